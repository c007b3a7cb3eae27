"""A pair of factors for each task, with A, B or a further pair in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lori_dist.forms import Entry, Form, Site, Tensors

PER_TASK: dict[str, list[str]] = {}
OWN_A = {"sharing": ["none", "b"]}


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskLora:
    """scale * B_t A_t, scale * B A_t, scale * B_t A, or scale * (B A + B_t A_t)."""

    rank: int
    rank_shared: int
    scale: float
    trains_a: bool
    sharing: Literal["none", "a", "b", "extra"]

    def entries(self, site: Site) -> Mapping[str, Entry]:
        if self.sharing == "extra":
            return self._with_extra(site)
        own_a = self.sharing in ("none", "b")
        return {
            "a": Entry(shape=(self.rank, site.in_features), per_task=own_a, start="a", trained=self.trains_a),
            "b": Entry(shape=(site.out_features, self.rank), per_task=self.sharing != "b", sparse=True),
        }

    def _with_extra(self, site: Site) -> Mapping[str, Entry]:
        # A frozen A serves both pairs: it is as random for one as for the other, and the sum keeps its rank.
        rows = self.rank_shared if self.trains_a else max(self.rank, self.rank_shared)
        found = {
            "a": Entry(shape=(rows, site.in_features), start="a", trained=self.trains_a),
            "b": Entry(shape=(site.out_features, self.rank_shared), sparse=True),
            "own_b": Entry(shape=(site.out_features, self.rank), per_task=True, sparse=True),
        }
        if self.trains_a:
            found["own_a"] = Entry(shape=(self.rank, site.in_features), per_task=True, start="uniform")
        return found

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        if self.sharing != "extra":
            return self.scale * t["b"], t["a"]
        if self.trains_a:
            return self.scale * torch.cat([t["b"], t["own_b"]], dim=1), torch.cat([t["a"], t["own_a"]])
        wide = max(self.rank, self.rank_shared)
        shared, own = (functional.pad(b, (0, wide - b.shape[1])) for b in (t["b"], t["own_b"]))
        return self.scale * (shared + own), t["a"]


def form(
    *,
    rank: int,
    alpha: float,
    trains_a: bool,
    sharing: Literal["none", "a", "b", "extra"] = "a",
    rank_shared: Annotated[int, "[1, inf)"] | None = None,
) -> Form:
    """An update for each task, sharing nothing, A, B, or an extra pair of factors (after MTEEG).

    sharing: `none`: each task has its own A and B, as if trained alone on its rows of the batches; `a`: one A, and a B
    for each; `b`: one B, and an A for each; `extra`: a pair that all tasks train beside each task's own. rank_shared:
    of the extra pair; by default `rank`. With a frozen A, one A serves both pairs, so that their sum keeps the larger
    rank.
    Source: MTEEG (arXiv 2604.25131) has three ways to integrate a task's LoRA modules, of which the abstract alone
    could be read: these four, that the pairs have one scale, and the frozen A are ours.
    """
    return TaskLora(rank=rank, rank_shared=rank_shared or rank, scale=alpha / rank, trains_a=trains_a, sharing=sharing)
