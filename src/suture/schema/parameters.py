"""Parameters of methods, read from a signature: types, defaults, what values mean and may be.

A plain annotation is enough: ``float``, ``int``, ``bool``, ``str``, ``Literal["a", "b"]``,
``tuple[str, ...]``, ``PerModel`` or ``Scalar``; its meaning is then read from the section ``Args:``
of the docstring. ``Annotated[float, Number("share of entries", 0, 1)]`` adds bounds, and
``Annotated[float, "share of entries"]`` a meaning alone.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from suture.errors import RecipeError, brief, did_you_mean
from suture.schema.values import PerModel, Scalar

LARGEST = (2 - 2.0**-23) * 2.0**127
"""The largest finite number of float32."""


@dataclass(frozen=True)
class Meaning:
    """What a parameter means, in a sentence; subclasses say which values it may have."""

    doc: str = ""

    def problem(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        fault = self.fault(value)
        return f"{self.doc}; {fault}" if fault is not None and self.doc else fault

    def fault(self, value: object) -> str | None:
        """The same without the meaning."""
        return None


@dataclass(frozen=True)
class Choice(Meaning):
    """A few named values, or true and false: the type says which."""


@dataclass(frozen=True)
class Number(Meaning):
    """A number of float32 within bounds."""

    low: float = -math.inf
    high: float = math.inf
    positive: bool = False
    whole: bool = False

    def fault(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"{brief(value)} is not a number"
        if not abs(value) <= LARGEST:  # NaN, too, and integers that no float can hold
            return f"{brief(value)} is not a number of float32"
        if self.whole and value != int(value):
            return f"{brief(value)} is not a whole number"
        low = value <= 0 if self.positive else value < self.low
        return f"got {brief(value)}" if low or value > self.high else None


@dataclass(frozen=True)
class Text(Meaning):
    """A text: a word, a path, the name of a column."""

    empty: bool = False
    """Whether it may be empty."""

    def fault(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        fine = isinstance(value, str) and (value or self.empty)
        return None if fine else f"{brief(value)} is no text"


@dataclass(frozen=True)
class Words(Meaning):
    """A list of words."""

    choices: tuple[str, ...] = ()
    """What they may be; none given: anything."""
    single: bool = False
    """Whether one word may stand for a list of one."""
    empty: bool = True
    """Whether the list may be empty."""

    def fault(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        words = [value] if self.single and isinstance(value, str) else value
        if not isinstance(words, list | tuple) or not (words or self.empty):
            return f"not {brief(value)}"
        texts = all(isinstance(w, str) for w in words)
        if not (texts if self.single else len({str(w) for w in words}) == len(words)):
            return f"not {brief(value)}"
        wrong = next((w for w in words if self.choices and w not in self.choices), None)
        return None if wrong is None else f"{wrong!r} is none; " + did_you_mean(wrong, self.choices)


@dataclass(frozen=True)
class TextByWord(Meaning):
    """Texts, each by a word."""

    def fault(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        fine = isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values())
        return None if fine else f"not {brief(value)}"


@dataclass(frozen=True)
class Rising(Meaning):
    """Whole numbers within bounds, each larger than the one before."""

    low: int = 0
    high: int = 100

    def fault(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        numbers = value if isinstance(value, list | tuple) else []
        fine = numbers and all(
            isinstance(n, int) and not isinstance(n, bool) and self.low <= n <= self.high
            for n in numbers
        )
        return None if fine and sorted(set(numbers)) == list(numbers) else f"not {brief(value)}"


@dataclass(frozen=True)
class Tagged(Meaning):
    """A mapping with exactly one of some keys, which says what else may stand in it."""

    kinds: Mapping[str, Sequence[str]] = None  # type: ignore[assignment]
    """The keys that are allowed beside each, itself among them."""

    def fault(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        if not isinstance(value, Mapping):
            return f"not {brief(value)}"
        named = [kind for kind in self.kinds if kind in value]
        if len(named) != 1:
            return f"{len(named)} of them are named"
        allowed = self.kinds[named[0]]
        strange = next((key for key in value if key not in allowed), None)
        if strange is None:
            return None
        return f"unknown key {strange!r}; {did_you_mean(str(strange), allowed)}"


@dataclass(frozen=True)
class Files(Meaning):
    """One file a model: a folder, or a mapping by model."""

    instead: tuple[str, ...] = ()
    """Parameters that have no meaning beside it: the files decide what they would."""
    kinds: ClassVar[tuple[type, ...]] = (str, os.PathLike)
    """What may stand for a file."""

    def fault(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        fine = isinstance(value, str | os.PathLike) or (
            isinstance(value, Mapping)
            and all(isinstance(k, str) and isinstance(v, self.kinds) for k, v in value.items())
        )
        wrong = f"{brief(value)} is neither a folder nor a mapping from models to files"
        return None if fine else wrong


@dataclass(frozen=True)
class ModelName(Meaning):
    """The name of one of the recipe's models, or none."""

    def fault(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        return None if value is None or isinstance(value, str) else f"{brief(value)} is no name"


PLAIN: Mapping[Any, tuple[Meaning, str]] = {
    float: (Number(), "a number"),
    int: (Number(whole=True), "a whole number"),
    bool: (Choice(), "true or false"),
    str: (Text(empty=True), "a text"),
    tuple: (Words(single=True), "a list of words"),
    PerModel: (Number(), "a number, for all models or each, for all tensors or by pattern"),
    Scalar: (Number(), "a number, for all tensors or by pattern"),
}
"""What an annotation without a meaning allows, and says."""
ALLOWED = "float, int, bool, str, Literal[...], tuple[str, ...], PerModel or Scalar"


class Parameter:
    """One parameter of a method, read from its signature.

    Raises:
        RecipeError: its annotation is none that values of a recipe can be held against.
    """

    def __init__(self, name: str, annotation: Any, default: Any, doc: str = "") -> None:
        kind, *rest = get_args(annotation) if _is(annotation, Annotated) else (annotation,)
        meta = next((m for m in rest if isinstance(m, Meaning | str)), None)
        self.name = name
        self.required = default is inspect.Parameter.empty
        self.default = None if self.required else _plain(default)
        kinds = tuple(a for a in get_args(kind) if a is not NoneType)
        union = get_origin(kind) in (Union, UnionType)
        self.optional = len(kinds) < len(get_args(kind)) if union else False
        if union and len(kinds) == 1:
            kind = kinds[0]
        self.choices: tuple[str, ...] = get_args(kind) if _is(kind, Literal) else ()
        self.kind = kind if self.choices or kind in PLAIN else get_origin(kind) or kind
        self.meta = self._meaning(meta, doc)

    def _meaning(self, meta: Meaning | str | None, doc: str) -> Meaning:
        """The meaning of an annotation, with what its type says of the values."""
        if isinstance(meta, Meaning):
            whole = self.kind is int and isinstance(meta, Number)
            return replace(meta, whole=True) if whole else meta  # type: ignore[call-arg]
        doc = meta or doc
        if self.choices:
            return Choice(doc or "one of a few words")
        if self.kind not in PLAIN:
            said = getattr(self.kind, "__name__", str(self.kind))
            raise RecipeError(f"parameter {self.name!r} is annotated as {said}; {ALLOWED} can be "
                              "read from a recipe, and what Annotated gives a meaning")  # fmt: skip
        plain, says = PLAIN[self.kind]
        return replace(plain, doc=doc or says)

    @property
    def doc(self) -> str:
        """What it means, in a sentence."""
        return self.meta.doc

    @property
    def per_model(self) -> bool:
        """Whether each model may have a number of its own."""
        return self.kind is PerModel

    @property
    def per_tensor(self) -> bool:
        """Whether tensors may have numbers of their own."""
        return self.kind in (PerModel, Scalar)

    @property
    def files(self) -> bool:
        """Whether it names files of the models."""
        return isinstance(self.meta, Files)

    @property
    def flag(self) -> bool:
        """Whether it is true or false."""
        return self.kind is bool

    def problem(self, value: object) -> str | None:
        """What is wrong with one plain value; ``None`` when nothing is."""
        if value is None and (self.optional or (self.default is None and not self.required)):
            return None
        if self.flag and not isinstance(value, bool):
            return f"{self.doc}; {brief(value)} is not true or false"
        if self.choices and value not in self.choices:
            known = [str(c) for c in self.choices]
            hint = did_you_mean(str(value), known)
            return f"{brief(value)} is not one of {', '.join(known)}; {hint}"
        return self.meta.problem(value)

    def typed(self, value: Any) -> Any:
        """A plain value that is fine, in the type of the annotation."""
        if value is None:
            return None
        if isinstance(self.meta, Number):
            return int(value) if self.meta.whole else float(value)
        if self.kind is tuple:
            return (value,) if isinstance(value, str) else tuple(value)
        return value

    def to_dict(self) -> dict[str, Any]:
        """What listings show, as plain data."""
        scopes = {(True, True): ", for each model and tensor", (False, True): ", for each tensor"}
        return {
            "default": self.default,
            "required": self.required,
            "doc": self.doc,
            "choices": list(self.choices),
            "scope": scopes.get((self.per_model, self.per_tensor), ""),
        }


def _is(annotation: Any, form: Any) -> bool:
    """Whether an annotation is ``form[...]``."""
    return get_origin(annotation) is form


def _plain(default: Any) -> Any:
    """A default as a recipe would give it."""
    if isinstance(default, PerModel):
        return default.scalars[0].default
    return default.default if isinstance(default, Scalar) else default


@lru_cache(maxsize=1024)
def parameters_of(make: Callable[..., Any], skip: int = 0) -> Mapping[str, Parameter]:
    """The parameters of a function, by name, in the order of its signature.

    Args:
        make: the function.
        skip: leading arguments that are no parameters.

    Raises:
        RecipeError: an annotation is missing or cannot be read; the message names it.
    """
    try:
        signature = inspect.signature(make)
        hints = get_type_hints(make, include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError, ValueError) as error:
        raise RecipeError(f"its annotations cannot be read: {error}") from None
    docs = documented(make)
    parameters = {}
    for name, one in list(signature.parameters.items())[skip:]:
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD, one.POSITIONAL_ONLY):
            raise RecipeError(f"parameter {name!r} is given by keyword: no *, ** and / before it")
        if name not in hints:
            raise RecipeError(f"parameter {name!r} has no annotation; write {ALLOWED}")
        parameters[name] = Parameter(name, hints[name], one.default, docs.get(name, ""))
    return parameters


SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Examples?|Notes?):\s*$", re.MULTILINE)
ARGUMENT = re.compile(r"^ +(\w+)(?: *\([^)]*\))?: *(.+(?:\n {8,}.+)*)", re.MULTILINE)


def documented(make: Callable[..., Any]) -> dict[str, str]:
    """What the section ``Args:`` of a docstring says of each argument."""
    text = inspect.cleandoc(make.__doc__ or "")
    start = re.search(r"^Args:\s*$", text, re.MULTILINE)
    if start is None:
        return {}
    after = SECTION.split(text[start.end() :])[0]
    return {n: " ".join(said.split()).rstrip(".") for n, said in ARGUMENT.findall(after)}


def told(make: Callable[..., Any]) -> str:
    """The docstring of a function without its sections: what is computed, in Markdown."""
    text = SECTION.split(inspect.cleandoc(make.__doc__ or ""))[0].strip().replace("``", "`")
    return re.sub(r":math:`([^`]*)`", r"$\1$", text)


__all__ = [
    "Choice", "Files", "Meaning", "ModelName", "Number", "Parameter", "Rising", "Tagged", "Text",
    "TextByWord", "Words", "documented", "parameters_of", "told",
]  # fmt: skip
