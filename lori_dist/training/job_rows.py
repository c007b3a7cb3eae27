"""The rows of a training job: which files it reads, which of their rows each step takes, and so which need tokens."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lori_dist import tables
from lori_dist.config import Run, held_out, trained_as
from lori_dist.errors import ConfigError, JobError
from lori_dist.jobs import CLUSTERS, tasks_of
from lori_dist.jobs import Job as Planned
from lori_dist.tensors import stored
from lori_dist.training import data, token_cache
from lori_dist.training.joint import Joint
from lori_dist.training.joint import joint as joint_of
from lori_dist.training.joint import rows_of_step as joint_rows
from lori_dist.training.phases import Phase, phases
from lori_dist.training.token_cache import Show
from lori_dist.training.token_files import Rows, Some, TokenFile

SMALL = 2**23
"""Bytes of files whose rows all become tokens, as that takes seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFile:
    """A file of rows that a training job takes."""

    task: str
    part: str
    """Its place in the task's section."""
    path: str
    held_out: int = 0
    """Number of its last rows that are not trained on."""
    chosen: npt.NDArray[np.int64] | None = None
    """The rows that any step takes, ascending; None: all may be."""


def row_files(run: Run, planned: Planned, tokenizer: PreTrainedTokenizerBase) -> list[list[RowFile]]:
    """The files of each task of a training job. Where its steps take less than half of the rows, and reading them takes
    time, the files say which. The job may be one of moments. Raises ConfigError for a file that cannot be read."""
    if planned.kind == "moments":
        return [[_of_moments(run, planned, tokenizer)]]
    found = []
    for name in tasks_of(planned):
        task = run.tasks[name]
        first = RowFile(task=name, part="train", path=task.train, held_out=held_out(run, name))
        found.append([first, *(RowFile(task=name, part="mixture", path=path) for path in task.mixture)])
    files = [file for of_task in found for file in of_task]
    if "cluster" in planned.settings:  # whose rows are known when they are divided, for which all are read
        return found
    train = run.train if "joint" in planned.settings else trained_as(run, planned.settings["task"])
    if train.steps is None or any(tables.is_hub(file.path) for file in files):
        return found
    with contextlib.suppress(OSError):  # for whoever reads them to say
        if sum(os.path.getsize(file.path) for file in files) <= SMALL:
            return found
    if all(token_cache.is_there(run, file.task, file.part, file.path, tokenizer) for file in files):
        return found
    counts = [[_count(file) - file.held_out for file in of_task] for of_task in found]
    if any(count <= 0 for of_task in counts for count in of_task):
        return found  # for whoever reads them to say
    num_rows = [sum(of_task) for of_task in counts]
    density = 1.0 if "start" in planned.settings else run.adapter.density
    ahead = phases(train, density, sum(num_rows))
    if 2 * train.batch_size * sum(phase.num_steps for phase in ahead) >= sum(num_rows):
        return found
    steps = Steps.of(run, planned, counts)
    taken = {pair for phase in ahead for step in range(phase.num_steps) for pair in steps.rows(phase, step)}
    for number, (of_task, sizes) in enumerate(zip(found, counts, strict=True)):
        rows = np.array(sorted(row for which, row in taken if which == number), dtype=np.int64)
        ends = np.cumsum(sizes)
        for place, (file, end, size) in enumerate(zip(of_task, ends, sizes, strict=True)):
            of_file = rows[(rows >= end - size) & (rows < end)] - (end - size)
            of_task[place] = replace(file, chosen=of_file)
    return found


def spread(num_rows: int, count: int) -> npt.NDArray[np.int64]:
    """So many rows, or all where there are fewer, evenly spaced."""
    count = min(num_rows, count)
    return np.arange(count, dtype=np.int64) * num_rows // max(1, count)


def _of_moments(run: Run, planned: Planned, tokenizer: PreTrainedTokenizerBase) -> RowFile:
    task = planned.settings["task"]
    path = run.tasks[task].train
    file = RowFile(task=task, part="train", path=path, held_out=held_out(run, task))
    if tables.is_hub(path) or token_cache.is_there(run, task, "train", path, tokenizer):
        return file
    with contextlib.suppress(OSError):  # for whoever reads it to say
        if os.path.getsize(path) <= SMALL:
            return file
    num_rows, count = _count(file) - file.held_out, planned.settings["moments"]["rows"]
    return file if num_rows <= 2 * count else replace(file, chosen=spread(num_rows, count))


