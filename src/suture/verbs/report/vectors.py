"""Figures about several task vectors: what their masks share, angles, opposite signs, bases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from suture.verbs.report import charts
from suture.verbs.report.blocks import OUTSIDE, Chart, Figure, Table, layer_labels, percent

Raw = Mapping[str, Any]
Charts = tuple[Chart, ...]
PALE = 0.1
"""Cosines smaller than this look pale, even where all are: they are next to nothing."""
ENOUGH = 100
"""A rate over fewer shared entries is not drawn; it stands in the table."""


def _largest(values: Sequence[Sequence[float]]) -> float:
    off = [abs(float(v)) for i, row in enumerate(values) for j, v in enumerate(row) if i != j]
    return max(off, default=0.0)


def _pairs(names: Sequence[str], **columns: Sequence[Sequence[float]]) -> list[tuple[Any, ...]]:
    return [
        (names[a], names[b], *(float(m[a][b]) for m in columns.values()))
        for a in range(len(names))
        for b in range(a + 1, len(names))
    ]


def _single(draw: Callable[..., dict[str, Any]], alt_text: str, *given: Any, **look: Any) -> Charts:
    """A drawing that is the whole figure."""
    return (Chart("", draw(*given, alt_text=alt_text, **look), alt_text),)


def overlaps(overlap: Raw) -> Iterator[Figure]:
    """What masks share: entries, and the directions of the masked changes."""
    if len(overlap["models"]) > 1:
        yield _shared(overlap)
        yield _together(overlap)


def _shared(overlap: Raw) -> Figure:
    names = list(overlap["models"])
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
    return Figure(
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


def _together(overlap: Raw) -> Figure:
    names = list(overlap["models"])
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
    return Figure(
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


def angles(geometry: Raw) -> Iterator[Figure]:
    """Cosines of task vectors, and their lengths beside the distance to the average."""
    names, cosine = list(geometry["models"]), geometry["cosine"]
    top = max(_largest(cosine), PALE)
    alt_text = (
        f"Cosine of each pair of task vectors; the largest in size is {_largest(cosine):.3f}."
    )
    totals = {m["model"]: m for m in geometry["total"]}
    reading = (
        f"Every pair is nearly orthogonal: no cosine is larger in size than "
        f"{max(_largest(cosine), 0.001):.3f}."
        if _largest(cosine) < PALE
        else f"The largest cosine in size is {top:.3f}."
    )
    yield Figure(
        "Cosine of the task vectors",
        "0 means that two changes are orthogonal and can be added without disturbing each other to "
        "first order; blue agrees, orange opposes.",
        _single(
            charts.matrix,
            alt_text,
            cosine,
            names,
            value="cosine",
            diverging=True,
            top=top,
            fmt=".3f",
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
        _single(
            charts.bars,
            alt_text,
            rows,
            names=names,
            value="norm",
            marked="distance to the average",
            fmt=".4~g",
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


def conflicts(raw: Raw) -> Iterator[Figure]:
    """Where experts move entries in opposite directions, by layer and role, and pair by pair."""
    yield _opposed(raw)
    if len(raw["models"]) > 1:
        yield _opposed_pairs(raw)


def _bars(parts: Iterable[tuple[str, Raw]]) -> list[dict[str, Any]]:
    """A bar for each part with entries enough, and what random signs give as its mark."""
    return [
        {"name": name, "value": float(r["rate"]), "mark": float(r["null"])}
        for name, r in parts if r["rate"] is not None and r["shared"] >= ENOUGH
    ]  # fmt: skip


def _opposed(raw: Raw) -> Figure:
    total = raw["total"]
    labels = layer_labels(r["layer"] for r in raw["layers"])
    names = {k: k if label == OUTSIDE else label for k, label in labels.items()}
    columns = ("shared", "rate", "null", "weighted", "cancelled")
    table = [(r["layer"], "", *(r[c] for c in columns)) for r in raw["layers"]]
    table += [("", r["role"], *(r[c] for c in columns)) for r in raw["roles"]]
    rows = _bars((names[r["layer"]], r) for r in raw["layers"])
    by_role = _bars((r["role"], r) for r in raw["roles"])
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
    return Figure(
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
            ("layer", "role", "shared entries", "rate", "by chance", "weighted by magnitude",
             "cancelled in a sum"),
            tuple(table),
        ),
        reading,
    )  # fmt: skip


def _opposed_pairs(raw: Raw) -> Figure:
    names = list(raw["models"])
    top = max(_largest(raw["pairs"]), 0.5)
    alt_text = f"Rate of opposite signs of each pair; at most {_largest(raw['pairs']):.3f}."
    return Figure(
        "Opposite signs, pair by pair",
        "One half is what random signs give; less means that two experts agree where both "
        "move, more that they undo each other.",
        _single(
            charts.matrix,
            alt_text,
            raw["pairs"],
            names,
            value="rate",
            top=top,
            fmt=".2f",
        ),
        Table(
            "Rate of opposite signs",
            ("model", "and", "rate"),
            tuple(_pairs(names, r=raw["pairs"])),
        ),
    )


def bases(raw: Raw) -> Iterator[Figure]:
    """What bases of task vectors lose, what unseen models have in them, what they are made of."""
    yield _lost(raw["bases"])
    if raw.get("nearest"):
        yield _unseen(raw["nearest"])
    yield _made_of(raw["bases"])


def _lost(bases: Sequence[Raw]) -> Figure:
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
    return Figure(
        "What a basis loses",
        "The share of the task vectors' squared length that so many vectors (in brackets) cannot "
        "rebuild; the tick is the least that any vectors of that number can lose.",
        _single(
            charts.bars,
            alt_text,
            rows,
            names=[str(r["name"]) for r in rows],
            value="lost",
            fmt=".2%",
            marked="at best",
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
        f"With {len(best['names'])} vector{'s' if len(best['names']) > 1 else ''}, "
        f"{best['kind']} loses "
        f"{percent(float(best['loss']), 1)}.",
    )


def _unseen(nearest: Raw) -> Figure:
    found = [
        (name, kind, place["name"], max(place["cosines"]), place["error"])
        for name, kinds in nearest.items()
        for kind, place in kinds.items()
    ]
    kinds = list(dict.fromkeys(f[1] for f in found))
    names = list(nearest)
    grid = [
        [next((f[3] for f in found if f[0] == n and f[1] == k), 0.0) for k in kinds] for n in names
    ]
    top = max(PALE, *(abs(v) for row in grid for v in row))
    alt_text = "Cosine of each unseen model with its nearest basis vector."
    return Figure(
        "Models that no basis was made of",
        "Cosine of an unseen task vector with the nearest vector of each basis; near 0, no "
        "basis vector stands in for it.",
        _single(
            charts.matrix,
            alt_text,
            grid,
            names,
            value="cosine",
            diverging=True,
            top=top,
            columns=kinds,
            fmt=".3f",
        ),
        Table(
            "Nearest basis vectors",
            ("model", "basis", "nearest", "cosine", "left over after projection"),
            tuple(found),
        ),
    )


def _made_of(bases: Sequence[Raw]) -> Figure:
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
    return Figure(
        "What the basis vectors are made of",
        "Each column is a basis vector, each row a task: the colour is the factor of the task "
        "vector in it. The table also has the coefficients that rebuild the tasks.",
        tuple(drawn),
        Table("Basis vectors", ("basis", "vector", "task", "factor", "coefficient"), tuple(table)),
    )


__all__ = ["angles", "bases", "conflicts", "overlaps"]
