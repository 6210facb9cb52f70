"""Every merge method in plain loops over float64, entry by entry, as its paper states it.

A twin gets deltas (or weights) as ``{model: {tensor: flat float64 array}}``, with the models in the
order in which the merge takes them, and gives the merged delta (or weight) by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from slow import philox, topk

Array = np.ndarray[Any, Any]
Vectors = Mapping[str, Mapping[str, Array]]
Shares = Callable[[str], Sequence[float]]
"""The number of each model for one tensor."""


def constant(*values: float) -> Shares:
    """The same numbers for every tensor."""
    return lambda name: values


def _entrywise(
    vectors: Vectors, weight: Shares, one: Callable[[str, list[float], list[float]], float]
) -> dict[str, Array]:
    """Apply ``one(name, weights, entries of all models)`` to every entry of every tensor."""
    found = {}
    for name in next(iter(vectors.values())):
        factors = [float(np.float32(w)) for w in weight(name)]  # a recipe's 0.1 is float32's
        columns = zip(*(v[name].tolist() for v in vectors.values()), strict=True)
        found[name] = np.array([one(name, factors, list(c)) for c in columns], np.float64)
    return found


def linear(weights: Vectors, weight: Shares, normalize: bool = True) -> dict[str, Array]:
    """The weighted average of the models' weights."""

    def one(name: str, factors: list[float], column: list[float]) -> float:
        whole = sum(factors) if normalize and abs(sum(factors)) >= 1e-8 else 1.0
        return sum(w * x for w, x in zip(factors, column, strict=True)) / whole

    return _entrywise(weights, weight, one)


def task_arithmetic(
    deltas: Vectors, weight: Shares, scale: Callable[[str], float], normalize: bool = False
) -> dict[str, Array]:
    """The scaled sum of the task vectors."""
    total = linear(deltas, weight, normalize)
    return {name: scale(name) * x for name, x in total.items()}


def trimmed(
    deltas: Vectors, density: Shares, scope: str, count: Callable[[float, int], int]
) -> dict[str, dict[str, Array]]:
    """Each task vector with all but its largest entries set to zero."""
    found = {}
    for number, (model, vector) in enumerate(deltas.items()):
        masks = topk.kept(vector, list(vector), density, number, scope, count)
        found[model] = {name: np.where(masks[name], x, 0.0) for name, x in vector.items()}
    return found


def sign(x: float) -> int:
    """-1, 0 or 1."""
    return (x > 0) - (x < 0)


def elected(column: Sequence[float], elect: str) -> int:
    """The sign that a column of weighted entries elects."""
    return sign(math.fsum(column) if elect == "mass" else sum(sign(x) for x in column))


def agreed(column: Sequence[float], weights: Sequence[float], gamma: int, aggregate: str) -> float:
    """What becomes of the entries of a column that have the sign ``gamma``."""
    pairs = [(x, w) for x, w in zip(column, weights, strict=True) if sign(x) == gamma != 0]
    if not pairs:
        return 0.0
    if aggregate == "max":
        return gamma * max(abs(x) for x, _ in pairs)
    total = sum(x for x, _ in pairs)
    if aggregate == "sum":
        return total
    if aggregate == "mean":
        return total / len(pairs)
    share = sum(w for _, w in pairs)
    return total / (share if share != 0 else 1.0)


def elect_and_merge(
    vectors: Vectors, weight: Shares, elect: str, aggregate: str, zero_sign: str
) -> dict[str, Array]:
    """Elect a sign per entry and merge what agrees with it."""

    def times(factors: list[float], column: list[float]) -> list[float]:
        return [w * x for w, x in zip(factors, column, strict=True)]

    votes = _entrywise(vectors, weight, lambda name, w, column: elected(times(w, column), elect))
    most = sign(sum(int(v.sum()) for v in votes.values()))
    zero = {"zero": 0, "positive": 1, "majority": most}[zero_sign]

    def one(name: str, factors: list[float], column: list[float]) -> float:
        entries = times(factors, column)
        return agreed(entries, factors, elected(entries, elect) or zero, aggregate)

    return _entrywise(vectors, weight, one)


def _times(vector: dict[str, Array], scale: Callable[[str], float]) -> dict[str, Array]:
    return {name: scale(name) * x for name, x in vector.items()}


def nearest_count(share: float, n: int) -> int:
    """``round(density * n)``."""
    return round(share * n)


def floor_count(share: float, n: int) -> int:
    """Down, but at least one of what there is."""
    return min(n, max(1, int(share * n)))


