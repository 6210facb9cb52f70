"""mergekit's recipes in Suture's terms: the same tensors, said in the other language.

What a parameter is for one tensor follows from four scopes, the nearest first: the source, its
slice, its module, the recipe. In each it may be a number, a gradient (a list over the depth), or a
list of conditions, of which the first whose ``filter`` is part of the tensor's name counts; where
none fits, the next scope is asked. So the scopes of a parameter, written one after another, are one
list of rules, which is what Suture's own recipes have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from suture.checkpoints.chat import read_chat_template
from suture.checkpoints.vocabulary import from_mergekit
from suture.checkpoints.writer import SHARD_SIZE
from suture.errors import Problems, RecipeError, brief, did_you_mean, nearest
from suture.merges.policy import Policy
from suture.merges.table import METHODS
from suture.schema.parameters import Parameter
from suture.schema.reader import Reader, refuse_unknown, section
from suture.schema.table import slip
from suture.tensors.roles import DEFAULT_SPACE, ParamSpace
from suture.tensors.spec import PROMOTED, dtype_named
from suture.verbs.merge.jobs import (
    UNKNOWN,
    ModelEntry,
    Recipe,
    Slice,
    Source,
    check_models,
    check_slice,
    layer_range,
    once,
    short,
)
from suture.verbs.merge.mergekit_methods import KITS, REQUIRED, Kit, Same

KEYS = ("models", "slices", "modules", "merge_method", "base_model", "dtype", "out_dtype",
        "parameters", "tokenizer", "tokenizer_source", "chat_template")  # fmt: skip

Scopes = list[tuple[str, Mapping[str, Any]]]
"""Parameters with the place where they stand, the nearest scope first."""


@dataclass
class _Input:
    """One model of a slice, as the recipe has it."""

    path: str
    layers: tuple[int, int] | None
    parameters: dict[str, Any]
    where: str


@dataclass
class _Cut:
    """One slice of the output, as the recipe has it; without slices there is one, of all layers."""

    inputs: list[_Input]
    where: str
    parameters: dict[str, Any] = field(default_factory=dict)
    base: str | None = None


def translated(raw: Mapping[str, Any], folder: Path, problems: Problems) -> Recipe:
    """A mergekit recipe in Suture's terms; faults are noted, and what is understood comes back."""
    return _Reader(raw, folder, problems).recipe()


