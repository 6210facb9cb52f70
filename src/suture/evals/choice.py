"""Multiple choice: which of a few answers does a language model find likeliest?"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from suture.errors import RecipeError, brief
from suture.evals.kinds import (
    Column,
    EvalJob,
    Models,
    Prepare,
    Row,
    Run,
    Score,
    Template,
    dataset_of,
)
from suture.evals.loss import joined, row_losses
from suture.schema.parameters import Choice, Words
from suture.training.labelled import cell

LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s*", re.MULTILINE)


def choice(
    prompt: Template = "question",
    choices: Annotated[
        str | tuple[str, ...],
        Words("the column of the answers, or a list of columns", single=True, empty=False),
    ] = "choices",
    answer: Column = "answer",
    answer_as: Annotated[
        Literal["auto", "text", "letter", "index", "number"],
        Choice("what `answer` holds: a text, a letter, an index from 0 or a number from 1"),
    ] = "auto",
    normalise: Annotated[
        Literal["tokens", "bytes", "none"],
        Choice("what a log-likelihood is divided by, so that short answers have no advantage"),
    ] = "tokens",
) -> Prepare:
    """The share of rows whose right answer has the highest log-likelihood after the prompt.

    ``accuracy`` divides each log-likelihood by the answer's length, ``raw_accuracy`` does not.
    Answers come from a list in one column, from text with a line for each (``A. ...``), or from
    several columns. Prompt and answer are joined by a space unless there is white space already.
    """

    def prepare(job: EvalJob) -> Run:
        prompts = job.prompts(prompt)
        right: dict[int, int] = {}
        places: list[tuple[int, str]] = []  # one text to score a line: its row, the answer
        for number, row in enumerate(job.rows):
            with job.problems.collecting():
                found = options_of(row, choices)
                right[number] = _right(row, found, answer, answer_as)
                places += [(number, text) for text in found if number in prompts]
        asked = {at: prompts[number] for at, (number, _) in enumerate(places)}
        told = {at: _apart(asked[at], job) + text for at, (_, text) in enumerate(places)}
        fitting: dict[int, list[int]] = {}
        targets: dict[int, list[int]] = {}
        for at, (ids, marks) in joined(job, asked, told).items():
            fit = job.fit(places[at][0], ids, end=True)
            if fit is not None:
                fitting[at], targets[at] = fit, marks[len(ids) - len(fit) :]
                if not any(targets[at][1:]):
                    job.refuse(f"{job.rows[places[at][0]].where}: an answer without tokens")
        short = {number for at, (number, _) in enumerate(places) if at not in fitting}
        kept = {at: ids for at, ids in fitting.items() if places[at][0] not in short}
        data, order = dataset_of(kept, job.tokenizer, targets)

        def run(models: Models) -> tuple[Score, ...]:
            share = len({places[at][0] for at in order}) / max(1, len(order))
            sums, counts = row_losses(
                models.model, data.batches(job.batch), device=models.device,
                tick=lambda texts: models.tick(texts * share),
            )  # fmt: skip
            raw: dict[int, list[float]] = {}
            even: dict[int, list[float]] = {}
            for n in sorted(sums):  # answers of a row in their order
                number, text = places[order[n]]
                length = len(text.encode()) if normalise == "bytes" else counts[n]
                raw.setdefault(number, []).append(-sums[n])
                even.setdefault(number, []).append(-sums[n] / max(1.0, length))
            if normalise == "none":
                return (_score("accuracy", raw, right),)
            return _score("accuracy", even, right), _score("raw_accuracy", raw, right)

        return run

    return prepare


def _score(name: str, found: Mapping[int, Sequence[float]], right: Mapping[int, int]) -> Score:
    """1 where the right answer is the likeliest, the first of equals counting; NaN stays."""
    hits = {}
    for number, values in found.items():
        broken = any(v != v for v in values)
        hits[number] = math.nan if broken else float(values.index(max(values)) == right[number])
    return Score(name, hits, "share")


def _apart(prompt: str, job: EvalJob) -> str:
    return "" if job.decoding.chat or not prompt or prompt[-1].isspace() else " "


def options_of(row: Row, choices: str | Sequence[str]) -> list[str]:
    """The answers of a row: a list, lettered lines, or the cells of several columns.

    Raises:
        RecipeError: there are fewer than two.
    """
    names = [choices] if isinstance(choices, str) else list(choices)
    if len(names) > 1:
        found = [cell(row.cells, name, row.where) for name in names]
    else:
        raw = row.cells.get(names[0])
        if not isinstance(raw, list):
            text = cell(row.cells, names[0], row.where)
            found = _listed(text)
        else:
            found = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in raw]
    if len(found) < 2:
        raise RecipeError(
            f"{row.where}: {' '.join(names)} holds {len(found)} answers; it takes a list of two or "
            "more, or text with a line for each (`A. ...`)"
        )
    return found


def _listed(text: str) -> list[str]:
    """Answers out of one text: a JSON list, as CSV files have it, or lines with letters."""
    if text.startswith("["):
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if isinstance(found, list):
            return [v if isinstance(v, str) else json.dumps(v) for v in found]
    wanted = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    marks: list[re.Match[str]] = []
    for mark in LETTERED.finditer(
        text
    ):  # a line that happens to begin with a letter is not the next answer
        if len(marks) < len(wanted) and mark[1] == wanted[len(marks)]:
            marks.append(mark)
    answers = []
    for at, mark in enumerate(marks):
        end = marks[at + 1].start() if at + 1 < len(marks) else len(text)
        answers.append(text[mark.end() : end].strip())
    return answers


def _right(row: Row, options: Sequence[str], column: str, how: str) -> int:
    """Which of the answers is right, from 0.

    Raises:
        RecipeError: none of them, or it cannot be told.
    """
    told = cell(row.cells, column, row.where).strip()
    plain = [option.strip() for option in options]
    found: int | None = None
    if how in ("auto", "text"):
        bare = LETTERED.sub("", told, count=1).strip()
        found = next((plain.index(t) for t in (told, bare) if plain.count(t) == 1), None)
    if found is None and how in ("auto", "letter"):
        letter = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", told)
        marked = LETTERED.match(told)
        letters = letter[1].upper() if letter else marked[1] if marked and how == "auto" else ""
        found = ord(letters) - ord("A") if letters else None
    if found is None and how in ("index", "number") and re.fullmatch(r"[0-9]{1,4}", told):
        found = int(told) - (how == "number")
    if found is not None and 0 <= found < len(options):
        return found
    hint = (
        "; say `answer_as: index` (from 0) or `answer_as: number` (from 1)"
        if how == "auto" and told.isdigit()
        else ""
    )
    raise RecipeError(
        f"{row.where}: {column!r} is {brief(told)}, which is none of the {len(options)} answers"
        f"{'' if how == 'auto' else f', read as {how}'}{hint}"
    )
