"""What a suite asks before there is a model: the rows of every question, groups, what is hashed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from suture.errors import Problems, RecipeError
from suture.evals.kinds import Row
from suture.schema.paths import place_of, shown
from suture.schema.sources import DataSpec
from suture.training.image_rows import labelled
from suture.training.images import Image, checked
from suture.training.labelled import cell
from suture.training.rows import Record, records_of
from suture.verbs.evaluate.recipe import DTYPES, Question, Suite

IMAGES = "image-classifier"
MOST_GROUPS = 200
"""Categories and languages of an evaluation; a column with more is none, but perhaps of texts."""


@dataclass(frozen=True)
class Asked:
    """One question with its rows, the same for all models."""

    question: Question
    rows: tuple[Row, ...]
    facts: Mapping[str, Any]
    """What two results must share to be compared."""
    groups: Mapping[str, tuple[int, ...]]


def digest(value: Any) -> str:
    """A hash of plain data."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def asked_in(suite: Suite, most: int, problems: Problems) -> dict[str, Asked]:
    """Every question of a suite with its rows, ``most`` of them (0: all); faults are noted."""
    found, read = {}, dict[Any, list[Record]]()
    for question in suite.questions:
        with problems.collecting():
            images = question.line.needs == IMAGES
            source = (question.data, images)
            if source not in read:
                read[source] = _images(question) if images else records_of(question.data)
            records = read[source]
            limit = min(filter(None, (question.limit, most)), default=len(records))
            rows, groups = _rows(question, records[:limit], problems)
            facts = {
                "kind": question.kind, "version": question.line.version,
                "options": dict(question.options),
                "decoding": {"method": "greedy", **asdict(question.decoding)}
                if question.line.needs == "language-model" else None,
                "max_length": question.max_length, "too_long": question.too_long,
                "category": question.category, "language": question.language,
                "rows": len(rows), "data": digest([_content(row) for row in rows] if images
                               else [dict(row.cells) for row in rows]),
            }  # fmt: skip
            if question.line.needs == "language-model" and suite.dtype != DTYPES[0]:
                facts["dtype"] = suite.dtype
            if question.line.needs in ("classifier", IMAGES):
                facts["head"] = _given_head(question, suite, problems)
            found[question.name] = Asked(question, rows, facts, groups)
    return found


def _images(question: Question) -> list[Record]:
    """Images with labels as rows: each cell an image is a file, bytes or pixels."""
    image, label = str(question.options["image"]), str(question.options["label"])
    if image == label:
        raise RecipeError(f"evaluations.{question.name}: image and label are both {image!r}")
    spec = DataSpec(question.data, image=image, label=label)
    return [
        (where, {image: what, label: told}) for where, what, told in labelled(question.data, spec)
    ]


def _content(row: Row) -> list[object]:
    """What identifies an image and its label, wherever it lies."""
    return [value if isinstance(value, str) else checked(cast("Image", value), row.where)
            for value in row.cells.values()]  # fmt: skip


def _rows(
    question: Question, records: Sequence[Record], problems: Problems
) -> tuple[tuple[Row, ...], dict[str, tuple[int, ...]]]:
    rows: list[Row] = []
    groups: dict[str, list[int]] = {}
    without: dict[str, list[str]] = {}
    for number, (where, cells) in enumerate(records):
        told = {}
        for what in ("category", "language"):
            column = getattr(question, what)
            value = cells.get(column) if column else ""
            if value is None:
                without.setdefault(what, []).append(where)
            told[what] = "" if value is None else re.sub(r"\W+", "_", str(value)).strip("_")
            if told[what]:
                groups.setdefault(told[what], []).append(number)
        rows.append(Row(where, cells, **told))
    for what, places in without.items():
        more = f" (and {len(places) - 1} more rows)" if len(places) > 1 else ""
        problems.add(RecipeError, f"evaluations.{question.name}.{what}: {places[0]} has no column "
                                  f"{getattr(question, what)!r}{more}")  # fmt: skip
    if len(groups) > MOST_GROUPS:
        problems.add(RecipeError, f"evaluations.{question.name}: {len(groups)} categories and "
                                  "languages; are these the right columns?")  # fmt: skip
    if question.category and question.language:
        both = {r.category for r in rows} & {r.language for r in rows} - {""}
        for name in sorted(both):
            problems.add(RecipeError, f"evaluations.{question.name}: {name!r} is a category and a "
                                      "language; rename one")  # fmt: skip
    return tuple(rows), {name: tuple(groups[name]) for name in sorted(groups)}


def _given_head(question: Question, suite: Suite, problems: Problems) -> str:
    """What is known of a head before there is a model: its file's hash, or how it is made."""
    head = str(question.options["head"])
    if head == "zero-shot" and question.line.needs == IMAGES:
        raise RecipeError(f"evaluations.{question.name}.head: a zero-shot head is made of texts, "
                          "the model reads images; name a head")  # fmt: skip
    if head in ("model", "zero-shot"):
        return head
    path = place_of(head, suite.folder)
    if not path.is_file():
        problems.add(RecipeError, f"evaluations.{question.name}.head: no file {shown(path)}; "
                                  "name one, or say `model` or `zero-shot`")  # fmt: skip
        return head
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def zero_shot_labels(asked: Asked) -> tuple[str, ...]:
    """The labels of a head that is made of texts: those of the suite, else those of the rows."""
    given = tuple(map(str, asked.question.options["labels"]))
    column = str(asked.question.options["label"])
    own = {cell(r.cells, column, r.where) for r in asked.rows if r.cells.get(column) is not None}
    return given or tuple(sorted(own))


__all__ = ["IMAGES", "Asked", "asked_in", "digest", "zero_shot_labels"]
