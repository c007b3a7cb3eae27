"""Attaching, detaching and folding on real model classes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lori_dist import Adapter, AdapterError, Spec, adapted, attach, detach, extract, fold, trainable, unfold
from lori_dist.adapter.attach import projection_checksums
from lori_dist.adapter.projection import checksum, projection
from lori_dist.merges import merge
from tests.models import tiny_gpt2, tiny_llama

SPEC = Spec(rank=4, alpha=8.0, seed=11)
IDS = torch.tensor([[1, 5, 9, 30, 7], [1, 40, 41, 42, 2]])
models = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for values in trainable(model).values():
        values.data.normal_(generator=generator)


def masks(model: nn.Module, density: float = 0.2) -> dict[str, Tensor]:
    """Random masks; the first module keeps nothing, the second everything."""
    generator = torch.Generator().manual_seed(6)
    layers = attach(model, SPEC)
    shapes = {path: (layer.deltas[0].out_features, SPEC.rank) for path, layer in layers.items()}
    detach(model)
    chosen = {path: torch.rand(shape, generator=generator) < density for path, shape in shapes.items()}
    for path, kept in zip(chosen, (False, True), strict=False):
        chosen[path] = torch.full(shapes[path], kept)
    return chosen


@models
def test_a_fresh_adapter_changes_nothing_and_freezes_the_base(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = logits(model)
    attach(model, SPEC)
    assert torch.equal(logits(model), before)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(v) for v in trainable(model).values()}


@models
def test_detach_gives_the_model_back(make: Callable[[], nn.Module]) -> None:
    model = make()
    before, names = logits(model), [name for name, _ in model.named_modules()]
    attach(model, SPEC)
    randomise(model)
    assert not torch.allclose(logits(model), before)
    detach(model)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == names


@models
def test_an_extracted_adapter_attached_to_another_copy_gives_equal_logits(make: Callable[[], nn.Module]) -> None:
    model, other = make(), make()
    attach(model, SPEC, masks=masks(model))
    randomise(model)
    adapter = extract(model, name="task", base={"name": "tiny"})
    attach(other, adapter)
    assert torch.equal(logits(other), logits(model))
    assert not any(parameter.requires_grad for parameter in other.parameters())
    assert adapter.kept == sum(values.numel() for values in trainable(model).values())
    assert adapter.base == {"name": "tiny"}


@models
def test_extracting_does_not_alias_the_model(make: Callable[[], nn.Module]) -> None:
    model = make()
    attach(model, SPEC)
    randomise(model)
    adapter = extract(model, name="task")
    path, values = next(iter(trainable(model).items()))
    kept = values.detach().clone()
    values.data.zero_()
    assert torch.equal(adapter.blocks[0].entries[path].values, kept)


@models
def test_fold_bakes_in_and_unfold_takes_out(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = logits(model)
    attach(model, SPEC, masks=masks(model))
    randomise(model)
    with_adapter = logits(model)
    fold(model)
    fold(model)  # once more changes nothing
    assert torch.allclose(logits(model), with_adapter, atol=1e-5)
    unfold(model)
    assert torch.allclose(logits(model), with_adapter, atol=1e-5)
    detach(model)
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_what_was_folded_is_taken_out_whatever_the_values_are_then() -> None:
    model = tiny_llama()
    before = logits(model)
    attach(model, SPEC)
    randomise(model)
    fold(model)
    randomise(model)
    unfold(model)
    detach(model)
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_an_update_is_rounded_once_into_a_narrow_weight() -> None:
    """Each of them alone is lost against the weight's last bit; their sum is not."""
    base = nn.Linear(4, 1, bias=False, dtype=torch.bfloat16)
    base.weight.data.fill_(1.0)
    model = nn.ModuleDict({"layer": base})
    attach(model, Spec(rank=4, alpha=4.0, seed=0, targets="layer"))
    one = extract(model, name="one")
    a = projection(0, "layer", 4, 4)
    values = torch.linalg.solve(a.t(), torch.full((4,), 2.0**-9))
    entries = {"layer": dataclasses.replace(one.blocks[0].entries["layer"], values=values)}
    blocks = (dataclasses.replace(one.blocks[0], entries=entries),) * 4
    detach(model)
    attach(model, dataclasses.replace(one, blocks=blocks))
    fold(model)
    assert torch.equal(base.weight, torch.full((1, 4), 1.0 + 2.0**-7, dtype=torch.bfloat16))


@models
def test_folded_and_detached_is_a_plain_model_with_the_update(make: Callable[[], nn.Module]) -> None:
    model = make()
    attach(model, SPEC)
    randomise(model)
    with_adapter = logits(model)
    fold(model)
    detach(model)
    assert not adapted(model)
    assert torch.allclose(logits(model), with_adapter, atol=1e-5)


