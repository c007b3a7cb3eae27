"""A pool of ranks, of which each row takes some; those that are taken most often are what a training leaves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lori_dist.forms import Choosing, Entry, Site, Tensors, pair, refuse_above_rank

DEPENDENT: dict[str, list[str]] = {}
OF_ROWS: dict[str, list[str]] = {}
SETTLES: dict[str, list[str]] = {}
IN_SEQUENCE: dict[str, list[str]] = {}
PENALTY = "weight"
AT_MOST_RANK = ("active", "keep")


@dataclass(frozen=True, kw_only=True, slots=True)
class Dac:
    """scale * B (g A x), where g is zero but for the `active` ranks that a router chooses for a row."""

    rank: int
    active: int
    keep: int
    gate: Literal["hard", "soft"]
    weight: float
    scale: float
    trains_a: bool

    def entries(self, site: Site) -> Mapping[str, Entry]:
        return {
            **pair(site, self.rank, trains_a=self.trains_a),
            # The last column is the bias. A hard choice gives it no gradient: it stays what the seed makes of it.
            "router": Entry(shape=(self.rank, site.in_features + 1), start="uniform", trained=self.gate == "soft"),
            "votes": Entry(shape=(self.rank,), trained=False, counted=True),
        }

    def choose(self, t: Tensors, x: Tensor) -> Mapping[str, Tensor]:
        router = t["router"].to(x.dtype)
        p, ranks = torch.softmax(x @ router[:, :-1].t() + router[:, -1], dim=-1).topk(self.active, dim=-1)
        gates = torch.ones_like(p) if self.gate == "hard" else self.active * p / p.sum(-1, keepdim=True)
        return {"ranks": ranks, "gates": gates}

    def update(self, t: Tensors, x: Tensor, chosen: Mapping[str, Tensor]) -> Tensor:
        gates = x.new_zeros(len(x), self.rank).scatter(-1, chosen["ranks"], chosen["gates"].to(x.dtype))
        return self.scale * ((gates * (x @ t["a"].to(x.dtype).t())) @ t["b"].to(x.dtype).t())

    def after_step(self, t: Tensors, counts: Tensor) -> Mapping[str, Tensor]:
        return {"votes": t["votes"] + counts.to(t["votes"].dtype)}

    def most_voted(self, votes: Tensor) -> Tensor:
        """The ranks that are kept, (keep,): those with most votes, of as many the first."""
        return torch.argsort(votes, descending=True, stable=True)[: self.keep]

    def settled(self, t: Tensors) -> tuple[Tensor, Tensor]:
        ranks = self.most_voted(t["votes"])
        b = torch.zeros_like(t["b"]).index_copy(1, ranks, t["b"][:, ranks])
        return self.scale * b, t["a"]

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        past = t.get("past")
        if self.weight == 0 or past is None or not past.numel():
            return None
        return self.weight * (t["b"][:, self.most_voted(t["votes"])].t() @ past).abs().sum()


def form(
    *,
    rank: int,
    alpha: float,
    trains_a: bool,
    active: Annotated[int, "[1, inf)"] | None = None,
    keep: Annotated[int, "[1, inf)"] | None = None,
    gate: Literal["hard", "soft"] = "hard",
    weight: Annotated[float, "[0, inf)"] = 0.1,
) -> Choosing:
    """Each row takes some of the ranks, and the training keeps those that rows took most often (DAC's pool of ranks).

    active: ranks of a row; by default two thirds of all. keep: ranks that are left, of those with as many votes the
    first; by default a third. gate: with `hard` the router is frozen, made from the seed, so the choice is a random
    one that similar prompts share; `soft` multiplies ranks by their probabilities over their mean, so that the router
    learns. weight: of the penalty in a sequence of tasks, the mean over layers of the sum of |B^T B_past|, of the ranks
    with most votes by now and those that earlier tasks have left; it is in the gradient, not in the loss that is
    recorded.
    What is left is an ordinary adapter, without router: a column of B for each rank that is kept. In a sequence
    (`multitask: sequential`) a task's columns are added to those of the tasks before.
    Raises ConfigError for numbers that do not fit the rank.
    Source: DAC (arXiv 2601.22828) and Fazhan-cs/DAC, which is for images and text: rank 12, of which 8 are taken and 4
    kept. There, all rows of a batch have one choice, by a vote, from the first token, which depends on who shares a
    batch; here each row has its own, from the mean over its prompt. The code trains A; that it is frozen, the same one
    for all tasks of a sequence, and the mask of B are ours, as is the soft gate. Its dropout is left out. In its
    attention layers, all columns of the past enter the penalty, also those that were not kept: here, those that were.
    """
    active = max(1, 2 * rank // 3) if active is None else active
    keep = max(1, rank // 3) if keep is None else keep
    refuse_above_rank(rank, active=active, keep=keep)
    return Dac(rank=rank, active=active, keep=keep, gate=gate, weight=weight, scale=alpha / rank, trains_a=trains_a)
