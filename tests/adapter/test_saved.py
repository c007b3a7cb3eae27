"""Heads of several tasks over one base: of their own sizes, trained together, stored, attached."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lori_dist import (
    Adapter,
    AdapterError,
    Spec,
    attach,
    attach_several,
    dense,
    detach,
    extract,
    load_adapter,
    save_adapter,
    sparsify,
    trainable,
)
from lori_dist.adapter.splitting import split
from lori_dist.adapter.task_adapter import extract_formed
from lori_dist.adapter.task_column import routing_of
from lori_dist.formats import forms
from lori_dist.forms import FormChoice
from lori_dist.masks.magnitude import mask
from tests.models import tiny_classifier, tiny_llama

KINDS = {"bert": "classifier", "roberta": "classifier", "llama": "score"}
"""Models that classify, and what their heads are called. RoBERTa's has two layers, Llama's sees every token."""
IDS = torch.randint(3, 64, (6, 9), generator=torch.Generator().manual_seed(2))
ROWS = ["films", "topics", "topics", "plain", "films", "plain"]
LABELS = torch.tensor([1, 4, 0, 2, 0, 1])
SPECS = {name: Spec(rank=2, alpha=8.0, seed=seed) for seed, name in enumerate(dict.fromkeys(ROWS))}
NUM_LABELS = {"films": 2, "topics": 5, "plain": 3}
"""`plain` has a copy of the base's head."""
LEAST = torch.finfo(torch.float32).min


def head_of(kind: str, task: str) -> nn.Module:
    """A head that was drawn for this task."""
    made: nn.Module = getattr(tiny_classifier(kind, NUM_LABELS[task]), KINDS[kind])
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(NUM_LABELS[task])
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def together(kind: str) -> Any:
    model, name = tiny_classifier(kind), KINDS[kind]
    specs = SPECS | {"plain": replace(SPECS["plain"], modules_to_save=(name,))}
    routing = attach_several(model, specs, heads={task: {name: head_of(kind, task)} for task in ("films", "topics")})
    return model, routing


def alone(kind: str, task: str) -> Any:
    model, name = tiny_classifier(kind), KINDS[kind]
    if task != "plain":
        setattr(model, name, head_of(kind, task))
    attach(model, replace(SPECS[task], modules_to_save=(name,)))
    return model


def step(model: Any, parameters: Any, loss: Tensor) -> None:
    loss.backward()
    with torch.no_grad():
        for parameter in parameters:
            parameter.sub_(parameter.grad, alpha=0.05)
            parameter.grad = None


def train_together(model: Any, routing: Any) -> None:
    for _ in range(3):
        with routing.rows(ROWS):
            step(
                model,
                trainable(model).values(),
                nn.functional.cross_entropy(model(IDS).logits, LABELS, reduction="sum"),
            )


def train_alone(model: Any, task: str) -> None:
    mine = [place for place, name in enumerate(ROWS) if name == task]
    for _ in range(3):
        logits = model(IDS[mine]).logits
        step(model, trainable(model).values(), nn.functional.cross_entropy(logits, LABELS[mine], reduction="sum"))


def assert_close(found: Adapter, wanted: Adapter) -> None:
    for one, other in (
        (found.delta(module), wanted.delta(module)) for module in wanted.shapes if module in wanted.blocks[0].entries
    ):
        assert (one - other).norm() <= 5e-6 * other.norm()
    assert found.saved.keys() == wanted.saved.keys() and wanted.saved
    for name, tensor in wanted.saved.items():
        assert isinstance(tensor, Tensor)
        assert (found.saved[name] - tensor).norm() <= 5e-6 * tensor.norm()


@torch.no_grad()
def logits_of(model: Any, routing: Any, rows: list[str | None]) -> Tensor:
    with routing.rows(rows):
        logits: Tensor = model(IDS[: len(rows)]).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_unlike_sizes_are_what_each_is_alone(kind: str, tmp_path: Path) -> None:
    """Both phases, then files, then all of them at once for rows of each, and of none."""
    model, routing = together(kind)
    train_together(model, routing)
    sparsify(model, {task: mask(dense(model, task), density=0.3) for task in SPECS})
    train_together(model, routing)
    wanted = {}
    for task in SPECS:
        one = alone(kind, task)
        train_alone(one, task)
        sparsify(one, mask(dense(one), density=0.3))
        train_alone(one, task)
        adapter = extract(one, name=task)
        assert_close(extract(model, name=task), adapter)
        wanted[task] = one(IDS).logits.detach()
        assert {name for name in trainable(model, task) if ":saved" in name} == {
            f"{name}:saved@{task}" for name in adapter.saved
        }
        save_adapter(extract(model, name=task), tmp_path / task)
    trained = logits_of(model, routing, [*SPECS, None])
    detach(model)
    base = model(IDS).logits.detach()
    assert torch.equal(base, tiny_classifier(kind)(IDS).logits)

    routing = attach_several(model, {task: load_adapter(tmp_path / task) for task in SPECS})
    assert not any(parameter.requires_grad for parameter in model.parameters())
    found = logits_of(model, routing, [*SPECS, None])
    torch.testing.assert_close(found, trained, rtol=1e-5, atol=1e-6)
    assert found.shape == (4, 5)
    for row, (task, number) in enumerate(NUM_LABELS.items()):
        torch.testing.assert_close(found[row, :number], wanted[task][row], rtol=1e-4, atol=1e-5)
        assert (found[row, number:] == LEAST).all()
    torch.testing.assert_close(found[3, :3], base[3])


