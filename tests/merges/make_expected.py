"""Makes expected.json: what the merges give on small matrices, from the papers' formulas alone.

Plain NumPy in float64, on dense matrices, with nothing of lori_dist. Run it again only to add cases:

    python tests/merges/make_expected.py
"""

import hashlib
import json
from pathlib import Path

import numpy as np

OUT, IN, RANK = 9, 8, 3
ALPHAS = [3.0, 6.0, 1.5]
WEIGHTS = [0.7, -0.4, 1.3]
NAMES = ["a", "b", "c"]
T = 3


def inputs() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """B_t, half of it zero, and A_t of three tasks."""
    rng = np.random.default_rng(0)
    bs = [rng.normal(size=(OUT, RANK)).round(3) * (rng.random((OUT, RANK)) < 0.5) for _ in range(T)]
    return bs, [rng.normal(size=(RANK, IN)).round(3) for _ in range(T)]


# Entry by entry.


def trim(x, density):
    n = np.count_nonzero(x)
    k = max(1, round(density * n))
    order = np.argsort(-np.abs(x).ravel(), kind="stable")[:k]
    out = np.zeros(x.size)
    out[order] = x.ravel()[order]
    return out.reshape(x.shape)


def draw(x, density, name, seed=5):
    """Word f of a Philox stream decides on entry f."""
    text = b"\0".join([b"lori_dist.merges.dare.v1", str(seed).encode(), b"m", name.encode()])
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    words = np.random.Philox(key=key).random_raw(x.size)
    return np.where(words.reshape(x.shape) < int(density * 2**64), x / density, 0.0)


def vote(ys, elect="total", denominators=(1, 1, 1)):
    out = np.zeros(ys[0].shape)
    for place in np.ndindex(*out.shape):
        values = [y[place] for y in ys]
        ballots = np.sign(values) if elect == "frequency" else values
        sign = 1.0 if sum(ballots) >= 0 else -1.0
        agreeing = [(v, d) for v, d in zip(values, denominators, strict=True) if np.sign(v) == sign]
        if agreeing:
            out[place] = sum(v for v, _ in agreeing) / sum(d for _, d in agreeing)
    return out


def add(xs):
    return sum(w * x for w, x in zip(WEIGHTS, xs, strict=True))


def ties(xs, density, elect="total", by_weight=False):
    ys = [w * trim(x, density) for w, x in zip(WEIGHTS, xs, strict=True)]
    return vote(ys, elect, [abs(w) for w in WEIGHTS] if by_weight else (1, 1, 1))


def dare(xs, density):
    return add([draw(x, density, name) for x, name in zip(xs, NAMES, strict=True)])


def dare_ties(xs, density):
    return vote([w * draw(x, density, name) for w, x, name in zip(WEIGHTS, xs, NAMES, strict=True)])


# By singular values.


def truncated(x, rank):
    u, s, vh = np.linalg.svd(x)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def knots(xs, merge):
    u, s, vh = np.linalg.svd(np.hstack(xs), full_matrices=False)
    kept = s > 1e-5
    blocks = np.hsplit((s[:, None] * vh)[kept], len(xs))
    return u[:, kept] @ merge([np.where(np.abs(block) < 1e-12, 0, block) for block in blocks])


def polar(x):
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh


def tsv(xs, keep):
    us, ss, vs = zip(*(np.linalg.svd(x, full_matrices=False) for x in xs), strict=True)
    s = np.concatenate([w * s[:keep] for w, s in zip(WEIGHTS, ss, strict=True)])
    u, v = np.hstack([u[:, :keep] for u in us]), np.vstack([v[:keep] for v in vs])
    return polar(u) @ np.diag(s) @ polar(v)


def core(bs, as_, ds, merge):
    u = np.linalg.svd(np.hstack(bs), full_matrices=False)[0]
    _, s, vh = np.linalg.svd(np.vstack(as_), full_matrices=False)
    v = vh[s > 1e-10].T
    return u @ merge([u.T @ d @ v for d in ds]) @ v.T


def equalized(x):
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    kept = s > 1e-10
    return u[:, kept] @ vh[kept] * s[kept].mean()


def pico(bs, as_, scales, ds):
    u, s, _ = np.linalg.svd(np.hstack(bs), full_matrices=False)
    damped = 1 / (1 + (T - 1) * s**2 / (s**2).sum())
    new = [b + u @ np.diag(damped - 1) @ u.T @ b for b in bs]
    merged = add([scale * b @ a for scale, b, a in zip(scales, new, as_, strict=True)])
    return merged * np.mean([np.linalg.norm(d) for d in ds]) / np.linalg.norm(merged)


