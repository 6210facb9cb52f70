"""Sections about weights out of an ``analysis.json``: how far each model moved, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from suture.verbs.report import charts, classifiers, theory, vectors
from suture.verbs.report.blocks import (
    OUTSIDE,
    Builder,
    Chart,
    Figure,
    Section,
    Table,
    in_order,
    layer_labels,
    layer_words,
    listed_words,
    percent,
)

Raw = Mapping[str, Any]


def glance(raw: Raw) -> Iterator[str]:
    """Which layers carry which task, a sentence a model."""
    geometry = raw.get("geometry")
    if not geometry:
        return
    labels = layer_labels(m["layer"] for m in geometry["layers"])
    for model in geometry["models"]:
        moves = [m for m in geometry["layers"] if m["model"] == model]
        by_share = sorted(moves, key=lambda m: -float(m["share"]))
        chosen: list[str] = []
        held = 0.0
        for move in by_share:
            if held >= 0.5:
                break
            chosen.append(labels[move["layer"]])
            held += float(move["share"])
        inside = [labels[m["layer"]] for m in moves if labels[m["layer"]] in chosen]
        roles = [m for m in geometry["roles"] if m["model"] == model]
        strong = max(roles, key=lambda m: float(m["relative_norm"] or 0))
        total = {m["model"]: m for m in geometry["total"]}[model]
        relative = total["relative_norm"]
        far = (
            "" if relative is None else f" moved by {percent(float(relative))} of the base's length"
        )
        yield (
            f"{model}{far}: {percent(held)} of its change lies in {layer_words(inside)}; relative "
            f"to their size, {strong['role']} weights moved most."
        )


def sections(where: str, raw: Raw, builder: Builder) -> Iterator[Section]:
    """The sections of one analysis."""
    base = (
        f"Analysis {where}, of {raw.get('elements', 0):,} entries in {raw.get('tensors')} tensors."
    )
    geometry, overlap = raw.get("geometry"), raw.get("overlap")
    if geometry:
        made = builder.attempt("geometry", lambda: _moved(geometry))
        yield Section("moved", "Where fine-tuning moved the weights", base, tuple(made))
    if overlap:
        made = builder.attempt("masks", lambda: [*_profile(overlap), *vectors.overlaps(overlap)])
        lead = f"The masks are {overlap.get('source')}."
        yield Section("masks", "Where the masks lie, and how much they share", lead, tuple(made))
    if geometry and len(geometry.get("models", ())) > 1:
        made = builder.attempt("angles", lambda: vectors.angles(geometry))
        yield Section("angles", "Angles between task vectors", "", tuple(made))
    if raw.get("conflicts"):
        made = builder.attempt("conflicts", lambda: vectors.conflicts(raw["conflicts"]))
        yield Section("conflicts", "Where experts disagree", "", tuple(made))
    if raw.get("diagnostics"):
        made = builder.attempt("diagnostics", lambda: theory.diagnosed(raw["diagnostics"]))
        lead = theory.merge_of(raw["diagnostics"]) if made else ""
        yield Section("diagnostics", "What merging costs each task", lead, tuple(made))
    yield from classifiers.sections(raw, builder)
    if raw.get("bases"):
        made = builder.attempt("bases", lambda: vectors.bases(raw))
        yield Section("bases", "Fewer vectors for many tasks", "", tuple(made))


def _fields(
    rows: Iterable[Raw], model: str, value: str, more: Sequence[str] = ()
) -> list[dict[str, Any]]:
    found = list(rows)
    labels = layer_labels(r["layer"] for r in found)
    return [
        {
            "x": labels[r["layer"]],
            "y": r["role"],
            "value": None if r[value] is None else float(r[value]),
            **{f"more{i}": r[m] for i, m in enumerate(more)},
        }
        for r in found
        if r["model"] == model
    ]


def _axes(rows: Sequence[Raw]) -> tuple[list[str], list[str]]:
    labels = layer_labels(r["layer"] for r in rows)
    across = in_order(labels.values())
    down = list(dict.fromkeys(r["role"] for r in rows if labels[r["layer"]] != OUTSIDE))
    down += [r["role"] for r in rows if r["role"] not in down]
    return across, list(dict.fromkeys(down))


def _grid_table(caption: str, rows: Sequence[Raw], columns: Mapping[str, str]) -> Table:
    return Table(
        caption,
        ("model", "layer", "role", *columns.values()),
        tuple((r["model"], r["layer"], r["role"], *(r[c] for c in columns)) for r in rows),
    )


def _maps(
    cells: Sequence[Raw], models: Sequence[str], value: str, called: str, fmt: str,
    more: Mapping[str, str], told: Callable[[str, Raw], str],
) -> tuple[Chart, ...]:  # fmt: skip
    """A map of layers and roles for each model; the same colour means the same in all.

    Args:
        cells: of all models.
        models: in the order of the drawings.
        value: the key of what is drawn.
        called: what that is called.
        fmt: of the numbers.
        more: keys whose values are shown where somebody points, and their names.
        told: the sentence of a model and its strongest field, for who cannot see it.
    """
    across, down = _axes(cells)
    top = max((float(c[value] or 0) for c in cells), default=0.0)
    drawn = []
    for model in models:
        fields = _fields(cells, model, value, tuple(more))
        alt_text = told(model, max(fields, key=lambda f: f["value"] or 0.0))
        drawn.append(Chart(model, charts.heat(
            fields, x="layer", y="role", xs=across, ys=down, value=called, fmt=fmt, top=top,
            alt_text=alt_text, tooltips=tuple(more.values()),
        ), alt_text))  # fmt: skip
    return tuple(drawn)


def _moved(geometry: Raw) -> Iterator[Figure]:
    yield _by_layer(geometry)
    yield _by_part(geometry)


def _by_layer(geometry: Raw) -> Figure:
    models, layers = list(geometry["models"]), list(geometry["layers"])
    labels = layer_labels(m["layer"] for m in layers)
    shares: dict[tuple[str, str], float] = {}
    for move in layers:
        key = (move["model"], labels[move["layer"]])
        shares[key] = shares.get(key, 0.0) + float(move["share"])
    across = in_order(labels.values())
    rows = [{"x": layer, "y": model, "value": v} for (model, layer), v in shares.items()]
    peaks = [max((v, layer) for (m, layer), v in shares.items() if m == model) for model in models]
    told = [
        f"{m} in {layer_words([layer])} ({percent(v)})"
        for m, (v, layer) in zip(models, peaks, strict=True)
    ]
    alt_text = f"Share of each model's change by layer. The largest: {listed_words(told)}."
    return Figure(
        "Which layers carry which task",
        "Each row is one fine-tuned model and adds up to 100 %: the stronger a colour, the more of "
        "the model's whole change (its squared length) lies in that layer. “out” is what stands "
        "in no layer.",
        (
            Chart(
                "",
                charts.heat(
                    rows,
                    x="layer",
                    y="model",
                    xs=across,
                    ys=models,
                    value="share",
                    fmt=".0%",
                    written=True,
                    alt_text=alt_text,
                ),
                alt_text,
            ),
        ),
        Table(
            "Share of the change by model and layer",
            ("model", *across),
            tuple((m, *(shares.get((m, layer)) for layer in across)) for m in models),
        ),
        f"The largest shares: {listed_words(told)}.",
        wide=True,
    )


def _by_part(geometry: Raw) -> Figure:
    cells, models = list(geometry["cells"]), list(geometry["models"])
    drawn = _maps(
        cells, models, "relative_norm", "relative change", ".3%",
        {"norm": "norm", "share": "share of the model's change"},
        lambda model, peak: f"{model}: relative change by layer and role; the largest is "
        f"{peak['y']} in layer {peak['x']}, {percent(peak['value'] or 0, 2)}.",
    )  # fmt: skip
    return Figure(
        "How far each part moved, for its size",
        "Length of the change over length of the base's weights, for each layer and role: the same "
        "colour means the same relative change, in all maps.",
        drawn,
        _grid_table(
            "Change by model, layer and role",
            cells,
            {
                "elements": "entries",
                "norm": "norm",
                "relative_norm": "relative change",
                "share": "share of the change",
            },
        ),
    )


def _profile(overlap: Raw) -> Iterator[Figure]:
    cells, models = list(overlap["cells"]), list(overlap["models"])
    drawn = _maps(
        cells, models, "density", "density", ".2%",
        {"share": "share of the mask", "enrichment": "enrichment"},
        lambda model, peak: f"{model}: density of its mask by layer and role; densest is "
        f"{peak['y']} in layer {peak['x']}, {percent(peak['value'], 1)}.",
    )  # fmt: skip
    told = []
    for model in models:
        roles = sorted(
            (r for r in overlap["roles"] if r["model"] == model),
            key=lambda r: -float(r["enrichment"]),
        )
        if roles:
            told.append(
                f"{model} prefers {roles[0]['role']} ({roles[0]['enrichment']:.1f} times its "
                "density overall)"
            )
    yield Figure(
        "Density of each mask by layer and role",
        "The share of a part's entries that the mask keeps. Density is not share: a small part can "
        "be dense and still hold little of the mask; both stand in the table, beside enrichment, "
        "the density over that of the whole mask.",
        drawn,
        _grid_table(
            "Masks by model, layer and role",
            cells,
            {
                "elements": "entries",
                "density": "density",
                "share": "share of the mask",
                "enrichment": "enrichment",
                "energy": "squared length kept",
            },
        ),
        f"{'; '.join(told)}." if told else "",
    )
