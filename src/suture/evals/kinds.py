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

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from torch import nn

from suture.checkpoints.chat import as_chat
from suture.errors import Problems, RecipeError
from suture.evals.base import Eval, Metric
from suture.evals.decoding import Decoding
from suture.schema.parameters import Text
from suture.schema.table import Line
from suture.training.data import Batch, Dataset
from suture.training.images import ImageTransform
from suture.training.labelled import cell

Needs = Literal["classifier", "encoder", "image-classifier", "language-model"]


Column = Annotated[str, Text("the name of a column")]
Template = Annotated[str, Text("the name of a column, or text with {columns} in it")]


@dataclass(frozen=True)
class Row:
    """One row of the data."""

    where: str
    """File and line."""
    cells: Mapping[str, object]
    category: str = ""
    language: str = ""


@dataclass
class EvalJob:
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
    look: ImageTransform | None = None
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
Prepare = Callable[[EvalJob], Run]


@dataclass(frozen=True)
class Kind(Line):
    """A line of the table: ``make`` gives the two steps; its parameters are keys of a suite."""

    joint: ClassVar[str] = "-"
    needs: Needs = "language-model"
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
    def requires(self) -> str:
        """What is asked, in a sentence."""
        return f"Asks a model of the kind {self.needs}" + (
            ", beside a reference." if self.reference else ".")  # fmt: skip


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
    "Column", "Decoding", "EvalJob", "Kind", "Models", "Prepare", "Row", "Run", "Score", "Template",
    "dataset_of",
]  # fmt: skip
