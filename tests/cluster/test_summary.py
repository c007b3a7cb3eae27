"""The summary of a run."""

import json
from typing import Any

from lori_dist import config
from lori_dist.cluster.summary import summarize
from lori_dist.jobs import Job, Kind


def job(kind: Kind, name: str, **settings: Any) -> Job:
    return Job(name=f"{kind}-{name}", kind=kind, settings=settings, fingerprint=name)


RUN = config.Run(
    name="demo",
    output="/runs",
    model=config.Model(path="model"),
    tasks={name: config.Task(train="", test="") for name in ("math", "code")},
    merges={"all": config.Merge(method=config.Choice(name="concat"))},
)
JOBS = [
    job("evaluate", "all", subject="all"),
    job("train", "code", task="code"),
    job("train", "math", task="math"),
    job("merge", "all", merge="all", tasks=[], weights=[]),
    job("evaluate", "math", subject="math"),
    job("evaluate", "base", subject="base"),
]


def test_models_are_in_the_order_base_tasks_merges_whatever_the_order_of_the_jobs() -> None:
    states = {item.name: {"state": "finished", "seconds": 1.0} for item in JOBS}
    file = {"kept": 1, "total": 10, "bytes": 100}
    results: dict[str, dict[str, Any]] = {
        item.name: {"evaluation": {"math": {"loss": 0.5}}} if item.kind == "evaluate" else file for item in JOBS
    }
    summary = summarize(RUN, JOBS, states, results)
    assert json.loads(json.dumps(summary)) == summary
    assert list(summary) == ["run", "jobs", "needs", "adapters", "merges", "evaluation", "intervals"]
    assert summary["run"] == "demo"
    assert summary["jobs"] == states
    assert summary["needs"] == {item.name: [] for item in JOBS}
    assert list(summary["adapters"].items()) == [
        ("math", {**file, "path": "/runs/demo/train-math/adapter.safetensors"}),
        ("code", {**file, "path": "/runs/demo/train-code/adapter.safetensors"}),
    ]
    assert summary["merges"] == {"all": {**file, "path": "/runs/demo/merge-all/adapter.safetensors"}}
    assert list(summary["evaluation"]) == ["base", "math", "all"]
    assert summary["evaluation"]["base"] == {"math": {"loss": 0.5}}


def test_what_is_not_done_is_left_out() -> None:
    states = {item.name: {"state": "waiting"} for item in JOBS}
    summary = summarize(RUN, JOBS, states, {})
    assert (summary["adapters"], summary["merges"], summary["evaluation"]) == ({}, {}, {})
    assert set(summary["jobs"]) == {item.name for item in JOBS}
