"""The types of keys that name rows or say how to train and how to answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen
from pydantic import AfterValidator, BeforeValidator, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from suture.errors import brief
from suture.schema.fields import Becomes, Column, Listed, Says, plain, section_of, told
from suture.schema.sections import Section
from suture.schema.sources import TOO_LONG, DataSpec, Source, found_at
from suture.schema.tuning import Precision, TuneSettings

FILES = ("a file (.jsonl, .json, .csv, .parquet; of images also .npz or a folder) or a data set of "
         "the hub")  # fmt: skip


class SourceKeys(Section):
    """Rows: a file, a data set of the hub, or a file of a package, as ``package:NAME/FILE``."""

    short = "path"
    shape = FILES

    path: Annotated[str, MinLen(1), Says(FILES)]
    """A file or a data set of the hub."""
    split: str = ""
    """Of a data set of the hub."""
    config: str | None = None
    """Of a data set of the hub that has several."""
    revision: str | None = None
    """Of a data set of the hub."""


def source(split: str) -> Becomes:
    """Return how a key that names rows is read.

    Args:
        split: of a data set of the hub, where the recipe names none.
    """

    def make(keys: SourceKeys, folder: Path) -> Source:
        return found_at(keys.path, folder, keys.split or split, keys.config, keys.revision)

    def data(source: Source, names: bool) -> Any:
        if names:
            return Path(source.path).name
        return {k: v for k, v in asdict(source).items() if v}

    return Becomes(SourceKeys, make, data)


def _no(value: object) -> object:
    """A bare ``no``, which YAML reads as false, as the word."""
    return "no" if value is False else value


def how_to_train(default: TuneSettings, elsewhere: str = "", **types: Any) -> Becomes:
    """Return how a section that says how to train is read.

    Args:
        default: what holds where nothing is said.
        elsewhere: where the keys are that are left out, for the message.
        **types: of keys, where not those of ``default``; ``None`` leaves one out.
    """

    def make(keys: Section, _: Path) -> TuneSettings:
        return replace(default, **keys.model_dump(exclude_unset=True))

    precision = Annotated[Precision, BeforeValidator(_no)]
    keys = section_of(type(default), precision=precision, **types)
    keys.elsewhere = {key: elsewhere for key, hint in types.items() if hint is None}
    return Becomes(keys, make, plain)


TrainRows = Annotated[Source, source("train")]
TestRows = Annotated[Source, source("test")]


@dataclass(frozen=True)
class HeldOut:
    """Rows to choose by: a source of their own, or the share of the others that is held out."""

    def __get_pydantic_core_schema__(self, kind: Any, handler: Any) -> CoreSchema:
        rows = handler.generate_schema(ValidationRows)

        def read(value: Any, inner: Any, info: ValidationInfo[Any]) -> Source | float:
            if isinstance(value, bool) or not isinstance(value, int | float):
                return inner(value)  # type: ignore[no-any-return]
            if not 0 <= value < 1:
                raise told(f"a share is in [0, 1), not {float(value)}")
            return float(value)

        share = core_schema.float_schema(ge=0, lt=1)
        return core_schema.with_info_wrap_validator_function(
            read, rows, json_schema_input_schema=core_schema.union_schema([share, rows]),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: value if isinstance(value, float) else asdict(value)
            ),
        )  # fmt: skip


ValidationRows = Annotated[Source, source("validation")]
Held = Annotated[Source | float, HeldOut()]


def _different(labels: tuple[Any, ...]) -> tuple[str, ...]:
    found = tuple(map(str, labels))
    if len({*found}) < len(found):
        raise told(f"a list of different labels, not {brief(list(labels))}")
    return found


Labels = Annotated[
    tuple[str | int | float | bool, ...], Listed(one=False, different=False),
    Says("a list of different labels"), AfterValidator(_different),
]  # fmt: skip
Texts = Annotated[
    Mapping[str, Any], BeforeValidator(
        lambda given: {str(k): str(v) for k, v in given.items()}
        if isinstance(given, Mapping) else given
    ), Says("a mapping from labels to texts"),
]  # fmt: skip
Limit = Annotated[int, Ge(0), Says("a whole number")]
COLUMNS = {
    **dict.fromkeys(("text", "label", "prompt", "response", "messages", "image"), Column),
    **dict.fromkeys(("max_length", "limit", "size"), Limit),
    "format": Literal["", "text", "prompt", "chat"],
    "too_long": Literal[TOO_LONG],
    "test": TestRows | None,
}
"""The types of keys that say what columns are called and how much of the rows is used."""


def rows_of(
    kind: type, train: str = "train", share: float = 0.1, short: str = "", **types: Any
) -> Becomes:
    """Return how a section of rows is read into ``DataSpec`` or ``PairSpec``.

    Args:
        kind: the class.
        train: the key of the rows themselves.
        share: of them, held out for validation where the recipe says nothing.
        short: the key that text stands for instead of the section.
        **types: of further keys; ``None`` leaves a field of the class out.
    """
    split = TrainRows if train == "train" else TestRows
    more = {train: (split, ...), "validation": (Held, share)}
    names = {f.name for f in fields(kind)}
    own = {
        k: v for k, v in {**COLUMNS, "train": None, "share": None, **types}.items() if k in names
    }
    keys = section_of(kind, more, **{k: v for k, v in own.items() if k in names})
    keys.short = short

    def make(given: Any, _: Path) -> Any:
        held = given.validation
        rest = {k: getattr(given, k) for k in names & type(given).model_fields.keys()}
        rest |= {"train": getattr(given, train)}
        part = {"validation": None, "share": held} if isinstance(held, float) else {"share": share}
        return kind(**{**rest, **part})

    def data(rows: Any, _: bool) -> dict[str, Any]:
        found = {f.name: getattr(rows, f.name) for f in fields(kind)}
        held, share = found.pop("validation"), found.pop("share")
        found = {train: found.pop("train"), "validation": held or share, **found}
        kept = {k: v for k, v in found.items() if k in keys.model_fields}
        return {
            k: asdict(v) if isinstance(v, Source) else list(v) if isinstance(v, tuple) else v
            for k, v in kept.items()
        }

    return Becomes(keys, make, data)


TrainingRows = rows_of(DataSpec, labels=Labels, label_texts=Texts)
"""Rows that are trained on, and rows to choose by."""
