"""A report as one HTML page that needs nothing else: no script, no font, no network."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lori_dist.jobs import same_merges_said
from lori_dist.report.plots import Plot, as_html, short_layers, style
from lori_dist.report.timeline import MOST, STATES, Row, span
from lori_dist.scores import Intervals

Rows = Iterable[Sequence[Any]]

MOST_LETTERS = 400
"""Letters of a prompt or a response that are shown."""

_CSS = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
p,dl,ul{max-width:44rem}dt{font-weight:600}dd{margin:0 0 .6rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.5rem}
figure{margin:0;min-width:0}figcaption,.note{color:var(--muted);font-size:.875rem}
.box{overflow-x:auto}.tall{max-height:48rem;overflow-y:auto}
.box:focus-visible{outline:2px solid var(--line-1)}
svg{display:block;width:100%;height:auto}
caption{text-align:left;color:var(--muted);padding:.75rem 0 .25rem}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
td:first-child,th:first-child,.words{text-align:left}th{font-weight:600}
thead th{vertical-align:bottom;color:var(--muted)}tbody th{max-width:16rem;overflow:hidden;text-overflow:ellipsis}
.texts td{text-align:left;white-space:pre-wrap;vertical-align:top}
details{margin:.75rem 0}summary{cursor:pointer;color:var(--line-1)}
"""


