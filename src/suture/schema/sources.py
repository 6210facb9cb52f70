"""Where rows come from, and what their columns are called; reads none of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from suture.errors import RecipeError
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
    """The rows that are trained on."""
    validation: Source | None = None
    """Rows to choose by, where they have a source of their own."""
    share: float = 0.1
    """Share of the training rows held out for validation, where it has no source of its own."""
    text: str = "text"
    """The column of texts."""
    label: str = "label"
    """The column of labels."""
    prompt: str = "prompt"
    """The column of prompts."""
    response: str = "response"
    """The column of answers."""
    messages: str = "messages"
    """The column of chats: lists of messages with a role and a content."""
    image: str = "image"
    """The column of images."""
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
    """What is done with rows that have more tokens: error, cut or drop."""
    limit: int = 0
    """Use only the first so many training rows; 0 for all."""
    chat: bool = False
    """Whether prompts and responses are put into the chat template."""


@dataclass(frozen=True)
class PairSpec:
    """Pairs of a safe and an unsafe answer, and what their columns are called."""

    train: Source
    """The pairs that are trained on."""
    validation: Source | None = None
    """Pairs to choose by, where they have a source of their own."""
    test: Source | None = None
    """Rows for the numbers that are reported; where there are none, the validation rows."""
    share: float = 0.1
    """Share of prompts held out for validation, where it has no source of its own."""
    prompt: str = "prompt"
    """The column of prompts."""
    chosen: str = "chosen"
    """The column of safe answers."""
    rejected: str = "rejected"
    """The column of unsafe answers."""
    max_length: int = 0
    """Most tokens of prompt and answer; 0 for what the model can read."""
    too_long: str = "error"
    """What is done with rows that have more tokens: error, cut or drop."""
    limit: int = 0
    """Use only the first so many training rows; 0 for all."""
    chat: bool = False
    """Whether prompts and answers are put into the chat template."""


UNREAD = DataSpec(Source(""))
"""Stands in a recipe whose rows cannot be found or read, until that is reported."""


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
