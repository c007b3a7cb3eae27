"""The plots of a report: each is drawn once, and is a PNG on white as well as an SVG in the colours of its page."""

import functools
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle

PALETTE: Mapping[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e8edf2"),
    "paper": ("#ffffff", "#12171c"),
    "muted": ("#59636e", "#a3afbb"),
    "grid": ("#d5dae0", "#3a444f"),
    "band": ("#e3e8ee", "#29323c"),
    "line-1": ("#0b62a8", "#6db3f2"),
    "line-2": ("#b3480f", "#f5a15a"),
    "line-3": ("#0f7a5a", "#4fc9a0"),
    "line-4": ("#8a3ea8", "#d69bf0"),
    "more-0": ("#f1f5f9", "#1d242c"),
    "more-1": ("#dbe9f6", "#20364b"),
    "more-2": ("#b8d4ea", "#234a6b"),
    "more-3": ("#8fbfe0", "#265f8c"),
    "more-4": ("#2f77b0", "#5ea6db"),
    "more-5": ("#1d5f97", "#8cc4ee"),
    "more-6": ("#0b4579", "#c4e2f8"),
    "less-1": ("#fbe6d8", "#40291c"),
    "less-2": ("#f4c3a0", "#6b3d20"),
    "less-3": ("#b5541c", "#e0935c"),
    "less-4": ("#7f3208", "#f7c9a6"),
}
"""Name -> colour on a light and on a dark page. Told apart also by the colour-blind; no two of a column are equal."""

SIGNED = ("less-4", "less-3", "less-2", "less-1", "more-0", "more-1", "more-3", "more-4", "more-6")
RISING = tuple(f"more-{number}" for number in range(7))
COSINES = (0.01, 0.03, 0.1, 0.3)
"""Cosines at which the colour changes. They are fixed, so that the pictures of two reports can be compared."""
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)