def ties(
    deltas: Vectors,
    weight: Shares,
    density: Shares,
    scale: Callable[[str], float],
    *,
    scope: str = "global",
    elect: str = "mass",
    aggregate: str = "mean",
    zero_sign: str = "zero",
    rounding: str = "round",
) -> dict[str, Array]:
    """Trim, elect, merge (Yadav et al. 2023)."""
    count = nearest_count if rounding == "round" else floor_count
    thin = trimmed(deltas, density, scope, count)
    return _times(elect_and_merge(thin, weight, elect, aggregate, zero_sign), scale)


def stitch(
    deltas: Vectors,
    weight: Shares,
    density: Shares,
    scale: Callable[[str], float],
    *,
    scope: str = "global",
) -> dict[str, Array]:
    """Average, entry by entry, the task vectors that selected the entry (He et al. 2025)."""
    thin = trimmed(deltas, density, scope, nearest_count)

    def one(name: str, factors: list[float], column: list[float]) -> float:
        chosen = [w * x for w, x in zip(factors, column, strict=True) if x != 0]
        return sum(chosen) / max(1, len(chosen))

    return _times(_entrywise(thin, weight, one), scale)


def dropped(deltas: Vectors, density: Shares, seed: int, rescale: str) -> dict[str, Any]:
    """Each task vector with entries dropped at random, the rest rescaled (Yu et al. 2024)."""
    found: dict[str, dict[str, Array]] = {}
    for number, (model, vector) in enumerate(deltas.items()):
        found[model] = {}
        for name, x in vector.items():
            share = density(name)[number]
            mask = philox.keeps(seed, model, name, x.size, share)
            thin = [v if keep else 0.0 for v, keep in zip(x.tolist(), mask, strict=True)]
            factor = 1.0
            if rescale == "density":
                factor = 1 / share
            elif rescale == "l1":
                whole, left = (math.fsum(abs(v) for v in values) for values in (x.tolist(), thin))
                factor = whole / left if min(whole, left) >= 1e-7 else 1.0
            found[model][name] = np.array([factor * v for v in thin], np.float64)
    return found


def dare_linear(
    deltas: Vectors,
    weight: Shares,
    density: Shares,
    scale: Callable[[str], float],
    *,
    seed: int = 0,
    rescale: str = "density",
    normalize: bool = False,
) -> dict[str, Array]:
    """Drop and rescale, then add."""
    return task_arithmetic(dropped(deltas, density, seed, rescale), weight, scale, normalize)


def dare_ties(
    deltas: Vectors,
    weight: Shares,
    density: Shares,
    scale: Callable[[str], float],
    *,
    seed: int = 0,
    rescale: str = "density",
    elect: str = "mass",
    aggregate: str = "mean",
    zero_sign: str = "zero",
) -> dict[str, Array]:
    """Drop and rescale, then elect signs and merge."""
    thin = dropped(deltas, density, seed, rescale)
    return _times(elect_and_merge(thin, weight, elect, aggregate, zero_sign), scale)


def consensus(
    deltas: Vectors,
    weight: Shares,
    bounds: Shares,
    scale: Callable[[str], float],
    *,
    min_tasks: int = 2,
) -> dict[str, Array]:
    """Keep the sum where enough tasks hold their own against the others (Wang et al. 2024).

    In float32, because where both sides of the comparison are equal rounding decides.
    """

    def one(name: str, factors: list[float], column: list[float]) -> float:
        entries = [np.float32(w) * np.float32(x) for w, x in zip(factors, column, strict=True)]
        total = np.float32(0)
        for x in entries:
            total += x
        held = sum(
            x != 0 and abs(x) >= np.float32(bound) * abs(total - x)
            for x, bound in zip(entries, bounds(name), strict=True)
        )
        return float(total) if held >= min_tasks else 0.0

    return _times(_entrywise(deltas, weight, one), scale)


def slerp(weights: Vectors, t: Callable[[str], float]) -> dict[str, Array]:
    """Along the arc between two weights, tensor by tensor (Shoemake 1985)."""
    one, other = weights.values()
    found = {}
    for name, a in one.items():
        b, place = other[name], t(name)
        lengths = [math.sqrt(float(x @ x)) for x in (a, b)]
        cosine = float(a @ b) / math.prod(length if length > 1e-8 else 1.0 for length in lengths)
        if abs(cosine) > 0.9995:
            found[name] = (1 - place) * a + place * b
            continue
        angle = math.acos(cosine)
        left, right = math.sin((1 - place) * angle), math.sin(place * angle)
        found[name] = (left * a + right * b) / math.sin(angle)
    return found


