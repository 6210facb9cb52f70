"""Where rows come from, and what their columns are called; reads none of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from suture.errors import Problems, RecipeError, brief, did_you_mean
from suture.schema.paths import place_of, shown

TOO_LONG = ("error", "cut", "drop")
"""What may be done with rows that have more tokens than can be read."""
PACKAGE = "package:"
"""Before the path of a file that an installed Python package carries; its code is not run."""


@dataclass(frozen=True)
class Source:
    """Where rows come from: a file, or a data set of the hub."""

    path: str
    split: str = ""
    """Of a hub data set."""
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class DataSpec:
    """The rows and what their columns are called."""

    train: Source
    validation: Source | None = None
    share: float = 0.1
    """Share of the training rows held out for validation, where it has no source of its own."""
    text: str = "text"
    label: str = "label"
    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    image: str = "image"
    size: int = 0
    """Pixels that images are scaled to, in both directions; 0 for what the base was made for."""
    format: str = ""
    """text, prompt or chat; found out from the columns unless given."""
    labels: tuple[str, ...] = ()
    """The labels there are, in order; by default those of the training rows, sorted."""
    label_texts: Mapping[str, str] = field(default_factory=dict)
    """What a zero-shot head reads for a label, where not its name."""
    max_length: int = 0
    """Most tokens of a row; 0 for what the model can read."""
    too_long: str = "error"
    limit: int = 0
    """Use only the first so many training rows; 0 for all."""
    chat: bool = False
    """Whether prompts and responses are put into the chat template."""


SOURCE = ("path", "split", "config", "revision")
UNREAD = DataSpec(Source(""))
"""Stands in a recipe whose rows cannot be found or read, until that is reported."""


def read_held_out(
    raw: Mapping[str, Any], where: str, default: float, folder: Path, problems: Problems
) -> tuple[Source | None, float]:
    """The key ``validation``: rows to choose by, a source of their own or a share of the others."""
    given = raw.get("validation", default)
    if not isinstance(given, int | float) or isinstance(given, bool):
        return read_source(given, where, folder, "validation", problems), default
    share = float(given)
    if not 0 <= share < 1:
        problems.add(RecipeError, f"{where}: a share is in [0, 1), not {share}")
    return None, share


def _packaged(path: str) -> Path:
    """A file of an installed package, read where it lies.

    Raises:
        RecipeError: there is no such package, or no such file in it.
    """
    name, _, rest = path.partition("/")
    spec = find_spec(name) if re.fullmatch(r"[A-Za-z_]\w*", name) else None
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(f"the package {name} is not installed; install it, or take rows "
                          "of your own")  # fmt: skip
    for place in map(Path, spec.submodule_search_locations):
        found = place / rest
        if found.is_file() and place.resolve() in found.resolve().parents:
            return found
    raise RecipeError(f"the package {name} has no file {rest}")


def read_source(
    value: object, where: str, folder: Path, split: str, problems: Problems
) -> Source | None:
    """Where rows come from: a file or a data set of the hub; ``split`` is the hub's by default."""
    raw = {"path": value} if isinstance(value, str) else value
    if not isinstance(raw, Mapping) or not isinstance(raw.get("path"), str) or not raw["path"]:
        problems.add(
            RecipeError,
            f"{where}: a file (.jsonl, .json, .csv, .parquet; of images also .npz or a folder) or "
            f"a data set of the hub, not {brief(value)}",
        )
        return None
    for key in raw.keys() - set(SOURCE):
        hint = did_you_mean(str(key), SOURCE)
        problems.add(RecipeError, f"{where}: unknown key {key!r}; {hint}")
    for key in ("split", "config", "revision"):
        if not isinstance(raw.get(key) or "", str):
            problems.add(RecipeError, f"{where}.{key}: a word, not {brief(raw[key])}")
    with problems.collecting(f"{where}: "):
        return found_at(str(raw["path"]), folder, str(raw.get("split") or split),
                        raw.get("config"), raw.get("revision"))  # fmt: skip
    return None


def found_at(
    path: str, folder: Path, split: str, config: str | None = None, revision: str | None = None
) -> Source:
    """Return the source of a path: a file of a package, a file, or a data set of the hub.

    Args:
        path: as a recipe names it.
        folder: where relative paths start.
        split: of a data set of the hub.
        config: of it, where it has several.
        revision: of it; by default the newest.

    Raises:
        RecipeError: no such file, and no name of a data set.
    """
    if path.startswith(PACKAGE):
        return Source(str(_packaged(path.removeprefix(PACKAGE))))
    local = place_of(path, folder)
    if local.exists():
        return Source(str(local))
    looks = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).suffix
    if not looks:
        raise RecipeError(f"no file {shown(local)}")
    return Source(path, split, config, revision)
