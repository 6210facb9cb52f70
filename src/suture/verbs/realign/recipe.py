"""The recipe of a realignment: YAML to frozen types, all faults at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from suture.errors import Problems, RecipeError, brief, did_you_mean
from suture.schema.reader import Reader, read_space, read_training, refuse_unknown, section
from suture.schema.settings import check_words, settings
from suture.schema.sources import TOO_LONG, DataSpec, read_held_out, read_source
from suture.schema.text import raw_recipe
from suture.schema.tuning import TuneSettings
from suture.tensors.roles import EVERYTHING, ParamSpace
from suture.tensors.spec import WORD_OF, dtype_named
from suture.verbs.realign.fuse import Fusing, read_fusing
from suture.verbs.realign.methods import REALIGNERS, Realigner
from suture.verbs.realign.pairs import PairSpec

KEYS = (
    "method", "base", "aligned", "models", "safety", "fuse", "parameters", "space", "data",
    "utility", "training", "ancestor", "output", "device",
)  # fmt: skip
TRAINING = TuneSettings(
    epochs=3, batch=4, accumulate=4, lr=5e-3, warmup=0.0, schedule="cosine", weight_decay=0.0
)
"""That of the published code."""
ANCESTOR = ("check", "trust")


@dataclass(frozen=True)
class Realign:
    """A realignment, as data: every key is known and every value checked."""

    method: Realigner
    aligned: str
    models: Mapping[str, str]
    weights: Mapping[str, float]
    base: str | None = None
    safety: str | None = None
    fusing: Fusing = field(default_factory=Fusing)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    space: ParamSpace = field(default_factory=lambda: ParamSpace((), ()))
    data: PairSpec | None = None
    utility: DataSpec | None = None
    """Rows of what the tuned models are for; a loss per token is measured on them."""
    training: TuneSettings = TRAINING
    ancestor: str = "check"
    """Whether distances are asked if the tuned models come from the aligned one."""
    dtype: str | None = None
    device: str = "auto"
    folder: Path = field(default_factory=Path)
    notes: tuple[str, ...] = ()
    """What the recipe gives and the method does not read."""

    @property
    def trained(self) -> tuple[str, ...]:
        """The keys of ``training`` that are read."""
        if self.method.trains:
            return tuple(asdict(self.training))
        split = () if self.data is None else ("seed",)  # of the pairs that are held out
        read = ("batch", "activations", "activations_memory", "activations_disk")
        return split if self.data is None and self.utility is None else (*read, *split)

    @property
    def reads_base(self) -> bool:
        """Whether the base is asked for anything."""
        finds = self.method.name == "protect" and not self.settings.get("mask")
        return "base" in self.method.needs or finds or self.ancestor == "check"

    @property
    def settings(self) -> dict[str, Any]:
        """The parameters of the method with its defaults."""
        return settings(self.method, self.parameters, Problems())

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as plain data that can be read again."""
        return {
            "method": self.method.name,
            "base": self.base,
            "aligned": self.aligned,
            "models": {m: {"path": p, "weight": self.weights[m]} for m, p in self.models.items()},
            "safety": self.safety,
            "fuse": self.fusing.resolved(),
            "parameters": self.settings,
            "space": {"include": list(self.space.include), "exclude": list(self.space.exclude)},
            "data": None if self.data is None else _sided(asdict(self.data)),
            "utility": None if self.utility is None else _rows(self.utility),
            "training": {key: getattr(self.training, key) for key in self.trained},
            "ancestor": self.ancestor,
            "output": {"dtype": None if self.dtype is None else WORD_OF[self.dtype]},
            "device": self.device,
        }


def _sided(data: dict[str, Any]) -> dict[str, Any]:
    share = data.pop("share")
    return {**data, "validation": data["validation"] or share}


def _rows(spec: DataSpec) -> dict[str, Any]:
    found = asdict(spec)
    held = found["validation"] or spec.share
    return {"rows": found["train"], "validation": held, **{k: found[k] for k in UTILITY_KEYS[2:]}}


UTILITY_KEYS = (
    "rows", "validation", "text", "prompt", "response", "messages", "format", "max_length",
    "too_long", "limit", "chat",
)  # fmt: skip


