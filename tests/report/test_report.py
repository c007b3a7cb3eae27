"""The report as files: JSON, a page that needs nothing else, and pictures."""

import dataclasses
import json
import logging
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from lori_dist import Adapter, report, save_adapter
from lori_dist.interference import interference
from lori_dist.report.plots import PALETTE, plots
from tests.merges.made import adapter, block

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{1}{0}$ & \N{SNOWMAN} \N{CJK UNIFIED IDEOGRAPH-6F22}",
    "a\x1b[2J\nb</svg></style>" + "x" * 200,
)
VOID = {"meta", "br", "img", "link", "input", "hr"}


def evaluation(*tasks: str) -> dict[str, dict[str, dict[str, float]]]:
    models = ["base", *tasks, "concat", "linear"]
    return {
        model: {
            task: {"loss": 1.0 + len(model) / (1 + len(task)), "choice": 0.9 if model == task else 0.5}
            for task in tasks
        }
        for model in models
    }


def tasks(*names: str) -> list[Adapter]:
    return [adapter(block(name, seed=number, draw=number)) for number, name in enumerate(names)]


class Page(HTMLParser):
    """What is on a page. Raises where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.tags if found == tag]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "made" / "here"
    report.write(tasks("math", "code", "safety"), folder, evaluation=evaluation("math", "code", "safety"))
    return folder


def test_the_json_is_what_was_computed(out: Path) -> None:
    found = json.loads((out / "report.json").read_text())
    drops = found.pop("drops")
    assert found == interference(tasks("math", "code", "safety"))
    assert drops["choice"]["merges"]["concat"]["drop"] == {"math": 0.4, "code": 0.4, "safety": 0.4}


def test_the_pictures_are_pictures(out: Path) -> None:
    found = {path.name for path in out.glob("*.png")}
    names = ["cosine", "layers", "support", "signs", "energy-input", "energy-output", "drop-1", "drop-2"]
    assert found == {f"report-{name}.png" for name in [*names, "norm-1", "norm-2", "norm-3"]}
    for path in out.glob("*.png"):
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert 600 <= width <= 2000
        assert 150 <= height <= 2000
        pixels = imread(path)[:, :, :3]
        assert pixels[0, 0].min() == 1.0  # on white
        assert (pixels.min(axis=2) < 0.5).mean() > 0.002  # and something is on it


def test_the_page_needs_nothing_else(out: Path) -> None:
    text = (out / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|//|@import|src=|javascript:", text)
    references = [value for _, found in page.tags for name, value in found.items() if name in ("href", "xlink:href")]
    assert all(value and value.startswith("#") for value in references)
    assert {"name": "viewport", "content": "width=device-width,initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme:dark" in text


def test_ids_are_unique_and_references_lead_somewhere(out: Path) -> None:
    text = (out / "report.html").read_text()
    ids = [found["id"] for _, found in Page(text).tags if "id" in found]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text)) <= set(ids)


def test_every_plot_has_a_text_and_every_table_a_box(out: Path) -> None:
    page = Page((out / "report.html").read_text())
    plotted = page.all("svg")
    assert len(plotted) == len(list(out.glob("*.png")))
    assert all(found["role"] == "img" and len(found["aria-label"] or "") > 20 for found in plotted)
    boxes = [found for found in page.all("div") if found.get("role") == "region"]
    assert len(boxes) == len(page.all("table"))
    for word in ("math and code", "0.900", "concat", "Cosines by layer", "sign conflicts"):
        assert word in page.words


def test_colours_are_variables_that_both_schemes_have(out: Path) -> None:
    text = (out / "report.html").read_text()
    drawn = text.partition("</style>")[2]
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == set()
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", text)) <= set(PALETTE)
    for side in (0, 1):
        assert len({colours[side] for colours in PALETTE.values()}) == len(PALETTE)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str, side: int) -> float:
    low, high = sorted(luminance(PALETTE[name][side]) for name in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("side", [0, 1])
def test_contrast_is_enough_to_read(side: int) -> None:
    for name in PALETTE:
        if name.startswith("line") or name in ("ink", "muted"):
            assert contrast(name, "paper", side) >= 4.5, name
        if re.fullmatch(r"more-[0-3]|less-[12]|band", name):
            assert contrast(name, "ink", side) >= 4.5, name
        if re.fullmatch(r"more-[456]|less-[34]", name):
            assert contrast(name, "paper", side) >= 4.5, name


def test_hostile_names_are_text(tmp_path: Path) -> None:
    report.write(tasks(*HOSTILE), tmp_path, evaluation={**evaluation(*HOSTILE), "<script>merge": {}})
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "\x1b" not in text
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    assert all(name in page.words for name in HOSTILE[:3])
    assert len(page.all("svg")) == len(list(tmp_path.glob("*.png")))
    assert [one["name"] for one in json.loads((tmp_path / "report.json").read_text())["adapters"]] == list(HOSTILE)


def test_hostile_modules_are_text(tmp_path: Path) -> None:
    module = "layers.0.<script>alert(1)</script>"
    made = [
        Adapter(
            shapes={module: (6, 5)},
            blocks=(dataclasses.replace(one.blocks[0], entries={module: entries}, checksums={}),),
            targets="all-linear",
        )
        for one in tasks("one", "two")
        for entries in [one.blocks[0].entries["layers.0.q_proj"]]
    ]
    report.write(made, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert not page.all("script")


def test_one_adapter_alone_has_its_norms(tmp_path: Path) -> None:
    report.write(tasks("alone"), tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["report-norm-1.png"]
    assert "one adapter only" in Page((tmp_path / "report.html").read_text()).words


@pytest.mark.parametrize(
    "made",
    [
        [adapter(block("full")), adapter(block("empty", entries={}))],
        [adapter(block("empty", entries={})), adapter(block("void", seed=1, entries={}))],
        [adapter(block("shared")), adapter(block("same", draw=1))],
        tasks(*(f"task-{number}" for number in range(9))),
        [
            adapter(block("s", modules=["layers.0.q_proj"]), modules=["layers.0.q_proj"]),
            adapter(block("t", modules=["layers.1.up_proj"]), modules=["layers.1.up_proj"]),
        ],
    ],
)
def test_any_set_of_adapters_has_a_report(made: list[Adapter], tmp_path: Path) -> None:
    report.write(made, tmp_path)
    Page((tmp_path / "report.html").read_text())


def test_many_layers_fit(tmp_path: Path) -> None:
    entries = tasks("a")[0].blocks[0].entries["layers.0.q_proj"]
    modules = [f"layers.{layer}.{name}" for layer in range(80) for name in ("q_proj", "k_proj", "v_proj")]
    made = [
        Adapter(
            shapes=dict.fromkeys(modules, (6, 5)),
            blocks=(block(name, seed=seed, modules=(), entries=dict.fromkeys(modules, entries)),),
            targets="all-linear",
        )
        for seed, name in enumerate(("a", "b"))
    ]
    drawn = list(plots(interference(made)))
    assert all(max(plot.figure.get_size_inches()) < 16 for plot in drawn)


def test_the_same_adapters_give_the_same_files(out: Path, tmp_path: Path) -> None:
    (tmp_path / "report-norm-9.png").write_bytes(b"of an earlier report")
    report.write(tasks("math", "code", "safety"), tmp_path, evaluation=evaluation("math", "code", "safety"))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_run_leaves_its_report(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, tasks("math", "code"))
    assert report.write_of_run(summary, tmp_path) == {"path": str(tmp_path / "report.html")}
    written = json.loads((tmp_path / "report.json").read_text())
    assert [one["name"] for one in written["adapters"]] == ["math", "code"]
    assert list(written["drops"]) == ["loss", "choice"]


def test_merges_that_are_the_same_function_are_named(tmp_path: Path) -> None:
    summary = {**summary_of(tmp_path, tasks("math", "code")), "same_merges": [["concat", "linear"]]}
    report.write_of_run(summary, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["same_merges"] == [["concat", "linear"]]
    page = (tmp_path / "report.html").read_text()
    assert "The merges concat and linear are the same function of the same adapters" in page


def test_rows_that_a_merge_lost_are_on_the_page(tmp_path: Path) -> None:
    for model, score in (("math", 1.0), ("concat", 0.0)):
        folder = tmp_path / f"evaluate-{model}"
        folder.mkdir()
        line = {
            "task": "math",
            "metric": "choice",
            "row": 7,
            "prompt": HOSTILE[0],
            "answer": "x" * 1000,
            "score": score,
        }
        (folder / "predictions.jsonl").write_text(json.dumps({**line, "response": f"of {model}"}) + "\n")
    report.write_of_run(summary_of(tmp_path, tasks("math", "code")), tmp_path)
    [found] = json.loads((tmp_path / "report.json").read_text())["examples"]
    assert (found["right"], found["wrong"], found["only_right"]) == ("math", "concat", 1)
    page = (tmp_path / "report.html").read_text()
    assert "math is right and concat wrong on 1 of 1 rows" in Page(page).words
    assert HOSTILE[0] not in page
    assert "x" * 401 not in page


def test_a_run_of_one_adapter_leaves_none(tmp_path: Path) -> None:
    assert report.write_of_run(summary_of(tmp_path, tasks("math")), tmp_path) is None
    assert not (tmp_path / "report.html").exists()


def test_a_run_says_why_there_is_no_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    summary = summary_of(tmp_path, tasks("math", "code"))
    Path(summary["adapters"]["code"]["path"]).write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        found = report.write_of_run(summary, tmp_path)
    assert found is not None
    assert re.match(r"AdapterError: .*code\.safetensors: this is not a whole safetensors file", found["error"])
    assert "no report could be made" in caplog.text


def summary_of(folder: Path, made: list[Adapter]) -> dict[str, Any]:
    names = [one.blocks[0].name for one in made]
    for name, one in zip(names, made, strict=True):
        save_adapter(one, folder / f"{name}.safetensors")
    return {
        "adapters": {name: {"path": str(folder / f"{name}.safetensors")} for name in names},
        "evaluation": evaluation(*names),
    }


CONFLICTS = {
    "joint": {
        "steps": 20,
        "layers": ["model.layers.0", "model.layers.1"],
        "removed": 0.125,
        "pairs": [
            {
                "tasks": ["math", other],
                "cosine": -0.25,
                "share": share,
                "layers": {"cosine": [0.1, -0.3], "often": [share, 0.0], "depth": [-0.4, 0.0]},
            }
            for other, share in (("code", 0.5), (HOSTILE[0], 0.75))
        ],
    }
}


def test_conflicts_of_a_joint_training_are_in_all_of_it(tmp_path: Path) -> None:
    made = report.write(tasks("joint"), tmp_path, conflicts=CONFLICTS)
    assert made["conflicts"] == CONFLICTS == json.loads((tmp_path / "report.json").read_text())["conflicts"]
    assert {"report-conflicts-1.png", "report-conflicts-depth-1.png"} <= {path.name for path in tmp_path.glob("*.png")}
    page = Page((tmp_path / "report.html").read_text())
    assert not page.all("script")
    assert f"math and {HOSTILE[0]} conflicted most often: on average in 75.0%" in page.words
    assert "Projection removed 12.5% of" in page.words
    assert {"conflicts-1", "conflicts-depth-1"} <= {figure.get("id") for figure in page.all("figure")}


def test_a_run_of_one_adapter_has_a_report_if_tasks_shared_it(tmp_path: Path) -> None:
    save_adapter(tasks("joint")[0], tmp_path / "joint.safetensors")
    made = {"path": str(tmp_path / "joint.safetensors")}
    evaluation_of_joint = {"joint": {"math": {"loss": 1.0}}}
    assert report.write_of_run({"adapters": {"joint": made}, "evaluation": evaluation_of_joint}, tmp_path) is None
    shared = {"adapters": {"joint": {**made, "conflicts": CONFLICTS["joint"]}}, "evaluation": evaluation_of_joint}
    assert report.write_of_run(shared, tmp_path) == {"path": str(tmp_path / "report.html")}
