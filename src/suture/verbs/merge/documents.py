"""Recipes: YAML read once into frozen types, every fault found before anything is opened.

Two languages are read. Suture's own has ``method`` at the top; one with ``merge_method`` is a
mergekit recipe, which ``suture.verbs.merge.mergekit`` translates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suture.errors import Problems, RecipeError, brief
from suture.runs.place import SCHEMA
from suture.schema.paths import recipe_folder
from suture.schema.read import parse
from suture.schema.text import RECIPE_LIMIT, Lines, parse_documents, text_of
from suture.verbs.merge.recipe import MergeRecipe


def read_recipe(source: Path | Mapping[str, Any], folder: Path | None = None) -> MergeRecipe:
    """Read a recipe file, the ``suture.json`` of an earlier output, or a mapping.

    Args:
        source: the file, or what stands in it.
        folder: where relative paths start; by default the file's folder or the current one.

    Raises:
        RecipeError: everything that is wrong with it, at once.
    """
    problems = Problems()
    recipe = parse_recipe(source, folder, problems)
    problems.raise_if_any()
    assert recipe is not None
    return recipe


def parse_recipe(
    source: Path | Mapping[str, Any], folder: Path | None, problems: Problems
) -> MergeRecipe | None:
    """The same, but with faults noted in ``problems``.

    A recipe with faults comes back as far as it is understood, so that its models can be looked at
    too and all that is wrong be told at once; ``None`` where there is no recipe at all.
    """
    with problems.collecting():
        if isinstance(source, Mapping):
            return _from_raw(dict(source), recipe_folder(source, folder), problems)
        return _from_file(source, recipe_folder(source, folder), problems)
    return None


def _from_file(source: Path, folder: Path, problems: Problems) -> MergeRecipe | None:
    if source.is_dir():
        raise RecipeError(f"{source}: is a folder; a recipe is a YAML file")
    text = text_of(source, limit=RECIPE_LIMIT * (16 if source.suffix == ".json" else 1))
    if source.suffix == ".json":
        return _from_provenance(text, source, folder, problems)
    lines: list[Lines] = []
    documents = parse_documents(text, str(source), lines)
    if len(documents) > 1:
        return _from_documents(documents, lines, source, folder, problems)
    problems.locate = lines[0].locate
    documents[0].pop("name", None)
    return _from_raw(documents[0], folder, problems)


def _from_documents(
    documents: list[dict[str, Any]], lines: list[Lines], source: Path, folder: Path,
    problems: Problems,
) -> MergeRecipe:  # fmt: skip
    """Several merges of one file: those with a name are stages, which others may name as models."""
    last = [n for n, raw in enumerate(documents) if "name" not in raw] or [len(documents) - 1]
    if len(last) > 1:
        begin = ", ".join(str(min(lines[n].known.values(), default=1)) for n in last)
        raise RecipeError(
            f"{source}: {len(last)} documents have no name (they begin on lines {begin}); give "
            "each but the last merge a `name`"
        )
    stages: dict[str, tuple[dict[str, Any], Lines]] = {}
    for number, raw in enumerate(documents):
        name = raw.pop("name", None)
        if number == last[0]:
            continue
        line = lines[number].known.get("name")
        if not isinstance(name, str) or not name.isprintable() or not name:
            problems.add(RecipeError, f"line {line}: name: a word, not {brief(name)}")
        elif name in stages:
            problems.add(
                RecipeError, f"line {line}: name: {name!r} is the name of another document"
            )
        else:
            stages[name] = (raw, lines[number])
    problems.locate = lines[last[0]].locate
    recipe = _from_raw(documents[last[0]], folder, problems)
    return _with_stages(recipe, stages, folder, problems)


def _with_stages(
    recipe: MergeRecipe, raw: Mapping[str, tuple[dict[str, Any], Lines]], folder: Path,
    problems: Problems,
) -> MergeRecipe:  # fmt: skip
    """The recipe with the merges that it needs first, in the order in which they can be done."""
    stages = {name: _stage(name, *one, folder, problems) for name, one in raw.items()}
    order: dict[str, MergeRecipe] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = [*path[path.index(name) :], name]
            what = f"{name} names itself" if len(circle) == 2 else " needs ".join(circle)
            line = raw[name][1].known.get("name")
            problems.add(
                RecipeError,
                f"{f'line {line}: ' if line else ''}stages: {what}; one must come first",
            )
        elif name not in order and name in stages:
            for inner in stages[name].paths:
                if inner in stages:
                    visit(inner, (*path, name))
            order[name] = stages[name]

    for path in recipe.paths:
        if path in stages:
            visit(path, ())
    unused = sorted(stages.keys() - order.keys())
    notes = [f"stage {name}: the last merge does not need it, so it is left out" for name in unused]
    return recipe.with_(stages=order, notes=(*recipe.notes, *notes))


def _stage(
    name: str, raw: dict[str, Any], lines: Lines, folder: Path, problems: Problems
) -> MergeRecipe:
    """One of the merges that come first; what is wrong with it is noted with its name."""
    own = Problems()
    own.locate = lines.locate
    recipe = MergeRecipe.model_construct(models={})
    with own.collecting():
        recipe = _from_raw(raw, folder, own)
    try:
        own.raise_if_any()
    except RecipeError as error:
        for text in getattr(error, "problems", ()):
            problems.add(RecipeError, _told(name, text))
    return recipe


def _told(stage: str, text: str) -> str:
    """A problem of a stage, with its line first and its name after that."""
    line, _, rest = text.partition(": ")
    return (
        f"{line}: stage {stage}: {rest}" if line.startswith("line ") else f"stage {stage}: {text}"
    )


def _from_provenance(
    text: str, source: Path, folder: Path, problems: Problems
) -> MergeRecipe | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("recipe"), dict):
        raise RecipeError(f"{source}: holds no recipe; give the suture.json of a merged model")
    if found.get("schema", SCHEMA) != SCHEMA:
        raise RecipeError(
            f"{source}: has the schema {found['schema']!r}, this version reads {SCHEMA}; "
            f"it was written by Suture {found.get('suture')}"
        )
    recipe = _from_raw(found["recipe"], folder, problems)
    inputs = found.get("inputs")
    prints = {
        label: entry["fingerprint"]
        for label, entry in (inputs.items() if isinstance(inputs, dict) else ())
        if isinstance(entry, dict) and isinstance(entry.get("fingerprint"), str)
    }
    labels = {*recipe.models, *(["base"] if recipe.base is not None else [])}
    for label in sorted(labels ^ prints.keys()):
        text = "no fingerprint of this input" if label in labels else "not an input of the recipe"
        problems.add(RecipeError, f"inputs.{label}: {text}; a changed recipe is written as YAML")
    return recipe.with_(fingerprints=prints)


def _from_raw(raw: dict[str, Any], folder: Path, problems: Problems) -> MergeRecipe:
    if "merge_method" in raw:
        from suture.verbs.merge.mergekit import translated

        return translated(raw, folder, problems)
    inner = raw.get("stages")
    recipe = parse(MergeRecipe, raw, folder, problems, whole=False)
    assert recipe is not None
    if not isinstance(inner, Mapping):
        return recipe
    stages = {}
    for name, stage in inner.items():
        if isinstance(stage, Mapping):
            stages[str(name)] = (dict(stage), Lines())
        else:
            problems.add(RecipeError, f"stages.{name}: a recipe, not {brief(stage)}")
    return _with_stages(recipe, stages, folder, problems)


__all__ = ["MergeRecipe", "parse_recipe", "read_recipe"]