WIDTH = 3.7  # inches: a phone's. On a wider screen there are several beside each other
LETTER = 0.068  # inches, of a label
SETTINGS = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 8,
    "text.parse_math": False,  # a task may be called $x$
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lori_dist",
}
_SUPERFLUOUS = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One plot."""

    name: str
    """Name of the file."""
    alternative: str
    """Text for readers who do not see the picture."""
    caption: str
    """How to read it."""
    figure: Figure

    def save(self, path: Path) -> None:
        """Writes a PNG."""
        with matplotlib.rc_context(SETTINGS):
            self.figure.savefig(path, format="png", dpi=200, facecolor=PALETTE["paper"][0])

    def svg(self) -> str:
        """An SVG element for an HTML page that sets the variables of `style`. Its ids are its own."""
        text = io.StringIO()
        with matplotlib.rc_context(SETTINGS):
            self.figure.savefig(text, format="svg", facecolor="none", metadata=_SUPERFLUOUS)
        _, _, body = text.getvalue().partition("<svg")
        _, _, body = body.partition(">")
        width, height = (round(96 * inches) for inches in self.figure.get_size_inches())
        body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", body)
        for name, (light, _) in PALETTE.items():
            body = body.replace(light, f"var(--{name})")
        least = f"min-width:{width}px" if width > 96 * WIDTH else ""
        return (
            f'<svg viewBox="0 0 {0.75 * width:g} {0.75 * height:g}" style="max-width:{round(1.5 * width)}px;{least}" '
            f'role="img" aria-label="{as_html(self.alternative)}">{body}'
        )


def style() -> str:
    """The CSS variables of the palette, on light and on dark pages."""
    light, dark = (";".join(f"--{name}:{colours[side]}" for name, colours in PALETTE.items()) for side in (0, 1))
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f"@media print{{:root{{color-scheme:light;{light}}}}}"
    )


def as_html(text: str) -> str:
    """Text of a page, whatever characters a file has brought."""
    return escape("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text))


def plots(report: Mapping[str, Any]) -> Iterator[Plot]:
    """All plots that there is something to show for."""
    with matplotlib.rc_context(SETTINGS):
        if report["pairs"]:
            yield _cosines(report)
            yield _cosines_of_layers(report)
            yield _shares(
                report,
                "support",
                "Overlap of supports",
                "Share of the row's kept entries of B that the column's adapter keeps too; below it, what random masks "
                "of these sizes would share.",
                lambda pair, side: pair["support"]["share"][side],
                lambda pair, side: _over(pair["support"]["expected"], pair["support"]["kept"][side]),
            )
            yield _shares(
                report,
                "signs",
                "Sign conflicts",
                "Share of opposite signs among the entries that are zero in neither: of B where A is shared, of the "
                "updates elsewhere. Unrelated tasks have 50%.",
                lambda pair, side: pair["signs"]["share"],
            )
            for space, verb in (("input", "reads"), ("output", "writes")):
                yield _shares(
                    report,
                    f"energy-{space}",
                    f"Energy shared, {space} side",
                    f"Share of the squared norm of the row's update that {verb} the {space} directions which the "
                    f"column's adapter {verb}.",
                    functools.partial(_energy, space),
                )
        yield from _norms(report)
        for number, (metric, found) in enumerate(report.get("drops", {}).items(), 1):
            yield _drops(number, metric, found)
        for number, (metric, found) in enumerate(report.get("transfer", {}).items(), 1):
            yield _gains(number, metric, found)
        for number, (name, found) in enumerate(report.get("conflicts", {}).items(), 1):
            yield from _conflicts(number, name, found)


def _energy(space: str, pair: Mapping[str, Any], side: int) -> float | None:
    share: float | None = pair["energy"][space][side]
    return share


# --- heat maps -------------------------------------------------------------------------------------------------------


def _cosines(report: Mapping[str, Any]) -> Plot:
    names, pairs = _names(report), _both_ways(report)
    values = [
        [pairs[row, column][0]["cosine"]["value"] if row != column else None for column in names] for row in names
    ]
    figure = _heat_map("Cosine of the updates", names, names, values, _short, _signed)
    steps = ", ".join(map(str, COSINES))
    return Plot(
        name="cosine",
        alternative="Heat map of the overall cosine of every two adapters' updates; the table of pairs has them.",
        caption=f"Over all modules. The colour changes at {steps}; blue is above zero, orange below.",
        figure=figure,
    )


def _shares(
    report: Mapping[str, Any],
    name: str,
    title: str,
    caption: str,
    share: Callable[[Any, int], float | None],
    beside: Callable[[Any, int], float | None] | None = None,
) -> Plot:
    """beside: a second share of each two, written below the first."""
    names, pairs = _names(report), _both_ways(report)
    cells = [[pairs[row, column] if row != column else None for column in names] for row in names]
    values = [[cell and share(*cell) for cell in row] for row in cells]
    notes = [[beside(*cell) if cell and beside else None for cell in row] for row in cells]
    return Plot(
        name=name,
        alternative=f"Heat map, {title.lower()}. {caption} The table of pairs has its numbers.",
        caption=caption,
        figure=_heat_map(title, names, names, values, _percent, _rising(SHARES), notes=notes),
    )


def _norms(report: Mapping[str, Any]) -> Iterator[Plot]:
    tables = [report["norms"][name]["table"] for name in _names(report)]
    largest = max((value for table in tables for row in table for value in row if value is not None), default=0.0)
    steps = [largest * step / 7 for step in range(1, 7)]
    layers = short_layers(report["layers"])
    for number, (name, table) in enumerate(zip(_names(report), tables, strict=True), 1):
        yield Plot(
            name=f"norm-{number}",
            alternative=f"Heat map of the norm of the update of {name}, layers down, projections across; the tables of "
            "norms have its sums.",
            caption="Frobenius norm of the update. Colours are those of the largest norm of all adapters.",
            figure=_heat_map(
                f"Norm: {shown(name, 30)}",
                layers,
                report["projections"],
                table,
                _two_digits,
                _rising(steps),
                down="layer",
            ),
        )


def _drops(number: int, metric: str, found: Mapping[str, Any]) -> Plot:
    tasks, merges = list(found["single"]), list(found["merges"])
    values = [[found["merges"][merge]["drop"].get(task) for task in tasks] for merge in merges]
    better = "lower" if found["lower_is_better"] else "higher"
    return Plot(
        name=f"drop-{number}",
        alternative=f"Heat map of the drop of each task in {metric} under each merge; the table of drops has it.",
        caption=f"What the merge loses against the task's own adapter, {_unit(found)} ({better} is better): above "
        "zero, orange, it is worse.",
        figure=_heat_map(
            f"Drop in {shown(metric, 24)}",
            merges,
            tasks,
            values,
            _change(found),
            lambda value: _signed(-value, _steps(values)),
        ),
    )


def _conflicts(number: int, name: str, found: Mapping[str, Any]) -> Iterator[Plot]:
    """How often, and how much: layers down, pairs of tasks across."""
    pairs = ["+".join(shown(task, 7) for task in pair["tasks"]) for pair in found["pairs"]]
    layers = short_layers(found["layers"])

    def table(key: str) -> list[tuple[float, ...]]:
        return list(zip(*(pair["layers"][key] for pair in found["pairs"]), strict=True))

    yield Plot(
        name=f"conflicts-{number}",
        alternative=f"Heat map of how often two tasks of {name} conflicted, layers down, pairs across.",
        caption="Share of the steps in which the gradients of two tasks, in a layer, had a negative inner product.",
        figure=_heat_map(
            f"Conflicts: {shown(name, 24)}",
            layers,
            pairs,
            table("often"),
            _percent,
            _rising(SHARES),
            down="layer",
        ),
    )
    yield Plot(
        name=f"conflicts-depth-{number}",
        alternative=f"Heat map of how much two tasks of {name} conflicted, layers down, pairs across.",
        caption="Mean cosine of the two gradients in these steps: at -1 the gradients are exactly opposite.",
        figure=_heat_map(
            f"Depth of conflicts: {shown(name, 20)}", layers, pairs, table("depth"), _short, _signed, down="layer"
        ),
    )


def _gains(number: int, metric: str, found: Mapping[str, Any]) -> Plot:
    """The picture of what each training of a sequence changed: models down, tasks across."""
    base, *stages = found["scores"].items()
    tasks, sign = list(base[1]), -1 if found["lower_is_better"] else 1
    values = [[sign * (scores[task] - base[1][task]) for task in tasks] for _, scores in stages]
    return Plot(
        name=f"transfer-{number}",
        alternative=f"Heat map of the gain over the base in {metric}, after each task's training and on each task.",
        caption=f"Gain over the base {_unit(found)}, on each task, after the training of the row's task: above zero, "
        "blue, it is better. Down a column one sees what later tasks do to an earlier one.",
        figure=_heat_map(
            f"Gain in {shown(metric, 24)}",
            [f"+ {name}" for name, _ in stages],
            tasks,
            values,
            _change(found),
            lambda value: _signed(value, _steps(values)),
        ),
    )


def _steps(values: Sequence[Sequence[float | None]]) -> list[float]:
    """Values at which the colour changes: shares of the largest value."""
    largest = max((abs(value) for row in values for value in row if value is not None), default=0.0)
    return [largest * step for step in (0.05, 0.25, 0.5, 0.75)]


def _unit(found: Mapping[str, Any]) -> str:
    return "in points of a hundred" if _is_share(found) else "in its own unit"


def _change(found: Mapping[str, Any]) -> Callable[[float], str]:
    return (lambda v: f"{100 * v:+.1f}") if _is_share(found) else (lambda v: f"{v:+.2g}")


def _is_share(found: Mapping[str, Any]) -> bool:
    """Whether all scores of a metric are parts of one."""
    if "scores" in found:
        scores = [score for of_tasks in found["scores"].values() for score in of_tasks.values()]
    else:
        merged = (score for merge in found["merges"].values() for score in merge["score"].values())
        scores = [*found["single"].values(), *merged]
    return not found["lower_is_better"] and all(0 <= score <= 1 for score in scores)


def _heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    text: Callable[[float], str],
    colour: Callable[[float], str],
    *,
    notes: Sequence[Sequence[float | None]] | None = None,
    down: str = "",
) -> Figure:
    """Cells with their number, so that no colour has to be told from another. None: an empty cell."""
    rows, columns = [shown(name, 16) for name in rows], [shown(name, 16) for name in columns]
    left = LETTER * max(map(len, [down, *rows])) + 0.15
    width = max(WIDTH, left + 0.42 * len(columns) + 0.1)
    cell = (width - left - 0.1) / len(columns)
    is_turned = any(LETTER * len(name) > cell for name in columns)
    top = 0.36 + (LETTER * max(map(len, columns)) if is_turned else 0.2)
    tall = (0.36 if len(rows) <= 12 else 0.2) if not down else 0.24 if len(rows) <= 40 else 0.17
    height = top + tall * len(rows) + 0.08
    figure = Figure(figsize=(width, height))
    figure.text(0.06 / width, 1 - 0.08 / height, title, va="top", size=9.5, weight="bold", color=tint("ink"))
    axes = figure.add_axes((left / width, 0.08 / height, 1 - (left + 0.1) / width, tall * len(rows) / height))
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            _draw_cell(axes, x, y, value, text, colour, notes[y][x] if notes else None)
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.set_xticks([x + 0.5 for x in range(len(columns))], columns, rotation=90 if is_turned else 0)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
    axes.tick_params(top=False, left=False, bottom=False, labeltop=True, labelbottom=False, pad=2)
    plain(axes)
    if down:
        axes.text(-0.02, -0.12, down, ha="right", va="bottom", color=tint("muted"), transform=axes.transData)
    return figure


def _draw_cell(
    axes: Axes,
    x: int,
    y: int,
    value: float | None,
    text: Callable[[float], str],
    colour: Callable[[float], str],
    note: float | None,
) -> None:
    if value is None:
        axes.text(x + 0.5, y + 0.5, "\N{MIDDLE DOT}", ha="center", va="center", color=tint("muted"))
        return
    name = colour(value)
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=tint(name), edgecolor=tint("paper"), linewidth=1))
    ink = tint("paper" if name in ("more-4", "more-5", "more-6", "less-3", "less-4") else "ink")
    axes.text(
        x + 0.5, y + (0.34 if note is not None else 0.5), text(value), ha="center", va="center", size=7, color=ink
    )
    if note is not None:
        axes.text(x + 0.5, y + 0.72, f"({_percent(note)})", ha="center", va="center", size=6, color=ink)


def _signed(value: float, steps: Sequence[float] = COSINES) -> str:
    level = sum(abs(value) >= step for step in steps) if value else 0
    return SIGNED[4 + level if value > 0 else 4 - level]


def _rising(steps: Sequence[float]) -> Callable[[float], str]:
    return lambda value: RISING[sum(value > step for step in steps)]


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value == 0 or abs(value) >= 99.5 else f"{value:#.2g}".rstrip(".")


def _short(value: float) -> str:
    """A cosine in a small cell: four decimals at most, and no zero before them."""
    text = f"{value:.2f}" if abs(value) >= 0.0995 else f"{value:.4f}"
    if float(text) == 0:
        return "0" if value == 0 else "~0"
    return text.replace("0.", ".", 1)


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%" if value >= 0.0995 or value == 0 else f"{100 * value:.1f}%"


# --- cosines over layers ---------------------------------------------------------------------------------------------


def _cosines_of_layers(report: Mapping[str, Any]) -> Plot:
    layers, places = report["layers"], range(len(report["layers"]))
    ranked = sorted(report["pairs"], key=lambda pair: -abs(pair["overall"]["cosine"]["value"] or 0.0))
    figure = Figure(figsize=(WIDTH, 3.1 + 0.16 * min(5, len(ranked))), layout="constrained")
    figure.suptitle(
        "Size of the cosine, layer by layer", x=0.016, ha="left", size=9.5, weight="bold", color=tint("ink")
    )
    axes = figure.add_subplot()
    known = [
        value
        for pair in ranked
        for layer in pair["layers"].values()
        for value in (layer["cosine"][name] for name in ("value", "std", "cap", "bound"))
        if value
    ]
    stds = [std for pair in ranked for layer in pair["layers"].values() if (std := layer["cosine"]["std"])]
    lowest = max(min(map(abs, known), default=0.1) / 1.5, min(stds, default=0.01) / 30)

    def over_layers(pair: Mapping[str, Any], name: str) -> list[float]:
        return [_size(pair["layers"].get(layer), name, lowest) for layer in layers]

    def largest(name: str) -> list[float]:
        return [max(values) for values in zip(*(over_layers(pair, name) for pair in ranked), strict=True)]

    every = -(-len(layers) // 12)  # layers from one label, and from one marker, to the next
    for pair in ranked[4:]:
        axes.plot(places, over_layers(pair, "value"), color=tint("muted"), linewidth=0.4)
    for number, pair in enumerate(ranked[:4]):
        axes.plot(
            places,
            over_layers(pair, "value"),
            color=tint(f"line-{number + 1}"),
            linestyle=("-", "--", "-.", ":")[number],
            marker="os^D"[number],
            markersize=4,
            markevery=(number * every // 4, every),
            linewidth=1.3,
            label=", ".join(shown(name, 18) for name in pair["adapters"]),
        )
    axes.fill_between(
        places, lowest, largest("std"), color=tint("band"), zorder=0, label="up to one std, independent B"
    )
    axes.plot(
        places, largest("cap"), color=tint("muted"), linestyle="--", linewidth=1, label="1/sqrt(d_in), cap of std"
    )
    axes.plot(places, largest("bound"), color=tint("ink"), linewidth=1.6, label="bound for any B: principal angles")
    axes.set_yscale("log")
    axes.set_ylim(lowest, 1.3)
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, position: "")
    axes.set_xticks(list(places)[::every], short_layers(layers)[::every])
    axes.set_xlabel("layer", color=tint("muted"))
    axes.grid(axis="y", color=tint("grid"), linewidth=0.6)
    axes.set_axisbelow(True)
    plain(axes)
    figure.legend(loc="outside lower left", frameon=False, labelcolor=tint("ink"), fontsize=7)
    more = f" The {len(ranked) - 4} pairs of the smallest overall cosine are grey." if len(ranked) > 4 else ""
    return Plot(
        name="layers",
        alternative="Lines over the layers: the size of the cosine of pairs of updates, with its standard deviation, "
        "the cap of that and the bound. The table of cosines by layer has its numbers.",
        caption="A logarithmic axis; what is zero, or very small, lies at its lower edge. Std, cap and bound are "
        f"the largest of all pairs.{more}",
        figure=figure,
    )


def _size(layer: Mapping[str, Any] | None, name: str, lowest: float) -> float:
    """The plotted size; a missing one, or one too small for the axis, is drawn at the axis's lower edge."""
    return max(lowest, abs((layer["cosine"][name] if layer else None) or 0.0))


