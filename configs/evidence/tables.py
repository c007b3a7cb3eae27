"""Writes the tables of README.md in this folder from the files in results/, each of which is the summary of one run.

    python configs/evidence/tables.py                           writes them
    python configs/evidence/tables.py --check                   exits with 1 if README.md is not what it would write
    python configs/evidence/tables.py --collect evidence/runs --command "lori compare ... train.steps=30"
                                                                takes what the runs there have finished, then writes

A table stands between `<!-- tables: NAME -->` and `<!-- end of tables -->`, NAME.yaml being the comparison. `--collect`
also takes what `lori evaluate configs/evidence/tasks.yaml --out evidence/runs/base.json` wrote.
"""

import argparse
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lori_dist.cluster import comparison
from lori_dist.scores import wilson

HERE = Path(__file__).resolve().parent
PAGE, RESULTS = HERE / "README.md", HERE / "results"
COMPARISONS = ("first", "single", "merging", "control", "joint", "continual", "safety", "related", "speed")
BASES = {"base": "tasks", "candidates": "candidates"}
"""Results of `lori evaluate` on the base alone -> the configuration."""
TRAINER = "trainer"
"""Start of the results of trainer.py."""
PLACE = re.compile(r"(<!-- tables: (\w+) -->\n).*?(<!-- end of tables -->)", re.DOTALL)

Summary = dict[str, Any]


# --- the files in results/ -------------------------------------------------------------------------------------------


def collect(runs: Path, command: str, results: Path = RESULTS) -> list[Path]:
    """Writes a file for each finished run of a comparison in a folder of runs, and for the base alone. command: that
    which made those runs. Returns the files."""
    written = []
    for path in sorted(runs.glob("*/summary.json")):
        name = path.parent.name
        if any(name.startswith(f"{one}-") for one in COMPARISONS):
            summary = json.loads(path.read_text())
            if all(job["state"] == "finished" for job in summary["jobs"].values()):
                tree = {"command": command, **shortened(summary)}
                for task, made in tree["adapters"].items():
                    made["memory"] = _most_memory(path.parent / f"train-{task}" / "metrics.jsonl")
                written.append(_write(results / f"{name}.json", tree))
    for path in sorted(runs.glob(f"{TRAINER}-*.json")):
        written.append(_write(results / path.name, {"command": command, **json.loads(path.read_text())}))
    for name, configuration in BASES.items():
        if (runs / f"{name}.json").exists():
            of_name = f"lori evaluate configs/evidence/{configuration}.yaml"
            tree = {"command": of_name, **of_base(runs / f"{name}.json")}
            written.append(_write(results / f"{name}.json", tree))
    return written


ADAPTER = ("kept", "total", "trained", "bytes", "steps", "step_seconds", "seconds")
PAIR = ("tasks", "cosine", "share")
MERGE = ("kept", "total", "bytes", "weights", "score", "evaluations")


