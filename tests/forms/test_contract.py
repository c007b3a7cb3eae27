"""What holds for every form, found as the configuration finds it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lori_dist import attach, attach_several, describe, detach, formats, load_adapter, load_tasks, plugin
from lori_dist.__main__ import main
from lori_dist.adapter.attach import adapted, separate_tasks
from lori_dist.adapter.form_states import end_step, states_of
from lori_dist.adapter.formed import formed, penalties_of
from lori_dist.adapter.splitting import split
from lori_dist.adapter.task_adapter import TaskAdapter, extract_formed
from lori_dist.adapter.task_column import routing_of
from lori_dist.config import Train
from lori_dist.errors import AdapterError
from lori_dist.formats import forms
from lori_dist.integrations import peft
from lori_dist.training.engine import Engine, StepResult, collect, trained
from lori_dist.training.micro_batches import micro_batches
from lori_dist.training.trainer import checkpoint_activations
from lori_dist.training.world import World, from_environment
from tests.distributed import run_distributed
from tests.engines import oracle
from tests.engines.oracle import Course, _state, difference
from tests.forms.made import (
    CASES,
    DEPENDENT,
    PER_TASK,
    RATES,
    SEQUEL,
    STEPS,
    TASKS,
    WEIGHTS,
    Case,
    backward,
    batch_of,
    counts_of,
    fill,
    logits,
    rows_of_step,
)
from tests.models import on_meta, tiny_llama

TRAIN: Train = replace(oracle.TRAIN, eps=1e-4, clip=0.3)
"""With an eps far above the rounding of gradients: those of weights and transforms are small, and Adam would make much
of it."""
TOLERANCE = 5e-6


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=PER_TASK)
def per_task(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_every_file_has_a_case() -> None:
    assert {case.name for case in CASES.values()} == set(plugin.names("forms"))


def test_it_names_its_paper_and_refuses_what_it_does_not_know(case: Case) -> None:
    method = plugin.find("forms", case.name, "form", "adapter.form")
    assert "Source:" in str(method.load().__doc__)
    with pytest.raises(AdapterError, match=rf"form.colour: {case.name} has no such option"):
        replace(case.choice(), options={"colour": "red"}).form(rank=4, alpha=8.0, trains_a=False)


def test_it_changes_nothing_at_the_start(case: Case) -> None:
    base = logits(tiny_llama())
    for task in TASKS:
        torch.testing.assert_close(logits(case.model(), task), base, rtol=1e-6, atol=1e-6)


def test_the_forward_pass_is_that_of_its_factors(case: Case) -> None:
    if case.choice().is_dependent:
        pytest.skip("it has none")
    model = fill(case.model())
    of_tasks = split(extract_formed(model))
    for path, delta in formed(adapted(model)).items():
        x = torch.randn(6, delta.in_features, generator=torch.Generator().manual_seed(1))
        y = torch.zeros(6, delta.out_features)
        for task in TASKS:
            if delta.routing is not None:
                delta.routing.only(task)
            wanted = x @ of_tasks[task].delta(path).t()
            torch.testing.assert_close(delta(x, y).detach(), wanted, rtol=1e-4, atol=1e-5)


def test_rows_of_several_tasks_meet_their_own_updates_and_none_meets_the_base(per_task: Case) -> None:
    model = fill(per_task.model())
    base, alone = logits(tiny_llama()), {task: logits(model, task) for task in TASKS}
    routing = routing_of(model)
    assert routing is not None
    with routing.rows(["three", None, "one"]):
        mixed = logits(model)
    for row, wanted in enumerate((alone["three"], base, alone["one"])):
        torch.testing.assert_close(mixed[row], wanted[row], rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match="unknown adapter 'four'"), routing.rows(["four"]):
        pass


def test_a_column_of_the_batch_names_the_tasks(per_task: Case) -> None:
    model = fill(per_task.model())
    routing, ids = routing_of(model), torch.tensor([[5, 6, 7], [8, 9, 3], [4, 4, 6]])
    assert routing is not None
    with routing.rows(["three", "one", "two"]):
        wanted = model(ids).logits
    assert torch.equal(model(ids, task=torch.tensor([2, 0, 1])).logits, wanted)
    assert torch.equal(model(ids, task=["three", "one", "two"]).logits, wanted)
    with pytest.raises(AdapterError, match="task: the batch does not say which task its rows are of"):
        model(ids)
    with pytest.raises(AdapterError, match="task: unknown task 3; there are one, two, three"):
        model(ids, task=torch.tensor([3, 0, 1]))
    detach(model)
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)


def test_the_trainer_of_transformers_passes_the_column_on(tmp_path: Path) -> None:
    model = CASES["task_lora, a"].model()
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "task": number % 2 * 2} for number in range(12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = [
        sum(float(adapter.delta(module).norm()) for module in adapter.shapes)
        for adapter in split(extract_formed(model)).values()
    ]
    assert changed[0] > 0 and changed[1] == 0 and changed[2] > 0  # there were no rows of the second


def test_split_gives_ordinary_adapters(per_task: Case, tmp_path: Path) -> None:
    model = fill(per_task.model())
    of_tasks = split(extract_formed(model))
    wanted = {task: logits(model, task) for task in TASKS}
    together = tiny_llama()
    routing = attach_several(together, of_tasks)
    for task, adapter in of_tasks.items():
        alone = tiny_llama()
        attach(alone, adapter)
        torch.testing.assert_close(logits(alone), wanted[task], rtol=1e-4, atol=1e-5)
        with routing.rows([task] * 3):
            torch.testing.assert_close(logits(together), wanted[task], rtol=1e-4, atol=1e-5)
        [block] = adapter.blocks
        assert (block.seed is None) == (per_task.a == "trained")
    one = TASKS[1]
    tiny_llama().save_pretrained(tmp_path / "base")
    peft.export(of_tasks[one], tmp_path / "peft", base_model_name=str(tmp_path / "base"))
    again = tiny_llama()
    attach(again, formats.load(tmp_path / "peft"))
    torch.testing.assert_close(logits(again), wanted[one], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("title", CASES)
def test_it_is_attached_again_as_it_was(title: str, tmp_path: Path) -> None:
    model = fill(CASES[title].model())
    forms.save(extract_formed(model), tmp_path / "adapter.safetensors")
    again = tiny_llama()
    attach(again, forms.load(tmp_path / "adapter.safetensors"))
    for task in TASKS:
        assert torch.equal(logits(again, task), logits(model, task))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    detach(again)
    assert torch.equal(logits(again), logits(tiny_llama()))


@pytest.mark.parametrize("title", DEPENDENT)
def test_what_depends_on_the_input_is_no_adapter_with_one_sentence(title: str, tmp_path: Path) -> None:
    made, path = extract_formed(fill(CASES[title].model())), tmp_path / "adapter.safetensors"
    forms.save(made, path)
    said = f"the update of the form {made.form.name} depends on the input, so it cannot be folded, exported or merged"
    for function in (
        lambda: split(made),
        lambda: load_adapter(path),
        lambda: load_tasks(path),
        lambda: formats.load(path),
    ):
        with pytest.raises(AdapterError, match=said):
            function()  # type: ignore[no-untyped-call]
    assert "cannot be folded, exported or merged" in describe.adapter_file(path)


def test_a_file_gives_back_what_was_written(per_task: Case, tmp_path: Path) -> None:
    made, path = extract_formed(fill(per_task.model())), tmp_path / "adapter.safetensors"
    forms.save(made, path)
    again = forms.load(path)
    forms.save(again, tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert (again.kept, again.total, again.form) == (made.kept, made.total, made.form)
    for task, adapter in split(made).items():
        for found in (load_tasks(path)[task], formats.load(Path(f"{path}@{task}"))):
            assert all(torch.equal(found.delta(module), adapter.delta(module)) for module in adapter.shapes)
    with pytest.raises(
        AdapterError, match=r"adapter\.safetensors: has an update for each of the tasks one, two, three"
    ):
        load_adapter(path)
    with pytest.raises(AdapterError, match=r"has no task 'tow'; there are one, two, three. Did you mean 'two'\?"):
        formats.load(Path(f"{path}@tow"))
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(AdapterError, match="damaged"):
        forms.load(path)


def test_commands_take_one_task_of_a_file_or_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, path = extract_formed(fill(CASES["mtl_lora, diagonal"].model())), tmp_path / "adapter.safetensors"
    forms.save(made, path)
    of_tasks, merged = split(made), tmp_path / "merged.safetensors"
    assert main(["export", str(path), str(tmp_path / "out"), "--format", "tasks"]) == 0
    for task, adapter in of_tasks.items():
        found = load_adapter(tmp_path / "out" / f"{task}.safetensors")
        assert all(torch.equal(found.delta(module), adapter.delta(module)) for module in adapter.shapes)
    assert main(["merge", str(merged), f"{path}@one", f"{path}@three", "--method", "linear"]) == 0
    for module in made.shapes:
        wanted = (of_tasks["one"].delta(module) + of_tasks["three"].delta(module)) / 2
        torch.testing.assert_close(load_adapter(merged).delta(module), wanted, rtol=1e-5, atol=1e-6)
    capsys.readouterr()
    assert main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert f"keeps {made.kept:,} of {made.total:,} entries that are trained" in shown
    assert "form: mtl_lora (transform diagonal, heads 2, temperature 0.7)" in shown
    assert "tasks: one, two, three" in shown
    assert main(["show", f"{path}@two"]) == 0
    assert "sparse B on a seed" in capsys.readouterr().out
    assert main(["export", str(path), str(tmp_path / "peft"), "--format", "peft", "--base", "none"]) == 1
    assert "add @TASK to the path for the adapter of one of them" in capsys.readouterr().err


def test_masks_hold_for_what_is_sparse(case: Case) -> None:
    model = fill(case.model())
    masks, found = case.masks(tiny_llama()), extract_formed(model)
    for module in found.shapes:
        for name, entry in found.sizes(module).entries.items():
            entries = found.tensors[module].get(name)
            if masks is not None and entry.sparse:
                kept = int(masks[f"{module}:{name}"].sum())
                places = 1 if len(entry.shape) == 2 else entry.shape[0]
                assert (0 if entries is None else entries.kept) == kept * places
    first = next(iter(found.shapes))
    if masks is not None:
        assert found.tensors[first] == {}  # nothing of B is kept there, so nothing is trained there
    if masks is not None:
        key = next(iter(masks))
        for wrong, message in (
            ({key: masks[key][..., :1]}, "the mask of"),
            ({**masks, "nowhere:b": masks[key]}, "a mask for nowhere:b"),
            ({name: mask for name, mask in masks.items() if name != key}, "no mask for"),
        ):
            with pytest.raises(AdapterError, match=message):
                attach(tiny_llama(), case.spec(), masks=wrong)


def test_gradients_of_tasks_from_one_pass_are_those_of_a_pass_for_each(case: Case) -> None:
    """In float64, but for the loss, as rounding would hide what is wrong."""
    if case.name == "thanora":
        with pytest.raises(AdapterError, match="thanora has a penalty, which is not the gradient of a task"):
            separate_tasks(case.model(), len(TASKS))
        case = replace(case, options={"weight": 0.0})
    model = fill(case.model()).double()
    wanted: dict[str, list[Tensor]] = {}
    for task in range(len(TASKS)):
        backward(model, 0, [task])
        for name, parameter in trained(model).items():
            assert parameter.grad is not None  # also of tasks without rows, or engines would mix gradients
            wanted.setdefault(name, []).append(parameter.grad)
            parameter.grad = None
    gradients = separate_tasks(model, len(TASKS))
    batch = batch_of(rows_of_step(0), counts_of(0))
    gradients.begin(batch.tasks)
    backward(model, 0)
    assert all(parameter.grad is None for parameter in trained(model).values())
    assert gradients.sums.keys() == wanted.keys()
    for name, of_tasks in wanted.items():
        torch.testing.assert_close(gradients.sums[name], torch.stack(of_tasks), rtol=1e-6, atol=1e-9)


def test_what_it_has_no_answer_for_is_refused(per_task: Case) -> None:
    model = per_task.model()
    from lori_dist import extract, fold, sparsify

    for function in (lambda: fold(model), lambda: extract(model, name="one"), lambda: sparsify(model, {})):
        with pytest.raises(AdapterError, match=f"the model trains the form {per_task.name}"):
            function()  # type: ignore[no-untyped-call]
    with pytest.raises(AdapterError, match="recomputed is for the form lori"):
        attach(tiny_llama(), replace(per_task.spec(), projection="recomputed"))
    with pytest.raises(AdapterError, match="trains tasks together, as one Spec"):
        attach_several(tiny_llama(), {"one": per_task.spec()})


def test_a_device_and_a_dtype_change_neither_a_nor_values(case: Case) -> None:
    model = fill(case.model())
    before = extract_formed(model)
    after = extract_formed(model.to(torch.bfloat16))
    for module, tensors in before.tensors.items():
        for name, entries in tensors.items():
            assert torch.equal(entries.values, after.tensors[module][name].values)
    assert before.checksums == after.checksums


# --- engines ---------------------------------------------------------------------------------------------------------

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "fsdp, base replicated": ("fsdp", {"base": "replicated"}),
    "fsdp, hybrid": ("fsdp", {"replicas": 2}),
    "deepspeed-1": ("deepspeed", {"stage": 1}),
    "deepspeed-2": ("deepspeed", {"stage": 2}),
    "deepspeed-3": ("deepspeed", {"stage": 3}),
}
QUICK = ("ddp", "fsdp", "deepspeed-2", "deepspeed-3")
EACH = (
    *("lori", "task_lora, none", "task_lora, extra, A trained", "mtl_lora", "thanora", "hydra"),
    *("smora", "mixlora", "dac, after other tasks"),
)
"""A case of every form; the others are trained in slow tests."""
RUNS = [
    *(pytest.param(name, 2, EACH, id=f"{name} on 2") for name in QUICK),
    *(
        pytest.param(name, size, tuple(CASES | SEQUEL), id=f"{name} on {size}, all", marks=pytest.mark.slow)
        for name, size in (
            *((name, 1) for name in ENGINES if name != "fsdp, hybrid"),
            *((name, 2) for name in ENGINES if name != "fsdp, hybrid"),
            ("fsdp, hybrid", 4),
            ("ddp", 3),
        )
    ),
]


def one_process(case: Case) -> Course:
    model = case.model()
    parameters: dict[str, nn.Parameter] = trained(model)
    optimizer = torch.optim.AdamW(
        parameters.values(), betas=TRAIN.betas, eps=TRAIN.eps, weight_decay=TRAIN.weight_decay, foreach=False
    )
    results = []
    for step in range(len(STEPS)):
        optimizer.param_groups[0]["lr"] = RATES[step]
        losses = backward(model, step)
        norm = nn.utils.clip_grad_norm_(parameters.values(), TRAIN.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        end_step(model)
        of_tasks = tuple(losses.tolist())
        results.append(StepResult(loss=sum(of_tasks), grad_norm=norm.item(), task_losses=of_tasks))
    state = _state(len(STEPS), parameters, optimizer)
    return Course(results=tuple(results), state=replace(state, notes=states_of(model)))


def do(engine: Engine, world: World) -> Course:
    """The same steps with an engine, on this rank's rows, two at a time."""
    results = list[StepResult]()
    for step in range(len(STEPS)):
        chosen, counts = rows_of_step(step), counts_of(step)
        pieces = micro_batches(range(len(chosen)), world.rank, world.size, 2)
        batches = [batch_of([chosen[row] for row in piece], counts) for piece in pieces]
        if (penalties := penalties_of(engine.model)) is not None:
            penalties.num_micro_batches = len(batches)
        results.append(engine.step(batches, num_targets=1, lr=RATES[step]))
        end_step(engine.model, dist.all_reduce if world.size > 1 else None)
    state = replace(collect(engine, world), notes=states_of(engine.model))
    return Course(results=tuple(results), state=state)


