"""More merge methods as their sources state them: on whole vectors, in float64, one tensor at a time.

The fast ones find their factors in the span of the models, their ranks by histograms and their rows
block by block; here everything is written out on the vectors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from slow import philox, topk
from slow.merges import Shares, Vectors, _times, elect_and_merge, floor_count, task_arithmetic

Array = np.ndarray[Any, Any]
Shapes = Mapping[str, tuple[int, ...]]
Number = Callable[[str], float]


def stacked(vectors: Vectors, name: str) -> Array:
    """The entries of a tensor: float64[models, entries]."""
    return np.stack([v[name] for v in vectors.values()])


def by_name(vectors: Vectors, one: Callable[[str, Array], Array]) -> dict[str, Array]:
    """Merge every tensor by itself."""
    names = next(iter(vectors.values()))
    return {n: one(n, stacked(vectors, n)) if names[n].size else names[n] for n in names}


def rows_of(values: Array, shape: tuple[int, ...]) -> Array:
    """A flat tensor as rows along its last axis; a vector or a number is one row."""
    return values.reshape(-1, shape[-1] if shape else 1)


# ------------------------------------------------------------------------------------- spheres


def arc(a: Array, b: Array, t: float) -> Array:
    """From a to b along the arc between them."""
    cosine = float(a @ b) / math.prod(max(float(np.linalg.norm(x)), 1e-7) for x in (a, b))
    cosine = min(1.0, max(-1.0, cosine))
    if 1 - cosine**2 <= 1e-16:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def nuslerp(vectors: Vectors, weight: Shares, shapes: Shapes, over: str = "tensor") -> Any:
    """Along the arcs between two tensors, or their rows or columns."""

    def one(name: str, both: Array) -> Array:
        first, second = weight(name)
        t = second / (first + second)
        shape = shapes[name]
        if over == "tensor":
            return arc(both[0], both[1], t)
        if over == "row" or len(shape) < 2:
            pairs = zip(*(rows_of(x, shape) for x in both), strict=True)
            return np.concatenate([arc(a, b, t) for a, b in pairs])
        grids = [x.reshape(shape[0], -1) for x in both]
        out = np.stack([arc(a, b, t) for a, b in zip(*(g.T for g in grids), strict=True)])
        return out.T.reshape(-1)

    return by_name(vectors, one)


def multislerp(vectors: Vectors, weight: Shares, normalize: bool = True) -> dict[str, Array]:
    """To the mean direction, a step in its tangent space, and back (Goddard)."""

    def one(name: str, x: Array) -> Array:
        w = np.array(weight(name), np.float64)
        w = w / w.sum() if normalize else w
        if len(x) == 1:
            return x[0]
        lengths = np.linalg.norm(x, axis=1)
        units = x / np.where(lengths > 0, lengths, 1)[:, None]
        mean = w @ units
        if np.linalg.norm(mean) < 1e-8:
            return w @ x
        mean = mean / np.linalg.norm(mean)
        tangent = w @ (units - (units @ mean)[:, None] * mean)
        step = float(np.linalg.norm(tangent)) + 1e-12
        return (mean * math.cos(step) + tangent * math.sin(step) / step) * float(w @ lengths)

    return by_name(vectors, one)


def karcher(
    vectors: Vectors, weight: Shares, max_iter: int = 10, tolerance: float = 1e-5
) -> dict[str, Array]:
    """Step by step towards the point on the sphere that is nearest to all."""

    def one(name: str, x: Array) -> Array:
        w = np.array(weight(name), np.float64)
        w = w / w.sum()
        lengths = np.linalg.norm(x, axis=1)
        size = float(w @ lengths)
        there = lengths > tolerance
        if not there.any():
            return np.zeros(x.shape[1])
        units, w = x[there] / lengths[there][:, None], w[there] / w[there].sum()
        mean = w @ units
        mean = mean / np.linalg.norm(mean)
        for _ in range(max_iter):
            step = np.zeros_like(mean)
            for u, share in zip(units, w, strict=True):
                cosine = min(1.0, max(-1.0, float(mean @ u)))
                angle = math.acos(cosine)
                if angle >= tolerance:
                    step += share * angle / math.sin(angle) * (u - cosine * mean)
            length = float(np.linalg.norm(step))
            if length < tolerance:
                break
            mean = math.cos(length) * mean + math.sin(length) * step / length
            mean = mean / np.linalg.norm(mean)
        return size * mean

    return by_name(vectors, one)


def model_stock(
    deltas: Vectors, shapes: Shapes, scale: Number, over: str = "tensor", clamp: bool = True
) -> dict[str, Array]:
    """As far towards the average as the mean cosine says (Jang et al. 2024)."""

    def ratio(x: Array) -> float:
        cosines = []
        for a in range(len(x)):
            for b in range(a + 1, len(x)):
                sizes = float(np.linalg.norm(x[a]) * np.linalg.norm(x[b]))
                cosines.append(float(x[a] @ x[b]) / sizes if sizes else 0.0)
        cosine, n = sum(cosines) / len(cosines), len(x)
        below = 1 + (n - 1) * cosine
        t = n * cosine / below if abs(below) >= 1e-6 else 0.0
        return min(1.0, max(0.0, t)) if clamp else t

    def one(name: str, x: Array) -> Array:
        if over == "tensor":
            return scale(name) * ratio(x) * x.mean(0)
        rows = np.stack([rows_of(v, shapes[name]) for v in x], 1)
        return scale(name) * np.concatenate([ratio(r) * r.mean(0) for r in rows])

    return by_name(deltas, one)


# --------------------------------------------------------------------------------- one model


def nearswap(deltas: Vectors, t: Number) -> dict[str, Array]:
    """The model where it is near, else a step of t towards it."""

    def one(name: str, x: Array) -> Array:
        bound = float(np.float32(t(name)))
        return np.array([d if abs(d) <= bound else math.copysign(bound, d) for d in x[0].tolist()])

    return by_name(deltas, one)


def arcee_fusion(
    deltas: Vectors, base: Mapping[str, Array], shapes: Shapes, spread: Number
) -> dict[str, Array]:
    """Where the difference times its row's divergence is far above the median."""

    def softmax(row: Array) -> Array:
        powers = np.exp(row - row.max())
        return powers / powers.sum() + 1e-8

    def one(name: str, x: Array) -> Array:
        importances = []
        for d, b in zip(
            rows_of(x[0], shapes[name]), rows_of(base[name], shapes[name]), strict=True
        ):
            p, q = softmax(b + d), softmax(b)
            divergence = np.float32(float((p * np.log(p / q)).sum()))
            importances += [abs(np.float32(v)) * divergence for v in d.tolist()]
        ordered = sorted(float(i) for i in importances)
        low, middle, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
        least = middle + spread(name) * (high - low)
        return np.where(np.array(importances, np.float64) >= least, x[0], 0.0)

    return by_name(deltas, one)


