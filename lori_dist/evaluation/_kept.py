"""Rows that a model has read, with the keys and values that it keeps of them: rows may join, leave and be copied."""

import inspect
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from lori_dist.evaluation._batches import Ids, left_padded
from lori_dist.training.device import put
from lori_dist.training.model import num_positions

MORE, LEAST = 3, 8
"""Tokens that `keeps_rows` reads on in its rows, and those that the longer one has at least before that."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Rows that a model has read. All end in the last column."""

    mask: Tensor  # (rows, columns), int64: whether a token is there
    states: Sequence[tuple[Tensor, Tensor]]  # of each layer, keys and values: (rows, heads, columns, features)

    def only(self, rows: Sequence[int]) -> "Kept":
        """These rows, in this order; one may be there several times."""
        if list(rows) == list(range(len(self.mask))):
            return self
        index = put(torch.tensor(rows), self.mask.device)
        mask = self.mask[index]
        start = int(mask.any(0).int().argmax())  # the columns before it are padding
        states = [tuple(one[:, :, start:].index_select(0, index) for one in pair) for pair in self.states]
        return Kept(mask=mask[:, start:], states=[(keys, values) for keys, values in states])

    def with_rows(self, others: "Kept") -> "Kept":
        """These rows, and then the others."""
        columns = max(self.mask.shape[1], others.mask.shape[1])
        one, other = self._widened(columns), others._widened(columns)
        pairs = zip(one.states, other.states, strict=True)
        return Kept(
            mask=torch.cat([one.mask, other.mask]),
            states=[(torch.cat([k, others_k]), torch.cat([v, others_v])) for (k, v), (others_k, others_v) in pairs],
        )

    def _widened(self, columns: int) -> "Kept":
        more = columns - self.mask.shape[1]
        if not more:
            return self
        states = [tuple(functional.pad(one, (0, 0, more, 0)) for one in pair) for pair in self.states]
        return Kept(mask=functional.pad(self.mask, (more, 0)), states=[(keys, values) for keys, values in states])


def read(model: PreTrainedModel, rows: Sequence[Ids], pad: int, device: torch.device) -> tuple[Tensor, Kept]:
    """Reads rows. Returns the logits after each row, (rows, vocabulary), and what is kept of them."""
    input_ids, mask = left_padded(rows, pad)
    logits, kept = _forward(model, put(input_ids, device), put(mask, device), None)
    return logits[:, -1], kept


def read_on(model: PreTrainedModel, kept: Kept, rows: Sequence[Ids], pad: int) -> tuple[Tensor, Kept]:
    """Reads on in rows, at least a token in each. Returns the logits after each of the tokens, (rows, tokens,
    vocabulary), and what is kept of the rows, which can be used if each was given as many."""
    length, device = max(map(len, rows)), kept.mask.device
    input_ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return _forward(model, put(input_ids, device), put(mask, device), kept)


def _forward(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, kept: Kept | None) -> tuple[Tensor, Kept]:
    whole = mask if kept is None else torch.cat([kept.mask, mask], dim=1)
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if "position_ids" in accepted:
        options["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    if kept is None and "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    # Layers with a window keep all of it like the others: what they do not see is masked.
    cache = DynamicCache()
    for keys, values in () if kept is None else kept.states:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    output = model(input_ids=input_ids, attention_mask=whole, past_key_values=cache, use_cache=True, **options)
    return output.logits, Kept(mask=whole, states=[(layer.keys, layer.values) for layer in cache.layers])


@torch.no_grad()
def keeps_rows(model: PreTrainedModel, rows: Sequence[Ids], pad: int, device: torch.device) -> bool:
    """Whether a short row gives the same logits, to rounding, read alone at once and read beside one as long as the
    longest of the rows, with which it shares a cache until that leaves.

    Recurrent models do not: they keep a state, not keys and values.
    """
    if model._is_stateful or not model._supports_default_dynamic_cache():
        return False
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    tokens = max(rows, key=len)
    length = min(max(LEAST, len(tokens)), (num_positions(model) or sys.maxsize) - MORE)
    long = [tokens[place % len(tokens)] for place in range(max(1, length))]
    short, more = long[length // 2 :][: max(1, length // 3)], (long * MORE)[:MORE]
    whole = put(torch.tensor([short + more]), device)
    expected = model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[0]
    try:
        found = [read(model, [long, short], pad, device)[0][1]]
        _, kept = read(model, [long], pad, device)
        logits, other = read(model, [short], pad, device)
        found.append(logits[0])
        logits, kept = read_on(model, kept.with_rows(other), [more[:1]] * 2, pad)
        found.append(logits[1, -1])
        logits, _ = read_on(model, kept.only([1]), [more[1:]], pad)
        found += logits[0]
    except Exception as error:  # of whatever kind, from code that is not made for such a cache
        log.debug("rows cannot share a cache", exc_info=error)
        return False
    places = [len(short) - 1, len(short) - 1, *range(len(short), len(short) + MORE)]
    tolerance = max(1e-4, 4 * torch.finfo(model.dtype).eps)
    pairs = [(one.float(), expected[place].float()) for one, place in zip(found, places, strict=True)]
    # NaN is a difference.
    return all(bool((a - b).abs().max() <= tolerance * (b - b.mean()).abs().max()) for a, b in pairs)
