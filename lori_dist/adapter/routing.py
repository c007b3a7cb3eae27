"""The adapter of each row of a batch, for a model that has several, and the gradients of the backward pass."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lori_dist.errors import AdapterError
from lori_dist.plugin import nearest

NOBODY = -1
"""The number of no adapter: the base alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Tokens that follow each other and meet the same adapter."""

    adapter: int
    tokens: slice


@dataclass(kw_only=True, slots=True)
class Routing:
    """The adapter of each row of the batch that is being computed, and the gradients that its rows gave."""

    names: tuple[str, ...]
    """Names of the adapters."""
    collects: bool = False
    """Whether layers add gradients to `sums` and give parameters none, so that no engine reduces them. Else every
    parameter has a gradient after a backward pass, zero where the batch has no rows of its adapter, so that all ranks
    reduce the same ones."""
    rows_of: tuple[tuple[int, int], ...] = ()
    """(adapter, rows that follow each other), or tokens, in the batch's order."""
    num_tokens: int | None = None
    """Tokens of the batch, padding included, if all layers see as many."""
    only_one: int | None = None
    """The adapter that all rows meet, however many there are."""
    inside: tuple[tuple[int, int], ...] | None = None
    """(adapter, tokens that follow each other), where a layer sees tokens in an order of its own."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """`name_of(tensor, adapter)` -> (1, entries): gradients of the step, summed, of this process."""

    @property
    def num_owners(self) -> int:
        return len(self.names)

    def begin(self, of_rows: Sequence[int], length: int | None = None) -> None:
        """A batch is to run. of_rows: number of each row's adapter. length: tokens of a row.

        As many rows of each adapter, one adapter after the other, are fastest.
        """
        self.rows_of = tuple((number, len([*rows])) for number, rows in itertools.groupby(of_rows))
        self.num_tokens, self.only_one = None if length is None else len(of_rows) * length, None

    def begin_tokens(self, of_tokens: Sequence[tuple[int, int]]) -> None:
        """A batch is to run. of_tokens: (adapter, tokens that follow each other), row by row."""
        self.rows_of = tuple(
            (number, sum(count for _, count in spans))
            for number, spans in itertools.groupby(of_tokens, key=lambda span: span[0])
        )
        self.num_tokens, self.only_one = sum(count for _, count in of_tokens), None

    @contextlib.contextmanager
    def rows(self, adapters: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of what the model is given meets adapters[i]; None: the base alone.

        Raises AdapterError for a name that no adapter has.
        """
        numbers: dict[str | None, int] = {None: NOBODY}
        numbers |= {name: number for number, name in enumerate(self.names)}
        unknown = next((name for name in adapters if name not in numbers), None)
        if unknown is not None:
            known = ", ".join(self.names)
            raise AdapterError(
                f"rows: unknown adapter {unknown!r}; there are {known}.{nearest(str(unknown), self.names)}"
            )
        before = self.rows_of, self.num_tokens, self.only_one
        self.begin([numbers[name] for name in adapters])
        try:
            yield
        finally:
            self.rows_of, self.num_tokens, self.only_one = before

    def only(self, adapter: str | None) -> None:
        """Routes all rows to one adapter from now on, or to the base alone, however many rows there are."""
        self.only_one = NOBODY if adapter is None else self.names.index(adapter)

    def segments(self, module: str, x: Tensor) -> tuple[Segment, ...]:
        """The places of each adapter's tokens in the input of a layer, flattened to (tokens, features).

        Raises AdapterError for a layer that does not see the rows as they are.
        """
        num_tokens = x.numel() // x.shape[-1]
        if self.only_one is not None:
            return (Segment(adapter=self.only_one, tokens=slice(0, num_tokens)),)
        counts, factor = self.rows_of, 1
        if self.inside is not None:
            counts = self.inside
        else:
            num_rows = sum(count for _, count in counts)
            if not num_rows or (x.shape[0] != num_rows and num_tokens != self.num_tokens):
                found = f"an input of shape {tuple(x.shape)} for {num_rows} rows"
                raise AdapterError(
                    f"{module}: has {found}, so they cannot be distinguished; remove it from the targets"
                )
            factor = num_tokens // num_rows
        ends = list(itertools.accumulate((count * factor for _, count in counts), initial=0))
        pairs = zip(counts, itertools.pairwise(ends), strict=True)
        return tuple(
            Segment(adapter=number, tokens=slice(*edges)) for (number, _), edges in pairs if edges[0] < edges[1]
        )

    def of_tokens(self, module: str, x: Tensor) -> Tensor:
        """The number of each token's adapter in the input of experts, (tokens, features), row by row: (tokens,)."""
        num_rows = sum(count for _, count in self.rows_of)
        if self.only_one is None and num_rows and len(x) % num_rows == 0:
            x = x.view(num_rows, -1, x.shape[-1])
        segments = self.segments(module, x)
        counts = [segment.tokens.stop - segment.tokens.start for segment in segments]
        numbers = torch.tensor([segment.adapter for segment in segments], device=x.device)
        return numbers.repeat_interleave(torch.tensor(counts, device=x.device))

    @contextlib.contextmanager
    def within(self, counts: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Inside, layers see so many tokens of each adapter, (adapter, tokens), one after the other."""
        before, self.inside = self.inside, tuple(counts)
        try:
            yield
        finally:
            self.inside = before

    def sum_of(self, name: str, size: int, device: torch.device) -> Tensor:
        """(size,), to be added to."""
        if name not in self.sums:
            self.sums[name] = torch.zeros(1, size, device=device)
        return self.sums[name][0]


def name_of(tensor: str, adapter: str) -> str:
    """The name of a trained tensor of one adapter of several; with an empty name, of the only one."""
    return f"{tensor}@{adapter}" if adapter else tensor


def adapter_of(name: str) -> str:
    """The adapter of a trained tensor; nothing where there is one adapter only."""
    return name.partition("@")[2]


def module_of(name: str) -> str:
    """The name that a trained tensor has where there is one adapter only."""
    return name.partition("@")[0]
