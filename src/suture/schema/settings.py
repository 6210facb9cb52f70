"""What a recipe gives for the parameters of a method, checked, in the types that it asks for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from suture.errors import Problems, RecipeError, brief, did_you_mean
from suture.schema.parameters import ModelName, Number, Parameter
from suture.schema.table import Line, Table
from suture.schema.values import DepthCurve, PerModel, Scalar, Value

L = TypeVar("L", bound=Line)
Own = Sequence[tuple[str, Mapping[str, Any]]]
"""Name and own parameters of each model, in the order of rows."""
SEED = Parameter("seed", Annotated[int, Number("seed, 0 to 2**63 - 1", 0, 2**63 - 1)], 0)
"""Said for every method, used by those that draw."""


def settings(
    line: Line,
    given: Mapping[str, Any],
    problems: Problems,
    models: Own = (),
    shared: str = "parameters",
    own: str = "models.{}",
) -> dict[str, Any]:
    """Return the parameters of a recipe in the types of the signature, with every default.

    Args:
        line: of a table, whose signature lists the parameters.
        given: parameters for all models; a number may be a mapping from patterns to numbers.
        problems: takes one note for every fault; what is wrong is left out of the result.
        models: name and own parameters of each model, in the order of rows.
        shared: what messages call the place of the parameters for all models.
        own: what they call the place of those of one model, with ``{}`` for its name.
    """
    _check_keys(line, given, models, problems, shared, own)
    values = {}
    for name, parameter in line.parameters.items():
        where, before = f"{shared}.{name}", len(problems)
        by_model = parameter.per_model and all(name in mine for _, mine in models) and models
        if parameter.required and given.get(name) is None and not by_model:
            problems.add(RecipeError, f"{where}: missing; {parameter.doc}")
            continue
        value = given.get(name, parameter.default)
        if parameter.per_model:
            own_values = [(f"{own.format(m)}.{name}", mine[name]) if name in mine else
                          (where, value) for m, mine in models]  # fmt: skip
            read: Any = PerModel(tuple(_scalar(parameter, v, w, problems) for w, v in own_values))
        else:
            read = _shared(parameter, value, [m for m, _ in models], where, problems)
        if len(problems) == before:
            values[name] = read
    return values


def _check_keys(
    line: Line, given: Mapping[str, Any], models: Own, problems: Problems, shared: str, own: str
) -> None:
    """Note keys that the line does not have, and those that mean nothing beside others."""
    known, idle = line.parameters, line.idle(given)
    seeded = bool(models) or "seed" in known
    for key in given:
        if key == "seed" and key not in known and seeded:
            _check(SEED, given[key], f"{shared}.{key}", problems)
        elif key not in known:
            hint = did_you_mean(key, list(known)) if known else "it has none"
            problems.add(RecipeError, f"{shared}: {line.name} has no {key!r}; {hint}")
        elif key in idle:
            problems.add(RecipeError, _idle(f"{shared}.{key}", idle[key]))
    theirs = [p.name for p in known.values() if p.per_model]
    for model, mine in models:
        for key in mine:
            if key not in theirs:
                hint = did_you_mean(key, ["path", *theirs])
                problems.add(RecipeError, f"{own.format(model)}: unknown key {key!r}; {hint}")
            elif key in idle:
                problems.add(RecipeError, _idle(f"{own.format(model)}.{key}", idle[key]))


def check_words(
    lines: Iterable[Line], given: Iterable[str], problems: Problems,
    own: Mapping[str, Iterable[str]] | None = None, noun: str = "method",
) -> None:  # fmt: skip
    """Note parameters that no line has, where it is not known which one is meant.

    Args:
        lines: all there are.
        given: the parameters for all models.
        problems: takes the notes.
        own: those of each model, by its name.
        noun: what a line is.
    """
    known = {n: p.per_model for line in lines for n, p in line.parameters.items()}
    for key in given:
        if key not in known:
            hint = did_you_mean(key, [*known])
            problems.add(RecipeError, f"parameters: no {noun} has {key!r}; {hint}")
    theirs = ["path", *(n for n, per_model in known.items() if per_model)]
    for model, keys in (own or {}).items():
        for key in keys:
            if key not in theirs:
                hint = did_you_mean(key, theirs)
                problems.add(RecipeError, f"models.{model}: unknown key {key!r}; {hint}")


def line_faults(
    table: Table[L], key: str, name: str, given: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the name of a line and with its parameters, each with its place.

    Parameters of a misspelt line are held against the one that is likely meant.

    Args:
        table: where the line stands.
        key: where a recipe names it.
        name: as the recipe writes it.
        given: its parameters, without defaults.
    """
    problems = Problems()
    line = table.likely(name)
    with problems.collecting(f"{key}: "):
        line = table.find(name)
    if line is None:
        check_words(table.values(), given, problems, noun=table.noun)
    else:
        with problems.supposing(None if line.name == name else line.name):
            before = len(problems)
            values = settings(line, given, problems)
            if len(problems) == before:
                with problems.collecting():  # what parameters say together
                    line.make(**values)
    for text in problems.texts:
        place, _, what = text.partition(": ")
        yield place, what


def _idle(where: str, by: str) -> str:
    return f"{where}: has no meaning beside `{by}`, which decide it; leave one of them out"


def _shared(
    parameter: Parameter, value: Any, models: Sequence[str], where: str, problems: Problems
) -> Any:
    """A parameter of the whole in its type."""
    if parameter.files:
        return _files(parameter, value, models, where, problems)
    if parameter.per_tensor:
        return _scalar(parameter, value, where, problems)
    if not _check(parameter, value, where, problems):
        return None
    if isinstance(parameter.meta, ModelName) and value not in (None, *models):
        hint = did_you_mean(str(value), models)
        problems.add(RecipeError, f"{where}: no model {brief(value)}; {hint}")
    return parameter.typed(value)


def _files(
    parameter: Parameter, value: object, models: Sequence[str], where: str, problems: Problems
) -> dict[str, Any] | None:
    """The file of each model, or what is in it, paired by name."""
    if value is None or not _check(parameter, value, where, problems):
        return None
    if isinstance(value, str | os.PathLike):
        return {m: f"{os.fspath(value)}/{m}.safetensors" for m in models}
    assert isinstance(value, Mapping)
    for model in sorted({*models} ^ {*value}):
        hint = f"is given, but {did_you_mean(model, models)}" if model in value else "has no file"
        problems.add(RecipeError, f"{where}: {model!r} {hint}; files are paired by model name")
    return {m: value[m] for m in models if m in value}


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
    if default is None:
        problems.add(RecipeError, f"{where}: a number for all other tensors is missing; say '*'")
        default = 1.0
    return Scalar(default if isinstance(default, DepthCurve) else float(default), rules)


def _value(parameter: Parameter, value: object, where: str, problems: Problems) -> Value:
    if not isinstance(value, list):
        return float(value) if _check(parameter, value, where, problems) else 1.0  # type: ignore[arg-type]
    if not value:
        problems.add(
            RecipeError, f"{where}: an empty list; give one number or more, in order of depth"
        )
    fine = [_check(parameter, v, f"{where}[{i}]", problems) for i, v in enumerate(value)]
    return DepthCurve(tuple(map(float, value))) if value and all(fine) else 1.0


__all__ = ["check_words", "line_faults", "settings"]
