"""Rows that one model gets right and another wrong, out of the predictions of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from lori_dist.__main__ import main

SCORES = {
    "base": [0, 0, 0, 0, 1],
    "sums": [1, 1, 1, 0, 1],
    "films": [0, 0, 0, 0, 0],
    "merged": [1, 0, 0, 1, 0],
}
"""Model -> scores of the task `sums`, row by row."""


def lines(model: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for metric in ("loss", "exact_match"):
        for row, score in enumerate(SCORES[model], start=1):
            answer = f"answer {row}\nin two lines"
            written = None if metric == "loss" else answer if score else f"{model}'s \x1b[2J {row}"
            value = row / 10 + score if metric == "loss" else float(score)
            found.append(
                {"task": "sums", "metric": metric, "row": row, "prompt": f"prompt {row}", "response": written}
                | {"answer": answer, "score": value}
            )
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder."""
    for model in SCORES:
        folder = tmp_path / "runs/demo" / f"evaluate-{model}"
        folder.mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines(model))
        (folder / "predictions.jsonl").write_text(text)
    kept = tmp_path / "runs/demo/evaluate-base.1"
    kept.mkdir()
    (kept / "predictions.jsonl").write_text(json.dumps({**lines("base")[0], "task": "of another run"}) + "\n")
    return tmp_path / "runs/demo"


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["show", *words, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["comparisons"]
    return found


def test_each_task_s_own_adapter_is_compared_with_the_merges(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    films, merged = shown(capsys, str(run))
    # An adapter of another task is a merge as far as predictions can tell where that task has none.
    assert (films["right"], films["wrong"]) == ("sums", "films")
    assert (merged["task"], merged["metric"]) == ("sums", "exact_match")
    counts = {key: merged[key] for key in ("rows", "both", "only_right", "only_wrong", "neither")}
    assert counts == {"rows": 5, "both": 1, "only_right": 3, "only_wrong": 1, "neither": 0}
    first = merged["examples"][0]
    assert [example["row"] for example in merged["examples"]] == [2, 3, 5]
    assert (first["prompt"], first["answer"], first["right"]) == ("prompt 2", first["answer"], first["answer"])
    assert first["wrong"] == "merged's \x1b[2J 2"


def test_models_task_metric_and_number_are_chosen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run), "--task", "sums", "--right", "merged", "--wrong", "base", "--rows", "1"]
    [found] = shown(capsys, *words)
    assert [example["row"] for example in found["examples"]] == [1]
    assert found["only_right"] == 2
    by_loss = shown(capsys, str(run), "--metric", "loss", "--wrong", "sums", "--right", "base")
    assert [example["row"] for example in by_loss[0]["examples"]] == [1, 2, 3]  # lower is better
    assert {(one["right"], one["wrong"]) for one in shown(capsys, str(run), "--wrong", "base")} == {
        ("sums", "base"), ("films", "base"), ("merged", "base"),
    }  # fmt: skip


def test_a_person_reads_them_and_no_text_moves_the_cursor(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(run), "--right", "sums", "--wrong", "merged", "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert (
        "sums, exact_match: sums is right and merged wrong on 3 of 5 rows (both right 1, only merged 1, neither 0)"
        in said
    )
    assert "    prompt  prompt 2\n    answer  answer 2\n            in two lines\n" in said
    assert "    merged  merged's \\x1b[2J 2\n" in said
    assert "\x1b" not in said


def test_what_lori_evaluate_wrote_is_read_too(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "matrix.predictions.jsonl"
    file.write_text("".join(json.dumps({"model": model, **line}) + "\n" for model in SCORES for line in lines(model)))
    words = ["--right", "sums", "--wrong", "merged"]
    assert shown(capsys, str(file), *words) == shown(capsys, str(run), *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "sum"], "--task: there are no predictions of 'sum'; there are sums. Did you mean 'sums'?"),
        (["--right", "merge"], "--right: there are no predictions of 'merge'; there are base, films, merged, sums."),
        (["--metric", "choice"], "--metric: there are no predictions of 'choice'; there are exact_match, loss."),
    ],
)
def test_what_is_not_there_is_named(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_rows_of_a_run_are_asked_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "methods", "--rows", "3"]) == 2
    assert "--rows: is for the rows of a run, and 'methods' is not one; remove it" in capsys.readouterr().err
    (tmp_path / "evaluate-base").mkdir()
    assert main(["show", str(tmp_path)]) == 1
    assert "there are no predictions, as no evaluation in it has finished" in capsys.readouterr().err