# ----------------------------------------------------------------------------------- overlaps


def ram(
    deltas: Vectors, scale: Number, epsilon: float = 1e-5, gain: float = 0.0, most: float = 0.0
) -> dict[str, Array]:
    """The mean of the models that moved an entry; a model's own entries may be strengthened."""

    def one(name: str, x: Array) -> Array:
        moved = np.abs(x) > float(np.float32(epsilon))
        number = moved.sum(0)
        factors = []
        for mine in moved:
            shared, alone = int((mine & (number > 1)).sum()), int((mine & (number == 1)).sum())
            rho = shared / alone if alone else (math.inf if shared else 0.0)
            factors.append(1 + gain * min(rho, most))
        out = []
        for column, who in zip(x.T, moved.T, strict=True):
            chosen = np.flatnonzero(who)
            if len(chosen) == 1:
                out.append(factors[chosen[0]] * column[chosen[0]])
            else:
                out.append(float(column[chosen].mean()) if len(chosen) else 0.0)
        return scale(name) * np.array(out)

    return by_name(deltas, one)


def sce(
    deltas: Vectors,
    density: Number,
    scale: Number,
    counted: str = "all",
    rounding: str = "round",
    zero_sign: str = "zero",
    equal_below: float = 0.0,
) -> dict[str, Array]:
    """Select by variance, weigh by size, erase what disagrees (Wan et al. 2024).

    Variances in float32, for among rounded inputs many are equal, and rounding orders them.
    """

    def one(name: str, x: Array) -> Array:
        share = density(name)
        if share < 1:
            away = (x - x[0]).astype(np.float32)
            mean = np.zeros(x.shape[1], np.float32)
            for row in away:
                mean = mean + row
            mean = mean / np.float32(len(x))
            spread = np.zeros(x.shape[1], np.float32)
            for row in away:
                spread = spread + (row - mean) * (row - mean)
            spread = spread / np.float32(len(x))
            n = int((spread != 0).sum()) if counted == "nonzero" else spread.size
            wanted = round(share * n) if rounding == "round" else int(share * n)
            x = np.where(topk.largest(spread, wanted), x, 0.0)
        sizes = (x**2).mean(1)
        even = sizes.sum() == 0 or sizes.sum() < equal_below
        weights = np.full(len(x), 1 / len(x)) if even else sizes / sizes.sum()
        signs = np.sign(x.sum(0))
        if zero_sign == "positive":
            signs = np.where(signs == 0, 1, signs)
        agree = (np.sign(x) == signs) & (x != 0)
        total = (weights[:, None] * x * agree).sum(0)
        share_of = (weights[:, None] * agree).sum(0)
        return scale(name) * total / np.where(share_of > 0, share_of, 1)

    return by_name(deltas, one)


