"""Texts that models write. Rows of all models and tasks share a batch, which each enters and leaves by itself."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lori_dist.evaluation._kept import Kept, read, read_on
from lori_dist.evaluation._rows import Continuation
from lori_dist.training.tokens import Ids

if TYPE_CHECKING:
    from lori_dist.evaluation._answers import Names, Reader

FREE = 1 / 4
"""Share of a batch's places that are free before rows enter: their prompts are a forward pass of their own."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: the likeliest one, or, with a temperature above 0, one that is drawn. What is drawn
    follows from the prompt, the model and the seed."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Draw from the likeliest tokens only, those that have this much of the probability together."""
    seed: int = 0

    @property
    def draws(self) -> bool:
        return self.temperature > 0

    def random(self, prompt: Ids, step: int) -> float:
        """A number of [0, 1) for a token of a row."""
        digest = hashlib.blake2b(repr((self.seed, tuple(prompt), step)).encode(), digest_size=6)
        return float(int.from_bytes(digest.digest(), "little") / 2**48)

    def choose(self, logits: Tensor, rows: Sequence[tuple[Ids, int]]) -> list[int]:
        """The next token of each row. logits: (rows, vocabulary). rows: prompt, and how many tokens were written."""
        if not self.draws:
            return [int(token) for token in logits.argmax(-1).tolist()]
        scaled = logits.double() / self.temperature
        p, tokens = scaled.softmax(-1).sort(descending=True, stable=True)
        p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0.0)
        sums = p.cumsum(-1)
        drawn = torch.tensor([[self.random(*row)] for row in rows], dtype=sums.dtype, device=sums.device)
        places = (sums <= drawn * sums[:, -1:]).sum(-1, keepdim=True)
        return [int(token) for token in tokens.gather(1, places.clamp(max=p.shape[1] - 1))[:, 0].tolist()]


GREEDY = Sampling()

Group = tuple["Names", Sequence[Continuation]]
"""Models and what each is asked, such as the rows of one task."""
Texts = dict[tuple[int, int], Ids]
"""(place of the name, place of the request) -> what was written."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Row:
    """What one model writes after one prompt."""

    group: int
    place: tuple[int, int]
    name: str | None
    request: Continuation
    written: list[int] = field(default_factory=list)

    def adds(self, token: int, ends: frozenset[int]) -> bool:
        """Whether the row continues after a token."""
        if token in ends:
            return False
        self.written.append(token)
        return len(self.written) < self.request.max_new_tokens


class Writer:
    """The rows of this rank: those that wait, in their order, and those that are in the batch."""

    def __init__(self, reader: "Reader", groups: Sequence[Group]) -> None:
        self.reader, self.groups, self.ends = reader, groups, frozenset(reader.ends)
        rank, size = (0, 1) if reader.world is None else (reader.world.rank, reader.world.size)
        self.waiting = [row for number, group in enumerate(groups) for row in self._rows(number, group, rank, size)]
        self.waiting.reverse()  # the next is at the end
        self.left = [sum(row.group == number for row in self.waiting) for number in range(len(groups))]
        self.texts: list[Texts] = [{} for _ in groups]
        self.active: list[_Row] = []
        self.kept: Kept | None = None
        self.room = reader.batch_size * max(len(names) for names, _ in groups)

    def _rows(self, number: int, group: Group, rank: int, size: int) -> Iterator[_Row]:
        """This rank's rows of a group, longest prompts first."""
        names, requests = group
        order = sorted(range(len(requests)), key=lambda place: -requests[place].num_tokens)
        for place in order[rank::size]:
            for which, name in enumerate(names):
                yield _Row(group=number, place=(which, place), name=name, request=requests[place])

    @property
    def is_done(self) -> bool:
        return not self.active and not self.waiting

    @property
    def num_complete(self) -> int:
        """How many groups, from the first on, have all their rows of this rank."""
        return next((number for number, left in enumerate(self.left) if left), len(self.left))

    def forward(self) -> None:
        """Runs the model once: rows enter, or those in the batch get a token each."""
        reader = self.reader
        free = self.room - len(self.active)
        if self.is_done:  # other ranks' rows are not
            reader.meet_rows([self.groups[0][0][0]])
            read(reader.model, [[reader.pad]], reader.pad, reader.device)
        elif self.waiting and (not self.active or free >= max(1, FREE * self.room)):
            count = min(free, len(self.waiting))
            rows = reader.in_order([self.waiting.pop() for _ in range(count)], lambda row: row.name)
            reader.meet_rows([row.name for row in rows])
            logits, kept = read(reader.model, [row.request.prompt_ids for row in rows], reader.pad, reader.device)
            self._add(rows, logits, kept, self.active, self.kept)
        else:
            assert self.kept is not None
            reader.meet_rows([row.name for row in self.active])
            last = [row.written[-1:] for row in self.active]
            logits, kept = read_on(reader.model, self.kept, last, reader.pad)
            self._add(self.active, logits[:, -1], kept, [], None)

    def _add(self, rows: list[_Row], logits: Tensor, kept: Kept, others: list[_Row], of_others: Kept | None) -> None:
        """Gives rows their next token; those that continue join the others in the batch."""
        tokens = self.reader.sampling.choose(logits, [(row.request.prompt_ids, len(row.written)) for row in rows])
        staying = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if row.adds(token, self.ends):
                staying.append(place)
            else:
                self.texts[row.group][row.place] = tuple(row.written)
                self.left[row.group] -= 1
        self.active, self.kept = [rows[place] for place in staying], kept.only(staying) if staying else None
        if others and staying:
            assert self.kept is not None and of_others is not None
            together = [*others, *self.active]
            order = self.reader.in_order(range(len(together)), lambda place: together[place].name)
            self.active = [together[place] for place in order]
            self.kept = of_others.with_rows(self.kept).only(order)
        elif others:
            self.active, self.kept = others, of_others


def written(reader: "Reader", groups: Sequence[Group]) -> Iterator[Texts]:
    """Yields what the models of each group write, group after group, on all ranks, as soon as one is complete. Rows of
    the next groups enter the batch meanwhile."""
    if not groups:
        return
    writer, done = Writer(reader, groups), 0
    together = reader.is_sharded and reader.world is not None and reader.world.size > 1
    while done < len(groups):
        complete = writer.num_complete
        if together:
            # Each forward pass is a collective, and so is handing on a group: all ranks do the same.
            assert reader.world is not None
            least = torch.tensor([complete], device=reader.world.device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            complete = int(least)
        while done < complete:
            yield _gathered(reader, writer.texts[done])
            done += 1
        if done < len(groups):
            writer.forward()


def _gathered(reader: "Reader", own: Texts) -> Texts:
    if reader.world is None or reader.world.size == 1:
        return own
    everyone: list[Any] = [None] * reader.world.size
    dist.all_gather_object(everyone, own)
    return {place: text for of_rank in everyone for place, text in of_rank.items()}
