"""Second moments of what linear layers read, in full or as a sketch, and the projections that follow from them.

The moment of an input is S = mean of x x^T over the tokens x of some rows. Layers that read one input, as q_proj and
k_proj do, have one moment. In full it has in_features^2 entries; a sketch is Y = S Omega with a random Omega of few
columns, the same for all rows, so that sketches add up as moments do, and S is nearly Y (Omega^T Y)^-1 Y^T (Nystrom).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lori_dist.adapter.projection import projection
from lori_dist.errors import AdapterError
from lori_dist.tensors import metadata, save, stored

NOTES = "moments"
"""Key of a file's metadata that holds its notes as JSON."""
SEED = 0
"""Seed of every Omega: those of all tasks are the same."""
LENGTH = 1 / math.sqrt(3)
"""Length of the rows of A that are made here, which is that of the seeded A's rows in the mean: a learning rate that
suits one suits the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """The moments of what a model's layers read of some rows."""

    num_tokens: int
    of_inputs: Mapping[str, Tensor]
    """First layer that reads an input -> its S, (in_features, in_features), or Y, (in_features, width); fp32."""
    inputs: Mapping[str, str]
    """Module path -> the first layer that reads the same input."""

    @property
    def sketched(self) -> tuple[str, ...]:
        """The inputs of which there is a sketch alone."""
        return tuple(name for name, one in self.of_inputs.items() if one.shape[0] != one.shape[1])

    def shape(self, module: str) -> tuple[int, ...]:
        """Of the moment of a module's input. Raises AdapterError for a module that was not measured."""
        if module not in self.inputs:
            raise AdapterError(f"{module}: its input was not measured; measure moments of the same targets")
        return tuple(self.of_inputs[self.inputs[module]].shape)


