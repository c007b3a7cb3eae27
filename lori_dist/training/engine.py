"""The protocol of engines, which train a model, and the code that all of them share.

An engine is `build(model, weights, train, world, *, state, ...)` in a file of engines/. The keyword-only parameters
that have a default are its options.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lori_dist.adapter import packed
from lori_dist.adapter.attach import adapted, trainable
from lori_dist.adapter.routing import adapter_of
from lori_dist.config import Train
from lori_dist.training.data import Batch
from lori_dist.training.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """This rank's part of a tensor: entries that follow each other, row by row."""

    start: int
    """Flat position of the first."""
    data: Tensor  # (entries,), the memory itself


Quantity = Literal["values", "exp_avg", "exp_avg_sq"]
"""Quantities that training changes: the kept entries, and Adam's first and second moment of each."""
QUANTITIES: tuple[Quantity, ...] = ("values", "exp_avg", "exp_avg_sq")

PIECE = 2**19
"""Entries that are sent at once when something is gathered: 2 MB."""

WINDOW = 2**22
"""Entries that rank 0 holds at once when something is gathered in turn: 16 MB, or one tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """All that training has changed, whatever engine holds it: full tensors on the CPU, fp32.

    The mappings have one key per module that keeps any entries, in the model's order.
    """

    step: int
    """Updates done; of several adapters, the most."""
    skipped: int = 0
    """Steps besides, which changed nothing."""
    values: Mapping[str, Tensor]
    """Module path -> (kept,)."""
    exp_avg: Mapping[str, Tensor]
    """Adam's first moment, as values."""
    exp_avg_sq: Mapping[str, Tensor]
    """Adam's second moment, as values."""
    steps: Mapping[str, int] = field(default_factory=dict)
    """Steps of each adapter, if there are several. The tensors may then be those of some of them."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """The training loop's record of earlier steps, as plain JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Equal on all ranks."""

    loss: float
    """Mean negative log-likelihood of a target token, in nats, over the global batch."""
    grad_norm: float
    """Norm of the whole gradient, before clipping."""
    task_losses: tuple[float, ...] = ()
    """Each task's part of the loss, if tasks are trained together."""


Accept = Callable[[StepResult], bool | Mapping[str, bool]]
"""Whether a step's gradient is to change the values: of all, or of each adapter. Called once a step, on every rank,
with the same answer."""


def always(result: StepResult) -> bool:
    return True


class Engine(Protocol):
    """A model being trained. `step` is a collective: every rank calls it as often."""

    @property
    def model(self) -> nn.Module:
        """The model that computes: the library's own wrapper."""
        ...

    @property
    def num_steps(self) -> int:
        """Updates done, those before a resumption included."""
        ...

    def step(
        self,
        micro_batches: Sequence[Batch],
        *,
        num_targets: int,
        lr: "LearningRate",
        tasks: "TaskGradients | None" = None,
        accept: Accept = always,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches, of which every rank has the same number.

        num_targets: of the global batch, over all ranks; 1 where the batches have weights. lr: for this step. tasks:
        what sums up gradients over batches and ranks and makes the step's gradient, in the engine's place. accept:
        where it says no, values and moments stay as they were, bit for bit. lr and accept may differ by adapter.
        """
        ...

    def load(self, state: State) -> None:
        """Puts a state in place of values and moments, of several adapters in place of those that it has."""
        ...

    def parts(self, quantity: Quantity) -> Mapping[str, Part]:
        """This rank's parts of a quantity, by module path, in the model's order: the memory itself, fp32.

        Every rank has a key for every module that keeps entries, if only with an empty part. Several ranks may hold
        the same entries, which are then equal.
        """
        ...

    def close(self) -> None:
        """Gives its memory back. Neither the engine nor the model it was built from is of use afterwards."""
        ...


class TaskGradients(Protocol):
    """Makes the gradient of a step that trains several tasks together; see `surgery`."""

    def begin(self, batch: Batch) -> None:
        """A batch is to run, whose backward pass gives the parameters no gradient."""
        ...

    def gradient(self, parts: Mapping[str, Part], step: int, losses: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Name -> the gradient, over all ranks, of what this one holds, flat.

        step: of the training, from 0. losses: of this rank's micro-batches, (tasks,) each.
        """
        ...


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by the names of `attach.trainable`, of several adapters one after the other; of a model without
    an adapter, name -> parameter that needs a gradient."""
    if several := dict(packed.trainable(model)):
        return several
    if adapted(model):
        return trainable(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def held_of_base(model: nn.Module) -> tuple[int, int]:
    """How many of the frozen weights this rank holds between steps, and how many there are.

    Shards are DTensors with FSDP2, and parameters with a `ds_tensor` with ZeRO-3.
    """
    held = total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        shard: Any = getattr(parameter, "ds_tensor", None)
        if shard is not None:
            held, total = held + shard.numel(), total + int(getattr(parameter, "ds_numel"))  # noqa: B009
        else:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            held, total = held + local.numel(), total + parameter.numel()
    return held, total


# --- optimizer -------------------------------------------------------------------------------------------------------


ADAPTER = "adapter"
"""Key of a group of the optimizer's parameters for the name of its adapter."""


def adamw(parameters: Mapping[str, Tensor], train: Train) -> torch.optim.AdamW:
    """The optimizer, over the trained values only: a group for each adapter."""
    groups = [
        {
            "params": [parameter for name, parameter in parameters.items() if adapter_of(name) == adapter],
            ADAPTER: adapter,
        }
        for adapter in adapters_of(parameters)
    ]
    return torch.optim.AdamW(
        groups, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay, fused=True
    )


def adapters_of(names: Iterable[str]) -> tuple[str, ...]:
    """The adapters that trained tensors belong to; one without a name where there are not several."""
    return tuple(dict.fromkeys(map(adapter_of, names)))


def start_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[Tensor, int]]) -> None:
    """Gives every parameter the moments AdamW keeps, at zero, before the first step: so they can always be read.

    parameters: each with the number of steps it has had.
    """
    for parameter, num_steps in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(num_steps), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def steps_had(name: str, state: State | None) -> int:
    """Updates that a trained tensor has had, in a state with all adapters."""
    if state is None:
        return 0
    return state.steps[adapter_of(name)] if state.steps else state.step


