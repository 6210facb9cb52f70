"""A recipe file or mapping to a frozen model; every fault is noted with its place and line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from suture.errors import Problems, RecipeError
from suture.schema.sections import Reading, Recipe
from suture.schema.text import MAPPING, raw_recipe

R = TypeVar("R", bound=Recipe)


def read(
    model: type[R], source: Path | Mapping[str, Any], problems: Problems,
    folder: Path | None = None, *, what: str = "recipe", shape: str = MAPPING, whole: bool = True,
) -> R | None:  # fmt: skip
    """Return what a recipe says; ``None`` where it cannot be read.

    Args:
        model: the keys it may have.
        source: a file, or what stands in it.
        problems: takes every fault; from then on it puts lines of the file before what is noted.
        folder: where relative paths start; by default the file's folder.
        what: it is, for messages.
        shape: it should have, for messages.
        whole: return nothing where anything is wrong; else keys that are wrong have their defaults,
            so that what they have nothing to do with can be checked, too.
    """
    with problems.collecting():
        raw, where = raw_recipe(source, folder, problems, what, shape)
        return parse(model, raw, where, problems, whole=whole)
    return None


def parse(
    model: type[R], raw: Mapping[str, Any], folder: Path, problems: Problems, *, whole: bool = True
) -> R | None:
    """Return what a mapping says, its relative paths taken from ``folder`` on; see ``read``."""
    reading = Reading(folder)
    try:
        return model.model_validate(raw, context=reading).placed(folder, raw)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            place, text = key_path(one["loc"]), one.get("ctx", {}).get("text", one["msg"])
            problems.add(RecipeError, f"{place}: {text}" if place else text)
    part = reading.part(raw)
    if whole or not isinstance(part, model) or not part.placed(folder, raw).filled():
        return None
    return part


def key_path(parts: tuple[int | str, ...]) -> str:
    """Return a place as messages write it, such as ``models[0].path``."""
    found = ""
    for part in parts:
        found += f"[{part}]" if isinstance(part, int) else f".{part}" if found else part
    return found
