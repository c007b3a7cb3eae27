"""Several tasks' trainings at once over one copy of the base: each gets what it would get alone.

Rows of the tasks share batches, which is one pass over the base for all of them. A task has its own A, mask, optimizer
state, learning rate, number of steps, folder and checkpoints; what goes wrong in one ends that one.
"""

import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from lori_dist import plugin
from lori_dist.adapter import file, packed
from lori_dist.adapter.packed import Routing, adapter_of, module_of
from lori_dist.config import Run
from lori_dist.errors import ConfigError, JobError, LoriError
from lori_dist.training import checkpoint, data, flops, metrics
from lori_dist.training.data import Batch, Example
from lori_dist.training.device import memory
from lori_dist.training.divergence import not_finite
from lori_dist.training.engine import QUANTITIES, Engine, Part, Quantity, State, gather
from lori_dist.training.exchange import Exchange
from lori_dist.training.model import check, identity
from lori_dist.training.preemption import Notice, preempted
from lori_dist.training.schedule import learning_rate
from lori_dist.training.train import (
    ADAPTER,
    CALIBRATE,
    CALIBRATED,
    CHECKPOINTS,
    Job,
    Phase,
    append,
    calibrated_masks,
    checkpoint_activations,
    digest_of,
    diverged,
    is_calibrated,
    is_due,
    notice_after,
    origin_of,
    phases_of,
    rewind,
    rows_of_step,
    spec_of,
)
from lori_dist.training.weights import skeleton
from lori_dist.training.world import World, agree, from_first

log = logging.getLogger(__name__)

Outcome = dict[str, Any] | LoriError
"""Of one task: what `train.train` returns, or raises."""


def train_packed(run: Run, jobs: Mapping[str, Callable[[], Job]], world: World) -> dict[str, Outcome]:
    """Trains a task's adapter in each job, all at once. Every rank calls this.

    jobs: task -> what makes its job, reading its rows. Returns what became of each task.
    """
    start = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    members: dict[str, Job] = {}
    for task, make in jobs.items():
        made = agreed(world, make)
        if isinstance(made, LoriError):
            outcomes[task] = made
        else:
            members[task] = made
            made.folder.mkdir(parents=True, exist_ok=True)
    steps = {task: phases_of(job) for task, job in members.items()}
    masks: dict[str, Mapping[str, Tensor]] = {}
    if run.adapter.density < 1:
        _calibrate(members, {task: of_task[0] for task, of_task in steps.items()}, outcomes)
        for task, job in _left(members, outcomes).items():
            masks[task] = calibrated_masks(job, steps[task][0])
        gc.collect()
    left = _left(members, outcomes)
    if left:
        pack = Pack.build(left, {task: steps[task][-1] for task in left}, masks or None)
        outcomes |= pack.run()
        for task, job in _left(left, outcomes).items():
            outcomes[task] = pack.publish(job, steps[task][-1], start)
        pack.engine.close()
    return {task: outcomes[task] for task in jobs}


def agreed(world: World, make: Callable[[], Job]) -> Job | LoriError:
    """A job, or, on all ranks, the mistake in its rows that any of them met."""
    made: Job | LoriError
    try:
        made = make()
    except (ConfigError, JobError) as error:
        made = error
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, made if isinstance(made, LoriError) else None)
    return next((error for error in found if error is not None), made)


def _left(jobs: Mapping[str, Job], outcomes: Mapping[str, Outcome]) -> dict[str, Job]:
    return {task: job for task, job in jobs.items() if task not in outcomes}


def _calibrate(members: Mapping[str, Job], steps: Mapping[str, Phase], outcomes: dict[str, Outcome]) -> None:
    """Leaves each task's calibrated B in its folder, where that is not there from an earlier attempt."""
    missing = {task: job for task, job in members.items() if not is_calibrated(job, steps[task])}
    if not missing:
        return
    pack = Pack.build(missing, {task: steps[task] for task in missing}, None)
    outcomes |= pack.run()
    for task, job in _left(missing, outcomes).items():
        if job.world.rank == 0:
            job.still_mine()
        view = pack.view(task)
        path, origin = job.folder / CALIBRATED, origin_of(job, steps[task])
        checkpoint.write_state(path, CALIBRATE, view, job.world, origin=origin, quantities=("values",))
        if job.world.rank == 0:
            checkpoint.delete(job.folder / CHECKPOINTS, CALIBRATE)
    pack.engine.close()


