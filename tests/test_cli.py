"""The `lori` command, mostly as a process of its own: what it prints, where, and its exit code."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lori_dist import Adapter, Spec, attach, commands, extract, load_adapter, plugin, save_adapter, trainable
from lori_dist.__main__ import main
from lori_dist.config import Model
from lori_dist.training.model import identity
from tests.models import tiny_llama
from tests.tokenizers import save

YAML = """
name: demo
output: runs
model: {path: model}
tasks:
  first: {train: rows.jsonl, test: rows.jsonl}
  second: {train: rows.jsonl, test: rows.jsonl, labels: [left, right]}
adapter: {rank: 2, alpha: 4, density: 0.25, targets: [q_proj, down_proj]}
train: {steps: 2, batch_size: 5, micro_batch_size: 2, max_length: 32, calibrate: {steps: 3}}
merges:
  both: {method: concat}
evaluate: {max_new_tokens: 4, rows: 3}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, a configuration of them, and two adapters."""
    made = tmp_path_factory.mktemp("cli")
    save(tiny_llama(), made / "model")
    rows = [{"prompt": f"go {word} {number}", "response": word} for number in range(3) for word in ("left", "right")]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "run.yaml").write_text(YAML)
    for number, name in enumerate(("first", "second")):
        save_adapter(random_adapter(name, number, made / "model"), made / f"{name}.safetensors")
    return made


def random_adapter(name: str, seed: int, base: Path) -> Adapter:
    model = tiny_llama()
    targets = attach(model, Spec(rank=2, alpha=4.0, seed=seed, targets=("q_proj", "down_proj")))
    generator = torch.Generator().manual_seed(seed)
    masks = {path: torch.rand(*layer.weight.shape[:1], 2, generator=generator) < 0.5 for path, layer in targets.items()}
    masks["model.layers.0.mlp.down_proj"].zero_()
    model = tiny_llama()
    attach(model, Spec(rank=2, alpha=4.0, seed=seed, targets=("q_proj", "down_proj")), masks=masks)
    for values in trainable(model).values():
        values.data.normal_(generator=generator)
    return extract(model, name=name, base=identity(Model(path=str(base))))


def lori(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lori_dist", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


# --- help and mistakes -----------------------------------------------------------------------------------------------


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert tuple(re.findall(r"^    (\w+)  ", printed, re.MULTILINE)) == commands.VERBS
    assert set(commands.VERBS) == set(plugin.names("commands"))


@pytest.mark.parametrize("verb", commands.VERBS)
def test_help_of_a_verb_has_an_example_of_it(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    printed = capsys.readouterr().out
    assert re.search(rf"^  lori {verb} ", printed, re.MULTILINE)
    assert "local_rank" not in printed


def test_without_a_verb_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "usage: lori" in capsys.readouterr().err


def test_all_mistakes_of_a_configuration_are_reported_at_once_and_before_torch_is_imported(folder: Path) -> None:
    words = ["run", "run.yaml", "train.lr=fast", "trian.steps=3", "merges.both.method=concta", "model.path=./nowhere"]
    program = f"""