class _Reader(Reader):
    def __init__(self, raw: Mapping[str, Any], folder: Path, problems: Problems) -> None:
        super().__init__(raw, folder, problems)
        self.notes: list[str] = []
        self.name = str(raw["merge_method"])
        if self.name not in KITS:  # all else is told as though the likely one were meant
            hint = did_you_mean(self.name, list(KITS))
            self.refuse(f"merge_method: no method {self.name!r}; {hint}")
            near = nearest(self.name, KITS) or ""
            self.name = near if slip(self.name, near) else "mergekit"
        self.kit = KITS.get(self.name)
        self.module: Scopes = []
        self.incomplete: set[str] = set()

    def recipe(self) -> Recipe:
        """The recipe in Suture's terms."""
        refuse_unknown(self.raw, KEYS, "", self.problems)
        body, where = self.body()
        base = self.raw.get("base_model")
        base = self.path(base, "base_model") if base else None
        shared = self.parameters(self.raw, "")
        cuts = self.cuts(body, where, base)
        dtype = self.dtype()
        blank = Recipe(UNKNOWN, {}, folder=self.folder, kit=dict(self.raw))
        if self.kit is None:
            paths = list(dict.fromkeys(i.path for cut in cuts for i in cut.inputs))
            models = {short(path, paths): ModelEntry(path) for path in paths if path}
            read_chat_template(self.raw.get("chat_template"), self.problems)
            return replace(blank, models=models, base=base)
        scopes = [*self.module, ("parameters", shared)]
        return self.translated(replace(blank, dtype=dtype), cuts, scopes, base)

    def dtype(self) -> str:
        """The dtype of the output; without one it is wide enough for every model."""
        found = PROMOTED
        for key in ("dtype", "out_dtype"):
            if self.raw.get(key) is not None:
                with self.problems.collecting():
                    try:
                        found = dtype_named(str(self.raw[key]))
                    except RecipeError as error:
                        raise RecipeError(f"{key}: {error}") from None
        return found

    def body(self) -> tuple[Mapping[str, Any], str]:
        """What holds the models or slices: the recipe, or its only module."""
        given = [key for key in ("models", "slices", "modules") if self.raw.get(key)]
        if len(given) > 1:
            self.refuse(f"{given[1]}: {given[0]} are given, too; keep one of them")
        if not given:
            self.refuse("models: a list of models, with at least one (or slices)")
        if given[:1] != ["modules"]:
            return self.raw, ""
        modules = self.raw["modules"]
        if not isinstance(modules, Mapping) or len(modules) != 1:
            names = ", ".join(map(str, modules)) if isinstance(modules, Mapping) else brief(modules)
            self.refuse(f"modules: one module is read, not {names}; merge them one after another")
            return {}, ""
        name, found = next(iter(modules.items()))
        where = f"modules.{name}"
        if not isinstance(found, Mapping):
            self.refuse(f"{where}: a mapping with models or slices, not {brief(found)}")
            return {}, ""
        refuse_unknown(found, ("models", "slices", "parameters"), f"{where}: ", self.problems)
        if bool(found.get("models")) == bool(found.get("slices")):
            self.refuse(f"{where}: models or slices, one of the two")
        self.module = [(f"{where}.parameters", self.parameters(found, f"{where}."))]
        return found, f"{where}."

    def path(self, value: object, where: str) -> str:
        """The path or hub id of a model, in mergekit's short or long form, with its adapter."""
        if isinstance(value, Mapping):  # {model: {path: ..., revision: ...}, lora: ...}
            keys = ("path", "revision") if "path" in value else ("model", "lora")
            refuse_unknown(value, keys, f"{where}: ", self.problems)
            parts = [value.get("model", value), *([value["lora"]] if value.get("lora") else [])]
            found = []
            for part in parts:
                if isinstance(part, Mapping) and part is not value:
                    refuse_unknown(part, ("path", "revision"), f"{where}: ", self.problems)
                if isinstance(part, Mapping) and isinstance(part.get("path"), str):
                    revision = part.get("revision")
                    found.append(f"{part['path']}@{revision}" if revision else str(part["path"]))
                elif isinstance(part, str):
                    found.append(part)
            if len(found) == len(parts):
                return "+".join(found)
        if not isinstance(value, str):
            self.refuse(f"{where}: a path or hub id, not {brief(value)}")
            return ""
        return value

    def parameters(self, raw: Mapping[Any, Any], where: str) -> dict[str, Any]:
        """The parameters of one scope, those that change nothing left out."""
        found = section(raw, "parameters", self.problems, where)
        if found.pop("int8_mask", None) is not None:
            self.notes.append("int8_mask changes nothing here: masks are never stored")
        kits = KITS.values() if self.kit is None else [self.kit]
        known = {key for kit in kits for part in (kit.own, kit.shared, kit.flags) for key in part}
        for key in sorted(found.keys() - known):
            hint = did_you_mean(key, sorted(known))
            self.refuse(f"{where}parameters: {self.name} has no {key!r}; {hint}")
            del found[key]
        for key in [
            k for k, same in (self.kit or Kit()).own.items() if k in found and not same.name
        ]:
            self.notes.append(f"{key} changes nothing in {self.name}")
            del found[key]
        return found

    def cuts(self, body: Mapping[str, Any], where: str, base: str | None) -> list[_Cut]:
        """The slices, or one of whole models, to which mergekit adds the base."""
        if body.get("slices"):
            raw = body["slices"]
            if not isinstance(raw, list):
                self.refuse(f"{where}slices: a list of slices, not {brief(raw)}")
                return []
            found = [self.cut(entry, f"{where}slices[{i}]") for i, entry in enumerate(raw)]
            return [cut for cut in found if cut is not None]
        raw = body.get("models")
        if not isinstance(raw, list) or not raw:
            if raw:
                self.refuse(f"{where}models: a list of models, not {brief(raw)}")
            return []
        inputs = list(self.inputs(raw, f"{where}models", ("model", "parameters")))
        if base is not None and all(i.path != base for i in inputs):
            inputs.append(_Input(base, None, {}, "base_model"))
        return [_Cut(inputs, "")]

    def cut(self, raw: object, where: str) -> _Cut | None:
        """One slice."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("sources"), list):
            self.refuse(f"{where}: a mapping with a list of sources, not {brief(raw)}")
            return None
        known = ("sources", "base_model", "parameters", "residual_weight")
        refuse_unknown(raw, known, f"{where}: ", self.problems)
        if raw.get("residual_weight") is not None:
            self.notes.append("residual_weight changes nothing, in mergekit either")
        base = raw.get("base_model")
        base = self.path(base, f"{where}.base_model") if base else None
        inputs = list(
            self.inputs(raw["sources"], f"{where}.sources", ("model", "layer_range", "parameters"))
        )
        if not raw["sources"]:
            self.refuse(f"{where}.sources: a list of sources, with at least one")
        for i in inputs:
            if [j.path for j in inputs].count(i.path) > 1 and i.path:
                self.refuse(f"{where}.sources: {i.path} stands twice; a slice has a model once")
        return _Cut(inputs, where, self.parameters(raw, f"{where}."), base)

    def inputs(self, raw: list[Any], where: str, keys: Sequence[str]) -> Iterator[_Input]:
        """The models of a slice, or of the whole recipe."""
        for number, entry in enumerate(raw):
            place = f"{where}[{number}]"
            if not isinstance(entry, Mapping) or "model" not in entry:
                self.refuse(f"{place}: a mapping with a model, not {brief(entry)}")
                continue
            refuse_unknown(entry, keys, f"{place}: ", self.problems)
            path = self.path(entry["model"], f"{place}.model")
            layers = None
            if "layer_range" in keys:
                if entry.get("layer_range") is None:
                    self.refuse(f"{place}: no layer_range; write `layer_range: [0, 16]`")
                    continue
                layers = layer_range(entry["layer_range"], f"{place}.layer_range", self.problems)
                if layers is None:
                    continue
            yield _Input(path, layers, self.parameters(entry, f"{place}."), place)

    def translated(
        self, recipe: Recipe, cuts: list[_Cut], scopes: Scopes, base: str | None
    ) -> Recipe:
        """The same, once everything was read."""
        assert self.kit is not None
        method = METHODS[self.kit.method or self.name]
        difference = self.kit.base == "difference"
        paths = list(dict.fromkeys(i.path for cut in cuts for i in cut.inputs if i.path))
        if base is not None:  # what stands beside the weights comes from the base, or the first
            paths = [base, *(path for path in paths if path != base)]
        labels = {path: short(path, paths) for path in paths}
        if difference and base is not None:
            labels[base] = "base"
        tokenizer = from_mergekit(
            self.raw, self.problems, labels.get(base or "", base),
            next((n for n in labels.values() if n != "base"), None),
            lambda value, where: labels.get(path := self.path(value, where), path),
        )  # fmt: skip
        template = read_chat_template(self.raw.get("chat_template"), self.problems)
        if self.kit.base == "first" and base is None and all(cut.base is None for cut in cuts):
            self.refuse(f"base_model: {self.name} starts from the base model; name one")
        if cuts and not cuts[0].where:
            once([i.path for i in cuts[0].inputs if i.path], self.problems)
        slices = [self.slice(cut, scopes, labels, base) for cut in cuts]
        recipe = replace(
            recipe, method=method, base=base if difference else None, space=ParamSpace((), ()),
            models={n: ModelEntry(path) for path, n in labels.items() if n != "base"},
            policy=Policy(), required=tuple(sorted(self.incomplete)),
            notes=tuple(dict.fromkeys(self.notes)), tokenizer=tokenizer, chat_template=template,
        )  # fmt: skip
        recipe = self.placed(recipe, cuts, slices)
        check_models(recipe, self.problems)
        for cut, made in zip(cuts, recipe.slices, strict=False):
            check_slice(recipe, made, cut.where, "the base_model", self.problems)
        return recipe

    def slice(
        self, cut: _Cut, scopes: Scopes, labels: Mapping[str, str], base: str | None
    ) -> Slice:
        """One slice in Suture's terms."""
        assert self.kit is not None
        start = cut.base or base
        outer = [(f"{cut.where}.parameters", cut.parameters), *scopes] if cut.where else scopes
        inputs = cut.inputs
        if self.kit.base == "first":
            inputs = sorted(inputs, key=lambda i: i.path != start)
        sources = {}
        for i in inputs:
            inner = [(f"{i.where}.parameters", i.parameters), *outer]
            is_start = self.kit.base == "difference" and i.path == start
            own = {} if is_start or not i.path else self.own(inner, i)
            sources[labels.get(i.path, i.path)] = Source(i.layers, own, f"{i.where}.layer_range")
            for key in i.parameters:
                if key not in self.kit.own:
                    self.refuse(f"{i.where}.parameters: {key!r} belongs to all models; "
                                "write it under the recipe's parameters")  # fmt: skip
        shared = {
            same.name: value
            for key, same in self.kit.shared.items()
            if same.name and (value := self.value(key, same, outer, "parameters")) is not None
        }
        return Slice(sources, {**shared, **self.fixed(outer)}, labels.get(start or "", "base"))

    def own(self, scopes: Scopes, i: _Input) -> dict[str, Any]:
        """The parameters of one model in a slice."""
        assert self.kit is not None
        found = {}
        for key, same in self.kit.own.items():
            if same.name:
                value = self.value(key, same, scopes, f"{i.where}: {i.path}")
                if value is not None:
                    found[same.name] = value
        return found

    def value(self, key: str, same: Same, scopes: Scopes, where: str) -> Any:
        """A parameter as Suture's recipes have it: a number, a curve, or rules by name."""
        parameter = METHODS[(self.kit and self.kit.method) or self.name].parameters[same.name]
        rules: dict[str, Any] = {}
        for place, scope in scopes:
            if key in scope and scope[key] is not None:
                for pattern, value in self.rules(scope[key], f"{place}.{key}", parameter):
                    rules.setdefault(pattern, value)
                if "*" in rules:
                    break
        if "*" not in rules and same.default is not REQUIRED:
            rules["*"] = same.default
        if not rules:
            self.refuse(
                f"{where}: mergekit's {self.name} needs a {key} (for one model, or for all)"
            )
            return None
        if "*" not in rules:
            self.incomplete.add(same.name)
        return rules["*"] if list(rules) == ["*"] else rules

    def rules(
        self, value: object, where: str, parameter: Parameter
    ) -> Iterator[tuple[str, float | list[float]]]:
        """One setting as patterns of names with what holds for them, in order."""
        conditions = value if isinstance(value, list) else [value]
        if not any(isinstance(c, Mapping) for c in conditions):
            yield "*", self.number(value, where, parameter)
            return
        for number, entry in enumerate(conditions):
            place = f"{where}[{number}]" if isinstance(value, list) else where
            if not isinstance(entry, Mapping):
                self.refuse(f"{place}: conditions and numbers do not mix; write {{value: ...}}")
                continue
            refuse_unknown(entry, ("filter", "value"), f"{place}: ", self.problems)
            word = entry.get("filter")
            if entry.get("value") is None:
                self.refuse(f"{place}: no value; write {{filter: mlp, value: 0.5}}")
                continue
            if word is not None and not isinstance(word, str):
                self.refuse(f"{place}.filter: a part of tensor names, not {brief(word)}")
                continue
            found = self.number(entry["value"], f"{place}.value", parameter)
            yield ("*" if word in (None, "*", "") else f"*{_literal(str(word))}*"), found

    def number(self, value: object, where: str, parameter: Parameter) -> float | list[float]:
        """A number or a gradient, with what is wrong with it noted at its own place."""
        if isinstance(value, list) and not value:
            self.refuse(f"{where}: a gradient of no numbers; give one or more")
            return 1.0
        found = []
        for n, v in enumerate(value if isinstance(value, list) else [value]):
            v = _number(v)
            problem = parameter.problem(v)
            if problem is not None:
                self.refuse(f"{where}{f'[{n}]' if isinstance(value, list) else ''}: {problem}")
            found.append(v if problem is None else 1.0)
        return found if isinstance(value, list) else found[0]

    def fixed(self, scopes: Scopes) -> dict[str, Any]:
        """What follows from the flags of a slice."""
        assert self.kit is not None
        flags = {}
        for key, default in self.kit.flags.items():
            place, value = next(((p, s[key]) for p, s in scopes if s.get(key) is not None),
                                ("", default))  # fmt: skip
            if not isinstance(value, bool | int) or value not in (True, False):
                self.refuse(f"{place}.{key}: true or false for all tensors, not {brief(value)}")
                value = default
            flags[key] = bool(value)
        try:
            return self.kit.fixed(flags)
        except RecipeError as error:
            self.refuse(f"parameters: {error}")
            return {}

    def placed(self, recipe: Recipe, cuts: list[_Cut], slices: list[Slice]) -> Recipe:
        """Parameters where a reader expects them: what all slices share stands under all."""
        common = dict(slices[0].parameters) if slices else {}
        for one in slices[1:]:
            common = {k: v for k, v in common.items() if one.parameters.get(k) == v}
        if cuts and not cuts[0].where:
            entries = {
                n: ModelEntry(e.path, slices[0].sources[n].parameters)
                for n, e in recipe.models.items()
            }
            if self.kit is not None and self.kit.base == "first":
                entries = {n: entries[n] for n in slices[0].sources}
            return replace(recipe, models=entries, parameters=common)
        rest = tuple(
            replace(s, parameters={k: v for k, v in s.parameters.items() if k not in common})
            for s in slices
        )
        return replace(recipe, slices=rest, parameters=common)


