"""Tasks trained together over one copy of the base, beside one after another and side by side on the same ranks."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from lori_dist import config, plugin
from lori_dist.adapter import packed
from lori_dist.adapter.adapter import Spec
from lori_dist.adapter.attach import attach
from lori_dist.adapter.bases import features
from lori_dist.adapter.matching import match
from lori_dist.benchmarks._gang import start
from lori_dist.benchmarks._methods import make_llama
from lori_dist.benchmarks._timing import quotients
from lori_dist.benchmarks._traffic import Traffic, moment_bytes
from lori_dist.training import device
from lori_dist.training.data import Batch, Example, collate, together
from lori_dist.training.engine import Engine
from lori_dist.training.sequences import Share
from lori_dist.training.trainer import Gradients
from lori_dist.training.weights import skeleton
from lori_dist.training.world import World, from_environment

VOCABULARY = 2048
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {"fsdp": ("fsdp", {}), "zero3": ("deepspeed", {"stage": 3})}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings of every rank."""

    folder: Path
    engine: str
    rank: int
    rows: int
    length: int
    steps: int
    density: float
    dtype: str
    lengths: tuple[tuple[int, ...], ...] = ()
    """Tokens of each task's rows, to draw from; without them all rows have `length`."""


def run(
    *,
    tasks: list[int] = [2, 4, 8],  # noqa: B006  # read from the source, never shared
    engines: list[str] = ["fsdp", "zero3"],  # noqa: B006
    ranks: int = 2,
    rank: int = 16,
    density: float = 0.1,
    layers: int = 8,
    hidden: int = 768,
    rows: int = 1,
    length: int = 32,
    steps: int = 5,
    dtype: str = "",
    files: list[str] = [],  # noqa: B006
) -> dict[str, Any]:
    """Rows for a table, and ratios[engine][tasks], with the base sharded over the ranks.

    tasks: how many, one measurement each. rank, density: of the adapters. layers, hidden: of a Llama with random
    weights, 60 million at the defaults. rows, length: of a task's batch on a rank. steps: timed, in turns, after one
    that is not. files: JSON lines with `prompt` and `response`, or `text` and `label_name`, one file for each task,
    instead of `tasks`: rows are as long as those, a token for every four characters, and at most `length`.

    packed: all tasks in one gang. after: one task at a time in that gang. beside: a gang of as many ranks for each
    task, all at once on the same machine. tokens_per_second: of all tasks. gathered_bytes, reduced_bytes: of a step of
    all tasks, in the collectives of rank 0, each the whole tensor that is made or reduced. held_bytes: of rank 0
    between steps: values, moments, A and positions. ratios: `packed_over_after` and
    `packed_over_beside` of tokens/s; `memory_per_task`: what a further task adds to held_bytes over its values, moments
    and A there; with files, `useful`: the share of the packed batches that is no padding.
    """
    num_ranks, lengths = device.num_ranks(ranks), tuple(_lengths(Path(file), length) for file in files)
    tasks = [len(files)] if files else tasks
    table: list[dict[str, Any]] = []
    ratios: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_llama(folder / "base", layers, hidden, length, VOCABULARY)
        for engine in engines:
            setting = Setting(
                folder=folder,
                engine=engine,
                rank=rank,
                rows=rows,
                length=length,
                steps=steps,
                density=density,
                dtype=dtype or device.dtype_of_base(),
                lengths=lengths,
            )
            ratios[engine] = {}
            for number in tasks:
                found = _gangs(_in_turns, setting, num_ranks, 1, number)
                seconds = {"packed": found["packed"]["seconds"], "after": found["one"]["seconds"]}
                if not files:  # gangs whose rows differ in length would wait for each other
                    seconds["beside"] = _gangs(_one_alone, setting, num_ranks, number, 1)["one"]["seconds"]
                tokens = found["tokens"]
                for way, times in seconds.items():
                    counted = found["packed"] if way == "packed" else found["one"]
                    factor = 1 if way == "packed" else number
                    table.append(
                        {
                            "engine": engine,
                            "tasks": number,
                            "way": way,
                            "seconds": round(statistics.median(times), 4),
                            "tokens_per_second": round(tokens / statistics.median(times)),
                            "gathered_bytes": factor * counted["gathered"],
                            "reduced_bytes": factor * counted["reduced"],
                            "held_bytes": counted["held"] * (number if way == "beside" else 1),
                        }
                    )
                further = (found["packed"]["held"] - found["one"]["held"]) / (number - 1)
                beside = statistics.median(seconds.get("beside", [0.0])) / statistics.median(seconds["packed"])
                ratios[engine][str(number)] = {
                    **quotients("packed_over_after", seconds["after"], seconds["packed"]),
                    **({"useful": round(found["useful"], 3)} if files else {"packed_over_beside": round(beside, 3)}),
                    "memory_per_task": round(further / found["one"]["own"], 3),
                }
    return {"rows": table, "ratios": ratios}


