"""The timeline of a run, from summaries as runs write them and as they wrote them once."""

import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lori_dist import report
from lori_dist.report.timeline import MOST, Attempt, Clock, Row, rows, timeline
from tests.report.test_report import HOSTILE, Page, summary_of, tasks

NOON = 1_795_608_000.0
KILLED = "the process died: it was killed"


def attempt(start: float, seconds: float | None, error: str | None = None) -> dict[str, Any]:
    return {"started": NOON + start, "seconds": seconds, "error": error, "workers": 2, "resumed_at": None}


def job(*attempts: dict[str, Any], state: str = "finished", **more: Any) -> dict[str, Any]:
    return {"state": state, "started": attempts[0]["started"], "seconds": 1.0, "attempts": list(attempts), **more}


JOBS: dict[str, dict[str, Any]] = {
    "evaluate-base": job(attempt(70, 30)),
    "train-math": job(attempt(0, 20, KILLED), attempt(30, 40)),
    "train-code": job(attempt(1, 5, "row 7 is no row"), state="failed", error="row 7 is no row"),
    "train-law": {"state": "finished", "cached": True, "seconds": 40.0},
    "merge-all": {"state": "blocked", "seconds": 0.0, "needs": ["train-code"]},
}


def test_rows_are_in_the_order_the_jobs_began() -> None:
    found = rows(JOBS)
    assert [row.name for row in found] == ["train-math", "train-code", "evaluate-base", "train-law", "merge-all"]
    assert [row.state for row in found] == ["finished", "failed", "finished", "earlier", "blocked"]
    assert [one.error for one in found[0].attempts] == [KILLED, None]
    assert [(one.start - NOON, one.end - NOON) for one in found[0].attempts] == [(0, 20), (30, 70)]
    assert found[0].seconds == 60


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"state": "finished", "seconds": 3.0, "attempts": 2}, []),
        ({"state": "waiting"}, []),
        ({"state": "finished", "seconds": 3.0, "attempts": 2, "started": NOON}, [(0, 3, None)]),
        ({"state": "failed", "seconds": 3.0, "started": NOON, "error": "no"}, [(0, 3, "no")]),
        (job(attempt(0, None)), [(0, 1, None)]),
        (job(attempt(0, None), attempt(5, None), state="failed", error="no"), [(0, 0, None), (5, 6, "no")]),
        ({"state": "finished", "attempts": [{"seconds": 3.0}], "seconds": 3.0}, []),
    ],
)
def test_a_summary_of_another_time_is_read_as_far_as_it_goes(state: dict[str, Any], found: list[Any]) -> None:
    read = rows({"train-math": state})
    assert [(one.start - NOON, one.end - NOON, one.error) for row in read for one in row.attempts] == found


def test_a_run_has_its_timeline_in_its_report(tmp_path: Path) -> None:
    summary = {**summary_of(tmp_path, tasks("math", "code")), "jobs": JOBS}
    assert report.write_of_run(summary, tmp_path) == {"path": str(tmp_path / "report.html")}
    width, height = struct.unpack(">II", (tmp_path / "report-timeline.png").read_bytes()[16:24])
    assert 600 <= width <= 2000
    assert 150 <= height <= 2000
    page = Page((tmp_path / "report.html").read_text())
    [drawn] = [found for found in page.all("svg") if (found["aria-label"] or "").startswith("Bars over time")]
    assert "5 jobs, in 100.0 s of work; 1 failed" in (drawn["aria-label"] or "")
    for words in (
        "From 2026-11-25 12:00:00 UTC to 2026-11-25 12:01:40 UTC",
        f"train-math, attempt 1, after 20.0 s: {KILLED}",
        "train-code, attempt 1, after 5.0 s: row 7 is no row",
        "finished before",
        "not done, needs a failed job",
        "attempt that failed",
    ):
        assert words in page.words, words


@pytest.mark.parametrize("names", [[], ["math"]])
def test_a_run_without_two_adapters_has_its_timeline(names: list[str], tmp_path: Path) -> None:
    summary = {**summary_of(tmp_path, tasks(*names)), "jobs": JOBS}
    assert report.write_of_run(summary, tmp_path) == {"path": str(tmp_path / "report.html")}
    assert (tmp_path / "report-timeline.png").exists()
    assert KILLED in Page((tmp_path / "report.html").read_text()).words


