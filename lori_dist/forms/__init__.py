"""Forms: what one adapted layer is, one per file, by the name that `adapter.form` takes.

A file has `form(*, rank, alpha, trains_a, **options)`, which gives a layer's tensors (`entries`) and the factors of
each task's update (`factors`): forward pass, export, fold and merges come from that one function. A form whose update
depends on the input has `update` instead. Constants of the file, each a mapping from options to the values that ask for
it: `PER_TASK`, tasks have updates of their own; `OWN_A`, each has its own A; `RANK_FOR_EACH`, each needs a part of the
rank; `DEPENDENT`, the update depends on the input; `OF_ROWS`, what is chosen is chosen for a row; `SETTLES`, a training
makes an ordinary adapter of it at its end; `IN_SEQUENCE`, it may be trained on one task after the other; `MOMENTS`, a
function `given(a, weight, factors, **options)` of the file makes a start from second moments of the tasks' inputs.
`PENALTY`: the option that is a penalty's weight; `COUNTS`: one that is zero where layers count nothing; `AT_MOST_RANK`,
`AT_LEAST_RANK`: options that are at most, or at least, the rank.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from lori_dist import plugin
from lori_dist.errors import AdapterError, ConfigError

LORI = "lori"
"""The form that has a kernel of its own, and files of versions 1 to 3."""

Start = Literal["a", "zeros", "ones", "eye", "uniform"]
Tensors = Mapping[str, Tensor]
"""A layer's tensors for one task, by name: of those that tasks own, that task's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One linear layer, and who trains on it."""

    module: str
    in_features: int
    out_features: int
    tasks: tuple[str, ...]
    blocks: tuple[int, ...] = ()
    """Rows of each part into which A was divided by data, if a form does that: see `Given`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One tensor of a form in one layer."""

    shape: tuple[int, ...]
    """Of one task's, where it is per_task."""
    per_task: bool = False
    """Every task has its own. They are one parameter, stacked along a first axis in the order of the tasks: so it has a
    gradient on every rank, whatever rows that has."""
    start: Start = "zeros"
    """a: the projection of the seed; uniform: on +-1/sqrt(the last size), from the seed as well."""
    trained: bool = True
    """A tensor that is not trained is regenerated from the seed: it is in no file."""
    counted: bool = False
    """It follows from what layers count: (rank,), not `trained`, zero at the start, in checkpoints and files."""
    sparse: bool = False
    """Calibration chooses which entries exist. The last two axes are those of B, (out_features, rank); all places of
    axes before them have one mask. Starts at zero."""

    @property
    def is_stored(self) -> bool:
        return self.trained or self.counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What a layer begins with where it was computed from data, and no seed makes it."""

    a: Tensor  # (rank, in_features), fp32
    blocks: tuple[int, ...] = ()
    """Rows of each part of A, if a form divides it into parts."""


def pair(site: Site, rank: int, *, trains_a: bool) -> dict[str, Entry]:
    """LoRI's own two tensors: A of the seed, `a`, and a sparse B, `b`, that all tasks share."""
    return {
        "a": Entry(shape=(rank, site.in_features), start="a", trained=trains_a),
        "b": Entry(shape=(site.out_features, rank), sparse=True),
    }


def refuse_above_rank(rank: int, **numbers: int) -> None:
    """Raises ConfigError that names the option, for a number above the rank."""
    for option, number in numbers.items():
        if number > rank:
            raise ConfigError(f"adapter.form.{option}: got {number}, and adapter.rank is {rank}; give at most that")


class AnyForm(Protocol):
    """What one adapted layer is: a `Form` or a `DependentForm`."""

    def entries(self, site: Site) -> Mapping[str, Entry]:
        """Name -> tensor. Names are lower-case identifiers."""
        ...


@runtime_checkable
class Form(AnyForm, Protocol):
    """A form whose update of a task is one matrix, whatever the input."""

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """B, (out_features, k), with the scale in it, and A, (k, in_features), differentiable. An A that is given back
        as it is, `t["a"]`, stays one that a seed makes."""
        ...


