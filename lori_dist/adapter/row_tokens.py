"""The rows that the tokens of a batch are of, for forms that choose something for a row as a whole.

The choice is made from a row's prompt: the answer, which training has and generation has not, would tell it too much.
Rows that a model continues, as `generate` does, keep the choice of their prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lori_dist.adapter import sharded
from lori_dist.errors import AdapterError

ROWS, HOOK = "lori_rows", "lori_rows_hook"
"""Attributes of a model whose form looks at rows: the `Rows` that its layers have in common, and what fills them."""
IGNORED = -100
"""Label of a token that is not a target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """The tokens of a batch, padding included, one sequence after the other."""

    row: Tensor  # (tokens,), int64: the number of each token's row
    in_prompt: Tensor  # (tokens,), bool: whether the choice for its row is made from it
    counts: Tensor  # (tokens,), bool: whether it is a token of a row with targets, as padding never is
    num_rows: int

    def of(self, where: slice) -> "Tokens":
        """Some of the tokens, whose rows keep their numbers."""
        return Tokens(
            row=self.row[where], in_prompt=self.in_prompt[where], counts=self.counts[where], num_rows=self.num_rows
        )

    def rows_that_count(self) -> Tensor:
        """Whether each row has targets, (rows,), bool."""
        return _any(self.counts, self.row, self.num_rows)

    def means(self, x: Tensor) -> Tensor:
        """(tokens, features) -> the mean over each row's prompt, (rows, features), in float32 at least; 0 without any
        token."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        chosen = self.in_prompt.nonzero().squeeze(1)
        row = self.row[chosen]
        sums = torch.zeros(self.num_rows, x.shape[-1], dtype=dtype, device=x.device)
        counts = torch.zeros(self.num_rows, dtype=dtype, device=x.device)
        sums = sums.index_add(0, row, x[chosen].to(dtype))
        return sums / counts.index_add(0, row, torch.ones_like(row, dtype=dtype)).clamp(min=1)[:, None]


@dataclass(kw_only=True, slots=True)
class Rows:
    """What the layers of a model know of the rows of the batch that is being computed, until the next one."""

    choose: bool
    """Whether something is chosen for each row; else layers only count."""
    labels: Tensor | None = None
    """Of the batch that is to run next, (rows, length), where the model itself is not given them."""
    tokens: Tokens | None = None
    continues: bool = False
    """Whether the batch continues rows, which keep what was chosen for them."""
    chosen: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Module -> what was chosen for each row, (rows, ...), of the last batch without gradients that began rows."""

    def of(self, module: str, x: Tensor) -> Tokens:
        """The tokens of a layer's input. Raises AdapterError for a layer that does not see all of them."""
        num_tokens = x.numel() // x.shape[-1]
        if self.tokens is None or len(self.tokens.row) != num_tokens:
            known = "an unknown number of" if self.tokens is None else f"{len(self.tokens.row)}"
            raise AdapterError(
                f"{module}: has an input of shape {tuple(x.shape)} for {known} tokens, so rows cannot be "
                "distinguished; call the model itself, and remove layers that see other tokens from the targets"
            )
        return self.tokens

    def kept(self, module: str) -> Mapping[str, Tensor]:
        """What was chosen for the rows that the batch continues. Raises AdapterError where that is of other rows."""
        assert self.tokens is not None
        found = self.chosen.get(module)
        if found is None or any(len(one) != self.tokens.num_rows for one in found.values()):
            raise AdapterError(
                f"{module}: got {self.tokens.num_rows} rows to continue, whose prompts were not the last that the "
                "model read; read the prompts first, all rows together"
            )
        return found

    def begin(self, shape: tuple[int, int], device: torch.device, named: Mapping[str, Any]) -> None:
        """A batch of so many sequences and tokens of each is to run. named: what a model of transformers is given."""
        mask, labels, positions = (named.get(name) for name in ("attention_mask", "labels", "position_ids"))
        labels, self.labels = self.labels if labels is None else labels, None
        cache = named.get("past_key_values")
        self.continues = bool(getattr(cache, "get_seq_length", int)())
        length = shape[1]
        starts = torch.zeros(shape, dtype=torch.bool, device=device)
        starts[:, 0] = True
        if mask is None and not self.continues and positions is not None and positions.dim() == 2:
            starts |= (positions.to(device) == 0).expand(shape)  # each row of a sequence begins at 0
        is_real = torch.ones(shape, dtype=torch.bool, device=device)
        if mask is not None and mask.dim() == 2:
            is_real = mask[:, -length:].to(device).bool()
        is_target = torch.zeros(shape, dtype=torch.bool, device=device)
        if labels is not None and tuple(labels.shape) == tuple(shape):
            is_target = labels.to(device) != IGNORED
        self.tokens = _tokens(starts.flatten(), is_real.flatten(), (is_target & is_real).flatten())


def _tokens(starts: Tensor, is_real: Tensor, is_target: Tensor) -> Tokens:
    """All (tokens,): where rows begin, what is not padding, what is a target."""
    row = starts.long().cumsum(0) - 1
    num_rows = int(starts.sum())
    so_far = is_target.long().cumsum(0)
    before_row = (so_far - is_target.long())[starts]  # targets of earlier rows
    in_prompt = is_real & (so_far == before_row[row])
    has_prompt = _any(in_prompt, row, num_rows)
    # Rows that begin with a target have no prompt: their choice is made from all of their tokens.
    in_prompt = torch.where(has_prompt[row], in_prompt, is_real)
    return Tokens(row=row, in_prompt=in_prompt, counts=is_real & _any(is_target, row, num_rows)[row], num_rows=num_rows)


def _any(which: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Whether any token of each row is one of these, (rows,)."""
    return torch.zeros(num_rows, dtype=torch.long, device=row.device).index_add(0, row, which.long()) > 0


def rows_of(model: nn.Module) -> Rows | None:
    """What the layers of a model know of a batch's rows; None for a form that does not look at rows.

    The model may be wrapped by DDP or an engine.
    """
    return getattr(sharded.unwrapped(model), ROWS, None)


def watch(model: nn.Module, rows: Rows) -> None:
    """Has each forward pass of a model say which rows its tokens are of."""

    def begin(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        inputs = next(one for one in (*args[:1], named.get("input_ids"), named.get("inputs_embeds")) if one is not None)
        rows.begin((inputs.shape[0], inputs.shape[1]), inputs.device, named)

    setattr(model, ROWS, rows)
    setattr(model, HOOK, model.register_forward_pre_hook(begin, with_kwargs=True))


def unwatch(model: nn.Module) -> None:
    """Undoes `watch`, of a model that may have none."""
    setattr(model, ROWS, None)
    if (hook := vars(model).pop(HOOK, None)) is not None:
        hook.remove()