def magprune(x, density, epsilon, name, seed=5):
    """Row by row: rank i of n entries that are not zero has probability density - epsilon + 2 epsilon i / (n - 1)."""
    probabilities = np.full(x.shape, density)
    for row in range(len(x)):
        places = [place for place in np.argsort(np.abs(x[row]), kind="stable") if x[row, place] != 0]
        for i, place in enumerate(places):
            if len(places) > 1:
                probabilities[row, place] = density - epsilon + 2 * epsilon * i / (len(places) - 1)
    text = b"\0".join([b"lori_dist.merges.dare.v1", str(seed).encode(), b"m", name.encode()])
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    words = np.random.Philox(key=key).random_raw(x.size).reshape(x.shape)
    return np.where(words / 2.0**64 < probabilities, x / probabilities, 0.0)


def magpruned(xs, density, epsilon):
    return [w * magprune(x, density, epsilon, name) for w, x, name in zip(WEIGHTS, xs, NAMES, strict=True)]


def breadcrumbs(x, density, gamma):
    order = [place for place in np.argsort(-np.abs(x).ravel(), kind="stable") if x.ravel()[place] != 0]
    kept = max(1, round(density * len(order)))
    outliers = min(round(gamma * len(order)), len(order) - kept)
    out = np.zeros(x.size)
    chosen = order[outliers : outliers + kept]
    out[chosen] = x.ravel()[chosen]
    return out.reshape(x.shape)


def sce(xs, density):
    ys = [w * x for w, x in zip(WEIGHTS, xs, strict=True)]
    variance = np.var(ys, axis=0)
    if density < 1:
        kept = trim(variance, density) != 0
        ys = [y * kept for y in ys]
    shares = np.array([(y**2).sum() for y in ys]) / sum((y**2).sum() for y in ys)
    out = np.zeros(ys[0].shape)
    for place in np.ndindex(*out.shape):
        sign = 1.0 if sum(y[place] for y in ys) >= 0 else -1.0
        agreeing = [(share, y[place]) for share, y in zip(shares, ys, strict=True) if np.sign(y[place]) == sign]
        if agreeing:
            out[place] = sum(share * y for share, y in agreeing) / sum(share for share, _ in agreeing)
    return out


def iso(ds, common, flatten=1.0):
    ys = [w * d for w, d in zip(WEIGHTS, ds, strict=True)]
    u, s, vh = np.linalg.svd(sum(ys))
    r = int((s > 1e-10).sum())
    each = round((r - int(r * common)) / T)
    each -= each * T > r
    k = r - each * T
    us, ss, vs = [u[:, :k]], [s[:k]], [vh[:k]]
    for y in ys:
        a, b, c = np.linalg.svd(y - u[:, :k] @ u[:, :k].T @ y)
        us, ss, vs = [*us, a[:, :each]], [*ss, b[:each]], [*vs, c[:each]]
    s = np.concatenate(ss)
    return polar(np.hstack(us)) @ np.diag(s + flatten * (s.mean() - s)) @ polar(np.vstack(vs))


def compress(ds, rank, merge, sweeps=10):
    def leading(matrices):
        return np.linalg.svd(np.hstack(matrices))[0][:, :rank]

    u, v = leading(ds), leading([d.T for d in ds])
    for _ in range(sweeps):
        u = leading([d @ v for d in ds])
        v = leading([d.T @ u for d in ds])
    found = [u.T @ d @ v for d in ds]
    return u @ merge([np.where(np.abs(x) < 1e-12, 0, x) for x in found]) @ v.T


