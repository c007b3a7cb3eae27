"""What a plan says: laws of its arithmetic, what is known of 70B models, and what is measured."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from lori_dist import attach, config, trainable
from lori_dist.__main__ import main
from lori_dist.benchmarks.plan import run as measure
from lori_dist.errors import ConfigError
from lori_dist.gpus import DEVICES
from lori_dist.plan import Hardware, picture, plan, rows
from lori_dist.plan.model import Counted, count, spec
from lori_dist.plan.placement import MEMORY, memory, placements, sent, traffic
from lori_dist.training.data import encode, read
from lori_dist.training.flops import attention
from lori_dist.training.model import load_tokenizer
from tests.models import tiny

ROOT = Path(__file__).parents[2]
LARGE = sorted(path.stem for path in (ROOT / "configs").glob("llama-*.yaml"))


DATA = "configs/quickstart/data"
TWO = (
    "train.epochs=null",
    "train.steps=20",
    f"tasks.second={{train: {DATA}/refusal.train.jsonl, test: {DATA}/refusal.test.jsonl}}",
)
"""A second task."""


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def load(name: str, *overrides: str) -> config.Run:
    return config.load(f"configs/{name}.yaml", overrides)


def hardware(gpus: int = 16, nodes: int = 2, device: str = "h100", **given: Any) -> Hardware:
    return Hardware(gpus=gpus, nodes=nodes, **{**DEVICES[device], **given})


@pytest.fixture(scope="module")
def seventy() -> Counted:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return count(load("llama-3-70b-fsdp"))


# --- 70B -------------------------------------------------------------------------------------------------------------


def test_a_model_is_counted_without_its_weights(seventy: Counted) -> None:
    assert seventy.parameters == 70_553_706_496
    assert seventy.base == 2 * seventy.parameters
    assert seventy.num_blocks == 80 and seventy.num_modules == 560
    assert seventy.entries == 214_958_080  # 32 * 80 * (8192 + 2 * 1024 + 8192 + 2 * 28672 + 8192)
    assert seventy.kept == 21_495_808
    assert seventy.flops == 4 * (seventy.parameters - (128256 + 161) * 8192)  # without embeddings and norms


def test_a_base_of_four_bits_takes_a_quarter(seventy: Counted) -> None:
    small = count(load("llama-3-70b-4bit"))
    assert small.parameters == seventy.parameters
    assert small.blocks == pytest.approx(seventy.blocks * (4 + 32 / 64) / 16, rel=1e-3)


@pytest.mark.parametrize("name", LARGE)
def test_a_configuration_fits_the_machines_its_header_names(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (ROOT / "configs" / f"{name}.yaml").read_text().splitlines()
    commands = [shlex.split(line.lstrip("# ")) for line in lines if line.startswith("#   lori ")]
    [planned], [launch] = ([c for c in commands if c[1] == verb] for verb in ("plan", "run"))
    assert launch[2] == f"configs/{name}.yaml"
    assert main([*planned[1:], "--out", str(tmp_path / "plan.json"), "--picture", str(tmp_path / "plan.png")]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    engine = load(name).train.engine
    [own] = [one for one in found["placements"] if one["engine"] == {"name": engine.name, **engine.options}]
    assert own["fits_with_checkpointing"]
    assert load(name).train.activation_checkpointing
    printed = capsys.readouterr().out
    assert own["name"] in printed
    assert "TFLOP/s each, of which 50% are reached" in printed and "10% of memory lost to fragmentation" in printed
    assert ("(assumed, as there is no --gpu)" in printed) == ("--gpu" not in planned)
    assert main([*planned[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_said_with_what_is_lacking() -> None:
    found = plan(load("llama-3-70b-fsdp"), hardware(gpus=2, nodes=1, device="l40s"))
    assert found["recommended"]["placement"] is None
    assert "nothing fits: " in found["recommended"]["reason"] and "GiB a device" in found["recommended"]["reason"]
    assert not any(one["fits"] for one in found["placements"])
    assert all(one["packed_tasks"] == 0 for one in found["placements"])


def test_the_recommended_one_fits_and_none_that_fits_is_faster() -> None:
    found = plan(load("llama-3-70b-fsdp"), hardware(network=10.0))
    best = found["recommended"]
    fitting = [one for one in found["placements"] if one["fits"] or one["fits_with_checkpointing"]]
    [chosen] = [one for one in fitting if one["name"] == best["placement"]]
    assert chosen["seconds"] == min(one["seconds"] for one in fitting)
    assert best["engine"]["name"] == "fsdp" and best["engine"]["replicas"] == 2  # a copy a node saves the slow network


# --- by hand ---------------------------------------------------------------------------------------------------------

WEIGHTS = 69_501_714_432
"""Of Llama-3-70B's matrices that rows are multiplied with: all but the input embedding."""


