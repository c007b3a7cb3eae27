"""LoRI through PEFT's own calls."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lori_dist.adapter.attach import trainable
from lori_dist.errors import AdapterError
from lori_dist.integrations.peft_tuner import LoriConfig, LoriLinear, dense, sparsify, to_adapter
from lori_dist.masks.magnitude import mask
from tests.integrations.made import adapted_logits, logits
from tests.models import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft 0.21 asks transformers 5.23 for it
    "ignore:Could not find a config file:UserWarning",  # a tiny model has no name on the hub
)


def peft_model(model: PreTrainedModel | None = None, *, density: float = 1.0, **settings: object) -> PeftModel:
    """With values of B that change the logits visibly."""
    wrapped = get_peft_model(model or tiny_llama(), LoriConfig(**{"r": 4, "lori_alpha": 10.0, **settings}))
    return fill(wrapped, "default", density)


def fill(wrapped: PeftModel, name: str, density: float = 1.0) -> PeftModel:
    generator = torch.Generator().manual_seed(len(name))
    if density < 1:
        b = {path: torch.randn(b.shape, generator=generator) for path, b in dense(wrapped, name).items()}
        sparsify(wrapped, mask(b, density=density), name)
    with torch.no_grad():
        for layer in layers(wrapped):
            if name in layer.lori_delta and layer.lori_delta[name].values is not None:
                layer.lori_delta[name].values.normal_(generator=generator)
    return wrapped.eval()


def layers(model: nn.Module) -> list[LoriLinear]:
    return [module for module in model.modules() if isinstance(module, LoriLinear)]


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_it_is_the_adapter_that_attach_gives(make: object, density: float) -> None:
    wrapped = peft_model(make(), density=density)  # type: ignore[operator]
    torch.testing.assert_close(logits(wrapped), adapted_logits(make(), to_adapter(wrapped)), rtol=0, atol=1e-5)  # type: ignore[operator]
    assert (logits(wrapped) - logits(make())).abs().max() > 1e-2  # type: ignore[operator]


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_a_folder_has_no_a_and_gives_the_same_logits(tmp_path: Path, density: float) -> None:
    wrapped = peft_model(density=density, seed=3)
    wrapped.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    kept = sum(tensor.numel() for name, tensor in held.items() if name.endswith("values"))
    assert kept == to_adapter(wrapped).kept and all(name.endswith(("values", "index")) for name in held)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(again), logits(wrapped)) and not trained_names(again)
    lazily = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lazily), logits(wrapped))


def test_loading_to_train_trains_the_kept_entries_alone(tmp_path: Path) -> None:
    wrapped = peft_model(density=0.1)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert trained_names(again) == trained_names(wrapped)
    assert all(name.endswith("lori_delta.default.values") for name in trained_names(again))
    assert again.get_nb_trainable_parameters()[0] == to_adapter(wrapped).kept


def test_the_freeze_survives_what_peft_and_torch_do() -> None:
    wrapped = peft_model(density=0.2)
    wrapped.add_adapter("other", LoriConfig(r=4, seed=9))
    before = {layer.path: layer.lori_delta["default"].a().clone() for layer in layers(wrapped)}
    names = trained_names(wrapped)
    wrapped.set_adapter("other")
    assert all(".other." in name for name in trained_names(wrapped))
    wrapped.set_adapter("default")
    with wrapped.disable_adapter():
        assert not trained_names(wrapped)
    assert trained_names(wrapped) == names
    wrapped.to(torch.bfloat16)
    optimizer = torch.optim.SGD([parameter for parameter in wrapped.parameters() if parameter.requires_grad], lr=1.0)
    wrapped(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert trained_names(wrapped) == names
    for layer in layers(wrapped):
        assert torch.equal(layer.lori_delta["default"].a(), before[layer.path])
        assert layer.lori_delta["default"].values is None or layer.lori_delta["default"].values.dtype == torch.float32


def test_several_adapters(tmp_path: Path) -> None:
    wrapped = peft_model(density=0.3, seed=1)
    wrapped.add_adapter("other", LoriConfig(r=3, seed=2))
    first = logits(wrapped)
    fill(wrapped, "other", 0.5).set_adapter("other")
    second = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(again), first)
    again.set_adapter("other")
    assert torch.equal(logits(again), second) and not torch.equal(first, second)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(tiny_llama()))
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        again.delete_adapter("other")
    assert torch.equal(logits(again), first)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_merged_into_the_base(make: object) -> None:
    wrapped = peft_model(make(), density=0.3)  # type: ignore[operator]
    wanted = logits(wrapped)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped), wanted, rtol=0, atol=1e-5)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), logits(make()), rtol=0, atol=1e-5)  # type: ignore[operator]
    model = wrapped.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
    assert not layers(model) and not trainable(model)


def test_a_process_without_the_package_is_told_what_to_install(tmp_path: Path) -> None:
    peft_model().save_pretrained(tmp_path)
    code = f"import peft; peft.PeftConfig.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "pip install lori_dist[peft]" in result.stderr.splitlines()[-1]
    assert isinstance(PeftConfig.from_pretrained(tmp_path), LoriConfig)  # here, where it was imported


def test_another_a_is_refused(tmp_path: Path) -> None:
    peft_model(seed=1).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seed": 2}))
    with pytest.raises(AdapterError, match="checksum"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "rank: got 0"),
        ({"projection_dtype": "float33"}, "projection_dtype"),
        ({"generator": "other"}, "generator"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"lora_alpha": 3, "lori_alpha": 4}, "lora_alpha: got 3, and 4 as lori_alpha"),
        ({"bias": "all"}, "bias: got 'all'"),
        ({"lora_dropout": 1.0}, "lora_dropout: got 1.0"),
        ({"lora_dropout": True}, "lora_dropout: got True"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        LoriConfig(**settings)


def test_masks_that_do_not_fit_change_nothing() -> None:
    wrapped = peft_model(target_modules=["q_proj"])
    before = logits(wrapped)
    masks = {path: torch.ones(b.shape, dtype=torch.bool) for path, b in dense(wrapped).items()}
    path = min(masks)
    for wrong in ({}, {**masks, path: masks[path].float()}, {**masks, path: masks[path][:, :1]}):
        with pytest.raises(AdapterError, match=path.replace(".", r"\.")):
            sparsify(wrapped, wrong)
    assert torch.equal(logits(wrapped), before)


# --- rows of one batch with different adapters ----------------------------------------------------------------------


TOKENS = torch.arange(1, 25).view(2, 12)


def two_adapters() -> PeftModel:
    wrapped = peft_model(seed=1)
    wrapped.add_adapter("other", LoriConfig(r=3, seed=2, target_modules=["q_proj", "down_proj"]))
    return fill(wrapped, "other", 0.5)


def by_one(wrapped: PeftModel, name: str, run: object) -> torch.Tensor:
    """What all rows give with one adapter."""
    if name == "__base__":
        with wrapped.disable_adapter():
            return run()  # type: ignore[operator, no-any-return]
    wrapped.set_adapter(name)
    result = run()  # type: ignore[operator]
    wrapped.set_adapter("default")
    return result  # type: ignore[no-any-return]


@pytest.mark.parametrize("names", [["default", "__base__"], ["other", "default"], ["__base__", "other"]])
def test_each_row_meets_its_own_adapter(names: list[str]) -> None:
    wrapped = two_adapters()
    with torch.no_grad():
        mixed = wrapped(input_ids=TOKENS, adapter_names=names).logits
    for row, name in enumerate(names):
        alone = by_one(wrapped, name, lambda: logits(wrapped))
        torch.testing.assert_close(mixed[row], alone[row], rtol=0, atol=1e-5)
        if name == "__base__":
            assert torch.equal(mixed[row], alone[row])
    assert torch.equal(logits(wrapped), by_one(wrapped, "default", lambda: logits(wrapped)))  # the hooks are gone


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_with_an_adapter_for_each_row(more: dict[str, int]) -> None:
    wrapped, names = two_adapters(), ["other", "__base__"]
    arguments = {"input_ids": TOKENS, "max_new_tokens": 5, "do_sample": False, **more}
    mixed = wrapped.generate(**arguments, adapter_names=names)
    repeats = len(mixed) // 2
    for row, name in enumerate(names):
        alone = by_one(wrapped, name, lambda: wrapped.generate(**arguments))
        rows = slice(row * repeats, (row + 1) * repeats)
        assert torch.equal(mixed[rows], alone[rows])
    assert not torch.equal(mixed, wrapped.generate(**arguments))


def test_names_that_cannot_be_met_are_refused() -> None:
    wrapped = two_adapters()
    for names, wanted in (
        (["nope", "other"], "unknown adapter 'nope'"),
        (["other"], "for 1 rows"),
        ("other", "a list"),
    ):
        with pytest.raises(AdapterError, match=wanted):
            wrapped(input_ids=TOKENS, adapter_names=names)
    with pytest.raises(AdapterError, match="training mode"):
        wrapped.train()(input_ids=TOKENS, adapter_names=["other", "other"])
    wrapped.eval().merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        wrapped(input_ids=TOKENS, adapter_names=["other", "other"])


# --- settings that LoRA has too --------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", None, r".*\.[qk]_proj", ["q_proj"], ["model.layers.1.mlp.up_proj"]])
def test_layers_to_transform_counts_however_targets_are_named(targets: object) -> None:
    wrapped = peft_model(target_modules=targets, layers_to_transform=[1])
    assert {layer.path.split(".")[2] for layer in layers(wrapped)} == {"1"}
    everywhere = [layer.path for layer in layers(peft_model(target_modules=targets))]
    assert [layer.path for layer in layers(wrapped)] == [path for path in everywhere if ".1." in path]


def test_excluded_modules_are_no_targets() -> None:
    for excluded in (["q_proj", "mlp.up_proj"], r".*\.(q|up)_proj"):
        paths = {layer.path for layer in layers(peft_model(exclude_modules=excluded))}
        assert len(paths) == 10 and not any(path.endswith(("q_proj", "up_proj")) for path in paths)


def test_no_targets_are_all_linear_layers() -> None:
    assert [layer.path for layer in layers(peft_model(target_modules=None))] == [
        layer.path for layer in layers(peft_model())
    ]


def test_alpha_has_the_name_that_lora_has() -> None:
    assert LoriConfig(lora_alpha=3).spec() == LoriConfig(lori_alpha=3).spec() != LoriConfig().spec()
    config = LoriConfig(lora_alpha=3, bias="none", lora_dropout=0.1, target_modules=["q_proj"])
    assert config.to_dict()["lori_alpha"] == 3
    assert dataclasses.replace(config, lori_alpha=5.0).spec().alpha == 5.0


def test_dropout_is_that_of_lora() -> None:
    """The same masks at the same places: LoRA with our A, and values in B, has the same loss and gradients."""
    targets, dropout = ["q_proj", "down_proj"], 0.3
    ours = peft_model(target_modules=targets, lora_dropout=dropout, lori_alpha=8.0).train()
    theirs = get_peft_model(
        tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=dropout)
    ).train()
    deltas = {layer.path: layer.lori_delta["default"] for layer in layers(ours)}
    with torch.no_grad():
        for path, delta in deltas.items():
            layer = theirs.get_submodule(f"base_model.model.{path}")
            layer.lora_A["default"].weight.copy_(delta.a())
            layer.lora_B["default"].weight.copy_(delta.values.view(-1, 4))
    losses = []
    for model in (ours, theirs, ours):
        model.zero_grad()
        torch.manual_seed(5)
        losses.append(model(input_ids=TOKENS, labels=TOKENS).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert torch.equal(losses[0], losses[2])
    for path, delta in deltas.items():
        wanted = theirs.get_submodule(f"base_model.model.{path}").lora_B["default"].weight.grad
        torch.testing.assert_close(delta.values.grad.view(-1, 4), wanted, rtol=1e-4, atol=1e-6)
    torch.manual_seed(6)
    assert not torch.equal(ours(input_ids=TOKENS, labels=TOKENS).loss, losses[0])
    assert torch.equal(logits(ours.eval()), logits(ours))


def test_input_of_another_dtype_is_cast_unless_told_otherwise() -> None:
    wrapped = peft_model(tiny_llama(), target_modules=["q_proj"])
    layer = layers(wrapped)[0]
    layer.base_layer = _Wide(layer.base_layer)
    x = torch.randn(2, 36, dtype=torch.float64)
    cast = layer(x) - layer.base_layer(x)
    with disable_input_dtype_casting(wrapped):
        exact = layer(x) - layer.base_layer(x)
    wanted = (x @ layer.get_delta_weight("default").double().t()).float()
    assert exact.dtype == cast.dtype == torch.float32
    assert not torch.equal(exact, cast)
    torch.testing.assert_close(exact, wanted, rtol=1e-6, atol=1e-6)


class _Wide(nn.Linear):
    """A layer that takes any input, as those do whose hooks cast it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())


