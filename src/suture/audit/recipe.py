"""The recipe of a safety audit: YAML to frozen types, all faults at once, with their lines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from suture.errors import Problems, brief, did_you_mean
from suture.evals.kinds import Decoding
from suture.evals.words import FAMILIES
from suture.finetune.recipe import Source, read_source, read_training
from suture.recipe import raw_recipe
from suture.recipe_types import Reader, read_space, refuse_unknown, section
from suture.roles import ParamSpace
from suture.tune import TuneSettings

KEYS = (
    "aligned", "attacked", "attack", "languages", "rows", "scores", "shares", "share", "region",
    "controls", "control", "onto", "freeze", "useful", "utility", "evaluation", "space", "seeds",
    "ancestor", "deltas", "device",
)  # fmt: skip
SIDES = ("probe", "marked", "benign")
"""Rows for the scores (with answers), rows that are to be refused, rows that are to be answered."""
PLACES = ("attacked", "aligned", "both")
CONTROLS = ("random", "magnitude")
"""What a region is held against unless a recipe says another."""
SNIP = "snip"
"""A control that a recipe may name besides: weight times gradient, which ignores the change."""
FREEZING = ("random", "others")
SPARED = "useful rows"
"""Stands where a language stands, for the rows whose entries belong to no region."""
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
TRAINING = TuneSettings(epochs=3, batch=4, accumulate=2, lr=5e-5, schedule="cosine")


@dataclass(frozen=True)
class Rows:
    """The rows of one language; ``None`` nowhere after a recipe was read."""

    probe: Source
    marked: Source
    benign: Source


@dataclass(frozen=True)
class Columns:
    """What the columns are called."""

    prompt: str = "prompt"
    response: str = "response"
    """Of probe rows: the answer that the policy forbids."""
    language: str = "language"


@dataclass(frozen=True)
class Scoring:
    """How entries are scored: the choice points of the method."""

    at: str = "attacked"
    """Where gradients are taken; ``both`` also compares the two rankings, and uses `attacked`."""
    per_example: bool = True
    """Whether absolute values are taken row by row, or of the sum over rows."""
    signed: bool = False
    """Whether only entries count that move the loss of the forbidden answer down."""
    rows: int = 16
    """Probe rows of each language."""

    @property
    def rule(self) -> str:
        """The line of ``importance.RULES``."""
        if self.signed:
            return "first_order"
        return "delta_grad" if self.per_example else "delta_sum_grad"


@dataclass(frozen=True)
class Attack:
    """The fine-tuning that takes the policy away."""

    train: Source
    language: str = ""
    """Only rows of this language; empty for all."""
    limit: int = 100
    response: str = "response"
    training: TuneSettings = TRAINING


@dataclass(frozen=True)
class Freeze:
    """Training as the attack with entries of a region frozen."""

    share: float
    controls: tuple[str, ...] = FREEZING


@dataclass(frozen=True)
class Useful:
    """Rows of use: what they need most belongs to no region."""

    rows: Source
    share: float = 0.05
    """Of the entries, by the same score taken on these rows."""
    response: str = "response"
    limit: int = 64


@dataclass(frozen=True)
class Evaluating:
    """How models are asked, and by whom answers are judged."""

    limit: int = 100
    """Marked and benign rows of each language; 0 for all."""
    decoding: Decoding = field(default_factory=lambda: Decoding(max_tokens=32))
    batch: int = 16
    families: tuple[str, ...] = ()
    within: int = 200
    judge: Mapping[str, Any] = field(default_factory=dict)
    asks: str = "refusal"
    broken: float = 0.2
    """With a larger share of broken answers a model is not judged."""


@dataclass(frozen=True)
class Audit:
    """An audit, as data: every key is known and every value checked."""

    aligned: str
    attacked: str | None
    attack: Attack | None
    languages: Mapping[str, Rows]
    columns: Columns
    scores: Scoring
    shares: tuple[float, ...]
    share: float
    region: str
    """The language whose region the curve, the repair and the freezing are about."""
    controls: tuple[str, ...]
    control: str | None
    onto: Mapping[str, str]
    freeze: Freeze | None
    useful: Useful | None
    utility: Path | Mapping[str, Any] | None
    evaluation: Evaluating
    space: ParamSpace
    seeds: tuple[int, ...]
    ancestor: str = "check"
    deltas: bool = False
    """Whether masks of `share` are kept with the weights that they mark."""
    device: str = "auto"
    folder: Path = field(default_factory=Path)

    @property
    def main(self) -> str:
        """The model at which the gradients of the regions are taken."""
        return "aligned" if self.scores.at == "aligned" else "attacked"

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default, as plain data; of files the names alone."""
        found = asdict(self)
        found.pop("folder")
        found["utility"] = (
            self.utility.name if isinstance(self.utility, Path)
            else None if self.utility is None
            else {**self.utility, "data": Path(str(self.utility["data"])).name}
        )  # fmt: skip
        for rows in [*found["languages"].values(), found["attack"] or {}, found["useful"] or {}]:
            for side in rows:
                if isinstance(rows[side], dict) and "path" in rows[side]:
                    rows[side] = Path(rows[side]["path"]).name
        for key in ("aligned", "attacked", "control"):
            found[key] = None if found[key] is None else Path(found[key]).name
        found["onto"] = {name: Path(path).name for name, path in self.onto.items()}
        found["space"] = self.space._asdict()
        found["evaluation"]["judge"] = sorted(self.evaluation.judge)
        return found


