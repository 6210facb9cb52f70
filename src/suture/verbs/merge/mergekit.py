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

from suture.checkpoints.vocabulary import UNION, ZERO, Wanted
from suture.checkpoints.writer import SHARD_SIZE
from suture.errors import Problems, RecipeError, brief, did_you_mean, nearest
from suture.merges.policy import Policy
from suture.merges.table import METHODS
from suture.schema.parameters import Parameter
from suture.schema.read import parse
from suture.schema.table import slip
from suture.tensors.roles import DEFAULT_SPACE, EVERYTHING
from suture.tensors.spec import PROMOTED
from suture.verbs.merge.keys import Output
from suture.verbs.merge.mergekit_keys import KitModel, KitModule, KitRecipe, KitSlice
from suture.verbs.merge.mergekit_methods import KITS, REQUIRED, Kit, Same
from suture.verbs.merge.recipe import (
    MergeRecipe,
    ModelEntry,
    Slice,
    Source,
    model_faults,
    short,
    slice_faults,
    twice,
)

Scopes = list[tuple[str, Mapping[str, Any]]]
"""Parameters with the place where they stand, the nearest scope first."""


@dataclass
class _Input:
    """One model of a slice, with where it stands."""

    path: str
    layers: tuple[int, int] | None
    parameters: dict[str, Any]
    where: str


@dataclass
class _Cut:
    """One slice of the output; without slices there is one, of all layers."""

    inputs: list[_Input]
    where: str
    parameters: dict[str, Any] = field(default_factory=dict)
    base: str | None = None


def translated(raw: Mapping[str, Any], folder: Path, problems: Problems) -> MergeRecipe:
    """A mergekit recipe in Suture's terms; faults are noted, and what is understood comes back."""
    given = parse(KitRecipe, raw, folder, problems, whole=False)
    assert given is not None
    recipe = _Translator(given, problems).recipe()
    return recipe.placed(folder, raw).with_(kit=dict(raw))


