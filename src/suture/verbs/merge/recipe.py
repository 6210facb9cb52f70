"""What a merge recipe is: its keys, what they must satisfy together, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from annotated_types import MinLen
from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, WrapValidator
from pydantic_core import InitErrorDetails

from suture.errors import Problems, brief, did_you_mean
from suture.merges.base import Method, located, spelled
from suture.merges.policy import STRICT, Policy
from suture.merges.presets import PRESETS, Preset
from suture.merges.protect import Protection
from suture.merges.table import METHODS
from suture.schema.fields import (
    Becomes,
    LineOf,
    Listed,
    ModelPath,
    NamedEntries,
    Parameters,
    Space,
    plain,
    section_of,
    told,
)
from suture.schema.parameters import Parameter
from suture.schema.sections import Faults, check, reading_of
from suture.schema.settings import check_words, settings
from suture.schema.table import Table
from suture.tensors.roles import DEFAULT_SPACE, EVERYTHING
from suture.verbs.merge.keys import Beside, ModelEntry, Output, Slice, Source

TAKEN = ("base", "output")
"""Names that reports use for other things than models."""
OPTIONAL = ("slices", "tokenizer", "chat_template", "protect", "stages")
"""Keys that a record leaves out where a recipe does not have them."""


def _listed(given: Any, inner: Any, info: ValidationInfo[Any]) -> Any:
    """Models by name; of a list their paths name them."""
    if not isinstance(given, list) or not all(isinstance(m, str) for m in given):
        return inner(given)
    named = {short(path, given): path for path in given}
    try:
        found = inner(named)
    finally:
        reading_of(info).keep(given, reading_of(info).part(named))
    faults = [InitErrorDetails(type=told(text), loc=(), input=given) for text in twice(given)]
    if faults:
        raise ValidationError.from_exception_data("models", faults)
    return found


AsPolicy = Becomes(section_of(Policy), lambda keys, _: Policy(**keys.model_dump()), plain)
Models = Annotated[
    Mapping[str, ModelEntry],
    NamedEntries(r".+", "cannot be the name of a model",
                 "a mapping from names to paths, with at least one model", taken=TAKEN, least=1),
    WrapValidator(_listed, json_schema_input_type=Mapping[str, ModelEntry] | list[str]),
]  # fmt: skip


class MergeRecipe(Beside):
    """A merge of several models into one, key by key."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["method"]}, {"required": ["preset"]}]}
    )
    absent = {"models": {}}

    name: Annotated[str | None, Field(exclude=True)] = None
    """By which the other merges of a file call the output, as a model of theirs."""
    base: ModelPath | None = None
    """What the models were fine-tuned from: for methods that work on differences."""
    models: Models
    """The models by name, each a path, or a mapping with a path and parameters of its own; or a
    list of paths."""
    method: Annotated[
        Method, LineOf(lambda: METHODS, "`suture methods` lists them"),
        Field(default_factory=lambda: METHODS["linear"]),
    ]  # fmt: skip
    """How they are merged; `suture methods` lists the methods."""
    preset: Annotated[Preset | None, LineOf(lambda: PRESETS), Field(exclude=True)] = None
    """Parameters of a paper or a tool, with their method; what the recipe says itself wins."""
    parameters: Parameters = {}
    """Of the method, for all models; a number may differ by name of tensor, or with depth."""
    space: Space = DEFAULT_SPACE
    """The tensors that are merged; the others are those of the base, or of the first model."""
    policy: Annotated[Policy, AsPolicy] = STRICT
    """What to do where the models do not hold the same tensors."""
    output: Output = Output()
    """How the output is written."""
    slices: Annotated[
        tuple[Slice, ...], MinLen(1), Listed(one=False, different=False)
    ] = ()  # fmt: skip
    """The output's layers from bottom to top; without any, all models are taken whole."""
    protect: Protection | None = None
    """Entries that one model alone may write."""
    stages: dict[str, Any] = {}
    """Merges that come first, by name; this one and each other may name them as models."""

    notes: ClassVar[tuple[str, ...]] = ()
    """What a reader should know: options that were accepted and do nothing, ..."""
    fingerprints: ClassVar[Mapping[str, str]] = {}
    """What the inputs must have, when the recipe is the provenance of an earlier output."""
    required: ClassVar[tuple[str, ...]] = ()
    """Parameters that must be given for every tensor, default or not."""
    places: ClassVar[Mapping[tuple[int, str], str]] = {}
    """Where layers stand in it, by number of slice and name of model."""
    kit: ClassVar[Mapping[str, Any] | None] = None
    """The mergekit recipe that this one was translated from."""

    @classmethod
    def tables(cls) -> Mapping[str, Table[Any]]:
        """Return the table of merge methods."""
        return {"method": METHODS}

    @classmethod
    def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
        """Return the schema, in which a stage is a recipe itself."""
        found = super().model_json_schema(*args, **options)
        stages = found["properties"]["stages"]
        stages["anyOf"][0] = {"type": "object", "additionalProperties": {"$ref": "#"}}
        return found

    # -- what follows from the keys -----------------------------------------------------------

    def with_(self, **values: Any) -> Self:
        """Return a copy with other values, which are not checked."""
        return self.model_copy(update=values)

    @property
    def dtype(self) -> str | None:
        """The dtype of floating tensors of the output; ``None`` keeps that of the base."""
        return self.output.dtype

    @property
    def shard_size(self) -> int:
        """Bytes of a file at most."""
        return self.output.shard_size

    @property
    def differs(self) -> bool:
        """Whether what is merged are differences to a base, which is then no row itself."""
        return _differs(self.method, self.base is not None)

    @property
    def settings(self) -> dict[str, Any]:
        """The parameters in the types that the method asks for, where nothing is sliced."""
        return self.settings_of(self.cuts[0], list(self.models))

    @property
    def cuts(self) -> tuple[Slice, ...]:
        """The slices, or one that takes every model whole."""
        whole = {name: Source.model_construct(layers=None) for name in self.models}
        return self.slices or (Slice.model_construct(sources=whole),)

    @property
    def paths(self) -> list[str]:
        """What is merged, as the recipe calls it."""
        own = [entry.path for entry in self.models.values()]
        return own if self.base is None else [self.base, *own]

    def rows(self, cut: Slice) -> list[str]:
        """The models that are merged in a slice, in the order of rows.

        They are sorted where the method allows, so that the recipe's order changes no byte.
        """
        names = [n for n in cut.sources if not self.differs or n != cut.base]
        return names if self.method.ordered else sorted(names)

    def settings_of(self, cut: Slice, names: Sequence[str]) -> dict[str, Any]:
        """The parameters of one slice: of the source, else slice, else model, else recipe."""
        known = self.method.parameters
        shared = {**self.parameters, **cut.parameters}
        for_each = {k: v for k, v in cut.parameters.items() if k in known and known[k].per_model}
        own = [
            (n, {**(self.models[n].parameters if n in self.models else {}), **for_each,
                 **cut.sources[n].parameters})
            for n in names
        ]  # fmt: skip
        problems = Problems()
        found = settings(self.method, shared, problems, own)
        problems.raise_if_any()
        return found

    def placed(self, folder: Path, written: Mapping[str, Any]) -> Self:
        """Return the recipe after it was told where relative paths start."""
        given = vars(self)
        if given.get("parameters") and "method" in given:
            given["parameters"] = located(given["method"], given["parameters"], folder)
        return super().placed(folder, written)

    def settled(self) -> Mapping[str, Any]:
        """Return method and parameters with those of the preset, and whose tokenizer is meant."""
        preset, spaced = self.preset, "space" in self.model_fields_set
        everything = preset is not None and preset.everything and not spaced
        base = None if self.base is None else "base"
        wanted = self.tokenizer and self.tokenizer.beside(base, next(iter(self.models), None))
        return {
            "method": self.meant or self.method, "parameters": self.given, "tokenizer": wanted,
            **({"space": EVERYTHING} if everything else {}),
        }  # fmt: skip

    def resolved(self) -> dict[str, Any]:
        """Return the recipe with every default, as plain data that can be read again."""
        known, idle = self.method.parameters, self.method.idle(self.parameters)
        found = self.model_dump(mode="json", exclude={"parameters", "stages"})
        found["parameters"] = {n: _plain(p, self.parameters.get(n, p.default))
                               for n, p in known.items() if n not in idle}  # fmt: skip
        for cut in found["slices"] if not self.differs else ():
            del cut["base"]
        found["stages"] = {name: stage.resolved() for name, stage in self.stages.items()}
        order = ("base", "models", "method", "parameters", "space", "policy", "output", *OPTIONAL)
        return {k: found[k] for k in order if found[k] or k not in OPTIONAL}

    # -- what keys must satisfy together ------------------------------------------------------

    @property
    def meant(self) -> Method | None:
        """The method, of the preset or itself, or the one that is likely meant by its name."""
        chosen = vars(self).get("preset")
        if chosen is not None:
            return METHODS.likely(chosen.method)
        named = "method" in self.model_fields_set | self.wrong
        return vars(self).get("method") if named else None

    @property
    def given(self) -> dict[str, Any]:
        """The parameters, with those of the preset."""
        chosen, how = vars(self).get("preset"), self.meant
        if chosen is None:
            return self.parameters
        idle = {} if how is None else how.idle(self.parameters)
        return {k: v for k, v in chosen.parameters.items() if k not in idle} | self.parameters

    def _supposed(self, texts: Iterable[str]) -> Faults:
        """Faults that are none if the method is not the one that is likely meant."""
        unsure = self.meant is not None and {"method", "preset"} & self.wrong
        more = f" (if {self.meant.name!r} is meant)" if unsure and self.meant else ""
        for text in texts:
            yield "", text + more

    @check
    def _a_method_is_named(self) -> Faults:
        if self.preset is None and "method" not in self.model_fields_set | self.wrong:
            yield "method", "missing; `suture methods` lists them"

    @check
    def _the_preset_is_of_the_method(self) -> Faults:
        chosen, named = self.preset, "method" in self.model_fields_set
        if chosen is not None and named and chosen.method != self.method.name:
            yield "method", (f"the preset {chosen.name} is one of {chosen.method}, not of "
                             f"{self.method.name!r}")  # fmt: skip

    @check
    def _the_method_has_the_parameters(self) -> Faults:
        problems, how = Problems(), self.meant
        own = [(name, entry.parameters) for name, entry in vars(self).get("models", {}).items()]
        if how is None:
            check_words(METHODS.values(), self.given, problems, dict(own))
        else:
            settings(how, self.given, problems, own)
        yield from self._supposed(problems.texts)

    @check
    def _the_method_has_its_models(self) -> Faults:
        if self.meant is not None:
            yield from self._supposed(model_faults(self, self.meant))

    @check
    def _slices_are_of_the_models(self) -> Faults:
        labels = [*self.models, *([] if self.base is None else ["base"])]
        for number, cut in enumerate(self.slices):
            for name in cut.sources if labels else ():
                if name not in labels:
                    hint = did_you_mean(name, labels)
                    yield f"slices[{number}].sources", f"no model {name!r}; {hint}"
            if "base" in cut.model_fields_set and cut.base not in labels:
                hint = did_you_mean(cut.base, labels) if labels else "name a model"
                yield f"slices[{number}].base", f"no model {brief(cut.base)}; {hint}"
        used = {name for cut in self.slices for name in cut.sources}
        for name in self.models if self.slices and "slices" not in self.wrong else ():
            if name not in used:
                yield f"models.{name}", "no slice has layers of it; remove it"

    @check
    def _slices_go_with_the_method(self) -> Faults:
        how = self.meant
        if how is None or not self.slices:
            return
        given = {n for own in (self.given, *(cut.parameters for cut in self.slices)) for n in own}
        files = [n for n, p in how.parameters.items() if p.files and (p.required or n in given)]
        if files:
            which = ", ".join(files)
            text = (f"slices: {how.name} reads files about whole models ({which}), whose layers "
                    "would have other numbers here; merge the models whole")  # fmt: skip
            yield from self._supposed([text])
        based = vars(self).get("base") is not None
        for number, cut in enumerate(self.slices if not files else ()):
            where, problems = f"slices[{number}]", Problems()
            own = [(n, s.parameters) for n, s in cut.sources.items()]
            settings(how, cut.parameters, problems, own, f"{where}.parameters",
                     f"{where}.sources.{{}}")  # fmt: skip
            yield from self._supposed(problems.texts)
            yield from self._supposed(slice_faults(how, based, cut, where, f"`{cut.base}`"))

    @check
    def _protected_models_are_whole(self) -> Faults:
        if self.protect is not None and self.slices:
            yield "slices", ("protect marks entries of whole models, whose layers would have other "
                             "numbers here; merge the models whole, in a stage")  # fmt: skip

    @check
    def _the_protected_model_is_one(self) -> Faults:
        if self.protect is not None and self.protect.model not in self.models:
            known = list(self.models)
            hint = did_you_mean(self.protect.model, known) if known else "there are none"
            yield "protect.model", f"no model {brief(self.protect.model)}; {hint}"

    @check
    def _the_protected_change_has_a_base(self) -> Faults:
        how = self.protect
        if how is not None and self.base is None and (how.scale != 1 or how.rule is not None):
            yield "protect", "a rule, or a scale, works on the change to a base; name a base"

    @check
    def _one_thing_decides_the_vocabulary(self) -> Faults:
        if self.tokenizer is not None and self.policy.vocabulary != "error":
            yield "", "policy.vocabulary and tokenizer: give one of them"


