"""What a recipe is, as frozen types, and what both languages check in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suture.checkpoints.vocabulary import Wanted
from suture.checkpoints.writer import SHARD_SIZE
from suture.errors import Problems, RecipeError, brief
from suture.merges.base import Method, spelled
from suture.merges.policy import POLICIES, STRICT, Policy
from suture.merges.protect import Protection
from suture.merges.table import METHODS
from suture.schema.parameters import Parameter
from suture.schema.settings import settings
from suture.tensors.roles import DEFAULT_SPACE, ParamSpace
from suture.tensors.spec import WORD_OF


@dataclass(frozen=True)
class ModelEntry:
    """One model of a recipe."""

    path: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where one model enters a slice."""

    layers: tuple[int, int] | None = None
    """First layer and the one after the last; ``None`` takes the model whole."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)
    """Its place in the recipe."""


@dataclass(frozen=True)
class Slice:
    """A stretch of the output's layers, and what it is made of."""

    sources: Mapping[str, Source]
    """By the name of the model, or ``base``."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    base: str = "base"
    """The source from which differences are taken, for methods that work on differences."""


@dataclass(frozen=True)
class Recipe:
    """A merge, as data: after ``read_recipe`` every key is known and every value checked."""

    method: Method
    models: Mapping[str, ModelEntry]
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    space: ParamSpace = DEFAULT_SPACE
    policy: Policy = STRICT
    dtype: str | None = None
    """The dtype of floating tensors of the output; ``None`` keeps that of the base, ``PROMOTED``
    takes for each the narrowest that holds every model's."""
    shard_size: int = SHARD_SIZE
    folder: Path = Path()
    """Where relative paths start."""
    notes: tuple[str, ...] = ()
    """What a reader of the recipe should know: options that were accepted and do nothing, ..."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """What the inputs must have, when the recipe is the provenance of an earlier output."""
    slices: tuple[Slice, ...] = ()
    """The output's layers from bottom to top; none: all models are taken whole."""
    required: tuple[str, ...] = ()
    """Parameters that must be given for every tensor, default or not."""
    stages: Mapping[str, Recipe] = field(default_factory=dict)
    """Merges that come first; this one and each other may name them as models."""
    tokenizer: Wanted | None = None
    """The tokenizer of the output, to which embeddings are matched; ``None``: the base's own."""
    chat_template: str | None = None
    protect: Protection | None = None
    """Entries that one model alone may write."""
    kit: Mapping[str, Any] | None = None
    """The mergekit recipe that this one was translated from."""

    @property
    def differs(self) -> bool:
        """Whether what is merged are differences to a base, which is then no row itself."""
        how = self.method
        return how.needs_base or (how.optional_base and self.base is not None)

    @property
    def settings(self) -> dict[str, Any]:
        """The parameters in the types that the method asks for, where nothing is sliced."""
        return self.settings_of(self.cuts[0], list(self.models))

    @property
    def cuts(self) -> tuple[Slice, ...]:
        """The slices, or one that takes every model whole."""
        return self.slices or (Slice({name: Source() for name in self.models}),)

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

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as plain data that can be read again."""
        known, idle = self.method.parameters, self.method.idle(self.parameters)
        shared = {n: _plain(p, self.parameters.get(n, p.default)) for n, p in known.items()
                  if n not in idle}  # fmt: skip
        found: dict[str, Any] = {
            "base": self.base,
            "models": {n: {"path": e.path, **e.parameters} for n, e in self.models.items()},
            "method": self.method.name,
            "parameters": shared,
            "space": {"include": list(self.space.include), "exclude": list(self.space.exclude)},
            "policy": {k: getattr(self.policy, k) for k in POLICIES},
            "output": {
                "dtype": None if self.dtype is None else WORD_OF.get(self.dtype, self.dtype),
                "shard_size": self.shard_size,
            },
        }
        if self.slices:
            found["slices"] = [
                {"sources": {n: {"layers": list(s.layers or ()), **s.parameters}
                             for n, s in cut.sources.items()},
                 "parameters": dict(cut.parameters),
                 **({"base": cut.base} if self.differs else {})}
                for cut in self.slices
            ]  # fmt: skip
        if self.tokenizer is not None:
            found["tokenizer"] = self.tokenizer.plain()
        if self.chat_template is not None:
            found["chat_template"] = self.chat_template
        if self.protect is not None:
            found["protect"] = self.protect.plain()
        if self.stages:
            found["stages"] = {name: stage.resolved() for name, stage in self.stages.items()}
        return found


def _plain(parameter: Parameter, value: Any) -> Any:
    """The value of a parameter as a record has it: files by their paths."""
    if not parameter.files or value is None:
        return value
    if isinstance(value, Mapping):
        return {model: spelled(file) for model, file in value.items()}
    return spelled(value)


def checked(recipe: Recipe, problems: Problems) -> Recipe:
    """The recipe, with its parameters and models held against what its method asks for."""
    own = [(name, entry.parameters) for name, entry in recipe.models.items()]
    settings(recipe.method, recipe.parameters, problems, own)
    check_models(recipe, problems)
    return recipe


UNKNOWN = METHODS["linear"]
"""Stands in a recipe whose method does not exist, until that is reported."""


def layer_range(raw: object, where: str, problems: Problems) -> tuple[int, int] | None:
    """First layer and the one after the last, as two whole numbers."""
    if not isinstance(raw, list | tuple) or len(raw) != 2 or {*map(type, raw)} != {int}:
        what = "the first layer and the one after the last, such as [0, 16]"
        problems.add(RecipeError, f"{where}: {what}, not {brief(raw)}")
        return None
    start, stop = int(raw[0]), int(raw[1])
    if start < 0 or stop <= start:
        why = "layers count from 0" if start < 0 else "it holds no layer"
        problems.add(
            RecipeError,
            f"{where}: [{brief(start)}, {brief(stop)}]: {why}; write the lower number first, "
            "the second is not included",
        )
        return None
    return start, stop


def check_slice(recipe: Recipe, cut: Slice, where: str, base: str, problems: Problems) -> None:
    """Note what is wrong with a slice before its models are opened.

    Args:
        recipe: the recipe it belongs to.
        cut: the slice.
        where: its place.
        base: what the recipe's language calls the base.
        problems: takes one note for every fault.
    """
    how = recipe.method
    lengths = {n: s.layers[1] - s.layers[0] for n, s in cut.sources.items() if s.layers}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name}: {number}" for name, number in lengths.items())
        problems.add(RecipeError, f"{where}.sources: as many layers of each model, not {told}")
    if recipe.differs and cut.base not in cut.sources:
        problems.add(
            RecipeError,
            f"{where}.sources: {how.name} works on differences to a base; "
            f"give the layers of {base} too",
        )
    number = len(recipe.rows(cut))
    check_number(how, number, f"{where}.sources", problems)


TAKEN = ("base", "output")
"""Names that reports use for other things than models."""


def once(paths: Sequence[str], problems: Problems) -> None:
    """Note models that are listed twice: they would be one, under one name."""
    for path in sorted({p for p in paths if paths.count(p) > 1}):
        problems.add(RecipeError, f"models: {path} stands twice; give the model one larger weight")


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


def check_models(recipe: Recipe, problems: Problems) -> None:
    """Note where there are too few or too many models, or no base."""
    how = recipe.method
    if how.needs_base and recipe.base is None and all(c.base == "base" for c in recipe.cuts):
        problems.add(RecipeError, f"base: {how.name} works on differences to a base; name one")
    if recipe.models and not recipe.slices:
        check_number(how, len(recipe.models), "models", problems)
    if recipe.policy.missing == "base" and recipe.base is None:
        problems.add(RecipeError, "policy.missing: base needs a base")


def check_number(how: Method, number: int, where: str, problems: Problems) -> None:
    """Note where a method gets fewer or more models than it takes."""
    if number < how.least:
        more = "" if how.most == how.least else " or more"
        problems.add(RecipeError, f"{where}: {how.name} takes {how.least}{more}, not {number}")
    if how.most is not None and number > how.most:
        problems.add(RecipeError, f"{where}: {how.name} takes {how.most}, not {number}")
