"""One task of a group that is trained: its rows, its phases, and where it is in one of them."""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lori_dist import formats
from lori_dist.adapter.adapter import Adapter, Spec
from lori_dist.atomic import append_json
from lori_dist.config import Run, held_out, trained_as
from lori_dist.errors import AdapterError, ConfigError, JobError, LoriError
from lori_dist.formats import native
from lori_dist.forms import LORI, FormChoice, Given, declares
from lori_dist.jobs import Job as Planned
from lori_dist.jobs import task_seed, tasks_of
from lori_dist.training import checkpoint, conflicts, data, masking, metrics, starts, token_cache, validation
from lori_dist.training.data import Batch
from lori_dist.training.divergence import Divergence
from lori_dist.training.engine import State
from lori_dist.training.job_rows import Steps, rows_of
from lori_dist.training.joint import Joint
from lori_dist.training.joint import batches as joint_batches
from lori_dist.training.metrics import METRICS, Record
from lori_dist.training.micro_batches import divided, micro_batches
from lori_dist.training.model import check_base, check_device, load_tokenizer
from lori_dist.training.phases import CALIBRATE, TRAIN, Phase, phases
from lori_dist.training.preemption import StopRequest, nothing
from lori_dist.training.schedule import learning_rate
from lori_dist.training.sequence_parallel import Group
from lori_dist.training.sequences import Share
from lori_dist.training.surgery import layers_of
from lori_dist.training.token_files import Rows
from lori_dist.training.trackers import forget
from lori_dist.training.validation import Best
from lori_dist.training.world import World, agree, from_first

ADAPTER = "adapter.safetensors"
CALIBRATED = "calibrated.safetensors"
CHECKPOINTS = "checkpoints"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The settings and data that both phases share."""

    run: Run
    name: str
    task: str
    world: World
    folder: Path
    fingerprint: str
    still_mine: Callable[[], None]
    track: Callable[[Record], None]
    """Passes a record to the run's trackers."""
    progress: Callable[[Record], None]
    stop_request: StopRequest
    """Gives the request to stop that has come since, if any."""
    fetch: Callable[[], None]
    """Brings this rank's machine the checkpoints that rank 0 has written. A collective."""
    examples: Sequence[Rows]
    """Examples of each task: one, or those of `joint`."""
    steps: Steps
    """Says which rows each step takes."""
    pad_id: int
    origin: Mapping[str, Any]
    """Settings that the result depends on."""
    joint: Joint | None
    before: Adapter | None
    """Adapter to whose entries this training adds its own."""
    is_disjoint: bool
    """Whether the entries are disjoint from those of `before`."""
    start: Adapter | None
    """Adapter from which the training continues."""
    given: Mapping[str, Given] | None
    """What layers begin with, where that was computed from data."""
    validation: Sequence[Rows]
    """Validation examples of each task; none if the loss on them is not measured."""


def make_job(
    run: Run,
    planned: Planned,
    world: World,
    folder: Path,
    *,
    fingerprint: str,
    still_mine: Callable[[], None] = lambda: None,
    track: Callable[[Record], None] = lambda record: None,
    progress: Callable[[Record], None] = lambda record: None,
    stop_request: StopRequest = nothing,
    fetch: Callable[[], None] = lambda: None,
    is_rehearsal: bool = False,
) -> Job:
    """The job of a training, with its rows read and encoded. is_rehearsal: it is not done, and nothing is written.
    Raises ConfigError for rows that cannot be used, JobError for moments or clusters that are not measured."""
    check_device(run.model, world.device)
    task: str = planned.settings["task"]
    sequel = planned.settings.get("sequel")
    tokenizer, tasks = load_tokenizer(run.model), tasks_of(planned)
    examples = rows_of(run, planned, tokenizer, is_rehearsal=is_rehearsal)
    steps = Steps.of(run, planned, [[count for _, count in of_task.parts] for of_task in examples])
    for name, of_task in zip(tasks, examples, strict="cluster" not in planned.settings):
        if count := held_out(run, name):
            where, (file, _) = f"tasks.{name}.train", of_task.parts[0]
            log.info("%s: the last %d of %d rows are held out for the search for weights", where, count, len(file))
    return Job(
        run=run if task not in run.tasks else dataclasses.replace(run, train=trained_as(run, task)),
        name=planned.name,
        task=task,
        world=world,
        folder=folder,
        fingerprint=fingerprint,
        still_mine=still_mine,
        track=track,
        progress=progress,
        stop_request=stop_request,
        fetch=fetch,
        examples=examples,
        steps=steps,
        pad_id=data.pad_id(tokenizer),
        origin={"fingerprint": fingerprint, **planned.settings},
        joint=steps.joint,
        before=None if sequel is None else _before(run, sequel["before"]),
        is_disjoint=sequel is not None and sequel["masks"] == "disjoint",
        start=_start(run, task) if "start" in planned.settings else None,
        given=starts.given(
            run,
            task,
            spec_of(run, task),
            world,
            folder,
            fingerprint=fingerprint,
            still_mine=still_mine,
            is_rehearsal=is_rehearsal,
        ),
        validation=_validation(run, tasks, tokenizer),
    )


