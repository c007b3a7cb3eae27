"""Negative log-likelihood of the responses, as a sum: ranks and micro-batches hold different numbers of targets.

Logits are made of the targets alone: prompts and padding are most of a batch, and logits are the largest tensor of a
step. Where a model ends in the product of its head, they are also made in chunks, of which one exists at a time.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from lori_dist.adapter.bases import is_product, is_quantized
from lori_dist.adapter.formed import FormedDelta
from lori_dist.adapter.linear import AdaptedLinear
from lori_dist.adapter.probe import Probe, probe
from lori_dist.adapter.routed import RoutedLinear
from lori_dist.adapter.row_tokens import rows_of
from lori_dist.adapter.saved import RoutedModule
from lori_dist.adapter.task_column import routing_of
from lori_dist.training.data import IGNORED, Batch

CHUNK = 2**24
"""Logits that exist at once, where they are made in chunks: 64 MiB in fp32."""


def num_targets(batch: Batch) -> int:
    """Labels that `loss_sum` sums over. The first token of a row is never one: nothing predicts it."""
    return int((batch.next_labels() != IGNORED).sum())


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over the targets of -log p(target | the tokens before it), 0-dim, fp32, in nats.

    A batch without targets gives a zero that still depends on the model's parameters, so that its backward runs the
    same collectives as on the other ranks.
    """
    return _losses(model, batch).sum()


def task_loss_sums(model: nn.Module, batch: Batch) -> Tensor:
    """The `loss_sum` of each of the batch's tasks, times its weight: (tasks,), or (1,) where there is one."""
    if batch.tasks is None or batch.weights is None:
        return loss_sum(model, batch).view(1)
    if (routing := routing_of(model)) is not None:
        routing.begin_tokens(batch.tasks)  # which the backward pass may need again
    losses = _losses(model, batch)
    numbers, counts = (torch.tensor(of_spans, device=losses.device) for of_spans in zip(*batch.tasks, strict=True))
    of_tokens = numbers.repeat_interleave(counts).view(batch.labels.shape)
    tasks = of_tokens[batch.next_labels() != IGNORED]
    return losses.new_zeros(len(batch.weights)).index_add_(0, tasks, losses) * batch.weights


def log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """log p(response | prompt) of each row, (rows,), fp32, in nats."""
    losses = _losses(model, batch)
    return losses.new_zeros(batch.labels.shape[0]).index_add_(0, _rows(batch), -losses)


def is_chunked(model: nn.Module) -> bool:
    """Whether the loss makes a model's logits in chunks."""
    return _frozen_head(model) is not None


def logits_bytes(num_targets: int, vocabulary: int, hidden_bytes: int, *, chunked: bool) -> int:
    """The most bytes that a loss of so many targets takes beside what the model keeps for its backward pass.

    hidden_bytes: of what the head is given of them. chunked: as `is_chunked` says of the model.
    """
    if not chunked:  # the logits in fp32, their log-softmax, and the gradient of either
        return 3 * 4 * num_targets * vocabulary
    # The logits of a chunk and their log-softmax, and what the head is given, with its gradient.
    return 2 * 4 * min(num_targets, _chunk_size(vocabulary)) * vocabulary + 2 * hidden_bytes


def _rows(batch: Batch) -> Tensor:
    """Row of each target, in the order of `_losses`."""
    return (batch.next_labels() != IGNORED).nonzero()[:, 0]


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of every target, (targets,), fp32, row by row."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    # A mask would hide from transformers that rows are packed.
    inputs |= (
        {"attention_mask": batch.attention_mask} if batch.position_ids is None else {"position_ids": batch.position_ids}
    )
    if (rows := rows_of(model)) is not None:
        rows.labels = batch.labels  # which the model is not given
    following = batch.next_labels()
    predicts = following != IGNORED  # (rows, length): tokens before a target
    targets = following[predicts]
    if (head := _frozen_head(model)) is not None:
        return _head_losses(model, inputs, head, predicts, targets)
    if _known(model).keeps_logits and not _head_sees_rows(model, batch):
        logits = model(**inputs, logits_to_keep=predicts).logits
    else:
        logits = model(**inputs).logits[predicts]
    # Chosen before the cast: prompts and padding would need four bytes an entry of the vocabulary for nothing.
    return functional.cross_entropy(logits.to(torch.float32), targets, reduction="none")


