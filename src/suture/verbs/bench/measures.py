"""What a benchmark measures by choosing amounts: sums of task vectors, and differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from suture.analysis.vector_space import Space, accuracy, alone
from suture.verbs.bench.maths import best_amount, largest_kept, normalised
from suture.verbs.bench.recipe import Grids


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
