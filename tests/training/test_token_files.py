"""Rows become tokens once: the same tokens as ever, from a file that survives whatever happens to it."""

import contextlib
import json
import logging
import os
import queue
import resource
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
from transformers import PreTrainedTokenizerBase

from lori_dist import config, rows, tables
from lori_dist.__main__ import main
from lori_dist.config import Template
from lori_dist.errors import ConfigError, JobError
from lori_dist.jobs import plan
from lori_dist.training import job_rows, token_cache, tokenising
from lori_dist.training.data import encode, read
from lori_dist.training.job_rows import Steps
from lori_dist.training.token_cache import ENDING, token_file
from lori_dist.training.token_files import HEADER, TokenFile
from lori_dist.training.tokenising import Helper, Made, Work, made_of
from tests.models import tiny_llama
from tests.tokenizers import save, tiny_tokenizer
from tests.training.test_data import CHAT, TURNS
from tests.training.test_tokens import BYTE_LEVEL, JOINED

ROWS = [
    {"prompt": f"question {number % 7}{' and more' * (number % 5)}: ", "response": f"answer {number}"}
    for number in range(53)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and pieces that are small."""
    monkeypatch.setenv("LORI_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORI_CACHE_SIZE", raising=False)
    monkeypatch.setattr(tables, "AT_ONCE", 7)
    return tmp_path / "cache"


def lines(folder: Path, given: list[dict[str, Any]] = ROWS, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def work(path: Path | str, tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any) -> Work:
    source = rows.Source(path=str(path), template=settings.pop("template", Template()), where="tasks.t.train")
    return Work(
        **{
            "source": source,
            "tokenizer": tokenizer or tiny_tokenizer(),
            "max_length": 90,
            "keeps_texts": True,
            **settings,
        }
    )


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ENDING)


@pytest.mark.parametrize("tokenizer", [*JOINED.values(), *BYTE_LEVEL.values()], ids=[*JOINED, *BYTE_LEVEL])
def test_the_examples_of_a_file_are_those_of_its_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = lines(tmp_path)
    wanted = encode(read(str(path), Template()), tokenizer, 24)
    found = token_file(work(path, tokenizer, max_length=24))
    assert [*found] == wanted == [*token_file(work(path, tokenizer, max_length=24))]
    assert found.sums(20) == tuple(
        map(sum, zip(*((one.num_tokens, one.num_targets) for one in wanted[:20]), strict=True))
    )
    assert [found.num_tokens(row) for row in range(53)] == [one.num_tokens for one in wanted]
    assert found.whole.tolist() == [one.num_tokens for one in encode(read(str(path), Template()), tokenizer, 999)]
    assert found.notes["longest"] == max(one.num_tokens for one in wanted) == 24
    assert found.notes["largest"] == max(max(one.prompt_ids + one.response_ids) for one in wanted)
    assert len(files(tmp_path / "cache")) == 1
    [without] = [*token_file(work(path, tokenizer, max_length=24, keeps_texts=False))][:1]
    assert without == replace(wanted[0], prompt="", response="")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", "hub"])
def test_every_kind_of_file_has_the_same_tokens(tmp_path: Path, kind: str) -> None:
    wanted = encode([(row["prompt"], row["response"]) for row in ROWS], tiny_tokenizer(), 90)
    path: Path | str = lines(tmp_path)
    if kind == ".json":
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(ROWS))
    elif kind == ".csv":
        path = tmp_path / "rows.csv"
        path.write_text("prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in ROWS))
    elif kind == ".parquet":
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "hub":
        (tmp_path / "set").mkdir()
        lines(tmp_path / "set", name="train.jsonl")
        path = f"hub:{tmp_path / 'set'}:train"
    assert [*token_file(work(path))] == wanted
    if kind == "hub":
        lines(tmp_path / "set", ROWS[:5], name="train.jsonl")
        os.utime(tmp_path / "set" / "train.jsonl", (1e9, 1e9))
        assert [*token_file(work(path))] == wanted[:5]


def test_all_answers_of_a_chat_are_learned_from_a_file_too(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    template = Template(messages="chat", train_on="all")
    path = lines(tmp_path, [{"chat": TURNS[: 2 * (1 + number % 3)]} for number in range(20)])
    found = token_file(work(path, tokenizer, template=template, max_length=60))
    assert [*found] == encode(read(str(path), template, tokenizer=tokenizer), tokenizer, 60)
    assert any(one.read_only for one in found)


def test_a_file_is_read_by_safetensors(tmp_path: Path, cache: Path) -> None:
    found = token_file(work(lines(tmp_path)))
    arrays = safetensors.numpy.load_file(files(cache)[0])
    assert arrays["tokens"][: arrays["starts"][1]].tolist() == [*found[0].prompt_ids, *found[0].response_ids]


def test_another_process_makes_the_same(tmp_path: Path) -> None:
    own, idle = work(lines(tmp_path)), queue.SimpleQueue[Any]()
    helper = Helper(own, idle)
    try:
        assert idle.get(timeout=120) is helper
        first = 0
        for piece in tables.pieces(own.source.path):
            here, there = own(first, piece), helper(first, piece)
            for name in Made.__slots__:
                np.testing.assert_equal(getattr(there, name), getattr(here, name))
            first += len(piece)
        helper.process.kill()
        with pytest.raises(tokenising.Lost):
            helper(0, piece)
    finally:
        helper.close()


def test_pieces_come_in_their_order_whoever_makes_them(tmp_path: Path) -> None:
    own = work(lines(tmp_path, ROWS * 20))
    pieces = [*tables.pieces(own.source.path)]
    made = [*made_of(own, iter(pieces), 3)]
    assert [piece for piece, _ in made] == pieces
    found = np.concatenate([one.tokens for _, one in made])
    np.testing.assert_equal(found, np.concatenate([one.tokens for _, one in made_of(own, iter(pieces), 1)]))


def test_every_row_that_gives_no_tokens_is_named_by_its_line(tmp_path: Path, cache: Path) -> None:
    given: list[dict[str, Any]] = [
        *ROWS,
        {"prompt": "", "response": "a"},
        {"prompt": "a"},
        *ROWS,
        {"prompt": "", "response": "b"},
    ]
    path = lines(tmp_path, given)
    for chosen in (None, np.array([0, 3])):
        with pytest.raises(ConfigError) as caught:
            token_file(work(path, tiny_tokenizer(bos=False)), chosen=chosen)
        found = [line.removeprefix(f"tasks.t.train: {path}:") for line in str(caught.value).split("\n")]
        assert [line.partition(":")[0] for line in found] == ["54", "55", "109"]
        assert "gives no tokens" in found[0] and "has no field 'response'" in found[1]
    assert [*cache.iterdir()] == []


# --- what happens to files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 30, 100, HEADER + 9, -9, "empty", "short", "long", "notes"])
def test_a_damaged_file_is_noticed_and_made_again(
    tmp_path: Path, cache: Path, place: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = [*token_file(work(lines(tmp_path)))]
    [path] = files(cache)
    raw = bytearray(path.read_bytes())
    if place == "empty":
        raw = bytearray()
    elif place == "short":
        del raw[-100:]
    elif place == "long":
        raw += b"more"
    elif place == "notes":
        raw = raw.replace(b'\\"longest\\": ', b'\\"longest\\":1')
    else:
        raw[int(place)] ^= 64
    path.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        assert [*token_file(work(tmp_path / "rows.jsonl"))] == wanted
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [f"{path} is damaged"]
    caplog.clear()
    assert [*token_file(work(tmp_path / "rows.jsonl"))] == wanted
    assert not caplog.records


def test_what_a_killed_writer_leaves_is_taken_over(tmp_path: Path, cache: Path) -> None:
    wanted = [*token_file(work(lines(tmp_path)))]
    [path] = files(cache)
    path.rename(cache / f".{path.name}.partial")
    with (cache / f".{path.name}.partial").open("ab") as left:
        left.write(b"more than the whole" * 1000)
    assert [*token_file(work(tmp_path / "rows.jsonl"))] == wanted
    assert [*cache.iterdir()] == [path]


def test_of_two_at_once_one_writes_and_both_read(tmp_path: Path) -> None:
    path, written = lines(tmp_path), list[int]()
    begun, found = threading.Event(), dict[int, TokenFile]()

    def make(number: int) -> None:
        def show(what: str, num_rows: int, share: float | None) -> None:
            written.append(number)
            begun.set()

        found[number] = token_file(work(path), show=show)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(written)) == 1
    assert all([*one] == [*found[0]] for one in found.values())


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """A limit on the size of files, as a full disk has one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER + 1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path, cache: Path) -> None:
    one = work(lines(tmp_path))
    message = r"cache: cannot hold the tokens of .*lori cache --clear.*LORI_CACHE"
    with pytest.raises(JobError, match=message), small_files():
        token_file(one)
    assert [*cache.iterdir()] == []


