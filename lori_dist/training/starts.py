"""What layers begin with where it follows from the tasks' inputs instead of a seed alone.

The projections are computed by rank 0 from files of moments, once for a job: a resumed one reads them again, as another
machine would compute them with other rounding. The adapter's file stores them, for no seed makes them.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lori_dist import plugin
from lori_dist.adapter import moments
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.bases import features, is_conv1d
from lori_dist.adapter.matching import match
from lori_dist.adapter.projection import projection
from lori_dist.config import Run
from lori_dist.errors import AdapterError, JobError
from lori_dist.forms import Given
from lori_dist.jobs import MOMENTS, moments_of
from lori_dist.tensors import metadata, save, stored
from lori_dist.training.weights import Weights, skeleton
from lori_dist.training.world import World, from_first

START = "start.safetensors"
"""File in an unfinished job's folder: what its layers begin with."""
NOTES = "start"
"""Key of the file's metadata."""

log = logging.getLogger(__name__)


def given(
    run: Run,
    task: str,
    spec: Spec,
    world: World,
    folder: Path,
    *,
    fingerprint: str,
    still_mine: Callable[[], None],
    is_rehearsal: bool,
) -> dict[str, Given] | None:
    """Module path -> what it begins with; None where a seed alone says it. Every rank calls this.

    folder: of the job; only rank 0 need see it. is_rehearsal: nothing is written, and moments that are not measured yet
    have a stand-in of the same size. Raises JobError for moments that are missing, AdapterError for damaged ones.
    """
    tasks = moments_of(run, task)
    if not tasks:
        return None

    def make() -> dict[str, Given]:
        known = _read(folder / START, fingerprint)
        if known is not None:
            return known
        files = [run.folder / f"moments-{one}" / MOMENTS for one in tasks]
        missing = next((file for file in files if not file.exists()), None)
        if missing is not None and not is_rehearsal:
            raise JobError(f"{missing}: is missing, and {task} begins from it; `lori run` measures it")
        made = _made(run, spec, None if missing else [moments.read(file) for file in files])
        if not is_rehearsal:
            still_mine()
            _write(folder / START, made, fingerprint)
        return made

    return from_first(world, make)


def _made(run: Run, spec: Spec, found: list[moments.Moments] | None) -> dict[str, Given]:
    model, weights = skeleton(replace(run.model, quantize=None))  # their own weights, not those that are computed with
    bases = match(model, spec.targets, spec.modules_to_save, spec.exclude)
    made = {}
    for path, base in bases.items():
        a = projection(spec.seed, path, spec.rank, features(base)[1])
        made[path] = Given(a=a) if found is None else _of_layer(run, path, base, a, found, weights)
    return made


def _of_layer(run: Run, path: str, base: nn.Module, a: Tensor, found: list[moments.Moments], weights: Weights) -> Given:
    if run.adapter.init == "osrm":
        return Given(a=moments.avoiding(a, moments.factor(found, path)))
    form = run.adapter.form
    method = plugin.find("forms", form.name, "form", "adapter.form")
    start = method.companion("given")
    assert start is not None
    options = {name: option.default for name, option in method.options.items()}
    options |= method.bind(form.options, "adapter.form")
    like = base.get_parameter("weight")
    weight = torch.empty(like.shape, dtype=like.dtype)
    weights.read(f"{path}.weight", weight.view(-1), 0)
    factors = [moments.factor([one], path) for one in found]
    made: Given = start(a, (weight.t() if is_conv1d(base) else weight).double(), factors, **options)
    return made


def _write(path: Path, made: Mapping[str, Given], fingerprint: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {"fingerprint": fingerprint, "blocks": {module: one.blocks for module, one in made.items()}}
    save(path, {module: one.a for module, one in made.items()}, {NOTES: json.dumps(notes)})


def _read(path: Path, fingerprint: str) -> dict[str, Given] | None:
    """What an earlier attempt at the job has computed. None where there is none; a damaged one is computed again."""
    if not path.exists():
        return None
    try:
        notes: Any = json.loads(metadata(path)[NOTES])
        if notes["fingerprint"] != fingerprint:
            return None
        return {
            module: Given(a=one.load(), blocks=tuple(notes["blocks"][module])) for module, one in stored(path).items()
        }
    except (OSError, ValueError, LookupError, TypeError, RecursionError, AdapterError) as error:
        log.warning("%s: cannot be read (%s); computing it again", path, error)
        return None
