"""The base of every recipe and section: a frozen pydantic model whose faults are in our words.

A key is a field; what keys must satisfy together is a method marked with ``check``, which runs
whenever the keys that it reads are right::

    class Grid(Section):
        low: float = 0.0
        high: float = 1.0

        @check
        def _rising(self) -> Faults:
            if self.low >= self.high:
                yield "high", f"more than low, {self.low}; got {self.high}"
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from suture.errors import brief, did_you_mean
from suture.schema.table import Table

Faults = Iterator[tuple[str, str]]
"""Places below the section, empty for itself, and what is wrong there."""
Check = TypeVar("Check", bound=Callable[[Any], Faults])
NAMES = "names"
"""The context of ``model_dump`` in which paths are written as their last part."""


class Refused(Exception):
    """A check reads a key that is wrong itself."""


@dataclass
class Reading:
    """What reading one recipe knows besides its keys."""

    folder: Path = Path()
    """Where relative paths start."""
    parts: dict[int, tuple[object, object]] = field(default_factory=dict)
    """By the identity of what they were read from: sections and mappings, without what is wrong."""

    def keep(self, given: object, part: object) -> None:
        """Remember what could be read, for whoever contains it."""
        self.parts[id(given)] = (given, part)

    def part(self, given: object) -> object:
        """Return what could be read; ``None`` where that is nothing."""
        return self.parts.get(id(given), (None, None))[1]


def reading_of(info: ValidationInfo[Any]) -> Reading:
    """Return what the reader passes along; an empty one where a model is made by hand."""
    return info.context if isinstance(info.context, Reading) else Reading()


def check(rule: Check) -> Check:
    """Mark a method of a section that yields what is wrong with several keys together."""
    rule.is_check = True  # type: ignore[attr-defined]
    return rule


class Section(BaseModel):
    """A mapping of a recipe; keys that are no fields are refused."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False,
        defer_build=True,  # sections of a recipe are built with it, and only where it is read
    )  # fmt: skip
    short: ClassVar[str] = ""
    """The key that is meant where text stands instead of the mapping; empty: there is none."""
    short_for: ClassVar[type | tuple[type, ...]] = str
    """What may stand instead of the mapping, where that is not only text."""
    shape: ClassVar[str] = "a mapping"
    """What must stand here, for the message where something else does."""
    documents: ClassVar[type | None] = None
    """The class in which fields are documented, where it is not this one."""
    absent: ClassVar[Mapping[str, Any]] = {}
    """What stands for keys that are wrong, where not their default, so that the rest is used."""
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """What is said of keys that one may look for here, and that stand somewhere else."""
    partial: ClassVar[bool] = False
    """Whether wrong keys were left out."""
    wrong: ClassVar[frozenset[str]] = frozenset()
    """Which ones: what stands for them was likely meant, or they have no value."""

    def settled(self) -> Mapping[str, Any]:
        """Return values of keys whose defaults depend on others; called once all are right."""
        return {}

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise Refused(name)
            return super().__getattr__(name)

    @model_validator(mode="wrap")
    @classmethod
    def _read(
        cls, given: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo[Any]
    ) -> Self:
        if cls.partial or isinstance(given, cls):
            return handler(given)
        short = cls.short and isinstance(given, cls.short_for) and not isinstance(given, Mapping)
        raw = {cls.short: given} if short else given
        if not isinstance(raw, Mapping):
            raise PydanticCustomError(
                "told", "{text}", {"text": f"{cls.shape}, not {brief(given)}"}
            )
        required = {k for k, known in cls.model_fields.items() if known.is_required()}
        raw = {
            str(k): v for k, v in raw.items()
            if v is not None or not (str(k) in required or cls.may_be_empty(str(k)))
        }  # fmt: skip
        faults: list[InitErrorDetails] = []
        try:
            found = handler(raw)
        except ValidationError as error:
            wrong = _deepest(error.errors(include_url=False))
            faults = [cls._told(one) for one in wrong]
            found = cls._without({str(one["loc"][0]) for one in wrong if one["loc"]}, raw, info)
        faults += [_fault((place,) if place else (), text) for place, text in found.faults()]
        reading_of(info).keep(given, found)
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        vars(found).update(found.settled())
        return found

    @classmethod
    def may_be_empty(cls, key: str) -> bool:
        """Return whether nothing may stand after a key: then its default holds."""
        known = cls.model_fields.get(key)
        if known is None or known.is_required():
            return False
        default = known.get_default(call_default_factory=True)
        plain = isinstance(default, Section | Mapping | None) or default == ()
        return plain or is_dataclass(default) or hasattr(default, "_asdict")

    @classmethod
    def _told(cls, one: Any) -> InitErrorDetails:
        """A fault that pydantic found, in our words."""
        kind, place, ctx = one["type"], one["loc"], one.get("ctx", {})
        if kind == "told":
            return _fault(place, ctx["text"], one["input"])
        if kind == "extra_forbidden" and place[-1] in cls.elsewhere:
            return _fault(place, cls.elsewhere[place[-1]], one["input"])
        if kind == "extra_forbidden":
            hint = did_you_mean(str(place[-1]), list(cls.model_fields))
            return _fault(place[:-1], f"unknown key {str(place[-1])!r}; {hint}", one["input"])
        if kind == "missing":
            said = docstrings(cls).get(str(place[-1]), "").partition(".")[0]
            more = f"; {said[0].lower()}{said[1:]}" if said else ""
            return _fault(place, f"missing{more}", one["input"])
        given = brief(one["input"])
        if kind == "literal_error":
            known = re.findall(r"'([^']*)'", ctx["expected"])
            hint = did_you_mean(str(one["input"]), known)
            return _fault(place, f"{given} is not known; {hint}", one["input"])
        if kind == "greater_than" and ctx["gt"] == 0:
            return _fault(place, f"a positive number, not {given}", one["input"])
        words = WORDS.get(kind, one["msg"][0].lower() + one["msg"][1:])
        bounds = {k: int(v) if isinstance(v, float) and v.is_integer() else v
                  for k, v in ctx.items()}  # fmt: skip
        return _fault(place, f"{words.format(**bounds)}, not {given}", one["input"])

    @classmethod
    def _without(cls, wrong: set[str], raw: dict[str, Any], info: ValidationInfo[Any]) -> Self:
        """The section without the keys that are wrong; of wrong sections, the right part."""
        bad = wrong & cls.model_fields.keys()
        loose: Any = type(cls.__name__, (cls,), {
            "__module__": cls.__module__, "partial": True, "wrong": frozenset(bad),
            "__annotations__": dict.fromkeys(bad, Any), **dict.fromkeys(bad),
        })  # fmt: skip
        others = cls.model_config.get("extra") == "allow"
        given = {k: v for k, v in raw.items() if k not in bad and (others or k in cls.model_fields)}
        found: Self = loose.model_validate(given, context=info.context)
        for key in bad:
            part, kind = reading_of(info).part(raw.get(key)), cls.model_fields[key].annotation
            kinds = [k for k in (kind, *get_args(kind)) if isinstance(k, type)]
            if part is not None and isinstance(part, (dict, tuple, *kinds)):
                vars(found)[key] = part
            else:
                del vars(found)[key]
        return found

    def faults(self) -> Faults:
        """Yield what is wrong with several keys together; checks of wrong keys are skipped."""
        for rule in _rules(self.whole()):
            try:
                yield from rule(self)
            except Refused:
                continue

    @classmethod
    def whole(cls) -> type[Section]:
        """Return the section itself, where this is it without the keys that are wrong."""
        return next(
            k for k in cls.__mro__ if issubclass(k, Section) and not k.__dict__.get("partial")
        )

    def filled(self) -> bool:
        """Put defaults where keys are wrong; return whether all of them have one."""
        kind = self.whole()
        for key, known in kind.model_fields.items():
            value = vars(self).get(key)
            if isinstance(value, Section) and not value.filled():
                del vars(self)[key]
            elif isinstance(value, dict):
                vars(self)[key] = {
                    n: v for n, v in value.items() if not isinstance(v, Section) or v.filled()
                }
            elif type(value) is tuple:
                vars(self)[key] = tuple(
                    v for v in value if not isinstance(v, Section) or v.filled()
                )
            if key not in vars(self) and (key in self.absent or not known.is_required()):
                vars(self)[key] = self.absent.get(key, known.get_default(call_default_factory=True))
        if not kind.model_fields.keys() <= vars(self).keys():
            return False
        if type(self).partial:
            vars(self).update(self.settled())
        return True

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        found: dict[str, Any] = handler(core)
        target = handler.resolve_ref_schema(found)
        target.pop("title", None)
        for key, entry in target.get("properties", {}).items():
            entry.pop("title", None)
            said = docstrings(cls).get(key)
            if said:
                entry["description"] = said
            if cls.may_be_empty(key) and {"type": "null"} not in entry.get("anyOf", []):
                kept = {k: entry.pop(k) for k in ("description", "default") if k in entry}
                target["properties"][key] = {"anyOf": [entry, {"type": "null"}], **kept}
        if not cls.short:
            return found
        kept = {k: v for k, v in target["properties"][cls.short].items()
                if k not in ("description", "default")}  # fmt: skip
        return {"anyOf": [kept, found]}


