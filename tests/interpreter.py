"""Kernels on the CPU: run by Triton's interpreter, in a fresh process, with bfloat16 as the hardware has it."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def require_triton() -> None:
    """Fails the test where the kernels could be tested and Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        if sys.platform != "linux":
            pytest.skip("Triton, which the kernels are written in, is made for Linux only")
        pytest.fail("Triton is not installed, so no kernel can be tested; pip install -e '.[test]' brings it along")


def run(function: Callable[[], None], **environment: str) -> None:
    """Runs a function of a test module in a fresh process. Its traceback is the failure."""
    require_triton()
    code = f"from {function.__module__} import {function.__name__} as check; check()"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def run_interpreted(function: Callable[[], None]) -> None:
    """Runs a function whose kernels work on CPU tensors, after it has called `repair_bfloat16`."""
    run(function, TRITON_INTERPRET="1")


def repair_bfloat16() -> None:
    """Makes the interpreter round to bfloat16, where it truncates, and multiply such values, where it takes their bits.

    To be called before a kernel runs.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return cast(self, source, target)
        bits = source.data.astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to nearest, ties to even; nothing here is infinite
        return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    def dot_of_values(self: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast(self, operand, tl.float32) for operand in (a, b))
        return dot(self, a, b, *others)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounding_cast, dot_of_values