def rows_of(
    run: Run, planned: Planned, tokenizer: PreTrainedTokenizerBase, *, is_rehearsal: bool = False
) -> list[Rows]:
    """The rows of each task of a training job, or one of moments, with the tokens of those that it takes; of a cluster,
    its rows of all tasks as those of one. is_rehearsal: where rows are not divided into clusters yet, all stand for
    those of one. Raises as `token_cache.token_file`, and JobError for rows that are not divided."""
    found = []
    for of_task in row_files(run, planned, tokenizer):
        parts = []
        for file in of_task:
            tokens = token_cache.of_part(run, file.task, file.part, file.path, tokenizer, chosen=file.chosen)
            parts.append((tokens, len(tokens) - file.held_out))
        found.append(Rows(*parts))
    if planned.kind == "train" and "cluster" in planned.settings:
        place = run.folder / "cluster-rows" / CLUSTERS
        if not place.exists() and not is_rehearsal:
            raise JobError(f"{place}: is missing, and {planned.name} reads its rows; `lori run` makes it")
        return [_of_cluster(planned, found, place if place.exists() else None)]
    return found


def _of_cluster(planned: Planned, found: Sequence[Rows], place: Path | None) -> Rows:
    """place: of the file that says which cluster each row of a task is in; None: all rows are taken."""
    if place is None:
        return Rows(*(part for of_task in found for part in of_task.parts))
    try:
        clusters = {name: one.load().numpy() for name, one in stored(place).items()}
    except (OSError, ValueError) as error:
        raise JobError(f"{place}: cannot be read ({error}); delete its folder to divide the rows again") from error
    parts = []
    for name, of_task in zip(tasks_of(planned), found, strict=True):
        [(file, _)] = of_task.parts
        assert isinstance(file, TokenFile)
        rows = np.flatnonzero(clusters[name] == planned.settings["cluster"]["place"])
        if len(rows):
            parts.append((Some(file, rows), len(rows)))
    return Rows(*parts)


def prepare(
    run: Run, trainings: Iterable[Planned], tokenizer: PreTrainedTokenizerBase, parts: Sequence[str], show: Show | None
) -> None:
    """Makes the tokens that jobs of a run read, as far as they are not there.

    trainings: the training jobs; parts: the places in the tasks' sections of what else is read. Raises ConfigError with
    every row of every file that cannot be used, and JobError as `token_file`.
    """
    wanted: dict[tuple[str, str, str], list[RowFile]] = {}
    problems = dict[str, None]()
    for planned in trainings:
        with _noting(problems):
            for file in [file for of_task in row_files(run, planned, tokenizer) for file in of_task]:
                wanted.setdefault((file.task, file.part, file.path), []).append(file)
    for name, part, path in _files(run):
        files = wanted.get((name, part, path), [])
        if not files and part in parts:
            files = [RowFile(task=name, part=part, path=path)]
        for file in files:
            with _noting(problems):
                token_cache.of_part(run, name, part, path, tokenizer, chosen=file.chosen, show=show)
    if problems:
        raise ConfigError("\n".join(problems))


def _files(run: Run) -> Iterator[tuple[str, str, str]]:
    from lori_dist.config import files

    for name, task in run.tasks.items():
        yield from ((name, part, path) for part, path in files(task))


@contextlib.contextmanager
def _noting(problems: dict[str, None]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        problems[str(error)] = None


def _count(file: RowFile) -> int:
    try:
        return tables.count(file.path)
    except (OSError, ConfigError):  # for whoever reads it to say
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """The rows of each step of a training job: a function of the seed and the step alone."""

    batch_size: int
    seed: int
    joint: Joint | None
    num_rows: Sequence[int]
    """Rows of each task."""
    mixture: Sequence[int]
    """Rows of each file of one task, if there are several."""
    shares: Sequence[float]
    """Share of each of these files."""

    @classmethod
    def of(cls, run: Run, planned: Planned, counts: Sequence[Sequence[int]]) -> "Steps":
        """counts: rows of each file of each task."""
        settings: Mapping[str, Any] = planned.settings
        num_rows = [sum(of_task) for of_task in counts]
        joint = None if settings.get("joint") is None else joint_of(settings["joint"], num_rows)
        is_one = settings["task"] in run.tasks and joint is None
        shares = [*run.tasks[settings["task"]].mixture.values()] if is_one else []
        return cls(
            batch_size=run.train.batch_size,
            seed=run.train.seed,
            joint=joint,
            num_rows=num_rows,
            mixture=counts[0] if shares else [],
            shares=[1 - sum(shares), *shares],
        )

    def rows(self, phase: Phase, step: int) -> list[tuple[int, int]]:
        """(task, row) of a step, over all ranks."""
        if self.joint is not None:
            return joint_rows(
                step, num_rows=self.num_rows, batch_size=self.batch_size, seed=self.seed, shares=self.joint.shares
            )
        if self.mixture:
            rows = data.mixed_rows_of_step(
                step,
                num_rows=tuple(self.mixture),
                shares=tuple(self.shares),
                batch_size=self.batch_size,
                seed=self.seed,
                epochs=phase.epochs,
            )
        else:
            rows = data.rows_of_step(
                step, num_rows=self.num_rows[0], batch_size=self.batch_size, seed=self.seed, epochs=phase.epochs
            )
        return [(0, row) for row in rows]
