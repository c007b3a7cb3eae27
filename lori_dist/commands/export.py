"""`lori export`: write an adapter in a form that other programs read."""

import argparse
import sys
from pathlib import Path

from lori_dist.errors import ConfigError

SUMMARY = "write an adapter in a form that other programs read"
HELP = """\
peft: a LoRA folder that peft.PeftModel.from_pretrained loads; its outputs equal those of the adapter.
official: the adapter of one task in the layout of LoRI's official code, with B's mask as 0.9_mask.pt.
folded: the base model with the adapter added to its weights, an ordinary transformers folder.
tasks: of a file with an update for each task, the adapter file of each, TASK.safetensors; for the other formats, add
@TASK to its path. Every export is read back and compared before it appears.

examples:
  lori export runs/quickstart/merge-concat/adapter.safetensors exported --format peft
  lori export adapter.safetensors model-with-adapter --format folded --base path/to/base
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter file, or LoRA folder of PEFT")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist, or be empty")
    parser.add_argument("--format", required=True, choices=("peft", "official", "folded", "tasks"))
    parser.add_argument("--base", metavar="PATH", help="base model (default for a LoRA folder: the one it names)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that the base model brings along, as model.trust_remote_code does",
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.format == "folded" and arguments.base is None:
        raise ConfigError("--base: is missing; --format folded writes the base model with the adapter in it")
    from lori_dist import formats
    from lori_dist.integrations import model_card

    if arguments.format == "tasks":
        _write_tasks(arguments.adapter, arguments.out)
        return
    adapter, origin = formats.open_lazy(arguments.adapter), model_card.origin(arguments.adapter)
    if arguments.format == "folded":
        from lori_dist.integrations.folded import export_folded

        export_folded(
            arguments.base, adapter, arguments.out, origin=origin, trust_remote_code=arguments.trust_remote_code
        )
    else:
        from lori_dist.integrations import official, peft

        base = arguments.base or adapter.base.get("name")
        if base is None:
            raise ConfigError("--base: is missing, and the adapter does not name its base model; name it")
        write = official.export if arguments.format == "official" else peft.export
        write(adapter, arguments.out, base_model_name=str(base), origin=origin)
        if not peft.is_loadable(str(base)):
            print(
                f"{arguments.out}: names its base model {base!r}, a folder that is not here or a model that is not in "
                "the hub's cache; for AutoPeftModelForCausalLM.from_pretrained, export with --base PATH",
                file=sys.stderr,
            )
    print(arguments.out)


def _write_tasks(path: Path, out: Path) -> None:
    """Writes the adapter of each task of a form, and reads it back."""
    from lori_dist.formats import forms, native

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT: {str(out)!r} exists and is not an empty folder; give another")
    made = forms.load_tasks(path)
    out.mkdir(parents=True, exist_ok=True)
    for task, adapter in made.items():
        native.save(adapter, out / f"{task}.safetensors")
        native.load(out / f"{task}.safetensors")
    print(out)
