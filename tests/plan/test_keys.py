"""Every key of the configuration reaches the plan, or is known to change neither memory nor traffic nor time."""

import json
import shutil
import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from lori_dist import config, jobs, plugin
from lori_dist.config import check
from lori_dist.gpus import DEVICES
from lori_dist.plan import Hardware, plan

ROOT = Path(__file__).parents[2]
DATA = ROOT / "configs/quickstart/data"

KEPT_SAME = "the same entries in the same places of the same tensors"
ONLY_LOST = "only what happens when nodes or ranks are lost"

MATTERS: dict[str, list[str]] = {
    "model.path": ["model.path={small}"],
    "model.dtype": ["model.dtype=bfloat16"],
    "model.quantize": ["model.quantize=int8"],
    "model.attention": ["model.attention=eager"],
    "tasks.*.train": ["tasks.one.train={short}"],
    "tasks.*.test": ["tasks.one.test={short}"],
    "tasks.*.validation": ["tasks.one.validation={short}"],
    "tasks.*.mixture": ["tasks.one.mixture={{{short}: 0.5}}"],
    "tasks.*.template.prompt": ["tasks.one.template.prompt='a long story before: {{prompt}}'"],
    "tasks.*.template.response": ["tasks.one.template.response='well, {{response}}'"],
    "tasks.*.template.messages": ["tasks.one.template.messages=messages"],
    "tasks.*.template.layout": ["tasks.one.template.layout=alpaca"],
    "tasks.*.template.tools": ["tasks.one.template.tools=tools"],
    "tasks.*.template.arguments": ["tasks.one.template.arguments={{more: some words more}}"],
    "tasks.*.labels": ["tasks.one.labels=[a, b, c]"],
    "tasks.*.start": ["tasks.one.start={adapter}"],
    "tasks.*.steps": ["tasks.one.steps=5"],
    "tasks.*.epochs": ["tasks.one.epochs=5"],
    "adapter.rank": ["adapter.rank=32"],
    "adapter.targets": ["adapter.targets=q_proj"],
    "adapter.exclude": ["adapter.exclude=[q_proj]"],
    "adapter.density": ["adapter.density=0.2"],
    "adapter.dtype": ["adapter.dtype=bfloat16"],
    "adapter.projection": ["adapter.projection=recomputed"],
    "adapter.form": ["adapter.form=mtl_lora"],
    "adapter.modules_to_save": ["adapter.modules_to_save=[norm]", "merges={{}}"],
    "train.engine": ["train.engine={{name: fsdp, offload: true}}"],
    "train.steps": ["train.epochs=null", "train.steps=3"],
    "train.epochs": ["train.epochs=2"],
    "train.batch_size": ["train.batch_size=16"],
    "train.micro_batch_size": ["train.micro_batch_size=1"],
    "train.micro_batch_tokens": ["train.micro_batch_size=8", "train.micro_batch_tokens=48"],
    "train.max_length": ["train.max_length=64"],
    "train.pack": ["train.pack=true"],
    "train.sequence_parallel": ["train.sequence_parallel=2"],
    "train.activation_checkpointing": ["train.activation_checkpointing=true"],
    "train.mlp_slices": ["train.mlp_slices=4"],
    "train.compile": ["train.compile=true"],
    "train.deterministic": ["train.deterministic=true"],
    "train.validate_every": ["train.validate_every=2"],
    "train.early_stop": ["train.early_stop=2"],
    "train.calibrate.steps": ["train.calibrate.steps=3"],
    "train.calibrate.epochs": ["train.calibrate.epochs=3"],
    "train.checkpoint_every": ["train.checkpoint_every=1"],
    "train.keep": ["train.keep=5"],
    "train.time_limit": ["train.time_limit=1h"],
    "merges.*.tasks": ["merges.all.tasks=[one]", "merges.all.search={{rows: 2}}"],
    "merges.*.search.rows": ["merges.all.search={{rows: 4}}"],
    "merges.*.search.budget": ["merges.all.search={{rows: 2, budget: 4}}"],
    "merges.*.search.metric": ["merges.all.search={{rows: 2, metric: exact_match}}"],
    "evaluate.engine": ["evaluate.engine=fsdp"],
    "evaluate.tasks": ["evaluate.tasks=own"],
    "evaluate.metrics": ["evaluate.metrics=[loss, exact_match]"],
    "evaluate.batch_size": ["evaluate.batch_size=8"],
    "evaluate.rows": ["evaluate.rows=2"],
    "evaluate.max_new_tokens": ["evaluate.metrics=[exact_match]", "evaluate.max_new_tokens=7"],
    "evaluate.lm_eval.tasks": ["evaluate.lm_eval={{tasks: [hellaswag]}}"],
    "evaluate.lm_eval.rows": ["evaluate.lm_eval={{tasks: [hellaswag], rows: 3}}"],
    "evaluate.lm_eval.num_fewshot": ["evaluate.lm_eval={{tasks: [hellaswag], num_fewshot: 3}}"],
    "cluster.workers": ["cluster.workers=2"],
    "cluster.gpus_per_worker": ["cluster.gpus_per_worker=2"],
    "cluster.packing": ["cluster.packing=2"],
    "multitask": ["multitask={{name: joint, projection: none}}", "merges={{}}"],
}
"""Key -> what changes it, and the plan."""

