r"""The arithmetic of the tables: which amount is chosen, ratios, intervals, matched pairs.

Everything here is on plain numbers, so that it can be checked by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from suture.errors import RecipeError
from suture.evals.base import Z95, share

T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t that leave 2.5 % above, by degrees of freedom."""


def t95(degrees: int) -> float:
    r"""The quantile of Student's t that leaves 2.5 % above.

    From ten degrees of freedom on, the expansion around the normal quantile z,
    :math:`z + (z^3 + z) / 4n + (5 z^5 + 16 z^3 + 3 z) / 96 n^2 + \dots`, is right to four digits
    (Abramowitz and Stegun 1964, 26.7.5).
    """
    if degrees < len(T95):
        return T95[degrees]
    z, n = Z95, degrees
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with its 95 % t interval; the interval is unknown for one seed."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    @property
    def half(self) -> float:
        """Half the width of the interval; 0 where it is unknown."""
        return 0.0 if self.high is None else self.high - self.mean

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    r"""Mean and t interval, :math:`\bar x \pm t_{n-1} s / \sqrt n`.

    Raises:
        RecipeError: there are no values.
    """
    if not values:
        raise RecipeError("no values, no mean")
    number = len(values)
    mean = math.fsum(values) / number
    if number == 1:
        return Spread(mean, None, None, tuple(values))
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (number - 1))
    half = t95(number - 1) * deviation / math.sqrt(number)
    return Spread(mean, mean - half, mean + half, tuple(values))


def normalised(found: Sequence[float], single: Sequence[float]) -> float:
    """Mean over tasks of accuracy over that of the task's own single model.

    Raises:
        RecipeError: a single model has no right answer, or the lists differ in length.
    """
    if len(found) != len(single) or not found or not all(single):
        raise RecipeError(f"{len(found)} accuracies over {list(single)} is no ratio")
    return math.fsum(a / b for a, b in zip(found, single, strict=True)) / len(found)


def best_amount(scores: Mapping[float, Sequence[float]], single: Sequence[float]) -> float:
    """The amount with the largest normalised accuracy; the smallest of equal ones.

    ``scores`` has the accuracies of all tasks, by amount.
    """
    return max(sorted(scores), key=lambda a: (normalised(scores[a], single), -a))


def largest_kept(
    control: Mapping[float, float], base: float, *, keep: float, most: float = math.inf
) -> float:
    """The largest amount, up to ``most``, with at least ``keep`` of the control's accuracy.

    It need not be where the accuracy first falls below: amounts are judged one by one. 0, the base
    itself, is what is left where none is good enough.
    """
    fine = [a for a, score in control.items() if a <= most and score >= keep * base - 1e-12]
    return max(fine, default=0.0)


def matched(own: Sequence[float], reference: Sequence[float]) -> tuple[int, int]:
    """Checkpoints of a strategy and of the reference whose single-task accuracies are nearest.

    One of both is at its end: the one that ends lower. Of the other, the checkpoint nearest to it
    is taken, the later one of two that are equally near. Checkpoints are counted from 0.
    """
    last_own, last_reference = len(own) - 1, len(reference) - 1
    if own[-1] <= reference[-1]:
        return last_own, _nearest(reference, own[-1])
    return _nearest(own, reference[-1]), last_reference


def _nearest(values: Sequence[float], wanted: float) -> int:
    return min(range(len(values)), key=lambda i: (abs(values[i] - wanted), -i))


def within_one_interval(own: float, reference: float, rows: int) -> bool:
    """Whether an accuracy lies in the 95 % Wilson interval of the other over so many rows."""
    bounds = share("accuracy", round(reference * rows), rows)
    return bounds.low <= own <= bounds.high


@dataclass(frozen=True)
class Claim:
    """A statement, the difference over seeds that decides it, and what comes out."""

    text: str
    difference: Spread
    """Positive values speak for the statement."""
    verdict: str
    """holds, does not hold (the opposite is clear), or not decided."""


def claim(text: str, better: Sequence[float], worse: Sequence[float]) -> Claim:
    """Judge ``better > worse`` by the paired differences of seeds: the t interval excludes 0."""
    found = spread([a - b for a, b in zip(better, worse, strict=True)])
    if found.low is None:
        verdict = "not decided (one seed)"
    elif found.low > 0:
        verdict = "holds"
    elif found.high is not None and found.high < 0:
        verdict = "does not hold: the opposite is clear"
    else:
        verdict = "not decided: the interval holds 0"
    return Claim(text, found, verdict)