def test_a_base_of_four_bits_computes_what_one_of_sixteen_does(seventy: Counted) -> None:
    small = count(load("llama-3-70b-4bit"))
    assert small.flops == seventy.flops == 4 * WEIGHTS
    assert small.adapter_flops == seventy.adapter_flops
    assert small.dequantized == pytest.approx(10.5 * (WEIGHTS - 128256 * 8192))  # 0.5 + 4 + 4 + 2 bytes an entry


def test_a_full_step_of_70b_takes_what_its_products_take() -> None:
    found = plan(load("llama-3-70b-fsdp"), hardware(), row_tokens=1024)
    [fsdp] = [one for one in found["placements"] if one["name"] == "fsdp"]
    reached = 16 * 989e12 * 0.5
    assert fsdp["full"]["step"]["base"] == pytest.approx(6 * WEIGHTS * 65536 / reached)  # checkpointing: forward twice
    # Scores and values, of which a token sees half on average: forward twice, and 2.5 times that backward.
    attention = 4 * 8192 * 80 * (1025 / 2) * (1 + 1 + 2.5) * 65536 / reached
    assert fsdp["full"]["step"]["attention"] == pytest.approx(attention)
    entries = 32 * 80 * (5 * 8192 + 28672 + 8192 - 8192)  # of A
    of_adapter = 1.5 * (4 * entries + 6 * 214_958_080) * 65536 / reached
    assert fsdp["full"]["step"]["adapter"] == pytest.approx(of_adapter, rel=0.05)
    assert fsdp["full"]["seconds"] == pytest.approx(3.454 + attention + of_adapter, rel=0.01)
    # Model FLOPs have neither the second forward pass nor the scores that a kernel makes again.
    useful = (4 * WEIGHTS + 3 * 4 * 8192 * 80 * 1025 / 2) * 65536
    assert fsdp["full"]["mfu"] == pytest.approx(useful / (fsdp["full"]["seconds"] * 16 * 989e12))
    assert fsdp["traffic"]["base"]["inside"] == pytest.approx(521e9, rel=0.01)


@pytest.mark.parametrize(("length", "share"), [(8192, 0.077), (32768, 0.309), (131072, 1.236)])
def test_attention_s_share_grows_with_rows(length: int, share: float) -> None:
    layers = attention(AutoConfig.from_pretrained("configs/models/llama-3-70b"))
    forward = sum(layer.per_pair * layer.pairs(length) for layer in layers) / length
    assert forward / (2 * WEIGHTS) == pytest.approx(share, rel=0.01)


# --- rows and tasks --------------------------------------------------------------------------------------------------


