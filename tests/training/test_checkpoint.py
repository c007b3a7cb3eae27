import hashlib
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lori_dist.benchmarks._traffic import process_bytes
from lori_dist.errors import JobError
from lori_dist.training import checkpoint
from lori_dist.training.data import Batch
from lori_dist.training.engine import Part, Quantity, State, StepResult
from lori_dist.training.world import World, from_environment
from tests.distributed import run_distributed

PHASE = "train"
ORIGIN = {"fingerprint": "f1", "adapter": {"rank": 4, "alpha": 8.0}, "model": {"content": {"config.json": "aa"}}}


def state(step: int) -> State:
    """Modules in an order that is not that of their names; of unequal sizes, one with a single entry."""
    generator = torch.Generator().manual_seed(step)

    def part() -> dict[str, torch.Tensor]:
        return {path: torch.randn(n, generator=generator) for path, n in (("b.x", 7), ("a", 1), ("b.c", 50))}

    return State(step=step, values=part(), exp_avg=part(), exp_avg_sq=part())


class Holder:
    """An engine that holds a state, sharded as FSDP does it."""

    model = nn.Module()

    def __init__(self, step: int, world: World) -> None:
        self.state, self.num_steps, self.world = state(step), step, world

    def step(self, micro_batches: object, *, num_targets: int, lr: float) -> StepResult:
        raise NotImplementedError(Batch)

    def parts(self, quantity: Quantity) -> Mapping[str, Part]:
        return {path: self._share(full) for path, full in getattr(self.state, quantity).items()}

    def _share(self, full: torch.Tensor) -> Part:
        size = -(-full.numel() // self.world.size)
        start = min(size * self.world.rank, full.numel())
        return Part(start=start, data=full[start : start + size])

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """What `save` is a collective of: this process alone."""
    from_environment()
    yield
    dist.destroy_process_group()


def save(folder: Path, *steps: int, keep: int = 10, phase: str = PHASE) -> list[Path]:
    world = from_environment()
    return [checkpoint.save(folder, phase, Holder(step, world), world, origin=ORIGIN, keep=keep) for step in steps]


def newest(folder: Path) -> State | None:
    return checkpoint.newest(folder, PHASE, ORIGIN)


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
    save(tmp_path, 7, keep=1, phase="calibrate")
    assert_is(newest(tmp_path), 5)
    assert_is(checkpoint.newest(tmp_path, "calibrate", ORIGIN), 7)
    checkpoint.delete(tmp_path, "calibrate")
    assert checkpoint.newest(tmp_path, "calibrate", ORIGIN) is None
    assert_is(newest(tmp_path), 5)


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=2, phase="calibrate")
    paths = save(tmp_path, 10, 20, 30, 40, keep=2)
    assert [path.exists() for path in paths] == [False, False, True, True]
    assert checkpoint.newest(tmp_path, "calibrate", ORIGIN) is not None


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    [path] = save(tmp_path, 5)
    with safe_open(path, framework="pt") as file:
        [(key, text)] = file.metadata().items()
        shapes = {name: list(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    assert key == "lori"
    assert json.loads(text) == {
        "format": "lori-checkpoint-3",
        "phase": "train",
        "step": 5,
        "modules": {"b.x": 7, "a": 1, "b.c": 50},
        "origin": ORIGIN,
    }
    assert shapes == {"values": [58], "exp_avg": [58], "exp_avg_sq": [58], "digest": [16]}


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    [first], [second] = save(tmp_path / "a", 5), save(tmp_path / "b", 5)
    assert first.read_bytes() == second.read_bytes()


def test_it_holds_nothing_but_three_numbers_an_entry(tmp_path: Path) -> None:
    [path] = save(tmp_path, 5)
    assert path.stat().st_size < 3 * 4 * 58 + 700


OTHERS = {
    "run": ({"fingerprint": "f2"}, "fingerprint is 'f1' there and 'f2' here"),
    "adapter": ({"adapter": {"rank": 8, "alpha": 8.0}}, "adapter.rank is 4 there and 8 here"),
    "base": ({"model": {"content": {"config.json": "bb"}}}, "model.content.config.json is 'aa' there and 'bb' here"),
    "mask": ({"mask": "cc"}, "mask is None there and 'cc' here"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_something_else_is_refused_with_what_differs(other: str, tmp_path: Path) -> None:
    changes, reason = OTHERS[other]
    save(tmp_path, 5)
    with pytest.raises(JobError) as caught:
        checkpoint.newest(tmp_path, PHASE, {**ORIGIN, **changes})
    assert f"train-00000005.safetensors: is a checkpoint of something else: {reason}; delete" in str(caught.value)


def test_another_phase_is_something_else(tmp_path: Path) -> None:
    [path] = save(tmp_path, 5)
    for read in (checkpoint.read, checkpoint.check):
        with pytest.raises(JobError, match="phase is 'train' there and 'calibrate' here"):
            read(path, "calibrate", origin=ORIGIN)


def save_sharded(folder: Path) -> None:
    world = from_environment()
    checkpoint.save(folder, PHASE, Holder(5, world), world, origin=ORIGIN, keep=1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_make_the_same_file(world_size: int, tmp_path: Path) -> None:
    [wanted] = save(tmp_path / "here", 5)
    run_distributed(save_sharded, tmp_path / "there", world_size=world_size)
    [found] = (tmp_path / "there").iterdir()
    assert found.read_bytes() == wanted.read_bytes()


def test_some_quantities_can_be_written_alone(tmp_path: Path) -> None:
    world = from_environment()
    path = tmp_path / "calibrated.safetensors"
    checkpoint.write_state(path, PHASE, Holder(5, world), world, origin=ORIGIN, quantities=("values",))
    found = checkpoint.read(path, PHASE, origin=ORIGIN)
    assert not found.exp_avg and not found.exp_avg_sq
    assert all(torch.equal(tensor, state(5).values[path]) for path, tensor in found.values.items())


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
    with pytest.raises(checkpoint.Damaged, match="damaged"):
        checkpoint.check(path, PHASE, origin=ORIGIN)


def test_modules_in_another_order_are_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Values belong to modules by their order alone."""
    _, path = save(tmp_path, 5, 10)
    reorder(path)
    assert_is(newest(tmp_path), 5)
    assert f"{path}: its content does not match its digest" in caplog.text
    for read in (checkpoint.read, checkpoint.check):
        with pytest.raises(checkpoint.Damaged, match="does not match its digest"):
            read(path, PHASE, origin=ORIGIN)


def reorder(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["lori"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    header["modules"] = dict(reversed(header["modules"].items()))
    save_file(tensors, path, metadata={"lori": json.dumps(header)})


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Its digest is over the header with sorted keys."""
    [path] = save(tmp_path, 5)
    with safe_open(path, framework="pt") as file:
        header = {**json.loads(file.metadata()["lori"]), "format": "lori-checkpoint-2"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    digest = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name in ("values", "exp_avg", "exp_avg_sq"):
        digest.update(tensors[name].numpy().data)
    tensors["digest"] = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    save_file(tensors, path, metadata={"lori": json.dumps(header)})
    assert_is(newest(tmp_path), 5)


def test_notes_come_back_with_the_state(tmp_path: Path) -> None:
    world = from_environment()
    notes = {"loss": 0.1, "best": {"step": 3}}
    checkpoint.save(tmp_path, PHASE, Holder(5, world), world, origin=ORIGIN, keep=1, notes=notes)
    found = newest(tmp_path)
    assert found is not None
    assert found.notes == notes


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
        checkpoint.read(path, PHASE, origin=ORIGIN)


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path: Path) -> None:
    [path] = save(tmp_path, 5)
    (tmp_path / ".train-00000010.safetensors.ab12.partial").write_bytes(path.read_bytes()[:100])
    assert_is(newest(tmp_path), 5)
    save(tmp_path, 10)
    assert_is(newest(tmp_path), 10)
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*.partial"))


def die_while_writing(folder: Path, num_bytes: int) -> None:
    """Killed when so many bytes, in a file or in all of them, have reached the disk; -1: all, but before the rename."""
    real = os.fsync

    def end(descriptor: int) -> None:
        real(descriptor)
        if num_bytes >= 0:
            os.truncate(descriptor, num_bytes)
        os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = end  # type: ignore[assignment]
    save(folder, 10)


@pytest.mark.parametrize("num_bytes", [0, 1, 8, 100, 1000, -1])
def test_a_writer_killed_in_the_act_leaves_the_one_before(num_bytes: int, tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(pytest.fail.Exception, match="SIGKILL"):
        run_distributed(die_while_writing, tmp_path, num_bytes, world_size=1)
    assert_is(newest(tmp_path), 5)


class Sized(Holder):
    """Holds as many entries as an adapter of the quickstart's size: 8192 over 28 modules."""

    def __init__(self, world: World) -> None:
        super().__init__(5, world)
        names = [f"model.layers.{layer}.mlp.projection_{number}" for layer in range(4) for number in range(7)]
        sizes = [292] * 27 + [8192 - 27 * 292]
        part = {name: torch.ones(size) for name, size in zip(names, sizes, strict=True)}
        self.state = State(step=5, values=part, exp_avg=part, exp_avg_sq=part)


def test_a_small_adapter_s_checkpoint_is_little_more_than_its_numbers(tmp_path: Path) -> None:
    world = from_environment()
    origin = {"settings": {f"setting_{number}": "0123456789" * 5 for number in range(40)}}
    path = checkpoint.save(tmp_path, PHASE, Sized(world), world, origin=origin, keep=1)
    assert path.stat().st_size < 1.1 * 3 * 4 * 8192


def most_held(path: Path) -> int:
    """Most bytes above those before, while a rank of four takes its share of a large checkpoint."""
    world = from_environment()
    share = torch.zeros(3, 2**22)

    def take() -> None:
        found = checkpoint.read(path, PHASE, origin=ORIGIN)
        for part, full in zip(share, (found.values, found.exp_avg, found.exp_avg_sq), strict=True):
            part.copy_(full["large"][world.rank * part.numel() :][: part.numel()])

    take()  # the first time, as libraries then load code of their own
    assert share.sum().item() == share.numel()
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    take()
    return process_bytes("VmHWM") - before


def test_a_rank_that_resumes_holds_its_share_of_the_state(tmp_path: Path) -> None:
    ones = torch.ones(2**24)
    large = State(step=1, values={"large": ones}, exp_avg={"large": ones}, exp_avg_sq={"large": ones})
    world = from_environment()
    holder = Holder(1, world)
    holder.state = large
    path = checkpoint.save(tmp_path, PHASE, holder, world, origin=ORIGIN, keep=1)
    size = path.stat().st_size
    assert size > 200e6
    for held in run_distributed(most_held, path, world_size=4):
        assert held < 0.75 * size  # a quarter of the state, and pieces of 16 MB of which its digest is computed
