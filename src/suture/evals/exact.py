"""Answers that are generated and compared with the right ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Annotated, Literal

from suture.evals.generate import generate, questions
from suture.evals.kinds import Column, EvalJob, Models, Prepare, Row, Run, Score, Template
from suture.schema.parameters import Choice, Text
from suture.training.labelled import cell

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")
LETTER = re.compile(r"(?<![A-Za-z])\(?([A-H])(?:[).:]|(?![A-Za-z]))")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()] or [""]


def _numbers(text: str) -> list[str]:
    return [_even(number) for number in NUMBER.findall(text)] or [""]


def _even(number: str) -> str:
    """One way to write a number: without separators, signs and zeros that say nothing."""
    try:
        return format(Decimal(number.replace(",", "").rstrip(".")).normalize() + 0, "f")
    except InvalidOperation:
        return number


def _letter(text: str) -> str:
    found = LETTER.search(text)
    return found[1] if found else ""


EXTRACTORS: Mapping[str, Callable[[str], str]] = {
    "whole": lambda text: text,
    "first-line": lambda text: _lines(text)[0],
    "last-line": lambda text: _lines(text)[-1],
    "first-number": lambda text: _numbers(text)[0],
    "last-number": lambda text: _numbers(text)[-1],
    "letter": _letter,
}
"""What is taken out of an answer, and of the right answer alike; an empty text is no answer."""


def exact_match(
    prompt: Template = "prompt",
    answer: Column = "answer",
    extract: Annotated[
        Literal[
            "whole", "first-line", "last-line", "first-number", "last-number", "letter", "regex"
        ],
        Choice("what of an answer is compared; of the right one, too"),
    ] = "first-line",
    pattern: Annotated[
        str, Text("for `extract: regex`; its last match counts, of that the first group", True)
    ] = "",
    case: Annotated[bool, Choice("whether upper and lower case differ")] = False,
) -> Prepare:
    """The share of rows whose generated answer equals the right one.

    Both are cut to what ``extract`` takes out of them, and compared without case, outer
    punctuation and repeated spaces. ``answer`` may hold a list: one of them is enough. ``answered``
    is the share of rows in whose answer anything was found.
    """

    def prepare(job: EvalJob) -> Run:
        take = EXTRACTORS.get(extract)
        if take is None:
            take = _finder(pattern, job)
        elif pattern:
            job.refuse(f"pattern: belongs to `extract: regex`, not to {extract}")
        asked = questions(job, prompt)
        right: dict[int, set[str]] = {}
        for number, row in enumerate(job.rows):
            with job.problems.collecting():
                texts = _accepted(row, answer)
                # What the pattern does not find in the right answer is taken to be that answer.
                found = [take(t) or (t if extract == "regex" else "") for t in texts]
                right[number] = {_same(t, case) for t in found} - {""}
                if not right[number]:
                    job.refuse(f"{row.where}: {answer!r} holds nothing that `extract: {extract}` "
                               "finds, so no answer could be right")  # fmt: skip

        def run(models: Models) -> tuple[Score, ...]:
            hits, answered = {}, {}
            for number, text in generate(models, job, asked).items():
                if text is None:
                    hits[number] = answered[number] = math.nan
                    continue
                said = _same(take(text), case)
                hits[number], answered[number] = float(said in right[number]), float(bool(said))
            return Score("accuracy", hits, "share"), Score("answered", answered, "share")

        return run

    return prepare


def _finder(pattern: str, job: EvalJob) -> Callable[[str], str]:
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        job.refuse(f"pattern: {pattern!r} is no regular expression: {error}")
        return str
    if not pattern:
        job.refuse("pattern: missing: what `extract: regex` looks for")

    def take(text: str) -> str:
        found = list(compiled.finditer(text))
        if not found:
            return ""
        return str(found[-1][1] if compiled.groups else found[-1][0]) or ""

    return take


def _accepted(row: Row, column: str) -> list[str]:
    raw = row.cells.get(column)
    if isinstance(raw, list) and raw:
        return [cell({column: value}, column, row.where) for value in raw]
    return [cell(row.cells, column, row.where)]


def _same(text: str, case: bool) -> str:
    even = " ".join(text.split()).strip(" .,:;!?\"'`*")
    return even if case else even.casefold()