def _plain(parameter: Parameter, value: Any) -> Any:
    """The value of a parameter as a record has it: files by their paths."""
    if not parameter.files or value is None:
        return value
    if isinstance(value, Mapping):
        return {model: spelled(file) for model, file in value.items()}
    return spelled(value)


def _differs(how: Method, based: bool) -> bool:
    return how.needs_base or (how.optional_base and based)


def slice_faults(how: Method, based: bool, cut: Slice, where: str, base: str) -> Iterator[str]:
    """What is wrong with a slice, as can be told before its models are opened.

    Args:
        how: the method.
        based: whether the recipe names a base.
        cut: the slice.
        where: its place.
        base: what the recipe's language calls the base.
    """
    lengths = {n: s.layers[1] - s.layers[0] for n, s in cut.sources.items() if s.layers}
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{name}: {number}" for name, number in lengths.items())
        yield f"{where}.sources: as many layers of each model, not {each}"
    differs = _differs(how, based)
    if differs and cut.base not in cut.sources:
        yield (f"{where}.sources: {how.name} works on differences to a base; "
               f"give the layers of {base} too")  # fmt: skip
    number = sum(not differs or n != cut.base for n in cut.sources)
    if cut.sources:  # that there are none is told before
        yield from _wrong_number(how, number, f"{where}.sources")


