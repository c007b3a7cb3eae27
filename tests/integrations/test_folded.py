"""The base model with the adapter in its weights."""

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lori_dist import config
from lori_dist.adapter.adapter import Adapter, Entries
from lori_dist.benchmarks._traffic import process_bytes
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.evaluation._rehearsal import stand_in
from lori_dist.formats import native
from lori_dist.integrations import folded as integration
from lori_dist.integrations.folded import export_folded
from lori_dist.merges import merge
from lori_dist.tensors import Stored, stored
from lori_dist.training.model import identity
from lori_dist.training.weights import skeleton
from tests.distributed import run_distributed
from tests.integrations.made import adapted_logits, logits, trained
from tests.models import tiny_gpt2, tiny_llama
from tests.tokenizers import save, tiny_tokenizer


def folded(adapter: Adapter, base: Path, folder: Path) -> PreTrainedModel:
    export_folded(str(base), adapter, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_the_logits_are_those_of_base_and_adapter(
    tmp_path: Path, make: Callable[[], PreTrainedModel], density: float
) -> None:
    base = save(make(), tmp_path / "base")
    adapter = trained(make(), density=density, base=identity(config.Model(path=str(base))))
    model = folded(adapter, base, tmp_path / "out")
    torch.testing.assert_close(logits(model), adapted_logits(make(), adapter), rtol=0, atol=1e-5)
    assert (logits(model) - logits(make())).abs().max() > 1e-2


def test_a_folded_export_never_holds_the_base(tmp_path: Path) -> None:
    settings = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8
    )
    with torch.device("meta"):
        made = LlamaForCausalLM(settings)
    made.to_empty(device="cpu")
    for parameter in made.parameters():
        parameter.data.fill_(0.01)
    base = save(made, tmp_path / "base")
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert size > 250_000_000
    del made
    [grown] = run_distributed(growth_of_export, base, tmp_path, world_size=1, process_group=False)
    assert grown < 0.5 * size  # a few tensors, and what the first product and the first file take


def growth_of_export(base: Path, folder: Path) -> int:
    """Bytes by which the process grows at most while it exports a base with an adapter of all its layers."""
    run = config.validate(
        {
            "name": "run",
            "model": {"path": str(base)},
            "tasks": {"t": {"train": __file__, "test": __file__}},
            "adapter": {"rank": 4, "density": 0.1},
            "train": {"steps": 1},
        }
    )
    adapter = stand_in(run, skeleton(run.model)[0], 1)
    entries = {
        path: Entries(index=one.index, values=one.values + 0.1) for path, one in adapter.blocks[0].entries.items()
    }
    adapter = dataclasses.replace(adapter, blocks=(dataclasses.replace(adapter.blocks[0], entries=entries),))
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    export_folded(str(base), adapter, folder / "out")
    return process_bytes("VmHWM") - before


