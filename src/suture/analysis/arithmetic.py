"""How task vectors disturb each other: maps, movement of features, weights that tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from suture.analysis.maps import Disentanglement, disagreement, disentanglement
from suture.analysis.vector_space import (
    Array,
    LinearSpace,
    PlainSpace,
    Side,
    Space,
    accuracy,
    alone,
)
from suture.errors import RecipeError
from suture.training.calibrate import Calibration, prunable, sensitivity, smallest
from suture.training.models import Classifier, Encoder, device_of

METRICS = {
    "classes": "the share of rows whose class differs",
    "features": "1 - cosine of the encoder's vectors, a mean over rows",
}
"""How far two answers to the same rows are apart."""


def apart(one: Array, other: Array) -> float:
    """1 - cosine of vectors, a mean over rows; shapes ``[rows, dim]``."""
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(1) / np.maximum(lengths, 1e-300)
    return float(np.mean(1 - np.minimum(cosines, 1.0)))


def maps(
    space: Space, amounts: Sequence[float], tasks: Sequence[str], metric: str = "classes"
) -> list[Disentanglement]:
    """The map of disentanglement errors of every pair of task vectors.

    Raises:
        RecipeError: fewer than two amounts, or one stands twice.
    """
    found = []
    for one, other in combinations(range(space.count), 2):

        def answer(point: Sequence[float], task: int, pair: Any = (one, other)) -> Array:
            at = [0.0] * space.count
            at[pair[0]], at[pair[1]] = point
            if metric == "features":
                return np.asarray(space.features(tuple(at), pair[task], "probe").numpy())
            return space.predict(tuple(at), pair[task], "probe")

        distance = apart if metric == "features" else disagreement
        pair = tasks[one], tasks[other]
        found.append(disentanglement(answer, pair, amounts, distance, metric))
    return found


def transfers(space: Space) -> dict[str, Any]:
    """Every task vector on every task; rows are vectors, columns the tasks measured on.

    ``transfer`` is accuracy minus that of the base, ``drift`` the share of predictions that differ
    from the base's.
    """
    none = (0.0,) * space.count
    base = [accuracy(space, none, t, "probe") for t in range(space.count)]
    transfer, drift = np.zeros((2, space.count, space.count))
    for row in range(space.count):
        at = alone(space.count, row)
        for column in range(space.count):
            transfer[row, column] = accuracy(space, at, column, "probe") - base[column]
            said, before = (space.predict(p, column, "probe") for p in (at, none))
            drift[row, column] = np.mean(said != before)
    return {"transfer": np.round(transfer, 4).tolist(), "drift": np.round(drift, 4).tolist()}


def entangled(space: Space, amounts: Sequence[float], tasks: Sequence[str]) -> dict[str, Any]:
    """How much task vectors disturb each other: maps of all pairs, and every vector on every task.

    The amounts go up; ``xi`` is at the last of them, ``xi_mean`` over all but 0.
    """
    found = maps(space, amounts, tasks)
    errors = [np.array(m.error) for m in found]
    joint = [e[1:, 1:] for e in errors]
    last = [e[-1, -1] for e in errors]
    return {
        "xi": float(np.mean(last)),
        "xi_mean": float(np.mean(joint)),
        "amounts": list(amounts),
        "maps": {
            f"{m.tasks[0]}, {m.tasks[1]}": np.round(e, 4).tolist()
            for m, e in zip(found, errors, strict=True)
        },
        **transfers(space),
    }


def movement(space: Space, encoder: Encoder) -> dict[str, Any]:
    r"""How far each vector moves the features of every task, and how much of it is first order.

    ``moved`` has :math:`E_x |f(x, \theta_0 + \tau) - f(x, \theta_0)|^2` over
    :math:`E_x |f(x, \theta_0)|^2`, ``first`` the same of :math:`J \tau`; rows are vectors, columns
    tasks. ``elsewhere`` is what a vector moves on other tasks over what it moves on its own, a mean
    over vectors: 0 would be perfect localization. ``bend`` is the share of the movement on the own
    task that is not first order, :math:`|\Delta f - J\tau|^2 / |\Delta f|^2`.

    Raises:
        RecipeError: a vector moves no features of its own task, which all are held against.
    """
    count = space.count
    lines = LinearSpace(encoder, space.vectors, space.sides)
    none = (0.0,) * count
    moved, first = np.zeros((2, count, count))
    bend = np.zeros(count)
    for row in range(count):
        at = alone(count, row)
        for column in range(count):
            start = lines.features(none, column, "few")
            whole = space.features(at, column, "few") - start
            slope = lines.features(at, column, "few") - start
            size = float(start.square().sum())
            moved[row, column] = float(whole.square().sum()) / size
            first[row, column] = float(slope.square().sum()) / size
            if row == column:
                if not moved[row, row] > 0 or not first[row, row] > 0:
                    raise RecipeError(
                        f"{space.sides[row].name}: its task vector moves no features of its own "
                        "task, so nothing can be held against that; leave it out"
                    )
                bend[row] = float((whole - slope).square().sum() / whole.square().sum())
    return {
        "moved": np.round(moved, 6).tolist(),
        "first": np.round(first, 6).tolist(),
        "own": float(np.mean(np.diag(moved))),
        "elsewhere": _elsewhere(moved),
        "elsewhere_first": _elsewhere(first),
        "bend": float(np.mean(bend)),
    }


def _elsewhere(matrix: Array) -> float:
    count = len(matrix)
    others = (matrix.sum(1) - np.diag(matrix)) / (count - 1)
    return float(np.mean(others / np.diag(matrix)))


def sharing(
    encoder: Encoder, sides: Sequence[Side], task: int, shares: Sequence[float], how: Calibration
) -> dict[str, Any]:
    """Accuracy of every task when entries that matter least to one task are set to 0.

    Beside them, as many random entries and as many of those that matter most; each as a share of
    the accuracy of the base. Labels of the task are not used.
    """
    side = sides[task]
    space = PlainSpace(encoder, [], sides)
    device = device_of(space.encoder)
    model = Classifier(space.encoder, side.head).to(device)
    names = prunable(model)
    scores = sensitivity(model, side.data["validation"], names, how, device=str(device))
    known = dict(model.named_parameters())
    every = {n: torch.ones_like(known[n], dtype=torch.bool) for n in names}
    dice = torch.Generator().manual_seed(how.seed)
    chance = {n: torch.rand(known[n].shape, generator=dice).to(device) for n in names}
    base_scores = [accuracy(space, (), t, "probe") for t in range(len(sides))]
    found: dict[str, dict[str, list[float]]] = {}
    kept = {n: known[n].detach().clone() for n in names}
    for share in shares:
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
