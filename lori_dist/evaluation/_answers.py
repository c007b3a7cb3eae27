"""The answers of models to requests: batches of rows that need little padding, divided among ranks.

A prompt that several responses follow is read once, and rows that are written enter and leave a batch one by one. Both
need a model that keeps what it has read as keys and values of each token; others read every row in full, and write the
rows of a batch until all have ended.

Every rank of a gang runs the model equally often, as each forward pass gathers what is sharded: a rank that has no
batch left runs one row once more.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lori_dist.adapter.routing import NOBODY, Routing
from lori_dist.adapter.row_tokens import rows_of
from lori_dist.evaluation._batches import Side, by_length, hides_padding, left_padded, without_settings
from lori_dist.evaluation._kept import keeps_rows, read, read_on
from lori_dist.evaluation._rows import Answer, Continuation, Likelihood, Request
from lori_dist.evaluation._writing import GREEDY, Group, Sampling, written
from lori_dist.training.data import IGNORED, Example, collate, pad_id
from lori_dist.training.device import put
from lori_dist.training.loss import log_likelihoods
from lori_dist.training.tokens import Ids
from lori_dist.training.world import World, from_first

Names = Sequence[str | None]
"""Adapters on the model; None: the base alone."""
BASE: Names = (None,)

T = TypeVar("T")
K = TypeVar("K")
R = TypeVar("R", Likelihood, Continuation)

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Reader:
    """A model that answers, on this process alone or on a gang whose ranks all call it alike."""

    model: PreTrainedModel
    """Model in evaluation mode, with its adapters if it has any."""
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    """Rows run at once, each with all models."""
    device: torch.device
    """Device of the model."""
    routing: Routing | None = None
    """The routing of rows to adapters; None without several adapters."""
    world: World | None = None
    """The gang; None: this process alone."""
    is_sharded: bool = False
    """Whether a forward pass is a collective."""
    sampling: Sampling = GREEDY
    _seen: dict[Side, tuple[int, bool]] = field(default_factory=dict)
    """Side of padding -> the longest row it was tested with, and whether the model hides it."""
    _keeps: bool | None = None
    """Whether rows can share what the model keeps of them; None: it was not tried."""

    @torch.no_grad()
    def answers(self, names: Names, requests: Sequence[Request]) -> dict[str | None, list[Answer]]:
        """Name -> answers, in the order of the requests, on every rank."""
        known: list[dict[Request, Answer]] = [{} for _ in names]
        likelihoods = list(dict.fromkeys(request for request in requests if isinstance(request, Likelihood)))
        shared = self._shared(likelihoods)
        alone = [request for request in likelihoods if request.prompt_ids not in shared]
        for (which, number), value in self.apart(names, alone).items():
            known[which][alone[number]] = value
        for (which, prompt, response), value in self._compared(names, shared).items():
            known[which][Likelihood(prompt, response)] = value
        continuations = list(dict.fromkeys(request for request in requests if isinstance(request, Continuation)))
        for texts in self.written([(names, continuations)]):
            for (which, number), text in zip(texts, texts.values(), strict=True):
                known[which][continuations[number]] = text
        return {name: [known[which][request] for request in requests] for which, name in enumerate(names)}

    @torch.no_grad()
    def apart(self, names: Names, requests: Sequence[Likelihood]) -> dict[tuple[int, int], float]:
        """(place of the name, place of the request) -> log-likelihood, each with a prompt of its own."""
        return self._answered(names, requests, self._read, "right")

    @torch.no_grad()
    def written(self, groups: Sequence[Group]) -> Iterator[dict[tuple[int, int], Ids]]:
        """Yields what the models of each group write: (place of the name, place of the request) -> text, group after
        group as they are complete, on every rank."""
        asked = [request for _, requests in groups for request in requests]
        if asked and self._keeps_rows([request.prompt_ids for request in asked]):
            with self._hooked():
                yield from written(self, groups)
            return
        for names, requests in groups:
            if not self.sampling.draws:
                yield self._answered(names, requests, self._generated, "left")
                continue
            texts = [self._answered([name], requests, self._generated, "left", batch_size=1) for name in names]
            yield {(which, number): text for which, of in enumerate(texts) for (_, number), text in of.items()}

    @contextlib.contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """Inside, whoever calls the model itself has all rows meet one adapter. A forward pass of what is sharded is a
        collective, so every rank is to call it alike."""
        self._meet((name,))
        with torch.no_grad():
            yield

    def _answered(
        self,
        names: Names,
        requests: Sequence[R],
        run: Callable[[Names, Sequence[R]], Sequence[T]],
        side: Side,
        *,
        batch_size: int | None = None,
    ) -> dict[tuple[int, int], T]:
        """(place of the name, place of the request) -> answer. run: answers a batch, names first."""
        if not requests:
            return {}
        self._meet(names[:1])
        own: dict[tuple[int, int], T] = {}
        lengths = [request.num_tokens for request in requests]
        is_padded = self._is_padded(requests, side)
        with self._hooked():
            for numbers, is_spare, _ in self._turns(lengths, batch_size or self.batch_size, is_padded=is_padded):
                answers = run(names, [requests[number] for number in numbers])
                if not is_spare:
                    places = [(which, number) for which in range(len(names)) for number in numbers]
                    own.update(zip(places, answers, strict=True))
        return self._of_all(own)

    def _turns(
        self, lengths: Sequence[int], batch_size: int, *, is_padded: bool
    ) -> Iterator[tuple[list[int], bool, list[list[int]]]]:
        """Yields, batch after batch of this rank, the numbers of its rows, whether it is run for the other ranks' sake
        alone, and the batches that all ranks have at that time."""
        rank, size = (0, 1) if self.world is None else (self.world.rank, self.world.size)
        # As many rows for each rank, rather than full batches for some.
        num_turns = max(1, -(-len(lengths) // (batch_size * size)))
        batches = list(by_length(lengths, max(1, -(-len(lengths) // (num_turns * size))), is_padded=is_padded))
        for first in range(0, len(batches), size):
            of_ranks = batches[first : first + size]
            if rank < len(of_ranks):
                yield of_ranks[rank], False, of_ranks
            elif self.is_sharded:
                yield batches[-1][:1], True, of_ranks

    def _of_all(self, own: dict[K, T]) -> dict[K, T]:
        """The answers of all ranks."""
        if self.world is None or self.world.size == 1:
            return own
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, own)
        return {place: answer for of_rank in everyone for place, answer in of_rank.items()}

    # --- what the model can do, the same on all ranks

    def _is_padded(self, requests: Sequence[Request], side: Side) -> bool:
        """Whether rows of different lengths may share a batch."""
        rows = [
            request.prompt_ids + (request.response_ids if isinstance(request, Likelihood) else ())
            for request in requests
        ]
        if self.batch_size == 1 or len({len(row) for row in rows}) == 1:
            return True
        longest = max(map(len, rows))
        checked, hides = self._seen.get(side, (0, True))
        if not hides or longest <= checked:
            return hides
        steps = max((request.max_new_tokens for request in requests if isinstance(request, Continuation)), default=0)
        hides = self._of_first(hides_padding(self.model, rows, self.pad, side, steps=steps))
        self._seen[side] = (longest, hides)
        return hides

    def _keeps_rows(self, rows: Sequence[Ids]) -> bool:
        """Whether rows can share what the model keeps of them."""
        seen = rows_of(self.model)
        if seen is not None and seen.choose:
            return False  # what a form chooses for a row is kept for the rows of the last prompts alone
        if self._keeps is None:
            self._meet((None if self.routing is None else self.routing.names[0],))
            with self._hooked():
                self._keeps = self._of_first(keeps_rows(self.model, rows, self.pad, self.device))
            if not self._keeps and (self.world is None or self.world.rank == 0):
                log.info(
                    "%s keeps no keys and values that rows could share: each label reads its prompt again, and the "
                    "rows of a batch are written until all have ended",
                    type(self.model).__name__,
                )
        return self._keeps

    def _of_first(self, own: bool) -> bool:
        """What rank 0 has found."""
        return own if self.world is None or self.world.size == 1 else from_first(self.world, lambda: own)

    @property
    def pad(self) -> int:
        return pad_id(self.tokenizer)

    @property
    def ends(self) -> list[int]:
        """The token that training ends responses with, and those that the base's own authors end them with."""
        settings = self.model.generation_config
        own = settings.eos_token_id if settings is not None else None
        return sorted({cast(int, self.tokenizer.eos_token_id), *([own] if isinstance(own, int) else own or [])})

    # --- responses to one prompt

    def _shared(self, requests: Sequence[Likelihood]) -> dict[Ids, list[Ids]]:
        """Prompt -> its responses, for prompts that are read once: those that are longer than what follows them."""
        found: dict[Ids, list[Ids]] = {}
        for request in requests:
            found.setdefault(request.prompt_ids, []).append(request.response_ids)
        found = {
            prompt: of for prompt, of in found.items() if len(of) > 1 and all(of) and len(prompt) >= max(map(len, of))
        }
        return found if found and self._keeps_rows(list(found)) else {}

    def _compared(self, names: Names, shared: Mapping[Ids, list[Ids]]) -> dict[tuple[int, Ids, Ids], float]:
        """(place of the name, prompt, response) -> log-likelihood."""
        prompts = list(shared)
        own: dict[tuple[int, Ids, Ids], float] = {}
        with self._hooked():
            for numbers, is_spare, of_ranks in self._turns(
                [len(prompt) for prompt in prompts], self.batch_size, is_padded=True
            ):
                batches = of_ranks if self.is_sharded else [numbers]
                num_passes = max(self._num_passes([shared[prompts[number]] for number in of]) for of in batches)
                values = self._of_prompts(names, {prompts[n]: shared[prompts[n]] for n in numbers}, num_passes)
                if not is_spare:
                    own.update(values)
        return self._of_all(own)

    def _num_passes(self, responses: Sequence[Sequence[Ids]]) -> int:
        """Forward passes of the responses to a batch of prompts: the first token of each needs none of its own."""
        return -(-sum(len(one) > 1 for of in responses for one in of) // self.batch_size)

    def _of_prompts(
        self, names: Names, shared: Mapping[Ids, list[Ids]], num_passes: int
    ) -> dict[tuple[int, Ids, Ids], float]:
        """Reads a batch of prompts, and then responses in as many forward passes."""
        prompts = list(shared)
        pairs = [(number, response) for number, prompt in enumerate(prompts) for response in shared[prompt]]
        size, count = len(prompts), len(names)
        self._meet(names, size)
        logits, kept = read(self.model, prompts * count, self.pad, self.device)
        rows, tokens = zip(
            *((which * size + number, of[0]) for which in range(count) for number, of in pairs), strict=True
        )
        firsts = logits.float().log_softmax(-1)[list(rows), list(tokens)].tolist()
        places = [(which, prompts[number], response) for which in range(count) for number, response in pairs]
        found = dict(zip(places, firsts, strict=True))
        longer = sorted((pair for pair in pairs if len(pair[1]) > 1), key=lambda pair: -len(pair[1]))
        for turn in range(num_passes):
            some = longer[turn * self.batch_size : (turn + 1) * self.batch_size]
            read_rows = some or [(0, (*pairs[0][1][:1], IGNORED))]  # for the other ranks' sake
            self._meet(names, len(read_rows))
            of_kept = kept.only([which * size + number for which in range(count) for number, _ in read_rows])
            logits, _ = read_on(self.model, of_kept, [response[:-1] for _, response in read_rows] * count, self.pad)
            longest = logits.shape[1]
            targets = [[*of[1:], *[IGNORED] * (longest + 1 - len(of))] for _, of in read_rows] * count
            losses = functional.cross_entropy(
                logits.float().flatten(0, 1),
                put(torch.tensor(targets), self.device).flatten(),
                ignore_index=IGNORED,
                reduction="none",
            )
            values = losses.view(-1, longest).sum(1).tolist()
            for place, value in zip(
                [(which, prompts[number], response) for which in range(count) for number, response in some],
                values,
                strict=bool(some),
            ):
                found[place] -= value
        return found

    # --- one batch: rows of the first name, then those of the second, ...

    def _read(self, names: Names, requests: Sequence[Likelihood]) -> list[float]:
        examples = [
            Example(prompt="", response="", prompt_ids=request.prompt_ids, response_ids=request.response_ids)
            for request in requests
        ] * len(names)
        self._meet(names, len(requests))
        return [float(value) for value in log_likelihoods(self.model, collate(examples, self.pad).to(self.device))]

    def _generated(self, names: Names, requests: Sequence[Continuation]) -> list[Ids]:
        input_ids, attention_mask = left_padded([request.prompt_ids for request in requests] * len(names), self.pad)
        self._meet(names, len(requests))
        ends, draws = self.ends, self.sampling.draws
        # Of the settings left out here, each has its neutral value.
        settings = GenerationConfig(
            do_sample=draws,
            num_beams=1,
            use_cache=True,
            eos_token_id=ends,
            pad_token_id=self.pad,
            max_new_tokens=max(request.max_new_tokens for request in requests),
            **({"temperature": self.sampling.temperature, "top_p": self.sampling.top_p, "top_k": 0} if draws else {}),
        )
        with without_settings(self.model), self._drawing(requests[0].prompt_ids):
            output = self.model.generate(
                input_ids=put(input_ids, self.device),
                attention_mask=put(attention_mask, self.device),
                generation_config=settings,
                synced_gpus=self.is_sharded and self.world is not None and self.world.size > 1,
            )
        written = cast(list[list[int]], output[:, input_ids.shape[1] :].tolist())
        limits = [request.max_new_tokens for request in requests] * len(names)
        return [_until(tokens[:limit], ends) for tokens, limit in zip(written, limits, strict=True)]

    @contextlib.contextmanager
    def _drawing(self, prompt: Ids) -> Iterator[None]:
        """Random numbers of their own for one row."""
        if not self.sampling.draws:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(self.sampling.random(prompt, 0) * 2**48))
            yield

    # --- routing

    def meet_rows(self, names: Names) -> None:
        """Routes the next batch: the name of each row."""
        if self.routing is not None:
            self.routing.begin([self._number(name) for name in names])

    def in_order(self, items: Iterable[T], name_of: Callable[[T], str | None]) -> list[T]:
        """Items of one adapter beside each other, as rows are fastest."""
        return sorted(items, key=lambda item: self._number(name_of(item)))

    def _number(self, name: str | None) -> int:
        return NOBODY if name is None or self.routing is None else self.routing.names.index(name)

    def _meet(self, names: Names, num_rows: int = 1) -> None:
        """Routes the rows of the next batch: as many rows for each name, one name after the other."""
        if self.routing is None:
            return
        if len(names) == 1:
            self.routing.only(names[0])
            return
        self.routing.begin([self._number(name) for name in names for _ in range(num_rows)])

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        """Tells the routing how many tokens each forward pass has, as some layers see tokens and no rows. And gives the
        output layer the last token's states in one piece: on a CPU torch would copy its weight for each row of a slice.
        """

        def count(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
            if self.routing is not None and (ids := kwargs.get("input_ids")) is not None:
                self.routing.num_tokens = ids.numel()

        def in_one_piece(module: Any, args: Any) -> Any:
            return (args[0].contiguous(), *args[1:]) if args else None

        handles = [self.model.register_forward_pre_hook(count, with_kwargs=True, prepend=True)]
        if (output := self.model.get_output_embeddings()) is not None:
            handles.append(output.register_forward_pre_hook(in_one_piece))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _until(tokens: Sequence[int], ends: Sequence[int]) -> Ids:
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:end])
