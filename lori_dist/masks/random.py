"""Any entries: what a mask is worth shows against this one."""

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from lori_dist.masks._select import largest

_BITS = 62  # among 215M entries, two keys at the threshold are equal about once in 20 billion masks
_PIECE = 1 << 20


def mask(b: Mapping[str, Tensor], *, density: float, seed: int = 0) -> dict[str, Tensor]:
    """Which entries of B live: a uniformly random choice over the whole model, among those that are not zero.

    b: module path -> (out_features, rank). density: kept entries / all entries, in (0, 1]; exactly
    max(1, round(density * n)) are kept, zeros only once all other entries are.
    The choice follows from seed, module paths, shapes and where the zeros are: each entry gets a word of the
    Philox4x64-10 stream keyed by seed and module path, and the largest are kept. The order of `b` and the state of
    other generators do not matter.
    Raises ConfigError if density is outside (0, 1], AdapterError naming the module for an entry that is not finite.
    """

    def keys(module: str) -> Iterator[Tensor]:
        digest = hashlib.blake2b(f"lori_dist.masks.random\0{seed}\0{module}".encode(), digest_size=16).digest()
        words = np.random.Philox(key=int.from_bytes(digest, "little"))
        flat = b[module].detach().reshape(-1)
        for start in range(0, flat.numel(), _PIECE):
            piece = flat[start : start + _PIECE]
            raw = words.random_raw(piece.numel()) >> np.uint64(64 - _BITS)
            yield torch.from_numpy(raw.view(np.int64)).to(flat.device) | (piece != 0).long() << _BITS

    return largest(b, keys, _BITS + 1, lambda module: "", density)
