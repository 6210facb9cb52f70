"""The demo, a program of the folder ``examples``, started from here."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

import suture
from suture.cli.options import FAILED, app, errors, stop
from suture.cli.terminal import part, say, tell
from suture.errors import RecipeError, SutureError

NAME = "suture_demo"
"""What the examples' package is called where it is loaded."""


def load_demo() -> ModuleType:
    """The package ``examples/demo``: beside the sources of a clone, or inside an installed Suture.

    Raises:
        SutureError: it is not there, or a package that it needs is not installed.
    """
    if NAME in sys.modules:
        return sys.modules[NAME]
    here = Path(suture.__file__).resolve().parent
    places = [here / "examples" / "demo", here.parents[1] / "examples" / "demo"]
    folder = next((p for p in places if (p / "__init__.py").is_file()), None)
    if folder is None:
        raise SutureError("the demo is not installed: run `make demo` in a clone of Suture")
    spec = importlib.util.spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        del sys.modules[NAME]
        if not error.name or error.name.startswith(("suture", NAME)):
            raise
        raise SutureError(
            f"the demo needs {error.name}: run `make demo` in a clone of Suture, or "
            "pip install 'suture[demo]' and pip install --no-deps -r requirements/demo.txt"
        ) from None
    return module


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where to write.")] = Path("demo"),
    full: Annotated[
        bool, typer.Option("--full", help="The long form: about twenty minutes, more of all.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option("--only", help="One half: edits (of encoders), or safety (of a chat model)."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of rows and training.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", hidden=True)] = False,
) -> None:
    """Tune, merge, localize, patch and realign small real models; exit 1 if a promise is broken."""
    with errors():
        if quick:
            raise RecipeError("--quick: the short form is the default now; leave the flag out "
                              "(--full is the long form)")  # fmt: skip
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads spin
        done = load_demo().run(out, full=full, only=only, seed=seed, write=part)
    tell(f"The page: {done.page.resolve()}")
    tell(f"Open it in a browser: {done.page.resolve().as_uri()}")
    tell(f"Shown: {done.shown}")
    tell("Next, on these models; put the paths of your own in their place:")
    for command in done.commands:
        tell(f"  {command}")
    if done.broken:
        for promise in done.broken:
            say(f"FAILED: {promise}")
        say(f"The demo ran to its end, but did not show what it promises; see {done.page}")
        stop(FAILED)
