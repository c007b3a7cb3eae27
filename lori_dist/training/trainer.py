"""The loop: a phase of one task, or of several over one copy of the base.

Rows of several tasks share batches, which is one pass over the base for all of them. Each task has its own A, mask,
moments, learning rate, number of steps, validation, folder and checkpoints, and gets what it would get alone; what goes
wrong in one ends that one.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from lori_dist import config, plugin
from lori_dist.adapter import form_states, packed
from lori_dist.adapter.adapter import Adapter
from lori_dist.adapter.attach import attach, extract, projection_checksums, refuse_other_projections
from lori_dist.adapter.formed import penalties_of
from lori_dist.adapter.routing import Routing, adapter_of, module_of, name_of
from lori_dist.adapter.splitting import of_task
from lori_dist.adapter.task_adapter import TaskAdapter, extract_formed
from lori_dist.adapter.task_column import routing_of
from lori_dist.errors import ConfigError, JobError, LoriError
from lori_dist.formats import forms, native
from lori_dist.training import checkpoint, conflicts, data, flops, sequence_parallel, validation
from lori_dist.training.ahead import Ahead
from lori_dist.training.compilation import compile_blocks
from lori_dist.training.data import Batch
from lori_dist.training.determinism import set_deterministic
from lori_dist.training.device import memory, reset_peak
from lori_dist.training.divergence import MOST, UPDATE, Divergence, not_finite
from lori_dist.training.engine import (
    QUANTITIES,
    Engine,
    Part,
    Quantity,
    State,
    StepResult,
    gather,
    held_of_base,
    trained,
)
from lori_dist.training.exchange import Exchange
from lori_dist.training.metrics import METRICS, Record
from lori_dist.training.model import check_fit, identity
from lori_dist.training.phases import TRAIN, Phase
from lori_dist.training.preemption import Notice, of_any, preempted
from lori_dist.training.sequences import Share
from lori_dist.training.sliced import slice_mlps
from lori_dist.training.surgery import Surgery, surgery
from lori_dist.training.task import (
    ADAPTER,
    CHECKPOINTS,
    Course,
    End,
    Job,
    append,
    digest_of,
    form_of,
    num_rows,
    origin_of,
    rewind,
    spec_of_job,
    state_of,
)
from lori_dist.training.weights import Weights, skeleton
from lori_dist.training.world import World, agree, from_first

STATES = "states"
"""Key in the notes of a checkpoint of what the layers of a form keep beside what is trained."""
ALONE = ""
"""The name of the adapter of a task that has the base for itself, in the names of what is trained."""

Masks = Mapping[str, Tensor] | None
"""Module path -> the entries of B that are kept, bool; None: all."""

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Gradients:
    """The `TaskGradients` of several tasks: each one's gradient over all ranks, clipped by its own norm."""

    routing: Routing
    world: World
    max_norm: float | None
    norms: dict[str, float] = field(default_factory=dict)
    """Norms of the last step, before clipping."""
    _exchange: Exchange | None = field(default=None, init=False)

    def begin(self, batch: Batch) -> None:
        assert batch.tasks is not None
        self.routing.begin_tokens(batch.tasks)

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
            # An engine may refuse a step for all tasks where one gradient is not finite.
            made.append((name, torch.where(norms[number].isfinite(), gradient * factors[number], 0.0)))
        shared = self._exchange.share(made)
        self.routing.sums.clear()  # which between steps would be as much as the values of all tasks
        self.norms = dict(zip(self.routing.names, norms.tolist(), strict=True))
        return shared


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One task's part of an engine, as far as saving it takes one."""

    engine: Engine
    adapter: str
    num_steps: int

    def parts(self, quantity: Quantity) -> dict[str, Part]:
        parts = self.engine.parts(quantity)
        return {module_of(name): part for name, part in parts.items() if adapter_of(name) == self.adapter}


