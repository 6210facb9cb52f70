"""What masks have in common beside what chance gives, and where in the network they lie."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from suture.analysis.cells import Array
from suture.analysis.overlap import independent_jaccard
from suture.edits.mask import Mask
from suture.edits.mask_file import popcount
from suture.tensors.roles import role_of


def component(name: str) -> str:
    """The layer and the part of it that a tensor is: ``3/q``, ``3/q.bias``, ``-/norm``."""
    role = role_of(name)
    kind = role.kind
    if kind == "bias":
        kind = role_of(name.removesuffix("bias") + "weight").kind + ".bias"
    return f"{'-' if role.layer is None else role.layer}/{kind}"


def structure(masks: Sequence[Mask]) -> dict[str, Any]:
    """The share of all chosen entries by layer and role, a mean over masks."""
    shares: dict[str, float] = {}
    for mask in masks:
        counts = {n: popcount(b) for n, b in mask.bits.items()}
        total = max(1, sum(counts.values()))
        for name, count in counts.items():
            if count:
                cell = component(name)
                shares[cell] = shares.get(cell, 0.0) + count / total / len(masks)
    attention = sum(v for k, v in shares.items() if k.split("/")[1] in ("q", "k"))
    return {"cells": {k: round(v, 5) for k, v in sorted(shares.items())}, "query_key": attention}


def densities(mask: Mask) -> dict[str, float]:
    """The share of the entries of each layer and role that a mask holds."""
    found: dict[str, list[int]] = {}
    for name, bits in mask.bits.items():
        cell = found.setdefault(component(name), [0, 0])
        cell[0] += popcount(bits)
        cell[1] += int(np.prod(mask.shapes[name], dtype=np.int64))
    return {k: round(kept / max(1, size), 5) for k, (kept, size) in sorted(found.items())}


NULLS = ("random", "tensors", "lines")
"""What masks share by chance, given ever more of what they are."""


def overlaps(masks: Sequence[Mask]) -> dict[str, float]:
    """Means over pairs of masks of what ``pairwise`` tells."""
    found = pairwise(masks)
    return {word: float(np.mean([p[word] for p in found])) for word in ("iou", *NULLS)}


def pairwise(masks: Sequence[Mask]) -> list[dict[str, Any]]:
    """Intersection over union of each pair of masks, beside what chance gives.

    ``random``: masks of the same sizes; ``tensors``: with the same density in every tensor;
    ``lines``: with the same density in every row and every column, entries independent otherwise.
    ``pair`` has the places of the two.
    """
    pairs = list(combinations(range(len(masks)), 2))
    sizes = [m.count for m in masks]
    inside = np.zeros((2, len(masks), len(masks)))
    for name in masks[0].bits:  # one tensor at a time: chances are floats of its size
        entries = [m[name] for m in masks]
        counts = [float(e.sum()) for e in entries]
        by_line = [chances(e) if e.ndim == 2 and e.any() else None for e in entries]
        for i, j in pairs:
            even = counts[i] * counts[j] / max(1, entries[i].size)
            a, b = by_line[i], by_line[j]
            inside[0, i, j] += even
            inside[1, i, j] += even if a is None or b is None else float((a * b).sum())

    def expected(kind: int, i: int, j: int) -> float:
        shared = float(inside[kind, i, j])
        union = sizes[i] + sizes[j] - shared
        return shared / union if union else 0.0

    return [
        {
            "pair": [i, j],
            "iou": masks[i].jaccard(masks[j]),
            "random": independent_jaccard(masks[i].density, masks[j].density),
            "tensors": expected(0, i, j),
            "lines": expected(1, i, j),
        }
        for i, j in pairs
    ]


def chances(mask: Array, rounds: int = 60) -> Array:
    r"""Chances of entries, row effect times column effect in odds, with the mask's line densities.

    :math:`p_{ij} = r_i c_j / (1 + r_i c_j)`, fitted by turns: the least committed choice of random
    matrices with these expected sums.
    """
    rows = mask.sum(1, dtype=np.float32)
    columns = mask.sum(0, dtype=np.float32)
    r, c = _odds(rows, mask.shape[1]), _odds(columns, mask.shape[0])
    r /= np.sqrt(max(float(np.median(c[c > 0], keepdims=False)), 1e-6))
    for _ in range(rounds):
        found = _chance(r, c)
        off = np.abs(found.sum(1) - rows).sum() + np.abs(found.sum(0) - columns).sum()
        if off < 2e-3 * rows.sum():
            break
        r *= _ratio(_odds(rows, mask.shape[1]), _odds(found.sum(1), mask.shape[1]))
        c *= _ratio(_odds(columns, mask.shape[0]), _odds(_chance(r, c).sum(0), mask.shape[0]))
    return _chance(r, c)


def _chance(r: Array, c: Array) -> Array:
    odds = np.minimum(np.outer(r, c), np.float32(1e12))
    return np.asarray(odds / (1 + odds))


def _odds(count: Array, most: int) -> Array:
    """Odds of a line with so many of its entries; a full line has large odds, not infinite ones."""
    inside = np.minimum(count, most - 0.01).astype(np.float32)
    return np.asarray(inside / (most - inside))


def _ratio(wanted: Array, found: Array) -> Array:
    return np.asarray(np.divide(wanted, found, out=np.zeros_like(wanted), where=found > 0))
