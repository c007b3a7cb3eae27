"""LoRI, and LoRA where A is trained: one update for all tasks."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lori_dist.forms import Entry, Form, Site, Tensors, pair


@dataclass(frozen=True, kw_only=True, slots=True)
class Lori:
    """scale * B A."""

    rank: int
    scale: float
    trains_a: bool

    def entries(self, site: Site) -> Mapping[str, Entry]:
        return pair(site, self.rank, trains_a=self.trains_a)

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        return self.scale * t["b"], t["a"]


def form(*, rank: int, alpha: float, trains_a: bool) -> Form:
    """One update B A for all tasks, A frozen and seeded, B sparse (LoRI).

    A run computes it with a kernel of its own, `adapter.linear`, which gives the same bits.
    Source: LoRI (arXiv 2504.07448), section 3.
    """
    return Lori(rank=rank, scale=alpha / rank, trains_a=trains_a)
