"""`lori plan`: estimate memory, traffic, time and cost of a run, for every engine."""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from lori_dist import config, gpus
from lori_dist.commands._arguments import OVERRIDES, add_config, check_writable, write_json

SUMMARY = "estimate memory, traffic, time and cost of a run, for every engine"
HELP = f"""\
Estimates for every engine and placement of the base whether a run fits the devices, how fast it is and what it costs,
and recommends one. Reads the model's config.json and the rows, whose tokens it counts, but no weights. Memory is that
of the dense phase, which needs most, for rows of train.max_length tokens; time is given for the rows as they are and
for full rows. A plan is arithmetic with the assumptions that it prints, not a measurement.

devices: {", ".join(gpus.DEVICES)}

examples:
  lori plan configs/llama-3-70b-fsdp.yaml --gpus 16 --nodes 2 --row-tokens 1024
  lori plan mine.yaml --gpus 8 --gpu a100 --gpu-memory 40GiB --price 1.8 --out plan.json --picture plan.png

{OVERRIDES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--gpus", type=_count, required=True, metavar="N", help="number of devices")
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="number of nodes (default: 1)")
    parser.add_argument(
        "--gpu", metavar="NAME", help="device, see the list below (default: h100); the options below override its data"
    )
    parser.add_argument("--gpu-memory", type=_size, metavar="SIZE", help="memory of a device, such as 80GiB")
    parser.add_argument("--tflops", type=_above_zero, metavar="X", help="peak TFLOP/s of a device in the base's dtype")
    parser.add_argument("--bandwidth", type=_above_zero, metavar="GB/S", help="memory bandwidth of a device")
    parser.add_argument(
        "--link", type=_above_zero, metavar="GB/S", help="bandwidth between devices of a node, one direction"
    )
    parser.add_argument(
        "--network",
        type=_above_zero,
        metavar="GB/S",
        help="bandwidth between nodes, of all network adapters of a node together",
    )
    parser.add_argument("--host", type=_above_zero, metavar="GB/S", help="bandwidth from the host's memory to a device")
    parser.add_argument(
        "--efficiency", type=_above_zero, metavar="X", help="share of the peak that is reached (default: 0.5)"
    )
    parser.add_argument("--price", type=_above_zero, metavar="X", help="price of one device for an hour")
    parser.add_argument("--currency", metavar="WORD", help="currency of the price (default: USD)")
    parser.add_argument(
        "--row-tokens",
        type=_count,
        metavar="N",
        help="tokens of every row (default: the tokens of the files' rows are counted)",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the plan as JSON")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="also write a picture of the memory as PNG")


def run(arguments: argparse.Namespace) -> None:
    described = config.load(arguments.config, arguments.settings)
    from lori_dist.plan import Hardware, picture
    from lori_dist.plan import plan as planned
    from lori_dist.plan.table import table

    name, usual = gpus.device(arguments.gpu or gpus.ASSUMED)
    given = {key: getattr(arguments, key) for key in (*usual, "efficiency", "price", "currency")}
    chosen: dict[str, Any] = usual | {key: value for key, value in given.items() if value is not None}
    for path in (arguments.out, arguments.picture):
        if path is not None:
            check_writable(path, "--out" if path is arguments.out else "--picture")
    hardware = Hardware(
        gpus=arguments.gpus, nodes=arguments.nodes, name=name, is_assumed=arguments.gpu is None, **chosen
    )
    found = planned(described, hardware, row_tokens=arguments.row_tokens)
    if arguments.out is not None:
        write_json(arguments.out, found)
    if arguments.picture is not None:
        picture.save(found, arguments.picture)
    print(json.dumps(found, indent=2) if arguments.json else table(found))


def _size(text: str) -> float:
    """Bytes, given as `80GiB`, `80GB` or a number of GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|GB|TB|TiB)?", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a size such as 80GiB")
    return float(match[1]) * {"GB": 1e9, "TB": 1e12, "TiB": 2**40}.get(match[2], 2**30)


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a number above 0")
    return number


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a whole number of at least 1")
    return int(text)
