"""Gradients of several tasks made into one: where two oppose each other, what opposes is taken out.

All that is made are sums of the tasks' gradients, so that of these nothing but their inner products has to be known:
T x T numbers for each unit, whatever holds the gradients themselves. Sources: Ortho-LoRA (arXiv 2601.09684), algorithm
1; PCGrad (arXiv 2001.06782), which is its `original` over the whole model. The form with inner products is our own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lori_dist.adapter.attach import separate_tasks
from lori_dist.adapter.per_task import PerTask, is_a, module_of
from lori_dist.adapter.targets import layer
from lori_dist.training.data import Batch
from lori_dist.training.engine import Part, trained
from lori_dist.training.exchange import Exchange
from lori_dist.training.world import World

Projection = Literal["original", "in_place"]
Granularity = Literal["matrix", "layer", "type", "global"]
Reduce = Literal["sum", "mean"]

VANISHED = 1e-10
"""Of what a gradient's squared norm was, what is left of it that counts as nothing: rounding of fp32 gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conflicts:
    """How the tasks' gradients of one step stand to each other, before anything was taken out.

    Equal on all ranks, but for sent_bytes where these hold unequal shares.
    """

    cosines: Mapping[tuple[str, str], float]
    """Two tasks -> cosine of their gradients, over all that is trained. 0 where one is zero."""
    shares: Mapping[tuple[str, str], float]
    """Two tasks -> the share of units where they oppose each other."""
    layers: Mapping[tuple[str, str], tuple[float, ...]]
    """Two tasks -> cosine in each layer, in the order of `layers_of`."""
    removed: float
    """|taken out| / |sum of the gradients|; of `mean`, as if it were `sum`."""
    sent_bytes: int
    """In the step's exchange: of each whole tensor that was reduced or gathered. 0 on one rank."""


@dataclass(kw_only=True, slots=True)
class Surgery:
    """Told of each batch of a step, it gives the step's gradient, and leaves what it found in `conflicts`."""

    tasks: tuple[str, ...]
    per_task: PerTask
    world: World
    projection: Projection
    granularity: Granularity
    reduce: Reduce
    seed: int
    conflicts: Conflicts | None = None
    """Of the last step."""
    _exchange: Exchange | None = field(default=None, init=False)

    def begin(self, batch: Batch) -> None:
        """A batch is to run."""
        assert batch.tasks is not None
        self.per_task.begin(batch.tasks, batch.input_ids.shape[1])

    @torch.no_grad()
    def gradient(self, parts: Mapping[str, Part], step: int) -> dict[str, Tensor]:
        """Name -> the gradient of what this rank holds of a trained tensor, as `parts` says; flat. A collective.

        Afterwards the tasks' gradients are zero again. step: of the training, from 0; with the seed it gives the order.
        """
        if self._exchange is None:
            self._exchange = Exchange(parts, len(self.tasks), self.world)
        names, exchange = list(parts), self._exchange
        own = exchange.reduce(self.per_task.sums)
        gram = exchange.add(gram_matrices(names, own, len(self.tasks), self.world.device)).cpu()
        units = numbered(unit_of(name, self.granularity) for name in names)
        of_units = summed(gram, units)
        chosen = coefficients(of_units, order(len(self.tasks), self.seed, step), self.projection).sum(1)
        scale = 1 / len(self.tasks) if self.reduce == "mean" else 1.0
        of_tensors = dict(zip(names, (chosen * scale)[units].to(self.world.device), strict=True))
        made = exchange.share([(name, of_tensors[name].to(g.dtype) @ g) for name, g in own])
        self.per_task.clear()
        self.conflicts = self._conflicts(names, gram, of_units, chosen, exchange.sent_bytes)
        return made

    def _conflicts(
        self, names: Sequence[str], gram: Tensor, of_units: Tensor, chosen: Tensor, sent_bytes: int
    ) -> Conflicts:
        layers = numbered(layer(module_of(name)) for name in names)
        whole, of_layers = cosines(gram.sum(0)), cosines(summed(gram, layers))
        pairs = {(self.tasks[i], self.tasks[j]): (i, j) for i, j in combinations(range(len(self.tasks)), 2)}
        out = 1 - chosen
        removed = torch.einsum("ui,uij,uj->", out, of_units, out).clamp(min=0)
        total = of_units.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return Conflicts(
            cosines={pair: float(whole[place]) for pair, place in pairs.items()},
            shares={pair: float((of_units[:, i, j] < 0).double().mean()) for pair, (i, j) in pairs.items()},
            layers={pair: tuple(of_layers[:, i, j].tolist()) for pair, (i, j) in pairs.items()},
            removed=float((removed / total).sqrt()),
            sent_bytes=sent_bytes,
        )