# --- one phase of all ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Gradients:
    """The `TaskGradients` of a pack: each task's gradient over all ranks, clipped by its own norm."""

    routing: Routing
    world: World
    max_norm: float | None
    norms: dict[str, float] = field(default_factory=dict)
    """Of the last step, before clipping."""
    _exchange: Exchange | None = field(default=None, init=False)

    def begin(self, batch: Batch) -> None:
        assert batch.tasks is not None
        self.routing.begin(batch.tasks, batch.input_ids.shape[1])

    @torch.no_grad()
    def gradient(self, parts: Mapping[str, Part], step: int, losses: Sequence[Tensor]) -> dict[str, Tensor]:
        if self._exchange is None:
            self._exchange = Exchange(parts, 1, self.world)
        own = [(name, summed[0]) for name, summed in self._exchange.reduce(self.routing.sums)]
        numbers = {name: number for number, name in enumerate(self.routing.names)}
        squares = torch.zeros(len(numbers), device=self.world.device)
        if own:
            which = torch.tensor([numbers[adapter_of(name)] for name, _ in own], device=squares.device)
            found = torch.stack(torch._foreach_norm([gradient for _, gradient in own])).square()
            squares.index_add_(0, which, found)
        if self.world.size > 1:
            dist.all_reduce(squares)
        norms = squares.sqrt()
        factors = torch.ones_like(norms) if self.max_norm is None else (self.max_norm / (norms + 1e-6)).clamp(max=1.0)
        made = []
        for name, gradient in own:
            number = numbers[adapter_of(name)]
            # A task that is to be stopped does not move any more, and hands nothing on.
            made.append((name, torch.where(norms[number].isfinite(), gradient * factors[number], 0.0)))
        shared = self._exchange.share(made)
        self.routing.sums.clear()  # which between steps would be as much as the values of all tasks
        self.norms = dict(zip(self.routing.names, norms.tolist(), strict=True))
        return shared


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One task's part of an engine, as far as saving it takes one."""

    engine: Engine
    task: str
    num_steps: int

    def parts(self, quantity: Quantity) -> dict[str, Part]:
        parts = self.engine.parts(quantity)
        return {module_of(name): part for name, part in parts.items() if adapter_of(name) == self.task}