def _literal(word: str) -> str:
    """A part of a name as a glob pattern that means only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in word)


def _number(value: object) -> Any:
    """Numbers that were written as text, as mergekit reads them."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


REASONS: dict[tuple[str, object], str] = {
    ("scope", "tensor"): "mergekit trims every tensor to its density; in the paper, and in Suture "
    "unless told otherwise, entries compete over the whole model, so that a layer which hardly "
    "changed keeps little",
    (
        "rounding",
        "floor",
    ): "mergekit rounds density * n down (and keeps at least one entry); Suture "
    "rounds to the nearest count",
    ("aggregate", "weighted_mean"): "mergekit divides by the weights that agree (normalize: true), "
    "so weights of 0.5 and 0.5 give what 1 and 1 give; Suture takes the mean of the weighted "
    "entries, as the paper does, where the size of a weight counts",
    ("aggregate", "sum"): "mergekit adds the entries that agree (normalize: false); Suture takes "
    "their mean, as the papers of TIES do",
    (
        "zero_sign",
        "positive",
    ): "where the votes cancel exactly, mergekit elects plus; Suture elects "
    "no sign and leaves the base",
    (
        "rescale",
        "l1",
    ): "mergekit restores each tensor's sum of magnitudes after dropping; the paper, "
    "and Suture, divide by the density, which keeps the expected value of every entry",
    (
        "rescale",
        "none",
    ): "the recipe asks for no rescaling (rescale: false); Suture divides what is "
    "kept by the density, as the paper does",
    (
        "normalize",
        True,
    ): "the recipe divides by the sum of the weights; Suture adds task vectors as they are",
    ("normalize", False): "the recipe takes the weights as they are; Suture divides by their sum",
}
"""Why a parameter of a translated recipe is not the one that Suture would take."""


