"""Any entries: what a mask is worth shows against this one."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lori_dist.masks._select import Rule, largest

_BITS = 62  # among 215M entries, two keys at the threshold are equal about once in 20 billion masks
_BLOCK = 4  # words that the generator makes at once


def mask(b: Mapping[str, Tensor], *, density: float, seed: int = 0) -> dict[str, Tensor]:
    """Keeps a uniformly random choice over the whole model, among the entries that are not zero.

    b: module path -> (out_features, rank). density: kept entries / all entries, in (0, 1]; exactly
    max(1, round(density * n)) are kept, zeros only once all other entries are.
    The choice follows from seed, module paths, shapes and where the zeros are: each entry gets a word of the
    Philox4x64-10 stream keyed by seed and module path, and the largest are kept. The order of `b` and the state of
    other generators do not matter.
    Raises ConfigError if density is outside (0, 1], AdapterError naming the module for an entry that is not finite.
    """
    return largest(b, rule(seed=seed), density)


def rule(*, seed: int = 0) -> Rule:
    """The rule by which several processes choose together."""

    def keys(module: str, start: int, entries: Tensor) -> Tensor:
        digest = hashlib.blake2b(f"lori_dist.masks.random\0{seed}\0{module}".encode(), digest_size=16).digest()
        words = np.random.Philox(key=int.from_bytes(digest, "little")).advance(start // _BLOCK)
        skipped = start % _BLOCK
        raw = words.random_raw(skipped + entries.numel())[skipped:] >> np.uint64(64 - _BITS)
        return torch.from_numpy(raw.view(np.int64)).to(entries.device) | (entries != 0).long() << _BITS

    return Rule(group=lambda module: "", keys=keys)
