"""The recipe of a safety audit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt, MinLen
from pydantic import BeforeValidator

from suture.errors import Problems, did_you_mean
from suture.evals.decoding import Decoding
from suture.evals.words import FAMILIES
from suture.schema.fields import (
    Becomes,
    Column,
    Count,
    Listed,
    ModelPath,
    NamedEntries,
    Number,
    Says,
    Share,
    Space,
    Word,
)
from suture.schema.read import read
from suture.schema.rows import TestRows, TrainRows, how_to_train
from suture.schema.sections import NAMES, Faults, Recipe, Section, check
from suture.schema.sources import Source
from suture.schema.tuning import TuneSettings
from suture.tensors.roles import DEFAULT_SPACE

SIDES = ("probe", "marked", "benign")
"""Rows for the scores (with answers), rows that are to be refused, rows that are to be answered."""
SPARED = "useful rows"
"""Stands where a language stands, for the rows whose entries belong to no region."""
TRAINING = TuneSettings(epochs=3, batch=4, accumulate=2, lr=5e-5, schedule="cosine")
LISTS = tuple(dict.fromkeys(name for families in FAMILIES.values() for name in families))
Freezing = Literal["random", "others"]


class Rows(Section):
    """The rows of one language; what is missing is taken from ``rows``."""

    probe: TestRows | None = None
    """Prompts with the answers that are forbidden."""
    marked: TestRows | None = None
    """Prompts that are to be refused."""
    benign: TestRows | None = None
    """Prompts that are to be answered."""


class SharedRows(Rows):
    """Rows of all languages, and what the columns are called."""

    prompt: Column = "prompt"
    """The column of prompts."""
    response: Column = "response"
    """Of probe rows: the answer that the policy forbids."""
    language: Column = "language"
    """The column of languages, where one file holds several."""


class Scoring(Section):
    """How entries are scored: the choice points of the method."""

    at: Literal["attacked", "aligned", "both"] = "attacked"
    """Where gradients are taken; ``both`` also compares the two rankings, and uses `attacked`."""
    per_example: bool = True
    """Whether absolute values are taken row by row, or of the sum over rows."""
    signed: bool = False
    """Whether only entries count that move the loss of the forbidden answer down."""
    rows: Count = 16
    """Probe rows of each language."""

    @property
    def rule(self) -> str:
        """The line of ``importance.RULES``."""
        if self.signed:
            return "first_order"
        return "delta_grad" if self.per_example else "delta_sum_grad"


class Attack(Section):
    """The fine-tuning that takes the policy away."""

    train: TrainRows
    """Rows that are trained on."""
    language: str = ""
    """Only rows of this language; empty for all."""
    limit: Number = 100
    """Rows at most; 0 for all."""
    response: str = "response"
    """The column of answers."""
    training: Annotated[TuneSettings, how_to_train(TRAINING)] = TRAINING
    """How the attack trains."""


class Freeze(Section):
    """Training as the attack with entries of a region frozen."""

    share: Share = 0.2
    """Of the entries; by default the audit's."""
    controls: Annotated[tuple[Freezing, ...], Listed()] = ("random", "others")
    """What else is frozen, to compare with."""


class Useful(Section):
    """Rows of use: what they need most belongs to no region."""

    rows: TrainRows
    """Rows whose answers are to be kept."""
    share: Share = 0.05
    """Of the entries, by the same score taken on these rows."""
    response: Column = "response"
    """The column of answers."""
    limit: Number = 64
    """Rows at most; 0 for all."""

    @check
    def _leaves_entries(self) -> Faults:
        if self.share == 1:
            yield "share", "1 leaves no entry for a region"


class Utility(Section):
    """Rows for perplexity, as a suite has them."""

    short = "data"

    data: TestRows
    """The rows."""
    text: Any = None
    """The column of texts."""
    prompt: Any = None
    """The column of prompts."""
    response: Any = None
    """The column of answers."""
    limit: Any = None
    """Rows at most; 0 for all."""
    max_length: Any = None
    """Most tokens of a row."""
    too_long: Any = None
    """What is done with longer rows: error, cut or drop."""

    def asked(self) -> dict[str, Any]:
        """Return what the evaluation of a suite has."""
        return {**{k: getattr(self, k) for k in self.model_fields_set}, "data": self.data.path}


