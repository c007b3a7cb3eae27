"""What the masks are compared with: a stable sort of all entries of a group."""

from collections.abc import Callable, Mapping

import torch
from hypothesis import strategies as st
from torch import Tensor

MODULES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.10.mlp.experts.3.down_proj",
    "lm_head",
    "connector.dense",
)


def kept(b: Mapping[str, Tensor], group: Callable[[str], str], density: float) -> dict[str, list[bool]]:
    """Module -> which of its entries are kept, flat: the largest of each group, the earlier of equal ones."""
    groups: dict[str, list[tuple[float, int, str, int]]] = {}
    for place, (module, tensor) in enumerate(b.items()):
        entries = groups.setdefault(group(module), [])
        entries += [(-abs(value), place, module, index) for index, value in enumerate(tensor.flatten().tolist())]
    masks = {module: [False] * tensor.numel() for module, tensor in b.items()}
    for entries in groups.values():
        num_kept = max(1, round(density * len(entries)))
        for _, _, module, index in sorted(entries)[:num_kept]:
            masks[module][index] = True
    return masks


def flat(masks: Mapping[str, Tensor]) -> dict[str, list[bool]]:
    return {module: mask.flatten().tolist() for module, mask in masks.items()}


DENSITIES = st.one_of(st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0]), st.floats(1e-6, 1.0))


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, Tensor]:
    """The B of some modules, in any order: few different values, so many ties and zeros, or any floats at all."""
    modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=6, unique=True))
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2**-23, 2.0, 1e-45, -1e-40])
    values = draw(st.sampled_from([few, st.floats(allow_nan=False, allow_infinity=False, width=32)]))
    return {
        module: torch.tensor(
            draw(st.lists(values, min_size=size * rank, max_size=size * rank)), dtype=torch.float32
        ).view(size, rank)
        for module in modules
        for size, rank in [draw(st.tuples(st.integers(1, 7), st.integers(1, 4)))]
    }
