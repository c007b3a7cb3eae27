"""The loss of a weighted sum of adapters and its gradient by the weights, on a base that may be sharded."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lori_dist.adapter.adapter import Adapter
from lori_dist.adapter.targets import kind
from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.evaluation import _test_rows
from lori_dist.evaluation._place import place
from lori_dist.training import data
from lori_dist.training.loss import loss_sum, num_targets
from lori_dist.training.model import check, load_tokenizer
from lori_dist.training.world import World

Place = tuple[str, str | None]
"""A task, and the module or module kind whose weight it is; None: all modules."""
Slope = tuple[dict[str, float], list[float]]
"""The loss of each task, and the derivative of their mean by every weight."""


@dataclass(kw_only=True)
class _Sum:
    """The weighted updates of several adapters on a base's layers. Inside `with`, they are added to the output."""

    layers: Mapping[str, nn.Module]
    factors: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    """Module path -> A of all adapters below each other, their B beside each other with the scale in it, and the number
    of the weight of each row of A."""
    weights: Tensor
    _hooks: list[RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> Self:
        for path, layer in self.layers.items():
            self._hooks.append(layer.register_forward_hook(self._hook(*self.factors[path])))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, a: Tensor, b: Tensor, numbers: Tensor) -> Any:
        def add(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            reduced = args[0].to(y.dtype) @ a.t().to(y.dtype)
            return y + (reduced * self.weights[numbers].to(y.dtype)) @ b.t().to(y.dtype)

        return add


@contextlib.contextmanager
def descending(
    run: Run, adapters: Mapping[str, Adapter], along: Sequence[Place], world: World
) -> Iterator[Callable[[Sequence[float]], Slope]]:
    """Gives what measures a sum of the tasks' adapters, with one weight for each place, on the tasks' test rows: the
    mean loss of a target of each task, and the derivatives. Every rank calls this, and that, alike; the base is placed
    once, as for evaluations, and figures are equal on all ranks.

    adapters: by task. Raises ConfigError for rows that cannot be used, and for a mixture's fused experts.
    """
    tokenizer = load_tokenizer(run.model)
    rows = {task: of_task for task, of_task in _test_rows(run, tokenizer).items() if task in adapters}
    pad, size = data.pad_id(tokenizer), min(run.evaluate.batch_size, run.train.micro_batch_size)
    counts = {task: sum(num_targets(data.collate([row], pad)) for row in of_task) for task, of_task in rows.items()}
    base = place(run, world, world.device)
    try:
        for of_task in rows.values():
            check(of_task, base.model)
        summed = _sum(base.model, adapters, along, world.device)

        def measure(point: Sequence[float]) -> Slope:
            summed.weights = torch.tensor(point, dtype=torch.float32, device=world.device, requires_grad=True)
            losses = torch.zeros(len(rows), dtype=torch.float64, device=world.device)
            for number, (task, of_task) in enumerate(rows.items()):
                own = sorted(of_task, key=lambda row: -row.num_tokens)[world.rank :: world.size]
                for first in range(0, -(-len(of_task) // world.size), size):  # equally often on every rank
                    batch = data.collate(own[first : first + size], pad).to(world.device)
                    loss = loss_sum(base.model, batch) / counts[task]
                    (loss / len(rows)).backward()
                    losses[number] += loss.detach()
            slope = summed.weights.grad
            assert slope is not None
            dist.all_reduce(slope)
            dist.all_reduce(losses)
            return dict(zip(rows, losses.tolist(), strict=True)), slope.tolist()

        with summed:
            yield measure
    finally:
        base.close()


def _sum(model: nn.Module, adapters: Mapping[str, Adapter], along: Sequence[Place], device: torch.device) -> _Sum:
    numbers = {place: number for number, place in enumerate(along)}
    modules = list(dict.fromkeys(module for adapter in adapters.values() for module in adapter.shapes))
    layers, factors = dict[str, nn.Module](), dict[str, tuple[Tensor, Tensor, Tensor]]()
    for module in modules:
        a, b, of_rows = list[Tensor](), list[Tensor](), list[int]()
        for task, adapter in adapters.items():
            shape = adapter.shapes.get(module)
            number = next(
                (numbers[task, name] for name in (module, kind(module), None) if (task, name) in numbers), None
            )
            for block in adapter.blocks if shape is not None and number is not None else ():
                assert shape is not None
                assert number is not None
                if module not in block.entries:
                    continue
                rank = block.rank_of(module)
                a.append(block.projection(module, shape[1]).float())
                b.append(block.scale * block.entries[module].dense(shape[0], rank).float())
                of_rows += [number] * rank
        if not a:
            continue
        try:
            layers[module] = model.get_submodule(module)
        except AttributeError:
            raise ConfigError(
                f"search.method: gradient does not reach {module}, a matrix of fused experts; use coordinate or cma"
            ) from None
        joined = torch.cat(a), torch.cat(b, dim=1), torch.tensor(of_rows)
        factors[module] = joined[0].to(device), joined[1].to(device), joined[2].to(device)
    return _Sum(layers=layers, factors=factors, weights=torch.zeros(len(along), device=device))
