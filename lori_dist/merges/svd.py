"""The best approximation of the sum at a rank."""

from collections.abc import Sequence
from typing import Annotated

from lori_dist.adapter.update import Part, Update
from lori_dist.merges import concat
from lori_dist.merges._factors import singular_of_product, stacked
from lori_dist.merges._forms import in_row_space
from lori_dist.merges._spaces import rank_within

EXACT: dict[str, tuple[object, ...]] = {"rank": (None,)}
"""Options -> values for which the result is the weighted sum of the updates, exactly."""


def merge(
    updates: Sequence[Update], *, weights: Sequence[float], rank: Annotated[int, "[1, inf)"] | None = None
) -> list[Part]:
    """The best approximation of sum_t w_t D_t at a rank: its largest singular directions.

    The squared error is the sum of the dropped squared singular values; at the rank of the sum, which is the default,
    there is none. The result has a computed A and B, in fp32, or, where the tasks share A, a dense B on that A.
    Singular directions that are zero are not kept, whatever the rank.
    updates: of one module, one per adapter. weights: one per adapter, of any sign.
    Raises ConfigError for a rank above what the shape allows.
    Source: Eckart and Young (Psychometrika 1936); LoRI (arXiv 2504.07448) names SVD among PEFT's merges.
    """
    rank = rank_within(updates, rank)
    weighted = [part for part in concat.merge(updates, weights=weights) if part.entries is not None]
    u, s, vh = singular_of_product(*stacked(updates[0].shape, weighted))
    return [in_row_space(updates, (u * s)[:, :rank], vh[:rank])]