OF_CHATS = [f"tasks.one.{part}={{chats}}" for part in ("train", "test", "validation")]
CHATS = [*OF_CHATS, "tasks.one.template.messages=messages"]
BEFORE: dict[str, list[str]] = {
    **{f"adapter.moments.{key}": ["adapter.init=osrm"] for key in ("rows", "full_up_to", "width")},
    "adapter.form": ["multitask={{name: joint, balance: none}}", "merges={{}}"],
    "train.early_stop": ["train.validate_every=2"],
    "tasks.*.validation": ["train.validate_every=2"],
    "tasks.*.template.layout": OF_CHATS,
    "tasks.*.template.messages": OF_CHATS,
    "tasks.*.template.tools": CHATS,
    "tasks.*.template.arguments": CHATS,
    "merges.*.search.rows": ["merges.all.search={{rows: 2}}"],
    "merges.*.search.budget": ["merges.all.search={{rows: 2}}"],
    "merges.*.search.metric": ["merges.all.search={{rows: 2}}"],
    "merges.*.tasks": ["merges.all.search={{rows: 2}}"],
    "evaluate.max_new_tokens": ["evaluate.metrics=[exact_match]"],
    "evaluate.lm_eval.rows": ["evaluate.lm_eval={{tasks: [hellaswag]}}"],
    "evaluate.lm_eval.num_fewshot": ["evaluate.lm_eval={{tasks: [hellaswag]}}"],
}
"""Key -> what it is compared with, where that is not the run below."""

