"""One task's training: LoRI's protocol from rows of text to an adapter file, on one rank of a gang."""

import dataclasses
import gc
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lori_dist import config, plugin
from lori_dist.adapter import file, source
from lori_dist.adapter.adapter import Adapter, Spec
from lori_dist.adapter.attach import attach, extract, projection_checksums, refuse_other_projections
from lori_dist.atomic import append_json
from lori_dist.config import Run, held_out, trained_as
from lori_dist.errors import AdapterError, ConfigError, JobError
from lori_dist.jobs import Job as Planned
from lori_dist.jobs import joint_job, task_seed, train_job
from lori_dist.training import checkpoint, conflicts, data, flops, masking, metrics, validation
from lori_dist.training.compilation import compile_blocks
from lori_dist.training.data import Example
from lori_dist.training.determinism import set_deterministic
from lori_dist.training.device import memory, reset_peak
from lori_dist.training.divergence import MOST, UPDATE, Divergence
from lori_dist.training.engine import Engine, State, StepResult, gather, held_of_base, trained
from lori_dist.training.joint import Joint
from lori_dist.training.joint import batches as joint_batches
from lori_dist.training.joint import joint as joint_of
from lori_dist.training.joint import rows_of_step as joint_rows
from lori_dist.training.metrics import METRICS
from lori_dist.training.metrics import Record as Record
from lori_dist.training.model import check, check_base, check_device, identity, load_tokenizer
from lori_dist.training.preemption import Notice, Told, nothing, of_any, preempted
from lori_dist.training.schedule import learning_rate
from lori_dist.training.surgery import Surgery, layers_of, surgery
from lori_dist.training.trackers import forget, tracked
from lori_dist.training.validation import Best
from lori_dist.training.weights import Weights, skeleton
from lori_dist.training.world import World, agree, from_first

ADAPTER = "adapter.safetensors"
CALIBRATED = "calibrated.safetensors"
CHECKPOINTS = "checkpoints"
CALIBRATE, TRAIN = "calibrate", "train"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Adam over a fixed set of entries, from zero."""

    name: str
    """CALIBRATE or TRAIN."""
    num_steps: int
    epochs: float | None
    lr: float
    steps_after: int = 0
    """Of the phase that follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What both phases share."""

    run: Run
    name: str
    task: str
    world: World
    folder: Path
    fingerprint: str
    still_mine: Callable[[], None]
    track: Callable[[Record], None]
    """To the run's trackers."""
    progress: Callable[[Record], None]
    told: Told
    """Of the time that is left."""
    examples: Sequence[Sequence[Example]]
    """Of each task: one, or those of `joint`."""
    mixture: Sequence[int]
    """Of one task whose rows are of several files: how many are of each, in their order."""
    pad_id: int
    origin: Mapping[str, Any]
    """What the result follows from."""
    joint: Joint | None
    before: Adapter | None
    """To whose entries those of this one are added."""
    is_disjoint: bool
    """From the entries of `before`."""
    start: Adapter | None
    """That whose training goes on."""
    validation: Sequence[Sequence[Example]]
    """Of each task, for the loss while it trains; none where that is not measured."""


