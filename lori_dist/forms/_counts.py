"""What forms make of how often ranks are taken."""

import torch
from torch import Tensor


def evened(bias: Tensor, counts: Tensor, by: float) -> Tensor:
    """A bias that has risen where a rank was taken less often than the mean, and fallen where it was more often.

    bias, counts: (rank,). by: how much.
    """
    return bias + by * torch.sign(counts.double().mean() - counts).to(bias.dtype)
