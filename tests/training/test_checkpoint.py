import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lori_dist.errors import JobError
from lori_dist.training import checkpoint
from lori_dist.training.engine import State
from tests.distributed import run_distributed

PHASE, FINGERPRINT = "train", "f1"


def state(step: int) -> State:
    """Modules in an order that is not that of their names; of unequal sizes, one with a single entry."""
    generator = torch.Generator().manual_seed(step)

    def part() -> dict[str, torch.Tensor]:
        return {path: torch.randn(n, generator=generator) for path, n in (("b.x", 7), ("a", 1), ("b.c", 50))}

    return State(step=step, values=part(), exp_avg=part(), exp_avg_sq=part())


def save(folder: Path, *steps: int, keep: int = 10) -> list[Path]:
    return [checkpoint.save(folder, PHASE, state(step), fingerprint=FINGERPRINT, keep=keep) for step in steps]


def newest(folder: Path) -> State | None:
    return checkpoint.newest(folder, PHASE, FINGERPRINT)


def assert_is(found: State | None, step: int) -> None:
    wanted = state(step)
    assert found is not None
    assert found.step == step
    for part in ("values", "exp_avg", "exp_avg_sq"):
        assert list(getattr(found, part)) == list(getattr(wanted, part))
        assert all(torch.equal(tensor, getattr(wanted, part)[path]) for path, tensor in getattr(found, part).items())


def test_there_may_be_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "checkpoints") is None


def test_the_newest_comes_back_as_it_was_in_its_order(tmp_path: Path) -> None:
    save(tmp_path, 5, 100, 20)
    assert_is(newest(tmp_path), 100)


def test_phases_do_not_mix(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint.save(tmp_path, "calibrate", state(7), fingerprint=FINGERPRINT, keep=1)
    assert_is(newest(tmp_path), 5)
    assert_is(checkpoint.newest(tmp_path, "calibrate", FINGERPRINT), 7)
    checkpoint.delete(tmp_path, "calibrate")
    assert checkpoint.newest(tmp_path, "calibrate", FINGERPRINT) is None
    assert_is(newest(tmp_path), 5)


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "calibrate", state(1), fingerprint=FINGERPRINT, keep=2)
    paths = save(tmp_path, 10, 20, 30, 40, keep=2)
    assert [path.exists() for path in paths] == [False, False, True, True]
    assert checkpoint.newest(tmp_path, "calibrate", FINGERPRINT) is not None


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    [path] = save(tmp_path, 5)
    with safe_open(path, framework="pt") as file:
        [(key, text)] = file.metadata().items()
        names = set(file.keys())
    header = json.loads(text)
    assert key == "lori"
    assert header.pop("digest")
    assert header == {
        "format": "lori-checkpoint-1",
        "phase": "train",
        "step": 5,
        "modules": ["b.x", "a", "b.c"],
        "fingerprint": "f1",
    }
    assert names == {f"{part}/{path}" for part in ("values", "exp_avg", "exp_avg_sq") for path in ("b.x", "a", "b.c")}


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    [first], [second] = save(tmp_path / "a", 5), save(tmp_path / "b", 5)
    assert first.read_bytes() == second.read_bytes()


def test_it_holds_nothing_but_three_numbers_an_entry(tmp_path: Path) -> None:
    [path] = save(tmp_path, 5)
    assert path.stat().st_size < 3 * 4 * 58 + 2000


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(JobError, match="of fingerprint f1; wanted train of f2; the configuration or its inputs have"):
        checkpoint.newest(tmp_path, PHASE, "f2")


# --- damage ----------------------------------------------------------------------------------------------------------


def truncate(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * share)]


def flip(share: float) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        place = int((len(content) - 1) * share)
        return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]

    return damage


DAMAGES = [truncate(share / 20) for share in range(20)] + [flip(share / 40) for share in range(41)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, path = save(tmp_path, 5, 10)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert_is(newest(tmp_path), 5)
    assert str(path) in caplog.text
    assert "continuing from the checkpoint before it" in caplog.text


def test_if_all_are_damaged_training_starts_over_with_a_warning_for_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = save(tmp_path, 5, 10)
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    assert newest(tmp_path) is None
    assert all(str(path) in caplog.text for path in paths)


def test_a_file_asked_for_by_name_must_be_whole(tmp_path: Path) -> None:
    [path] = save(tmp_path, 5)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(JobError, match="is damaged"):
        checkpoint.read(path, PHASE, fingerprint=FINGERPRINT)


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path: Path) -> None:
    [path] = save(tmp_path, 5)
    (tmp_path / ".train-00000010.safetensors.partial").write_bytes(path.read_bytes()[:100])
    assert_is(newest(tmp_path), 5)
    save(tmp_path, 10)
    assert_is(newest(tmp_path), 10)
    assert not (tmp_path / ".train-00000010.safetensors.partial").exists()


def die_while_writing(folder: Path) -> None:
    """Ends where the bytes are in the file, but not yet known to be on disk."""
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    save(folder, 10)


def test_a_writer_killed_in_the_act_leaves_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(pytest.fail.Exception, match="SIGKILL"):
        run_distributed(die_while_writing, tmp_path, world_size=1)
    assert_is(newest(tmp_path), 5)
