"""Methods of a user's own, for launched ranks: an engine with a fault, and a mask that tells how many ranks it has."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from lori_dist.engines import ddp
from lori_dist.errors import JobError
from lori_dist.masks import magnitude
from lori_dist.training.data import Batch
from lori_dist.training.engine import StepResult
from lori_dist.training.world import World

MESSAGE = "nobody has foreseen this"
REFUSAL = "step 2: the loss is what it should not be; lower the learning rate"


def mask(b: Mapping[str, Tensor], *, density: float, mark: str = "mask") -> dict[str, Tensor]:
    """That of magnitude. mark: a file that is made, with the number of the rank and that of all behind its name."""
    Path(f"{mark}-{dist.get_rank()}-of-{dist.get_world_size()}").touch()
    return magnitude.mask(b, density=density)


def build(
    *args: Any,
    fault: Literal["raise", "kill", "terminate", "refuse", "refuse_all", "refuse_each"] = "raise",
    rank: int = 1,
    busy: float = 0.0,
    mark: str = "fault",
    **kwargs: Any,
) -> "Faulty":
    """The engine ddp, but in the second step a rank goes wrong.

    fault: how. busy: seconds for which the others then compute and do not communicate. mark: a file that is made when
    it happens.
    """
    [world] = [value for value in args if isinstance(value, World)]
    return Faulty(ddp.build(*args, **kwargs), world, fault, rank, busy, Path(mark))


class Faulty:
    """An `Engine`."""

    def __init__(self, engine: Any, world: World, fault: str, rank: int, busy: float, mark: Path) -> None:
        self.engine, self.world = engine, world
        self.fault, self.rank, self.busy, self.mark = fault, rank, busy, mark
        self.num_steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self, micro_batches: Sequence[Batch], *, num_targets: int, lr: float, accept: object) -> StepResult:
        self.num_steps += 1
        if self.num_steps == 2:
            if self.fault.startswith("refuse_"):
                of = f"rank {self.world.rank}, " if self.fault == "refuse_each" else ""
                self.mark.touch()
                raise JobError(of + REFUSAL)
            if self.world.rank == self.rank:
                self.happen()
            time.sleep(self.busy)
        return self.engine.step(micro_batches, num_targets=num_targets, lr=lr)

    def happen(self) -> None:
        self.mark.touch()
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
            return
        raise RuntimeError(MESSAGE) if self.fault == "raise" else JobError(REFUSAL)
