"""One update whose rows of A and columns of B are divided among the tasks, which keep out of each other's way."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Literal

import torch
from torch import Tensor

from lori_dist.errors import AdapterError
from lori_dist.forms import Entry, Form, Given, Site, Tensors, pair

RANK_FOR_EACH: dict[str, list[str]] = {}
PENALTY = "weight"
MOMENTS = {"start": ["moments"]}


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
        sizes = list(site.blocks) or blocks(self.rank, len(site.tasks))
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
    return [*divided(rank - together, [1 / num_tasks] * num_tasks), together]


def divided(rank: int, shares: Sequence[float]) -> list[int]:
    """A rank divided by shares that sum to one, by largest remainders, at least 1 for each; of equal ones the first
    gets more."""
    whole = [1] * len(shares)
    for _ in range(rank - len(shares)):
        lacking = [round(rank * share - one, 9) for share, one in zip(shares, whole, strict=True)]
        whole[lacking.index(max(lacking))] += 1
    return whole


def entropy(sizes: Tensor) -> float:
    """Of singular values as shares of their sum, in nats: log k of k equal values, 0 of a single one."""
    shares = sizes[sizes > 0] / sizes.sum()
    return float(-(shares * shares.log()).sum())


def given(
    a: Tensor, weight: Tensor, factors: Sequence[Tensor], /, *, temperature: float = 1.0, **options: object
) -> Given:
    """What a layer begins with under `start: moments`.

    a: the seeded A, (rank, in_features), whose last rows are the cooperative block's. weight: of the base,
    (out_features, in_features), float64. factors: F of each task's moment, C = F F^T, (in_features, k), float64.
    """
    found = [_directions(weight, factor) for factor in factors]
    together = blocks(len(a), len(factors))[-1]
    scores = torch.tensor([entropy(sizes) for sizes, _ in found], dtype=torch.float64)
    ranks = divided(len(a) - together, torch.softmax(scores / temperature, 0).tolist())
    length, rows = 1 / math.sqrt(3), list[Tensor]()
    for place, (rank, (_, directions)) in enumerate(zip(ranks, found, strict=True)):
        start = sum(ranks[:place])
        chosen = directions[:rank]
        # The sign of a singular vector is the library's choice: the largest entry is to be positive.
        largest = chosen.gather(1, chosen.abs().argmax(1, keepdim=True)).sign()
        # A task whose inputs have fewer directions keeps rows of the seeded A.
        rows += [length * chosen * largest, a[start + len(chosen) : start + rank].double()]
    rows.append(a[len(a) - together :].double())
    return Given(a=torch.cat(rows).float(), blocks=(*ranks, together))


def _directions(weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of W C, C = F F^T, in descending order, and its right singular vectors as rows."""
    q, r = torch.linalg.qr(factor)
    _, sizes, vectors = torch.linalg.svd((weight @ factor) @ r.t(), full_matrices=False)
    there = sizes > 1e-10 * sizes.sum()
    return sizes[there], vectors[there] @ q.t()


def form(
    *,
    rank: int,
    alpha: float,
    trains_a: bool,
    weight: Annotated[float, "[0, inf)"] = 0.1,
    start: Literal["random", "moments"] = "random",
    temperature: Annotated[float, "(0, inf)"] = 1.0,
) -> Form:
    """One update for all rows, of whose rank each task has a block that keeps orthogonal to those of others (ThanoRA).

    rank / (tasks + 1), rounded down, is a block for all of them, with rows of the seeded A. The tasks divide the rest:
    equally, with rows of the seeded A too (start: random), or by what the base's layer makes of their inputs
    (`moments`, see `adapter.moments`): the more evenly the singular values of W C_t are spread, with W the base's
    weight and C_t the mean of x x^T over inputs x of task t, the more rows it gets, in each layer by itself: shares are
    the softmax of their entropies / temperature, at least one row each; and its rows of A are the first right singular
    vectors of W C_t, of length 1/sqrt(3), that of the seeded A's rows in the mean. Such an A is stored in the adapter.
    weight: of the penalty, the mean over layers of the sum over two tasks of |B_s^T B_t|^2, and of |A_s A_t^T|^2 where
    A is trained; it is in the gradient, not in the loss that is recorded. The adapter is an ordinary one.
    Source: ThanoRA (arXiv 2505.18640), of which abstracts and reviews could be read: blocks, a cooperative one, ranks
    by spectral entropy, a truncated SVD, a penalty. Which matrix is decomposed (as in CorDA, a baseline there), how
    entropies become ranks, and the form of the penalty are inferred; its weight, the length of rows, and that B starts
    at zero and the base stays as it is are ours.
    """
    return Thanora(rank=rank, scale=alpha / rank, trains_a=trains_a, weight=weight)