def train(
    run: Run,
    task: str,
    world: World,
    folder: Path,
    *,
    fingerprint: str,
    still_mine: Callable[[], None] = lambda: None,
    progress: Callable[[Record], None] = lambda record: None,
    told: Told = nothing,
    joint: Mapping[str, Any] | None = None,
    sequel: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains an adapter, of one task or of several, and writes it to folder/adapter.safetensors. Every rank calls this.

    With density 1 there is one dense phase (LoRI-D). Below that, a dense phase calibrates, its B gives the mask, and
    the kept entries are trained from zero, with the same A and a new optimizer (LoRI-S).

    folder: on storage that all ranks see; an earlier attempt's calibration and checkpoints in it are continued.
    fingerprint: of all that determines the result; files of another one are refused. still_mine: called before each
    write, raises JobError where a newer attempt has taken over. progress: gets each step's record, on rank 0. told:
    asked after each step whether to end; where any rank is told so, all save and end. joint: how tasks are trained
    together, in the place of the one, which is then the adapter's name; as `Joint` takes it.
    sequel: `before`, the tasks that were trained one after another, to whose entries those of this one are added, and
    `masks`: whether these may be anywhere (independent) or where none of theirs are (disjoint).
    Returns kept, total, bytes, steps, loss (of the last step), seconds (of this attempt) and, where tasks' gradients
    were projected, conflicts; where a validation loss chose them, best, its step and loss.
    Raises ConfigError for rows or a model that cannot be used, JobError if ranks disagree or the loss diverges,
    Preempted if it was told to end.
    Source: LoRI (arXiv 2504.07448), section 3, but for A, which the authors' code draws again for the second phase.
    """
    start = time.monotonic()
    set_deterministic(run.train.deterministic)
    folder.mkdir(parents=True, exist_ok=True)
    planned = joint_job(run, joint) if joint is not None else train_job(run, task, sequel=sequel)
    with tracked(run, planned.name) as track:
        job = make_job(
            run,
            planned,
            world,
            folder,
            fingerprint=fingerprint,
            still_mine=still_mine,
            track=track,
            progress=progress,
            told=told,
        )
        *calibration, last = phases_of(job)
        masks = _masks(job, calibration[0]) if calibration else None
        gc.collect()  # models and engines refer to themselves, and two bases may not fit
        model, engine, end = _fit(job, last, masks)
    adapter = write_adapter(folder / ADAPTER, model, engine, job)
    engine.close()

    def summary() -> dict[str, Any]:
        assert adapter is not None
        return {
            "kept": adapter.kept,
            "total": adapter.total,
            "bytes": (folder / ADAPTER).stat().st_size,
            "steps": end.step,
            "loss": end.loss,
            "seconds": time.monotonic() - start,
            **_conflicts(job, model),
            **({"best": {"step": end.best.step, "loss": end.best.loss}} if run.train.early_stop is not None else {}),
        }

    return from_first(world, summary)


def rehearse(
    run: Run,
    task: str,
    world: World,
    folder: Path,
    *,
    fingerprint: str,
    joint: Mapping[str, Any] | None = None,
    sequel: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that `train` does before its next step; nothing is written. Every rank calls this.

    The arguments are those of `train`; folder: need not be there. Returns rows, phases (name and steps of each that is
    not done yet), done (steps of the first of them, by an earlier attempt) and entries (that are trained in that one).
    Raises what `train` would by then.
    """
    set_deterministic(run.train.deterministic)
    planned = joint_job(run, joint) if joint is not None else train_job(run, task, sequel=sequel)
    job = make_job(run, planned, world, folder, fingerprint=fingerprint)
    left, masks = phases_of(job), None
    if len(left) > 1 and is_calibrated(job, left[0]):
        masks = calibrated_masks(job, left.pop(0))
    built = _build(job, left[0], masks)
    built.engine.close()
    steps = [(phase.name, phase.num_steps) for phase in left]
    return {"rows": _num_rows(job), "phases": steps, "done": built.first, "entries": built.num_entries}


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
    told: Told = nothing,
) -> Job:
    """What is to be trained, with its rows read and encoded. Raises ConfigError for rows that cannot be used."""
    check_device(run.model, world.device)
    task: str = planned.settings["task"]
    joint, sequel = planned.settings.get("joint"), planned.settings.get("sequel")
    tokenizer = load_tokenizer(run.model)
    tasks = joint["tasks"] if joint is not None else (task,)
    rows = {name: _rows(run, name, tokenizer) for name in tasks}
    examples = [
        data.encode([*chain(*parts)], tokenizer, run.train.max_length, where=f"tasks.{name}.train")
        for name, parts in rows.items()
    ]
    return Job(
        run=run if joint is not None else dataclasses.replace(run, train=trained_as(run, task)),
        name=planned.name,
        task=task,
        world=world,
        folder=folder,
        fingerprint=fingerprint,
        still_mine=still_mine,
        track=track,
        progress=progress,
        told=told,
        examples=examples,
        mixture=[] if len(rows[tasks[0]]) == 1 else [len(part) for part in rows[tasks[0]]],
        pad_id=data.pad_id(tokenizer),
        origin={"fingerprint": fingerprint, **planned.settings},
        joint=None if joint is None else joint_of(joint, [len(of_task) for of_task in examples]),
        before=None if sequel is None else _before(run, sequel["before"]),
        is_disjoint=sequel is not None and sequel["masks"] == "disjoint",
        start=_start(run, task) if "start" in planned.settings else None,
        validation=_validation(run, tasks, tokenizer),
    )


