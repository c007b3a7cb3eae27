"""The costs of evaluating a run's models, as if one device held the whole base."""

from collections.abc import Iterator
from typing import Any

from lori_dist import jobs
from lori_dist.config import Run
from lori_dist.plan.cost import Hardware
from lori_dist.plan.model import Counted
from lori_dist.plan.rows import Counter, Lengths
from lori_dist.training.loss import logits_bytes


def planned(run: Run, model: Counted, hardware: Hardware, counter: Counter) -> dict[str, Any]:
    """The costs of a run's evaluation as plain JSON.

    models: number of evaluated models; memory: bytes of the device; fits; seconds: time of a device, over all models,
    with the merges that searches for weights try; gpu_hours; uncounted: work that takes time and cannot be counted.
    """
    rows = {name: counter.of(name, "test", task.test) for name, task in run.tasks.items()}
    models = sum(1 for job in jobs.plan(run) if job.kind == "evaluate")
    rate = hardware.tflops * 1e12 * hardware.efficiency
    seconds = models * sum(
        _seconds(run, name, metric, one, _limited(run, one.number), model, hardware, rate)
        for name, one in rows.items()
        for metric in run.evaluate.metrics
    )
    for merge in run.merges.values():
        if (search := merge.search) is not None:
            seconds += search.budget * sum(
                _seconds(run, name, search.metric, rows[name], search.rows, model, hardware, rate)
                for name in merge.tasks or run.tasks
            )
    longest = max(int(one.tokens.max()) for one in rows.values())
    memory = _memory(run, model, longest, models)
    return {
        "models": models,
        "memory": memory,
        "fits": memory * (1 + hardware.fragmentation) <= hardware.room,
        "seconds": seconds,
        "gpu_hours": seconds / 3600,
        "uncounted": list(_uncounted(run)),
    }


def _limited(run: Run, number: int) -> int:
    return number if run.evaluate.rows is None else min(number, run.evaluate.rows)


def _seconds(
    run: Run, task: str, metric: str, lengths: Lengths, number: int, model: Counted, hardware: Hardware, rate: float
) -> float:
    """Seconds of one metric of one model on one task."""
    forward = (model.flops or 4.0 * model.parameters) / 2 * lengths.mean
    forward += sum(layer.per_pair * layer.pairs(round(lengths.mean)) for layer in model.attention)
    labels = run.tasks[task].labels
    match metric:
        case "loss":
            return number * forward / rate
        case "choice":
            return number * len(labels) * forward / rate if labels is not None else 0.0
        case "exact_match":  # each token of a batch reads all weights
            batches = -(-number // run.evaluate.batch_size)
            reading = batches * run.evaluate.max_new_tokens * model.base / (hardware.bandwidth * 1e9)
            return number * forward / rate + reading
        case _:
            return 0.0


def _memory(run: Run, model: Counted, longest: int, models: int) -> int:
    """Bytes of the base, the adapters, the logits of a batch, and the keys and values of generated tokens."""
    rows, adapters = run.evaluate.batch_size, models if run.cluster.packing != "off" else 1
    of_adapters = adapters * (model.projections // model.adapters + 8 * model.kept)
    hidden = rows * longest * model.block_input // model.tokens
    logits = logits_bytes(rows * longest, model.vocabulary, hidden, chunked=model.chunked)
    generated = longest + run.evaluate.max_new_tokens if "exact_match" in run.evaluate.metrics else 0
    cached = rows * generated * model.num_blocks * model.key_values * model.dtype
    return model.base + of_adapters + max(logits, cached)


def _uncounted(run: Run) -> Iterator[str]:
    if run.evaluate.lm_eval is not None:
        settings = run.evaluate.lm_eval
        limits = f" of {settings.rows} rows" if settings.rows is not None else ""
        shots = f" with {settings.num_fewshot} examples" if settings.num_fewshot is not None else ""
        yield f"lm-eval's tasks {', '.join(settings.tasks)}{limits}{shots}"
    own = [metric for metric in run.evaluate.metrics if metric not in ("loss", "choice", "exact_match")]
    if own:
        yield f"the metrics {', '.join(own)}"
