import hashlib
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lori_dist.adapter.projection import DTYPES, GENERATOR, checksum, philox, projection
from lori_dist.errors import AdapterError
from tests.interpreter import repair_bfloat16, run_interpreted

SEED, MODULE = 2024, "model.layers.0.self_attn.q_proj"
MASK = 2**64 - 1

# Random123's kat_vectors, philox4x64 with 10 rounds: counter, key, words.
KNOWN_ANSWERS = (
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (MASK, MASK, MASK, MASK),
        (MASK, MASK),
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
)

bounds = st.none() | st.integers(-45, 45)
parts = st.none() | st.builds(slice, bounds, bounds)


def oracle_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = divmod(c0 * 0xD2E7470EE14C6C93, 2**64)
        high_1, low_1 = divmod(c2 * 0xCA5A826395121157, 2**64)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return c0, c1, c2, c3


def oracle_key(seed: int, module: str) -> tuple[int, int]:
    text = f"lori_dist.projection.v1\0{seed}\0{module}".encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def oracle_scale(in_features: int) -> float:
    return float(np.float32(1 / (math.sqrt(in_features) * 2**23)))


def oracle_entry(key: tuple[int, int], i: int, j: int, in_features: int) -> np.float32:
    word, half = divmod(i * in_features + j, 2)
    bits = oracle_philox((word // 4, 0, 0, 0), key)[word % 4] >> 32 * half & 0xFFFFFFFF
    signed = bits - 2**32 if bits >= 2**31 else bits
    return np.float32(signed >> 8) * np.float32(oracle_scale(in_features))


def oracle(seed: int, module: str, rank: int, in_features: int) -> Tensor:
    key = oracle_key(seed, module)
    return torch.tensor(
        np.array([[oracle_entry(key, i, j, in_features) for j in range(in_features)] for i in range(rank)])
    )


def run_python(code: str, **environment: str) -> str:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(
        command, cwd=root, env=os.environ | environment, check=True, capture_output=True, text=True, timeout=120
    ).stdout.strip()


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: Any, key: Any, words: Any) -> None:
    assert philox(counter, key) == words
    assert oracle_philox(counter, key) == words


@given(st.tuples(*[st.integers(0, MASK)] * 4), st.tuples(*[st.integers(0, MASK)] * 2))
def test_philox_equals_the_oracle(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    assert philox(counter, key) == oracle_philox(counter, key)


@pytest.mark.parametrize(("rank", "in_features"), [(1, 1), (1, 7), (3, 5), (4, 8), (5, 33), (2, 130)])
@pytest.mark.parametrize(("seed", "module"), [(0, "q_proj"), (2**64 - 1, "größe.0")])
def test_projection_equals_the_oracle(seed: int, module: str, rank: int, in_features: int) -> None:
    a = projection(seed, module, rank, in_features)
    assert a.dtype == torch.float32
    assert torch.equal(a, oracle(seed, module, rank, in_features))


def test_golden_values() -> None:
    """Frozen: another value here is another definition of A, and asks for another GENERATOR."""
    a = projection(SEED, MODULE, 8, 33)
    assert GENERATOR == "philox4x64-10"
    assert [value.hex() for value in a[0, :4].tolist()] == [
        "0x1.28c5d60000000p-3",
        "-0x1.55a8220000000p-3",
        "0x1.19aa520000000p-4",
        "0x1.8e978a0000000p-5",
    ]
    assert [value.hex() for value in a[7, -2:].tolist()] == ["-0x1.a15f680000000p-4", "0x1.4a7c760000000p-4"]
    assert checksum(a) == "d5aa966beed96fdb"
    assert checksum(projection(SEED, MODULE, 8, 33, dtype=torch.bfloat16)) == "c80bb0af86c98636"
    assert checksum(projection(2**64 - 1, "größe", 64, 4096)) == "f540ac243e4b5993"


@given(parts, parts, st.sampled_from([1, 7, 8, 32, 41]), st.sampled_from(DTYPES))
def test_a_slice_is_the_slice_of_the_whole(
    rows: slice | None, columns: slice | None, in_features: int, dtype: torch.dtype
) -> None:
    whole = projection(SEED, MODULE, 9, in_features, dtype=dtype)
    part = projection(SEED, MODULE, 9, in_features, rows=rows, columns=columns, dtype=dtype)
    assert torch.equal(part, whole[rows or slice(None), columns or slice(None)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_threads_change_no_bit(num_threads: int, dtype: torch.dtype) -> None:
    rank, in_features = 9, 100_003  # more than one thread's least work, chunks that end inside of a block
    whole = projection(SEED, MODULE, rank, in_features, dtype=dtype, num_threads=1)
    assert torch.equal(whole, projection(SEED, MODULE, rank, in_features, dtype=dtype, num_threads=num_threads))
    rows, columns = slice(1, 9), slice(5, 100_000)
    part = projection(SEED, MODULE, rank, in_features, rows=rows, columns=columns, dtype=dtype, num_threads=num_threads)
    assert torch.equal(part, whole[rows, columns])


def test_a_slice_far_along_makes_nothing_else() -> None:
    """The whole would have 2^60 entries."""
    size, row = 2**30, 2**29
    part = projection(SEED, MODULE, size, size, rows=slice(row, row + 2), columns=slice(-3, None))
    key = oracle_key(SEED, MODULE)
    assert part.tolist() == [[oracle_entry(key, row + i, size - 3 + j, size) for j in range(3)] for i in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_formed_in_fp32_and_cast_once(dtype: torch.dtype) -> None:
    a = projection(SEED, MODULE, 16, 4099, dtype=dtype)
    assert a.dtype == dtype
    assert torch.equal(a, projection(SEED, MODULE, 16, 4099).to(dtype))


def test_a_larger_rank_keeps_the_earlier_rows() -> None:
    assert torch.equal(projection(SEED, MODULE, 32, 65)[:5], projection(SEED, MODULE, 5, 65))


def test_no_generator_is_read_or_moved() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    a = projection(SEED, MODULE, 4, 50)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert random.getstate() == states[2]
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(a, projection(SEED, MODULE, 4, 50))


def test_torch_defaults_change_nothing() -> None:
    expected = projection(SEED, MODULE, 4, 50)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            a = projection(SEED, MODULE, 4, 50)
    finally:
        torch.set_default_dtype(dtype)
    assert a.device.type == "cpu"
    assert torch.equal(a, expected)


def test_a_fresh_process_makes_the_same_bits() -> None:
    code = (
        "from lori_dist.adapter.projection import checksum, projection; "
        f"print(checksum(projection({SEED}, {MODULE!r}, 8, 33)))"
    )
    assert run_python(code, PYTHONHASHSEED="7") == checksum(projection(SEED, MODULE, 8, 33))


@pytest.mark.parametrize("in_features", [1, 3, 100, 4096])
def test_values_lie_within_the_bound(in_features: int) -> None:
    a = projection(SEED, MODULE, 2**20 // in_features, in_features)
    bound = np.float32(1 / math.sqrt(in_features))
    assert a.abs().max() <= bound
    assert a.max() > 0.999 * bound
    assert a.min() < -0.999 * bound


def test_values_are_uniform() -> None:
    in_features = 2**10
    unit = projection(SEED, MODULE, 2**10, in_features).double() * math.sqrt(in_features)  # uniform on [-1, 1)
    num_values = unit.numel()
    deviations = 5  # so far off once in two million seeds; this one is fixed
    assert abs(unit.mean()) < deviations * math.sqrt(1 / 3 / num_values)
    assert abs(unit.square().mean() - 1 / 3) < deviations * math.sqrt(4 / 45 / num_values)
    counts = torch.histc(unit, bins=64, min=-1, max=1)
    assert (counts - num_values / 64).abs().max() < deviations * math.sqrt(num_values / 64)


def test_rows_are_nearly_orthogonal() -> None:
    a = projection(SEED, MODULE, 32, 2**14)
    error = a @ a.T - torch.eye(32) / 3
    assert error.abs().max() < 5 * math.sqrt(1 / 9 / 2**14)


@pytest.mark.parametrize(("seed", "module"), [(SEED + 1, MODULE), (SEED, MODULE.replace("0", "1"))])
def test_another_seed_or_module_gives_an_independent_a(seed: int, module: str) -> None:
    a, other = projection(SEED, MODULE, 16, 2**12), projection(seed, module, 16, 2**12)
    assert (a != other).float().mean() > 0.999
    assert (a @ other.T).abs().max() < 5 * math.sqrt(1 / 9 / 2**12)


def test_seed_and_module_do_not_run_together() -> None:
    assert not torch.equal(projection(1, "2.q", 1, 16), projection(12, ".q", 1, 16))


def test_checksum_follows_the_bytes() -> None:
    a = projection(SEED, MODULE, 4, 6)
    assert checksum(a) == hashlib.blake2b(a.numpy().tobytes(), digest_size=8).hexdigest()
    assert checksum(a.T.contiguous().T) == checksum(a)
    assert checksum(a.T) != checksum(a)
    assert checksum(a.bfloat16()) != checksum(a)
    assert checksum(a[:0]) == hashlib.blake2b(b"", digest_size=8).hexdigest()
    changed = a.clone()
    changed[3, 5] = math.nextafter(float(a[3, 5]), 2) + 1e-7
    assert checksum(changed) != checksum(a)


def test_meta_tensors_have_the_shape() -> None:
    a = projection(SEED, MODULE, 64, 2**40, rows=slice(3, 9), dtype=torch.bfloat16, device="meta")
    assert (a.shape, a.dtype, a.device.type) == ((6, 2**40), torch.bfloat16, "meta")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": -1}, "seed is -1; give an integer from 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616; give an integer"),
        ({"seed": 1.0}, "seed is 1.0; give an integer"),
        ({"module": ""}, "module is ''; give the module's path"),
        ({"module": 3}, "module is 3; give the module's path"),
        ({"rank": 0}, "rank is 0; give an integer of at least 1"),
        ({"in_features": -4}, "in_features is -4; give an integer of at least 1"),
        ({"num_threads": 0}, "num_threads is 0; give an integer of at least 1"),
        ({"dtype": torch.int32}, r"dtype is torch.int32; give one of torch.float32, torch.bfloat16"),
        ({"rows": slice(0, 4, 2)}, "rows has step 2; only step 1"),
        ({"columns": slice(None, None, -1)}, "columns has step -1; only step 1"),
        ({"columns": 3}, r"columns is 3; give a slice, such as slice\(0, 6\)"),
    ],
)
def test_bad_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"seed": SEED, "module": MODULE, "rank": 4, "in_features": 6}
    with pytest.raises(AdapterError, match=message):
        projection(**arguments | changed)


def test_cuda_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "lori_dist.adapter.projection_cuda", raising=False)
    with pytest.raises(AdapterError, match=r"Triton.*cannot be imported; install triton, or make A with device='cpu'"):
        projection(SEED, MODULE, 4, 6, device="cuda")


# rank, in_features, rows, columns: single entries, odd widths, runs that start and end inside of a block or a tile
KERNEL_CASES = (
    (1, 1, slice(None), slice(None)),
    (7, 301, slice(None), slice(None)),
    (5, 1024, slice(2, 5), slice(None)),
    (4, 33, slice(1, 3), slice(3, 20)),
    (3, 2500, slice(1, 3), slice(7, 2310)),
)


def check_interpreted_kernel() -> None:
    from lori_dist.adapter import projection_cuda

    repair_bfloat16()
    for dtype in DTYPES:
        for rank, in_features, rows, columns in KERNEL_CASES:
            expected = projection(SEED, MODULE, rank, in_features, rows=rows, columns=columns, dtype=dtype)
            a = torch.empty_like(expected)
            low, high = oracle_key(SEED, MODULE)
            first = range(rank)[rows].start * in_features + range(in_features)[columns].start
            projection_cuda.fill(a, low + (high << 64), first, in_features, oracle_scale(in_features))
            assert torch.equal(a, expected), (dtype, rank, in_features, rows, columns)


def test_the_interpreted_kernel_makes_the_same_bits() -> None:
    run_interpreted(check_interpreted_kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rank", "in_features", "rows", "columns"),
    [
        *KERNEL_CASES,
        (64, 4096, slice(None), slice(None)),
        (64, 14336, slice(None), slice(7168, None)),
        (256, 28672, slice(100, 227), slice(3, 28001)),
        (2**20, 2**20, slice(-3, None), slice(-2051, -1)),
        (4, 6, slice(0), slice(None)),
    ],
)
def test_cuda_makes_the_same_bits(rank: int, in_features: int, rows: slice, columns: slice, dtype: torch.dtype) -> None:
    on_cuda = projection(SEED, MODULE, rank, in_features, rows=rows, columns=columns, dtype=dtype, device="cuda")
    on_cpu = projection(SEED, MODULE, rank, in_features, rows=rows, columns=columns, dtype=dtype)
    assert on_cuda.is_cuda
    assert torch.equal(on_cuda.cpu(), on_cpu)
    assert checksum(on_cuda) == checksum(on_cpu)