# --- gangs -----------------------------------------------------------------------------------------------------------


def _gangs(function: Any, setting: Setting, num_ranks: int, num_gangs: int, *args: Any) -> dict[str, Any]:
    """The result of rank 0 of the first of several gangs that work at the same time."""
    result = setting.folder / "result.json"
    place = setting.folder / f"stores-{time.monotonic_ns()}"
    place.mkdir()
    start(_process, (function, setting, num_ranks, num_gangs, place, result, args), num_ranks * num_gangs)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def _process(
    number: int,
    function: Any,
    setting: Setting,
    num_ranks: int,
    num_gangs: int,
    place: Path,
    result: Path,
    args: tuple[Any, ...],
) -> None:
    gang, rank = divmod(number, num_ranks)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    store = f"file://{place / str(gang)}"
    options = device.group_settings(rank)
    dist.init_process_group(init_method=store, rank=rank, world_size=num_ranks, **options)
    # Gangs that work at once begin and end at once.
    meeting = dist.FileStore(str(place / "all"), num_ranks * num_gangs)  # type: ignore[attr-defined]
    found = function(setting, from_environment(), lambda: _meet(meeting, num_ranks * num_gangs), *args)
    if number == 0:
        result.write_text(json.dumps(found))
    _meet(meeting, num_ranks * num_gangs)
    dist.destroy_process_group()


def _meet(store: Any, count: int) -> None:
    """Returns once all processes have called it as often."""
    mine = store.add("arrived", 1)
    turn = (mine - 1) // count
    while store.add("arrived", 0) < (turn + 1) * count:
        time.sleep(0.001)


def _in_turns(setting: Setting, world: World, meet: Any, number: int) -> dict[str, Any]:
    """Steps of one task and of the pack, in turns."""
    one, several = Way(setting, world, 1, is_packed=False), Way(setting, world, number, is_packed=True)
    seconds: dict[str, list[float]] = {"one": [], "packed": []}
    useful, computed = torch.zeros(1), 0
    for way in (one, several):
        way.take(_rows(setting, number, world, 0))
        way.step()
    for step in range(setting.steps):
        rows = _rows(setting, number, world, step if setting.lengths else 0)
        useful += sum(example.num_tokens for of_task in rows for example in of_task)
        # Batches of tasks that are alike take equally long, so one of them stands for all.
        alone = [[of_task] for of_task in (rows if setting.lengths else rows[:1])]
        seconds["one"].append(sum(one.timed(of_task) for of_task in alone) * number / len(alone))
        seconds["packed"].append(several.timed(rows))
        computed += several.batch.input_ids.numel()
    share = float(useful) / computed
    dist.all_reduce(useful)
    return {
        "tokens": round(float(useful) / setting.steps),
        "useful": share,
        "one": {"seconds": seconds["one"], **one.counted()},
        "packed": {"seconds": seconds["packed"], **several.counted()},
    }


def _one_alone(setting: Setting, world: World, meet: Any, number: int) -> dict[str, Any]:
    """Steps of one task, while other gangs do theirs: of the slowest, as all are waited for."""
    way = Way(setting, world, number, is_packed=False)
    way.take(_rows(setting, number, world, 0))
    way.step()
    seconds = []
    for _ in range(setting.steps):
        meet()
        start = time.perf_counter()
        way.step()
        meet()
        seconds.append(time.perf_counter() - start)
    return {"one": {"seconds": seconds}}


