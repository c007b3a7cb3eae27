"""`lori merge`: merge adapters into one file."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lori_dist import config, describe, plugin
from lori_dist.commands._arguments import check_writable, is_option, options
from lori_dist.errors import ConfigError

if TYPE_CHECKING:
    from lori_dist.merges import Weight

SUMMARY = "merge adapters into one file"
HELP = """\
Merges adapters, module by module and without the base model. `lori show methods` lists the methods and their options.
An adapter is an adapter file, a LoRA folder of PEFT, or a checkpoint of LoRI's official code; they can be mixed.

examples:
  lori merge merged.safetensors math.safetensors code.safetensors --method linear --weights 0.7,0.3
  lori merge merged.safetensors math.safetensors path/to/peft-lora path/to/LoRI-S --method concat
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write")
    parser.add_argument(
        "adapters", metavar="ADAPTER", nargs="+", help="files or folders; options of the method as KEY=VALUE"
    )
    parser.add_argument(
        "--method",
        required=True,
        metavar="NAME",
        help="merge method: a name from `lori show`, or your own package.module",
    )
    parser.set_defaults(settings=[])
    parser.add_argument(
        "--weights",
        metavar="W,W,...",
        help="one weight per adapter (default: equal ones that sum to one, or 1 each for methods that take a mean)",
    )


def run(arguments: argparse.Namespace) -> None:
    adapters = [Path(word) for word in arguments.adapters if not is_option(word)]
    chosen = options([word for word in arguments.adapters if is_option(word)] + arguments.settings)
    plugin.find("merges", arguments.method, "merge", "--method").bind(chosen, "--method")
    if not adapters:
        raise ConfigError("ADAPTER: none is given; give the adapters to merge")
    weights = _weights(arguments.weights, len(adapters))
    if arguments.out.exists():
        raise ConfigError(f"OUT: {str(arguments.out)!r} exists; the file to write comes first, and must be a new one")
    check_writable(arguments.out, "OUT")
    from lori_dist.merges import merge_files

    made = merge_files(adapters, arguments.out, method=arguments.method, options=chosen, weights=weights)
    print(f"{made['path']}: {describe.size(made['kept'], made['total'])}, {made['bytes']:,} bytes")


def _weights(text: str | None, num_adapters: int) -> "list[Weight] | None":
    """Weights as numbers, or, for layers and modules, as mappings like a configuration's: `0.5,{default: 0.4,
    "*.mlp.*": 0.6}`."""
    if text is None:
        return None
    try:
        merge = config.checked(
            config.Merge,
            {"method": "linear", "weights": config.value(f"[{text}]", f"--weights: {text!r}")},
            "--weights",
        )
    except ConfigError as error:
        raise ConfigError(f"--weights: got {text!r}; write numbers and commas, such as 0.7,0.3 ({error})") from error
    weights: list[Weight] = [*merge.weights] if isinstance(merge.weights, tuple) else []
    if len(weights) != num_adapters:
        raise ConfigError(f"--weights: {len(weights)} given for {num_adapters} adapters; give one per adapter")
    return weights
