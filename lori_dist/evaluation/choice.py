"""Share of rows whose label the model finds likelier than the other labels."""

import dataclasses

from lori_dist.errors import ConfigError
from lori_dist.evaluation import Subject
from lori_dist.evaluation._batches import by_length
from lori_dist.training.data import Example, collate, pad_id, response_ids, shorten
from lori_dist.training.loss import log_likelihoods
from lori_dist.training.model import check


def score(subject: Subject) -> float | None:
    """Accuracy of the likeliest label: by the sum of its tokens' log-probabilities after the prompt, eos among them.

    Of equally likely labels, the first counts. None for a task without labels.
    Raises ConfigError for a row whose response is no label.
    """
    if subject.labels is None:
        return None
    answers = [_answer(subject, number) for number in range(len(subject.examples))]
    candidates = _candidates(subject)
    check(candidates, subject.model)  # a label can be longer than any row's own response
    scores = [0.0] * len(candidates)
    pad = pad_id(subject.tokenizer)
    for rows in by_length([candidate.num_tokens for candidate in candidates], subject.batch_size):
        batch = collate([candidates[row] for row in rows], pad).to(subject.model.device)
        for row, value in zip(rows, log_likelihoods(subject.model, batch).tolist(), strict=True):
            scores[row] = value
    num_labels = len(subject.labels)
    found = [scores[first : first + num_labels] for first in range(0, len(scores), num_labels)]
    hits = sum(row.index(max(row)) == answer for row, answer in zip(found, answers, strict=True))
    return hits / len(answers)


def _answer(subject: Subject, number: int) -> int:
    assert subject.labels is not None
    response = subject.examples[number].response
    if response not in subject.labels:
        raise ConfigError(
            f"tasks.{subject.task}.labels: the response of test row {number + 1} is {response!r}; "
            f"wanted one of {', '.join(repr(label) for label in subject.labels)}"
        )
    return subject.labels.index(response)


def _candidates(subject: Subject) -> list[Example]:
    """Every row with every label. All labels of a row follow the same prompt, short enough for the longest label."""
    assert subject.labels is not None
    labels = [ids[: subject.max_length - 1] for ids in response_ids(subject.labels, subject.tokenizer)]
    room = subject.max_length - max(len(ids) for ids in labels)
    return [
        dataclasses.replace(example, prompt_ids=shorten(example.prompt_ids, room, subject.tokenizer), response_ids=ids)
        for example in subject.examples
        for ids in labels
    ]
