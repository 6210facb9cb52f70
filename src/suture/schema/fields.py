"""The types of keys in recipes: what they accept, and how a message says what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BeforeValidator, PlainSerializer, ValidationError, ValidationInfo, create_model
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from suture.errors import RecipeError, brief, did_you_mean
from suture.schema.paths import place_of, shown
from suture.schema.sections import NAMES, Section, reading_of
from suture.schema.table import Table
from suture.tensors.roles import DEFAULT_SPACE, ParamSpace
from suture.tensors.spec import WORD_OF, dtype_named

T = TypeVar("T")


@dataclass(frozen=True)
class Says:
    """What a value must be, for the message where it is something else."""

    text: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.custom_error_schema(
            handler(source), custom_error_type="says", custom_error_message="{says}",
            custom_error_context={"says": self.text},
        )  # fmt: skip


@dataclass(frozen=True)
class Listed:
    """A list, which becomes a tuple; or one value, which is a list of one."""

    one: bool = True
    """Whether a single value may stand without brackets."""
    different: bool = True
    """Whether a value that stands twice is kept once."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        def spread(value: Any) -> Any:
            if isinstance(value, list):
                return tuple(value)
            single = self.one and isinstance(value, str | int | float)
            return (value,) if single else value

        def read(given: Any, inner: Any, info: ValidationInfo[Any]) -> Any:
            try:
                return inner(spread(given))
            except ValidationError:
                parts = [reading_of(info).part(v) for v in given] if isinstance(given, list) else []
                sections = tuple(part for part in parts if isinstance(part, Section))
                if sections:
                    reading_of(info).keep(given, sections)
                raise

        inner = core_schema.with_info_wrap_validator_function(read, handler(source))
        if not self.different:
            return inner
        return core_schema.no_info_after_validator_function(
            lambda values: tuple(dict.fromkeys(values)), inner
        )

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        found: dict[str, Any] = handler(core)
        return {"anyOf": [found["items"], found]} if self.one else found


@dataclass(frozen=True)
class NamedEntries:
    """A mapping from names to entries; a list of names where ``listed``."""

    pattern: str
    says: str
    """What is wrong with another name."""
    what: str
    """What must stand here."""
    listed: bool = False
    taken: tuple[str, ...] = ()
    least: int = 0

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.with_info_wrap_validator_function(self._read, handler(source))

    def _read(self, given: Any, handler: Any, info: ValidationInfo[Any]) -> Any:
        value = given
        if self.listed and isinstance(given, list):
            if len({str(name) for name in given}) < len(given):
                raise told(f"different names, not {brief(given)}")
            value = {str(name): {} for name in given}
        if not isinstance(value, Mapping) or len(value) < self.least:
            raise told(f"{self.what}, not {brief(value)}")
        entries = {n: {} if v is None and self.listed else v for n, v in value.items()}
        faults = []
        right: dict[str, Any] = {}
        for name, entry in entries.items():
            if self._fits(name) and str(name) not in right:
                right[str(name)] = entry
                continue
            says = (
                "is no name; put it in quotes"
                if isinstance(name, bool) or name is None
                else self.says
            )
            faults.append(InitErrorDetails(type=told(f"{brief(name)} {says}"), loc=(), input=name))
        try:
            found = handler(right)
        except ValidationError as error:
            wrong = error.errors(include_url=False)
            faults += [
                InitErrorDetails(
                    type=PydanticCustomError(one["type"], one["msg"], one.get("ctx")),
                    loc=one["loc"], input=one["input"],
                ) for one in wrong
            ]  # fmt: skip
            bad = {one["loc"][0] for one in wrong}
            found = handler({n: v for n, v in right.items() if n not in bad})
            parts = {n: reading_of(info).part(right.get(str(n))) for n in bad}
            found |= {n: part for n, part in parts.items() if isinstance(part, Section)}
        reading_of(info).keep(given, dict(found))
        if faults:
            raise ValidationError.from_exception_data("names", faults)
        return found

    def _fits(self, name: object) -> bool:
        if isinstance(name, bool) or name is None or name in self.taken:  # YAML reads `no` as false
            return False
        return str(name).isprintable() and re.fullmatch(self.pattern, str(name)) is not None

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        found: dict[str, Any] = handler(core)
        found |= {"minProperties": self.least} if self.least else {}
        found["propertyNames"] = {"pattern": f"^(?:{self.pattern})$"}
        if self.taken:
            found["propertyNames"]["not"] = {"enum": list(self.taken)}
        if self.listed:
            entry = found.get("additionalProperties", {})
            found["additionalProperties"] = {"anyOf": [entry, {"type": "null"}]}
        names = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
        return {"anyOf": [found, {**names, "minItems": self.least}]} if self.listed else found


