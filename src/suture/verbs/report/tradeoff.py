"""What is kept against what is safe: points with intervals, and which of them nothing beats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from suture.tensors.spec import listed
from suture.verbs.report import charts
from suture.verbs.report.blocks import Chart, Figure, Table, listed_words

Ends = tuple[float | None, float | None]
NARROW, WIDE, HEIGHT = 360, 560, 280
"""Of a panel that stands beside another, or alone, in pixels, about."""
CHARACTER, LINE = 6, 13
"""Of a label, in pixels."""


@dataclass(frozen=True)
class Mark:
    """One model: two numbers, each with the ends of its interval where they are known."""

    name: str
    kind: str
    x: float
    y: float
    x_ends: Ends = (None, None)
    y_ends: Ends = (None, None)
    judged: bool = True
    """Whether it is a candidate; base and experts are there to compare with."""


def ends_of(raw: Mapping[str, Any]) -> Ends:
    """The ends of an interval in a file; ``None`` where it has none."""
    low, high = raw.get("low"), raw.get("high")
    return (None if low is None else float(low), None if high is None else float(high))


def unbeaten(points: Sequence[Mark], better: tuple[str, str] = ("higher", "higher")) -> list[str]:
    """Candidates that no other one equals or beats in both numbers, except by being the same."""
    signs = [1.0 if word == "higher" else -1.0 for word in better]

    def at(point: Mark) -> tuple[float, float]:
        return signs[0] * point.x, signs[1] * point.y

    chosen = [p for p in points if p.judged]
    return [
        p.name for p in chosen
        if not any(at(o) != at(p) and at(o)[0] >= at(p)[0] and at(o)[1] >= at(p)[1]
                   for o in chosen)
    ]  # fmt: skip


def pareto(
    panels: Mapping[str, Sequence[Mark]],
    *,
    x: str,
    title: str,
    explains: str,
    better: Mapping[str, tuple[str, str]] | None = None,
) -> Figure:
    """A figure of one panel for each thing that is held against ``x``.

    Args:
        panels: the points, by what their ``y`` is.
        x: what their ``x`` is.
        title: the heading.
        explains: how to read it, in a sentence.
        better: ``higher`` or ``lower`` for both numbers of a panel; higher where nothing is said.
    """
    drawn, rows, told = [], [], []
    kinds = list(dict.fromkeys(p.kind for points in panels.values() for p in points))
    for y, points in panels.items():
        way = (better or {}).get(y, ("higher", "higher"))
        best = unbeaten(points, way)
        alt_text = f"{y} against {x}. "
        if len(best) == 1 and sum(p.judged for p in points) > 1:
            alt_text += f"{best[0]} equals or beats all others in both."
        elif len(best) > 1:
            alt_text += f"Nothing beats {listed_words(best)} in both at once."
        told.append(alt_text)
        width = NARROW if len(panels) > 1 else WIDE
        spec = charts.pareto(_rows(points, best, width, way), x=x, y=y, kinds=kinds,
                             alt_text=alt_text, better=way)  # fmt: skip
        drawn.append(Chart(y if len(panels) > 1 else "", spec, alt_text))
        rows += [(y, p.name, p.kind, p.x, *p.x_ends, p.y, *p.y_ends,
                  "yes" if p.name in best else "" if p.judged else "not judged")
                 for p in points]  # fmt: skip
    head = ("measure", "model", "kind", x, "from", "to", "value", "from", "to", "unbeaten")
    return Figure(title, explains, tuple(drawn), Table(title, head, tuple(rows)), " ".join(told),
                  wide=len(panels) == 1)  # fmt: skip


def _rows(
    points: Sequence[Mark], best: Sequence[str], width: int, better: tuple[str, str]
) -> list[dict[str, Any]]:
    """The points as rows of a chart; ``left`` and ``right`` are labels that begin or end there."""
    labels = _labels(points, best, width, better)
    return [
        {
            "name": point.name, "kind": point.kind, "x": point.x, "x_low": point.x_ends[0],
            "x_high": point.x_ends[1], "y": point.y, "y_low": point.y_ends[0],
            "y_high": point.y_ends[1], "left": "", "right": "", **labels.get(point.name, {}),
        }
        for point in points
    ]  # fmt: skip


def _labels(
    points: Sequence[Mark], best: Sequence[str], width: int, better: tuple[str, str]
) -> dict[str, dict[str, str]]:
    """By point a side and what stands there; no label lies over another.

    Points at one place share a label. Those that nothing beats are named first, then what there is
    only to compare with, then as many of the others as find room on one of their sides.
    """
    places: dict[tuple[float, float], list[Mark]] = {}
    for point in points:
        places.setdefault((round(point.x, 2), round(point.y, 2)), []).append(point)

    def rank(there: Sequence[Mark]) -> int:
        if any(p.name in best for p in there):
            return 0
        return 1 if any(not p.judged for p in there) else 2

    across = _pixels([v for p in points for v in (p.x, *p.x_ends)], width, better[0] == "lower")
    up = _pixels([v for p in points for v in (p.y, *p.y_ends)], HEIGHT, better[1] == "lower")
    marks = {n: (across(one.x), up(one.y)) for n, (one, *_) in enumerate(places.values())}
    taken: list[tuple[float, float, float]] = []
    found: dict[str, dict[str, str]] = {}
    for number, there in sorted(enumerate(places.values()), key=lambda pair: rank(pair[1])):
        text, one = listed([p.name for p in there], 3), there[0]
        at, line = marks[number]
        line, long = line + LINE / 2, CHARACTER * len(text)
        sides = {"left": (at, at + long), "right": (at - long, at)}
        order = ("left", "right") if at <= width / 2 else ("right", "left")
        for side in order:
            begin, end = sides[side]
            free = begin >= 0 and end <= width and all(
                end <= low or begin >= high or abs(line - other) >= LINE
                for low, high, other in taken
            ) and all(
                end <= x or begin >= x or abs(line - y) >= LINE
                for other, (x, y) in marks.items() if other != number
            )  # fmt: skip
            if free:
                taken.append((begin, end, line))
                found[one.name] = {side: text}
                break
    return found


def _pixels(values: Sequence[float | None], size: int, back: bool) -> Callable[[float], float]:
    """About where a number will be drawn; from the other end where the axis runs ``back``."""
    known = [v for v in values if v is not None]
    low, high = (max(known), min(known)) if back else (min(known), max(known))
    return lambda value: size * (value - low) / ((high - low) or 1.0)


# -- benchmarks ------------------------------------------------------------------------------------


SHAPES: tuple[tuple[str, str, Mapping[str, tuple[str, str]]], ...] = (
    ("utility kept", "utility kept",
     {"refused": ("higher", "higher"), "over-refused": ("higher", "lower")}),
    ("utility", "utility that is left", {"safety": ("higher", "higher")}),
)  # fmt: skip
"""Of tables of benchmarks: the column of utility, what it is, and what is held against it."""


def of_benchmark(raw: Mapping[str, Any]) -> Figure:
    """Safety against utility out of a file of ``benchmarks/``: of LED, or of realignment.

    Rows in which a number is missing are left out; kinds are the first words of names in a table of
    realignment, which say what was realigned together.

    Raises:
        LookupError: the file has no such table.
    """
    rows: Mapping[str, Any] = raw["table"]
    for column, x, better in SHAPES:
        panels: dict[str, list[Mark]] = {}
        for name, row in rows.items():
            kind = str(name).partition(" ")[0] if column == "utility" else "merge"
            for y in better:
                if isinstance(row.get(column), Mapping) and isinstance(row.get(y), Mapping):
                    panels.setdefault(y, []).append(_mark(str(name), kind, row[column], row[y]))
        if panels:
            return pareto(
                panels, x=x, title="Safety against utility", better=better,
                explains="Each mark is a model: to the right it keeps more of what it is for. What "
                "runs up is named over each panel; lines are intervals, or ranges over seeds.",
            )  # fmt: skip
    raise LookupError("no row has both safety and utility")


def _mark(name: str, kind: str, x: Mapping[str, Any], y: Mapping[str, Any]) -> Mark:
    return Mark(name, kind, float(x["value"]), float(y["value"]), ends_of(x), ends_of(y))


__all__ = ["Mark", "ends_of", "of_benchmark", "pareto", "unbeaten"]
