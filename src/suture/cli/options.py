"""What all commands share: the application, common options, errors as messages, tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from suture.cli.terminal import say, show_json, tell
from suture.errors import SutureError

DONE, FAILED, WRONG, INTERRUPTED = range(4)

app = typer.Typer(
    name="suture",
    help="Edit open-weight models like code.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads to use; default: every core. Changes no byte.")
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; overrides the recipe.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and say what would be done.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an older output, in one step, at the end.")
]
NoResume = Annotated[
    bool, typer.Option("--no-resume", help="Start anew even if an interrupted run left work.")
]
Restricted = Annotated[
    bool, typer.Option("--restricted", help="Mark it, and what is made with it: not to share.")
]
Explain = Annotated[bool, typer.Option("--explain")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Go on where weights are NaN or infinite.")
]
Link = Annotated[
    bool, typer.Option("--link", help="Link files that stay as they are, instead of copying.")
]
ToLog = Annotated[
    str | None, typer.Option("--log", help="Also write curves: tensorboard or trackio.")
]
OneOf = Annotated[str | None, typer.Argument(help="Show this one in full.")]


def stop(code: int) -> NoReturn:
    """End the command with a code."""
    raise typer.Exit(code)


@contextmanager
def errors(as_json: bool = False) -> Iterator[None]:
    """Show an error of the user's as a message; let one of ours through with its traceback."""
    try:
        yield
    except SutureError as error:
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        if as_json:
            show_json({"error": str(error), "kind": type(error).__name__})
        say(f"error: {error}{notes}")
        stop(WRONG)
    except KeyboardInterrupt:
        if as_json:
            show_json({"error": "interrupted", "kind": "Interrupted"})
        say("interrupted; run the same command again: it goes on from what is done")
        stop(INTERRUPTED)


def show_dry(
    facts: Mapping[str, Any], as_json: bool, purpose: str, outline: Iterable[str] | None = None
) -> None:
    """Show what a run would do: a line for each fact, or the command's own lines."""
    if as_json:
        show_json(facts)
        return
    for line in outline or (
        f"{key:<12}{value if isinstance(value, str) else json.dumps(value)}"
        for key, value in facts.items()
    ):
        tell(line)
    tell(f"nothing was written; leave out --dry-run to {purpose}")


__all__ = [
    "DONE", "FAILED", "INTERRUPTED", "WRONG", "AllowNonfinite", "Device", "DryRun", "Explain",
    "Json", "Link", "NoResume", "OneOf",
    "Overwrite", "Restricted", "Threads", "ToLog", "app", "errors", "show_dry", "stop",
]  # fmt: skip