@runtime_checkable
class DependentForm(AnyForm, Protocol):
    """A form whose update depends on the input: attached or evaluated, but never folded, exported or merged. Its file
    has the constant `DEPENDENT`."""

    def update(self, t: Tensors, x: Tensor) -> Tensor:
        """What a layer adds for x, (tokens, in_features), with the scale in it: (tokens, out_features)."""
        ...


@runtime_checkable
class Choosing(AnyForm, Protocol):
    """A dependent form that chooses something, for each token or, with the constant `OF_ROWS`, for each row: then from
    the mean of what the tokens of its prompt bring, so that the answer does not matter and may not be there yet."""

    def choose(self, t: Tensors, x: Tensor) -> Mapping[str, Tensor]:
        """What is chosen for x, (tokens or rows, in_features): name -> (tokens or rows, ...). Where layers count,
        `ranks` are the numbers of the ranks that are taken."""
        ...

    def update(self, t: Tensors, x: Tensor, chosen: Mapping[str, Tensor]) -> Tensor:
        """As that of a `DependentForm`. chosen: for each token."""
        ...


@runtime_checkable
class Counting(Choosing, Protocol):
    """A form whose layers count how often they take each rank, over all ranks of a step and all tokens, or rows, that
    have something to learn from."""

    def after_step(self, t: Tensors, counts: Tensor) -> Mapping[str, Tensor]:
        """Name -> what a `counted` tensor is after a step. counts: of the step, (rank,), int64."""
        ...


@runtime_checkable
class Settling(AnyForm, Protocol):
    """A form of which a training makes an ordinary adapter at its end. Its file has the constant `SETTLES`."""

    def settled(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """B and A as `Form.factors` gives them."""
        ...


@runtime_checkable
class Penalised(Protocol):
    """A form that adds something to what is minimised."""

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        """What one layer adds, 0-dim, with its weight in it; None: nothing. Of all layers the mean is taken.

        t: of a training in sequence also `past`, (out_features, columns): the B that earlier tasks left."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class FormChoice:
    """A form with its options, for the tasks that are trained together."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    """Seed of each task's own A; needed by forms that have one."""

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise AdapterError(f"form: got tasks {list(self.tasks)}; name at least one, each of them once")
        if self.seeds and len(self.seeds) != len(self.tasks):
            raise AdapterError(f"form: got {len(self.seeds)} seeds for {len(self.tasks)} tasks; give one for each")

    def form(self, *, rank: int, alpha: float, trains_a: bool) -> AnyForm:
        """Raises AdapterError for a form or options that do not exist or fit."""
        try:
            method = plugin.find("forms", self.name, "form", "form")
            made: AnyForm = method.load()(
                rank=rank, alpha=alpha, trains_a=trains_a, **method.bind(self.options, "form")
            )
        except ConfigError as error:
            raise AdapterError(str(error)) from error
        return made

    @property
    def is_per_task(self) -> bool:
        """Whether each task has an update of its own."""
        return declares(self.name, self.options, "PER_TASK")

    @property
    def is_dependent(self) -> bool:
        """Whether the update depends on the input."""
        return declares(self.name, self.options, "DEPENDENT")

    @property
    def is_of_rows(self) -> bool:
        """Whether something is chosen for each row."""
        return declares(self.name, self.options, "OF_ROWS")

    @property
    def settles(self) -> bool:
        """Whether a training makes an ordinary adapter of it."""
        return declares(self.name, self.options, "SETTLES")


def declares(name: str, options: Mapping[str, Any], constant: str) -> bool:
    """Whether a form's file says by a constant that it has a property with these options."""
    return plugin.find("forms", name, "form", "adapter.form").declares(constant, options)


@functools.cache
def of_one_layer(tasks: tuple[str, ...]) -> Site:
    """A layer to ask a form about what does not depend on sizes."""
    return Site(module="layer", in_features=1, out_features=1, tasks=tasks)