CANNOT_MATTER: dict[str, tuple[list[str], str]] = {
    "name": (["name=other"], "a folder's name"),
    "output": (["output=elsewhere"], "a folder's place"),
    "model.trust_remote_code": (["model.trust_remote_code=true"], "a model without code of its own is the same"),
    "tasks.*.seed": (["tasks.one.seed=5"], "another A of the same size"),
    "tasks.*.template.date": ([], "for chat templates alone, where a date is a few tokens of a row"),
    "tasks.*.template.train_on": ([], "the same tokens, of which others are learned"),
    "tasks.*.lr": (["tasks.one.lr=0.1"], "a number in the optimizer"),
    "adapter.alpha": (["adapter.alpha=7"], "a factor"),
    "adapter.mask": (["adapter.mask=random"], "as many entries are kept; chosen once, in seconds, on the host"),
    "adapter.seed": (["adapter.seed=5"], "another A of the same size"),
    "adapter.init": (["adapter.init=osrm"], "another A of the same size; what it is made of is a pass over few rows"),
    "adapter.moments.rows": (["adapter.init=osrm", "adapter.moments.rows=5"], "a pass over few rows is not counted"),
    "adapter.moments.full_up_to": (["adapter.init=osrm", "adapter.moments.full_up_to=9"], "as for the rows"),
    "adapter.moments.width": (["adapter.init=osrm", "adapter.moments.width=9"], "as for the rows"),
    "adapter.share_projection": (["adapter.share_projection=true"], "each adapter over a base has its copy of A"),
    "train.lr": (["train.lr=0.1"], "a number in the optimizer"),
    "train.schedule": (["train.schedule=cosine"], "a number in the optimizer"),
    "train.warmup_steps": (["train.warmup_steps=1"], "a number in the optimizer"),
    "train.weight_decay": (["train.weight_decay=0.1"], "a number in the optimizer"),
    "train.betas": (["train.betas=[0.8, 0.9]"], "numbers in the optimizer"),
    "train.eps": (["train.eps=1e-6"], "a number in the optimizer"),
    "train.clip": (["train.clip=null"], "the norm is measured anyway"),
    "train.on_divergence": (["train.on_divergence=skip"], "only what happens when a loss is not finite"),
    "train.spike": (["train.spike=4"], "only what happens when a loss is a spike"),
    "train.calibrate.lr": (["train.calibrate.lr=0.1"], "a number in the optimizer"),
    "train.seed": (["train.seed=5"], "another order of the same rows"),
    "merges.*.method": (["merges.all.method=linear"], "merges are made on the host, a module at a time"),
    "merges.*.weights": (["merges.all.weights=[0.1, 0.2]"], "factors"),
    "merges.*.search.method": (["merges.all.search={{rows: 2, method: coordinate}}"], "the budget limits both"),
    "merges.*.search.per": (["merges.all.search={{rows: 2, per: projection}}"], "the budget limits both"),
    "merges.*.search.bounds": (["merges.all.search={{rows: 2, bounds: [0, 2]}}"], "the budget limits both"),
    "merges.*.search.lr": (["merges.all.search={{rows: 2, method: gradient, lr: 0.1}}"], "the budget limits all"),
    "merges.*.search.seed": (["merges.all.search={{rows: 2, seed: 5}}"], "other weights in the same evaluations"),
    "evaluate.temperature": (["evaluate.temperature=0.5"], "a choice among the same logits"),
    "evaluate.top_p": (["evaluate.temperature=0.5", "evaluate.top_p=0.5"], "a choice among the same logits"),
    "evaluate.seed": (["evaluate.seed=5"], "a choice among the same logits"),
    "evaluate.lm_eval.include": (
        ["evaluate.lm_eval={{tasks: [hellaswag], include: {folder}}}"], "tasks of lm-eval are not counted, by name",
    ),
    "cluster.address": (["cluster.address=auto"], "--gpus and --nodes say what there is"),
    "cluster.bind": (["cluster.bind=0.0.0.0"], "an address"),
    "cluster.min_workers": (["cluster.min_workers=1"], ONLY_LOST),
    "cluster.cpus_per_worker": (["cluster.cpus_per_worker=2"], "rank and data take no more of the devices"),
    "cluster.placement": (["cluster.placement=spread"], "--nodes says where the ranks are"),
    "cluster.max_concurrent": (["cluster.max_concurrent=1"], "a gang takes all devices, so there is one at a time"),
    "cluster.retries": (["cluster.retries=3"], ONLY_LOST),
    "cluster.patience": (["cluster.patience=3"], ONLY_LOST),
    "trackers": (["trackers=[]"], "a few numbers a step"),
}  # fmt: skip
"""Key -> what changes it, and why that changes nothing of a plan."""

WITH_SEARCH = ["merges.all.search={{rows: 2}}"]
WITH_LM_EVAL = ["evaluate.lm_eval={{tasks: [hellaswag]}}"]

CHANGES_RESULT: dict[str, tuple[list[str], list[str]]] = {
    "adapter.projection": ([], ["adapter.projection=trained"]),
    "train.engine": (["train.engine=fsdp"], ["train.engine={{name: fsdp, param_dtype: bfloat16}}"]),
    "tasks.*.template.train_on": (CHATS, [*CHATS, "tasks.one.template.train_on=all"]),
    "tasks.*.template.date": (CHATS, [*CHATS, "tasks.one.template.date=2025-01-01"]),
    "tasks.*.validation": (
        ["train.validate_every=2"], ["train.validate_every=2", "tasks.one.validation={short}"]
    ),
    "merges.*.search.method": (WITH_SEARCH, ["merges.all.search={{rows: 2, method: cma}}"]),
    "evaluate.lm_eval.tasks": ([], WITH_LM_EVAL),
}  # fmt: skip
"""Key -> two values of it with different results, where those above have the same."""


def keys(kind: Any, place: str = "") -> Iterator[str]:
    """Every key of a section and of those in it; `*` for names that users give."""
    for item in fields(kind):
        path = f"{place}{item.name}"
        found = typing.get_type_hints(kind, include_extras=True)[item.name]
        below = list(_sections(found))
        if not below:
            yield path
        for section, is_named in below:
            yield from keys(section, f"{path}.*." if is_named else f"{path}.")