class Recipe(Section):
    """What stands at the top of a file."""

    _folder: Path = PrivateAttr(default_factory=Path)
    _written: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def tables(cls) -> Mapping[str, Table[Any]]:
        """Return the tables of which keys name a line, whose parameters stand in ``parameters``."""
        return {}

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return self._folder

    @property
    def written(self) -> Mapping[str, Any]:
        """What was written, without defaults."""
        return self._written

    def placed(self, folder: Path, written: Mapping[str, Any]) -> Self:
        """Return the recipe after it was told what was written, and where relative paths start."""
        self._folder, self._written = folder, written
        return self

    def resolved(self) -> dict[str, Any]:
        """Return the recipe with every default, as plain data that can be read again."""
        return self.model_dump(mode="json")


WORDS = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a number",
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "too_short": "a list with {min_length} entry at least",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "says": "{says}",
}
"""What was expected, by the kinds of faults that pydantic finds."""


@cache
def _rules(kind: type[Section]) -> tuple[Callable[[Any], Faults], ...]:
    """The checks of a section."""
    found = {
        name: rule for one in kind.__mro__[::-1] for name, rule in [*vars(one).items()]
        if getattr(rule, "is_check", False)
    }  # fmt: skip
    return tuple(found.values())


def _deepest(faults: list[Any]) -> list[Any]:
    """Faults without the lists that are too short because of what is wrong in them."""
    places = [one["loc"] for one in faults]
    return [
        one for one in faults if one["type"] != "too_short"
        or not any(p[: len(one["loc"])] == one["loc"] != p for p in places)
    ]  # fmt: skip


def _fault(place: tuple[int | str, ...], text: str, given: object = None) -> InitErrorDetails:
    told = PydanticCustomError("told", "{text}", {"text": text})
    return InitErrorDetails(type=told, loc=place, input=given)


@cache
def docstrings(kind: type) -> dict[str, str]:
    """Return what stands below the fields of a class, by name; nothing where there is no source."""
    found: dict[str, str] = {}
    for one in kind.__mro__[::-1]:
        described = vars(one).get("documents")
        if described is not None:
            found |= docstrings(described)
            continue
        if one.__module__.partition(".")[0] in ("builtins", "pydantic"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(one)))
        except (OSError, TypeError):
            continue
        body = getattr(tree.body[0], "body", [])
        for key, below in pairwise(body):
            said = getattr(below.value, "value", None) if isinstance(below, ast.Expr) else None
            if isinstance(key, ast.AnnAssign) and isinstance(said, str):
                found[ast.unparse(key.target)] = " ".join(said.split())
    return found
