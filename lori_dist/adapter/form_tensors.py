"""The tensors of a form in one layer: shapes, masks and initial values, whether on a model or in a file."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lori_dist.adapter.projection import Recipe, projection
from lori_dist.errors import AdapterError
from lori_dist.forms import AnyForm, Entry, FormChoice, Given, Site


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The tensors of a form in one layer, stacked over tasks."""

    site: Site
    entries: Mapping[str, Entry]
    given: Tensor | None = None
    """A, where it was computed from data."""

    @classmethod
    def of(cls, form: AnyForm, site: Site, given: Given | None = None) -> "Sizes":
        if given is None:
            return cls(site=site, entries=form.entries(site))
        site = dataclasses.replace(site, blocks=given.blocks)
        entries = form.entries(site)
        if any(one.per_task or one.shape != given.a.shape for one in entries.values() if one.start == "a"):
            raise AdapterError(
                f"given: one A for all tasks was given for {site.module}, and its form has others; remove it"
            )
        return cls(site=site, entries=entries, given=given.a)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor: with the tasks first, where each has its own."""
        entry = self.entries[name]
        return (len(self.site.tasks), *entry.shape) if entry.per_task else entry.shape

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    def mask_shape(self, name: str) -> tuple[int, ...]:
        """Of the mask of a sparse tensor: one for all places before its last two axes, for each task with its own."""
        entry = self.entries[name]
        return (len(self.site.tasks), *entry.shape[-2:]) if entry.per_task else entry.shape[-2:]

    def index(self, name: str, mask: Tensor) -> Tensor | None:
        """Flat positions in the whole tensor of what a mask keeps, int32; None for all."""
        entry = self.entries[name]
        if bool(mask.all()):
            return None
        wide = mask.view(*mask.shape[:-2], *[1] * (len(entry.shape) - 2), *mask.shape[-2:]).expand(self.shape(name))
        return wide.flatten().nonzero().squeeze(1).to(torch.int32)

    def recipes(self, name: str, choice: FormChoice, seed: int, dtype: torch.dtype) -> list[Recipe]:
        """How a tensor that starts as `a` is made: one recipe, or one for each task. Raises AdapterError where tasks
        lack seeds."""
        entry = self.entries[name]
        if entry.per_task and not choice.seeds:
            raise AdapterError(f"form: {choice.name} has an A for each task with these options; give their seeds")
        seeds = choice.seeds if entry.per_task else (seed,)
        rank, in_features = entry.shape
        return [
            Recipe(seed=one, module=self.site.module, rank=rank, in_features=in_features, dtype=dtype) for one in seeds
        ]

    def start(self, name: str, choice: FormChoice, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The whole tensor before training."""
        entry, shape = self.entries[name], self.shape(name)
        match entry.start:
            case "a":
                if self.given is not None:
                    return self.given.to(device, copy=True)
                made = [recipe.make(device=device) for recipe in self.recipes(name, choice, seed, dtype)]
                return torch.stack(made) if entry.per_task else made[0]
            case "eye":
                return torch.eye(entry.shape[-1], device=device).expand(shape).contiguous()
            case "uniform":
                place, columns = f"{self.site.module}:{name}", shape[-1]
                rows = math.prod(shape) // columns
                return projection(seed, place, rows, columns, device=device).view(shape)
            case "ones":
                return torch.ones(shape, device=device)
            case "zeros":
                return torch.zeros(shape, device=device)
