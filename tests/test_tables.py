"""Files of rows, of every kind, give the same rows; what is wrong with one is told with its line."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lori_dist import tables
from lori_dist.errors import ConfigError

ROWS = [{"prompt": 'one, "two"\nthree', "response": "ä"}, {"prompt": "four", "response": "five"}]


def files(folder: Path) -> dict[str, str]:
    """Kind -> path of a file with ROWS."""
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "array.json").write_text(json.dumps(ROWS, indent=1))
    (folder / "table.csv").write_text('prompt,response\n"one, ""two""\nthree",ä\nfour,five\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "table.parquet")
    hub = folder / "hub"
    hub.mkdir()
    (hub / "train.jsonl").write_text((folder / "lines.jsonl").read_text())
    paths = {path.suffix: str(path) for path in folder.iterdir() if path.is_file()}
    return {**paths, "hub": f"hub:{hub}:train"}


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", "hub"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    assert [row for _, row in tables.read(files(tmp_path)[kind])] == ROWS


def problems(path: Path) -> dict[int, str]:
    return {number: str(row) for number, row in tables.read(str(path)) if isinstance(row, ConfigError)}


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.csv", b"x,y\n1,2\n3\n\n4,5,6\n", {3: "has 1 values; the header, in line 1, has 2", 5: "has 3 values"}),
        ("a.csv", b'x,y\n1,2\n"3"4,5\n6,7\n"8"9,0\n', {3: "is not CSV", 5: "is not CSV"}),
        ("a.csv", b"x,y\n1,\xff\n2,3\n\xfe,4\n", {2: "is not UTF-8", 4: "is not UTF-8"}),
        ("a.json", b'[\n{"x":\n 1},\n2,\n{"y": [NaN]}, null\n]', {4: "holds a number", 5: "holds null"}),
        ("a.json", b'[{"x": 1},\n {"x": NaN},\n {"x": 2}]', {2: "NaN is no JSON value"}),
        ("a.json", b'[{"x": 1}', {1: "is followed by no comma"}),
        ("a.json", b'[{"x": 1},\n{"x": }]', {2: "is not JSON"}),
        ("a.json", b'[{"x": 1}]\n]', {1: "the array by more"}),
        ("a.json", b'[{"x": "\n\xff"}]', {2: "is not UTF-8"}),
        ("a.json", b'{"x": 1}\n[]\n', {2: "holds a list"}),
    ],
)
def test_what_is_no_row_is_told_with_its_line(tmp_path: Path, name: str, text: bytes, wanted: dict[int, str]) -> None:
    path = tmp_path / name
    path.write_bytes(text)
    found = problems(path)
    assert list(found) == list(wanted)
    assert all(message in found[number] for number, message in wanted.items())


def test_a_csv_text_may_be_of_any_length(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"x\n{'long ' * 100_000}\n")
    assert [len(row["x"]) for _, row in tables.read(str(tmp_path / "a.csv"))] == [500_000]


@pytest.mark.parametrize("text", ["[]", " [ ] ", '[{"x": 1}]', '\n[{"x": 1}\n,\n{"x": 1.50}]\n'])
def test_an_array_is_read_as_json_reads_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert [row for _, row in tables.read(str(tmp_path / "a.json"))] == json.loads(text, parse_float=str)


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        list(tables.read(f"hub:{tmp_path / 'none'}:train"))
    with pytest.raises(ConfigError, match="wanted hub:NAME:SPLIT"):
        list(tables.read("hub:none"))


def test_what_needs_the_package_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find: Any = tables.importlib.util.find_spec
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    with pytest.raises(ConfigError, match=r"pip install 'lori_dist\[data\]'"):
        list(tables.read("hub:imdb:train"))
