"""The sections of a merge recipe: which keys they have, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen
from pydantic import ConfigDict, Field

from suture.checkpoints.chat import chat_template_named
from suture.checkpoints.vocabulary import UNION, ZERO, TokenRule, Wanted
from suture.checkpoints.writer import SHARD_SIZE
from suture.errors import RecipeError, brief
from suture.schema.fields import (
    Becomes,
    ByWord,
    Listed,
    ModelPath,
    NamedEntries,
    Parameters,
    ReadAs,
    Says,
    Word,
)
from suture.schema.sections import Faults, Recipe, Section, check
from suture.tensors.spec import PROMOTED, WORD_OF, bytes_from, dtype_named


def layer_range(value: Any) -> tuple[int, int]:
    """Return first layer and the one after the last.

    Raises:
        RecipeError: they are not two whole numbers that go up from 0.
    """
    if not isinstance(value, list | tuple) or len(value) != 2 or {*map(type, value)} != {int}:
        what = "the first layer and the one after the last, such as [0, 16]"
        raise RecipeError(f"{what}, not {brief(value)}")
    start, stop = value
    if start < 0 or stop <= start:
        why = "layers count from 0" if start < 0 else "it holds no layer"
        raise RecipeError(
            f"[{brief(start)}, {brief(stop)}]: {why}; write the lower number first, "
            "the second is not included"
        )
    return start, stop


def _dtype(word: object, _: Path) -> str:
    return PROMOTED if word == PROMOTED else dtype_named(str(word))


def _size(given: Any, _: Path) -> int:
    size = bytes_from(given)
    if size < 100:  # a small number without a unit was meant to have one
        raise RecipeError(f"{size} bytes; write a unit, such as {size}GB")
    return size


class ModelEntry(Section):
    """One model: where it is, and the parameters that the method has for it alone."""

    model_config = ConfigDict(extra="allow")
    short = "path"
    shape = "a path, or a mapping with a path"

    path: ModelPath
    """A folder, a file, a hub id, or BASE+ADAPTER."""
    adapter: Annotated[
        tuple[Annotated[str, MinLen(1)], ...], Listed(different=False), Field(exclude=True),
        Says("a path, or a list of them"),
    ] = ()  # fmt: skip
    """Adapters that are put onto it, one after another."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Its own parameters."""
        return self.model_extra or {}

    def settled(self) -> Mapping[str, Any]:
        """Return the path with its adapters."""
        return {"path": "+".join((self.path, *self.adapter)), "adapter": ()}


Layers = Annotated[
    tuple[int, int] | None, ReadAs(lambda value, _: layer_range(value), list, tuple[int, int])
]


class Source(Section):
    """Where one model enters a slice, and the parameters that it has there."""

    model_config = ConfigDict(extra="allow")
    short = "layers"
    short_for = object

    layers: Layers
    """First layer and the one after the last, such as [0, 16]."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Its own parameters."""
        return self.model_extra or {}


class Slice(Section):
    """A stretch of the output's layers, and what it is made of."""

    shape = "a mapping with sources"

    sources: Annotated[Mapping[str, Source], NamedEntries(
        ".+", "is no name of a model", "a mapping from models to layers, such as {math: [0, 16]}",
        least=1,
    )]  # fmt: skip
    """The layers, by the name of the model, or `base`."""
    parameters: Parameters = {}
    """Of the method, for this slice."""
    base: Word = "base"
    """The source from which differences are taken, for methods that work on differences."""


class Output(Section):
    """How the output is written."""

    dtype: Annotated[str | None, ReadAs(_dtype, lambda d: WORD_OF.get(d, d))] = None
    """Of floating tensors; by default that of the base. `promoted` takes for each tensor the
    narrowest that holds every model's."""
    shard_size: Annotated[int, ReadAs(_size, int, int | str)] = SHARD_SIZE
    """Bytes of a file at most, such as 5GB."""


ModelWord = Annotated[str, MinLen(1), Says("the name of a model")]


class OtherToken(Section):
    """Whose embedding a token has: a model's, by the same token or another; or zeros."""

    short = "model"

    kind: Literal["zero", "model_token"] | None = None
    """Zeros, or the row of another token."""
    model: ModelWord | None = None
    """Whose row it is."""
    token: Annotated[str, Says("a token")] | None = None
    """Another token."""
    token_id: Annotated[int, Ge(0), Says("a number from 0")] | None = None
    """The same, by id."""

    @check
    def _names_its_row(self) -> Faults:
        named = (self.token is not None) + (self.token_id is not None)
        if self.kind is None and (named or self.model is None):
            yield "kind", "missing; zero, or model_token"
        if self.kind == "zero" and (named or self.model is not None):
            yield "", "zero has no model and no token"
        if self.kind == "model_token" and named != 1:
            yield "", "give one of token and token_id"
        if self.kind == "model_token" and self.model is None:
            yield "model", "missing; the name of a model"


class TokenKeys(Section):
    """Where the embedding of one token comes from."""

    short = "source"
    shape = "a mapping with a source"

    source: OtherToken | None = None
    """The name of a model, or what else it is."""
    force: bool = False
    """Whether models that have the token take this row, too."""

    @check
    def _something_is_forced(self) -> Faults:
        if self.force and self.source is None:
            yield "", "force needs a source"

    @property
    def rule(self) -> TokenRule:
        """What it means."""
        row = self.source
        if row is None:
            return TokenRule(force=self.force)
        model = ZERO if row.kind == ZERO else row.model
        return TokenRule(model, row.token, row.token_id, self.force)


class TokenizerKeys(Section):
    """The tokenizer of the output, and how embeddings are matched to it."""

    short = "source"
    shape = "a mapping or a source"

    source: ModelWord = UNION
    """`union`, `base`, the name of a model, or the path of a folder with a tokenizer."""
    base: ModelWord | None = None
    """The model whose row stands in where others lack a token; by default the base."""
    tokens: Annotated[dict[str, TokenKeys], ByWord] = {}
    """Where embeddings of single tokens come from."""
    pad_to_multiple_of: Annotated[
        int, Ge(1), Le(1 << 16), Says("a whole number from 1")
    ] | None = None  # fmt: skip
    """Rows of the embedding are filled up to a multiple of this."""

    def wanted(self, _: Path) -> Wanted:
        """Return what it means, where the base does not decide."""
        tokens = {token: keys.rule for token, keys in self.tokens.items()}
        return Wanted(self.source, self.base, tokens, self.pad_to_multiple_of)


class Beside(Recipe):
    """What stands beside the weights."""

    tokenizer: Annotated[
        Wanted | None, Becomes(TokenizerKeys, TokenizerKeys.wanted, lambda w, _: w and w.plain())
    ] = None
    """The tokenizer of the output, to which embeddings are matched; by default the base's own."""
    chat_template: Annotated[
        str | None, ReadAs(lambda value, _: chat_template_named(value), lambda text: text)
    ] = None
    """The chat template of the output: `auto`, the name of one, or Jinja text."""


__all__ = [
    "Beside", "Layers", "ModelEntry", "OtherToken", "Output", "Slice", "Source", "TokenKeys",
    "TokenizerKeys", "layer_range",
]  # fmt: skip