# ------------------------------------------------------------------------------------ thinning


def restored(thin: Vectors, whole: Vectors, l1: bool) -> Vectors:
    """The same, with each tensor's sum of magnitudes as it was."""
    if not l1:
        return thin
    found: dict[str, dict[str, Array]] = {}
    for model, vector in thin.items():
        found[model] = {}
        for name, x in vector.items():
            before, after = (math.fsum(np.abs(v).tolist()) for v in (whole[model][name], x))
            found[model][name] = x * (before / after if min(before, after) >= 1e-7 else 1.0)
    return found


def crumbs(
    deltas: Vectors,
    density: Shares,
    gamma: Shares,
    scope: str = "tensor",
    rounding: str = "round",
) -> dict[str, dict[str, Array]]:
    """Each task vector without its largest and its many small entries (Davari and Belilovsky)."""

    def count(share: float, n: int) -> int:
        return round(share * n) if rounding == "round" else int(share * n)

    found: dict[str, dict[str, Array]] = {model: {} for model in deltas}
    numbers = {n: [*density(n), *gamma(n)] for n in next(iter(deltas.values()))}
    for number, (model, vector) in enumerate(deltas.items()):
        for members in topk.groups(list(vector), scope, lambda n: numbers[n]).values():
            whole = np.concatenate([vector[n] for n in members])
            share = numbers[members[0]][number]
            top = numbers[members[0]][len(deltas) + number]
            kept = whole.size if share >= 1 else count(share, whole.size)
            above = min(count(top, whole.size), whole.size - kept)
            order = np.argsort(-np.abs(whole.astype(np.float32)), kind="stable")
            mask = np.zeros(whole.size, bool)
            mask[order[above : above + kept]] = True
            for n in members:
                found[model][n] = np.where(mask[: vector[n].size], vector[n], 0.0)
                mask = mask[vector[n].size :]
    return found


def breadcrumbs(
    deltas: Vectors, weight: Shares, density: Shares, gamma: Shares, scale: Number, *,
    rescale: str = "none", normalize: bool = False, **how: Any,
) -> dict[str, Array]:  # fmt: skip
    """A band of magnitudes, added."""
    thin = restored(crumbs(deltas, density, gamma, **how), deltas, rescale == "l1")
    return task_arithmetic(thin, weight, scale, normalize)


def magprune(
    deltas: Vectors, shapes: Shapes, density: Shares, epsilon: Shares, seed: int, rescale: str
) -> dict[str, dict[str, Array]]:
    """Drop by rank in the row, divide by the probability (Deep et al. 2024)."""
    found: dict[str, dict[str, Array]] = {}
    for number, (model, vector) in enumerate(deltas.items()):
        found[model] = {}
        for name, x in vector.items():
            share, half = density(name)[number], epsilon(name)[number]
            words = philox.stream(seed, model, name, x.size)
            if share >= 1 or not x.size:
                found[model][name] = x
                continue
            out: list[float] = []
            for row in rows_of(x, shapes[name]).tolist():
                order = sorted(range(len(row)), key=lambda i: (abs(row[i]), i))
                for i, value in enumerate(row):
                    p = share
                    if len(row) > 1:
                        p = share - half + 2 * half * order.index(i) / (len(row) - 1)
                    kept = words[len(out)] < round(p * 2**32)
                    factor = 1 / p if rescale == "probability" and kept else 1.0
                    out.append(factor * value if kept else 0.0)
            found[model][name] = np.array(out)
    return dict(restored(found, deltas, rescale == "l1"))  # type: ignore[arg-type]


def della_linear(
    deltas: Vectors, shapes: Shapes, weight: Shares, density: Shares, epsilon: Shares,
    scale: Number, *, seed: int = 0, rescale: str = "probability", normalize: bool = False,
) -> dict[str, Array]:  # fmt: skip
    """Drop by rank, then add."""
    thin = magprune(deltas, shapes, density, epsilon, seed, rescale)
    return task_arithmetic(thin, weight, scale, normalize)


def voted(
    thin: Vectors, weight: Shares, scale: Number, *, elect: str = "mass", aggregate: str = "mean",
    zero_sign: str = "zero", votes: str = "weighted",
) -> dict[str, Array]:  # fmt: skip
    """Elect signs and merge; with ``votes: equal`` before the weights are applied."""
    if votes == "weighted":
        return _times(elect_and_merge(thin, weight, elect, aggregate, zero_sign), scale)
    nets = {
        n: (stacked(thin, n) if elect == "mass" else np.sign(stacked(thin, n))).sum(0)
        for n in next(iter(thin.values()))
    }
    most = np.sign(sum(np.sign(v).sum() for v in nets.values()))
    zero = {"zero": 0, "positive": 1, "majority": most}[zero_sign]

    def one(name: str, x: Array) -> Array:
        w = np.array(weight(name), np.float32).astype(np.float64)[:, None]
        gamma = np.where(np.sign(nets[name]) == 0, zero, np.sign(nets[name]))
        agree = (np.sign(x) == gamma) & (x != 0)
        if aggregate == "max":
            chosen = np.where(agree, w * x, 0)
            return np.take_along_axis(chosen, np.abs(chosen).argmax(0)[None], 0)[0]
        total = (w * x * agree).sum(0)
        share = {"sum": 1.0, "mean": agree.sum(0), "weighted_mean": (w * agree).sum(0)}[aggregate]
        return total / np.where(share == 0, 1, share)

    return _times(by_name(thin, one), scale)


