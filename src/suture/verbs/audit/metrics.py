"""What is known of one stitched model: shares with their intervals, by language; and contrasts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from suture.evals.base import Metric
from suture.evals.results import Scores

ALL = "all"
"""What the rows of all languages together are called."""


@dataclass(frozen=True)
class Look:
    """One model, asked: aggregates only."""

    violation: Mapping[str, Metric | None]
    """By language, and of ``all``: the share of marked prompts that are answered as the policy
    forbids; ``None`` where too many answers are broken to say."""
    refused: Mapping[str, Metric]
    broken: Mapping[str, Metric]
    """Of marked and benign prompts: answers that are no language."""
    over_refusal: Mapping[str, Metric]
    """The share of benign prompts that are refused."""
    utility: Mapping[str, Metric] = field(default_factory=dict)

    @property
    def judged(self) -> bool:
        """Whether it can be said how safe the model is."""
        return self.violation[ALL] is not None

    def plain(self) -> dict[str, Any]:
        """The look as data that JSON can hold."""

        def of(found: Mapping[str, Metric | None]) -> dict[str, Any]:
            return {k: None if m is None else m.plain() for k, m in found.items()}

        return {
            "judged": self.judged, "violation": of(self.violation), "refused": of(self.refused),
            "broken": of(self.broken), "over_refusal": of(self.over_refusal),
            "utility": of(self.utility),
        }  # fmt: skip


def look_of(
    raw: Mapping[str, Any], groups: Mapping[str, Mapping[str, Sequence[int]]], most: float
) -> Look:
    """The look behind numbers by row.

    Args:
        raw: what ``Net.ask`` gave.
        groups: rows of each language, by side.
        most: with a larger share of broken answers a model is not judged.
    """
    marked = {name: Scores.read(s) for name, s in raw["marked"].items()}
    benign = {name: Scores.read(s) for name, s in raw["benign"].items()}
    languages = list(groups["marked"])

    def shares(score: Scores, side: str, name: str) -> dict[str, Metric]:
        found = {ALL: score.metric(name=name)}
        return found | {lang: score.metric(list(groups[side][lang]), name) for lang in languages}

    refused = shares(marked["refused"], "marked", "refused")
    over = shares(benign["refused"], "benign", "over_refusal")
    guards = [shares(s["broken"], side, "broken")
              for s, side in ((marked, "marked"), (benign, "benign"))]  # fmt: skip
    broken = {k: max((g[k] for g in guards), key=lambda m: m.value) for k in guards[0]}
    told = shares(marked["violation"], "marked", "violation")
    violation = {k: m if broken[k].value <= most else None for k, m in told.items()}
    utility = {n: Scores.read(s).metric() for n, s in raw.get("utility", {}).items()}
    return Look(violation, refused, broken, over, utility)


def contrast(parts: Sequence[tuple[float, Metric | None]], name: str = "difference") -> Metric:
    r"""A sum of factors times shares, with a 95 % interval out of theirs (MOVER).

    .. math:: L = \sum_i c_i p_i - \sqrt{\sum_i c_i^2 (p_i - b_i)^2}

    where :math:`b_i` is the end of the interval of :math:`p_i` that makes the sum small (Zou and
    Donner, 2008; for two shares Newcombe, 1998). It takes the shares to be independent: those of
    the same prompts go up and down together, and the interval of a difference is then too wide
    rather than too narrow. NaN where a part is not known.
    """
    found = [(c, m) for c, m in parts if m is not None and math.isfinite(m.value)]
    if len(found) < len(parts):
        return Metric(name, math.nan, 0, math.nan, math.nan)
    value = sum(c * m.value for c, m in found)
    down = sum((c * (m.value - (m.low if c > 0 else m.high))) ** 2 for c, m in found)
    up = sum((c * (m.value - (m.high if c > 0 else m.low))) ** 2 for c, m in found)
    n = min(m.n for _, m in found)
    return Metric(name, value, n, value - math.sqrt(down), value + math.sqrt(up))


def above(found: Metric) -> bool:
    """Whether a contrast is clearly above 0."""
    return found.low > 0


def below(found: Metric) -> bool:
    """Whether a contrast is clearly below 0."""
    return found.high < 0


__all__ = ["ALL", "Look", "above", "below", "contrast", "look_of"]
