"""Several tasks' trainings over one base give what each gives alone."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lori_dist import config, load_adapter
from lori_dist.adapter.adapter import Adapter, in_memory
from lori_dist.config import Choice, Run
from lori_dist.errors import LoriError
from lori_dist.jobs import plan, train_job
from lori_dist.training.metrics import Record
from lori_dist.training.task import make_job
from lori_dist.training.train import train, train_together
from lori_dist.training.trainer import Group
from lori_dist.training.world import from_environment
from tests.distributed import TIMEOUT, run_distributed
from tests.models import tiny
from tests.multitask.combinations import OPTIONS, changed
from tests.tokenizers import save

TASKS = {"short": ("yes", 5), "long": ("no", 9), "middle": ("yes no yes", 7)}
ENGINES = [
    Choice(name="ddp"),
    Choice(name="fsdp"),
    Choice(name="fsdp", options={"base": "replicated"}),
    *(Choice(name="deepspeed", options={"stage": stage}) for stage in (1, 2, 3)),
]
SLOW = pytest.mark.slow
TOLERANCE = 5e-6
COMPILE_S = 1800.0
"""Seconds for trainings whose blocks are compiled, on a machine that others use as well."""
Failed = pytest.fail.Exception


def described(model_folder: Path, place: Path) -> Run:
    """Tasks of unequal sizes, lengths, numbers of steps and learning rates."""
    tasks = {}
    for name, (answer, count) in TASKS.items():
        path = place / f"{name}.jsonl"
        rows = [{"prompt": f"{n} and {n * 7 % 5}: ", "response": f"{answer} {n}"} for n in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks[name] = {"train": str(path), "test": str(path)}
    tasks["short"] |= {"lr": 5e-3}
    tasks["long"] |= {"epochs": 4}
    return config.validate(
        {
            "name": "test",
            "output": str(place / "runs"),
            "model": {"path": str(model_folder)},
            "tasks": tasks,
            "adapter": {"rank": 4, "alpha": 8, "density": 0.3, "seed": 3},
            # A large eps, or Adam makes steps of the rounding of gradients near zero.
            "train": {
                "epochs": 3,
                "batch_size": 4,
                "micro_batch_size": 2,
                "lr": 2e-2,
                "eps": 1e-3,
                "clip": 0.5,
                "schedule": "cosine",
                "calibrate": {"epochs": 2},
                "checkpoint_every": 2,
            },
        }
    )


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> Run:
    return described(model_folder, tmp_path)


def alone(run: Run, task: str) -> None:
    job = train_job(run, task)
    train(run, task, from_environment(), run.folder / job.name, fingerprint=job.fingerprint)


def pack(run: Run, tasks: list[str], die_after: tuple[str, str, int] | None = None) -> dict[str, Any]:
    """What becomes of each task; an error as its text."""

    def watch(record: Record) -> None:
        if die_after is not None and (record["phase"], record["step"]) == die_after[1:]:
            os.kill(os.getpid(), signal.SIGKILL)

    def make(task: str) -> Any:
        job = train_job(run, task)
        return lambda: make_job(
            run,
            job,
            from_environment(),
            run.folder / job.name,
            fingerprint=job.fingerprint,
            progress=watch if die_after is not None and task == die_after[0] else lambda record: None,
        )

    world = from_environment()
    found = train_together({task: make(task) for task in tasks}, world)
    return {task: str(outcome) if isinstance(outcome, LoriError) else outcome for task, outcome in found.items()}


def adapter(run: Run, task: str) -> Adapter:
    return load_adapter(run.folder / f"train-{task}" / "adapter.safetensors")


def records(run: Run, task: str) -> list[dict[str, Any]]:
    lines = (run.folder / f"train-{task}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def flat(adapter: Adapter) -> Tensor:
    return torch.cat([adapter.delta(module).flatten() for module in adapter.shapes])


def assert_equal(found: Adapter, wanted: Adapter) -> None:
    assert [block.name for block in found.blocks] == [block.name for block in wanted.blocks]
    assert found.blocks[0].seed == wanted.blocks[0].seed
    if not wanted.blocks[0].projections:  # a trained A is compared with B
        assert found.blocks[0].checksums == wanted.blocks[0].checksums
    for module, entries in wanted.blocks[0].entries.items():
        ours = found.blocks[0].entries[module].index
        assert (ours is None) == (entries.index is None)
        assert ours is None or entries.index is None or torch.equal(ours, entries.index)
    for name, tensor in wanted.saved.items():
        mine, other = map(in_memory, (found.saved[name], tensor))
        assert float((mine - other).norm() / other.norm()) < TOLERANCE
    ours, theirs = flat(found), flat(wanted)
    assert float((ours - theirs).norm() / theirs.norm()) < TOLERANCE


def each_alone(run: Run) -> None:
    for task in run.tasks:
        alone(run, task)


@pytest.fixture(scope="module")
def separate(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run like `run` whose tasks were each trained alone, by one process."""
    run = described(model_folder, tmp_path_factory.mktemp("separate"))
    run_distributed(each_alone, run, world_size=1)
    return run