def ties(
    deltas: Vectors, weight: Shares, density: Shares, scale: Number, *, scope: str = "global",
    rounding: str = "round", rescale: str = "none", **how: Any,
) -> dict[str, Array]:  # fmt: skip
    """Trim, restore lengths, vote with or without weights."""
    count = (lambda s, n: round(s * n)) if rounding == "round" else floor_count
    thin = {
        model: {
            n: np.where(mask, vector[n], 0.0)
            for n, mask in topk.kept(vector, list(vector), density, number, scope, count).items()
        }
        for number, (model, vector) in enumerate(deltas.items())
    }
    return voted(restored(thin, deltas, rescale == "l1"), weight, scale, **how)


# ------------------------------------------------------------------------------------ spectral


def _matrices(
    deltas: Vectors, shapes: Shapes, weight: Shares, scale: Number,
    merge: Callable[[Sequence[Array]], Array],
) -> dict[str, Array]:  # fmt: skip
    def one(name: str, x: Array) -> Array:
        weighted = x * np.array(weight(name), np.float64)[:, None]
        if len(shapes[name]) != 2:
            return scale(name) * weighted.mean(0)
        return scale(name) * merge([v.reshape(shapes[name]) for v in weighted]).reshape(-1)

    return by_name(deltas, one)


def orthogonal(matrix: Array) -> Array:
    """The polar factor, from the eigenvectors of the smaller product with itself."""
    if matrix.shape[0] < matrix.shape[1]:
        return orthogonal(matrix.T).T
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    return matrix @ (vectors / np.sqrt(values)) @ vectors.T


def tsv_merge(deltas: Vectors, shapes: Shapes, weight: Shares, scale: Number) -> dict[str, Array]:
    """Task singular vectors, whitened (Gargiulo et al. 2025)."""

    def merge(parts: Sequence[Array]) -> Array:
        rank = max(1, min(parts[0].shape) // len(parts))
        lefts, values, rights = [], [], []
        for part in parts:
            u, s, v = np.linalg.svd(part, full_matrices=False)
            lefts.append(u[:, :rank])
            values.append(s[:rank])
            rights.append(v[:rank])
        left, right = orthogonal(np.concatenate(lefts, 1)), orthogonal(np.concatenate(rights, 0))
        return left @ np.diag(np.concatenate(values)) @ right

    return _matrices(deltas, shapes, weight, scale, merge)


def iso_c(
    deltas: Vectors, shapes: Shapes, weight: Shares, scale: Number, isotropy: float = 1.0
) -> dict[str, Array]:
    """All singular values of the sum become their mean (Marczak et al. 2025)."""

    def merge(parts: Sequence[Array]) -> Array:
        u, s, v = np.linalg.svd(sum(parts), full_matrices=False)
        return u @ np.diag((1 - isotropy) * s + isotropy * s.mean()) @ v

    return _matrices(deltas, shapes, weight, scale, merge)


def iso_cts(
    deltas: Vectors, shapes: Shapes, weight: Shares, scale: Number, common: float = 0.8,
    isotropy: float = 1.0,
) -> dict[str, Array]:  # fmt: skip
    """Common directions, and some of each task's own (Marczak et al. 2025)."""

    def merge(parts: Sequence[Array]) -> Array:
        u, s, v = np.linalg.svd(sum(parts), full_matrices=False)
        rank = len(s)
        own = min(round((rank - int(rank * common)) / len(parts)), rank // len(parts))
        shared = rank - own * len(parts)
        inside = u[:, :shared] @ u[:, :shared].T
        lefts, values, rights = [u[:, :shared]], [s[:shared]], [v[:shared]]
        for part in parts:
            u, s, v = np.linalg.svd(part - inside @ part, full_matrices=False)
            lefts.append(u[:, :own])
            values.append(s[:own])
            rights.append(v[:own])
        s = np.concatenate(values)
        left, right = orthogonal(np.concatenate(lefts, 1)), orthogonal(np.concatenate(rights, 0))
        return left @ np.diag((1 - isotropy) * s + isotropy * s.mean()) @ right

    return _matrices(deltas, shapes, weight, scale, merge)
