"""What the process of a merge or an evaluation leaves, without the cluster that starts it."""

import json
import time

import pytest

from lori_dist import Spec, attach, config, extract, folder, save_adapter
from lori_dist.cluster.attempts import History
from lori_dist.cluster.summary import log_file
from lori_dist.cluster.work import Assignment, merge_adapters
from lori_dist.jobs import Job, evaluate_job, merge_job, train_job
from lori_dist.training import metrics
from lori_dist.training.model import identity
from tests.cluster.trained import evaluated
from tests.models import tiny_llama
from tests.tokenizers import save
from tests.training.test_trackers import curves

TASKS = ("one", "two")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> config.Run:
    """Both of its trainings are done."""
    place = tmp_path_factory.mktemp("run")
    base = save(tiny_llama(), place / "base")
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}: ", "response": "yes"}) + "\n" for n in range(5)))
    run = config.validate(
        {
            "name": "demo",
            "output": str(place / "runs"),
            "model": {"path": str(base)},
            "tasks": {task: {"train": str(rows), "test": str(rows)} for task in TASKS},
            "train": {"steps": 1, "max_length": 32},
            "merges": {"all": {"method": "concat"}},
            "evaluate": {"metrics": ["loss", "exact_match"], "max_new_tokens": 2},
        }
    )
    for seed, task in enumerate(TASKS):
        done = run.folder / train_job(run, task).name
        done.mkdir(parents=True)
        model = tiny_llama()
        attach(model, Spec(rank=2, alpha=4.0, seed=seed))
        save_adapter(extract(model, name=task, base=identity(run.model)), done / "adapter.safetensors")
    return run


def assigned(run: config.Run, job: Job) -> Assignment:
    partial = folder.open(run.folder, job)
    return Assignment(tree=config.dump(run), job=job, attempt=folder.attempt(partial))


def merge_of(run: config.Run) -> Job:
    return merge_job(run, "all", {task: train_job(run, task) for task in TASKS})


def test_a_merge_says_what_it_made_and_how_long_it_took(run: config.Run) -> None:
    assignment = assigned(run, merge_of(run))
    merge_adapters(assignment)
    [record] = metrics.read(assignment.attempt.partial)
    made = assignment.attempt.partial / "adapter.safetensors"
    assert (record["bytes"], record["rank"]) == (made.stat().st_size, 4)
    assert record["density"] == record["kept"] / record["total"] > 0
    assert 0 < record["seconds"] < 60
    assert time.time() - record["time"] < 60
    assert curves(run.folder / "tensorboard" / "merge-all")["bytes"] == [(0, float(record["bytes"]))]


def test_an_evaluation_says_every_score_and_how_long_it_took(run: config.Run) -> None:
    assignment = assigned(run, evaluate_job(run, "base", None))
    evaluated(assignment)
    records = metrics.read(assignment.attempt.partial)
    found = json.loads((assignment.attempt.partial / "evaluation.json").read_text())
    scores = {(task, metric): value for task in found for metric, value in found[task].items()}
    assert {(record["task"], record["metric"]): record["value"] for record in records} == scores
    assert len(records) == 4
    assert all(0 < record["seconds"] < 60 for record in records)
    drawn = curves(run.folder / "tensorboard" / "evaluate-base")
    assert drawn == {
        f"{metric}/{task}": [(0, pytest.approx(value, rel=1e-6))] for (task, metric), value in scores.items()
    }


def test_no_secret_gets_into_what_a_job_leaves(run: config.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hush-hush-hush")
    assignment = assigned(run, evaluate_job(run, "base", None))
    evaluated(assignment)
    written = [path for path in run.folder.rglob("*") if path.is_file()]
    assert log_file(run.folder, assignment.job, 0) in written
    assert not [path for path in written if b"hush-hush-hush" in path.read_bytes()]


def test_the_metrics_of_a_merge_or_an_evaluation_are_no_steps(run: config.Run) -> None:
    assignment = assigned(run, evaluate_job(run, "base", None))
    history = History(assignment.attempt.partial, assignment.attempt.number)
    history.begin(workers=1)
    evaluated(assignment)
    history.end(None)
    assert history.attempts[-1]["seconds"] > 0
    assert history.attempts[-1]["resumed_at"] is None
