"""The products with an A that is not kept, against A itself: in torch, in Triton's interpreter, on a GPU."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lori_dist.adapter import product
from lori_dist.adapter.product import down, up
from lori_dist.adapter.projection import DTYPES, Recipe
from lori_dist.errors import AdapterError
from tests.interpreter import repair_bfloat16, run, run_interpreted

# rank, in_features: single entries; rows that begin inside of a Philox block and such that begin with one; more of both
# sides than a tile has, of which `down` adds up parts
SMALL = ((1, 1), (3, 7), (5, 33), (16, 64))
LARGE = ((70, 136), (35, 150))
TOKENS = (1, 17, 130)

Shapes = tuple[tuple[int, int], ...]


def recipe(rank: int, in_features: int, dtype: torch.dtype = torch.float32) -> Recipe:
    return Recipe(seed=2**64 - 1, module="layers.0.q_proj", rank=rank, in_features=in_features, dtype=dtype)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """To the rounding of the result, and of a sum in fp32, or in fp64 for such a result."""
    absolute = 1e-13 if found.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        found.cpu().double(), expected, rtol=2 * torch.finfo(found.dtype).eps, atol=absolute, check_dtype=False
    )


# --- in torch --------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 5),
    st.integers(1, 20),
    st.integers(1, 70),
    st.sampled_from([1, 8, 100, 2**20]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
)
def test_products_are_those_with_a(
    tokens: int, rank: int, in_features: int, chunk: int, dtype: torch.dtype, a_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    a = recipe(rank, in_features, a_dtype)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    u = torch.randn(tokens, rank, generator=generator).to(dtype)
    whole = a.make().to(dtype).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "_CHUNK", chunk)
        reduced, expanded = down(x, a), up(u, a)
    assert reduced.dtype == expanded.dtype == dtype
    assert_near(reduced, x.double() @ whole.t())
    assert_near(expanded, u.double() @ whole)


def test_a_is_never_there_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    a, made = recipe(40, 70), []
    make = Recipe.make

    def spy(self: Recipe, **arguments: object) -> Tensor:
        made.append(make(self, **arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(product, "_CHUNK", 200)
    monkeypatch.setattr(Recipe, "make", spy)
    down(torch.ones(3, 70), a)
    assert sum(part.numel() for part in made) == 40 * 70
    up(torch.ones(3, 40), a)
    assert sum(part.numel() for part in made) == 2 * 40 * 70
    assert max(part.numel() for part in made) <= 200


def test_meta_tensors_have_the_shape() -> None:
    a = recipe(4, 2**40, torch.bfloat16)
    x = torch.empty(3, 2**40, device="meta")
    assert (down(x, a).shape, down(x, a).dtype, down(x, a).is_meta) == ((3, 4), torch.float32, True)
    assert up(x[:, :4], a).shape == (3, 2**40)


def test_a_recipe_that_makes_nothing_is_refused() -> None:
    with pytest.raises(AdapterError, match="rank is 0; give an integer of at least 1"):
        recipe(0, 3)


def test_kernels_without_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "lori_dist.adapter.product_cuda", raising=False)
    monkeypatch.delitem(sys.modules, "lori_dist.adapter.projection_cuda", raising=False)
    with pytest.raises(AdapterError, match=r"recomputed.*Triton.*cannot be imported; install triton, or choose cached"):
        product._kernels()


# --- the kernels -----------------------------------------------------------------------------------------------------


def kernel_down(x: Tensor, a: Recipe) -> Tensor:
    from lori_dist.adapter import product_cuda

    return product_cuda.down(x, a.key, a.rank, a.scale, a.dtype)


def kernel_up(u: Tensor, a: Recipe) -> Tensor:
    from lori_dist.adapter import product_cuda

    return product_cuda.up(u, a.key, a.in_features, a.scale, a.dtype)


def check_bits(dtype: torch.dtype, a_dtype: torch.dtype, shapes: Shapes, device: str) -> None:
    """A product with the unit vectors is A itself: sums of one entry and zeros."""
    for rank, in_features in shapes:
        a = recipe(rank, in_features, a_dtype)
        whole = a.make().to(dtype)
        about = dtype, a_dtype, rank, in_features
        reduced = kernel_down(torch.eye(in_features, dtype=dtype, device=device), a)
        assert torch.equal(reduced.cpu(), whole.t()), about
        expanded = kernel_up(torch.eye(rank, dtype=dtype, device=device), a)
        assert torch.equal(expanded.cpu(), whole), about


def check_sums(dtype: torch.dtype, a_dtype: torch.dtype, shapes: Shapes, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for (rank, in_features), tokens in itertools.product(shapes, TOKENS):
        a = recipe(rank, in_features, a_dtype)
        whole = a.make().to(dtype).double()
        x = torch.randn(in_features, tokens, generator=generator).t().to(dtype)  # not contiguous
        u = torch.randn(tokens, rank, generator=generator).to(dtype)
        reduced, expanded = kernel_down(x.to(device), a), kernel_up(u.to(device), a)
        assert reduced.dtype == expanded.dtype == dtype
        assert_near(reduced, x.double() @ whole.t())
        assert_near(expanded, u.double() @ whole)
        assert torch.equal(kernel_down(x.to(device), a), reduced)


def check_interpreted() -> None:
    repair_bfloat16()
    for dtype, a_dtype in itertools.product(DTYPES, DTYPES):
        check_bits(dtype, a_dtype, SMALL, "cpu")
    check_bits(torch.bfloat16, torch.bfloat16, LARGE, "cpu")
    for dtype in DTYPES:
        check_sums(dtype, dtype, SMALL, "cpu")
    check_sums(torch.float32, torch.float32, LARGE, "cpu")


def test_the_interpreted_kernels_multiply_with_a_bit_for_bit() -> None:
    run_interpreted(check_interpreted)


pairs = pytest.mark.parametrize(("dtype", "a_dtype"), list(itertools.product(DTYPES, DTYPES)))


@pytest.mark.gpu
@pairs
def test_on_cuda_unit_vectors_give_a_bit_for_bit(dtype: torch.dtype, a_dtype: torch.dtype) -> None:
    check_bits(dtype, a_dtype, SMALL + LARGE, "cuda")


@pytest.mark.gpu
@pairs
def test_on_cuda_products_are_those_with_a(dtype: torch.dtype, a_dtype: torch.dtype) -> None:
    check_sums(dtype, a_dtype, SMALL + LARGE, "cuda")


@pytest.mark.gpu
def test_on_cuda_a_large_a_is_the_same_bit_for_bit() -> None:
    a = recipe(64, 14336, torch.bfloat16)
    whole = a.make()
    assert torch.equal(down(torch.eye(14336, dtype=torch.bfloat16, device="cuda"), a).cpu(), whole.t())
    assert torch.equal(up(torch.eye(64, dtype=torch.bfloat16, device="cuda"), a).cpu(), whole)


@pytest.mark.gpu
def test_on_cuda_no_tokens_are_no_error() -> None:
    a = recipe(4, 8)
    assert down(torch.empty(0, 8, device="cuda"), a).shape == (0, 4)
    assert up(torch.empty(0, 4, device="cuda"), a).shape == (0, 8)


def check_compiles() -> None:
    """As a launch would have them compiled, for devices that need not be there."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lori_dist.adapter import product_cuda

    kernels = product_cuda._down, product_cuda._up
    cases = [*itertools.product(DTYPES, (4096,), (90,)), (torch.bfloat16, 4095, 90), (torch.bfloat16, 1, 80)]
    for kernel, (dtype, in_features, capability) in itertools.product(kernels, cases):
        sizes = {"rank": 1 if in_features == 1 else 64, "in_features": in_features}
        tile = product_cuda._tile(1000, sizes["rank"], in_features, torch.float32, dtype)
        num_warps = tile.pop("num_warps")
        pointer = "*" + {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}[str(dtype)[6:]]
        types = dict.fromkeys(("x", "u", "parts", "out"), pointer) | {"low": "i64", "high": "i64", "scale": "fp32"}
        tile |= {name: 1 for name, size in sizes.items() if size == 1}  # which Triton compiles as constants
        signature = {name: "constexpr" if name in tile else types.get(name, "i32") for name in kernel.arg_names}
        constants = {(kernel.arg_names.index(name),): value for name, value in tile.items()}
        aligned = [name for name, kind in signature.items() if kind == pointer or sizes.get(name, 1) % 16 == 0]
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        made = compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps},
        )
        uses_tensor_cores = "mma" in made.asm["ptx"]
        assert uses_tensor_cores == (dtype != torch.float32), (kernel, dtype, in_features, capability)


def test_the_kernels_compile_for_an_a100_and_an_h100(tmp_path: Path) -> None:
    run(check_compiles, TRITON_CACHE_DIR=str(tmp_path))
