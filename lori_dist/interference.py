"""The interference between the updates of several adapters, from the adapters alone: no model is run."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lori_dist.adapter.adapter import Adapter
from lori_dist.adapter.targets import place
from lori_dist.adapter.update import Part, Update, label, split
from lori_dist.errors import AdapterError

SIGN_ENTRIES = 1 << 22
"""Entries of a module's update whose signs are compared; evenly spread rows stand for a larger update. This bounds the
time for a 70B model."""

_CHUNK = 1 << 20  # entries of an update that exist at a time
_CUT = 4 * torch.finfo(torch.float64).eps  # per row: what an eigenvalue of a Gram matrix of lower rank can become

Figures = dict[str, Any]
"""Plain JSON data."""
Sums = Mapping[str, float]
"""Quantities that add up over modules; a missing one is zero."""


def interference(adapters: Sequence[Adapter], *, names: Sequence[str] | None = None) -> Figures:
    """Every figure of a set of adapters, over the modules of all of them, as plain JSON data.

    names: of the adapters, all different; by default those of their blocks, joined by `+`, with numbers where equal.
    An adapter has nothing in a module that it does not adapt. Memory is that of the factors B and A of one module.

    Returns
        adapters: a list of {name, rank, blocks, kept, total, norm}.
        layers, projections: their names, in the modules' order; see `adapter.targets`.
        norms: adapter -> {layers, projections: name -> |D|_F, table: a row for each layer with a number for each
            projection, null where there is no such module}.
        modules: path -> {shape, layer, projection, norms: adapter -> |D|_F}.
        pairs: a list of {adapters: two names, overall, layers: name -> figures, modules: path -> figures}, figures only
            where both keep an entry. `pair_figures` says what they are.

    Raises AdapterError for names that do not fit, for adapters of different base models or shapes, and for an A that is
    not the one that was trained with.
    """
    names = _names(adapters) if names is None else list(names)
    _check(adapters, names)
    shapes = {module: shape for adapter in adapters for module, shape in adapter.shapes.items()}
    norms: dict[str, dict[str, float]] = {}
    sums: dict[tuple[str, str], dict[str, Sums]] = {pair: {} for pair in itertools.combinations(names, 2)}
    for module, shape in shapes.items():
        factors = {name: _factors(split(adapter, module, shape)) for name, adapter in zip(names, adapters, strict=True)}
        norms[module] = {name: factor.norm for name, factor in factors.items()}
        signs = _signs(factors)
        for pair in sums:
            sums[pair][module] = {**_sums(*(factors[name] for name in pair)), **signs.get(pair, {})}
    return {
        "adapters": [_described(name, adapter, norms) for name, adapter in zip(names, adapters, strict=True)],
        "layers": _unique(place(module)[0] for module in shapes),
        "projections": _unique(place(module)[1] for module in shapes),
        "norms": {name: _norms(name, norms) for name in names},
        "modules": {
            module: {
                "shape": list(shape),
                "layer": place(module)[0],
                "projection": place(module)[1],
                "norms": norms[module],
            }
            for module, shape in shapes.items()
        },
        "pairs": [_pair(pair, of_modules) for pair, of_modules in sums.items()],
    }


def pair_figures(sums: Mapping[str, float]) -> Figures:
    """Figures of how two adapters, s and t, interfere in one or several modules m.

    sums: of what `_sums` and `_signs` say of each of these modules. With D = B A, the scale in B:

    cosine
        value: sum_m <D_s, D_t> / (|D_s| |D_t|), with <D_s, D_t> = <B_s^T B_t, A_s A_t^T>.
        expected: what it is on average over the draws of A, for B independent of A. 0 where no A is shared, and
            <B_s, B_t> / (|B_s| |B_t|) on a shared A. null where an A was computed, as it then has no distribution.
        std: its standard deviation over these draws, sqrt(sum_m |B_s^T B_t|^2 / d_in) / (|B_s| |B_t|). Only where no A
            is shared or computed.
        cap: the most that std can be, sqrt(sum_m |B_s|^2 |B_t|^2 / d_in) / (|B_s| |B_t|); 1 / sqrt(d_in) of one module.
        bound: the most that |value| can be for any B with these norms: sum_m p |D_s| |D_t| / (|D_s| |D_t|), where p is
            the largest cosine of the principal angles between row(A_s) and row(A_t). It assumes nothing.
        Trained B depend on A: after one gradient step, related tasks keep about r / d_in of their gradients' cosine.
    support: positions (row, column of B) with a kept entry; several blocks of an adapter are laid on each other
        kept: of s and of t. common: of both. share: common / kept, of s and of t. jaccard: common / those of either.
        expected: common ones of independent random masks of these sizes, sum_m kept_s kept_t / (d_out max(r_s, r_t)).
        Where A is not shared, equal positions stand for different directions, and the overlap says nothing of the sum.
    signs
        on: `B` where both stand on one A: entries that both keep. `update` elsewhere: entries of D_s and D_t.
        compared: entries where neither is zero. conflicts: those of opposite sign. share: conflicts / compared.
        entries: what was looked at, of `total`. An update is made a few rows at a time, and of one with more than
        SIGN_ENTRIES entries evenly spread rows are looked at.
    energy: share of sum_m |D_s|^2 that lies in a space of D_t, and that of |D_t|^2 in the space of D_s
        input: in the row space, |D_s P|^2 with P the projector on row(D_t): how much of s reads what t reads. About
            r / d_in for independent A and 1 on a shared one; the square of the cosine is never above it.
        output: in the column space, |P D_s|^2: how much of s writes where t writes.

    Shares and cosines are null where they would be 0 / 0.
    Source: LoRI (arXiv 2504.07448), Property 1, for finite d_in: an entry of A_s A_t^T has variance 1 / (9 d_in) for
    the uniform A used here, and |D| is about |B| / sqrt(3).
    """

    def of(name: str) -> float:
        return sums.get(name, 0.0)

    norms = math.sqrt(of("norm_s") * of("norm_t"))
    b_norms = math.sqrt(of("b_norm_s") * of("b_norm_t"))
    kept = [int(of("kept_s")), int(of("kept_t"))]
    common, compared = int(of("common")), int(of("compared"))
    on = [name for name in ("B", "update") if of(f"on_{name}")]
    is_random, is_independent = not of("computed"), not of("computed") and not of("shared")
    return {
        "cosine": {
            "value": _ratio(of("inner"), norms),
            "expected": _ratio(of("b_inner"), b_norms) if is_random else None,
            "std": _ratio(math.sqrt(of("variance")), b_norms) if is_independent else None,
            "cap": _ratio(math.sqrt(of("most_variance")), b_norms) if is_independent else None,
            "bound": _ratio(of("bound"), norms),
        },
        "support": {
            "kept": kept,
            "common": common,
            "expected": of("expected_common"),
            "share": [_ratio(common, number) for number in kept],
            "jaccard": _ratio(common, sum(kept) - common),
        },
        "signs": {
            "on": " and ".join(on) or None,
            "compared": compared,
            "conflicts": int(of("conflicts")),
            "share": _ratio(of("conflicts"), compared),
            "entries": int(of("sign_entries")),
            "total": int(of("sign_total")),
        },
        "energy": {
            space: [_ratio(of(f"{space}_{one}"), of(f"norm_{one}")) for one in "st"] for space in ("input", "output")
        },
    }


# --- the figures of one module ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Factors:
    """The update B A of one adapter in one module, float64, each A once: blocks on the same A are added up."""

    b: Tensor  # (out_features, rank), the scale in it
    a: Tensor  # (rank, in_features)
    keys: tuple[tuple[object, ...], ...]
    """One key for each row of a: the identity of its A, and the row's number in it."""
    is_computed: bool
    """Whether an A has no seed."""
    num_projections: int
    """A without repetition."""
    support: Tensor  # (out_features, rank of the widest part), bool
    b_gram: Tensor  # B^T B
    a_gram: Tensor  # A A^T
    norm: float
    """|B A|_F."""
    rows: Tensor  # (rank, k): A^T times it is an orthonormal basis of the rows of B A
    columns: Tensor  # (rank, k): B times it is an orthonormal basis of the columns of B A
    a_rows: Tensor  # (rank, k): A^T times it is an orthonormal basis of the rows of A


