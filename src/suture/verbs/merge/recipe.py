"""Recipes: YAML read once into frozen types, every fault found before anything is opened.

Two languages are read. Suture's own has ``method`` at the top; one with ``merge_method`` is a
mergekit recipe, which ``suture.verbs.merge.mergekit`` translates.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from suture.checkpoints.chat import read_chat_template
from suture.checkpoints.vocabulary import read_wanted
from suture.checkpoints.writer import SHARD_SIZE
from suture.errors import Problems, RecipeError, brief, did_you_mean
from suture.merges.base import Method
from suture.merges.policy import POLICIES, Policy
from suture.merges.presets import PRESETS, Preset
from suture.merges.protect import Protection, read_protection
from suture.merges.table import METHODS
from suture.runs.place import SCHEMA
from suture.schema.paths import place_of, recipe_folder
from suture.schema.reader import read_space, refuse_unknown, section
from suture.schema.settings import check_words, settings
from suture.schema.text import RECIPE_LIMIT, Lines, parse_documents, text_of
from suture.tensors.roles import ParamSpace
from suture.tensors.spec import PROMOTED, bytes_from, dtype_named
from suture.verbs.merge.jobs import (
    TAKEN,
    UNKNOWN,
    ModelEntry,
    Recipe,
    Slice,
    Source,
    check_slice,
    checked,
    layer_range,
    once,
    short,
)


def read_recipe(source: Path | Mapping[str, Any], folder: Path | None = None) -> Recipe:
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
) -> Recipe | None:
    """The same, but with faults noted in ``problems``.

    A recipe with faults comes back as far as it is understood, so that its models can be looked at
    too and all that is wrong be told at once; ``None`` where there is no recipe at all.
    """
    with problems.collecting():
        if isinstance(source, Mapping):
            return _from_raw(dict(source), recipe_folder(source, folder), problems)
        return _from_file(source, recipe_folder(source, folder), problems)
    return None


def _from_file(source: Path, folder: Path, problems: Problems) -> Recipe | None:
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
) -> Recipe:  # fmt: skip
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
    recipe: Recipe, raw: Mapping[str, tuple[dict[str, Any], Lines]], folder: Path,
    problems: Problems,
) -> Recipe:  # fmt: skip
    """The recipe with the merges that it needs first, in the order in which they can be done."""
    stages = {name: _stage(name, *one, folder, problems) for name, one in raw.items()}
    order: dict[str, Recipe] = {}

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
    return replace(recipe, stages=order, notes=(*recipe.notes, *notes))


def _stage(
    name: str, raw: dict[str, Any], lines: Lines, folder: Path, problems: Problems
) -> Recipe:
    """One of the merges that come first; what is wrong with it is noted with its name."""
    own = Problems()
    own.locate = lines.locate
    recipe = Recipe(UNKNOWN, {}, folder=folder)
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


def _from_provenance(text: str, source: Path, folder: Path, problems: Problems) -> Recipe | None:
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
    return replace(recipe, fingerprints=prints)


def _from_raw(raw: dict[str, Any], folder: Path, problems: Problems) -> Recipe:
    if "merge_method" in raw:
        from suture.verbs.merge.mergekit import translated

        return translated(raw, folder, problems)
    return _native(raw, problems, folder)


KEYS = (
    "base", "models", "method", "preset", "parameters", "protect", "slices", "space", "policy",
    "tokenizer", "chat_template", "output", "stages",
)  # fmt: skip


def _method_of(raw: dict[str, Any], problems: Problems) -> tuple[Method | None, Preset | None]:
    """The method that a recipe names, itself or by a preset."""
    found, chosen, name = None, None, raw.get("method")
    if raw.get("preset") is not None:
        word = str(raw["preset"])
        with problems.collecting("preset: "):
            chosen = PRESETS.likely(word)  # what was meant, for all else
            chosen = PRESETS.find(word)
        if chosen is not None and name not in (None, chosen.method):
            problems.add(
                RecipeError,
                f"method: the preset {chosen.name} is one of {chosen.method}, not of {name!r}",
            )
        name = chosen.method if chosen is not None else name
        if name is None:
            return None, None
    if not isinstance(name, str):
        what = "missing" if name is None else f"a name, not {brief(name)}"
        problems.add(RecipeError, f"method: {what}; `suture methods` lists them")
    else:
        with problems.collecting("method: "):
            found = METHODS.likely(name)  # likewise
            found = METHODS.find(name)
    return found, chosen


def _native(raw: dict[str, Any], problems: Problems, folder: Path) -> Recipe:
    refuse_unknown(raw, KEYS, "", problems)
    found, chosen = _method_of(raw, problems)
    base = raw.get("base")
    if base is not None and not isinstance(base, str):
        problems.add(RecipeError, f"base: a path or hub id, not {brief(base)}")
    models = _models(raw.get("models"), problems)
    parameters = section(raw, "parameters", problems)
    space = read_space(raw, problems)
    if chosen is not None:
        idle = {} if found is None else found.idle(parameters)
        preset_has = {k: v for k, v in chosen.parameters.items() if k not in idle}
        parameters = {**preset_has, **parameters}
        if chosen.everything and raw.get("space") is None:
            space = ParamSpace((), ())
    policy = _policy(section(raw, "policy", problems), problems)
    output = section(raw, "output", problems)
    refuse_unknown(output, ("dtype", "shard_size"), "output: ", problems)
    dtype, shard_size = None, SHARD_SIZE
    with problems.collecting():
        dtype = _dtype(output.get("dtype"))
    with problems.collecting():
        shard_size = _size(output.get("shard_size", SHARD_SIZE))
    base = base if isinstance(base, str) else None
    labels = [*models, *([] if base is None else ["base"])]
    slices = _slices(raw.get("slices"), labels, problems)
    tokenizer = read_wanted(raw.get("tokenizer"), problems, "base" if base is not None else None,
                            next(iter(models), None))  # fmt: skip
    if tokenizer is not None and policy.vocabulary != "error":
        problems.add(RecipeError, "policy.vocabulary and tokenizer: give one of them")
    template = read_chat_template(raw.get("chat_template"), problems)
    recipe = Recipe(UNKNOWN, models, base, {}, space, policy, dtype, shard_size, folder,
                    slices=slices, tokenizer=tokenizer, chat_template=template,
                    protect=_protection(raw, models, base, folder, problems))  # fmt: skip
    if found is None:
        own_words = {name: entry.parameters for name, entry in models.items()}
        check_words(METHODS.values(), parameters, problems, own_words)
    else:
        recipe = replace(recipe, method=found, parameters=_located(found, parameters, folder))
        known = found.name == raw.get("method") or (chosen and chosen.name == raw.get("preset"))
        with problems.supposing(None if known else found.name):
            _check_method(checked(recipe, problems), problems)
    inner = section(raw, "stages", problems)
    for name in [n for n, stage in inner.items() if not isinstance(stage, Mapping)]:
        problems.add(RecipeError, f"stages.{name}: a recipe, not {brief(inner.pop(name))}")
    if not inner:
        return recipe
    stages = {name: (dict(stage), Lines()) for name, stage in inner.items()}
    return _with_stages(recipe, stages, folder, problems)


def _check_method(recipe: Recipe, problems: Problems) -> None:
    """Note where slices do not go with the method of a recipe."""
    found, parameters, slices = recipe.method, recipe.parameters, recipe.slices
    given = {n for own in (parameters, *(cut.parameters for cut in slices)) for n in own}
    files = [n for n, p in found.parameters.items() if p.files and (p.required or n in given)]
    if slices and files:
        problems.add(
            RecipeError,
            f"slices: {found.name} reads files about whole models ({', '.join(files)}), whose "
            "layers would have other numbers here; merge the models whole",
        )
    for number, cut in enumerate(() if files else slices):
        where = f"slices[{number}]"
        own = [(n, s.parameters) for n, s in cut.sources.items()]
        settings(found, cut.parameters, problems, own, f"{where}.parameters",
                 f"{where}.sources.{{}}")  # fmt: skip
        check_slice(recipe, cut, where, f"`{cut.base}`", problems)


def _protection(
    raw: Mapping[str, Any], models: Mapping[str, ModelEntry], base: str | None, folder: Path,
    problems: Problems,
) -> Protection | None:  # fmt: skip
    """What one model alone may write."""
    if raw.get("protect") is not None and raw.get("slices"):
        problems.add(
            RecipeError,
            "slices: protect marks entries of whole models, whose layers would have other numbers "
            "here; merge the models whole, in a stage",
        )
    return read_protection(raw.get("protect"), models, base is not None, folder, problems)


def _located(how: Method, parameters: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The parameters with the paths of files taken from the recipe's folder on."""

    def at(path: object) -> object:
        return (
            str(place_of(os.fspath(path), folder)) if isinstance(path, str | os.PathLike) else path
        )

    found = dict(parameters)
    for name in found.keys() & {n for n, p in how.parameters.items() if p.files}:
        value = found[name]
        by_model = isinstance(value, Mapping)
        found[name] = {k: at(v) for k, v in value.items()} if by_model else at(value)
    return found