def differences(recipe: Recipe) -> list[str]:
    """What Suture would do otherwise by its own defaults, and why, a sentence each."""
    found = []
    if recipe.space == ParamSpace((), ()):
        found.append(
            "space: mergekit merges everything; Suture leaves token embeddings and output heads as "
            "they are in the base, because their rows belong to single tokens"
        )
    known = recipe.method.parameters
    given = {**recipe.parameters}
    for cut in recipe.slices:
        given |= {k: v for k, v in cut.parameters.items() if k not in given}
    for key, value in given.items():
        reason = REASONS.get((key, value)) if isinstance(value, str | bool) else None
        if reason is not None and key in known and value != known[key].default:
            found.append(f"{key}: {reason}")
    kit = recipe.kit or {}
    word = str(kit.get("dtype"))
    if kit.get("dtype") is None:
        found.append(
            "output.dtype: mergekit writes the widest dtype among the models of each tensor; "
            "Suture keeps that of the base"
        )
    elif word.removeprefix("torch.") != "float32":
        found.append(
            f"dtype: mergekit casts the models to {word} and computes in it, rounding at every "
            "step (but in linear and slerp); Suture computes in float32 and rounds once, here, too"
        )
    if recipe.method.random:
        found.append(
            "seed: mergekit draws from one generator for the whole run, so that threads and other "
            "tensors decide which entries are dropped; Suture draws by seed, model, tensor and "
            "position, here, too: density and statistics agree, single entries do not"
        )
    return found


