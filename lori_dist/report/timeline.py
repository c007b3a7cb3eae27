"""A run's timeline: which job was at work when, and what became of each attempt at it."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from lori_dist.report.plots import LETTER, SETTINGS, WIDTH, Plot, plain, shown, tint

MOST = 40
"""Rows: of more jobs, those that failed, needed several attempts or took longest have one each, the others share."""
BREAK_SECONDS = 60.0
"""A run that waits for so long, and for a tenth of the time it works, is shown without that."""
COLOURS = {"moments": "line-2", "cluster": "line-2", "train": "line-1", "merge": "line-3", "evaluate": "line-4"}
OTHER, EARLIER = "ink", "muted"
HATCHED: dict[str, Any] = {
    "facecolor": tint("less-1"),
    "edgecolor": tint("line-2"),
    "hatch": "/////",
    "linewidth": 0.6,
}
"""How an attempt that failed looks, whatever the colours."""
STATES = {"earlier": "finished before", "blocked": "not done, needs a failed job", "waiting": "not done"}
"""A job's state in words, where its own word does not do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One try at a job, in seconds since 1970."""

    start: float
    end: float
    error: str | None
    """Why it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A job of a run."""

    name: str
    state: str
    """The state that summary.json gives, or `earlier` for a job that another command had finished."""
    attempts: tuple[Attempt, ...]
    """The attempts whose times are known."""

    @property
    def kind(self) -> str:
        return self.name.partition("-")[0]

    @property
    def seconds(self) -> float:
        return sum(attempt.end - attempt.start for attempt in self.attempts)


