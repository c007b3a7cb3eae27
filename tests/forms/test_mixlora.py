"""Pools of rows of A and columns of B, of which each row of a batch takes some."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lori_dist.errors import ConfigError
from lori_dist.evaluation._answers import Reader
from lori_dist.evaluation._rows import Continuation, Likelihood
from lori_dist.forms import Site
from lori_dist.forms.mixlora import form
from lori_dist.training.data import packed
from lori_dist.training.loss import log_likelihoods, loss_sum
from tests.engines.oracle import PAD, examples
from tests.forms.made import CASES, batch_of, fill
from tests.tokenizers import tiny_tokenizer

E, R = 5, 3
SITE = Site(module="layer", in_features=6, out_features=7, tasks=("one",))


def made(rank: int = R, *, experts: int = E, **options: Any) -> Any:
    return form(rank=rank, alpha=2.0 * rank, trains_a=False, experts=experts, **options)


def tensors(rank: int = R, experts: int = E) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"a": (experts, 6), "b": (7, experts), "router_a": (experts, 6), "router_b": (experts, 6)}
    shapes["router_ab"] = (rank, experts, 6)  # type: ignore[assignment]
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def numbers(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def updated(one: Any, t: dict[str, Tensor], h: Tensor, x: Tensor) -> Tensor:
    found: Tensor = one.update(t, x, one.choose(t, h))
    return found


@pytest.mark.parametrize("pairing", ["order", "index"])
@pytest.mark.parametrize("condition", ["single", "double", "none"])
@pytest.mark.parametrize("gate", ["soft", "hard"])
def test_it_is_the_formula_row_by_row(gate: str, condition: str, pairing: str) -> None:
    t, h, x = tensors(), numbers(8), numbers(8, seed=4)
    found = updated(made(gate=gate, condition=condition, pairing=pairing), t, h, x)
    for row in range(8):
        p = torch.softmax(t["router_a"] @ h[row], 0)
        of_a = sorted(range(E), key=lambda one: -float(p[one]))[:R]
        q = torch.softmax(t["router_b"] @ h[row], 0)
        more = sum(torch.softmax(t["router_ab"][place] @ t["a"][one], 0) for place, one in enumerate(of_a))
        if condition != "none":
            q = q + (torch.softmax(more, 0) if condition == "double" else more)  # type: ignore[call-overload]
        of_b = sorted(range(E), key=lambda one: -float(q[one]))[:R]
        if pairing == "index":
            of_a, of_b = sorted(of_a), sorted(of_b)
        wanted = torch.zeros(7)
        for one, other in zip(of_a, of_b, strict=True):
            weight = 1.0
            if gate == "soft":
                weight = float(R * p[one] / p[of_a].sum() * R * q[other] / q[of_b].sum())
            wanted += 2.0 * weight * t["b"][:, other] * (t["a"][one] @ x[row])
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)


def test_one_expert_is_lora_of_rank_one() -> None:
    t, x = tensors(1, 1), numbers(4)
    for gate in ("soft", "hard"):
        found = updated(made(1, experts=1, gate=gate), t, x, x)
        torch.testing.assert_close(found, 2.0 * x @ t["a"].t() @ t["b"].t())


def test_all_experts_with_equal_scores_paired_by_index_are_lora() -> None:
    t, x = tensors(E, E), numbers(4)
    t |= {name: torch.zeros_like(one) for name, one in t.items() if name.startswith("router")}
    found = updated(made(E, pairing="index"), t, x, x)
    torch.testing.assert_close(found, 2.0 * x @ t["a"].t() @ t["b"].t())


def test_the_order_of_a_pool_does_not_matter() -> None:
    t, h, x = tensors(), numbers(8), numbers(8, seed=4)
    found = updated(made(), t, h, x)
    a, b = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([2, 0, 1, 4, 3])
    other = {
        "a": t["a"][a],
        "router_a": t["router_a"][a],
        "b": t["b"][:, b],
        "router_b": t["router_b"][b],
        "router_ab": t["router_ab"][:, b],
    }
    torch.testing.assert_close(updated(made(), other, h, x), found, rtol=1e-4, atol=1e-5)


def test_routers_learn_from_soft_gates_and_are_made_from_the_seed_with_hard_ones() -> None:
    t = {name: one.requires_grad_() for name, one in tensors().items()}
    updated(made(), t, numbers(8), numbers(8, seed=4)).square().sum().backward()
    assert all(bool(one.grad.any()) for one in t.values() if one.grad is not None)
    assert t["router_a"].grad is not None
    for gate, learns in (("soft", True), ("hard", False)):
        entries = made(gate=gate).entries(SITE)
        assert [entries[name].trained for name in ("router_a", "router_b", "router_ab")] == [learns] * 3


def test_it_has_as_many_parameters_as_the_formula() -> None:
    site = Site(module="layer", in_features=4096, out_features=4096, tasks=("one",))
    found = form(rank=4, alpha=32.0, trains_a=True).entries(site)
    sizes = {name: torch.Size(entry.shape).numel() for name, entry in found.items()}
    assert sizes["a"] + sizes["b"] == 131_072
    assert sum(size for name, size in sizes.items() if name.startswith("router")) == 393_216


def test_fewer_experts_than_the_rank_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"form\.experts: got 2, and adapter\.rank is 3; give at least that"):
        made(3, experts=2)


def test_a_row_does_not_depend_on_others_on_padding_or_on_a_shared_sequence() -> None:
    model = fill(CASES["mixlora"].model())
    rows = [(row, 0) for row in (3, 7, 11, 2)]
    with torch.no_grad():
        alone = torch.stack([log_likelihoods(model, batch_of([row]))[0] for row in rows])
        torch.testing.assert_close(log_likelihoods(model, batch_of(rows)), alone, rtol=1e-5, atol=1e-5)
        made_of = [examples()[row] for row, _ in rows]
        together = packed(made_of, PAD, sum(one.num_tokens for one in made_of) + 3)
        assert len(together.input_ids) == 1
        wanted = sum(loss_sum(model, packed([one], PAD, one.num_tokens)) for one in made_of)
        torch.testing.assert_close(loss_sum(model, together), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_written_follows_from_the_choice_of_the_prompt() -> None:
    """As in training, where the answer is known: the reader, which writes rows together, and labels say the same."""
    model = fill(CASES["mixlora"].model()).eval()
    reader = Reader(model=model, tokenizer=tiny_tokenizer(), batch_size=4, device=torch.device("cpu"))
    prompts = [(5, 6, 7, 9, 11), (8, 9, 3), (4, 4, 6, 12)]
    written = reader.answers((None,), [Continuation(prompt, 6) for prompt in prompts])[None]
    for prompt, text in zip(prompts, written, strict=True):
        assert isinstance(text, tuple)
        ids = torch.tensor([[*prompt, *text]])
        labels = torch.tensor([[-100] * len(prompt) + list(text)])
        with torch.no_grad():
            predicted = model(ids, labels=labels).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert predicted.tolist() == list(text)
    # Several responses to one prompt, which other forms read once.
    asked = [Likelihood(prompts[0], response) for response in ((3, 4), (9, 5, 6), (7, 7))]
    for request, found in zip(asked, reader.answers((None,), asked)[None], strict=True):
        [wanted] = reader.answers((None,), [request])[None]
        assert found == pytest.approx(wanted, rel=1e-5)
