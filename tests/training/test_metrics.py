"""metrics.jsonl: complete lines, in order, whatever cut an earlier attempt off."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lori_dist import config
from lori_dist.training import metrics

RECORDS = st.lists(st.dictionaries(st.text(), st.none() | st.integers() | st.text()))


@given(before=RECORDS, cut=st.text(alphabet='ab{" ', max_size=5), after=RECORDS)
def test_what_was_appended_is_read_but_for_a_line_that_was_cut(
    tmp_path_factory: pytest.TempPathFactory, before: list[metrics.Record], cut: str, after: list[metrics.Record]
) -> None:
    folder = tmp_path_factory.mktemp("job")
    assert metrics.read(folder) == []
    for record in before:
        metrics.append(folder, record)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(cut)
    assert metrics.read(folder) == before
    metrics.rewrite(folder, metrics.read(folder))
    for record in after:
        metrics.append(folder, record)
    assert metrics.read(folder) == before + after


def test_a_job_done_as_a_whole_starts_its_metrics_anew(tmp_path: Path) -> None:
    run = config.Run(name="demo", output=str(tmp_path), model=config.Model(path="model"), tasks={})
    for value in (0.25, 0.5):
        with metrics.recorded(run, "evaluate-all", tmp_path) as record:
            record({"metric": "loss", "task": "math", "value": value})
    [line] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert time.time() - line.pop("time") < 60
    assert line == {"metric": "loss", "task": "math", "value": 0.5}
    assert [path.name for path in (run.folder / "tensorboard").iterdir()] == ["evaluate-all"]
    assert len(list((run.folder / "tensorboard" / "evaluate-all").iterdir())) == 1