@pytest.fixture
def wanted(separate: Run) -> dict[str, Adapter]:
    return {task: adapter(separate, task) for task in TASKS}


def test_each_task_gets_what_it_gets_alone(run: Run, separate: Run, wanted: dict[str, Adapter]) -> None:
    [found] = run_distributed(pack, run, list(TASKS), world_size=1)
    for task, (_, count) in TASKS.items():
        assert_equal(adapter(run, task), wanted[task])
        assert found[task]["steps"] == -(-(4 if task == "long" else 3) * count // 4)
        assert found[task]["kept"] == wanted[task].kept
        ours, theirs = records(run, task), records(separate, task)
        for key in ("phase", "step", "num_steps", "steps_left", "tokens"):
            assert [record[key] for record in ours] == [record[key] for record in theirs]
        assert all(record["mfu"] is None for record in ours)  # nobody knows what a CPU can do
        for key in ("loss", "grad_norm", "lr"):
            assert [record[key] for record in ours] == pytest.approx([record[key] for record in theirs], rel=1e-4)


# --- options ---------------------------------------------------------------------------------------------------------

HERE = [option for option in OPTIONS if option not in ("train.validate_every", "output: a URL")]
"""What is not shown elsewhere."""
QUICK = (
    *("train.early_stop", "train.on_divergence: rollback", "train.pack", "adapter.projection: trained"),
    *("adapter.modules_to_save", "tasks.NAME.start"),
)
"""Those that have most of their own to keep apart by task."""


def both(run: Run) -> None:
    """Each task alone, then all over one base, in one process."""
    each_alone(replace(run, name="alone"))
    found = pack(run, list(run.tasks))
    assert not any(isinstance(outcome, str) for outcome in found.values()), found


@pytest.mark.parametrize("option", [pytest.param(one, marks=() if one in QUICK else SLOW) for one in HERE])
@pytest.mark.filterwarnings("ignore")  # torch's compiler calls what torch warns of
def test_whatever_one_task_can_have(run: Run, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    first = replace(run, name="first", adapter=replace(run.adapter, rank=2, seed=8))
    start = str(first.folder / "train-middle" / "adapter.safetensors")
    if "start" in option:
        run_distributed(alone, first, "middle", world_size=1)
    tree = config.dump(run)
    del tree["tasks"]["long"]["epochs"]
    for task in tree["tasks"].values():
        task["validation"] = run.tasks["long"].train
    tree = changed(tree, option, task="long", rows=run.tasks["middle"].train, start=start)
    tree["evaluate"]["max_new_tokens"] = 8
    if "model" in OPTIONS[option]:
        tree["model"]["path"] = str(save(tiny(OPTIONS[option]["model"]), tmp_path / "mixture"))
    run = config.validate(tree)
    run_distributed(both, run, world_size=1, timeout=COMPILE_S if "compile" in option else TIMEOUT)
    updates, left = [], []
    for name in run.tasks:
        separate = replace(run, name="alone")
        assert_equal(adapter(run, name), adapter(separate, name))
        ours, theirs = records(run, name), records(separate, name)
        assert [(r["phase"], r["step"], r.get("update")) for r in ours] == [
            (r["phase"], r["step"], r.get("update")) for r in theirs
        ]
        for key in ("loss", "grad_norm", "validation_loss"):
            assert [r[key] for r in ours if key in r] == pytest.approx([r[key] for r in theirs if key in r], rel=1e-3)
        updates += [record["update"] for record in ours if "update" in record]
        left.append(ours[-1]["num_steps"] - ours[-1]["step"])
    assert bool(updates) == ("divergence" in option)  # or nothing is shown
    assert any(left) == ("early_stop" in option)


@pytest.mark.parametrize(
    "engine",
    [pytest.param(one, marks=() if one.name == "fsdp" or one.options == {"stage": 3} else SLOW) for one in ENGINES],
    ids=lambda engine: f"{engine.name} {engine.options}",
)
def test_on_every_engine(run: Run, wanted: dict[str, Adapter], engine: Choice) -> None:
    run = replace(run, train=replace(run.train, engine=engine))
    run_distributed(pack, run, list(TASKS), world_size=2)
    for task in TASKS:
        assert_equal(adapter(run, task), wanted[task])


@pytest.mark.slow
@pytest.mark.parametrize("engine", [ENGINES[0], ENGINES[1], ENGINES[4]], ids=["ddp", "fsdp", "deepspeed-2"])
@pytest.mark.filterwarnings("ignore")  # torch's compiler calls what torch warns of
def test_compiled_on_engines(
    run: Run, wanted: dict[str, Adapter], engine: Choice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    run = replace(run, train=replace(run.train, engine=engine, compile=True))
    run_distributed(pack, run, list(TASKS), world_size=2, timeout=COMPILE_S)
    for task in TASKS:
        assert_equal(adapter(run, task), wanted[task])


def trained_in_order(run: Run) -> None:
    """The trainings of a run's plan, one after the other."""
    for job in plan(run):
        if job.kind == "train":
            more = {key: job.settings[key] for key in ("joint", "sequel") if key in job.settings}
            place = run.folder / job.name
            train(run, job.settings["task"], from_environment(), place, fingerprint=job.fingerprint, **more)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["joint", "sequential"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_together_and_in_sequence(run: Run, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    tree = config.dump(run)
    for task in tree["tasks"].values():
        task |= {"lr": None, "epochs": None}
    tree |= {"multitask": way, "adapter": {**tree["adapter"], "share_projection": way == "sequential"}, "merges": {}}
    plain = config.validate({**tree, "name": "plain"})
    compiled = config.validate({**tree, "train": {**tree["train"], "compile": True}})
    for one in (plain, compiled):
        run_distributed(trained_in_order, one, world_size=2, timeout=COMPILE_S)
    names = ["joint"] if way == "joint" else list(TASKS)
    for name in names:
        assert_equal(adapter(compiled, name), adapter(plain, name))


@pytest.mark.parametrize("engine", [ENGINES[1], *(pytest.param(one, marks=SLOW) for one in ENGINES[2:])])
def test_whatever_one_task_can_have_where_it_is_sharded(run: Run, engine: Choice) -> None:
    """States of one task are put back, its steps skipped, and its modules and A trained, beside those of others."""
    tree = config.dump(run)
    del tree["tasks"]["long"]["epochs"]
    for task in tree["tasks"].values():
        task["validation"] = run.tasks["long"].train
    tree["adapter"] |= {"projection": "trained", "modules_to_save": ["norm", "lm_head"]}
    guards = {"spike": 1.001, "on_divergence": "rollback", "validate_every": 3, "early_stop": 1}
    tree["train"] |= {**guards, "epochs": None, "steps": 12, "batch_size": 2, "lr": 1e-4}
    run = config.validate(tree)
    run = replace(run, train=replace(run.train, engine=engine))
    run_distributed(both, run, world_size=2)
    for name in run.tasks:
        separate = replace(run, name="alone")
        assert_equal(adapter(run, name), adapter(separate, name))
        about = [[(r["step"], r.get("update")) for r in records(one, name)] for one in (run, separate)]
        assert about[0] == about[1]


def test_tasks_that_were_killed_go_on_where_each_was(run: Run, wanted: dict[str, Adapter]) -> None:
    """In calibration, and with tasks at different steps in the sparse phase."""
    for moment in (("long", "calibrate", 3), ("middle", "train", 3), ("long", "train", 6)):
        with pytest.raises(Failed, match="SIGKILL"):
            run_distributed(pack, run, list(TASKS), moment, world_size=1)
    run_distributed(pack, run, ["middle", "long", "short"], world_size=2)
    for task in TASKS:
        assert_equal(adapter(run, task), wanted[task])
        steps = [(record["phase"], record["step"]) for record in records(run, task)]
        assert steps == list(dict.fromkeys(steps))


@pytest.mark.parametrize("engine", [Choice(name="ddp"), Choice(name="deepspeed", options={"stage": 3})])
def test_what_goes_wrong_in_one_task_ends_that_one(run: Run, wanted: dict[str, Adapter], engine: Choice) -> None:
    """One has a broken row; another diverges until its loss is no number."""
    Path(run.tasks["short"].train).write_text("{}\n")
    run = replace(run, train=replace(run.train, engine=engine))
    broken, [found, _] = run.folder / "train-long", run_distributed(diverging, run, world_size=2)
    assert "tasks.short.train" in found["short"]
    assert "long: at step" in found["long"] and "the loss is nan" in found["long"]
    assert not (broken / "adapter.safetensors").exists()
    assert_equal(adapter(run, "middle"), wanted["middle"])


def diverging(run: Run) -> dict[str, Any]:
    """The pack, where the values of the task `long` are spoilt after its second sparse step."""
    before = Group._step

    def step(self: Group, active: Any) -> None:
        before(self, active)
        if self.courses["long"].phase.name == "train" and self.courses["long"].end.step == 2:
            for name, part in self.engine.parts("values").items():
                if name.endswith("@long"):
                    part.data.fill_(math.nan)

    Group._step = step  # type: ignore[method-assign]
    return pack(run, list(TASKS))