def _factors(update: Update) -> _Factors:
    groups: dict[tuple[object, ...], list[Part]] = {}
    for part in update.kept:
        groups.setdefault(part.key, []).append(part)
    out_features, in_features = update.shape
    none = torch.zeros(0, dtype=torch.float64)
    b = torch.cat([none.view(out_features, 0), *map(_sum_of_b, groups.values())], dim=1)
    a = torch.cat([none.view(0, in_features), *(parts[0].a() for parts in groups.values())])
    b_gram, a_gram = b.t() @ b, a @ a.t()
    return _Factors(
        b=b,
        a=a,
        keys=tuple((*key, row) for key, parts in groups.items() for row in range(parts[0].rank)),
        is_computed=any(part.seed is None for part in update.kept),
        num_projections=len(groups),
        support=_support(update),
        b_gram=b_gram,
        a_gram=a_gram,
        norm=math.sqrt(max(0.0, float((b_gram * a_gram).sum()))),
        rows=_orthonormal(a_gram, _range(b_gram)),
        columns=_orthonormal(b_gram, _range(a_gram)),
        a_rows=_orthonormal(a_gram, _range(a_gram)),
    )


def _sum_of_b(parts: Sequence[Part]) -> Tensor:
    return torch.stack([part.scaled_b() for part in parts]).sum(0) if len(parts) > 1 else parts[0].scaled_b()