@dataclass(kw_only=True, slots=True)
class Pack:
    """A phase of several tasks."""

    jobs: Mapping[str, Job]
    steps: Mapping[str, Phase]
    masks: Mapping[str, Mapping[str, Tensor]] | None
    model: PreTrainedModel
    engine: Engine
    gradients: Gradients
    done: dict[str, int]
    """Steps of each task."""
    mfu: flops.Utilisation
    losses: dict[str, float | None]
    """Of each task's last step."""

    @classmethod
    def build(
        cls, jobs: Mapping[str, Job], steps: Mapping[str, Phase], masks: Mapping[str, Mapping[str, Tensor]] | None
    ) -> "Pack":
        """Goes on from each task's newest checkpoint."""
        first = next(iter(jobs.values()))
        run, world = first.run, first.world
        model, weights = skeleton(run.model)
        for job in jobs.values():
            check(job.examples[0], model)
        routing = packed.attach(model, {task: spec_of(run, task) for task in jobs}, masks)
        if run.train.activation_checkpointing:
            checkpoint_activations(model)
        mfu = flops.utilisation(model, run, world)  # before an engine shards the model
        found = {task: _newest(job, steps[task], _of(masks, task)) for task, job in jobs.items()}
        shapes = {name: parameter.numel() for name, parameter in packed.trainable(model)}
        method = plugin.find("engines", run.train.engine.name, "build", "train.engine")
        options = method.bind(run.train.engine.options, "train.engine")
        # Each task is clipped by itself.
        train = dataclasses.replace(run.train, clip=None)
        engine: Engine = method.load()(model, weights, train, world, state=_joined(found, shapes), **options)
        done = {task: state.step if state else 0 for task, state in found.items()}
        agree(world, str(done), "newest checkpoints", "give an output folder that all ranks share")
        if world.rank == 0:
            for task, job in jobs.items():
                rewind(job, steps[task], done[task])
        gradients = Gradients(routing=routing, world=world, max_norm=run.train.clip)
        losses = {task: state.notes.get("loss") if state else None for task, state in found.items()}
        return cls(
            jobs=jobs,
            steps=steps,
            masks=masks,
            model=model,
            engine=engine,
            gradients=gradients,
            mfu=mfu,
            done=done,
            losses=losses,
        )

    def run(self) -> dict[str, Outcome]:
        """Does all steps of all tasks. Returns those that failed."""
        failed: dict[str, Outcome] = {}
        while True:
            going = [task for task in self.jobs if task not in failed and self.done[task] < self.steps[task].num_steps]
            if not going:
                return failed
            failed |= self._step(going)
            self._save_if_told([task for task in self.jobs if task not in failed])

    def view(self, task: str) -> Engine:
        return View(engine=self.engine, task=task, num_steps=self.done[task])  # type: ignore[return-value]

    def _step(self, going: Sequence[str]) -> dict[str, Outcome]:
        start = time.monotonic()
        first = next(iter(self.jobs.values()))
        rates = {task: self._rate(task) if task in going else 0.0 for task in self.jobs}
        rows = {task: self._rows(task) for task in going}
        batches = self._batches(rows)
        data_wait = time.monotonic() - start
        result = self.engine.step(batches, num_targets=1, lr=list(rates.values()), tasks=self.gradients)
        seconds = time.monotonic() - start
        losses = dict(zip(self.jobs, result.task_losses or (result.loss,), strict=True))
        failed: dict[str, Outcome] = {}
        lengths = [self.jobs[task].examples[0][row].num_tokens for task in going for row in rows[task]]
        mfu = self.mfu(sum(lengths), seconds, lengths)
        for task in going:
            job, phase, loss, norm = self.jobs[task], self.steps[task], losses[task], self.gradients.norms[task]
            problem = not_finite(loss, norm)
            if problem is not None:
                failed[task] = diverged(job, phase, self.done[task] + 1, problem, rates[task])
                continue
            self.done[task] += 1
            self.losses[task] = loss
            examples = [job.examples[0][row] for row in rows[task]]
            num_tokens = sum(example.num_tokens for example in examples)
            if job.world.rank == 0:
                record = {
                    "phase": phase.name,
                    "step": self.done[task],
                    "num_steps": phase.num_steps,
                    "steps_left": phase.num_steps - self.done[task] + phase.steps_after,
                    "loss": loss,
                    "lr": rates[task],
                    "grad_norm": norm,
                    "tokens": num_tokens,
                    "seconds": seconds,
                    "tokens_per_second": num_tokens / seconds,
                    "mfu": mfu,
                    "packed": len(going),
                    "memory": memory(first.world.device),
                    "data_wait": data_wait,
                    "time": time.time(),
                }
                append(job, metrics.METRICS, record)
                job.track(record)
                job.progress(record)
            if is_due(job, phase, self.done[task]):
                self._save(task)
        return failed

    def _save_if_told(self, tasks: Sequence[str]) -> None:
        """tasks: that have not failed. Those that have done all of their steps have them in memory alone."""
        if not tasks:
            return
        first = min(tasks, key=lambda task: self.done[task] - self.steps[task].num_steps)  # the one with most to do
        notice = notice_after(self.jobs[first], self.steps[first], self.done[first])
        if notice:
            for task in tasks:
                self._save(task)
        if notice > Notice.NODE:
            from_first(self.jobs[first].world, lambda: None)  # which may be writing, and ends with the first that ends
            raise preempted(
                notice, {task: (self.done[task], self.steps[task].num_steps, self.steps[task].name) for task in tasks}
            )

    def _save(self, task: str) -> None:
        job, phase = self.jobs[task], self.steps[task]
        checkpoint.save(
            job.folder / CHECKPOINTS,
            phase.name,
            self.view(task),
            job.world,
            origin={**origin_of(job, phase), "mask": digest_of(_of(self.masks, task))},
            keep=job.run.train.keep,
            still_mine=job.still_mine,
            notes={"loss": self.losses[task]},
        )

    def _rate(self, task: str) -> float:
        phase, train = self.steps[task], self.jobs[task].run.train
        return learning_rate(
            self.done[task],
            num_steps=phase.num_steps,
            lr=phase.lr,
            schedule=train.schedule,
            warmup_steps=train.warmup_steps,
        )

    def _rows(self, task: str) -> list[int]:
        return [row for _, row in rows_of_step(self.jobs[task], self.steps[task], self.done[task])]

    def _batches(self, rows: Mapping[str, Sequence[int]]) -> list[Batch]:
        """Each task's micro-batches one after the other in one, with as many rows of each: what lacks is padding."""
        first = next(iter(self.jobs.values()))
        world, size = first.world, first.run.train.micro_batch_size
        pieces = {task: data.micro_batches(of_task, world.rank, world.size, size) for task, of_task in rows.items()}
        counts = {
            task: sum(self.jobs[task].examples[0][row].num_targets for row in of_task) for task, of_task in rows.items()
        }
        weights = torch.tensor([1.0 / counts[task] if task in counts else 0.0 for task in self.jobs])
        numbers = {task: number for number, task in enumerate(self.jobs)}
        batches = []
        for place in range(max(map(len, pieces.values()))):
            now = {task: of_task[place] if place < len(of_task) else [] for task, of_task in pieces.items()}
            most = max(1, *map(len, now.values()))
            nothing = Example(prompt="", response="", prompt_ids=(first.pad_id,), response_ids=())
            examples = [
                example
                for task, piece in now.items()
                for example in [*(self.jobs[task].examples[0][row] for row in piece), *[nothing] * (most - len(piece))]
            ]
            tasks = tuple(numbers[task] for task in now for _ in range(most))
            batches.append(dataclasses.replace(data.collate(examples, first.pad_id), tasks=tasks, weights=weights))
        return batches

    def publish(self, job: Job, phase: Phase, start: float) -> dict[str, Any]:
        """Writes a task's adapter, and returns what `train.train` would."""
        values = gather(self.view(job.task), "values", job.world)
        path = job.folder / ADAPTER

        def write() -> dict[str, Any]:
            job.still_mine()
            adapter = packed.extract(self.model, job.task, values, base=identity(job.run.model))
            file.save(adapter, path)
            return {
                "kept": adapter.kept,
                "total": adapter.total,
                "bytes": path.stat().st_size,
                "steps": phase.num_steps,
                "loss": self.losses[job.task],
                "seconds": time.monotonic() - start,
            }

        return from_first(job.world, write)


def _of(masks: Mapping[str, Mapping[str, Tensor]] | None, task: str) -> Mapping[str, Tensor] | None:
    return None if masks is None else masks[task]


def _newest(job: Job, phase: Phase, masks: Mapping[str, Tensor] | None) -> State | None:
    origin = {**origin_of(job, phase), "mask": digest_of(masks)}
    return checkpoint.newest(job.folder / CHECKPOINTS, phase.name, origin)


def _joined(found: Mapping[str, State | None], shapes: Mapping[str, int]) -> State | None:
    """The states of the tasks as one; zero where a task has none."""
    if not any(found.values()):
        return None

    def quantity(of: Quantity) -> dict[str, Tensor]:
        states = {name: found[adapter_of(name)] for name in shapes}
        return {
            name: torch.zeros(shapes[name]) if state is None else getattr(state, of)[module_of(name)]
            for name, state in states.items()
        }

    steps = {task: state.step if state else 0 for task, state in found.items()}
    values, exp_avg, exp_avg_sq = (quantity(of) for of in QUANTITIES)
    return State(step=max(steps.values()), steps=steps, values=values, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
