"""Recipes as JSON Schema, by which editors complete and check them."""

from __future__ import annotations

from typing import Any

from suture.schema.sections import Recipe
from suture.schema.table import Line, Table


def schema_of(model: type[Recipe], title: str) -> dict[str, Any]:
    """Return the JSON Schema of a recipe: keys, types, bounds, defaults, and what each is for.

    Names of lines of a table are listed, and the parameters of each. What several keys must satisfy
    together, and whether files are there, is not in it.

    Args:
        model: the recipe.
        title: what an editor calls it.

    Examples:
        >>> from suture.verbs.finetune.recipe import Finetune
        >>> sorted(schema_of(Finetune, "Recipe of suture finetune")["required"])
        ['base', 'data', 'strategy']
    """
    found = model.model_json_schema()
    found.pop("title", None)
    for key, table in model.tables().items():
        found["properties"][key] |= {"enum": table.names()}
        found.setdefault("allOf", []).extend(
            {"if": {"properties": {key: {"const": name}}, "required": [key]},
             "then": {"properties": {"parameters": _parameters(table, name)}}}
            for name in table
        )  # fmt: skip
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, "title": title, **found}


def _parameters(table: Table[Any], name: str) -> dict[str, Any]:
    """What stands under ``parameters`` beside a line: its own, and the seed that all may have."""
    line = table[name]
    known: dict[str, Any] = {"seed": {"description": "Of what is drawn at random."}}
    for parameter in line.parameters.values() if isinstance(line, Line) else ():
        known[parameter.name] = {"description": parameter.doc}
        if parameter.choices:
            known[parameter.name]["enum"] = list(parameter.choices)
    return {"properties": known, "propertyNames": {"enum": list(known)}}
