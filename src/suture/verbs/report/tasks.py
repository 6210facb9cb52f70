"""Results of tasks alone: models of a comparison without a gate, and what they keep of experts.

Beside the scores two ratios are shown, both 1 for the best expert of a task:

- *share of the expert*: ``m / expert``
- *retention*: ``(m - base) / (expert - base)``, how much of what fine-tuning gained is kept; none
  where no gain is clear, that is where the expert's interval reaches down to the base
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from suture.verbs.report import charts
from suture.verbs.report.blocks import Builder, Cell, Chart, Figure, Section, Table, percent

Raw = Mapping[str, Any]
Ratios = Mapping[tuple[str, str], float | None]
"""By model and task."""


def only_tasks(raw: Raw) -> bool:
    """Return whether a comparison holds no rule, and nothing but tasks where more is better."""
    lines = [line for line in raw["lines"] if isinstance(line, Mapping)]
    tasks = all(line.get("utility") and line.get("better") == "higher" for line in lines)
    return bool(lines) and tasks and not raw.get("verdicts")


def results(where: str, raw: Raw, builder: Builder) -> Iterator[Section]:
    """Yield the section of scores, shares of the experts and retention of their gains."""
    stem = where.rpartition("/")[2].removesuffix(".json")
    figures = builder.attempt("the scores", partial(_scores, raw))
    figures += builder.attempt("the ratios", partial(_ratios, raw))
    yield Section(
        "results",
        f"Results: {stem}",
        f"From {where}: suite {raw['suite']}. Scores on held-out rows, with 95 % intervals.",
        tuple(figures),
    )


def glance(raw: Raw) -> Iterator[str]:
    """Yield which edit keeps most of the experts, as a sentence."""
    found = shares(raw)
    names, tasks = list(raw["models"]), [line["evaluation"] for line in _lines(raw)]
    means = {name: _summary(found, name, tasks) for name in names}
    edits = [n for n, role in raw["models"].items() if role == "edit" and means[n][1] is not None]
    if edits:
        best = max(edits, key=lambda name: means[name][1] or 0.0)
        least, mean = means[best]
        base = next(n for n, role in raw["models"].items() if role == "base")
        start = means[base][1]
        before = "" if start is None else f"; the base alone has {percent(start)}"
        yield (
            f"Of {len(edits)} edits, {best} keeps most of the experts: {percent(mean or 0.0)} of "
            f"their scores on average, {percent(least or 0.0)} in its weakest task{before}."
        )


def shares(raw: Raw) -> dict[tuple[str, str], float | None]:
    """Return every model's score over that of the best expert, by model and task."""
    found: dict[tuple[str, str], float | None] = {}
    for line in _lines(raw):
        _, best = _ends(raw, line)
        for name, value in line["values"].items():
            whole = float(best["value"]) if best else 0.0
            found[name, line["evaluation"]] = float(value["value"]) / whole if whole else None
    return found


def retentions(raw: Raw) -> dict[tuple[str, str], float | None]:
    """Return what every edit keeps of the best expert's gain over the base, by model and task."""
    found: dict[tuple[str, str], float | None] = {}
    for line in _lines(raw):
        base, best = _ends(raw, line)
        start = float(base["value"])
        for name, value in line["values"].items():
            if raw["models"][name] != "edit":
                continue
            clear = best is not None and float(best["low"]) > start
            gain = float(best["value"]) - start if best else 0.0
            kept = (float(value["value"]) - start) / gain if clear else None
            found[name, line["evaluation"]] = kept
    return found


def _lines(raw: Raw) -> list[Raw]:
    """Return the metric of every task that models are compared by, where it has numbers."""
    first: dict[str, Raw] = {}
    for line in raw["lines"]:
        first.setdefault(str(line["evaluation"]), line)
    return [line for line in first.values()
            if all(v["value"] is not None for v in line["values"].values())]  # fmt: skip


def _ends(raw: Raw, line: Raw) -> tuple[Raw, Raw | None]:
    """Return the metric of the base, and that of the best expert if there is one."""
    values, roles = line["values"], raw["models"]
    base = next(v for name, v in values.items() if roles[name] == "base")
    experts = [v for name, v in values.items() if roles[name] == "expert"]
    return base, max(experts, key=lambda v: float(v["value"]), default=None)


def _scores(raw: Raw) -> Iterator[Figure]:
    roles, drawn, table = raw["models"], list[Chart](), list[tuple[Cell, ...]]()
    for line in _lines(raw):
        name = f"{line['evaluation']}: {line['metric']}"
        rows = [
            {"name": m, "kind": roles[m], "value": v["value"], "low": v["low"], "high": v["high"],
             "n": v["n"]}
            for m, v in line["values"].items()
        ]  # fmt: skip
        told = f"{name}: " + ", ".join(f"{r['name']} {float(r['value']):.2f}" for r in rows)
        spec = charts.intervals(rows, names=list(roles), value=line["metric"], alt_text=told,
                                kinds=("base", "expert", "edit"))  # fmt: skip
        drawn.append(Chart(name, spec, told))
        table += [(str(line["evaluation"]), str(r["name"]), str(r["kind"]), r["value"], r["low"],
                   r["high"], r["n"]) for r in rows]  # fmt: skip
    yield Figure(
        "Scores with intervals",
        "One panel a task, one row a model: the dot is the score on held-out rows, the line its "
        "95 % interval. Where lines overlap widely, the models cannot be told apart.",
        tuple(drawn),
        Table("Scores", ("task", "model", "role", "score", "from", "to", "rows"), tuple(table)),
    )


def _ratios(raw: Raw) -> Iterator[Figure]:
    for word, found, title, explains in (
        ("share", shares(raw), "Share of the expert",
         "A score over that of the task's best expert: 1 means as good as the expert."),
        ("retention", retentions(raw), "Retention of the gain",
         "How much of what fine-tuning gained over the base is kept: 0 is the base, 1 the best "
         "expert. Fields are empty where the gain is not clear."),
    ):  # fmt: skip
        yield from _heat(raw, word, found, title, explains)


def _heat(raw: Raw, word: str, found: Ratios, title: str, explains: str) -> Iterator[Figure]:
    tasks = [str(line["evaluation"]) for line in _lines(raw)]
    names = [n for n in raw["models"] if any((n, task) in found for task in tasks)]
    rows = [{"x": task, "y": name, "value": value} for name in names for task in tasks
            if (value := found.get((name, task))) is not None]  # fmt: skip
    if not rows:
        return
    told = f"{title} by model and task."
    spec = charts.heat(rows, x="task", y="model", xs=tasks, ys=names, value=word, fmt=".2f",
                       written=True, alt_text=told)  # fmt: skip
    cells = tuple(
        (name, *(found.get((name, task)) for task in tasks), *_summary(found, name, tasks))
        for name in names
    )
    yield Figure(title, explains, (Chart("", spec, told),),
                 Table(title, ("model", *tasks, "minimum", "mean"), cells))  # fmt: skip


def _summary(found: Ratios, name: str, tasks: Sequence[str]) -> tuple[float | None, float | None]:
    """Return minimum and mean over the tasks that have a number."""
    values = [v for task in tasks if (v := found.get((name, task))) is not None]
    return (min(values), sum(values) / len(values)) if values else (None, None)


__all__ = ["glance", "only_tasks", "results", "retentions", "shares"]
