"""Rows in batches that need little padding, or none where the model would see it."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lori_dist.training.device import put

Ids = Sequence[int]
Side = Literal["left", "right"]
STEPS = 3
"""At most so many tokens are written to find out whether a model sees padding on the left."""


def by_length(lengths: Sequence[int], batch_size: int, *, is_padded: bool = True) -> Iterator[list[int]]:
    """Row numbers in batches of at most batch_size, longest rows first: what does not fit in memory fails at once.

    is_padded: whether rows of different lengths may share a batch, see `hides_padding`.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups = [order] if is_padded else [list(rows) for _, rows in groupby(order, key=lambda row: lengths[row])]
    for rows in groups:
        for first in range(0, len(rows), batch_size):
            yield rows[first : first + batch_size]


@torch.no_grad()
def hides_padding(model: PreTrainedModel, rows: Sequence[Ids], pad: int, side: Side, *, steps: int = STEPS) -> bool:
    """Whether the shortest of the rows gives the same logits alone and padded to the longest, to rounding.

    steps: on the left, tokens that the model has positions for after the longest row.

    Attention hides padding. Recurrent models that do not look at the attention mask (RWKV, some kinds of linear
    attention) read padding on the left as text; models whose positions depend on the longest row of a batch see it on
    either side.
    """
    short, long = min(rows, key=len, default=()), max(rows, key=len, default=())
    if len(short) == len(long):
        return True
    logits = functools.partial(_written, steps=min(steps, STEPS)) if side == "left" else _read
    alone, together = logits(model, [short], pad), logits(model, [short, long], pad)
    tolerance = max(1e-4, 4 * torch.finfo(model.dtype).eps)
    for one, other in zip(alone, together, strict=True):
        scale = (one - one.mean()).abs().max()
        if not bool((one - other).abs().max() <= tolerance * scale):  # NaN is a difference
            return False
        if one.argmax() != other.argmax():
            return True  # a tie, within rounding: from here on they write different texts
    return True


def left_padded(rows: Sequence[Ids], pad: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, (rows, length), int64: what follows begins in the same column."""
    length = max(len(row) for row in rows)
    input_ids = [[pad] * (length - len(row)) + list(row) for row in rows]
    attention_mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(input_ids), torch.tensor(attention_mask)


def _written(model: PreTrainedModel, rows: Sequence[Ids], pad: int, *, steps: int) -> list[Tensor]:
    """The first row's logits, fp32, of each token that is written after it."""
    input_ids, attention_mask = left_padded(rows, pad)
    settings = GenerationConfig(
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        max_new_tokens=steps,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with without_settings(model):
        found = model.generate(
            input_ids=put(input_ids, model.device),
            attention_mask=put(attention_mask, model.device),
            generation_config=settings,
        )
    return [step[0].float() for step in found.logits]


def _read(model: PreTrainedModel, rows: Sequence[Ids], pad: int) -> list[Tensor]:
    """The logits, fp32, at the first row's last token."""
    length = max(len(row) for row in rows)
    input_ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    output = model(
        input_ids=put(input_ids, model.device), attention_mask=put(attention_mask, model.device), use_cache=False
    )
    return [output.logits[0, len(rows[0]) - 1].float()]


@contextlib.contextmanager
def without_settings(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills what a call leaves open with the base's own settings: sampling, penalties, minimum lengths."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
