"""Ranks as experts, of which each token takes those that its own A x makes large, without a router."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from lori_dist.forms import Choosing, Entry, Site, Tensors, pair, refuse_above_rank
from lori_dist.forms._counts import evened

DEPENDENT: dict[str, list[str]] = {}
AT_MOST_RANK = ("active",)
COUNTS = "bias"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fly:
    """scale * B (A x, zero but where A x + bias is among its `active` largest)."""

    rank: int
    active: int
    bias: float
    scale: float
    trains_a: bool

    def entries(self, site: Site) -> Mapping[str, Entry]:
        found = pair(site, self.rank, trains_a=self.trains_a)
        if self.bias:
            found["bias"] = Entry(shape=(self.rank,), trained=False, counted=True)
        return found

    def choose(self, t: Tensors, x: Tensor) -> Mapping[str, Tensor]:
        reduced = x @ t["a"].to(x.dtype).t()
        score = reduced.detach() + t["bias"].to(x.dtype) if self.bias else reduced.detach()
        return {"ranks": score.abs().topk(self.active, dim=-1).indices, "reduced": reduced}

    def update(self, t: Tensors, x: Tensor, chosen: Mapping[str, Tensor]) -> Tensor:
        reduced, ranks = chosen["reduced"], chosen["ranks"]
        kept = torch.zeros_like(reduced).scatter(-1, ranks, reduced.gather(-1, ranks))
        return self.scale * (kept @ t["b"].to(x.dtype).t())

    def after_step(self, t: Tensors, counts: Tensor) -> Mapping[str, Tensor]:
        return {"bias": evened(t["bias"], counts, self.bias)}


def form(
    *,
    rank: int,
    alpha: float,
    trains_a: bool,
    active: Annotated[int, "[1, inf)"] | None = None,
    bias: Annotated[float, "[0, inf)"] = 1e-3,
) -> Choosing:
    """Of A x, each token keeps the entries of largest magnitude (FlyLoRA): it cannot be folded, exported or merged.

    active: how many, at most the rank; by default a quarter of it. bias: entries are chosen by |A x + d|, where d
    rises by so much for an entry after each step that took it less often than the mean, and falls after one that took
    it more often; 0 for none. All tokens of the step count, of all processes, but padding.
    Raises ConfigError for more entries than the rank.
    Source: FlyLoRA (arXiv 2510.08396) and gfyddha/FlyLoRA, whose A is sparse and normal: here A is LoRI's. The mask of
    B is ours, and that the bias moves once in each step, whatever the number of micro-batches.
    """
    number = max(1, rank // 4) if active is None else active
    refuse_above_rank(rank, active=number)
    return Fly(
        rank=rank,
        active=number,
        bias=bias,
        scale=alpha / rank,
        trains_a=trains_a,
    )
