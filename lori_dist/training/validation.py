"""The loss on rows that are not trained on, during training, and which of its steps had the lowest."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lori_dist.training import data
from lori_dist.training.engine import Engine
from lori_dist.training.loss import loss_sum
from lori_dist.training.metrics import Record
from lori_dist.training.micro_batches import micro_batches
from lori_dist.training.sequence_parallel import Group
from lori_dist.training.token_files import Rows
from lori_dist.training.world import World

LOSS = "validation_loss"
"""Key in the record of the step after which the loss was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The lowest of the losses so far."""

    step: int = 0
    """After so many steps; 0: none was measured yet."""
    loss: float = math.inf
    num_since: int = 0
    """Measurements after it."""

    @classmethod
    def noted(cls, notes: Mapping[str, Any]) -> "Best":
        """Restores the state from its `notes`."""
        loss = math.inf if notes["loss"] is None else notes["loss"]
        return cls(step=notes["step"], loss=loss, num_since=notes["num_since"])

    def notes(self) -> dict[str, Any]:
        """The state that a resumed training needs, as plain JSON."""
        loss = self.loss if math.isfinite(self.loss) else None
        return {"step": self.step, "loss": loss, "num_since": self.num_since}

    def after(self, step: int, loss: float) -> "Best":
        if loss < self.loss:
            return Best(step=step, loss=loss)
        return Best(step=self.step, loss=self.loss, num_since=self.num_since + 1)


def best(records: Iterable[Record]) -> Best:
    """The best step among those that were done."""
    found = Best()
    for line in records:
        if LOSS in line:
            found = found.after(line["step"], line[LOSS])
    return found


@torch.no_grad()
def measure(engine: Engine, examples: Rows, world: World, *, batch_size: int, pad_id: int, ranks: Group) -> float:
    """Mean over the target tokens of all rows, in nats. A collective; batch_size: rows that a rank runs at once.

    ranks: those that divide rows among them.
    """
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for piece in micro_batches(range(len(examples)), ranks.world_rank, ranks.world_size, batch_size):
        batch = ranks.part(data.collate([examples[row] for row in piece], pad_id), pad_id)
        total += loss_sum(engine.model, batch.to(world.device))
    if world.size > 1:
        dist.all_reduce(total)
    return float(total) / examples.sums()[1]
