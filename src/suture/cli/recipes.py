"""The command about recipes themselves: their schemas."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from suture.cli.options import app, errors
from suture.cli.terminal import show_json, tell
from suture.errors import RecipeError, did_you_mean

RECIPES = {
    "analyze": ("suture.verbs.analyze.recipe", "Request"),
    "audit": ("suture.verbs.audit.recipe", "Audit"),
    "bench": ("suture.verbs.bench.recipe", "Bench"),
    "eval": ("suture.verbs.evaluate.recipe", "Suite"),
    "finetune": ("suture.verbs.finetune.recipe", "Finetune"),
    "localize": ("suture.verbs.localize.recipe", "Regions"),
    "merge": ("suture.verbs.merge.recipe", "MergeRecipe"),
    "realign": ("suture.verbs.realign.recipe", "Realign"),
}
"""Where the recipe of a command is defined."""


@app.command()
def schema(
    command: Annotated[
        str | None, typer.Argument(help="Whose recipes: see the list without it.")
    ] = None,
) -> None:
    """Print the JSON Schema of a command's recipes, by which editors complete and check them."""
    with errors(False):
        if command is None:
            for name in RECIPES:
                tell(name)
            return
        if command not in RECIPES:
            raise RecipeError(f"no schema of {command!r}; {did_you_mean(command, list(RECIPES))}")
        from suture.schema.export import schema_of

        module, name = RECIPES[command]
        show_json(schema_of(getattr(import_module(module), name), f"Recipe of suture {command}"))


__all__ = ["RECIPES", "schema"]
