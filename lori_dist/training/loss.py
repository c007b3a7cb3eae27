"""Negative log-likelihood of the responses, as a sum: ranks and micro-batches hold different numbers of targets."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lori_dist.training.data import IGNORED, Batch


def num_targets(batch: Batch) -> int:
    """Labels that `loss_sum` sums over. The first token of a row is never one: nothing predicts it."""
    return int((batch.labels[:, 1:] != IGNORED).sum())


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over the targets of -log p(target | the tokens before it), 0-dim, fp32, in nats.

    A batch without targets gives a zero that still depends on the model's parameters, so that its backward runs the
    same collectives as on the other ranks.
    """
    return _losses(model, batch).sum()


def task_loss_sums(model: nn.Module, batch: Batch) -> Tensor:
    """As `loss_sum`, for each of the batch's tasks, times its weight: (tasks,), or (1,) where there is one."""
    if batch.tasks is None or batch.weights is None:
        return loss_sum(model, batch).view(1)
    losses = _losses(model, batch)
    tasks = torch.tensor(batch.tasks, device=losses.device)[_rows(batch)]
    return losses.new_zeros(len(batch.weights)).index_add_(0, tasks, losses) * batch.weights


def log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """log p(response | prompt) of each row, (rows,), fp32, in nats."""
    losses = _losses(model, batch)
    return losses.new_zeros(batch.labels.shape[0]).index_add_(0, _rows(batch), -losses)


def _rows(batch: Batch) -> Tensor:
    """Of each target, in the order of `_losses`."""
    return (batch.labels[:, 1:] != IGNORED).nonzero()[:, 0]


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of every target, (targets,), fp32, row by row."""
    if batch.position_ids is None:
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    else:  # a mask would hide from transformers that rows are packed
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    labels = batch.labels[:, 1:]
    chosen = labels != IGNORED
    # Chosen before the cast: prompts and padding would need four bytes an entry of the vocabulary for nothing.
    logits = output.logits[:, :-1][chosen].to(torch.float32)
    return functional.cross_entropy(logits, labels[chosen], reduction="none")
