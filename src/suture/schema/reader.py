"""The keys of a recipe that is read by hand: paths, sections, unknown keys, faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from suture.errors import Problems, RecipeError, brief, did_you_mean
from suture.schema.paths import place_of
from suture.schema.tuning import TuneSettings
from suture.tensors.roles import DEFAULT_SPACE, ParamSpace


class Reader:
    """Reads the keys of one recipe; every fault is noted, none stops it.

    Args:
        raw: what the recipe says.
        folder: where its relative paths start, from ``recipe_folder``.
        problems: takes the faults.
    """

    def __init__(self, raw: Mapping[str, Any], folder: Path, problems: Problems) -> None:
        self.raw, self.folder, self.problems = raw, folder, problems

    def place(self, path: str) -> Path:
        """Return where a path of the recipe lies: absolute, from the folder of the recipe on."""
        return place_of(path, self.folder)

    def refuse(self, text: str) -> None:
        """Note a fault."""
        self.problems.add(RecipeError, text)


def refuse_unknown(
    raw: Mapping[Any, Any], keys: Sequence[str], where: str, problems: Problems
) -> None:
    """Note every key that is not one of ``keys``; ``where`` is empty or ends in a colon."""
    for key in raw:
        if key not in keys:
            problems.add(RecipeError, f"{where}unknown key {key!r}; {did_you_mean(str(key), keys)}")


def section(
    raw: Mapping[Any, Any], key: str, problems: Problems, where: str = ""
) -> dict[str, Any]:
    """A part of a recipe that must be a mapping; nothing where it is missing."""
    found = raw.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        problems.add(RecipeError, f"{where}{key}: a mapping, not {brief(found)}")
        return {}
    return {str(k): v for k, v in found.items()}


def read_space(
    raw: Mapping[str, Any], problems: Problems, default: ParamSpace = DEFAULT_SPACE
) -> ParamSpace:
    """The section ``space`` of a recipe: which tensors it is about."""
    given = section(raw, "space", problems)
    refuse_unknown(given, default._fields, "space: ", problems)
    found = {}
    for key, usual in default._asdict().items():
        words = given.get(key, list(usual))
        words = [words] if isinstance(words, str) else words
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            what = f"space.{key}: a list of roles or name patterns, not {brief(words)}"
            problems.add(RecipeError, what)
            words = usual
        found[key] = tuple(words)
    return ParamSpace(**found)


def read_training(
    raw: Mapping[str, Any], default: TuneSettings, problems: Problems, more: tuple[str, ...] = (),
    place: str = "training",
) -> TuneSettings:  # fmt: skip
    """The section ``training`` of a recipe.

    Args:
        raw: what stands there.
        default: what holds where nothing does.
        problems: takes every fault.
        more: keys that somebody else reads.
        place: what the section is called in messages.
    """
    names = tuple(f.name for f in fields(TuneSettings))
    refuse_unknown(raw, (*names, *more), f"{place}: ", problems)
    fine: dict[str, Any] = {}
    for key in names:
        if key not in raw:
            continue
        value, like = raw[key], getattr(default, key)
        if key == "precision" and value is False:  # YAML reads a bare `no` as false
            value = "no"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(like, str):
            right = isinstance(value, str)
        else:
            whole = isinstance(like, int)
            right = number and abs(value) < 2**63 and (not whole or value == int(value))
        if right:
            fine[key] = type(like)(value)
        else:
            kind = "a number" if isinstance(like, float) else "a whole number"
            kind = "a word" if isinstance(like, str) else kind
            kind += " below 2**63" if number and abs(value) >= 2**63 else ""
            problems.add(RecipeError, f"{place}.{key}: {kind}, not {brief(value)}")
    for key, value in [*fine.items()]:
        try:
            TuneSettings(**{key: value})
        except RecipeError as error:
            told = str(error).removeprefix(key).strip()
            problems.add(RecipeError, f"{place}.{key}: {told}")
            del fine[key]
    return replace(default, **fine)
