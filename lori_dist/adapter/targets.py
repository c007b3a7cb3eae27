"""The layer and the kind of a module, found from its path.

Every place that groups modules asks here: masks, weights by pattern and their search, tables, the report.
"""

EXPERTS = "experts"
FUSED = ("gate_up_proj", "up_proj", "down_proj")
"""Weights that hold the matrices of all experts, one after the other; see `lori_dist.adapter.experts`."""


def layer(module: str) -> str:
    """The path up to its first number that is not an expert's, such as `model.layers.3`; `` outside of all layers."""
    parts = module.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal() and not _is_expert(parts, place):
            return ".".join(parts[: place + 1])
    return ""


def kind(module: str) -> str:
    """The last part of the path that is not a number: `q_proj`, `down_proj`; a path of numbers is its own kind.

    An expert's matrix, `model.layers.0.mlp.experts.down_proj.7`, is a `down_proj` as one of a dense layer is.
    """
    return unnumbered(module).rpartition(".")[2]


def unnumbered(module: str) -> str:
    """The path without numbers at its end: of an expert's matrix, that of the weight which holds all experts."""
    parts = module.split(".")
    while parts and parts[-1].isdecimal():
        parts.pop()
    return ".".join(parts) or module


def place(module: str) -> tuple[str, str]:
    """The layer and the kind."""
    return layer(module), kind(module)


def is_number(pattern: str) -> bool:
    """Whether it is numbers alone, which say neither whether a layer nor whether an expert is meant."""
    return all(part.isdecimal() for part in pattern.split("."))


def _is_expert(parts: list[str], place: int) -> bool:
    before = parts[place - 1] if place else ""
    return before.endswith(EXPERTS) or (before in FUSED and place == len(parts) - 1)