def test_tokens_are_those_that_training_reads(tmp_path: Path) -> None:
    run = load("quickstart", "train.steps=null", "train.epochs=2", "train.calibrate.steps=null", "merges={}")
    found = plan(run, hardware(gpus=1, nodes=1))
    tokenizer = load_tokenizer(run.model)
    for name, task in run.tasks.items():
        texts = read(task.train, task.template, tokenizer=tokenizer)
        tokens = sum(one.num_tokens for one in encode(texts, tokenizer, run.train.max_length))
        assert found["training"]["tokens"][name] == pytest.approx(2 * 2 * tokens, abs=1)  # epochs, phases
    assert "counted with the model's tokenizer in all 6,000 rows" in found["training"]["counted"]
    assert found["training"]["steps"]["refusal"] == {"calibrate": 47, "train": 47}
    [ddp, *_] = found["placements"]
    assert ddp["seconds"] < ddp["full"]["seconds"] / 2  # rows have a quarter of max_length
    given = plan(run, hardware(gpus=1, nodes=1), row_tokens=96)["placements"][0]
    assert given["seconds"] == pytest.approx(given["full"]["seconds"], rel=0.03)  # the last step of a phase is smaller


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load("quickstart", "train.steps=null", "train.epochs=2")
    exact = plan(run, hardware(gpus=1, nodes=1))
    monkeypatch.setattr(rows, "BYTES", 160_000)
    sampled = plan(run, hardware(gpus=1, nodes=1))
    assert sampled["training"]["steps"] == exact["training"]["steps"]
    counted = sum(one["counted"] for one in sampled["rows"].values() if one["how"] == "some")
    assert 100 < counted < 6000 and "of 6,000 rows" in sampled["training"]["counted"]
    for task, tokens in exact["training"]["tokens"].items():
        assert sampled["training"]["tokens"][task] == pytest.approx(tokens, rel=0.05)


def test_packed_rows_take_less_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ["one", "one", "one", "how many " * 20]
    path.write_text("".join(json.dumps({"prompt": texts[i % 4], "response": "yes"}) + "\n" for i in range(64)))
    # One micro-batch of all rows: in several, rows of equal length meet, and there is nothing to save.
    settings = [f"tasks={{one: {{train: {path}, test: {path}}}}}", "merges={}", "train.micro_batch_size=64"]
    loose, packed = (
        plan(load("quickstart", *settings, f"train.pack={word}"), hardware(gpus=1, nodes=1))
        for word in ("false", "true")
    )
    assert packed["placements"][0]["seconds"] < 0.7 * loose["placements"][0]["seconds"]
    assert packed["training"]["tokens"] == loose["training"]["tokens"]


def test_tasks_over_one_base_are_one_gang() -> None:
    alone, together = (
        plan(load("llama-3-8b", *TWO, f"cluster.packing={word}"), hardware(gpus=8, nodes=1)) for word in ("off", "auto")
    )
    assert alone["training"]["gangs"] == [["arithmetic"], ["second"]]
    assert together["training"]["gangs"] == [["arithmetic", "second"]]
    for one, both in zip(alone["placements"], together["placements"], strict=True):
        for kind in ("projections", "values", "moments", "activations"):
            assert both["memory"][kind] == pytest.approx(2 * one["memory"][kind], rel=0.02)
        assert both["memory"]["base"] == one["memory"]["base"]
        # The rows of one task alone are padded to the longest, those of both share sequences.
        assert 1.5 * one["step"]["compute"] < both["step"]["compute"] < 2.0 * one["step"]["compute"]
        base, again = one["traffic"]["base"]["inside"], both["traffic"]["base"]["inside"]
        assert again == base  # gathered once for both
        assert both["gpu_hours"] < 1.1 * one["gpu_hours"]


def test_as_many_tasks_at_once_as_are_said_to_fit() -> None:
    settings = ["train.activation_checkpointing=true", "train.max_length=256"]
    one = plan(load("llama-3-8b", *TWO, *settings), hardware(gpus=1, nodes=1))["placements"][0]
    assert one["packed_tasks"] > 2
    run = load("llama-3-8b", *TWO, *settings)
    more = {f"task{number}": run.tasks["second"] for number in range(one["packed_tasks"] + 1)}
    for number, fits in ((one["packed_tasks"], True), (one["packed_tasks"] + 1, False)):
        tasks = dict(list(more.items())[:number])
        cluster = dataclasses.replace(run.cluster, packing="auto")
        full = plan(dataclasses.replace(run, tasks=tasks, cluster=cluster), hardware(gpus=1, nodes=1))["placements"][0]
        assert full["fits_with_checkpointing"] == fits


