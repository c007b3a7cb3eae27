"""Gradients of several tasks made into one, with weights that a balance finds (`lori_dist.balances`).

All that is made are sums of the tasks' gradients, so that of these nothing but their inner products has to be known:
T x T numbers for each unit, whatever holds the gradients themselves.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lori_dist import plugin
from lori_dist.adapter.attach import separate_tasks
from lori_dist.adapter.per_task import PerTask, module_of, tensor_of
from lori_dist.adapter.targets import layer
from lori_dist.balances import Balance, State
from lori_dist.training.data import Batch
from lori_dist.training.engine import Part, trained
from lori_dist.training.exchange import Exchange
from lori_dist.training.world import World

Granularity = Literal["matrix", "layer", "type", "global"]
Reduce = Literal["sum", "mean"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conflicts:
    """How the tasks' gradients of one step stand to each other, before they were made into one.

    Equal on all ranks, but for sent_bytes where these hold unequal shares.
    """

    cosines: Mapping[tuple[str, str], float]
    """Two tasks -> cosine of their gradients, over all that is trained. 0 where one is zero."""
    shares: Mapping[tuple[str, str], float]
    """Two tasks -> the share of units where they oppose each other."""
    layers: Mapping[tuple[str, str], tuple[float, ...]]
    """Two tasks -> cosine in each layer, in the order of `layers_of`."""
    removed: float
    """|sum of the gradients - what was made of them| / |sum of the gradients|; of `mean`, as if it were `sum`."""
    weights: tuple[float, ...]
    """Factor of each task's gradient, the mean over units; for `mean`, as if it were `sum`."""
    sent_bytes: int
    """Bytes of the whole tensors that were reduced or gathered in the step's exchange. 0 on one rank."""


@dataclass(kw_only=True, slots=True)
class Surgery:
    """Gets each batch of a step, gives the step's gradient, and leaves its findings in `conflicts`."""

    tasks: tuple[str, ...]
    per_task: PerTask
    world: World
    balance: Balance
    takes_losses: bool
    granularity: Granularity
    reduce: Reduce
    seed: int
    state: State = field(default_factory=dict)
    """State of the balance after the last step."""
    conflicts: Conflicts | None = None
    """Conflicts of the last step."""
    _exchange: Exchange | None = field(default=None, init=False)

    def begin(self, batch: Batch) -> None:
        """A batch is to run."""
        assert batch.tasks is not None
        self.per_task.begin(batch.tasks)

    @torch.no_grad()
    def gradient(self, parts: Mapping[str, Part], step: int, losses: Sequence[Tensor]) -> dict[str, Tensor]:
        """Name -> the gradient of what this rank holds of a trained tensor, as `parts` says; flat. A collective.

        Afterwards the tasks' gradients are zero again. step: of the training, from 0. losses: of this rank's
        micro-batches, (tasks,) each.
        """
        if self._exchange is None:
            self._exchange = Exchange(parts, len(self.tasks), self.world)
        names, exchange = list(parts), self._exchange
        own = exchange.reduce(self.per_task.sums)
        gram = exchange.add(gram_matrices(names, own, len(self.tasks), self.world.device)).cpu()
        units = numbered(unit_of(name, self.granularity) for name in names)
        of_units = summed(gram, units)
        chosen = self._weights(of_units, self._losses(losses), step)
        scale = 1 / len(self.tasks) if self.reduce == "mean" else 1.0
        of_tensors = dict(zip(names, (chosen * scale)[units].to(self.world.device), strict=True))
        made = exchange.share([(name, of_tensors[name].to(g.dtype) @ g) for name, g in own])
        self.per_task.clear()
        self.conflicts = self._conflicts(names, gram, of_units, chosen, exchange.sent_bytes)
        return made

    def _losses(self, losses: Sequence[Tensor]) -> Tensor:
        """Losses of the step over all ranks, (tasks,), float64; zeros if the balance does not look at them."""
        if not self.takes_losses:
            return torch.zeros(len(self.tasks), dtype=torch.float64)
        total = torch.stack(list(losses)).sum(0).double()
        if self.world.size > 1:
            dist.all_reduce(total)
        return total.cpu()

    def _weights(self, gram: Tensor, losses: Tensor, step: int) -> Tensor:
        """(units, T). Of a step whose loss is not finite, which is not done, the plain sum; it leaves the state."""
        if not (bool(gram.isfinite().all()) and bool(losses.isfinite().all())):
            return gram.new_ones(gram.shape[:2])
        weights, self.state = self.balance(gram, losses, self.state, seed=self.seed, step=step)
        return weights

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
            weights=tuple(chosen.mean(0).tolist()),
            sent_bytes=sent_bytes,
        )


def surgery(
    model: nn.Module,
    tasks: Sequence[str],
    world: World,
    *,
    balance: str = "ortho",
    options: Mapping[str, Any] | None = None,
    granularity: Granularity | None = None,
    reduce: Reduce = "sum",
    seed: int = 0,
) -> Surgery:
    """Prepares a model with an adapter to train for gradients of several tasks. From here on its backward passes give
    parameters no gradient.

    balance: a file of `lori_dist/balances`, or `package.module`. options: of it, by name. granularity: the unit in
    which gradients are compared: each A and B apart, all of a layer, all A and all B, or everything; by default that
    of the balance. reduce: the sum of the weighted gradients, or that over the number of tasks.
    Raises ConfigError for a balance or options that do not exist or fit.
    """
    method = plugin.find("balances", balance, "balance", "multitask.balance")
    return Surgery(
        tasks=tuple(tasks),
        per_task=separate_tasks(model, len(tasks)),
        world=world,
        balance=partial(method.load(), **method.bind(options or {}, "multitask.balance")),
        takes_losses=bool(method.constants.get("LOSSES", False)),
        granularity=granularity or method.constants.get("GRANULARITY", ("global",))[0],
        reduce=reduce,
        seed=seed,
    )


def layers_of(model: nn.Module) -> tuple[str, ...]:
    """The layers where something is trained, in the model's order."""
    return tuple(dict.fromkeys(layer(module_of(name)) for name in trained(model)))


# --- units -----------------------------------------------------------------------------------------------------------


def unit_of(name: str, granularity: Granularity) -> str:
    """The unit in which a trained tensor's gradients are compared."""
    match granularity:
        case "matrix":
            return name
        case "layer":
            return layer(module_of(name))
        case "type":
            return tensor_of(name) or "B"
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