import sys
from lori_dist.__main__ import main
code = main({words!r})
assert "torch" not in sys.modules and "ray" not in sys.modules
sys.exit(code)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    problems = result.stderr.splitlines()
    assert sorted(problem.partition(":")[0] for problem in problems) == [
        "merges.both.method",
        "model.path",
        "train.lr",
        "trian",
    ]
    assert "Did you mean 'train'?" in result.stderr
    assert "Did you mean 'concat'?" in result.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("run nowhere.yaml", 2, r"^nowhere\.yaml: cannot be read"),
        ("train run.yaml --task frist", 2, r"^--task: unknown task 'frist'.* Did you mean 'first'\?$"),
        ("merge out.safetensors first.safetensors --method linaer", 2, r"^--method: .* Did you mean 'linear'\?$"),
        ("merge out.safetensors first.safetensors a=1 --method linear", 2, r"^--method\.a: linear has no such option"),
        ("merge out.safetensors a=1 --method linear", 2, r"^--method\.a: "),
        ("merge out.safetensors first.safetensors --method linear --weights 1,2", 2, r"^--weights: 2 given for 1 "),
        ("merge out.safetensors first.safetensors --method linear --weights x", 2, r"^--weights: got 'x'"),
        (
            "merge first.safetensors second.safetensors --method linear",
            2,
            r"^OUT: 'first\.safetensors' exists; the file",
        ),
        (
            "merge out.safetensors first.safetensors d=2001-99-99 --method linear",
            2,
            r"^--method\.d: linear has no such option",
        ),
        ("evaluate run.yaml --adapter rows.jsonl", 1, r"^rows\.jsonl: this is not a whole safetensors file"),
        ("export first.safetensors rows.jsonl/x --format peft", 1, r"^rows\.jsonl/x: cannot be made: "),
        ("run run.yaml output=rows.jsonl/x", 2, r"^output: .*rows\.jsonl/x/demo' cannot be made, .* is not a folder"),
        ("merge no/out.safetensors first.safetensors --method linear", 2, r"^OUT: 'no/out\.safetensors' cannot be"),
        ("merge out.safetensors nowhere.safetensors --method linear", 1, r"^nowhere\.safetensors: it cannot be read"),
        ("evaluate run.yaml --out no/matrix.json", 2, r"^--out: 'no/matrix\.json' cannot be a file"),
        ("export first.safetensors out --format folded", 2, r"^--base: is missing"),
        ("export rows.jsonl out --format peft", 1, r"^rows\.jsonl: this is not a whole safetensors file"),
        ("show model", 1, r"^model: this is a folder"),
        ("report --out out", 2, r"^ADAPTER: none is given"),
        (
            "report --out out --run run.yaml output=x",
            2,
            r"^ADAPTER: none is given; give adapter files, or with --run a",
        ),
        (
            "report first.safetensors train.steps=3 --out out",
            2,
            r"^train\.steps=3: is an override, which needs a configuration",
        ),
        ("report first.safetensors --out out --run run.yaml output=x", 2, r"^--run: '.*x/demo/summary\.json' does not"),
        ("report first.safetensors --out out --evaluation no.json", 2, r"^--evaluation: 'no\.json' does not exist"),
        (
            "report first.safetensors --out out --evaluation rows.jsonl",
            2,
            r"^--evaluation: 'rows\.jsonl' is not a JSON file",
        ),
        (
            "report first.safetensors --out out --evaluation model/config.json",
            2,
            r"^--evaluation: .* does not say model",
        ),
        ("report rows.jsonl --out out", 1, r"^rows\.jsonl: this is not a whole safetensors file"),
        ("report first.safetensors --out rows.jsonl/x", 1, r"^rows\.jsonl/x: cannot be made: "),
        ("bench projetcion", 2, r"^SUITE: .* Did you mean 'projection'\?$"),
        ("bench projection fast", 2, r"^fast: an option of a method has the form NAME=VALUE"),
        ("bench projection repetitions=3", 2, r"^SUITE\.repetitions: projection has no such option"),
    ],
)
def test_a_mistake_is_one_message_and_no_traceback(
    words: str,
    code: int,
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert main(words.split()) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(message, printed.err, re.MULTILINE)
    assert "Traceback" not in printed.err
    assert not (folder / "out").exists()


def test_what_a_file_says_cannot_move_the_cursor(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = load_adapter(folder / "first.safetensors")
    block = dataclasses.replace(adapter.blocks[0], name="first\x1b[2J\nlast")
    save_adapter(dataclasses.replace(adapter, blocks=(block,)), tmp_path / "hostile.safetensors")
    assert main(["show", str(tmp_path / "hostile.safetensors")]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", ["show methods more", "run run.yaml --fast", "export a b --format zip", "rnu run.yaml"]
)
def test_words_that_no_verb_takes_are_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert "usage: lori" in capsys.readouterr().err


def test_verbose_shows_the_traceback(folder: Path) -> None:
    result = lori("show", "rows.jsonl", "--verbose", cwd=folder)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "rows.jsonl: this is not a whole safetensors file" in result.stderr


def test_other_ranks_say_who_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert main(["show", str(folder / "rows.jsonl")]) == 1
    assert capsys.readouterr().err.startswith("rank 3: ")


# --- show ------------------------------------------------------------------------------------------------------------


def test_show_lists_all_methods_and_imports_no_torch(folder: Path) -> None:
    program = "import sys; from lori_dist.__main__ import main; main(['show']); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    for kind in ("masks", "merges", "engines", "multitask", "balances", "evaluation", "benchmarks"):
        section = re.search(rf"^{kind}:\n((?:  .*\n?)+)", result.stdout, re.MULTILINE)
        assert section is not None
        lines = section[1].splitlines()
        assert [line.split()[0] for line in lines] == list(plugin.names(kind))
        assert all(len(line.split()) > 3 for line in lines), "a method without a summary"
    assert re.search(r"^  deepspeed .* Options: stage=2", result.stdout, re.MULTILINE)


def test_show_tells_the_densities_of_an_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = load_adapter(folder / "first.safetensors")
    assert main(["show", str(folder / "first.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert f"keeps {adapter.kept:,} of {adapter.total:,} entries" in printed
    assert re.search(r"base: .*model_type llama", printed)
    assert re.search(rf"^first +0 +2 +4 +1 +float32 +{adapter.kept} ", printed, re.MULTILINE)
    table = printed[printed.index("layer") :].splitlines()
    assert table[0].split() == ["layer", "q_proj", "down_proj", "all"]
    assert table[1].split()[2] == "0.00"  # keeps nothing there
    assert table[3].split()[0] == "all"
    assert float(table[3].split()[-1]) == pytest.approx(100 * adapter.kept / adapter.total, abs=0.006)


def test_show_ends_well_when_its_reader_does(folder: Path) -> None:
    result = subprocess.run(
        f"{sys.executable} -m lori_dist show | head -n 1",
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr) == ("masks:\n", "")


# --- merge and export ------------------------------------------------------------------------------------------------


def test_data_shows_what_is_learned_and_what_is_cut(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab\\u001b[2J", "response": "cdef"}\n' * 4)
    words = ["data", str(folder / "run.yaml"), "--rows", "1", f"tasks.first.train={tmp_path}/rows.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*words, "--task", "first", "train.max_length=8"]) == 0
    printed = capsys.readouterr().out
    # <s>, six characters of the prompt, of which the first four are cut off, four of the response, </s>
    assert "first, row 1: 8 tokens, cut from 12 to train.max_length; 5 are learned (62%)" in printed
    assert "ab\\x1b[2J[cdef]" in printed
    assert "[6:c] [7:d] [8:e] [9:f] [2:</s>]" in printed
    assert (
        "tasks.first.train: 4 rows, 32 tokens, 20 of them learned (62%); tokens a row: 50% up to 12, 90% up to 12, 99% "
        "up to 12, at most 12; 4 rows (100.0%) lose 16 tokens at train.max_length=8"
    ) in printed
    assert "tasks.first.test: 6 rows" in printed
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*words, "--task", "firs"]) == 2
    assert "--task: got 'firs'; wanted one of first, second. Did you mean 'first'?" in capsys.readouterr().err


def test_merge_writes_the_weighted_sum(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    names = ("first.safetensors", "second.safetensors")
    result = lori("merge", out, *names, "--weights", "0.75,-0.5", "--method", "concat", cwd=folder)
    assert (result.returncode, result.stderr) == (0, "")
    merged, first, second = (load_adapter(path) for path in (out, *(folder / name for name in names)))
    assert f"{out}: keeps {merged.kept:,} of {merged.total:,} entries of B" in result.stdout
    for module in merged.shapes:
        torch.testing.assert_close(merged.delta(module), 0.75 * first.delta(module) - 0.5 * second.delta(module))


def test_weights_may_start_with_a_minus(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(out), str(folder / "first.safetensors"), "--method", "linear", "--weights", "-1"]) == 0
    negated, first = load_adapter(out), load_adapter(folder / "first.safetensors")
    assert all(torch.equal(negated.delta(module), -first.delta(module)) for module in first.shapes)


def test_export_to_peft_writes_a_lora_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    result = lori("export", folder / "first.safetensors", out, "--format", "peft", cwd=folder)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{out}\n", "")
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["base_model_name_or_path"]) == (
        "LORA",
        2,
        str(folder / "model"),
    )
    tensors = load_file(out / "adapter_model.safetensors")
    adapter = load_adapter(folder / "first.safetensors")
    module = "model.layers.1.self_attn.q_proj"
    a, b = (tensors[f"base_model.model.{module}.lora_{name}.weight"] for name in "AB")
    torch.testing.assert_close(2.0 * b @ a, adapter.delta(module))


def test_export_to_the_official_layout_is_read_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = lori("export", folder / "first.safetensors", out, "--format", "official", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} < {file.name for file in out.iterdir()}
    assert "stored" in lori("show", out, cwd=folder).stdout


def test_export_folded_writes_a_model_with_the_adapter_in_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "folded"
    words = ["export", folder / "first.safetensors", out, "--format", "folded", "--base", folder / "model"]
    assert main([*map(str, words)]) == 0
    base, folded = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "model", out))
    module = "model.layers.1.self_attn.q_proj"
    difference = folded.get_submodule(module).weight - base.get_submodule(module).weight
    torch.testing.assert_close(
        difference, load_adapter(folder / "first.safetensors").delta(module), atol=1e-6, rtol=1e-5
    )


# --- report ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [True, False], ids=["summary", "matrix"])
def test_report_writes_json_page_and_pictures(folder: Path, tmp_path: Path, wrapped: bool) -> None:
    matrix = {
        model: {task: {"loss": 1.0 + (model != task)} for task in ("first", "second")}
        for model in ("base", "first", "second", "both")
    }
    (tmp_path / "summary.json").write_text(json.dumps({"run": "demo", "evaluation": matrix} if wrapped else matrix))
    words = ["report", "--out", tmp_path / "out", "--evaluation", tmp_path / "summary.json"]
    result = lori(*words, "first.safetensors", "second.safetensors", cwd=folder)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{tmp_path}/out/report.html\n", "")
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [one["name"] for one in written["adapters"]] == ["first", "second"]
    assert written["drops"]["loss"]["merges"]["both"]["drop"] == {"first": 1.0, "second": 1.0}
    assert {"report-cosine.png", "report-drop-1.png", "report.html"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_report_says_when_an_evaluation_has_no_drops(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "matrix.json").write_text(json.dumps({"base": {"first": {"loss": 1.0}}}))
    words = ["report", "first.safetensors", "--out", tmp_path / "out", "--evaluation", tmp_path / "matrix.json"]
    result = lori(*words, cwd=folder)
    assert result.returncode == 0
    assert "no drops can be computed" in result.stderr


# --- bench -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_prints_and_writes_rows_and_ratios(tmp_path: Path) -> None:
    out = tmp_path / "projection.json"
    result = lori("bench", "projection", "--out", out, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    measured = json.loads(out.read_text())
    assert {"suite", "machine", "rows", "ratios"} <= set(measured)
    assert {"cpu", "cores", "gpu", "torch"} == set(measured["machine"])
    assert all(row["name"] in result.stdout for row in measured["rows"])
    assert all(name in result.stdout for name in measured["ratios"])


# --- train, evaluate, run --------------------------------------------------------------------------------------------


def test_evaluate_prints_and_writes_the_matrix(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "matrix.json"
    words = ["evaluate", "run.yaml", "--adapter", "first.safetensors", "--out", out, f"output={tmp_path}"]
    result = lori(*words, "--adapter", "second.safetensors", "evaluate.rows=2", cwd=folder)
    assert result.returncode == 0, result.stderr
    matrix = json.loads(out.read_text())
    assert list(matrix) == ["base", "first.safetensors", "second.safetensors"]
    assert list(matrix["base"]) == ["first", "second"]
    assert set(matrix["base"]["second"]) == {"loss", "exact_match", "choice"}
    assert f"{matrix['first.safetensors']['first']['loss']:.3f}" in result.stdout


def test_train_writes_where_a_run_looks_and_does_nothing_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "demo" / "train-first" / "adapter.safetensors"
    words = ["train", "run.yaml", "--task", "first", f"output={tmp_path}"]
    result = lori(*words, cwd=folder)
    assert (result.returncode, result.stdout) == (0, f"{path}\n"), result.stderr
    adapter = load_adapter(path)
    assert adapter.kept == round(0.25 * adapter.total)
    written = path.stat().st_mtime_ns
    monkeypatch.chdir(folder)
    assert main(words) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.stat().st_mtime_ns == written


def test_train_of_tasks_together_makes_their_adapter(folder: Path, tmp_path: Path) -> None:
    words = ["train", "run.yaml", f"output={tmp_path}", "multitask=joint", "merges={}"]
    path = tmp_path / "demo" / "train-joint" / "adapter.safetensors"
    result = lori(*words, "--task", "joint", cwd=folder)
    assert (result.returncode, result.stdout) == (0, f"{path}\n"), result.stderr
    assert [block.name for block in load_adapter(path).blocks] == ["joint"]
    result = lori(*words, "--task", "first", cwd=folder)
    assert result.returncode == 2
    assert result.stderr == "--task: unknown task 'first'; there are joint.\n"


def test_evaluate_without_adapters_takes_what_the_run_has_finished(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["train", "run.yaml", "--task", "second", f"output={tmp_path}"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "run.yaml", "evaluate.metrics=[loss]", f"output={tmp_path}"]) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["loss", "base", "second"]


@pytest.mark.ray
def test_run_prints_the_matrix_and_takes_up_what_was_trained_alone(folder: Path, tmp_path: Path) -> None:
    words = ["run.yaml", f"output={tmp_path}"]
    assert lori("train", *words, "--task", "first", cwd=folder).returncode == 0
    result = lori("run", *words, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert re.search(r"train-first: was finished before$", result.stderr, re.MULTILINE)
    assert re.search(r"train-second: finished in \d+\.\d s$", result.stderr, re.MULTILINE)
    file = tmp_path / "demo" / "summary.json"
    summary = json.loads(file.read_text())
    assert result.stdout.splitlines()[-1] == str(file)
    assert summary["jobs"]["train-first"]["cached"]
    assert "cached" not in summary["jobs"]["train-second"]
    for name, item in {**summary["adapters"], **summary["merges"]}.items():
        assert re.search(rf"^{name} .* {re.escape(item['path'])}$", result.stdout, re.MULTILINE)
    assert f"{summary['evaluation']['both']['first']['loss']:.3f}" in result.stdout
    page = tmp_path / "demo" / "report.html"
    assert summary["report"] == {"path": str(page)}
    assert f"\n{page}\n" in result.stdout
    written = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert list(written["drops"]["loss"]["merges"]) == ["both"]
    again = lori("report", "--run", *words, "--out", tmp_path / "again", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again" / "report.json").read_text()) == written
    assert (tmp_path / "again" / "report.html").read_text() == page.read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_a_failed_job_is_a_message_and_an_exit_code(folder: Path, tmp_path: Path) -> None:
    result = lori("run", "run.yaml", f"output={tmp_path}", "tasks.first.lr=1e38", cwd=folder)
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.search(r"^train-first: first: at step .* the loss is ", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr
    assert json.loads((tmp_path / "demo" / "summary.json").read_text())["jobs"]["train-second"]["state"] == "finished"


def test_the_installed_command_is_the_same(folder: Path) -> None:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lori")), "--version"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert re.fullmatch(r"lori_dist \d+\.\d+\.\d+\n", result.stdout)
    assert os.access(Path(sys.executable).with_name("lori"), os.X_OK)
