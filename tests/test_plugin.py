"""Methods found by their file name, from their source alone."""

import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from lori_dist import plugin
from lori_dist.errors import ConfigError


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a user's own `package.module` and returns what the registry makes of it."""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")

    def write(source: str) -> plugin.Method:
        (package / "own.py").write_text(source)
        return plugin.find("masks", "theirs.own", "mask", "adapter.mask")

    return write


def test_the_methods_are_the_public_files_of_the_folder() -> None:
    masks = {"magnitude", "per_layer", "per_matrix", "per_module", "per_projection", "random"}
    assert masks <= set(plugin.names("masks"))
    assert not any(name.startswith("_") for name in plugin.names("masks"))
    assert {"concat", "linear"} <= set(plugin.names("merges"))


def test_a_method_has_its_options_and_its_summary() -> None:
    method = plugin.find("masks", "random", "mask", "adapter.mask")
    assert dict(method.options) == {"seed": plugin.Option(annotation=int, default=0)}
    assert method.summary.startswith("Keeps ")
    assert method.load().__name__ == "mask"


def test_what_a_file_only_imports_is_no_companion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "borrowed").mkdir()
    source = "from lori_dist.masks.magnitude import rule\n\n\ndef mask(b, *, density): ...\n"
    (tmp_path / "borrowed" / "own.py").write_text(source)
    assert plugin.find("masks", "magnitude", "mask", "adapter.mask").companion("rule") is not None
    assert plugin.find("masks", "borrowed.own", "mask", "adapter.mask").companion("rule") is None


def test_parameters_without_a_default_are_no_options() -> None:
    assert "density" not in plugin.find("masks", "random", "mask", "adapter.mask").options
    assert "weights" not in plugin.find("merges", "linear", "merge", "merge.method").options


@pytest.mark.parametrize(
    ("name", "nearest"), [("magnitud", "magnitude"), ("permatrix", "per_matrix"), ("rand", "random")]
)
def test_an_unknown_name_gets_the_nearest_one(name: str, nearest: str) -> None:
    wanted = f"adapter.mask: unknown '{name}' in masks; there are magnitude, .* Did you mean '{nearest}'"
    with pytest.raises(ConfigError, match=wanted):
        plugin.find("masks", name, "mask", "adapter.mask")


@pytest.mark.parametrize("name", ["__init__", "_select", "", "../merges/linear", "/etc/passwd", "magnitude/"])
def test_only_names_of_methods_reach_a_file(name: str) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.mask: "):
        plugin.find("masks", name, "mask", "adapter.mask")


def test_bind_reports_every_wrong_option() -> None:
    method = plugin.find("masks", "random", "mask", "adapter.mask")
    assert method.bind({"seed": 5}, "adapter.mask") == {"seed": 5}
    assert method.bind({}, "adapter.mask") == {}
    with pytest.raises(ConfigError) as caught:
        method.bind({"seed": "many", "sede": 1}, "adapter.mask")
    first, second = str(caught.value).split("\n")
    assert first.startswith("adapter.mask.seed: got 'many'; it should be a valid integer")
    assert second == "adapter.mask.sede: random has no such option; it takes seed. Did you mean 'seed'?"


