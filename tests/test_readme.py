"""What the READMEs say is so: their commands run, their configurations are valid, their tables are complete."""

import glob
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lori_dist import Spec, attach, config, extract, formats, load_adapter, plugin, save_adapter, trainable
from lori_dist.__main__ import main
from lori_dist.config import schema
from lori_dist.masks.magnitude import mask
from lori_dist.merges import merge
from tests.merges.made import adapter, block
from tests.models import tiny_llama

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
MODEL = "configs/quickstart/model"
FOLDERS = ("lori_dist", "configs", "launch", "docker", "tests")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a document."""

    document: str
    language: str
    text: str
    mark: str
    """The comment at the end of the line above: `test: PLACE`, `not run: REASON`, or empty where this file runs it."""


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]


def blocks(language: str, document: str | None = None) -> list[Block]:
    pattern = re.compile(rf"(?:<!-- ([^\n]*) -->\n)?^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = []
    for path in documents():
        name = str(path.relative_to(ROOT))
        if document in (None, name):
            for mark, text in pattern.findall(path.read_text()):
                found.append(Block(document=name, language=language, text=text, mark=mark))
    return found


def section(document: str, title: str) -> str:
    return (ROOT / document).read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


# --- documents -------------------------------------------------------------------------------------------------------


def test_the_readme_is_for_a_user_in_a_hurry() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_no_sentence_stands_in_two_documents() -> None:
    seen: dict[str, str] = {}
    for path in documents():
        prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        prose = re.sub(r"^(\||#).*$", "", prose, flags=re.MULTILINE)
        for sentence in re.split(r"(?<=[.:;])\s+", re.sub(r"\s+", " ", prose)):
            if len(sentence) > 60:
                assert sentence not in seen, f"{path} and {seen[sentence]}: {sentence}"
                seen[sentence] = str(path)


@pytest.mark.parametrize("language", ["bash", "python"])
def test_what_is_not_run_here_names_the_test_that_runs_it_or_the_reason(language: str) -> None:
    for found in blocks(language):
        kind, _, rest = found.mark.partition(": ")
        if kind == "test":
            file, _, name = rest.partition("::")
            assert not name or re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), rest
            assert (ROOT / file).exists(), rest
        elif kind == "not run":
            assert len(rest) > 10
        else:
            assert not found.mark
            assert language == "bash", f"{found.document}: a block of Python needs a test:\n{found.text}"


def test_the_bytes_of_the_golden_file_are_those_of_the_format() -> None:
    data = (ROOT / "tests/formats/golden/adapter.safetensors").read_bytes()
    lines = re.findall(r"^([0-9a-f]{8}): ((?:[0-9a-f]{2} )+)", (ROOT / "lori_dist/adapter/FORMAT.md").read_text(), re.M)
    assert len(lines) == 7
    for place, listed in lines:
        start, wanted = int(place, 16), bytes.fromhex(listed)
        assert data[start : start + len(wanted)] == wanted


@pytest.mark.slow
def test_the_package_installs(tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, ROOT]
    subprocess.run(install, check=True, capture_output=True)
    shown = subprocess.run(
        [sys.executable, "-c", "import lori_dist; print(lori_dist.__file__)"],
        env={"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.startswith(str(tmp_path))


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's mine.yaml and its rows, and what its commands expect to find."""
    place = tmp_path_factory.mktemp("workplace")
    (place / "configs").symlink_to(ROOT / "configs")
    mine = mine_of_readme()
    mine["model"]["path"] = MODEL
    (place / "mine.yaml").write_text(yaml.safe_dump(mine, sort_keys=False))
    write_rows(place)
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(ROOT / MODEL), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(place / "some-peft-lora")
    return place


def mine_of_readme() -> dict[str, Any]:
    (text,) = [found.text for found in blocks("yaml", "README.md") if found.text.startswith("name: mine ")]
    return dict(yaml.safe_load(text))


def write_rows(place: Path) -> None:
    rows = {
        "math": [{"prompt": f"{n} plus 1 is", "response": f" {n + 1}"} for n in range(80)],
        "sst2": [{"text": f"film {n}", "label_name": ("negative", "positive")[n % 2]} for n in range(80)],
    }
    for name, lines in rows.items():
        (place / "data" / name).mkdir(parents=True)
        for split, number in (("train", len(lines)), ("test", 4)):
            (place / "data" / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines[:number])))