def _rows(run: Run, task: str, tokenizer: PreTrainedTokenizerBase) -> list[list[data.Segments]]:
    """Prompt and response of the rows to train on, file by file: all, but for those on which weights of merges are
    searched."""
    where, count, settings = f"tasks.{task}.train", held_out(run, task), run.tasks[task]
    rows, *others = (
        data.read(path, settings.template, where=place, tokenizer=tokenizer, labels=settings.labels)
        for place, path in [(where, settings.train), *((f"tasks.{task}.mixture", path) for path in settings.mixture)]
    )
    if count:
        log.info("%s: the last %d of %d rows are held out for the search for weights", where, count, len(rows))
    return [rows[: len(rows) - count], *others]


def _validation(run: Run, tasks: Sequence[str], tokenizer: Any) -> list[list[Example]]:
    if run.train.validate_every is None:
        return []
    found = []
    for name in tasks:
        where, task = f"tasks.{name}.validation", run.tasks[name]
        texts = data.read(str(task.validation), task.template, where=where, tokenizer=tokenizer, labels=task.labels)
        found.append(data.encode(texts, tokenizer, run.train.max_length, where=where))
    return found


def _before(run: Run, tasks: Sequence[str]) -> Adapter | None:
    """What the last of the tasks left: the entries of all of them."""
    return file.load(run.folder / f"train-{tasks[-1]}" / ADAPTER) if tasks else None


def _start(run: Run, task: str) -> Adapter:
    """The adapter whose training goes on."""
    path = Path(str(run.tasks[task].start))
    try:
        adapter = source.load(path)
        check_base(path, adapter.base, run.model)
        if adapter.saved:
            raise AdapterError(
                f"{path}: has modules that were trained in full, from which a training job cannot continue"
            )
    except AdapterError as error:
        raise ConfigError(f"tasks.{task}.start: {error}") from error
    return adapter


def write_adapter(path: Path, model: nn.Module, engine: Engine, job: Job) -> Adapter | None:
    """Writes what was trained to a file, and returns it on rank 0, which alone has it. Every rank calls this.

    Only values are gathered, and rank 0 holds them once.
    """
    values = gather(engine, "values", job.world)
    if job.world.rank > 0:
        return None
    job.still_mine()
    adapter = extract(model, name=job.task, values=values, base=identity(job.run.model))
    if job.before is not None:
        adapter = dataclasses.replace(adapter, blocks=(*job.before.blocks, *adapter.blocks))
    file.save(adapter, path)
    return adapter


def phases_of(job: Job) -> list[Phase]:
    """What is done for a job, in order. Of an adapter whose training goes on, the entries are known."""
    density = job.run.adapter.density if job.start is None else 1.0
    return phases(job.run.train, density, _num_rows(job))


def _num_rows(job: Job) -> int:
    return sum(map(len, job.examples))


def phases(train: config.Train, density: float, num_rows: int) -> list[Phase]:
    """What is done, in order: calibrate and train, or only train for a dense adapter."""

    def phase(name: str, steps: int | None, epochs: float | None, lr: float, steps_after: int = 0) -> Phase:
        num_steps = data.num_steps(num_rows, train.batch_size, steps, epochs)
        return Phase(name=name, num_steps=num_steps, epochs=epochs, lr=lr, steps_after=steps_after)

    last = phase(TRAIN, train.steps, train.epochs, train.lr)
    if density == 1.0:
        return [last]
    calibrate = train.calibrate
    lr = train.lr / 10 if calibrate.lr is None else calibrate.lr
    if calibrate.steps is None and calibrate.epochs is None:
        return [phase(CALIBRATE, train.steps, train.epochs, lr, last.num_steps), last]
    return [phase(CALIBRATE, calibrate.steps, calibrate.epochs, lr, last.num_steps), last]


# --- one phase -------------------------------------------------------------------------------------------------------


