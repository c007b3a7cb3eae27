import math

from lori_dist.evaluation._table import table

EVALUATION = {
    "base": {"sst2": {"loss": 2.5, "exact_match": 0.0, "choice": 0.5}, "gsm8k": {"loss": 3.25, "exact_match": 0.015}},
    "sst2": {"sst2": {"loss": 0.1234, "exact_match": 1.0, "choice": 1.0}, "gsm8k": {"loss": 4.0, "exact_match": 0.0}},
    "all": {"sst2": {"loss": 0.5, "exact_match": 0.875, "choice": 0.9}, "gsm8k": {"loss": 1.0, "exact_match": 0.25}},
}


def test_there_is_one_table_a_metric() -> None:
    assert table(EVALUATION) == "\n".join(
        [
            "loss   sst2  gsm8k   mean",
            "base  2.500  3.250  2.875",
            "sst2  0.123  4.000  2.062",
            "all   0.500  1.000  0.750",
            "",
            "exact_match, %   sst2  gsm8k  mean",
            "base              0.0    1.5   0.8",
            "sst2            100.0    0.0  50.0",
            "all              87.5   25.0  56.2",
            "",
            "choice, %   sst2   mean",
            "base        50.0   50.0",
            "sst2       100.0  100.0",
            "all         90.0   90.0",
        ]
    )


def test_what_is_missing_is_a_dash_and_has_no_mean() -> None:
    assert table({"base": {"a": {"loss": 1.0}, "b": {"loss": 2.0}}, "x": {"a": {"loss": math.nan}}}) == "\n".join(
        [
            "loss      a      b   mean",
            "base  1.000  2.000  1.500",
            "x       nan      -      -",
        ]
    )


def test_metrics_of_the_users_own_are_shown() -> None:
    assert table({"base": {"a": {"my.rouge": 0.123456}}}) == "my.rouge       a    mean\nbase      0.1235  0.1235"


def test_nothing_gives_nothing() -> None:
    assert table({}) == ""
    assert table({"base": {"a": {}}}) == ""