def test_all_linear_leaves_the_output_embedding_alone() -> None:
    paths = set(attach(tiny_llama(), SPEC))
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert paths == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in names}


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("q_proj",), 2),
        (("self_attn.q_proj", "v_proj"), 4),
        (("model.layers.1.mlp.up_proj",), 1),
        (("model.layers.*.mlp.*",), 6),
        (("*_proj",), 14),
        (("q_proj", "model.layers.0.*.q_proj"), 2),
        (("lm_head",), 1),
        ("k_proj", 2),
    ],
)
def test_targets_by_name_path_and_pattern(targets: str | tuple[str, ...], count: int) -> None:
    assert len(attach(tiny_llama(), Spec(rank=2, alpha=2.0, seed=0, targets=targets))) == count


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_porj", "'q_porj' matches nothing; .*down_proj, gate_proj, .*Did you mean 'q_proj'"),
        ("model.layers.7.*", "matches nothing; the model's linear layers are called"),
        ("mlp", "'mlp' is a LlamaMLP, not a linear layer"),
        ("embed_tokens", "'embed_tokens' is a Embedding, not a linear layer"),
    ],
)
def test_a_target_that_fits_nothing_lists_what_there_is(target: str, message: str) -> None:
    model = tiny_llama()
    with pytest.raises(AdapterError, match=message):
        attach(model, Spec(rank=2, alpha=2.0, seed=0, targets=("q_proj", target)))
    assert not adapted(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_inside_or_around_is_refused() -> None:
    model, wrapper = tiny_llama(), nn.ModuleDict()
    wrapper["inner"] = model
    attach(model.model, SPEC)
    for other in (model, wrapper, model.model.layers[0]):
        with pytest.raises(AdapterError, match="an adapter is attached already"):
            attach(other, SPEC)
    detach(model.model)
    attach(wrapper, SPEC)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
def test_an_adapter_of_peft_is_refused() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"lora_A: is a LoRA adapter of PEFT; merge_and_unload\(\)"):
        attach(model, SPEC)


def test_an_adapter_of_the_inner_model_or_with_a_pattern_for_a_name_does_not_fit() -> None:
    model = tiny_llama()
    attach(model.model, SPEC)
    adapter = extract(model.model, name="inner")
    detach(model.model)
    with pytest.raises(AdapterError, match=r"^layers\.0\.self_attn\.q_proj: .* which the model does not have"):
        attach(model, adapter)
    path, shape = next(iter(adapter.shapes.items()))
    hostile = dataclasses.replace(adapter, shapes={"*" + path: shape})
    with pytest.raises(AdapterError, match=r"^\*layers\.0\.self_attn\.q_proj: .* which the model does not have"):
        attach(model, hostile)


def test_a_trained_adapter_needs_a_base_with_data() -> None:
    model = tiny_llama()
    attach(model, SPEC)
    adapter = extract(model, name="t")
    with pytest.raises(AdapterError, match="is on the meta device, where a trained adapter has no values; load"):
        attach(tiny_llama().to("meta"), adapter)


def test_an_adapter_that_came_ready_made_is_not_extracted() -> None:
    model = tiny_llama()
    attach(model, SPEC)
    adapter = extract(model, name="t")
    detach(model)
    attach(model, adapter)
    with pytest.raises(AdapterError, match="trained before; save that one itself"):
        extract(model, name="u")


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"targets": ()}, {"targets": ("",)}, {"projection": "lost"}],
)
def test_a_spec_that_can_be_no_adapter_is_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(AdapterError, match=f"^{name}: got .*; "):
        dataclasses.replace(SPEC, **wrong)


def test_a_second_adapter_is_refused() -> None:
    model = tiny_llama()
    attach(model, SPEC)
    with pytest.raises(
        AdapterError, match=r"^model.layers.0.self_attn.q_proj: an adapter is attached already; detach it"
    ):
        attach(model, SPEC)
    detach(model)
    attach(model, SPEC)


def test_detach_without_an_adapter_is_refused() -> None:
    with pytest.raises(AdapterError, match="no adapter is attached"):
        detach(tiny_llama())


def test_a_layer_used_in_two_places_is_refused_by_both_names() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared})
    with pytest.raises(AdapterError, match="first and second are one and the same layer"):
        attach(model, SPEC)


