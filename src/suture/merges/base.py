"""What a merge method is: ``prepare`` once, ``combine`` block by block, and typed parameters.

A method is a function from its parameters to a ``Merge``, and a line in ``METHODS``. Its signature
is the list of its parameters: recipes, the command line and the docs read it from there.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from suture.errors import Problems, RecipeError, brief, did_you_mean
from suture.roles import selects
from suture.spec import TensorSpec
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


@dataclass(frozen=True)
class Files:
    """What a parameter that names one file a model means: a folder, or a mapping by model."""

    doc: str

    def problem(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        if isinstance(value, str) or (
            isinstance(value, Mapping)
            and all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())
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


def settings(
    method: Method,
    given: Mapping[str, Any],
    per_model: Sequence[tuple[str, Mapping[str, Any]]],
    problems: Problems,
    shared: str = "parameters",
    own: str = "models.{}",
) -> dict[str, Any]:
    """Check the parameters of a recipe and give them the types that the method asks for.

    Args:
        method: the line of the table.
        given: parameters for all models; a number may be a mapping from patterns to numbers.
        per_model: name and own parameters of each model, in the order of rows.
        problems: takes one note for every fault.
        shared: what messages call the place of the parameters for all models.
        own: what they call the place of those of one model, with ``{}`` for its name.
    """
    known = method.parameters
    for key in given:
        if key == "seed" and key not in known:  # said for every method, used by those that draw
            _check(Parameter(key, Seed, 0), given[key], f"{shared}.{key}", problems)
        elif key not in known:
            hint = did_you_mean(key, list(known))
            problems.add(RecipeError, f"{shared}: {method.name} has no {key!r}; {hint}")
    theirs = [p for p in known.values() if p.per_model]
    for model, mine in per_model:
        for key in mine:
            if key not in {p.name for p in theirs}:
                hint = did_you_mean(key, ["path", *(p.name for p in theirs)])
                problems.add(RecipeError, f"{own.format(model)}: unknown key {key!r}; {hint}")
    found: dict[str, Any] = {}
    for name, parameter in known.items():
        if parameter.per_model:
            values = [(f"{own.format(m)}.{name}", v[name]) if name in v else
                      (f"{shared}.{name}", given.get(name, parameter.default))
                      for m, v in per_model]  # fmt: skip
            found[name] = PerModel(tuple(_scalar(parameter, v, w, problems) for w, v in values))
        else:
            value = given.get(name, parameter.default)
            where = f"{shared}.{name}"
            models = [m for m, _ in per_model]
            found[name] = _shared(parameter, value, models, where, problems)
    return found


def _shared(
    parameter: Parameter, value: Any, models: Sequence[str], where: str, problems: Problems
) -> Any:
    """A parameter of the whole merge in its type."""
    if parameter.files:
        return _files(parameter, value, models, where, problems)
    if parameter.per_tensor:
        return _scalar(parameter, value, where, problems)
    fine = _check(parameter, value, where, problems)
    if fine and isinstance(parameter.meta, ModelName) and value not in (None, *models):
        problems.add(
            RecipeError, f"{where}: no model {brief(value)}; {did_you_mean(str(value), models)}"
        )
    whole = fine and isinstance(parameter.meta, Number) and parameter.meta.whole
    return int(value) if whole else value


def _files(
    parameter: Parameter, value: object, models: Sequence[str], where: str, problems: Problems
) -> dict[str, str] | None:
    """The file of each model, paired by name."""
    if value is None:
        if parameter.required:
            problems.add(RecipeError, f"{where}: missing; {parameter.doc}")
        return None
    if not _check(parameter, value, where, problems):
        return None
    if isinstance(value, str):
        return {m: f"{value}/{m}.safetensors" for m in models}
    assert isinstance(value, Mapping)
    for model in sorted({*models} ^ {*value}):
        hint = f"is given, but {did_you_mean(model, models)}" if model in value else "has no file"
        problems.add(RecipeError, f"{where}: {model!r} {hint}; files are paired by model name")
    return {m: str(value[m]) for m in models if m in value}


def _check(parameter: Parameter, value: object, where: str, problems: Problems) -> bool:
    problem = parameter.problem(value)
    if problem is not None:
        problems.add(RecipeError, f"{where}: {problem}")
    return problem is None


def _scalar(parameter: Parameter, value: object, where: str, problems: Problems) -> Scalar:
    if not isinstance(value, Mapping):
        return Scalar(_value(parameter, value, where, problems))
    rules = tuple(
        (str(pattern), _value(parameter, number, f"{where}[{pattern!r}]", problems))
        for pattern, number in value.items()
    )
    default: Any = next((v for p, v in rules if p == "*"), parameter.default)
    return Scalar(default if isinstance(default, Curve) else float(default), rules)


def _value(parameter: Parameter, value: object, where: str, problems: Problems) -> Value:
    if not isinstance(value, list):
        return float(value) if _check(parameter, value, where, problems) else 1.0  # type: ignore[arg-type]
    if not value:
        problems.add(
            RecipeError, f"{where}: an empty list; give one number or more, in order of depth"
        )
    fine = [_check(parameter, v, f"{where}[{i}]", problems) for i, v in enumerate(value)]
    return Curve(tuple(map(float, value))) if value and all(fine) else 1.0