def _validation(run: Run, tasks: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Rows]:
    if run.train.validate_every is None:
        return []
    paths = [(name, str(run.tasks[name].validation)) for name in tasks]
    files = [token_cache.of_part(run, name, "validation", path, tokenizer) for name, path in paths]
    return [Rows((file, len(file))) for file in files]


def _before(run: Run, tasks: Sequence[str]) -> Adapter | None:
    """The adapter that the last of the tasks left, with the entries of all of them."""
    return native.load(run.folder / f"train-{tasks[-1]}" / ADAPTER) if tasks else None


def _start(run: Run, task: str) -> Adapter:
    """The adapter whose training goes on."""
    path = Path(str(run.tasks[task].start))
    try:
        adapter = formats.load(path)
        check_base(path, adapter.base, run.model)
        if adapter.saved:
            raise AdapterError(
                f"{path}: has modules that were trained in full, from which a training job cannot continue"
            )
    except AdapterError as error:
        raise ConfigError(f"tasks.{task}.start: {error}") from error
    return adapter


def phases_of(job: Job) -> list[Phase]:
    """The phases of a job, in order. Of an adapter whose training goes on, the entries are known."""
    density = job.run.adapter.density if job.start is None else 1.0
    return phases(job.run.train, density, num_rows(job))


def num_rows(job: Job) -> int:
    return sum(map(len, job.examples))


def calibrated_masks(job: Job, phase: Phase) -> dict[str, Tensor]:
    """The masks that a finished calibration gives, the same on all ranks."""
    return masking.choose(
        job.folder / CALIBRATED,
        CALIBRATE,
        origin=origin_of(job, phase),
        settings=job.run.adapter,
        world=job.world,
        apart_from=job.before if job.is_disjoint else None,
        form=spec_of(job.run, job.task).form,
    )


def is_calibrated(job: Job, phase: Phase) -> bool:
    """Whether an earlier attempt did it. A damaged file costs the calibration, nothing else. Every rank calls this."""
    path = job.folder / CALIBRATED
    agree(job.world, str(path.exists()), f"finding of {path}", "give an output folder that all ranks share")

    def found() -> bool:
        if not path.exists():
            return False
        try:
            checkpoint.check(path, CALIBRATE, origin=origin_of(job, phase))
        except checkpoint.Damaged as error:
            log.warning("%s; calibrating again", error)
            return False
        return True

    return from_first(job.world, found)


def origin_of(job: Job, phase: Phase) -> dict[str, Any]:
    train = job.run.train
    schedule = {
        "name": train.schedule,
        "num_steps": phase.num_steps,
        "warmup_steps": train.warmup_steps,
        "lr": phase.lr,
    }
    return {**job.origin, "schedule": schedule, "generator_seed": train.seed}


def digest_of(masks: Mapping[str, Tensor] | None) -> str | None:
    """Tells one choice of kept entries from another."""
    if masks is None:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for module, mask in masks.items():
        digest.update(module.encode())
        digest.update(mask.numpy().data)
    return digest.hexdigest()


