"""What stands in a recipe file and on which line: YAML read once, its size and depth bounded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from suture.errors import Problems, RecipeError
from suture.schema.paths import recipe_folder

RECIPE_LIMIT = 1 << 20
"""Bytes a recipe may have; sixteen times that with what was made of it, as JSON."""
NODE_LIMIT = 100_000
"""Values a recipe may have, aliases written out."""
STAGE_LIMIT = 100
"""Documents a recipe may have."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-3 is a number and a key that stands twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    own: set[Any] = set()
    for key_node, _ in node.value:
        line = f"line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{line}: a key must be a word")
        merged = key_node.tag == "tag:yaml.org,2002:merge"
        key = key_node.value if merged else loader.construct_object(key_node)
        if key in own:
            raise RecipeError(f"{line}: the key {key!r} stands twice")
        own.add(key)
    loader.flatten_mapping(node)  # `<<: *defaults`, which own keys override
    return {
        loader.construct_object(k, deep=True): loader.construct_object(v, deep=True)
        for k, v in node.value
    }


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _unfolded(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a node holds when every alias is written out."""
    if id(node) not in known:
        known[id(node)] = 0  # while it is counted, so that one that holds itself comes to an end
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [p for item in inner for p in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in parts)
    return known[id(node)]


class Lines:
    """On which line of a YAML file each part of a recipe stands, by its place.

    A place is written as messages write it: ``models[0].parameters.weight``.
    """

    def __init__(self, node: yaml.Node | None = None) -> None:
        self.known: dict[str, int] = {}
        self.words: dict[str, int] = {}
        """The lines of values: a message about a model begins with its path."""
        waiting: list[tuple[str, yaml.Node | None]] = [("", node)]
        while waiting:
            place, at = waiting.pop()
            if isinstance(at, yaml.MappingNode):
                for key, value in at.value:
                    inner = f"{place}.{key.value}" if place else str(key.value)
                    self.known.setdefault(inner, key.start_mark.line + 1)
                    waiting.append((inner, value))
            elif isinstance(at, yaml.SequenceNode):
                for number, value in enumerate(at.value):
                    inner = f"{place}[{number}]"
                    self.known.setdefault(inner, value.start_mark.line + 1)
                    waiting.append((inner, value))
            elif isinstance(at, yaml.ScalarNode):
                line = at.start_mark.line + 1
                self.words[at.value] = min(line, self.words.get(at.value, line))

    def of(self, text: str) -> int | None:
        """The line of what a message speaks of; ``None`` where that cannot be told."""
        place = _PLACE.match(text)
        where = place[1] if place else ""
        # `parameters: ties has no 'densty'` speaks of what is quoted rather than of the section.
        quoted = re.search(r"(?:key|has no|no model) '([^']*)'", text)
        word = re.search(r"\['([^']*)'\]:", text)
        for found in (word, quoted):
            if found is not None:
                inner = f"{where}.{found[1]}" if where else found[1]
                if inner in self.known:
                    return self.known[inner]
        while where and where not in self.known:
            where = _LAST.sub("", where)
        return self.known.get(where) or self.words.get(text.partition(": ")[0])

    def locate(self, text: str) -> str:
        """The message, with its line before it."""
        line = self.of(text)
        return text if line is None or text.startswith("line ") else f"line {line}: {text}"


_PLACE = re.compile(r"([\w-]+(?:\.[\w*/-]+|\[\d+\])*)(?:\['[^']*'\](?:\[\d+\])?)?: ")
_LAST = re.compile(r"(^|\.)[^.\[\]]*$|\[\d+\]$")


def text_of(source: Path, what: str = "recipe", limit: int = RECIPE_LIMIT) -> str:
    """What a file of ours says, if it is text of a size that a person may have written.

    Args:
        source: the file.
        what: it should be, for the message.
        limit: bytes that it may have.

    Raises:
        RecipeError: it cannot be read, is too large, or is no text.
    """
    try:
        if source.stat().st_size > limit:
            raise RecipeError(f"{source}: too large for a {what}")
        return source.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{source}: not a text file") from None


MAPPING = "a recipe is a mapping with keys such as base, models, method"


def raw_recipe(
    source: Path | Mapping[str, Any],
    folder: Path | None,
    problems: Problems,
    what: str = "recipe",
    shape: str = MAPPING,
) -> tuple[dict[str, Any], Path]:
    """What a recipe of any command says, and where its relative paths start.

    ``problems`` puts lines of the file before what is noted from then on; ``what`` it is and which
    ``shape`` it should have is for messages.

    Raises:
        RecipeError: the file cannot be read, or holds no YAML mapping.
    """
    if isinstance(source, Mapping):
        return dict(source), recipe_folder(source, folder)
    lines: list[Lines] = []
    raw = parse_yaml(text_of(source, what), str(source), lines, shape)
    problems.locate = lines[0].locate
    return raw, recipe_folder(source, folder)


def parse_yaml(
    text: str, where: str, lines: list[Lines] | None = None, shape: str = MAPPING
) -> dict[str, Any]:
    """Read a YAML mapping; ``lines`` takes where its parts stand, ``shape`` says what it should be.

    Raises:
        RecipeError: it is not YAML, not a mapping, or a key stands twice.
    """
    found = parse_documents(text, where, lines, shape)
    if len(found) > 1:
        raise RecipeError(f"{where}: not valid YAML: expected a single document in the stream")
    return found[0]


def parse_documents(
    text: str, where: str, lines: list[Lines] | None = None, shape: str = MAPPING
) -> list[dict[str, Any]]:
    """Read the mappings of a YAML file; ``lines`` takes where the parts of each stand.

    Raises:
        RecipeError: it is not YAML, not mappings, or a key stands twice.
    """
    found: list[Any] = []
    try:
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            if _unfolded(node, {}) > NODE_LIMIT:
                raise RecipeError("its aliases unfold to far more than a recipe holds")
            found.append(loader.construct_document(node))
            if lines is not None:
                lines.append(Lines(node))
            if len(found) > STAGE_LIMIT:
                raise RecipeError(f"more than {STAGE_LIMIT} documents")
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        deep = isinstance(error, RecursionError)
        reason = "nested too deeply" if deep else " ".join(str(error).split())
        raise RecipeError(f"{where}: not valid YAML: {reason}") from None
    found = [raw for raw in found if raw is not None] or [None]
    for raw in found:
        if not isinstance(raw, dict) or not all(isinstance(k, str) for k in raw):
            raise RecipeError(f"{where}: {shape}")
    return found
