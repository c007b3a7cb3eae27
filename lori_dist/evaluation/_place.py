"""The base of an evaluation: where each rank of a gang holds its share, or whole in one process."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from lori_dist import plugin
from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.training.engine import held_of_base
from lori_dist.training.model import frozen, load_model
from lori_dist.training.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """A base to compute with."""

    model: PreTrainedModel
    is_sharded: bool
    """Whether a forward pass is a collective."""
    close: Callable[[], None]
    """Gives its memory back."""


def place(run: Run, world: World | None, device: torch.device) -> Base:
    """The run's base. world: the gang whose ranks all call this, each to hold what the engine gives it; None: this
    process, which holds all of it on the device.

    Raises ConfigError if it cannot be loaded, or for options that do not fit the ranks.
    """
    if world is None:
        model = load_model(run.model).to(device)
        return Base(model=model, is_sharded=False, close=lambda: None)
    name, method, options = engine_of(run)
    model, weights = frozen(run.model)
    close = method.load()(model, weights, world, **options)
    held, total = held_of_base(model)
    if world.rank == 0:
        log.info(
            "evaluating on %d rank%s (%s) with %s; rank 0 holds %.0f%% of the base's %s weights",
            world.size,
            "s" * (world.size > 1),
            world.device.type,
            name,
            100 * held / max(total, 1),
            f"{total:,}",
        )
    return Base(model=model, is_sharded=held < total, close=close)


def engine_of(run: Run) -> tuple[str, plugin.Method, Mapping[str, Any]]:
    """The engine of evaluate.engine, or else that of train.engine: its name, its `place`, and the options for it.

    An engine of train.engine that has no `place` is replaced by ddp.
    """
    own = run.evaluate.engine
    if own is not None:
        method = plugin.find("engines", own.name, "place", "evaluate.engine")
        return own.name, method, method.bind(own.options, "evaluate.engine")
    chosen = run.train.engine
    settled = plugin.find("engines", chosen.name, "build", "train.engine").companion("settled")
    try:
        method = plugin.find("engines", chosen.name, "place", "train.engine")
    except ConfigError:  # of the user's own, for training alone: every rank then holds the whole base
        log.info("%s has no function `place`: every rank holds the whole base while it is evaluated", chosen.name)
        return "ddp", plugin.find("engines", "ddp", "place", "train.engine"), {}
    options = chosen.options if settled is None else settled(chosen.options)
    return (
        chosen.name,
        method,
        method.bind({key: value for key, value in options.items() if key in method.options}, "train.engine"),
    )