def set_num_steps(moments: Iterable[tuple[str, Mapping[str, Tensor]]], state: State) -> None:
    """moments: adapter -> what AdamW keeps of a tensor of it. Adapters that the state does not have keep theirs."""
    for adapter, kept in moments:
        if not state.steps or adapter in state.steps:
            kept["step"].fill_(state.steps.get(adapter, state.step))


LearningRate = float | Mapping[str, float]
"""The learning rate of all that is trained, or of each adapter."""


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: LearningRate) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr if isinstance(lr, float) else lr[group[ADAPTER]]


def update(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], answer: bool | Mapping[str, bool]
) -> bool:
    """Changes the values of the adapters that a step was accepted for. Returns whether there are any."""
    for name, parameter in parameters.items():
        if not is_accepted(answer, adapter_of(name)):
            parameter.grad = None  # which leaves the moments as they are, too
    is_any = answer if isinstance(answer, bool) else any(answer.values())
    if is_any:
        optimizer.step()
    return is_any


def is_accepted(answer: bool | Mapping[str, bool], adapter: str) -> bool:
    return answer if isinstance(answer, bool) else answer[adapter]


def clip(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scales the gradients down to a global norm. Returns the norm they had."""
    return torch.nn.utils.clip_grad_norm_(list(parameters), math.inf if max_norm is None else max_norm)


def finish(losses: Sequence[Tensor], norm: Tensor) -> StepResult:
    """A step's result, from the losses of this rank's micro-batches and the norm: one collective, one copy to the host.

    losses: of each micro-batch, (tasks,). norm: 0-dim, equal on all ranks.
    """
    loss = torch.stack(list(losses)).sum(0)
    dist.all_reduce(loss)
    *found, grad_norm = torch.cat([loss, norm.to(loss.device, loss.dtype).view(1)]).tolist()
    return StepResult(loss=sum(found), grad_norm=grad_norm, task_losses=tuple(found) if len(found) > 1 else ())


# --- state -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def restore(engine: Engine, state: State | None, quantities: Sequence[Quantity] = QUANTITIES) -> None:
    """Puts what this rank holds of a state into an engine. Nothing is sent."""
    if state is not None:
        for quantity in quantities:
            full = getattr(state, quantity)
            for path, part in engine.parts(quantity).items():
                if state.steps and path not in full:
                    continue
                part.data.copy_(full[path].view(-1)[part.start : part.start + part.data.numel()])


def collect(engine: Engine, world: World) -> State:
    """The portable state, in full on rank 0 and empty on the others. A collective."""
    values, exp_avg, exp_avg_sq = (gather(engine, quantity, world) for quantity in QUANTITIES)
    return State(step=engine.num_steps, values=values, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


def gather(engine: Engine, quantity: Quantity, world: World) -> dict[str, Tensor]:
    """A quantity in full, flat, on the CPU of rank 0; nothing on the others. A collective.

    Nothing of the base is sent, and besides the result no rank needs memory for more than PIECE entries.
    """
    parts = engine.parts(quantity)
    return _gathered(parts, _holdings(parts, world), world)


def gather_in_turn(engine: Engine, quantity: Quantity, world: World) -> Iterator[dict[str, Tensor]]:
    """Yields what `gather` gives, some tensors after the others: at most WINDOW entries, or one tensor. All ranks take
    all."""
    parts = engine.parts(quantity)
    holdings = _holdings(parts, world)
    for paths in _windows(_sizes(parts, holdings)):
        some = {path: parts[path] for path in paths}
        yield _gathered(some, [holding for holding in holdings if holding.path in some], world)


def entries(engine: Engine, world: World) -> dict[str, int]:
    """How many entries each trained tensor has, over all ranks. A collective."""
    parts = engine.parts("values")
    return _sizes(parts, _holdings(parts, world))


def _sizes(parts: Mapping[str, Part], holdings: Iterable["_Holding"]) -> dict[str, int]:
    sizes = dict.fromkeys(parts, 0)
    for holding in holdings:
        sizes[holding.path] = max(sizes[holding.path], holding.start + holding.numel)
    return sizes


def _windows(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    window: list[str] = []
    for path in sizes:
        if window and sum(sizes[one] for one in (*window, path)) > WINDOW:
            yield window
            window = []
        window.append(path)
    if window:
        yield window


@torch.no_grad()
def _gathered(parts: Mapping[str, Part], holdings: Sequence["_Holding"], world: World) -> dict[str, Tensor]:
    gathered: dict[str, Tensor] = {}
    if world.rank == 0:
        sizes = _sizes(parts, holdings)
        full = torch.empty(sum(sizes.values()))
        gathered = dict(zip(sizes, full.split(list(sizes.values())), strict=True))
    buffer = torch.empty(min(PIECE, sum(holding.numel for holding in holdings)), device=world.device)
    for run in _runs(holdings):
        sender, sent = run[0].rank, buffer[: sum(one.numel for one in run)]
        if sender == world.rank:
            torch.cat(
                [parts[one.path].data[one.offset : one.offset + one.numel].to(sent.device) for one in run], out=sent
            )
        if sender:  # to all, as the libraries have no lasting connection between two ranks; these are small pieces
            dist.broadcast(sent, src=sender)
        if world.rank == 0:
            for one, piece in zip(run, sent.split([one.numel for one in run]), strict=True):
                gathered[one.path][one.start : one.start + one.numel].copy_(piece)
    return gathered


@dataclass(frozen=True, kw_only=True, slots=True)
class _Holding:
    """Entries of one tensor that one rank holds: numel of them, from `offset` on in its part."""

    rank: int
    path: str
    start: int
    offset: int
    numel: int


def _holdings(parts: Mapping[str, Part], world: World) -> list[_Holding]:
    """Who sends what, rank by rank: of ranks that hold the same, the first."""
    everyone: list[list[tuple[int, int]]] = [[] for _ in range(world.size)]
    dist.all_gather_object(everyone, [(part.start, part.data.numel()) for part in parts.values()])
    seen: set[tuple[str, int]] = set()
    holdings = []
    for rank, places in enumerate(everyone):
        for path, (start, numel) in zip(parts, places, strict=True):
            if numel and (path, start) not in seen:
                seen.add((path, start))
                holdings += [
                    _Holding(
                        rank=rank, path=path, start=start + offset, offset=offset, numel=min(PIECE, numel - offset)
                    )
                    for offset in range(0, numel, PIECE)
                ]
    return holdings


def _runs(holdings: Sequence[_Holding]) -> Iterator[list[_Holding]]:
    """Yields the holdings that are sent at once: from one rank, at most PIECE entries."""
    run: list[_Holding] = []
    for holding in holdings:
        if run and (holding.rank != run[0].rank or sum(one.numel for one in run) + holding.numel > PIECE):
            yield run
            run = []
        run.append(holding)
    if run:
        yield run
