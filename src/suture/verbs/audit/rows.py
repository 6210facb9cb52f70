"""The rows of an audit: read by language, tokenised, and turned into questions to a model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint
from suture.errors import Problems, RecipeError
from suture.evals.decoding import Decoding
from suture.evals.kinds import EvalJob, Row, Run
from suture.evals.table import EVALS
from suture.schema.sources import DataSpec, Source
from suture.training.data import Dataset
from suture.training.models import longest_of
from suture.training.rows import Record, language_data, records_of
from suture.verbs.audit.recipe import SIDES, Audit
from suture.verbs.evaluate.plan import digest, tokenizer_of


@dataclass(frozen=True)
class Material:
    """Rows as they stand in files, by side and language; read once."""

    rows: Mapping[str, Mapping[str, Sequence[Record]]]
    attack: Sequence[Record] = ()
    useful: Sequence[Record] = ()
    notes: tuple[str, ...] = ()

    def counts(self) -> dict[str, dict[str, int]]:
        """How many rows there are, by language and side."""
        languages = self.rows[SIDES[0]]
        return {lang: {side: len(self.rows[side][lang]) for side in SIDES} for lang in languages}

    def probe_key(self) -> str:
        """A hash of all rows that gradients are taken on."""
        own = self.key("probe")
        return own if not self.useful else hash_of([own, [dict(r) for _, r in self.useful]])

    def key(self, side: str) -> str:
        """A hash of the rows of a side."""
        return hash_of([[lang, [dict(r) for _, r in rows]]
                        for lang, rows in self.rows[side].items()])  # fmt: skip


def hash_of(value: Any) -> str:
    """A hash of plain data, whatever stands in its cells."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_material(recipe: Audit, problems: Problems) -> Material:
    """Read all rows; whatever is missing is noted, by language."""
    cache: dict[Source, list[Record]] = {}
    notes: list[str] = []
    users = Counter(
        source for sources in recipe.languages.values()
        for source in {getattr(sources, side) for side in SIDES}
    )  # fmt: skip

    def records(source: Source) -> list[Record]:
        if source not in cache:
            cache[source] = records_of(source)
        return cache[source]

    def of(source: Source, language: str, place: str) -> list[Record]:
        """The rows of a language: those that say so, or all where no row says anything."""
        found, column = records(source), recipe.columns.language
        told = sorted({str(r[column]) for _, r in found if r.get(column) is not None})
        if not told and users[source] > 1:
            name = Path(source.path).name
            raise RecipeError(f"{place}: no row of {name} has a column {column!r}, which tells the "
                              "languages apart; name a file for each language")  # fmt: skip
        chosen = [x for x in found if str(x[1].get(column)) == language] if told else found
        if not chosen:
            raise RecipeError(f"{place}: no rows of {language!r} in {Path(source.path).name}; its "
                              f"column {column!r} has {', '.join(told)}")  # fmt: skip
        return chosen

    limits = {"probe": recipe.scores.rows, "marked": recipe.evaluation.limit,
              "benign": recipe.evaluation.limit}  # fmt: skip
    rows: dict[str, dict[str, list[Record]]] = {side: {} for side in SIDES}
    for language, sources in recipe.languages.items():
        for side in SIDES:
            place = f"languages.{language}.{side}"
            with problems.collecting():
                found = of(getattr(sources, side), language, place)
                most = limits[side] or len(found)
                needed = [recipe.columns.prompt]
                needed += [recipe.columns.response] if side == "probe" else []
                _check(found[:most], needed, place)
                rows[side][language] = found[:most]
                if len(found) < most and side == "probe":
                    notes.append(f"{language}: only {len(found)} probe rows, not {most}")

    def trained(source: Source, language: str, limit: int, response: str, place: str) -> Any:
        """Rows that are trained on, or that gradients are taken on besides."""
        with problems.collecting():
            found = records(source)
            found = of(source, language, place) if language else found
            _check(found[: limit or len(found)], [recipe.columns.prompt, response], place)
            return found[: limit or len(found)]
        return []

    attack, useful = recipe.attack, recipe.useful
    return Material(
        rows,
        [] if attack is None else trained(
            attack.train, attack.language, attack.limit, attack.response, "attack.train"
        ),
        [] if useful is None else trained(
            useful.rows, "", useful.limit, useful.response, "useful.rows"
        ),
        tuple(notes),
    )  # fmt: skip


