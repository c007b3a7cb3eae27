"""Gradients of several tasks, made up."""

import torch
from torch import Tensor


def gradients(seed: int, num_tasks: int, size: int) -> Tensor:
    """Of different lengths, (tasks, size), float64, with conflicts."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64).mul(0.7).exp()
    return torch.randn(num_tasks, size, generator=generator, dtype=torch.float64) * scales