class _Translator:
    """Makes a recipe of Suture's of one of mergekit's; every fault is noted."""

    def __init__(self, given: KitRecipe, problems: Problems) -> None:
        self.given, self.problems = given, problems
        self.notes: list[str] = []
        self.name = str(given.merge_method)
        if self.name not in KITS:  # all else is told as though the likely one were meant
            hint = did_you_mean(self.name, list(KITS))
            self.refuse(f"merge_method: no method {self.name!r}; {hint}")
            near = nearest(self.name, KITS) or ""
            self.name = near if slip(self.name, near) else "mergekit"
        self.kit = KITS.get(self.name)
        self.incomplete: set[str] = set()

    def refuse(self, text: str) -> None:
        """Note a fault."""
        self.problems.add(RecipeError, text)

    def recipe(self) -> MergeRecipe:
        """The recipe in Suture's terms."""
        given, module, where = self.given, KitModule.model_construct(), ""
        scopes: Scopes = [("parameters", self.parameters(given, ""))]
        for name, module in [*given.modules.items()][:1]:
            where = f"modules.{name}."
            scopes.insert(0, (f"{where}parameters", self.parameters(module, where)))
        body = module if given.modules else given
        cuts = self.cuts(body, where)
        if self.kit is None:
            paths = list(dict.fromkeys(i.path for cut in cuts for i in cut.inputs))
            models = {short(path, paths): _entry(path) for path in paths if path}
            return MergeRecipe.model_construct(models=models, base=given.base_model)
        return self.translated(cuts, scopes)

    def parameters(self, part: KitModule | KitSlice | KitModel, where: str) -> dict[str, Any]:
        """The parameters of one scope, those that change nothing left out."""
        found = dict(part.parameters)
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

    def cuts(self, body: KitModule, where: str) -> list[_Cut]:
        """The slices, or one of whole models, to which mergekit adds the base."""
        found = []
        for number, one in enumerate(body.slices):
            place = f"{where}slices[{number}]"
            if one.residual_weight is not None:
                self.notes.append("residual_weight changes nothing, in mergekit either")
            inputs = self.inputs(one.sources, f"{place}.sources")
            own = self.parameters(one, f"{place}.")
            found.append(_Cut(inputs, place, own, one.base_model))
        if found or not body.models:
            return found
        inputs, base = self.inputs(body.models, f"{where}models"), self.given.base_model
        if base is not None and all(i.path != base for i in inputs):
            inputs.append(_Input(base, None, {}, "base_model"))
        return [_Cut(inputs, "")]

    def inputs(self, given: Sequence[KitModel], where: str) -> list[_Input]:
        """The models of a slice, or of the whole recipe."""
        return [
            _Input(one.model, getattr(one, "layer_range", None),
                   self.parameters(one, f"{where}[{n}]."), f"{where}[{n}]")
            for n, one in enumerate(given)
        ]  # fmt: skip

    def translated(self, cuts: list[_Cut], scopes: Scopes) -> MergeRecipe:
        """The same, once everything was read."""
        assert self.kit is not None
        method, base = METHODS[self.kit.method or self.name], self.given.base_model
        difference = self.kit.base == "difference"
        paths = list(dict.fromkeys(i.path for cut in cuts for i in cut.inputs if i.path))
        if base is not None:  # what stands beside the weights comes from the base, or the first
            paths = [base, *(path for path in paths if path != base)]
        labels = {path: short(path, paths) for path in paths}
        if difference and base is not None:
            labels[base] = "base"
        if self.kit.base == "first" and base is None and all(cut.base is None for cut in cuts):
            self.refuse(f"base_model: {self.name} starts from the base model; name one")
        if cuts and not cuts[0].where:
            for text in twice([i.path for i in cuts[0].inputs if i.path]):
                self.refuse(f"models: {text}")
        slices = [self.slice(cut, scopes, labels, base) for cut in cuts]
        given = self.given
        recipe = MergeRecipe.model_construct(
            method=method, base=base if difference else None, space=EVERYTHING, policy=Policy(),
            models={n: _entry(path) for path, n in labels.items() if n != "base"},
            tokenizer=self.tokenizer(labels), chat_template=given.chat_template,
            output=Output.model_construct(dtype=given.out_dtype or given.dtype or PROMOTED),
        )  # fmt: skip
        recipe = self.placed(recipe, cuts, slices).with_(
            required=tuple(sorted(self.incomplete)), notes=tuple(dict.fromkeys(self.notes)),
            places={(number, labels.get(i.path, i.path)): f"{i.where}.layer_range"
                    for number, cut in enumerate(cuts) for i in cut.inputs},
        )  # fmt: skip
        for text in model_faults(recipe, method):
            self.refuse(text)
        based = recipe.base is not None
        for cut, made in zip(cuts, recipe.slices, strict=False):
            for text in slice_faults(method, based, made, cut.where, "the base_model"):
                self.refuse(text)
        return recipe

    def tokenizer(self, labels: Mapping[str, str]) -> Wanted | None:
        """The tokenizer of the output, models by their names."""
        wanted, source = self.given.tokenizer, self.given.tokenizer_source
        wanted = Wanted(source) if wanted is None and source is not None else wanted
        if wanted is None:
            return None

        def named(path: str | None) -> str | None:
            return path if path in (None, UNION, ZERO) else labels.get(str(path), path)

        base = self.given.base_model
        tokens = {t: replace(r, source=named(r.source)) for t, r in wanted.tokens.items()}
        wanted = replace(wanted, source=str(named(wanted.source)), base=named(wanted.base),
                         tokens=tokens)  # fmt: skip
        first = next((n for n in labels.values() if n != "base"), None)
        return wanted.beside(labels.get(base or "", base), first)

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
            sources[labels.get(i.path, i.path)] = Source.model_construct(layers=i.layers, **own)
            for key in i.parameters:
                if key not in self.kit.own:
                    self.refuse(f"{i.where}.parameters: {key!r} belongs to all models; "
                                "write it under the recipe's parameters")  # fmt: skip
        shared = {
            same.name: value
            for key, same in self.kit.shared.items()
            if same.name and (value := self.value(key, same, outer, "parameters")) is not None
        }
        return Slice.model_construct(
            sources=sources, parameters={**shared, **self.fixed(outer)},
            base=labels.get(start or "", "base"),
        )  # fmt: skip

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
            for key in [k for k in entry if k not in ("filter", "value")]:
                hint = did_you_mean(str(key), ["filter", "value"])
                self.refuse(f"{place}: unknown key {key!r}; {hint}")
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

    def placed(
        self, recipe: MergeRecipe, cuts: list[_Cut], slices: list[Slice]
    ) -> MergeRecipe:  # fmt: skip
        """Parameters where a reader expects them: what all slices share stands under all."""
        common = dict(slices[0].parameters) if slices else {}
        for one in slices[1:]:
            common = {k: v for k, v in common.items() if one.parameters.get(k) == v}
        if cuts and not cuts[0].where:
            entries = {
                n: _entry(e.path, slices[0].sources[n].parameters) for n, e in recipe.models.items()
            }
            if self.kit is not None and self.kit.base == "first":
                entries = {n: entries[n] for n in slices[0].sources}
            return recipe.with_(models=entries, parameters=common)
        rest = tuple(
            s.model_copy(update={
                "parameters": {k: v for k, v in s.parameters.items() if k not in common}
            }) for s in slices
        )  # fmt: skip
        return recipe.with_(slices=rest, parameters=common)


def _entry(path: str, own: Mapping[str, Any] | None = None) -> ModelEntry:
    return ModelEntry.model_construct(path=path, **(own or {}))


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


def differences(recipe: MergeRecipe) -> list[str]:
    """What Suture would do otherwise by its own defaults, and why, a sentence each."""
    found = []
    if recipe.space == EVERYTHING:
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


def native(recipe: MergeRecipe) -> dict[str, Any]:
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
    if recipe.space == EVERYTHING:
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
