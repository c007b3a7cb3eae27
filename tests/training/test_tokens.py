"""The tokens of a prompt and a response are those of their text, whatever the tokenizer puts before a text."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lori_dist import config
from lori_dist.errors import ConfigError
from lori_dist.jobs import evaluate_job, train_job
from lori_dist.training.data import encode, read
from lori_dist.training.tokens import blank_end, continuation, pairs, prompt_ids, segments

SPECIALS = ["<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
TEXTS = [
    "once upon a time there was ",
    "this review is positive or negative",
    "def f(): return 1 + 22",
    "\u00dcber \ufb01ne \u00e9",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
METASPACE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def trained(tokenizer: Tokenizer, trainer: Any, *, bos: bool = True) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(9 * TEXTS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[(token, tokenizer.token_to_id(token)) for token in SPECIALS[:2]]
        )
    tokenizer.add_special_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def bpe(*, bos: bool = True, fallback: bool = True, **parts: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    more = {} if fallback else {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    specials = SPECIALS + (BYTES if fallback else [])
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False, **more)
    return trained(tokenizer, trainer, bos=bos)


def metaspace(scheme: str, *, split: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    part = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return bpe(bos=bos, pre_tokenizer=part, decoder=METASPACE)


def byte_level(*, prefix: bool) -> PreTrainedTokenizerFast:
    part = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return bpe(fallback=False, pre_tokenizer=part, decoder=decoders.ByteLevel())


def prepended() -> PreTrainedTokenizerFast:
    """As Llama 2's, Mistral's and TinyLlama's own files have it."""
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return bpe(normalizer=normalizers.Sequence(parts), decoder=METASPACE)


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    return trained(tokenizer, trainer)


def word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return trained(tokenizer, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False))


class Python(PreTrainedTokenizer):
    """A tokenizer without offsets: characters, pairs of letters first, with a blank before every text."""

    def __init__(self, **options: Any) -> None:
        signs = [*SPECIALS, "▁", *map(chr, range(32, 127)), *(a + b for a in "abcdehinopst" for b in "abcdehinopst")]
        self.numbers = {sign: number for number, sign in enumerate(signs)}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self.numbers)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.numbers)

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        rest, found = "▁" + text.replace(" ", "▁"), []
        while rest:
            size = 2 if rest[:2] in self.numbers else 1
            found.append(rest[:size])
            rest = rest[size:]
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self.numbers.get(token, 2)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.numbers)[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("▁", " ").removeprefix(" ")


MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "prepend": prepended,
    "first": lambda: metaspace("first"),
    "whole": lambda: metaspace("first", split=False),
    "always": lambda: metaspace("always"),
    "never": lambda: metaspace("never"),
    "no bos": lambda: metaspace("always", bos=False),
    "prefix": lambda: byte_level(prefix=True),
    "unigram": unigram,
    "word piece": word_piece,
    "python": Python,
}
JOINED = {name: make() for name, make in MAKERS.items()}
BYTE_LEVEL = {"bytes": byte_level(prefix=False), "python bytes": ByT5Tokenizer()}
joined = pytest.mark.parametrize("tokenizer", JOINED.values(), ids=JOINED.keys())
EXACT = {name: JOINED[name] for name in ("prepend", "first", "whole", "always", "never", "no bos", "prefix")}
ROWS = [
    ("once upon", "ing"),
    ("This review is", " positive"),
    ("def f():\n", "    return 1"),
    ("Answer: ", "yes"),
    ("a\n", "b"),
    ("one", "  two"),
    ("é", "é\u0301 ﬁ"),
    ("<|user|> hi <|assistant|>", "hello"),
    ("ab<|assistant|>\n", " once"),
]


def ids_of(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def bos_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    whole, bare = tokenizer("a")["input_ids"], ids_of("a", tokenizer)
    return (whole[0],) if len(whole) > len(bare) and whole[0] == tokenizer.bos_token_id else ()


@joined
@given(rows=st.lists(st.tuples(*[st.text("abonceup \n:é1", min_size=1, max_size=12)] * 2), min_size=1, max_size=5))
def test_the_tokens_are_those_of_the_whole_text(
    tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, str]]
) -> None:
    rows = [row for row in rows if ids_of(row[0], tokenizer)] + ROWS[:7]
    for (prompt, response), (before, after) in zip(rows, pairs(rows, tokenizer), strict=True):
        whole = (*bos_of(tokenizer), *ids_of(prompt + response, tokenizer))
        assert before + after == whole
        [alone] = prompt_ids([prompt], tokenizer)
        if whole[: len(alone)] == alone and tokenizer.unk_token_id not in alone:  # no token is of both
            assert before == alone


@pytest.mark.parametrize("tokenizer", EXACT.values(), ids=EXACT.keys())
@pytest.mark.parametrize("row", ROWS[:6], ids=repr)
def test_the_text_is_that_of_the_row(tokenizer: PreTrainedTokenizerBase, row: tuple[str, str]) -> None:
    [example] = encode([row], tokenizer, 200)
    assert example.response_ids[-1] == tokenizer.eos_token_id
    ids = [token for token in example.prompt_ids + example.response_ids if token not in (0, 1)]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert text.removeprefix(" ") == "".join(row)
    assert continuation(example.prompt_ids, example.response_ids[:-1], tokenizer).endswith(row[1])


