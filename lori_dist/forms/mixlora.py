"""Pools of rows of A and columns of B, of which each row of a batch takes some, matched with each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lori_dist.errors import ConfigError
from lori_dist.forms import Choosing, Entry, Site, Tensors, pair

DEPENDENT: dict[str, list[str]] = {}
OF_ROWS: dict[str, list[str]] = {}
AT_LEAST_RANK = ("experts",)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixLora:
    """scale * sum_i g_i b_{J_i} a_{I_i} x, i up to the rank, with I, J and g chosen for a row."""

    rank: int
    experts: int
    scale: float
    trains_a: bool
    gate: Literal["soft", "hard"]
    pairing: Literal["order", "index"]
    condition: Literal["single", "double", "none"]

    def entries(self, site: Site) -> Mapping[str, Entry]:
        # Hard choices give routers no gradient: they stay what the seed makes of them.
        learns = self.gate == "soft"
        pool = (self.experts, site.in_features)
        found = {
            **pair(site, self.experts, trains_a=self.trains_a),
            "router_a": Entry(shape=pool, start="uniform", trained=learns),
            "router_b": Entry(shape=pool, start="uniform", trained=learns),
        }
        if self.condition != "none":
            found["router_ab"] = Entry(shape=(self.rank, *pool), start="uniform", trained=learns)
        return found

    def choose(self, t: Tensors, x: Tensor) -> Mapping[str, Tensor]:
        p_a = torch.softmax(x @ t["router_a"].to(x.dtype).t(), dim=-1)
        of_a, chosen_a = p_a.topk(self.rank, dim=-1)
        p_b = torch.softmax(x @ t["router_b"].to(x.dtype).t(), dim=-1)
        if self.condition != "none":
            p_b = p_b + self._of_chosen(t, chosen_a)
        of_b, chosen_b = p_b.topk(self.rank, dim=-1)
        if self.pairing == "index":
            (chosen_a, order_a), (chosen_b, order_b) = chosen_a.sort(dim=-1), chosen_b.sort(dim=-1)
            of_a, of_b = of_a.gather(-1, order_a), of_b.gather(-1, order_b)
        gates = torch.ones_like(of_a)
        if self.gate == "soft":
            gates = (self.rank**2) * (of_a / of_a.sum(-1, keepdim=True)) * (of_b / of_b.sum(-1, keepdim=True))
        return {"of_a": chosen_a, "of_b": chosen_b, "gates": gates}

    def _of_chosen(self, t: Tensors, chosen: Tensor) -> Tensor:
        """What the rows of A that were chosen, (rows, rank), say of those of B: (rows, experts)."""
        dtype = torch.promote_types(t["a"].dtype, torch.float32)
        scores = torch.einsum("ibd,ad->iab", t["router_ab"].to(dtype), t["a"].to(dtype))
        of_chosen = scores[torch.arange(self.rank, device=chosen.device), chosen]  # (rows, rank, experts)
        if self.condition == "double":
            return torch.softmax(torch.softmax(of_chosen, dim=-1).sum(1), dim=-1)
        return torch.softmax(of_chosen, dim=-1).sum(1)

    def update(self, t: Tensors, x: Tensor, chosen: Mapping[str, Tensor]) -> Tensor:
        reduced = x @ t["a"].to(x.dtype).t()
        taken = chosen["gates"].to(x.dtype) * reduced.gather(-1, chosen["of_a"])
        # The columns of B that a row takes are different ones, so none is written twice.
        spread = torch.zeros_like(reduced).scatter(-1, chosen["of_b"], taken)
        return self.scale * (spread @ t["b"].to(x.dtype).t())


def form(
    *,
    rank: int,
    alpha: float,
    trains_a: bool,
    experts: Annotated[int, "[1, inf)"] | None = None,
    gate: Literal["soft", "hard"] = "soft",
    condition: Literal["single", "double", "none"] = "single",
    pairing: Literal["order", "index"] = "order",
) -> Choosing:
    """Each row takes some rows of A and columns of B from pools (MixLoRA): it cannot be folded, exported or merged.

    It takes `rank` of each. experts: size of both pools, at least the rank; by default four times the rank. A router
    chooses rows of A from the mean h of what the layer gets of a row's prompt, and another one columns of B from h and
    from the rows of A.
    gate: `soft` multiplies what is chosen by the probabilities of both choices, over their mean, so that routers learn;
    `hard` by nothing: routers are frozen, made from the seed. condition: `single`, the paper's: the probabilities of B
    are softmax(h) plus those that each chosen row of A gives; `double`: the latter under another softmax; `none`:
    without them. pairing: the chosen rows of A meet the columns of B by `order` of their scores, or by `index`.
    Raises ConfigError for fewer experts than the rank.
    Source: MixLoRA (arXiv 2402.15896) and VT-NLP/MixLoRA, which has hard choices alone, `double`, and a trained A
    (`adapter.projection: trained`). The soft gate, the frozen A, the mask of B, and that h is of the prompt, and stays
    what it is while an answer is written, are ours: the code takes the mean over all tokens it is given.
    """
    number = 4 * rank if experts is None else experts
    if number < rank:
        raise ConfigError(f"adapter.form.experts: got {number}, and adapter.rank is {rank}; give at least that")
    return MixLora(
        rank=rank,
        experts=number,
        scale=alpha / rank,
        trains_a=trains_a,
        gate=gate,
        pairing=pairing,
        condition=condition,
    )
