"""What to ask of a model: a suite in YAML to frozen types, all faults at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suture.errors import Problems, brief, did_you_mean
from suture.evals.decoding import Decoding
from suture.evals.kinds import Kind
from suture.evals.table import EVALS
from suture.recipe_types import Reader, refuse_unknown, section
from suture.schema.text import raw_recipe
from suture.sources import TOO_LONG, Source, read_source

KEYS = ("name", "evaluations", "decoding", "reference", "dtype")
DTYPES = ("float32", "bfloat16", "float16")
SHAPE = "a suite is a mapping with keys such as name, evaluations, decoding"
COMMON = ("kind", "data", "limit", "category", "language", "utility", "batch", "decoding",
          "max_length", "too_long")  # fmt: skip
"""Keys that every evaluation has; the others are options of its kind."""
NAME = re.compile(r"[A-Za-z_]\w*(?:-[A-Za-z]\w*)*")
"""What an evaluation may be called: a name that a gate can write."""
TAKEN = ("utility", "base", "expert")


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
        return EVALS[self.kind]


@dataclass(frozen=True)
class Suite:
    """What is asked, as data: after ``read_suite`` every key is known and every value checked."""

    name: str
    questions: tuple[Question, ...]
    folder: Path
    """Where relative paths start."""
    reference: str | None = None
    """A model to compare with, for the kinds that need one."""
    dtype: str = DTYPES[0]
    """In which language models are loaded and asked."""
    locate: Callable[[str], str] = field(default=str, compare=False)
    """Puts before a problem on which line it stands."""


def read_suite(
    source: Path | Mapping[str, Any], problems: Problems, folder: Path | None = None
) -> Suite | None:
    """Read a suite file, or a mapping; faults are noted, ``None`` where there is nothing to go on.

    ``problems`` puts lines before what is noted from then on.
    """
    with problems.collecting():
        name = "suite" if isinstance(source, Mapping) else source.stem
        raw, where = raw_recipe(source, folder, problems, "suite", SHAPE)
        return _Reader(raw, where, problems).suite(name, problems.locate)
    return None


class _Reader(Reader):
    """Reads one suite; every fault is noted."""

    def suite(self, stem: str, locate: Callable[[str], str]) -> Suite:
        folder = self.folder
        refuse_unknown(self.raw, KEYS, "", self.problems)
        name, reference = self.raw.get("name", stem), self.raw.get("reference")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            self.refuse(f"name: a word for the names of files, not {brief(name)}")
            name = stem
        if reference is not None and not isinstance(reference, str):
            self.refuse(f"reference: a model, a path or hub id, not {brief(reference)}")
            reference = None
        decoding = self.decoding(self.raw, Decoding(), "")
        entries = section(self.raw, "evaluations", self.problems)
        if not entries and isinstance(self.raw.get("evaluations") or {}, Mapping):
            self.refuse("evaluations: a mapping from names to what is asked, with at least one")
        found = [self.question(n, e, folder, decoding) for n, e in entries.items()]
        questions = tuple(q for q in found if q is not None)
        for question in questions:
            if question.line.reference and reference is None:
                self.refuse(f"evaluations.{question.name}: {question.kind} needs a `reference` "
                            "at the top of the suite: the model to compare with")  # fmt: skip
        dtype = self.raw.get("dtype", DTYPES[0])
        if dtype not in DTYPES:
            self.refuse(f"dtype: {brief(dtype)} is not known; {did_you_mean(str(dtype), DTYPES)}")
        elif dtype != DTYPES[0] and not any(q.line.needs == "language-model" for q in questions):
            self.refuse(f"dtype: only language models are asked in {dtype}, and none is asked here")
        return Suite(name, questions, folder, reference, str(dtype), locate)

    def question(self, name: str, raw: object, folder: Path, decoding: Decoding) -> Question | None:
        where = f"evaluations.{name}"
        if not NAME.fullmatch(name) or name in TAKEN:
            self.refuse(f"{where}: a name is a word that rules can use, and none of "
                        f"{', '.join(TAKEN)}")  # fmt: skip
        if not isinstance(raw, Mapping):
            self.refuse(f"{where}: a mapping with kind and data, not {brief(raw)}")
            return None
        kind = raw.get("kind")
        data = read_source(raw.get("data"), f"{where}.data", folder, "test", self.problems)
        if not isinstance(kind, str) or kind not in EVALS:
            self.refuse(f"{where}.kind: {brief(kind)} is no evaluation; "
                        f"{did_you_mean(str(kind), list(EVALS))}")  # fmt: skip
            return None
        line = EVALS[kind]
        refuse_unknown(raw, (*COMMON, *line.options), f"{where}: ", self.problems)
        options = line.settings(
            {k: v for k, v in raw.items() if k not in COMMON}, where, self.problems
        )
        too_long = raw.get("too_long", "error")
        if too_long not in TOO_LONG:
            hint = did_you_mean(str(too_long), TOO_LONG)
            self.refuse(f"{where}.too_long: {brief(too_long)} is not known; {hint}")
        utility = raw.get("utility", False)
        if not isinstance(utility, bool):
            self.refuse(f"{where}.utility: true or false, not {brief(utility)}")
        given: dict[str, Any] = {
            "limit": self.whole(raw, "limit", where, 0, 0),
            "max_length": self.whole(raw, "max_length", where, 0, 0),
            "batch": self.whole(raw, "batch", where, 8, 1),
            "category": self.word(raw, "category", where),
            "language": self.word(raw, "language", where),
            "decoding": self.decoding(raw, decoding, f"{where}."),
        }
        if data is None or options.keys() != line.options.keys():
            return None  # rows are not read by options that are wrong
        return Question(name, kind, options, data, utility=bool(utility), too_long=str(too_long),
                        **given)  # fmt: skip

    def decoding(self, raw: Mapping[str, Any], default: Decoding, where: str) -> Decoding:
        found = section(raw, "decoding", self.problems, where)
        where = f"{where}decoding"
        refuse_unknown(found, ("max_tokens", "stop", "chat", "system"), f"{where}: ", self.problems)
        stop, chat = found.get("stop", default.stop), found.get("chat", default.chat)
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
            self.refuse(f"{where}.stop: a text that ends an answer, or a list, not {brief(stop)}")
            stop = ()
        if not isinstance(chat, bool):
            self.refuse(f"{where}.chat: true or false, not {brief(chat)}")
        system = found.get("system", default.system)
        if not isinstance(system, str):
            self.refuse(f"{where}.system: text, not {brief(system)}")
        elif system and not chat:
            self.refuse(f"{where}.system: belongs to a chat; say `chat: true`")
        most = self.whole(found, "max_tokens", where, default.max_tokens, 1)
        return Decoding(most, tuple(stop), bool(chat), str(system))

    def whole(self, raw: Mapping[str, Any], key: str, where: str, default: int, low: int) -> int:
        value = raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 1 << 31:
            self.refuse(f"{where}.{key}: a whole number from {low}, not {brief(value)}")
            return default
        return value

    def word(self, raw: Mapping[str, Any], key: str, where: str) -> str:
        value = raw.get(key, "")
        if not isinstance(value, str):
            self.refuse(f"{where}.{key}: the name of a column, not {brief(value)}")
            return ""
        return value
