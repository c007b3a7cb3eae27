"""The processes that train together, and this one among them."""

import contextlib
import hashlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from lori_dist.errors import JobError, LoriError
from lori_dist.training.device import group_settings, of_rank
from lori_dist.training.rendezvous import rendezvous

T = TypeVar("T")

TIMEOUT = timedelta(minutes=5)
"""How long a rank waits for the others: longer than any step, shorter than anyone's patience."""


SILENCE = timedelta(seconds=10)
"""How long a rank waits for the others before it says so."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among those that train together."""

    rank: int
    """Rank of this process, from 0."""
    size: int
    """Number of processes."""
    local_rank: int
    """Rank of this process among those on its machine."""
    device: torch.device
    """Device of this process."""


def from_environment() -> World:
    """The world a launcher describes: torchrun, deepspeed, accelerate, srun, or none of them, which is a world of one.

    Joins the process group that there is, as Ray Train makes one, or makes it: nccl where there is CUDA, else gloo.
    There is always a group, as all engines need one. Raises JobError for an incomplete environment.
    """
    if not dist.is_initialized():
        _make_group()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = of_rank(local_rank, dist.get_backend())
    return World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, device=device)


def from_first(world: World, make: Callable[[], T]) -> T:
    """Calls `make` on rank 0 alone and returns its result on all ranks. A LoriError that it raises is raised on all."""
    made: list[Any] = [None]
    if world.rank == 0:
        try:
            made[0] = make()
        except LoriError as error:
            made[0] = error
    dist.broadcast_object_list(made, device=world.device)
    if isinstance(made[0], LoriError):
        raise made[0]
    return cast(T, made[0])


def agree(world: World, found: str, what: str, remedy: str) -> None:
    """Raises JobError, on all ranks, naming those that found something else than rank 0."""
    digest = int.from_bytes(hashlib.blake2b(found.encode(), digest_size=8).digest(), "little", signed=True)
    own = torch.tensor([digest], device=world.device)
    all_digests = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(all_digests, own)
    others = [str(rank) for rank, other in enumerate(all_digests) if other.item() != all_digests[0].item()]
    if others:
        raise JobError(f"rank {', '.join(others)}: its {what} differs from that of rank 0; {remedy}")


def _make_group() -> None:
    launcher = rendezvous(os.environ)
    os.environ.update(launcher or {})  # libraries look there as well, and srun leaves them unset
    settings = group_settings(int(os.environ.get("LOCAL_RANK", "0")))
    if launcher is None:
        with _on_loopback():
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT, **settings)  # type: ignore[attr-defined]
        return
    try:
        with _patient(launcher):
            dist.init_process_group(init_method="env://", timeout=TIMEOUT, **settings)
    except dist.DistError as error:  # no free port, or not all came
        place = f"{launcher['MASTER_ADDR']}:{launcher['MASTER_PORT']}"
        found = str(error).strip().partition("\n")[0]
        raise JobError(
            f"environment: the ranks did not find each other at {place} ({found}); start all {launcher['WORLD_SIZE']} "
            f"of them within {TIMEOUT.seconds // 60} minutes, with a MASTER_PORT that is free on rank 0's machine"
        ) from error


@contextlib.contextmanager
def _patient(launcher: Mapping[str, str]) -> Iterator[None]:
    """Says for whom this rank waits, where that takes longer than `SILENCE`."""

    def say() -> None:
        log.error(  # of a warning, ranks other than the first say nothing
            "rank %s has been waiting for %.0f s for the other of %s ranks at %s:%s; it gives up after %d minutes. If "
            "RANK and WORLD_SIZE are left over from another job in this shell, unset them",
            launcher["RANK"],
            SILENCE.total_seconds(),
            *(launcher[name] for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")),
            TIMEOUT.seconds // 60,
        )

    timer = threading.Timer(SILENCE.total_seconds(), say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """gloo listens on this machine's own name, which others may reach, unless it is told an interface."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is None or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    try:
        yield
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]
