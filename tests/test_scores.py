"""What an evaluation says of merges and of sequences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lori_dist.scores import drops, transfer, wilson

EVALUATION = {
    "base": {"math": {"loss": 3.0, "choice": 0.1}, "code": {"loss": 4.0}},
    "math": {"math": {"loss": 1.0, "choice": 0.8}, "code": {"loss": 5.0}},
    "code": {"math": {"loss": 3.0, "choice": 0.2}, "code": {"loss": 2.0}},
    "both": {"math": {"loss": 1.5, "choice": 0.6}, "code": {"loss": 1.75}},
    "half": {"math": {"loss": 1.25, "choice": 1.0}},
}


def test_drops_of_every_metric() -> None:
    found = drops(EVALUATION)
    assert found["loss"] == {
        "lower_is_better": True,
        "single": {"math": 1.0, "code": 2.0},
        "merges": {
            "both": {"score": {"math": 1.5, "code": 1.75}, "drop": {"math": 0.5, "code": -0.25}, "kept": None},
            "half": {"score": {"math": 1.25}, "drop": {"math": 0.25}, "kept": None},
        },
    }
    assert found["choice"]["single"] == {"math": 0.8}
    assert found["choice"]["merges"]["both"]["drop"]["math"] == pytest.approx(0.2)
    assert found["choice"]["merges"]["half"]["kept"] == pytest.approx(1.25)


def test_a_task_whose_own_adapter_scores_nothing_is_not_in_the_mean() -> None:
    evaluation = {
        "a": {"a": {"score": 0.0}, "b": {"score": 0.0}},
        "b": {"a": {"score": 0.0}, "b": {"score": 0.5}},
        "both": {"a": {"score": 0.1}, "b": {"score": 0.25}},
    }
    assert drops(evaluation)["score"]["merges"]["both"]["kept"] == 0.5
    evaluation["b"]["b"]["score"] = 0.0
    assert drops(evaluation)["score"]["merges"]["both"]["kept"] is None


@pytest.mark.parametrize("models", [(), ("base",), ("base", "math", "code"), ("base", "both")])
def test_without_adapters_and_merges_there_are_none(models: tuple[str, ...]) -> None:
    assert drops({model: EVALUATION[model] for model in models}) == {}


def matrix(rows: dict[str, list[float]], metric: str = "score") -> dict[str, dict[str, dict[str, float]]]:
    tasks = [name for name in rows if name != "base"]
    return {
        model: {task: {metric: value} for task, value in zip(tasks, values, strict=True)}
        for model, values in rows.items()
    }


SEQUENCE = {"base": [0.1, 0.2, 0.3], "a": [0.9, 0.3, 0.3], "b": [0.95, 0.8, 0.4], "c": [0.5, 0.7, 0.6]}


def test_transfer_is_that_of_the_definitions() -> None:
    found = transfer(["a", "b", "c"], matrix(SEQUENCE))["score"]
    assert found["average"] == pytest.approx(0.6)
    assert found["forgetting"] == pytest.approx(((0.95 - 0.5) + (0.8 - 0.7)) / 2)
    assert found["backward"] == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    assert found["forward"] == pytest.approx(((0.3 - 0.2) + (0.4 - 0.3)) / 2)
    assert list(found["scores"]) == ["base", "a", "b", "c"]


def test_a_loss_that_rises_is_forgetting() -> None:
    worse = {model: [1 - value for value in values] for model, values in SEQUENCE.items()}
    found, wanted = (
        transfer(["a", "b", "c"], matrix(worse, "loss"))["loss"],
        transfer(["a", "b", "c"], matrix(SEQUENCE)),
    )
    for key in ("forgetting", "backward", "forward"):
        assert found[key] == pytest.approx(wanted["score"][key])
    assert found["average"] == pytest.approx(0.4)


def test_until_all_are_evaluated_there_is_no_transfer() -> None:
    evaluation = matrix(SEQUENCE)
    del evaluation["b"]
    assert transfer(["a", "b", "c"], evaluation) == {}


def test_a_metric_that_one_task_lacks_is_left_out() -> None:
    evaluation = matrix(SEQUENCE)
    evaluation["base"]["a"]["choice"] = 0.5
    assert list(transfer(["a", "b", "c"], evaluation)) == ["score"]


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=4, max_size=4))
def test_forgetting_is_at_least_what_backward_transfer_took(rows: list[list[float]]) -> None:
    found = transfer(["a", "b", "c"], matrix(dict(zip(("base", "a", "b", "c"), rows, strict=True))))["score"]
    assert found["forgetting"] >= -found["backward"] - 1e-12


@pytest.mark.parametrize(
    ("share", "rows", "expected"),
    [(0.5, 100, (0.4038, 0.5962)), (0.9, 500, (0.8706, 0.9233)), (0.0, 10, (0.0, 0.2775)), (1.0, 10, (0.7225, 1.0))],
)
def test_the_interval_of_a_share_is_that_of_wilson(share: float, rows: int, expected: tuple[float, float]) -> None:
    assert wilson(share, rows) == pytest.approx(expected, abs=1e-4)