Steps = tuple[tuple[str, int], ...]
"""Tasks, and the step that each is at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """All that a step needs of its rows."""

    batches: Sequence[Batch]
    """The rank's micro-batches, on its device."""
    num_targets: int
    """Targets of the step over all ranks; 1 where batches have weights."""
    lengths: Mapping[str, Sequence[int]]
    """Tokens of each task's rows, over all ranks."""


@dataclass(kw_only=True, slots=True)
class Group:
    """A phase of one or several tasks over one base."""

    courses: Mapping[str, Course]
    """The course of each task."""
    model: PreTrainedModel
    engine: Engine
    routing: Routing | None
    """None where one task has the base for itself."""
    gradients: Surgery | Gradients | None
    """Makes the gradient of a step, if it is not the sum over the rows."""
    mfu: flops.Utilisation
    share: Share
    """Whether rows of several tasks share sequences."""
    ranks: sequence_parallel.Group
    """The ranks that divide rows among them."""
    _ahead: Ahead[Steps, Made] = field(init=False)

    def __post_init__(self) -> None:
        self._ahead = Ahead(self._made)

    @classmethod
    def build(cls, jobs: Mapping[str, Job], phases: Mapping[str, Phase], masks: Mapping[str, Masks]) -> "Group":
        """A phase that continues from each task's newest checkpoint. A collective."""
        first = next(iter(jobs.values()))
        run, world = first.run, first.world
        set_deterministic(run.train.deterministic)
        model, weights, routing = _adapted_model(jobs, masks)
        sizes = {name: parameter.numel() for name, parameter in trained(model).items()}
        mfu = flops.utilisation(model, run, world)  # before an engine shards the model
        reset_peak(world.device)
        courses, states = dict[str, Course](), dict[str, State | None]()
        for task, job in jobs.items():
            adapter = ALONE if routing is None else task
            origin = {**origin_of(job, phases[task]), "mask": digest_of(masks.get(task))}
            found = checkpoint.newest(job.folder / CHECKPOINTS, phases[task].name, origin)
            done = 0 if found is None else found.step + found.skipped
            agree(world, str(done), f"newest checkpoint in {job.folder}", "give an output folder that all ranks share")
            courses[task] = Course(
                job=job,
                phase=phases[task],
                origin=origin,
                num_entries=sum(size for name, size in sizes.items() if adapter_of(name) == adapter),
                num_updates=0 if found is None else found.step,
                end=End(step=done),
                divergence=Divergence(job.run.train.spike, []),
                notes={} if found is None else found.notes,
            )
            states[task] = state_of(job.start) if found is None and job.start is not None else found
        method = plugin.find("engines", run.train.engine.name, "build", "train.engine")
        options = method.bind(run.train.engine.options, "train.engine")
        gradients: Surgery | Gradients | None
        if routing is None:
            gradients, train, state = _surgery(first, model), run.train, next(iter(states.values()))
            [course] = courses.values()
            if gradients is not None:
                gradients.state = course.notes.get("balance", {})
        else:
            gradients = Gradients(routing=routing, world=world, max_norm=run.train.clip)
            train, state = dataclasses.replace(run.train, clip=None), _joined(states)
        ranks = sequence_parallel.join(run.train, world)
        sequence_parallel.divide_attention(model, ranks, run.train.max_length)
        if run.train.compile:
            compile_blocks(model)
        engine: Engine = method.load()(model, weights, train, world, state=state, **options)
        if routing is None:
            form_states.take(model, next(iter(courses.values())).notes.get(STATES, {}))
        checksums = projection_checksums(model)
        remedy = "install the same version of the program on all machines"
        agree(world, json.dumps(checksums), "projection A", remedy)
        for task, job in jobs.items():
            if job.start is not None:
                adapter = ALONE if routing is None else task
                own = {module_of(name): found for name, found in checksums.items() if adapter_of(name) == adapter}
                refuse_other_projections(job.start.blocks[0], own)
        return cls(
            courses=courses,
            model=model,
            engine=engine,
            routing=routing,
            gradients=gradients,
            mfu=mfu,
            share=Share.NO if routing is None and first.joint is None else _share(first, model),
            ranks=ranks,
        )

    def run(self) -> dict[str, LoriError]:
        """Does the steps that are left, each task to its last one or until it ends early with its best values. Returns
        what has ended a task before."""
        for course in self.courses.values():
            if course.job.world.rank == 0:
                rewind(course.job, course.phase, course.end.step)
                log.info("%s: %s", course.job.name, self._announced(course))
            course.recall()
            if course.end.step == 0 and course.job.run.train.on_divergence == "rollback":
                self._save(course)
        self._begin(tuple((task, course.end.step) for task, course in self.courses.items() if course.is_active))
        try:
            while active := [task for task, course in self.courses.items() if course.is_active]:
                self._step(active)
                self._end_if_asked()
        finally:
            self._ahead.close()
        for task in self._whole():
            self._take_best(task)
        return {task: course.error for task, course in self.courses.items() if course.error is not None}

    def view(self, task: str) -> Engine:
        adapter = self._adapter(task)
        return View(engine=self.engine, adapter=adapter, num_steps=self.courses[task].num_updates)  # type: ignore[return-value]

    def write_adapter(self, task: str) -> Adapter | TaskAdapter | None:
        """Writes what was trained to the task's folder, and returns it on rank 0, which alone has it. A collective.

        Only values are gathered, and rank 0 holds them once.
        """
        job = self.courses[task].job
        values = gather(self.view(task), "values", job.world)
        if job.world.rank > 0:
            return None
        job.still_mine()
        base = identity(job.run.model)
        form = form_of(job.run, task)
        if form is not None and not form.settles and (form.is_per_task or form.is_dependent):
            of_tasks = extract_formed(self.model, values=values, base=base)
            forms.save(of_tasks, job.folder / ADAPTER)
            return of_tasks
        if form is not None:  # one update for all tasks, which is an ordinary adapter
            adapter = of_task(extract_formed(self.model, values=values, base=base), form.tasks[0])
            [block] = adapter.blocks
            adapter = dataclasses.replace(adapter, blocks=(dataclasses.replace(block, name=task),))
        else:
            adapter = extract(self.model, name=task, values=values, base=base)
        if job.before is not None:
            adapter = dataclasses.replace(adapter, blocks=(*job.before.blocks, *adapter.blocks))
        native.save(adapter, job.folder / ADAPTER)
        return adapter

    # --- a step ------------------------------------------------------------------------------------------------------

    def _step(self, active: Sequence[str]) -> None:
        """One step of the tasks that have any left; the others stay as they are, bit for bit."""
        start = time.monotonic()
        courses = {task: self.courses[task] for task in active}
        first = courses[active[0]]
        first.seed()
        rates = {task: course.lr for task, course in courses.items()}
        now = tuple((task, course.end.step) for task, course in courses.items())
        made = self._ahead.take(now)
        data_wait = time.monotonic() - start
        self._begin(tuple((task, step + 1) for task, step in now))
        results: dict[str, StepResult] = {}
        mixes = self.routing is not None and len(active) > 1 and self.share is Share.YES
        is_mixed = False

        def accept(result: StepResult) -> bool | dict[str, bool]:
            nonlocal is_mixed
            results.update(self._results(result, active))
            is_mixed = mixes and any(not_finite(one.loss, one.grad_norm) for one in results.values())
            if is_mixed:
                return dict.fromkeys(self.courses, False)
            answers = {task: course.divergence.accepts(results[task]) for task, course in courses.items()}
            if self.routing is None:
                return answers[active[0]]
            return {task: answers.get(task, False) for task in self.courses}

        if (penalties := penalties_of(self.model)) is not None:
            penalties.num_micro_batches = len(made.batches)
        of_all = {task: rates.get(task, 0.0) for task in self.courses}
        lr = of_all[active[0]] if self.routing is None else of_all
        if self.gradients is None:
            result = self.engine.step(made.batches, num_targets=made.num_targets, lr=lr, accept=accept)
        else:
            result = self.engine.step(made.batches, num_targets=1, lr=lr, tasks=self.gradients, accept=accept)
            if is_mixed:
                # In a sequence, what is not finite in one task's rows reaches the others': a mask multiplies it by 0.
                mixes, made = False, self._made(now, Share.NO)
                result = self.engine.step(made.batches, num_targets=1, lr=lr, tasks=self.gradients, accept=accept)
        if not results:  # an engine of the user's own may do every step without asking
            results.update(self._results(result, active))
        reduce = dist.all_reduce if first.job.world.size > 1 else None
        form_states.end_step(self.model, reduce, is_taken=first.divergence.problem is None)
        seconds = time.monotonic() - start
        lengths = made.lengths
        together = [length for of_task in lengths.values() for length in of_task]
        mfu = self.mfu(sum(together), seconds, together)
        for task, course in courses.items():
            num_tokens, phase = sum(lengths[task]), course.phase
            record: Record = {
                "phase": phase.name,
                "step": course.end.step + 1,
                "num_steps": phase.num_steps,
                "steps_left": phase.num_steps - course.end.step - 1 + phase.steps_after,
                "loss": results[task].loss,
                "lr": rates[task],
                "grad_norm": results[task].grad_norm,
                "tokens": num_tokens,
                "seconds": seconds,
                "tokens_per_second": num_tokens / seconds,
                "mfu": mfu,
                **({} if self.routing is None else {"packed": len(active)}),
                "memory": memory(course.job.world.device),
                "data_wait": data_wait,
                "time": time.time(),
                **self._of_tasks(course.job, results[task]),
            }
            try:
                self._after(task, record)
            except JobError as error:
                course.error = error

    def _begin(self, steps: Steps) -> None:
        """Begins to make the batches of steps, of those tasks that have so many."""
        left = tuple((task, step) for task, step in steps if step < self.courses[task].phase.num_steps)
        if left:
            self._ahead.begin(left)

    def _made(self, steps: Steps, share: Share | None = None) -> Made:
        """All that a step of some tasks needs of their rows. Another thread may call this. share: instead of the
        group's."""
        courses = {task: self.courses[task] for task, _ in steps}
        rows = {task: courses[task].rows(step) for task, step in steps}
        lengths = {
            task: [course.job.examples[which].num_tokens(row) for which, row in rows[task]]
            for task, course in courses.items()
        }
        batches, num_targets = self._batches(rows, share or self.share)
        device = next(iter(courses.values())).job.world.device
        return Made(batches=[batch.to(device) for batch in batches], num_targets=num_targets, lengths=lengths)

    def _batches(self, rows: Mapping[str, Sequence[tuple[int, int]]], share: Share) -> tuple[list[Batch], int]:
        """This rank's micro-batches of a step, and the number of targets, which is 1 where batches have weights."""
        found, num_targets = self._of_group(rows, share)
        pad_id = next(iter(self.courses.values())).job.pad_id
        return [self.ranks.part(batch, pad_id) for batch in found], num_targets

    def _of_group(self, rows: Mapping[str, Sequence[tuple[int, int]]], share: Share) -> tuple[list[Batch], int]:
        """As `_batches`, of all ranks that divide rows among them."""
        courses = {task: self.courses[task] for task in rows}
        counts = {
            task: sum(course.job.examples[which].num_targets(row) for which, row in rows[task])
            for task, course in courses.items()
        }
        if self.routing is None:
            [(task, course)] = courses.items()
            found = course.batches(rows[task], share, self.ranks)
            return found, counts[task] if course.job.joint is None else 1  # of all ranks, and nothing is sent
        numbers = {task: number for number, task in enumerate(self.courses)}
        weights = torch.tensor([1.0 / counts[task] if task in counts else 0.0 for task in self.courses])
        first, max_length = (
            next(iter(courses.values())).job,
            max(one.job.run.train.max_length for one in courses.values()),
        )
        pieces = {
            task: course.pieces(rows[task], self.ranks, share, is_alone=False) for task, course in courses.items()
        }
        together = []
        for place in range(max(map(len, pieces.values()))):
            now = {
                numbers[task]: [courses[task].job.examples[which][row] for which, row in piece]
                for task, of_task in pieces.items()
                for piece in (of_task[place] if place < len(of_task) else [],)
            }
            together.append(data.together(now, weights, first.pad_id, share, max_length))
        return together, 1

    def _results(self, result: StepResult, active: Sequence[str]) -> dict[str, StepResult]:
        """Each task's own."""
        if not isinstance(self.gradients, Gradients):
            return {active[0]: result}
        losses = dict(zip(self.courses, result.task_losses or (result.loss,), strict=True))
        return {task: StepResult(loss=losses[task], grad_norm=self.gradients.norms[task]) for task in active}

    def _of_tasks(self, job: Job, result: StepResult) -> Record:
        """Additional entries in the record of a joint job."""
        if job.joint is None:
            return {}
        weighted = zip(job.joint.tasks, result.task_losses, job.joint.weights, strict=True)
        found: Record = {"task_losses": {task: loss / weight for task, loss, weight in weighted}}
        if isinstance(self.gradients, Surgery) and self.gradients.conflicts is not None:
            found |= conflicts.figures(self.gradients.conflicts, job.joint.tasks)
        return found

    def _after(self, task: str, record: Record) -> None:
        """Does what follows a step of a task. Raises JobError where the task ends with it."""
        course = self.courses[task]
        job, num_done = course.job, record["step"]
        if course.divergence.problem is None:
            course.num_updates += 1
        else:
            self._treat(task, record)
        best = course.end.best
        course.end = End(step=num_done, loss=record["loss"], best=best)
        if course.is_measured():
            record[validation.LOSS] = self._validation_loss(task)
            course.end = dataclasses.replace(course.end, best=best.after(num_done, record[validation.LOSS]))
        if job.world.rank == 0:
            if isinstance(self.gradients, Surgery) and self.gradients.conflicts is not None:
                cosines = conflicts.of_layers(self.gradients.conflicts)
                append(job, conflicts.FILE, {"phase": course.phase.name, "step": num_done, "cosines": cosines})
            append(job, METRICS, record)
            job.track(record)
            job.progress(record)
        if course.is_saved():
            self._save(course)

    def _treat(self, task: str, record: Record) -> None:
        """After a step whose update was left out: ends the task, or lets it continue, maybe with an earlier state."""
        course = self.courses[task]
        job, divergence = course.job, course.divergence
        policy, problem = job.run.train.on_divergence, str(divergence.problem)
        if policy == "stop":
            raise course.diverged(record["step"], problem, record["lr"])
        if divergence.in_a_row > MOST:
            raise course.diverged(record["step"], f"{problem}, as at the {MOST} steps before", record["lr"])
        said = course.described(record["step"], problem)
        record[UPDATE] = "skipped"
        if policy == "rollback":
            job.fetch()
            found = checkpoint.newest(job.folder / CHECKPOINTS, course.phase.name, course.origin)
            back = -1 if found is None else found.step + found.skipped
            remedy = "give an output folder that all ranks share"
            agree(job.world, str(back), f"newest checkpoint in {job.folder}", remedy)
            if found is None:
                raise JobError(f"{said}, and there is no checkpoint to go back to; lower the learning rate")
            self._load(task, found)
            record[UPDATE] = f"rolled back to step {back}"
        record.update({key: None for key in ("loss", "grad_norm") if not math.isfinite(record[key])})
        log.warning("%s; its update is %s", said, record[UPDATE])

    def _validation_loss(self, task: str) -> float:
        job = self.courses[task].job
        if self.routing is not None:
            self.routing.only(task)
        rows, losses, own = job.run.train.rows_at_once, list[float](), routing_of(self.model)
        for number, examples in enumerate(job.validation):
            if own is not None:
                own.only(own.names[number])
            losses.append(
                validation.measure(
                    self.engine, examples, job.world, batch_size=rows, pad_id=job.pad_id, ranks=self.ranks
                )
            )
        return sum(losses) / len(losses)

    # --- states ------------------------------------------------------------------------------------------------------

    def _adapter(self, task: str) -> str:
        return ALONE if self.routing is None else task

    def _whole(self) -> list[str]:
        return [task for task, course in self.courses.items() if course.error is None]

    def _end_if_asked(self) -> None:
        """Saves, and ends, where any rank was asked to: after the last step of all, what is left is not much more.

        Tasks that have done all of their steps have them in memory alone, so they are saved too.
        """
        courses = [self.courses[task] for task in self._whole()]
        if not courses or all(course.phase.name == TRAIN and not course.is_active for course in courses):
            return
        job = courses[0].job
        notice = of_any(job.stop_request(), job.world)
        if notice:
            for course in courses:
                if not course.is_saved():  # else it has just been
                    self._save(course)
        if notice > Notice.NODE:
            from_first(job.world, lambda: None)  # which may be writing, and ends with the first that ends
            raise preempted(
                notice,
                {one.job.task: (one.end.step, one.phase.num_steps, one.phase.name) for one in courses},
            )

    def _save(self, course: Course) -> None:
        job, end = course.job, course.end
        checkpoint.save(
            job.folder / CHECKPOINTS,
            course.phase.name,
            self.view(job.task),
            job.world,
            origin=course.origin,
            keep=job.run.train.keep,
            still_mine=job.still_mine,
            skipped=end.step - course.num_updates,
            spare=end.best.step if job.run.train.early_stop is not None else None,
            notes={**end.notes(course.divergence), **self._balance(), **self._states()},
        )

    def _balance(self) -> dict[str, Any]:
        """The state of the balance, which a resumed joint job needs."""
        if not isinstance(self.gradients, Surgery) or not self.gradients.state:
            return {}
        return {"balance": dict(self.gradients.state)}

    def _states(self) -> dict[str, Any]:
        """What the layers of a form keep beside what is trained."""
        states = form_states.states_of(self.model)
        return {STATES: states} if states else {}

    def _load(self, task: str, state: State) -> None:
        """Puts a task's state in place of its values and moments; those of others stay."""
        if self.routing is None:
            form_states.take(self.model, state.notes.get(STATES, {}))
        if isinstance(self.gradients, Surgery):
            self.gradients.state = state.notes.get("balance", {})
        self.courses[task].num_updates = state.step
        adapter = self._adapter(task)
        self.engine.load(state if self.routing is None else _named(state, adapter))

    def _take_best(self, task: str) -> None:
        """Loads the values with the lowest loss on validation rows, for a task that may end early."""
        course = self.courses[task]
        job, best = course.job, course.end.best
        if job.run.train.early_stop is None or best.step == 0:
            return
        path = checkpoint.file_of(job.folder / CHECKPOINTS, course.phase.name, best.step)
        from_first(job.world, lambda: None)  # which may be writing it
        job.fetch()
        try:
            self._load(task, checkpoint.read(path, course.phase.name, origin=course.origin))
        except checkpoint.Damaged as error:
            course.error = JobError(f"{error}; it has the best values, so delete {job.folder} to train again")

    def _announced(self, course: Course) -> str:
        """The line for people at the start of a phase: what is trained, by what, where, and what this rank holds of
        it."""
        job = course.job
        world, train, rows = job.world, job.run.train, num_rows(job)
        tokens = sum(len(examples) * examples.mean_tokens for examples in job.examples)
        per_step = tokens / rows * train.batch_size
        values = sum(part.data.numel() for part in self.view(job.task).parts("values").values())
        held, total = held_of_base(self.engine.model)
        return (
            f"phase {course.phase.name}, {course.phase.num_steps} steps of {train.batch_size} of {rows:,} rows (about "
            f"{per_step:,.0f} tokens), on {world.size} rank{'s' * (world.size > 1)} ({world.device.type}) with "
            f"{train.engine.name}; {course.num_entries:,} entries are trained; rank 0 holds {values:,} of them and "
            f"{held / max(total, 1):.0%} of the base's {total:,} weights"
        )


