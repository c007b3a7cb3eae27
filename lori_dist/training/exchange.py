"""Tasks' gradients summed over ranks with as little sent as a projection allows, which needs each of them whole.

A rank gets the sums of the entries it holds of what is trained, and nothing else of the tasks' gradients: a
reduce-scatter. Of ranks that hold the same entries, each gets a part of them, and they tell each other the one gradient
that is made in the end: an all-gather of one gradient instead of as many as there are tasks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lori_dist.training.engine import Part
from lori_dist.training.world import World

ROUND = 2**24
"""Entries, of all tasks and for all ranks, that are sent at once: 64 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Entries of a trained tensor that follow each other."""

    name: str
    start: int
    numel: int


class Exchange:
    """Reduces and gathers tensors of which each rank holds the part that it held at the start."""

    def __init__(self, parts: Mapping[str, Part], num_tasks: int, world: World) -> None:
        """A collective. parts: of this rank."""
        self.world, self.num_tasks = world, num_tasks
        self.sent_bytes = 0
        """Bytes of the whole tensors that were reduced or gathered in the last exchange."""
        self.held = [Piece(name=name, start=part.start, numel=part.data.numel()) for name, part in parts.items()]
        everyone: list[list[Piece]] = [[]] * world.size
        dist.all_gather_object(everyone, self.held)
        copies = [[rank for rank in range(world.size) if everyone[rank] == held] for held in everyone]
        self.copies = copies[world.rank]
        """Ranks that hold what this one holds."""
        self.group = _group(copies, world)
        owned = [
            _share(held, same.index(rank), len(same))
            for rank, (held, same) in enumerate(zip(everyone, copies, strict=True))
        ]
        self.sizes = [sum(piece.numel for piece in pieces) for pieces in owned]
        rounds = [list(_rounds(pieces, max(1, ROUND // (num_tasks * world.size)))) for pieces in owned]
        self.rounds = [
            [of_rank[number] if number < len(of_rank) else [] for of_rank in rounds]
            for number in range(max(map(len, rounds)))
        ]
        """The parts that every rank receives in each round."""

    def reduce(self, sums: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Sums over ranks of this rank's share: names, each with (tasks, entries). A collective.

        sums: name -> (tasks, entries of the whole tensor), this rank's. One that is missing counts as zero.
        """
        self.sent_bytes = 0
        if self.world.size == 1:
            nothing = torch.zeros(self.num_tasks, 1, device=self.world.device)
            return [(piece.name, sums.get(piece.name, nothing.expand(-1, piece.numel))) for piece in self.held]
        return [found for pieces in self.rounds for found in self._round(sums, pieces)]

    def _round(self, sums: Mapping[str, Tensor], pieces: Sequence[Sequence[Piece]]) -> Iterator[tuple[str, Tensor]]:
        sizes = [sum(piece.numel for piece in of_rank) for of_rank in pieces]
        send = torch.zeros(self.world.size, self.num_tasks, max(sizes), device=self.world.device)
        for row, of_rank, size in zip(send, pieces, sizes, strict=True):
            for piece, into in zip(of_rank, row[:, :size].split([p.numel for p in of_rank], dim=1), strict=True):
                if piece.name in sums:
                    into.copy_(sums[piece.name][:, piece.start : piece.start + piece.numel])
        received = torch.empty_like(send[0])
        dist.reduce_scatter(received, list(send))
        self.sent_bytes += send.nbytes
        own = pieces[self.world.rank]
        split = received[:, : sizes[self.world.rank]].split([piece.numel for piece in own], dim=1)
        yield from ((piece.name, found) for piece, found in zip(own, split, strict=True))

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of a symmetric (..., T, T), in place. A collective."""
        if self.world.size > 1:
            rows, columns = torch.triu_indices(self.num_tasks, self.num_tasks).unbind()
            half = tensor[..., rows, columns].contiguous()
            dist.all_reduce(half)
            self.sent_bytes += half.nbytes
            tensor[..., rows, columns] = half
            tensor[..., columns, rows] = half
        return tensor

    def share(self, own: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Name -> what this rank holds of a gradient, flat. A collective.

        own: what `reduce` gave, the tasks made into one: (entries,) each.
        """
        flat = torch.cat([gradient for _, gradient in own]) if own else torch.zeros(0, device=self.world.device)
        if len(self.copies) > 1:
            sizes = [self.sizes[rank] for rank in self.copies]
            padded = flat.new_zeros(max(sizes))
            padded[: len(flat)] = flat
            gathered = flat.new_empty(len(sizes), max(sizes))
            dist.all_gather(list(gathered), padded, group=self.group)
            self.sent_bytes += gathered.nbytes
            flat = torch.cat([row[:size] for row, size in zip(gathered, sizes, strict=True)])
        found = flat.split([piece.numel for piece in self.held])
        return {piece.name: gradient for piece, gradient in zip(self.held, found, strict=True)}


def _group(copies: Sequence[Sequence[int]], world: World) -> dist.ProcessGroup | None:
    """The group of ranks that hold the same parts. None stands for all ranks, or for no group."""
    sets = [list(same) for same in dict.fromkeys(map(tuple, copies))]
    if len(sets) in (1, world.size):
        return None
    group, _ = dist.new_subgroups_by_enumeration(sets)
    return group


def _share(pieces: Sequence[Piece], number: int, count: int) -> list[Piece]:
    """One of `count` nearly equal shares of pieces laid side by side."""
    total = sum(piece.numel for piece in pieces)
    first, last = total * number // count, total * (number + 1) // count
    share, position = [], 0
    for piece in pieces:
        begin, end = max(first - position, 0), min(last - position, piece.numel)
        if begin < end:
            share.append(Piece(name=piece.name, start=piece.start + begin, numel=end - begin))
        position += piece.numel
    return share


def _rounds(pieces: Sequence[Piece], most: int) -> Iterator[list[Piece]]:
    """At most so many entries each."""
    total = sum(piece.numel for piece in pieces)
    count = -(-total // most)
    yield from (_share(pieces, number, count) for number in range(count))
