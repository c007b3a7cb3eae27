"""A model card in the hub's form: front matter that programs read, and what is known of the adapter for people."""

import json

from lori_dist.adapter.adapter import Adapter, Block


def text(adapter: Adapter, base_model_name: str) -> str:
    """A README.md: base model, tasks, and how each block's A and B were made.

    An adapter file knows neither its data nor what was measured, so the card says nothing of them.
    """
    front = [
        "---",
        f"base_model: {json.dumps(base_model_name)}",  # a JSON string is one of YAML, whatever is in it
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [lora, lori]",
        "---",
    ]
    total = max(adapter.total, 1)
    lines = [
        "",
        f"# {' + '.join(block.name for block in adapter.blocks)}",
        "",
        f"A LoRI adapter for `{base_model_name}`: {adapter.kept:,} of {total:,} entries of B are kept "
        f"({adapter.kept / total:.1%}), over {len(adapter.shapes)} linear layers. A is random and frozen where it has "
        "a seed.",
        "",
        "| task | rank | alpha | weight | A | kept entries |",
        "|---|---|---|---|---|---|",
        *(_row(block) for block in adapter.blocks),
        "",
    ]
    return "\n".join([*front, *lines])


def _row(block: Block) -> str:
    made = "stored" if block.seed is None else f"seed {block.seed}"
    kept = sum(entries.kept for entries in block.entries.values())
    name = block.name.replace("|", "\\|")
    return f"| {name} | {block.rank} | {block.alpha:g} | {block.weight:g} | {made} | {kept:,} |"
