"""Sections about localizations: where masks lie and what they share - out of ``localize.json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import yaml

from suture.verbs.report import charts
from suture.verbs.report.blocks import (
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


def localization(where: str, raw: Raw, builder: Builder) -> Iterator[Section]:
    """The section of one localization."""
    masks: Mapping[str, Raw] = raw["masks"]
    rule = raw["rule"]
    figures = builder.attempt("where the masks lie", partial(_places, masks))
    figures += builder.attempt("the overlap of masks", partial(_overlaps, raw))
    figures += builder.attempt("learning", partial(_learning, masks))
    head = ("model", "kept", "entries", "density", "asked for", "exactly at the threshold", "bytes")
    kept = Table(
        "Masks",
        head,
        tuple(
            (m, f["kept"], f["entries"], f["density"], f.get("wanted"), f.get("tied_at_threshold"),
             f.get("bytes"))
            for m, f in masks.items()
        ),
    )  # fmt: skip
    recipe = yaml.safe_dump(raw.get("recipe") or {}, sort_keys=False, allow_unicode=True)
    yield Section(
        "localization",
        f"Which entries carry the skill: {str(rule['title']).lower()}",
        f"From {where}: entries ranked by {rule['title']} ({rule['paper']}).",
        tuple(figures),
        (kept,),
        (("recipe", recipe),) if raw.get("recipe") else (),
    )


def glance(raw: Raw) -> Iterator[str]:
    """In which layers each mask lies, a sentence for all."""
    told = []
    for model, mask in raw["masks"].items():
        layers = mask["layers"]
        labels = layer_labels(layers)
        chosen, held = [], 0.0
        for key in sorted(layers, key=lambda k: -float(layers[k]["share"])):
            if held >= 0.5:
                break
            chosen.append(key)
            held += float(layers[key]["share"])
        inside = [labels[k] for k in layers if k in chosen]
        told.append(f"{percent(held)} of {model}'s in {layer_words(inside)}")
    rule = str(raw["rule"]["title"]).lower()
    yield f"Where the entries lie that {rule} marks: {listed_words(told)}."


def _places(masks: Mapping[str, Raw]) -> Iterator[Figure]:
    labels = layer_labels(k for f in masks.values() for k in f["layers"])
    across = in_order(labels.values())
    for section, xs, x, title, explains, value in (
        (
            "layers", across, "layer", "Share of each mask by layer",
            "Each row is one mask and adds up to 100 %: the stronger a colour, the more of the "
            "entries that were marked for the task lie in that layer.", "share",
        ),
        (
            "roles", None, "role", "Density of each mask by role",
            "The share of a role's entries that the mask marks. A small part can be dense and "
            "still hold little of the mask; enrichment, in the table, is density over that of "
            "the whole mask.", "density",
        ),
    ):  # fmt: skip
        rows: list[dict[str, Any]] = []
        table: list[tuple[Any, ...]] = []
        names = xs or list(dict.fromkeys(k for f in masks.values() for k in f[section]))
        for model, found in masks.items():
            for key, part in found[section].items():
                at = labels[key] if xs else key
                rows.append({"x": at, "y": model, "value": float(part[value])})
                table.append((model, key, part["kept"], part["entries"], part["density"],
                              part["share"], part["enrichment"]))  # fmt: skip
        peaks = [
            max((r for r in rows if r["y"] == m), key=lambda r: float(r["value"])) for m in masks
        ]
        told = listed_words([
            f"{p['y']} in {layer_words([p['x']]) if xs else p['x']} ({percent(p['value'])})"
            for p in peaks
        ])  # fmt: skip
        yield Figure(
            title,
            explains,
            (
                Chart(
                    "",
                    charts.heat(
                        rows,
                        x=x,
                        y="model",
                        xs=names,
                        ys=list(masks),
                        value=value,
                        fmt=".0%" if xs else ".2%",
                        written=True,
                        alt_text=f"{title}. The largest: {told}.",
                    ),
                    f"{title}. The largest: {told}.",
                ),
            ),
            Table(
                title,
                ("model", x, "kept", "entries", "density", "share of the mask", "enrichment"),
                tuple(table),
            ),
            f"The largest: {told}.",
            wide=True,
        )


def _overlaps(raw: Raw) -> Iterator[Figure]:
    pairs = list(raw.get("overlaps") or ())
    if not pairs:
        return
    rows: list[dict[str, Any]] = [
        {
            "name": f"{p['models'][0]} with {p['models'][1]}",
            "value": float(p["jaccard"]),
            "mark": float(p["matched"]),
        }
        for p in pairs
    ]
    beyond = [
        r["name"]
        for r, p in zip(rows, pairs, strict=True)
        if float(p["jaccard"]) > float(p["high"])
    ]
    alt_text = "Jaccard index of each pair of masks, beside what their profiles give by chance."
    yield Figure(
        "Do the masks mark the same entries?",
        "The bar is the Jaccard index, entries in both masks over entries in either; the tick is "
        "what random masks give that are as dense in every tensor. Only what goes beyond the tick "
        "says that two tasks need the same entries.",
        (
            Chart(
                "",
                charts.bars(
                    rows,
                    names=[str(r["name"]) for r in rows],
                    value="Jaccard",
                    fmt=".4f",
                    marked="by chance",
                    alt_text=alt_text,
                ),
                alt_text,
            ),
        ),
        Table(
            "Overlap of masks",
            ("model", "and", "Jaccard", "by chance: same density", "by chance: same profile",
             "from", "to"),
            tuple((*p["models"], p["jaccard"], p["independent"], p["matched"], p["low"], p["high"])
                  for p in pairs),
        ),
        f"Beyond the 95 % interval of chance: {listed_words(beyond)}." if beyond else
        "No pair goes beyond the 95 % interval of chance.",
        wide=True,
    )  # fmt: skip


def _learning(masks: Mapping[str, Raw]) -> Iterator[Figure]:
    rows: list[dict[str, Any]] = [
        {"name": model, "x": float(epoch), "value": float(loss)}
        for model, found in masks.items()
        for epoch, loss in enumerate((found.get("stats") or {}).get("losses") or (), 1)
    ]
    if not rows:
        return
    names = list(dict.fromkeys(str(r["name"]) for r in rows))
    alt_text = "Loss with the soft mask, by epoch of learning."
    yield Figure(
        "Loss while the masks were learned",
        "The loss of the base with the soft mask's part of the task vector on it, epoch by epoch; "
        "a line that still falls at the end was stopped early.",
        (
            Chart(
                "",
                charts.lines(
                    rows, x="epoch", y="loss", logarithmic=False, names=names, alt_text=alt_text
                ),
                alt_text,
            ),
        ),
        Table(
            "Loss by epoch",
            ("model", "epoch", "loss"),
            tuple((r["name"], r["x"], r["value"]) for r in rows),
        ),
        wide=True,
    )