# In an order in which each document's commands find what those before have left.
RUN = ["README.md", *(f"lori_dist/{name}/README.md" for name in ("merges", "evaluation", "plan", "integrations"))]


def test_every_document_with_commands_to_run_is_run() -> None:
    assert {found.document for found in blocks("bash") if not found.mark} == set(RUN)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.ray
@pytest.mark.parametrize("document", RUN)
def test_its_commands_run(
    document: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    for found in blocks("bash", document):
        if found.mark:
            continue
        for words in commands(found.text):
            if words[0] == "lori" and words[1] != "run":
                assert main([name for word in words[1:] for name in (sorted(glob.glob(word)) or [word])]) == 0, words
            else:
                done = subprocess.run(
                    ["bash", "-euc", shlex.join(words) if words[0] == "lori" else words[0]],
                    env=environment(),
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a block, or the whole block where it is more than `lori` commands."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.partition("#")[0].strip()]
    if all(line.startswith("lori ") for line in lines):
        for line in lines:
            words = shlex.split(line, comments=True)
            yield [MODEL if word == "MODEL" else word for word in words]
    else:
        yield [text.replace(".venv/bin/", f"{BIN}/")]


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.mark.ray
@pytest.mark.slow
def test_the_way_from_rows_to_a_served_model_can_be_gone(tmp_path: Path) -> None:
    (script,) = [found.text for found in blocks("bash", "configs/README.md") if "demo.yaml" in found.text]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    script = script.replace(".venv/bin/", f"{BIN}/")
    result = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    matrix = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())["evaluation"]
    assert all(matrix[task][task]["exact_match"] > 0.9 for task in ("next", "previous"))
    assert all(score["loss"] < matrix["base"][task]["loss"] for task, score in matrix["both"].items())
    assert re.search(r"'generated_text': 'after 7 comes \d", result.stdout)
    assert (tmp_path / "demo" / "both" / "adapter_model.safetensors").exists()


VERBS = {
    verb
    for path in documents()
    for verb in re.findall(r"(?:^|lori_dist |\.venv/bin/|`)lori ([a-z]+)\b", path.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_verb_they_name_exists(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found", [found for found in blocks("yaml") if not found.mark], ids=lambda found: found.document
)
def test_a_configuration_is_valid(found: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block leaves out is that of the README's mine.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_rows(tmp_path)
    whole = mine_of_readme() | yaml.safe_load(found.text)
    whole["model"]["path"] = MODEL
    config.validate(whole)


def test_the_settings_are_all_there_are_with_their_defaults() -> None:
    """Where they are not: put what `lori schema --yaml` prints into the block."""
    (text,) = [found.text for found in blocks("yaml", "configs/README.md") if "\ncluster:" in found.text]
    assert text == schema.as_yaml()


def test_every_merge_is_in_the_table() -> None:
    table = (ROOT / "lori_dist/merges/README.md").read_text()
    for name in plugin.names("merges"):
        assert re.search(rf"^\|[^|]*`{name}`[^|]*\|", table, re.MULTILINE), name
        if name != "peft_linear":
            assert f"`{name}`" in section("README.md", "Several tasks"), name


@pytest.mark.parametrize("folder", ["masks", "multitask", "balances", "engines"])
def test_every_method_of_a_folder_is_in_its_table(folder: str) -> None:
    table = (ROOT / "lori_dist" / folder / "README.md").read_text()
    for name in plugin.names(folder):
        assert re.search(rf"^\|[^|]*\b{name}\b[^|]*\|", table, re.MULTILINE), name


def test_the_options_of_joint_training_are_all_there_are_with_their_defaults() -> None:
    (text,) = [found.text for found in blocks("yaml") if found.text.startswith("multitask:\n")]
    listed = yaml.safe_load(text)["multitask"]
    options = plugin.find("multitask", listed.pop("name"), "plan", "multitask").options
    defaults = {name: option.default for name, option in options.items() if name != "projection"}  # an older name
    found = {"balance": "ortho", "granularity": "matrix"}  # where none is given
    examples = {"weights": {"math": 2.0}, "sampling": "proportional", "temperature": 2.0, "cap": 10000}
    assert listed == defaults | found | examples


# --- Python ----------------------------------------------------------------------------------------------------------


def python(document: str, words: str) -> str:
    (text,) = [found.text for found in blocks("python", document) if words in found.text]
    return text


def test_the_script_of_one_s_own_trains_with_the_trainer_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8
    arguments = TrainingArguments(
        output_dir="trainer", max_steps=2, report_to=[], use_cpu=True, save_strategy="no", learning_rate=1e-2
    )

    def train(model: Any) -> None:
        Trainer(model=model, args=arguments, train_dataset=rows).train()

    exec(python("README.md", "train(model)"), {"model": tiny_llama(), "train": train})
    trained = load_adapter("adapter.safetensors")
    assert trained.kept == round(0.1 * trained.total)
    assert all(entries.values.any() for entries in trained.blocks[0].entries.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_lines_for_peft_train_both_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap, phases = python("README.md", "peft_tuner"), python("lori_dist/integrations/README.md", "peft_tuner")
    monkeypatch.chdir(tmp_path)
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8

    def trainer_of(model: Any, steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir="trainer", max_steps=steps, report_to=[], use_cpu=True, save_strategy="no", learning_rate=1e-2
        )
        return Trainer(model=model, args=arguments, train_dataset=rows)

    wrapped = []
    for _ in range(2):
        names: dict[str, Any] = {"model": tiny_llama()}
        exec(wrap, names)
        wrapped.append(names["model"])
    trainer = trainer_of(wrapped[0], 2)
    trainer.train()
    exec(phases, {"trainer": trainer, "new_model": wrapped[1], "mask": mask})
    trainer_of(wrapped[1], 2).train()
    wrapped[1].save_pretrained("sparse")
    trained = formats.load(Path("sparse"))
    assert trained.kept == round(0.1 * trained.total)
    assert any(entries.values.any() for entries in trained.blocks[0].entries.values())


def test_several_adapters_share_one_base(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("math", "sentiment")}
    model, ids = tiny_llama(), torch.tensor([[5, 6, 7]] * 3)
    plain = model(ids).logits
    wanted = {}
    for seed, (name, path) in enumerate(paths.items()):
        alone = tiny_llama()
        attach(alone, Spec(rank=4, alpha=8.0, seed=seed, targets="all-linear"))
        with torch.no_grad():
            for values in trainable(alone).values():
                values.normal_(generator=torch.Generator().manual_seed(seed))
        save_adapter(extract(alone, name=name), path)
        wanted[name] = alone(ids).logits
    names: dict[str, Any] = {"model": model, "paths": paths, "input_ids": ids}
    exec(python("lori_dist/adapter/README.md", "attach_several"), names)
    rows = torch.stack([wanted["math"][0], wanted["sentiment"][1], plain[2]])
    torch.testing.assert_close(names["output"].logits, rows, rtol=1e-4, atol=1e-5)


def test_a_form_is_trained_in_a_loop_of_one_s_own() -> None:
    model, ids = tiny_llama(), torch.tensor([[5, 6, 7], [8, 9, 3], [4, 4, 6]])
    names: dict[str, Any] = {"model": model, "input_ids": ids, "torch": torch}
    exec(python("lori_dist/forms/README.md", "mtl_lora"), names)
    assert set(names["adapters"]) == {"math", "code"}
    for task, made in names["adapters"].items():
        alone = tiny_llama()
        attach(alone, made)
        with names["routing"].rows([task] * 3):
            torch.testing.assert_close(model(ids).logits, alone(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_merge_of_one_s_own_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = python("lori_dist/README.md", "def merge(")
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "faded.py").write_text(method)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"name": "mypackage.faded", "factor": 0.5}
    assert yaml.safe_load(method.partition("`")[2].partition("`")[0]) == {"merges": {"all": {"method": options}}}
    tasks = [adapter(block("one")), adapter(block("two", seed=1))]
    merged = merge(tasks, method=options.pop("name"), options=options, weights=[1.0, -2.0])  # type: ignore[arg-type]
    assert [part.weight for part in merged.blocks] == [0.5, -1.0]
