"""Several B's on one A, of which a router weighs each token's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from lori_dist.forms import DependentForm, Entry, Site, Tensors

DEPENDENT: dict[str, list[str]] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Hydra:
    """scale * sum_i softmax(R x)_i B_i A x."""

    rank: int
    scale: float
    trains_a: bool
    heads: int

    def entries(self, site: Site) -> Mapping[str, Entry]:
        return {
            "a": Entry(shape=(self.rank, site.in_features), start="a", trained=self.trains_a),
            "b": Entry(shape=(self.heads, site.out_features, self.rank), sparse=True),
            "router": Entry(shape=(self.heads, site.in_features), start="uniform"),
        }

    def update(self, t: Tensors, x: Tensor) -> Tensor:
        shares = torch.softmax((x @ t["router"].to(x.dtype).t()).float(), dim=-1).to(x.dtype)
        reduced = x @ t["a"].to(x.dtype).t()
        # Each token's A x under each of its shares meets the B's side by side: one product.
        weighted = (shares.unsqueeze(-1) * reduced.unsqueeze(-2)).flatten(-2)
        wide = t["b"].to(x.dtype).transpose(0, 1).flatten(1)  # (out_features, heads * rank)
        return self.scale * (weighted @ wide.t())


def form(*, rank: int, alpha: float, trains_a: bool, heads: Annotated[int, "[1, inf)"] = 3) -> DependentForm:
    """Several B's on one A, mixed by a router for each token (HydraLoRA): it cannot be folded, exported or merged.

    heads: number of B's; one mask holds for all. The router is a matrix without bias, and its softmax is in float32.
    Source: HydraLoRA (arXiv 2404.19245) and Clin0212/HydraLoRA, which trains A (`adapter.projection: trained`): a
    frozen A and sparse B's are ours.
    """
    return Hydra(rank=rank, scale=alpha / rank, trains_a=trains_a, heads=heads)
