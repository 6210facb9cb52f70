"""The types of keys that name rows or say how to train and how to answer."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen
from pydantic import BeforeValidator

from suture.schema.fields import Becomes, Says, plain, section_of
from suture.schema.sections import Section
from suture.schema.sources import Source, found_at
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


TrainingKeys = section_of(TuneSettings, precision=Annotated[Precision, BeforeValidator(_no)])


def how_to_train(default: TuneSettings) -> Becomes:
    """Return how a section that says how to train is read; ``default`` holds elsewhere."""

    def make(keys: Section, _: Path) -> TuneSettings:
        return replace(default, **keys.model_dump(exclude_unset=True))

    return Becomes(TrainingKeys, make, plain)


TrainRows = Annotated[Source, source("train")]
TestRows = Annotated[Source, source("test")]
