"""The command line: parse, call, print; heavy imports are made by the commands that need them."""

from __future__ import annotations

import gc
import signal
from typing import Annotated

import typer

from suture.version import __version__

# Commands are listed in the order in which their modules come.
# isort: off
from suture.cli import models, patches, verbs, asking, demo, methods, recipes  # noqa: F401

# isort: on
from suture.cli.options import DONE, app, stop
from suture.cli.terminal import tell


def _version(value: bool) -> None:
    if value:
        tell(f"suture {__version__}")
        stop(DONE)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Edit open-weight models like code."""
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line."""
    # Headers of many tensors are many small values that live to the end: looking through all of
    # them for cycles, again and again, would take a quarter of the time.
    gc.set_threshold(200_000, 50, 50)
    app(prog_name="suture")


__all__ = ["app", "main"]
