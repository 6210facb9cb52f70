"""Numbers, intervals and tables as lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from suture.evals.base import Metric


def number(value: float) -> str:
    """A number in a few digits."""
    if not math.isfinite(value):
        return "NaN"
    return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3f}"


def interval(metric: Metric | None, sign: str = "") -> str:
    """A value with the ends of its interval."""
    if metric is None:
        return "-"
    if not math.isfinite(metric.value):
        return f"NaN, n = {metric.n}"
    plus = "+" if sign and metric.value >= 0 else ""
    return f"{plus}{number(metric.value)} [{number(metric.low)}, {number(metric.high)}]"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Cells under each other."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        yield "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
