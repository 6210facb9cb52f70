"""A comparison, its gate and the search for who broke it, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from suture.runs.tables import aligned, interval, number
from suture.verbs.compare.recipe import read_rule
from suture.verbs.compare.rules import Verdict
from suture.verbs.compare.run import Comparison, Line

if TYPE_CHECKING:  # it needs the whole way from recipe to network, comparing does not
    from suture.verbs.compare.blame import Blame


def comparison_table(found: Comparison) -> Iterator[str]:
    """Models side by side, differences to the base, and what became of the rules."""
    yield f"suite {found.suite}, 95 % intervals"
    heads = [f"{name} ({role})" for name, role in found.roles.items()]
    yield from aligned(["", "n", *heads], [_row(line, found) for line in found.lines])
    others = [name for name, role in found.roles.items() if role != "base"]
    yield ""
    yield "less the base, on the same rows (paired bootstrap)"
    yield from aligned(
        ["", *others],
        [[f"{line.evaluation}.{line.metric}",
          *(interval(line.differences.get(name), "+") for name in others)]
         for line in found.lines],
    )  # fmt: skip
    for note in found.notes:
        yield f"note: {note}"
    if found.verdicts:
        yield ""
        yield from _gate(found.verdicts)


def _row(line: Line, found: Comparison) -> list[str]:
    arrow = {"higher": "", "lower": " (less is better)"}[line.better]
    n = max((m.n for m in line.values.values()), default=0)
    cells = [interval(line.values.get(name)) for name in found.roles]
    return [f"{line.evaluation}.{line.metric}{arrow}", str(n), *cells]


def _gate(verdicts: Sequence[Verdict]) -> Iterator[str]:
    broken = [v for v in verdicts if not v.held]
    if broken:
        yield f"gate: BROKEN, {len(broken)} of {len(verdicts)} rules"
    else:
        yield f"gate: held, {len(verdicts)} rules"
    rows = []
    for v in sorted(verdicts, key=lambda v: v.held):
        apart = read_rule(v.rule).factors  # to other models
        told = f"difference {interval(v.margin, '+')}" if apart else interval(v.margin)
        told = v.reason or f"{told}, n = {v.margin.n}"
        told += ": the value keeps it, too few rows to be sure" if _unsure(v) else ""
        rows.append([
            "held" if v.held else "BROKEN", v.edit, v.rule, number(v.value), number(v.limit), told
        ])  # fmt: skip
    yield from aligned(["", "edit", "rule", "value", "limit", "judged on"], rows)


def _unsure(found: Verdict) -> bool:
    """Whether a rule is broken by its interval alone."""
    above = found.value - found.limit
    return not found.held and not found.reason and (above < 0 if "<" in found.rule else above > 0)


def blame_table(found: Blame) -> Iterator[str]:
    """The rules of an edit and of the merges without one expert each, and who is to blame."""
    tried = [one for one in found.without if one.verdicts]
    if tried:
        yield f"{found.edit} without one expert, merged in memory"
        rows = [
            [verdicts[0].rule, *(f"{'held' if v.held else 'BROKEN'} {number(v.value)}"
                                 for v in verdicts)]
            for verdicts in zip(*(one.verdicts for one in tried), strict=True)
        ]  # fmt: skip
        yield from aligned(["", *(f"without {one.expert}" for one in tried)], rows)
    for one in found.without:
        if one.reason:
            yield f"note: without {one.expert}: there is no such merge: {one.reason}"
    for note in found.notes:
        yield f"note: {note}"
    yield found.told
