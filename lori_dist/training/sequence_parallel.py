"""Rows whose tokens are divided among ranks, because a row is too long for one of them.

Every rank of a group has tokens that follow each other, and all layers but attention compute token by token. Before
attention the ranks exchange what they have: each gets all tokens of a share of the heads, and afterwards all heads of
its own tokens again. Losses and gradients are sums over tokens, so to an engine these ranks are like others.
Source: DeepSpeed-Ulysses (arXiv 2309.14509), section 3.
"""

import math
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lori_dist import config
from lori_dist.errors import ConfigError
from lori_dist.training.data import IGNORED, Batch
from lori_dist.training.flops import attention
from lori_dist.training.world import World

KEY = "train.sequence_parallel"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The ranks that divide rows among them, and this one among them."""

    size: int
    place: int
    """Number of this rank's tokens, from 0."""
    ranks: Any
    """The process group; None for a group of one."""
    world_rank: int
    """Number of this group among all of them."""
    world_size: int
    """Number of groups."""

    def part(self, batch: Batch, pad_id: int) -> Batch:
        """This rank's tokens of a batch. Rows get padding at their end until they can be divided evenly."""
        if self.size == 1:
            return batch
        num_rows, length = batch.input_ids.shape
        count = -(-length // self.size)
        more, own = count * self.size - length, slice(self.place * count, (self.place + 1) * count)
        position_ids = torch.arange(own.start, own.stop).repeat(num_rows, 1)

        def cut(tensor: Tensor, fill: int) -> Tensor:
            return functional.pad(tensor, (0, more), value=fill)[:, own]

        return replace(
            batch,
            input_ids=cut(batch.input_ids, pad_id),
            attention_mask=cut(batch.attention_mask, 0),
            labels=cut(batch.labels, IGNORED),
            following=cut(batch.next_labels(), IGNORED),
            position_ids=position_ids,
            tasks=batch.tasks and tuple((task, tokens // length * count) for task, tokens in batch.tasks),
        )


def own_tokens(train: config.Train) -> int:
    """Tokens that a rank has of a row of the greatest length."""
    return -(-train.max_length // train.sequence_parallel)


def join(train: config.Train, world: World) -> Group:
    """The group of this rank: ranks that follow each other. A collective. Raises ConfigError."""
    size = train.sequence_parallel
    check_ranks(train, world.size)
    number, place = divmod(world.rank, size)
    ranks = None
    if size > 1:
        ranks, _ = dist.new_subgroups_by_enumeration(
            [list(range(first, first + size)) for first in range(0, world.size, size)]
        )
    return Group(size=size, place=place, ranks=ranks, world_rank=number, world_size=world.size // size)


def check_ranks(train: config.Train, ranks: int) -> None:
    """Raises ConfigError if so many ranks cannot be divided into groups."""
    if ranks % train.sequence_parallel:
        raise ConfigError(
            f"{KEY}: got {train.sequence_parallel} for {ranks} rank{'s' * (ranks > 1)}; give a divisor of their number"
        )


def divide_attention(model: PreTrainedModel, group: Group, max_length: int) -> None:
    """Lets the attention of a model compute with rows that are divided among a group, in place.

    Rows are padded at their end, so that causal attention needs no mask. max_length: most tokens of a row. Raises
    ConfigError for a model whose heads or attention cannot be divided.
    """
    if group.size == 1:
        return
    check_attention(model.config, group.size, max_length)
    inner = str(model.config._attn_implementation)
    name = f"sequence_parallel_{inner}"
    AttentionInterface.register(name, _divided(model, group, AttentionInterface()[inner]))
    AttentionMaskInterface.register(name, _no_mask)
    model.set_attn_implementation(name)


def check_attention(settings: Any, size: int, max_length: int) -> None:
    """Raises ConfigError, with every reason, if the attention of a model with this configuration cannot be divided
    among so many ranks."""
    if size == 1:
        return
    text = settings.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", 0)
    found = []
    if settings.model_type not in config.PACKED:
        known = ", ".join(config.PACKED)
        found.append(f"{KEY}: {settings.model_type} is not known to divide its rows, as {known} do; remove it")
    if settings._attn_implementation == "eager":
        found.append(
            f"{KEY}: eager attention cannot do without a mask; set model.attention to sdpa, if the model has it"
        )
    if not heads or heads % size:
        found.append(f"{KEY}: got {size}, and the model has {heads} heads; give a divisor of their number")
    windows = [layer.window for layer in attention(settings) if layer.window is not None]
    if windows and min(windows) < max_length:
        found.append(
            f"{KEY}: the model attends within {min(windows)} tokens in some layers, which the ranks of a group do not "
            f"know, and train.max_length is {max_length}; set that to at most {min(windows)}, or remove {KEY}"
        )
    if found:
        raise ConfigError("\n".join(found))


def _no_mask(*args: Any, **options: Any) -> None:
    return None


def _divided(model: PreTrainedModel, group: Group, inner: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function of transformers for the layers of this model; for others, as a copy's, the inner one."""
    layers = weakref.WeakSet(model.modules())

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """query, (rows, heads, tokens, features); key and value may have fewer heads."""
        if module not in layers:
            return cast(tuple[Tensor, None], inner(module, query, key, value, attention_mask, **options))
        if key.shape[1] % group.size:  # as many as it takes for each rank to have some
            times = group.size // math.gcd(key.shape[1], group.size)
            if (query.shape[1] // key.shape[1]) % times:
                times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        # The function repeats keys by a number that it reads off the module.
        like = _Like(module, num_key_value_groups=query.shape[1] // key.shape[1])
        exchanged = (_Exchange.apply(tensor, group, 1, 2) for tensor in (query, key, value))
        options.pop("position_ids", None)  # of this rank's tokens alone
        found, _ = inner(like, *exchanged, None, **options)  # (rows, all tokens, heads / size, features)
        return cast(Tensor, _Exchange.apply(found, group, 1, 2)), None

    return forward


class _Like(types.SimpleNamespace):
    """A module with some attributes of its own."""

    def __init__(self, module: nn.Module, **own: Any) -> None:
        super().__init__(**own)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


class _Exchange(torch.autograd.Function):
    """Divides one dimension among the ranks of a group and joins their parts of another one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, divided: int, joined: int) -> Tensor:
        ctx.group, ctx.dimensions = group, (divided, joined)
        return _exchange(tensor, group, divided, joined)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        divided, joined = ctx.dimensions
        return _exchange(grad, ctx.group, joined, divided), None, None, None


def _exchange(tensor: Tensor, group: Group, divided: int, joined: int) -> Tensor:
    send = torch.stack(tensor.chunk(group.size, dim=divided)).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group.ranks)
    return torch.cat(received.unbind(), dim=joined)