class Watch:
    """Adds up the moments of what layers read while a model runs. Inside `with`, their inputs are seen."""

    def __init__(self, layers: Mapping[str, nn.Module], *, full_up_to: int, width: int) -> None:
        """layers: by module path. full_up_to: in_features up to which a moment is kept in full; of a wider input, a
        sketch of `width` columns is, if that is narrower."""
        self.layers, self.full_up_to, self.width = layers, full_up_to, width
        self.sums: dict[str, Tensor] = {}
        """First layer that reads an input -> the sum of x x^T, or of x x^T Omega, fp32, on the layer's device."""
        self.inputs: dict[str, str] = {}
        self.num_tokens = 0
        self._omegas: dict[str, Tensor] = {}
        self._counted: Tensor | None = None
        self._last: tuple[str, tuple[Any, ...], Tensor] | None = None
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for path, layer in self.layers.items():
            self._hooks.append(layer.register_forward_pre_hook(self._hook(path), with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._last = self._counted = None

    def begin(self, counted: Tensor) -> None:
        """To be called before each forward pass. counted: which tokens of the batch count, (rows, length) bool; others
        are padding."""
        self._counted, self._last = counted.flatten(), None
        self.num_tokens += int(counted.sum())

    def _hook(self, path: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._add(path, args[0] if args else next(iter(named.values())))

        return add

    @torch.no_grad()
    def _add(self, path: str, x: Tensor) -> None:
        # What was seen last is held, so nothing else can be where it is; a change in place has another version.
        now = (x.data_ptr(), tuple(x.shape), x._version)
        if path not in self.inputs:
            is_same = self._last is not None and self._last[1] == now
            self.inputs[path] = self._last[0] if self._last is not None and is_same else path
        if self.inputs[path] != path:
            return
        self._last = (path, now, x)
        assert self._counted is not None
        flat = x.detach().reshape(-1, x.shape[-1])
        if len(flat) != len(self._counted):
            raise AdapterError(
                f"{path}: reads {len(flat)} vectors of a batch of {len(self._counted)} tokens, so it is unknown which "
                "are padding, and its moment cannot be measured; name it in adapter.exclude"
            )
        flat = flat[self._counted.to(flat.device)].float()
        in_features = flat.shape[1]
        if in_features <= max(self.full_up_to, self.width):
            total, right = self._sum(path, in_features, in_features, flat), flat
        else:
            if path not in self._omegas:
                self._omegas[path] = omega(path, in_features, self.width).to(flat.device)
            total, right = self._sum(path, in_features, self.width, flat), flat @ self._omegas[path]
        total.addmm_(flat.t(), right)

    def _sum(self, path: str, rows: int, columns: int, like: Tensor) -> Tensor:
        if path not in self.sums:
            self.sums[path] = torch.zeros(rows, columns, device=like.device)
        return self.sums[path]

    def moments(self) -> Moments:
        """What was seen so far, on the CPU. Raises AdapterError where that is nothing, or not finite."""
        idle = next((path for path in self.layers if path not in self.inputs), None)
        if not self.num_tokens or idle is not None:
            raise AdapterError(f"{idle or 'moments'}: no token was seen; give rows with text, and layers that run")
        means = {path: (total / self.num_tokens).cpu() for path, total in self.sums.items()}
        wrong = next((path for path, one in means.items() if not bool(one.isfinite().all())), None)
        if wrong is not None:
            raise AdapterError(f"{wrong}: reads values that are not finite; use model.dtype float32, or other rows")
        inputs = {path: self.inputs[path] for path in self.layers}
        return Moments(num_tokens=self.num_tokens, of_inputs=means, inputs=inputs)


def omega(path: str, in_features: int, width: int) -> Tensor:
    """The random matrix of an input's sketch, (in_features, width), from the generator of A: the same everywhere."""
    return projection(SEED, f"{path}:moments", width, in_features).t()


# --- files -----------------------------------------------------------------------------------------------------------


def write(path: Path, moments: Moments, notes: Mapping[str, Any]) -> None:
    """Writes moments to a safetensors file, with notes of the caller's, as plain JSON."""
    about = {"num_tokens": moments.num_tokens, "inputs": dict(moments.inputs), **notes}
    save(path, moments.of_inputs, {NOTES: json.dumps(about)})


def notes_of(path: Path) -> dict[str, Any]:
    """The notes of a file. Raises AdapterError for a file that is not one of moments, or is damaged."""
    try:
        notes = json.loads(metadata(path)[NOTES])
        if not isinstance(notes, dict) or not isinstance(notes.get("inputs"), dict):
            raise ValueError("its notes are damaged")
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise AdapterError(f"{path}: is not a file of moments ({error}); delete it to measure them again") from error
    return notes


def read(path: Path) -> Moments:
    """The moments of a file. Raises AdapterError as `notes_of`."""
    notes = notes_of(path)
    try:
        tensors = {name: one.load() for name, one in stored(path).items()}
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: is not a file of moments ({error}); delete it to measure them again") from error
    return Moments(num_tokens=notes["num_tokens"], of_inputs=tensors, inputs=notes["inputs"])


# --- what follows from them ------------------------------------------------------------------------------------------


def factor(moments: Sequence[Moments], module: str) -> Tensor:
    """F, (in_features, k), float64, so that the sum of the moments of a module's input is F F^T up to rounding; of
    sketches, what they tell of it.

    moments: of the same targets and width, each with the same share whatever its number of rows.
    Raises AdapterError for a module that was not measured, and for moments of different shapes.
    """
    shapes = {one.shape(module) for one in moments}
    if len(shapes) != 1:
        raise AdapterError(
            f"{module}: got moments of shapes {', '.join(map(str, sorted(shapes))) or 'no task'}; measure all of them "
            "with the same settings"
        )
    [(rows, columns)], place = shapes, moments[0].inputs[module]
    total = torch.stack([one.of_inputs[place].double() for one in moments]).sum(0)
    if rows == columns:
        return _root(total)[0]
    sketch = omega(place, rows, columns).double()
    _, inverse = _root(sketch.t() @ total)
    return total @ inverse


def _root(s: Tensor) -> tuple[Tensor, Tensor]:
    """F and G, with F F^T = S and G G^T the pseudo-inverse of S, which is symmetric and was summed in fp32."""
    values, vectors = torch.linalg.eigh((s + s.t()) / 2)
    kept = values > values.max() * len(s) * torch.finfo(torch.float32).eps
    roots = values[kept].sqrt()
    return vectors[:, kept] * roots, vectors[:, kept] / roots


def avoiding(a: Tensor, of_others: Tensor) -> Tensor:
    """A that other inputs pass through least: orthogonal rows of length `LENGTH`, (rank, in_features), fp32.

    Its rows span the `rank` directions in which these inputs have least energy. Where there are more without any, as
    where the inputs are fewer than in_features, it is the projection there that is nearest to the given one.
    a: the seeded A. of_others: as `factor` gives it. Raises AdapterError for a rank above in_features.
    Source: OSRM (arXiv 2505.22934): A A^T = I with the smallest energy of other tasks' inputs. The paper takes the
    smallest eigenvectors of their covariance; the choice among those that are equal, and the length, are ours.
    """
    rank, in_features = a.shape
    if rank > in_features:
        raise AdapterError(f"rank: got {rank} for a layer of {in_features} inputs, which has no more directions")
    directions = torch.linalg.svd(of_others, full_matrices=False).U  # most energy first
    most = directions[:, : in_features - rank]
    exact = a.to(of_others.dtype)
    return (LENGTH * orthonormal(exact - (exact @ most) @ most.t())).float()


def orthonormal(a: Tensor) -> Tensor:
    """The matrix with orthonormal rows that is nearest to one of full rank, (rank, in_features)."""
    found = torch.linalg.svd(a, full_matrices=False)
    made: Tensor = found.U @ found.Vh
    return made
