"""The recommended placement, and the effect of other settings."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lori_dist import plugin
from lori_dist.config import Run
from lori_dist.errors import ConfigError
from lori_dist.gpus import GIB
from lori_dist.plan.cost import Hardware, Trained, placed_on, ranks_of, with_micro_batches_of
from lori_dist.plan.placement import Placement

SHOWN = 3
"""Number of alternatives that are listed."""
NOTICEABLE = 0.98
"""Largest share of the recommended time that a listed alternative takes."""


def recommended(
    run: Run, trained: Sequence[Trained], hardware: Hardware, found: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The fastest placement that fits, with activation checkpointing if the run asks for it or needs it, and the
    reason.

    `alternatives`: sentences on what other settings would change: no activation checkpointing, another
    micro_batch_size, replicas, offload.
    """
    fitting = [one for one in found if one["fits"] or one["fits_with_checkpointing"]]
    if not fitting:
        least = min(found, key=lambda one: one["total_with_checkpointing"])
        lacking = least["total_with_checkpointing"] - least["room"]
        others = list(_others(run, trained, hardware, least))
        advice = "use more devices, a quantised base (model.quantize), or fewer tokens (train.max_length)"
        return {
            "placement": None,
            "reason": f"nothing fits: {least['name']} takes the least, and lacks {lacking / GIB:.1f} GiB a device; "
            f"{advice}",
            "alternatives": others,
        }
    best = min(fitting, key=lambda one: one["training_seconds"])
    is_saving = bool(best["checkpointing"])
    needs = ", with train.activation_checkpointing: true," if is_saving else ""
    step = best["step"]
    bound = "computing" if step["compute"] + step["dequantize"] >= step["traffic"] else "traffic"
    rest = [one["name"] for one in found if one not in fitting]
    short = f"; {', '.join(rest)} would not fit" if rest else ""
    return {
        "placement": best["name"],
        "engine": best["engine"],
        "activation_checkpointing": is_saving,
        "reason": f"{best['name']}{needs} is the fastest of {len(fitting)} that fit, bound by {bound}{short}",
        "alternatives": [*_without_checkpointing(run, fitting), *_others(run, trained, hardware, best)],
    }


def _without_checkpointing(run: Run, fitting: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields the time that leaving out the second forward pass would save, if the run asks for it without need."""
    able = [one for one in fitting if one["fits"]]
    if not run.train.activation_checkpointing or not able:
        return
    best = min(able, key=lambda one: one["training_seconds_otherwise"])
    seconds, other = best["training_seconds"], best["training_seconds_otherwise"]
    yield (
        f"train.activation_checkpointing=false fits too: {best['name']} takes {best['total'] / GIB:.1f} of "
        f"{best['room'] / GIB:.1f} GiB, and {other / seconds:.2f} of the time"
    )


def _others(run: Run, trained: Sequence[Trained], hardware: Hardware, best: Mapping[str, Any]) -> Iterator[str]:
    """Yields settings that fit and are faster than the best, or that fit if nothing else does."""
    nothing_fits = not (best["fits"] or best["fits_with_checkpointing"])
    tried = []
    for words, changed, placement in _variants(run, trained, hardware, best):
        try:
            one = placed_on(run, changed, hardware, placement)
        except ConfigError:  # which that engine cannot be
            continue
        if not (one["fits"] or one["fits_with_checkpointing"]):
            continue
        ratio = one["training_seconds"] / best["training_seconds"]
        if nothing_fits or ratio < NOTICEABLE:
            tried.append((ratio, words, one))
    for ratio, words, one in sorted(tried, key=lambda item: item[0])[:SHOWN]:
        total = one["total_with_checkpointing"] if one["checkpointing"] else one["total"]
        saving = ", with activation checkpointing" if one["checkpointing"] else ""
        time = "fits" if nothing_fits else f"takes {ratio:.2f} of the time"
        yield f"{words} {time}, in {total / GIB:.1f} of {one['room'] / GIB:.1f} GiB{saving}"


def _variants(
    run: Run, trained: Sequence[Trained], hardware: Hardware, best: Mapping[str, Any]
) -> Iterator[tuple[str, Sequence[Trained], Placement]]:
    name, options = best["engine"]["name"], {key: item for key, item in best["engine"].items() if key != "name"}
    ranks = ranks_of(run, hardware)
    own = Placement(engine=name, options=options, ranks=ranks)
    most = -(-run.train.batch_size // ranks)
    size = min(run.train.rows_at_once, most)
    for other in sorted({1, max(1, size // 2), min(most, 2 * size), min(most, 4 * size)} - {size}):
        words = f"train.micro_batch_size={other} with {own.name}"
        yield words, [with_micro_batches_of(one, other, ranks) for one in trained], own
    known = plugin.find("engines", name, "build", "train.engine").options
    for key, value in (*(("replicas", number) for number in (2, 4, 8)), ("offload", True)):
        if key in known and options.get(key, known[key].default) != value:
            changed = Placement(engine=name, options={**options, key: value}, ranks=ranks)
            yield f"train.engine={changed.name}", trained, changed
