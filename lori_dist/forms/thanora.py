"""One update whose rows of A and columns of B are divided among the tasks, which keep out of each other's way."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import torch
from torch import Tensor

from lori_dist.errors import AdapterError
from lori_dist.forms import Entry, Form, Site, Tensors, pair

RANK_FOR_EACH: dict[str, list[str]] = {}
PENALTY = "weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Thanora:
    """scale * [B_1 .. B_T B_coop] [A_1; ..; A_T; A_coop]."""

    rank: int
    scale: float
    trains_a: bool
    weight: float

    def entries(self, site: Site) -> Mapping[str, Entry]:
        return pair(site, self.rank, trains_a=self.trains_a)

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        return self.scale * t["b"], t["a"]

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        if self.weight == 0 or len(site.tasks) == 1:
            return None
        sizes = blocks(self.rank, len(site.tasks))
        b = torch.split(t["b"], sizes, dim=1)[:-1]  # the cooperative block is free
        a = torch.split(t["a"], sizes)[:-1]
        found = torch.stack([(b[s].t() @ b[r]).square().sum() for s, r in combinations(range(len(b)), 2)]).sum()
        if self.trains_a:
            found = (
                found + torch.stack([(a[s] @ a[r].t()).square().sum() for s, r in combinations(range(len(a)), 2)]).sum()
            )
        return self.weight * found


def blocks(rank: int, num_tasks: int) -> list[int]:
    """Columns of each task's block and, at the end, of the cooperative one, which may have none.

    Raises AdapterError for a rank that gives a task nothing.
    """
    if rank < num_tasks:
        raise AdapterError(f"form: thanora gives each of {num_tasks} tasks a part of the rank, which is {rank}")
    together = rank // (num_tasks + 1)
    share, more = divmod(rank - together, num_tasks)
    return [*(share + (task < more) for task in range(num_tasks)), together]


def form(*, rank: int, alpha: float, trains_a: bool, weight: Annotated[float, "[0, inf)"] = 0.1) -> Form:
    """One update for all rows, of whose rank each task has a block that keeps orthogonal to those of others (ThanoRA).

    rank / (tasks + 1), rounded down, is a block for all of them; the tasks have equal parts of the rest. weight: of the
    penalty, the mean over layers of the sum over two tasks of |B_s^T B_t|^2, and of |A_s A_t^T|^2 where A is trained;
    it is in the gradient, not in the loss that is recorded. The adapter is an ordinary one.
    Source: ThanoRA (arXiv 2505.18640), of which abstracts and reviews could be read. That ranks follow the spectra of
    the tasks' activations is left out: blocks are of a seeded A, which is nearly orthogonal as it is. The form of the
    penalty is inferred; its weight is ours.
    """
    return Thanora(rank=rank, scale=alpha / rank, trains_a=trains_a, weight=weight)
