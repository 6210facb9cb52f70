"""Sections about weights: how far, where, against whom - out of an ``analysis.json``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from suture.page import charts, classifiers, theory
from suture.page.parts import (
    OUTSIDE,
    Builder,
    Chart,
    Figure,
    Section,
    Table,
    layer_labels,
    layer_words,
    listed_words,
    percent,
)

Raw = Mapping[str, Any]
PALE = 0.1
"""Cosines smaller than this look pale, even where all are: they are next to nothing."""
ENOUGH = 100
"""A rate over fewer shared entries is not drawn; it stands in the table."""


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
        made = builder.attempt("masks", lambda: [*_profile(overlap), *_overlap(overlap)])
        lead = f"The masks are {overlap.get('source')}."
        yield Section("masks", "Where the masks lie, and how much they share", lead, tuple(made))
    if geometry and len(geometry.get("models", ())) > 1:
        made = builder.attempt("angles", lambda: _angles(geometry))
        yield Section("angles", "Angles between task vectors", "", tuple(made))
    if raw.get("conflicts"):
        made = builder.attempt("conflicts", lambda: _conflicts(raw["conflicts"]))
        yield Section("conflicts", "Where experts disagree", "", tuple(made))
    if raw.get("diagnostics"):
        made = builder.attempt("diagnostics", lambda: theory.diagnosed(raw["diagnostics"]))
        lead = theory.merge_of(raw["diagnostics"]) if made else ""
        yield Section("diagnostics", "What merging costs each task", lead, tuple(made))
    yield from classifiers.sections(raw, builder)
    if raw.get("bases"):
        made = builder.attempt("bases", lambda: _bases(raw))
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
    across = list(dict.fromkeys(labels.values()))
    down = list(dict.fromkeys(r["role"] for r in rows if labels[r["layer"]] != OUTSIDE))
    down += [r["role"] for r in rows if r["role"] not in down]
    return across, list(dict.fromkeys(down))


def _grid_table(caption: str, rows: Sequence[Raw], columns: Mapping[str, str]) -> Table:
    return Table(
        caption,
        ("model", "layer", "role", *columns.values()),
        tuple((r["model"], r["layer"], r["role"], *(r[c] for c in columns)) for r in rows),
    )


def _moved(geometry: Raw) -> Iterator[Figure]:
    models, layers = list(geometry["models"]), list(geometry["layers"])
    labels = layer_labels(m["layer"] for m in layers)
    shares: dict[tuple[str, str], float] = {}
    for move in layers:
        key = (move["model"], labels[move["layer"]])
        shares[key] = shares.get(key, 0.0) + float(move["share"])
    across = list(dict.fromkeys(labels.values()))
    rows = [{"x": layer, "y": model, "value": v} for (model, layer), v in shares.items()]
    peaks = [max((v, layer) for (m, layer), v in shares.items() if m == model) for model in models]
    told = [
        f"{m} in {layer_words([layer])} ({percent(v)})"
        for m, (v, layer) in zip(models, peaks, strict=True)
    ]
    alt_text = f"Share of each model's change by layer. The largest: {listed_words(told)}."
    yield Figure(
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
    cells = list(geometry["cells"])
    across, down = _axes(cells)
    top = max((float(c["relative_norm"] or 0) for c in cells), default=0.0)
    drawn = []
    for model in models:
        fields = _fields(cells, model, "relative_norm", ("norm", "share"))
        peak = max(fields, key=lambda f: f["value"] or 0.0)
        alt_text = (
            f"{model}: relative change by layer and role; the largest is {peak['y']} in "
            f"layer {peak['x']}, {percent(peak['value'] or 0, 2)}."
        )
        drawn.append(
            Chart(
                model,
                charts.heat(
                    fields,
                    x="layer",
                    y="role",
                    xs=across,
                    ys=down,
                    value="relative change",
                    fmt=".3%",
                    top=top,
                    alt_text=alt_text,
                    tooltips=("norm", "share of the model's change"),
                ),
                alt_text,
            )
        )
    yield Figure(
        "How far each part moved, for its size",
        "Length of the change over length of the base's weights, for each layer and role: the same "
        "colour means the same relative change, in all maps.",
        tuple(drawn),
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
    across, down = _axes(cells)
    top = max((float(c["density"]) for c in cells), default=0.0)
    drawn = []
    for model in models:
        fields = _fields(cells, model, "density", ("share", "enrichment"))
        peak = max(fields, key=lambda f: f["value"])
        alt_text = (
            f"{model}: density of its mask by layer and role; densest is {peak['y']} in "
            f"layer {peak['x']}, {percent(peak['value'], 1)}."
        )
        drawn.append(
            Chart(
                model,
                charts.heat(
                    fields,
                    x="layer",
                    y="role",
                    xs=across,
                    ys=down,
                    value="density",
                    fmt=".2%",
                    top=top,
                    alt_text=alt_text,
                    tooltips=("share of the mask", "enrichment"),
                ),
                alt_text,
            )
        )
    told = []
    for model in models:
        roles = sorted(
            (r for r in overlap["roles"] if r["model"] == model),
            key=lambda r: -float(r["enrichment"]),
        )
        if roles:
            told.append(
                f"{model} prefers {roles[0]['role']} ({roles[0]['enrichment']:.1f} times "
                "its density elsewhere)".replace("elsewhere", "overall")
            )
    yield Figure(
        "Density of each mask by layer and role",
        "The share of a part's entries that the mask keeps. Density is not share: a small part can "
        "be dense and still hold little of the mask; both stand in the table, beside enrichment, "
        "the density over that of the whole mask.",
        tuple(drawn),
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


def _largest(values: Sequence[Sequence[float]]) -> float:
    off = [abs(float(v)) for i, row in enumerate(values) for j, v in enumerate(row) if i != j]
    return max(off, default=0.0)


def _pairs(names: Sequence[str], **columns: Sequence[Sequence[float]]) -> list[tuple[Any, ...]]:
    return [
        (names[a], names[b], *(float(m[a][b]) for m in columns.values()))
        for a in range(len(names))
        for b in range(a + 1, len(names))
    ]


def _overlap(overlap: Raw) -> Iterator[Figure]:
    names = list(overlap["models"])
    if len(names) < 2:
        return
    jaccard, placed, chance = overlap["jaccard"], overlap["placed"], overlap["independent"]
    top = max(_largest(jaccard), _largest(placed), _largest(chance)) or 1.0
    titles = (
        ("measured", jaccard, "Jaccard index of the masks"),
        (
            "same density in every tensor",
            placed,
            "expected of random masks with the same density in every tensor",
        ),
        ("same density overall", chance, "expected of random masks with the same density overall"),
    )
    drawn = tuple(
        Chart(
            label,
            charts.matrix(m, names, value="Jaccard", top=top, fmt=".3f", alt_text=text),
            f"{text}, pair by pair; at most {_largest(m):.3f}.",
        )
        for label, m, text in titles
    )
    rows = _pairs(names, jaccard=jaccard, placed=placed, chance=chance)
    best = max(rows, key=lambda r: r[2] - r[3])
    yield Figure(
        "Do the masks pick the same entries?",
        "Jaccard index: entries in both masks over entries in either. The second and third map are "
        "what chance alone gives; only what exceeds the second says that the same entries matter.",
        drawn,
        Table(
            "Jaccard index of pairs of masks",
            (
                "model",
                "and",
                "measured",
                "expected: same density in every tensor",
                "expected: same density overall",
            ),
            tuple(rows),
        ),
        f"Furthest above chance: {best[0]} and {best[1]}, {best[2]:.3f} against {best[3]:.3f} "
        "expected.",
    )
    masked, whole = overlap["cosine"], overlap["unmasked"]
    top = max(_largest(masked), _largest(whole), PALE)
    drawn = tuple(
        Chart(
            label,
            charts.matrix(
                m, names, value="cosine", diverging=True, top=top, fmt=".3f", alt_text=label
            ),
            f"{label}: at most {_largest(m):.3f}.",
        )
        for label, m in (("masked task vectors", masked), ("whole task vectors", whole))
    )
    yield Figure(
        "Do the masked changes point the same way?",
        "Cosine of the masked task vectors, beside that of the whole ones: 0 means that they do "
        "not disturb each other, blue that they agree, orange that they pull apart.",
        drawn,
        Table(
            "Cosine of pairs",
            ("model", "and", "masked", "whole"),
            tuple(_pairs(names, masked=masked, whole=whole)),
        ),
    )


def _angles(geometry: Raw) -> Iterator[Figure]:
    names, cosine = list(geometry["models"]), geometry["cosine"]
    top = max(_largest(cosine), PALE)
    alt_text = (
        f"Cosine of each pair of task vectors; the largest in size is {_largest(cosine):.3f}."
    )
    totals = {m["model"]: m for m in geometry["total"]}
    reading = (
        f"Every pair is nearly orthogonal: no cosine is larger in size than {_largest(cosine):.3f}."
        if _largest(cosine) < PALE
        else f"The largest cosine in size is {top:.3f}."
    )
    yield Figure(
        "Cosine of the task vectors",
        "0 means that two changes are orthogonal and can be added without disturbing each other to "
        "first order; blue agrees, orange opposes.",
        (
            Chart(
                "",
                charts.matrix(
                    cosine,
                    names,
                    value="cosine",
                    diverging=True,
                    top=top,
                    fmt=".3f",
                    alt_text=alt_text,
                ),
                alt_text,
            ),
        ),
        Table("Cosine of pairs", ("model", "and", "cosine"), tuple(_pairs(names, c=cosine))),
        reading,
    )
    rows = [
        {"name": n, "value": float(totals[n]["norm"]), "mark": float(d)}
        for n, d in zip(names, geometry["to_average"], strict=True)
    ]
    alt_text = "Norm of each task vector, and its distance to the average of all."
    yield Figure(
        "How far the models are from the base, and from their average",
        "A bar is the length of a task vector; the tick is the distance from that model to the "
        "plain average of all. For k orthogonal vectors of equal length it is "
        "√(1 - 1/k) of the bar.",
        (
            Chart(
                "",
                charts.bars(
                    rows,
                    names=names,
                    value="norm",
                    marked="distance to the average",
                    fmt=".4~g",
                    alt_text=alt_text,
                ),
                alt_text,
            ),
        ),
        Table(
            "Lengths",
            ("model", "norm", "relative to the base", "distance to the average"),
            tuple(
                (n, totals[n]["norm"], totals[n]["relative_norm"], d)
                for n, d in zip(names, geometry["to_average"], strict=True)
            ),
        ),
    )


def _conflicts(raw: Raw) -> Iterator[Figure]:
    total = raw["total"]
    labels = layer_labels(r["layer"] for r in raw["layers"])
    rows: list[dict[str, Any]] = []
    table: list[tuple[Any, ...]] = []
    for row in raw["layers"]:
        name = labels[row["layer"]]
        shown = row["layer"] if name == OUTSIDE else name
        if row["rate"] is not None and row["shared"] >= ENOUGH:
            rows.append({"name": shown, "value": float(row["rate"]), "mark": float(row["null"])})
        table.append(
            (
                row["layer"],
                "",
                row["shared"],
                row["rate"],
                row["null"],
                row["weighted"],
                row["cancelled"],
            )
        )
    by_role = [
        {"name": r["role"], "value": float(r["rate"]), "mark": float(r["null"])}
        for r in raw["roles"]
        if r["rate"] is not None and r["shared"] >= ENOUGH
    ]
    table += [
        ("", r["role"], r["shared"], r["rate"], r["null"], r["weighted"], r["cancelled"])
        for r in raw["roles"]
    ]
    which = (
        "all entries"
        if raw["density"] is None
        else (f"the {100 * float(raw['density']):.3g}\u202f% of largest magnitude of each expert")
    )
    alt_text = "Share of shared entries that experts move in opposite directions, by layer."
    other = "The same by role."
    reading = ""
    if total["rate"] is not None:
        reading = (
            f"In all, {percent(total['rate'], 1)} of {total['shared']:,} shared entries are "
            f"opposed; random signs would give {percent(total['null'], 1)}."
        )
    if total["cancelled"] is not None:
        reading += (
            f" Adding the task vectors cancels {percent(total['cancelled'], 1)} of their magnitude."
        )
    yield Figure(
        "Opposite signs",
        f"Among entries that at least two experts move ({which}), the share that two of them move "
        "in opposite directions. The tick is what random signs would give: only bars that differ "
        f"from it mean anything. Parts with fewer than {ENOUGH} shared entries are in the table "
        "only.",
        tuple(
            Chart(
                label,
                charts.bars(
                    part,
                    names=[str(r["name"]) for r in part],
                    value="rate",
                    fmt=".2%",
                    marked="by chance",
                    alt_text=text,
                ),
                text,
            )
            for label, part, text in (("by layer", rows, alt_text), ("by role", by_role, other))
            if part
        ),
        Table(
            "Sign conflicts",
            (
                "layer",
                "role",
                "shared entries",
                "rate",
                "by chance",
                "weighted by magnitude",
                "cancelled in a sum",
            ),
            tuple(table),
        ),
        reading,
    )
    names = list(raw["models"])
    if len(names) > 1:
        top = max(_largest(raw["pairs"]), 0.5)
        alt_text = f"Rate of opposite signs of each pair; at most {_largest(raw['pairs']):.3f}."
        yield Figure(
            "Opposite signs, pair by pair",
            "One half is what random signs give; less means that two experts agree where both "
            "move, more that they undo each other.",
            (
                Chart(
                    "",
                    charts.matrix(
                        raw["pairs"], names, value="rate", top=top, fmt=".2f", alt_text=alt_text
                    ),
                    alt_text,
                ),
            ),
            Table(
                "Rate of opposite signs",
                ("model", "and", "rate"),
                tuple(_pairs(names, r=raw["pairs"])),
            ),
        )


def _bases(raw: Raw) -> Iterator[Figure]:
    bases = list(raw["bases"])
    rows = [
        {
            "name": f"{b['kind']} ({len(b['names'])})",
            "value": float(b["loss"]),
            "mark": float(b["bound"]),
        }
        for b in bases
    ]
    alt_text = "Squared length that each basis cannot rebuild, and the least that is possible."
    best = min(bases, key=lambda b: (len(b["names"]), float(b["loss"])))
    yield Figure(
        "What a basis loses",
        "The share of the task vectors' squared length that so many vectors (in brackets) cannot "
        "rebuild; the tick is the least that any vectors of that number can lose.",
        (
            Chart(
                "",
                charts.bars(
                    rows,
                    names=[str(r["name"]) for r in rows],
                    value="lost",
                    fmt=".2%",
                    marked="at best",
                    alt_text=alt_text,
                ),
                alt_text,
            ),
        ),
        Table(
            "Bases",
            ("kind", "vectors", "lost", "at best", "worst task", "its error"),
            tuple(
                (
                    b["kind"],
                    len(b["names"]),
                    b["loss"],
                    b["bound"],
                    b["tasks"][b["errors"].index(max(b["errors"]))],
                    max(b["errors"]),
                )
                for b in bases
            ),
        ),
        f"With {len(best['names'])} vectors, {best['kind']} loses "
        f"{percent(float(best['loss']), 1)}.",
    )
    nearest = raw.get("nearest") or {}
    if nearest:
        found = [
            (name, kind, place["name"], max(place["cosines"]), place["error"])
            for name, kinds in nearest.items()
            for kind, place in kinds.items()
        ]
        kinds = list(dict.fromkeys(f[1] for f in found))
        names = list(nearest)
        grid = [
            [next((f[3] for f in found if f[0] == n and f[1] == k), 0.0) for k in kinds]
            for n in names
        ]
        top = max(PALE, *(abs(v) for row in grid for v in row))
        alt_text = "Cosine of each unseen model with its nearest basis vector."
        yield Figure(
            "Models that no basis was made of",
            "Cosine of an unseen task vector with the nearest vector of each basis; near 0, no "
            "basis vector stands in for it.",
            (
                Chart(
                    "",
                    charts.matrix(
                        grid,
                        names,
                        value="cosine",
                        diverging=True,
                        top=top,
                        columns=kinds,
                        fmt=".3f",
                        alt_text=alt_text,
                    ),
                    alt_text,
                ),
            ),
            Table(
                "Nearest basis vectors",
                ("model", "basis", "nearest", "cosine", "left over after projection"),
                tuple(found),
            ),
        )
    drawn, table = [], []
    for basis in bases:
        made = basis["vectors"]
        top = max((abs(float(v)) for row in made for v in row), default=1.0) or 1.0
        alt_text = f"{basis['kind']}: how much of each task vector is in each basis vector."
        drawn.append(
            Chart(
                str(basis["kind"]),
                charts.matrix(
                    made,
                    basis["tasks"],
                    value="factor",
                    diverging=True,
                    top=top,
                    columns=basis["names"],
                    alt_text=alt_text,
                ),
                alt_text,
            )
        )
        table += [
            (basis["kind"], name, task, float(made[t][m]), float(basis["coefficients"][m][t]))
            for m, name in enumerate(basis["names"])
            for t, task in enumerate(basis["tasks"])
        ]
    yield Figure(
        "What the basis vectors are made of",
        "Each column is a basis vector, each row a task: the colour is the factor of the task "
        "vector in it. The table also has the coefficients that rebuild the tasks.",
        tuple(drawn),
        Table("Basis vectors", ("basis", "vector", "task", "factor", "coefficient"), tuple(table)),
    )