def form_of(run: Run, task: str) -> FormChoice | None:
    """The form of a training job: of all tasks of the run together, or of one in a sequence; None: LoRI's own."""
    chosen, tasks = run.adapter.form, (task,) if run.multitask.name == "sequential" else tuple(run.tasks)
    if chosen.name == LORI:
        return None
    seeds = tuple(task_seed(run, task) for task in tasks)
    has_own = declares(chosen.name, chosen.options, "OWN_A")
    return FormChoice(name=chosen.name, options=chosen.options, tasks=tasks, seeds=seeds if has_own else ())


def spec_of(run: Run, task: str) -> Spec:
    """A task's adapter before its training, or that of a joint training."""
    adapter = run.adapter
    return Spec(
        rank=adapter.rank,
        alpha=adapter.alpha,
        seed=task_seed(run, task),
        targets=adapter.targets,
        dtype=getattr(torch, adapter.dtype),
        projection=adapter.projection,
        modules_to_save=adapter.modules_to_save,
        exclude=adapter.exclude,
        form=form_of(run, task),
    )


def spec_of_job(job: Job) -> Spec:
    """The adapter of a job before its training."""
    return dataclasses.replace(spec_of(job.run, job.task), given=job.given)


# --- where it is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """The progress of a phase, or its end. Goes into checkpoints: metrics.jsonl is for people, and may be damaged."""

    step: int = 0
    """The last that was done."""
    loss: float | None = None
    """Loss of that step."""
    best: Best = field(default_factory=Best)

    @classmethod
    def noted(cls, notes: Mapping[str, Any]) -> "End":
        return cls(step=notes["step"], loss=notes["loss"], best=Best.noted(notes["best"]))

    def notes(self, divergence: Divergence) -> dict[str, Any]:
        loss = self.loss if self.loss is not None and math.isfinite(self.loss) else None
        return {"step": self.step, "loss": loss, "best": self.best.notes(), "divergence": divergence.notes()}


@dataclass(kw_only=True, slots=True)
class Course:
    """The state of one task in a phase."""

    job: Job
    phase: Phase
    origin: Mapping[str, Any]
    """The settings that its checkpoints belong to."""
    num_entries: int
    """Entries that are trained."""
    num_updates: int
    """Steps that have changed the values."""
    end: End
    divergence: Divergence
    notes: Mapping[str, Any]
    """Notes of the checkpoint from which it resumes."""
    error: LoriError | None = None
    """Error that ended the task before its last step."""

    @property
    def is_active(self) -> bool:
        """Whether there are steps left to do."""
        stops = self.job.run.train.early_stop
        is_best = stops is not None and self.end.best.num_since >= stops
        return self.error is None and self.end.step < self.phase.num_steps and not is_best

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        train = self.job.run.train
        return learning_rate(
            self.end.step,
            num_steps=self.phase.num_steps,
            lr=self.phase.lr,
            schedule=train.schedule,
            warmup_steps=train.warmup_steps,
        )

    def recall(self) -> None:
        """Takes up what is known of the steps that were done. Checkpoints of earlier versions have no notes: then
        metrics.jsonl says it. Every rank calls this."""
        self.divergence, self.end = from_first(self.job.world, self._known)

    def _known(self) -> tuple[Divergence, End]:
        spike, notes, step = self.job.run.train.spike, self.notes, self.end.step
        if "divergence" in notes:
            return Divergence.noted(spike, notes["divergence"]), End.noted(notes)
        records = [
            line for line in metrics.steps(self.job.folder) if line["phase"] == self.phase.name and "loss" in line
        ]
        loss = notes.get("loss", records[-1].get("loss") if records else None)
        return Divergence(spike, records), End(step=step, loss=loss, best=validation.best(records))

    def is_measured(self) -> bool:
        """Whether the loss on validation rows is due."""
        every, step = self.job.run.train.validate_every, self.end.step
        return every is not None and self.phase.name == TRAIN and (step % every == 0 or step == self.phase.num_steps)

    def is_saved(self) -> bool:
        """Whether a checkpoint is due."""
        train, step = self.job.run.train, self.end.step
        is_best = train.early_stop is not None and self.end.best.step == step
        every = train.checkpoint_every
        return is_best or (every is not None and step % every == 0 and step < self.phase.num_steps)

    def rows(self, step: int) -> list[tuple[int, int]]:
        """(task, row) of a step, over all ranks."""
        return self.job.steps.rows(self.phase, step)

    def pieces(
        self, rows: Sequence[tuple[int, int]], group: Group, share: Share, *, is_alone: bool
    ) -> list[list[tuple[int, int]]]:
        """The rows of the micro-batches of a step of this rank's group.

        is_alone: whether a batch has no rows of other trainings, to whose length those of this one would be padded.
        """
        job, train = self.job, self.job.run.train
        is_packed = train.pack or share is not Share.NO
        if not is_alone and not is_packed:
            return micro_batches(rows, group.world_rank, group.world_size, train.rows_at_once)
        lengths = [job.examples[task].num_tokens(row) for task, row in rows]
        found = divided(
            lengths,
            group.world_size,
            train.micro_batch_size,
            most_tokens=train.micro_batch_tokens,
            pack=train.max_length if is_packed else None,
        )
        return [[rows[place] for place in piece] for piece in found[group.world_rank]]

    def batches(self, rows: Sequence[tuple[int, int]], share: Share, group: Group) -> list[Batch]:
        """The micro-batches of a step of this rank's group. share: whether rows of several tasks share sequences."""
        job, train = self.job, self.job.run.train
        pieces = self.pieces(rows, group, share, is_alone=True)
        if job.joint is not None:
            return joint_batches(rows, job.examples, job.joint.weights, pieces, job.pad_id, share, train.max_length)
        length = train.max_length if train.pack else None
        return [data.collate([job.examples[0][row] for _, row in piece], job.pad_id, length) for piece in pieces]

    def seed(self) -> None:
        """Whatever draws random numbers draws the same ones in a job that was resumed."""
        torch.manual_seed(_draw_seed(self.job.run.train.seed, self.phase.name, self.end.step, self.job.world.rank))

    def diverged(self, step: int, problem: str, lr: float) -> JobError:
        """problem: what is wrong with the step."""
        said = self.described(step, problem)
        return JobError(f"{said}; lower the learning rate (here {lr:g}) or use model.dtype float32")

    def described(self, step: int, problem: str) -> str:
        return f"{self.job.task}: at step {step} of {self.phase.num_steps} of phase {self.phase.name} {problem}"


