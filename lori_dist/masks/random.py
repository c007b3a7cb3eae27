"""Any entries: what a mask is worth shows against this one."""

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from lori_dist.masks._select import largest

_BITS = 63  # among 215M entries, two keys at the threshold are equal about once in 40 billion masks
_PIECE = 1 << 20


def mask(b: Mapping[str, Tensor], *, density: float, seed: int = 0) -> dict[str, Tensor]:
    """Which entries of B live: a uniformly random choice over the whole model, whatever their values.

    b: module path -> (out_features, rank); only shapes and devices matter, but entries that are not finite are refused
    as everywhere. density: kept entries / all entries, in (0, 1]; exactly max(1, round(density * n)) are kept.
    The choice follows from seed, module paths and shapes alone: each entry gets a word of the Philox4x64-10 stream
    keyed by seed and module path, and the largest are kept. The order of `b` and the state of other generators do not
    matter.
    Raises ConfigError if density is outside (0, 1], AdapterError naming the module for an entry that is not finite.
    """

    def keys(module: str) -> Iterator[Tensor]:
        digest = hashlib.blake2b(f"lori_dist.masks.random\0{seed}\0{module}".encode(), digest_size=16).digest()
        words = np.random.Philox(key=int.from_bytes(digest, "little"))
        tensor = b[module]
        for start in range(0, tensor.numel(), _PIECE):
            raw = words.random_raw(min(_PIECE, tensor.numel() - start)) >> np.uint64(64 - _BITS)
            yield torch.from_numpy(raw.view(np.int64)).to(tensor.device)

    return largest(b, keys, _BITS, lambda module: "", density)