def test_what_an_earlier_command_did_is_told_apart() -> None:
    [row] = rows({"train-math": job(attempt(0, 20), cached=True)})
    assert (row.state, row.seconds) == ("earlier", 20)
    assert "of an earlier command" in timeline([row]).svg()


def test_a_run_that_did_nothing_has_none(tmp_path: Path) -> None:
    cached = {"train-math": {"state": "finished", "cached": True, "seconds": 4.0}}
    summary = {**summary_of(tmp_path, tasks("math", "code")), "jobs": cached}
    report.write_of_run(summary, tmp_path)
    assert not (tmp_path / "report-timeline.png").exists()
    assert "Jobs" not in Page((tmp_path / "report.html").read_text()).words


def test_hostile_names_and_errors_are_text(tmp_path: Path) -> None:
    jobs = {name: job(attempt(0, 3, HOSTILE[number - 1])) for number, name in enumerate(HOSTILE)}
    report.write(tasks("math", "code"), tmp_path, jobs=jobs)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "\x1b" not in text
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    assert all(name in page.words for name in HOSTILE[:3])


def test_many_jobs_are_readable() -> None:
    """Those that failed have rows of their own; the others are told by kind and number."""
    jobs = {f"train-{number:03}": job(attempt(9 * number, 30)) for number in range(200)}
    jobs |= {f"evaluate-{number:03}": job(attempt(9 * number, 20)) for number in range(40)}
    jobs |= {f"train-{number:03}": job(attempt(9 * number, 3, KILLED), state="failed") for number in (7, 77)}
    jobs["train-111"] = job(attempt(999, 3, KILLED), attempt(1010, 3))
    plot = timeline(rows(jobs))
    assert max(plot.figure.get_size_inches()) < 11
    drawn = re.findall(r"<text [^>]*>([^<]+)</text>", plot.svg())
    assert {"train-007", "train-077", "train-111"} <= set(drawn)
    alone = [text for text in drawn if re.fullmatch(r"(train|evaluate)-\d{3}", text)]
    shared = [int(number) for number in re.findall(r"(\d+) more: (?:train|evaluate)", " ".join(drawn))]
    assert len(alone) == MOST - 2
    assert len(alone) + sum(shared) == 240
    assert {"4", "3"} <= {text.strip() for text in drawn}  # trainings, and evaluations, at once


def test_colours_are_those_of_the_page(tmp_path: Path) -> None:
    report.write([], tmp_path, jobs=JOBS)
    text = (tmp_path / "report.html").read_text()
    assert set(re.findall(r"#[0-9a-f]{6}\b", text.partition("</style>")[2])) == set()
    ids = [found["id"] for _, found in Page(text).tags if "id" in found]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text)) <= set(ids)


# --- the clock -------------------------------------------------------------------------------------------------------


def clock(*spans: tuple[float, float]) -> Clock:
    attempts = tuple(Attempt(start=start, end=end, error=None) for start, end in spans)
    return Clock.of([Row(name="train-math", state="finished", attempts=attempts)])


def test_a_night_between_two_commands_is_left_out() -> None:
    found = clock((NOON, NOON + 100), (NOON + 50_000, NOON + 50_100))
    assert (found.length, found.breaks) == (200, [100])
    assert found.at(NOON + 50_050) == 150


@pytest.mark.parametrize("gap", [59.0, 100.0])
def test_waiting_is_a_part_of_a_run(gap: float) -> None:
    assert clock((0, 1000), (1000 + gap, 2000)).breaks == []


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**4)), min_size=1), st.data())
def test_order_and_durations_are_kept(spans: list[tuple[int, int]], data: st.DataObject) -> None:
    found = clock(*((float(start), float(start + seconds)) for start, seconds in spans))
    places = sorted({moment for start, seconds in spans for moment in (start, start + seconds)})
    at = [found.at(moment) for moment in places]
    assert at == sorted(at)
    assert (at[0], at[-1]) == (0.0, found.length)
    start, seconds = data.draw(st.sampled_from(spans))
    assert found.at(start + seconds) - found.at(start) == seconds
