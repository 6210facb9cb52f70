"""What a page is made of: sections, figures with a sentence and a table, words for numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """Rows under a head; numbers are shown short and sorted whole."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, and nothing else but empty cells."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and not any(isinstance(cell, str) for cell in cells)


@dataclass(frozen=True)
class Chart:
    """One drawing of a figure."""

    label: str
    """Its own heading, where a figure has several."""
    spec: dict[str, Any]
    """Vega-Lite."""
    alt: str
    """What a reader who cannot see it should know."""


@dataclass(frozen=True)
class Figure:
    """Drawings of the same kind, one sentence that explains them, and the numbers as a table."""

    title: str
    explains: str
    """One sentence: what is drawn, and how to read it."""
    charts: tuple[Chart, ...]
    table: Table
    reading: str = ""
    """What these numbers say, in one sentence."""
    wide: bool = False
    """Whether each drawing takes the whole width."""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    lead: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    listings: tuple[tuple[str, str], ...] = ()
    """Headings with text to be shown as it is."""
    points: tuple[str, ...] = ()
    """Sentences of a list."""
    steps: tuple[tuple[str, str], ...] = ()
    """Sentences of a list, each with a command to type; with nothing where there is none."""


@dataclass
class Builder:
    """Collects the figures of one file, and notes those whose numbers are not there."""

    where: str
    notes: list[str] = field(default_factory=list)

    def attempt(self, what: str, make: Callable[[], Iterable[T]]) -> list[T]:
        """What ``make`` gives, up to the first thing that the file does not hold as it should."""
        found: list[T] = []
        try:
            for part in make():
                found.append(part)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__} {error}" if str(error) else type(error).__name__
            self.notes.append(f"{self.where}: {what} cannot be shown: {reason[:200]}")
        return found


def number(value: Cell) -> str:
    """A number as people read it: four digits that count, thin groups of thousands."""
    if value is None:
        return "\u2013"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def percent(value: float, digits: int | None = None) -> str:
    """A share as people read it: ``12 %``, small ones with a decimal place."""
    if digits is None:
        digits = 0 if abs(value) >= 0.095 or value == 0 else 1
    return f"{100 * value:.{digits}f}\u202f%"


def listed_words(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


OUTSIDE = "out"
"""The label of what stands in no layer."""
_NUMBERED = re.compile(r"^(.*?)\.?(\d+)$")


def layer_labels(keys: Iterable[str]) -> dict[str, str]:
    """Short names for layers: ``3`` for ``model.layers.3``; ``out`` for what is in no layer.

    Where a model numbers two stacks alike, as an encoder and a decoder, their names stay.
    """
    found = list(dict.fromkeys(keys))
    stacks = {m[1] for key in found if (m := _NUMBERED.match(key))}
    labels = {}
    for key in found:
        match = _NUMBERED.match(key)
        if match is None:
            labels[key] = OUTSIDE
        elif len(stacks) == 1:
            labels[key] = match[2]
        else:
            others = [s.split(".") for s in stacks if s != match[1]]
            parts = match[1].split(".")
            own = next(
                (p for i, p in enumerate(parts) if any(i >= len(o) or o[i] != p for o in others)),
                parts[-1],
            )
            labels[key] = f"{own} {match[2]}"
    return labels


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels of layers, each once, by stack and number; what stands in no layer comes last."""

    def place(label: str) -> tuple[bool, str, int]:
        stack, _, digits = label.rpartition(" ")
        return label == OUTSIDE, stack, int(digits) if digits.isdecimal() else -1

    return sorted(dict.fromkeys(labels), key=place)


def layer_words(labels: Sequence[str]) -> str:
    """``layers 3 to 5 and weights outside of layers``, in order of number."""
    numbers = [label for label in in_order(labels) if label != OUTSIDE]
    word = "layer" if len(numbers) == 1 else "layers"
    ranges: list[list[str]] = []
    for label in numbers:
        if (
            ranges
            and label.isdecimal()
            and ranges[-1][-1].isdecimal()
            and (int(label) == int(ranges[-1][-1]) + 1)
        ):
            ranges[-1].append(label)
        else:
            ranges.append([label])
    told = [t for r in ranges for t in ([f"{r[0]} to {r[-1]}"] if len(r) > 2 else r)]
    text = f"{word} {listed_words(told)}" if numbers else ""
    if OUTSIDE in labels:
        text += (" and " if text else "") + "weights outside of layers"
    return text