def test_gradients_of_tasks_that_are_projected_are_kept_apart() -> None:
    plain, apart = (
        plan(
            load("llama-3-8b", *TWO, f"multitask={{name: joint, projection: {how}}}", "merges={}"),
            hardware(gpus=4, nodes=1),
        )
        for how in ("none", "original")
    )
    entries = plain["adapter"]["entries"]  # of the dense phase
    [ddp, *_], [other, *_] = plain["placements"], apart["placements"]
    assert other["memory"]["gradients"] - ddp["memory"]["gradients"] == 2 * 4 * entries
    # Two gradients are reduced and one is gathered, in place of one that is all-reduced.
    assert other["traffic"]["adapter"]["inside"] == pytest.approx(1.5 * ddp["traffic"]["adapter"]["inside"])


def test_entries_of_earlier_tasks_are_there_too() -> None:
    settings = [*TWO, "adapter.share_projection=true", "merges={}"]
    first, chain = (
        plan(load("llama-3-8b", *settings, f"multitask={name}"), hardware(gpus=1, nodes=1))
        for name in ("independent", "sequential")
    )
    for one, other in zip(first["placements"], chain["placements"], strict=True):
        assert other["memory"]["positions"] - one["memory"]["positions"] == 8 * first["adapter"]["kept"]


# --- engines outside the package -------------------------------------------------------------------------------------

OWN = """
from lori_dist.training.cost import Collective, Held

def build(model, weights, train, world, *, state, width: int = 1):
    raise NotImplementedError
"""
COSTS = """
def memory(model, load, *, width=1):
    return Held(base=model.base // width, values=4 * load.trained, gradients=4 * load.trained, moments=8 * load.trained)

def traffic(model, load, *, width=1):
    size = 4 * load.trained
    return [Collective(kind="all_reduce", owner="adapter", bytes=size, group=load.ranks, spans_nodes=False)]
"""


PLACE = """
def place(model, weights, world, *, width: int = 1):
    raise NotImplementedError
"""
OF_PLACE = """
def place_memory(model, load, *, width=1):
    base = model.base // width // 2
    return Held(base=base, values=0, gradients=0, moments=0, gathered_at_loss=7, gathered_in_block=7)
"""


