"""Gradients of several tasks from one backward pass over rows of all of them.

The rows of a batch do not meet in a transformer, so a task's gradient is what its rows add to the sum that a weight's
gradient is. Source: Ortho-LoRA (arXiv 2601.09684), section 3, for what they are needed; the one pass is our own.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lori_dist.errors import AdapterError

Segments = tuple[tuple[int, slice], ...]
"""The tasks that have tokens in a batch, each with where these are."""


@dataclass(kw_only=True, slots=True)
class PerTask:
    """Knows which rows a batch has, and gets each task's gradient from every adapted layer's backward pass.

    While a model has one, its backward pass gives trained parameters no gradient: what they get is made of these.
    """

    num_tasks: int
    segments: Segments = ()
    """Segments of the batch that is being computed."""
    num_tokens: int = 0
    """Tokens of the batch that is being computed, padding included."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Name of a trained parameter -> (num_tasks, entries): the sum over all batches since `clear`, of this process."""

    def begin(self, of_tokens: Sequence[tuple[int, int]]) -> None:
        """A batch is to run. of_tokens: (task, tokens that follow each other), row by row; tasks from 0, ascending."""
        tasks = [task for task, _ in of_tokens]
        if tasks != sorted(tasks):
            raise AdapterError(f"tasks: got {tasks}; rows of a task must follow each other, in order")
        counts = [
            (task, sum(count for _, count in spans))
            for task, spans in itertools.groupby(of_tokens, key=lambda span: span[0])
        ]
        self.segments, self.num_tokens = _segments(counts)

    @property
    def num_owners(self) -> int:
        return self.num_tasks

    def of_tokens(self, module: str, x: Tensor) -> Tensor:
        """The task of each token in the input of a layer, (tokens,), int64."""
        segments = self.of(module, x.numel() // x.shape[-1])
        counts = [tokens.stop - tokens.start for _, tokens in segments]
        numbers = torch.tensor([task for task, _ in segments], device=x.device)
        return numbers.repeat_interleave(torch.tensor(counts, device=x.device))

    @contextlib.contextmanager
    def within(self, counts: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Inside, layers see so many tokens of each task, (task, tokens), one after the other."""
        before = self.segments, self.num_tokens
        self.segments, self.num_tokens = _segments(counts)
        try:
            yield
        finally:
            self.segments, self.num_tokens = before

    def of(self, module: str, num_tokens: int) -> Segments:
        """The places of each task's tokens in the input of a layer, flattened to (tokens, features).

        Raises AdapterError where a layer does not see every token of the batch.
        """
        if not self.num_tokens:  # no batch of a step runs
            return ((0, slice(0, num_tokens)),)
        if num_tokens != self.num_tokens:
            raise AdapterError(
                f"{module}: sees {num_tokens} of the batch's {self.num_tokens} tokens, so the tasks' gradients cannot "
                "be distinguished there; remove it from adapter.targets"
            )
        return self.segments

    def sum_of(self, name: str, like: Tensor) -> Tensor:
        """(num_tasks, entries of `like`), to be added to."""
        if name not in self.sums:
            self.sums[name] = like.new_zeros(self.num_tasks, like.numel())
        return self.sums[name]

    def clear(self) -> None:
        """After a step: what runs until the next one `begin`s is of no task."""
        self.segments, self.num_tokens = (), 0
        for tensor in self.sums.values():
            tensor.zero_()


A = "A"
"""The name of a trained A among a layer's tensors, where these are LoRI's; the kept entries of B have an empty one."""


def of_tensor(module: str, tensor: str) -> str:
    """The name of one of a layer's tensors among all that is trained."""
    return f"{module}:{tensor}" if tensor else module


def _segments(counts: Sequence[tuple[int, int]]) -> tuple[Segments, int]:
    """The places of (task, tokens) that follow each other, and their sum."""
    ends = list(itertools.accumulate((count for _, count in counts), initial=0))
    pairs = zip(counts, itertools.pairwise(ends), strict=True)
    return tuple((task, slice(*edges)) for (task, count), edges in pairs if count), ends[-1]


def of_a(module: str) -> str:
    """The name of a module's trained A among trained parameters; its kept entries of B have the module's own."""
    return of_tensor(module, A)


def is_a(name: str) -> bool:
    return tensor_of(name) == A


def module_of(name: str) -> str:
    """The module of a trained tensor."""
    return name.partition(":")[0]


def tensor_of(name: str) -> str:
    """The name of a trained tensor in its layer."""
    return name.partition(":")[2]
