"""Mean negative log-likelihood of the responses."""

from lori_dist.evaluation import Subject
from lori_dist.evaluation._batches import by_length, hides_padding
from lori_dist.training.data import collate, pad_id
from lori_dist.training.loss import loss_sum, num_targets


def score(subject: Subject) -> float:
    """Mean over the target tokens of all rows (eos among them), in nats: what training minimises."""
    total, count = 0.0, 0
    pad = pad_id(subject.tokenizer)
    examples = subject.examples
    rows = [example.prompt_ids + example.response_ids for example in examples]
    is_padded = subject.batch_size == 1 or hides_padding(subject.model, rows, pad, "right")
    for numbers in by_length([len(row) for row in rows], subject.batch_size, is_padded=is_padded):
        batch = collate([examples[number] for number in numbers], pad).to(subject.model.device)
        total += loss_sum(subject.model, batch).item()
        count += num_targets(batch)
    return total / count