def _support(update: Update) -> Tensor:
    width = max((part.rank for part in update.kept), default=0)
    support = torch.zeros(update.shape[0], width, dtype=torch.bool)
    for part in update.kept:
        assert part.entries is not None
        if part.entries.index is None:
            support[:, : part.rank] = True
        else:
            index = part.entries.index.long()
            support[index // part.rank, index % part.rank] = True
    return support


def _range(gram: Tensor) -> Tensor:
    """An orthonormal basis, in columns, of what the positive semidefinite matrix does not map to zero."""
    values, vectors = _eigen(gram)
    return vectors[:, values > 0]


def _orthonormal(gram: Tensor, basis: Tensor) -> Tensor:
    """Coefficients, (rows of basis, k), of an orthonormal basis of the space that X^T basis spans, gram = X X^T."""
    values, vectors = _eigen(basis.t() @ gram @ basis)
    return basis @ (vectors[:, values > 0] / values[values > 0].sqrt())


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, those that are zero to rounding set to it, and eigenvectors."""
    if not len(gram):
        return gram.new_zeros(0), gram
    values, vectors = torch.linalg.eigh(gram)
    return torch.where(values > values[-1] * len(gram) * _CUT, values, 0.0), vectors


def _sums(s: _Factors, t: _Factors) -> Sums:
    """The quantities that add up over modules to the figures of s and t, except those of signs."""
    sums = {**_own(s, "s"), **_own(t, "t")}
    if not len(s.a) or not len(t.a):
        return sums
    b_cross, a_cross = s.b.t() @ t.b, s.a @ t.a.t()
    same = _matching(s.keys, t.keys)
    width, widest = sorted((s.support.shape[1], t.support.shape[1]))
    num_kept, in_features = int(s.support.sum()) * int(t.support.sum()), s.a.shape[1]
    principal = float(torch.linalg.matrix_norm(s.a_rows.t() @ a_cross @ t.a_rows, 2))
    return {
        **sums,
        "inner": float((b_cross * a_cross).sum()),
        "b_inner": float((b_cross * same).sum()),
        "variance": float(b_cross.square().sum()) / in_features,
        "most_variance": float(s.b_gram.trace() * t.b_gram.trace()) / in_features,
        "bound": min(1.0, principal) * s.norm * t.norm,
        "shared": float(same.any()),
        "computed": float(s.is_computed or t.is_computed),
        "common": float((s.support[:, :width] & t.support[:, :width]).sum()),
        "expected_common": num_kept / (len(s.b) * widest),
        "input_s": _energy(s.b_gram, a_cross @ t.rows),
        "input_t": _energy(t.b_gram, a_cross.t() @ s.rows),
        "output_s": _energy(s.a_gram, b_cross @ t.columns),
        "output_t": _energy(t.a_gram, b_cross.t() @ s.columns),
    }


def _own(factors: _Factors, letter: str) -> Sums:
    return {
        f"norm_{letter}": factors.norm**2,
        f"b_norm_{letter}": float(factors.b_gram.trace()),
        f"kept_{letter}": float(factors.support.sum()),
    }


def _matching(s: Sequence[tuple[object, ...]], t: Sequence[tuple[object, ...]]) -> Tensor:
    """(rows of A_s, rows of A_t), 1 where they are the same row of the same A: E A_s A_t^T, but for a factor 1/3."""
    places = {key: column for column, key in enumerate(t)}
    matching = torch.zeros(len(s), len(t), dtype=torch.float64)
    for row, key in enumerate(s):
        if key in places:
            matching[row, places[key]] = 1.0
    return matching


def _energy(gram: Tensor, projected: Tensor) -> float:
    """|D P|^2 = <gram, projected projected^T>, which rounding must not make less than nothing."""
    return max(0.0, float(((gram @ projected) * projected).sum()))


# --- signs -----------------------------------------------------------------------------------------------------------


def _signs(factors: Mapping[str, _Factors]) -> dict[tuple[str, str], Sums]:
    """Pair of adapters that both keep an entry in this module -> numbers of compared signs and of opposite ones."""
    found, apart = {}, []
    for pair in itertools.combinations([name for name, one in factors.items() if one.keys], 2):
        s, t = (factors[name] for name in pair)
        if s.keys == t.keys and s.num_projections == 1:
            found[pair] = {"on_B": 1.0, "sign_total": float(s.b.numel()), **_compared(s.b, t.b)}
        else:
            apart.append(pair)
    return {**found, **_signs_of_updates(factors, apart)}


def _signs_of_updates(factors: Mapping[str, _Factors], pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Sums]:
    if not pairs:
        return {}
    names = _unique(name for pair in pairs for name in pair)
    out_features, in_features = len(factors[names[0]].b), factors[names[0]].a.shape[1]
    num_rows = min(out_features, max(1, SIGN_ENTRIES // in_features))
    total = float(out_features * in_features)
    found: dict[tuple[str, str], Sums] = {pair: {"on_update": 1.0, "sign_total": total} for pair in pairs}
    rows = torch.arange(num_rows) * out_features // num_rows
    for chunk in torch.split(rows, max(1, _CHUNK // in_features)):
        updates = {name: factors[name].b[chunk] @ factors[name].a for name in names}
        for s, t in pairs:
            found[s, t] = _added([found[s, t], _compared(updates[s], updates[t])])
    return found


def _compared(one: Tensor, other: Tensor) -> Sums:
    product = one.sign() * other.sign()
    return {
        "compared": float(product.count_nonzero()),
        "conflicts": float((product < 0).sum()),
        "sign_entries": float(product.numel()),
    }


# --- from modules to the whole ---------------------------------------------------------------------------------------


def _pair(pair: tuple[str, str], modules: Mapping[str, Sums]) -> Figures:
    both = {module: sums for module, sums in modules.items() if "inner" in sums}
    layers: dict[str, list[Sums]] = {}
    for module, sums in modules.items():
        layers.setdefault(place(module)[0], []).append(sums)
    return {
        "adapters": list(pair),
        "overall": pair_figures(_added(modules.values())),
        "layers": {
            layer: pair_figures(_added(all_sums))
            for layer, all_sums in layers.items()
            if any("inner" in sums for sums in all_sums)
        },
        "modules": {module: pair_figures(sums) for module, sums in both.items()},
    }


def _added(all_sums: Iterable[Sums]) -> Sums:
    total: dict[str, float] = {}
    for sums in all_sums:
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _norms(adapter: str, norms: Mapping[str, Mapping[str, float]]) -> Figures:
    squares: dict[tuple[str, str], float] = {}
    for module, of_adapters in norms.items():
        squares[place(module)] = squares.get(place(module), 0.0) + of_adapters[adapter] ** 2
    layers, projections = _unique(layer for layer, _ in squares), _unique(projection for _, projection in squares)

    def norm(places: Iterable[tuple[str, str]]) -> float | None:
        there = [squares[here] for here in places if here in squares]
        return math.sqrt(sum(there)) if there else None

    return {
        "layers": {layer: norm((layer, projection) for projection in projections) for layer in layers},
        "projections": {projection: norm((layer, projection) for layer in layers) for projection in projections},
        "table": [[norm([(layer, projection)]) for projection in projections] for layer in layers],
    }


def _described(name: str, adapter: Adapter, norms: Mapping[str, Mapping[str, float]]) -> Figures:
    return {
        "name": name,
        "rank": sum(block.rank for block in adapter.blocks),
        "blocks": [block.name for block in adapter.blocks],
        "kept": adapter.kept,
        "total": adapter.total,
        "norm": math.sqrt(sum(of_adapters[name] ** 2 for of_adapters in norms.values())),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _names(adapters: Sequence[Adapter]) -> list[str]:
    names: list[str] = []
    for adapter in adapters:
        name, number = label(adapter), 2
        while name in names:
            name, number = f"{label(adapter)}-{number}", number + 1
        names.append(name)
    return names


def _check(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    if not adapters:
        raise AdapterError("interference: got no adapters; give at least one")
    if len(names) != len(adapters) or len(set(names)) < len(names):
        raise AdapterError(
            f"interference: got {len(names)} names ({', '.join(names)}) for {len(adapters)} adapters; "
            "give each adapter a name of its own"
        )
    shapes: dict[str, tuple[tuple[int, int], str]] = {}
    weights: dict[str, str] = {}
    for name, adapter in zip(names, adapters, strict=True):
        if (found := adapter.base.get("weights")) is not None:
            weights.setdefault(str(found), name)
        for module, shape in adapter.shapes.items():
            wanted, first = shapes.setdefault(module, (shape, name))
            if shape != wanted:
                raise AdapterError(
                    f"{module}: {first} was trained on a weight of shape {wanted}, {name} on {shape}; "
                    "compare adapters of one base model"
                )
    if len(weights) > 1:
        (first, first_name), (other, other_name) = list(weights.items())[:2]
        raise AdapterError(
            f"interference: {first_name} was trained on a base model with weights {first}, {other_name} on one with "
            f"{other}; compare adapters of one base model"
        )