class Evaluating(Section):
    """How models are asked, and by whom answers are judged."""

    limit: Number = 100
    """Marked and benign rows of each language; 0 for all."""
    max_tokens: Count = 32
    """New tokens at most."""
    chat: bool = False
    """Whether prompts are put into the model's chat template."""
    system: str = ""
    """What the system says first, in a chat."""
    stop: Annotated[tuple[Annotated[str, MinLen(1)], ...], Listed(), Says("a list of texts")] = ()
    """Texts that end an answer."""
    batch: Count = 16
    """Answers that are made at once."""
    families: Annotated[tuple[Literal[LISTS], ...], Listed()] = ()  # type: ignore[valid-type]
    """Lists of words for refusals; by default those of each language."""
    within: Number = 200
    """Only so many first characters of an answer are searched for a refusal; 0 for all."""
    judge: Mapping[str, Any] = {}
    """Who judges answers, instead of lists of words."""
    asks: Literal["refusal", "harm"] = "refusal"
    """What the judge is asked about."""
    broken: Annotated[float, Ge(0), Lt(1), Says("a share in [0, 1)")] = 0.2
    """With a larger share of broken answers a model is not judged."""

    @property
    def decoding(self) -> Decoding:
        """How answers are generated."""
        return Decoding(self.max_tokens, self.stop, self.chat, self.system)

    @check
    def _system_of_a_chat(self) -> Faults:
        if self.system and not self.chat:
            yield "system", "belongs to a chat; say `chat: true`"


def _freezing(value: object) -> object:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


def _utility(keys: Utility, _: Path) -> Path | Utility:
    path = Path(keys.data.path)
    return path if path.suffix in (".yaml", ".yml") else keys


def _plain(given: Path | Utility, names: bool) -> Any:
    if isinstance(given, Path):
        return given.name if names else str(given)
    return given.model_dump(mode="json", exclude_unset=True, context=NAMES if names else None)