def _dtype(word: object) -> str | None:
    if word is None or word == PROMOTED:
        return PROMOTED if word else None
    try:
        return dtype_named(str(word))
    except RecipeError as error:
        raise RecipeError(f"output.dtype: {error}") from None


def _size(given: Any) -> int:
    """The bytes of a shard; a small number without a unit was meant to have one."""
    try:
        size = bytes_from(given)
    except RecipeError as error:
        raise RecipeError(f"output.shard_size: {error}") from None
    if size < 100:
        raise RecipeError(f"output.shard_size: {size} bytes; write a unit, such as {size}GB")
    return size


def _slices(raw: object, labels: Sequence[str], problems: Problems) -> tuple[Slice, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list) or not raw:
        problems.add(RecipeError, f"slices: a list of slices, with at least one, not {brief(raw)}")
        return ()
    found = []
    for number, entry in enumerate(raw):
        where = f"slices[{number}]"
        if not isinstance(entry, Mapping):
            problems.add(RecipeError, f"{where}: a mapping with sources, not {brief(entry)}")
            continue
        refuse_unknown(entry, ("sources", "parameters", "base"), f"{where}: ", problems)
        base = entry.get("base", "base")
        if "base" in entry and base not in labels:
            hint = did_you_mean(str(base), labels) if labels else "name a model"
            problems.add(RecipeError, f"{where}.base: no model {brief(base)}; {hint}")
        sources = _sources(entry.get("sources"), labels, f"{where}.sources", problems)
        shared = section(entry, "parameters", problems, f"{where}.")
        if sources:
            found.append(Slice(sources, shared, str(base)))
    used = {name for cut in found for name in cut.sources}
    for name in labels if len(found) == len(raw) else ():
        if name not in used and name != "base":
            problems.add(RecipeError, f"models.{name}: no slice has layers of it; remove it")
    return tuple(found)


