"""The adapted layer against the dense formula, in every way it is used."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lori_dist import attach
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.bases import is_plain
from lori_dist.adapter.linear import AdaptedLinear, Delta
from lori_dist.adapter.projection import projection

MODES = ("cached", "recomputed")
modes = pytest.mark.parametrize("mode", MODES)


def layer(
    *,
    in_features: int = 7,
    out_features: int = 5,
    rank: int = 3,
    density: float = 0.4,
    bias: bool = True,
    mode: str = "cached",
) -> AdaptedLinear:
    """A linear layer with random kept entries."""
    generator = torch.Generator().manual_seed(in_features * 100 + out_features)
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=bias))
    mask = torch.rand(out_features, rank, generator=generator) < density
    spec = Spec(rank=rank, alpha=2.0 * rank, seed=3, projection=mode)
    adapted = attach(model, spec, masks={"0": mask})["0"]
    values = adapted.deltas[0].values
    if values is not None:
        values.data.normal_(generator=generator)
    return adapted


def dense_b(delta: Delta, values: Tensor) -> Tensor:
    b = torch.zeros(delta.out_features * delta.rank, dtype=values.dtype)
    positions = range(b.numel()) if delta.index is None else delta.index.tolist()
    for position, value in zip(positions, values, strict=True):
        b[position] = value
    return b.view(delta.out_features, delta.rank)


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.sampled_from([(), (2,), (2, 3)]),
)
@settings(deadline=None, max_examples=40)
def test_output_and_gradients_are_those_of_the_dense_formula(
    in_features: int, out_features: int, rank: int, density: float, batch: tuple[int, ...]
) -> None:
    adapted = layer(in_features=in_features, out_features=out_features, rank=rank, density=density)
    delta = adapted.deltas[0]
    x = torch.randn(*batch, in_features, requires_grad=True)
    weight = torch.randn(*batch, out_features)
    y = adapted(x)
    (y * weight).sum().backward()

    dense_x = x.detach().clone().requires_grad_()
    b = dense_b(delta, delta.values.detach() if delta.values is not None else torch.zeros(0)).requires_grad_()
    expected = adapted.base(dense_x) + 2.0 * dense_x @ delta.projection.t() @ b.t()
    (expected * weight).sum().backward()
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(x.grad, dense_x.grad, atol=1e-5)
    if delta.values is not None:
        kept = b.grad.flatten() if delta.index is None else b.grad.flatten()[delta.index.long()]
        assert torch.allclose(delta.values.grad, kept, atol=1e-5)


@modes
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_gradcheck_in_float64(density: float, mode: str) -> None:
    adapted = layer(density=density, mode=mode).double()
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    values = adapted.deltas[0].values.detach().clone().requires_grad_()

    def forward(x: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(adapted, {"deltas.0.values": values}, (x,))

    assert torch.autograd.gradcheck(forward, (x, values))


@modes
def test_saves_the_reduced_input_and_neither_x_nor_a_dense_b(mode: str) -> None:
    adapted = layer(in_features=400, out_features=300, rank=4, density=0.1, mode=mode)
    saved: list[Tensor] = []
    x = torch.randn(10, 400, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        adapted(x)
    constants = {
        tensor.data_ptr() for tensor in (adapted.base.weight, adapted.deltas[0].projection) if tensor is not None
    }
    shapes = [tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in constants]
    kept = adapted.deltas[0].kept
    assert sorted(shapes) == sorted([(10, 4), (kept,), (kept,)])


def hooked(adapted: AdaptedLinear) -> AdaptedLinear:
    """The same layer, whose base has to be called, as someone else wants to see what it gives."""
    adapted.base.register_forward_hook(lambda module, args, output: None)
    return adapted


@modes
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_base_that_is_called_gives_the_same(density: float, mode: str, autocast: bool, transposed: bool) -> None:
    inlined = layer(density=density, mode=mode)
    if transposed:
        conv = Conv1D(5, 7)
        conv.weight.data.copy_(inlined.base.weight.t())
        conv.bias.data.copy_(inlined.base.bias)
        inlined.base = conv.requires_grad_(False)
    called = hooked(copy.deepcopy(inlined))
    assert is_plain(inlined.base) and not is_plain(called.base)
    results = []
    for adapted in (inlined, called):
        x = torch.linspace(-1, 1, 3 * 4 * 7).view(3, 4, 7).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = adapted(x)
        y.float().pow(2).sum().backward()
        results.append((y, x.grad, adapted.deltas[0].values.grad))
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, **({"rtol": 0.02, "atol": 0.02} if autocast else {}))


def test_a_base_that_is_trained_gets_its_gradient() -> None:
    adapted = layer()
    adapted.base.weight.requires_grad_()
    adapted(torch.ones(2, 7)).sum().backward()
    assert torch.equal(adapted.base.weight.grad, torch.full((5, 7), 2.0))


def test_a_second_derivative_is_refused() -> None:
    adapted = layer()
    x = torch.randn(2, 7, requires_grad=True)
    (grad,) = torch.autograd.grad(adapted(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@modes
def test_activation_checkpointing_changes_no_gradient(mode: str) -> None:
    adapted = layer(mode=mode)
    x = torch.randn(4, 7, requires_grad=True)
    adapted(x).pow(2).sum().backward()
    expected, expected_x = adapted.deltas[0].values.grad.clone(), x.grad.clone()
    adapted.zero_grad()
    x.grad = None
    checkpoint(adapted, x, use_reentrant=False).pow(2).sum().backward()
    assert torch.equal(adapted.deltas[0].values.grad, expected)
    assert torch.equal(x.grad, expected_x)


def test_bf16_base_keeps_fp32_values_and_gradients() -> None:
    adapted = layer()
    values = adapted.deltas[0].values.detach().clone()
    exact = adapted(x := torch.randn(6, 7))
    adapted.to(torch.bfloat16)
    y = adapted(x.bfloat16())
    y.float().pow(2).sum().backward()
    delta = adapted.deltas[0]
    assert adapted.base.weight.dtype == y.dtype == torch.bfloat16
    assert delta.values.dtype == delta.values.grad.dtype == delta.projection.dtype == torch.float32
    assert torch.equal(delta.values, values)
    assert torch.allclose(y.float(), exact, atol=0.1, rtol=0.05)


def test_autocast_computes_in_bf16() -> None:
    adapted = layer()
    x = torch.randn(6, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x)
    y.float().pow(2).sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == adapted.deltas[0].values.grad.dtype == torch.float32
    assert torch.allclose(y.float(), adapted(x), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model_never_changes_a(dtype: torch.dtype) -> None:
    adapted = layer()
    adapted.to(dtype).to(torch.float32)
    assert torch.equal(adapted.deltas[0].projection, projection(3, "0", 3, 7))


def test_a_model_built_on_meta_gets_its_a_and_index_when_it_becomes_real() -> None:
    real = layer()
    model = nn.Sequential(nn.Linear(7, 5, device="meta"))
    mask = torch.zeros(15, dtype=torch.bool)
    mask[real.deltas[0].index.long()] = True
    attach(model, Spec(rank=3, alpha=6.0, seed=3), masks={"0": mask.view(5, 3)})
    index = model[0].deltas[0].index
    assert model[0].deltas[0].projection.is_meta
    assert not index.is_meta
    model.to_empty(device="cpu")
    assert torch.equal(model[0].deltas[0].projection, real.deltas[0].projection)
    assert torch.equal(model[0].deltas[0].index, real.deltas[0].index)
    assert torch.equal(model[0].deltas[0].values, torch.zeros(real.deltas[0].kept))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo and inductor, about themselves
@modes
def test_compiles_without_graph_breaks(mode: str) -> None:
    adapted = layer(in_features=16, out_features=12, mode=mode)
    x = torch.randn(4, 16, requires_grad=True)
    expected = adapted(x)
    expected.pow(2).sum().backward()
    grads = [x.grad.clone(), adapted.deltas[0].values.grad.clone()]
    x.grad = adapted.deltas[0].values.grad = None
    compiled = torch.compile(adapted, fullgraph=True)
    y = compiled(x)
    y.pow(2).sum().backward()
    assert torch.allclose(y, expected, atol=1e-6)
    assert torch.allclose(x.grad, grads[0], atol=1e-5)
    assert torch.allclose(adapted.deltas[0].values.grad, grads[1], atol=1e-4)


def test_a_recomputed_a_takes_no_memory_and_gives_the_same_to_rounding() -> None:
    cached, recomputed = (layer(in_features=300, out_features=200, rank=8, mode=mode) for mode in MODES)
    recomputed.load_state_dict(cached.state_dict())
    results = []
    for adapted in (cached, recomputed):
        x = torch.linspace(-1, 1, 1500).view(5, 300).requires_grad_()
        y = adapted(x)
        y.pow(2).sum().backward()
        results.append((y, x.grad, adapted.deltas[0].values.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    delta = recomputed.deltas[0]
    assert [name for name, _ in delta.named_buffers()] == ["index"]
    assert torch.equal(delta.a(), cached.deltas[0].projection)
    assert torch.equal(delta.weight(delta.values), cached.deltas[0].weight(delta.values))


def test_a_recomputed_a_stays_the_same_whatever_the_model_is_cast_to() -> None:
    adapted = layer(mode="recomputed")
    x = torch.randn(6, 7)
    exact = adapted(x)
    y = adapted.to(torch.bfloat16)(x.bfloat16())
    y.float().pow(2).sum().backward()
    assert (y.dtype, adapted.deltas[0].values.grad.dtype) == (torch.bfloat16, torch.float32)
    assert torch.allclose(y.float(), exact, atol=0.1, rtol=0.05)
    assert torch.equal(adapted.deltas[0].a(), projection(3, "0", 3, 7))


def test_a_recomputed_model_built_on_meta_becomes_real() -> None:
    model = nn.Sequential(nn.Linear(7, 5, device="meta"))
    attach(model, Spec(rank=3, alpha=6.0, seed=3, projection="recomputed"))
    assert model(torch.empty(2, 7, device="meta")).shape == (2, 5)
    assert model[0].deltas[0].a().is_meta
    model.to_empty(device="cpu")
    assert torch.equal(model[0].deltas[0].a(), projection(3, "0", 3, 7))
    assert torch.equal(model[0].deltas[0].values, torch.zeros(15))


def test_a_layer_that_keeps_nothing_has_no_parameter_and_is_the_base() -> None:
    model = nn.Sequential(nn.Linear(7, 5))
    x = torch.randn(2, 7)
    expected = model(x)
    adapted = attach(model, Spec(rank=3, alpha=6.0, seed=3), masks={"0": torch.zeros(5, 3, dtype=torch.bool)})["0"]
    assert [name for name, _ in adapted.named_parameters()] == ["base.weight", "base.bias"]
    assert torch.equal(model(x), expected)


def test_only_the_values_are_in_the_state_dict() -> None:
    assert set(layer().state_dict()) == {"base.weight", "base.bias", "deltas.0.values"}


@modes
def test_a_copy_is_a_layer_of_its_own(mode: str) -> None:
    adapted = layer(mode=mode)
    other = copy.deepcopy(adapted)
    x = torch.randn(2, 7)
    assert torch.equal(adapted(x), other(x))
    other.deltas[0].values.data.zero_()
    assert not torch.equal(adapted(x), other(x))


@pytest.mark.gpu
@modes
def test_cuda_gives_the_cpu_result(mode: str) -> None:
    adapted = layer(in_features=512, out_features=384, rank=8, density=0.1, mode=mode)
    x = torch.randn(64, 512)
    expected = adapted(x)
    expected.pow(2).sum().backward()
    grad = adapted.deltas[0].values.grad.clone()
    adapted.zero_grad()
    adapted.cuda()
    y = adapted(x.cuda())
    y.pow(2).sum().backward()
    assert torch.allclose(y.cpu(), expected, atol=1e-3, rtol=1e-3)
    assert torch.allclose(adapted.deltas[0].values.grad.cpu(), grad, atol=1e-1, rtol=1e-2)
