"""Sections about what classifiers answered and where masks lie - out of an ``analysis.json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from suture.verbs.report import charts
from suture.verbs.report.arithmetic import gains, shared
from suture.verbs.report.blocks import (
    Builder,
    Cell,
    Chart,
    Figure,
    Section,
    Table,
    in_order,
    layer_labels,
    listed_words,
    percent,
)

Raw = Mapping[str, Any]
WORDS = {"least": "least sensitive", "random": "random", "most": "most sensitive"}


def sections(raw: Raw, builder: Builder) -> Iterator[Section]:
    """The sections of one analysis, those that it has."""
    if raw.get("function_localization"):
        made = builder.attempt(
            "vectors on every task", lambda: _local(raw["function_localization"])
        )
        yield Section("localized", "What every task vector does elsewhere", "", tuple(made))
    if raw.get("sensitivity"):
        made = builder.attempt("sensitivity", lambda: _sharing(raw["sensitivity"]))
        yield Section("sensitivity", "Do tasks share their insensitive weights?", "", tuple(made))
    if raw.get("masks"):
        made = builder.attempt("pairs of masks", lambda: _pairs(raw["masks"], raw.get("structure")))
        lead = f"The masks are {raw['masks'].get('source')}." if made else ""
        yield Section("pairs", "Do masks mark the same entries?", lead, tuple(made))
    if raw.get("structure"):
        made = builder.attempt("the structure of masks", lambda: _places(raw["structure"]))
        yield Section("structure", "Layer by layer and part by part", "", tuple(made))


def _local(found: Raw) -> Iterator[Figure]:
    tasks = [str(t) for t in found["models"]]
    yield from gains(tasks, {"accuracy": found["transfer"]})
    table = tuple(
        (vector, task, found["drift"][i][j], found["moved"][i][j], found["first"][i][j])
        for i, vector in enumerate(tasks)
        for j, task in enumerate(tasks)
    )
    rows = [{"x": str(r[1]), "y": str(r[0]), "value": float(r[2])} for r in table]
    told = (
        f"Features move {found['elsewhere']:.2f} times as much on other tasks as on the own one, "
        f"{found['elsewhere_first']:.2f} times to first order; {percent(found['bend'])} of the own "
        "movement is not first order"
    )
    yield Figure(
        "Predictions that a vector changes",
        "The share of rows of each task whose class is another with the vector than without; the "
        "table has how far features move, over their own squared length.",
        (
            Chart(
                "",
                charts.heat(rows, x="task", y="vector", xs=tasks, ys=tasks, value="drift",
                            fmt=".2f", written=True, alt_text=told),
                told,
            ),
        ),
        Table("Predictions and features",
              ("vector", "task", "changed", "features moved", "to first order"), table),
        told + ".",
        wide=True,
    )  # fmt: skip


def _sharing(found: Raw) -> Iterator[Figure]:
    tasks = [str(t) for t in found["models"]]
    share = f"{found['shares'][-1]:g}"
    drawn, told = [], []
    for word, about in WORDS.items():
        values = [found["tasks"][t][word][share] for t in tasks]
        rows: list[dict[str, Any]] = [
            {"x": task, "y": chooser, "value": float(values[i][j])}
            for i, chooser in enumerate(tasks)
            for j, task in enumerate(tasks)
        ]
        rest = [float(r["value"]) for r in rows if r["x"] != r["y"]]
        say = f"{about}: other tasks keep {percent(sum(rest) / len(rest))}"
        told.append(say)
        spec = charts.heat(rows, x="task", y="chosen by", xs=tasks, ys=tasks, value="kept",
                           fmt=".2f", top=1.0, written=True, alt_text=say)  # fmt: skip
        drawn.append(Chart(about, spec, say))
    table: tuple[tuple[Cell, ...], ...] = tuple(
        (WORDS[word], float(at), chooser, task, float(values[j]))
        for chooser in tasks
        for word in WORDS
        for at, values in found["tasks"][chooser][word].items()
        for j, task in enumerate(tasks)
    )
    yield Figure(
        "Accuracy that is left when entries chosen by one task are set to 0",
        f"{percent(float(share))} of the prunable entries of the base are set to 0, chosen on the "
        "rows of the task of each row; a field is the accuracy that is left, over the base's. "
        "Where rows look alike and the first map is near 1, unlike chance, tasks share what does "
        "not matter to them.",
        tuple(drawn),
        Table("Accuracy that is left", ("entries", "share", "chosen by", "task", "kept"), table),
        listed_words(told).capitalize() + ".",
        wide=True,
    )


def _pairs(found: Raw, structure: Raw | None) -> Iterator[Figure]:
    inside = (structure or {}).get("models", {})
    rows: list[tuple[Cell, ...]] = [
        (
            f"{p['pair'][0]} with {p['pair'][1]}",
            (inside[p["pair"][0]]["query_key"] + inside[p["pair"][1]]["query_key"]) / 2
            if inside
            else None,
            p["iou"], p["random"], p["tensors"], p["lines"],
        )
        for p in found["pairs"]
    ]  # fmt: skip
    yield from shared("masks", rows, found.get("same_task") or {})


def _places(found: Raw) -> Iterator[Figure]:
    models: Mapping[str, Raw] = found["models"]
    drawn: list[Chart] = []
    table: list[tuple[Cell, ...]] = []
    for name, one in models.items():
        split = sorted(
            ((*cell.partition("/")[::2], share) for cell, share in one["densities"].items()),
            key=lambda cell: (len(cell[0]), cell[0]),  # layer 2 before layer 10
        )
        labels = layer_labels("" if layer == "-" else layer for layer, _, _ in split)
        rows = []
        for layer, kind, density in split:
            at = labels["" if layer == "-" else layer]
            share = float(one["cells"].get(f"{layer}/{kind}", 0.0))
            rows.append({"x": at, "y": kind, "value": float(density), "more0": share})
            table.append((name, layer, kind, float(density), share))
        most = max(rows, key=lambda r: float(r["more0"]))
        told = (
            f"{name}: {percent(one['query_key'])} in queries and keys; the largest share, "
            f"{percent(float(most['more0']))}, in {most['y']} of layer {most['x']}"
        )
        spec = charts.heat(rows, x="layer", y="part", xs=in_order(labels.values()),
                           ys=list(dict.fromkeys(r["y"] for r in rows)), value="density",
                           fmt=".1%", tooltips=("share of the mask",), alt_text=told)  # fmt: skip
        drawn.append(Chart(name, spec, told))
    yield Figure(
        "Where each mask lies",
        "The colour is the share of the entries of one part of one layer that the mask holds.",
        tuple(drawn),
        Table("Where each mask lies", ("mask", "layer", "part", "density", "share of the mask"),
              tuple(table)),
        listed_words([c.alt for c in drawn]) + ".",
        wide=True,
    )  # fmt: skip