# --- the head --------------------------------------------------------------------------------------------------------

_probes: "weakref.WeakKeyDictionary[nn.Module, Probe]" = weakref.WeakKeyDictionary()


def _known(model: nn.Module) -> Probe:
    """The probe of the model of transformers that an engine may have wrapped."""
    if model not in _probes:
        _probes[model] = probe(_unwrapped(model) or model)
    return _probes[model]


def _unwrapped(model: nn.Module) -> PreTrainedModel | None:
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _frozen_head(model: nn.Module) -> nn.Linear | None:
    """The layer whose product is a model's logits. None where they are more than that, as with soft-capping or an
    adapter, or where the layer itself is trained: its gradient needs all logits."""
    inner = _unwrapped(model)
    if inner is None or not _known(model).ends_in_head:
        return None
    head = inner.get_output_embeddings()
    is_plain = (
        isinstance(head, nn.Linear) and is_product(head) and not is_quantized(head) and "forward" not in vars(head)
    )
    if not is_plain or any(parameter.requires_grad for parameter in head.parameters()):
        return None
    return head


def _head_sees_rows(model: nn.Module, batch: Batch) -> bool:
    """Whether the head computes tokens in a way that follows from their task or row, so that it has to see all of
    them."""
    inner = _unwrapped(model)
    head = None if inner is None else inner.get_output_embeddings()
    has_tasks = batch.tasks is not None
    if isinstance(head, AdaptedLinear):
        of_forms = [delta for delta in head.deltas if isinstance(delta, FormedDelta)]
        if any(delta.rows is not None for delta in of_forms):
            return True
        is_routed = isinstance(head, RoutedLinear) or any(delta.per_task is not None for delta in head.deltas)
        return has_tasks and (is_routed or bool(of_forms))
    return has_tasks and isinstance(head, RoutedModule)


def _chunk_size(vocabulary: int) -> int:
    """Targets of a chunk."""
    return max(1, CHUNK // vocabulary)


def _head_losses(
    model: nn.Module, inputs: dict[str, Any], head: nn.Linear, predicts: Tensor, targets: Tensor
) -> Tensor:
    """The losses as `_losses` gives them. The head computes them instead of logits when the model calls it: engines
    gather its weight for that call alone, and their hooks see what a forward pass returns."""
    exact: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        exact.append(_ChunkedLosses.apply(hidden[predicts], head.weight, head.bias, targets))
        return exact[0]

    head.forward = forward  # type: ignore[assignment, method-assign]
    try:
        losses = model(**inputs).logits
    finally:
        del head.forward
    if losses.dtype != torch.float32:  # FSDP's output_dtype; the gradient has to pass it, the loss does not
        losses = losses.to(torch.float32)
        losses = losses + (exact[0] - losses).detach()
    return losses


class _ChunkedLosses(torch.autograd.Function):
    """-log p of every target, (targets,), fp32, of what a head is given, (targets, in_features).

    As `torch.nn.functional.linear_cross_entropy` with a chunk size, which returns the losses in the dtype of its input,
    too coarse for a sum in bfloat16, and makes the logits of each target twice. A frozen head lets the gradient of each
    target be computed with its loss, up to the factor that only the backward pass knows.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = _chunk_size(weight.shape[0])
        for first in range(0, len(targets), size):
            part, chosen = slice(first, first + size), targets[first : first + size, None]
            logits = functional.linear(hidden[part], weight, bias).to(torch.float32)
            log_p = functional.log_softmax(logits, dim=-1)
            del logits
            losses[part] = -log_p.gather(1, chosen)[:, 0]
            if gradient is not None:
                p = log_p.exp_()
                p.scatter_(1, chosen, p.gather(1, chosen) - 1)
                gradient[part] = p.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None]).to(gradient.dtype), None, None, None
