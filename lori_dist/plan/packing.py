"""Whether tasks are trained at once over one base or one after another: what `cluster.packing: auto` means."""

import dataclasses

from lori_dist.config import Run
from lori_dist.plan.cost import Hardware, ranks_of, trained_of, training_seconds
from lori_dist.plan.placement import own
from lori_dist.plan.rows import Counter
from lori_dist.plan.steps import gangs
from lori_dist.training.model_files import read_settings
from lori_dist.training.sequences import Share

WORTH = 0.97
"""Largest share of the time of all tasks at once that one after another takes where it is chosen."""


def chosen(run: Run, hardware: Hardware, counter: Counter) -> tuple[Run, str | None]:
    """A run with `cluster.packing: off` in place of `auto` where its tasks take less time one after another, by the
    count of its rows under its own engine, and a sentence that says so.

    At once, the base is sent once for all tasks, but where their rows cannot share sequences, each is padded to the
    longest of all. Where they can, the run is as it was, and nothing is counted.
    """
    if run.cluster.packing != "auto" or Share.of(run, str(read_settings(run.model).get("model_type"))) is not Share.NO:
        return run, None
    if all(gang.adapters == 1 for gang in gangs(run, counter)):
        return run, None
    ranks = ranks_of(run, hardware)
    apart = dataclasses.replace(run, cluster=dataclasses.replace(run.cluster, packing="off"))
    placement = own(ranks, hardware.nodes, run.train.engine)
    at_once, in_turn = (
        training_seconds(
            trained_of(one, gangs(one, counter), ranks), hardware, placement, run.train.activation_checkpointing
        )
        for one in (run, apart)
    )
    if in_turn > WORTH * at_once:
        return run, None
    return apart, (
        f"cluster.packing: auto trains the tasks one after another, which takes {in_turn / at_once:.2f} of the time of "
        "all at once: their rows have different lengths, and this model pads each to the longest of all."
    )
