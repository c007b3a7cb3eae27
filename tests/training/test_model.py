import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lori_dist.config import Model
from lori_dist.errors import ConfigError
from lori_dist.training.data import Example
from lori_dist.training.model import check, identity, load_model, load_tokenizer, num_positions
from tests.models import tiny_gpt2, tiny_llama
from tests.tokenizers import save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def edit(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_the_base_is_what_was_saved(saved: Path) -> None:
    model = load_model(Model(path=str(saved)))
    assert not model.training
    for (name, found), expected in zip(model.named_parameters(), tiny_llama().parameters(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_base_comes_in_the_dtype_asked_for(saved: Path, dtype: str) -> None:
    model = load_model(Model(path=str(saved), dtype=dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_dropout_is_off(tmp_path: Path) -> None:
    model = tiny_gpt2()
    assert model.config.resid_pdrop > 0
    model.save_pretrained(tmp_path)
    loaded = load_model(Model(path=str(tmp_path)))
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_loading_draws_nothing(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(Model(path=str(saved)))
    assert capfd.readouterr() == ("", "")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    remove_weights(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_weights, "cannot be loaded"),
        (cut_weights, "model.safetensors is cut off"),
        (pickle_weights, "pytorch_model.bin cannot be read: save the model with safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: edit(folder, model_type="nonesuch"), "nonesuch"),
        (
            lambda folder: edit(folder, model_type="t5"),
            "cannot be loaded (ValueError: Unrecognized configuration class",
        ),
        (
            lambda folder: edit(folder, num_hidden_layers=3),
            "lack 9 tensors of the shape config.json asks for (model.layers",
        ),
        (
            lambda folder: edit(folder, vocab_size=65),
            "lack 2 tensors of the shape config.json asks for (lm_head.weight, ",
        ),
        (shutil.rmtree, "there is no config.json in "),
    ],
)
def test_a_base_that_cannot_be_loaded_whole_is_refused(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    """transformers fills missing weights with random ones and warns; that would train on noise."""
    damage(folder)
    with pytest.raises(ConfigError) as caught:
        load_model(Model(path=str(folder)))
    assert str(caught.value).startswith("model.path: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_tokenizer_is_the_bases_own(saved: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(saved)))
    assert tokenizer("abc")["input_ids"] == [1, 4, 5, 6]
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, model: Callable[[], torch.nn.Module]) -> None:
    """For some kinds of model transformers makes an empty tokenizer, for which every text is nothing."""
    model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^model.path: the tokenizer of .* cannot be loaded"):
        load_tokenizer(Model(path=str(tmp_path)))


def test_rows_have_to_fit_the_model() -> None:
    def row(*tokens: int) -> Example:
        return Example(prompt="", response="", prompt_ids=tokens[:1], response_ids=tokens[1:])

    model = tiny_gpt2()
    assert num_positions(model) == 64
    check([row(*[63] * 64)], model)
    with pytest.raises(ConfigError, match=r"^train.max_length: a row has 65 tokens, the model has 64 positions; set"):
        check([row(1, 2), row(*[63] * 65)], model)
    with pytest.raises(
        ConfigError, match=r"^model.path: the tokenizer gives token 64, the model has embeddings for 64"
    ):
        check([row(1, 2), row(5, 64, 2)], model)


# --- identity --------------------------------------------------------------------------------------------------------


def test_a_model_is_the_same_wherever_it_lies(saved: Path, folder: Path) -> None:
    found = identity(Model(path=str(saved)))
    assert found == identity(Model(path=str(folder))) == identity(Model(path=str(folder), dtype="bfloat16"))
    assert (found["name"], found["model_type"]) == ("tiny", "llama")
    assert len(found["architecture"]) == len(found["weights"]) == 16
    assert identity(Model(path=str(folder.rename(folder.parent / "other")))) == found | {"name": "other"}


def test_the_identity_of_a_model_is_frozen(tmp_path: Path) -> None:
    """Adapter files carry it. Written by hand, as safetensors may come to arrange its files otherwise."""
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "b": {"dtype": "F32", "shape": [3000], "data_offsets": [0, 12_000]},
            "a": {"dtype": "F32", "shape": [2, 500_000], "data_offsets": [12_000, 4_012_000]},
        }
    ).encode()
    data = torch.arange(1_003_000, dtype=torch.float32).numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = identity(Model(path=str(tmp_path)))
    assert (found["architecture"], found["weights"]) == ("f8b70bb1a10d0f67", "0f2c3810458320a4")


def test_a_name_on_the_hub_is_its_snapshot_in_the_cache(saved: Path, tmp_path: Path) -> None:
    """In a process of its own, as the cache's place is read when the libraries are imported."""
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(saved, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    program = (
        "import json\n"
        "from lori_dist.config import Model\n"
        "from lori_dist.training.model import identity, load_model, load_tokenizer\n"
        "model = Model(path='someone/tiny')\n"
        "load_model(model)\n"
        "print(json.dumps([identity(model), load_tokenizer(model)('abc')['input_ids']]))"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    expected = identity(Model(path=str(saved))) | {"name": "someone/tiny"}
    assert json.loads(found.stdout) == [expected, [1, 4, 5, 6]]


@pytest.mark.parametrize("place", [0, 0.37, 1])
def test_other_weights_are_another_model(saved: Path, folder: Path, place: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[int(place * (len(tensors) - 1))]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    before, after = identity(Model(path=str(saved))), identity(Model(path=str(folder)))
    assert before["weights"] != after["weights"]
    assert before["architecture"] == after["architecture"]


def test_other_shapes_are_another_architecture(saved: Path, tmp_path: Path) -> None:
    other = save(tiny_llama(layers=1), tmp_path)
    assert identity(Model(path=str(saved)))["architecture"] != identity(Model(path=str(other)))["architecture"]


def test_large_files_are_sampled_evenly(tmp_path: Path) -> None:
    """A whole training changes all of a file; a change to either end or the middle of it shows."""
    weights = torch.zeros(1_000_000)
    seen = set()
    for place in (None, 0, 500_000, 999_999):
        if place is not None:
            weights[place : place + 20_000] = 1
        (tmp_path / "config.json").write_text("{}")
        save_file({"w": weights}, tmp_path / "model.safetensors")
        seen.add(identity(Model(path=str(tmp_path)))["weights"])
    assert len(seen) == 4


def test_shards_are_read_by_their_index(saved: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, sharded = identity(Model(path=str(saved))), identity(Model(path=str(tmp_path)))
    assert whole["architecture"] == sharded["architecture"]
    assert identity(Model(path=str(tmp_path))) == sharded
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = tmp_path / sorted(set(index["weight_map"].values()))[-1]
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    assert identity(Model(path=str(tmp_path)))["weights"] != sharded["weights"]


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, b"\x40" + b"\x00" * 7 + b"{}"])
def test_files_that_are_no_safetensors_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"^model.path: .* cannot be loaded \(ValueError: model.safetensors is not a safetensors "
    ):
        identity(Model(path=str(folder)))