def _masks(job: Job, phase: Phase) -> dict[str, Tensor]:
    """Which entries are kept, the same on all ranks, from a calibration done now or by an earlier attempt."""
    path = job.folder / CALIBRATED
    if not is_calibrated(job, phase):
        _calibrate(job, phase, path)
    return calibrated_masks(job, phase)


def calibrated_masks(job: Job, phase: Phase) -> dict[str, Tensor]:
    """The masks that a finished calibration gives, the same on all ranks."""
    return masking.choose(
        job.folder / CALIBRATED,
        CALIBRATE,
        origin=origin_of(job, phase),
        settings=job.run.adapter,
        world=job.world,
        apart_from=job.before if job.is_disjoint else None,
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


def _calibrate(job: Job, phase: Phase, path: Path) -> None:
    _, engine, _ = _fit(job, phase, None)
    if job.world.rank == 0:
        job.still_mine()
    # Only B is needed from here on, and the moments are two thirds of the bytes.
    checkpoint.write_state(path, CALIBRATE, engine, job.world, origin=origin_of(job, phase), quantities=("values",))
    engine.close()
    if job.world.rank == 0:
        checkpoint.delete(job.folder / CHECKPOINTS, CALIBRATE)


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """Where the steps of a phase are, or have ended. Goes into checkpoints: metrics.jsonl is for people, and may be
    damaged."""

    step: int = 0
    """The last that was done."""
    loss: float | None = None
    """Of that step."""
    best: Best = field(default_factory=Best)

    @classmethod
    def noted(cls, notes: Mapping[str, Any]) -> "End":
        return cls(step=notes["step"], loss=notes["loss"], best=Best.noted(notes["best"]))

    def notes(self, divergence: Divergence) -> dict[str, Any]:
        loss = self.loss if self.loss is not None and math.isfinite(self.loss) else None
        return {"step": self.step, "loss": loss, "best": self.best.notes(), "divergence": divergence.notes()}


def _fit(job: Job, phase: Phase, masks: Mapping[str, Tensor] | None) -> tuple[PreTrainedModel, Engine, End]:
    """Trains the entries that masks keep, from zero or from the newest checkpoint. Returns what holds them, and where
    it ended."""
    built = _build(job, phase, masks)
    if job.world.rank == 0:
        rewind(job, phase, built.first)
        log.info("%s: %s", job.name, _announced(job, phase, built))
    return built.model, built.engine, _do_steps(job, phase, built)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Built:
    """All that a phase's steps need."""

    model: PreTrainedModel
    engine: Engine
    num_entries: int
    """That are trained."""
    first: int
    """Steps that were done before."""
    notes: Mapping[str, Any]
    """Of the checkpoint from which it resumes."""
    origin: Mapping[str, Any]
    tasks: Surgery | None
    mfu: flops.Utilisation


def _build(job: Job, phase: Phase, masks: Mapping[str, Tensor] | None) -> _Built:
    model, weights = _adapted_model(job, masks)
    num_entries = sum(parameter.numel() for parameter in trained(model).values())
    mfu = flops.utilisation(model, job.run, job.world)  # before an engine shards the model
    reset_peak(job.world.device)
    origin = {**origin_of(job, phase), "mask": digest_of(masks)}
    found = checkpoint.newest(job.folder / CHECKPOINTS, phase.name, origin)
    first, notes = (found.step + found.skipped, found.notes) if found else (0, {})
    if found is None and job.start is not None:
        found = _state_of(job.start)
    agree(job.world, str(first), f"newest checkpoint in {job.folder}", "give an output folder that all ranks share")
    chosen = job.run.train.engine
    method = plugin.find("engines", chosen.name, "build", "train.engine")
    options = method.bind(chosen.options, "train.engine")
    tasks = _surgery(job, model)
    if tasks is not None and first:
        tasks.state = notes.get("balance", {})
    engine: Engine = method.load()(model, weights, job.run.train, job.world, state=found, **options)
    checksums = projection_checksums(model)
    agree(job.world, json.dumps(checksums), "projection A", "install the same version of the program on all machines")
    if job.start is not None:
        refuse_other_projections(job.start.blocks[0], checksums)
    return _Built(
        model=model,
        engine=engine,
        num_entries=num_entries,
        first=first,
        notes=notes,
        origin=origin,
        tasks=tasks,
        mfu=mfu,
    )


def _announced(job: Job, phase: Phase, built: _Built) -> str:
    """For people, at the start of a phase: what is trained, by what, where, and what this rank holds of it."""
    world, train = job.world, job.run.train
    rows = _num_rows(job)
    per_step = sum(example.num_tokens for examples in job.examples for example in examples) / rows * train.batch_size
    values = sum(part.data.numel() for part in built.engine.parts("values").values())
    held, total = held_of_base(built.engine.model)
    return (
        f"phase {phase.name}, {phase.num_steps} steps of {train.batch_size} of {rows:,} rows (about {per_step:,.0f} "
        f"tokens), on {world.size} rank{'s' * (world.size > 1)} ({world.device.type}) with {train.engine.name}; "
        f"{built.num_entries:,} entries are trained; rank 0 holds {values:,} of them and {held / max(total, 1):.0%} of "
        f"the base's {total:,} weights"
    )


def _do_steps(job: Job, phase: Phase, built: _Built) -> End:
    """Those that are left, to the last one, or until it ends early, with the best values."""
    train, engine, first, origin, tasks = job.run.train, built.engine, built.first, built.origin, built.tasks
    divergence, end = from_first(job.world, lambda: _known(job, phase, first, built.notes))
    best = end.best
    if first == 0 and train.on_divergence == "rollback":
        _save(job, phase, engine, origin, end, divergence, tasks)
    for step in range(first, phase.num_steps):
        if train.early_stop is not None and best.num_since >= train.early_stop:
            break
        record, num_done = _step(job, phase, engine, step, tasks, built.mfu, divergence), step + 1
        if divergence.problem is not None:
            _treat(job, phase, engine, divergence, origin, record, tasks)
        if _is_measured(job, phase, num_done):
            losses = [_validation_loss(job, engine, examples) for examples in job.validation]
            record[validation.LOSS] = sum(losses) / len(losses)
            best = best.after(num_done, record[validation.LOSS])
        end = End(step=num_done, loss=record["loss"], best=best)
        if job.world.rank == 0:
            if tasks is not None and tasks.conflicts is not None:
                line = {"phase": phase.name, "step": num_done, "cosines": conflicts.of_layers(tasks.conflicts)}
                append(job, conflicts.FILE, line)
            append(job, METRICS, record)
            job.track(record)
            job.progress(record)
        is_saved = is_due(job, phase, num_done) or (train.early_stop is not None and best.step == num_done)
        notice = notice_after(job, phase, num_done)
        if is_saved or notice:
            _save(job, phase, engine, origin, end, divergence, tasks)
        if notice > Notice.NODE:
            from_first(job.world, lambda: None)  # which may be writing, and ends with the first that ends
            raise preempted(notice, {job.task: (num_done, phase.num_steps, phase.name)})
    if train.early_stop is not None and best.step > 0:
        path = checkpoint.file_of(job.folder / CHECKPOINTS, phase.name, best.step)
        from_first(job.world, lambda: None)  # which may be writing it
        try:
            engine.load(checkpoint.read(path, phase.name, origin=origin))
        except checkpoint.Damaged as error:
            raise JobError(f"{error}; it has the best values, so delete {job.folder} to train again") from error
    return end


def notice_after(job: Job, phase: Phase, num_done: int) -> Notice:
    """Whether to save, and end, after a step: the same on all ranks. After the last, what is left is not much more."""
    is_last = phase.name == TRAIN and num_done == phase.num_steps
    return Notice.NONE if is_last else of_any(job.told(), job.world)


def _known(job: Job, phase: Phase, first: int, notes: Mapping[str, Any]) -> tuple[Divergence, End]:
    """From the steps that were done. Checkpoints of earlier versions have no notes: then from what the metrics say."""
    spike = job.run.train.spike
    if notes:
        return Divergence.noted(spike, notes["divergence"]), End.noted(notes)
    records = [line for line in metrics.steps(job.folder) if line["phase"] == phase.name and "loss" in line]
    loss = records[-1].get("loss") if records else None
    return Divergence(spike, records), End(step=first, loss=loss, best=validation.best(records))


def _save(
    job: Job,
    phase: Phase,
    engine: Engine,
    origin: Mapping[str, Any],
    end: End,
    divergence: Divergence,
    tasks: Surgery | None,
) -> None:
    checkpoint.save(
        job.folder / CHECKPOINTS,
        phase.name,
        engine,
        job.world,
        origin=origin,
        keep=job.run.train.keep,
        still_mine=job.still_mine,
        skipped=end.step - engine.num_steps,
        spare=end.best.step if job.run.train.early_stop is not None else None,
        notes={
            **end.notes(divergence),
            **({"balance": dict(tasks.state)} if tasks is not None and tasks.state else {}),
        },
    )


def _treat(
    job: Job,
    phase: Phase,
    engine: Engine,
    divergence: Divergence,
    origin: Mapping[str, Any],
    record: Record,
    tasks: Surgery | None,
) -> None:
    """After a step whose update was not done: ends, or goes on, maybe with an earlier state. The record tells it."""
    policy, problem = job.run.train.on_divergence, str(divergence.problem)
    if policy == "stop":
        raise diverged(job, phase, record["step"], problem, record["lr"])
    if divergence.in_a_row > MOST:
        raise diverged(job, phase, record["step"], f"{problem}, as at the {MOST} steps before", record["lr"])
    said = _told(job, phase, record["step"], problem)
    record[UPDATE] = "skipped"
    if policy == "rollback":
        found = checkpoint.newest(job.folder / CHECKPOINTS, phase.name, origin)
        back = -1 if found is None else found.step + found.skipped
        agree(job.world, str(back), f"newest checkpoint in {job.folder}", "give an output folder that all ranks share")
        if found is None:
            raise JobError(f"{said}, and there is no checkpoint to go back to; lower the learning rate")
        engine.load(found)
        if tasks is not None:
            tasks.state = found.notes.get("balance", {})
        record[UPDATE] = f"rolled back to step {back}"
    record.update({key: None for key in ("loss", "grad_norm") if not math.isfinite(record[key])})
    log.warning("%s; its update is %s", said, record[UPDATE])


def diverged(job: Job, phase: Phase, step: int, problem: str, lr: float) -> JobError:
    """problem: what is wrong with the step."""
    said = _told(job, phase, step, problem)
    return JobError(f"{said}; lower the learning rate (here {lr:g}) or use model.dtype float32")


def _told(job: Job, phase: Phase, step: int, problem: str) -> str:
    return f"{job.task}: at step {step} of {phase.num_steps} of phase {phase.name} {problem}"


def _is_measured(job: Job, phase: Phase, num_done: int) -> bool:
    every = job.run.train.validate_every
    return every is not None and phase.name == TRAIN and (num_done % every == 0 or num_done == phase.num_steps)


def _validation_loss(job: Job, engine: Engine, examples: Sequence[Example]) -> float:
    rows = job.run.train.micro_batch_size
    return validation.measure(engine, examples, job.world, batch_size=rows, pad_id=job.pad_id)


def _state_of(adapter: Adapter) -> State:
    """What a training begins with that goes on from an adapter: its values, and no moments."""
    [block] = adapter.blocks
    values = {module: block.entries[module].values.float() for module in adapter.shapes if module in block.entries}
    zeros = {module: torch.zeros_like(of_module) for module, of_module in values.items()}
    return State(step=0, values=values, exp_avg=zeros, exp_avg_sq=zeros)


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


def _adapted_model(job: Job, masks: Mapping[str, Tensor] | None) -> tuple[PreTrainedModel, Weights]:
    """The base without its weights, with an adapter whose values are zero; and the weights."""
    model, weights = skeleton(job.run.model)
    if job.run.train.pack and (problems := list(config.unpackable(model.config.model_type))):
        raise ConfigError("\n".join(problems))
    for examples in job.examples:
        check(examples, model)
    if job.start is None:
        attach(model, spec_of(job.run, job.task), masks=masks, before=job.before)
    else:
        attach(model, job.start, train=True)
    if job.run.train.activation_checkpointing:
        checkpoint_activations(model)
    if job.run.train.compile:
        compile_blocks(model)
    return model, weights


def spec_of(run: Run, task: str) -> Spec:
    """What a task's adapter is before its training."""
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
    )


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


