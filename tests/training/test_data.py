import itertools
import json
import logging
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lori_dist import config
from lori_dist.config import Template
from lori_dist.errors import ConfigError
from lori_dist.jobs import train_job
from lori_dist.training.data import (
    IGNORED,
    Example,
    collate,
    encode,
    mixed_rows_of_step,
    num_steps,
    packed,
    pad_id,
    read,
    rows_of_step,
)
from lori_dist.training.loss import loss_sum, num_targets
from lori_dist.training.micro_batches import micro_batches
from tests.engines.oracle import examples
from tests.models import tiny
from tests.tokenizers import tiny_tokenizer

BOS, EOS = 1, 2


def rows_file(folder: Path, text: str | bytes) -> str:
    path = folder / "rows.jsonl"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


# --- files -----------------------------------------------------------------------------------------------------------


def test_rows_of_prompt_and_response_need_no_template(tmp_path: Path) -> None:
    path = rows_file(tmp_path, '{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d", "more": []}\n')
    assert read(path, Template()) == [("a", "b"), ("c", "d")]


def test_classification_rows_read_by_the_template_alone(tmp_path: Path) -> None:
    path = rows_file(tmp_path, '{"text": "it rains", "text_pair": "it is wet", "label": 0, "label_name": "yes"}')
    template = Template(prompt="{text}?\n{text_pair}: {{{label}}} ", response="{label_name}")
    assert read(path, template) == [("it rains?\nit is wet: {0} ", "yes")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("3", "3"),
        ("2.50", "2.50"),
        ("-1", "-1"),
        ("1e500", "1e500"),
        ("true", "true"),
        ("false", "false"),
        ('"x"', "x"),
    ],
)
def test_a_value_reads_as_it_stands_in_the_file(tmp_path: Path, value: str, text: str) -> None:
    path = rows_file(tmp_path, f'{{"prompt": "a", "response": {value}}}')
    assert read(path, Template()) == [("a", text)]


def test_what_a_row_holds_is_never_a_template(tmp_path: Path) -> None:
    path = rows_file(tmp_path, '{"prompt": "{response.__class__} {0} }{", "response": "{prompt}"}')
    assert read(path, Template()) == [("{response.__class__} {0} }{", "{prompt}")]


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{0}", "{a b}"])
def test_a_template_takes_names_of_fields_and_nothing_else(tmp_path: Path, template: str) -> None:
    path = rows_file(tmp_path, '{"a": "x"}')
    with pytest.raises(ConfigError, match=r"^tasks.t.test: .* has more than the name of a field in braces; write"):
        read(path, Template(prompt=template, response="{a}"), where="tasks.t.test")


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    """Other separators are legal inside a JSON string, and `str.splitlines` would cut there."""
    text = "a\u2028b\u2029c\x85d"
    path = rows_file(tmp_path, json.dumps({"prompt": text, "response": "r"}, ensure_ascii=False) + "\n")
    assert read(path, Template()) == [(text, "r")]


def test_marks_of_other_systems_and_blank_lines_are_no_part_of_a_row(tmp_path: Path) -> None:
    path = rows_file(
        tmp_path, b'\xef\xbb\xbf{"prompt": "a", "response": "b"}\r\n\r\n  \n{"prompt": "\xc3\xa9", "response": "d"}'
    )
    assert read(path, Template()) == [("a", "b"), ("é", "d")]


