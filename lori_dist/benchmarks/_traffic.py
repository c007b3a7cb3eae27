"""The cost of a step besides its time: bytes sent, counted at the collectives, and bytes kept for the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REDUCING = ("allreduce_", "allreduce_coalesced_", "reduce_", "_reduce_scatter_base_", "reduce_scatter_")
GATHERING = ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_", "broadcast_", "gather_")


class Traffic(TorchDispatchMode):
    """Bytes of every collective inside, whoever calls it: of the whole tensor that is reduced or made."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced = self.gathered = self.num_calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            size = max((_bytes_of_all(arg) for arg in args), default=0)  # what is sent, or the larger that is made
            assert name in REDUCING + GATHERING + ("barrier",), f"{name} is a collective that is not counted"
            self.reduced += size if name in REDUCING else 0
            self.gathered += size if name in GATHERING else 0
            self.num_calls += 1
        return function(*args, **(kwargs or {}))


class Saved:
    """Bytes that autograd keeps from the forward to the backward pass, parameters and buffers apart."""

    def __init__(self) -> None:
        self.of_layers: dict[int, int] = {}
        """Kept by the adapted layers: address -> bytes."""
        self.of_model: dict[int, int] = {}

    @property
    def layer_bytes(self) -> int:
        return sum(self.of_layers.values())

    @property
    def model_bytes(self) -> int:
        return sum(self.of_model.values())


@contextmanager
def saved_bytes(model: nn.Module, is_adapted: Callable[[nn.Module], bool]) -> Iterator[Saved]:
    """Counts what one forward pass inside keeps."""
    saved = Saved()

    def hooks(module: nn.Module, *places: dict[int, int]) -> Any:
        def pack(tensor: Tensor) -> Tensor:
            # Looked up now, as engines put gathered weights in the place of sharded ones.
            resident = {_address(held) for held in (*module.parameters(), *module.buffers())}
            if _address(tensor) not in resident:
                for place in places:
                    place[_address(tensor)] = max(_bytes(tensor), place.get(_address(tensor), 0))
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    handles, entered = [], []
    for layer in (module for module in model.modules() if is_adapted(module)):

        def enter(module: nn.Module, args: Any) -> None:
            entered.append(hooks(module, saved.of_layers, saved.of_model))
            entered[-1].__enter__()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            entered.pop().__exit__(None, None, None)

        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    with hooks(model, saved.of_model):
        yield saved
    for handle in handles:
        handle.remove()


def local_bytes(tensor: Any) -> int:
    """Bytes of this rank's part of a tensor."""
    return int((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes)


def moment_bytes(engine: Any) -> int:
    """Bytes of Adam's moments on this rank."""
    held = [kept[name] for kept in engine.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return sum(map(local_bytes, held))


def process_bytes(name: str) -> int:
    """Bytes of this process as Linux counts them: `VmRSS` is its current size, `VmHWM` its largest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _bytes_of_all(tree: Any) -> int:
    return sum(_bytes(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _address(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
