"""The keys of mergekit's recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from suture.checkpoints.vocabulary import Wanted
from suture.schema.fields import Becomes, ByWord, Listed, ModelPath, Parameters, ReadAs, Word
from suture.schema.sections import Faults, Section, check
from suture.tensors.spec import dtype_named
from suture.verbs.merge.keys import Beside, Layers, OtherToken, TokenizerKeys, TokenKeys


class HubKeys(Section):
    """A model, with the revision that is meant."""

    short = "path"
    shape = "a path or hub id"

    path: ModelPath
    revision: Word | None = None

    def text(self, _: Path) -> str:
        """Return it as Suture's recipes have it."""
        return f"{self.path}@{self.revision}" if self.revision else self.path


Hub = Annotated[str, Becomes(HubKeys, HubKeys.text, lambda path, _: path)]


class PathKeys(Section):
    """A model, in mergekit's short or long form: path and revision, or model and adapter."""

    short = "path"
    shape = "a path or hub id"

    path: ModelPath | None = None
    revision: Word | None = None
    model: Hub | None = None
    lora: Hub | None = None

    @check
    def _names_a_model(self) -> Faults:
        if (self.path is None) == (self.model is None):
            yield "", "a path or hub id, as `path`, or as `model` with its `lora`"

    def text(self, folder: Path) -> str:
        """Return it as Suture's recipes have it."""
        if self.path is not None:
            return HubKeys(path=self.path, revision=self.revision).text(folder)
        return "+".join(part for part in (self.model, self.lora) if part)


KitPath = Annotated[str, Becomes(PathKeys, PathKeys.text, lambda path, _: path)]
MaybePath = Annotated[KitPath | None, BeforeValidator(lambda value: value or None)]


class KitModel(Section):
    """A model, with its parameters."""

    shape = "a mapping with a model"
    absent = {"model": ""}

    model: KitPath
    """A path or hub id."""
    parameters: Parameters = {}


class KitSource(KitModel):
    """A stretch of a model's layers."""

    absent = {"model": "", "layer_range": None}

    layer_range: Layers
    """First layer and the one after the last, such as `layer_range: [0, 16]`."""


class KitSlice(Section):
    """A stretch of the output's layers."""

    shape = "a mapping with a list of sources"
    absent = {"sources": ()}

    sources: Annotated[tuple[KitSource, ...], Listed(one=False, different=False)]
    """A list of sources, each a model with its layers."""
    base_model: MaybePath = None
    parameters: Parameters = {}
    residual_weight: Any = None

    @check
    def _has_sources_once(self) -> Faults:
        if not self.sources:
            yield "sources", "a list of sources, with at least one"
        paths = [vars(source).get("model", "") for source in self.sources]
        for path in sorted({p for p in paths if p and paths.count(p) > 1}):
            yield "sources", f"{path} stands twice; a slice has a model once"


class KitModule(Section):
    """The models or the slices of a module, or of the whole recipe."""

    shape = "a mapping with models or slices"

    models: Annotated[tuple[KitModel, ...], Listed(one=False, different=False)] = ()
    slices: Annotated[tuple[KitSlice, ...], Listed(one=False, different=False)] = ()
    parameters: Parameters = {}


class KitOther(OtherToken):
    """Whose embedding a token has."""

    model: KitPath | None = None


class KitToken(TokenKeys):
    """Where the embedding of one token comes from."""

    source: Annotated[KitOther | None, BeforeValidator(
        lambda given: {"model": given} if isinstance(given, Mapping) and "kind" not in given
        else given
    )] = None  # fmt: skip


class KitTokenizer(TokenizerKeys):
    """The tokenizer of the output, and how embeddings are matched to it."""

    source: KitPath = "union"
    base: KitPath | None = None
    tokens: Annotated[dict[str, KitToken], ByWord] = {}  # type: ignore[assignment]


Dtype = Annotated[str | None, ReadAs(lambda word, _: dtype_named(str(word)))]
AsTokenizer = Becomes(KitTokenizer, KitTokenizer.wanted, lambda wanted, _: wanted)


class KitRecipe(Beside, KitModule):
    """A recipe of mergekit's."""

    modules: Annotated[dict[str, KitModule], ByWord] = {}
    merge_method: Any = None
    base_model: MaybePath = None
    dtype: Dtype = None
    out_dtype: Dtype = None
    tokenizer: Annotated[Wanted | None, AsTokenizer] = None
    tokenizer_source: MaybePath = None

    @check
    def _one_tokenizer(self) -> Faults:
        if self.tokenizer is not None and self.tokenizer_source is not None:
            yield "", "tokenizer_source and tokenizer: give one of them"

    @check
    def _something_is_merged(self) -> Faults:
        given = [key for key in ("models", "slices", "modules") if getattr(self, key)]
        if len(given) > 1:
            yield given[1], f"{given[0]} are given, too; keep one of them"
        if not given:
            yield "models", "a list of models, with at least one (or slices)"

    @check
    def _one_module(self) -> Faults:
        if len(self.modules) > 1:
            names = ", ".join(self.modules)
            yield "modules", f"one module is read, not {names}; merge them one after another"
        for name, module in self.modules.items():
            if bool(module.models) == bool(module.slices):
                yield f"modules.{name}", "models or slices, one of the two"


__all__ = ["KitModel", "KitModule", "KitRecipe", "KitSlice"]
