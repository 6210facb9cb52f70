"""What an evaluation of a suite is: a function from options to two steps, and a line of the table.

``make(**options)`` gives ``prepare(job)``, which reads rows before any model is loaded and notes
every fault; that gives ``run(models)``, which asks the loaded model and returns numbers by row.
Metrics, intervals, categories, languages and comparisons are made of these numbers elsewhere, the
same for all kinds. A kind is a small module and a line in ``suture.evals.table``::

    def shouting(prompt: Template = "{prompt}") -> Prepare:
        def prepare(job: Job) -> Run:
            prompts = job.prompts(prompt)

            def run(models: Models) -> tuple[Score, ...]:
                said = generate(models, job, prompts)
                hits = {n: float(text.isupper()) for n, text in said.items()}
                return (Score("shouting", hits, "share", better="lower"),)

            return run
        return prepare
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from torch import nn

from suture.chat import as_chat
from suture.data import Batch, Dataset, cell
from suture.errors import Problems, RecipeError, brief
from suture.evals.base import Eval, Metric
from suture.evals.decoding import Decoding
from suture.images import Look
from suture.merges.base import Parameter

Needs = Literal["classifier", "encoder", "image-classifier", "language-model"]


@dataclass(frozen=True)
class Doc:
    """What an option means, where its type says the rest: a choice or a flag."""

    doc: str

    def problem(self, value: object) -> str | None:
        """Nothing is wrong with what the type allows."""
        return None


@dataclass(frozen=True)
class Word:
    """What an option that is text means."""

    doc: str
    empty: bool = True
    """Whether nothing may be said."""

    def problem(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        if isinstance(value, str) and (value or self.empty):
            return None
        return f"{self.doc}; {brief(value)} is no text"


@dataclass(frozen=True)
class Names:
    """What an option that is a list of words, or of texts by word, means."""

    doc: str
    mapping: bool = False

    def problem(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        if self.mapping:
            right = value is None or (
                isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values())
            )
        else:
            right = isinstance(value, list | tuple) and len({str(v) for v in value}) == len(value)
        return None if right else f"{self.doc}; not {brief(value)}"


@dataclass(frozen=True)
class Columns:
    """What an option that names one column or several means."""

    doc: str

    def problem(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        names = [value] if isinstance(value, str) else value
        right = isinstance(names, list | tuple) and names and all(isinstance(n, str) for n in names)
        return None if right else f"{self.doc}; not {brief(value)}"


Column = Annotated[str, Word("the name of a column", empty=False)]
Template = Annotated[str, Word("the name of a column, or text with {columns} in it", empty=False)]


@dataclass(frozen=True)
class Row:
    """One row of the data."""

    where: str
    """File and line."""
    cells: Mapping[str, object]
    category: str = ""
    language: str = ""


@dataclass
class Job:
    """What is known before a model is loaded; rows are numbered as they stand."""

    rows: Sequence[Row]
    tokenizer: Any
    longest: int
    """Most tokens that the model reads, or that the suite allows."""
    decoding: Decoding
    problems: Problems
    """Takes every fault; what ``prepare`` returns is used only if there is none."""
    too_long: str = "error"
    """What is done with a longer row: ``error``, ``cut`` or ``drop``."""
    batch: int = 16
    labels: tuple[str, ...] = ()
    """Of a classifier's head; of the rows where it is made of texts."""
    folder: Path = Path()
    """Where relative paths of the suite start."""
    look: Look | None = None
    """How the model wants its images, where it reads some."""
    stamp: str = ""
    """Set by a kind that reads more than rows and models: what tells that from another."""
    notes: list[str] = field(default_factory=list)
    _over: list[str] = field(default_factory=list)

    def refuse(self, text: str) -> None:
        """Note a fault of the suite or of a row."""
        self.problems.add(RecipeError, text)

    def column(self, name: str) -> dict[int, str]:
        """A column as text, by row; rows that lack it are noted."""
        found = {}
        for number, row in enumerate(self.rows):
            with self.problems.collecting():
                found[number] = cell(row.cells, name, row.where)
        return found

    def texts(self, template: str) -> dict[int, str]:
        """A column, or a text with ``{columns}`` filled in, by row."""
        names = re.findall(r"\{([^{}]+)\}", template)
        if not names:
            return self.column(template)
        columns = {name: self.column(name) for name in dict.fromkeys(names)}
        return {
            number: re.sub(r"\{([^{}]+)\}", lambda m, n=number: columns[m[1]][n], template)  # type: ignore[misc]
            for number in range(len(self.rows))
            if all(number in column for column in columns.values())
        }

    def prompts(self, template: str) -> dict[int, str]:
        """What the model reads before it answers, by row; in its chat template if that is asked."""
        found = self.texts(template)
        if not self.decoding.chat:
            return found
        if not getattr(self.tokenizer, "chat_template", None):
            self.refuse("decoding.chat: the model has no chat template; say `chat: false` for it")
            return {}
        first = (
            [{"role": "system", "content": self.decoding.system}] if self.decoding.system else []
        )
        made = {}
        with self.problems.collecting():
            for number, text in found.items():
                asked = [*first, {"role": "user", "content": text}]
                made[number] = as_chat(self.tokenizer, asked, ask=True)
        return made

    def ids(self, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
        """Token ids; without special tokens where a chat template wrote them, or if ``plain``."""
        if not texts:
            return []
        special = not (plain or self.decoding.chat)
        found = self.tokenizer(list(texts), add_special_tokens=special)["input_ids"]
        return [list(row) for row in found]

    def fit(
        self, number: int, ids: list[int], *, room: int = 0, end: bool = False
    ) -> list[int] | None:
        """Token ids that the model can read, with ``room`` left for an answer.

        Args:
            number: of the row.
            ids: its tokens.
            room: tokens that come after them.
            end: keep the end where a row is cut: a question stands at the end of a prompt.

        Returns:
            ``None`` where the row is left out.
        """
        where, limit = self.rows[number].where, self.longest - room
        if not ids:
            self.refuse(f"{where}: no tokens: is its text empty?")
            return None
        if len(ids) <= limit:
            return ids
        self._over.append(where)
        if self.too_long == "error" or limit < 1:
            if len(self._over) == 1:
                more = f" and {room} of an answer" if room else ""
                self.refuse(
                    f"{where}: {len(ids)} tokens{more}, but at most {self.longest} can be read; "
                    + ("give fewer max_tokens, or " if room else "")
                    + "say `too_long: cut` or `too_long: drop`"
                )
            return None
        if self.too_long == "drop":
            return None
        return ids[len(ids) - limit :] if end else ids[:limit]

    def finish(self) -> None:
        """Note how many rows were too long."""
        if self._over and self.too_long != "error":
            done = {"cut": "cut", "drop": "left out"}[self.too_long]
            self.notes.append(
                f"{len(self._over)} of {len(self.rows)} rows have more than {self.longest} "
                f"tokens; they were {done}"
            )
            if self.too_long == "drop" and len(self._over) >= len(self.rows):
                self.refuse(f"every row has more than {self.longest} tokens; none is left")


@dataclass(frozen=True)
class Models:
    """What is asked."""

    model: nn.Module
    """A ``Classifier``, ``Encoder`` or ``LanguageModel``, or a linearized one that reads alike."""
    device: str = "cpu"
    reference: nn.Module | None = None
    """Another model to compare with, on the same tokens; kinds that need one say so."""
    tick: Callable[[float], None] = lambda rows: None
    """Takes how many more rows are done."""


@dataclass(frozen=True)
class Score:
    """One number for every row that was asked, and how they become one."""

    name: str
    values: Mapping[int, float]
    """By the number of the row; NaN where the model gave no finite number."""
    statistic: str
    """Of ``numbers.STATISTICS``."""
    weights: Mapping[int, float] | None = None
    """Of each row, for statistics that weigh."""
    better: Literal["higher", "lower"] = "higher"


Run = Callable[[Models], tuple[Score, ...]]
"""Asks the model; the first score is the one to compare by."""
Prepare = Callable[[Job], Run]


@dataclass(frozen=True)
class Kind:
    """A line of the table."""

    make: Callable[..., Prepare]
    """From options, which stand in its signature, to the two steps."""
    title: str
    needs: Needs
    score: Eval | None = None
    """The same for batches at hand, as during training, where the kind reads nothing else."""
    reference: bool = False
    """Whether it needs a reference model."""
    asks: bool = False
    """Whether it asks a reference model where the suite names one."""
    version: int = 1
    """Counted up when the numbers that come out change: older results are then not reused."""

    def __call__(
        self, model: nn.Module, batches: Iterable[Batch], *, device: str = "cpu"
    ) -> tuple[Metric, ...]:
        """The metrics of batches at hand."""
        assert self.score is not None, f"{self.title} reads more than batches"
        return self.score(model, batches, device=device)

    @property
    def options(self) -> dict[str, Parameter]:
        """The options, by name, in the order of the signature."""
        hints = get_type_hints(self.make, include_extras=True)
        return {
            n: Parameter(n, hints[n], p.default)
            for n, p in inspect.signature(self.make).parameters.items()
        }

    def settings(self, given: Mapping[str, Any], where: str, problems: Problems) -> dict[str, Any]:
        """The options of a suite, checked, with every default; without those that are wrong."""
        known, found = self.options, {}
        for name, option in known.items():
            value = given.get(name, option.default)
            if option.required and name not in given:
                problems.add(RecipeError, f"{where}.{name}: missing: {option.doc}")
                continue
            wrong = option.problem(value)
            if wrong is not None:
                problems.add(RecipeError, f"{where}.{name}: {wrong}")
                continue
            found[name] = list(value) if isinstance(value, tuple) else value
        return found


def dataset_of(
    ids: Mapping[int, list[int]], tokenizer: Any, targets: Mapping[int, list[int]] | None = None,
    labels: Mapping[int, int] | None = None,
) -> tuple[Dataset, list[int]]:  # fmt: skip
    """Tokenised rows for batches, and the number of the row behind each."""
    numbers = list(ids)
    marked = None if targets is None else tuple(tuple(targets[n]) for n in numbers)
    told = tuple(-1 if labels is None else labels[n] for n in numbers)
    pad = getattr(tokenizer, "pad_token_id", None) or 0  # masked, so any id does
    return Dataset(tuple(tuple(ids[n]) for n in numbers), told, pad, marked), numbers


__all__ = [
    "Column", "Columns", "Decoding", "Doc", "Job", "Kind", "Models", "Names", "Prepare", "Row",
    "Run", "Score", "Template", "Word", "dataset_of",
]  # fmt: skip