def model_faults(recipe: MergeRecipe, how: Method) -> Iterator[str]:
    """Where there are too few or too many models, or no base."""
    if recipe.models and not recipe.slices:
        yield from _wrong_number(how, len(recipe.models), "models")
    based = recipe.base is not None
    if how.needs_base and not based and all(c.base == "base" for c in recipe.cuts):
        yield f"base: {how.name} works on differences to a base; name one"
    if recipe.policy.missing == "base" and not based:
        yield "policy.missing: base needs a base"


def _wrong_number(how: Method, number: int, where: str) -> Iterator[str]:
    """Where a method gets fewer or more models than it takes."""
    if number < how.least:
        more = "" if how.most == how.least else " or more"
        yield f"{where}: {how.name} takes {how.least}{more}, not {number}"
    if how.most is not None and number > how.most:
        yield f"{where}: {how.name} takes {how.most}, not {number}"


def twice(paths: Sequence[str]) -> Iterator[str]:
    """Models that are listed twice: they would be one, under one name."""
    for path in sorted({p for p in paths if paths.count(p) > 1}):
        yield f"{path} stands twice; give the model one larger weight"


def short(path: str, all_paths: Sequence[str]) -> str:
    """A name for a model that has only a path: as many last parts as tell it from the others."""
    for number in range(1, len(Path(path).parts) + 1):
        name = _end(path, number)
        if name not in TAKEN and [_end(p, number) for p in all_paths].count(name) == 1:
            return name
    return f"./{path}" if path in TAKEN else path


def _end(path: str, number: int) -> str:
    whole = Path(path.partition("@")[0])
    return "/".join(whole.relative_to(whole.anchor).parts[-number:])


__all__ = [
    "MergeRecipe", "ModelEntry", "Slice", "Source", "model_faults", "short", "slice_faults",
    "twice",
]  # fmt: skip
