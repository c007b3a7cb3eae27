"""A base that is read to where it belongs is the one that transformers loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from lori_dist import Spec, attach, load_adapter, save_adapter
from lori_dist.__main__ import main
from lori_dist.config import Model
from lori_dist.errors import ConfigError
from lori_dist.training.engine import Part
from lori_dist.training.model import check_device, load_model
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


def under_its_prefix(folder: Path) -> None:
    """Names with the model's prefix once more, which transformers takes off."""
    wrapped("model.")(folder)


SINGLE = "model.safetensors"
HARMLESS = [
    two_sets, adapter_beside, pickle_beside, consolidated_beside, more_tensors, in_two_shards, under_its_prefix,
]  # fmt: skip

YAML = """
name: r
model: {path: BASE}
tasks: {t: {train: rows.jsonl, test: rows.jsonl}}
adapter: {rank: 2, density: 1.0}
train: {steps: 1, batch_size: 2, micro_batch_size: 2, max_length: 64}
evaluate: {metrics: [loss]}
"""
VERBS = {
    "train": ["train", "run.yaml", "--task", "t"],
    "evaluate": ["evaluate", "run.yaml", "--adapter", "any.safetensors", "--out", "losses.json"],
    "export": ["export", "any.safetensors", "folded", "--format", "folded", "--base", "BASE"],
    "plan": ["plan", "run.yaml", "--gpus", "1", "--out", "plan.json"],
}
"""What reads a base."""


def described(folder: Path, damage: Callable[[Path], None] | None = None) -> Path:
    """A base, damaged or not, with what the commands need beside it."""
    folder.mkdir()
    save(tiny_llama(), folder / "base")
    if damage is not None:
        damage(folder / "base")
    (folder / "run.yaml").write_text(YAML.replace("BASE", str(folder / "base")))
    (folder / "rows.jsonl").write_text('{"prompt": "a b", "response": "c"}\n' * 4)
    save_adapter(trained(tiny_llama()), folder / "any.safetensors")
    return folder


def done(words: list[str]) -> int:
    """The exit code of a command in the current folder. The base's path is absolute, as `lori train` names it."""
    return main([str(Path("base").absolute()) if word == "BASE" else word for word in words])


def results(folder: Path) -> dict[str, Any]:
    """What the commands leave of the base in a folder."""
    adapter = load_adapter(folder / "runs" / "r" / "train-t" / "adapter.safetensors").blocks[0]
    model = by_transformers(folder / "folded")
    return {
        "train": torch.cat([entries.values for entries in adapter.entries.values()]),
        "evaluate": json.loads((folder / "losses.json").read_text()),
        "export": (type(model), torch.cat([parameter.detach().flatten() for parameter in model.parameters()])),
        "plan": json.loads((folder / "plan.json").read_text().replace(str(folder.absolute()), "FOLDER")),
    }


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the commands leave of a folder without any oddity."""
    folder = described(tmp_path_factory.mktemp("sound") / "sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert [done(words) for words in VERBS.values()] == [0] * len(VERBS)
    return results(folder)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("damage", HARMLESS)
def test_an_odd_folder_is_the_same_base_to_every_command(
    damage: Callable[[Path], None], sound: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(described(tmp_path / "odd", damage))
    for verb, words in VERBS.items():
        assert done(words) == 0, verb
    found = results(Path())
    for verb, wanted in sound.items():
        if verb == "train":
            assert torch.equal(found[verb], wanted)
        elif verb == "export":
            assert found[verb][0] is wanted[0] and torch.equal(found[verb][1], wanted[1])
        else:
            assert found[verb] == wanted, verb


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


def half_prefixed(folder: Path) -> None:
    tensors = {
        f"module.{name}" if number % 2 else name: tensor
        for number, (name, tensor) in enumerate(load_file(folder / SINGLE).items())
    }
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def cut_off(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: len(content) // 2])


def changed_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tree = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(change(tree)))

    return write


def config_cut_off(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_missing(folder: Path) -> None:
    (folder / "config.json").unlink()


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "index of nothing": (index_of_nothing, "names 1 files that are not there: model-00002-of-00002.safetensors"),
    "index out of the folder": (index_out_of_the_folder, "names '../model.safetensors', wanted the name of a"),
    "index without a map": (index_without_a_map, "model.safetensors.index.json has no weight_map"),
    "differing shards": (differing_shards, "is in model-00001-of-00002.safetensors and, with other values, in"),
    **{
        prefix: (wrapped(prefix), f"have 21 with other names ({prefix}")
        for prefix in ("module.", "_orig_mod.", "model.model.", "base_model.model.", "_fsdp_wrapped_module.")
    },
    "half prefixed": (half_prefixed, "have 10 with other names (module."),
    "transposed": (transposed, "tensors of the shape config.json asks for"),
    "both names": (both_names, "model.norm.weight is twice in the weights"),
    "consolidated only": (consolidated_only, "consolidated.safetensors cannot be read"),
    "cut off": (cut_off, "model.safetensors"),
    "config cut off": (config_cut_off, "config.json is not valid JSON"),
    "config a list": (changed_config(lambda tree: [tree]), "config.json holds a list, wanted a JSON object"),
    "config missing": (config_missing, "there is no config.json in "),
    "quantised": (changed_config(lambda tree: {**tree, "quantization_config": {"quant_method": "fp8"}}), "quantised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_odd_folder_is_refused_by_every_command_in_the_same_words(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = REFUSED[case]
    monkeypatch.chdir(described(tmp_path / "odd", damage))
    capsys.readouterr()
    errors = {}
    for verb, words in VERBS.items():
        assert done(words) == 2, verb
        errors[verb] = capsys.readouterr().err.strip().splitlines()[-1]
    assert len(set(errors.values())) == 1, errors
    assert message in errors["train"] and errors["train"].startswith("model.path: ")