@dataclass(frozen=True)
class Becomes:
    """A section that is read into a value of another type.

    Args:
        section: the keys.
        make: the value, of the section and the folder where relative paths start; it may raise
            ``RecipeError``.
        plain: the value as data that can be read again; ``True`` asks for names instead of paths.
    """

    section: type[Section]
    make: Callable[[Any, Path], Any]
    plain: Callable[[Any, bool], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        def read(value: Any, inner: Any, info: ValidationInfo[Any]) -> Any:
            if isinstance(value, source):
                return value
            try:
                return self.make(inner(value), reading_of(info).folder)
            except RecipeError as error:
                raise told(str(error)) from None

        return core_schema.with_info_wrap_validator_function(
            read, handler.generate_schema(self.section),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value, info: self.plain(value, info.context == NAMES), info_arg=True
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class EachModel:
    """One value for all models, or a mapping from models to values.

    Args:
        item: the type of values.
        what: must stand here.
    """

    item: Any
    what: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        item = handler.generate_schema(self.item)
        each = core_schema.dict_schema(core_schema.str_schema(), item)
        return core_schema.no_info_wrap_validator_function(
            self._read, each, json_schema_input_schema=core_schema.union_schema([item, each])
        )

    def _read(self, value: Any, handler: Any) -> Any:
        if isinstance(value, Mapping):
            return handler({str(k): v for k, v in value.items()})
        try:
            return handler({"": value})[""]
        except ValidationError:
            raise told(f"{self.what}, not {brief(value)}") from None


@dataclass(frozen=True)
class Placed:
    """A path, taken from the recipe's folder on."""

    what: str = "a file"

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        def read(value: Any, info: ValidationInfo[Any]) -> Path:
            if isinstance(value, str) and value:
                return place_of(value, reading_of(info).folder)
            if isinstance(value, Path):
                return value
            raise told(f"{self.what}, not {brief(value)}")

        return core_schema.with_info_plain_validator_function(
            read, json_schema_input_schema=core_schema.str_schema(min_length=1),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda path, info: path.name if info.context == NAMES else str(path), info_arg=True
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class WordOrFile:
    """One of some words, or a file that is there, as the recipe writes it.

    Args:
        words: that mean something else than a file.
        what: the file is.
        folder: it is one, and no file.
    """

    words: tuple[str, ...]
    what: str
    folder: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        def read(value: Any, info: ValidationInfo[Any]) -> str:
            if not isinstance(value, str) or not value:
                raise told(f"{', '.join(self.words)} or {self.what}, not {brief(value)}")
            place = place_of(value, reading_of(info).folder)
            is_there, kind = (
                (place.is_dir(), "folder") if self.folder else (place.is_file(), "file")
            )
            if value not in self.words and not is_there:
                raise told(f"no {kind} {shown(place)}; {did_you_mean(value, self.words)}")
            return value

        return core_schema.with_info_plain_validator_function(
            read, json_schema_input_schema=core_schema.str_schema(min_length=1)
        )


def _dtype(value: Any) -> Any:
    try:
        return dtype_named(str(value))
    except RecipeError as error:
        raise told(str(error)) from None


DtypeName = Annotated[str, BeforeValidator(_dtype), PlainSerializer(WORD_OF.__getitem__)]
"""A dtype by any of its names, as the one of safetensors."""


@dataclass(frozen=True)
class ReadAs:
    """A value that is read into another.

    Args:
        make: the other, of the value and the folder where relative paths start; what it refuses
            with a ``RecipeError`` is a fault of the key.
        plain: the other as data that can be read again.
        like: the type that editors accept.
    """

    make: Callable[[Any, Path], Any]
    plain: Callable[[Any], Any] = str
    like: Any = str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        def read(value: Any, info: ValidationInfo[Any]) -> Any:
            try:
                return self.make(value, reading_of(info).folder)
            except RecipeError as error:
                raise told(str(error)) from None

        return core_schema.with_info_plain_validator_function(
            read, json_schema_input_schema=handler.generate_schema(self.like),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: None if value is None else self.plain(value)
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class LineOf:
    """A line of a table by its name; one that is misspelt counts as what is likely meant."""

    table: Callable[[], Table[Any]]
    """Gives the table, which some can import only where a framework is installed."""
    lists: str = ""
    """What lists the names, for the message."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._read, serialization=core_schema.plain_serializer_function_ser_schema(
                lambda line: None if line is None else line.name
            ),
        )  # fmt: skip

    def _read(self, name: Any, info: ValidationInfo[Any]) -> Any:
        if isinstance(name, self.table().kind):
            return name
        if not isinstance(name, str):
            more = f"; {self.lists}" if self.lists else ""
            raise told(f"a name, not {brief(name)}{more}")
        try:
            return self.table().find(name)
        except RecipeError as error:
            reading_of(info).keep(name, self.table().likely(name))
            raise told(str(error)) from None

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "enum": self.table().names()}


def told(text: str) -> PydanticCustomError:
    """Return a fault with its message, to be raised in a validator."""
    return PydanticCustomError("told", "{text}", {"text": text})


def _whole(value: object) -> object:
    """A number such as 1e3 as the whole number that it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integral = BeforeValidator(_whole)


def section_of(kind: type, more: Mapping[str, Any] | None = None, **types: Any) -> type[Section]:
    """Return the section whose keys are the fields of a dataclass, with their annotated bounds.

    Args:
        kind: the dataclass.
        more: types and defaults of keys besides.
        **types: of fields, where not those of the dataclass; ``None`` leaves one out.
    """
    assert is_dataclass(kind)
    hints = get_type_hints(kind, include_extras=True)
    keys: dict[str, Any] = dict(more or {})
    for f in fields(kind):
        hint = types.get(f.name, hints[f.name])
        if hint is None:
            continue
        plain = getattr(hint, "__origin__", hint)
        hint = Annotated[hint, Lt(1 << 63)] if plain in (int, float) else hint
        hint = Annotated[hint, Integral] if plain is int else hint
        default = f.default if f.default_factory is MISSING else f.default_factory()
        keys.setdefault(f.name, (hint, ... if default is MISSING else default))
    found = create_model(f"{kind.__name__}Keys", __base__=Section, **keys)
    found.documents = kind
    return found


def _by_word(value: object) -> object:
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value


ByWord = BeforeValidator(_by_word)
"""Reads the keys of a mapping as words."""
Parameters = Annotated[dict[str, Any], ByWord]
"""Parameters of a method, which ``settings`` holds against its signature."""
Number = Annotated[int, Ge(0), Lt(1 << 31), Says("a whole number from 0")]
Count = Annotated[int, Ge(1), Lt(1 << 31), Says("a whole number from 1")]
Word = Annotated[str, MinLen(1), Says("a word")]
Column = Annotated[str, MinLen(1), Says("the name of a column")]
Share = Annotated[float, Gt(0), Le(1), Says("a share of the entries, in (0, 1]")]
Seed = Annotated[int, Ge(0), Lt(1 << 63), Says("a whole number from 0 to 2**63 - 1")]
ModelPath = Annotated[
    str, MinLen(1), Says("a path or hub id"),
    PlainSerializer(lambda path, info: Path(path).name if info.context == NAMES else path),
]  # fmt: skip
"""A model as ``opening.open_model`` takes it, which resolves it against the recipe's folder."""


Numbers = Annotated[
    tuple[float, ...], Listed(one=False, different=False), Says("a list of numbers")
]
FilePath = Annotated[Path, Placed()]
Factors = Annotated[
    Mapping[str, float] | float,
    EachModel(Annotated[float, Says("a number")], "a number, or one for each model"),
]
Files = Annotated[
    Mapping[str, Path] | Path, EachModel(Annotated[Path, Placed()], "a file, or one for each model")
]


class ModelKeys(Section):
    """A model."""

    short = "path"
    shape = "a path or hub id"

    path: ModelPath
    """A folder, a file, a hub id, or BASE+ADAPTER."""


Opened = Annotated[str, Becomes(
    ModelKeys, lambda keys, _: keys.path, lambda path, names: Path(path).name if names else path
)]  # fmt: skip
_NAME = (".+", "cannot be the name of a model")
Models = Annotated[Mapping[str, Opened], NamedEntries(
    *_NAME, "a mapping from names to paths, with at least one model", taken=("base", ""), least=1
)]  # fmt: skip
"""Models by name, as ``opening.open_model`` takes them."""
OtherModels = Annotated[Mapping[str, Opened], NamedEntries(
    *_NAME, "a mapping from names to paths", taken=("base", "")
)]  # fmt: skip
"""The same, or none."""


class SpaceKeys(Section):
    """Which tensors are looked at or changed."""

    include: Annotated[tuple[str, ...], Listed(), Says("a list of roles or name patterns")] = ()
    """Roles or name patterns; empty for all."""
    exclude: Annotated[tuple[str, ...], Listed(), Says("a list of roles or name patterns")] = (
        DEFAULT_SPACE.exclude
    )
    """Roles or name patterns that are left alone."""


def space_of(default: ParamSpace) -> Becomes:
    """Return how a section that names tensors is read; ``default`` holds for keys without words."""
    keys = create_model("SpaceKeys", __base__=SpaceKeys, **{  # type: ignore[call-overload]
        key: (known.rebuild_annotation(), getattr(default, key))
        for key, known in SpaceKeys.model_fields.items()
    })  # fmt: skip
    return Becomes(
        keys, lambda keys, _: ParamSpace(keys.include, keys.exclude),
        lambda space, _: {k: list(v) for k, v in space._asdict().items()},
    )  # fmt: skip


Space = Annotated[ParamSpace, space_of(DEFAULT_SPACE)]


def plain(value: Any, _: bool) -> dict[str, Any]:
    """Return a dataclass as data."""
    return asdict(value)