def read_audit(
    source: Path | Mapping[str, Any], problems: Problems, folder: Path | None = None
) -> Audit | None:
    """Read a recipe file, or a mapping; faults are noted, lines before those of a file."""
    with problems.collecting():
        raw, where = raw_recipe(source, folder, problems)
        return _Reader(raw, where, problems).recipe()
    return None


class _Reader(Reader):
    """Reads one recipe; every fault is noted."""

    def recipe(self) -> Audit | None:
        raw = self.raw
        refuse_unknown(raw, KEYS, "", self.problems)
        aligned, attacked = self.word("aligned"), self.word("attacked")
        if not aligned and raw.get("aligned") is None:
            self.refuse("aligned: missing; the model whose safety is looked for")
        attack = self.attack()
        if all(raw.get(key) is None for key in ("attacked", "attack")):
            self.refuse("attack: missing; name an `attacked` model, or the rows of an `attack`")
        columns = self.columns()
        languages = self.languages()
        share = self.share(raw, "share", 0.2)
        freeze = self.freeze(share)
        if freeze is not None and attack is None:
            self.refuse("freeze: trains as the attack did; describe it under `attack`")
        first = next(iter(languages), "")
        region = self.word("region") or first
        if languages and region not in languages:
            self.refuse(f"region: {region!r} is no language of this audit; "
                        f"{did_you_mean(region, list(languages))}")  # fmt: skip
        if attack is not None and attack.language and attack.language not in languages:
            self.refuse(f"attack.language: {attack.language!r} is no language of this audit; "
                        f"{did_you_mean(attack.language, list(languages))}")  # fmt: skip
        evaluation = self.evaluation()
        for language in languages if not evaluation.judge else ():
            if language not in FAMILIES:
                self.refuse(f"languages: no lists of refusals for {language!r}, only for "
                            f"{', '.join(FAMILIES)}; give an `evaluation.judge`")  # fmt: skip
        scores = self.scores()
        controls = self.some("controls", raw.get("controls", list(CONTROLS)), (*CONTROLS, SNIP))
        if SNIP in controls and scores.rule != "delta_grad":
            self.refuse("controls: snip takes absolute gradients row by row; the scores have to do "
                        "the same: leave `per_example: true` and `signed: false`")  # fmt: skip
        found = Audit(
            aligned, attacked or None, attack, languages, columns, scores, self.shares(),
            share, region, controls,
            self.word("control") or None, self.onto(), freeze, self.useful(), self.utility(),
            evaluation,
            read_space(self.raw, self.problems), self.seeds(attacked),
            self.choice(raw, "ancestor", ("check", "trust")), self.flag(raw, "deltas", False),
            self.word("device") or "auto", self.folder,
        )  # fmt: skip
        return None if self.problems else found

    # -- words, numbers ----------------------------------------------------------------------------

    def word(self, key: str) -> str:
        value = self.raw.get(key)
        if value is None:
            return ""
        if not isinstance(value, str) or not value:
            self.refuse(f"{key}: a word or a path, not {brief(value)}")
            return ""
        return value

    def flag(self, raw: Mapping[str, Any], key: str, default: bool, where: str = "") -> bool:
        value = raw.get(key, default)
        if not isinstance(value, bool):
            self.refuse(f"{where}{key}: true or false, not {brief(value)}")
            return default
        return value

    def whole(
        self, raw: Mapping[str, Any], key: str, default: int, where: str = "", low: int = 0
    ) -> int:
        value = raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 1 << 31:
            self.refuse(f"{where}{key}: a whole number from {low}, not {brief(value)}")
            return default
        return value

    def share(self, raw: Mapping[str, Any], key: str, default: float, where: str = "") -> float:
        return self.one_share(raw.get(key, default), f"{where}{key}", default)

    def one_share(self, value: object, where: str, default: float) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < float(value) <= 1:  # type: ignore[arg-type]
            self.refuse(f"{where}: a share of the entries, in (0, 1]; got {brief(value)}")
            return default
        return float(value)  # type: ignore[arg-type]

    def choice(
        self, raw: Mapping[str, Any], key: str, choices: tuple[str, ...], where: str = ""
    ) -> str:
        value = raw.get(key, choices[0])
        if value not in choices:
            hint = did_you_mean(str(value), choices)
            self.refuse(f"{where}{key}: {brief(value)} is not known; {hint}")
            return choices[0]
        return str(value)

    def some(self, where: str, value: object, choices: tuple[str, ...]) -> tuple[str, ...]:
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            self.refuse(f"{where}: some of {', '.join(choices)}, not {brief(value)}")
            return ()
        for word in words:
            if word not in choices:
                self.refuse(f"{where}: {word!r} is not known; {did_you_mean(word, choices)}")
        return tuple(dict.fromkeys(words))

    # -- sections ----------------------------------------------------------------------------------

    def columns(self) -> Columns:
        raw = section(self.raw, "rows", self.problems)
        names = tuple(Columns.__dataclass_fields__)
        refuse_unknown(raw, (*SIDES, *names), "rows: ", self.problems)
        given = {}
        for key in names:
            if key in raw and (not isinstance(raw[key], str) or not raw[key]):
                self.refuse(f"rows.{key}: the name of a column, not {brief(raw[key])}")
            elif key in raw:
                given[key] = raw[key]
        return Columns(**given)

    def _by_name(self, value: Any) -> Any:
        """A list of languages as a mapping."""
        if not isinstance(value, list):
            return value
        found: dict[str, Any] = {str(word): {} for word in value}
        if len(found) < len(value):
            self.refuse(f"languages: different languages, not {brief(value)}")
        return found

    def languages(self) -> dict[str, Rows]:
        shared = section(self.raw, "rows", self.problems)
        value = self._by_name(self.raw.get("languages"))
        if not isinstance(value, Mapping) or not value:
            self.refuse("languages: a mapping from languages to their rows, with at least one; or "
                        "a list, where the files under `rows` tell languages apart")  # fmt: skip
            return {}
        found = {}
        for language, entry in value.items():
            where = f"languages.{language}"
            entry = {} if entry is None else entry
            if not isinstance(entry, Mapping):
                self.refuse(f"{where}: a mapping with {', '.join(SIDES)}, not {brief(entry)}")
                continue
            if not re.fullmatch(r"\w+", str(language)):
                self.refuse(f"languages: {brief(language)} is no word for a language, such as en")
                continue
            refuse_unknown(entry, SIDES, f"{where}: ", self.problems)
            sources = {}
            for side in SIDES:
                given = entry.get(side, shared.get(side))
                if given is None:
                    self.refuse(f"{where}.{side}: missing; {MEANT[side]}, here or under `rows`")
                    continue
                place = f"{where}.{side}" if side in entry else f"rows.{side}"
                source = read_source(given, place, self.folder, "test", self.problems)
                if source is not None:
                    sources[side] = source
            if len(sources) == len(SIDES):
                found[str(language)] = Rows(**sources)
        return found

    def attack(self) -> Attack | None:
        raw = section(self.raw, "attack", self.problems)
        if not raw:
            return None
        names = ("train", "language", "limit", "response", "training")
        refuse_unknown(raw, names, "attack: ", self.problems)
        train = read_source(raw.get("train"), "attack.train", self.folder, "train", self.problems)
        training = read_training(
            section(raw, "training", self.problems, "attack."), TRAINING, self.problems,
            place="attack.training",
        )  # fmt: skip
        words = {}
        for key, default in (("language", ""), ("response", "response")):
            words[key] = raw.get(key, default)
            if not isinstance(words[key], str):
                self.refuse(f"attack.{key}: a word, not {brief(words[key])}")
        limit = self.whole(raw, "limit", 100, "attack.")
        if train is None:
            return None
        return Attack(train, str(words["language"]), limit, str(words["response"]), training)

    def scores(self) -> Scoring:
        raw = section(self.raw, "scores", self.problems)
        refuse_unknown(raw, tuple(Scoring.__dataclass_fields__), "scores: ", self.problems)
        where = "scores."
        return Scoring(
            self.choice(raw, "at", PLACES, where), self.flag(raw, "per_example", True, where),
            self.flag(raw, "signed", False, where), self.whole(raw, "rows", 16, where, 1),
        )  # fmt: skip

    def shares(self) -> tuple[float, ...]:
        value = self.raw.get("shares", list(SHARES))
        if not isinstance(value, list) or not value:
            self.refuse(f"shares: a list of shares of the entries, not {brief(value)}")
            return SHARES
        return tuple(sorted({self.one_share(v, f"shares[{i}]", 0.2) for i, v in enumerate(value)}))

    def freeze(self, share: float) -> Freeze | None:
        value = self.raw.get("freeze", False)
        if value is False or value is None:
            return None
        raw = {} if value is True else section(self.raw, "freeze", self.problems)
        refuse_unknown(raw, ("share", "controls"), "freeze: ", self.problems)
        controls = self.some("freeze.controls", raw.get("controls", list(FREEZING)), FREEZING)
        found = Freeze(self.share(raw, "share", share, "freeze."), controls)
        if found.share == 1:
            self.refuse("freeze.share: 1 leaves nothing that an attack could train")
        return found

    def useful(self) -> Useful | None:
        raw = section(self.raw, "useful", self.problems)
        if not raw:
            return None
        refuse_unknown(raw, ("rows", "share", "response", "limit"), "useful: ", self.problems)
        rows = read_source(raw.get("rows"), "useful.rows", self.folder, "train", self.problems)
        response = raw.get("response", Useful.response)
        if not isinstance(response, str) or not response:
            self.refuse(f"useful.response: the name of a column, not {brief(response)}")
        share = self.share(raw, "share", Useful.share, "useful.")
        if share == 1:
            self.refuse("useful.share: 1 leaves no entry for a region")
        limit = self.whole(raw, "limit", Useful.limit, "useful.")
        return None if rows is None else Useful(rows, share, str(response), limit)

    def onto(self) -> dict[str, str]:
        found = {}
        for name, path in section(self.raw, "onto", self.problems).items():
            if not re.fullmatch(r"[\w.-]+", name) or name == "aligned":
                self.refuse(f"onto: {name!r} cannot be the name of a model here")
            elif not isinstance(path, str) or not path:
                self.refuse(f"onto.{name}: the path of a model, not {brief(path)}")
            else:
                found[name] = path
        return found

    def utility(self) -> Path | dict[str, Any] | None:
        value = self.raw.get("utility")
        if isinstance(value, str) and value.endswith((".yaml", ".yml")):
            path = self.place(value)
            if not path.is_file():
                self.refuse(f"utility: no file {path}")
            return path
        if value is None:
            return None
        raw = {"data": value} if isinstance(value, str) else section(
            self.raw, "utility", self.problems
        )  # fmt: skip
        refuse_unknown(raw, UTILITY, "utility: ", self.problems)
        source = read_source(raw.get("data"), "utility.data", self.folder, "test", self.problems)
        return None if source is None else {**raw, "data": source.path}

    def evaluation(self) -> Evaluating:
        raw = section(self.raw, "evaluation", self.problems)
        where, like = "evaluation.", Evaluating()
        names = ("limit", "max_tokens", "chat", "system", "stop", "batch", "families", "within",
                 "judge", "asks", "broken")  # fmt: skip
        refuse_unknown(raw, names, "evaluation: ", self.problems)
        stop = raw.get("stop", [])
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
            self.refuse(f"evaluation.stop: a list of texts, not {brief(stop)}")
            stop = []
        chat, system = self.flag(raw, "chat", False, where), raw.get("system", "")
        if not isinstance(system, str) or (system and not chat):
            self.refuse(f"evaluation.system: a text, with `chat: true`; got {brief(system)}")
        lists = tuple(dict.fromkeys(f for families in FAMILIES.values() for f in families))
        broken = raw.get("broken", like.broken)
        if isinstance(broken, bool) or not isinstance(broken, int | float) or not 0 <= broken < 1:
            self.refuse(f"evaluation.broken: a share in [0, 1), not {brief(broken)}")
            broken = like.broken
        return Evaluating(
            self.whole(raw, "limit", like.limit, where),
            Decoding(self.whole(raw, "max_tokens", 32, where, 1), tuple(stop), chat, str(system)),
            self.whole(raw, "batch", like.batch, where, 1),
            self.some("evaluation.families", raw.get("families", []), lists),
            self.whole(raw, "within", like.within, where),
            section(raw, "judge", self.problems, where),
            self.choice(raw, "asks", ("refusal", "harm"), where), float(broken),
        )  # fmt: skip

    def seeds(self, attacked: str) -> tuple[int, ...]:
        value = self.raw.get("seeds", [0])
        value = [value] if isinstance(value, int) else value
        fine = isinstance(value, list) and value and all(type(v) is int and v >= 0 for v in value)
        if not fine or len(set(value)) != len(value):
            self.refuse(f"seeds: different whole numbers, not {brief(value)}")
            return (0,)
        if attacked and len(value) > 1:
            self.refuse("seeds: several belong to an `attack` that is trained here; an attacked "
                        "model that is there already has one")  # fmt: skip
        return tuple(value)


UTILITY = ("data", "text", "prompt", "response", "limit", "max_length", "too_long")
MEANT = {
    "probe": "prompts with the answers that are forbidden",
    "marked": "prompts that are to be refused",
    "benign": "prompts that are to be answered",
}

__all__ = [
    "CONTROLS", "FREEZING", "KEYS", "SHARES", "SIDES", "SNIP", "SPARED", "Attack", "Audit",
    "Columns", "Evaluating", "Freeze", "Rows", "Scoring", "Useful", "read_audit",
]  # fmt: skip
