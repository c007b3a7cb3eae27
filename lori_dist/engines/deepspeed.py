"""DeepSpeed ZeRO: moments (stage 1), gradients (2) and base and values (3) sharded over all ranks.

The portable state needs names that DeepSpeed does not document, which a test holds on to:
`single_partition_of_fp32_groups` and `_lazy_init_hp_params_optimizer_state` (stages 1 and 2),
`fp32_partitioned_groups_flat` (stage 3).
"""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():  # DeepSpeed looks for itself when it is imported, and warns if it finds none
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)

from lori_dist.adapter.attach import trainable
from lori_dist.config import Train
from lori_dist.training.data import Batch
from lori_dist.training.engine import (
    State,
    StepResult,
    adamw,
    on_cpu,
    restore_values,
    set_learning_rate,
    total,
    zero_moments,
)
from lori_dist.training.loss import loss_sum
from lori_dist.training.world import World

BUCKET = 25_000_000
"""Entries reduced or gathered at once; a sparse adapter has about that many at 70B."""


def build(
    model: nn.Module, train: Train, world: World, *, state: State | None, stage: Literal[1, 2, 3] = 2
) -> "Partitioned":
    """Stages 1 and 2 keep the whole base on every rank, stage 3 gathers each layer when it runs."""
    return Partitioned(model, train, world, state, stage)


class Partitioned:
    """An `Engine`."""

    def __init__(self, model: nn.Module, train: Train, world: World, state: State | None, stage: int) -> None:
        _quiet()
        # Its way of saying which device, asked for also where there is no launcher.
        os.environ["LOCAL_RANK"] = str(world.local_rank if world.device.index is None else world.device.index)
        if world.device.type == "cpu":
            # Gloo does all there is to do; this would compile for a minute, or wait for ever for a killed compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        restore_values(trainable(model), state)  # before DeepSpeed copies them
        self.parameters = trainable(model)
        self.optimizer = adamw(self.parameters.values(), train)
        config = _config(train, stage, sum(parameter.numel() for parameter in self.parameters.values()))
        if stage == 3:
            _partition(model, config, world)
        self.model: Any
        self.model, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)
        self.world, self.stage = world, stage
        self.num_steps = state.step if state else 0
        self._restore_moments(state)

    def step(self, micro_batches: Sequence[Batch], *, num_targets: int, lr: float) -> StepResult:
        set_learning_rate(self.optimizer, lr)
        losses = []
        for i, batch in enumerate(micro_batches):
            # Told for each, as steps have different numbers of them.
            self.model.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            loss = loss_sum(self.model, batch.to(self.world.device)) / num_targets
            self.model.backward(loss * self.world.size)  # gradients become means over the ranks, the loss is a sum
            losses.append(loss.detach())
        self.model.step()
        self.num_steps += 1
        return StepResult(loss=total(losses), grad_norm=float(self.model.get_global_grad_norm()))

    def state(self) -> State:
        def moment(name: str) -> dict[str, Tensor]:
            return {path: on_cpu(safe_get_full_optimizer_state(p, name)) for path, p in self.parameters.items()}

        return State(
            step=self.num_steps,
            values={path: on_cpu(safe_get_full_fp32_param(p)) for path, p in self.parameters.items()},
            exp_avg=moment("exp_avg"),
            exp_avg_sq=moment("exp_avg_sq"),
        )

    def close(self) -> None:
        self.model.destroy()
        if self.stage == 3:
            # DeepSpeed keeps the modules in lists and caches of its own, for ever.
            for parameter in self.model.parameters():
                parameter.ds_tensor.data = torch.empty(0)
            _replace_buffers(self.model, lambda buffer: torch.empty(0))
            self.optimizer.state.clear()

    def _restore_moments(self, state: State | None) -> None:
        zero = self.model.optimizer
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for partition in flat:
            self.optimizer.state[partition] = zero_moments(partition, self.num_steps)
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
        if state is None:
            return
        for name, part in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            for path, parameter in self.parameters.items():
                full = part[path].to(self.world.device)
                if self.stage == 3:  # the setter of full tensors fails where the ranks' shares differ
                    safe_set_local_optimizer_state(parameter, self._share(full), name)
                else:
                    safe_set_full_optimizer_state(parameter, full, name)

    def _share(self, full: Tensor) -> Tensor:
        """This rank's part of a tensor, padded to the size that all ranks have."""
        size = -(-full.numel() // self.world.size)
        padded = torch.zeros(size * self.world.size, dtype=full.dtype, device=full.device)
        padded[: full.numel()] = full
        return padded[size * self.world.rank : size * (self.world.rank + 1)]


def _config(train: Train, stage: int, num_values: int) -> dict[str, Any]:
    """No bf16 section: it would cast the fp32 values too."""
    bucket = min(BUCKET, num_values + num_values % 2)  # odd ones are refused
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,  # losses are not divided; see set_gradient_accumulation_boundary
        "gradient_clipping": train.clip or 0.0,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # At the default, values and norms would be gathered one by one after each step, not with the base.
            "stage3_param_persistence_threshold": 0,
        },
    }


def _partition(model: nn.Module, config: dict[str, Any], world: World) -> None:
    """Takes a model to the device parameter by parameter; `initialize` would take all of it there first."""
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    _replace_buffers(model, lambda buffer: buffer.to(world.device))


def _replace_buffers(model: nn.Module, replacement: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, replacement(buffer))


def _quiet() -> None:
    """Without this, each rank hears of every part that is set up and of every collective that torch has renamed."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