def _surgery(job: Job, model: nn.Module) -> Surgery | None:
    """What makes one gradient of the tasks', where that is asked for."""
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


def _step(
    job: Job,
    phase: Phase,
    engine: Engine,
    step: int,
    tasks: Surgery | None,
    mfu: flops.Utilisation,
    divergence: Divergence,
) -> Record:
    start = time.monotonic()
    train, world = job.run.train, job.world
    # Whatever draws random numbers draws the same ones in a training that was resumed.
    torch.manual_seed(_draw_seed(train.seed, phase.name, step, world.rank))
    rows = rows_of_step(job, phase, step)
    examples = [job.examples[task][row] for task, row in rows]
    pieces = data.micro_batches(rows, world.rank, world.size, train.micro_batch_size)
    if job.joint is None:
        length = train.max_length if train.pack else None
        batches = [data.collate([job.examples[0][row] for _, row in piece], job.pad_id, length) for piece in pieces]
    else:
        batches = joint_batches(rows, job.examples, job.joint.weights, pieces, job.pad_id)
    lr = learning_rate(
        step, num_steps=phase.num_steps, lr=phase.lr, schedule=train.schedule, warmup_steps=train.warmup_steps
    )
    num_targets = sum(example.num_targets for example in examples)  # of all ranks, and nothing is sent
    data_wait = time.monotonic() - start
    if tasks is None:
        num = num_targets if job.joint is None else 1
        result = engine.step(batches, num_targets=num, lr=lr, accept=divergence.accepts)
    else:
        result = engine.step(batches, num_targets=1, lr=lr, tasks=tasks, accept=divergence.accepts)
    seconds = time.monotonic() - start
    num_tokens = sum(example.num_tokens for example in examples)
    return {
        "phase": phase.name,
        "step": step + 1,
        "num_steps": phase.num_steps,
        "steps_left": phase.num_steps - step - 1 + phase.steps_after,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "mfu": mfu(num_tokens, seconds, [example.num_tokens for example in examples]),
        "memory": memory(world.device),
        "data_wait": data_wait,
        "time": time.time(),
        **_of_tasks(job, result, tasks),
    }


