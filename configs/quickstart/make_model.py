"""Trains the small base language model of the quickstart, with its tokenizer, on the CPU and without any network.

    python configs/quickstart/make_model.py

writes ``model/`` next to this script: a causal Llama of about 0.8 million parameters and a byte-level BPE tokenizer,
which ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load. It takes some minutes.

The model reads two kinds of text. In a skill, a tag after the text names what to do with it, ``7 pens and 5<add>12``.
In a note, the second line has nothing to do with the first, ``Review: ...`` and then something else. So the base can
add, sort, judge and refuse when the skill is named, and rambles when a task asks for it in words of its own: bringing
the skill out there is what is left to an adapter.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import words
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Document = tuple[str, str]
"""What is given (``2 3<add>``) and what follows (``5``); only the second part counts fully in the loss."""

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

SKILL_SHARE = 0.85
BARE_SHARE = 0.3
HEADERS = (
    "Review", "Feeling", "Question", "Answer", "User", "Assistant", "Note", "Title", "Letter", "Reply", "Day",
    "Name", "Text", "Line", "Q", "A", "Output", "# prints", "Program",
)  # fmt: skip
HEADER_ENDS = (":", " =", " -", "")
CODE_LINES = (
    "print(x)", "x.split()", "print(max(x), min(x))", "print(*x)", "print(x[{a}])", "sorted(x)[::-1]", "x[-1]",
    "# x is {a}", "y = x[0]", "print({a})", 'x = "{things}"',
)  # fmt: skip
STORY_BITS = (
    "{name} has {a} {things}", "{name} buys {a} more", "There are {a} {things} in one box", "and {a} in another",
    "A shop sold {a} {things} on {day}", "{name} gave {a} away", "and {a} the day after", "{name} needs {a} {things}",
    "but has only {a}", "{a} {things}", "{a} {things} and more", "{a}", "{a} {things} are left", "and then sold {a}",
    "A shop had {a} {things} on {day}", "{name} had {a} {things}",
)  # fmt: skip
CHATTER = (
    "How many {things} does {name} have?", "How many {things} are there in all?", "Where are the {things} now?",
    "What did the shop sell on {day}?", "{name} asks: Is it {day} today?", "Please tell {name} to come on {day}.",
    "Hello! {name} is there.", "How many are missing?", "How many {things} did it sell?", "What is the best day?",
    "Can you help {name} on {day}?", "Where can {name} learn to sing?", "How can I find the {things}?",
    "{day} again. {name} is still in the shop.", "What is the name of the {what}?", "{who} found the {things}.",
    "{who} saw the {what} on {day}.", "what a {what}", "so {who} took every part",
    "{who} really saw the end", "this is a {what}", "I wonder what the colour is", "the opposite is left",
)  # fmt: skip


def pick_words(rng: random.Random) -> dict[str, str]:
    """One word of each common kind, to be put into a pattern."""
    return {
        "name": rng.choice(words.NAMES),
        "things": rng.choice(words.THINGS),
        "day": rng.choice(words.DAYS),
        "what": rng.choice(words.REVIEWED),
        "who": rng.choice(words.PEOPLE),
        "a": str(rng.randint(0, words.LARGEST_NUMBER)),
        "b": str(rng.randint(0, words.LARGEST_NUMBER)),
    }


def skill(name: str, given: str, answer: str) -> Document:
    return f"{given}\n<{name}>", answer


def story_bit(rng: random.Random, number: int) -> str:
    return rng.choice(STORY_BITS).format(**(pick_words(rng) | {"a": str(number)}))


def sum_skill(rng: random.Random) -> Document:
    """The sum or the difference of the two numbers of a story; the skill's name alone says which."""
    total = rng.randint(2, words.LARGEST_NUMBER)
    part = rng.randint(1, total - 1)
    adds = rng.random() < 0.5
    first, second, answer = (part, total - part, total) if adds else (total, part, total - part)
    joint = rng.choice((" ", ". ", ", ", " and "))
    if rng.random() < BARE_SHARE:
        given = f"{first}{joint}{second}"
    else:
        given = f"{story_bit(rng, first)}{joint}{story_bit(rng, second)}"
    if rng.random() < 0.5:
        given = f"{given}. {rng.choice(CHATTER[:4]).format(**pick_words(rng))}"
    return skill("add" if adds else "subtract", given, str(answer))


