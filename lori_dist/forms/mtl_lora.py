"""Several B's that all tasks mix, each in its own way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lori_dist.forms import Entry, Form, Site, Tensors

PER_TASK: dict[str, list[str]] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class MtlLora:
    """scale * (sum_i softmax(w_t / temperature)_i B_i) L_t A."""

    rank: int
    scale: float
    trains_a: bool
    heads: int
    transform: Literal["full", "diagonal", "none"]
    start: Literal["random", "equal"]
    temperature: float

    def entries(self, site: Site) -> Mapping[str, Entry]:
        found = {
            "a": Entry(shape=(self.rank, site.in_features), start="a", trained=self.trains_a),
            "b": Entry(shape=(self.heads, site.out_features, self.rank), sparse=True),
            "w": Entry(shape=(self.heads,), per_task=True, start="uniform" if self.start == "random" else "zeros"),
        }
        if self.transform == "full":
            found["l"] = Entry(shape=(self.rank, self.rank), per_task=True, start="eye")
        elif self.transform == "diagonal":
            found["l"] = Entry(shape=(self.rank,), per_task=True, start="ones")
        return found

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        shares = torch.softmax(t["w"].float() / self.temperature, dim=0).to(t["b"].dtype)
        b = (shares @ t["b"].flatten(1)).view(t["b"].shape[1:])
        if self.transform == "full":
            b = b @ t["l"]
        elif self.transform == "diagonal":
            b = b * t["l"]
        return self.scale * b, t["a"]


def form(
    *,
    rank: int,
    alpha: float,
    trains_a: bool,
    heads: Annotated[int, "[1, inf)"] = 3,
    transform: Literal["full", "diagonal", "none"] = "full",
    start: Literal["random", "equal"] = "random",
    temperature: Annotated[float, "(0, inf)"] = 0.1,
) -> Form:
    """Several B's that each task mixes with its own weights, after its own transform of A x (MTL-LoRA).

    heads: number of B's. transform: L_t, (rank, rank), or its diagonal; `none` leaves it out. start: of the weights:
    `random` is the paper's, where each task begins with one B almost alone; `equal` begins with the mean. temperature:
    of the softmax over the weights. One mask holds for all B's; with a full transform a task's B has every entry of a
    row that has any, with a diagonal one it keeps the mask.
    Source: MTL-LoRA (arXiv 2410.09437) and pUmpKin-Co/MTL-LoRA, which trains A (`adapter.projection: trained`) and has
    no mask: a frozen A and sparse B's are ours. The paper's text has a diagonal L_t, its script a full one.
    """
    return MtlLora(
        rank=rank,
        scale=alpha / rank,
        trains_a=trains_a,
        heads=heads,
        transform=transform,
        start=start,
        temperature=temperature,
    )
