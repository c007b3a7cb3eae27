"""Code of a model's own runs where the configuration says so, and nowhere else; nobody is asked on a terminal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils

from lori_dist import config
from lori_dist.errors import ConfigError
from lori_dist.integrations import model_card
from lori_dist.integrations.folded import export_folded
from lori_dist.jobs import Job, train_job
from lori_dist.plan.model import count
from lori_dist.training import model_files
from lori_dist.training.model import identity, load_model, load_tokenizer
from lori_dist.training.weights import skeleton
from tests.integrations.made import trained
from tests.models import tiny_llama
from tests.tokenizers import save

CODE = """\
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

with Path({ran!r}).open("a") as file:
    file.write("ran")


class OwnConfig(LlamaConfig):
    model_type = "of-its-own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base whose configuration, model and tokenizer are code of its own, which leaves a file `ran` where it runs."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    monkeypatch.setattr(model_files, "HF_MODULES_CACHE", cache)

    def ask(text: str = "") -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    made = save(tiny_llama(), tmp_path / "base")
    (made / "own.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    change(
        made / "config.json",
        model_type="of-its-own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    change(
        made / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
    )
    return made


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def described(model: config.Model, rows: Path) -> config.Run:
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    task = config.Task(train=str(rows), test=str(rows))
    adapter = config.Adapter(rank=2)
    return config.Run(
        name="r",
        output=str(rows.parent),
        model=model,
        tasks={"t": task},
        adapter=adapter,
        train=config.Train(steps=1, max_length=32),
    )


def exported(model: config.Model) -> None:
    place = Path(model.path).parent / "folded"
    shutil.rmtree(place, ignore_errors=True)
    adapter = trained(tiny_llama(), base=identity(model))
    export_folded(model.path, adapter, place, trust_remote_code=model.trust_remote_code)


USES: dict[str, Callable[[config.Model], object]] = {
    "tokenizer": load_tokenizer,
    "training": skeleton,
    "evaluation": load_model,
    "export": exported,
    "plan": lambda model: count(described(model, Path(model.path).parent / "rows.jsonl")),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_code_of_a_model_s_own_runs_where_it_is_trusted_alone(
    use: Callable[[config.Model], object], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran = folder.parent / "ran"
    with pytest.raises(ConfigError, match=r"^model\.path: .* set model\.trust_remote_code: true if you trust it$"):
        use(config.Model(path=str(folder)))
    assert not ran.exists()
    use(config.Model(path=str(folder), trust_remote_code=True))
    assert ran.exists()
    assert f"model.trust_remote_code: true: Python code in {folder}" in caplog.text


def test_code_beside_a_model_that_transformers_knows_is_not_needed(folder: Path) -> None:
    change(folder / "config.json", model_type="llama")
    model = load_model(config.Model(path=str(folder)))
    for ours, theirs in zip(model.parameters(), tiny_llama().parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not (folder.parent / "ran").exists()


def test_trusted_code_is_part_of_a_job_and_of_its_card(folder: Path) -> None:
    rows = folder.parent / "rows.jsonl"

    def job(trusts: bool) -> Job:
        return train_job(described(config.Model(path=str(folder), trust_remote_code=trusts), rows), "t")

    before, trusted = job(False), job(True)
    assert "own.py" not in before.settings["model"]["content"]
    (folder / "own.py").write_text("# other code\n")
    assert job(False).fingerprint == before.fingerprint
    assert job(True).fingerprint not in (before.fingerprint, trusted.fingerprint)

    def card(made: Job) -> str:
        origin = model_card.Origin(settings=made.settings)
        return model_card.text(trained(tiny_llama()), "base", origin)

    assert "trust_remote_code" not in card(before)
    assert "Python code of its own, which was run (`model.trust_remote_code: true`)" in card(trusted)