def test_an_engine_of_one_s_own_is_planned_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_engines").mkdir()
    for name, text in (
        ("split", OWN + COSTS),
        ("silent", OWN),
        ("placing", OWN + COSTS + PLACE),
        ("lean", OWN + COSTS + PLACE + OF_PLACE),
    ):
        (tmp_path / "own_engines" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    run = load("llama-3-8b", "train.engine={name: own_engines.split, width: 2}")
    found = plan(run, hardware(gpus=4, nodes=1))
    own, ddp = found["placements"][-1], found["placements"][0]
    assert own["engine"] == {"name": "own_engines.split", "width": 2}
    assert own["memory"]["base"] == ddp["memory"]["base"] // 2
    assert own["traffic"]["adapter"] == ddp["traffic"]["adapter"]
    assert found["evaluation"]["placement"] == "ddp"  # as it has no `place`
    run = load("llama-3-8b", "train.engine={name: own_engines.placing, width: 2}")
    found = plan(run, hardware(gpus=4, nodes=1))["evaluation"]
    assert (found["placement"], found["memory"]["base"]) == (
        "own_engines.placing (width=2)",
        ddp["memory"]["base"] // 2,
    )
    # Nothing is written, or most memory is taken while keys and values are copied, when nothing is gathered.
    run = load("llama-3-8b", "evaluate.engine={name: own_engines.lean, width: 2}", "evaluate.metrics=[loss]")
    found = plan(run, hardware(gpus=4, nodes=1))["evaluation"]
    assert (found["memory"]["base"], found["memory"]["gathered"]) == (ddp["memory"]["base"] // 4, 7)
    with pytest.raises(ConfigError, match=r"own_engines\.silent cannot be planned, as its file defines no function"):
        plan(load("llama-3-8b", "train.engine=own_engines.silent"), hardware(gpus=4, nodes=1))


# --- laws ------------------------------------------------------------------------------------------------------------


sizes = st.integers(1, 10**9)


@given(sizes, sizes, st.integers(1, 64), st.booleans(), st.sampled_from([1, 2, 4]))
def test_memory_falls_with_more_ranks_and_with_checkpointing(
    base: int, entries: int, half: int, is_sparse: bool, nodes: int
) -> None:
    model = Counted(
        parameters=base, base=2 * base, block=base // 8, blocks=base, num_blocks=8, num_modules=56, entries=entries,
        kept=entries, whole=0, projections=entries, quantized=0, widest_b=1, vocabulary=100, chunked=True, dtype=2,
        block_activations=10**6, blocks_activations=8 * 10**6, block_gradients=10**4, block_input=10**5,
        other_activations=0, tokens=10, flops=4.0 * base,
    )  # fmt: skip
    kept = entries // 10 if is_sparse else entries
    few, many = (list(placements(ranks * nodes, nodes)) for ranks in (2 * half, 4 * half))
    for one, other in zip(few, many, strict=True):
        now, later = (memory(model, p, kept=kept, checkpointing=False) for p in (one, other))
        saving = memory(model, one, kept=kept, checkpointing=True)
        assert tuple(now) == MEMORY
        assert all(size >= 0 for size in now.values())
        assert sum(later.values()) <= sum(now.values())
        assert sum(saving.values()) <= sum(now.values())
        for collective in traffic(model, one, kept=kept, micro_batches=3, nodes=nodes):
            most = 2 if collective.kind == "all_reduce" else 1
            assert most / 2 * collective.bytes - 1 <= sent(collective) <= most * collective.bytes


def test_steps_and_cost_are_those_of_the_configuration() -> None:
    run = load("llama-3-8b", "train.epochs=null", "train.steps=100", "train.calibrate.steps=20")
    found = plan(run, hardware(gpus=1, nodes=1, price=3.0))
    assert found["training"]["steps"] == {"arithmetic": {"train": 100, "calibrate": 20}}
    for one in found["placements"]:
        assert one["gpu_hours"] == pytest.approx(120 * one["seconds"] / 3600)
        assert one["cost"] == pytest.approx(3 * one["gpu_hours"])


def test_tasks_trained_together_are_one_training() -> None:
    rows = "{train: configs/quickstart/data/refusal.train.jsonl, test: configs/quickstart/data/refusal.test.jsonl}"
    settings = ["train.epochs=null", "train.steps=100", "train.calibrate.steps=20", f"tasks.second={rows}"]
    alone = plan(load("llama-3-8b", *settings), hardware(gpus=1, nodes=1))
    joint = plan(load("llama-3-8b", *settings, "multitask=joint", "merges={}"), hardware(gpus=1, nodes=1))
    assert alone["training"]["steps"] == {task: {"train": 100, "calibrate": 20} for task in ("arithmetic", "second")}
    assert joint["training"]["steps"] == {"joint": {"train": 100, "calibrate": 20}}
    for one, other in zip(joint["placements"], alone["placements"], strict=True):
        assert one["gpu_hours"] == pytest.approx(other["gpu_hours"] / 2, rel=0.01)


@pytest.mark.parametrize(
    ("options", "kind", "change"),
    [
        ({"name": "fsdp", "replicas": 4}, "base", 2.0),  # of two copies, as are listed
        ({"name": "fsdp", "offload": True}, "base", 0.0),
        ({"name": "fsdp", "offload": True}, "moments", 0.0),
        ({"name": "deepspeed", "stage": 3, "hpz": 4}, "base", (1 / 16 + 1 / 4) / (1 / 16 + 1 / 8)),
    ],
)
def test_a_placement_of_one_s_own_is_among_them(options: dict[str, Any], kind: str, change: float) -> None:
    found = plan(load("llama-3-70b-fsdp", f"train.engine={json.dumps(options)}"), hardware())["placements"]
    [own] = [one for one in found if one["engine"] == options]
    near = {**options, **{key: {"replicas": 2, "hpz": 8}[key] for key in ("replicas", "hpz") if key in options}}
    near.pop("offload", None)
    [listed] = [one for one in found if one["engine"] == near]
    assert own["memory"][kind] == pytest.approx(change * listed["memory"][kind], rel=1e-6)


def test_ranks_have_no_more_rows_than_the_batch_has_for_them() -> None:
    run = load("llama-3-8b", "train.batch_size=8", "train.micro_batch_size=4")
    few, many = (count(run, ranks=ranks) for ranks in (1, 8))
    assert (few.tokens, many.tokens) == (4 * run.train.max_length, run.train.max_length)
    assert few.block_activations == pytest.approx(4 * many.block_activations, rel=0.05)


def test_what_is_trained_besides_b_is_counted() -> None:
    plain = count(load("llama-3-8b"))
    more = count(load("llama-3-8b", "adapter.projection=trained", "adapter.dtype=float32"))
    assert more.whole == plain.projections // 2  # bytes of an entry in bfloat16
    assert more.projections == plain.whole == 0
    plain = count(load("llama-3-8b", "model.dtype=float32"))
    head = count(load("llama-3-8b", "model.dtype=float32", "adapter.modules_to_save=[lm_head]"))
    assert head.whole == 128256 * 4096
    [ddp, *_] = placements(1, 1)
    grown = {
        kind: size - memory(plain, ddp, kept=plain.kept, checkpointing=False)[kind]
        for kind, size in memory(head, ddp, kept=head.kept, checkpointing=False).items()
    }
    assert grown["moments"] == 2 * grown["values"] == 2 * grown["gradients"] == 8 * head.whole


def test_activation_checkpointing_that_is_asked_for_is_planned() -> None:
    for is_on in (True, False):
        run = load("llama-3-8b", f"train.activation_checkpointing={json.dumps(is_on)}")
        best = plan(run, hardware(gpus=1, nodes=1, device="h200"))["recommended"]
        assert best["activation_checkpointing"] == is_on


def test_replicas_that_share_a_network_wait_for_each_other() -> None:
    [hybrid] = [one for one in placements(16, 2) if one.options == {"replicas": 2}]
    [across] = [
        one
        for one in traffic(count(load("llama-3-70b-hybrid")), hybrid, kept=10**6, micro_batches=1, nodes=2)
        if one.spans_nodes
    ]
    assert (across.kind, across.group, across.rings, across.bytes) == ("all_reduce", 2, 8, 4 * 10**6 // 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "4", "train.engine={name: fsdp, replicas: 3}"], "train.engine.replicas: got 3 for 4 ranks"),
        (["--gpus", "3", "--nodes", "2"], "--nodes: got 2 for 3 GPUs; give a number that divides them"),
        (["--gpus", "2", "model.path=nowhere/at/all"], "model.path: "),
        (["--gpus", "2", "--gpu", "h10"], "--gpu: unknown device 'h10'; there are b200, h200, h100, "),
        (["--gpus", "2", "--out", "/nowhere/plan.json"], "--out: "),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "configs/llama-3-8b.yaml", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (  # of which no small copy can be run
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5},
            r"model.path: MixtralForCausalLM is a mixture of experts, and how many of them compute a token could not",
        ),
        (
            {"model_type": "llama", "max_position_embeddings": 512},
            "train.max_length: got 1024, the model",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **settings}))
    with pytest.raises(ConfigError, match=message):
        plan(load("llama-3-8b", f"model.path={tmp_path}"), hardware(gpus=1, nodes=1))


