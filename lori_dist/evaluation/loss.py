"""Mean negative log-likelihood of the responses."""

from lori_dist.evaluation import Subject
from lori_dist.evaluation._batches import by_length
from lori_dist.training.data import collate, pad_id
from lori_dist.training.loss import loss_sum, num_targets


def score(subject: Subject) -> float:
    """Mean over the target tokens of all rows (eos among them), in nats: what training minimises."""
    total, count = 0.0, 0
    pad = pad_id(subject.tokenizer)
    examples = subject.examples
    for rows in by_length([example.num_tokens for example in examples], subject.batch_size):
        batch = collate([examples[row] for row in rows], pad).to(subject.model.device)
        total += loss_sum(subject.model, batch).item()
        count += num_targets(batch)
    return total / count
