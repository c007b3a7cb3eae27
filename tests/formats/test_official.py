"""Checkpoints of LoRI's official code: the same updates, sparse where their mask says so."""

import pickle
from pathlib import Path

import pytest
import torch

from lori_dist import formats
from lori_dist.adapter.attach import attach, detach, extract, trainable
from lori_dist.errors import AdapterError
from lori_dist.formats import native, official
from lori_dist.merges import merge
from tests.formats.official import lora, lori_d, lori_s, mask_of
from tests.formats.test_peft import MODULE, compare
from tests.integrations.made import trained
from tests.models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("place", [".", "masks"])
def test_lori_s_keeps_the_entries_of_its_mask(tmp_path: Path, place: str) -> None:
    model, mask = lori_s(tmp_path / "s")
    (tmp_path / "s" / "masks").mkdir()
    (tmp_path / "s" / "0.9_mask.pt").rename(tmp_path / "s" / place / "0.9_mask.pt")
    adapter = formats.load(tmp_path / "s")
    compare(model, adapter)
    assert adapter.kept == sum(int(item.sum()) for item in mask.values())
    for name, item in mask.items():
        module = name.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight")
        index = adapter.blocks[0].entries[module].index
        assert index is not None
        assert index.tolist() == item.flatten().nonzero().squeeze(1).tolist()
    native.save(adapter, tmp_path / "ours")
    compare(model, native.load(tmp_path / "ours"))


def test_lori_s_without_its_mask_keeps_what_is_not_zero(tmp_path: Path) -> None:
    model, mask = lori_s(tmp_path / "s")
    (tmp_path / "s" / "0.9_mask.pt").unlink()
    adapter = formats.load(tmp_path / "s")
    compare(model, adapter)
    assert adapter.kept == sum(int(item.sum()) for item in mask.values()) - 1


def test_lori_d_is_dense_whatever_masks_were_taken_from_it(tmp_path: Path) -> None:
    model = lori_d(tmp_path / "d", sparsities=(0.1, 0.5, 0.9, 0.99))
    adapter = formats.load(tmp_path / "d")
    compare(model, adapter)
    assert adapter.kept == adapter.total


def test_names_of_modules_alone_are_mapped(tmp_path: Path) -> None:
    model, mask = lori_s(tmp_path / "s")
    for cut in (("base_model.model.", ""), (".lora_B.default.weight", ""), (".default", "")):
        torch.save({name.replace(*cut): item for name, item in mask.items()}, tmp_path / "s" / "0.9_mask.pt")
        compare(model, formats.load(tmp_path / "s"))


def test_a_mask_takes_memory_only_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "0_mask.pt"
    torch.save({MODULE: torch.ones(2**16, 2**10, dtype=torch.bool)}, path)

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    before = anonymous()
    mask = official.read_mask(path, {MODULE: (2**16, 2**10)})
    assert anonymous() - before < path.stat().st_size / 4  # the rest is the file's own pages, which the system may drop
    assert mask[MODULE].all()