# --- of all ----------------------------------------------------------------------------------------------------------


def short_layers(layers: Sequence[str]) -> list[str]:
    """Layers without the path that they have in common."""
    parts = [layer.rpartition(".") for layer in layers]
    is_one = len({start for start, _, _ in parts if start}) == 1
    return [(end if is_one else layer) or "other" for layer, (_, _, end) in zip(layers, parts, strict=True)]


def plain(axes: Axes) -> None:
    axes.tick_params(which="both", colors=tint("muted"), labelcolor=tint("ink"), length=0)
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_visible(False)


def tint(name: str) -> str:
    """A colour of the palette as it is drawn: on white. A page replaces it."""
    return PALETTE[name][0]


def _names(report: Mapping[str, Any]) -> list[str]:
    return [adapter["name"] for adapter in report["adapters"]]


def _both_ways(report: Mapping[str, Any]) -> dict[tuple[str, str], tuple[Mapping[str, Any], int]]:
    """(s, t) and (t, s) -> the pair's figures over all modules, and which of its two comes first."""
    found = {}
    for pair in report["pairs"]:
        first, second = pair["adapters"]
        found[first, second] = (pair["overall"], 0)
        found[second, first] = (pair["overall"], 1)
    return found


def _over(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def shown(name: str, length: int) -> str:
    """A name as the font can draw it, its middle left out if it is long."""
    font = get_font(findfont("DejaVu Sans"))
    name = "".join(letter if letter.isprintable() and font.get_char_index(ord(letter)) else "?" for letter in name)
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