# --- what must not be merged or loaded -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_weight_is_not_merged() -> None:
    wrapped = peft_model(tiny_llama(tied=True), target_modules=["lm_head", "q_proj"])
    before = logits(wrapped)
    for merge in (wrapped.merge_and_unload, wrapped.merge_adapter):
        with pytest.raises(AdapterError, match=r"lm_head: its weight is tied \(model\.embed_tokens\.weight, lm_head"):
            merge()
    assert torch.equal(logits(wrapped), before)
    peft_model(tiny_llama(tied=True), target_modules=["q_proj"]).merge_and_unload()


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize(
    "fields",
    [{"checksums": {}}, {"checksums": {"model.layers.9.mlp.up_proj": "0" * 16}}, {"checksums": {}, "shapes": {}}],
)
def test_a_folder_without_the_checksums_of_its_modules_is_refused(
    tmp_path: Path, density: float, fields: dict[str, object]
) -> None:
    peft_model(density=density).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    for more in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        with pytest.raises(AdapterError, match="no checksum of its A"):
            PeftModel.from_pretrained(tiny_llama(), tmp_path, **more)
    with pytest.raises(AdapterError, match="no checksum of its A"):
        tiny_llama().load_adapter(str(tmp_path))


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_itself_loads_a_folder(tmp_path: Path, density: float, dtype: torch.dtype) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_llama().to(dtype).save_pretrained(base)
    wrapped = peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), density=density)
    wrapped.save_pretrained(folder)
    wanted = logits(wrapped)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    loaded.load_adapter(str(folder))
    assert torch.equal(logits(loaded), wanted)
    named = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)  # which finds the base by the folder
    assert torch.equal(logits(named), wanted)
    named.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), tmp_path / "again")
    assert torch.equal(logits(again), wanted)


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_transformers_itself_loads_a_folder_to_train_on(tmp_path: Path, density: float) -> None:
    wrapped = peft_model(density=density)
    wrapped.save_pretrained(tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path), is_trainable=True)
    assert torch.equal(logits(loaded), logits(wrapped))
    kept = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    assert sum(parameter.numel() for parameter in kept.values()) == to_adapter(wrapped).kept
    before = {name: parameter.detach().clone() for name, parameter in kept.items()}
    ids = torch.arange(6).view(1, 6)
    loaded(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(kept.values(), lr=0.1).step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in kept.items())