@pytest.mark.parametrize("method", ["concat", "svd", "ties"])
def test_merges_are_folded(tmp_path: Path, method: str) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    parts = [trained(tiny_llama(), f"task{seed}", seed=seed) for seed in range(2)]
    adapter = merge(parts, method=method, weights=[0.5, -0.5])
    model = folded(adapter, base, tmp_path / "out")
    torch.testing.assert_close(logits(model), adapted_logits(tiny_llama(), adapter), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_base_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save(tiny_llama().to(dtype), tmp_path / "base")
    adapter = trained(tiny_llama(), alpha=1.0)
    model = folded(adapter, base, tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    exact = adapted_logits(tiny_llama().to(dtype).float(), adapter)
    change = (exact - logits(tiny_llama())).abs().max()
    assert (logits(model) - exact).abs().max() < 0.1 * change


def test_the_tokenizer_and_the_configuration_come_along(tmp_path: Path) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    model = folded(trained(tiny_llama()), base, tmp_path / "out")
    text = "add 3, 4"
    before, after = (AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (base, tmp_path / "out"))
    assert before == after
    assert model.config.hidden_size == 36
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    adapter = dataclasses.replace(trained(tiny_llama()), base={"weights": "0123"})
    with pytest.raises(AdapterError, match=r"base: has the weights .*, the adapter was trained on 0123; give the base"):
        export_folded(str(base), adapter, tmp_path / "out")
    other = save(tiny_gpt2(), tmp_path / "other")
    with pytest.raises(
        AdapterError, match=r"^model\.layers\.0\S*: .* which the model does not have; .* are called c_attn"
    ):
        export_folded(str(other), trained(tiny_llama()), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"model\.path: there is no config\.json in '.*none'"):
        export_folded(str(tmp_path / "none"), trained(tiny_llama()), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]


def test_a_tied_weight_is_refused(tmp_path: Path) -> None:
    base = save(tiny_llama(tied=True), tmp_path / "base")
    adapter = trained(tiny_llama(tied=True), targets=("lm_head", "q_proj"))
    with pytest.raises(AdapterError, match=r"lm_head: its weight is tied to model\.embed_tokens\.weight"):
        export_folded(str(base), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(AdapterError, match="out: is not empty"):
        export_folded("no model", trained(tiny_llama()), tmp_path / "out")


def contents(folder: Path) -> dict[str, dict[str, Stored]]:
    """Weight file -> its tensors, with the file and folder they lie in taken out."""
    return {path.name: stored(path) for path in sorted(folder.glob("*.safetensors"))}


def laid_out(folder: Path) -> dict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]]:
    return {
        name: [(key, where.dtype, where.shape) for key, where in tensors.items()]
        for name, tensors in contents(folder).items()
    }


SOME = ("model.layers.1.*", "model.layers.0.self_attn.v_proj")


@pytest.mark.parametrize(
    ("make", "targets"),
    [(tiny_llama, SOME), (functools.partial(tiny_llama, tied=True), SOME), (tiny_gpt2, ("transformer.h.0.*",))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_names_dtypes_and_other_files_stay(
    tmp_path: Path, make: Callable[[], PreTrainedModel], targets: tuple[str, ...], dtype: torch.dtype
) -> None:
    base = tmp_path / "base"
    make().to(dtype).save_pretrained(base, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(base)
    (base / "LICENSE").write_text("yours")
    (base / "pytorch_model.bin").write_text("another copy of the weights")
    adapter = trained(make(), targets=targets)
    model = folded(adapter, base, tmp_path / "out")
    assert len(laid_out(base)) >= 3
    assert laid_out(tmp_path / "out") == laid_out(base)
    weights = {path.name for path in base.glob("*.safetensors")}
    others = {path.name for path in base.iterdir()} - weights - {"pytorch_model.bin"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == others | weights | {"README.md"}
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()
    assert all((tmp_path / "out" / name).read_bytes() == (base / name).read_bytes() for name in others)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    assert model.dtype == plain.dtype == dtype
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == bool(
        model.config.tie_word_embeddings
    )
    for name, weight in plain.named_parameters():
        path, changed = name.removesuffix(".weight"), model.get_parameter(name)
        if path in adapter.shapes and adapter.blocks[0].entries.get(path) is not None:
            update = adapter.delta(path)
            exact = weight.float() + (update.t() if make is tiny_gpt2 else update)
            torch.testing.assert_close(changed.float(), exact.to(dtype).float(), rtol=2**-7, atol=1e-6)
            assert not torch.equal(changed, weight)
        else:
            assert torch.equal(changed, weight)


def test_a_failure_in_the_middle_leaves_no_folder(tmp_path: Path) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    path = tmp_path / "adapter.safetensors"
    native.save(trained(tiny_llama()), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterError, match=r"adapter\.safetensors: B of .* does not match its digest"):
        export_folded(str(base), native.open_lazy(path), tmp_path / "out")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["adapter.safetensors", "base"]


MEASURE = """
import sys
from pathlib import Path
from lori_dist.formats import native
from lori_dist.integrations import folded as integration
from lori_dist.integrations.folded import export_folded

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

base, adapter, out = map(Path, sys.argv[1:])
export_folded(str(base), native.open_lazy(adapter), out / "first")
before = peak()
large = base.with_name("large")
export_folded(str(large), native.open_lazy(adapter.with_name("large.safetensors")), out / "second")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_a_piece_not_the_model(tmp_path: Path) -> None:
    for name, hidden, layers in (("base", 64, 1), ("large", 1024, 4)):
        settings = LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
        )
        model = LlamaForCausalLM(settings)
        save(model, tmp_path / name)
        path = tmp_path / ("adapter.safetensors" if name == "base" else "large.safetensors")
        native.save(trained(model, rank=2), path)
    (tmp_path / "out").mkdir()
    arguments = [str(tmp_path / name) for name in ("base", "adapter.safetensors", "out")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 250e6
    assert int(done.stdout) < 80e6


def test_a_folded_model_that_is_not_base_plus_update_is_never_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, summed = save(tiny_llama(), tmp_path / "base"), integration._summed
    monkeypatch.setattr(integration, "_summed", lambda *given: (rows + 1e-3 for rows in summed(*given)))
    with pytest.raises(AdapterError, match=r"q_proj: row \d+ of its weight is not the base's plus the update"):
        export_folded(str(base), trained(tiny_llama()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