class Way:
    """An engine with its batch."""

    batch: Batch
    num_targets: int

    def __init__(self, setting: Setting, world: World, number: int, *, is_packed: bool) -> None:
        model, weights = skeleton(config.Model(path=str(setting.folder / "base"), dtype=setting.dtype))  # type: ignore[arg-type]
        specs = {f"task{seed}": Spec(rank=setting.rank, alpha=32.0, seed=seed) for seed in range(number)}
        masks = {name: _masks(model, spec, setting.density) for name, spec in specs.items()}
        self.gradients = None
        if is_packed:
            routing = packed.attach(model, specs, masks)
            self.gradients = Gradients(routing=routing, world=world, max_norm=1.0)
        else:
            attach(model, specs["task0"], masks=masks["task0"])
        name, options = ENGINES[setting.engine]
        build = plugin.find("engines", name, "build", "engine").load()
        train = config.Train(steps=setting.steps, micro_batch_size=setting.rows, clip=None if is_packed else 1.0)
        self.engine: Engine = build(model, weights, train, world, state=None, **options)
        self.world, self.number, self.length = world, number, setting.length

    def take(self, rows: Sequence[Sequence[Example]]) -> None:
        """The rows of each task become the next batch."""
        counts = [self.world.size * sum(example.num_targets for example in of_task) for of_task in rows]
        if self.gradients is None:
            self.batch, self.num_targets = collate(rows[0], 0), counts[0]
        else:
            weights = torch.tensor([1 / count for count in counts])
            self.batch = together(dict(enumerate(rows)), weights, 0, Share.YES, self.length)
            self.num_targets = 1

    def step(self) -> None:
        lr: Any = {f"task{n}": 1e-4 for n in range(self.number)} if self.gradients is not None else 1e-4
        self.engine.step([self.batch], num_targets=self.num_targets, lr=lr, tasks=self.gradients)

    def timed(self, rows: Sequence[Sequence[Example]]) -> float:
        dist.barrier()
        start = time.perf_counter()
        self.take(rows)
        self.step()
        return time.perf_counter() - start

    def counted(self) -> dict[str, int]:
        with Traffic() as traffic:
            self.step()
        engine: Any = self.engine
        moments = moment_bytes(engine)
        values = sum(part.data.nbytes for part in engine.parts("values").values())
        a = sum(buffer.nbytes for name, buffer in engine.model.named_buffers() if ".projection" in name)
        places = sum(buffer.nbytes for name, buffer in engine.model.named_buffers() if name.endswith(PLACES))
        own = values + moments + a
        return {"gathered": traffic.gathered, "reduced": traffic.reduced, "held": own + places, "own": own}


PLACES = (".index", ".positions")


def _masks(model: torch.nn.Module, spec: Spec, density: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(spec.seed)
    shapes = {path: (features(base)[0], spec.rank) for path, base in match(model, spec.targets).items()}
    return {path: torch.rand(shape, generator=generator) < density for path, shape in shapes.items()}


def _rows(setting: Setting, number: int, world: World, step: int) -> list[list[Example]]:
    """A rank's rows of each task: random tokens, of which the second half is learned."""
    generator = torch.Generator().manual_seed(1000 * step + world.rank)

    def row(length: int) -> Example:
        ids: list[int] = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        half = length // 2
        return Example(prompt="", response="", prompt_ids=tuple(ids[:half]), response_ids=tuple(ids[half:]))

    if not setting.lengths:
        return [[row(setting.length) for _ in range(setting.rows)] for _ in range(number)]
    drawn = [torch.randint(len(of_task), (setting.rows,), generator=generator).tolist() for of_task in setting.lengths]
    return [[row(of_task[one]) for one in ones] for of_task, ones in zip(setting.lengths, drawn, strict=True)]


def _lengths(file: Path, most: int) -> tuple[int, ...]:
    """Tokens of the rows of a file, a token for every four characters."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = ("".join(str(row.get(key, "")) for key in ("prompt", "response", "text", "label_name")) for row in lines)
    return tuple(min(most, max(2, len(text) // 4)) for text in texts)
