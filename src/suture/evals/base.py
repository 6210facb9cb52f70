"""What an evaluation gives back: numbers with their ``n`` and 95 % interval, as JSON in and out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from suture.errors import RecipeError

if TYPE_CHECKING:  # reading results must not cost what running a model costs
    from torch import nn

    from suture.training.data import Batch

Z95 = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % above."""


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation and what is needed to trust it.

    Examples:
        >>> import suture
        >>> suture.Metric("accuracy", 0.75, n=8, low=0.41, high=0.93).plain()["value"]
        0.75
    """

    name: str
    value: float
    n: int
    """How many rows it was taken over."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Metric:
        """The metric that ``plain`` or ``asdict`` wrote; ``null`` is a number that is none.

        Raises:
            RecipeError: a key is missing, unknown, or not a number.
        """
        try:
            numbers = {
                key: math.nan if raw[key] is None else float(raw[key])
                for key in ("value", "low", "high")
            }
            return cls(name=str(raw["name"]), n=int(raw["n"]), **numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"not a metric: {error!r}") from error

    def plain(self) -> dict[str, Any]:
        """The metric as data that JSON can hold: what is not finite becomes ``null``."""
        return {k: None if v != v or v in (math.inf, -math.inf) else v
                for k, v in asdict(self).items()}  # fmt: skip


def share(name: str, hits: int, n: int) -> Metric:
    """A share of ``n`` with its 95 % Wilson score interval (Wilson, 1927)."""
    if not 0 <= hits <= n or n == 0:
        raise RecipeError(f"{name}: {hits} of {n} is not a share")
    p, zz = hits / n, Z95 * Z95
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = Z95 / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return Metric(name, p, n, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)))


def mean(name: str, values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> Metric:
    """A mean over rows with its 95 % percentile bootstrap interval (Efron, 1979)."""
    return ratio(name, values, np.ones(len(values)), seed=seed, resamples=resamples)


def ratio(
    name: str,
    above: Sequence[float],
    below: Sequence[float] | np.ndarray[Any, Any],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Metric:
    """``sum(above) / sum(below)`` over rows, its 95 % interval by resampling whole rows.

    With summed losses above and token counts below this is the loss per token, and a document
    counts as one draw: the tokens of one document are not independent.
    """
    top, bottom = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if not len(top) or len(top) != len(bottom) or bottom.sum() <= 0:
        raise RecipeError(f"{name}: nothing was measured")
    generator = np.random.Generator(np.random.Philox(seed))
    drawn = np.empty(resamples)
    for at in range(resamples):  # one row of draws at a time: memory stays that of the data
        chosen = generator.integers(0, len(top), len(top))
        total = bottom[chosen].sum()
        drawn[at] = top[chosen].sum() / total if total else math.nan
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Metric(name, float(top.sum() / bottom.sum()), len(top), float(low), float(high))


class Eval(Protocol):
    """A loaded model and batches in, metrics out; the first metric is the one to compare by."""

    def __call__(
        self, model: nn.Module, batches: Iterable[Batch], *, device: str = "cpu"
    ) -> tuple[Metric, ...]:
        """Evaluate; the model is left as it was."""
