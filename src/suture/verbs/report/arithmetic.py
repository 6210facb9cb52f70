"""The section about a benchmark of task arithmetic: what `suture bench` wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from suture.verbs.report import charts
from suture.verbs.report.blocks import (
    Builder,
    Cell,
    Chart,
    Figure,
    Section,
    Table,
    listed_words,
    percent,
)

Raw = Mapping[str, Any]
NULLS = {"random": "same size", "tensors": "same tensors", "lines": "same rows and columns"}
"""What masks would share by chance, given ever more of what they are."""


def arithmetic(where: str, raw: Raw, builder: Builder) -> Iterator[Section]:
    """The section of one benchmark."""
    lines: Mapping[str, Raw] = raw["lines"]
    figures = builder.attempt("vectors on every task", partial(_transfer, raw, lines))
    figures += builder.attempt("the overlap of masks", partial(_masks, lines))
    head = ("strategy", "rate", "trained entries", "single", "absolute", "normalised", "xi (1, 1)")
    sums = Table(
        "Single models and their sum",
        head,
        tuple(
            (name, line.get("lr"), line.get("trained"), *(
                _interval(line.get(key)) for key in ("single_mean", "absolute", "normalised", "xi")
            ))
            for name, line in lines.items()
        ),
    )  # fmt: skip
    claims = Table(
        "Claims",
        ("claim", "difference, paired over seeds", "verdict"),
        tuple(
            (str(c["text"]), _interval(c["difference"]), str(c["verdict"]))
            for c in raw.get("claims") or ()
        ),
    )
    seeds = len(raw["recipe"]["seeds"])
    state = "" if raw.get("complete") else " Not complete yet."
    yield Section(
        "arithmetic",
        "Task arithmetic: which fine-tuning adds and subtracts well",
        f"From {where}: {len(raw['recipe']['tasks'])} tasks, {seeds} seeds; means with 95 % t "
        f"intervals over seeds. Accuracies are shares; a sum has one amount for all tasks.{state}",
        tuple(figures),
        (sums, claims) if claims.rows else (sums,),
    )


def _interval(found: Raw | None) -> Cell:
    """A mean with half the width of its interval."""
    if not found or found.get("mean") is None:
        return None
    half = (float(found["high"]) - float(found["low"])) / 2
    return f"{found['mean']:.3f} ± {half:.3f}"


def _transfer(raw: Raw, lines: Mapping[str, Raw]) -> Iterator[Figure]:
    shown = [name for name, line in lines.items() if line.get("transfer")][:2]
    yield from gains(
        [str(t) for t in raw["recipe"]["tasks"]], {n: lines[n]["transfer"] for n in shown}
    )


def gains(tasks: Sequence[str], matrices: Mapping[str, Any]) -> Iterator[Figure]:
    """What each task vector does to the accuracy of each task: a map for each name."""
    drawn: list[Chart] = []
    table: list[tuple[Cell, ...]] = []
    for name, values in matrices.items():
        rows: list[dict[str, Any]] = [
            {"x": task, "y": vector, "value": float(values[i][j])}
            for i, vector in enumerate(tasks)
            for j, task in enumerate(tasks)
        ]
        table += [(name, r["y"], r["x"], r["value"]) for r in rows]
        own = sum(float(values[i][i]) for i in range(len(tasks))) / len(tasks)
        rest = [abs(float(r["value"])) for r in rows if r["x"] != r["y"]]
        other = sum(rest) / max(1, len(rest))
        told = (
            f"{name}: a vector changes its own task by {percent(own, 1)} on average, another one "
            f"by {percent(other, 1)}, up or down"
        )
        spec = charts.heat(rows, x="task", y="vector", xs=tasks, ys=tasks, value="gain",
                           fmt="+.2f", written=True, alt_text=told)  # fmt: skip
        drawn.append(Chart(name, spec, told))
    if drawn:
        yield Figure(
            "Every vector on every task",
            "Rows are task vectors, columns tasks; a field is the accuracy with the vector minus "
            "that of the base. Vectors that keep apart colour the diagonal alone.",
            tuple(drawn),
            Table("Every vector on every task", ("strategy", "vector", "task", "gain"),
                  tuple(table)),
            listed_words([c.alt for c in drawn]) + ".",
            wide=True,
        )  # fmt: skip


def _masks(lines: Mapping[str, Raw]) -> Iterator[Figure]:
    held = {n: m for n, line in lines.items() if (m := line.get("masks")) and m.get("iou")}
    rows: list[tuple[Cell, ...]] = [
        (n, m["query_key"]["mean"], *(m[k]["mean"] for k in ("iou", *NULLS)))
        for n, m in held.items()
    ]
    yield from shared("strategy", rows)


def shared(
    what: str, rows: Sequence[tuple[Cell, ...]], same_task: Mapping[str, float] | None = None
) -> Iterator[Figure]:
    """Intersection over union beside chance; rows are name, share in Q and K, IoU and NULLS.

    The share may be unknown; ``same_task`` has the ceiling, by the name of the mask.
    """
    if not rows:
        return
    bars = [{"name": str(r[0]), "value": r[2], "mark": r[-1]} for r in rows]
    told = listed_words([
        f"{r[0]} {r[2]:.3f}"
        + ("" if r[1] is None else f" ({percent(float(r[1]))} in queries and keys)")
        for r in rows
    ])  # fmt: skip
    if same_task:
        top = [f"{n} {v:.3f}" for n, v in same_task.items()]
        told += f"; masks of the same task, made anew, share: {listed_words(top)}"
    title = "What the masks of different tasks share"
    names = [str(r[0]) for r in rows]
    yield Figure(
        title,
        "Bars are intersection over union, averaged over pairs of tasks; the tick is what masks "
        "with the same number of entries in every row and column share by chance.",
        (
            Chart(
                "",
                charts.bars(bars, names=names, value="IoU", alt_text=told,
                            marked="by chance, same rows and columns"),
                told,
            ),
        ),
        Table(title, (what, "in queries and keys", "IoU", *NULLS.values()), tuple(rows)),
        told + ".",
    )  # fmt: skip


def glance(raw: Raw) -> Iterator[str]:
    """How many of the claims hold, in a sentence."""
    claims = list(raw.get("claims") or ())
    holds = [c for c in claims if str(c["verdict"]) == "holds"]
    against = [c for c in claims if "opposite" in str(c["verdict"])]
    if claims:
        yield (
            f"Of {len(claims)} claims about {raw['title'].lower()}, {len(holds)} hold, the "
            f"opposite is clear for {len(against)}, and the seeds do not decide the others."
        )
