"""What a recipe means, and where two languages of recipes differ, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import yaml

from suture.verbs.merge.documents import read_recipe


def explain(recipe: Path | Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe means in Suture's terms, and where Suture's defaults would differ.

    Raises:
        RecipeError: everything that is wrong with it, at once; models are not opened.
    """
    from suture.verbs.merge.mergekit import differences, native

    found = read_recipe(recipe)
    merges = {**found.stages, "": found}
    return {
        "mergekit": found.kit is not None or any(s.kit for s in found.stages.values()),
        "differences": {
            name: differences(one) for name, one in merges.items() if one.kit is not None
        },
        "native": native(found),
        "notes": [
            note
            for one in merges.values()
            for note in (*one.notes, *([one.protect.told] if one.protect is not None else ()))
        ],
    }


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield an explanation as a commented recipe."""
    if not found["mergekit"]:
        yield "# A recipe of Suture's own; without what is a default it reads:\n"
    else:
        yield "# With mergekit's meaning, which this recipe keeps, Suture's defaults differ in:"
        yield "#"
    for stage, sentences in found["differences"].items():
        if stage:
            yield f"# stage {stage}:"
        for text in sentences or ["nothing"]:
            yield _comment(text)
    for note in found["notes"]:
        yield _comment(f"note: {note}")
    if found["mergekit"]:
        yield "#\n# The same merge as a recipe of Suture's own:\n"
    native = yaml.safe_dump(
        found["native"], sort_keys=False, default_flow_style=None, width=100, allow_unicode=True
    )
    yield native.rstrip()


def _comment(text: str) -> str:
    """A sentence as an item of a YAML comment."""
    return fill(text, 98, initial_indent="# - ", subsequent_indent="#   ")