def test_a_folder_that_cannot_be_written_is_an_error_unless_the_tokens_are_there(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORI_CACHE", str(lines(tmp_path) / "folder"))
    with pytest.raises(JobError, match=r"folder: cannot be written \(Not a directory\).*set LORI_CACHE"):
        token_file(work(tmp_path / "rows.jsonl"))
    monkeypatch.setenv("LORI_CACHE", str(cache))
    wanted = [*token_file(work(tmp_path / "rows.jsonl"))]
    monkeypatch.setattr(token_cache, "_problem", lambda folder, **options: "cannot be written")
    assert [*token_file(work(tmp_path / "rows.jsonl"))] == wanted


def test_a_home_that_cannot_be_written_has_a_folder_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert token_cache.cache_folder() == tmp_path / "home" / "lori_dist"
    monkeypatch.setenv("XDG_CACHE_HOME", str(lines(tmp_path) / "home"))
    monkeypatch.setattr(token_cache, "WITHOUT_HOME", (str(tmp_path),))
    assert token_cache.cache_folder() == tmp_path / f"lori-{os.getuid()}-cache"


def test_the_folder_keeps_what_was_used_last_and_what_is_in_use(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [lines(tmp_path, ROWS[number:], name=f"{number}.jsonl") for number in range(4)]
    used = token_file(work(paths[0]))
    size = files(cache)[0].stat().st_size
    for number, path in enumerate(paths[1:3]):
        token_file(work(path))
        os.utime(max(files(cache), key=lambda file: file.stat().st_mtime), (1e9 + number, 1e9 + number))
    monkeypatch.setenv("LORI_CACHE_SIZE", str(3 * size))
    token_file(work(paths[3]))
    assert {entry.notes["path"] for entry in token_cache.entries()} == {str(paths[place]) for place in (0, 2, 3)}
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert f"{cache}: 3 files" in shown and str(paths[2]) in shown and "53" in shown
    assert main(["cache", "--clear"]) == 0
    assert "2 deleted" in (shown := capsys.readouterr().out) and "1 is in use" in shown
    assert [entry.path for entry in token_cache.entries()] == [used.path]
    assert [*used] == encode([(row["prompt"], row["response"]) for row in ROWS], tiny_tokenizer(), 90)


@pytest.mark.parametrize(("given", "wanted"), [("20GB", 2 * 10**10), ("1.5 MiB", 1_500_000), ("123", 123)])
def test_the_size_of_the_folder_is_read(monkeypatch: pytest.MonkeyPatch, given: str, wanted: int) -> None:
    monkeypatch.setenv("LORI_CACHE_SIZE", given)
    assert token_cache.most_bytes() == wanted
    monkeypatch.setenv("LORI_CACHE_SIZE", f"{given} of bytes")
    with pytest.raises(
        ConfigError, match=r"LORI_CACHE_SIZE: got '.* of bytes'; wanted a number of bytes, such as 20GB"
    ):
        token_cache.most_bytes()


def test_tokens_are_made_again_where_anything_differs_that_they_depend_on(tmp_path: Path, cache: Path) -> None:
    path = lines(tmp_path)
    changed = [
        work(path),
        work(path, max_length=89),
        work(path, keeps_texts=False),
        work(path, template=Template(prompt="{prompt} ")),
        work(path, tiny_tokenizer(bos=False)),
        work(lines(tmp_path, ROWS[1:], name="other.jsonl")),
    ]
    for number, one in enumerate(changed, start=1):
        token_file(one)
        assert len(files(cache)) == number
    token_file(work(path.rename(tmp_path / "moved.jsonl")))
    assert len(files(cache)) == len(changed)


# --- rows of a job ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan_name", ["independent", "joint", "mixture"])
def test_only_rows_that_steps_take_become_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan_name: str
) -> None:
    monkeypatch.setattr(job_rows, "SMALL", 0)
    paths = [lines(tmp_path, ROWS * 4, name="one.jsonl"), lines(tmp_path, ROWS * 3, name="two.jsonl")]
    tasks: dict[str, Any] = {"one": {"train": str(paths[0]), "test": str(paths[0])}}
    if plan_name == "joint":
        tasks["two"] = {"train": str(paths[1]), "test": str(paths[1])}
    elif plan_name == "mixture":
        tasks["one"]["mixture"] = {str(paths[1]): 0.3}
    run = config.validate(
        {
            "name": "r",
            "output": str(tmp_path / "out"),
            "model": {"path": str(save(tiny_llama(), tmp_path / "model"))},
            "tasks": tasks,
            "multitask": "joint" if plan_name == "joint" else "independent",
            "train": {"steps": 3, "batch_size": 4, "max_length": 40},
        }
    )
    tokenizer = tiny_tokenizer()
    [planned] = [job for job in plan(run) if job.kind == "train"]
    some = job_rows.rows_of(run, planned, tokenizer)
    monkeypatch.setattr(job_rows, "SMALL", 10**9)
    whole = job_rows.rows_of(run, planned, tokenizer)
    steps = Steps.of(run, planned, [[count for _, count in of_task.parts] for of_task in whole])
    assert [len(of_task) for of_task in some] == [len(of_task) for of_task in whole]
    [phase] = job_rows.phases(run.train, 1.0, 100)
    taken = {pair for step in range(3) for pair in steps.rows(phase, step)}
    for which, of_task in enumerate(whole):
        for row, example in enumerate(of_task):
            if (which, row) in taken:
                assert some[which][row] == example
            else:
                assert some[which].num_tokens(row) == 0
    assert all(len(of_task) > 100 for of_task in whole)


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_large_file_is_never_in_memory_whole(tmp_path: Path, kind: str) -> None:
    import tracemalloc

    path = tmp_path / f"rows.{kind}"
    with path.open("w") as file:
        file.write("prompt,response\n" if kind == "csv" else '{"version": 1, "data": [\n')
        row = f"{'many words ' * 50},short\n" if kind == "csv" else json.dumps({"prompt": "many words " * 50}) + ",\n"
        for _ in range(20_000):
            file.write(row)
        file.write("a,b\n" if kind == "csv" else '{"prompt": "a"}]}\n')
    tracemalloc.start()
    try:
        assert sum(1 for _ in tables.read(str(path))) == 20_001
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 2
    finally:
        tracemalloc.stop()