def _sections(annotation: Any) -> Iterator[tuple[Any, bool]]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _sections(typing.get_args(annotation)[0])
    elif origin is dict:
        yield from ((section, True) for section, _ in _sections(typing.get_args(annotation)[1]))
    elif origin in (types.UnionType, typing.Union):
        for one in typing.get_args(annotation):
            yield from _sections(one)
    elif is_dataclass(annotation) and annotation is not config.Choice:
        yield annotation, False


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Inputs that overrides name."""
    folder = tmp_path_factory.mktemp("keys")
    rows = [{"prompt": "how many " * (1 + i % 4), "response": "abc"[i % 3]} for i in range(12)]
    chats = [
        {
            "messages": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "yes"}],
            "tools": [{"type": "function", "function": {"name": "add"}}],
            "instruction": row["prompt"],
            "output": row["response"],
            **row,
        }
        for row in rows
    ]
    found = {}
    for name, of_file in (("rows", rows), ("short", rows[:5]), ("chats", chats)):
        found[name] = str(folder / f"{name}.jsonl")
        Path(found[name]).write_text("".join(json.dumps(row) + "\n" for row in of_file))
    for name, layers in (("model", 2), ("small", 1)):
        found[name] = str(folder / name)
        shutil.copytree(ROOT / "configs/quickstart/model", found[name], ignore=shutil.ignore_patterns("*.safetensors"))
        settings = json.loads((folder / name / "config.json").read_text())
        settings["num_hidden_layers"] = layers
        (folder / name / "config.json").write_text(json.dumps(settings))
        template = folder / name / "chat_template.jinja"
        template.write_text(
            "{{ tools }}{{ more }}"
            "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
        )
    found["folder"] = str(folder)
    found["ds_config"] = str(folder / "ds.json")
    Path(found["ds_config"]).write_text('{"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 0}}')
    found["adapter"] = _adapter(folder, found["model"])
    return found


def _adapter(folder: Path, model: str) -> str:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lori_dist import Spec, attach, extract
    from lori_dist.formats import native

    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    attached = attach(made, Spec(rank=4, alpha=8.0, seed=1, targets=("q_proj",)))
    with torch.no_grad():
        for layer in attached.values():
            layer.deltas[0].values.fill_(0.1)
    path = folder / "adapter.safetensors"
    native.save(extract(made, name="one"), path)
    return str(path)


def described(places: dict[str, str], *overrides: str) -> config.Run:
    task = {"train": places["rows"], "test": places["rows"], "validation": places["rows"]}
    tree = {
        "name": "keys",
        "output": places["folder"],
        "model": {"path": places["model"]},
        "tasks": {"one": task, "two": task},
        "adapter": {"rank": 8},
        "train": {"epochs": 1, "batch_size": 8, "micro_batch_size": 4, "max_length": 48, "calibrate": {"steps": 2}},
        "merges": {"all": {"method": "concat"}},
        "evaluate": {"metrics": ["loss", "choice"]},
        "cluster": {"workers": 4},
    }
    path = Path(places["folder"]) / "run.yaml"
    path.write_text(json.dumps(tree))
    given = [override.format(**places) for override in overrides]
    if "train.calibrate.epochs=3" in given:
        given.append("train.calibrate.steps=null")
    if any(override.startswith("evaluate.lm_eval") for override in given):
        with pytest.MonkeyPatch.context() as patch:  # planned where it is not installed
            patch.setattr("lori_dist.config.run.is_installed", lambda package: True)
            return config.load(path, given)
    return config.load(path, given)


def planned(places: dict[str, str], *overrides: str) -> dict[str, Any]:
    found = plan(described(places, *overrides), Hardware(gpus=4, nodes=1, **DEVICES["h100"]))
    return {key: found[key] for key in ("model", "adapter", "training", "placements", "evaluation", "notes")}


@pytest.fixture(scope="module")
def usual(places: dict[str, str]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Plans that others are compared with, by what they were made of."""
    return {}


def compared(usual: dict[tuple[str, ...], Any], places: dict[str, str], *overrides: str) -> dict[str, Any]:
    if overrides not in usual:
        usual[overrides] = planned(places, *overrides)
    return usual[overrides]


def test_every_key_is_known_to_matter_or_not() -> None:
    listed = set(MATTERS) | set(CANNOT_MATTER)
    assert not MATTERS.keys() & CANNOT_MATTER.keys()
    assert set(keys(config.Run)) == listed, "a new key belongs into MATTERS or, with the reason, into CANNOT_MATTER"