def test_a_mask_of_torch_before_1_6_is_read(tmp_path: Path) -> None:
    path = tmp_path / "0.5_mask.pt"
    wanted = torch.tensor([[True, False], [False, True]])
    torch.save({MODULE: wanted}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(official.read_mask(path, {MODULE: (2, 2)})[MODULE], wanted)


def refused(folder: Path, wanted: str) -> None:
    with pytest.raises(AdapterError, match=wanted) as caught:
        formats.load(folder)
    assert str(caught.value).startswith(f"{folder}: ")


def test_a_mask_of_another_sparsity_than_its_name_is_refused(tmp_path: Path) -> None:
    lori_s(tmp_path / "s", sparsity=0.5)
    (tmp_path / "s" / "0.5_mask.pt").rename(tmp_path / "s" / "0.9_mask.pt")
    refused(tmp_path / "s", r"0\.9_mask\.pt: its sparsity is 0\.500\d, not the 0\.9 of its name; give the mask")


def test_a_name_without_a_sparsity_is_refused(tmp_path: Path) -> None:
    lori_s(tmp_path / "s")
    (tmp_path / "s" / "0.9_mask.pt").rename(tmp_path / "s" / "my_mask.pt")
    refused(tmp_path / "s", r"my_mask\.pt: the name has no sparsity; wanted one such as 0\.9_mask\.pt")


def test_entries_outside_of_the_mask_are_refused_with_the_module(tmp_path: Path) -> None:
    _, mask = lori_s(tmp_path / "s")
    other = mask_of(lora(tmp_path / "other", seed=5), 0.9)
    for place in ("0.9_mask.pt", "masks/0.9_mask.pt"):
        (tmp_path / "s" / "masks").mkdir(exist_ok=True)
        (tmp_path / "s" / "0.9_mask.pt").unlink(missing_ok=True)
        torch.save(other, tmp_path / "s" / place)
        refused(tmp_path / "s", r"model\.layers\.\S+: B has \d+ entries that are not zero outside of 0\.9_mask\.pt")
    lora(tmp_path / "dense")
    torch.save(other, tmp_path / "dense" / "0.9_mask.pt")
    refused(tmp_path / "dense", r"entries that are not zero outside of 0\.9_mask\.pt")
    assert mask.keys() == other.keys()


def test_masks_of_other_modules_and_shapes_are_refused(tmp_path: Path) -> None:
    _, mask = lori_s(tmp_path / "s")
    name = f"base_model.model.{MODULE}.lora_B.default.weight"
    path = tmp_path / "s" / "0.9_mask.pt"
    for changed, wanted in (
        (
            {**mask, "base_model.model.x.lora_B.default.weight": mask[name]},
            r"s: x: 0\.9_mask\.pt has a mask for it, but the",
        ),
        ({key: item for key, item in mask.items() if key != name}, rf"{MODULE}: 0\.9_mask\.pt has no mask of it"),
        ({**mask, name: mask[name].t()}, rf"{MODULE}: its mask in 0\.9_mask\.pt is torch\.bool \(4, 40\); wanted"),
        ({**mask, name: mask[name].float()}, rf"{MODULE}: its mask in 0\.9_mask\.pt is torch\.float32 \(40, 4\)"),
        ({**mask, name: 3}, rf"{MODULE}: its mask in 0\.9_mask\.pt is int; wanted torch\.bool \(40, 4\)"),
        ([1], r"0\.9_mask\.pt: holds list; wanted module names and their masks"),
    ):
        torch.save(changed, path)
        refused(tmp_path / "s", wanted)


class Program:
    """What a hostile pickle does when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_that_runs_a_program_is_not_read(tmp_path: Path) -> None:
    lori_s(tmp_path / "s")
    path = tmp_path / "s" / "0.9_mask.pt"
    torch.save({"a": Program(tmp_path / "ran")}, path)
    refused(tmp_path / "s", r"0\.9_mask\.pt: holds more than tensors, or is damaged")
    path.write_bytes(pickle.dumps(Program(tmp_path / "ran"), protocol=2))
    refused(tmp_path / "s", r"0\.9_mask\.pt: holds more than tensors, or is damaged")
    assert not (tmp_path / "ran").exists()
    path.write_bytes(b"")
    refused(tmp_path / "s", r"0\.9_mask\.pt: holds more than tensors, or is damaged")


def test_a_checkpoint_is_trained_further_with_its_stored_a(tmp_path: Path) -> None:
    lori_s(tmp_path / "theirs")
    before = formats.open_lazy(tmp_path / "theirs")
    model = tiny_llama()
    attach(model, before, train=True)
    assert sum(values.numel() for values in trainable(model).values()) == before.kept
    tokens = torch.arange(1, 25).view(2, 12)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.01)
    first = model(input_ids=tokens, labels=tokens).loss
    first.backward()
    optimizer.step()
    second = model(input_ids=tokens, labels=tokens)
    assert second.loss < first
    native.save(extract(model, name="further"), tmp_path / "further.safetensors")
    detach(model)
    after = native.load(tmp_path / "further.safetensors")
    attach(model, after)
    torch.testing.assert_close(model(input_ids=tokens).logits, second.logits)
    for module, entries in after.blocks[0].entries.items():
        width = before.shapes[module][1]
        assert torch.equal(after.blocks[0].projection(module, width), before.blocks[0].projection(module, width))
        assert entries.index is not None
        assert torch.equal(entries.index, before.blocks[0].entries[module].index)  # type: ignore[arg-type]


def test_a_merge_of_several_blocks_is_not_trained_further() -> None:
    both = merge([trained(tiny_llama(), "one", seed=1), trained(tiny_llama(), "two", seed=2)], method="concat")
    model = tiny_llama()
    with pytest.raises(AdapterError, match="2 weighted components"):
        attach(model, both, train=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
