"""Kernels that give the same bits every time."""

import os

import torch


def set_deterministic(is_on: bool) -> None:
    """Switches deterministic kernels on or off for this process. An operation without one then raises RuntimeError."""
    if is_on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # which torch does not know of
    torch.use_deterministic_algorithms(is_on)
