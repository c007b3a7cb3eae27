"""The phases of a training job: calibrate (LoRI-D), then train the entries that are kept (LoRI-S)."""

from dataclasses import dataclass

from lori_dist import config
from lori_dist.training import data

CALIBRATE, TRAIN = "calibrate", "train"


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Adam over a fixed set of entries, from zero."""

    name: str
    """CALIBRATE or TRAIN."""
    num_steps: int
    epochs: float | None
    lr: float
    steps_after: int = 0
    """Steps of the phase that follows."""


def phases(train: config.Train, density: float, num_rows: int) -> list[Phase]:
    """The phases of a training, in order: calibrate and train, or only train for a dense adapter."""

    def phase(name: str, steps: int | None, epochs: float | None, lr: float, steps_after: int = 0) -> Phase:
        num_steps = data.num_steps(num_rows, train.batch_size, steps, epochs)
        return Phase(name=name, num_steps=num_steps, epochs=epochs, lr=lr, steps_after=steps_after)

    last = phase(TRAIN, train.steps, train.epochs, train.lr)
    if density == 1.0:
        return [last]
    calibrate = train.calibrate
    lr = train.lr / 10 if calibrate.lr is None else calibrate.lr
    if calibrate.steps is None and calibrate.epochs is None:
        return [phase(CALIBRATE, train.steps, train.epochs, lr, last.num_steps), last]
    return [phase(CALIBRATE, calibrate.steps, calibrate.epochs, lr, last.num_steps), last]