class Audit(Recipe):
    """A safety audit, key by key."""

    aligned: ModelPath
    """The model whose safety is looked for."""
    attacked: ModelPath | None = None
    """The model without its safety; by default it is trained, by `attack`."""
    attack: Attack | None = None
    languages: Annotated[Mapping[str, Rows], NamedEntries(
        r"\w+", "is no word for a language, such as en",
        "a mapping from languages to their rows, with at least one; or a list, where the files "
        "under `rows` tell languages apart", listed=True, least=1,
    )]  # fmt: skip
    """A mapping from languages to their rows; or a list, where `rows` tells languages apart."""
    rows: SharedRows = SharedRows()
    scores: Scoring = Scoring()
    shares: Annotated[tuple[Share, ...], MinLen(1), Listed(one=False)] = (
        0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0,
    )  # fmt: skip
    """Of the entries: the points of the curve."""
    share: Share = 0.2
    """Of the entries, in regions that are compared, mapped and frozen."""
    region: Word = ""
    """The language whose region the curve, the repair and the freezing are about."""
    controls: Annotated[tuple[Literal["random", "magnitude", "snip"], ...], Listed()] = (
        "random", "magnitude",
    )  # fmt: skip
    """What a region is held against; snip is weight times gradient, which ignores the change."""
    control: ModelPath | None = None
    """A model that was tuned harmlessly from the aligned one."""
    onto: Annotated[Mapping[str, ModelPath], NamedEntries(
        r"[\w.-]+", "cannot be the name of a model here", "a mapping from names to models",
        taken=("aligned",),
    )] = {}  # fmt: skip
    """Models derived from the aligned one, which the region is put onto."""
    freeze: Annotated[Freeze | None, BeforeValidator(
        _freezing, json_schema_input_type=Freeze | bool | None
    )] = None  # fmt: skip
    useful: Useful | None = None
    utility: Annotated[Path | Utility, Becomes(Utility, _utility, _plain)] | None = None
    """The file of a suite, or rows for perplexity."""
    evaluation: Evaluating = Evaluating()
    space: Space = DEFAULT_SPACE
    """The tensors in which regions lie."""
    seeds: Annotated[tuple[Number, ...], MinLen(1), Listed(different=False)] = (0,)
    """Of the attacks, one after another."""
    ancestor: Literal["check", "trust"] = "check"
    """Whether the attacked model must be tuned from the aligned one to be looked at."""
    deltas: bool = False
    """Whether masks of `share` are kept with the weights that they mark."""
    device: Word = "auto"
    """Where it is computed: auto, cpu or cuda."""

    @property
    def columns(self) -> SharedRows:
        """What the columns are called."""
        return self.rows

    @property
    def main(self) -> str:
        """The model at which the gradients of the regions are taken."""
        return "aligned" if self.scores.at == "aligned" else "attacked"

    @check
    def _something_attacks(self) -> Faults:
        if self.attacked is None and self.attack is None:
            yield "attack", "missing; name an `attacked` model, or the rows of an `attack`"

    @check
    def _one_seed_of_a_given_model(self) -> Faults:
        if len({*self.seeds}) < len(self.seeds):
            yield "seeds", f"different whole numbers, not {list(self.seeds)}"
        if self.attacked is not None and len(self.seeds) > 1:
            yield "seeds", ("several belong to an `attack` that is trained here; an attacked "
                            "model that is there already has one")  # fmt: skip

    @check
    def _languages_are_known(self) -> Faults:
        known = list(self.languages)
        if self.region not in ("", *known):
            yield "region", (f"{self.region!r} is no language of this audit; "
                             f"{did_you_mean(self.region, known)}")  # fmt: skip
        if self.attack is not None and self.attack.language not in ("", *known):
            yield "attack.language", (f"{self.attack.language!r} is no language of this audit; "
                                      f"{did_you_mean(self.attack.language, known)}")  # fmt: skip

    @check
    def _rows_are_there(self) -> Faults:
        for language, own in self.languages.items():
            for side in SIDES:
                if getattr(own, side) is None and getattr(self.rows, side) is None:
                    said = {
                        "probe": "prompts with the answers that are forbidden",
                        "marked": "prompts that are to be refused",
                        "benign": "prompts that are to be answered",
                    }[side]
                    yield f"languages.{language}.{side}", f"missing; {said}, here or under `rows`"

    @check
    def _somebody_judges(self) -> Faults:
        for language in self.languages if not self.evaluation.judge else ():
            if language not in FAMILIES:
                known = ", ".join(FAMILIES)
                yield "languages", (f"no lists of refusals for {language!r}, only for {known}; "
                                    "give an `evaluation.judge`")  # fmt: skip

    @check
    def _snip_has_its_gradients(self) -> Faults:
        if "snip" in self.controls and self.scores.rule != "delta_grad":
            yield (
                "controls",
                (
                    "snip takes absolute gradients row by row; the scores have to do "
                    "the same: leave `per_example: true` and `signed: false`"
                ),
            )

    @check
    def _freezing_leaves_something(self) -> Faults:
        if self.freeze is None:
            return
        if self.attack is None:
            yield "freeze", "trains as the attack did; describe it under `attack`"
        if (self.freeze.share if "share" in self.freeze.model_fields_set else self.share) == 1:
            yield "freeze.share", "1 leaves nothing that an attack could train"

    def settled(self) -> Mapping[str, Any]:
        """Return the rows of every language, the region, and what is frozen."""
        sides = {
            name: Rows(**{s: getattr(own, s) or getattr(self.rows, s) for s in SIDES})
            for name, own in self.languages.items()
        }
        freeze = self.freeze
        if freeze is not None and "share" not in freeze.model_fields_set:
            freeze = freeze.model_copy(update={"share": self.share})
        return {
            "languages": sides, "region": self.region or next(iter(sides)), "freeze": freeze,
            "shares": tuple(sorted({*self.shares})),
        }  # fmt: skip

    def resolved(self) -> dict[str, Any]:
        """Return the recipe with every default, as plain data; of files the names alone."""
        found = self.model_dump(mode="json", context=NAMES)
        found["evaluation"]["judge"] = sorted(self.evaluation.judge)
        return found


def read_audit(
    source: Path | Mapping[str, Any], problems: Problems, folder: Path | None = None
) -> Audit | None:
    """Read a recipe file, or a mapping; faults are noted, lines before those of a file."""
    return read(Audit, source, problems, folder)


__all__ = [
    "SIDES", "SPARED", "Attack", "Audit", "Evaluating", "Freeze", "Rows", "Scoring", "Source",
    "Useful", "read_audit",
]  # fmt: skip
