import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lori_dist import config
from lori_dist.adapter import attach
from lori_dist.adapter.adapter import Spec
from lori_dist.errors import AdapterError, ConfigError
from lori_dist.evaluation import Store, Subject, choice, evaluate, evaluate_all, exact_match, loss, measuring
from lori_dist.formats import native
from lori_dist.merges import merge, merge_files
from lori_dist.training.data import encode, read
from lori_dist.training.model import identity, load_model, load_tokenizer
from tests.models import tiny_llama
from tests.tokenizers import save

QUESTIONS = [("1+1=", "2"), ("2+2=", "4"), ("two and two: ", "four")]
REVIEWS = [("a fine film", "good"), ("a dull film", "bad"), ("a film", "good"), ("no film", "bad"), ("film", "good")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # as it is, every token is about as likely as any other, whatever comes before
    return save(model, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tree(base: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of two tasks of different kind."""
    questions, reviews = tmp_path / "questions.jsonl", tmp_path / "reviews.jsonl"
    questions.write_text("\n".join(json.dumps({"prompt": prompt, "response": text}) for prompt, text in QUESTIONS))
    reviews.write_text("\n".join(json.dumps({"text": text, "label_name": label}) for text, label in REVIEWS))
    return {
        "name": "run",
        "model": {"path": str(base)},
        "tasks": {
            "questions": {"train": str(questions), "test": str(questions)},
            "reviews": {
                "train": str(reviews),
                "test": str(reviews),
                "template": {"prompt": "{text}: ", "response": "{label_name}"},
                "labels": ["good", "bad"],
            },
        },
        "train": {"steps": 1, "max_length": 40},
        "evaluate": {"batch_size": 2, "max_new_tokens": 5},
    }


def adapter_file(folder: Path, base: dict[str, str], name: str = "questions") -> Path:
    """An adapter whose update is large enough to be seen in every metric."""
    model = tiny_llama()
    attach.attach(model, Spec(rank=4, alpha=8.0, seed=len(name)))
    generator = torch.Generator().manual_seed(0)
    for values in attach.trainable(model).values():
        values.data.normal_(generator=generator)
    native.save(attach.extract(model, name=name, base=base), folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def by_hand(run: config.Run, adapter: Path | None) -> dict[str, dict[str, float]]:
    model, tokenizer = load_model(run.model), load_tokenizer(run.model)
    if adapter is not None:
        attach.attach(model, native.load(adapter))
    found = {}
    for name, task in run.tasks.items():
        examples = encode(read(task.test, task.template), tokenizer, run.train.max_length)
        subject = Subject(
            task=name,
            model=model,
            tokenizer=tokenizer,
            examples=tuple(examples),
            labels=task.labels,
            batch_size=32,
            max_length=40,
            max_new_tokens=5,
        )
        with torch.no_grad():
            found[name] = {"loss": loss.score(subject), "exact_match": exact_match.score(subject)}
            value = choice.score(subject)
        if value is not None:
            found[name]["choice"] = value
    return found


def assert_close(found: dict[str, dict[str, float]], expected: dict[str, dict[str, float]]) -> None:
    assert {task: list(values) for task, values in found.items()} == {
        task: list(values) for task, values in expected.items()
    }
    for task, values in found.items():
        assert values == pytest.approx(expected[task], rel=1e-5)


@pytest.mark.parametrize("method", ["concat", "linear", "ties"])
def test_adapters_in_memory_are_measured_one_after_another_as_those_in_files_are(
    tree: dict[str, Any], tmp_path: Path, method: str
) -> None:
    run = config.validate(tree)
    files = [adapter_file(tmp_path, identity(run.model), name) for name in ("one", "other")]
    adapters = [native.load(file) for file in files]
    given = [[(0.5, 0.5)], [(1.0, 0.0), (0.2, 0.9)], [(0.3, 0.3), (0.1, 0.7)], [(0.6, -0.2)]]
    with measuring(run) as values_of:
        for weights in given:
            found = values_of({str(pair): merge(adapters, method=method, weights=list(pair)) for pair in weights})
            for pair in weights:
                merge_files(files, tmp_path / "merged", method=method, weights=list(pair))
                assert_close(found[str(pair)], evaluate(run, tmp_path / "merged"))


def test_every_metric_that_applies_is_measured_on_every_task(tree: dict[str, Any]) -> None:
    run = config.validate(tree)
    found = evaluate(run, None)
    assert {task: list(values) for task, values in found.items()} == {
        "questions": ["loss", "exact_match"],
        "reviews": ["loss", "exact_match", "choice"],
    }
    assert_close(found, by_hand(run, None))
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_measured_on_its_base(tree: dict[str, Any], tmp_path: Path, dtype: str) -> None:
    tree["model"]["dtype"] = dtype
    run = config.validate(tree)
    adapter = adapter_file(tmp_path, identity(run.model))
    found = evaluate(run, adapter)
    assert abs(found["questions"]["loss"] - evaluate(run, None)["questions"]["loss"]) > 0.1
    expected = by_hand(run, adapter)
    if dtype == "bfloat16":  # sums of other batches round otherwise
        assert found["reviews"]["loss"] == pytest.approx(expected["reviews"]["loss"], rel=1e-2)
    else:
        assert_close(found, expected)


def test_an_adapter_of_tied_embeddings_is_measured_too(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["model"]["path"] = str(save(tiny_llama(tied=True), tmp_path / "tied"))
    run = config.validate(tree)
    model = load_model(run.model)
    attach.attach(model, Spec(rank=4, alpha=8.0, seed=3, targets=("lm_head", "q_proj")))
    for values in attach.trainable(model).values():
        values.data.fill_(0.1)
    adapter = tmp_path / "adapter.safetensors"
    native.save(attach.extract(model, name="t", base=identity(run.model)), adapter)
    assert_close(evaluate(run, adapter), by_hand(run, adapter))


def test_an_adapter_of_another_base_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    run = config.validate(tree)
    adapter = adapter_file(tmp_path, identity(run.model) | {"name": "other", "weights": "0123456789abcdef"})
    with pytest.raises(
        AdapterError, match=r"was trained on other \(weights 0123456789abcdef\), model.path is tiny \(weig"
    ):
        evaluate(run, adapter)


def test_an_adapter_that_does_not_know_its_base_is_measured_with_a_warning(
    tree: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = config.validate(tree)
    adapter = adapter_file(tmp_path, {})
    found = evaluate(run, adapter)
    assert "does not name its base model" in caplog.text
    assert found == evaluate(run, adapter_file(tmp_path, identity(run.model)))


def test_only_the_first_rows_are_measured_if_so_asked(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["evaluate"]["rows"] = 2
    found = evaluate(config.validate(tree), None)
    del tree["evaluate"]["rows"]
    for task in tree["tasks"].values():
        path = Path(task["test"])
        path.write_text("\n".join(path.read_text().split("\n")[:2]))
    assert found == evaluate(config.validate(tree), None)


def test_models_are_measured_on_the_tasks_that_are_asked_for(tree: dict[str, Any], tmp_path: Path) -> None:
    run = config.validate(tree)
    models = {"base": None, "adapter": adapter_file(tmp_path, identity(run.model))}
    whole = evaluate_all(run, models)
    some = evaluate_all(run, models, tasks={"adapter": ["reviews"]})
    assert some["base"] == whole["base"]
    assert some["adapter"].values == {"reviews": whole["adapter"].values["reviews"]}
    assert some["adapter"].intervals == {"reviews": whole["adapter"].intervals["reviews"]}
    assert some["adapter"].rows == {"reviews": whole["base"].rows["reviews"]}


def test_metrics_are_chosen_by_name_and_may_be_the_users_own(tree: dict[str, Any]) -> None:
    tree["evaluate"]["metrics"] = ["lori_dist.evaluation.loss", "loss"]
    found = evaluate(config.validate(tree), None)["questions"]
    assert list(found) == ["lori_dist.evaluation.loss", "loss"]
    assert len(set(found.values())) == 1


def test_texts_are_drawn_where_a_temperature_is_set(tree: dict[str, Any], tmp_path: Path) -> None:
    def texts(name: str, **settings: Any) -> list[str]:
        evaluate = {**tree["evaluate"], "metrics": ["exact_match"], **settings}
        (tmp_path / name).mkdir()
        store = Store.of_folder(tmp_path / name)
        evaluate_all(config.validate({**tree, "evaluate": evaluate}), {"base": None}, stores={"base": store})
        return [json.loads(line)["response"] for line in store.predictions.read_text().splitlines()]

    greedy, drawn = texts("greedy"), texts("drawn", temperature=5.0)
    assert drawn != greedy
    assert texts("again", temperature=5.0, batch_size=32) == drawn
    assert texts("other", temperature=5.0, seed=1) != drawn
    assert texts("likeliest", temperature=5.0, top_p=1e-6) == greedy
    with pytest.raises(ConfigError, match=r"^evaluate.top_p: is for tokens that are drawn; set evaluate.temperature"):
        texts("mistake", top_p=0.5)


def test_progress_is_told(tree: dict[str, Any]) -> None:
    told: list[tuple[str, int, int]] = []
    evaluate(config.validate(tree), None, progress=lambda *now: told.append(now))
    assert told[0] == ("loss of questions", 0, 6)
    assert [done for _, done, _ in told] == [0, 1, 2, 3, 4, 5]


def test_rows_that_cannot_be_used_are_all_named_before_anything_is_loaded(tree: dict[str, Any]) -> None:
    run = config.validate(tree)
    reviews = Path(tree["tasks"]["reviews"]["test"])
    reviews.write_text(reviews.read_text().replace('"bad"', '"Bad"'))
    Path(tree["tasks"]["questions"]["test"]).write_text("{}\n")
    with pytest.raises(ConfigError) as caught:
        evaluate(run, Path("no-adapter"))
    first, second, *_ = str(caught.value).split("\n")
    assert first.startswith("tasks.questions.test: ")
    assert "questions.jsonl:1: has no field 'prompt'; there are none" in first
    assert second == (
        f"tasks.reviews.test: {reviews}:2: its response is 'Bad', which is not one of the labels; "
        "wanted one of 'good', 'bad'. Did you mean 'bad'?"
    )


def test_rows_longer_than_the_model_are_refused(tree: dict[str, Any]) -> None:
    tree["train"]["max_length"] = 500
    Path(tree["tasks"]["questions"]["test"]).write_text(json.dumps({"prompt": "long " * 50, "response": "yes"}))
    with pytest.raises(ConfigError, match=r"^train.max_length: a row has 255 tokens, the model has 128 positions"):
        evaluate(config.validate(tree), None)