def fisher_merging(
    deltas: Vectors, weight: Shares, fishers: Vectors, scale: Callable[[str], float],
    floor: float = 1e-10, normalize: bool = False,
) -> dict[str, Array]:  # fmt: skip
    """The mean of the task vectors, each entry weighed by its model's Fisher information."""
    sizes = {
        model: math.sqrt(math.fsum(x * x for row in own.values() for x in row.tolist()))
        for model, own in fishers.items()
    }
    found = {}
    for name in next(iter(deltas.values())):
        factors = [float(np.float32(w)) for w in weight(name)]
        out = []
        for i in range(len(next(iter(deltas.values()))[name])):
            above = below = 0.0
            for w, (model, vector) in zip(factors, deltas.items(), strict=True):
                share = float(fishers[model][name][i]) / (sizes[model] if normalize else 1.0)
                above += w * (share + floor) * vector[name][i]
                below += w * (share + floor)
            out.append(above / below if below else 0.0)
        found[name] = np.array(out, np.float64)
    return _times(found, scale)


def regmean(
    deltas: Vectors, grams: Mapping[str, Mapping[str, Array]], scale: Callable[[str], float],
    alpha: float = 0.9,
) -> dict[str, Array]:  # fmt: skip
    """Row by row, the minimum of the summed quadratic forms; the mean where there is no Gram."""
    found = {}
    for name in next(iter(deltas.values())):
        rows = [vector[name] for vector in deltas.values()]
        if any(name not in grams[model] for model in deltas):
            found[name] = np.array([math.fsum(c) / len(rows) for c in zip(*rows, strict=True)])
            continue
        hats = []
        for model in deltas:
            gram = grams[model][name].astype(np.float64)
            ridge = 1e-6 * gram.trace() / len(gram)
            hats.append(alpha * gram + np.diag((1 - alpha) * gram.diagonal() + ridge))
        n = len(hats[0])
        out = []
        for at in range(0, len(rows[0]), n):
            right = sum(hat @ row[at : at + n] for hat, row in zip(hats, rows, strict=True))
            out.append(np.linalg.inv(sum(hats)) @ right)
        found[name] = np.concatenate(out)
    return _times(found, scale)


Sets = dict[str, dict[str, set[int]]]
"""Of each tensor and model some entries."""


def led_elected(
    deltas: Vectors, base: Mapping[str, Array], grads: Vectors, base_grads: Vectors,
    density: Shares, elect: str = "both", flip: bool = False,
) -> Sets:  # fmt: skip
    """Location and election of LED-Merging (arXiv:2502.16770), one entry at a time.

    Scores are |weight| times the mean absolute gradient, in float32; at most ``floor(r n)`` entries
    of a tensor are important, and only with a score above 0. With ``flip`` the least are.
    """

    def best(weights: Array, gradient: Array, share: float) -> set[int]:
        scores = np.abs(weights.astype(np.float32)) * gradient.astype(np.float32)
        some = [i for i in range(len(scores)) if scores[i] > 0]
        some.sort(key=lambda i: (scores[i] if flip else -scores[i], i))
        return set(some[: math.floor(share * len(scores))])

    found: Sets = {}
    for name, start in base.items():
        found[name] = {}
        for model, share in zip(deltas, density(name), strict=True):
            expert = best(start + deltas[model][name], grads[model][name], share)
            own = best(start, base_grads[model][name], share)
            every = set(range(len(start)))
            found[name][model] = {
                "both": expert & own, "expert": expert, "base": own, "either": expert | own,
                "expert_only": expert - own, "base_only": own - expert,
                "neither": every - expert - own,
            }[elect]  # fmt: skip
    return found


def led_owned(elected: Sets, safety: str | None = None) -> Sets:
    """What each model may write: what it alone elects, and all of it for the safety expert."""
    return {
        name: {
            model: {
                i for i in mine
                if model == safety or not any(i in sets[m] for m in sets if m != model)
            }
            for model, mine in sets.items()
        }
        for name, sets in elected.items()
    }  # fmt: skip


def led(
    deltas: Vectors, base: Mapping[str, Array], grads: Vectors, base_grads: Vectors,
    density: Shares, weight: Shares, elect: str = "both", safety: str | None = None,
    flip: bool = False,
) -> dict[str, Array]:  # fmt: skip
    """Each entry from the model that owns it; nothing elsewhere."""
    owned = led_owned(
        led_elected(deltas, base, grads, base_grads, density, elect, flip), safety
    )  # fmt: skip
    found = {}
    for name, start in base.items():
        found[name] = np.zeros(len(start))
        for model, factor in zip(deltas, weight(name), strict=True):
            for i in owned[name][model]:
                found[name][i] = float(np.float32(factor)) * deltas[model][name][i]
    return found