def native(recipe: Recipe) -> dict[str, Any]:
    """The same merge as a recipe of Suture's own, with nothing in it that is a default."""
    whole = recipe.resolved()
    known = recipe.method.parameters
    found: dict[str, Any] = {"base": whole["base"]} if recipe.base is not None else {}
    found["models"] = {n: e["path"] if len(e) == 1 else e for n, e in whole["models"].items()}
    found["method"] = whole["method"]
    shared = {k: v for k, v in recipe.parameters.items() if v != known[k].default}
    for key, value in (("parameters", shared), ("slices", whole.get("slices"))):
        if value:
            found[key] = value
    if recipe.space == ParamSpace((), ()):
        found["space"] = {"exclude": []}
    elif recipe.space != DEFAULT_SPACE:
        found["space"] = whole["space"]
    policy = {k: v for k, v in whole["policy"].items() if v != getattr(Policy(), k)}
    output = {k: v for k, v in whole["output"].items() if v not in (None, SHARD_SIZE)}
    for key, value in (("policy", policy), ("output", output), ("protect", whole.get("protect")),
                       ("tokenizer", whole.get("tokenizer")),
                       ("chat_template", whole.get("chat_template"))):  # fmt: skip
        if value:
            found[key] = value
    if recipe.stages:
        found["stages"] = {name: native(stage) for name, stage in recipe.stages.items()}
    return found
