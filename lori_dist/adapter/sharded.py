"""Parameters that a user's own loop has given to FSDP2 (`fully_shard`) or to DeepSpeed ZeRO: reading them in full, and
putting new ones into the same groups of collectives, or taking them out.

Both are known by what they leave on parameters and modules, so neither has to be installed or imported. What torch does
not document of FSDP2, and a test holds on to: a state's `_fsdp_param_groups`, a group's `fsdp_params` with its
`mesh_info`, policies and `_init_mp_dtypes`, and the constructor of `FSDPParam`. Of DeepSpeed: a parameter's `ds_id`,
`_z3_optimizer`, `_hp_mapping`.
"""

import itertools
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lori_dist.errors import AdapterError


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model, of what DDP, DeepSpeed or torch.compile have put around it."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    for kind, name in (
        ("DistributedDataParallel", "module"),
        ("DeepSpeedEngine", "module"),
        ("OptimizedModule", "_orig_mod"),
    ):
        if any(one.__name__ == kind for one in type(model).__mro__):
            return cast(nn.Module, getattr(model, name))
    return None


def refuse_late(model: nn.Module) -> None:
    """Raises AdapterError where parameters that are attached now would be in no group that reduces gradients."""
    names = {one.__name__ for one in type(model).__mro__}
    if "DistributedDataParallel" in names:
        raise AdapterError("model: is wrapped in DistributedDataParallel already; attach first, then wrap the model")
    if "FullyShardedDataParallel" in names or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    ):
        raise AdapterError(
            "model: is wrapped in torch's FSDP1 (FullyShardedDataParallel), which is not supported; use fully_shard"
        )
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if zero is not None and getattr(zero, "zero_init_context", False):
        raise AdapterError(
            "model: attach was called inside deepspeed.zero.Init, which would cast and partition what it makes; call "
            "it after that context, with the model made there"
        )
    if "DeepSpeedEngine" in names or has_engine(model):
        raise AdapterError(
            "model: is already managed by a DeepSpeed engine, whose optimizer does not take new parameters; attach "
            "first, then call deepspeed.initialize (after engine.destroy(), if there was an engine)"
        )
    refuse_split(model)


def refuse_split(model: nn.Module) -> None:
    """Raises AdapterError where a rank has a part of the layers (pipeline) or computes a part of each (tensor
    parallelism): there an adapter would be another one on each rank."""
    for path, module in model.named_modules():
        names = {one.__name__ for one in type(module).__mro__}
        if "PipelineModule" in names:
            raise AdapterError(
                f"{path or 'model'}: is a DeepSpeed PipelineModule, and pipeline parallelism is not supported; give "
                "deepspeed.initialize the model itself, with zero_optimization.stage 3"
            )
        if "TensorParallel_Layer" in names:
            raise AdapterError(f"{path}: was split by DeepSpeed's AutoTP ({type(module).__name__}), {NO_TENSORS}")
    if (size := getattr(model, "tp_size", None) or 1) > 1:
        raise AdapterError(f"model: was loaded with tp_plan over {size} ranks, {NO_TENSORS}")
    meshes = [group.mesh_info.mesh for state in _states(model) for group in _groups(state)]
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh not in meshes:
            mesh = parameter.device_mesh.mesh_dim_names or "without names"
            raise AdapterError(f"{name}: is a DTensor on a mesh {mesh} that is not fully_shard's, {NO_TENSORS}")


NO_TENSORS = "and tensor parallelism is not supported; load the model whole, then shard it with fully_shard or ZeRO-3"


def refuse_wrapped(model: nn.Module) -> None:
    """Raises AdapterError for DDP and engines of DeepSpeed, which train the parameters that they were made with."""
    names = {one.__name__ for one in type(model).__mro__}
    for kind, remedy in (
        ("DistributedDataParallel", "give the model inside it (accelerator.unwrap_model), and wrap that again"),
        ("DeepSpeedEngine", "call engine.destroy(), give engine.module, and call deepspeed.initialize again"),
    ):
        if kind in names:
            raise AdapterError(f"model: is a {kind}, which does not take new parameters; {remedy} afterwards")


def has_engine(model: nn.Module) -> bool:
    """Whether an engine of DeepSpeed trains a part of it at stage 1 to 3, which engine.destroy() ends."""
    return any(map(_is_live, model.parameters()))


def _is_live(parameter: Tensor) -> bool:
    if getattr(parameter, "_hp_mapping", None) is not None:
        return True
    optimizer = getattr(parameter, "_z3_optimizer", None)
    return optimizer is not None and bool(getattr(optimizer, "ipg_buckets", True))


