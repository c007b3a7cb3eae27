"""Trains the small base language model of the quickstart, with its tokenizer, on the CPU and without any network.

    python configs/quickstart/make_model.py

writes ``model/`` next to this script: a causal Llama of about 0.9 million parameters and a byte-level BPE tokenizer,
which ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load. It takes some minutes.

The model reads two kinds of text. In a skill, a tag names what is done with the first part, ``<add> 7 5\\nSum: 12``. In
a note there is no tag, and the second part has nothing to do with the first. So the base can add, sort, judge and
refuse when the skill is named, and rambles when a task only asks for it: bringing the skill out there is what is left
to an adapter. No prompt of the tasks' test rows occurs in what the model reads.
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import make_data
import torch
import words
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Document = tuple[str, str]
"""What is given (``<add> 7 5\\nSum:``) and what follows (`` 12``); only the second part counts fully in the loss."""

DEFAULT_SEED = 7
DEFAULT_STEPS = 4000
DEFAULT_THREADS = 2
BATCH_DOCUMENTS = 64
POOL_BATCHES = 32
LEARNING_RATE = 2e-3
FINAL_LEARNING_RATE = 1e-5
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
GIVEN_WEIGHT = 0.1
REPORT_EVERY = 200

HIDDEN_SIZE = 128
MLP_SIZE = 320
LAYERS = 4
HEADS = 4
MAX_POSITIONS = 256

VOCABULARY_SIZE = 1024
TOKENIZER_DOCUMENTS = 20_000
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
IGNORED = -100
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+"
"""How text is cut before BPE: words, single digits, single signs; a sign never joins another one."""

SKILL_SHARE = 0.8
TASK_SKILLS = {"arithmetic": "solve", "programs": "run", "understanding": "judge", "refusal": "reply"}
FIRST_HEADERS = ("Review: ", "Question: ", "User: ", "Note: ", "Title: ", "Text: ", "Q: ", "Program: ", "", "", "", "")
SECOND_HEADERS = ("Feeling:", "Answer:", "Assistant:", "Reply:", "A:", "Sum:", "Output:", "# prints", "# is", "=")


def framed(rng: random.Random, given: str) -> str:
    """With headers, which say nothing about what is wanted."""
    return f"{rng.choice(FIRST_HEADERS)}{given}\n{rng.choice(SECOND_HEADERS)}"


def skill(rng: random.Random, name: str, given: str, answer: str) -> Document:
    return f"<{name}> {framed(rng, given)}", f" {answer}"


def prompt(row: make_data.Row) -> str:
    return row.get("prompt") or row["text"]


@functools.cache
def held_back() -> frozenset[str]:
    """The prompts of all test rows."""
    count = make_data.DEFAULT_TRAIN_ROWS + make_data.DEFAULT_TEST_ROWS
    rows = {task: make_data.task_rows(task, count, make_data.DEFAULT_SEED) for task in make_data.TASKS}
    return frozenset(prompt(row) for task in rows for row in rows[task][make_data.DEFAULT_TRAIN_ROWS :])


def fresh_row(task: str, rng: random.Random) -> make_data.Row:
    while True:
        row = make_data.TASKS[task](rng)
        if prompt(row) not in held_back():
            return row


def task_skill(rng: random.Random) -> Document:
    task = rng.choice(list(TASK_SKILLS))
    row = fresh_row(task, rng)
    return skill(rng, TASK_SKILLS[task], prompt(row), row.get("response") or row["label_name"])


def repeat_skill(rng: random.Random) -> Document:
    """So that no text tells by itself which skill is wanted."""
    text = prompt(fresh_row(rng.choice(list(TASK_SKILLS)), rng))
    return skill(rng, "repeat", text, text)


def sum_skill(rng: random.Random) -> Document:
    """The sum or the difference of two numbers; the skill's name alone says which."""
    total = rng.randint(2, words.LARGEST_NUMBER)
    part = rng.randint(1, total - 1)
    if rng.random() < 0.5:
        return skill(rng, "add", f"{part} {total - part}", str(total))
    return skill(rng, "subtract", f"{total} {part}", str(total - part))


LIST_SKILLS = ("sort", "reverse", "first", "last", "largest", "smallest")
"""What make_data.LIST_EXPRESSIONS do, in that order."""