def test_positions_that_a_reader_left_out_are_missed(tmp_path: Path) -> None:
    peft_model(density=0.1).save_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), PeftConfig.from_pretrained(tmp_path)).eval()
    with pytest.raises(AdapterError, match="positions of its kept entries were not loaded"):
        logits(model)


def test_a_saved_folder_has_a_model_card(tmp_path: Path) -> None:
    wrapped = peft_model(density=0.1)
    wrapped.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "More Information Needed" not in card and "library_name: peft" in card
    assert f"{to_adapter(wrapped).kept} of 2,048 entries" in card and "import lori_dist.integrations.peft_tuner" in card
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    wrapped.save_pretrained(tmp_path)
    assert "My own words." in (tmp_path / "README.md").read_text()


HOSTILE: dict[str, list[object]] = {
    "r": ["4", True, 0, None, [], 10**400],
    "lori_alpha": ["4", True, 0, None, -1.0, {}],
    "seed": ["0", True, -1, 2**64, 0.5, None],
    "projection_dtype": ["float33", "int8", "load", 5, None, "float16"],
    "checksums": [0, [], "x", {"model.layers.0.mlp.up_proj": 5}],
    "shapes": [0, [], {"model.layers.0.mlp.up_proj": [1]}, {"model.layers.0.mlp.up_proj": [True, 2**70]}],
    "kept": [0, [], {"model.layers.0.mlp.up_proj": -1}, {"model.layers.0.mlp.up_proj": True}],
    "target_modules": [5, [5], [[]], "(a+)+", ["q_proj"]],
    "exclude_modules": [5, [[]], "(.*)*x", ["q_proj"]],
    "layers_to_transform": [True, "1", 0.5, ["1"], 0],
    "modules_to_save": [5, [None], ["(a+)+"]],
    "lora_dropout": ["0", True, 1, None],
    "bias": ["all", None, 0],
    "generator": ["other", 0, None],
}


def test_a_configuration_that_somebody_else_wrote_is_refused_or_loads_right(tmp_path: Path) -> None:
    wrapped = peft_model(density=0.1, target_modules=["q_proj", "up_proj"])
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for key, values in HOSTILE.items():
        for value in values:
            file.write_text(json.dumps({**config, key: value}))
            with pytest.raises(AdapterError):
                PeftModel.from_pretrained(tiny_llama(), tmp_path)
                pytest.fail(f"{key}: {value!r} was taken")
