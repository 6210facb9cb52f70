"""Recipes as JSON Schema, by which editors complete and check them."""

from __future__ import annotations

from typing import Any

from suture.schema.sections import Recipe


def schema_of(model: type[Recipe], title: str) -> dict[str, Any]:
    """Return the JSON Schema of a recipe: keys, types, bounds, defaults, and what each is for.

    What several keys must satisfy together, and whether files are there, is not in it.

    Args:
        model: the recipe.
        title: what an editor calls it.
    """
    found = model.model_json_schema()
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, "title": title, **{k: v for k, v in found.items() if k != "title"}}