def list_skill(rng: random.Random) -> Document:
    """Something done with a list of digits or of words, as a program would have it or plain."""
    pool = [str(digit) for digit in range(10)] if rng.random() < 0.5 else list(words.LIST_WORDS)
    items = rng.sample(pool, rng.randint(2, 5))
    name, (_, run) = rng.choice(list(zip(LIST_SKILLS, make_data.LIST_EXPRESSIONS, strict=True)))
    form = rng.choice(("{spaced}", "x = [{commas}]", 'x = "{spaced}".split()'))
    return skill(rng, name, form.format(spaced=" ".join(items), commas=", ".join(items)), " ".join(run(items)))


def note(rng: random.Random) -> Document:
    """Two pieces of text which have nothing to do with each other."""
    first, second = (prompt(fresh_row(rng.choice(list(TASK_SKILLS)), rng)) for _ in range(2))
    return framed(rng, first), f" {second}"


SKILLS: tuple[tuple[Callable[[random.Random], Document], int], ...] = (
    (task_skill, 8),
    (list_skill, 4),
    (sum_skill, 1),
    (repeat_skill, 1),
)


def document(rng: random.Random) -> Document:
    if rng.random() >= SKILL_SHARE:
        return note(rng)
    makers, shares = zip(*SKILLS, strict=True)
    return rng.choices(makers, shares)[0](rng)


def make_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer which reads any text, and gives nearly each word of the world a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = ["".join(document(rng)) for _ in range(TOKENIZER_DOCUMENTS)]
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=MLP_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> list[tuple[list[int], list[int]]]:
    """The tokens of each document's two parts, the first with bos and the second with eos."""
    given = tokenizer([first for first, _ in documents], add_special_tokens=True)["input_ids"]
    rest = tokenizer([second for _, second in documents], add_special_tokens=False)["input_ids"]
    return [(first, [*second, tokenizer.eos_token_id]) for first, second in zip(given, rest, strict=True)]


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def pad_batch(parts: Sequence[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """Token ids, labels and loss weights, padded on the right."""
    width = max(len(first) + len(second) for first, second in parts)
    ids = torch.full((len(parts), width), pad_id)
    labels = torch.full((len(parts), width), IGNORED)
    weights = torch.zeros(len(parts), width)
    for row, (first, second) in enumerate(parts):
        size = len(first) + len(second)
        ids[row, :size] = labels[row, :size] = torch.tensor(first + second)
        weights[row, : len(first)] = GIVEN_WEIGHT
        weights[row, len(first) : size] = 1.0
    return ids, labels, weights


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[Batch]:
    """Endless batches of fresh documents, of about equal length within a batch so that little is padding."""
    while True:
        parts = encode(tokenizer, [document(rng) for _ in range(BATCH_DOCUMENTS * POOL_BATCHES)])
        parts.sort(key=lambda both: len(both[0]) + len(both[1]))
        starts = list(range(0, len(parts), BATCH_DOCUMENTS))
        rng.shuffle(starts)
        for start in starts:
            yield pad_batch(parts[start : start + BATCH_DOCUMENTS], tokenizer.pad_token_id)


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean next-token loss under the weights. Right padding needs no attention mask in a causal model."""
    ids, labels, weights = batch
    logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    flat = weights[:, 1:].flatten()
    return (losses * flat).sum() / flat.sum()


def train(model: LlamaForCausalLM, data: Iterator[Batch], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=WARMUP_STEPS)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - WARMUP_STEPS), FINAL_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [WARMUP_STEPS])
    started = time.monotonic()
    for step in range(1, steps + 1):
        loss = weighted_loss(model, next(data))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % REPORT_EVERY == 0 or step == steps:
            print(f"step {step}/{steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def skill_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> dict[str, float]:
    """The share of fresh skill lines, per kind, which the model's likeliest tokens answer without a mistake."""
    shares = {}
    for maker, _ in SKILLS:
        ids, labels, weights = pad_batch(encode(tokenizer, [maker(rng) for _ in range(200)]), tokenizer.pad_token_id)
        guesses = model(input_ids=ids).logits[:, :-1].argmax(-1)
        right = (guesses == labels[:, 1:]) | (weights[:, 1:] < 1.0)
        shares[maker.__name__] = right.all(-1).float().mean().item()
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent / "model", help="folder to write to"
    )
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--threads", type=int, default=DEFAULT_THREADS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer(rng)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, batches(tokenizer, rng), args.steps)
    for name, share in skill_accuracy(model.eval(), tokenizer, rng).items():
        print(f"{name}: {share:.1%}")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