def state_of(adapter: Adapter) -> State:
    """The initial state of a training that continues from an adapter: its values, and no moments."""
    [block] = adapter.blocks
    values = {module: block.entries[module].values.float() for module in adapter.shapes if module in block.entries}
    zeros = {module: torch.zeros_like(of_module) for module, of_module in values.items()}
    return State(step=0, values=values, exp_avg=zeros, exp_avg_sq=zeros)


def _draw_seed(seed: int, phase: str, step: int, rank: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{phase}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# --- metrics ---------------------------------------------------------------------------------------------------------


def append(job: Job, name: str, line: Mapping[str, Any]) -> None:
    job.still_mine()
    append_json(job.folder / name, line)


def rewind(job: Job, phase: Phase, first: int) -> None:
    """Drops what an earlier attempt wrote about steps that are done again."""
    if first:
        log.info("%s: resuming from step %d of %d of phase %s", job.name, first, phase.num_steps, phase.name)
    for name in (METRICS,) if job.joint is None else (METRICS, conflicts.FILE):
        lines = metrics.steps(job.folder, name)
        kept = [line for line in lines if line["phase"] != phase.name or line["step"] <= first]
        if phase.name == CALIBRATE:
            kept = [line for line in kept if line["phase"] == CALIBRATE]
        job.still_mine()
        metrics.rewrite(job.folder, kept, name)
        if not kept and name == METRICS:
            forget(job.run, job.name)


def conflicts_of(job: Job, model: nn.Module) -> Record:
    """The conflicts of the last phase, over all of its steps."""
    if job.joint is None or job.joint.balance == "none":
        return {}
    records, lines = (
        [line for line in metrics.steps(job.folder, name) if line["phase"] == TRAIN]
        for name in (METRICS, conflicts.FILE)
    )
    return {"conflicts": conflicts.over_steps(job.joint.tasks, layers_of(model), records, lines)}