def rows_of_step(job: Job, phase: Phase, step: int) -> list[tuple[int, int]]:
    """(task, row)."""
    train, num_rows = job.run.train, [len(examples) for examples in job.examples]
    if job.joint is not None:
        shares = job.joint.shares
        return joint_rows(step, num_rows=num_rows, batch_size=train.batch_size, seed=train.seed, shares=shares)
    if job.mixture:
        shares = tuple(job.run.tasks[job.task].mixture.values())
        rows = data.mixed_rows_of_step(
            step,
            num_rows=tuple(job.mixture),
            shares=(1 - sum(shares), *shares),
            batch_size=train.batch_size,
            seed=train.seed,
            epochs=phase.epochs,
        )
        return [(0, row) for row in rows]
    rows = data.rows_of_step(
        step, num_rows=num_rows[0], batch_size=train.batch_size, seed=train.seed, epochs=phase.epochs
    )
    return [(0, row) for row in rows]


def _of_tasks(job: Job, result: StepResult, tasks: Surgery | None) -> Record:
    """What the record of a joint training has besides."""
    if job.joint is None:
        return {}
    weighted = zip(job.joint.tasks, result.task_losses, job.joint.weights, strict=True)
    losses = {"task_losses": {task: loss / weight for task, loss, weight in weighted}}
    if tasks is None or tasks.conflicts is None:
        return losses
    return {**losses, **conflicts.figures(tasks.conflicts, job.joint.tasks)}


def _draw_seed(seed: int, phase: str, step: int, rank: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{phase}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def is_due(job: Job, phase: Phase, num_done: int) -> bool:
    every = job.run.train.checkpoint_every
    return every is not None and num_done % every == 0 and num_done < phase.num_steps


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


def _conflicts(job: Job, model: nn.Module) -> Record:
    """Those of the last phase, over all of its steps."""
    if job.joint is None or job.joint.balance == "none":
        return {}
    records, lines = (
        [line for line in metrics.steps(job.folder, name) if line["phase"] == TRAIN]
        for name in (METRICS, conflicts.FILE)
    )
    return {"conflicts": conflicts.over_steps(job.joint.tasks, layers_of(model), records, lines)}