def read_realign(source: Path | Mapping[str, Any], folder: Path | None = None) -> Realign:
    """Read a recipe file, or a mapping.

    Raises:
        RecipeError: everything that is wrong with it, at once.
    """
    problems = Problems()
    found = parse_realign(source, folder, problems)
    problems.raise_if_any()
    assert found is not None
    return found


def parse_realign(
    source: Path | Mapping[str, Any], folder: Path | None, problems: Problems
) -> Realign | None:
    """The same, but with faults noted in ``problems``.

    A recipe with faults comes back as far as it is understood, so that its models and rows can be
    looked at too; ``None`` where there is no recipe at all.
    """
    with problems.collecting():
        raw, where = raw_recipe(source, folder, problems)
        return _Reader(raw, where, problems).recipe()
    return None


class _Reader(Reader):
    """Reads one recipe; every fault is noted."""

    def recipe(self) -> Realign:
        refuse_unknown(self.raw, KEYS, "", self.problems)
        found, parameters = self.method()
        aligned = self.path("aligned")
        if aligned is None and self.raw.get("aligned") is None:
            self.refuse("aligned: missing; the safe model that the others were tuned from")
        paths, weights = self.models()
        fusing = read_fusing(self.raw.get("fuse"), len(paths), self.problems)
        data, utility = self.data(), self.utility()
        base, safety = self.path("base"), self.path("safety")
        given = {"base": base, "safety": safety, "data": data}
        for need in found.needs:
            if given[need] is None and self.raw.get(need) is None:
                self.refuse(f"{need}: missing; {found.name} needs {MEANT[need]}")
        how = section(self.raw, "training", self.problems)
        training = read_training(how, TRAINING, self.problems)
        space, dtype = read_space(self.raw, self.problems, EVERYTHING), self.dtype()
        ancestor = self.raw.get("ancestor", "check")
        if ancestor not in ANCESTOR:
            hint = did_you_mean(str(ancestor), ANCESTOR)
            self.refuse(f"ancestor: {brief(ancestor)} is not known; {hint}")
        device = self.raw.get("device", "auto")
        if not isinstance(device, str):
            self.refuse(f"device: auto, cpu or cuda, not {brief(device)}")
            device = "auto"
        notes = []
        if safety is not None and "safety" not in found.needs:
            safety = None
            notes.append(f"safety: {found.name} reads no such model; it is left out")
        if utility is not None and (utility.validation or utility.share) and not found.chooses:
            notes.append(f"utility.validation: {found.name} chooses nothing by these rows")
        made = Realign(
            found, aligned or "", paths, weights, base, safety, fusing, parameters, space, data,
            utility, training, ancestor, dtype, device, self.folder,
        )  # fmt: skip
        idle = [key for key in how if key not in made.trained]
        if idle:
            notes.append(f"training: {found.name} does not train, so {', '.join(idle)} "
                         f"{'has' if len(idle) == 1 else 'have'} no effect")  # fmt: skip
        return replace(made, notes=tuple(notes))

    def method(self) -> tuple[Realigner, dict[str, Any]]:
        """The method with its parameters; where it is unknown, the one that was likely meant."""
        parameters, name = section(self.raw, "parameters", self.problems), self.raw.get("method")
        found = REALIGNERS.likely(name)
        with self.problems.collecting("method: "):
            if not isinstance(name, str):
                what = "missing" if name is None else f"a name, not {brief(name)}"
                raise RecipeError(f"{what}; `suture realigners` lists them")
            found = REALIGNERS.find(name)
        if found is None:
            check_words(REALIGNERS.values(), parameters, self.problems, noun="way to realign")
            return REALIGNERS["magnitude"], {}
        before = len(self.problems)
        with self.problems.supposing(None if found.name == name else found.name):
            values = settings(found, parameters, self.problems)
            if len(self.problems) == before:
                with self.problems.collecting():
                    found.make(**values)
        return found, parameters

    def path(self, key: str) -> str | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value:
            self.refuse(f"{key}: the path or hub id of a model, not {brief(value)}")
            return None
        return value

    def models(self) -> tuple[dict[str, str], dict[str, float]]:
        entries = section(self.raw, "models", self.problems)
        if not entries and isinstance(self.raw.get("models", {}), Mapping):
            self.refuse("models: a mapping from names to the tuned models, with at least one")
        paths, weights = {}, {}
        for name, entry in sorted(entries.items()):  # the order of models is no part of a result
            if not re.fullmatch(r"[\w.-]+", name):  # it becomes part of a file's name
                self.refuse(f"models: {name!r} cannot be the name of a model; letters, digits, "
                            "_, . and - can")  # fmt: skip
                continue
            given = {"path": entry} if isinstance(entry, str) else entry
            if not isinstance(given, Mapping) or not isinstance(given.get("path"), str):
                self.refuse(f"models.{name}: a path, or a mapping with a path, not {brief(entry)}")
                continue
            refuse_unknown(given, ("path", "weight"), f"models.{name}: ", self.problems)
            weight = given.get("weight", 1.0)
            if (
                isinstance(weight, bool)
                or not isinstance(weight, int | float)
                or not abs(weight) < 2**63
            ):
                self.refuse(f"models.{name}.weight: a number, not {brief(weight)}")
                continue
            paths[name], weights[name] = given["path"], float(weight)
        return paths, weights

    def dtype(self) -> str | None:
        raw = section(self.raw, "output", self.problems)
        refuse_unknown(raw, ("dtype",), "output: ", self.problems)
        try:
            return None if raw.get("dtype") is None else dtype_named(str(raw["dtype"]))
        except RecipeError as error:
            self.refuse(f"output.dtype: {error}")
        return None

    def data(self) -> PairSpec | None:
        raw = section(self.raw, "data", self.problems)
        if not raw:
            return None
        names = tuple(f.name for f in fields(PairSpec) if f.name != "share")
        refuse_unknown(raw, names, "data: ", self.problems)
        train = read_source(raw.get("train"), "data.train", self.folder, "train", self.problems)
        validation, share = read_held_out(raw, "data.validation", 0.1, self.folder, self.problems)
        test = None
        if raw.get("test") is not None:
            test = read_source(raw["test"], "data.test", self.folder, "test", self.problems)
        given = self.columns(raw, "data", ("prompt", "chosen", "rejected"))
        given |= self.limits(raw, "data")
        return None if train is None else PairSpec(train, validation, test, share, **given)

    def utility(self) -> DataSpec | None:
        value = self.raw.get("utility")
        if value is None:
            return None
        raw = {"rows": value} if isinstance(value, str) else section(
            self.raw, "utility", self.problems
        )  # fmt: skip
        refuse_unknown(raw, UTILITY_KEYS, "utility: ", self.problems)
        rows = read_source(raw.get("rows"), "utility.rows", self.folder, "test", self.problems)
        given = self.columns(raw, "utility", ("text", "prompt", "response", "messages"))
        given |= self.limits(raw, "utility")
        form = raw.get("format") or ""
        if form not in ("", "text", "prompt", "chat"):
            self.refuse(f"utility.format: text, prompt or chat, not {brief(form)}")
        held, share = read_held_out(raw, "utility.validation", 0.0, self.folder, self.problems)
        return None if rows is None else DataSpec(rows, held, share, format=form, **given)

    def columns(self, raw: Mapping[str, Any], where: str, keys: tuple[str, ...]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for key in keys:
            if key in raw and (not isinstance(raw[key], str) or not raw[key]):
                self.refuse(f"{where}.{key}: the name of a column, not {brief(raw[key])}")
            elif key in raw:
                given[key] = raw[key]
        return given

    def limits(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for key in ("max_length", "limit"):
            value = raw.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                self.refuse(f"{where}.{key}: a whole number, not {brief(value)}")
            else:
                given[key] = value
        long = raw.get("too_long", "error")
        if long not in TOO_LONG:
            self.refuse(f"{where}.too_long: {did_you_mean(str(long), TOO_LONG)}")
        else:
            given["too_long"] = long
        chat = raw.get("chat", False)
        if not isinstance(chat, bool):
            self.refuse(f"{where}.chat: true or false, not {brief(chat)}")
        return given | {"chat": chat}


MEANT = {
    "base": "the pretrained model that the aligned one was made of",
    "safety": "a model tuned from the aligned one on safety data alone",
    "data": "pairs of a safe (`chosen`) and an unsafe (`rejected`) answer",
}

__all__ = ["KEYS", "TRAINING", "Realign", "read_realign"]
