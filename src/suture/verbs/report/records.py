"""Sections about how everything was made: merges, their inputs, recipes and versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

from suture.tensors.spec import listed, readable
from suture.verbs.report import charts
from suture.verbs.report.blocks import Builder, Cell, Chart, Figure, Section, Table, percent
from suture.verbs.report.collect import Found

NOTHING = 1e-3
"""A loss in rounding below this share is not worth a drawing."""


def folder_of(where: str) -> str:
    """The folder of a file; the file itself where it lies at the top."""
    return where.rpartition("/")[0] or where


def _plain(value: Any) -> Cell:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        return ", ".join(dict.fromkeys(f"{v:.4g}" for v in value))
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).strip()
    return text if len(text) <= 200 else text[:199] + "…"


def merges(found: Found, builder: Callable[[str], Builder]) -> Iterator[Section]:
    """What each merge moved, and what rounding undid of it."""
    rows: list[dict[str, Any]] = []
    table: list[tuple[Cell, ...]] = []
    for where, raw in found.merges:
        results, output = raw.get("results") or {}, raw.get("output") or {}
        if not isinstance(results, Mapping) or not isinstance(output, Mapping):
            builder(where).notes.append(f"{where}: holds no results")
            continue
        name, loss = folder_of(where), results.get("writeback_loss")
        if isinstance(loss, int | float):
            rows.append({"name": name, "value": float(loss)})
        recipe = raw["recipe"]
        table.append(
            (
                name,
                _plain(recipe.get("method", raw.get("kind"))),
                _plain(recipe.get("parameters")),
                _plain(results.get("moved")),
                loss if isinstance(loss, int | float) else None,
                _plain(results.get("density")),
                _plain(output.get("fingerprint")),
            )
        )
    if not table:
        return
    figures: tuple[Figure, ...] = ()
    head = (
        "merge",
        "method",
        "parameters",
        "entries moved",
        "lost in rounding",
        "density kept",
        "fingerprint",
    )
    whole = Table("Merges", head, tuple(table))
    if max((r["value"] for r in rows), default=0.0) >= NOTHING:
        alt_text = "Share of the moved entries that rounding undid, by merge."
        figures = (
            Figure(
                "What rounding to the output dtype undid",
                "Share of the entries a merge moved that were the base's again after rounding: "
                "high values mean that the edit is finer than the dtype can hold.",
                (
                    Chart(
                        "",
                        charts.bars(
                            rows,
                            names=[r["name"] for r in rows],
                            value="lost in rounding",
                            fmt=".3%",
                            alt_text=alt_text,
                        ),
                        alt_text,
                    ),
                ),
                whole,
                wide=True,
            ),
        )
    lead = (
        ""
        if figures or not rows
        else (
            f"In every merge, rounding to the output dtype undid less than "
            f"{percent(NOTHING, 1)} of the entries that were moved."
        )
    )
    yield Section("merges", "Merges", lead, figures, () if figures else (whole,))


def provenance(found: Found) -> Iterator[Section]:
    """Fingerprints of all inputs, recipes with every default, versions."""
    inputs: dict[tuple[str, str], list[str]] = {}
    sizes: dict[tuple[str, str], tuple[Cell, Cell]] = {}
    listings = []
    for where, raw in (
        *found.tunings, *found.merges, *found.realignments, *found.analyses, *found.localizations,
    ):  # fmt: skip
        rows = raw.get("inputs")
        for label, entry in rows.items() if isinstance(rows, Mapping) else ():
            if isinstance(entry, Mapping):
                key = (str(label), str(entry.get("fingerprint", "")))
                inputs.setdefault(key, []).append(folder_of(where))
                size = entry.get("bytes")
                sizes[key] = (
                    _plain(entry.get("tensors")),
                    readable(size) if isinstance(size, int | float) else None,
                )
        recipe = raw.get("recipe") or raw.get("request")
        if recipe:
            text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
            listings.append((f"Recipe of {where}", text))
    versions: dict[str, str] = {}
    for _, result in found.suites:
        versions |= result.versions
    tables = []
    if inputs:
        tables.append(
            Table(
                "Inputs, by fingerprint of their contents",
                ("input", "fingerprint", "tensors", "size", "used in"),
                tuple(
                    (label, print_, *sizes[label, print_], listed(used, 3))
                    for (label, print_), used in inputs.items()
                ),
            )
        )
    if versions:
        tables.append(Table("Versions", ("package", "version"), tuple(versions.items())))
    lead = (
        "A fingerprint identifies content (xxh3-128 over names, shapes and bytes); two files "
        "with the same one hold the same weights."
    )
    if tables or listings:
        yield Section(
            "provenance", "Provenance", lead, tables=tuple(tables), listings=tuple(listings)
        )


__all__ = ["NOTHING", "folder_of", "merges", "provenance"]
