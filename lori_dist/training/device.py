"""The device that a rank computes on: which one, how ranks talk there, its memory, and how tensors get to it."""

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lori_dist.errors import JobError


def backend() -> str:
    """Backend of the process group: nccl where this machine has CUDA devices, else gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def group_settings(local_rank: int) -> dict[str, Any]:
    """Arguments of `init_process_group` that depend on this machine's devices: the backend and, for nccl, the rank's
    device.

    With it nccl connects at once, so that a network that does not work is reported at the start, and groups of some of
    the ranks are split from that of all. Nothing else of nccl is set: since torch 2.2 a collective that fails or takes
    longer than the group's timeout ends the process, and NCCL_DEBUG, NCCL_SOCKET_IFNAME and their like count as they
    are in the environment. Raises JobError as `of_rank`.
    """
    kind = backend()
    device = of_rank(local_rank, kind)
    return {"backend": kind, "device_id": device if device.type == "cuda" else None}


def of_rank(local_rank: int, backend: str) -> torch.device:
    """The device of a rank on this machine, which becomes the process's current device.

    Raises JobError where there are fewer CUDA devices than ranks.
    """
    if backend == "gloo":  # who made such a group wants the CPU, whatever else the machine has
        return torch.device("cpu")
    device = torch.device("cuda", _number(local_rank, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def _number(local_rank: int, visible: int) -> int:
    if local_rank < visible:
        return local_rank
    if visible == 1:  # a launcher that shows each process its own device
        return 0
    raise JobError(
        f"environment: this is rank {local_rank} of its machine, which shows {visible} CUDA devices; "
        "start at most one rank per device"
    )


def first(num_devices: int) -> torch.device:
    """The first of the CUDA devices that a process was given, or the CPU where it was given none."""
    return torch.device("cuda" if num_devices else "cpu")


def without_cuda() -> None:
    """This process, and those it starts, have no CUDA device from here on. To be called before one is used."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def num_ranks(wanted: int) -> int:
    """The wanted number of ranks on this machine; with CUDA at most one for each device."""
    return min(wanted, torch.cuda.device_count()) if torch.cuda.is_available() else wanted


def dtype_of_base() -> str:
    """Usual data type of a base: bfloat16 on CUDA, float32 on CPUs."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


# --- tensors ---------------------------------------------------------------------------------------------------------


def put(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device. From a CPU to CUDA it goes by pinned memory, for which the program does not wait."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# --- memory and time -------------------------------------------------------------------------------------------------


def memory(device: torch.device) -> int:
    """Bytes: the most that tensors took since `reset_peak`, or, without a device, what the process has resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_peak(device: torch.device) -> None:
    """Lets `memory` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> int | None:
    """Bytes of a device that nobody uses; None of a CPU's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


LARGE = 2**20
"""Bytes of memory that is given back as soon as it is free, see `return_freed`."""


def return_freed() -> None:
    """Makes this process give large pieces of host memory back when they are freed: glibc would keep up to all that
    was gathered of a sharded base. Where the C library is another one, nothing is done."""
    with contextlib.suppress(OSError, AttributeError):
        threshold = -3  # M_MMAP_THRESHOLD of mallopt(3); once it is set, glibc does not raise it any more
        ctypes.CDLL(None).mallopt(threshold, LARGE)


def free_cached() -> None:
    """Gives memory back that torch keeps of tensors that are gone."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Waits for what was started on the current device, so that a clock tells how long it took."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
