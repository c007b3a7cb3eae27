"""Trainings whose A follows from what the base's layers read of the tasks' rows, against a plain computation."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lori_dist import config, jobs
from lori_dist.adapter.matching import match
from lori_dist.adapter.moments import LENGTH, orthonormal
from lori_dist.adapter.projection import projection
from lori_dist.cluster.board import Board
from lori_dist.cluster.launcher import train_task
from lori_dist.cluster.schedule import Resources
from lori_dist.config import Choice, Run
from lori_dist.errors import ConfigError
from lori_dist.formats import native
from lori_dist.forms.thanora import divided, entropy
from lori_dist.training import data
from lori_dist.training.model import load_model, load_tokenizer
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed

TASKS = ("copy", "count", "turn")
ROWS = 6
"""Rows of each task that are measured, of 9."""
ENGINES = [
    pytest.param(Choice(name="ddp"), 1, id="ddp", marks=pytest.mark.slow),
    pytest.param(Choice(name="fsdp"), 2, id="fsdp"),
    pytest.param(Choice(name="deepspeed", options={"stage": 3}), 2, id="deepspeed", marks=pytest.mark.slow),
]


def described(place: Path, model: Path, *, multitask: Any = "independent", **adapter: Any) -> Run:
    tasks = {}
    for number, task in enumerate(TASKS):
        rows = place / f"{task}.jsonl"
        lines = [{"prompt": f"{task} {n}" + "x" * (n % 4), "response": f"{(n * 7 + number) % 10}"} for n in range(9)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        tasks[task] = {"train": str(rows), "test": str(rows)}
    return config.validate(
        {
            "name": "t",
            "output": str(place / "runs"),
            "model": {"path": str(model)},
            "tasks": tasks,
            "adapter": {
                "rank": 4,
                "density": 0.5,
                "mask": "per_matrix",
                "targets": ["q_proj", "v_proj", "down_proj"],
                **adapter,
            },
            "train": {"steps": 2, "batch_size": 6, "micro_batch_size": 2, "lr": 1e-2, "calibrate": {"steps": 1}},
            "evaluate": {"batch_size": 2},
            "trackers": [],
            "multitask": multitask,
        }
    )


def trained(run: Run, task: str) -> str:
    logging.getLogger("lori_dist").setLevel(logging.INFO)
    return str(train_task(run, task, from_environment(), progress=lambda record: None))


def plain(run: Run, task: str) -> dict[str, Tensor]:
    """Module path -> mean of x x^T, float64: evenly spaced rows, one after the other, in one process."""
    model = load_model(run.model)
    layers, sums, num_tokens = match(model, run.adapter.targets), dict[str, Tensor](), 0

    def add(path: str, x: Tensor) -> None:
        flat = x.flatten(0, -2).double()
        sums[path] = flat.t() @ flat + sums.get(path, torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64))

    for path, layer in layers.items():
        layer.register_forward_pre_hook(lambda module, args, path=path: add(path, args[0]))
    given = run.tasks[task]
    examples = data.encode(data.read(given.train, given.template), load_tokenizer(run.model), run.train.max_length)
    for place in (0, 1, 3, 4, 6, 7):
        ids = examples[place].prompt_ids + examples[place].response_ids
        num_tokens += len(ids)
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    return {path: one / num_tokens for path, one in sums.items()}


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert float((found.double() - wanted.double()).norm()) <= tolerance * float(wanted.double().norm())


@pytest.mark.parametrize(("engine", "num_ranks"), ENGINES)
def test_osrm_keeps_a_task_away_from_what_the_others_read(
    tmp_path: Path, model_folder: Path, engine: Choice, num_ranks: int
) -> None:
    run = described(tmp_path, model_folder, init="osrm", moments={"rows": ROWS})
    run = replace(run, train=replace(run.train, engine=engine))
    [path, *_] = run_distributed(trained, run, "copy", world_size=num_ranks)
    adapter = native.load(Path(path))
    [block] = adapter.blocks
    assert block.seed is None
    moments = [plain(run, task) for task in ("count", "turn")]
    for module, (_, in_features) in adapter.shapes.items():
        s = moments[0][module] + moments[1][module]
        values, vectors = torch.linalg.eigh(s)
        # As many directions as have no energy, to rounding, or the rank.
        count = max(4, int((values < values.max() * in_features * torch.finfo(torch.float32).eps).sum()))
        least = vectors[:, :count]
        seeded = projection(jobs.task_seed(run, "copy"), module, 4, in_features).double()
        a = block.projection(module, in_features)
        assert_near(a, LENGTH * orthonormal(seeded @ least @ least.t()), 2e-3)
        through = float((a.double() @ s * a).sum())
        assert through <= 1e-2 * float((seeded @ s * seeded).sum())
    assert {folder.name for folder in run.folder.glob("[!.]*/")} == {
        *("moments-count", "moments-turn", "train-copy", "logs")
    }
    assert not (run.folder / "train-copy" / "start.safetensors").exists()
    result = json.loads((run.folder / "moments-count" / "job.json").read_text())["result"]
    assert result["rows"] == ROWS
    assert (result["sketched"], result["width"]) == (0, None)
    said = (run.folder / "logs" / "moments-count.log").read_text()
    assert "moments of 4 distinct inputs of 6 layers" in said
    assert "4 in full, none as a sketch" in said


def test_what_is_measured_is_kept_and_a_sketch_says_so(tmp_path: Path, model_folder: Path) -> None:
    run = described(tmp_path, model_folder, init="osrm", moments={"rows": ROWS, "full_up_to": 40, "width": 30})
    run_distributed(trained, run, "copy", world_size=1)
    there = run.folder / "moments-turn" / "moments.safetensors"
    before = there.stat().st_mtime_ns
    [path] = run_distributed(trained, run, "count", world_size=1)
    assert there.stat().st_mtime_ns == before
    result = json.loads((there.parent / "job.json").read_text())["result"]
    assert (result["distinct"], result["sketched"], result["width"]) == (4, 2, 30)  # down_proj has 52 inputs
    assert "2 in full, 2 as a sketch of 30 columns" in (run.folder / "logs" / "moments-copy.log").read_text()
    [block] = native.load(Path(path)).blocks
    others = [plain(run, task) for task in ("copy", "turn")]
    for module in (f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)):
        s, a = others[0][module] + others[1][module], block.projection(module, 52).double()
        seeded = projection(jobs.task_seed(run, "count"), module, 4, 52).double()
        assert float((a @ s * a).sum()) <= 0.1 * float((seeded @ s * seeded).sum())


def test_thanora_begins_in_the_directions_of_each_task(tmp_path: Path, model_folder: Path) -> None:
    form = {"name": "thanora", "start": "moments", "temperature": 0.3}
    joint = {"name": "joint", "balance": "none"}
    run = described(tmp_path, model_folder, multitask=joint, form=form, rank=8, moments={"rows": ROWS})
    [path, _] = run_distributed(trained, run, "joint", world_size=2)
    adapter = native.load(Path(path))
    [block] = adapter.blocks
    model = load_model(run.model)
    moments = [plain(run, task) for task in TASKS]
    for module, (_, in_features) in adapter.shapes.items():
        weight = model.get_submodule(module).weight.detach().double()
        found = [torch.linalg.svd(weight @ one[module]) for one in moments]
        scores = torch.tensor([entropy(one.S[1e-6 * one.S.max() < one.S]) for one in found]) / 0.3
        sizes = divided(6, torch.softmax(scores, 0).tolist())
        a, start = block.projection(module, in_features).double(), 0
        for one, size in zip(found, sizes, strict=True):
            rows, start = a[start : start + size], start + size
            assert_near(rows @ rows.t(), torch.eye(size, dtype=torch.float64) / 3)
            assert_near((rows @ one.Vh[:size].t()).norm(), torch.tensor(math.sqrt(size / 3)), 1e-3)
        seeded = projection(jobs.task_seed(run, "joint"), module, 8, in_features)
        assert torch.equal(a[6:].float(), seeded[6:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": {"projection": "trained"}}, "adapter.projection: got trained, and adapter.init: osrm keeps an A"),
        ({"adapter": {"share_projection": True}}, "adapter.share_projection: makes one A for all tasks, and adapter.i"),
        (
            {"adapter": {"dtype": "bfloat16"}},
            "adapter.dtype: got bfloat16, and an A that is computed from data is floa",
        ),
        ({"multitask": "joint"}, "adapter.init: osrm is for an adapter of each task, and multitask joint"),
        ({"adapter": {"init": "random"}}, "adapter.moments: is for adapter.init osrm, or a form that begins from mom"),
        ({"tasks": ["copy"]}, "adapter.init: osrm keeps A away from what other tasks read, and there is one task"),
    ],
)
def test_what_does_not_combine_is_refused(
    tmp_path: Path, model_folder: Path, change: dict[str, Any], message: str
) -> None:
    tree = config.dump(described(tmp_path, model_folder, init="osrm", moments={"rows": ROWS}))
    tree["adapter"] |= change.get("adapter", {})
    tree["multitask"] = change.get("multitask", tree["multitask"])
    tree["tasks"] = {name: tree["tasks"][name] for name in change.get("tasks", TASKS)}
    with pytest.raises(ConfigError, match=message):
        config.validate(tree)


def needs(run: Run) -> dict[str, Sequence[str]]:
    return {job.name: job.needs for job in jobs.plan(run) if job.kind in ("moments", "train")}


def test_the_plan_measures_each_task_once(tmp_path: Path, model_folder: Path) -> None:
    run = described(tmp_path, model_folder, init="osrm")
    assert needs(run) == {
        **{f"moments-{task}": () for task in TASKS},
        "train-copy": ("moments-count", "moments-turn"),
        "train-count": ("moments-copy", "moments-turn"),
        "train-turn": ("moments-copy", "moments-count"),
    }
    one, other = (
        {job.name: job for job in jobs.plan(described(tmp_path, model_folder, init="osrm", moments={"rows": rows}))}
        for rows in (5, 6)
    )
    found = jobs.differences("moments", one["moments-copy"].settings, other["moments-copy"].settings)
    assert found == ["adapter.moments.rows 5 -> 6"]
    assert one["train-copy"].fingerprint != other["train-copy"].fingerprint
    assert not any(name.startswith("moments") for name in needs(described(tmp_path, model_folder)))


def test_trainings_that_share_a_base_start_when_all_moments_are_there(tmp_path: Path, model_folder: Path) -> None:
    run = described(tmp_path, model_folder, init="osrm")
    run = replace(run, cluster=replace(run.cluster, packing="auto"))
    board = Board(run=run, jobs=jobs.plan(run), progress=lambda event: None)
    run.folder.mkdir(parents=True)

    def startable() -> list[list[str]]:
        return [[job.name for job in together] for together in board.startable([Resources(cpus=4)])]

    assert startable() == [[f"moments-{task}" for task in TASKS]]
    measured = [job for job in board.jobs if job.kind == "moments"]
    board.start(measured)
    for job in measured:
        assert startable() == []
        board.finish(job, {"result": {}, "sha256": {}, "seconds": 1.0, "attempts": []})
    assert startable() == [[f"train-{task}" for task in TASKS]]
