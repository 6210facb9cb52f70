"""Runs that stopped, read out of the working folders and half-written files that they left."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

WORKING: Mapping[str, str] = {
    "localize": "goes on", "finetune": "goes on", "realign": "goes on", "analyze": "begins anew",
    "extract-lora": "begins anew", "merge": "goes on",
}  # fmt: skip
"""What a command does with what a run of the same that was killed has left; what names no command
is a merge or a patch."""
ENDING = ".suture"
"""How the folder ends in which a command prepares ``NAME``, after ``.NAME``."""
SMALL = 4096
"""Bytes of a workspace's key at most."""
PARTIAL = (".partial", ".part")
"""How a file ends that was being written, after ``.NAME``."""
CELLS = "cells"
"""The folder in which audits and benchmarks keep each number."""
HERE = "this folder"


@dataclass(frozen=True)
class Unfinished:
    """A run that stopped, or still goes on."""

    where: str
    """Its output, below the folder."""
    command: str
    """The command that makes it, to be typed in the folder; nothing where that cannot be told."""
    then: str
    """What the same command does."""
    older: bool
    """Whether an older output stands in the place."""


def unfinished(folder: Path) -> list[Unfinished]:
    """Runs whose working folders, half-written files or loose cells lie below ``folder``.

    Links are not followed, and nothing inside of a working folder is looked at.
    """
    found: list[Unfinished] = []
    for where, folders, files in os.walk(folder):
        place = Path(where)
        for name in (f for f in folders if not Path(where, f).is_symlink()):
            found += _working(folder, place, name)
        found += [one for name in files for one in _half(folder, place, name)]
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if CELLS in folders and not {"audit.json", "results.json"} & set(files):
            found += _cells(folder, place)
    return sorted(found, key=lambda one: one.where)


def _below(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _working(folder: Path, place: Path, name: str) -> Iterator[Unfinished]:
    out = name.removeprefix(".").removesuffix(ENDING)
    if name == f".{out}{ENDING}" and out:
        command = _command(place / name / "key")
        where = _below(folder, place / out)
        given = "BASE TUNED" if command == "extract-lora" else "RECIPE.yaml"
        typed = f"suture {command} {given} -o {shlex.quote(where)}"
        yield Unfinished(where, typed, WORKING[command], (place / out).exists())


def _command(key: Path) -> str:
    """Return the command that a workspace's key names."""
    try:
        with key.open("rb") as file:
            command = json.loads(file.read(SMALL))["command"]
    except (OSError, ValueError, LookupError, TypeError):
        return "merge"
    return command if command in WORKING else "merge"


def _half(folder: Path, place: Path, name: str) -> Iterator[Unfinished]:
    for end in PARTIAL:
        out = name.removeprefix(".").removesuffix(end)
        if name == f".{out}{end}" and out and not (place / out).exists():
            yield Unfinished(_below(folder, place / out), "", "writes it anew", older=False)


def _cells(folder: Path, place: Path) -> Iterator[Unfinished]:
    cells = place / CELLS
    try:
        held = not cells.is_symlink() and any(p.suffix == ".json" for p in cells.iterdir())
    except OSError:
        return
    if held:
        where = HERE if place == folder else _below(folder, place)
        yield Unfinished(where, "", "(an audit or a benchmark) goes on", older=False)


__all__ = ["CELLS", "HERE", "WORKING", "Unfinished", "unfinished"]
