"""Tasks of lm-eval beside those of the run."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lori_dist import config, formats
from lori_dist.errors import ConfigError
from lori_dist.evaluation import evaluate, evaluate_all
from lori_dist.integrations.folded import export_folded
from lori_dist.jobs import evaluate_job
from lori_dist.training.model import identity
from lori_dist.training.world import World, from_environment
from tests.distributed import run_distributed
from tests.evaluation.test_evaluate import REVIEWS, adapter_file, base, tree

__all__ = ["base", "tree"]
lm_eval = pytest.importorskip("lm_eval")
Instance = pytest.importorskip("lm_eval.api.instance").Instance

KINDS = {
    "choosing": """
output_type: multiple_choice
doc_to_choice: [good, bad]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "writing": """
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
filter_list:
- {name: first, filter: [{function: regex, regex_pattern: "^(.)"}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "reading": """
output_type: loglikelihood_rolling
metric_list:
- {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
- {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}


@pytest.fixture
def run(tree: dict[str, Any], tmp_path: Path) -> config.Run:
    folder, rows = tmp_path / "own", tmp_path / "rows.jsonl"
    folder.mkdir()
    rows.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in 8 * REVIEWS))
    for name, kind in KINDS.items():
        data = f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        texts = 'doc_to_text: "{{text}}: "\ndoc_to_target: "{{label}}"\n'
        if name == "reading":
            texts = 'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        (folder / f"{name}.yaml").write_text(data + texts + kind)
    tree["evaluate"] |= {"metrics": ["choice"], "lm_eval": {"tasks": list(KINDS), "include": str(folder)}}
    return config.validate(tree)


def in_process(run: config.Run, adapter: Path, folder: Path) -> dict[str, dict[str, float]]:
    """What lm-eval measures on the folded model."""
    export_folded(run.model.path, formats.load(adapter), folder)
    assert run.evaluate.lm_eval is not None
    tasks = lm_eval.tasks.TaskManager(include_path=run.evaluate.lm_eval.include, include_defaults=False)
    found = lm_eval.simple_evaluate("hf", f"pretrained={folder}", tasks=list(KINDS), device="cpu", task_manager=tasks)
    results: dict[str, dict[str, float]] = found["results"]
    return results


def by_command(run: config.Run, adapter: Path, folder: Path) -> dict[str, dict[str, float]]:
    """What lm-eval's own command says of the folded model."""
    export_folded(run.model.path, formats.load(adapter), folder)
    assert run.evaluate.lm_eval is not None
    words = ["--model_args", f"pretrained={folder}", "--tasks", ",".join(KINDS), "--device", "cpu"]
    words += ["--include_path", str(run.evaluate.lm_eval.include), "--output_path", str(folder.parent / "of lm-eval")]
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", *words]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    [written] = (folder.parent / "of lm-eval").rglob("results*.json")
    results: dict[str, dict[str, float]] = json.loads(written.read_text())["results"]
    return results


PRINTED = {
    ("choosing", "lm_eval/acc"): "acc,none",
    ("writing", "lm_eval/exact_match/first"): "exact_match,first",
    ("reading", "lm_eval/byte_perplexity"): "byte_perplexity,none",
    ("reading", "lm_eval/bits_per_byte"): "bits_per_byte,none",
}


def assert_printed_alike(found: dict[str, dict[str, float]], there: dict[str, dict[str, float]]) -> None:
    """Figures are those that lm-eval prints, with its four digits."""
    for (task, metric), name in PRINTED.items():
        assert f"{found[task][metric]:.4f}" == f"{there[task][name]:.4f}", (task, metric)


ENGINES: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp": "fsdp",
    "deepspeed-3": {"name": "deepspeed", "stage": 3},
}


def measured(tree: dict[str, Any], models: dict[str, Path | None]) -> dict[str, Any]:
    """On a rank: engine -> model -> figures; and the most requests that this rank has run of one kind."""
    from lori_dist.engines.deepspeed import forget_groups

    world, found = from_environment(), {}
    for name, engine in ENGINES.items():
        run = config.validate({**tree, "evaluate": {**tree["evaluate"], "engine": engine}})
        found[name] = {model: one.values for model, one in evaluate_all(run, models, world=world).items()}
        forget_groups()
    return found


@pytest.mark.slow
def test_ranks_divide_the_requests_and_print_what_lm_eval_does(run: config.Run, tmp_path: Path) -> None:
    adapter = adapter_file(tmp_path, identity(run.model))
    there = by_command(run, adapter, tmp_path / "folded")
    ranks = run_distributed(measured, config.dump(run), {"base": None, "adapter": adapter}, world_size=2)
    for of_rank in ranks:
        for of_models in of_rank.values():
            assert_printed_alike(of_models["adapter"], there)
            assert of_models["base"]["choosing"] == ranks[0]["ddp"]["base"]["choosing"]
            assert of_models["base"]["reading"] != of_models["adapter"]["reading"]