def page(
    report: Mapping[str, Any], plots: Sequence[Plot], jobs: Sequence[Row] = (), over_time: Plot | None = None
) -> str:
    """The page. Everything that comes from files is escaped. over_time: the timeline of the jobs."""
    count = len(report["adapters"])
    title = (
        "A run without adapters" if not count else "One adapter" if count == 1 else f"Interference of {count} adapters"
    )
    parts = [
        f"<h1>{as_html(title)}</h1>",
        *_summary(report),
        *(_section("Plots", [f'<div class="plots">{"".join(map(_figure, plots))}</div>']) if plots else ()),
        *(_section("Jobs", [_figure(over_time), *_jobs(jobs)]) if over_time else ()),
        *(_section("Pairs of adapters", _pairs(report)) if report["pairs"] else ()),
        *(_section("Drop of each task under each merge", _drops(report)) if report.get("drops") else ()),
        *(_section("Rows that merging lost", _examples(report["examples"])) if report.get("examples") else ()),
        *(_section("One task after another", _transfers(report["transfer"])) if report.get("transfer") else ()),
        *(_section("Conflicts in training", _conflicts(report["conflicts"])) if report.get("conflicts") else ()),
        *(_section("Adapters and norms", _adapters(report)) if count else ()),
        *(_section("How to read it", [_meanings()]) if report["pairs"] else ()),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{as_html(title)}</title>\n'
        f"<style>\n{style()}{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, parts: Iterable[str]) -> Iterator[str]:
    yield f"<section>\n<h2>{as_html(title)}</h2>"
    yield from parts
    yield "</section>"


def _figure(plot: Plot) -> str:
    return (
        f'<figure id="{plot.name}"><div class="box tall" tabindex="0">{plot.svg()}</div>'
        f"<figcaption>{as_html(plot.caption)}</figcaption></figure>"
    )


# --- what is said in words -------------------------------------------------------------------------------------------


def _summary(report: Mapping[str, Any]) -> Iterator[str]:
    names = ", ".join(adapter["name"] for adapter in report["adapters"])
    yield f'<p class="note">{as_html(names)}</p>'
    conflicts = report.get("conflicts", {})
    lines = [*_of_cosines(report["pairs"]), *_of_drops(report.get("drops", {})), *_of_conflicts(conflicts)]
    lines += [*_of_transfer(report.get("transfer", {})), *same_merges_said(report.get("same_merges", ()))]
    if len(report["adapters"]) == 1:
        lines.append("There is one adapter only, and nothing to compare it with.")
    yield f"<ul>{''.join(f'<li>{as_html(line)}</li>' for line in lines)}</ul>"


def _of_cosines(pairs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    known = [pair for pair in pairs if pair["overall"]["cosine"]["value"] is not None]
    if known:
        pair = max(known, key=lambda pair: abs(pair["overall"]["cosine"]["value"]))
        cosine = pair["overall"]["cosine"]
        std = "" if cosine["std"] is None else f"{_number(cosine['std'])} is one standard deviation for independent B, "
        yield (
            f"The largest cosine of two updates is {_number(cosine['value'])}, of {' and '.join(pair['adapters'])}; "
            f"{std}{_number(cosine['bound'])} the most it could be with these A."
        )


def _of_drops(drops: Mapping[str, Any]) -> Iterator[str]:
    for metric, found in drops.items():
        kept = {name: merge["kept"] for name, merge in found["merges"].items() if merge["kept"] is not None}
        if kept:
            best = max(kept, key=lambda name: kept[name])
            yield f"By {metric}, {best} keeps most: {_percent(kept[best])} of what the tasks' own adapters reach."


def _of_conflicts(conflicts: Mapping[str, Any]) -> Iterator[str]:
    for name, found in conflicts.items():
        worst = max(found["pairs"], key=lambda pair: pair["share"])
        yield (
            f"In the training of {name}, the gradients of {' and '.join(worst['tasks'])} conflicted most often: "
            "on average "
            f"in {_percent(worst['share'])} of the layers compared. Projection removed {_percent(found['removed'])} of "
            "the sum of all gradients."
        )


def _of_transfer(transfer: Mapping[str, Any]) -> Iterator[str]:
    for metric, found in transfer.items():
        yield (
            f"By {metric}, earlier tasks forgot {_number(found['forgetting'])} of their best on average, and tasks "
            f"not yet trained had already gained {_number(found['forward'])} over the base."
        )


def _meanings() -> str:
    return f"<dl>{''.join(f'<dt>{as_html(term)}</dt><dd>{as_html(meaning)}</dd>' for term, meaning in MEANINGS)}</dl>"


MEANINGS = (
    (
        "Cosine",
        "Inner product of two updates D = B A (B with its scale), divided by their norms. At 0 a merge keeps the "
        "component along each of them. It does not depend on inputs, so it does not replace the measured drop.",
    ),
    (
        "Expected and std",
        "Mean and standard deviation of the cosine over random A, for B that do not depend on A: 0 and "
        "|Bs^T Bt| / (sqrt(d_in) |Bs| |Bt|) where each task has its own A, the cosine of Bs and Bt on a shared A. "
        "Trained B do depend on A: related tasks keep about r / d_in of their gradients' cosine, often several std.",
    ),
    ("Cap", "The most that the std can be, 1 / sqrt(d_in)."),
    (
        "Bound",
        "The most that the cosine can be, whatever B is: the largest cosine of the principal angles between the rows "
        "of the two A. Over modules, weighted with the norms. 1 on a shared A.",
    ),
    (
        "Overlap, Jaccard, random",
        "Kept entries of B at the same row and column: as a share of the first adapter's, of the second's, "
        "and of those of either; random: the share of the first's for independent masks of the same sizes. Where A is "
        "not shared, equal columns stand for different directions.",
    ),
    (
        "Sign conflicts",
        "Share of opposite signs among the entries that are nonzero in both: of B where A is shared, else of the "
        "updates. It is about 50% for unrelated tasks.",
    ),
    (
        "Energy",
        "Share of the squared norm of the first update that lies in the row space (input) or column space (output) "
        "of the second, and the other way round. The square of the cosine is never above it.",
    ),
    (
        "Forgetting, transfer",
        "Forgetting: the best score of a task after its training, less that after the last task's. Backward: the last "
        "score less that right after its training. Forward: the score before its training less that of the base.",
    ),
    ("Drop", "Score of the task's own adapter less that of the merge; kept: mean of merged / own over the tasks."),
)


# --- tables ----------------------------------------------------------------------------------------------------------


COSINE_TITLES = ("cosine", "expected", "std", "cap", "bound")
OTHER_TITLES = ("overlap", "random", "Jaccard", "sign conflicts", "on", "energy, input", "energy, output")


def _pairs(report: Mapping[str, Any]) -> Iterator[str]:
    named = [(" and ".join(pair["adapters"]), pair) for pair in report["pairs"]]
    cosines = [(name, *_cosine(pair["overall"]["cosine"])) for name, pair in named]
    yield _table("Cosine of the updates, over all modules", ("pair", *COSINE_TITLES), cosines)
    rows = [(name, *_others(pair["overall"])) for name, pair in named]
    yield _table("What else they share, over all modules", ("pair", *OTHER_TITLES), rows)
    layers = report["layers"]
    of_layers = [
        (short, name, *_cosine(pair["layers"][layer]["cosine"]))
        for name, pair in named
        for layer, short in zip(layers, short_layers(layers), strict=True)
        if layer in pair["layers"]
    ]
    table = _table("Cosine of the updates, by layer", ("layer", "pair", *COSINE_TITLES), of_layers)
    yield f"<details><summary>Cosines by layer</summary>{table}</details>"


def _others(figures: Mapping[str, Any]) -> tuple[str, ...]:
    support, signs, energy = figures["support"], figures["signs"], figures["energy"]
    return (
        " / ".join(map(_percent, support["share"])),
        _percent(support["expected"] / support["kept"][0] if support["kept"][0] else None),
        _percent(support["jaccard"]),
        _percent(signs["share"]),
        signs["on"] or "-",
        " / ".join(map(_percent, energy["input"])),
        " / ".join(map(_percent, energy["output"])),
    )


def _cosine(cosine: Mapping[str, float | None]) -> tuple[str, ...]:
    return tuple(_number(cosine[name]) for name in ("value", "expected", "std", "cap", "bound"))


def _drops(report: Mapping[str, Any]) -> Iterator[str]:
    intervals: Intervals = report.get("intervals", {})
    for metric, found in report["drops"].items():
        tasks = list(found["single"])
        limits = {model: {task: _limits(intervals, model, task, metric) for task in tasks} for model in intervals}
        single = (f"{_number(found['single'][task])}{limits.get(task, {}).get(task, '')}" for task in tasks)
        rows = [
            ("each task's own adapter", *single, "", ""),
            *(_merge(name, merge, tasks, limits.get(name, {})) for name, merge in found["merges"].items()),
        ]
        better = "lower is better" if found["lower_is_better"] else "higher is better"
        known = any(text for of_model in limits.values() for text in of_model.values())
        title = f"{metric}, {better}: score{', 95% interval' if known else ''}, and drop"
        yield _table(title, ("merge", *tasks, "mean drop", "kept"), rows)


def _merge(name: str, merge: Mapping[str, Any], tasks: Sequence[str], limits: Mapping[str, str]) -> tuple[str, ...]:
    score, drop = merge["score"], merge["drop"]
    cells = (
        f"{_number(score[task])}{limits.get(task, '')} ({_number(drop[task], sign=True)})" if task in score else "-"
        for task in tasks
    )
    return (name, *cells, _number(sum(drop.values()) / len(drop), sign=True), _percent(merge["kept"]))


def _examples(examples: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for one in examples:
        caption = (
            f"{one['task']}, {one['metric']}: {one['right']} is right and {one['wrong']} wrong on "
            f"{one['only_right']} of {one['rows']} rows, the other way round on {one['only_wrong']}"
        )
        rows = [
            (str(row["row"]), *(_cut(row[key]) for key in ("prompt", "answer", "right", "wrong")))
            for row in one["examples"]
        ]
        yield _table(caption, ("row", "prompt", "answer", one["right"], one["wrong"]), rows, has_words=True)


def _cut(text: Any) -> str:
    shown = "-" if text is None else str(text)
    return shown if len(shown) <= MOST_LETTERS else f"{shown[:MOST_LETTERS]} ..."


def _limits(intervals: Intervals, model: str, task: str, metric: str) -> str:
    found = intervals.get(model, {}).get(task, {}).get(metric)
    return "" if found is None else f" [{_number(found[0])}, {_number(found[1])}]"


def _conflicts(conflicts: Mapping[str, Any]) -> Iterator[str]:
    for name, found in conflicts.items():
        rows = [
            (
                " and ".join(pair["tasks"]),
                _number(pair["cosine"], sign=True),
                _percent(pair["share"]),
                _number(min(pair["layers"]["depth"])),
            )
            for pair in found["pairs"]
        ]
        caption = f"Gradients of two tasks of {name}, before the projection: means over {found['steps']} steps"
        titles = ("pair", "cosine, over everything", "layers in conflict", "deepest, of a layer")
        yield _table(caption, titles, rows)


def _transfers(transfer: Mapping[str, Any]) -> Iterator[str]:
    for metric, found in transfer.items():
        tasks = list(found["scores"]["base"])
        rows = [
            ("base" if model == "base" else f"after {model}", *(_number(scores[task]) for task in tasks))
            for model, scores in found["scores"].items()
        ]
        better = "lower" if found["lower_is_better"] else "higher"
        yield _table(f"{metric} on each task, {better} is better", ("model", *tasks), rows)
    titles = ("metric", "average", "forgetting", "backward transfer", "forward transfer")
    figures = [
        (
            metric,
            _number(found["average"]),
            *(_number(found[key], sign=True) for key in ("forgetting", "backward", "forward")),
        )
        for metric, found in transfer.items()
    ]
    yield _table("Over all tasks, after the last; transfer above zero is better", titles, figures)


def _adapters(report: Mapping[str, Any]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [
        (
            adapter["name"],
            _number(adapter["norm"]),
            str(adapter["rank"]),
            str(len(adapter["blocks"])),
            f"{adapter['kept']:,}",
            _percent(adapter["kept"] / max(1, adapter["total"])),
        )
        for adapter in report["adapters"]
    ]
    yield _table("Adapters", ("adapter", "norm", "rank", "blocks", "kept entries of B", "density"), rows)
    for adapter in report["adapters"]:
        norms = report["norms"][adapter["name"]]
        rows = [
            (layer, *map(_number, row), _number(norms["layers"][path]))
            for layer, path, row in zip(short_layers(report["layers"]), report["layers"], norms["table"], strict=True)
        ]
        rows.append(("all", *map(_number, norms["projections"].values()), _number(adapter["norm"])))
        table = _table(f"Norm of {adapter['name']}", ("layer", *report["projections"], "all"), rows)
        yield f"<details><summary>Norms of {as_html(adapter['name'])}</summary>{table}</details>"


def _jobs(jobs: Sequence[Row]) -> Iterator[str]:
    """Yields the failed attempts, each with its end, and a table of all jobs."""
    failed = [(row.name, number, one) for row in jobs for number, one in enumerate(row.attempts, 1) if one.error]
    if failed:
        lines = (
            f"{name}, attempt {number}, after {span(one.end - one.start)}: {one.error}"
            for name, number, one in failed[:MOST]
        )
        yield f"<ul>{''.join(f'<li>{as_html(line)}</li>' for line in lines)}</ul>"
    first = min(one.start for row in jobs for one in row.attempts)
    cells = [
        (
            row.name,
            STATES.get(row.state, row.state),
            *((span(row.attempts[0].start - first), span(row.seconds)) if row.attempts else ("-", "-")),
            str(len(row.attempts)),
        )
        for row in jobs
    ]
    table = _table("Jobs, as they began", ("job", "state", "began after", "at work", "attempts"), cells)
    yield f"<details><summary>Times of {len(jobs)} jobs</summary>{table}</details>"


def _table(caption: str, titles: Sequence[str], rows: Rows, *, has_words: bool = False) -> str:
    """Wider than the screen, it scrolls inside of its box, also by keys. has_words: of lines that may break."""
    head = "".join(f'<th scope="col">{as_html(title)}</th>' for title in titles)
    body = "".join(f"<tr>{_row(row)}</tr>\n" for row in rows)
    table = '<table class="texts">' if has_words else "<table>"
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{as_html(caption)}">'
        f"{table}"
        f"<caption>{as_html(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _row(cells: Sequence[str]) -> str:
    first, *others = cells
    return f'<th scope="row" title="{as_html(first)}">{as_html(first)}</th>' + "".join(
        f"<td>{as_html(cell)}</td>" for cell in others
    )


def _number(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    text = "0" if value == 0 else f"{value:.3f}" if 0.0995 <= abs(value) < 1000 else f"{value:#.2g}".rstrip(".")
    return f"+{text}" if sign and value > 0 else text


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
