"""The tasks of a batch's rows, for a model in which tasks have updates of their own."""

from typing import Any

from torch import Tensor, nn

from lori_dist.adapter import sharded
from lori_dist.adapter.routing import Routing
from lori_dist.errors import AdapterError

ROUTING = "lori_routing"
"""Attribute of a model in which tasks have updates of their own, for what routes rows to them."""
COLUMN, HOOK = "task", "lori_column"
"""Argument of a model's forward pass that names each row's task, and the attribute that has its hook."""


def routing_of(model: nn.Module) -> Routing | None:
    """What routes the rows of a batch to the tasks' own updates; None for a model that has none.

    Its names are the tasks. The model may be wrapped by DDP or an engine.
    """
    return getattr(sharded.unwrapped(model), ROUTING, None)


def route_by_column(model: nn.Module, routing: Routing) -> None:
    """Makes a model take `task` beside its inputs, as Trainers pass a column of their data on: the name or the number
    of each row's task. It holds for the backward pass too.

    Raises AdapterError, in a forward pass, for an unknown task, and for a batch without the column that follows one
    with it.
    """
    last: list[tuple[tuple[int, int], ...]] = []

    def number_of(task: Any) -> int:
        if isinstance(task, str) and task in routing.names:
            return routing.names.index(task)
        if isinstance(task, str) or not 0 <= int(task) < len(routing.names):
            raise AdapterError(f"{COLUMN}: unknown task {task!r}; there are {', '.join(routing.names)}")
        return int(task)

    def route(module: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tasks = named.pop(COLUMN, None)
        if tasks is not None:
            routing.begin([number_of(task) for task in (tasks.tolist() if isinstance(tasks, Tensor) else tasks)])
            last[:] = [routing.rows_of]
        elif last and routing.only_one is None and routing.rows_of is last[0]:
            raise AdapterError(f"{COLUMN}: the batch does not say which task its rows are of, as earlier ones did")
        return args, named

    setattr(model, HOOK, model.register_forward_pre_hook(route, with_kwargs=True))