def surgery(
    model: nn.Module,
    tasks: Sequence[str],
    world: World,
    *,
    projection: Projection = "original",
    granularity: Granularity = "matrix",
    reduce: Reduce = "sum",
    seed: int = 0,
) -> Surgery:
    """For a model with an adapter to train. From here on its backward passes give parameters no gradient.

    projection: what a gradient is projected against: the other tasks' own gradients, or (`in_place`, as the paper
    prints it) what these have become. granularity: the unit in which two gradients are compared: each A and B apart,
    all of a layer, all A and all B, or everything.
    """
    return Surgery(
        tasks=tuple(tasks),
        per_task=separate_tasks(model, len(tasks)),
        world=world,
        projection=projection,
        granularity=granularity,
        reduce=reduce,
        seed=seed,
    )


def layers_of(model: nn.Module) -> tuple[str, ...]:
    """The layers where something is trained, in the model's order."""
    return tuple(dict.fromkeys(layer(module_of(name)) for name in trained(model)))


# --- units -----------------------------------------------------------------------------------------------------------


def unit_of(name: str, granularity: Granularity) -> str:
    """In which unit a trained tensor is compared."""
    match granularity:
        case "matrix":
            return name
        case "layer":
            return layer(module_of(name))
        case "type":
            return "A" if is_a(name) else "B"
        case "global":
            return ""


def numbered(units: Iterable[str]) -> Tensor:
    """Each unit's number, in the order in which they are first seen."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(unit, len(numbers)) for unit in units])


def summed(gram: Tensor, units: Tensor) -> Tensor:
    """(tensors, T, T) -> (units, T, T): inner products add up."""
    return gram.new_zeros(int(units.max()) + 1, *gram.shape[1:]).index_add_(0, units, gram)


# --- inner products --------------------------------------------------------------------------------------------------


def gram_matrices(
    names: Sequence[str], own: Sequence[tuple[str, Tensor]], num_tasks: int, device: torch.device
) -> Tensor:
    """(names, T, T), float64, of the entries in `own`, a tensor's name with (T, entries) of it."""
    numbers = {name: number for number, name in enumerate(names)}
    gram = torch.zeros(len(names), num_tasks, num_tasks, dtype=torch.float64, device=device)
    for name, gradients in own:
        wide = gradients.double()
        gram[numbers[name]].addmm_(wide, wide.t())
    return gram


def cosines(gram: Tensor) -> Tensor:
    """(..., T, T) -> cosines, 0 where a gradient is zero."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    product = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    return torch.where(product > 0, gram / product, 0.0)


def order(num_tasks: int, seed: int, step: int) -> list[int]:
    """In which order tasks give way, and to whom first: from seed and step alone."""
    words = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(num_tasks)
    return [int(task) for task in np.argsort(words, kind="stable")]


def coefficients(gram: Tensor, order: Sequence[int], projection: Projection) -> Tensor:
    """What becomes of each gradient, (units, T, T): task i's is the sum over j of [i, j] times task j's own.

    gram: (units, T, T), float64, inner products of the tasks' gradients. The identity where no two oppose each other.
    A gradient of which (nearly) nothing is left is nothing to give way to.
    """
    num_tasks = gram.shape[-1]
    made = torch.eye(num_tasks, dtype=gram.dtype, device=gram.device).repeat(len(gram), 1, 1)
    for i in order:
        for j in order:
            if i == j:
                continue
            against = made[:, j] if projection == "in_place" else _unit(j, made)
            images = torch.einsum("ujk,uk->uj", gram, against)  # inner products with every task's own gradient
            inner, squared = (made[:, i] * images).sum(1), (against * images).sum(1)
            opposes = (inner < 0) & (squared > VANISHED * gram[:, j, j])
            factor = torch.where(opposes, inner / torch.where(opposes, squared, 1.0), 0.0)
            made[:, i] -= factor.unsqueeze(1) * against
    return made


def _unit(task: int, like: Tensor) -> Tensor:
    own = torch.zeros_like(like[:, task])
    own[:, task] = 1
    return own