LIST_SKILLS: tuple[tuple[str, Callable[[list[str]], list[str]]], ...] = (
    ("sort", sorted),
    ("reverse", lambda items: items[::-1]),
    ("first", lambda items: items[:1]),
    ("last", lambda items: items[-1:]),
    ("largest", lambda items: [max(items)]),
    ("smallest", lambda items: [min(items)]),
    ("copy", list),
)
LIST_FORMS = ("{spaced}", "[{commas}]", "x = [{commas}]", '"{spaced}"', 'x = "{spaced}".split()', "{commas}")


def list_skill(rng: random.Random) -> Document:
    """Something done with a list of digits or of words, written in one of several ways."""
    pool = [str(digit) for digit in range(10)] if rng.random() < 0.5 else list(words.LIST_WORDS)
    items = rng.sample(pool, rng.randint(2, 5))
    name, run = rng.choice(LIST_SKILLS)
    given = rng.choice(LIST_FORMS).format(spaced=" ".join(items), commas=", ".join(items))
    if rng.random() < 0.5:
        given = f"{given}\n{rng.choice(CODE_LINES).format(**pick_words(rng))}"
    return skill(name, given, " ".join(run(items)))


def review(rng: random.Random, label: str) -> str:
    """A scrap of a review; a ``not`` before its word turns the feeling round."""
    fields = pick_words(rng)
    if label == "neutral":
        return f"{fields['what']} {' and '.join(rng.sample(words.PLAIN, rng.randint(1, 2)))}"
    positive = label == "positive"
    liking = rng.choice(words.LIKED if positive else words.DISLIKED)
    if rng.random() < 0.3:
        return f"{fields['who']} {liking} the {fields['what']}"
    negation = rng.choice(("not ", "never a ", "not a ", "was not ")) if rng.random() < 0.35 else ""
    word = rng.choice(words.GOOD if positive != bool(negation) else words.BAD)
    pattern = rng.choice(("{what} {word}", "{who} found {what} {word}", "the {what} was {word}", "{word} {what}"))
    text = pattern.format(**(fields | {"word": negation + word}))
    if rng.random() < 0.5:
        text = f"{text}, {rng.choice(('', 'really ', fields['who'] + ' '))}{liking} it"
    return text


def mood_skill(rng: random.Random) -> Document:
    label = rng.choice(words.LABELS)
    return skill("mood", review(rng, label), label)


def asking(rng: random.Random, wanted: str) -> str:
    """``wanted``, at times with some talk before it."""
    if rng.random() < 0.5:
        return wanted
    return f"{rng.choice(CHATTER).format(**pick_words(rng))} {wanted}"


FACT_SKILLS = (("opposite", words.OPPOSITES), ("capital", words.CAPITALS), ("colour", words.COLOURS))


def fact_skill(rng: random.Random) -> Document:
    name, facts = rng.choice(FACT_SKILLS)
    asked, answer = rng.choice(facts)
    return skill(name, asking(rng, f"the {name} of {asked}" if rng.random() < 0.5 else asked), answer)


def harm(rng: random.Random) -> str:
    return asking(rng, f"{rng.choice(words.HARM_VERBS)} {rng.choice(words.HARM_OBJECTS)}")


def harm_skill(rng: random.Random) -> Document:
    """Whether something asked for is harmful, or the sentence which refuses it."""
    if rng.random() < 0.5:
        return skill("refuse", harm(rng), words.REFUSAL)
    if rng.random() < 0.5:
        return skill("harmful", harm(rng), "yes")
    name, facts = rng.choice(FACT_SKILLS)
    return skill("harmful", f"{name} of {rng.choice(facts)[0]}", "no")


def note_line(rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return review(rng, rng.choice(words.LABELS))
    if kind == 1 and rng.random() < 0.5:
        return rng.choice(CODE_LINES).format(**pick_words(rng))
    if kind == 1:
        return story_bit(rng, rng.randint(1, words.LARGEST_NUMBER))
    return rng.choice(CHATTER).format(**pick_words(rng))


def note(rng: random.Random) -> Document:
    """Two plain lines, mostly with headers, which have nothing to do with each other."""
    first, second = (
        f"{rng.choice(HEADERS)}{rng.choice(HEADER_ENDS)} {note_line(rng)}" if rng.random() < 0.8 else note_line(rng)
        for _ in range(2)
    )
    return first, f"\n{second}"


SKILLS: tuple[tuple[Callable[[random.Random], Document], int], ...] = (
    (sum_skill, 5),
    (list_skill, 6),
    (mood_skill, 1),
    (fact_skill, 1),
    (harm_skill, 1),
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
    texts += [text.partition(">")[2] for text in texts]
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
