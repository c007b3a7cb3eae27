"""Ranks as experts, of which a router chooses some for each token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from lori_dist.errors import ConfigError
from lori_dist.forms import Choosing, Entry, Site, Tensors, pair, refuse_above_rank
from lori_dist.forms._counts import evened

DEPENDENT: dict[str, list[str]] = {}
AT_MOST_RANK = ("active",)
COUNTS = "bias"


@dataclass(frozen=True, kw_only=True, slots=True)
class Smora:
    """scale * B (h A x), where h is zero but for the `active` largest gates, which sum to `active`."""

    rank: int
    active: int
    partition: int
    bias: float
    scale: float
    trains_a: bool

    def entries(self, site: Site) -> Mapping[str, Entry]:
        found = {
            **pair(site, self.rank, trains_a=self.trains_a),
            "router": Entry(shape=(self.rank // self.partition, site.in_features), start="uniform"),
        }
        if self.bias:
            found["bias"] = Entry(shape=(self.rank,), trained=False, counted=True)
        return found

    def choose(self, t: Tensors, x: Tensor) -> Mapping[str, Tensor]:
        logits = (x @ t["router"].to(x.dtype).t()).to(torch.promote_types(x.dtype, torch.float32))
        routed = torch.sigmoid(logits).repeat_interleave(self.partition, dim=-1)
        if self.bias:
            routed = routed + t["bias"]
        gates, ranks = routed.topk(self.active, dim=-1)
        return {"ranks": ranks, "gates": self.active * gates / gates.sum(-1, keepdim=True)}

    def update(self, t: Tensors, x: Tensor, chosen: Mapping[str, Tensor]) -> Tensor:
        reduced, ranks = x @ t["a"].to(x.dtype).t(), chosen["ranks"]
        kept = torch.zeros_like(reduced).scatter(-1, ranks, chosen["gates"].to(x.dtype) * reduced.gather(-1, ranks))
        return self.scale * (kept @ t["b"].to(x.dtype).t())

    def after_step(self, t: Tensors, counts: Tensor) -> Mapping[str, Tensor]:
        return {"bias": evened(t["bias"], counts, self.bias)}


def form(
    *,
    rank: int,
    alpha: float,
    trains_a: bool,
    active: Annotated[int, "[1, inf)"] | None = None,
    partition: Annotated[int, "[1, inf)"] = 1,
    bias: Annotated[float, "[0, inf)"] = 1e-5,
) -> Choosing:
    """A router takes some of the ranks for each token and weighs them (SMoRA): it cannot be folded, exported or merged.

    active: ranks of a token; by default an eighth of all. partition: ranks that have one gate together, a divisor of
    the rank. bias: how much the gate of a rank rises after each step that took it less often than the mean rank, or
    falls after one that took it more often; 0 for none. All tokens of the step count, of all processes, but padding.
    The scale is alpha / active, and a token's gates sum to active. Raises ConfigError for numbers that do not fit the
    rank.
    Source: SMoRA (arXiv 2501.15103) and StyxXuan/smora, which trains A (`adapter.projection: trained`). A frozen A and
    the mask of B are ours.
    """
    number = max(1, rank // 8) if active is None else active
    refuse_above_rank(rank, active=number)
    if rank % partition:
        raise ConfigError(f"adapter.form.partition: got {partition}, and adapter.rank is {rank}; give a divisor of it")
    return Smora(rank=rank, active=number, partition=partition, bias=bias, scale=alpha / number, trains_a=trains_a)
