"""`lori generate`: prompts in, texts of several models out."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lori_dist import config
from lori_dist.__main__ import main
from lori_dist.adapter import attach, file
from lori_dist.adapter.adapter import Spec
from lori_dist.training.model import identity, load_model
from tests.models import tiny_llama
from tests.tokenizers import save, tiny_tokenizer

PROMPTS = ["1+1=", "a much longer prompt: "]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A configuration and an adapter."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1=", "response": "2"}))
    tree: dict[str, Any] = {
        "name": "run",
        "output": str(tmp_path / "runs"),
        "model": {"path": str(save(model, tmp_path / "tiny"))},
        "tasks": {"sums": {"train": str(rows), "test": str(rows), "template": {"prompt": "q: {prompt}"}}},
        "train": {"steps": 1},
        "evaluate": {"max_new_tokens": 6},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    base = load_model(config.validate(tree).model)
    attach.attach(base, Spec(rank=4, alpha=8.0, seed=3))
    for values in attach.trainable(base).values():
        values.data.normal_()
    file.save(attach.extract(base, name="t", base=identity(config.validate(tree).model)), tmp_path / "a.safetensors")
    return tmp_path / "run.yaml", tmp_path / "a.safetensors"


@torch.no_grad()
def by_hand(run: Path, adapter: Path | None, prompt: str) -> str:
    """Greedy, one token at a time, without a cache."""
    model, tokenizer = load_model(config.load(run).model), tiny_tokenizer()
    if adapter is not None:
        attach.attach(model, file.load(adapter))
    tokens = tokenizer(prompt)["input_ids"]
    start = len(tokens)
    while len(tokens) < start + 6 and tokens[-1] != tokenizer.eos_token_id:
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return str(tokenizer.decode([token for token in tokens[start:] if token != tokenizer.eos_token_id]))


def test_texts_of_several_models_stand_side_by_side(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, adapter = made
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS, ""]))
    out = tmp_path / "texts.jsonl"
    models = ["--adapter", "base", "--adapter", str(adapter)]
    assert main(["generate", str(run), *models, "--file", str(prompts), "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [
        {"prompt": prompt, "texts": {"base": by_hand(run, None, prompt), str(adapter): by_hand(run, adapter, prompt)}}
        for prompt in PROMPTS
    ]
    assert found == expected
    shown = capsys.readouterr().out
    assert shown.count("> ") >= len(PROMPTS)
    assert any(line.split()[:1] == ["base"] for line in shown.splitlines())


def test_a_prompt_is_given_typed_or_put_into_a_template(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = made
    assert main(["generate", str(run), "--prompt", "1+1="]) == 0
    assert capsys.readouterr().out == by_hand(run, None, "1+1=") + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1=\n\n"))
    assert main(["generate", str(run), "--task", "sums"]) == 0
    assert capsys.readouterr().out == by_hand(run, None, "q: 1+1=") + "\n"


def test_what_is_drawn_follows_from_the_seed(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, adapter = made
    texts = []
    for seed, others in (("1", []), ("1", ["--prompt", "more"]), ("2", [])):
        drawn = ["--temperature", "50", "--seed", seed, "--adapter", str(adapter)]
        assert main(["generate", str(run), "--prompt", "1+1=", *others, *drawn]) == 0
        texts.append(next(line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("> ")))
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_template_makes_a_message_of_a_prompt(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = made
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}; {% endfor %}bot: "
    tokenizer.save_pretrained(config.load(run).model.path)
    for words, prompt in (([], "user: 1+1=; bot: "), (["--raw"], "1+1=")):
        assert main(["generate", str(run), "--prompt", "1+1=", *words]) == 0
        assert capsys.readouterr().out == by_hand(run, None, prompt) + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "sumz", "--prompt", "a"], "--adapter: 'sumz' is not a file or folder, and the run has finished"),
        (["--task", "sum", "--prompt", "a"], "--task: unknown task 'sum'; there are sums. Did you mean 'sums'?"),
        (["--top-p", "0.5", "--prompt", "a"], "--top-p: is for tokens that are drawn; add --temperature"),
        (["--file", "nowhere.txt"], "--file: nowhere.txt cannot be read"),
    ],
)
def test_mistakes_are_named(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["generate", str(made[0]), *words]) == 2
    assert message in capsys.readouterr().err