@given(st.lists(st.tuples(st.text(), st.text(min_size=1).filter(str.strip)), min_size=1), st.booleans())
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], ascii: bool
) -> None:
    lines = [json.dumps({"prompt": prompt, "response": response}, ensure_ascii=ascii) for prompt, response in rows]
    path = rows_file(tmp_path_factory.mktemp("rows"), "\n".join(lines))
    assert read(path, Template()) == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense", "is not JSON (Expecting value"),
        (b'{"prompt": "a"', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"9" * 5_000, "is not JSON"),
        (b"[1, 2]", "holds a list; wanted a JSON object"),
        (b'"text"', "holds text; wanted a JSON object"),
        (b"null", "holds null; wanted a JSON object"),
        (b'{"prompt": NaN, "response": "b"}', "is not JSON (NaN is not a JSON value; a missing value"),
        (b'{"prompt": "a", "response": -Infinity}', "is not JSON (-Infinity is not a JSON value"),
        (b"17", "holds a number; wanted a JSON object"),
        (b'{"prompt": "a", "reponse": "b"}', "has no field 'response'; there are prompt, reponse"),
        (b"{}", "has no field 'prompt'; there are none"),
        (b'{"prompt": "a", "response": ""}', "its response is empty; wanted text to learn"),
        (b'{"prompt": "a", "response": " \\n"}', "its response is empty; wanted text to learn"),
        (b'{"prompt": null, "response": "b"}', "field 'prompt' is null; wanted text or a number"),
        (b'{"prompt": ["a"], "response": "b"}', "field 'prompt' is a list; wanted text or a number"),
        (b'{"prompt": {"a": 1}, "response": "b"}', "field 'prompt' is an object; wanted text or a number"),
        (b'{"prompt": "\\ud800", "response": "b"}', "field 'prompt' has half of a surrogate pair"),
        (b'{"prompt": "\xff", "response": "b"}', "byte 13 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = rows_file(tmp_path, b'{"prompt": "a", "response": "b"}\n\n' + line + b'\n{"prompt": "c", "response": "d"}\n')
    with pytest.raises(ConfigError) as caught:
        read(path, Template(), where="tasks.t.train")
    assert str(caught.value).startswith(f"tasks.t.train: {path}:3: {message}")
    assert "\n" not in str(caught.value)


def test_all_bad_rows_are_named_at_once_and_a_flood_is_counted(tmp_path: Path) -> None:
    good = '{"prompt": "a", "response": "b"}\n'
    path = rows_file(tmp_path, (good + "bad\n") * 3)
    with pytest.raises(ConfigError) as caught:
        read(path, Template())
    assert [line.split(": ")[0] for line in str(caught.value).split("\n")] == [
        f"{path}:{number}" for number in (2, 4, 6)
    ]

    path = rows_file(tmp_path, (good + "bad\n") * 300)
    with pytest.raises(ConfigError) as caught:
        read(path, Template(), where="tasks.t.train")
    lines = str(caught.value).split("\n")
    assert len(lines) == 21
    others = ", ".join(map(str, range(42, 601, 2)))
    assert lines[-1] == f"tasks.t.train: {path}: 280 more of 600 rows cannot be used, in lines {others}"

    path = rows_file(tmp_path, good + "bad\n" * 1000)
    with pytest.raises(ConfigError, match=r"980 more of 1001 rows cannot be used, in lines 22-1001$"):
        read(path, Template())


@pytest.mark.parametrize("text", ["", "\n \n\r\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_refused(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"rows.jsonl: holds no rows; wanted one JSON object a line"):
        read(rows_file(tmp_path, text), Template())


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tasks.t.train: .*none.jsonl cannot be read \(No such file"):
        read(str(tmp_path / "none.jsonl"), Template(), where="tasks.t.train")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(str(tmp_path), Template())


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_the_response_follows_the_prompt_and_ends_with_eos(bos: bool, eos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos, eos=eos)
    [example] = encode([("ab", "cd")], tokenizer, 16)
    assert example == Example(
        prompt="ab", response="cd", prompt_ids=(*((BOS,) if bos else ()), 4, 5), response_ids=(6, 7, EOS)
    )


def test_an_eos_that_the_prompt_itself_ends_with_stays() -> None:
    for eos in (False, True):
        [example] = encode([("ab</s>", "c")], tiny_tokenizer(eos=eos), 16)
        assert example.prompt_ids == (BOS, 4, 5, EOS)


def test_a_row_that_is_too_long_loses_the_beginning_of_its_prompt() -> None:
    rows = [("abcdef", "xyz")]
    [example] = encode(rows, tiny_tokenizer(bos=False), 8)
    assert tiny_tokenizer().decode(example.prompt_ids + example.response_ids) == "cdefxyz</s>"
    [example] = encode(rows, tiny_tokenizer(bos=True), 8)
    assert tiny_tokenizer().decode(example.prompt_ids + example.response_ids) == "<s>defxyz</s>"
    assert (example.prompt, example.response) == rows[0]


def test_a_response_that_is_too_long_loses_its_end_and_eos() -> None:
    [example] = encode([("abc", "uvwxyz")], tiny_tokenizer(bos=False), 5)
    assert tiny_tokenizer().decode(example.prompt_ids + example.response_ids) == "cuvwx"
    [example] = encode([("abc", "uvwxyz")], tiny_tokenizer(bos=True), 5)
    assert tiny_tokenizer().decode(example.prompt_ids + example.response_ids) == "<s>uvwx"


@given(
    rows=st.lists(st.tuples(st.text("abc", max_size=12), st.text("xyz", min_size=1, max_size=12)), min_size=1),
    max_length=st.integers(2, 30),
)
def test_every_row_fits_and_has_a_prompt_and_a_response(rows: list[tuple[str, str]], max_length: int) -> None:
    tokenizer = tiny_tokenizer()
    examples = encode(rows, tokenizer, max_length)
    assert [(example.prompt, example.response) for example in examples] == rows
    for example, (prompt, response) in zip(examples, rows, strict=True):
        assert 2 <= len(example.prompt_ids + example.response_ids) <= max_length
        assert example.prompt_ids[0] == BOS
        assert prompt.endswith(tokenizer.decode(example.prompt_ids[1:]))
        assert f"{response}</s>".startswith(tokenizer.decode(example.response_ids))
        assert example.response_ids
        fits = len(prompt) + len(response) + 2 <= max_length
        whole = (len(example.prompt_ids), len(example.response_ids)) == (len(prompt) + 1, len(response) + 1)
        assert whole == fits


def test_what_was_cut_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [("abcdef", "x"), ("a", "x"), ("ab", "xyzxyz"), ("abcdef", "xyzxyz")]
    with caplog.at_level(logging.INFO):
        encode(rows, tiny_tokenizer(), 6, where="tasks.t.train")
    [record] = caplog.records
    assert record.getMessage() == (
        "tasks.t.train: of 4 rows, 3 prompts lost their beginning and 2 responses their end to fit train.max_length=6"
    )
    caplog.clear()
    encode(rows, tiny_tokenizer(), 32)
    assert not caplog.records


def test_a_row_longer_than_the_tokenizers_limit_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 4
    [example] = encode([("abcdefgh", "xyz")], tokenizer, 32)
    assert len(example.prompt_ids) == 9
    assert not caplog.records


def test_rows_that_cannot_become_tokens_are_refused() -> None:
    without_eos = tiny_tokenizer()
    without_eos.eos_token = None
    with pytest.raises(ConfigError, match=r"^model.path: the tokenizer has no eos token"):
        encode([("a", "b")], without_eos, 8)
    with pytest.raises(ConfigError, match=r"^the prompt '' gives no tokens, as the tokenizer adds no bos"):
        encode([("a", "b"), ("", "b")], tiny_tokenizer(bos=False), 8)
    with pytest.raises(ConfigError, match=r"^train.max_length: got 1; a prompt and a response need at least 2"):
        encode([("a", "b")], tiny_tokenizer(), 1)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_right_and_learns_responses_only() -> None:
    batch = collate(encode([("ab", "x"), ("a", "xyz")], tiny_tokenizer(), 16), pad_id=0)
    assert batch.input_ids.tolist() == [[BOS, 4, 5, 27, EOS, 0], [BOS, 4, 27, 28, 29, EOS]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [
        [IGNORED, IGNORED, IGNORED, 27, EOS, IGNORED],
        [IGNORED, IGNORED, 27, 28, 29, EOS],
    ]
    assert {tensor.dtype for tensor in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}


def test_eos_as_padding_is_no_target() -> None:
    """Padding by eos is common, and masking labels by the padding's token would unlearn to stop."""
    batch = collate(encode([("ab", "x"), ("a", "xyz")], tiny_tokenizer(), 16), pad_id=EOS)
    assert batch.labels[0].tolist() == [IGNORED, IGNORED, IGNORED, 27, EOS, IGNORED]


def test_no_examples_give_a_row_without_targets() -> None:
    batch = collate([], pad_id=7)
    assert batch.input_ids.tolist() == [[7, 7]]
    assert batch.attention_mask.tolist() == [[1, 1]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED]]


def test_a_batch_moves_as_a_whole() -> None:
    moved = collate([], pad_id=0).to("meta")
    assert {tensor.device.type for tensor in (moved.input_ids, moved.attention_mask, moved.labels)} == {"meta"}


def test_padding_is_pad_or_eos_or_zero() -> None:
    assert pad_id(tiny_tokenizer(pad=True)) == 0
    without_pad = tiny_tokenizer(pad=False)
    assert pad_id(without_pad) == EOS
    without_pad.eos_token = None
    assert pad_id(without_pad) == 0


# --- which rows a step takes -----------------------------------------------------------------------------------------

counts = st.integers(1, 40)


@given(num_rows=counts, batch_size=counts, seed=st.integers(0, 2**53 - 1), epochs=st.integers(1, 4))
def test_every_row_comes_once_an_epoch(num_rows: int, batch_size: int, seed: int, epochs: int) -> None:
    steps = num_steps(num_rows, batch_size, None, epochs)
    order = [
        row
        for step in range(steps)
        for row in rows_of_step(step, num_rows=num_rows, batch_size=batch_size, seed=seed, epochs=epochs)
    ]
    assert len(order) == epochs * num_rows
    for epoch in range(epochs):
        assert sorted(order[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


@given(num_rows=counts, batch_size=counts, epochs=st.floats(0.01, 3))
def test_epochs_may_be_broken(num_rows: int, batch_size: int, epochs: float) -> None:
    steps = num_steps(num_rows, batch_size, None, epochs)
    sizes = [
        len(rows_of_step(step, num_rows=num_rows, batch_size=batch_size, seed=0, epochs=epochs))
        for step in range(steps)
    ]
    assert all(size == batch_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch_size
    assert abs(sum(sizes) - num_rows * epochs) <= max(0.5, 1 - num_rows * epochs)
    assert rows_of_step(steps, num_rows=num_rows, batch_size=batch_size, seed=0, epochs=epochs) == []


def test_epochs_that_floating_point_cannot_hold_take_no_step_more() -> None:
    assert num_steps(30, 3, None, 0.1) == 1  # 30 * 0.1 is 3.0000000000000004 in some orders of evaluation
    assert num_steps(10, 1, None, 1.1) == 11


def test_steps_run_on_into_further_epochs() -> None:
    assert num_steps(10, 4, 7, None) == 7
    order = [row for step in range(7) for row in rows_of_step(step, num_rows=10, batch_size=4, seed=3, epochs=None)]
    assert len(order) == 28
    assert Counter(order[:20]) == dict.fromkeys(range(10), 2)


def test_epochs_and_seeds_give_different_orders() -> None:
    def epoch(number: int, seed: int) -> tuple[int, ...]:
        return tuple(rows_of_step(number, num_rows=50, batch_size=50, seed=seed, epochs=None))

    orders = {epoch(number, seed) for number in range(10) for seed in (0, 1, 2, 2**52)}
    assert len(orders) == 40
    assert tuple(range(50)) not in orders


def test_the_order_of_rows_is_frozen() -> None:
    """A resumed run, another NumPy and another machine must see the same batches."""
    assert rows_of_step(0, num_rows=10, batch_size=10, seed=0, epochs=None) == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert rows_of_step(1, num_rows=10, batch_size=10, seed=2**40 + 7, epochs=None) == [6, 3, 4, 9, 5, 1, 2, 8, 0, 7]


def test_the_order_depends_on_nothing_else_in_the_process() -> None:
    asked = {"num_rows": 100, "batch_size": 7, "seed": 5, "epochs": None}
    before = rows_of_step(9, **asked)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for step in (40, 3, 9, 200):
        rows_of_step(step, **asked)
    assert rows_of_step(9, **asked) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_every_process_sees_the_same_order() -> None:
    program = (
        "from lori_dist.training.data import rows_of_step\n"
        "print(rows_of_step(9, num_rows=100, batch_size=7, seed=5, epochs=None))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == rows_of_step(9, num_rows=100, batch_size=7, seed=5, epochs=None)


def test_a_million_rows_are_shuffled_once_an_epoch() -> None:
    first = rows_of_step(0, num_rows=1_000_000, batch_size=64, seed=1, epochs=None)
    assert len(set(first)) == 64
    for step in range(1, 5_000):  # a permutation a step would take a quarter of an hour
        rows_of_step(step, num_rows=1_000_000, batch_size=64, seed=1, epochs=None)


@given(num_rows=st.integers(0, 50), size=st.integers(1, 9), micro_batch_size=st.integers(1, 9))
def test_ranks_share_a_batch_in_the_same_number_of_rounds(num_rows: int, size: int, micro_batch_size: int) -> None:
    rows = list(range(100, 100 + num_rows))
    shares = [micro_batches(rows, rank, size, micro_batch_size) for rank in range(size)]
    assert sorted(row for share in shares for piece in share for row in piece) == rows
    assert len({len(share) for share in shares}) == 1
    assert all(len(piece) <= micro_batch_size for share in shares for piece in share)
    totals = [sum(map(len, share)) for share in shares]
    assert max(totals) - min(totals) <= 1
    assert len(shares[0]) == -(-max(totals) // micro_batch_size)


def test_a_rank_without_rows_takes_part_with_empty_pieces() -> None:
    assert micro_batches([7, 8], 0, 4, 8) == [[7]]
    assert micro_batches([7, 8], 3, 4, 8) == [[]]
    assert micro_batches([1, 2, 3, 4, 5], 1, 2, 2) == [[2, 4], []]


# --- mixtures --------------------------------------------------------------------------------------------------------


@given(
    num_rows=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 9),
)
def test_a_mixture_takes_of_each_file_its_share_and_all_its_rows_as_often(
    num_rows: list[int], weights: list[int], batch_size: int, seed: int
) -> None:
    shares = tuple(weight / sum(weights[: len(num_rows)]) for weight in weights[: len(num_rows)])
    num_epochs, total = 4, sum(num_rows)
    taken = [
        row
        for step in range(num_steps(total, batch_size, None, num_epochs))
        for row in mixed_rows_of_step(
            step, num_rows=tuple(num_rows), shares=shares, batch_size=batch_size, seed=seed, epochs=num_epochs
        )
    ]
    assert len(taken) == num_epochs * total
    first = 0
    for count, share in zip(num_rows, shares, strict=True):
        of_file = [row for row in taken if first <= row < first + count]
        assert abs(len(of_file) - num_epochs * total * share) <= num_epochs  # each epoch's is rounded
        counts = [of_file.count(row) for row in range(first, first + count)]
        assert max(counts) - min(counts) <= 1
        first += count


def test_a_step_of_a_mixture_follows_from_seed_and_step_alone() -> None:
    def rows(step: int, size: int) -> list[int]:
        return mixed_rows_of_step(step, num_rows=(7, 3), shares=(0.4, 0.6), batch_size=size, seed=3, epochs=None)

    assert [row for step in range(12) for row in rows(step, 4)] == [row for step in range(6) for row in rows(step, 8)]


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", config.PACKED)
def test_packed_rows_have_the_loss_and_gradient_of_rows_apart(kind: str) -> None:
    model, rows = tiny(kind), examples()
    batch = packed(rows, 0, 40)
    assert batch.input_ids.shape[0] < len(rows) / 2  # they do share sequences
    found = [loss_sum(model, batch)]
    found += torch.autograd.grad(found[0], [*model.parameters()], allow_unused=True)
    wanted = [sum(loss_sum(model, collate([row], 0)) for row in rows)]
    wanted += torch.autograd.grad(wanted[0], [*model.parameters()], allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12), st.integers(12, 30))
def test_packing_keeps_every_row_whole(sizes: list[tuple[int, int]], length: int) -> None:
    rows = [
        Example(prompt="", response="", prompt_ids=(10 + i,) * before, response_ids=(40 + i,) * after)
        for i, (before, after) in enumerate(sizes)
    ]
    batch = packed(rows, 0, length)
    assert batch.input_ids.shape[1] <= length
    assert batch.position_ids is not None
    found = []
    for ids, positions, labels in zip(batch.input_ids, batch.position_ids, batch.labels, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            found.append((tuple(ids[start:end].tolist()), tuple(labels[start:end].tolist())))
    for row in rows:
        found.remove((row.prompt_ids + row.response_ids, (IGNORED,) * len(row.prompt_ids) + row.response_ids))
    assert all(set(labels) == {IGNORED} for _, labels in found)  # padding


# --- chat ------------------------------------------------------------------------------------------------------------

CHAT = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role not in ("user", "assistant") %}{{ raise_exception("no such role") }}{% endif %}
    {{- "<" + m.role + ">" + m.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<assistant>" }}{% endif %}"""


def chat_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def test_of_messages_only_the_last_answer_is_learned(tmp_path: Path) -> None:
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": f"say {i}"} for i, role in enumerate(roles)]
    path, tokenizer = rows_file(tmp_path, json.dumps({"chat": messages}) + "\n"), chat_tokenizer()
    [text] = read(path, Template(messages="chat"), tokenizer=tokenizer)
    assert text == ("<user>say 0</s><assistant>say 1</s><user>say 2</s><assistant>", "say 3")
    [example] = encode([text], tokenizer, 128)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert [*example.prompt_ids, *example.response_ids] == whole


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "is a list of 0; wanted a list of two or more"),
        ("hello", "is text; wanted a list"),
        ([{"role": "user", "content": "a"}] * 2, "the last message of 'chat' is of 'user'"),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], "message 1 of 'chat' has no role and content"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "its response is empty"),
        (
            [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}],
            "part 1 of message 1 of 'chat' is 'image'; wanted a part of type 'text'",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            "the arguments of 'f' in message 2 of 'chat' is text that is not JSON",
        ),
        ([{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}], "the chat template refuses it"),
    ],
)
def test_messages_that_cannot_be_used_are_named(tmp_path: Path, messages: object, message: str) -> None:
    path = rows_file(tmp_path, json.dumps({"chat": messages}) + "\n")
    with pytest.raises(ConfigError, match=message):
        read(path, Template(messages="chat"), tokenizer=chat_tokenizer())


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = rows_file(tmp_path, json.dumps({"chat": messages}) + "\n")
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        read(path, Template(messages="chat"), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("ask", ["{{ strftime_now('%d %b %Y') }}", "{{ date_string or 'no date' }}"])
def test_a_chats_text_is_the_same_on_every_day(tmp_path: Path, ask: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path, tokenizer = rows_file(tmp_path, json.dumps({"chat": messages}) + "\n"), tiny_tokenizer()
    tokenizer.chat_template = ask + CHAT
    asks_for_today = "strftime_now" in ask
    [(prompt, _)] = read(path, Template(messages="chat"), tokenizer=tokenizer)
    assert prompt.startswith("26 Jul 2024<" if asks_for_today else "no date<")
    [(prompt, _)] = read(path, Template(messages="chat", date="2031-02-03"), tokenizer=tokenizer)
    assert prompt.startswith("03 Feb 2031<")
    tokenizer.chat_template = "\n" + ask + CHAT  # what a template begins with stays
    assert read(path, Template(messages="chat", date="2031-02-03"), tokenizer=tokenizer)[0][0] == f"\n{prompt}"


def test_the_date_of_a_chat_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = rows_file(tmp_path, json.dumps({"chat": messages}) + "\n")
    (tmp_path / "config.json").write_text("{}")

    def template(ask: str, **date: str) -> dict[str, Any]:
        (tmp_path / "chat_template.jinja").write_text(ask)
        task = {"train": rows, "test": rows, "template": {"messages": "chat", **date}}
        tree = {"name": "r", "output": str(tmp_path), "model": {"path": str(tmp_path)}, "tasks": {"t": task}}
        return dict(train_job(config.validate(tree | {"train": {"steps": 1}}), "t").settings["data"]["template"])

    assert "date" not in template(CHAT)  # such runs keep the fingerprint they had
    assert template("{{ strftime_now('%d') }}")["date"] == "2024-07-26"
    assert template(CHAT, date="2031-02-03")["date"] == "2031-02-03"


# As those of Qwen: tools before the rest, calls as JSON, an argument, and a thinking section in the last answer.
QWEN = """{%- if tools %}{{ "<tools>" + (tools | tojson) + "</tools>\\n" }}{% endif %}
{%- for m in messages %}
    {{- "<im>" + m.role + "\\n" }}
    {%- if m.role == "assistant" and loop.last %}{{ "<think>\\n\\n</think>\\n\\n" }}{% endif %}
    {{- m.content }}
    {%- for call in m.tool_calls or [] %}{{ "<call>" + (call.function.arguments | tojson) + "</call>" }}{% endfor %}
    {{- "</im>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<im>assistant\\n" }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ "<think>\\n\\n</think>\\n\\n" }}{% endif %}
{%- endif %}"""
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "one and "}, {"type": "text", "text": "two?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "three"},
]


def read_chat(folder: Path, row: dict[str, Any], chat_template: str, **template: Any) -> tuple[str, ...]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    [text] = read(rows_file(folder, json.dumps(row) + "\n"), Template(**template), tokenizer=tokenizer)
    return text


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), None], ids=["objects", "text", "none"])
def test_calls_of_tools_read_as_the_chat_template_writes_them(tmp_path: Path, tools: Any) -> None:
    prompt, answer = read_chat(tmp_path, {"chat": CALLS, "tools": tools}, QWEN, messages="chat", tools="tools")
    listed = "" if tools is None else f"<tools>{json.dumps([TOOL])}</tools>\n"
    asked = '<im>user\none and two?</im>\n<im>assistant\n<call>{"a": 1}</call></im>\n<im>tool\n3</im>\n'
    assert prompt == f"{listed}{asked}<im>assistant\n"
    assert answer == "<think>\n\n</think>\n\nthree</im>"


def test_a_call_may_be_the_answer(tmp_path: Path) -> None:
    *_, answer = read_chat(tmp_path, {"chat": CALLS[:2]}, QWEN, messages="chat")
    assert answer == '<think>\n\n</think>\n\n<call>{"a": 1}</call></im>'


def test_arguments_reach_the_chat_template(tmp_path: Path) -> None:
    text = read_chat(tmp_path, {"chat": CALLS}, QWEN, messages="chat", arguments={"enable_thinking": False})
    assert text[0].endswith("<im>assistant\n<think>\n\n</think>\n\n")
    assert text[1] == "three</im>"


def test_a_template_that_opens_a_thinking_section_is_learned_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opens = CHAT.replace('{{ "<assistant>" }}', '{{ "<assistant><think>" }}')
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read_chat(tmp_path, {"chat": messages}, opens, messages="chat") == ("<user>a</s><assistant>", "b")
    assert "opens an answer with '<think>'" in caplog.text


TURNS = [{"role": role, "content": f"say {i}"} for i, role in enumerate(["user", "assistant"] * 3)]


@pytest.mark.parametrize("max_length", [128, 60, 24])
def test_all_answers_of_a_chat_are_learned(tmp_path: Path, max_length: int) -> None:
    text = read_chat(tmp_path, {"chat": TURNS}, CHAT, messages="chat", train_on="all")
    assert text[1::2] == ("say 1</s>", "say 3</s>", "say 5")
    tokenizer = chat_tokenizer()
    whole = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    [example] = encode([text], tokenizer, max_length)
    [last] = encode([("".join(text[:-1]), text[-1])], tokenizer, 1000)
    batch, together = collate([example], 0), packed([example, example], 0, 256)
    learned = batch.input_ids[batch.labels != IGNORED]
    assert [*last.prompt_ids, *last.response_ids] == whole  # the tokens of the text, whatever is learned
    assert example.num_targets == len(learned) == num_targets(batch)
    assert num_targets(together) == 2 * example.num_targets
    if max_length == 128:
        assert batch.input_ids[0].tolist() == whole
        assert tokenizer.decode(learned) == "say 1</s>say 3</s>say 5</s>"
    else:
        assert example.num_tokens == max_length
        assert "say 0" not in tokenizer.decode(learned)


def test_answers_that_change_when_others_follow_cannot_all_be_learned(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"rows.jsonl:1: .* changes the text of message 2 .*; set template.train_on to last"
    ):
        read_chat(tmp_path, {"chat": TURNS}, QWEN, messages="chat", train_on="all")


SHAREGPT = [
    {"from": "human", "value": "hi"},
    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    {"from": "observation", "value": "3"},
    {"from": "gpt", "value": "three"},
]


def test_rows_of_sharegpt_are_chats(tmp_path: Path) -> None:
    row = {"conversations": SHAREGPT, "system": "be brief"}
    prompt, answer = read_chat(tmp_path, row, QWEN, layout="sharegpt")
    assert prompt == (
        '<im>system\nbe brief</im>\n<im>user\nhi</im>\n<im>assistant\n<call>{"a": 1}</call></im>\n'
        "<im>tool\n3</im>\n<im>assistant\n"
    )
    assert answer.endswith("three</im>")


@pytest.mark.parametrize("given", ["", None, "2 and 3"])
def test_rows_of_alpaca(tmp_path: Path, given: str | None) -> None:
    row = {"instruction": "add {these}", "input": given, "output": "5"}
    if given is None:
        del row["input"]
    prompt, answer = read_chat(tmp_path, row, CHAT, layout="alpaca")
    assert answer == "5"
    assert "### Instruction:\nadd {these}\n\n" in prompt
    assert prompt.endswith("### Response:\n")
    assert ("### Input:\n2 and 3\n\n" in prompt) == bool(given) == ("further context" in prompt)
