import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lori_dist import config
from lori_dist.adapter.adapter import Adapter, Spec
from lori_dist.adapter.attach import attach, trainable
from lori_dist.config import Run
from lori_dist.errors import JobError
from lori_dist.formats import native
from lori_dist.jobs import task_seed
from lori_dist.masks.magnitude import mask
from lori_dist.tensors import metadata
from lori_dist.training import checkpoint, data
from lori_dist.training.loss import loss_sum, num_targets
from lori_dist.training.metrics import Record
from lori_dist.training.model import identity, load_model, load_tokenizer
from lori_dist.training.phases import Phase, phases
from lori_dist.training.schedule import learning_rate
from lori_dist.training.train import train
from lori_dist.training.trainer import checkpoint_activations
from lori_dist.training.world import from_environment
from tests.distributed import run_distributed
from tests.models import tiny_gpt2, tiny_llama
from tests.tokenizers import save
from tests.training.test_trackers import curves

FINGERPRINT = "f1"
STEPS, CALIBRATION_STEPS, EVERY = 7, 6, 2
MEASURED = {"seconds", "tokens_per_second", "mfu", "memory", "data_wait", "time"}
Failed = pytest.fail.Exception


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> Run:
    """A run of one task whose rows are of very different lengths."""
    rows = [{"prompt": f"{n} and {n * 7 % 5}: ", "response": "yes no " * (n % 4) + str(n)} for n in range(13)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config.validate(
        {
            "name": "test",
            "output": str(tmp_path / "runs"),
            "model": {"path": str(model_folder)},
            "tasks": {"count": {"train": str(path), "test": str(path)}},
            "adapter": {"rank": 4, "alpha": 8, "density": 0.13, "seed": 3},
            "train": {
                "steps": STEPS,
                "batch_size": 5,
                "micro_batch_size": 2,
                "lr": 5e-3,
                "schedule": "cosine",
                "warmup_steps": 2,
                "clip": 0.5,
                "checkpoint_every": EVERY,
                "calibrate": {"steps": CALIBRATION_STEPS},
            },
        }
    )


def changed(run: Run, **train: Any) -> Run:
    return replace(run, train=replace(run.train, **train))


def engine(name: str, **options: Any) -> config.Choice:
    return config.Choice(name=name, options=options)


# --- what a rank does ------------------------------------------------------------------------------------------------


def train_rank(run: Run, folder: Path, fingerprint: str = FINGERPRINT) -> tuple[dict[str, Any], list[Record]]:
    records: list[Record] = []
    summary = train(run, "count", from_environment(), folder, fingerprint=fingerprint, progress=records.append)
    return summary, records


def train_and_die(run: Run, folder: Path, phase: str, step: int) -> None:
    """The last rank is killed once the first has done a step."""
    world = from_environment()

    def kill(record: Record) -> None:
        if (record["phase"], record["step"]) == (phase, step):
            os.kill(os.getpid(), signal.SIGKILL)

    train(run, "count", world, folder, fingerprint=FINGERPRINT, progress=kill)


def train_apart(run: Run, folder: Path) -> None:
    """Every rank has storage of its own."""
    world = from_environment()
    train(run, "count", world, folder / str(world.rank), fingerprint=FINGERPRINT)


def train_unlike(run: Run, folder: Path) -> None:
    """The last rank makes another A, as another version of the program would."""
    world = from_environment()
    own = replace(run, adapter=replace(run.adapter, seed=world.rank // (world.size - 1)))
    train(own, "count", world, folder, fingerprint=FINGERPRINT)


def train_superseded(run: Run, folder: Path, num_writes: int) -> None:
    """A newer attempt takes over after so many writes."""
    writes: list[None] = []

    def still_mine() -> None:
        writes.append(None)
        if len(writes) > num_writes:
            raise JobError("folder: a newer attempt has taken over")

    train(run, "count", from_environment(), folder, fingerprint=FINGERPRINT, still_mine=still_mine)


def metrics(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(records: list[Record], phase: str) -> list[int]:
    return [record["step"] for record in records if record["phase"] == phase]


def without_seconds(records: list[Record]) -> list[Record]:
    """What is the same on any machine, at any time."""
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def values(adapter: Adapter) -> Tensor:
    return torch.cat([entries.values for entries in adapter.blocks[0].entries.values()])


# --- the protocol ----------------------------------------------------------------------------------------------------


def plain_protocol(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Calibrate, mask and train as the paper has it, in a plain loop. Returns masks and kept values."""
    b = plain_phase(run, None, CALIBRATION_STEPS, run.train.lr / 10)
    masks = mask({path: v.view(-1, run.adapter.rank) for path, v in b.items()}, density=run.adapter.density)
    return masks, plain_phase(run, masks, STEPS, run.train.lr)


def plain_phase(run: Run, masks: Mapping[str, Tensor] | None, num_steps: int, lr: float) -> dict[str, Tensor]:
    tokenizer = load_tokenizer(run.model)
    rows = data.read(run.tasks["count"].train, run.tasks["count"].template)
    examples = data.encode(rows, tokenizer, run.train.max_length)
    model = load_model(run.model)
    spec = Spec(rank=run.adapter.rank, alpha=run.adapter.alpha, seed=task_seed(run, "count"))
    attach(model, spec, masks=masks)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0, foreach=False)
    for step in range(num_steps):
        chosen = data.rows_of_step(step, num_rows=len(rows), batch_size=run.train.batch_size, seed=0, epochs=None)
        batch = data.collate([examples[row] for row in chosen], data.pad_id(tokenizer))
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, num_steps=num_steps, lr=lr, schedule="cosine", warmup_steps=2
        )
        (loss_sum(model, batch) / num_targets(batch)).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {path: parameter.detach() for path, parameter in parameters.items()}


ENGINES = [engine("ddp"), engine("fsdp"), engine("deepspeed", stage=2), engine("deepspeed", stage=3)]


@pytest.mark.parametrize("choice", ENGINES, ids=str)
def test_it_is_the_plain_protocol(choice: config.Choice, run: Run, tmp_path: Path) -> None:
    run_distributed(train_rank, changed(run, engine=choice), tmp_path / "job", world_size=2)
    adapter = native.load(tmp_path / "job" / "adapter.safetensors")
    masks, kept = plain_protocol(run)
    [block] = adapter.blocks
    assert {path for path, found in masks.items() if found.any()} == set(block.entries)
    for path, entries in block.entries.items():
        positions = masks[path].flatten().nonzero().squeeze(1)
        found = torch.arange(masks[path].numel()) if entries.index is None else entries.index
        assert torch.equal(found.long(), positions), path
    wanted = torch.cat([kept[path] for path in block.entries])
    assert float((values(adapter) - wanted).norm() / wanted.norm()) < 5e-6


def test_rows_that_a_search_measures_on_are_not_trained_on(run: Run, tmp_path: Path) -> None:
    lines = Path(run.tasks["count"].train).read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(lines[:-4]))
    fewer = replace(run, tasks={"count": replace(run.tasks["count"], train=str(tmp_path / "fewer.jsonl"))})
    searched = replace(
        run, merges={"all": config.Merge(method=config.Choice(name="linear"), search=config.Search(rows=4))}
    )
    for place, chosen in {"all": run, "fewer": fewer, "searched": searched}.items():
        run_distributed(train_rank, chosen, tmp_path / place, world_size=1)
    of_all, wanted, found = (
        native.load(tmp_path / place / "adapter.safetensors") for place in ("all", "fewer", "searched")
    )
    assert torch.equal(values(found), values(wanted))
    assert not torch.equal(values(found), values(of_all))


def test_what_it_writes_and_returns(run: Run, tmp_path: Path) -> None:
    (summary, records), (other_summary, other_records) = run_distributed(
        train_rank, run, tmp_path / "job", world_size=2
    )
    assert summary == other_summary
    assert other_records == []
    assert {path.name for path in (tmp_path / "job").iterdir()} == {
        "adapter.safetensors",
        "calibrated.safetensors",
        "checkpoints",
        "metrics.jsonl",
    }
    adapter = native.load(tmp_path / "job" / "adapter.safetensors")
    assert (summary["kept"], summary["total"]) == (adapter.kept, adapter.total)
    assert summary["kept"] == round(0.13 * summary["total"])
    assert summary["bytes"] == (tmp_path / "job" / "adapter.safetensors").stat().st_size
    assert summary["steps"] == STEPS
    assert summary["loss"] == records[-1]["loss"]
    assert summary["seconds"] > 0
    assert json.loads(json.dumps(summary)) == summary
    assert adapter.base == identity(run.model)
    assert [(block.name, block.seed) for block in adapter.blocks] == [("count", task_seed(run, "count"))]
    assert adapter.targets == "all-linear"
    assert sorted(path.name for path in (tmp_path / "job" / "checkpoints").iterdir()) == [
        "train-00000004.safetensors",
        "train-00000006.safetensors",
    ]


def test_metrics_are_those_of_the_global_batch(run: Run, tmp_path: Path) -> None:
    (_, records), _ = run_distributed(train_rank, run, tmp_path / "job", world_size=2)
    assert metrics(tmp_path / "job") == records
    assert len(list((run.folder / "tensorboard" / "train-count" / "train").iterdir())) == 1  # of rank 0 alone
    assert steps(records, "calibrate") == list(range(1, CALIBRATION_STEPS + 1))
    assert steps(records, "train") == list(range(1, STEPS + 1))
    first = records[CALIBRATION_STEPS]
    assert set(first) == {"phase", "step", "num_steps", "steps_left", "loss", "lr", "grad_norm", "tokens"} | MEASURED
    assert first["num_steps"] == STEPS
    for record in records:
        assert record["tokens_per_second"] == record["tokens"] / record["seconds"]
        assert 0 < record["data_wait"] < record["seconds"]
        assert 2**26 < record["memory"] < 2**34  # a process that has imported torch
        assert record["mfu"] is None  # nobody knows what a CPU can do
    assert sorted(record["time"] for record in records) == [record["time"] for record in records]
    assert abs(time.time() - first["time"]) < 300
    assert first["lr"] == pytest.approx(run.train.lr / 3)
    assert records[0]["lr"] == pytest.approx(run.train.lr / 30)
    assert first["loss"] == pytest.approx(records[0]["loss"], rel=1e-6)  # the same rows, and B at zero in both
    tokenizer = load_tokenizer(run.model)
    examples = data.encode(data.read(run.tasks["count"].train, run.tasks["count"].template), tokenizer, 512)
    chosen = data.rows_of_step(0, num_rows=13, batch_size=5, seed=0, epochs=None)
    assert first["tokens"] == sum(len(examples[row].prompt_ids + examples[row].response_ids) for row in chosen)


def test_a_dense_adapter_is_done_after_one_phase(run: Run, tmp_path: Path) -> None:
    dense = replace(run, adapter=replace(run.adapter, density=1.0))
    [(summary, records)] = run_distributed(train_rank, dense, tmp_path / "job", world_size=1)
    assert summary["kept"] == summary["total"]
    assert {record["phase"] for record in records} == {"train"}
    assert not (tmp_path / "job" / "calibrated.safetensors").exists()
    wanted = plain_phase(run, None, STEPS, run.train.lr)
    found = values(native.load(tmp_path / "job" / "adapter.safetensors"))
    assert float((found - torch.cat(list(wanted.values()))).norm() / found.norm()) < 5e-6


def test_a_task_has_a_length_and_a_rate_of_its_own(run: Run, tmp_path: Path) -> None:
    task = replace(run.tasks["count"], steps=3, lr=run.train.lr / 2)
    own = replace(run, tasks={**run.tasks, "count": task})
    [(summary, records)] = run_distributed(train_rank, own, tmp_path / "own", world_size=1)
    assert summary["steps"] == 3
    assert steps(records, "calibrate") == list(range(1, CALIBRATION_STEPS + 1))
    assert records[-1]["lr"] == pytest.approx(task.lr)
    assert records[0]["lr"] == pytest.approx(run.train.lr / 2 / 30)
    for_all = replace(run, train=replace(run.train, steps=3, lr=task.lr))
    run_distributed(train_rank, for_all, tmp_path / "all", world_size=1)
    assert torch.equal(*(values(native.load(tmp_path / name / "adapter.safetensors")) for name in ("own", "all")))


def test_activation_checkpointing_changes_no_number(run: Run, tmp_path: Path) -> None:
    run_distributed(train_rank, run, tmp_path / "plain", world_size=1)
    run_distributed(train_rank, changed(run, activation_checkpointing=True), tmp_path / "again", world_size=1)
    found, wanted = (native.load(tmp_path / name / "adapter.safetensors") for name in ("again", "plain"))
    assert torch.equal(values(found), values(wanted))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler calls what torch warns of
def test_compiled_blocks_change_the_rounding_alone(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    short = changed(replace(run, adapter=replace(run.adapter, density=1.0)), steps=2)  # each size would be compiled
    [(_, expected)] = run_distributed(train_rank, short, tmp_path / "plain", world_size=1)
    [(_, records)] = run_distributed(train_rank, changed(short, compile=True), tmp_path / "other", world_size=1)
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in expected], rel=1e-5)


def test_a_recomputed_projection_changes_no_number(run: Run, tmp_path: Path) -> None:
    other = replace(run, adapter=replace(run.adapter, projection="recomputed"))
    [(cached, expected)] = run_distributed(train_rank, run, tmp_path / "cached", world_size=1)
    [(recomputed, records)] = run_distributed(train_rank, other, tmp_path / "recomputed", world_size=1)
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in expected], rel=1e-5)
    assert recomputed["kept"] == cached["kept"]


def test_packed_rows_change_no_number(run: Run, tmp_path: Path) -> None:
    [plain] = run_distributed(train_rank, run, tmp_path / "plain", world_size=1)
    packing = changed(run, pack=True, micro_batch_size=5)
    for rank, (summary, _) in enumerate(run_distributed(train_rank, packing, tmp_path / "packed", world_size=2)):
        assert summary["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5), rank


def test_a_mixture_and_a_module_trained_whole_are_the_same_on_more_ranks(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "other", "response": "file"}\n')
    task = replace(run.tasks["count"], mixture={str(other): 0.4})
    whole = replace(run.adapter, modules_to_save=("model.norm",))
    run = replace(run, tasks={"count": task}, adapter=whole)
    found = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        run_distributed(train_rank, changed(run, engine=engine("fsdp")), folder, world_size=size)
        found.append(native.load(folder / "adapter.safetensors"))
    assert list(found[0].saved) == ["model.norm.weight"]
    torch.testing.assert_close(values(found[1]), values(found[0]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1].saved, found[0].saved, rtol=1e-5, atol=0)
    assert not torch.equal(found[0].saved["model.norm.weight"], torch.ones(36))


def test_a_base_in_half_precision_trains(run: Run, tmp_path: Path) -> None:
    halved = replace(run, model=replace(run.model, dtype="bfloat16"), adapter=replace(run.adapter, dtype="bfloat16"))
    (summary, records), _ = run_distributed(train_rank, halved, tmp_path / "job", world_size=2)
    assert summary["kept"] == round(0.13 * summary["total"])
    assert records[-1]["loss"] < records[0]["loss"]
    assert values(native.load(tmp_path / "job" / "adapter.safetensors")).dtype == torch.float32


# --- phases ----------------------------------------------------------------------------------------------------------


def plan(density: float = 0.1, **train: Any) -> list[Phase]:
    calibrate = config.Calibrate(**train.pop("calibrate", {}))
    return phases(config.Train(calibrate=calibrate, lr=1e-3, batch_size=4, **train), density, num_rows=10)


def test_calibration_is_as_long_as_training_at_a_tenth_of_its_rate() -> None:
    assert plan(steps=50) == [
        Phase(name="calibrate", num_steps=50, epochs=None, lr=1e-4, steps_after=50),
        Phase(name="train", num_steps=50, epochs=None, lr=1e-3),
    ]
    assert [phase.num_steps for phase in plan(epochs=2.0)] == [5, 5]


def test_calibration_may_have_its_own_length_and_rate() -> None:
    assert plan(epochs=2.0, calibrate={"steps": 3, "lr": 7e-4}) == [
        Phase(name="calibrate", num_steps=3, epochs=None, lr=7e-4, steps_after=5),
        Phase(name="train", num_steps=5, epochs=2.0, lr=1e-3),
    ]
    [first, _] = plan(steps=50, calibrate={"epochs": 1.0})
    assert first == Phase(name="calibrate", num_steps=3, epochs=1.0, lr=1e-4, steps_after=50)


def test_a_dense_adapter_has_no_calibration() -> None:
    assert plan(density=1.0, steps=50, calibrate={"steps": 3}) == [
        Phase(name="train", num_steps=50, epochs=None, lr=1e-3)
    ]


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "step", "calibration", "training"),
    [
        ("calibrate", 1, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]),
        ("calibrate", 5, [5, 6], [1, 2, 3, 4, 5, 6, 7]),
        ("train", 1, [], [1, 2, 3, 4, 5, 6, 7]),
        ("train", 6, [], [5, 6, 7]),
    ],
)
def test_a_killed_training_goes_on_to_the_same_bits(
    phase: str, step: int, calibration: list[int], training: list[int], run: Run, tmp_path: Path
) -> None:
    run_distributed(train_rank, run, tmp_path / "whole", world_size=2)
    with pytest.raises(Failed, match="SIGKILL"):
        run_distributed(train_and_die, run, tmp_path / "killed", phase, step, world_size=2)
    assert not (tmp_path / "killed" / "adapter.safetensors").exists()
    (_, records), _ = run_distributed(train_rank, run, tmp_path / "killed", world_size=2)
    assert steps(records, "calibrate") == calibration
    assert steps(records, "train") == training
    for name in ("adapter.safetensors", "calibrated.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert without_seconds(metrics(tmp_path / "killed")) == without_seconds(metrics(tmp_path / "whole"))
    drawn = run.folder / "tensorboard" / "train-count"
    for name in ("calibrate", "train"):
        written = [record for record in metrics(tmp_path / "killed") if record["phase"] == name]
        found = curves(drawn / name)
        assert found["loss"] == [(record["step"], pytest.approx(record["loss"], rel=1e-6)) for record in written]
        assert set(found) == {"loss", "lr", "grad_norm", "tokens", *MEASURED} - {"mfu", "time"}


@pytest.mark.parametrize(
    ("first", "first_size", "second", "second_size"),
    [
        (engine("fsdp"), 2, engine("deepspeed", stage=3), 1),
        (engine("deepspeed", stage=1), 2, engine("fsdp"), 4),
    ],
    ids=str,
)
def test_another_engine_on_other_ranks_goes_on(
    first: config.Choice, first_size: int, second: config.Choice, second_size: int, run: Run, tmp_path: Path
) -> None:
    run_distributed(train_rank, run, tmp_path / "whole", world_size=1)
    with pytest.raises(Failed, match="SIGKILL"):
        begun = changed(run, engine=first)
        run_distributed(train_and_die, begun, tmp_path / "killed", "train", 5, world_size=first_size)
    finished = changed(run, engine=second)
    [(_, records), *_] = run_distributed(train_rank, finished, tmp_path / "killed", world_size=second_size)
    assert steps(records, "train") == [5, 6, 7]
    found, wanted = (values(native.load(tmp_path / name / "adapter.safetensors")) for name in ("killed", "whole"))
    assert float((found - wanted).norm() / wanted.norm()) < 5e-6


CHAIN = (
    (engine("deepspeed", stage=3), 4, 3),
    (engine("fsdp"), 2, 5),
    (engine("ddp"), 1, 7),
    (engine("fsdp", base="replicated"), 4, None),
)
"""Engine, number of ranks, and the step of the second phase after which one of them is killed."""


def test_a_training_moves_over_engines_and_numbers_of_ranks(run: Run, tmp_path: Path) -> None:
    run_distributed(train_rank, run, tmp_path / "whole", world_size=1)
    for choice, world_size, last in CHAIN:
        moved = changed(run, engine=choice)
        if last is None:
            [(_, records), *_] = run_distributed(train_rank, moved, tmp_path / "moved", world_size=world_size)
            assert steps(records, "train") == [7]
            continue
        with pytest.raises(Failed, match="SIGKILL"):
            run_distributed(train_and_die, moved, tmp_path / "moved", "train", last, world_size=world_size)
    found, wanted = (values(native.load(tmp_path / name / "adapter.safetensors")) for name in ("moved", "whole"))
    assert float((found - wanted).norm() / wanted.norm()) < 5e-6


def draw_rank(run: Run, folder: Path) -> list[tuple[str, int, float]]:
    """What a random generator gives after each step, on the first rank."""
    drawn: list[tuple[str, int, float]] = []

    def draw(record: Record) -> None:
        drawn.append((record["phase"], record["step"], torch.rand(1).item()))

    train(run, "count", from_environment(), folder, fingerprint=FINGERPRINT, progress=draw)
    return drawn


def test_a_resumed_training_draws_the_same_random_numbers(run: Run, tmp_path: Path) -> None:
    whole, _ = run_distributed(draw_rank, run, tmp_path / "whole", world_size=2)
    with pytest.raises(Failed, match="SIGKILL"):
        run_distributed(train_and_die, run, tmp_path / "killed", "train", 3, world_size=2)
    rest, _ = run_distributed(draw_rank, run, tmp_path / "killed", world_size=2)
    assert rest == [item for item in whole if item[0] == "train" and item[1] > 2]
    assert len({number for _, _, number in whole}) == len(whole)


def test_another_base_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="SIGKILL"):
        run_distributed(train_and_die, run, tmp_path / "job", "train", 5, world_size=1)
    other = replace(run, model=replace(run.model, path=str(save(tiny_llama(tied=True), tmp_path / "other"))))
    with pytest.raises(Failed, match=r"is a checkpoint of something else: model\.content\.\S+ is '\w+' there"):
        run_distributed(train_rank, other, tmp_path / "job", world_size=1)


def test_another_adapter_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="SIGKILL"):
        run_distributed(train_and_die, run, tmp_path / "job", "train", 5, world_size=1)
    other = replace(run, adapter=replace(run.adapter, alpha=16.0))
    with pytest.raises(Failed, match=r"is a checkpoint of something else: adapter\.alpha is 8\.0 there and 16\.0 here"):
        run_distributed(train_rank, other, tmp_path / "job", world_size=1)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(run: Run, tmp_path: Path) -> None:
    run_distributed(train_rank, run, tmp_path / "job", world_size=1)
    wanted = (tmp_path / "job" / "adapter.safetensors").read_bytes()
    damaged = tmp_path / "job" / "checkpoints" / "train-00000006.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    [(_, records)] = run_distributed(train_rank, run, tmp_path / "job", world_size=1)
    assert steps(records, "train") == [5, 6, 7]
    assert (tmp_path / "job" / "adapter.safetensors").read_bytes() == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", [engine("fsdp"), engine("deepspeed", stage=2), engine("deepspeed", stage=3)], ids=str
)
def test_slices_of_mlps_change_the_rounding_alone(choice: config.Choice, run: Run, tmp_path: Path) -> None:
    run_distributed(train_rank, run, tmp_path / "plain", world_size=1)
    sliced = changed(run, engine=choice, mlp_slices=3, activation_checkpointing=True)
    run_distributed(train_rank, sliced, tmp_path / "sliced", world_size=2)
    found, wanted = (values(native.load(tmp_path / name / "adapter.safetensors")) for name in ("sliced", "plain"))
    assert float((found - wanted).norm() / wanted.norm()) < 5e-6


def test_a_damaged_calibration_is_done_again(run: Run, tmp_path: Path) -> None:
    run_distributed(train_rank, run, tmp_path / "job", world_size=1)
    calibrated, adapter = (tmp_path / "job" / f"{name}.safetensors" for name in ("calibrated", "adapter"))
    wanted = calibrated.read_bytes(), adapter.read_bytes()
    calibrated.write_bytes(wanted[0][:-1])
    [(_, records)] = run_distributed(train_rank, run, tmp_path / "job", world_size=1)
    assert steps(records, "calibrate") == list(range(1, CALIBRATION_STEPS + 1))
    assert (calibrated.read_bytes(), adapter.read_bytes()) == wanted


def test_results_of_another_configuration_are_refused(run: Run, tmp_path: Path) -> None:
    run_distributed(train_rank, run, tmp_path / "job", world_size=1)
    with pytest.raises(Failed, match=r"calibrated.safetensors: is a checkpoint of something else: fingerp"):
        run_distributed(train_rank, run, tmp_path / "job", "f2", world_size=1)


def test_the_calibration_can_be_read_as_a_state(run: Run, tmp_path: Path) -> None:
    run_distributed(train_rank, run, tmp_path / "job", world_size=1)
    path = tmp_path / "job" / "calibrated.safetensors"
    origin = json.loads(metadata(path)["lori"])["origin"]
    assert origin["fingerprint"] == FINGERPRINT
    assert origin["schedule"] == {"name": "cosine", "warmup_steps": 2, "num_steps": CALIBRATION_STEPS, "lr": 5e-4}
    state = checkpoint.read(path, "calibrate", origin=origin)
    wanted = plain_phase(run, None, CALIBRATION_STEPS, run.train.lr / 10)
    assert list(state.values) == list(wanted)
    assert state.step == CALIBRATION_STEPS


# --- refusals --------------------------------------------------------------------------------------------------------


def test_ranks_with_folders_of_their_own_are_named(run: Run, tmp_path: Path) -> None:
    run_distributed(train_rank, run, tmp_path / "0", world_size=1)
    with pytest.raises(Failed, match=r"JobError: rank 1, 2: its finding of .* differs from that of rank 0; give an"):
        run_distributed(train_apart, run, tmp_path, world_size=3)


def test_ranks_with_another_projection_are_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="JobError: rank 2: its projection A differs from that of rank 0; install"):
        run_distributed(train_unlike, run, tmp_path / "job", world_size=3)


def test_a_loss_that_is_not_finite_ends_the_training(run: Run, tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"JobError: count: at step . of 6 of phase calibrate the loss is nan.*lower the"):
        run_distributed(train_rank, changed(run, lr=1e30, clip=None), tmp_path / "job", world_size=1)


@pytest.mark.parametrize("num_writes", [0, 1, 8, 9, 12])
def test_an_attempt_that_was_taken_over_writes_nothing_more(num_writes: int, run: Run, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="JobError: folder: a newer attempt has taken over"):
        run_distributed(train_superseded, run, tmp_path / "job", num_writes, world_size=1)
    assert not (tmp_path / "job" / "adapter.safetensors").exists()
    written = metrics(tmp_path / "job") if num_writes else []
    assert len(written) <= num_writes


# --- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_blocks_run_again_in_the_backward_pass_and_without_dropout(make: Any) -> None:
    model, plain = make(), make()
    checkpoint_activations(model)
    block = (model.model.layers if hasattr(model, "model") else model.transformer.h)[0]
    calls: list[None] = []
    block.mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    ids = torch.arange(3, 20)[None]
    logits = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits, plain(input_ids=ids, use_cache=False).logits)
    assert len(calls) == 1
    logits.sum().backward()
    assert len(calls) == 2
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
