"""Commands that list what Suture can do by name: methods of every kind, those of plug-ins too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any

import typer

import suture
from suture.cli.options import Json, OneOf, app, errors
from suture.cli.terminal import say, show_json, tell
from suture.errors import MissingExtraError, RecipeError, did_you_mean

KINDS = {
    "merge": "METHODS", "strategy": "STRATEGIES", "realigner": "REALIGNERS", "rule": "RULES",
    "eval": "EVALS", "preset": "PRESETS",
}  # fmt: skip
"""The public name of each kind's table."""
KindOrName = Annotated[
    str | None,
    typer.Argument(metavar="kind", help=f"{', '.join(KINDS)}; by default merge. Or a name."),
]


@app.command()
def methods(kind: KindOrName = None, name: OneOf = None, as_json: Json = False) -> None:
    """List merge methods, strategies, realigners, rules, evaluations or presets with their papers.

    A name shows one in full: what it computes, what it needs, its parameters and their defaults.
    """
    with errors(as_json):
        if kind is not None and kind not in KINDS:
            if name is not None:
                raise RecipeError(f"no kind {kind!r}; {did_you_mean(kind, [*KINDS])}")
            kind, name = kind_of(kind), kind
        rows = rows_of(kind or "merge", name)
    show(rows, as_json, whole=name is not None)
    if not as_json and name is None and kind is None:
        others = " | ".join(k for k in KINDS if k != "merge")
        tell(f"\nmore: suture methods {others}")


@app.command()
def strategies(name: OneOf = None, as_json: Json = False) -> None:
    """List the fine-tuning strategies: suture methods strategy."""
    with errors(as_json):
        rows = rows_of("strategy", name)
    show(rows, as_json, whole=name is not None)


@app.command()
def realigners(name: OneOf = None, as_json: Json = False) -> None:
    """List the ways to realign: suture methods realigner."""
    with errors(as_json):
        rows = rows_of("realigner", name)
    show(rows, as_json, whole=name is not None)


def table_of(kind: str) -> Any:
    """The table of a kind."""
    return getattr(suture, KINDS[kind])


def kind_of(name: str) -> str:
    """The first kind that has something of a name, and ``merge`` where none has."""
    for kind in KINDS:
        with suppress(MissingExtraError):
            if name in table_of(kind).names():
                return kind
    return "merge"


def rows_of(kind: str, name: str | None) -> dict[str, dict[str, Any]]:
    """What is known of each line of a table, or of one of them.

    Raises:
        RecipeError: there is none of this name, or it is that of a plug-in that cannot be used.
    """
    table = table_of(kind)
    lines = table.values() if name is None else [table.find(name)]
    rows = {line.name: line.to_dict() for line in lines}
    for fault in table.faults().values() if name is None else ():
        say(f"warning: {fault}")
    if kind == "merge":
        for row in rows:
            rows[row]["presets"] = {p.name: p.to_dict() for p in table_of("preset").values()
                                    if p.method == row}  # fmt: skip
    return rows


def show(rows: dict[str, dict[str, Any]], as_json: bool, *, whole: bool) -> None:
    """A table, a line or two each; or all that is known of a line."""
    if as_json:
        show_json(rows)
        return
    for key, row in rows.items():
        for text in _lines(key, row, whole):
            tell(text)


def _lines(key: str, row: dict[str, Any], whole: bool) -> Iterator[str]:
    if "source" in row:
        yield f"{key:<28} {row['method']}: {row['source']}"
        yield from _preset(row)
        return
    yield f"{key:<17} {': '.join(filter(None, (row['title'], row['paper'])))}"
    presets = row.get("presets", {})
    if not whole:
        parameters = ", ".join(f"{k}={_default(v)}" for k, v in row["parameters"].items())
        if parameters:
            yield " " * 18 + parameters
        if presets:
            yield " " * 18 + "presets: " + ", ".join(presets)
        return
    from suture.tensors.spec import in_letters

    yield f"\n{in_letters(row['equation'])}\n"
    if isinstance(row.get("needs"), str):
        yield f"{row['needs']}\n"
    for parameter, facts in row["parameters"].items():
        choices = f": {', '.join(map(str, facts['choices']))}" if facts["choices"] else ""
        yield f"  {parameter} = {_default(facts)}{facts['scope']}"
        yield f"      {facts['doc']}{choices}"
    for name, facts in presets.items():
        yield f"\n  preset {name}: {facts['source']}"
        yield from _preset(facts)


def _default(facts: dict[str, Any]) -> str:
    return "(required)" if facts["required"] else str(facts["default"])


def _preset(facts: dict[str, Any]) -> Iterator[str]:
    if facts["note"]:
        yield f"      {facts['note']}"
    yield "      " + ", ".join(f"{k}={v}" for k, v in facts["parameters"].items())


__all__ = ["methods", "realigners", "strategies"]
