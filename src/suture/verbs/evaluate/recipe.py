"""What to ask of a model: the recipe of a suite."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from annotated_types import MinLen
from pydantic import ConfigDict

from suture.errors import Problems, RecipeError, did_you_mean
from suture.evals.decoding import Decoding
from suture.schema.fields import Count, Listed, ModelPath, NamedEntries, Number, Says
from suture.schema.read import read
from suture.schema.rows import TestRows
from suture.schema.sections import Faults, Recipe, Section, check
from suture.schema.settings import settings
from suture.schema.sources import Source

if TYPE_CHECKING:
    from suture.evals.kinds import Kind
    from suture.schema.table import Table

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
SHAPE = "a suite is a mapping with keys such as name, evaluations, decoding"
NAME = re.compile(r"[A-Za-z_]\w*(?:-[A-Za-z]\w*)*")
"""What an evaluation may be called: a name that a gate can write."""
TAKEN = ("utility", "base", "expert")


def _table() -> Table[Kind] | None:
    """The kinds of evaluations; ``None`` where the framework that they need is not installed."""
    try:
        from suture.evals.table import EVALS
    except ImportError as error:
        if error.name not in ("torch", "transformers"):
            raise
        return None
    return EVALS


@dataclass(frozen=True)
class Question:
    """One evaluation of a suite."""

    name: str
    kind: str
    """A line of ``EVALS``."""
    options: Mapping[str, Any]
    data: Source
    decoding: Decoding = field(default_factory=Decoding)
    limit: int = 0
    """Only the first so many rows; 0 for all."""
    category: str = ""
    """The column of categories; each gets metrics of its own."""
    language: str = ""
    utility: bool = False
    batch: int = 8
    max_length: int = 0
    """Most tokens of a row; 0 for what the model can read."""
    too_long: str = "error"

    @property
    def line(self) -> Kind:
        """The line of the table."""
        from suture.evals.table import EVALS

        return EVALS[self.kind]


class DecodingKeys(Section):
    """How answers are generated: always the likeliest token."""

    documents = Decoding

    max_tokens: Count = 64
    stop: Annotated[
        tuple[Annotated[str, MinLen(1)], ...], Listed(),
        Says("a text that ends an answer, or a list"),
    ] = ()  # fmt: skip
    chat: bool = False
    system: str = ""

    def over(self, default: Decoding) -> Decoding:
        """Return what is said here, and ``default`` for the rest."""
        return replace(default, **{key: getattr(self, key) for key in self.model_fields_set})


class Evaluation(Section):
    """What is asked; keys besides these are options of the kind."""

    model_config = ConfigDict(extra="allow")
    shape = "a mapping with kind and data"

    kind: Annotated[str, Says("the name of an evaluation")]
    """What is asked: a line of the table of evaluations."""
    data: TestRows
    """The rows that are asked about."""
    limit: Number = 0
    """Only the first so many rows; 0 for all."""
    category: Annotated[str, Says("the name of a column")] = ""
    """The column of categories; each gets metrics of its own."""
    language: Annotated[str, Says("the name of a column")] = ""
    """The column of languages; each gets metrics of its own."""
    utility: bool = False
    """Whether it is about what a model is for, and no safety."""
    batch: Count = 8
    """Rows that go through the model together."""
    decoding: DecodingKeys = DecodingKeys()
    max_length: Number = 0
    """Most tokens of a row; 0 for what the model can read."""
    too_long: Literal["error", "cut", "drop"] = "error"
    """What is done with longer rows."""

    @check
    def _kind_has_its_options(self) -> Faults:
        table = _table()
        if table is None:
            return
        try:
            known, given = table.find(self.kind).parameters, self.model_extra or {}
        except RecipeError as error:
            yield "kind", str(error)
            return
        words = [*type(self).model_fields, *known]
        for key in given.keys() - known.keys():
            yield "", f"unknown key {key!r}; {did_you_mean(key, words)}"
        for text in self.options()[1]:
            place, _, what = text.partition(": ")
            yield place.removeprefix("."), what

    def options(self) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
        """Return the options of the kind with every default, and what is wrong with them."""
        table, problems = _table(), Problems()
        if table is None or self.kind not in table:
            return None, ()
        line, extra = table[self.kind], self.model_extra or {}
        given = {k: v for k, v in extra.items() if k in line.parameters}
        values = settings(line, given, problems, shared="")
        found = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        wrong: tuple[str, ...] = ()
        try:
            problems.raise_if_any()
        except RecipeError as error:
            wrong = tuple(getattr(error, "problems", (str(error),)))
        return (found if found.keys() == line.parameters.keys() else None), wrong

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        found = super().__get_pydantic_json_schema__(core, handler)
        table: Mapping[str, Kind] = _table() or {}
        target = handler.resolve_ref_schema(found)
        target["properties"]["kind"]["enum"] = list(table)
        for line in table.values():
            for name, option in line.parameters.items():
                target["properties"].setdefault(name, {"description": option.doc})
        target["additionalProperties"] = not table
        return found


class Suite(Recipe):
    """A suite: what models are asked, key by key."""

    absent = {"evaluations": {}}

    name: Annotated[str, Says("a word for the names of files")] = "suite"
    """A word for the names of files; by default that of the suite's own."""
    evaluations: Annotated[Mapping[str, Evaluation], NamedEntries(
        NAME.pattern,
        f"is no name: a name is a word that rules can use, and none of {', '.join(TAKEN)}",
        "a mapping from names to what is asked, with at least one", taken=TAKEN, least=1,
    )]  # fmt: skip
    """A mapping from names to what is asked, with at least one; rules use the names."""
    decoding: DecodingKeys = DecodingKeys()
    reference: Annotated[ModelPath, Says("a model, a path or hub id")] | None = None
    """A model to compare with, for the kinds that need one."""
    dtype: Dtype = "float32"
    """In which language models are loaded and asked."""

    @property
    def questions(self) -> tuple[Question, ...]:
        """What is asked, without what is wrong: rows are not read by options that are."""
        default, found = self.decoding.over(Decoding()), []
        for name, one in self.evaluations.items():
            options, wrong = one.options()
            if options is not None and not wrong:
                found.append(Question(
                    name, one.kind, options, one.data, one.decoding.over(default), one.limit,
                    one.category, one.language, one.utility, one.batch, one.max_length,
                    one.too_long,
                ))  # fmt: skip
        return tuple(found)

    @check
    def _name_of_files(self) -> Faults:
        if not re.fullmatch(r"[\w.-]+", self.name):
            yield "name", f"a word for the names of files, not {self.name!r}"

    @check
    def _systems_belong_to_chats(self) -> Faults:
        default = self.decoding.over(Decoding())
        asked = {"decoding": default} | {
            f"evaluations.{name}.decoding": one.decoding.over(default)
            for name, one in self.evaluations.items()
            if one.decoding.model_fields_set
        }
        for place, decoding in asked.items():
            if decoding.system and not decoding.chat:
                yield f"{place}.system", "belongs to a chat; say `chat: true`"

    @check
    def _references_are_there(self) -> Faults:
        for one in self.questions if self.reference is None else ():
            if one.line.reference:
                what = f"{one.kind} needs a `reference` at the top of the suite"
                yield f"evaluations.{one.name}", f"{what}: the model to compare with"

    @check
    def _dtype_is_of_language_models(self) -> Faults:
        if self.dtype == DTYPES[0] or _table() is None:
            return
        if not any(one.line.needs == "language-model" for one in self.questions):
            yield "dtype", f"only language models are asked in {self.dtype}, and none is asked here"


def read_suite(
    source: Path | Mapping[str, Any], problems: Problems, folder: Path | None = None
) -> Suite | None:
    """Read a suite file, or a mapping; faults are noted, ``None`` where there is nothing to go on.

    ``problems`` puts lines before what is noted from then on.
    """
    found = read(Suite, source, problems, folder, what="suite", shape=SHAPE, whole=False)
    if found is None or "name" in found.model_fields_set or isinstance(source, Mapping):
        return found
    return found.model_copy(update={"name": source.stem})
