"""The section about losses between experts and a merge - out of an ``analysis.json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from suture.verbs.report import charts
from suture.verbs.report.blocks import Chart, Figure, Table, listed_words

Raw = Mapping[str, Any]


def diagnosed(raw: Raw) -> Iterator[Figure]:
    """The loss on the way, the gap beside its bounds, smoothness."""
    models = list(raw["models"])
    yield _line(raw["line"], models)
    yield _gaps(models)
    yield _smoothness(models)


def merge_of(raw: Raw) -> str:
    """Which merge it is, in words."""
    how = raw["merge"]
    if "path" in how:
        return f"The merge is {how['path']}."
    told = listed_words([f"{w:.3g} of {m}" for m, w in how["weights"].items()])
    return f"The merge is the base plus {told}."


def _line(line: Raw, models: list[Raw]) -> Figure:
    rows: list[dict[str, Any]] = [
        {"name": str(s["name"]), "x": float(p["x"]), "value": float(p["value"])}
        for s in line["series"]
        for p in s["points"]
    ]
    names = [str(s["name"]) for s in line["series"]]
    humps = [(float(m["barrier"]), str(m["model"])) for m in models]
    hump, whose = max(humps)
    ends = listed_words([
        f"{m['model']} from {m['expert_loss']:.3f} to {m['merged_loss']:.3f}" for m in models
    ])  # fmt: skip
    alt_text = f"Loss of each task from its expert (0) to the merge (1): {ends}."
    return Figure(
        "Loss on the way from each expert to the merge",
        "Each line is the loss of one task while its expert (0) is moved straight to the merge "
        "(1), on rows of the task; a hump between the ends is a barrier.",
        (
            Chart(
                "",
                charts.lines(
                    rows, x="way", y="loss", logarithmic=False, names=names, alt_text=alt_text
                ),
                alt_text,
            ),
        ),
        Table(
            "Loss on the way",
            ("task", "way", "loss"),
            tuple((r["name"], r["x"], r["value"]) for r in rows),
        ),
        "No line rises above the straight one between its ends: there is no barrier."
        if hump <= 1e-6
        else f"The largest barrier is that of {whose}, {hump:.3g} above the straight line.",
        wide=True,
    )


def _gaps(models: list[Raw]) -> Figure:
    rows: list[dict[str, Any]] = [
        {
            "name": str(m["model"]),
            "value": float(m["gap"]),
            "mark": float(m["bounds"]["curvature"]),
        }
        for m in models
    ]
    alt_text = "How much worse than its expert the merge is on each task, and the bound of theory."
    told = [
        f"{m['model']} {m['gap']:.3g} of at most {m['bounds']['curvature']:.3g}" for m in models
    ]
    columns = (
        "task", "gap", "bound by curvature", "bound by secant", "bound by random directions",
        "closed form by curvature", "gradient at expert", "slope", "distance", "barrier",
        "loss of base", "loss of expert", "loss of merge", "rows",
    )  # fmt: skip
    return Figure(
        "What the merge costs, and what theory allows",
        "The bar is how much higher the loss of the merge is than that of the task's expert; the "
        "tick is the most that it could be if the loss curved everywhere as it does at the expert. "
        "A tick far away says nothing, a bar beyond its tick that the loss curves more on the way.",
        (
            Chart(
                "",
                charts.bars(
                    rows,
                    names=[r["name"] for r in rows],
                    value="gap",
                    fmt=".4~g",
                    marked="bound",
                    alt_text=alt_text,
                ),
                alt_text,
            ),
        ),
        Table("Gap and bounds", columns, tuple(map(_gap_row, models))),
        f"Gap beside bound: {listed_words(told)}.",
        wide=True,
    )


def _gap_row(m: Raw) -> tuple[Any, ...]:
    closed = m.get("addition_bounds") or {}
    return (
        m["model"], m["gap"], *(m["bounds"].get(k) for k in ("curvature", "secant", "random")),
        closed.get("curvature"), m["gradient_norm"], m["slope"], m["distance"], m["barrier"],
        m["base_loss"], m["expert_loss"], m["merged_loss"], m["rows"],
    )  # fmt: skip


def _smoothness(models: list[Raw]) -> Figure:
    rows, table = [], []
    for m in models:
        smooth = m["smoothness"]
        secants = {float(s["at"]): float(s["value"]) for s in smooth["secants"]}
        found = {
            "curvature at the expert": smooth["curvature"],
            **{f"on the way, to {t:g}": v for t, v in secants.items()},
            "random directions": smooth["random"],
        }
        rows += [
            {"x": str(m["model"]), "y": k, "value": float(v)}
            for k, v in found.items()
            if v is not None
        ]
        table += [(m["model"], k, v) for k, v in found.items()]
        table.append((m["model"], "residual of the curvature", smooth["residual"]))
    kinds = list(dict.fromkeys(str(r["y"]) for r in rows))
    alt_text = "Smoothness of each task's loss, estimated in three ways."
    return Figure(
        "How strongly the loss curves",
        "The smoothness L of each loss, three ways: its largest curvature at the expert, what the "
        "loss itself shows on the way to the merge, and the largest of random directions of the "
        "same length. Where the way curves far less than the expert, the bound is far too high.",
        (
            Chart(
                "",
                charts.heat(
                    rows,
                    x="task",
                    y="estimate",
                    xs=[str(m["model"]) for m in models],
                    ys=kinds,
                    value="L",
                    fmt=".3~g",
                    written=True,
                    alt_text=alt_text,
                ),
                alt_text,
            ),
        ),
        Table("Smoothness", ("task", "estimate", "L"), tuple(table)),
        wide=True,
    )