def test_a_method_of_the_users_own_is_read_without_running_it(module: Any) -> None:
    method = module(
        '''
import torch
raise RuntimeError("run")
def mask(
    b, *, density, seed: int = 3, mode: Literal["a", "b"] = "a", rate: float | None = None, names: "list[str]" = []
):
    """Mine.

    More."""
'''
    )
    assert {name: option.annotation for name, option in method.options.items()} == {
        "seed": int,
        "mode": Literal["a", "b"],
        "rate": float | None,
        "names": list[str],
    }
    assert method.summary == "Mine."
    assert "theirs" not in sys.modules
    assert method.bind({"mode": "b", "rate": "1e-3", "names": ["x"]}, "m") == {
        "mode": "b",
        "rate": 1e-3,
        "names": ["x"],
    }
    with pytest.raises(ConfigError, match=r"m\.mode: got 'c'; it should be 'a' or 'b'"):
        method.bind({"mode": "c"}, "m")
    with pytest.raises(ConfigError, match=r"m\.rate: got True; wanted a number"):
        method.bind({"rate": True}, "m")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def mask(b, *, density, seed=DEFAULT): ...",
            "option seed of `mask` has the default DEFAULT; write a literal",
        ),
        ("def mask(b, *, density, x: Path = 'a'): ...", "option x of `mask` is annotated Path; only Literal, bool, .*"),
        ("def mask(b, *, density, x: 'a b' = 1): ...", "option x of `mask` is annotated 'a b'; only Literal, .*"),
        ("def musk(b, *, density): ...", "theirs.own has no function `mask`"),
        ("def mask(b, *, density:", "own.py is not valid Python"),
        ("", "theirs.own has no function `mask`"),
    ],
)
def test_a_method_that_cannot_be_checked_is_refused(module: Any, source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^adapter.mask: .*{message}"):
        module(source)


def test_a_method_may_lie_in_folders_that_are_no_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "own.py").write_text("def mask(b, *, density): ...")
    assert plugin.source_of("outer.inner.own", "adapter.mask") == tmp_path / "outer" / "inner" / "own.py"


@pytest.mark.parametrize("name", ["no.such", "theirs.none", "theirs.own.deeper", ".own", "theirs.", "sys.path", "a..b"])
def test_a_module_that_is_not_there_is_refused(module: Any, name: str) -> None:
    module("def mask(b, *, density): ...")
    with pytest.raises(
        ConfigError, match=r"adapter\.mask: no Python module '.*' can be found; check the name and PYTHONPATH"
    ):
        plugin.find("masks", name, "mask", "adapter.mask")


def test_a_range_stands_in_the_annotation(module: Any) -> None:
    method = module(
        """
def mask(
    b, *, density, share: Annotated[float, "(0, 1]"] = 1.0, rank: Annotated[int, "[1, inf)"] | None = None,
    weights: dict[str, float] = {}
): ..."""
    )
    good = {"share": 1, "rank": 3, "weights": {"a": 2}}
    assert method.bind(good, "m") == {"share": 1.0, "rank": 3, "weights": {"a": 2.0}}
    assert method.bind({"share": 1e-9, "rank": None}, "m") == {"share": 1e-9, "rank": None}
    for value in (0, 1.01, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=rf"^m\.share: got {value}; it must be in \(0, 1\]$"):
            method.bind({"share": value}, "m")
    with pytest.raises(ConfigError) as caught:
        method.bind({"rank": 0, "share": 2, "weights": {"a": "x"}}, "m")
    first, second, third = str(caught.value).split("\n")
    assert first == "m.rank: got 0; it must be in [1, inf)"
    assert second == "m.share: got 2; it must be in (0, 1]"
    assert third.startswith("m.weights: got {'a': 'x'}; ")


@pytest.mark.parametrize("text", ["0 to 1", "(0,1)", "(0, x]", "0, 1"])
def test_what_is_no_range_is_refused(module: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=r"option x of `mask`: .*write it as in"):
        module(f"def mask(b, *, density, x: Annotated[float, {text!r}] = 1.0): ...")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("magnitude", {"density": 0}),
        ("magnitude", {"rank": 0}),
        ("ties", {"density": 1.5}),
        ("ties", {"elect": "most"}),
        ("dare", {"density": -0.1}),
        ("dare", {"seed": -1}),
        ("dare_ties", {"density": 0.0}),
        ("svd", {"rank": 0}),
        ("tsv", {"keep": 0}),
        ("knots", {"inner": "tsv"}),
        ("knots", {"tolerance": -1.0}),
        ("core_space", {"inner": "knots"}),
        ("core_space", {"keep": 0}),
        ("pico", {"density": 2}),
        ("pico", {"inner": "svd"}),
        ("task_arithmetic", {"scale": "much"}),
        ("task_arithmetic", {"negate": "math"}),
    ],
)
def test_options_of_merges_are_refused_before_work(method: str, options: dict[str, Any]) -> None:
    found = plugin.find("merges", method, "merge", "merges.all.method")
    with pytest.raises(ConfigError, match=rf"^merges\.all\.method\.{next(iter(options))}: got .*; "):
        found.bind(options, "merges.all.method")
