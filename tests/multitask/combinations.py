"""Which options of training combine with which way of training tasks, as the table of lori_dist/multitask/README.md.

`python -m tests.multitask.combinations` writes it: what is refused is what the checks of a configuration refuse.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from lori_dist import config, plugin
from lori_dist.errors import ConfigError
from lori_dist.multitask import __file__ as package

README = Path(package).parent / "README.md"
BEGIN, END = "<!-- combinations: python -m tests.multitask.combinations -->", "<!-- end of combinations -->"

SPIKES = {"spike": 1.001, "lr": 1e-4, "epochs": None, "steps": 14, "batch_size": 2, "checkpoint_every": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "train.validate_every": {"train": {"validate_every": 1, "early_stop": None}},
    "train.early_stop": {"train": {"validate_every": 1, "early_stop": 1, "lr": 0.3}},
    "train.on_divergence: skip": {"train": {**SPIKES, "on_divergence": "skip"}},
    "train.on_divergence: rollback": {"train": {**SPIKES, "on_divergence": "rollback"}},
    "train.pack": {"train": {"pack": True, "micro_batch_size": 3}},
    "train.compile": {"train": {"compile": True}},
    "train.activation_checkpointing": {"train": {"activation_checkpointing": True}},
    "train.deterministic": {"train": {"deterministic": True}},
    "adapter.projection: recomputed": {"adapter": {"projection": "recomputed"}},
    "adapter.projection: trained": {"adapter": {"projection": "trained"}},
    "adapter.share_projection": {"adapter": {"share_projection": True}},
    "adapter.modules_to_save": {"adapter": {"modules_to_save": ["lm_head", "norm"]}},
    "adapter.dtype: bfloat16": {"adapter": {"dtype": "bfloat16"}},
    "tasks.NAME.lr, steps, epochs": {"task": {"lr": 5e-3}},
    "tasks.NAME.seed": {"task": {"seed": 5}},
    "tasks.NAME.start": {"task": {"start": "ADAPTER"}},
    "tasks.NAME.mixture": {"task": {"mixture": {"ROWS": 0.3}}},
    "a mixture of experts": {"model": "mixtral"},
    "output: a URL": {"output": "memory://bucket/runs"},
}
"""Key -> what is changed: sections of the run, keys of one task, the kind of model, or the output."""
WAYS: dict[str, dict[str, Any]] = {
    "each by itself": {},
    "over one base": {"cluster": {"packing": "auto"}},
    "joint": {"multitask": "joint"},
    "sequential": {"multitask": "sequential", "adapter": {"share_projection": True}},
}


def changed(tree: dict[str, Any], option: str, *, task: str, rows: str = "", start: str = "") -> dict[str, Any]:
    """A run with an option. rows, start: files of the task's mixture, and of the adapter that it starts from."""
    change, made = OPTIONS[option], json.loads(json.dumps(tree))
    for section in ("train", "adapter"):
        made[section] = {**made.get(section, {}), **change.get(section, {})}
    own = {"start": start} if "start" in change.get("task", {}) else dict(change.get("task", {}))
    if "mixture" in own:
        own["mixture"] = {rows: own["mixture"]["ROWS"]}
    made["tasks"][task] |= own
    if "output" in change:
        made["output"] = change["output"]
    return made


def refused(tree: dict[str, Any]) -> str | None:
    """Why a run cannot be; None if it can."""
    try:
        run = config.validate(tree)
        method = plugin.find("multitask", run.multitask.name, "plan", "multitask")
        method.load()(run, **method.bind(run.multitask.options, "multitask"))
    except ConfigError as error:
        return str(error).splitlines()[0]
    return None


def table() -> str:
    """The table and, below it, the reasons."""
    with tempfile.TemporaryDirectory() as place:
        rows, start, model = (Path(place) / name for name in ("rows.jsonl", "start", "model"))
        rows.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
        start.mkdir()
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
        other = Path(place) / "other.jsonl"
        other.write_text(rows.read_text())
        task = {"train": str(rows), "test": str(rows), "validation": str(rows)}
        tree = {
            "name": "run",
            "model": {"path": str(model)},
            "tasks": {"a": task, "b": task},
            "train": {"epochs": 1, "batch_size": 2},
        }
        lines = [f"| | {' | '.join(WAYS)} |", f"| --- |{' :---: |' * len(WAYS)}"]
        reasons: list[str] = []
        for option in OPTIONS:
            cells = []
            for way in WAYS.values():
                base = {**tree, **{key: value for key, value in way.items() if key != "adapter"}}
                base["adapter"] = way.get("adapter", {})
                problem = refused(changed(base, option, task="a", rows=str(other), start=str(start)))
                if problem is not None and problem not in reasons:
                    reasons.append(problem)
                cells.append("yes" if problem is None else f"no ({reasons.index(problem) + 1})")
            name = option if option.startswith("a ") else f"`{option}`"
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1))])


def written() -> str:
    """The README with the table."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(written(), encoding="utf-8")