def _sources(
    raw: object, labels: Sequence[str], where: str, problems: Problems
) -> dict[str, Source]:
    if not isinstance(raw, Mapping) or not raw:
        problems.add(
            RecipeError, f"{where}: a mapping from models to layers, such as {{math: [0, 16]}}"
        )
        return {}
    found = {}
    for key, entry in raw.items():
        name, place = str(key), f"{where}.{key}"
        if name not in labels:
            hint = did_you_mean(name, labels) if labels else "name a model"
            problems.add(RecipeError, f"{where}: no model {name!r}; {hint}")
        entry = entry if isinstance(entry, Mapping) else {"layers": entry}
        if "layers" not in entry:
            problems.add(RecipeError, f"{place}: no layers; write `layers: [0, 16]`")
            continue
        layers = layer_range(entry["layers"], f"{place}.layers", problems)
        own = {str(k): v for k, v in entry.items() if k != "layers"}
        if layers is not None:
            found[name] = Source(layers, own, f"{place}.layers")
    return found


def _models(raw: object, problems: Problems) -> dict[str, ModelEntry]:
    if isinstance(raw, list) and all(isinstance(m, str) for m in raw):
        once(raw, problems)
        raw = {short(path, raw): path for path in raw}
    if not isinstance(raw, Mapping) or not raw:
        problems.add(RecipeError, "models: a mapping from names to paths, with at least one model")
        return {}
    found = {}
    for name, entry in raw.items():
        if not isinstance(name, str | int) or isinstance(name, bool):  # YAML reads `no` as false
            problems.add(RecipeError, f"models: {name!r} is no name; put it in quotes")
            continue
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            problems.add(
                RecipeError, f"models.{name}: a path, or a mapping with a path, not {brief(entry)}"
            )
            continue
        if str(name) in found or str(name) in TAKEN or not str(name).isprintable():
            problems.add(RecipeError, f"models: {name!r} cannot be the name of a model")
        own = {str(k): v for k, v in entry.items() if k not in ("path", "adapter")}
        adapters = entry.get("adapter", [])
        adapters = [adapters] if isinstance(adapters, str) else adapters
        if not isinstance(adapters, list) or not all(a and isinstance(a, str) for a in adapters):
            problems.add(
                RecipeError, f"models.{name}.adapter: a path, or a list of them, not "
                f"{brief(entry['adapter'])}"
            )  # fmt: skip
            adapters = []
        found[str(name)] = ModelEntry("+".join([entry["path"], *adapters]), own)
    return found


def _policy(raw: dict[str, Any], problems: Problems) -> Policy:
    refuse_unknown(raw, list(POLICIES), "policy: ", problems)
    for key, choices in POLICIES.items():
        if key in raw and raw[key] not in choices:
            hint = did_you_mean(str(raw[key]), choices)
            problems.add(RecipeError, f"policy.{key}: {brief(raw[key])} is not known; {hint}")
    return Policy(**{k: v for k, v in raw.items() if k in POLICIES and v in POLICIES[k]})