def cp(ds, rank, sweeps=200, tolerance=1e-9):
    """Alternating least squares on the dense tensor, from two starts."""
    x = np.stack(ds)

    def error(u, v, c):
        return np.linalg.norm(x - np.einsum("pk,qk,tk->tpq", u, v, c)) / np.linalg.norm(x)

    def solved(axis, one, other):
        pairs = np.stack([np.kron(one[:, k], other[:, k]) for k in range(one.shape[1])], axis=1)
        return np.linalg.lstsq(pairs, np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).T, rcond=None)[0].T

    def fitted(u, v, c):
        now = error(u, v, c)
        for _ in range(sweeps):
            u = solved(1, c, v)
            u /= np.linalg.norm(u, axis=0)
            v = solved(2, c, u)
            v /= np.linalg.norm(v, axis=0)
            c = solved(0, u, v)
            before, now = now, error(u, v, c)
            if before - now < tolerance:
                break
        return now, u, v, c

    v = np.linalg.svd(np.vstack(ds))[2][:rank].T
    together = fitted(np.zeros((OUT, rank)), v, np.ones((T, rank)))
    found = [(s, t, u, vh) for t, d in enumerate(ds) for u, s, vh in zip(*triplets(d), strict=True)]
    found = sorted(found, key=lambda one: -one[0])[:rank]
    u = np.stack([s * u for s, _, u, _ in found], axis=1)
    v = np.stack([vh for _, _, _, vh in found], axis=1)
    apart = fitted(u, v, np.stack([np.eye(T)[t] for _, t, _, _ in found], axis=1))
    _, u, v, c = min(together, apart, key=lambda one: one[0])
    return u @ np.diag(np.array(WEIGHTS) @ c) @ v.T


def triplets(d):
    u, s, vh = np.linalg.svd(d, full_matrices=False)
    kept = s > 1e-10
    return u.T[kept], s[kept], vh[kept]


def do_merging(xs, as_, steps, gamma):
    """xs: s_t B_t."""

    def apart(matrices):  # their columns
        norms = [np.linalg.norm(x) for x in matrices]
        starts = [x / norm for x, norm in zip(matrices, norms, strict=True)]
        now = starts
        for _ in range(steps):
            now = [
                x - (4 * sum(o @ o.T @ x for o in now if o is not x) + 2 * gamma * (x - start)) / (12 * T + 2 * gamma)
                for x, start in zip(now, starts, strict=True)
            ]
        return [x / np.linalg.norm(x) * norm for x, norm in zip(now, norms, strict=True)]

    ds = [b @ a.T for b, a in zip(apart(xs), apart([a.T for a in as_]), strict=True)]
    out = np.zeros((OUT, IN))
    for row in range(OUT):
        sizes = [np.linalg.norm(d[row]) for d in ds]
        has = [size > 1e-12 for size in sizes]
        if any(has):
            mean = sum(size for size, yes in zip(sizes, has, strict=True) if yes) / sum(has)
            out[row] = mean * sum(
                w * d[row] / size for w, d, size, yes in zip(WEIGHTS, ds, sizes, has, strict=True) if yes
            )
    return out


def peft_linear(bs, as_, scales):
    shares = [w * s for w, s in zip(WEIGHTS, scales, strict=True)]
    b = sum(np.sqrt(abs(x)) * b for x, b in zip(shares, bs, strict=True))
    a = sum(np.sign(x) * np.sqrt(abs(x)) * a for x, a in zip(shares, as_, strict=True))
    return b @ a


