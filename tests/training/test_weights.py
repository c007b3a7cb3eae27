"""A base that is read to where it belongs is the one that transformers loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach, detach, fold
from lori_dist.config import Model
from lori_dist.errors import ConfigError
from lori_dist.integrations.folded import export_folded
from lori_dist.training.engine import Part
from lori_dist.training.model import check_device, identity, load_model
from lori_dist.training.weights import base_parameters, fill, materialize, skeleton, whole
from tests.integrations.made import trained
from tests.models import tiny_gpt2, tiny_llama
from tests.tokenizers import save


def tiny_mixtral() -> MixtralForCausalLM:
    """Its files hold the experts one by one, the model holds them in one tensor; expert 10 is not the second."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 12, "num_experts_per_tok": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tied=True),
    "gpt2": tiny_gpt2,
    "mixtral": tiny_mixtral,
}
CPU = torch.device("cpu")


def read(model: Model) -> Any:
    made, weights = skeleton(model)
    assert all(parameter.is_meta for parameter in made.parameters())
    materialize(made.requires_grad_(False), CPU)
    fill(made, weights, whole)
    return made


def by_transformers(folder: Path, dtype: str = "float32") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def assert_same(found: Any, wanted: Any) -> None:
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(wanted, kind)())
        assert list(ours) == list(theirs)
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name
    assert not found.training


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_it_is_what_transformers_loads(name: str, dtype: Any, stored: torch.dtype, tmp_path: Path) -> None:
    MODELS[name]().to(stored).save_pretrained(tmp_path, max_shard_size="60KB")
    model = Model(path=str(tmp_path), dtype=dtype)
    wanted = by_transformers(tmp_path, dtype)
    assert_same(read(model), wanted)
    assert_same(load_model(model), wanted)