def test_a_rank_has_a_share_of_the_requests_and_contexts_stay_whole() -> None:
    from lori_dist.evaluation._lm_eval import _share

    texts = ["a", "a", "bb", "ccc", "ccc", "ccc", "dd"]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(text, f" {number}"), idx=0, metadata=("t", 0, 1))
        for number, text in enumerate(texts)
    ]
    shares = [
        _share(requests, World(rank=rank, size=2, local_rank=rank, device=torch.device("cpu"))) for rank in (0, 1)
    ]
    assert sorted(itertools.chain(*shares)) == list(range(len(texts)))
    assert all(len({number in share for number in range(3, 6)}) == 1 for share in shares)
    assert all(shares)


def test_a_model_is_measured_as_lm_eval_measures_its_export(run: config.Run, tmp_path: Path) -> None:
    adapter = adapter_file(tmp_path, identity(run.model))
    seen: list[tuple[str, int, int]] = []
    found = evaluate(run, adapter, progress=lambda *given: seen.append(given))
    assert seen[-1] == ("lm-eval", 2, 3)
    assert {task: set(values) for task, values in found.items()} == {
        "questions": set(),
        "reviews": {"choice"},
        "choosing": {"lm_eval/acc"},
        "writing": {"lm_eval/exact_match/first"},
        "reading": {"lm_eval/byte_perplexity", "lm_eval/bits_per_byte"},
    }
    assert_printed_alike(found, in_process(run, adapter, tmp_path / "folded"))
    several = {name: one.values for name, one in evaluate_all(run, {"base": None, "adapter": adapter}).items()}
    assert several["adapter"] == found
    assert several["base"] == evaluate(run, None)
    assert several["base"]["reading"] != found["reading"]


def test_a_task_that_is_not_there_is_named(run: config.Run) -> None:
    path = config.validate(config.dump(run) | {"evaluate": {"lm_eval": {"tasks": ["hellaswagg"]}}})
    with pytest.raises(ConfigError, match=r"evaluate.lm_eval.tasks: .* 'hellaswagg' in lm-eval; .* 'hellaswag'\?"):
        evaluate(path, None)


def test_another_task_of_the_same_name_is_another_evaluation(run: config.Run) -> None:
    before = evaluate_job(run, "base", None)
    assert evaluate_job(run, "base", None) == before
    path = Path(str(run.evaluate.lm_eval and run.evaluate.lm_eval.include)) / "choosing.yaml"
    path.write_text(path.read_text().replace("good, bad", "bad, good"))
    assert evaluate_job(run, "base", None).fingerprint != before.fingerprint


def test_a_folder_that_is_not_there_is_named(run: config.Run) -> None:
    with pytest.raises(ConfigError, match=r"evaluate.lm_eval.include: there is no folder 'nowhere'; paths are"):
        config.validate(config.dump(run) | {"evaluate": {"lm_eval": {"tasks": ["x"], "include": "nowhere"}}})


FORMS = {"choice": "acc", "choice_norm": "acc_norm", "choice_bytes": "acc_bytes"}


def test_choice_is_what_lm_eval_says_of_the_same_rows(tree: dict[str, Any], tmp_path: Path) -> None:
    labels = ["yes", "no", "it is not so at all", "a", "12345678"]
    own = [label for number, label in enumerate(labels, start=1) for _ in range(number)]  # each another share
    rows = tmp_path / "asked.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"is it {i} or {9 * i}", "label": own[i % 15]}) for i in range(30)))
    (tmp_path / "asked.yaml").write_text(
        f"task: asked\ndataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        'doc_to_text: "{{text}}?"\ndoc_to_target: "{{label}}"\noutput_type: multiple_choice\n'
        f"doc_to_choice: {json.dumps(labels)}\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]\n"
    )
    template = {"prompt": "{text}?", "response": " {label}"}
    tree["tasks"] = {"asked": {"train": str(rows), "test": str(rows), "template": template, "labels": labels}}
    tree["evaluate"] = {"metrics": [*FORMS], "lm_eval": {"tasks": ["asked"], "include": str(tmp_path)}}
    [found] = evaluate(config.validate(tree), None).values()
    assert {form: found[form] for form in FORMS} == {form: found[f"lm_eval/{name}"] for form, name in FORMS.items()}
    assert found["choice"] != found["choice_norm"]  # or this would test little
