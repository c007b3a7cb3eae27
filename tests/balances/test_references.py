"""Every balance, from inner products, against the papers' formulas on the gradients themselves, to 1e-12."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lori_dist import plugin
from tests.balances.made import gradients

Gradients = np.ndarray


def combined(name: str, own: Tensor, losses: Tensor | None = None, **options: Any) -> np.ndarray:
    """The step's gradient, of one unit."""
    balance = plugin.find("balances", name, "balance", "multitask.balance").load()
    losses = torch.ones(len(own), dtype=torch.float64) if losses is None else losses
    weights, _ = balance((own @ own.t()).unsqueeze(0), losses, {}, seed=0, step=0, **options)
    return np.asarray((weights[0] @ own).numpy())


def shortest(g: Gradients) -> np.ndarray:
    """Of the convex hull of rows: the best of all faces, each by least squares on differences of gradients."""
    best = None
    for size in range(1, len(g) + 1):
        for chosen in itertools.combinations(range(len(g)), size):
            first, *others = (g[task] for task in chosen)
            if others:
                edges = np.stack([other - first for other in others], axis=1)
                shares = np.linalg.lstsq(edges, -first, rcond=None)[0]
                if shares.min() < -1e-14 or shares.sum() > 1 + 1e-14:
                    continue
                first = first + edges @ shares
            if best is None or np.linalg.norm(first) < np.linalg.norm(best):
                best = first
    assert best is not None
    return best


def worst_gain(g: Gradients, d: np.ndarray) -> float:
    return float((g @ d).min())


tasks = st.integers(2, 5)
seeds = st.integers(0, 10**6)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, number=tasks)
def test_mgda_is_the_shortest_mixture(seed: int, number: int) -> None:
    own = gradients(seed, number, 7)
    wanted = number * shortest(own.numpy())
    assert np.abs(combined("mgda", own) - wanted).max() < 1e-12 * max(1.0, float(own.norm()))


@pytest.mark.parametrize(("normalize", "by"), [("l2", "norm"), ("loss", "loss"), ("loss+", "both")])
def test_mgda_normalises_gradients_while_it_seeks(normalize: str, by: str) -> None:
    own, losses = gradients(3, 3, 7), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    sizes = {"norm": own.norm(dim=1), "loss": losses, "both": own.norm(dim=1) * losses}[by]
    scaled = (own / sizes.unsqueeze(1)).numpy()
    w = np.linalg.lstsq(scaled.T, shortest(scaled), rcond=None)[0]
    found = combined("mgda", own, losses, normalize=normalize)
    np.testing.assert_allclose(found, 3 * w @ own.numpy(), rtol=0, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, number=tasks, c=st.sampled_from([0.2, 0.5, 0.9]))
def test_cagrad_is_at_the_radius_and_meets_the_optimality_conditions(seed: int, number: int, c: float) -> None:
    """Of the strictly concave max_d min_t <g_t, d>: d - g_0 is a mixture of the gradients that d helps least."""
    own = gradients(seed, number, 7)
    g, d = own.numpy(), combined("cagrad", own, c=c) / number
    mean = g.mean(axis=0)
    size = float(np.linalg.norm(g))
    assert abs(np.linalg.norm(d - mean) - c * np.linalg.norm(mean)) < 1e-12 * size
    gains = g @ d
    shares = np.linalg.lstsq(g.T, d - mean, rcond=None)[0]
    assert shares.min() > -1e-10 * abs(shares).max()
    used = shares > 1e-7 * abs(shares).max()
    assert np.ptp(gains[used]) < 1e-9 * size**2
    assert gains.min() > gains[used].max() - 1e-9 * size**2


def test_cagrad_of_two_tasks_is_the_closed_search() -> None:
    """Over w in [0, 1], sought on the gradients themselves by golden section, then Newton on the derivative."""
    own = gradients(11, 2, 9)
    g = own.numpy()
    mean = g.mean(axis=0)
    radius = 0.5 * np.linalg.norm(mean)

    def slope(w: float) -> float:
        mixed = w * g[0] + (1 - w) * g[1]
        return float((g[0] - g[1]) @ mean + radius * mixed @ (g[0] - g[1]) / np.linalg.norm(mixed))

    low, high = 0.0, 1.0
    if slope(low) >= 0 or slope(high) <= 0:
        w = low if slope(low) >= 0 else high
    else:
        for _ in range(200):
            w = (low + high) / 2
            low, high = (w, high) if slope(w) < 0 else (low, w)
    mixed = w * g[0] + (1 - w) * g[1]
    wanted = 2 * (mean + radius * mixed / np.linalg.norm(mixed))
    np.testing.assert_allclose(combined("cagrad", own), wanted, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, number=tasks)
def test_nash_solves_the_bargain(seed: int, number: int) -> None:
    """<g_t, d> = s / a_t, where d = sum_t a_t g_t and s is the norm of all inner products; for every task d helps."""
    own = gradients(seed, number, 9)
    g, d = own.numpy(), combined("nash", own)
    a = np.linalg.lstsq(g.T, d, rcond=None)[0]
    norm = np.linalg.norm(g @ g.T)
    assert a.min() > 0
    np.testing.assert_allclose(a * (g @ d) / norm, np.ones(number), rtol=0, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, number=tasks)
