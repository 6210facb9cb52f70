"""What a folder lacks to be whole: runs that stopped, models never asked, results never compared.

Everything is read out of the folder itself; whatever made it is not known here.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suture.page.parts import Section
from suture.spec import listed

if TYPE_CHECKING:
    from suture.page.gather import Found

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
Step = tuple[str, str]
"""A sentence, and the command that it is about."""
PARTIAL = (".partial", ".part")
"""How a file ends that was being written, after ``.NAME``."""
CELLS = "cells"
"""The folder in which audits and benchmarks keep each number."""
MADE = {"finetune": "Fine-tuned models", "merge": "Merges", "realign": "Realigned models"}
"""Records of models that can be asked something, and what to call them."""
HERE = "this folder"
MOST = 12
"""Names in a sentence at most."""


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


# -- in words --------------------------------------------------------------------------------------


def missing(found: Found) -> list[Section]:
    """The section that says what is missing and how to go on; none where nothing is."""
    steps = [
        *map(_stopped, found.unfinished),
        *_half_asked(found),
        *_half_measured(found),
        *_never_asked(found),
        *_never_compared(found),
    ]
    lead = (
        "What this folder would need to be whole, and how to go on. Commands are to be typed in "
        "the folder itself; words in capitals stand for names of your own."
    )
    return [Section("missing", "What is missing", lead, steps=tuple(steps))] if steps else []


def _stopped(one: Unfinished) -> Step:
    older = " An older one stands in its place." if one.older else ""
    return (
        f"Not finished: {one.where} (interrupted, or still running); the same command "
        f"{one.then}.{older}",
        one.command,
    )


def _half_asked(found: Found) -> Iterator[Step]:
    for where, result in found.suites:
        left = [name for name in result.expected if name not in result.evaluations]
        if left:
            yield (
                f"Not finished: {where}, {len(left)} of {len(result.expected)} evaluations are "
                f"missing ({listed(left, MOST)}); the same command goes on.",
                f"suture eval MODEL --suite SUITE.yaml -o {shlex.quote(where)}",
            )


def _half_measured(found: Found) -> Iterator[Step]:
    for where, raw in found.benchmarks:
        if raw.get("complete") is False:
            out = shlex.quote(where.rpartition("/")[0] or ".")
            yield (
                f"Not finished: {where}; the same command goes on.",
                f"suture bench RECIPE.yaml -o {out}",
            )


def _never_asked(found: Found) -> Iterator[Step]:
    """Models without a result; what went into another model of the folder counts by that one."""
    prints, names = _asked(found)
    used = _used(found)
    for kind, records in (
        ("finetune", found.tunings), ("merge", found.merges), ("realign", found.realignments),
    ):  # fmt: skip
        left = []
        for where, raw in records:
            folder = where.rpartition("/")[0]
            mark = _fingerprint(raw.get("output"))
            known = mark in prints or (folder.rpartition("/")[2] or found.name) in names
            if raw.get("kind", kind) == kind and not known and (mark is None or mark not in used):
                left.append(folder or HERE)
        if left:
            models = " ".join(shlex.quote("." if f == HERE else f) for f in left)
            yield (
                f"{MADE[kind]} that were never evaluated: {listed(left, MOST)}.",
                f"suture eval {models} --suite SUITE.yaml -o results",
            )


def _asked(found: Found) -> tuple[set[str], set[str]]:
    """Fingerprints and names of the models that some result is about."""
    prints = {result.fingerprint for _, result in found.suites}
    prints |= {str(r.inputs["model"]) for _, r in found.results if "model" in r.inputs}
    names = {result.model for _, result in found.suites} | {r.model for _, r in found.results}
    names |= {entry.name for _, report in found.reports for entry in report.entries}
    for _, raw in found.comparisons:
        names |= set(map(str, _mapping(raw.get("models"))))
    return prints, names


def _used(found: Found) -> set[str]:
    """Fingerprints of what other models of the folder were made of."""
    records = (*found.tunings, *found.merges, *found.realignments)
    return {
        mark
        for _, raw in records
        for entry in _mapping(raw.get("inputs")).values()
        if (mark := _fingerprint(entry)) is not None
    }


def _mapping(raw: Any) -> Mapping[str, Any]:
    return raw if isinstance(raw, Mapping) else {}


def _fingerprint(raw: Any) -> str | None:
    mark = _mapping(raw).get("fingerprint")
    return mark if isinstance(mark, str) else None


def _never_compared(found: Found) -> Iterator[Step]:
    """Results of one suite, of several models, that stand in no comparison of it."""
    suites: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for where, result in found.suites:
        key = (result.suite, result.suite_hash)
        suites.setdefault(key, []).append((where, result.model))
    for (suite, _), results in suites.items():
        known = {
            str(name)
            for _, raw in found.comparisons
            if raw.get("suite") == suite
            for name in _mapping(raw.get("models"))
        }
        left = [where for where, model in results if not known & _labels(where, model)]
        if left and len(results) > 1:
            yield (
                f"Results of the suite {suite} that were never compared: {listed(left, MOST)}.",
                "suture compare BASE.json EXPERT.json EDIT.json --gate GATE.yaml --json "
                "> comparison.json",
            )


def _labels(where: str, model: str) -> set[str]:
    """What a comparison may call a result: by its model, its file, its path."""
    file = where.rpartition("/")[2]
    return {model, file.removesuffix(".json"), where}


def summary(sections: Sequence[Section]) -> list[str]:
    """What stands at the head of a page of which something is missing."""
    count = sum(len(s.steps) for s in sections)
    if not count:
        return []
    things = "1 thing is" if count == 1 else f"{count} things are"
    return [f"This folder is not whole: {things} named under What is missing."]


__all__ = ["CELLS", "MADE", "WORKING", "Unfinished", "missing", "summary", "unfinished"]