# --- the model -------------------------------------------------------------------------------------------------------


def _adapted_model(
    jobs: Mapping[str, Job], masks: Mapping[str, Masks]
) -> tuple[PreTrainedModel, Weights, Routing | None]:
    """The base without its weights, with adapters whose values are zero; its weights; and, for several tasks, what
    routes rows to adapters."""
    first = next(iter(jobs.values()))
    run = first.run
    model, weights = skeleton(run.model)
    if run.train.pack and (problems := list(config.unpackable(model.config.model_type))):
        raise ConfigError("\n".join(problems))
    for job in jobs.values():
        for examples in job.examples:
            check_fit(examples.longest, examples.largest, model)
    routing = None
    if len(jobs) > 1:
        specs = {task: spec_of_job(job) if job.start is None else job.start for task, job in jobs.items()}
        routing = packed.attach(model, specs, masks)
    elif first.start is None:
        attach(model, spec_of_job(first), masks=masks.get(next(iter(jobs))), before=first.before)
    else:
        attach(model, first.start, train=True)
    if run.train.mlp_slices > 1:
        slice_mlps(model, run.train.mlp_slices)
    if run.train.activation_checkpointing:
        checkpoint_activations(model)
    return model, weights, routing


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes the blocks forget their activations and compute them again in the backward pass."""
    # The first is the name of the second since transformers 5.20 or so.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            # transformers checkpoints modules in training mode only. That is for them alone: dropout stays off.
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


def _share(job: Job, model: PreTrainedModel) -> Share:
    """Whether rows of several tasks share sequences, which is said where they do not."""
    share = Share.of(job.run, model.config.model_type)
    if share is Share.NO and job.run.train.sequence_parallel == 1 and job.world.rank == 0:
        log.info(
            "%s: rows of several tasks are padded to the longest of a batch, as %s is not known to keep rows apart "
            "that share a sequence",
            job.name,
            model.config.model_type,
        )
    return share


def _surgery(job: Job, model: PreTrainedModel) -> Surgery | None:
    """The object that makes one gradient of the tasks', if the run asks for it."""
    joint = job.joint
    if joint is None or joint.balance == "none":
        return None
    return surgery(
        model,
        joint.tasks,
        job.world,
        balance=joint.balance,
        options=joint.options,
        granularity=joint.granularity,
        reduce=joint.reduce,
        seed=joint.seed,
    )


# --- states of several tasks -----------------------------------------------------------------------------------------


def _named(state: State, adapter: str) -> State:
    """A task's state under the names that its tensors have among those of others."""
    values, exp_avg, exp_avg_sq = (
        {name_of(path, adapter): tensor for path, tensor in getattr(state, quantity).items()} for quantity in QUANTITIES
    )
    steps = {adapter: state.step}
    return State(step=state.step, steps=steps, values=values, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


def _joined(states: Mapping[str, State | None]) -> State | None:
    """The states of all tasks as one, without the tensors of those that have none."""
    found = {task: state for task, state in states.items() if state is not None}
    if not found:
        return None
    named = [_named(state, task) for task, state in found.items()]

    def quantity(which: Quantity) -> dict[str, Tensor]:
        return {name: tensor for state in named for name, tensor in getattr(state, which).items()}

    values, exp_avg, exp_avg_sq = (quantity(which) for which in QUANTITIES)
    steps = {task: 0 if state is None else state.step for task, state in states.items()}
    return State(step=max(steps.values()), steps=steps, values=values, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