def test_aligned_is_the_polar_factor_at_the_smallest_singular_value(seed: int, number: int) -> None:
    own = gradients(seed, number, 9)
    u, s, vh = np.linalg.svd(own.numpy(), full_matrices=False)
    for scale, size in (("min", s[-1]), ("median", math.sqrt(np.median(s**2))), ("rmse", math.sqrt((s**2).mean()))):
        found = combined("aligned", own, scale=scale)
        np.testing.assert_allclose(found, size * (u @ vh).sum(axis=0), rtol=0, atol=1e-12 * (s[0] / s[-1]) ** 2)


def test_aligned_drops_directions_that_gradients_do_not_have() -> None:
    own = gradients(5, 3, 9)
    own[2] = own[0] + own[1]
    u, s, vh = np.linalg.svd(own.numpy(), full_matrices=False)
    wanted = s[1] * (u[:, :2] @ vh[:2]).sum(axis=0)
    np.testing.assert_allclose(combined("aligned", own), wanted, rtol=0, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, number=tasks)
def test_pcgrad_is_the_loop_over_gradients(seed: int, number: int) -> None:
    from lori_dist.balances.ortho import order

    own = gradients(seed, number, 9)
    g = own.numpy()
    total = np.zeros(9)
    for i in order(number, 0, 0):
        h = g[i].copy()
        for j in order(number, 0, 0):
            if i != j and h @ g[j] < 0:
                h = h - (h @ g[j]) / (g[j] @ g[j]) * g[j]
        total += h
    np.testing.assert_allclose(combined("pcgrad", own), total, rtol=0, atol=1e-11 * float(own.norm()))


# From losses, over steps.


def weights_over_steps(name: str, losses: np.ndarray, gram: Tensor, **options: Any) -> list[np.ndarray]:
    balance = plugin.find("balances", name, "balance", "multitask.balance").load()
    found, state = [], dict[str, Any]()
    for step, of_step in enumerate(losses):
        weights, state = balance(gram, torch.tensor(of_step), state, seed=0, step=step, **options)
        found.append(weights[0].numpy())
    return found


LOSSES = np.array([[2.0, 1.0, 0.5], [1.5, 0.9, 0.5], [1.0, 0.85, 0.45], [0.9, 0.8, 0.2]])
GRAM = (gradients(2, 3, 9) @ gradients(2, 3, 9).t()).unsqueeze(0)


def by_torch(function: Callable[[Tensor], Tensor], at: np.ndarray) -> np.ndarray:
    x = torch.tensor(at, requires_grad=True)
    function(x).backward()
    assert x.grad is not None
    return np.asarray(x.grad.numpy())


def test_famo_follows_its_algorithm() -> None:
    x, wanted = np.zeros(3), []
    for step, now in enumerate(LOSSES):
        if step:
            fell = torch.tensor(np.log(LOSSES[step - 1]) - np.log(now))
            gradient = by_torch(lambda x, fell=fell: (x.softmax(0) * fell).sum(), x)  # type: ignore[misc]
            x = x - 0.1 * (gradient + 0.01 * x)
        # The gradient of c sum_t z_t log l_t by the losses, with c that makes their sum one.
        z = torch.tensor(x).softmax(0).numpy()
        rates = by_torch(lambda losses, z=z: (torch.tensor(z) * losses.log()).sum(), now)  # type: ignore[misc]
        wanted.append(3 * rates / rates.sum())
    found = weights_over_steps("famo", LOSSES, GRAM, lr=0.1, decay=0.01)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_uncertainty_follows_its_loss() -> None:
    s, wanted = np.zeros(3), []
    for now in LOSSES:
        wanted.append(np.exp(-s))
        s = s - 0.1 * by_torch(lambda s, now=now: ((-s).exp() * torch.tensor(now) + s / 2).sum(), s)  # type: ignore[misc]
    np.testing.assert_allclose(weights_over_steps("uncertainty", LOSSES, GRAM, lr=0.1), wanted, rtol=0, atol=1e-12)


def test_gradnorm_follows_its_loss() -> None:
    own, w, wanted = gradients(2, 3, 9), np.ones(3), []
    norms = own.norm(dim=1)
    for now in LOSSES:
        wanted.append(w)
        ratios = torch.tensor(now / LOSSES[0])
        sizes = torch.tensor(w) * norms
        target = sizes.mean() * (ratios / ratios.mean()) ** 1.5
        slope = by_torch(lambda w, target=target: (w * norms - target).abs().sum(), w)  # type: ignore[misc]
        w = w - 0.05 * slope / float(sizes.mean())
        w = 3 * w / w.sum()
    np.testing.assert_allclose(weights_over_steps("gradnorm", LOSSES, GRAM, lr=0.05), wanted, rtol=0, atol=1e-12)
