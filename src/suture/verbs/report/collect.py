"""What lies below a folder: provenance, results, analyses, maps and curves; read, never trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from suture.errors import MissingExtraError, RecipeError, SutureError, brief
from suture.verbs.report.unfinished import Unfinished, unfinished

if TYPE_CHECKING:
    from suture.evals.results import SuiteResult

LIMIT = 32 << 20
"""Bytes a file may have; larger ones are named and left out."""
MOST = 5000
"""Files that are looked into at most."""
OURS = ("suture.json", "analysis.json", "localize.json", "results.json", "audit.json")
"""Files that only Suture writes: a broken one is worth a note."""


@dataclass
class Found:
    """Everything a page can show, by what it is; each with the path below the folder."""

    name: str = ""
    """What the folder is called."""
    merges: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    tunings: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    suites: list[tuple[str, SuiteResult]] = field(default_factory=list)
    """Files of `suture eval`."""
    analyses: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    localizations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    maps: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    curves: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    benchmarks: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    audits: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    comparisons: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    realignments: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    tables: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Benchmarks that have refusals beside utility."""
    withheld: list[str] = field(default_factory=list)
    """Paths of files that are marked restricted; nothing else of them is kept."""
    unfinished: list[Unfinished] = field(default_factory=list)
    """Runs that stopped, or still go on."""
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> int:
        """How many files are shown."""
        kinds = (
            self.merges,
            self.tunings,
            self.analyses,
            self.localizations,
            self.maps,
            self.curves,
            self.benchmarks,
            self.audits,
            self.comparisons,
            self.realignments,
            self.tables,
        )
        shown = {where for kind in kinds for where, _ in kind}
        return len(shown | {where for where, _ in self.suites})

    def take(self, where: str, raw: Mapping[str, Any], text: str) -> None:
        """Put one object where it belongs; what nobody knows is left alone.

        Raises:
            RecipeError: it says what it is, but does not hold it.
        """
        kind = raw.get("kind")
        if raw.get("restricted") is True:
            self.withheld.append(where)
            return
        plain = {
            "analysis": self.analyses,
            "disentanglement": self.maps,
            "curve": self.curves,
            "bench": self.benchmarks,
            "audit": self.audits,
            "realign": self.realignments,
            "finetune": self.tunings,
        }
        if isinstance(kind, str) and kind in plain:
            plain[kind].append((where, dict(raw)))
            inside = raw.get("disentanglement") if kind == "analysis" else None
            maps = inside.get("maps") if isinstance(inside, Mapping) else None
            self.maps += [(where, dict(one)) for one in (maps or ()) if isinstance(one, Mapping)]
        elif kind == "evaluation":
            self.suites.append((where, _suite_result(text)))
        elif isinstance(kind, str) and kind.startswith("locali"):
            self.localizations.append((where, dict(raw)))
        elif (place := self._by_shape(where, raw)) is not None:
            place.append((where, dict(raw)))

    def _by_shape(
        self, where: str, raw: Mapping[str, Any]
    ) -> list[tuple[str, dict[str, Any]]] | None:
        """Where an object belongs that does not say what it is; nowhere is ``None``."""
        if {"suite", "models", "lines", "verdicts"} <= raw.keys():
            return self.comparisons
        if isinstance(raw.get("recipe"), Mapping) and isinstance(raw.get("inputs"), Mapping):
            return self.merges
        if where.rsplit("/", 1)[-1] == "localize.json":
            return self.localizations
        return self.tables if is_table(raw) else None


def is_table(raw: Mapping[str, Any]) -> bool:
    """Whether rows by model have safety beside utility, as benchmarks of it write them."""
    rows = raw.get("table")
    return isinstance(rows, Mapping) and any(
        isinstance(row, Mapping)
        and ({"refused", "utility kept"} <= row.keys() or {"safety", "utility"} <= row.keys())
        for row in rows.values()
    )


def _suite_result(text: str) -> SuiteResult:
    """What `suture eval` wrote; its metrics need a framework, which other pages do not load."""
    try:
        from suture.evals.results import SuiteResult
    except ImportError:
        raise MissingExtraError("reading results of evaluations", "models") from None
    return SuiteResult.from_json(text)


def gather(folder: Path) -> Found:
    """Read every JSON file below a folder that a page can show, and see which runs have not ended.

    Hidden folders are left out, links are not followed.

    Raises:
        RecipeError: there is no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise RecipeError(f"{folder}: is no folder; name the one that holds results or analyses")
    found = Found(folder.resolve().name, unfinished=unfinished(folder))
    for number, path in enumerate(_files(folder)):
        where = path.relative_to(folder).as_posix()
        if number == MOST:
            found.notes.append(f"more than {MOST} JSON files: those after {where} were left out")
            break
        ours = path.name in OURS
        try:
            text, raw = _read(path)
            if isinstance(raw, Mapping):
                found.take(where, raw, text)
            elif ours:
                raise RecipeError(f"holds {brief(raw)}, not an object")
        except (OSError, ValueError, RecursionError, SutureError) as error:
            if ours or isinstance(error, MissingExtraError) or _is_result(path):
                reason = getattr(error, "strerror", None) or error
                found.notes.append(f"{where} cannot be read and was left out: {reason}")
    basis = {
        f"{where.rpartition('/')[0]}/{vector}/suture.json".lstrip("/")
        for where, raw in found.analyses
        for vectors in _values(raw.get("written"))
        for vector in (vectors if isinstance(vectors, list) else ())
    }
    found.merges = [(where, raw) for where, raw in found.merges if where not in basis]
    if not found.files and not found.withheld and not found.unfinished:
        raise RecipeError(
            f"{folder}: nothing to show; a report is made of suture.json, results.json, "
            "analysis.json, localize.json, audit.json and results of `suture eval`"
            + "".join(f"\n{note}" for note in found.notes)
        )
    return found


def _is_result(path: Path) -> bool:
    """Whether a file that cannot be read began as a result of `suture eval`, whatever its name."""
    try:
        with path.open("rb") as file:
            return b'"kind": "evaluation"' in file.read(200)
    except OSError:
        return False


def _values(raw: object) -> list[Any]:
    return list(raw.values()) if isinstance(raw, Mapping) else []


def _files(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            path = Path(where, name)
            if name.endswith(".json") and not name.startswith(".") and not path.is_symlink():
                yield path


def _read(path: Path) -> tuple[str, Any]:
    if path.stat().st_size > LIMIT:
        raise RecipeError(f"larger than {LIMIT >> 20} MB")
    text = path.read_text(encoding="utf-8")
    return text, json.loads(text, parse_constant=_refuse)


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number in JSON")
