"""Results of one suite side by side: differences with paired intervals, and whether rules hold.

Results are compared only if the same was asked of all: the same rows, options and decoding. Needs
no framework.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from suture.errors import MismatchError, Problems, RecipeError
from suture.evals.base import Metric
from suture.evals.results import SuiteResult, read_result
from suture.verbs.compare.recipe import Rule, read_gate, read_rule
from suture.verbs.compare.rules import Judge, Verdict, combined, part_of


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
    utility: bool = False
    """Whether the evaluation counts for ``utility.min_retention``."""


@dataclass(frozen=True)
class Comparison:
    """Base, experts and edits of one suite."""

    suite: str
    roles: Mapping[str, str]
    """``base``, ``expert`` or ``edit``, by model, in the order of the table."""
    lines: tuple[Line, ...]
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    kept: Mapping[str, Metric] = field(default_factory=dict)
    """``utility.min_retention`` of every model that has one, base and experts too."""

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
            "kept": {n: m.plain() for n, m in self.kept.items()},
            "lines": [
                {"evaluation": line.evaluation, "metric": line.metric, "better": line.better,
                 "utility": line.utility,
                 "values": {n: m.plain() for n, m in line.values.items()},
                 "differences": {n: m.plain() for n, m in line.differences.items()}}
                for line in self.lines
            ],
            "verdicts": [verdict.plain() for verdict in self.verdicts],
            "notes": list(self.notes),
        }  # fmt: skip


class Files(NamedTuple):
    """Results that were read from files, by their part in a comparison."""

    base: SuiteResult
    experts: list[SuiteResult]
    edits: list[SuiteResult]
    names: dict[int, str]
    """What to call each, by ``id``."""
    place: Path
    """The folder of the last edit's file."""


def compare_files(
    results: Sequence[Path], edits: Sequence[Path] = (), gate: Path | None = None
) -> Comparison:
    """Compare files that ``suture eval`` wrote: base, experts and an edit, in this order.

    Raises:
        SutureError: a file or rule is at fault, or not the same was asked; all problems at once.
    """
    found = read_files(results, edits)
    return compare(found.base, found.experts, found.edits, gate, names=found.names)


def read_files(results: Sequence[Path], edits: Sequence[Path] = ()) -> Files:
    """Files that ``suture eval`` wrote: base, experts and an edit, in this order.

    Raises:
        SutureError: files are at fault; all problems at once.
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
    return Files(
        found[first], [found[p] for p in experts], [found[p] for p in last],
        {id(found[p]): name for p, name in names.items()}, last[-1].parent,
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
        judge = Judge(table, roles)
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
    return Comparison(base.suite, roles, tuple(_lines(table, own)), tuple(verdicts), tuple(notes),
                      _kept(judge, table))  # fmt: skip


def _kept(judge: Judge, table: Mapping[str, SuiteResult]) -> dict[str, Metric]:
    """What every model keeps of its weakest utility, where evaluations are marked as such."""
    if not any(e.utility for r in table.values() for e in r.evaluations.values()):
        return {}
    rule = read_rule("utility.min_retention >= 0")
    found = {name: judge.retention(rule, name)[0] for name in table}
    return {name: metric for name, metric in found.items() if math.isfinite(metric.value)}


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
                told, theirs = ("unset" if v is None else repr(v) for v in (a, b))
                what = f"{place} is {told} for {own} and {theirs} for {name}"
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
            utility = any(e.utility for e in held.values())
            found.append(Line(name, metric, better, values, differences, utility))
    return found


__all__ = ["Comparison", "Files", "Line", "Verdict", "compare", "compare_files", "read_files"]
