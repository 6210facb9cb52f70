"""What only a model can tell: loss along a line, disentanglement maps, curves over density.

Nothing here loads a model. Each function takes a callable that evaluates the base plus given
amounts of task vectors; ``suture.evals.walk`` makes one of a loaded encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from suture.analysis.cells import Array, Matrix, frozen
from suture.errors import RecipeError

Predict = Callable[[Sequence[float], int], Array]
"""``predict(amounts, task)``: what the base plus ``amounts`` of the task vectors says to the rows
of a task, one prediction a row."""
Distance = Callable[[Array, Array], float]


def disagreement(one: Array, other: Array) -> float:
    """Share of rows whose predictions differ."""
    if len(one) != len(other) or not len(one):
        raise RecipeError(f"{len(one)} and {len(other)} predictions cannot be compared")
    return float(np.mean(np.asarray(one) != np.asarray(other)))


@dataclass(frozen=True)
class Disentanglement:
    """How much two task vectors disturb each other on each other's data, over their amounts."""

    tasks: tuple[str, str]
    amounts: tuple[float, ...]
    """The grid, the same for both."""
    error: Matrix
    """xi in [0, 2]: rows go over amounts of the first task, columns over those of the second."""
    mean: float
    """Over amounts from 0 to 1; over the whole grid where it has none of them."""
    at_one: float | None
    """At (1, 1), where the grid has it."""
    rows: int
    """Predictions that were compared at each point, both tasks together."""
    metric: str = "classes"
    """What is compared: ``classes``, or vectors (``features``)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, recognised by ``kind``."""
        return {"kind": "disentanglement", **asdict(self)}


def disentanglement(
    predict: Predict,
    tasks: tuple[str, str],
    amounts: Sequence[float],
    distance: Distance = disagreement,
    metric: str = "classes",
) -> Disentanglement:
    r"""The error map of a pair of task vectors.

    .. math:: \xi(a_1, a_2) = \sum_{t=1,2} E_{x \sim D_t}\, dist(f(x; \theta_0 + a_t\tau_t),
       f(x; \theta_0 + a_1\tau_1 + a_2\tau_2))

    Both axes are the localisation test: with one amount 0, only the other task's data can differ.
    Labels are not used. The n single predictions of each axis are made once; n squared joint ones.

    Source: Ortiz-Jimenez, Favero and Frossard (NeurIPS 2023, arXiv:2305.12827).

    Raises:
        RecipeError: fewer than two amounts, or one stands twice.
    """
    grid = [float(a) for a in amounts]
    if len(grid) < 2 or len(set(grid)) != len(grid):
        raise RecipeError(f"a map needs two different amounts or more, not {list(amounts)}")
    single = [[predict((a, 0.0), 0) for a in grid], [predict((0.0, a), 1) for a in grid]]
    error = np.zeros((len(grid), len(grid)))
    for i, first in enumerate(grid):
        for j, second in enumerate(grid):
            for task, alone in ((0, single[0][i]), (1, single[1][j])):
                error[i, j] += distance(alone, predict((first, second), task))
    inside = [i for i, a in enumerate(grid) if 0 <= a <= 1]
    one = grid.index(1.0) if 1.0 in grid else None
    return Disentanglement(
        tasks, tuple(grid), frozen(error),
        float(error[np.ix_(inside, inside)].mean()) if inside else float(error.mean()),
        None if one is None else float(error[one, one]),
        len(single[0][0]) + len(single[1][0]), metric,
    )  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One measured number of a curve, with its 95 % interval where there is one."""

    x: float
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """One line of a figure."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Curve:
    """Measured numbers over one quantity: a score over density, a loss along a line."""

    title: str
    x: str
    """What runs along: ``density``, ``way``, ..."""
    y: str
    """What is measured."""
    series: tuple[Series, ...]
    logarithmic: bool = False
    """Whether x is shown on a logarithmic scale."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, recognised by ``kind``."""
        return {"kind": "curve", **asdict(self)}


def along(
    measure: Callable[[Sequence[float]], Sequence[float]],
    start: Sequence[float],
    stop: Sequence[float],
    tasks: Sequence[str],
    *,
    steps: int = 11,
    what: str = "loss",
) -> Curve:
    """A measure of every task on the straight way between two points: barriers show as humps.

    Args:
        measure: ``measure(amounts)`` gives one number a task for the base plus these amounts.
        start: amounts of the task vectors where the way begins, for example of an expert.
        stop: where it ends, for example a merge.
        tasks: their names.
        steps: how many points, both ends included.
        what: what is measured.

    Raises:
        RecipeError: fewer than two steps, or the ends do not have the same number of amounts.
    """
    if steps < 2 or len(start) != len(stop):
        raise RecipeError("a line needs two steps or more, and as many amounts at both ends")
    first, last = np.array(start, np.float64), np.array(stop, np.float64)
    points: list[list[Point]] = [[] for _ in tasks]
    for x in np.linspace(0, 1, steps).tolist():
        values = measure(((1 - x) * first + x * last).tolist())
        for row, value in zip(points, values, strict=True):
            row.append(Point(x, float(value)))
    series = tuple(Series(name, tuple(row)) for name, row in zip(tasks, points, strict=True))
    return Curve(f"{what} along a line", "way", what, series)