def cases(bs, as_, shared):
    scales = [alpha / RANK for alpha in ALPHAS]
    ds = [scale * b @ a for scale, b, a in zip(scales, bs, as_, strict=True)]
    xs = [scale * b for scale, b in zip(scales, bs, strict=True)]
    negated = [w * d for w, d in zip([0.7, 0.4, 1.3], ds, strict=True)]

    def entries(space, merge):
        return merge(xs) @ as_[0] if space == "b" else merge(ds)

    yield "concat", {}, add(ds)
    yield "linear", {}, add(ds)
    yield "task_arithmetic", {"scale": 0.5, "negate": ["b"]}, 0.5 * sum(negated)
    for space in ("b", "dense") if shared else ("dense",):
        at = {"space": space}
        yield "magnitude", {"density": 0.4, **at}, entries(space, lambda x: add([trim(y, 0.4) for y in x]))
        yield "ties", {"density": 0.4, **at}, entries(space, lambda x: ties(x, 0.4))
        yield "ties", {"density": 0.7, "scale": 1.5, **at}, 1.5 * entries(space, lambda x: ties(x, 0.7))
        yield (
            "ties",
            {"density": 0.7, "elect": "frequency", "divide": "weight", **at},
            entries(space, lambda x: ties(x, 0.7, "frequency", by_weight=True)),
        )
        yield "dare", {"density": 0.6, "seed": 5, **at}, entries(space, lambda x: dare(x, 0.6))
        yield "dare_ties", {"density": 0.6, "seed": 5, **at}, entries(space, lambda x: dare_ties(x, 0.6))
        yield (
            "della",
            {"density": 0.6, "epsilon": 0.3, "seed": 5, **at},
            entries(space, lambda x: vote(magpruned(x, 0.6, 0.3))),
        )
        yield (
            "della",
            {"inner": "task_arithmetic", "density": 0.6, "epsilon": 0.3, "seed": 5, **at},
            entries(space, lambda x: sum(magpruned(x, 0.6, 0.3))),
        )
        yield (
            "breadcrumbs",
            {"density": 0.5, "gamma": 0.2, **at},
            entries(space, lambda x: add([breadcrumbs(y, 0.5, 0.2) for y in x])),
        )
        yield (
            "breadcrumbs",
            {"inner": "ties", "density": 0.7, "gamma": 0.4, **at},
            entries(space, lambda x: vote([w * breadcrumbs(y, 0.7, 0.4) for w, y in zip(WEIGHTS, x, strict=True)])),
        )
        for density in (0.4, 1.0):
            yield "sce", {"density": density, **at}, entries(space, lambda x, density=density: sce(x, density))
    yield "magnitude", {"density": 0.4, "space": "b"}, add([trim(x, 0.4) @ a for x, a in zip(xs, as_, strict=True)])
    yield "magnitude", {"density": 0.4, "space": "dense", "rank": 2}, truncated(add([trim(d, 0.4) for d in ds]), 2)
    for rank in (1, 2, 8):
        yield "svd", {"rank": rank}, truncated(add(ds), rank)
    for inner, merge in (
        ("task_arithmetic", lambda x: add([trim(y, 0.5) for y in x])),
        ("ties", lambda x: ties(x, 0.5)),
        ("dare", lambda x: dare(x, 0.5)),
        ("dare_ties", lambda x: dare_ties(x, 0.5)),
    ):
        yield "knots", {"inner": inner, "density": 0.5, "seed": 5, "space": "dense"}, knots(ds, merge)
        yield "core_space", {"inner": inner, "density": 0.5, "seed": 5}, core(bs, as_, ds, merge)
    if shared:
        yield "knots", {"inner": "ties", "density": 0.5}, knots(xs, lambda x: ties(x, 0.5)) @ as_[0]
    yield "core_space", {"inner": "tsv", "keep": 1}, core(bs, as_, ds, lambda x: tsv(x, 1))
    yield "core_space", {"equalize": True}, core(bs, as_, ds, lambda x: equalized(add(x)))
    yield "tsv", {"keep": 1}, tsv(ds, 1)
    if not shared:
        yield "tsv", {"keep": 2}, tsv(ds, 2)
    for common in (1.0, 0.8, 0.5) if not shared else (1.0,):
        yield "iso", {"common": common}, iso(ds, common)
    yield "iso", {"common": 0.1, "flatten": 0.5}, iso(ds, 0.1, 0.5)
    for inner, merge in (("task_arithmetic", add), ("ties", lambda x: ties(x, 0.5))):
        density = 0.5 if inner == "ties" else 1.0
        yield "compress", {"inner": inner, "density": density}, compress(ds, RANK, merge)
        yield "compress", {"inner": inner, "density": density, "rank": 2, "sweeps": 0}, compress(ds, 2, merge, 0)
    yield "cp", {"sweeps": 30}, cp(ds, RANK, 30)
    yield "cp", {"rank": 2, "sweeps": 5, "tolerance": 0.0}, cp(ds, 2, 5, 0.0)
    yield "do_merging", {}, do_merging(xs, as_, 100, 1.0)
    yield "do_merging", {"steps": 3, "gamma": 0.1}, do_merging(xs, as_, 3, 0.1)
    yield "do_merging", {"steps": 0}, do_merging(xs, as_, 0, 1.0)
    yield "pico", {}, pico(bs, as_, scales, ds)
    yield "peft_linear", {}, peft_linear(bs, as_, scales)


def main() -> None:
    bs, as_ = inputs()
    made = {
        "alphas": ALPHAS,
        "weights": WEIGHTS,
        "names": NAMES,
        "b": [b.tolist() for b in bs],
        "a": [a.tolist() for a in as_],
        "cases": [
            {"shared": shared, "method": method, "options": options, "delta": np.asarray(delta).round(12).tolist()}
            for shared in (False, True)
            for method, options, delta in cases(bs, [as_[0]] * T if shared else as_, shared)
        ],
    }
    lines = json.dumps(made).replace('{"shared"', '\n{"shared"')
    Path(__file__).with_name("expected.json").write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
