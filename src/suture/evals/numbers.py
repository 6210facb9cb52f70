"""Numbers by row to metrics with intervals, and differences of models over the same rows.

A statistic takes values and weights ``(..., rows)`` and gives ``(...)``: one line of ``STATISTICS``
is all that a new one needs. Models are compared over the same resampled rows (a paired bootstrap):
what is hard for both does not count as a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from suture.evals.base import Metric, share

Array = np.ndarray[Any, Any]
Statistic = Callable[[Array, Array], Array]

RESAMPLES = 2000
_AT_ONCE = 1 << 21
"""Numbers drawn at once: memory does not grow with the rows."""


def _mean(values: Array, weights: Array) -> Array:
    return np.asarray(values.mean(-1))


def _ratio(values: Array, weights: Array) -> Array:
    return np.asarray(values.sum(-1) / weights.sum(-1))


def _exp_ratio(values: Array, weights: Array) -> Array:
    return np.asarray(np.exp(_ratio(values, weights)))


def _auroc(values: Array, weights: Array) -> Array:
    """How often a row of weight 1 has more than one of weight 0; equals count half.

    0.5 where a draw has rows of one weight only: nothing is known then.
    """
    if values.ndim > 1:
        pairs = zip(values, np.broadcast_to(weights, values.shape), strict=True)
        return np.array([_auroc(v, w) for v, w in pairs])
    above, below = values[weights > 0], np.sort(values[weights <= 0])
    if not len(above) or not len(below):
        return np.asarray(0.5)
    ranks = np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")
    return np.asarray(ranks.mean() / (2 * len(below)))


def _false_at_95(values: Array, weights: Array) -> Array:
    """Share of rows of weight 0 that reach what 95 % of the rows of weight 1 reach.

    0.5 where a draw has rows of one weight only.
    """
    if values.ndim > 1:
        pairs = zip(values, np.broadcast_to(weights, values.shape), strict=True)
        return np.array([_false_at_95(v, w) for v, w in pairs])
    above, below = np.sort(values[weights > 0]), values[weights <= 0]
    if not len(above) or not len(below):
        return np.asarray(0.5)
    threshold = above[int(0.05 * len(above))]  # of n rows, at most 5 % lie below it
    return np.asarray((below >= threshold).mean())


STATISTICS: dict[str, Statistic] = {
    "share": _mean,  # of rows with 1; the others have 0
    "mean": _mean,
    "ratio": _ratio,  # sum of values over sum of weights
    "exp-ratio": _exp_ratio,  # the same as an exponent: perplexity
    "auroc": _auroc,  # how well values tell rows of weight 1 from rows of weight 0
    "false-at-95": _false_at_95,  # of weight 0, at the threshold that 95 % of the others reach
}
"""How numbers by row become one, by name."""


def metric_of(name: str, statistic: str, values: Array, weights: Array) -> Metric:
    """The metric of some rows: a share with its Wilson interval, others with a bootstrap one.

    Where a row has no finite number the metric is NaN: a model that breaks on one row has failed.
    """
    if not len(values):
        return Metric(name, np.nan, 0, np.nan, np.nan)
    if not (np.isfinite(values).all() and np.isfinite(weights).all()):
        return Metric(name, np.nan, len(values), np.nan, np.nan)
    if statistic == "share":
        return share(name, int(values.sum()), len(values))
    with np.errstate(all="ignore"):  # the exponent of a broken model's loss is infinite
        value = float(STATISTICS[statistic](values, weights))
        drawn = resampled(statistic, values[None], weights[None])[0]
    low, high = ends(drawn)
    return Metric(name, value, len(values), low, high)


def resampled(statistic: str, values: Array, weights: Array, *, seed: int = 0) -> Array:
    """The statistic of each model over the same resampled rows.

    Args:
        statistic: of ``STATISTICS``.
        values: ``(models, rows)``.
        weights: ``(models, rows)``.
        seed: of the draws.

    Returns:
        ``(models, RESAMPLES)``.
    """
    rows = values.shape[1]
    generator = np.random.Generator(np.random.Philox(seed))
    found = np.empty((len(values), RESAMPLES))
    step = max(1, _AT_ONCE // max(1, rows))
    with np.errstate(all="ignore"):
        for start in range(0, RESAMPLES, step):
            chosen = generator.integers(0, rows, (min(step, RESAMPLES - start), rows))
            for model in range(len(values)):
                found[model, start : start + len(chosen)] = STATISTICS[statistic](
                    values[model][chosen], weights[model][chosen]
                )
    return found


def ends(drawn: Array) -> tuple[float, float]:
    """The 95 % percentile interval; NaN where a draw is NaN."""
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return float(low), float(high)


def as_array(values: Sequence[float | None]) -> Array:
    """Numbers as an array; ``None`` is NaN."""
    return np.asarray([np.nan if v is None else v for v in values], np.float64)
