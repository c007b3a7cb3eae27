"""Task singular vectors: how many a task may keep, and how those of all tasks are made orthogonal."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lori_dist.adapter.update import Update
from lori_dist.errors import ConfigError
from lori_dist.merges._factors import Singular, singular
from lori_dist.merges._forms import groups


def kept_per_task(updates: Sequence[Update], keep: int | None) -> int:
    """Singular directions that each task keeps; without `keep`, as many as there is room for.

    Room: r of each task; a T-th of the smaller side of the weight; and, of tasks that share A, floor(r / T), because
    all their rows lie in the r dimensions of A, and directions that do not fit would be invented.
    Raises ConfigError for more than that, or if there is room for none.
    """
    tasks = [update for update in updates if update.kept]
    if not tasks:
        return 0
    module, most = updates[0].module, min(updates[0].shape) // len(tasks)
    where = f"the weight of {module} is {' x '.join(map(str, updates[0].shape))}"
    for parts in groups(tasks):
        num_tasks = sum(any(part.key == parts[0].key for part in update.kept) for update in tasks)
        room = parts[0].rank // num_tasks if num_tasks > 1 else most
        if room < most:
            most, where = room, f"in {module} they share an A of rank {parts[0].rank}"
    if most < 1 or (keep is not None and keep > most):
        asked = "at least 1 is needed" if keep is None else f"got {keep}"
        raise ConfigError(
            f"merge.method.keep: {asked}, and {where}, which has room for {most} of each of {len(tasks)} tasks; "
            + (f"give at most {most}" if most else "merge fewer tasks, or with another method")
        )
    return most if keep is None else keep


def orthogonalized(directions: Sequence[Singular], keep: int, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """left and right, whose product is U' diag(w S) V'^T: U' and V' are the stacked directions made orthogonal.

    directions: of each task, of which the `keep` largest are taken. U' and V' are polar factors, the nearest orthogonal
    matrices; where stacked directions are dependent, within their span.
    """
    u = torch.cat([u[:, :keep] for u, _, _ in directions], dim=1)
    s = torch.cat([s[:keep] * weight for (_, s, _), weight in zip(directions, weights, strict=True)])
    vh = torch.cat([vh[:keep] for _, _, vh in directions])
    return nearest_orthogonal(u) * s, nearest_orthogonal(vh)


def nearest_orthogonal(x: Tensor) -> Tensor:
    """The polar factor of x."""
    u, _, vh = singular(x)
    return u @ vh