def rows(jobs: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The jobs of a summary.json as they began, then those without a time. Empty if no time is known."""
    found = [
        Row(
            name=name,
            state="earlier" if job.get("cached") else str(job["state"]),
            attempts=tuple(_attempts(job)),
        )
        for name, job in jobs.items()
    ]
    if not any(row.attempts for row in found):
        return []
    return sorted(found, key=lambda row: (not row.attempts, row.attempts[0].start if row.attempts else 0.0))


def _attempts(job: Mapping[str, Any]) -> Iterator[Attempt]:
    """Yields the attempts; the last one takes from its job what its own record lacks."""
    listed = job.get("attempts")
    *before, last = listed if listed and isinstance(listed, list) else [{}]  # or a number of them, or nothing
    known = {key: value for key, value in last.items() if value is not None}
    for one in (*before, {**{key: job.get(key) for key in ("started", "seconds", "error")}, **known}):
        start, seconds = one.get("started"), one.get("seconds")
        if isinstance(start, int | float):
            yield Attempt(start=start, end=start + (seconds or 0.0), error=one.get("error"))


def timeline(found: Sequence[Row]) -> Plot:
    """Bars over time, a row for each job. found: of `rows`, not empty."""
    alone, together = _chosen(found)
    clock = Clock.of(found)
    with matplotlib.rc_context(SETTINGS):
        figure = _drawn(alone, together, clock)
    num_failed = sum(row.state == "failed" for row in found)
    ended = f"{num_failed} failed" if num_failed else "none failed"
    return Plot(
        name="timeline",
        alternative=f"Bars over time, one for each attempt at each of {len(found)} jobs, in {span(clock.length)} of "
        f"work; {ended}. The table of jobs has the times.",
        caption=f"From {_date(clock.start)} to {_date(clock.end)}. A bar is an attempt at a job"
        + (f"; of {len(found) - len(alone)} more, how many ran at once, and the most of them." if together else "."),
        figure=figure,
    )


def _chosen(found: Sequence[Row]) -> tuple[list[Row], dict[str, list[Row]]]:
    """The jobs with rows of their own, and by their kind those that share one."""
    if len(found) <= MOST:
        return list(found), {}
    ranked = sorted(found, key=lambda row: (row.state != "failed", -len(row.attempts), -row.seconds))
    kinds = dict.fromkeys(row.kind for row in found)
    names = {row.name for row in ranked[: MOST - len(kinds)]}
    others = [row for row in found if row.name not in names]
    together = {kind: [row for row in others if row.kind == kind] for kind in kinds}
    return [row for row in found if row.name in names], {kind: some for kind, some in together.items() if some}


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """Seconds since the run began, without long times in which nothing was at work."""

    busy: tuple[tuple[float, float], ...]
    """Start and end of each time of work, in order."""

    @classmethod
    def of(cls, found: Iterable[Row]) -> "Clock":
        spans = sorted((one.start, one.end) for row in found for one in row.attempts)
        merged = _merged(spans, 0.0)
        work = sum(end - start for start, end in merged)
        return cls(busy=tuple(_merged(spans, max(BREAK_SECONDS, work / 10))))

    @property
    def start(self) -> float:
        return self.busy[0][0]

    @property
    def end(self) -> float:
        return self.busy[-1][1]

    @property
    def length(self) -> float:
        return sum(end - start for start, end in self.busy)

    @property
    def breaks(self) -> list[float]:
        """Places on the axis where time was left out."""
        return [self.at(start) for start, _ in self.busy[1:]]

    def at(self, moment: float) -> float:
        return sum(max(0.0, min(end, moment) - start) for start, end in self.busy)


def _merged(spans: Iterable[tuple[float, float]], most: float) -> list[tuple[float, float]]:
    """Sorted spans, those in one that are at most so far apart."""
    merged: list[tuple[float, float]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1] + most:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


UNITS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))


def span(seconds: float) -> str:
    size, unit = _unit(seconds)
    return f"{seconds / size:.1f} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    return next((one for one in UNITS if seconds >= 2 * one[0]), UNITS[-1])


def _date(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))


# --- the picture -----------------------------------------------------------------------------------------------------


def _drawn(alone: Sequence[Row], together: Mapping[str, Sequence[Row]], clock: Clock) -> Figure:
    titles = [shown(row.name, 20) for row in alone]
    titles += [shown(f"{len(some)} more: {kind}", 20) for kind, some in together.items()]
    entries = _legend(alone, together)
    left = LETTER * max(map(len, titles)) + 0.15
    top, bottom, tall = 0.3, 0.42 + 0.17 * -(-len(entries) // 2), 0.2
    height = top + tall * len(titles) + bottom
    figure = Figure(figsize=(WIDTH, height))
    figure.text(0.06 / WIDTH, 1 - 0.08 / height, "Timeline", va="top", size=9.5, weight="bold", color=tint("ink"))
    axes = figure.add_axes((left / WIDTH, bottom / height, 1 - (left + 0.2) / WIDTH, tall * len(titles) / height))
    length = clock.length or 1.0
    for y, row in enumerate(alone):
        _draw_row(axes, y, row, clock, length)
    for y, (kind, some) in enumerate(together.items(), len(alone)):
        _draw_count(axes, y, kind, some, clock)
    for place in clock.breaks:
        axes.axvline(place, color=tint("ink"), linestyle=":", linewidth=0.8)
    size, unit = _unit(length)
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, length / size)
    axes.set_xticks([tick * size for tick in ticks], [f"{tick:g}" for tick in ticks])
    axes.set_yticks([y + 0.5 for y in range(len(titles))], titles)
    axes.set(xlim=(0, 1.02 * length), ylim=(len(titles), 0))
    left_out = ", without idle time at dotted lines" if clock.breaks else ""
    axes.set_xlabel(f"{unit} since the run began{left_out}", loc="right", color=tint("muted"), size=7)
    axes.grid(axis="x", color=tint("grid"), linewidth=0.6)
    axes.set_axisbelow(True)
    plain(axes)
    figure.legend(
        handles=entries, loc="lower left", ncols=2, frameon=False, labelcolor=tint("ink"), fontsize=7, borderpad=0.2
    )
    return figure


def _draw_row(axes: Axes, y: int, row: Row, clock: Clock, length: float) -> None:
    for attempt in row.attempts:
        start, end = clock.at(attempt.start), clock.at(attempt.end)
        width = max(end - start, length / 200)  # so that it can be seen
        axes.add_patch(Rectangle((start, y + 0.18), width, 0.64, **_look(row, attempt)))
        if attempt.error is not None:
            axes.plot([start + width], [y + 0.5], marker="x", color=tint("less-4"), markersize=4.5, clip_on=False)
    if row.attempts and row.state == "failed":
        place = clock.at(row.attempts[-1].end) + 0.03 * length
        axes.text(place, y + 0.5, "failed", va="center", size=7, color=tint("less-4"))
    if not row.attempts:
        state = STATES.get(row.state, row.state)
        axes.text(0.01 * length, y + 0.5, state, va="center", size=7, color=tint("muted"))


def _look(row: Row, attempt: Attempt) -> dict[str, Any]:
    if attempt.error is not None:
        return HATCHED
    name = EARLIER if row.state == "earlier" else COLOURS.get(row.kind, OTHER)
    return {"facecolor": tint(name), "edgecolor": tint("paper"), "linewidth": 0.4}


def _draw_count(axes: Axes, y: int, kind: str, some: Sequence[Row], clock: Clock) -> None:
    """How many were at work, as an area in the row; the most of them written at its end."""
    spans = [(clock.at(one.start), clock.at(one.end)) for row in some for one in row.attempts]
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    places, counts = [0.0], [0]
    for place, change in changes:
        places.append(place)
        counts.append(counts[-1] + change)
    most = max(counts) or 1
    heights = [y + 0.9 - 0.8 * count / most for count in counts]
    colour = tint(COLOURS.get(kind, OTHER))
    axes.fill_between(places, heights, y + 0.9, step="post", color=colour, linewidth=0)
    axes.text(1.0, y + 0.5, f" {most}", va="center", size=7, color=tint("ink"), transform=axes.get_yaxis_transform())


def _legend(alone: Sequence[Row], together: Mapping[str, Sequence[Row]]) -> list[Patch]:
    drawn = [(row, attempt) for row in alone for attempt in row.attempts]
    kinds = {row.kind: row for row, attempt in drawn if attempt.error is None and row.state != "earlier"}
    entries = {kind: tint(COLOURS.get(kind, OTHER)) for kind in (*kinds, *together)}
    patches = [Patch(facecolor=colour, label=kind) for kind, colour in entries.items()]
    if any(attempt.error is not None for _, attempt in drawn):
        patches.append(Patch(label="attempt that failed", **HATCHED))
    if any(row.state == "earlier" and attempt.error is None for row, attempt in drawn):
        patches.append(Patch(facecolor=tint(EARLIER), label="of an earlier command"))
    return patches
