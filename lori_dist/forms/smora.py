"""Ranks as experts, of which a router chooses some for each token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from lori_dist.errors import ConfigError
from lori_dist.forms import DependentForm, Entry, Site, Tensors, pair

DEPENDENT: dict[str, list[str]] = {}
AT_MOST_RANK = ("active",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Smora:
    """scale * B (h A x), where h is zero but for the `active` largest gates, which sum to `active`."""

    rank: int
    active: int
    partition: int
    scale: float
    trains_a: bool

    def entries(self, site: Site) -> Mapping[str, Entry]:
        return {
            **pair(site, self.rank, trains_a=self.trains_a),
            "router": Entry(shape=(self.rank // self.partition, site.in_features), start="uniform"),
        }

    def update(self, t: Tensors, x: Tensor) -> Tensor:
        routed = torch.sigmoid((x @ t["router"].to(x.dtype).t()).float())
        gates, chosen = routed.repeat_interleave(self.partition, dim=-1).topk(self.active, dim=-1)
        gates = self.active * gates / gates.sum(-1, keepdim=True)
        reduced = x @ t["a"].to(x.dtype).t()
        kept = torch.zeros_like(reduced).scatter(-1, chosen, gates.to(x.dtype) * reduced.gather(-1, chosen))
        return self.scale * (kept @ t["b"].to(x.dtype).t())


def form(
    *,
    rank: int,
    alpha: float,
    trains_a: bool,
    active: Annotated[int, "[1, inf)"] | None = None,
    partition: Annotated[int, "[1, inf)"] = 1,
) -> DependentForm:
    """A router takes some of the ranks for each token and weighs them (SMoRA): it cannot be folded, exported or merged.

    active: ranks of a token; by default an eighth of all. partition: ranks that have one gate together, a divisor of
    the rank. The scale is alpha / active, and a token's gates sum to active. Raises ConfigError for numbers that do not
    fit the rank.
    Source: SMoRA (arXiv 2501.15103) and StyxXuan/smora, which trains A (`adapter.projection: trained`), and adds a bias
    to the gates, which is not a parameter, to even out how often ranks are taken: there is none here. A frozen A and
    the mask of B are ours.
    """
    number = max(1, rank // 8) if active is None else active
    if number > rank:
        raise ConfigError(f"adapter.form.active: got {number}, and adapter.rank is {rank}; give at most that")
    if rank % partition:
        raise ConfigError(f"adapter.form.partition: got {partition}, and adapter.rank is {rank}; give a divisor of it")
    return Smora(rank=rank, active=number, partition=partition, scale=alpha / number, trains_a=trains_a)
