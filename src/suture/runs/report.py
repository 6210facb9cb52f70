"""What came out of merging several experts, as a frozen value; renders itself, measures nothing.

Besides the metrics themselves the report shows two ratios, both 1 for the expert:

- *share of the expert*: ``m / expert``
- *retention*: ``(m - base) / (expert - base)``, how much of what fine-tuning gained is kept; there
  is none where no gain is clear, that is where the expert's interval reaches down to the base
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from suture.errors import RecipeError
from suture.evals.base import Metric

Kind = Literal["base", "expert", "merge"]


@dataclass(frozen=True)
class ReportTask:
    """One column of the table."""

    name: str
    """Its heading."""
    metric: str
    """What is measured."""
    expert: str
    """The entry that was fine-tuned for it."""
    about: str = ""
    """One sentence for the reader: source, labels, how the rows were divided."""


@dataclass(frozen=True)
class Entry:
    """One row of the table: a model and its metrics."""

    name: str
    kind: Kind
    metrics: Mapping[str, Metric]
    """By name of the task."""
    about: str = ""
    """Method and parameters, or where it comes from."""
    seconds: float = 0.0
    """What making it took."""


@dataclass(frozen=True)
class Report:
    """Base, experts and merges on the same tasks."""

    title: str
    tasks: tuple[ReportTask, ...]
    entries: tuple[Entry, ...]
    """The base first."""
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages it was made with."""

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RecipeError(f"the report has two entries named {', '.join(twice)}")
        if [entry.kind for entry in self.entries].count("base") != 1:
            raise RecipeError("a report has exactly one base")
        for task in self.tasks:
            if task.expert not in names:
                raise RecipeError(f"{task.name}: its expert {task.expert!r} has no entry")
            for entry in self.entries:
                if task.name not in entry.metrics:
                    raise RecipeError(f"{entry.name} was not measured on {task.name}")

    @property
    def base(self) -> Entry:
        """The model that everything started from."""
        return next(entry for entry in self.entries if entry.kind == "base")

    def entry(self, name: str) -> Entry:
        """The entry of this name."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        known = ", ".join(entry.name for entry in self.entries)
        raise RecipeError(f"no entry {name!r}; there are {known}")

    def share(self, entry: Entry, task: ReportTask) -> float | None:
        """``m / expert``; ``None`` where the expert has 0."""
        best = self.entry(task.expert).metrics[task.name].value
        return entry.metrics[task.name].value / best if best else None

    def retention(self, entry: Entry, task: ReportTask) -> float | None:
        """``(m - base) / (expert - base)``; ``None`` where the expert has no clear gain."""
        start = self.base.metrics[task.name].value
        best = self.entry(task.expert).metrics[task.name]
        if best.low <= start:
            return None
        return (entry.metrics[task.name].value - start) / (best.value - start)

    def summary(self, entry: Entry, ratio: str) -> tuple[float | None, float | None]:
        """Minimum and mean over tasks of ``share`` or ``retention``, where there is one."""
        of = {"share": self.share, "retention": self.retention}[ratio]
        found = [value for task in self.tasks if (value := of(entry, task)) is not None]
        return (min(found), sum(found) / len(found)) if found else (None, None)

    def to_json(self) -> str:
        """One JSON object; ``derived`` repeats the ratios for readers and is not read back."""
        derived = {
            entry.name: {
                ratio: {
                    "tasks": {task.name: of(entry, task) for task in self.tasks},
                    "min": self.summary(entry, ratio)[0],
                    "mean": self.summary(entry, ratio)[1],
                }
                for ratio, of in (("share", self.share), ("retention", self.retention))
            }
            for entry in self.entries
        }
        return json.dumps({**asdict(self), "derived": derived}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that ``to_json`` wrote.

        Raises:
            RecipeError: the text is no such object, or what it says does not fit together.
        """
        try:
            raw = json.loads(text)
            raw.pop("derived", None)
            tasks = tuple(ReportTask(**task) for task in raw.pop("tasks"))
            entries = tuple(_entry(entry) for entry in raw.pop("entries"))
            return cls(tasks=tasks, entries=entries, notes=tuple(raw.pop("notes")), **raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"not a report: {error}") from error

    def to_markdown(self) -> str:
        """The report as a page: the metrics, the two ratios, what the tasks are, the notes."""
        heads = [f"{task.name} ({task.metric})" for task in self.tasks]
        parts = [f"# {self.title}", "", "## On the held-out test rows, with 95 % intervals", ""]
        parts += _table(
            ["", *heads],
            [
                [entry.name, *(_interval(entry.metrics[task.name]) for task in self.tasks)]
                for entry in self.entries
            ],
        )
        for ratio, title in (
            ("share", "Share of the expert: m / expert"),
            ("retention", "Retention of the gain: (m - base) / (expert - base)"),
        ):
            parts += ["", f"## {title}", ""]
            if ratio == "retention":
                parts += ["No number where the expert's interval reaches down to the base.", ""]
            parts += _table(
                ["", *(task.name for task in self.tasks), "minimum", "mean"],
                [self._ratios(entry, ratio) for entry in self.entries],
            )
        parts += ["", "## The models", ""]
        parts += _table(
            ["", "kind", "how", "seconds"],
            [[e.name, e.kind, e.about, f"{e.seconds:.1f}"] for e in self.entries],
        )
        parts += ["", "## The tasks", ""]
        parts += [f"- **{t.name}** (expert: {t.expert}): {t.about}" for t in self.tasks]
        if self.notes:
            parts += ["", "## Notes", "", *(f"- {note}" for note in self.notes)]
        if self.versions:
            made = ", ".join(f"{name} {version}" for name, version in self.versions.items())
            parts += ["", f"Made with {made}."]
        return "\n".join(parts) + "\n"

    def _ratios(self, entry: Entry, ratio: str) -> list[str]:
        of = self.share if ratio == "share" else self.retention
        values = [of(entry, task) for task in self.tasks]
        return [entry.name, *map(_number, [*values, *self.summary(entry, ratio)])]


def _entry(raw: dict[str, Any]) -> Entry:
    metrics = {name: Metric.read(metric) for name, metric in raw.pop("metrics").items()}
    if raw["kind"] not in get_args(Kind):
        raise ValueError(f"an entry is one of {', '.join(get_args(Kind))}, not {raw['kind']!r}")
    return Entry(metrics=metrics, **raw)


def _interval(metric: Metric) -> str:
    return f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + " --- |" * len(head), *map(line, rows)]
