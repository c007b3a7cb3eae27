"""Makes the four small tasks of the quickstart, as JSON lines.

    python configs/quickstart/make_data.py

writes ``data/<task>.train.jsonl`` and ``data/<task>.test.jsonl`` next to this script for

* ``arithmetic``: word problems (addition and subtraction up to 20), rows of ``prompt`` and ``response``;
* ``programs``: short Python programs over a list, answered with what they print, rows of ``prompt``, ``response``;
* ``understanding``: the feeling of a review, classification rows of ``text`` and ``label_name``;
* ``refusal``: questions to an assistant, which answers the harmless ones and refuses the harmful ones, rows of
  ``prompt`` and ``response``.

No prompt occurs twice, in one file or across train and test. The files depend on ``--seed`` only.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import words

Row = dict[str, str]

DEFAULT_SEED = 20250416
DEFAULT_TRAIN_ROWS = 1500
DEFAULT_TEST_ROWS = 150

ADD_STORIES = (
    "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
    "There are {a} {things} in one box and {b} in another. How many {things} are there in all?",
    "A shop sold {a} {things} on {day} and {b} the day after. How many {things} did it sell?",
)
SUBTRACT_STORIES = (
    "{name} had {a} {things} and gave {b} away. How many {things} are left?",
    "A shop had {a} {things} on {day} and then sold {b}. How many {things} are still there?",
    "{name} needs {a} {things} but has only {b}. How many {things} are missing?",
)

LIST_EXPRESSIONS: tuple[tuple[str, Callable[[list[str]], list[str]]], ...] = (
    ("*sorted(x)", sorted),
    ("*x[::-1]", lambda items: items[::-1]),
    ("x[0]", lambda items: items[:1]),
    ("x[-1]", lambda items: items[-1:]),
    ("max(x)", lambda items: [max(items)]),
    ("min(x)", lambda items: [min(items)]),
)
LIST_LENGTHS = (3, 4, 5)

OPINION_CLAUSES = (
    "the {what} was {word}",
    "this is a {word} {what}",
    "what a {word} {what}",
    "{who} found the {what} {word}",
)
NEGATED_CLAUSES = (
    "the {what} was not {word}",
    "this is not a {word} {what}",
    "{who} never found the {what} {word}",
)
REACTIONS = ("and {who} {did} it", "so {who} {did} every part", "and {who} really {did} it", "and {who} {did} the end")

FACT_QUESTIONS = (
    ("What is the opposite of {}?", words.OPPOSITES),
    ("What is the capital of {}?", words.CAPITALS),
    ("What is the colour of {}?", words.COLOURS),
)
ASKING = ("{}", "Please tell me: {}", "{name} asks: {}", "Hello! {}", "On {day} {name} asks: {}", "{day} again. {}")
HARM_QUESTIONS = (
    "How can I {}?",
    "What is the best way to {}?",
    "Where can {name} learn to {}?",
    "Can you help me {}?",
)


def arithmetic_row(rng: random.Random) -> Row:
    """A word problem; no number in it or in its answer is above the largest one."""
    total = rng.randint(2, words.LARGEST_NUMBER)
    part = rng.randint(1, total - 1)
    adds = rng.random() < 0.5
    a, b, answer = (part, total - part, total) if adds else (total, part, total - part)
    story = rng.choice(ADD_STORIES if adds else SUBTRACT_STORIES)
    fields = {"name": rng.choice(words.NAMES), "things": rng.choice(words.THINGS), "day": rng.choice(words.DAYS)}
    return {"prompt": story.format(a=a, b=b, **fields), "response": str(answer)}


def programs_row(rng: random.Random) -> Row:
    """A two-line Python program over a list of digits or of words, and the line it prints."""
    length = rng.choice(LIST_LENGTHS)
    if rng.random() < 0.5:
        items = [str(digit) for digit in rng.sample(range(10), length)]
        line = f"x = [{', '.join(items)}]"
    else:
        items = rng.sample(words.LIST_WORDS, length)
        line = f'x = "{" ".join(items)}".split()'
    expression, run = rng.choice(LIST_EXPRESSIONS)
    return {"prompt": f"{line}\nprint({expression})", "response": " ".join(run(items))}


def understanding_row(rng: random.Random) -> Row:
    """A review of one or two clauses with the feeling it tells; a negated word tells the opposite feeling."""
    what, who = rng.choice(words.REVIEWED), rng.choice(words.PEOPLE)
    label = rng.choice(words.LABELS)
    if label == "neutral":
        first, second = rng.sample(words.PLAIN, 2)
        return {"text": f"the {what} {first} and {second}", "label_name": label}
    positive = label == "positive"
    negated = rng.random() < 0.35
    clause = rng.choice(NEGATED_CLAUSES if negated else OPINION_CLAUSES)
    text = clause.format(what=what, who=who, word=rng.choice(words.GOOD if positive != negated else words.BAD))
    if rng.random() < 0.6:
        did = rng.choice(words.LIKED if positive else words.DISLIKED)
        text = f"{text} {rng.choice(REACTIONS).format(who=rng.choice(words.PEOPLE), did=did)}"
    return {"text": text, "label_name": label}


def refusal_row(rng: random.Random) -> Row:
    """A question for an assistant: a fact, which it tells, or something harmful, which it refuses."""
    if rng.random() < 0.5:
        template, facts = rng.choice(FACT_QUESTIONS)
        asked, response = rng.choice(facts)
        question = template.format(asked)
    else:
        harm = f"{rng.choice(words.HARM_VERBS)} {rng.choice(words.HARM_OBJECTS)}"
        question = rng.choice(HARM_QUESTIONS).format(harm, name=rng.choice(words.NAMES))
        response = words.REFUSAL
    asking = rng.choice(ASKING)
    prompt = asking.format(question, name=rng.choice(words.NAMES), day=rng.choice(words.DAYS))
    return {"prompt": prompt, "response": response}


TASKS: dict[str, Callable[[random.Random], Row]] = {
    "arithmetic": arithmetic_row,
    "programs": programs_row,
    "understanding": understanding_row,
    "refusal": refusal_row,
}


def task_rows(task: str, count: int, seed: int) -> list[Row]:
    """``count`` rows of ``task``, all with different prompts."""
    rng = random.Random(f"{task}-{seed}")
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = TASKS[task](rng)
        rows.setdefault(row.get("prompt") or row["text"], row)
    return list(rows.values())


def write_rows(path: Path, rows: list[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "data", help="folder to write to")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--train-rows", type=int, default=DEFAULT_TRAIN_ROWS)
    parser.add_argument("--test-rows", type=int, default=DEFAULT_TEST_ROWS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        rows = task_rows(task, args.train_rows + args.test_rows, args.seed)
        write_rows(args.out / f"{task}.train.jsonl", rows[: args.train_rows])
        write_rows(args.out / f"{task}.test.jsonl", rows[args.train_rows :])
        print(f"{task}: {args.train_rows} train rows, {args.test_rows} test rows")


if __name__ == "__main__":
    main()
