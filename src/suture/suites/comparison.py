"""Results of one suite side by side: differences with paired intervals, and whether rules hold.

Results are compared only if the same was asked of all: the same rows, options and decoding. Needs
no framework.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from suture.errors import MismatchError, Problems, RecipeError, did_you_mean
from suture.evals.base import Metric
from suture.evals.numbers import STATISTICS, Array, ends, resampled
from suture.evals.results import Evaluation, Scores, SuiteResult, read_result
from suture.suites.gate import Rule, read_gate

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


@dataclass(frozen=True)
class Line:
    """One metric of every model."""

    evaluation: str
    metric: str
    better: str
    values: Mapping[str, Metric]
    """By model; a model without it is not there."""
    differences: Mapping[str, Metric]
    """Model less base on the rows that both have, by model."""


@dataclass(frozen=True)
class Comparison:
    """Base, experts and edits of one suite."""

    suite: str
    roles: Mapping[str, str]
    """``base``, ``expert`` or ``edit``, by model, in the order of the table."""
    lines: tuple[Line, ...]
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        """Whether no rule is broken."""
        return all(verdict.held for verdict in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as data that JSON can hold."""
        return {
            "suite": self.suite,
            "models": dict(self.roles),
            "held": self.held,
            "lines": [
                {"evaluation": line.evaluation, "metric": line.metric, "better": line.better,
                 "values": {n: m.plain() for n, m in line.values.items()},
                 "differences": {n: m.plain() for n, m in line.differences.items()}}
                for line in self.lines
            ],
            "verdicts": [verdict.plain() for verdict in self.verdicts],
            "notes": list(self.notes),
        }  # fmt: skip


def compare_files(
    results: Sequence[Path], edits: Sequence[Path] = (), gate: Path | None = None
) -> Comparison:
    """Compare files that ``suture eval`` wrote: base, experts and an edit, in this order.

    Raises:
        SutureError: a file or rule is at fault, or not the same was asked; all problems at once.
    """
    problems = Problems()
    if len(results) + len(edits) < 2:
        problems.add(RecipeError, "compare takes a base and at least one other result")
    found: dict[Path, SuiteResult] = {}
    for path in (*results, *edits):
        if path in found:
            problems.add(RecipeError, f"{path}: stands twice")
        with problems.collecting():
            found[path] = read_result(path)
    problems.raise_if_any()
    names = _labels(found)
    first, *others = results
    last = list(edits) or others[-1:]
    experts = others if edits else others[:-1]
    return compare(
        found[first], [found[p] for p in experts], [found[p] for p in last], gate,
        names={id(found[p]): name for p, name in names.items()},
    )  # fmt: skip


def _labels(found: Mapping[Path, SuiteResult]) -> dict[Path, str]:
    """A name for each result: its model's, else its file's, else its path."""
    for name in (lambda p: found[p].model, lambda p: p.stem, str):
        names = {path: name(path) for path in found}
        if len(set(names.values())) == len(names) and not {"base", "expert"} & set(
            list(names.values())[1:]
        ):
            break
    return names


