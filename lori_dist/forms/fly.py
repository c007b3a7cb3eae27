"""Ranks as experts, of which each token takes those that its own A x makes large, without a router."""

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
class Fly:
    """scale * B (A x, but for its `active` largest entries zero)."""

    rank: int
    active: int
    scale: float
    trains_a: bool

    def entries(self, site: Site) -> Mapping[str, Entry]:
        return pair(site, self.rank, trains_a=self.trains_a)

    def update(self, t: Tensors, x: Tensor) -> Tensor:
        reduced = x @ t["a"].to(x.dtype).t()
        chosen = reduced.detach().abs().topk(self.active, dim=-1).indices
        kept = torch.zeros_like(reduced).scatter(-1, chosen, reduced.gather(-1, chosen))
        return self.scale * (kept @ t["b"].to(x.dtype).t())


def form(*, rank: int, alpha: float, trains_a: bool, active: Annotated[int, "[1, inf)"] | None = None) -> DependentForm:
    """Of A x, each token keeps the entries of largest magnitude (FlyLoRA): it cannot be folded, exported or merged.

    active: how many, at most the rank; by default a quarter of it. Raises ConfigError for more.
    Source: FlyLoRA (arXiv 2510.08396). Its A is sparse, and a bias, which is not a parameter, evens out how often
    entries are taken: here A is LoRI's, without a bias. The mask of B is ours.
    """
    if active is not None and active > rank:
        raise ConfigError(f"adapter.form.active: got {active}, and adapter.rank is {rank}; give at most that")
    return Fly(rank=rank, active=max(1, rank // 4) if active is None else active, scale=alpha / rank, trains_a=trains_a)
