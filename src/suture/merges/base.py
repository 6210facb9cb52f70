"""What a merge method is: ``prepare`` once, ``combine`` block by block, and typed parameters.

A method is a function from its parameters to a ``Merge``, and a line in ``METHODS``. Its signature
is the list of its parameters: recipes, the command line and the docs read it from there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from suture.checkpoints.checkpoint import MEMORY
from suture.edits.mask import Mask
from suture.edits.stats import Stats
from suture.errors import Problems
from suture.schema import parameters
from suture.schema.parameters import Choice, Number
from suture.schema.paths import place_of
from suture.schema.table import Line
from suture.schema.values import PerModel, Scalar
from suture.stream.sweep import DELTA, WEIGHT, Block, Progress, Sources
from suture.tensors.spec import TensorSpec

Array = np.ndarray[Any, Any]
S = TypeVar("S")


FILES = (str, os.PathLike, Mask, Stats)
"""What may stand for a file of masks or statistics: its path, or what would be read from it."""


def spelled(source: Any) -> str:
    """What a record calls a file; masks and statistics in memory have a name after ``memory:``."""
    if isinstance(source, Mask):
        return f"{MEMORY}{source.name}"
    return f"{MEMORY}stats" if isinstance(source, Stats) else os.fspath(source)


def located(how: Line, given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return parameters with the paths of files taken from a folder on."""

    def at(path: object) -> object:
        if not isinstance(path, str | os.PathLike):
            return path
        return str(place_of(os.fspath(path), folder))

    found = dict(given)
    for name in found.keys() & {n for n, p in how.parameters.items() if p.files}:
        value = found[name]
        by_model = isinstance(value, Mapping)
        found[name] = {k: at(v) for k, v in value.items()} if by_model else at(value)
    return found


@dataclass(frozen=True)
class ModelFiles(parameters.Files):
    """One file of masks or statistics a model, or what would be read from it."""

    kinds: ClassVar[tuple[type, ...]] = FILES


Weight = Annotated[PerModel, Number("factor on a model's contribution")]
Density = Annotated[
    PerModel, Number("density is the share of entries kept, in (0, 1]", high=1, positive=True)
]
Scale = Annotated[Scalar, Number("factor on the merged delta (the papers' lambda)")]
Seed = Annotated[int, Number("seed of the random masks, 0 to 2**63 - 1", 0, 2**63 - 1, whole=True)]
Scope = Annotated[
    Literal["global", "layer", "tensor"],
    Choice("entries compete over all tensors, a layer, a tensor"),
]


@dataclass(frozen=True)
class Context:
    """What ``prepare`` may read."""

    sources: Sources
    names: Sequence[str]
    """The tensors that are merged, sorted."""
    models: tuple[str, ...]
    """The names by which the recipe knows the models, in the order of rows."""
    threads: int | None
    block: int
    progress: Progress | None


