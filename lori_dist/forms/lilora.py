"""A B that all tasks share and one of low rank that each has, mixed by a weight of the task's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from lori_dist.forms import Entry, Form, Site, Tensors, pair

PER_TASK: dict[str, list[str]] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class LiLora:
    """scale * (sigmoid(f_t) B + (1 - sigmoid(f_t)) P_t Q_t) A."""

    rank: int
    task_rank: int
    scale: float
    trains_a: bool

    def entries(self, site: Site) -> Mapping[str, Entry]:
        return {
            **pair(site, self.rank, trains_a=self.trains_a),
            "p": Entry(shape=(site.out_features, self.task_rank), per_task=True),
            "q": Entry(shape=(self.task_rank, self.rank), per_task=True, start="uniform"),
            "f": Entry(shape=(1,), per_task=True, start="uniform"),
        }

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        share = torch.sigmoid(t["f"])
        return self.scale * (share * t["b"] + (1 - share) * (t["p"] @ t["q"])), t["a"]


def form(*, rank: int, alpha: float, trains_a: bool, task_rank: Annotated[int, "[1, inf)"] | None = None) -> Form:
    """A sparse B that all tasks share, and P_t Q_t of each task, mixed by a weight that each learns (LiLoRA).

    task_rank: columns of P_t; by default half the rank. P_t and Q_t are dense, so the update of a task has every entry
    of B. All tasks are trained together here, as the paper's first task trains what is shared; its later tasks, one
    after the other with B frozen, and the loss that keeps B near what it was, are not here.
    Source: LiLoRA (arXiv 2508.06202) and chanceche/LiLoRA, which trains A (`adapter.projection: trained`): a frozen A
    and the mask of B are ours, as is the start of f_t on +-1, which the code draws from a normal distribution.
    """
    return LiLora(
        rank=rank,
        task_rank=max(1, rank // 2) if task_rank is None else task_rank,
        scale=alpha / rank,
        trains_a=trains_a,
    )
