"""A step of joint training with projected gradients against the same step without, and against a pass for each task."""

import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lori_dist import config
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach
from lori_dist.adapter.bases import features
from lori_dist.adapter.matching import match
from lori_dist.balances.ortho import order
from lori_dist.benchmarks._methods import make_llama
from lori_dist.benchmarks._timing import interleaved, one_thread, quotients
from lori_dist.engines.ddp import Replicated, build
from lori_dist.errors import ConfigError
from lori_dist.training.data import Batch
from lori_dist.training.device import dtype_of_base
from lori_dist.training.loss import task_loss_sums
from lori_dist.training.surgery import surgery
from lori_dist.training.weights import skeleton
from lori_dist.training.world import World, from_environment

VOCABULARY = 2048
LR = 1e-4
METHODS = {
    "lori_s": (0.1, "cached"),
    "lori_d": (1.0, "cached"),
    "lora": (1.0, "trained"),
}
"""Density of B, and what A is."""


def run(
    *,
    tasks: list[int] = [3, 8],  # noqa: B006  # read from the source, never shared
    balances: list[str] = [],  # noqa: B006
    rank: int = 32,
    layers: int = 4,
    hidden: int = 512,
    rows: int = 24,
    length: int = 64,
    steps: int = 7,
    dtype: str = "",
) -> dict[str, Any]:
    """Rows for a table, and ratios[method][tasks]: medians of quotients of steps taken in turns, with quartiles.

    tasks: how many, one measurement each. balances: further ways, by name, besides Ortho-LoRA. rank: of the adapters.
    layers, hidden: of a Llama with random weights. rows, length: of a batch, the same for all numbers of tasks. steps:
    timed. dtype: of the base, by default bfloat16 on CUDA, else float32. On CPU all run on one thread.

    plain: joint training without projection. joint: with it, from one backward pass. loop: as the paper prints it, a
    forward and a backward pass for each task, on its rows, then the gradients themselves projected, matrix by matrix.
    lori_s, lori_d: frozen A, a tenth or all of B; lora: A trained too.
    Raises ConfigError for fewer rows than tasks.
    """
    if max(tasks) > rows:
        raise ConfigError(f"bench joint: rows: got {rows} for {max(tasks)} tasks; give each at least one")
    dtype = dtype or dtype_of_base()
    world = from_environment()
    table: list[dict[str, Any]] = []
    ratios: dict[str, Any] = {method: {} for method in METHODS}
    with tempfile.TemporaryDirectory() as place, one_thread():
        base = Path(place)
        make_llama(base, layers, hidden, length, VOCABULARY)
        for method in METHODS:
            for num_tasks in tasks:
                batch = _batch(num_tasks, rows, length)
                seconds = _measure(base, method, rank, dtype, batch, world, steps, balances)
                table += [_row(method, num_tasks, name, times, batch) for name, times in seconds.items()]
                ratios[method][str(num_tasks)] = {
                    **quotients("joint_over_plain", seconds["joint"], seconds["plain"]),
                    **quotients("loop_over_plain", seconds["loop"], seconds["plain"]),
                    **quotients("loop_over_joint", seconds["loop"], seconds["joint"]),
                    **{
                        key: value
                        for name in balances
                        for key, value in quotients(f"{name}_over_plain", seconds[name], seconds["plain"]).items()
                    },
                }
    return {"rows": table, "ratios": ratios}


def _batch(num_tasks: int, rows: int, length: int) -> Batch:
    """Rows of all tasks, task by task, in one micro-batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    counts = [len(range(task, rows, num_tasks)) for task in range(num_tasks)]
    tasks = tuple((task, count * length) for task, count in enumerate(counts))
    weights = torch.tensor([1 / (count * (length - 1)) for count in counts])
    return Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, tasks=tasks, weights=weights)


def _measure(
    base: Path, method: str, rank: int, dtype: str, batch: Batch, world: World, steps: int, balances: Sequence[str]
) -> dict[str, list[float]]:
    """Seconds of every step, of ways that take turns."""
    assert batch.weights is not None
    names = [f"task-{number}" for number in range(len(batch.weights))]
    plain, joint, loop = (_engine(base, method, rank, dtype, world) for _ in range(3))
    projecting = surgery(joint.model.module, names, world)

    def balanced(name: str) -> Callable[[], object]:
        engine = _engine(base, method, rank, dtype, world)
        tasks = surgery(engine.model.module, names, world, balance=name)
        return lambda: engine.step([batch], num_targets=1, lr=LR, tasks=tasks)

    return interleaved(
        {
            "plain": lambda: plain.step([batch], num_targets=1, lr=LR),
            "joint": lambda: joint.step([batch], num_targets=1, lr=LR, tasks=projecting),
            "loop": _loop(loop, batch, world),
            **{name: balanced(name) for name in balances},
        },
        steps,
    )


def _engine(base: Path, method: str, rank: int, dtype: str, world: World) -> Replicated:
    density, projection = METHODS[method]
    model, weights = skeleton(config.Model(path=str(base), dtype=dtype))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    masks = {
        path: torch.rand(features(module)[0], rank, generator=generator) < density
        for path, module in match(model, "all-linear").items()
    }
    spec: Any = {"dtype": torch.float32 if projection == "trained" else getattr(torch, dtype), "projection": projection}
    attach(model, Spec(rank=rank, alpha=2.0 * rank, seed=0, **spec), masks=masks)
    return build(model, weights, config.Train(steps=1), world, state=None)


# --- as the paper prints it ------------------------------------------------------------------------------------------


def _loop(engine: Replicated, batch: Batch, world: World) -> Callable[[], None]:
    """A step with a pass for each task."""
    assert batch.tasks is not None
    parts = [_only(batch, task) for task, _ in batch.tasks]
    parameters = list(engine.parameters.values())

    def step() -> None:
        gradients: list[list[Tensor]] = []
        for part in parts:
            with engine.model.no_sync():
                task_loss_sums(engine.model, part.to(world.device)).sum().backward()
            gradients.append([_taken(parameter) for parameter in parameters])
        in_order = order(len(parts), 0, engine.num_steps)
        for number, parameter in enumerate(parameters):
            parameter.grad = _projected([of_task[number] for of_task in gradients], in_order)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        engine.num_steps += 1

    return step


def _only(batch: Batch, task: int) -> Batch:
    assert batch.tasks is not None
    ends = list(itertools.accumulate((count // batch.input_ids.shape[1] for _, count in batch.tasks), initial=0))
    rows = slice(ends[task], ends[task + 1])
    tensors = {name: getattr(batch, name)[rows] for name in ("input_ids", "attention_mask", "labels")}
    return replace(batch, **tensors, tasks=(batch.tasks[task],))


def _taken(parameter: nn.Parameter) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    return gradient


def _projected(own: Sequence[Tensor], in_order: Sequence[int]) -> Tensor:
    made = [gradient.clone() for gradient in own]
    squared = [float(gradient @ gradient) for gradient in own]
    for i in in_order:
        for j in in_order:
            inner = float(made[i] @ own[j])
            if i != j and inner < 0 and squared[j] > 0:
                made[i].sub_(own[j], alpha=inner / squared[j])
    return torch.stack(made).sum(0)


# --- figures ---------------------------------------------------------------------------------------------------------


def _row(method: str, num_tasks: int, name: str, times: Sequence[float], batch: Batch) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "method": method,
        "tasks": num_tasks,
        "way": name,
        "step_seconds": round(median, 4),
        "tokens_per_second": round(batch.input_ids.numel() / median),
    }
