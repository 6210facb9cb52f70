"""The section about fine-tuned models: loss and metric before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from suture.verbs.report.blocks import Builder, Cell, Section, Table, listed_words, number, percent

Raw = Mapping[str, Any]


def tunings(found: Sequence[tuple[str, Raw]], builders: Sequence[Builder]) -> Iterator[Section]:
    """One table of all fine-tunings; none where there are none.

    Args:
        found: records of ``suture finetune``, by where they lie.
        builders: takes the notes of each.
    """
    rows: list[tuple[Cell, ...]] = []
    gains: list[tuple[str, bool]] = []
    for (where, raw), builder in zip(found, builders, strict=True):
        name = where.rpartition("/")[0] or where
        rows += builder.attempt("it", partial(_row, name, raw))
        gains += builder.attempt("its gain", partial(_gain, name, raw))
    head = ("model", "strategy", "steps", "loss, first", "loss, last", "metric", "before", "after",
            "rows", "entries trained", "share")  # fmt: skip
    if rows:
        yield Section(
            "tunings",
            "Fine-tuning",
            "Metrics are on the validation rows of each training, with 95 % intervals; losses are "
            "those of the first and of the last steps.",
            tables=(Table("Fine-tuned models", head, tuple(rows)),),
            points=tuple(_told(gains)),
        )


def _row(name: str, raw: Raw) -> Iterator[tuple[Cell, ...]]:
    results = raw["results"]
    before, after = results.get("base_metric"), results.get("metric")
    strategy = raw["recipe"].get("strategy")
    yield (
        name, str(strategy.get("name", strategy) if isinstance(strategy, Mapping) else strategy),
        int(results["steps"]), float(results["loss"]["first"]), float(results["loss"]["last"]),
        str(after["name"]) if after else None, _interval(before), _interval(after),
        int(after["n"]) if after else None, int(results["trained"]), percent(results["share"], 2),
    )  # fmt: skip


def _interval(metric: Raw | None) -> Cell:
    """A value with the ends of its interval."""
    if not metric:
        return None
    value, low, high = (float(metric[k]) for k in ("value", "low", "high"))
    return f"{number(value)} [{number(low)}, {number(high)}]"


def _gain(name: str, raw: Raw) -> Iterator[tuple[str, bool]]:
    """Whether the metric on validation rows got better, where there is one."""
    before, after = raw["results"].get("base_metric"), raw["results"].get("metric")
    if before and after:
        sign = -1.0 if after["name"] in LESS else 1.0
        yield name, sign * float(after["value"]) > sign * float(before["value"])


LESS = frozenset({"loss", "perplexity"})
"""Metrics of which less is better."""


def _told(gains: Sequence[tuple[str, bool]]) -> Iterator[str]:
    flat = [name for name, gained in gains if not gained]
    if flat:
        yield f"No better than before training, on its validation rows: {listed_words(flat)}."


__all__ = ["tunings"]
