"""The demo as one command: edits of small encoders, then safety of a small language model."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from suture.demo import STEPS, run_edits
from suture.demo_safety import FULL, QUICK, run_safety
from suture.demo_tasks import EDITS, SAFETY, packages
from suture.errors import MissingExtraError, RecipeError, did_you_mean
from suture.report import Report
from suture.stream import cores
from suture.suites.comparison import Comparison
from suture.workshop import Say, Workshop, limited

HALVES = {"edits": EDITS, "safety": SAFETY}
"""What each half of the demo reads: packages."""


@dataclass(frozen=True)
class Done:
    """What came out."""

    report: Report | None
    """Of edits, where they were asked for."""
    safety: Mapping[str, Comparison] | None
    """Of merges and of realigned models."""
    page: Path
    """The report; the tables where its extra is missing."""


def run_demo(out: Path, *, quick: bool = False, only: str | None = None, say: Say) -> Done:
    """Run the demo into a folder; a second run does again only what changed.

    Args:
        out: takes everything that is made; about 1.5 GB for edits, 5 GB for safety.
        quick: less of everything; about six minutes on two idle cores.
        only: one of ``HALVES``.
        say: receives a line of text now and then.

    Raises:
        SutureError: packages are missing, or ``out`` holds something else.
    """
    began = time.perf_counter()
    if only is not None and only not in HALVES:
        raise RecipeError(
            f"--only: {only!r} is no half of the demo; {did_you_mean(only, list(HALVES))}"
        )
    halves = HALVES if only is None else {only: HALVES[only]}
    places, versions = packages([name for names in halves.values() for name in names])
    versions |= {name: version(name) for name in ("torch", "transformers", "accelerate")}
    versions |= {"suture": version("suture"), "python": platform.python_version()}
    report = safety = None
    with limited(cores()):
        if "edits" in halves:
            made_with = {"steps": STEPS, **_without(versions, SAFETY)}
            report = run_edits(Workshop(out, made_with, say), places, versions, quick=quick)
        if "safety" in halves:
            shop = Workshop(out, _without(versions, EDITS), say)
            safety = run_safety(shop, places, QUICK if quick else FULL)
    page = _page(out, say)
    tables = [out / "results.md"] if report is not None else []
    tables += [out / "safety" / "results.md"] if safety is not None else []
    seconds = time.perf_counter() - began
    told = " and ".join(map(str, tables))
    say(f"done in {seconds:.0f} s; tables: {told}; report: {page}")
    return Done(report, safety, page)


def _without(versions: dict[str, str], packages: tuple[str, ...]) -> dict[str, str]:
    """The versions without those of packages that only the other half reads."""
    return {name: text for name, text in versions.items() if name not in packages}


def _page(out: Path, say: Say) -> Path:
    """The report of everything as one page; the tables alone where its extra is missing."""
    from suture.page import write_page

    try:
        write_page(out, out / "report.html", title="The demo of Suture", overwrite=True)
    except MissingExtraError as error:
        say(str(error))
        tables = out / "results.md"
        return tables if tables.is_file() else out / "safety" / "results.md"
    return out / "report.html"


__all__ = ["HALVES", "Done", "run_demo"]