@pytest.mark.parametrize("tokenizer", [*JOINED.values(), *BYTE_LEVEL.values()], ids=[*JOINED, *BYTE_LEVEL])
def test_several_segments_are_the_tokens_of_the_whole_text(tokenizer: PreTrainedTokenizerBase) -> None:
    row = ("say one", " two", " and three", " four")
    [found], [whole] = (segments([some], tokenizer) for some in (row, (row[0], "".join(row[1:]))))
    assert len(found) == 4
    assert all(found)
    assert found[0] == whole[0]
    assert sum(found, ()) == sum(whole, ()) or tokenizer in BYTE_LEVEL.values()
    before = [segments([("".join(row[:count]), "".join(row[count:]))], tokenizer)[0][0] for count in (2, 3)]
    assert [sum(found[:count], ()) for count in (2, 3)] == before or tokenizer in BYTE_LEVEL.values()


@pytest.mark.parametrize("tokenizer", BYTE_LEVEL.values(), ids=BYTE_LEVEL.keys())
def test_byte_level_tokens_do_not_depend_on_what_follows(tokenizer: PreTrainedTokenizerBase) -> None:
    found = pairs(ROWS[:8], tokenizer)
    for (prompt, response), (before, after) in zip(ROWS, found, strict=False):
        assert before == (*bos_of(tokenizer), *ids_of(prompt, tokenizer))
        assert after == ids_of(response, tokenizer)


def test_a_token_of_both_is_the_responses() -> None:
    tokenizer = JOINED["first"]
    [(before, after)] = pairs([("Answer: ", "once")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(after) == ["▁once"]
    assert before == prompt_ids(["Answer:"], tokenizer)[0]
    [(before, after)] = pairs([("on", "ce")], JOINED["no bos"])  # nothing would predict it: it is the prompt's there
    assert (JOINED["no bos"].convert_ids_to_tokens(before), after) == (["▁once"], ())


def test_a_special_token_stays_the_prompts_though_it_takes_a_blank_along() -> None:
    for name in ("prepend", "first", "prefix"):
        tokenizer = JOINED[name]
        [(before, after)] = pairs([("ab<|assistant|>", " once")], tokenizer)
        assert tokenizer.convert_ids_to_tokens(before[-1:]) == ["<|assistant|>"]
        assert "".join(tokenizer.convert_ids_to_tokens(after)).lstrip("▁Ġ") == "once"


def test_a_prompt_without_tokens_is_refused() -> None:
    for prompt in ("", " "):
        with pytest.raises(ConfigError, match=r"^the prompt '.?' gives no tokens, as the tokenizer adds no bos"):
            pairs([(prompt, "b")], word_piece_without_bos())


def word_piece_without_bos() -> PreTrainedTokenizerBase:
    tokenizer = word_piece()
    tokenizer.backend_tokenizer.post_processor = None
    return tokenizer


@joined
def test_a_long_row_is_cut_at_its_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    row = ("once upon a time there was " * 4 + "this", " review is positive")
    [whole], [cut] = (encode([row], tokenizer, length) for length in (500, 20))
    assert len(cut.prompt_ids + cut.response_ids) == min(20, len(whole.prompt_ids + whole.response_ids))
    assert cut.response_ids == whole.response_ids[:19]
    kept = cut.prompt_ids[len(bos_of(tokenizer)) :]
    assert whole.prompt_ids[len(whole.prompt_ids) - len(kept) :] == kept


@pytest.mark.parametrize("name", ["first", "bytes"])
def test_a_prompt_that_ends_with_a_blank_is_warned_of_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = (JOINED | BYTE_LEVEL)[name]
    with caplog.at_level(logging.WARNING):
        assert blank_end([("a review:", " positive"), ("a\n", "b")], tokenizer) is None
        for part in ("train", "validation", "test"):
            encode([("a review", " x"), ("a review: ", "positive")], tokenizer, 64, where=f"tasks.{name}.{part}")
    [record] = caplog.records
    assert record.getMessage().startswith(f"tasks.{name}.template: the prompt ends with a blank")


CHAT = """{% for m in messages %}{{ "<|user|>" if m.role == "user" else "<|reply|>" }}
{{ m.content + eos_token }}
{% endfor %}{% if add_generation_prompt %}{{ "<|reply|>\n" }}{% endif %}"""


@pytest.mark.parametrize("name", ["prepend", "first", "always", "prefix"])
def test_a_chats_answer_begins_without_a_blank(tmp_path: Path, name: str) -> None:
    tokenizer = MAKERS[name]()
    tokenizer.chat_template = CHAT
    messages = [{"role": "user", "content": "once"}, {"role": "assistant", "content": "upon"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"chat": messages}))
    [row] = read(str(path), config.Template(messages="chat"), tokenizer=tokenizer)
    [example] = encode([row], tokenizer, 99)
    assert row[1] == "upon"
    assert continuation(example.prompt_ids, example.response_ids[:-1], tokenizer) == "upon"
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (example.prompt_ids + example.response_ids)[len(bos_of(tokenizer)) :] == tuple(whole)


def described(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> config.Run:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    for file in model.glob("tokenizer*"):
        file.unlink()
    if tokenizer is not None:
        tokenizer.save_pretrained(model)
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "response": "b"}))
    task = {"train": str(rows), "test": str(rows)}
    tree = {"name": "r", "output": str(folder), "model": {"path": str(model)}, "tasks": {"t": task}}
    return config.validate({**tree, "train": {"steps": 1}, "evaluate": {"metrics": ["loss"]}})


@pytest.mark.parametrize("name", [*EXACT, "bytes"])
def test_results_of_tokens_that_changed_are_not_taken_for_these(tmp_path: Path, name: str) -> None:
    run = described(tmp_path, (EXACT | BYTE_LEVEL)[name])
    for job in (train_job(run, "t"), evaluate_job(run, "base", None)):
        assert job.settings["model"].get("tokens") == (None if name == "bytes" else "joined")