# --- whole tensors ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def full(tensor: Tensor) -> Tensor:
    """All entries of a parameter, on the CPU, a copy. A collective where it is sharded: every rank calls it.

    float32 where it is trained: DeepSpeed's own copy, as long as the engine is there, where it computes in half of it.
    """
    found: Any = tensor
    if isinstance(tensor, DTensor):
        return cast(Any, tensor.detach()).full_tensor().to("cpu", copy=True)  # type: ignore[no-any-return]
    if hasattr(tensor, "ds_id"):
        optimizer = getattr(tensor, "_z3_optimizer", None)
        if optimizer is not None and tensor.requires_grad:
            return cast(Tensor, optimizer.get_full_hp_param(tensor)).detach().to("cpu", copy=True).view(found.ds_shape)
        with _gathered(tensor):
            return tensor.detach().to("cpu", copy=True)
    if hasattr(tensor, "_hp_mapping") and tensor.dtype.itemsize < 4:
        # None where another rank has all of it, and on all of them once the engine is destroyed.
        owners = torch.tensor(int(found._hp_mapping is not None), device=tensor.device)
        dist.all_reduce(owners)
        if owners.item():
            return cast(Tensor, found.get_full_hp_param()).detach().to("cpu", copy=True).view(tensor.shape)
    exact = torch.promote_types(tensor.dtype, torch.float32) if tensor.requires_grad else tensor.dtype
    return tensor.detach().to("cpu", exact, copy=True)


@torch.no_grad()
def put(parameter: Tensor, values: Tensor) -> None:
    """Gives a parameter values that are there in full on every rank."""
    if isinstance(parameter, DTensor) and not isinstance(values, DTensor):
        values = values.to(parameter.device_mesh.device_type, parameter.dtype)
        parameter.copy_(distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None))
    elif hasattr(parameter, "ds_id"):
        with _gathered(parameter, modifier_rank=0):
            parameter.copy_(values)
    else:
        parameter.copy_(values)


def shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter. ZeRO-3 replaces the parameter's own shape by an empty one."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _gathered(parameter: Tensor, **options: Any) -> Any:
    return sys.modules["deepspeed"].zero.GatheredParameters([parameter], **options)


# --- groups of FSDP2 -------------------------------------------------------------------------------------------------


def is_fully_sharded(model: nn.Module) -> bool:
    return any(hasattr(module, "_get_fsdp_state") for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Makes modules hold their shards, also those that stay gathered after a forward pass, as the root's."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            cast(Any, module).reshard()


Places = Mapping[nn.Module, tuple[Any, Any]]
"""Module -> the group that had its parameters, and what this had for one of them."""


def forget(model: nn.Module, modules: Collection[nn.Module]) -> Places:
    """Takes the parameters of modules, but not of what is in these, out of the groups of a model. `join` or `settle`
    comes next."""
    gone, places = set(modules), dict[nn.Module, tuple[Any, Any]]()
    for state in _states(model):
        for group in _groups(state):
            places.update(
                {one._module_info.module: (group, one) for one in group.fsdp_params if one._module_info.module in gone}
            )
            group.fsdp_params = [one for one in group.fsdp_params if one._module_info.module not in gone]
    return places


def join(model: nn.Module, modules: Sequence[tuple[str, nn.Module]], places: Places = MappingProxyType({})) -> None:
    """Shards the parameters of modules, by path, on the mesh of the base around each, whose group has them from now on.

    places: of modules whose parameters were in a group before. Raises AdapterError where nothing around a module is
    sharded.
    """
    for path, module in modules:
        found = places.get(module) or next(((one, one.fsdp_params[0]) for one in _around(model, path)), None)
        if found is None:
            raise AdapterError(
                f"{path}: fully_shard was applied to the model, but to no parameter around this layer (the base is "
                "ignored, or other modules are sharded), so there is no mesh for its B; attach first, then fully_shard"
            )
        group, like = found
        _to_compute(group, module)
        for name, parameter in list(module.named_parameters(recurse=False)):
            place = type(like._module_info)(module, name)
            group.fsdp_params.append(
                type(like)(
                    parameter,
                    place,
                    group.mesh_info,
                    group.post_forward_mesh_info,
                    group.device,
                    None,
                    group.mp_policy,
                    group.offload_policy,
                )
            )
    settle(model)


def place(model: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> None:
    """Puts modules, by path, where the base around each computes; with an offload policy, its shards are elsewhere."""
    for path, module in modules:
        for group in itertools.islice(_around(model, path), 1):
            _to_compute(group, module)


def _to_compute(group: Any, module: nn.Module) -> None:
    if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        module.to(group.device)


def settle(model: nn.Module) -> None:
    """Lets groups know which parameters they have and which of these need a gradient, where they have asked already."""
    for state in _states(model):
        _drop_empty(state)
        for group in _groups(state):
            for one in group.fsdp_params:
                if hasattr(one, "_unsharded_param"):
                    one._unsharded_param.requires_grad_(one.sharded_param.requires_grad)
            if state._is_root is not None:  # else this comes at the first forward pass
                group._init_mp_dtypes()


def _around(model: nn.Module, path: str) -> Iterator[Any]:
    """Groups of the modules that a path leads through, the innermost first."""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if hasattr(module, "_get_fsdp_state"):
            yield from _groups(cast(Any, module)._get_fsdp_state())


def _states(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            state = cast(Any, module)._get_fsdp_state()
            if id(state) not in seen:
                seen.add(id(state))
                yield state


def _groups(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # of torch before 2.13


def _drop_empty(state: Any) -> None:
    """Collectives over nothing are errors."""
    if hasattr(state, "_fsdp_param_groups"):
        state._fsdp_param_groups[:] = [group for group in state._fsdp_param_groups if group.fsdp_params]
    elif state._fsdp_param_group is not None and not state._fsdp_param_group.fsdp_params:
        state._fsdp_param_group = None
