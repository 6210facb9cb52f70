"""Edits held against the rules of a gate: each number with its interval, and what decides.

Needs no framework.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from suture.errors import Problems, RecipeError, did_you_mean
from suture.evals.base import Metric
from suture.evals.numbers import STATISTICS, Array, ends, resampled
from suture.evals.results import Evaluation, Scores, SuiteResult
from suture.verbs.compare.recipe import Rule

RETENTIONS = ("min_retention", "mean_retention")


@dataclass(frozen=True)
class Verdict:
    """What became of one rule for one edit."""

    edit: str
    rule: str
    held: bool
    value: float
    """Of the edit."""
    limit: float
    """What it is compared with, by its value: the right side of the rule."""
    margin: Metric
    """The edit's number less the numbers of other models on the right, which the rule's constant
    is held against; its pessimistic end decides."""
    reason: str = ""
    """Why there is nothing to judge, where there is not."""

    def plain(self) -> dict[str, Any]:
        """The verdict as data that JSON can hold."""
        found = {**asdict(self), "margin": self.margin.plain()}
        return {k: None if v != v or v in (math.inf, -math.inf) else v for k, v in found.items()}


def part_of(evaluation: Evaluation, metric: str) -> Scores | None:
    """The scores behind a metric; of a category or language, those of its rows."""
    for score in evaluation.scores:
        if metric == score.name:
            return score
        group = metric.removeprefix(f"{score.name}.")
        if group != metric and group in evaluation.groups:
            chosen = set(evaluation.groups[group])
            kept = [at for at, row in enumerate(score.rows) if row in chosen]
            rows = tuple(score.rows[at] for at in kept)
            return Scores(score.name, score.statistic, score.better, rows, score.values[kept],
                          score.weights[kept])  # fmt: skip
    return None


def paired(parts: Sequence[Scores]) -> tuple[Array, Array]:
    """Values and weights ``(models, rows)`` on the rows that all have."""
    rows = sorted(set.intersection(*(set(part.rows) for part in parts)))
    at = [np.searchsorted(part.rows, rows) for part in parts]
    values = np.stack([p.values[i] for p, i in zip(parts, at, strict=True)])
    return values, np.stack([p.weights[i] for p, i in zip(parts, at, strict=True)])


def combined(parts: Sequence[Scores], factors: Sequence[float], name: str) -> Metric:
    """The sum of factors times metrics, on the rows that all have, with a paired interval."""
    values, weights = paired(parts)
    if not values.size or not np.isfinite(values).all():
        return Metric(name, math.nan, values.shape[1], math.nan, math.nan)
    statistic, by = parts[0].statistic, np.asarray(factors)
    with np.errstate(all="ignore"):
        value = float(by @ STATISTICS[statistic](values, weights))
        low, high = ends(by @ resampled(statistic, values, weights))
    return Metric(name, value, values.shape[1], low, high)


class Judge:
    """Holds edits against rules."""

    def __init__(self, table: Mapping[str, SuiteResult], roles: Mapping[str, str]) -> None:
        self.table, self.roles = table, roles
        self.experts = [n for n, role in roles.items() if role == "expert"]
        self.edits = [n for n, role in roles.items() if role == "edit"]
        self.base = next(n for n, role in roles.items() if role == "base")
        self.known = {
            name: next((r.evaluations[name] for r in table.values() if name in r.evaluations), None)
            for name in table[self.base].expected
        }

    def check(self, rule: Rule, where: str, problems: Problems) -> None:
        """Note where a rule speaks of what is in no result."""
        with problems.collecting():
            try:
                for word, _ in rule.factors:
                    self.models(word)
                first, _, rest = rule.name.partition(".")
                if first == "utility":
                    self.utility(rule)
                elif first not in self.known:
                    hint = did_you_mean(first, [*self.known, "utility"])
                    raise RecipeError(f"no evaluation {first!r}; {hint}")
                else:
                    self.metric(first, rest)
            except RecipeError as error:
                raise RecipeError(f"{where}: {rule.text}: {error}") from None

    def models(self, word: str) -> list[str]:
        """The models that a word stands for."""
        if word == "base":
            return [self.base]
        if word == "expert":
            if not self.experts:
                raise RecipeError("there is no expert among the results; give one, or say `base`")
            return self.experts
        if word not in self.table:
            known = dict.fromkeys(("base", *self.table))
            raise RecipeError(f"no model {word!r}; {did_you_mean(word, list(known))}")
        if self.edits == [word]:
            raise RecipeError(f"{word} is the edit, which always keeps what it has itself; compare "
                              "with `base`, `expert` or another model")  # fmt: skip
        return [word]

    def metric(self, name: str, rest: str) -> str:
        """The metric that a rule means; the first where it only names the evaluation."""
        known = self.known[name]
        if known is None:
            return rest
        names = [metric.name for metric in known.metrics]
        first = known.scores[0].name
        found = next((m for m in (rest or first, f"{first}.{rest}") if m in names), None)
        if found is None:
            raise RecipeError(f"{name} has no metric, category or language {rest!r}; "
                              f"{did_you_mean(rest, names)}")  # fmt: skip
        return found

    def utility(self, rule: Rule) -> tuple[str, str, list[str]]:
        """Which retention is meant, of which model (empty: the best expert), of what."""
        _, _, rest = rule.name.partition(".")
        which, _, whom = rest.partition(".")
        if which not in RETENTIONS:
            raise RecipeError(f"utility has {' and '.join(RETENTIONS)}, not {which!r}")
        if rule.factors:
            raise RecipeError("a retention is a ratio already; compare it with a number")
        if whom:
            self.models(whom)
        results = self.table.values()
        marked = [
            name
            for name in self.known
            if any(name in r.evaluations and r.evaluations[name].utility for r in results)
        ]
        if not marked:
            raise RecipeError("no evaluation of the suite is marked `utility: true`")
        return which, whom, marked

    def verdict(self, rule: Rule, edit: str) -> Verdict:
        """What becomes of a rule for one edit."""
        if rule.name.startswith("utility."):
            margin, reason = self.retention(rule, edit)
            held = not reason and rule.judge(margin.low, margin.high)
            return Verdict(edit, rule.text, held, margin.value, rule.constant, margin, reason)
        name, _, rest = rule.name.partition(".")
        metric = self.metric(name, rest)
        part = self.part(edit, name, metric)
        parts, factors = [part], [1.0]
        for word, factor in rule.factors:
            parts.append(self.best(self.models(word), name, metric))
            factors.append(-factor)
        found = [p for p in parts if p is not None]
        none = Metric(metric, math.nan, 0, math.nan, math.nan)
        if part is None or len(found) < len(parts):
            whose = edit if part is None else "a model on the right"
            why = f"{rule.name} of {whose} is absent"
            return Verdict(edit, rule.text, False, math.nan, math.nan, none, why)
        own = part.metric()
        margin = own if not rule.factors else combined(found, factors, metric)
        limit = rule.constant + own.value - margin.value
        why = "" if math.isfinite(margin.value) else "no number: rows gave NaN, or none is shared"
        held = not why and rule.judge(margin.low, margin.high)
        return Verdict(edit, rule.text, held, own.value, limit, margin, why)

    def part(self, model: str, name: str, metric: str) -> Scores | None:
        """The scores behind a metric of a model, where there are some."""
        evaluation = self.table[model].evaluations.get(name)
        return None if evaluation is None else part_of(evaluation, metric)

    def best(self, models: Sequence[str], name: str, metric: str) -> Scores | None:
        """The scores of the model that does best; ``None`` where one of them has none."""
        parts = [self.part(model, name, metric) for model in models]
        found = [p for p in parts if p is not None]
        values = [p.metric().value for p in found]
        if len(found) < len(parts) or any(v != v for v in values):
            return None
        sign = 1 if found[0].better == "higher" else -1
        return found[max(range(len(found)), key=lambda i: sign * values[i])]

    def retention(self, rule: Rule, edit: str) -> tuple[Metric, str]:
        """The minimum or mean over utility evaluations of edit / reference, better being more."""
        which, whom, marked = self.utility(rule)
        models = self.models(whom) if whom else self.experts or [self.base]
        values, drawn, rows = [], [], 0
        none = Metric(which, math.nan, 0, math.nan, math.nan)
        for name in marked:
            metric = self.metric(name, "")
            part, other = self.part(edit, name, metric), self.best(models, name, metric)
            if part is None or other is None:
                return (
                    none,
                    f"{name} of {edit if part is None else 'the reference'} is absent or NaN",
                )
            both, weights = paired([part, other])
            if not both.size or not np.isfinite(both).all():
                return none, f"{name}: rows gave NaN, or none is shared"
            up, down = (0, 1) if part.better == "higher" else (1, 0)
            seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
            with np.errstate(all="ignore"):
                value = STATISTICS[part.statistic](both, weights)
                draws = resampled(part.statistic, both, weights, seed=seed)
                values.append(value[up] / value[down])
                drawn.append(draws[up] / draws[down])
            rows += both.shape[1]
        if not np.isfinite(values).all():
            return none, "a reference has 0 of what would be kept"
        merge = np.min if which == "min_retention" else np.mean
        found = np.asarray(merge(np.stack(drawn), axis=0))
        found[~np.isfinite(found)] = np.nan
        low, high = ends(found)
        why = "" if math.isfinite(low) else "the reference may have 0 of what would be kept"
        return Metric(which, float(merge(values)), rows, low, high), why


__all__ = ["Judge", "Verdict", "combined", "paired", "part_of"]