def test_help_lists_the_devices_and_the_table_speaks_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    listed = " ".join(capsys.readouterr().out.split())
    assert f"devices: {', '.join(DEVICES)}" in listed
    assert main(["plan", "configs/quickstart.yaml", "--gpus", "1", "--gpu", "4090", "--price", "1", "merges={}"]) == 0
    printed = capsys.readouterr().out
    assert "1 GPU as rtx-4090: 24 GiB and 165 TFLOP/s" in printed
    assert "1 rank on 1 node" in printed and "cost, USD" in printed
    assert "train.max_length=35 takes less" in printed


def test_a_size_without_a_unit_is_in_gib(tmp_path: Path) -> None:
    for size, wanted in (("40", 40 * 2**30), ("40GiB", 40 * 2**30), ("40GB", 40e9)):
        words = ["configs/llama-3-8b.yaml", "--gpus", "1", "--gpu-memory", size, "--out", str(tmp_path / "plan.json")]
        assert main(["plan", *words]) == 0
        assert json.loads((tmp_path / "plan.json").read_text())["hardware"]["gpu_memory"] == wanted
    with pytest.raises(SystemExit):
        main(["plan", "configs/llama-3-8b.yaml", "--gpus", "1", "--gpu-memory", "many"])


def test_hardware_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="--nodes: got 3 for 16 GPUs"):
        hardware(gpus=16, nodes=3)