def test_a_head_of_another_kind_follows_the_model_s_mode() -> None:
    model = tiny_classifier("bert")
    heads = {"films": {"classifier": nn.Sequential(nn.Dropout(1.0), nn.Linear(32, 2))}}
    routing = attach_several(model, {"films": SPECS["films"]}, heads=heads)
    one, other = logits_of(model, routing, ["films", "films"])
    assert not torch.equal(one, other)
    model.train()
    one, other = logits_of(model, routing, ["films", "films"])  # of which nothing is left but the bias
    assert torch.equal(one, other)
    model.eval()
    adapter = extract(model, name="films")
    wanted = logits_of(model, routing, ["films"])
    detach(model)
    with pytest.raises(
        AdapterError, match=r"classifier\.1\.weight: the adapter has .* and the model none of that name"
    ):
        attach_several(model, {"films": adapter})
    routing = attach_several(model, {"films": adapter}, heads=heads)
    torch.testing.assert_close(logits_of(model, routing, ["films"]), wanted)


def test_tasks_of_a_form_have_heads_of_their_own(tmp_path: Path) -> None:
    """Rows of a task move its head alone; the file has all of them, and `split` gives each its own."""
    form = FormChoice(name="task_lora", options={"sharing": "a"}, tasks=("films", "topics"))
    heads = {task: {"classifier": head_of("bert", task)} for task in form.tasks}
    spec = Spec(rank=2, alpha=8.0, seed=0, form=form)
    model = tiny_classifier("bert")
    attach(model, spec, heads=heads)
    assert sum(":saved@" in name for name in trainable(model)) == 4
    step(model, trainable(model).values(), nn.functional.cross_entropy(model(IDS, task=["topics"] * 6).logits, LABELS))
    made = extract_formed(model)
    start = {f"classifier.{name}@films": one for name, one in heads["films"]["classifier"].named_parameters()}
    assert all(torch.equal(made.saved[name], one) for name, one in start.items())  # type: ignore[arg-type]
    assert not torch.equal(made.saved["classifier.weight@topics"], heads["topics"]["classifier"].weight)  # type: ignore[arg-type]
    routing = routing_of(model)
    wanted = logits_of(model, routing, ["films", "topics", None])
    assert wanted.shape == (3, 5) and (wanted[0, 2:] == LEAST).all()
    detach(model)
    assert torch.equal(model(IDS).logits, tiny_classifier("bert")(IDS).logits)

    forms.save(made, tmp_path / "tasks")
    again = forms.load(tmp_path / "tasks")
    attach(model, again)
    torch.testing.assert_close(logits_of(model, routing_of(model), ["films", "topics", None]), wanted)
    detach(model)
    ordinary = split(again)
    assert ordinary["films"].saved["classifier.weight"].shape == (2, 32)
    routing = attach_several(model, ordinary)
    torch.testing.assert_close(logits_of(model, routing, ["films", "topics", None]), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("specs", "heads", "message"),
    [
        ({}, {"film": {}}, r"^heads: unknown adapter 'film'; there are films, .*Did you mean 'films'"),
        (
            {},
            {"films": {"clasifier": nn.Linear(32, 2)}},
            r"^modules_to_save: 'clasifier' is not a module\. Did you mean",
        ),
        (
            {},
            {"films": {"classifier": nn.Linear(32, 2).half()}},
            r"^heads: weight of .* classifier is torch\.float16; ",
        ),
        ({}, {"films": {"classifier": nn.Identity()}}, r"^heads: the Identity that was given for classifier has no"),
        (
            {},
            {name: {"classifier": nn.BatchNorm1d(32)} for name in SPECS},
            r"^modules_to_save: classifier has a buffer \(running_mean\)",
        ),
        (
            {"films": {"modules_to_save": ("pooler",)}, "plain": {"modules_to_save": ("pooler.dense",)}},
            {},
            r"^modules_to_save: bert\.pooler\.dense is within bert\.pooler, which another adapter has",
        ),
        (
            {"films": {"modules_to_save": ("pooler",)}},
            {},
            r"^targets: bert\.pooler\.dense is also in modules_to_save; remove it",
        ),
    ],
)
def test_heads_that_cannot_be_are_refused(specs: dict[str, Any], heads: dict[str, Any], message: str) -> None:
    model = tiny_classifier("bert")
    names = set(dict(model.named_modules()))
    with pytest.raises(AdapterError, match=message):
        attach_several(model, {name: replace(one, **specs.get(name, {})) for name, one in SPECS.items()}, heads=heads)
    assert set(dict(model.named_modules())) == names


def test_heads_are_of_tasks_and_need_values() -> None:
    model = tiny_llama()
    with pytest.raises(AdapterError, match=r"^heads: are of tasks, and what is attached has one update for all rows"):
        attach(model, SPECS["films"], heads={"films": {"lm_head": nn.Linear(36, 4)}})
    with pytest.raises(AdapterError, match=r"^modules_to_save: lm_head is on the meta device, without values"):
        attach_several(tiny_llama().to("meta"), {"films": replace(SPECS["films"], modules_to_save=("lm_head",))})