def train_all(name: str, titles: tuple[str, ...]) -> dict[str, Course]:
    world = from_environment()
    engine, options = ENGINES[name]
    build = plugin.find("engines", engine, "build", "train.engine").load()
    found = {}
    for title in titles:
        model, weights = on_meta((CASES | SEQUEL)[title].model())
        if title in ("mtl_lora", "smora", "dac, after other tasks"):
            checkpoint_activations(model)
        made = build(model, weights, TRAIN, world, state=None, **options)
        found[title] = do(made, world)
        made.close()
    return found


@pytest.fixture(scope="module")
def references() -> dict[str, Course]:
    return {title: one_process(case) for title, case in (CASES | SEQUEL).items()}


@pytest.mark.parametrize(("name", "size", "titles"), RUNS)
def test_weights_are_those_of_one_process(
    references: dict[str, Course], name: str, size: int, titles: tuple[str, ...]
) -> None:
    """Also where no rank has rows of all tasks."""
    found = run_distributed(train_all, name, titles, world_size=size)[0]
    differences = {title: difference(found[title].state, references[title].state) for title in titles}
    assert max(differences.values()) < TOLERANCE, differences
    for title in titles:
        assert found[title].state.notes == references[title].state.notes, title  # counts are of all ranks
        for ours, theirs in zip(found[title].results, references[title].results, strict=True):
            assert ours.task_losses == pytest.approx(theirs.task_losses, rel=1e-5), title
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5), title


def test_a_split_of_two_ranks_misses_tasks() -> None:
    """What the test above rests on."""
    held = [
        {task for piece in micro_batches(range(2), rank, 2, 2) for task in (rows_of_step(1)[row][1] for row in piece)}
        for rank in range(2)
    ]
    assert held == [{0}, {2}]
    assert sum(WEIGHTS) > 0
    assert isinstance(extract_formed(CASES["mtl_lora"].model()), TaskAdapter)