# --- measured --------------------------------------------------------------------------------------------------------

COUNTABLE = (
    "base", "adapter", "moments", "gathered", "reduced", "gathered_2", "reduced_2", "file", "checkpoint",
)  # fmt: skip


@pytest.mark.parametrize(
    ("models", "engines", "ranks"),
    [
        (["llama"], ["fsdp"], [2]),
        pytest.param(["qwen3_moe"], ["deepspeed (stage=3)"], [2], marks=pytest.mark.slow),
        pytest.param([], [], [2, 4], marks=pytest.mark.slow),
    ],
    ids=["one", "mixture", "all"],
)
def test_plans_are_within_five_percent_and_peaks_within_twenty(
    models: list[str], engines: list[str], ranks: list[int]
) -> None:
    ratios = measure(models=models, engines=engines, ranks=ranks)["ratios"]
    for kind in COUNTABLE:
        low, high = ratios[kind]
        assert 0.95 <= low <= high <= 1.05, (kind, low, high)
    for kind in ("peak", "peak_checkpointed", "evaluated"):
        low, high = ratios[kind]
        assert 0.8 <= low <= high <= 1.2, (kind, low, high)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, o_proj]"])
def test_a_mixture_is_planned_as_it_is_in_memory(kind: str, targets: str, tmp_path: Path) -> None:
    made = tiny(kind)
    made.config.save_pretrained(tmp_path)
    words = [
        "evaluate.max_new_tokens=8",
        "adapter.rank=4",
        "train.max_length=48",
        "train.micro_batch_size=4",
        "train.batch_size=4",
    ]
    if kind == "deepseek_v3" and targets != "all-linear":
        targets = "[q_a_proj, o_proj]"
    run = load("llama-3-8b", f"model.path={tmp_path}", "model.dtype=float32", f"adapter.targets={targets}", *words)
    planned = count(run)
    ids = torch.randint(3, 64, (4, 48), generator=torch.Generator().manual_seed(0))
    is_token = torch.ones_like(ids)
    is_token[0, -1] = 0

    made.set_experts_implementation("eager")
    made.requires_grad_(False)
    assert planned.parameters == sum(parameter.numel() for parameter in made.parameters())
    assert planned.base == sum(parameter.nbytes for parameter in made.parameters())
    made.enable_input_require_grads()
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    counter = FlopCounterMode(display=False)
    with counter:
        made(input_ids=ids, attention_mask=is_token, use_cache=False).logits.sum().backward()
    of_base = sum(number for name, number in counter.get_flop_counts()["Global"].items() if name in products)
    assert planned.flops * ids.numel() == pytest.approx(of_base, rel=1e-9)
    made.disable_input_require_grads()

    layers = attach(made, spec(run))
    values = trainable(made)
    assert planned.entries == sum(one.numel() for one in values.values())
    assert planned.num_modules == len(layers)
    assert planned.projections == sum(layer.deltas[0].projection.nbytes for layer in layers.values())
    resident = {one.untyped_storage().data_ptr() for one in (*made.parameters(), *made.buffers())}
    kept: dict[int, int] = {}
    held = []  # or the next could have an address that was counted

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        if (address := tensor.untyped_storage().data_ptr()) not in resident:
            kept[address] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made(input_ids=ids, attention_mask=is_token, use_cache=False)
    assert planned.blocks_activations + planned.other_activations == pytest.approx(sum(kept.values()), rel=0.1)


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluated(*overrides: str, **devices: Any) -> dict[str, Any]:
    found: dict[str, Any] = plan(load("llama-3-70b-fsdp", *overrides), hardware(**devices), row_tokens=512)[
        "evaluation"
    ]
    return found