@pytest.mark.parametrize("key", MATTERS)
def test_a_key_that_matters_changes_the_plan(key: str, places: dict[str, str], usual: dict[Any, Any]) -> None:
    before = BEFORE.get(key, [])
    assert planned(places, *before, *MATTERS[key]) != compared(usual, places, *before)


@pytest.mark.parametrize("key", CANNOT_MATTER)
def test_a_key_that_cannot_matter_changes_nothing(key: str, places: dict[str, str], usual: dict[Any, Any]) -> None:
    overrides, reason = CANNOT_MATTER[key]
    assert reason
    before = WITH_SEARCH if ".search." in key else WITH_LM_EVAL if ".lm_eval." in key else []
    assert planned(places, *overrides) == compared(usual, places, *before)


@pytest.mark.parametrize("key", [*MATTERS, *CANNOT_MATTER])
def test_a_key_is_in_the_fingerprints_of_jobs_as_its_mark_says(key: str, places: dict[str, str]) -> None:
    if key in CHANGES_RESULT:
        before, after = CHANGES_RESULT[key]
    else:
        before = BEFORE.get(key, WITH_SEARCH if ".search." in key else WITH_LM_EVAL if ".lm_eval." in key else [])
        after = [*before, *(MATTERS[key] if key in MATTERS else CANNOT_MATTER[key][0])]
    is_same = fingerprints(places, *before) == fingerprints(places, *after)
    assert is_same == (mark(key) is config.Fingerprint.NEVER)


def fingerprints(places: dict[str, str], *overrides: str) -> dict[str, str]:
    return {job.name: job.fingerprint for job in jobs.plan(described(places, *overrides))}


def mark(key: str) -> config.Fingerprint | None:
    """That of a key, or of the section that it is in."""
    section, marks = config.Run, []
    for name in key.replace(".*", "").split("."):
        found = check.keys(section)[name]
        section = found.section or found.sections
        marks.append(found.fingerprint)
    return config.Fingerprint.NEVER if config.Fingerprint.NEVER in marks else marks[-1]


@pytest.mark.parametrize(
    ("chosen", "path", "values"),
    [
        ("ddp", "train.engine", {}),
        (
            "fsdp",
            "train.engine",
            {
                "base": "replicated",
                "replicas": 2,
                "offload": True,
                "wrap": ["LlamaMLP"],
                "reshard_after_forward": False,
                "forward_prefetch": 2,
                "backward_prefetch": 2,
                "param_dtype": "bfloat16",
                "reduce_dtype": "bfloat16",
            },
        ),
        ("deepspeed", "train.engine", {"stage": 1, "hpz": 2, "offload": True, "config": "{ds_config}"}),
        ("joint", "multitask", {"projection": "none", "balance": "none"}),
    ],
)
def test_options_of_methods_reach_the_plan(
    chosen: str, path: str, values: dict[str, Any], places: dict[str, str], usual: dict[Any, Any]
) -> None:
    neutral = {
        # Sums, units and factors of the same gradients; shares of tasks whose rows are alike here.
        "joint": {"granularity", "reduce", "seed", "weights", "sampling", "temperature", "cap"},
        "fsdp": {"output_dtype", "pin_memory"},  # a cast that the next block does anyway; how the host keeps its shards
    }.get(chosen, set())
    values = {key: places["ds_config"] if value == "{ds_config}" else value for key, value in values.items()}
    folder, role = ("engines", "build") if path == "train.engine" else ("multitask", "plan")
    assert set(plugin.find(folder, chosen, role, path).options) == set(values) | neutral
    needed = {"stage": 3} if chosen == "deepspeed" else {}
    others = ["merges={{}}"] if chosen == "joint" else []

    def made(options: dict[str, Any]) -> str:
        return f"{path}={json.dumps({'name': chosen, **options})}".replace("{", "{{").replace("}", "}}")

    for key, value in values.items():
        changed = planned(places, made({**needed, key: value}), *others)
        before = compared(usual, places, made(needed), *others)
        own = {"name": chosen, **needed, key: value}
        if path == "train.engine":
            [row] = [one for one in changed["placements"] if one["engine"] == own]
            alike = [one for one in before["placements"] if one["engine"] == {"name": chosen, **needed}]
            figures = ("memory", "traffic", "training_seconds")
            assert any(row[figure] != alike[0][figure] for figure in figures)
        else:
            assert changed["placements"] != before["placements"]
