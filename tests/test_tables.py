"""Files of rows, of every kind, give the same rows; what is wrong with one is named with its line."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lori_dist import config, rows, tables
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
        ("a.json", b'[{"x": 1},\n {"x": NaN},\n {"x": 2}]', {2: "NaN is not a JSON value"}),
        ("a.json", b'[{"x": 1}', {1: "is not followed by a comma"}),
        ("a.json", b'[{"x": 1},\n{"x": }]', {2: "is not JSON"}),
        ("a.json", b'[{"x": 1}]\n]', {1: "text follows the array"}),
        ("a.json", b'[{"x": "\n\xff"}]', {2: "is not UTF-8"}),
        ("a.json", b'{"x": 1}\n[]\n', {2: "holds a list"}),
        ("a.json", b'[{"x": 1, "x": 2},\n{"x": 3}]', {1: "has the field 'x' more than once"}),
        ("a.jsonl", b'{"x": 1}\n{"x": 1, "y": {"z": 0, "z": 0}}', {2: "has the field 'z' more than once"}),
        ("a.json", b'{"rows":\n [{"x": 1},\n{"x": NaN}]}\n', {3: "NaN is not a JSON value"}),
        ("a.csv", b"x,y,x\n1,2,3\n", {1: "has the column 'x' more than once; keep one"}),
        ("a.csv", b"\nx,y\n1,2\n", {1: "is empty; wanted the names of the columns"}),
        ("a.csv", b" , \nx,y\n", {1: "is empty; wanted the names of the columns"}),
    ],
)
def test_what_is_no_row_is_told_with_its_line(tmp_path: Path, name: str, text: bytes, wanted: dict[int, str]) -> None:
    path = tmp_path / name
    path.write_bytes(text)
    found = problems(path)
    assert list(found) == list(wanted)
    assert all(message in found[number] for number, message in wanted.items())


def test_values_of_a_tsv_file_are_parted_by_tabs(tmp_path: Path) -> None:
    (tmp_path / "a.TSV").write_bytes(b'prompt\tresponse\nNo, \xc3\xa4\t"one\ntwo"\n\n"3"4\tx\n')
    assert [row for _, row in tables.read(str(tmp_path / "a.TSV"))][:1] == [{"prompt": "No, ä", "response": "one\ntwo"}]
    [(line, problem)] = problems(tmp_path / "a.TSV").items()
    assert line == 5 and "put a text with quotes or tabs in quotes" in problem


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_an_empty_cell_counts_only_where_a_template_uses_its_column(tmp_path: Path, kind: str) -> None:
    path, separator = tmp_path / f"a.{kind}", {"csv": ",", "tsv": "\t"}[kind]
    path.write_text("id,prompt,response,note\n,a,b,\n2,c,d,NaN\n3,,f,\n".replace(",", separator))
    with pytest.raises(ConfigError) as caught:
        rows.read(str(path), config.Template())
    message = (
        f"{path}:4: field 'prompt' is empty, which in CSV is a missing value (JSON lines can have an empty text); "
    )
    assert str(caught.value) == f"{message}wanted text or a number"
    path.write_text(path.read_text().replace(f"3{separator}{separator}f", f"3{separator}e{separator}f"))
    assert rows.read(str(path), config.Template()) == [("a", "b"), ("c", "d"), ("e", "f")]


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


def compressors(content: bytes) -> dict[str, bytes]:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as file:
        file.write(content)
    packed = {".gz": gzip.compress(content), ".bz2": bz2.compress(content), ".xz": lzma.compress(content)}
    return {**packed, ".zst": stream.getvalue().to_pybytes()}


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("compressed", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_gives_its_rows_and_a_damaged_one_an_error(
    tmp_path: Path, kind: str, compressed: str
) -> None:
    content = compressors(Path(files(tmp_path)[kind]).read_bytes())[compressed]
    for name in (f"a{kind}{compressed}", f"A{kind}{compressed}".upper(), f"named{kind}"):
        (tmp_path / name).write_bytes(content)
        assert [row for _, row in tables.read(str(tmp_path / name))] == ROWS
    (tmp_path / f"cut{kind}").write_bytes(content[:-9])
    with pytest.raises(ConfigError, match=r"cut\.\w+: is a damaged compressed file \(.*\); make it again"):
        list(tables.read(str(tmp_path / f"cut{kind}")))


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_an_ending_may_be_in_capitals(tmp_path: Path, kind: str) -> None:
    path = Path(files(tmp_path)[kind])
    moved = path.rename(path.with_name(f"ROWS{kind.upper()}"))
    assert [row for _, row in tables.read(str(moved))] == ROWS


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_may_have_the_rows_under_its_only_key(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}, indent=indent))
    assert [row for _, row in tables.read(str(tmp_path / "a.json"))] == ROWS
    (tmp_path / "a.json").write_text(json.dumps({"version": [1], "rows": ROWS, "more": {"data": []}}, indent=indent))
    assert [row for _, row in tables.read(str(tmp_path / "a.json"))] == ROWS
    (tmp_path / "a.json").write_text(2 * (json.dumps({"data": ROWS}) + "\n"))  # JSON lines
    assert [row for _, row in tables.read(str(tmp_path / "a.json"))] == [{"data": ROWS}] * 2
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.json").write_text(json.dumps(chat, indent=indent))
    assert list(tables.read(str(tmp_path / "a.json"))) == [(1, chat)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04...", "is a ZIP archive, as an Excel file is one"),
        (b"PAR1...", "is a Parquet file; give it a name that ends in .parquet"),
        ('{"x": 1}'.encode("utf-16"), "is UTF-16; save the file as UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(tables.read(str(tmp_path / "a.jsonl")))