def shortened(summary: Summary) -> Summary:
    """What tables are made of, without paths, jobs and what layers have each."""

    def some(made: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
        return {key: made[key] for key in keys if key in made}

    adapters = {name: some(made, ADAPTER) for name, made in summary["adapters"].items()}
    for name, made in summary["adapters"].items():
        if "conflicts" in made:
            adapters[name]["conflicts"] = [some(pair, PAIR) for pair in made["conflicts"]["pairs"]]
    return {
        "run": summary["run"],
        "test_rows": summary.get("test_rows", {}),
        "adapters": adapters,
        "merges": {name: some(made, MERGE) for name, made in summary["merges"].items()},
        "evaluation": summary["evaluation"],
        "intervals": summary["intervals"],
        **({"transfer": summary["transfer"]} if "transfer" in summary else {}),
    }


def _most_memory(metrics: Path) -> int | None:
    """Bytes that rank 0 of a training had at most."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((record["memory"] for record in map(json.loads, lines) if "memory" in record), default=None)


def of_base(path: Path) -> Summary:
    """The base's figures, and of each task the share of its most frequent answer and the number of different ones."""
    evaluation = json.loads(path.read_text())
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for line in path.with_suffix(".predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        answers[row["task"]][row["answer"]] += 1
    return {
        "run": path.stem,
        "evaluation": evaluation,
        "test_rows": {task: counts.total() for task, counts in answers.items()},
        "answers": {task: len(counts) for task, counts in answers.items()},
        "majority": {task: counts.most_common(1)[0][1] / counts.total() for task, counts in answers.items()},
    }


def _write(path: Path, tree: Summary) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n")
    return path


def load(results: Path = RESULTS) -> dict[str, Summary]:
    """Run -> what is in its file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}


# --- tables ----------------------------------------------------------------------------------------------------------

NOT_RUN = "Not run yet."


def page(text: str, found: Mapping[str, Summary]) -> str:
    """The page with its tables made of these results. text: the page with whatever tables."""
    return PLACE.sub(lambda place: place[1] + tables_of(place[2], found) + "\n" + place[3], text)


def tables_of(name: str, found: Mapping[str, Summary]) -> str:
    if name == "base":
        return _of_base([found[one] for one in BASES if one in found]) or NOT_RUN
    described = comparison.load(HERE / f"{name}.yaml")
    own = {run: summary for run, summary in found.items() if run.startswith(f"{name}-")}
    if not own:
        return NOT_RUN
    result = comparison.result(described, own)
    parts = [
        *_scores(result),
        *_tuned(result),
        *_retention(own),
        *_recovered(result),
        *_transfer(own),
        *_conflicts(own),
    ]
    if name == "speed":
        parts += [*_times(own, found)]
    commands = dict.fromkeys(summary["command"] for summary in own.values())
    missing = [run for run in comparison.planned(described) if run not in own]
    parts.append(_made_by(f"`{command}`" for command in commands))
    if missing:
        parts.append(f"Runs that are still missing: {', '.join(f'`{run}`' for run in missing)}.")
    return "\n\n".join(parts)


def _of_base(bases: Sequence[Summary]) -> str:
    rows = [
        (
            task,
            str(base["test_rows"][task]),
            _percent(1 / base["answers"][task]),
            _percent(base["majority"][task]),
            _with_interval(values["choice"], base["test_rows"][task]),
        )
        for base in bases
        for task, values in base["evaluation"]["base"].items()
    ]
    commands = [f"`{base['command']}`" for base in bases]
    titles = ("task", "test rows", "chance", "most frequent answer", "base")
    return f"{_table(titles, rows)}\n\n{_made_by(commands)}" if rows else ""


def _made_by(commands: Iterable[str]) -> str:
    return f"Made by {', '.join(commands)}."


def _scores(result: Mapping[str, Any]) -> Iterator[str]:
    if not result["rows"]:
        return
    rows = []
    for name, row in result["rows"].items():
        cells = [_cell(row, task) for task in result["tasks"]]
        costs = [
            "-" if row[key] is None else written.format(row[key])
            for key, written in (("trained", "{:,.0f}"), ("bytes", "{:,.0f}"), ("step_seconds", "{:.2f}"))
        ]
        rows.append((name, *cells, *costs, str(len(row["scores"]))))
    numbers = [f"{task} ({number} rows)" for task, number in result["test_rows"].items()]
    spread = "mean over the seeds, ± standard deviation, [95% interval]"
    yield f"{result['metric']} in percent, {spread}: {', '.join(numbers)}."
    yield _table(("", *result["tasks"], "trained entries", "file bytes", "s/step", "seeds"), rows)


def _cell(row: Mapping[str, Any], task: str) -> str:
    if task not in row["mean"]:
        return "-"
    spread = f" ± {100 * row['std'][task]:.1f}" if len(row["scores"]) > 1 else ""
    limits = row["interval"].get(task)
    return f"{100 * row['mean'][task]:.1f}{spread}" + ("" if limits is None else _limits(limits))


def _tuned(result: Mapping[str, Any]) -> Iterator[str]:
    if result["tuned"]:
        rows = [
            (
                name,
                ", ".join(f"`{one}`" for one in found["settings"]),
                ", ".join(_percent(one) for one in found["scores"]),
            )
            for name, found in result["tuned"].items()
        ]
        yield "Chosen on validation rows, with the mean over the tasks of each list of the grid:"
        yield _table(("variant", "chosen", "tried"), rows)


def _retention(found: Mapping[str, Summary]) -> Iterator[str]:
    """What merges of some of the tasks keep of each task's own adapter: METHOD-TASK-TASK."""
    kept: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(dict)
    for run, summary in found.items():
        evaluation = summary["evaluation"]
        for merge in summary["merges"]:
            method, dash, _ = merge.partition("-")
            if dash:
                own = evaluation[merge]
                shares = [
                    own[task][metric] / evaluation[task][task][metric]
                    for task in own
                    for metric in own[task]
                    if evaluation[task][task][metric] > 0
                ]
                kept[run.partition("-")[2].rpartition("-")[0], method][merge] = shares
    rows = []
    for (variant, method), of_merges in kept.items():
        shares = [share for one in of_merges.values() for share in one]
        worst = min(statistics.fmean(one) for one in of_merges.values())
        rows.append(
            (variant, method, str(len(of_merges)), *map(_percent, (statistics.fmean(shares), worst, min(shares))))
        )
    if rows:
        yield "What merges of subsets keep of the accuracy of each task's own adapter, in percent of it:"
        yield _table(("adapters", "merge", "subsets", "mean", "worst subset", "worst task of a subset"), rows)


def _recovered(result: Mapping[str, Any]) -> Iterator[str]:
    """The share of the gap between joint and single training that a balance makes up for, on the mean of the tasks."""
    rows = result["rows"]
    single, joint = "LoRA, each task by itself", "LoRA, joint"
    if single in rows and joint in rows:
        top, low = rows[single]["mean"]["mean"], rows[joint]["mean"]["mean"]
        lines = [
            (name, f"{100 * (row['mean']['mean'] - low):+.1f}", _percent((row["mean"]["mean"] - low) / (top - low)))
            for name, row in rows.items()
            if name.startswith(f"{joint},")
        ]
        if top > low:
            gap = f"The gap between `{single}` and `{joint}` is {100 * (top - low):.1f} points."
            yield f"{gap} Of it, a balance recovers:"
            yield _table(("", "points", "share of the gap, %"), lines)
        else:
            points = f"{100 * (top - low):+.1f} points"
            yield f"`{joint}` is not worse than `{single}`: nothing is left to recover ({points})."


def _transfer(found: Mapping[str, Summary]) -> Iterator[str]:
    rows = []
    for run, summary in found.items():
        for metric, of in summary.get("transfer", {}).items():
            values = [of["average"], of["backward"], of["forward"], of["forgetting"]]
            rows.append((f"`{run}`", metric, *(f"{100 * value:.1f}" for value in values)))
    if rows:
        yield "After the last task, in points:"
        yield _table(("run", "metric", "average", "backward transfer", "forward transfer", "forgetting"), rows)


def _conflicts(found: Mapping[str, Summary]) -> Iterator[str]:
    rows = []
    for run, summary in found.items():
        for pair in summary["adapters"].get("joint", {}).get("conflicts", []):
            rows.append((f"`{run}`", " and ".join(pair["tasks"]), f"{pair['cosine']:.3f}", _percent(pair["share"])))
    if rows:
        yield "Gradients of two tasks: mean cosine, and share of places and steps where they oppose each other:"
        yield _table(("run", "tasks", "cosine", "conflicts, %"), rows)


def _times(own: Mapping[str, Summary], found: Mapping[str, Summary]) -> Iterator[str]:
    rows = []
    for run, summary in own.items():
        made = summary["adapters"].values()
        seconds, memory = [one["step_seconds"] for one in made], [one["memory"] for one in made]
        if None not in seconds and None not in memory:
            rows.append((f"`{run}`", f"{statistics.fmean(seconds):.2f}", f"{max(memory) / 2**20:,.0f}"))
    for run, one in found.items():
        if run.startswith(f"{TRAINER}-"):
            name = f"{one['method']}, transformers.Trainer, {one['ranks']} ranks"
            rows.append((name, f"{one['step_seconds']:.2f}", f"{one['memory'] / 2**20:,.0f}"))
    if rows:
        yield "Median seconds of a step, mean over the tasks, and the most memory of rank 0 in MiB:"
        yield _table(("", "s/step", "MiB"), rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _limits(limits: Sequence[float]) -> str:
    return f" [{100 * limits[0]:.1f}, {100 * limits[1]:.1f}]"


def _with_interval(share: float, rows: int) -> str:
    return _percent(share) + _limits(wilson(share, rows))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python configs/evidence/tables.py")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and exit with 1 where the page is out of date"
    )
    parser.add_argument("--collect", metavar="RUNS", type=Path, help="folder of runs, whose results are taken first")
    parser.add_argument("--command", default="lori compare", help="with --collect: the command that made them")
    given = parser.parse_args(words)
    if given.collect is not None:
        for path in collect(given.collect, given.command):
            print(path)
    text = PAGE.read_text(encoding="utf-8")
    wanted = page(text, load())
    if given.check and wanted != text:
        print(f"{PAGE}: is not what python configs/evidence/tables.py writes", file=sys.stderr)
        return 1
    if wanted != text:
        PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
