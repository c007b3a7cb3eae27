"""Random entries of each task, the larger ones more probably, rescaled, then the vote of TIES."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from torch import Tensor

from lori_dist.adapter.update import Part, Update
from lori_dist.errors import ConfigError
from lori_dist.merges._entries import Draw, by_rank, thin, total, vote
from lori_dist.merges._spaces import merge_entries

UNIT_WEIGHTS: dict[str, tuple[object, ...]] = {"inner": ("ties",)}
"""Each adapter has weight 1 where no weights are given: the paper's mean of those that agree."""

EXACT: dict[str, tuple[object, ...]] = {"inner": ("task_arithmetic",), "density": (1.0,), "rank": (None,)}
"""Options -> values for which the result is the weighted sum of the updates, exactly."""


def merge(
    updates: Sequence[Update],
    *,
    weights: Sequence[float],
    inner: Literal["ties", "task_arithmetic"] = "ties",
    density: Annotated[float, "(0, 1]"] = 0.7,
    epsilon: Annotated[float, "[0, 1)"] = 0.07,
    seed: Annotated[int, "[0, inf)"] = 0,
    elect: Literal["total", "frequency"] = "total",
    space: Literal["auto", "b", "dense"] = "auto",
    rank: Annotated[int, "[1, inf)"] | None = None,
) -> list[Part]:
    """Random entries, the larger ones more probably, rescaled; then the mean of those with the elected sign (DELLA).

    MagPrune: of a row of X_t with n entries that are not zero, the one with rank i by size, 0 for the smallest, stays
    with probability p = density - epsilon + 2 epsilon i / (n - 1) and is divided by it, so the expectation is X_t. An
    entry that is alone in its row has p = density; at density 1 nothing is dropped. Y_t = w_t X_t so sparsified; `ties`
    takes the mean of those with the elected sign, `task_arithmetic` the sum (`della_linear` of mergekit).
    updates: of one module, one per adapter. weights, elect: as of `ties`, so 1 by default; with `task_arithmetic` equal
    ones that sum to one. The paper's lambda is a common factor of the weights. epsilon: half of the paper's window of
    probabilities. seed: of the masks, which follow from (seed, module, adapter's name) as those of `dare`. space, rank:
    as of `magnitude`; `b` needs a shared A with `ties`.
    Raises ConfigError for probabilities outside of (0, 1), AdapterError and ConfigError as `ties`.
    Source: Deep et al., "DELLA-Merging" (arXiv 2406.11617), section 3. declare-lab/della has these probabilities and
    divides by them; mergekit's later version rescales what stays to the old norm instead.
    """
    if density < 1 and epsilon >= min(density, 1 - density):
        raise ConfigError(
            f"merge.method.epsilon: got {epsilon} with density {density}, so entries would be kept with probabilities "
            f"from {density - epsilon:g} to {density + epsilon:g}; give an epsilon below {min(density, 1 - density):g}"
        )
    draw = Draw(seed=seed, module=updates[0].module)

    def sparsify(x: Tensor, name: str) -> Tensor:
        return x if density == 1 else thin(x, by_rank(x, density, epsilon), draw, name)

    def combine(matrices: Iterable[Tensor]) -> Tensor:
        named = zip(matrices, (update.name for update in updates), weights, strict=True)
        sparse = [sparsify(x, name) * weight for x, name, weight in named]
        return vote(sparse, elect=elect) if inner == "ties" else total(sparse)

    return merge_entries(updates, combine, space=space, rank=rank, votes=inner == "ties", draws=True)