def test_an_evaluation_is_planned_where_its_engine_has_the_base(seventy: Counted) -> None:
    few = ("evaluate.batch_size=4", "evaluate.metrics=[loss]")
    sharded, whole = evaluated(*few), evaluated(*few, "evaluate.engine=ddp")
    assert (sharded["placement"], whole["placement"]) == ("fsdp", "ddp")
    assert sharded["memory"]["base"] == pytest.approx(seventy.base / 16, rel=1e-6)
    assert whole["memory"]["base"] == seventy.base
    assert 0 < sharded["memory"]["gathered"] < seventy.base / 20
    assert whole["memory"]["gathered"] == 0
    assert sharded["fits"] and not whole["fits"]
    assert sharded["total"] == sum(sharded["memory"].values())
    assert evaluated("evaluate.engine={name: deepspeed, stage: 3, hpz: 8}")["memory"]["base"] == pytest.approx(
        seventy.base * (1 / 16 + 1 / 8), rel=1e-6
    )


def test_what_evaluates_all_models_counts_them_all() -> None:
    """Keys and values of every row that meets a model, for every token that is read or written."""
    one = "evaluate.metrics=[exact_match]"
    few, many = (evaluated(one, f"evaluate.max_new_tokens={number}") for number in (128, 640))
    assert many["memory"]["cache"] == pytest.approx(few["memory"]["cache"] * (512 + 640) / (512 + 128), rel=0.01)
    of_token = 80 * 2 * 8 * 128 * 2  # layers, keys and values, heads, size, bytes
    rows_ = few["models"] * 32
    assert few["memory"]["cache"] == pytest.approx(
        3 * rows_ * (512 + 128) * of_token, rel=0.01
    )  # as rows leave the batch
    assert (
        evaluated(one, "evaluate.batch_size=8", "evaluate.max_new_tokens=128")["memory"]["cache"] * 4
        == few["memory"]["cache"]
    )
    assert evaluated("evaluate.metrics=[loss]")["memory"]["cache"] == 0
    apart = evaluated("adapter.modules_to_save=[lm_head]", "model.dtype=float32", "merges={}")
    assert apart["passes"] == [1] * apart["models"]


def test_a_written_token_takes_a_pass_over_the_base() -> None:
    """Time of writing grows with the tokens written, and where the base is sharded each of them gathers it."""
    one = ("evaluate.metrics=[exact_match]", "evaluate.rows=512")
    few, many = (evaluated(*one, f"evaluate.max_new_tokens={number}")["seconds"] for number in (10, 110))
    gathered = 140e9 * 15 / 16 / 1e9
    turns = -(-512 // 32 // 16)
    assert (many - few) / 100 / turns == pytest.approx(gathered / 400, rel=0.1)  # a ring leaves each node once
    whole = evaluated(*one, "evaluate.engine=ddp", "evaluate.max_new_tokens=10")["seconds"]
    assert whole < few
    assert evaluated(*one)["gpu_hours"] == pytest.approx(evaluated(*one)["seconds"] * 16 / 3600)
    assert evaluated(*one, price=2.5)["cost"] == pytest.approx(2.5 * evaluated(*one)["gpu_hours"])


def test_an_evaluation_that_does_not_fit_is_said_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--gpus", "16", "--nodes", "2", "--row-tokens", "512", "evaluate.batch_size=4"]
    words = ["evaluate.engine=ddp", *few]
    assert main(["plan", "configs/llama-3-70b-fsdp.yaml", *words]) == 0
    shown = capsys.readouterr().out
    assert "WHICH DOES NOT FIT" in shown
    assert "note: The evaluation does not fit: on ddp, with evaluate.batch_size 4, it takes " in shown
    assert "set evaluate.engine to " in shown
    assert main(["plan", "configs/llama-3-70b-fsdp.yaml", *words[1:]]) == 0
    shown = capsys.readouterr().out
    assert "which fits" in shown
    assert "does not fit" not in shown


def test_every_kind_of_memory_has_a_colour_of_its_own_in_the_picture() -> None:
    assert set(picture.COLOURS) == set(MEMORY)
    assert len({tuple(colour) for colour in picture.COLOURS.values()}) == len(MEMORY)
    greys = [kind for kind, colour in picture.COLOURS.items() if max(colour) - min(colour) < 0.05]
    assert len(greys) <= 1
