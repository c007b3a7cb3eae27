"""Tasks whose B are turned down where they all point, then merged, at the tasks' norm."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from lori_dist.adapter.adapter import Entries
from lori_dist.adapter.update import Part, Update
from lori_dist.merges import linear, ties, tsv
from lori_dist.merges._entries import trim
from lori_dist.merges._factors import singular, stacked
from lori_dist.merges._forms import values_dtype

Inner = Literal["task_arithmetic", "ties", "tsv"]


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    inner: Literal["task_arithmetic", "ties", "tsv"] = "task_arithmetic",
    density: Annotated[float, "(0, 1]"] = 1.0,
) -> list[Part]:
    """The tasks' B turned down where they all point, merged, and rescaled to the tasks' norm (Pico).

    [B_1 | .. | B_T] = U S V^T; c_j = S_j^2 / sum S^2; a_j = 1 / (1 + (T - 1) c_j); B_t becomes B_t + U diag(a - 1) U^T
    B_t. What `inner` makes of these has the form that `linear`, `ties` or `tsv` give, with a dense B; it is rescaled
    once, to the mean of the norms of the D_t, so that only the ratios of the weights count.
    updates: of one module, one per adapter; T counts those that keep entries in it. weights: one per adapter. density:
    of the entries of the new B_t, the share that stays, the largest.
    Depends on how an update is split into B and A, so it means most where the tasks share A.
    Raises as `inner` does.
    Source: Pico (arXiv 2604.16826); yixuantt/Pico, whose folder mode rescales every adapter instead.
    """
    methods: Mapping[Inner, Callable[..., list[Part]]] = {
        "task_arithmetic": linear.merge,
        "ties": lambda updates, weights: ties.merge(updates, weights=weights, density=1.0),
        "tsv": tsv.merge,
    }
    merged = methods[inner](_calibrated(updates, density), weights=weights)
    norms = [_norm(update.shape, update.kept) for update in updates if update.kept]
    norm = _norm(updates[0].shape, [part for part in merged if part.entries is not None])
    if norm == 0:
        return merged
    return [_scaled(part, sum(norms) / len(norms) / norm) for part in merged]


def _calibrated(updates: Sequence[Update], density: float) -> list[Update]:
    tasks = [update for update in updates if update.kept]
    if not tasks:
        return list(updates)
    u, s, _ = singular(torch.cat([part.b() for update in tasks for part in update.kept], dim=1))
    shares = s**2 / (s**2).sum()
    damping = 1 / (1 + (len(tasks) - 1) * shares) - 1

    def calibrated(part: Part) -> Part:
        if part.entries is None:
            return part
        b = part.b()
        return _with_b(part, trim(b + u * damping @ (u.t() @ b), density))

    return [dataclasses.replace(update, parts=tuple(map(calibrated, update.parts))) for update in updates]


def _with_b(part: Part, b: Tensor) -> Part:
    return dataclasses.replace(part, entries=Entries(index=None, values=b.flatten().to(values_dtype([part]))))


def _scaled(part: Part, factor: float) -> Part:
    if part.entries is None:
        return part
    values = part.entries.values
    scaled = (values.double() * factor).to(values_dtype([part]))
    return dataclasses.replace(part, entries=dataclasses.replace(part.entries, values=scaled))


def _norm(shape: tuple[int, int], parts: Sequence[Part]) -> float:
    """|sum of scale B A|, from the small products of the factors."""
    b, a = stacked(shape, parts)
    return float(((b.t() @ b) * (a @ a.t())).sum().clamp(min=0).sqrt())
