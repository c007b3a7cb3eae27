"""Writes RESULTS.md, and the table of figures in README.md, from the JSON files in results/.

    python -m tests.benchmarks.results            writes both
    python -m tests.benchmarks.results --check    exits with 1 if one of them is not what it would write

Each file there is one measurement: what `lori bench SUITE --out` or `python -m tests.benchmarks.NAME --out` wrote, with
its command, date, machine and versions. Measure again on another machine or day, add the file, and every figure that
does not repeat becomes a range.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "RESULTS.md"
README = ROOT / "README.md"
EARLIER = HERE / "results" / "earlier.txt"
"""Measurements of before JSON files were kept, as they were written then."""
SECTION = "\n## What it saves\n"
"""Of README.md: the one whose table is written here."""

Measured = Mapping[str, Any]


def load(folder: Path = HERE / "results") -> dict[str, list[Measured]]:
    """The measurements of each suite, in the order of their files' names."""
    found: dict[str, list[Measured]] = {}
    for path in sorted(folder.glob("*.json")):
        measured = json.loads(path.read_text())
        found.setdefault(measured["suite"].rpartition(".")[2], []).append(measured)
    return found


# --- one figure ------------------------------------------------------------------------------------------------------


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The ratios of a measurement, each with its keys."""
    if isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from leaves(item, (*path, str(key)))
    else:
        yield path, tree


def values(found: Sequence[Measured], *path: str) -> list[float]:
    """Of one ratio in all measurements. A `*` in the path stands for every key."""
    return [
        leaf
        for measured in found
        for keys, leaf in leaves(measured["ratios"])
        if len(keys) == len(path) and all(want in ("*", key) for key, want in zip(keys, path, strict=True))
    ]


def span(numbers: Sequence[float], style: str = "{:.2f}") -> str:
    """`0.81 to 0.92`, or one number where all of them read alike."""
    low, high = (style.format(number) for number in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


# --- README.md -------------------------------------------------------------------------------------------------------


PERCENT, TIMES, RATIO = "{:.1%}", "{:.1f}x", "{:.2f}"
LORA, PEFT_MERGE = "PEFT's LoRA", "PEFT's `add_weighted_adapter`"

# What is read, its suite, the ratios of which each makes a number or a range, how these are written, against what.
FIGURES: list[tuple[str, str, list[list[tuple[str, ...]]], str, str]] = [
    (
        "Adam moments of a rank, gradient bytes reduced (10% of B, rank 32)",
        "train",
        [[("*", "lori_s", "optimizer_bytes"), ("*", "lori_s", "gradient_bytes")]],
        PERCENT,
        LORA,
    ),
    ("adapter file in bf16", "train", [[("*", "lori_s", "adapter_file_bytes")]], PERCENT, LORA),
    ("bytes saved for the backward pass", "train", [[("*", "lori_s", "saved_activation_bytes")]], PERCENT, LORA),
    ("time of a step, six engines and placements", "train", [[("*", "lori_s", "step_seconds")]], RATIO, LORA),
    ("the same, over the base alone", "train", [[("*", "lori_s", "step_seconds_over_floor")]], RATIO, "no adapter"),
    (
        "2, 4, 8 tasks over one sharded base, rows of equal length: tokens/s",
        "packed",
        [[("*", number, "packed_over_after")] for number in ("2", "4", "8")],
        TIMES,
        "one task after another",
    ),
    (
        "speed of concat, TIES and linear merges of four adapters of a 40-layer 70B shape, file to file",
        "merge",
        [[(method, "file_to_file")] for method in ("concat", "ties", "linear")],
        TIMES,
        PEFT_MERGE,
    ),
    (
        "most memory of a rank while fsdp loads a base of 1 GB on 2 and 4 ranks",
        "loading",
        [[("fsdp", number)] for number in ("2", "4")],
        RATIO,
        "the base",
    ),
]


def readme_table(found: Mapping[str, Sequence[Measured]]) -> str:
    """The figures that decide for a user, of the suites that have been measured."""
    rows = []
    for what, suite, numbers, style, against in FIGURES:
        if suite in found:
            each = [[value for path in paths for value in values(found[suite], *path)] for paths in numbers]
            rows.append((what, "; ".join(span(one, style) for one in each), against))
    return table(("what", "measured", "against"), rows)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- RESULTS.md ------------------------------------------------------------------------------------------------------


def page(found: Mapping[str, Sequence[Measured]]) -> str:
    parts = [HEAD, *(section(suite, measured) for suite, measured in sorted(found.items()))]
    if EARLIER.exists():
        parts.append(EARLIER.read_text().strip())
    return "\n\n".join(parts) + "\n"


HEAD = """# Measurements

Written by `python -m tests.benchmarks.results` from the files in [results](results), one for each measurement. Nothing
was measured on a GPU where no machine names one. Ratios are of candidates that took turns in one run, so they repeat
better than times; a range goes over all measurements of the suite. The JSON files have the rows the ratios are made
of: bytes, seconds, tokens per second."""


def section(suite: str, found: Sequence[Measured]) -> str:
    machines = table(
        ("command", "date", "machine", "load before", "versions"),
        [
            (
                f"`{one['command']}`",
                one["date"],
                f"{one['machine']['cpu']}, {one['machine']['cores']} cores" + gpu(one["machine"]["gpu"]),
                f"{one['machine']['load']:.1f}",
                ", ".join(f"{name} {version}" for name, version in one["versions"].items()),
            )
            for one in found
        ],
    )
    ratios = table(
        ("ratio", "median" if has_quartiles(found) else "value", *(["quartiles"] if has_quartiles(found) else [])),
        rows_of(found),
    )
    return f"## {suite}\n\n{machines}\n\n{ratios}"


def gpu(name: str | None) -> str:
    return f", {name}" if name else ""


QUARTILES = "_quartiles"


def has_quartiles(found: Sequence[Measured]) -> bool:
    return any(path[-1].endswith(QUARTILES) for path, _ in leaves(found[0]["ratios"]))


def rows_of(found: Sequence[Measured]) -> list[list[str]]:
    rows = []
    for path, leaf in leaves(found[0]["ratios"]):
        if path[-1].endswith(QUARTILES):
            continue
        each = [value for one in found for keys, value in leaves(one["ratios"]) if keys == path]
        numbers = [number for value in each for number in (value if isinstance(value, list) else [value])]
        row = [", ".join(path).replace("_", " "), span(numbers, "{:.4g}") if numbers and leaf is not None else "-"]
        if has_quartiles(found):
            spreads = values(found, *path[:-1], path[-1] + QUARTILES)
            row.append(span([edge for pair in spreads for edge in pair], "{:.4g}") if spreads else "")
        rows.append(row)
    return rows


# --- writing ---------------------------------------------------------------------------------------------------------


def filled(readme: str, figures: str) -> str:
    """README.md with another table in its section."""
    before, title, rest = readme.partition(SECTION)
    inside, end, after = rest.partition("\n## ")
    found = re.search(r"^\|.*\|\n(?:\|.*\|\n)*", inside, re.MULTILINE)
    if found is None:
        raise SystemExit(f"README.md: has no section {SECTION.strip()!r} with a table")
    return f"{before}{title}{inside[: found.start()]}{figures}\n{inside[found.end() :]}{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.results")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and exit with 1 where a file is out of date"
    )
    check = parser.parse_args().check
    found = load()
    wanted = {RESULTS: page(found), README: filled(README.read_text(), readme_table(found))}
    stale = [path for path, text in wanted.items() if path.read_text() != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)}: is not what python -m tests.benchmarks.results writes", file=sys.stderr)
        else:
            path.write_text(wanted[path])
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
