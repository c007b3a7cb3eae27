"""What a module's path says, wherever modules are grouped by it."""

import pytest
import torch

from lori_dist.adapter import targets
from lori_dist.adapter.adapter import Adapter, Block, Entries
from lori_dist.adapter.projection import checksum, projection
from lori_dist.cluster import search
from lori_dist.describe import _densities
from lori_dist.interference import interference
from lori_dist.masks import per_layer, per_projection
from lori_dist.merges import _weights

FUSED = [
    f"model.layers.{layer}.mlp.experts.{kind}.{expert}"
    for layer in range(2)
    for kind in ("gate_up_proj", "down_proj")
    for expert in range(2)
]


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers.3", "q_proj")),
        ("model.layers.3.mlp.experts.7.up_proj", ("model.layers.3", "up_proj")),
        ("model.layers.3.mlp.experts.down_proj.7", ("model.layers.3", "down_proj")),
        ("model.layers.3.block_sparse_moe.experts.7.w1", ("model.layers.3", "w1")),
        ("experts.down_proj.7", ("", "down_proj")),
        ("moe.experts.7.down_proj", ("", "down_proj")),
        ("encoder.block.3.layer.0.SelfAttention.q", ("encoder.block.3", "q")),
        ("classifier.2", ("classifier.2", "classifier")),
        ("3.linear", ("3", "linear")),
        ("3", ("3", "3")),
        ("lm_head", ("", "lm_head")),
    ],
)
def test_layer_and_kind(module: str, found: tuple[str, str]) -> None:
    assert targets.place(module) == found == (targets.layer(module), targets.kind(module))


def test_every_kind_of_an_expert_has_the_density() -> None:
    generator = torch.Generator().manual_seed(0)
    b = {
        module: torch.randn(8, 4, generator=generator) * (10 if targets.kind(module) == "gate_up_proj" else 1)
        for module in FUSED
    }
    kept = per_projection.mask(b, density=0.25)
    for kind in ("gate_up_proj", "down_proj"):
        assert sum(int(kept[module].sum()) for module in FUSED if targets.kind(module) == kind) == 32
    kept = per_layer.mask(b, density=0.25)
    for layer in ("model.layers.0", "model.layers.1"):
        assert sum(int(kept[module].sum()) for module in FUSED if targets.layer(module) == layer) == 32


@pytest.mark.parametrize(
    ("pattern", "number_of_fitting"),
    [("1", 0), ("layers.1", 4), ("down_proj.1", 2), ("down_proj", 4), ("gate_up_proj.0", 2), ("1.mlp", 4), ("0.1", 0)],
)
def test_weights_of_an_expert_fit_no_layer(pattern: str, number_of_fitting: int) -> None:
    assert sum(_weights.fits(pattern, module) for module in FUSED) == number_of_fitting
    assert bool(list(_weights.unmatched({pattern: 1.0}, FUSED))) == (number_of_fitting == 0)


def test_a_number_is_the_path_of_a_module_that_has_no_other() -> None:
    assert _weights.fits("0", "0.linear") and _weights.fits("0", "0") and not _weights.fits("0", "1.0")


def test_weights_that_were_searched_for_by_kind() -> None:
    kinds = list(dict.fromkeys(map(targets.kind, FUSED)))
    along = search.axes(["one"], {"one": kinds})
    weight = search.weights((0.2, 0.9), along)["one"]
    assert weight == {"gate_up_proj": 0.2, "down_proj": 0.9}
    assert [_weights.of(weight, module, 0.5) for module in FUSED] == [0.2, 0.2, 0.9, 0.9] * 2


def made(modules: list[str]) -> Adapter:
    entries = {module: Entries(index=None, values=torch.ones(8)) for module in modules}
    sums = {module: checksum(projection(1, module, 2, 3)) for module in modules}
    one = Block(name="one", seed=1, rank=2, alpha=2.0, dtype=torch.float32, entries=entries, checksums=sums)
    return Adapter(shapes=dict.fromkeys(modules, (4, 3)), blocks=(one,), targets=tuple(modules))


def test_tables_and_report_have_a_column_for_each_kind() -> None:
    titles, rows = _densities(made(FUSED))
    assert titles == ("layer", "gate_up_proj", "down_proj", "all")
    assert [row[0] for row in rows] == ["0", "1", "all"]
    assert interference([made(FUSED)])["projections"] == ["gate_up_proj", "down_proj"]
    titles, rows = _densities(made(["encoder.layers.0.q_proj", "decoder.layers.0.q_proj", "lm_head"]))
    assert [row[0] for row in rows] == ["encoder.layers.0", "decoder.layers.0", "-", "all"]
