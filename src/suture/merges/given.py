"""What a recipe gives for the parameters of a method, checked, in the types that it asks for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from suture.errors import Problems, RecipeError, brief, did_you_mean
from suture.merges.base import (
    Curve,
    Method,
    ModelName,
    Number,
    Parameter,
    PerModel,
    Scalar,
    Seed,
    Value,
)


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
    _check_keys(method, given, per_model, problems, shared, own)
    known = method.parameters
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


def _check_keys(
    method: Method, given: Mapping[str, Any], per_model: Sequence[tuple[str, Mapping[str, Any]]],
    problems: Problems, shared: str, own: str,
) -> None:  # fmt: skip
    """Note keys that the method does not have, and those that mean nothing beside others."""
    known, idle = method.parameters, method.idle(given)
    for key in given:
        if key == "seed" and key not in known:  # said for every method, used by those that draw
            _check(Parameter(key, Seed, 0), given[key], f"{shared}.{key}", problems)
        elif key not in known:
            hint = did_you_mean(key, list(known))
            problems.add(RecipeError, f"{shared}: {method.name} has no {key!r}; {hint}")
        elif key in idle:
            problems.add(RecipeError, _idle(f"{shared}.{key}", idle[key]))
    theirs = [p for p in known.values() if p.per_model]
    for model, mine in per_model:
        for key in mine:
            if key not in {p.name for p in theirs}:
                hint = did_you_mean(key, ["path", *(p.name for p in theirs)])
                problems.add(RecipeError, f"{own.format(model)}: unknown key {key!r}; {hint}")
            elif key in idle:
                problems.add(RecipeError, _idle(f"{own.format(model)}.{key}", idle[key]))


def check_words(
    methods: Iterable[Method], given: Iterable[str], own: Mapping[str, Iterable[str]],
    problems: Problems,
) -> None:  # fmt: skip
    """Note parameters that no method has, where it is not known which one is meant.

    Args:
        methods: all there are.
        given: the parameters for all models.
        own: those of each model, by its name.
        problems: takes the notes.
    """
    known = {n: p.per_model for how in methods for n, p in how.parameters.items()}
    for key in given:
        if key not in known:
            hint = did_you_mean(key, [*known])
            problems.add(RecipeError, f"parameters: no method has {key!r}; {hint}")
    theirs = ["path", *(n for n, per_model in known.items() if per_model)]
    for model, keys in own.items():
        for key in keys:
            if key not in theirs:
                hint = did_you_mean(key, theirs)
                problems.add(RecipeError, f"models.{model}: unknown key {key!r}; {hint}")


def _idle(where: str, by: str) -> str:
    return f"{where}: has no meaning beside `{by}`, which decide it; leave one of them out"


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
) -> dict[str, Any] | None:
    """The file of each model, or what is in it, paired by name."""
    if value is None:
        if parameter.required:
            problems.add(RecipeError, f"{where}: missing; {parameter.doc}")
        return None
    if not _check(parameter, value, where, problems):
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


__all__ = ["check_words", "settings"]