def compare(
    base: SuiteResult,
    experts: Sequence[SuiteResult],
    edits: Sequence[SuiteResult] | SuiteResult,
    gate: Path | str | Sequence[str] | None = None,
    *,
    names: Mapping[int, str] | None = None,
) -> Comparison:
    """Put results of one suite side by side, and hold edits against rules.

    Args:
        base: what the others were made of.
        experts: models that edits are to keep up with.
        edits: what is judged.
        gate: rules, or a file of them.
        names: other names for results than their models', by ``id``; for models of one name.

    Raises:
        SutureError: not the same was asked of all, or a rule is none; all problems at once.
    """
    judged = [edits] if isinstance(edits, SuiteResult) else list(edits)
    problems = Problems()
    rules: list[Rule] = []
    if gate is not None:
        rules = read_gate(Path(gate) if isinstance(gate, str) else gate, problems)
    given = [("base", base), *(("expert", e) for e in experts), *(("edit", e) for e in judged)]
    table: dict[str, SuiteResult] = {}
    roles: dict[str, str] = {}
    for role, result in given:
        name = (names or {}).get(id(result), result.model)
        if name in table:
            problems.add(RecipeError, f"two results are of models named {name}")
        table[name], roles[name] = result, role
    own = next(iter(table))
    for name, result in table.items():
        for reason in _differs(base, result, own, name):
            problems.add(MismatchError, reason)
    if not problems:
        judge = _Judge(table, roles)
        for number, rule in enumerate(rules):
            judge.check(rule, f"rules[{number}]", problems)
    problems.raise_if_any()
    notes = [
        f"{name}: {evaluation}: {note}"
        for name, result in table.items()
        for evaluation, e in result.evaluations.items()
        for note in e.notes
    ]
    notes += [f"{name}: was interrupted; the same `suture eval` goes on"
              for name, result in table.items() if not result.complete]  # fmt: skip
    verdicts = [judge.verdict(rule, n) for n, role in roles.items() if role == "edit"
                for rule in rules]  # fmt: skip
    return Comparison(base.suite, roles, tuple(_lines(table, own)), tuple(verdicts), tuple(notes))


def _differs(base: SuiteResult, other: SuiteResult, own: str, name: str) -> list[str]:
    """Why two results cannot be compared; empty where they can."""
    if base.suite_hash == other.suite_hash:
        return []
    found = []
    for word, only in ((name, set(base.expected) - set(other.expected)),
                       (own, set(other.expected) - set(base.expected))):  # fmt: skip
        if only:
            found.append(f"{word} was not asked {', '.join(sorted(only))}; give all the same suite")
    for question in base.evaluations.keys() & other.evaluations.keys():
        one, two = base.evaluations[question], other.evaluations[question]
        leaves = _leaves(one.asked, two.asked)
        places = [place for place, _, _ in leaves]
        for place, a, b in leaves:
            if place == "data" and "rows" in places:
                continue  # another number of rows says it already
            if place == "data":
                what = "was asked of other rows"
            else:
                what = f"{place} is {a!r} for {own} and {b!r} for {name}"
            found.append(f"{question}: {what}; evaluate both with the same suite")
        if one.utility != two.utility:
            found.append(f"{question}: is marked as utility for one of {own} and {name} only")
    return sorted(found) or [f"{own} and {name} were asked by different suites"]


def _leaves(one: Any, two: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """Where two values of plain data differ."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        keys = dict.fromkeys([*one, *two])
        return [
            leaf
            for key in keys
            for leaf in _leaves(one.get(key), two.get(key), f"{place}.{key}" if place else str(key))
        ]
    return [] if one == two else [(place, one, two)]


def _lines(table: Mapping[str, SuiteResult], own: str) -> list[Line]:
    found = []
    for name in table[own].expected:
        held = {m: r.evaluations[name] for m, r in table.items() if name in r.evaluations}
        if not held:
            continue
        for metric in dict.fromkeys(metric.name for e in held.values() for metric in e.metrics):
            values = {m: x for m, e in held.items() for x in e.metrics if x.name == metric}
            better = "higher"
            differences = {}
            for model, evaluation in held.items():
                part = part_of(evaluation, metric)
                if part is None:
                    continue
                better = part.better
                start = part_of(held[own], metric) if own in held else None
                if model != own and start is not None:
                    differences[model] = combined([part, start], [1.0, -1.0], metric)
            found.append(Line(name, metric, better, values, differences))
    return found


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


class _Judge:
    """Holds edits against rules."""

    def __init__(self, table: Mapping[str, SuiteResult], roles: Mapping[str, str]) -> None:
        self.table, self.roles = table, roles
        self.experts = [n for n, role in roles.items() if role == "expert"]
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
            raise RecipeError(f"no model {word!r}; {did_you_mean(word, ['base', *self.table])}")
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


__all__ = ["Comparison", "Line", "Verdict", "combined", "compare", "compare_files"]