@dataclass(frozen=True)
class Beside:
    """What is known of the files that a merge reads besides its models."""

    identity: tuple[object, ...] = ()
    """Tells cheaply whether they are still the same, as plain data."""
    expected: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints that inputs must have, by label, for these files to be about them."""
    restricted: tuple[str, ...] = ()
    """Labels of models whose files must not be passed on."""


def _no_files(context: Context, problems: Problems) -> Beside:
    return Beside()


def _nothing(context: Context) -> Any:
    return None


def _no_facts(state: Any) -> dict[str, Any]:
    return {}


def _nothing_to_tell(state: Any) -> Iterable[str]:
    return ()


def _no_problems(names: Sequence[str], models: Sequence[str]) -> Iterable[str]:
    return ()


def _never(name: str) -> bool:
    return False


def _no_memory(spec: TensorSpec, models: int) -> int:
    return 0


EITHER = "either"
"""Rows are models minus base where a base is given, and the models themselves where none is."""


@dataclass(frozen=True)
class Merge(Generic[S]):
    """How several models become one.

    ``combine(block, state)`` fills ``block.out[:block.count]`` from ``block.rows`` (the merged
    delta where ``how`` is DELTA, the merged weight where it is WEIGHT; EITHER depends on whether
    the recipe names a base), or calls ``block.fuse`` for all columns of the block, which is faster
    where a kernel does all there is to do. It sees
    any slice of any tensor, in any order and in several threads, and must not keep anything
    between calls.
    """

    combine: Callable[[Block, S], None]
    prepare: Callable[[Context], S] = _nothing
    how: str = DELTA
    passes: int = 0
    """How often ``prepare`` reads the models, for estimates."""
    facts: Callable[[S], dict[str, Any]] = _no_facts
    """What the report tells of the state: densities reached, ties, ..."""
    tell: Callable[[S], Iterable[str]] = _nothing_to_tell
    """The same for people, a line each."""
    beside: Callable[[Context, Problems], Beside] = _no_files
    """Opens the headers of files that are read besides the models, and notes what does not fit."""
    keeps: Callable[[str], bool] = _never
    """Whether a tensor comes out as it is in the first model, so that it can simply be copied."""
    check: Callable[[Sequence[str], Sequence[str]], Iterable[str]] = _no_problems
    """What is wrong with the parameters for these tensors and models, before anything is read."""
    memory: Callable[[TensorSpec, int], int] = _no_memory
    """Bytes held for one tensor of so many models, beyond blocks."""

    def rows(self, based: bool) -> str:
        """How rows are made, for ``Sources``: DELTA or WEIGHT."""
        if self.how == EITHER:
            return DELTA if based else WEIGHT
        return self.how


@dataclass(frozen=True)
class Example:
    """What the laws need to know of a method; ``suture.testing`` runs them."""

    neutral: Mapping[str, Any] = field(default_factory=dict)
    """Parameters with which one model alone comes back unchanged."""
    lively: Sequence[Mapping[str, Any]] = ({},)
    """Parameters with which there is something to do: the laws are held with each of them."""
    together: Sequence[Mapping[str, Any]] = ()
    """More of them, with which all tensors decide about each other: they cannot be merged in parts.
    """
    drawing: Mapping[str, Any] = field(default_factory=dict)
    """What else makes a random method draw."""
    apart: Mapping[str, Any] | None = None
    """Parameters with which models that change other entries do not touch each other, where
    ``lively`` ones do not say so."""
    files: tuple[str, ...] = ()
    """Parameters that name statistics, which the laws make up."""
    twin: Callable[..., Mapping[str, Array]] | None = None
    """The equation in plain numpy: from ``{model: {tensor: float64[...]}}`` (in the order of rows)
    and the parameters as keywords to ``{tensor: float64[...]}``, of deltas or weights as they are
    merged."""


@dataclass(frozen=True)
class Method(Line):
    """A line of the table: the function that makes the merge, and what it asks of a recipe."""

    needs_base: bool = True
    least: int = 1
    most: int | None = None
    ordered: bool = False
    """Whether the order of the models matters; where it does not, they are sorted by name."""
    random: bool = False
    optional_base: bool = False
    """Whether a base changes what is merged, though none is needed."""
    tensorwise: bool = False
    """Whether it sees whole tensors, which needs torch and the memory that they take."""
    averages: bool = False
    """Whether it averages models, so that an entry that only one of them changed is watered down.
    """
    mixes: bool = False
    """Whether entries of a tensor decide about each other, or only one model is taken."""
    example: Example = field(default_factory=Example)

    @property
    def requires(self) -> str:
        """What a recipe must give, in a sentence."""
        if self.most is not None:
            number = f"exactly {self.least} models" if self.most == self.least else (
                f"{self.least} to {self.most} models")  # fmt: skip
        else:
            number = "one model or more" if self.least == 1 else f"{self.least} models or more"
        base = "a base and " if self.needs_base else ""
        more = " With a base, task vectors are merged." if self.optional_base else ""
        more += " Needs torch, and memory for whole tensors." if self.tensorwise else ""
        return f"Needs {base}{number}.{more}"
