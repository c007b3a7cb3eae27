"""A file where what was merged waits until all of it is there, so that it need not wait in memory."""

import copy
import dataclasses
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from lori_dist.adapter.adapter import Entries
from lori_dist.adapter.update import Part
from lori_dist.formats.lazy import (
    Place,
    StoredEntries,
    StoredProjection,
    as_bytes,
    digest,
    encode,
    encode_projection,
    naming,
)
from lori_dist.tensors import Stored


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spool:
    """Takes the tensors of parts out of memory. `file.save` copies them from here, if its dtype is the same."""

    path: Path
    out: Path
    """The file that is being made, for messages."""
    dtype: torch.dtype = torch.float32
    """Data type of the values."""

    def keep(self, part: Part) -> Part:
        """The part, with its tensors in the file. Those that lie in another, as they would here, stay there.

        Raises AdapterError for a part that `file.save` would refuse.
        """
        entries = part.entries
        if isinstance(entries, StoredEntries):
            is_as_here = entries.place.dtype == self.dtype
            entries = copy.copy(entries) if is_as_here else entries.place.read()  # a copy has nothing of what was read
        with naming(self.out, "written"):
            return dataclasses.replace(part, entries=self._entries(part, entries), stored=self._projection(part))

    def _entries(self, part: Part, entries: Entries | None) -> StoredEntries | None:
        if entries is None or isinstance(entries, StoredEntries):
            return entries
        num_entries = part.shape[0] * part.rank
        about = f"B of {part.module} in {part.name}"
        values, mask = encode(about, entries, num_entries, self.dtype)
        return StoredEntries(
            Place(
                about=about,
                values=self._append(values),
                mask=self._append(mask) if mask.numel() else None,
                kept=values.numel(),
                num_entries=num_entries,
                dtype=self.dtype,
                digest=digest(as_bytes(values), as_bytes(mask)),
            )
        )

    def _projection(self, part: Part) -> StoredProjection | None:
        a = part.stored
        if a is None or isinstance(a, StoredProjection):
            return a
        about = f"A of {part.module} in {part.name}"
        encoded = encode_projection(about, cast(Tensor, a), part.rank, part.shape[1], part.dtype)
        return StoredProjection(
            about=about,
            where=self._append(encoded),
            shape=tuple(encoded.shape),
            dtype=encoded.dtype,
            checksum=digest(as_bytes(encoded.flatten())),
        )

    def _append(self, tensor: Tensor) -> Stored:
        with self.path.open("ab") as file:
            offset = file.tell()
            file.write(as_bytes(tensor.flatten()))
        return Stored(path=self.path, dtype=tensor.dtype, shape=tuple(tensor.shape), offset=offset)
