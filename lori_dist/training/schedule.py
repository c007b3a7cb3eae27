"""Learning rates, as a function of the step."""

import math


def learning_rate(step: int, *, num_steps: int, lr: float, schedule: str, warmup_steps: int) -> float:
    """The learning rate of step 0 <= step < num_steps.

    It rises linearly over warmup_steps (the first step's is not zero: that step would be lost) and then stays at lr
    (`constant`) or falls to zero at num_steps along a line (`linear`) or half a cosine (`cosine`).
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return lr * DECAYS[schedule](progress)


DECAYS = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Share of the learning rate after a share of the steps that follow the warm-up."""
