"""`lori train` under every launcher, by the commands of launch/README.md: two ranks train together, and when one dies
nobody hangs and the cause is reported."""

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lori_dist import Adapter, load_adapter, save_adapter
from lori_dist.__main__ import main
from tests.launched import MESSAGE, REFUSAL
from tests.launching import Launched, assert_equal, free_port, make_task, run_all

README = (Path(__file__).parents[1] / "launch" / "README.md").read_text()
LIMIT_S = 30.0
"""From a rank's death to the end of the job."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("launchers")
    make_task(made)
    return made


# --- the launchers ---------------------------------------------------------------------------------------------------


Launcher = Callable[[], tuple[list[list[str]], list[str]]]
"""Gives the command of each host, up to `lori_dist train` and on ports that are free, and what it overrides."""


def torchrun() -> tuple[list[list[str]], list[str]]:
    command, overrides = readme("torchrun ")
    return [command], overrides


def deepspeed() -> tuple[list[list[str]], list[str]]:
    (program, *options), overrides = readme("deepspeed --num_gpus ")
    return [[program, "--master_port", free_port(), *options]], overrides


def deepspeed_hostfile() -> tuple[list[list[str]], list[str]]:
    (program, *options), overrides = readme("deepspeed --hostfile hosts --module ")
    meet = ["--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", free_port()]  # else it asks ssh for both
    return [[program, *meet, *options]], overrides


def deepspeed_per_host() -> tuple[list[list[str]], list[str]]:
    command, overrides = readme("deepspeed --hostfile hosts --no_ssh ")
    place = {"HOST": "127.0.0.1", "29500": free_port()}
    return [[(place | {"0": str(node)}).get(word, word) for word in command] for node in range(2)], overrides


def accelerate() -> tuple[list[list[str]], list[str]]:
    (program, verb, *options), overrides = readme("accelerate launch ")
    return [[program, verb, "--main_process_port", free_port(), *options]], overrides


def readme(start: str) -> tuple[list[str], list[str]]:
    """Of the command that starts so: what starts `lori_dist train`, and what is overridden in the configuration."""
    [line] = [line for line in README.splitlines() if line.startswith(start)]
    command, words = line.split(" lori_dist train mine.yaml --task math")
    return shlex.split(command), shlex.split(words, comments=True)


TRAIN = ("train", "mine.yaml", "--task", "math")


def launch(
    commands: Sequence[Sequence[str]], words: Sequence[str], folder: Path, log: Path, verb: Sequence[str] = TRAIN
) -> Launched:
    """Runs `lori train`, or another verb, by the commands, one per host. Fails if they do not end, or leave a process
    behind."""
    words = ["lori_dist", *verb, f"output={log.parent}", *words]
    bin = Path(sys.executable).parent
    return run_all([[str(bin / program), *options, *words] for program, *options in commands], folder, log)


# --- together --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """What one process trains."""
    place = tmp_path_factory.mktemp("alone")
    launched = launch([["python", "-m"]], [], folder, place / "log")
    assert launched.codes == [0], launched.output
    return load_adapter(place / "demo" / "train-math" / "adapter.safetensors")


@pytest.mark.parametrize(
    "launcher",
    [
        *(torchrun, deepspeed, accelerate),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (deepspeed_hostfile, deepspeed_per_host)),
    ],
)
def test_launched_ranks_train_together(launcher: Launcher, alone: Adapter, folder: Path, tmp_path: Path) -> None:
    commands, overrides = launcher()
    mask = f"adapter.mask={{name: tests.launched, mark: {tmp_path / 'mask'}}}"
    launched = launch(commands, [*overrides, mask], folder, tmp_path / "log")
    assert launched.codes == [0] * len(commands), launched.output
    path = tmp_path / "demo" / "train-math" / "adapter.safetensors"
    assert launched.output.count(f"{path}\n") == 1
    assert sorted(file.name for file in tmp_path.glob("mask-*")) == ["mask-0-of-2"]
    assert "library_name: lori_dist" in path.with_name("README.md").read_text()
    log = (tmp_path / "demo" / "logs" / "train-math.rank0.log").read_text()
    assert ": phase calibrate, 3 steps of " in log
    assert re.search(r"math: train step 2 of 2, loss \d+\.\d+, [\d,]+ tokens/s, 0:00:00 left", log)
    assert_equal(load_adapter(path), alone)


SHARDED = {torchrun: "fsdp", deepspeed: "{name: deepspeed, stage: 3}", accelerate: "fsdp"}


@pytest.mark.parametrize(
    "launcher", [torchrun, *(pytest.param(one, marks=pytest.mark.slow) for one in (deepspeed, accelerate))]
)
def test_launched_ranks_write_what_one_process_does(
    launcher: Launcher, alone: Adapter, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a sharded base, several models side by side, with prompts of a file that no rank has half of."""
    strong = dataclasses.replace(alone, blocks=(dataclasses.replace(alone.blocks[0], alpha=2000.0),))
    save_adapter(strong, tmp_path / "math.safetensors")
    (tmp_path / "prompts.txt").write_text(
        "".join(f"go {word} {n}\n" for n in range(5) for word in ("left", "on and on"))
    )
    verb = ["generate", "mine.yaml", "--file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "12"]
    verb += ["--adapter", "base", "--adapter", str(tmp_path / "math.safetensors")]
    drawn = ["--temperature", "2", "--seed", "3"]
    engine = f"evaluate.engine={SHARDED[launcher]}"
    for more in ([], drawn):
        out = tmp_path / "together.jsonl"
        together = launch(launcher()[0], [engine], folder, tmp_path / "log", verb=[*verb, *more, "--out", str(out)])
        assert together.codes == [0], together.output
        monkeypatch.chdir(folder)
        assert main([*verb, *more, "--out", str(tmp_path / "alone.jsonl")]) == 0
        found, wanted = (
            [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
            for name in (out.name, "alone.jsonl")
        )
        assert found == wanted
        assert len(found) == 10
        assert any(len(set(texts["texts"].values())) == 2 for texts in found)


# --- when a rank is told to end --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank", "code"), [(deepspeed, 0, 3), (torchrun, 1, 1)])
def test_a_signal_to_one_rank_saves_and_another_launcher_goes_on(
    launcher: Launcher, rank: int, code: int, alone: Adapter, folder: Path, tmp_path: Path
) -> None:
    engine = f"train.engine={{name: tests.launched, mark: {tmp_path / 'mark'}, fault: terminate, rank: {rank}}}"
    launched = launch(launcher()[0], [engine], folder, tmp_path / "log")
    assert launched.codes == [code], launched.output
    where = "math after step 2 of 3 of phase calibrate"
    said = f"{where}: saved and ended, as SIGTERM was received; the same command resumes from there"
    assert launched.output.count(said) == 1
    again = launch(torchrun()[0], [], folder, tmp_path / "again")
    assert again.codes == [0], again.output
    path = tmp_path / "demo" / "train-math" / "adapter.safetensors"
    records = [json.loads(line) for line in path.with_name("metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 1, 2]
    assert_equal(load_adapter(path), alone)


# --- accelerate's own configuration ----------------------------------------------------------------------------------

ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "machine_rank": 0,
    "rdzv_backend": "static",
    "same_network": True,
}
OF_FSDP = {
    "fsdp_version": 2,
    "fsdp_reshard_after_forward": False,
    "fsdp_offload_params": False,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "LlamaMLP,LlamaAttention",
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_activation_checkpointing": False,
}
OF_DEEPSPEED = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": 100},
}


@pytest.mark.parametrize("engine", [pytest.param("fsdp", marks=pytest.mark.slow), "deepspeed"])
def test_the_configuration_of_accelerate_is_followed(engine: str, alone: Adapter, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(OF_DEEPSPEED))
    own = (
        {"distributed_type": "FSDP", "fsdp_config": OF_FSDP}
        if engine == "fsdp"
        else {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json"), "zero3_init_flag": True},
        }
    )
    (tmp_path / "accelerate.yaml").write_text(json.dumps({**ACCELERATE, **own, "main_process_port": int(free_port())}))
    command = ["accelerate", "launch", "--config_file", str(tmp_path / "accelerate.yaml"), "-m"]
    launched = launch([command], [], folder, tmp_path / "log")
    assert launched.codes == [0], launched.output
    asked = {
        "fsdp": "{name: fsdp, reshard_after_forward: false, wrap: [LlamaMLP, LlamaAttention]}",
        "deepspeed": f"{{name: deepspeed, config: {tmp_path / 'ds.json'}}}",
    }
    assert f"accelerate's configuration asks for train.engine {asked[engine]}" in launched.output
    place = tmp_path / "demo" / "train-math" / "adapter.safetensors"
    assert f"on 2 ranks (cpu) with {engine}" in launched.output
    assert_equal(load_adapter(place), alone)


# --- when a rank dies ------------------------------------------------------------------------------------------------


def fail(launcher: Launcher, options: str, folder: Path, place: Path) -> str:
    """Returns the output of a launch whose engine has a fault, all of whose commands end in time, and with an error."""
    mark, (commands, _) = place / "mark", launcher()
    engine = f"train.engine={{name: tests.launched, mark: {mark}, {options}}}"
    launched = launch(commands, [engine], folder, place / "log")
    assert mark.exists(), launched.output
    assert all(launched.codes), launched.output
    seconds = launched.end - mark.stat().st_mtime
    print(f"{launcher.__name__}, {options}: ended after {seconds:.1f} s\n{launched.output}")
    assert seconds < LIMIT_S
    return launched.output


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        (torchrun, 1),
        pytest.param(deepspeed, 0, marks=pytest.mark.slow),
        *(pytest.param(deepspeed_per_host, rank, marks=pytest.mark.slow) for rank in (0, 1)),
        pytest.param(deepspeed_hostfile, 1, marks=pytest.mark.slow),
        pytest.param(accelerate, 0, marks=pytest.mark.slow),
    ],
)
def test_the_first_traceback_is_that_of_the_rank_that_failed(
    launcher: Launcher, rank: int, folder: Path, tmp_path: Path
) -> None:
    output = fail(launcher, f"fault: raise, rank: {rank}", folder, tmp_path)
    before, _, traceback = output.partition("Traceback (most recent call last):")
    assert before.endswith(f"rank {rank} of 2 failed:\n")
    assert f"RuntimeError: {MESSAGE}\n" in traceback
    assert "tests/launched.py" in traceback
    assert output.count(MESSAGE) == 1
    if launcher in (deepspeed_per_host, deepspeed_hostfile):  # where no launcher ends the other rank
        assert f"rank {1 - rank}: ends because rank {rank} failed; its message is printed above.\n" in output


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        (torchrun, 0),
        (deepspeed, 1),
        *(pytest.param(deepspeed_per_host, rank, marks=pytest.mark.slow) for rank in (0, 1)),
        pytest.param(deepspeed_hostfile, 0, marks=pytest.mark.slow),
        pytest.param(accelerate, 1, marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_is_named(launcher: Launcher, rank: int, folder: Path, tmp_path: Path) -> None:
    output = fail(launcher, f"fault: kill, rank: {rank}", folder, tmp_path)
    note = (
        f"rank {1 - rank}: ends because rank {rank} ended without a message: it was killed (out of memory, kill -9) or"
    )
    if launcher in (torchrun, accelerate):  # they may end the other rank before it has noticed
        assert re.search(rf"rank +: {rank} \(local_rank: {rank}\)\n +exitcode +: -9 ", output)
    elif launcher is deepspeed:
        assert note in output or "exits with return code = -9" in output
    else:
        assert note in output
    assert "lori_dist/__main__.py" not in output  # no traceback of ours


@pytest.mark.parametrize("fault", ["raise", pytest.param("kill", marks=pytest.mark.slow)])
def test_the_others_need_not_communicate_to_notice(fault: str, folder: Path, tmp_path: Path) -> None:
    output = fail(deepspeed_per_host, f"fault: {fault}, busy: 600.0", folder, tmp_path)
    assert "rank 0: ends because rank 1 " in output


def test_what_only_one_rank_refuses_is_told_by_it(folder: Path, tmp_path: Path) -> None:
    output = fail(torchrun, "fault: refuse", folder, tmp_path)
    assert output.count(REFUSAL) == 1
    assert f"rank 1: {REFUSAL}\n" in output


@pytest.mark.parametrize("launcher", [torchrun, pytest.param(deepspeed_per_host, marks=pytest.mark.slow)])
def test_what_all_ranks_refuse_is_told_once_by_the_first(launcher: Launcher, folder: Path, tmp_path: Path) -> None:
    output = fail(launcher, "fault: refuse_all", folder, tmp_path)
    assert output.count(REFUSAL) == 1
    assert f"rank 1: {REFUSAL}" not in output


def test_what_ranks_refuse_for_different_reasons_is_told_by_each(folder: Path, tmp_path: Path) -> None:
    output = fail(torchrun, "fault: refuse_each", folder, tmp_path)
    assert [f"rank {rank}, {REFUSAL}" in output for rank in range(2)] == [True, True]
    assert output.count(REFUSAL) == 2


@pytest.mark.parametrize("launcher", [torchrun, pytest.param(deepspeed, marks=pytest.mark.slow)])
def test_a_mistake_in_the_configuration_is_told_once(launcher: Launcher, folder: Path, tmp_path: Path) -> None:
    commands, _ = launcher()
    launched = launch(commands, ["train.lr=fast"], folder, tmp_path / "log")
    assert all(launched.codes)
    assert len(re.findall(r"^(rank 1: )?train\.lr: ", launched.output, re.MULTILINE)) == 1
    assert "lori_dist/__main__.py" not in launched.output


def test_a_rank_that_fails_before_the_others_have_found_it_is_not_waited_for(folder: Path, tmp_path: Path) -> None:
    ([*command, _],), _ = torchrun()
    script = 'test "$RANK" = 1 && exec lori train nowhere.yaml --task math; exec lori "$@"'
    launched = launch([[*command, "--no-python", "sh", "-c", script]], [], folder, tmp_path / "log")
    assert all(launched.codes)
    assert "\nrank 1: nowhere.yaml: cannot be read" in f"\n{launched.output}"
