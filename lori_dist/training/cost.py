"""The cost that an engine states for itself: bytes that a rank holds, and what ranks send each other in a step.

Beside `build`, an engine's file may define `memory(model, load) -> Held` and `traffic(model, load) ->
list[Collective]`, which take the options of `build` as keywords; a plan adds up what they say, of engines outside the
package too. With `placements(ranks, nodes)`, which gives dictionaries of options, it proposes what is worth a row in
every plan.

Beside `place`, which puts the base where evaluations compute with it, `place_memory` and `place_traffic` say the same
of a forward pass, with the options of `place`. Without them, an evaluation takes what training does with nothing that
is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lori_dist.training.flops import Attention
from lori_dist.training.sequences import Share

Kind = Literal["gather", "reduce", "all_reduce", "copy"]
Owner = Literal["base", "adapter"]

FP32 = 4
"""Bytes of a value, a gradient and a moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Bytes of the base in modules of one class."""

    largest: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """A model with what is trained on it. Bytes, unless it is said otherwise."""

    parameters: int
    """Entries of the base."""
    base: int
    """All frozen weights."""
    block: int
    """Bytes of the base's largest block."""
    blocks: int
    """Bytes of all blocks of the base."""
    num_blocks: int
    num_modules: int
    """Number of adapted modules."""
    entries: int
    """Entries of B over all modules, of one adapter."""
    kept: int
    """Entries that are trained in the sparse phase."""
    whole: int
    """Entries that are trained besides, in both phases: of A where it is trained, and of modules_to_save."""
    projections: int
    """A, cached on every rank."""
    quantized: int
    """Entries of the largest quantised weight, which is a matrix again while its layer computes; 0 for none."""
    widest_b: int
    """Entries of the largest B, which is dense while its layer computes."""
    vocabulary: int
    chunked: bool
    """Whether the loss makes logits in chunks."""
    dtype: int
    """Bytes of an entry in the data type of computation."""
    block_activations: int
    """Kept for the backward pass by the block that keeps most, of one micro-batch,"""
    blocks_activations: int
    """The same for all blocks."""
    block_gradients: int
    """Bytes of gradients that a block has at once in its backward pass: of what it multiplies, and of the two
    factors."""
    block_input: int
    """All that activation checkpointing keeps of a block."""
    other_activations: int
    """Kept outside of the blocks, logits apart."""
    tokens: int
    """Tokens of one micro-batch."""
    flops: float | None
    """FLOPs of training on a token, in products with the base's matrices; None if they are not known."""
    adapter_flops: float = 0.0
    """FLOPs of training on a token, in products with A and B."""
    attention: tuple[Attention, ...] = ()
    """Attention of each layer that has it."""
    kernel: str = "sdpa"
    """Implementation of attention, by transformers' name."""
    key_values: int = 0
    """Entries of keys and values of a token in a block."""
    adapters: int = 1
    """Adapters that are trained over the base at once; entries, kept and whole are those of each, all else is for
    all."""
    share: Share = Share.NO
    """Whether rows of several tasks share sequences."""
    before: int = 0
    """Entries of earlier tasks, which do not change."""
    of_a: int = 0
    """A of one adapter, where it is not trained: evaluations keep it, however training has it."""
    layer: int = 0
    """Bytes of the largest linear layer of a block, or of what a block has besides its linear layers."""
    ends: tuple[int, ...] = ()
    """Bytes of the embedding and of the output layer, where they are two."""
    largest: int = 0
    """Bytes of the largest weight."""
    widest: int = 0
    """Most features that a token has in or out of an adapted layer."""
    is_routable: bool = True
    """Whether the rows of several adapters can share a batch."""
    classes: Mapping[str, Sizes] = field(default_factory=dict)
    """Sizes of the base's modules, by the names of their classes; modules inside one of the same class count apart."""
    dequantized: int = 0
    """Bytes that go through a device's memory in each pass to dequantise all weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """The load of an engine in a step."""

    ranks: int
    nodes: int
    """Nodes among which the ranks are divided evenly."""
    trained: int
    """Entries that are updated, over all adapters."""
    micro_batches: int
    """Micro-batches of a rank in a step."""
    tasks: int = 0
    """Whose gradients are kept apart until all micro-batches are done, 0 where the engine sums and reduces them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Bytes of a rank."""

    base: int
    """Frozen weights, between steps."""
    values: int
    """Trained values, with all copies of them."""
    gradients: int
    """Gradients, with the buffers that sum them over micro-batches. Nothing where `Load.tasks` are kept apart and the
    engine gets a share."""
    moments: int
    buffers: int = 0
    """Through which something is sent."""
    gathered_at_loss: int = 0
    """Bytes of the base that are gathered when a forward pass has ended."""
    gathered_in_block: int = 0
    """Bytes of the base that are gathered while the first block of a backward pass computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """Bytes of the whole tensors that are made or reduced in a step."""

    kind: Kind
    """reduce: of what is summed, each rank gets its share; all_reduce: all of it. copy: what a rank takes from its
    host's memory to its device."""
    owner: Owner
    bytes: int
    group: int
    """Ranks that take part."""
    spans_nodes: bool
    rings: int = 1
    """Groups that send at the same time from the same node."""