def test_a_tied_output_embedding_is_adapted_without_touching_the_embedding_and_not_folded() -> None:
    model = tiny_llama(tied=True)
    before = model.model.embed_tokens.weight.detach().clone()
    attach(model, Spec(rank=2, alpha=2.0, seed=0, targets=("lm_head", "q_proj")))
    randomise(model)
    with pytest.raises(AdapterError, match=r"tied to .*embed_tokens\.weight"):
        fold(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_layer_of_an_unknown_kind_is_refused() -> None:
    class Quantised(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).round()

    with pytest.raises(AdapterError, match="0 is a Quantised"):
        attach(nn.Sequential(Quantised(4, 4)), dataclasses.replace(SPEC, targets=("0",)))


def test_masks_must_fit() -> None:
    model = tiny_llama()
    given = masks(model)
    path = next(iter(given))
    with pytest.raises(AdapterError, match="masks: no mask for"):
        attach(model, SPEC, masks={name: mask for name, mask in given.items() if name != path})
    with pytest.raises(AdapterError, match=r"wanted torch.bool \(40, 4\)"):
        attach(model, SPEC, masks={**given, path: torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(AdapterError, match="a mask for lm_head, which is not a target"):
        attach(model, SPEC, masks={**given, "lm_head": torch.ones(4, 4, dtype=torch.bool)})


def trained() -> Adapter:
    model = tiny_llama()
    attach(model, SPEC)
    randomise(model)
    return extract(model, name="task")


def test_an_adapter_of_another_shape_is_refused() -> None:
    adapter = trained()
    shapes = {path: (rows + 1, columns) for path, (rows, columns) in adapter.shapes.items()}
    with pytest.raises(AdapterError, match=r"trained on a weight of shape \(41, 36\), this model's is \(40, 36\)"):
        attach(tiny_llama(), _replaced(adapter, shapes=shapes))


def test_a_recomputed_a_folds_and_extracts_as_a_cached_one() -> None:
    cached, recomputed = tiny_llama(), tiny_llama()
    kept = masks(cached)
    attach(cached, SPEC, masks=kept)
    attach(recomputed, dataclasses.replace(SPEC, projection="recomputed"), masks=kept)
    for model in (cached, recomputed):
        randomise(model)
    assert not any("projection" in name for name, _ in recomputed.named_buffers())
    assert projection_checksums(recomputed) == projection_checksums(cached)
    assert torch.allclose(logits(recomputed), logits(cached), atol=1e-6)
    one, other = (extract(model, name="task") for model in (cached, recomputed))
    assert one.blocks[0].checksums == other.blocks[0].checksums
    assert all(torch.equal(one.delta(path), other.delta(path)) for path in one.shapes)
    with_adapter = logits(recomputed)
    fold(recomputed)
    assert torch.allclose(logits(recomputed), with_adapter, atol=1e-5)
    unfold(recomputed)
    detach(recomputed)
    attach(recomputed, other)
    assert torch.allclose(logits(recomputed), with_adapter, atol=1e-5)


def test_an_adapter_whose_a_comes_out_different_is_refused() -> None:
    adapter = trained()
    block = _replaced(adapter.blocks[0], seed=12)
    with pytest.raises(AdapterError, match="A made from seed 12 has checksum"):
        attach(tiny_llama(), _replaced(adapter, blocks=(block,)))


def test_checksums_are_those_of_the_projection() -> None:
    adapter = trained()
    path = "model.layers.1.mlp.down_proj"
    assert adapter.blocks[0].checksums[path] == checksum(projection(11, path, 4, 52))


def test_the_delta_of_an_adapter_is_what_it_adds_to_the_weight() -> None:
    model = tiny_llama()
    adapter = trained()
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    attach(model, adapter)
    fold(model)
    assert torch.allclose(
        model.model.layers[0].mlp.up_proj.weight, weight + adapter.delta("model.layers.0.mlp.up_proj"), atol=1e-6
    )


def _replaced(value: Any, **changes: object) -> Any:
    return dataclasses.replace(value, **changes)


def merged(model: nn.Module) -> Adapter:
    """Two tasks, merged to a computed A and B, of a lower rank in the narrow modules."""
    tasks = []
    for seed in range(2):
        attach(model, dataclasses.replace(SPEC, seed=seed))
        randomise(model)
        tasks.append(extract(model, name=f"task{seed}"))
        detach(model)
    return merge(tasks, method="svd", weights=[0.5, -1.0])


@models
def test_a_stored_a_is_attached_folded_and_detached(make: Callable[[], nn.Module]) -> None:
    model = make()
    adapter, before = merged(model), logits(model)
    assert [block.seed for block in adapter.blocks] == [None]
    layers = attach(model, adapter)
    with_adapter = logits(model)
    assert not torch.allclose(with_adapter, before, atol=1e-2)
    for path, layer in layers.items():
        (delta,) = layer.deltas
        assert torch.equal(delta.projection, adapter.blocks[0].projections[path])
        assert torch.allclose(delta.weight(delta.values), adapter.delta(path), atol=1e-5)
    assert not any(".projection" in name for name in model.state_dict())
    fold(model)
    assert torch.allclose(logits(model), with_adapter, atol=1e-4)
    detach(model)


def test_a_stored_a_survives_casts_and_a_trip_to_meta() -> None:
    model = tiny_llama()
    adapter = merged(model)
    attach(model, adapter)
    model.to(torch.bfloat16)
    model.to("meta")
    model.to_empty(device="cpu")
    for path, layer in adapted(model).items():
        assert torch.equal(layer.deltas[0].projection, adapter.blocks[0].projections[path])


def test_attaching_does_not_alias_a_stored_a() -> None:
    model = tiny_llama()
    adapter = merged(model)
    path, layer = next(iter(attach(model, adapter).items()))
    kept = layer.deltas[0].projection.clone()
    adapter.blocks[0].projections[path].zero_()
    assert torch.equal(layer.deltas[0].projection, kept)


def test_a_stored_a_with_another_checksum_is_refused() -> None:
    model = tiny_llama()
    adapter = merged(model)
    (block,) = adapter.blocks
    path = next(iter(adapter.shapes))
    wrong = dataclasses.replace(block, checksums={**block.checksums, path: "0" * 16})
    with pytest.raises(AdapterError, match=r"its A has checksum \w{16}, the adapter was trained with 0{16}"):
        attach(model, dataclasses.replace(adapter, blocks=(wrong,)))


# --- what was trained before, on the same A --------------------------------------------------------------------------


def trained_on(make: Callable[[], nn.Module], spec: Spec, seed: int) -> Adapter:
    model = make()
    attach(model, spec, masks=masks(model))
    generator = torch.Generator().manual_seed(seed)
    for values in trainable(model).values():
        values.data.normal_(generator=generator)
    return extract(model, name=f"task{seed}")


@models
def test_what_is_trained_is_added_to_what_was_before(make: Callable[[], nn.Module]) -> None:
    before = trained_on(make, SPEC, 1)
    model, wanted = make(), make()
    attach(wanted, before)
    attach(model, SPEC, masks=masks(model), before=before)
    torch.testing.assert_close(logits(model), logits(wanted))
    for values in trainable(model).values():
        values.data.fill_(0.01)
    added = extract(model, name="added")
    both = dataclasses.replace(before, blocks=(*before.blocks, *added.blocks))
    detach(wanted)
    attach(wanted, both)
    torch.testing.assert_close(logits(model), logits(wanted))
    fold(model)
    torch.testing.assert_close(logits(model), logits(wanted), rtol=1e-4, atol=1e-5)


def test_only_the_new_entries_have_gradients_and_those_of_a_sum() -> None:
    before = trained_on(tiny_llama, SPEC, 1)
    model, dense = tiny_llama(), tiny_llama()
    chosen = masks(model)
    attach(model, SPEC, masks=chosen, before=before)
    attach(dense, SPEC)
    with torch.no_grad():
        for path, values in trainable(dense).items():
            entries = before.blocks[0].entries.get(path)
            if entries is not None:
                values.copy_(entries.dense(before.shapes[path][0], SPEC.rank).flatten())
    for one in (model, dense):
        one(IDS, labels=IDS).loss.backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(v) for v in trainable(model).values()}
    for path, values in trainable(model).items():
        wanted = trainable(dense)[path].grad
        assert values.grad is not None and wanted is not None
        torch.testing.assert_close(values.grad, wanted[chosen[path].flatten()], rtol=1e-4, atol=1e-6)


def test_several_blocks_before_are_one_sum() -> None:
    first, second = trained_on(tiny_llama, SPEC, 1), trained_on(tiny_llama, SPEC, 2)
    both = dataclasses.replace(first, blocks=(*first.blocks, *second.blocks))
    model, wanted = tiny_llama(), tiny_llama()
    attach(model, SPEC, before=both)
    attach(wanted, both)
    torch.testing.assert_close(logits(model), logits(wanted))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            dataclasses.replace(SPEC, seed=12),
            "before: task1 has seed 11, what is to be added to it 12; only",
        ),
        (dataclasses.replace(SPEC, rank=2), "before: task1 has rank 4, what is to be added to it 2"),
        (dataclasses.replace(SPEC, alpha=4.0), "before: task1 has scale 2.0, what is to be added to it 1.0"),
        (dataclasses.replace(SPEC, targets=("q_proj",)), r"before: model\.layers\.0\..* there and None here"),
    ],
)
def test_entries_on_another_a_are_no_start(spec: Spec, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(tiny_llama(), spec, before=trained_on(tiny_llama, SPEC, 1))


def test_what_was_before_survives_casts_and_a_trip_to_meta() -> None:
    before = trained_on(tiny_llama, SPEC, 1)
    model = tiny_llama()
    layers = attach(model, SPEC, masks=masks(model), before=before)
    kept = {path: layer.deltas[0].before_values for path, layer in layers.items()}
    model.to(torch.bfloat16)
    for path, layer in layers.items():
        for there in (layer.deltas[0].before_values, layer.deltas[0].to("meta").before_values):
            assert there is None or (kept[path] is not None and torch.equal(there, kept[path]))
