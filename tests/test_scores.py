"""What each merge costs each task."""

import pytest

from lori_dist.scores import drops

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
