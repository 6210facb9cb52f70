"""What one model has got in one suite: a file with numbers by row, never with texts.

The numbers by row are what intervals of differences are made of. A result states what was asked so
exactly that two results are compared only if the same was asked of both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from suture.errors import RecipeError
from suture.evals.base import Metric
from suture.evals.numbers import STATISTICS, Array, as_array, metric_of

KIND, SCHEMA = "evaluation", 1
LIMIT = 256 << 20
"""Bytes that a file of results may have."""


@dataclass(frozen=True)
class Scores:
    """One number for every row that was asked."""

    name: str
    statistic: str
    """Of ``numbers.STATISTICS``."""
    better: str
    """``higher`` or ``lower``."""
    rows: tuple[int, ...]
    """Numbers of the rows, ascending."""
    values: Array
    weights: Array
    """1 each where nothing is weighed."""

    def metric(self, rows: Sequence[int] | None = None, name: str = "") -> Metric:
        """The metric of all rows, or of some."""
        kept = slice(None) if rows is None else np.searchsorted(self.rows, rows)
        return metric_of(name or self.name, self.statistic, self.values[kept], self.weights[kept])

    def plain(self) -> dict[str, Any]:
        """The scores as data that JSON can hold."""
        values = [v if math.isfinite(v) else None for v in self.values.tolist()]
        weighed = bool((self.weights != 1).any())
        return {
            "name": self.name, "statistic": self.statistic, "better": self.better,
            "rows": list(self.rows), "values": values,
            "weights": self.weights.tolist() if weighed else None,
        }  # fmt: skip

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Scores:
        """What ``plain`` wrote; ``ValueError`` and the like where it did not."""
        values = as_array(raw["values"])
        weights = raw.get("weights")
        weighed = as_array([1.0] * len(values) if weights is None else weights)
        rows = tuple(int(row) for row in raw["rows"])
        if raw["statistic"] not in STATISTICS or raw["better"] not in ("higher", "lower"):
            raise ValueError(f"{raw['name']}: is a number of an unknown kind")
        if not len(rows) == len(values) == len(weighed) or list(rows) != sorted(set(rows)):
            raise ValueError(f"{raw['name']}: rows, values and weights do not fit together")
        return cls(str(raw["name"]), raw["statistic"], raw["better"], rows, values, weighed)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one model."""

    name: str
    kind: str
    asked: Mapping[str, Any]
    """Options, decoding and the fingerprint of the rows: what two results must share."""
    key: str
    """A hash of what was asked and of whom; the same key, the same numbers."""
    utility: bool
    """Whether it counts for ``utility.min_retention``."""
    scores: tuple[Scores, ...]
    """The first is the one to compare by."""
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Numbers of the rows of each category and language."""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    known: tuple[Metric, ...] = field(default=(), repr=False)
    """The metrics, where they were read from a file."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Every score over all rows, then for each category and language: ``name.category``."""
        if self.known:
            return self.known
        found = [score.metric() for score in self.scores]
        for group, rows in self.groups.items():
            for score in self.scores:
                kept = sorted(set(rows) & set(score.rows))
                found.append(score.metric(kept, f"{score.name}.{group}"))
        return tuple(found)

    def score(self, name: str) -> Scores:
        """The scores of this name; there are some."""
        return next(score for score in self.scores if score.name == name)

    def plain(self) -> dict[str, Any]:
        """The evaluation as data that JSON can hold."""
        return {
            "kind": self.kind, "utility": self.utility,
            "metrics": [metric.plain() for metric in self.metrics],
            "seconds": self.seconds, "notes": list(self.notes), "key": self.key,
            "asked": dict(self.asked), "groups": {k: list(v) for k, v in self.groups.items()},
            "scores": [score.plain() for score in self.scores],
        }  # fmt: skip

    @classmethod
    def read(cls, name: str, raw: Mapping[str, Any]) -> Evaluation:
        """What ``plain`` wrote; ``ValueError`` and the like where it did not."""
        scores = tuple(Scores.read(score) for score in raw["scores"])
        if not scores:
            raise ValueError(f"{name}: holds no scores")
        groups = {str(k): tuple(map(int, v)) for k, v in raw["groups"].items()}
        metrics = tuple(Metric.read(metric) for metric in raw["metrics"])
        found = cls(
            name, str(raw["kind"]), dict(raw["asked"]), str(raw["key"]), bool(raw["utility"]),
            scores, groups, float(raw["seconds"]), tuple(map(str, raw["notes"])), metrics,
        )  # fmt: skip
        named = [f"{s.name}{g and '.'}{g}" for g in ("", *groups) for s in scores]
        if [metric.name for metric in metrics] != named:
            raise ValueError(f"{name}: its metrics are not those of its scores")
        return found


@dataclass(frozen=True)
class SuiteResult:
    """Everything that one model has got in one suite."""

    model: str
    """Its name."""
    path: str
    fingerprint: str
    """Of the weights."""
    suite: str
    """Its name."""
    suite_hash: str
    """Of everything that is asked, rows included."""
    evaluations: Mapping[str, Evaluation]
    expected: tuple[str, ...]
    """The evaluations of the suite; of an interrupted run some are missing."""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every evaluation has run."""
        return set(self.expected) <= self.evaluations.keys()

    def with_(self, evaluation: Evaluation) -> SuiteResult:
        """The same with one evaluation more, in the order of the suite."""
        found = {**self.evaluations, evaluation.name: evaluation}
        ordered = {n: found[n] for n in self.expected if n in found}
        return replace(self, evaluations=ordered)

    def to_json(self) -> str:
        """One JSON object, keys in a fixed order."""
        found = {
            "kind": KIND, "schema": SCHEMA, "model": self.model, "path": self.path,
            "fingerprint": self.fingerprint, "suite": self.suite, "suite_hash": self.suite_hash,
            "complete": self.complete, "expected": list(self.expected),
            "versions": dict(self.versions),
            "evaluations": {n: e.plain() for n, e in self.evaluations.items()},
        }  # fmt: skip
        return json.dumps(found, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> SuiteResult:
        """The value that ``to_json`` wrote.

        Raises:
            RecipeError: the text is no such object.
        """
        try:
            raw = json.loads(text, parse_constant=_refuse)
            if raw["kind"] != KIND or raw["schema"] != SCHEMA:
                raise ValueError("it is of another kind, or of another version of Suture")
            found = {n: Evaluation.read(n, e) for n, e in raw["evaluations"].items()}
            words = (raw[k] for k in ("model", "path", "fingerprint", "suite", "suite_hash"))
            model, path, fingerprint, suite, suite_hash = map(str, words)
            return cls(model, path, fingerprint, suite, suite_hash, found,
                       tuple(map(str, raw["expected"])), dict(raw["versions"]))  # fmt: skip
        except RecipeError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            told = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
            raise RecipeError(f"not a result of `suture eval`: {told}") from error


def read_result(path: Path) -> SuiteResult:
    """A file that ``suture eval`` wrote.

    Raises:
        RecipeError: it cannot be read, or is none.
    """
    try:
        if path.stat().st_size > LIMIT:
            raise RecipeError(f"{path}: too large for a result of `suture eval`")
        return SuiteResult.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a result of `suture eval`: no text") from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number in JSON")
