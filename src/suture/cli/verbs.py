"""The commands with a recipe, made from their list: parse, plan, describe or run, print."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from suture.cli.options import (
    AllowNonfinite,
    Device,
    DryRun,
    Explain,
    Json,
    Link,
    NoResume,
    Overwrite,
    Restricted,
    Threads,
    ToLog,
    app,
    errors,
    show_dry,
)
from suture.cli.terminal import Watch, say, show_json, tell
from suture.runs.verb import Verb
from suture.verbs import VERBS

FLAGS: dict[str, Any] = {
    "device": Device,
    "explain": Explain,
    "dry_run": DryRun,
    "overwrite": Overwrite,
    "no_resume": NoResume,
    "restricted": Restricted,
    "threads": Threads,
    "values": Annotated[bool, typer.Option("--values")],
    "log": ToLog,
    "allow_nonfinite": AllowNonfinite,
    "link": Link,
    "as_json": Json,
}
"""What a command may take besides recipe and output, in the order of its help."""


def command_of(verb: Verb[Any]) -> Callable[..., None]:
    """Return the function that typer makes a command of: its options are those of the verb."""

    def command(
        recipe: Path, out: Path | None, *, dry_run: bool, as_json: bool, log: str | None = None,
        no_resume: bool = False, explain: bool = False, **given: Any,
    ) -> None:  # fmt: skip
        if explain:
            with errors(as_json):
                told = verb.explain(recipe)
            show_json(told) if as_json else tell("\n".join(verb.explanation(told)))
            return
        if out is None:
            raise typer.BadParameter(
                "name the folder to write: -o OUT", param_hint="'--out' / '-o'"
            )
        with errors(as_json):
            if "no_resume" in verb.flags:
                given["resume"] = not no_resume
            plan = verb.plan(recipe, out, verb.options(**given))
            if dry_run:
                facts = verb.describe(plan)
            else:
                result = _run(verb, plan, log, as_json)
        if dry_run:
            show_dry(facts, as_json, verb.purpose, verb.outline(facts))
        elif as_json:
            show_json(result if isinstance(result, dict) else result.to_dict())
        else:
            for line in verb.lines(result, out):
                tell(line)

    kinds: dict[str, Any] = {
        "recipe": Annotated[Path, typer.Argument(help=verb.recipe)],
        "out": Annotated[Path, typer.Option("--out", "-o", help=verb.out)],
    }
    if "explain" in verb.flags:  # which writes nothing
        option = typer.Option("--out", "-o", help=verb.out, show_default=False)
        kinds["out"] = Annotated[Path | None, option]
    words = {"dry_run": "", "as_json": "", **verb.flags}
    kinds |= {flag: _worded(kind, words[flag]) for flag, kind in FLAGS.items() if flag in words}
    command.__signature__ = Signature([_parameter(*item) for item in kinds.items()])  # type: ignore[attr-defined]
    command.__annotations__ = kinds
    command.__name__, command.__doc__ = verb.name, verb.help
    return command


def _worded(kind: Any, words: str) -> Any:
    """Return an option with a command's own help."""
    if not words:
        return kind
    option = copy.copy(kind.__metadata__[0])
    option.help = words
    return Annotated[kind.__origin__, option]


def _parameter(name: str, kind: Any) -> Parameter:
    plain = kind.__origin__
    default = Parameter.empty if plain is Path else False if plain is bool else None
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _run(verb: Verb[Any], plan: Any, log: str | None, as_json: bool) -> Any:
    from suture.kernels import cache

    cache.announce = lambda: say("compiling for this processor (once, some ten seconds)")
    with Watch(as_json) as progress:
        if log is None:
            return verb.run(plan, progress)
        from suture.training.trackers import tracker

        with tracker(log, plan.out, plan.recipe.resolved()) as note:

            def step(phase: str, at: Any) -> None:
                progress.step(phase, at)
                note(phase, at)

            return verb.run(plan, replace(progress, step=step))


for _verb in VERBS.values():
    app.command(_verb.name)(command_of(_verb))


__all__ = ["FLAGS", "command_of"]
