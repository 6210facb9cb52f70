"""What a merge method is: ``prepare`` once, ``combine`` block by block, and typed parameters.

A method is a function from its parameters to a ``Merge``, and a line in ``METHODS``. Its signature
is the list of its parameters: recipes, the command line and the docs read it from there.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from suture.checkpoint import MEMORY
from suture.errors import Problems, brief, did_you_mean
from suture.mask import Mask
from suture.roles import selects
from suture.spec import TensorSpec
from suture.stats import Stats
from suture.stream import DELTA, WEIGHT, Block, Progress, Sources

Array = np.ndarray[Any, Any]
S = TypeVar("S")


@dataclass(frozen=True)
class Curve:
    """A number that changes with depth: the points are spread evenly from first to last layer."""

    points: tuple[float, ...]

    def at(self, depth: float) -> float:
        """The value at a depth from 0 to 1, linear between the two nearest points."""
        place = depth * (len(self.points) - 1)
        before = int(place)
        after = min(before + 1, len(self.points) - 1)
        share = place - before
        return (1 - share) * self.points[before] + share * self.points[after]


Value = float | Curve


@dataclass(frozen=True)
class Scalar:
    """A number that may differ from tensor to tensor: the first rule that fits counts.

    Where a curve is among the values, ``bound`` makes numbers of it before anything asks.
    """

    default: Value
    rules: tuple[tuple[str, Value], ...] = ()
    table: Mapping[str, float] = field(default_factory=dict)
    """The numbers of tensors that are settled; they stand above the rules."""

    @property
    def curved(self) -> bool:
        """Whether it depends on depth."""
        return any(isinstance(v, Curve) for v in (self.default, *(v for _, v in self.rules)))

    def at(self, name: str) -> float:
        """The number for one tensor."""
        if name in self.table:
            return self.table[name]
        value = self.rule(name) if self.rules else self.default
        assert not isinstance(value, Curve), f"{name}: the depth of a curve was not settled"
        return value

    def rule(self, name: str) -> Value:
        """The number or curve that the rules give a tensor of this name."""
        return next((v for p, v in self.rules if selects(p, name)), self.default)

    def bound(self, names: Iterable[tuple[str, str, float]]) -> Scalar:
        """The same, with a number for each tensor.

        Args:
            names: of each tensor its name, the name by which the rules know it, and its depth.
        """
        if not self.rules and not isinstance(self.default, Curve):
            return self
        found = {}
        for name, known, depth in names:
            value = self.rule(known)
            found[name] = value.at(depth) if isinstance(value, Curve) else value
        return replace(self, table=found)


@dataclass(frozen=True)
class PerModel:
    """One ``Scalar`` a model; a single one stands for every model."""

    scalars: tuple[Scalar, ...]

    def at(self, name: str, models: int) -> tuple[float, ...]:
        """The numbers for one tensor, in the order of models."""
        scalars = self.scalars * models if len(self.scalars) == 1 else self.scalars
        return tuple(s.at(name) for s in scalars)

    def row(self, block: Block) -> Array:
        """The same as float32[models], for the tensor of a block."""
        return _row(self.at(block.name, block.models))


@lru_cache(maxsize=4096)
def _row(values: tuple[float, ...]) -> Array:
    found = np.array(values, np.float32)
    found.flags.writeable = False  # it is shared
    return found


def each(value: float) -> PerModel:
    """The same number for every model and tensor."""
    return PerModel((Scalar(value),))


_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Number:
    """What a parameter means and which numbers it may be."""

    doc: str
    low: float = -math.inf
    high: float = math.inf
    positive: bool = False
    whole: bool = False

    def problem(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"{self.doc}; {brief(value)} is not a number"
        if not abs(value) <= _LARGEST:  # NaN, too, and integers that no float can hold
            return f"{self.doc}; {brief(value)} is not a number of float32"
        if self.whole and value != int(value):
            return f"{self.doc}; {brief(value)} is not a whole number"
        low = value <= 0 if self.positive else value < self.low
        if low or value > self.high:
            return f"{self.doc}; got {brief(value)}"
        return None


FILES = (str, os.PathLike, Mask, Stats)
"""What may stand for a file of masks or statistics: its path, or what would be read from it."""


def spelled(source: Any) -> str:
    """What a record calls a file; masks and statistics in memory have a name after ``memory:``."""
    if isinstance(source, Mask):
        return f"{MEMORY}{source.name}"
    return f"{MEMORY}stats" if isinstance(source, Stats) else os.fspath(source)


@dataclass(frozen=True)
class Files:
    """What a parameter that names one file a model means: a folder, or a mapping by model."""

    doc: str
    instead: tuple[str, ...] = ()
    """Parameters that have no meaning beside it: the files decide what they would."""

    def problem(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        if isinstance(value, str | os.PathLike) or (
            isinstance(value, Mapping)
            and all(isinstance(k, str) and isinstance(v, FILES) for k, v in value.items())
        ):
            return None
        return f"{self.doc}; {brief(value)} is neither a folder nor a mapping from models to files"


@dataclass(frozen=True)
class ModelName:
    """What a parameter that names one of the recipe's models means."""

    doc: str

    def problem(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        if value is None or isinstance(value, str):
            return None
        return f"{self.doc}; {brief(value)} is no name"


@dataclass(frozen=True)
class Choice:
    """What a parameter with a few named values means."""

    doc: str


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


class Parameter:
    """One parameter of a method, read from its signature."""

    def __init__(self, name: str, annotation: Any, default: Any) -> None:
        kind, self.meta = get_args(annotation)
        self.name = name
        self.per_model = kind is PerModel
        self.per_tensor = kind in (PerModel, Scalar)
        self.files = isinstance(self.meta, Files)
        self.choices: tuple[str, ...] = get_args(kind) if get_origin(kind) is Literal else ()
        self.flag = kind is bool
        self.required = default is inspect.Parameter.empty
        self.default = None if self.required else _plain(default)

    @property
    def doc(self) -> str:
        """What it means, in a sentence."""
        return str(self.meta.doc)

    def problem(self, value: object) -> str | None:
        """What is wrong with one plain value; ``None`` when nothing is."""
        if self.flag:
            return (
                None
                if isinstance(value, bool)
                else f"{self.doc}; {brief(value)} is not true or false"
            )
        if self.choices:
            if value in self.choices:
                return None
            return f"{brief(value)} is not one of {', '.join(self.choices)}; " + did_you_mean(
                str(value), self.choices
            )
        if self.files and value is None and not self.required:
            return None
        found: str | None = self.meta.problem(value)
        return found


def _plain(default: Any) -> Any:
    if isinstance(default, PerModel):
        return default.scalars[0].default
    return default.default if isinstance(default, Scalar) else default


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
class Method:
    """A line of the table: the function that makes the merge, and what it asks of a recipe."""

    make: Callable[..., Merge[Any]]
    title: str
    paper: str
    """Where it comes from: authors, year, identifier."""
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

    @property
    def name(self) -> str:
        """The name in recipes."""
        return self.make.__name__

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The parameters, by name, in the order of the signature."""
        hints = get_type_hints(self.make, include_extras=True)
        return {
            name: Parameter(name, hints[name], parameter.default)
            for name, parameter in inspect.signature(self.make).parameters.items()
        }

    def idle(self, given: Mapping[str, Any]) -> dict[str, str]:
        """The parameters that have no meaning beside what is given, each with what decides."""
        files = [(n, p.meta) for n, p in self.parameters.items()
                 if isinstance(p.meta, Files) and given.get(n) is not None]  # fmt: skip
        return {name: by for by, meta in files for name in meta.instead}

    @property
    def equation(self) -> str:
        """What is computed, in Markdown: the body of the docstring."""
        text = inspect.cleandoc(self.make.__doc__ or "").replace("``", "`")
        return re.sub(r":math:`([^`]*)`", r"$\1$", text)

    @property
    def needs(self) -> str:
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
