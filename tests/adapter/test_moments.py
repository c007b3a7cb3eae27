"""Moments of what layers read, and the projections that follow from them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lori_dist.adapter import moments
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach, extract
from lori_dist.adapter.matching import match
from lori_dist.adapter.moments import LENGTH, Moments, Watch
from lori_dist.adapter.projection import projection
from lori_dist.errors import AdapterError
from lori_dist.forms import Given
from tests.models import tiny, tiny_llama

ROWS = ((1, 7, 9, 12, 30), (1, 40, 41), (1, 5, 6, 7, 8, 9, 10, 11))


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def watched(model: nn.Module, rows: Sequence[Sequence[int]], *, full_up_to: int = 200, width: int = 4) -> Moments:
    watch = Watch(match(model, "all-linear"), full_up_to=full_up_to, width=width)
    with torch.no_grad(), watch:
        for batch in filter(None, (rows[:2], rows[2:])):
            ids, mask = padded(batch)
            watch.begin(mask.bool())
            model(input_ids=ids, attention_mask=mask)
    return watch.moments()


def by_hand(model: nn.Module, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Row by row, so without padding, in float64."""
    sums: dict[str, Tensor] = {}

    def add(path: str, x: Tensor) -> None:
        flat = x.flatten(0, -2).double()
        sums[path] = sums.get(path, torch.zeros((), dtype=torch.float64)) + flat.t() @ flat

    hooks = [
        layer.register_forward_pre_hook(lambda module, args, path=path: add(path, args[0]))
        for path, layer in match(model, "all-linear").items()
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return {path: one / sum(map(len, rows)) for path, one in sums.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_moments_are_those_of_rows_without_padding_once_for_each_input(kind: str) -> None:
    model = tiny(kind)
    found, wanted = watched(model, ROWS), by_hand(model, ROWS)
    assert found.num_tokens == 16
    assert found.sketched == ()
    for path, one in wanted.items():
        torch.testing.assert_close(found.of_inputs[found.inputs[path]].double(), one, rtol=1e-5, atol=1e-6)
    if kind == "llama":
        block = [path for path in found.of_inputs if ".layers.0." in path]
        assert [path.rpartition(".")[2] for path in block] == ["q_proj", "o_proj", "gate_proj", "down_proj"]
    assert not any(layer._forward_pre_hooks for layer in match(model, "all-linear").values())


def test_an_input_that_changes_in_place_is_another_one() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            x += 1
            return y + self.two(x)  # type: ignore[no-any-return]

    model = Added()
    watch, x = Watch({"one": model.one, "two": model.two}, full_up_to=3, width=1), torch.randn(1, 4, 3)
    with torch.no_grad(), watch:
        watch.begin(torch.ones(1, 4, dtype=torch.bool))
        model(x.clone())
    found = watch.moments()
    for path, read in (("one", x[0]), ("two", x[0] + 1)):
        torch.testing.assert_close(found.of_inputs[path], read.t() @ read / 4)


def test_a_sketch_of_inputs_of_few_directions_tells_all_of_them(tmp_path: Path) -> None:
    """And those of two tasks add up, also when they have been in files."""
    model = tiny_llama()
    parts = [watched(model, rows, full_up_to=0, width=20) for rows in (ROWS[:1], ROWS[1:2])]
    for number, part in enumerate(parts):
        moments.write(tmp_path / str(number), part, {"fingerprint": "f"})
    parts = [moments.read(tmp_path / str(number)) for number in range(2)]
    assert len(parts[0].sketched) == len(parts[0].of_inputs) > 4
    wanted = [by_hand(model, rows) for rows in (ROWS[:1], ROWS[1:2])]
    for path, one in wanted[0].items():  # eight tokens have at most eight directions
        factor = moments.factor(parts, path)
        assert factor.shape[1] <= 8
        whole = one + wanted[1][path]
        assert float((factor @ factor.t() - whole).norm()) <= 2e-4 * float(whole.norm())
    (tmp_path / "0").write_bytes((tmp_path / "0").read_bytes()[:-9])
    with pytest.raises(AdapterError, match=r"0: is not a file of moments .* delete it to measure them again"):
        moments.read(tmp_path / "0")


def energy(a: Tensor, s: Tensor) -> float:
    return float((a.double() @ s * a).sum())


def a_moment(in_features: int, count: int) -> Tensor:
    x = torch.randn(count, in_features, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x * torch.linspace(0.1, 3, in_features, dtype=torch.float64)
    return x.t() @ x / count


def factor_of(s: Tensor) -> Tensor:
    one = Moments(num_tokens=1, of_inputs={"m": s.float()}, inputs={"m": "m"})
    return moments.factor([one], "m")


def test_no_other_directions_let_less_of_the_others_through() -> None:
    s, seeded = a_moment(24, 200), projection(5, "m", 4, 24)
    a = moments.avoiding(seeded, factor_of(s))
    torch.testing.assert_close(a @ a.t(), LENGTH**2 * torch.eye(4), rtol=0, atol=1e-6)
    least = torch.linalg.eigh(s).eigenvectors[:, :4]  # the paper's choice
    torch.testing.assert_close((a.double() @ least).norm(), a.double().norm(), rtol=1e-5, atol=0)
    generator = torch.Generator().manual_seed(1)
    others = [torch.randn(4, 24, generator=generator, dtype=torch.float64) for _ in range(50)]
    lengths = [LENGTH * moments.orthonormal(other) for other in (*others, seeded.double())]
    assert all(energy(a, s) < 0.5 * energy(other, s) for other in lengths)


def test_of_directions_without_energy_those_nearest_to_the_seed_are_taken() -> None:
    s, seeded = a_moment(24, 6), projection(5, "m", 4, 24)
    a = moments.avoiding(seeded, factor_of(s))
    assert energy(a, s) < 1e-10 * energy(seeded, s)
    values, vectors = torch.linalg.eigh(s)
    nothing = vectors[:, values < 1e-9]
    assert nothing.shape[1] == 18
    wanted = LENGTH * moments.orthonormal(seeded.double() @ nothing @ nothing.t())
    torch.testing.assert_close(a.double(), wanted, rtol=0, atol=1e-5)
    with pytest.raises(AdapterError, match="rank: got 25 for a layer of 24 inputs"):
        moments.avoiding(projection(5, "m", 25, 24), factor_of(s))


def test_an_a_that_is_given_is_trained_on_and_stored() -> None:
    model = tiny_llama()
    made = {
        path: Given(a=torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(number)))
        for number, (path, layer) in enumerate(match(model, "all-linear").items())
    }
    layers = attach(model, Spec(rank=4, alpha=8.0, seed=0, given=made))
    x = torch.randn(2, 36)
    path, layer = next(iter(layers.items()))
    with torch.no_grad():
        layer.deltas[0].trained()[""].normal_()
        b = layer.deltas[0].trained()[""].view(-1, 4)
        torch.testing.assert_close(layer(x), layer.base(x) + 2.0 * x @ made[path].a.t() @ b.t())
    [block] = extract(model, name="one").blocks
    assert block.seed is None
    assert all(torch.equal(block.projection(path, 0), one.a) for path, one in made.items())
    del made[path]
    with pytest.raises(AdapterError, match=f"given: wanted an A of shape .4, 36. for {path}, and there is none"):
        attach(tiny_llama(), Spec(rank=4, alpha=8.0, seed=0, given=made))
    with pytest.raises(AdapterError, match="projection: got 'trained' for an A that is given; wanted 'cached'"):
        Spec(rank=4, alpha=8.0, seed=0, projection="trained", given=made)


def test_what_cannot_be_measured_is_refused() -> None:
    layer = nn.Linear(3, 2)
    watch = Watch({"m": layer}, full_up_to=3, width=1)
    with pytest.raises(AdapterError, match="m: no token was seen"):
        watch.moments()
    with watch:
        watch.begin(torch.ones(2, 5, dtype=torch.bool))
        with pytest.raises(AdapterError, match="m: reads 2 vectors of a batch of 10 tokens"):
            layer(torch.ones(2, 3))
        layer(torch.full((2, 5, 3), torch.nan))
    with pytest.raises(AdapterError, match="m: reads values that are not finite"):
        watch.moments()
    one = Moments(num_tokens=1, of_inputs={"m": torch.eye(3)}, inputs={"m": "m"})
    other = Moments(num_tokens=1, of_inputs={"m": torch.ones(3, 1)}, inputs={"m": "m"})
    with pytest.raises(AdapterError, match=r"m: got moments of shapes .3, 1., .3, 3.; measure all of them"):
        moments.factor([one, other], "m")
    with pytest.raises(AdapterError, match="n: its input was not measured"):
        moments.factor([one], "n")