def test_attention_is_computed_as_asked_for(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    eager, default = Model(path=str(tmp_path), attention="eager"), Model(path=str(tmp_path))
    ids = torch.arange(3, 15)[None]
    for make in (read, load_model):
        models = make(eager), make(default)
        assert [model.config._attn_implementation for model in models] == ["eager", "sdpa"]
        torch.testing.assert_close(*(model(ids).logits for model in models), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [read, load_model])
def test_attention_that_a_model_does_not_have_is_refused(make: Callable[[Model], Any], tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model.path: .* or remove model.attention, which is flash_attention_2$"):
        make(Model(path=str(tmp_path), attention="flash_attention_2", dtype="bfloat16"))


def test_attention_that_has_no_backward_pass_on_a_cpu_is_refused() -> None:
    check_device(Model(path="m", attention="sdpa"), CPU)
    with pytest.raises(ConfigError, match=r"model.attention: got flex_attention, which trains on CUDA devices"):
        check_device(Model(path="m", attention="flex_attention"), CPU)


def test_names_without_the_model_s_prefix_are_found(tmp_path: Path) -> None:
    tiny_gpt2().transformer.save_pretrained(tmp_path)  # as the files of GPT-2 itself are
    assert_same(load_model(Model(path=str(tmp_path))), by_transformers(tmp_path))


def test_tied_weights_that_differ_are_not_tied(tmp_path: Path) -> None:
    untied = tiny_llama()
    untied.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    model = Model(path=str(tmp_path))
    made = read(model)
    assert_same(made, AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert torch.equal(made.lm_head.weight, untied.lm_head.weight)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    made = read(model)
    assert made.lm_head.weight is made.model.embed_tokens.weight


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_make_the_whole(size: int, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="60KB")
    made, weights = skeleton(Model(path=str(tmp_path), dtype="bfloat16"))
    attach(made, Spec(rank=2, alpha=1.0, seed=0))
    materialize(made, CPU)

    def share(rank: int) -> Callable[[Any], Part]:
        def part(parameter: Any) -> Part:
            entries = -(-parameter.numel() // size)
            start = min(rank * entries, parameter.numel())
            return Part(start=start, data=parameter.view(-1)[start : start + entries])

        return part

    for rank in range(size):
        fill(made, weights, share(rank))
    wanted = load_model(Model(path=str(tmp_path), dtype="bfloat16"))
    assert {name: tensor.tolist() for name, tensor in base_parameters(made).items()} == {
        name: tensor.tolist() for name, tensor in wanted.named_parameters()
    }


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"model\.path: .*model\.safetensors is cut off"):
        skeleton(Model(path=str(tmp_path)))


def test_a_missing_weight_and_one_of_another_shape_are_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = torch.zeros(3, 3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 2 tensors .*\(lm_head\.weight, model\.norm\.weight\)"):
        skeleton(Model(path=str(tmp_path)))


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "fp8"},', 1))
    with pytest.raises(ConfigError, match="is quantised, which is not supported"):
        skeleton(Model(path=str(tmp_path)))


# --- odd folders -----------------------------------------------------------------------------------------------------


def shard(folder: Path, tensors: dict[str, torch.Tensor], count: int = 2) -> None:
    """An index, and files of the tensors."""
    names = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        piece = dict(list(tensors.items())[number::count])
        save_file(piece, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(piece, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def two_sets(folder: Path) -> None:
    """Of which transformers reads the single file."""
    shard(folder, {name: tensor * 2 for name, tensor in load_file(folder / SINGLE).items()})


def adapter_beside(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(tiny_llama(), settings).save_pretrained(folder)


def pickle_beside(folder: Path) -> None:
    torch.save({name: tensor * 2 for name, tensor in load_file(folder / SINGLE).items()}, folder / "pytorch_model.bin")


def consolidated_beside(folder: Path) -> None:
    tensors = {name: tensor * 2 for name, tensor in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / "consolidated.safetensors")


def more_tensors(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def in_two_shards(folder: Path) -> None:
    """One of which has all of the other's tensors as well."""
    tensors = load_file(folder / SINGLE)
    shard(folder, tensors)
    save_file(tensors, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    (folder / SINGLE).unlink()


SINGLE = "model.safetensors"
HARMLESS = [two_sets, adapter_beside, pickle_beside, consolidated_beside, more_tensors, in_two_shards]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("damage", HARMLESS)
def test_an_odd_folder_is_the_same_base_to_every_reader(damage: Callable[[Path], None], tmp_path: Path) -> None:
    save(tiny_llama(), tmp_path / "base")
    damage(tmp_path / "base")
    model = Model(path=str(tmp_path / "base"))
    for made in (read(model), load_model(model)):
        assert_same(made, tiny_llama().eval())
    # What an adapter is folded into is that base too, and what is written is nothing but it.
    adapter = trained(tiny_llama(), base=identity(model))
    export_folded(model.path, adapter, tmp_path / "folded")
    wanted = tiny_llama()
    attach(wanted, adapter)
    fold(wanted)
    detach(wanted)
    found = by_transformers(tmp_path / "folded")
    assert type(found) is type(wanted)
    for (name, ours), theirs in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def index_of_nothing(folder: Path) -> None:
    shard(folder, load_file(folder / SINGLE))
    (folder / SINGLE).unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_out_of_the_folder(folder: Path) -> None:
    shard(folder, load_file(folder / SINGLE))
    (folder / SINGLE).rename(folder.parent / SINGLE)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002", "../model"))


def index_without_a_map(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


def differing_shards(folder: Path) -> None:
    in_two_shards(folder)
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / "model-00001-of-00002.safetensors").items()}
    save_file(tensors, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})


def wrapped(prefix: str) -> Callable[[Path], None]:
    """As DDP and torch.compile name a model's weights."""

    def rename(folder: Path) -> None:
        tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(folder / SINGLE).items()}
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return rename


def transposed(folder: Path) -> None:
    tensors = {name: tensor.t().contiguous() for name, tensor in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def both_names(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def consolidated_only(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "consolidated.safetensors")


REFUSED = {
    index_of_nothing: "names 1 files that are not there: model-00002-of-00002.safetensors",
    index_out_of_the_folder: "names '../model.safetensors', wanted the name of a safetensors file beside it",
    index_without_a_map: "model.safetensors.index.json has no weight_map",
    differing_shards: "is in model-00001-of-00002.safetensors and, with other values, in model-00002-of-00002",
    wrapped("module."): "have 21 with other names (module.",
    wrapped("_orig_mod."): "have 21 with other names (_orig_mod.",
    transposed: "tensors of the shape config.json asks for",
    both_names: "model.norm.weight is twice in the weights",
    consolidated_only: "consolidated.safetensors cannot be read",
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.items())
def test_an_odd_folder_that_is_no_base_is_refused_by_every_reader(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    damage(tmp_path / "base")
    found = []
    for use in (skeleton, load_model):
        with pytest.raises(ConfigError, match=r"^model.path: ") as caught:
            use(Model(path=str(tmp_path / "base")))
        found.append(str(caught.value))
    assert found[0] == found[1]
    assert message in found[0] and "\n" not in found[0]
