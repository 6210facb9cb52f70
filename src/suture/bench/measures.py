"""What is measured on the vectors of one strategy and seed: each function gives plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from suture.analysis.maps import disentanglement
from suture.analysis.overlap import independent_jaccard
from suture.bench.learn import Base, Side
from suture.bench.maths import best_amount, largest_kept, normalised
from suture.bench.recipe import Grids
from suture.bench.space import Array, LinearSpace, PlainSpace, Space, accuracy, alone
from suture.finetune.calibrate import Calibration, prunable, sensitivity, smallest
from suture.mask import Mask
from suture.models import Classifier, Encoder
from suture.roles import role_of


def addition(space: Space, grid: Sequence[float]) -> dict[str, Any]:
    r"""Accuracies of :math:`\theta_0 + \alpha \sum_t \tau_t`, one amount chosen on validation rows.

    The amount has the largest mean of accuracies over those of the single models, both on
    validation rows; test rows are looked at for this one amount.
    """
    tasks = range(space.count)
    single = {
        part: [accuracy(space, alone(space.count, t), t, part) for t in tasks]
        for part in ("validation", "test")
    }
    scores = {
        alpha: [accuracy(space, (alpha,) * space.count, t, "validation") for t in tasks]
        for alpha in (0.0, *grid)
    }
    usable = [value or 1e-9 for value in single["validation"]]
    alpha = best_amount(scores, usable)
    test = [accuracy(space, (alpha,) * space.count, t, "test") for t in tasks]
    return {
        "alpha": alpha,
        "single": single["test"],
        "single_validation": single["validation"],
        "test": test,
        "absolute": float(np.mean(test)),
        "single_mean": float(np.mean(single["test"])),
        "normalised": normalised(test, [value or 1e-9 for value in single["test"]]),
        "validation": {f"{a:g}": float(np.mean(v)) for a, v in scores.items()},
    }


def negation(space: Space, grids: Grids, limits: Sequence[float] = (1.0, 2.0)) -> dict[str, Any]:
    r"""Accuracies of :math:`\theta_0 - \alpha \tau_t` on the task and the control, for each task.

    The amount is the largest, up to each limit, that keeps the wanted share of the control's
    accuracy on validation rows.
    """
    control = len(space.sides) - 1
    none = (0.0,) * space.count
    base = accuracy(space, none, control, "validation")
    found: dict[str, list[dict[str, float]]] = {f"{limit:g}": [] for limit in limits}
    for task in range(space.count):
        seen: dict[float, float] = {}
        for limit in sorted(limits, reverse=True):
            for amount in sorted((a for a in grids.negation if a <= limit), reverse=True):
                at = alone(space.count, task, -amount)
                seen[amount] = accuracy(space, at, control, "validation")
                if largest_kept(seen, base, keep=grids.keep, most=limit):
                    break  # smaller amounts cannot be the largest
            amount = largest_kept(seen, base, keep=grids.keep, most=limit)
            at = alone(space.count, task, -amount) if amount else none
            found[f"{limit:g}"].append({
                "alpha": amount,
                "target": accuracy(space, at, task, "test"),
                "control": accuracy(space, at, control, "test"),
            })  # fmt: skip
    return {
        "limits": found,
        "base": [accuracy(space, none, t, "test") for t in range(space.count)],
        "control": accuracy(space, none, control, "test"),
    }


def entangled(space: Space, grids: Grids, tasks: Sequence[str]) -> dict[str, Any]:
    """How much task vectors disturb each other: maps of all pairs, and every vector on every task.

    ``transfer`` is accuracy minus that of the base, ``drift`` the share of predictions that differ
    from the base's; rows are task vectors, columns the tasks measured on.
    """
    none = (0.0,) * space.count
    maps = []
    for one, other in combinations(range(space.count), 2):

        def predict(amounts: Sequence[float], task: int, pair: Any = (one, other)) -> Array:
            at = list(none)
            at[pair[0]], at[pair[1]] = amounts
            return space.predict(tuple(at), pair[task], "probe")

        pair = tasks[one], tasks[other]
        maps.append(disentanglement(predict, pair, (0.0, *grids.disentanglement)))
    base = [accuracy(space, none, t, "probe") for t in range(space.count)]
    transfer, drift = np.zeros((2, space.count, space.count))
    for row in range(space.count):
        at = alone(space.count, row)
        for column in range(space.count):
            transfer[row, column] = accuracy(space, at, column, "probe") - base[column]
            said, before = (space.predict(p, column, "probe") for p in (at, none))
            drift[row, column] = np.mean(said != before)
    errors = [np.array(m.error) for m in maps]
    joint = [e[1:, 1:] for e in errors]
    last = [e[-1, -1] for e in errors]
    return {
        "xi": float(np.mean(last)),
        "xi_mean": float(np.mean(joint)),
        "amounts": [0.0, *grids.disentanglement],
        "maps": {
            f"{m.tasks[0]}, {m.tasks[1]}": np.round(e, 4).tolist()
            for m, e in zip(maps, errors, strict=True)
        },
        "transfer": np.round(transfer, 4).tolist(),
        "drift": np.round(drift, 4).tolist(),
    }


def movement(space: Space, encoder: Encoder) -> dict[str, Any]:
    r"""How far each vector moves the features of every task, and how much of it is first order.

    ``moved`` has :math:`E_x |f(x, \theta_0 + \tau) - f(x, \theta_0)|^2` over
    :math:`E_x |f(x, \theta_0)|^2`, ``first`` the same of :math:`J \tau`; rows are vectors, columns
    tasks. ``elsewhere`` is what a vector moves on other tasks over what it moves on its own, a mean
    over vectors: 0 would be perfect localization. ``bend`` is the share of the movement on the own
    task that is not first order, :math:`|\Delta f - J\tau|^2 / |\Delta f|^2`.
    """
    count = space.count
    lines = LinearSpace(encoder, space.vectors, space.sides)
    none = (0.0,) * count
    moved, first, bend = np.zeros((3, count, count))
    for row in range(count):
        at = alone(count, row)
        for column in range(count):
            start = lines.features(none, column, "few")
            whole = space.features(at, column, "few") - start
            slope = lines.features(at, column, "few") - start
            size = float(start.square().sum())
            moved[row, column] = float(whole.square().sum()) / size
            first[row, column] = float(slope.square().sum()) / size
            bend[row, column] = float((whole - slope).square().sum() / whole.square().sum())
    return {
        "moved": np.round(moved, 6).tolist(),
        "first": np.round(first, 6).tolist(),
        "own": float(np.mean(np.diag(moved))),
        "elsewhere": _elsewhere(moved),
        "elsewhere_first": _elsewhere(first),
        "bend": float(np.mean(np.diag(bend))),
    }


def _elsewhere(matrix: Array) -> float:
    count = len(matrix)
    others = (matrix.sum(1) - np.diag(matrix)) / (count - 1)
    return float(np.mean(others / np.diag(matrix)))


# -- masks -----------------------------------------------------------------------------------------


def structure(masks: Sequence[Mask]) -> dict[str, Any]:
    """The share of all chosen entries by layer and role, a mean over masks."""
    shares: dict[str, float] = {}
    for mask in masks:
        counts = {n: int(np.bitwise_count(b).sum(dtype=np.int64)) for n, b in mask.bits.items()}
        total = max(1, sum(counts.values()))
        for name, count in counts.items():
            if count:
                role = role_of(name)
                kind = role.kind
                if kind == "bias":
                    kind = role_of(name.removesuffix("bias") + "weight").kind + ".bias"
                cell = f"{'-' if role.layer is None else role.layer}/{kind}"
                shares[cell] = shares.get(cell, 0.0) + count / total / len(masks)
    attention = sum(v for k, v in shares.items() if k.split("/")[1] in ("q", "k"))
    return {"cells": {k: round(v, 5) for k, v in sorted(shares.items())}, "query_key": attention}


def overlaps(masks: Sequence[Mask]) -> dict[str, float]:
    """Mean intersection over union of pairs of masks, beside what chance gives.

    ``random``: masks of the same sizes; ``tensors``: with the same density in every tensor;
    ``lines``: with the same density in every row and every column, entries independent otherwise.
    """
    pairs = list(combinations(range(len(masks)), 2))
    sizes = [_entries(m) for m in masks]
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

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    def expected(kind: int) -> float:
        return mean([inside[kind, i, j] / (sizes[i] + sizes[j] - inside[kind, i, j])
                     for i, j in pairs])  # fmt: skip

    return {
        "iou": mean([iou(masks[i], masks[j]) for i, j in pairs]),
        "random": mean([independent_jaccard(_density(masks[i]), _density(masks[j]))
                        for i, j in pairs]),
        "tensors": expected(0),
        "lines": expected(1),
    }  # fmt: skip


def iou(one: Mask, other: Mask) -> float:
    """Entries in both over entries in any."""
    both = any_ = 0
    for name, bits in one.bits.items():
        both += int(np.bitwise_count(bits & other.bits[name]).sum(dtype=np.int64))
        any_ += int(np.bitwise_count(bits | other.bits[name]).sum(dtype=np.int64))
    return both / any_ if any_ else 0.0


def _density(mask: Mask) -> float:
    sizes = sum(int(np.prod(mask.shapes[n])) for n in mask.bits)
    return _entries(mask) / sizes


def _entries(mask: Mask) -> int:
    return sum(int(np.bitwise_count(b).sum(dtype=np.int64)) for b in mask.bits.values())


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


# -- sensitivity -----------------------------------------------------------------------------------


def sharing(
    base: Base, sides: Sequence[Side], task: int, grids: Grids, seed: int
) -> dict[str, Any]:
    """Accuracy of every task when entries that matter least to one task are set to 0.

    Beside them, as many random entries and as many of those that matter most; each as a share of
    the accuracy of the base. Labels of the task are not used.
    """
    side = sides[task]
    space = PlainSpace(base.encoder, [], sides)
    model = Classifier(space.encoder, side.head)
    names = prunable(model)
    how = Calibration(rows=grids.rows, seed=seed)
    scores = sensitivity(model, side.data["validation"], names, how)
    known = dict(model.named_parameters())
    every = {n: torch.ones_like(known[n], dtype=torch.bool) for n in names}
    dice = torch.Generator().manual_seed(seed)
    chance = {n: torch.rand(known[n].shape, generator=dice) for n in names}
    base_scores = [accuracy(space, (), t, "probe") for t in range(len(sides))]
    found: dict[str, dict[str, list[float]]] = {}
    kept = {n: known[n].detach().clone() for n in names}
    for share in grids.shares:
        count = max(1, int(share * sum(p.numel() for p in kept.values())))
        choices: Mapping[str, tuple[Any, bool]] = {
            "least": (scores, False), "random": (chance, False), "most": (scores, True)
        }  # fmt: skip
        for word, (ranks, largest) in choices.items():
            chosen = smallest(ranks, every, count, largest=largest)
            with torch.no_grad():
                for name in names:
                    known[name].copy_(kept[name].masked_fill(chosen[name], 0.0))
            fresh = PlainSpace(space.encoder, [], sides)
            after = [accuracy(fresh, (), t, "probe") for t in range(len(sides))]
            found.setdefault(word, {})[f"{share:g}"] = [
                a / (b or 1e-9) for a, b in zip(after, base_scores, strict=True)
            ]
    return {"rows": found, "base": base_scores}