def _check(rows: Sequence[Record], columns: Sequence[str], place: str) -> None:
    """Refuse empty cells before any model is there; the first such row is named."""
    for column in columns:
        bare = [where for where, row in rows if not str(row.get(column) or "").strip()]
        if bare:
            more = f" (and {len(bare) - 1} more rows)" if bare[1:] else ""
            raise RecipeError(f"{place}: {bare[0]}{more}: nothing in the column {column!r}")


def tokens(
    records: Sequence[Record], recipe: Audit, tokenizer: Any, longest: int, response: str
) -> Dataset:
    """Prompts with answers, of which the answers are predicted.

    Raises:
        RecipeError: a row is too long, or there is no chat template.
    """
    spec = DataSpec(
        Source(""), None, 0.0, prompt=recipe.columns.prompt, response=response, format="prompt",
        chat=recipe.evaluation.decoding.chat, max_length=longest,
    )  # fmt: skip
    return language_data(records, spec, tokenizer, longest)[0]


@dataclass(frozen=True)
class Questions:
    """What one family of models is asked, ready to be run: they share tokenizer and template."""

    marked: Run
    benign: Run
    groups: Mapping[str, Mapping[str, tuple[int, ...]]]
    """Numbers of rows of each language, by side."""
    utility: Mapping[str, Run] = field(default_factory=dict)
    key: str = ""
    """A hash of all that is asked and how."""
    notes: tuple[str, ...] = ()

    @property
    def generations(self) -> int:
        """Answers that each model writes."""
        return sum(len(rows) for side in self.groups.values() for rows in side.values())


def questions(
    recipe: Audit, material: Material, checkpoint: Checkpoint, problems: Problems,
    utility: Mapping[str, Run], utility_key: str,
) -> Questions:  # fmt: skip
    """Prepare what is asked of models with the tokenizer of ``checkpoint``; faults are noted."""
    how, tokenizer = recipe.evaluation, tokenizer_of(checkpoint)
    longest = longest_of(checkpoint.config, tokenizer)
    runs: dict[str, Run] = {}
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    notes: list[str] = []
    stamps = []
    for side, expect in (("marked", "refuse"), ("benign", "answer")):
        rows: list[Row] = []
        groups[side] = {}
        for language, found in material.rows[side].items():
            groups[side][language] = tuple(range(len(rows), len(rows) + len(found)))
            rows += [Row(where, cells, language=language) for where, cells in found]
        job = EvalJob(rows, tokenizer, longest, how.decoding, problems, "error", how.batch,
                  folder=recipe.folder)  # fmt: skip
        runs[side] = _kind(recipe, side, expect)(job)
        job.finish()
        notes += job.notes
        stamps.append(job.stamp)
    facts = [
        _decoding(how.decoding), list(how.families), how.within, dict(how.judge), how.asks, stamps,
        material.key("marked"), material.key("benign"), recipe.columns.prompt, utility_key,
        EVALS["refusal"].version, EVALS["judged"].version,
    ]  # fmt: skip
    return Questions(runs["marked"], runs["benign"], groups, utility, digest(facts),
                     tuple(dict.fromkeys(notes)))  # fmt: skip


def _decoding(how: Decoding) -> list[Any]:
    return [how.max_tokens, list(how.stop), how.chat, how.system]


def _kind(recipe: Audit, side: str, expect: str) -> Any:
    """The evaluation of a side: refusals by words, or by a judge where one is named."""
    how, prompt = recipe.evaluation, recipe.columns.prompt
    if how.judge and (side == "marked" or how.asks == "refusal"):
        return EVALS["judged"].make(
            judge=dict(how.judge), prompt=prompt, asks=how.asks, expect=expect
        )
    return EVALS["refusal"].make(
        prompt=prompt, expect=expect, families=how.families, within=how.within
    )


__all__ = ["Material", "Questions", "hash_of", "questions", "read_material", "tokens"]
