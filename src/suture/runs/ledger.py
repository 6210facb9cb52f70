"""Finished cells of a benchmark as small files, and how long the rest will take.

A cell is what one number, or a few that are made together, came from: its file is named by a
digest of everything that it depends on, so that a second run does only what is missing or changed,
and a kill costs at most the cell that was being made.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from suture.checkpoints.atomic import LOCK, alone, write_whole
from suture.checkpoints.checkpoint import Checkpoint
from suture.errors import Problems
from suture.runs.place import Options, check_place
from suture.runs.progress import Say
from suture.runs.workspace import remove

CELLS = "cells"
"""The folder of cells in an output."""
Kind = tuple[str, str]
"""What is done and by which line of the tables; cells of one kind take about equally long."""


def digest(what: Any) -> str:
    """A short hash of plain data."""
    text = json.dumps(what, sort_keys=True, default=list, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def check_cells(
    out: Path, command: str, inputs: Mapping[str, Checkpoint], options: Options, problems: Problems
) -> None:
    """Note what keeps a folder of cells from being begun or gone on with.

    Args:
        out: the folder that holds the cells and the results.
        command: what makes them, such as ``bench``.
        inputs: the models that are read, by label.
        options: how to run.
        problems: takes the notes.
    """
    check_place(out, inputs, options.overwrite, problems, record=CELLS, grows=f"`suture {command}`")


@contextmanager
def cells_of(out: Path, options: Options, made: Callable[[Path], bool]) -> Iterator[Path]:
    """Hold the folder of an output's cells, emptied where the run is to begin anew.

    Args:
        out: the folder that holds the cells and the results.
        options: ``overwrite`` and ``resume`` say whether to begin anew.
        made: whether a path in ``out``, besides the cells, is the command's and goes with them.

    Raises:
        OutputError: another process works there, or nothing can be written.
    """
    folder = out / CELLS
    with alone(folder, out, "working on"):
        if options.overwrite or not options.resume:
            stale = [p for p in folder.iterdir() if p.name != LOCK]  # the lock is held
            for path in (*stale, *(p for p in out.iterdir() if p != folder and made(p))):
                remove(path)
        yield folder


class Ledger:
    """The cells of one output folder."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder, self.say = folder, say
        self.pending: Counter[Kind] = Counter()
        """Cells that are still to come, by kind."""
        self.finished = 0
        self._seconds: dict[Kind, list[float]] = defaultdict(list)

    def path(self, name: str, key: str) -> Path:
        """The file of a cell."""
        return self.folder / f"{name}-{key}.json"

    def find(self, name: str, key: str) -> Any | None:
        """What a finished cell holds; ``None`` where there is none, or half of one."""
        try:
            found = json.loads(self.path(name, key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(found, dict) and found.get("key") == key and "value" in found
        return found if whole else None

    def cell(
        self, kind: Kind, name: str, inputs: Any, make: Callable[[], Any], *, fresh: bool = False
    ) -> Any:
        """What a cell holds: from its file, or made now; ``fresh`` makes it anyway.

        Args:
            kind: what it is, for the clock.
            name: the beginning of its file's name, for people.
            inputs: everything that it depends on, as plain data.
            make: gives plain data.
            fresh: whether to make it again.
        """
        key = digest(inputs)
        found = None if fresh else self.find(name, key)
        if found is None:
            began = time.perf_counter()
            value = make()
            seconds = time.perf_counter() - began
            found = {"key": key, "inputs": inputs, "seconds": round(seconds, 2), "value": value}
            write_whole(self.path(name, key), json.dumps(found, indent=1) + "\n")
            self._done(kind, float(found["seconds"]))
            self.say(f"{name}: {seconds:.1f} s{self._left()}")
        else:
            self._done(kind, float(found.get("seconds", 0.0)))
        return found["value"]

    def _done(self, kind: Kind, seconds: float) -> None:
        self.pending[kind] = max(0, self.pending[kind] - 1)
        self._seconds[kind].append(seconds)
        self.finished += 1

    def eta(self) -> float:
        """Seconds that the pending cells will take, by finished ones of the same kind.

        Where a kind has none, those that do the same for other lines count; then all.
        """
        every = [s for found in self._seconds.values() for s in found]
        total = 0.0
        for kind, count in self.pending.items():
            same = self._seconds.get(kind) or [
                s for (what, _), found in self._seconds.items() if what == kind[0] for s in found
            ]
            known = same or every
            total += count * (sum(known) / len(known) if known else 0.0)
        return total

    def _left(self) -> str:
        left = sum(self.pending.values())
        if not left:
            return ""
        minutes, seconds = divmod(round(self.eta()), 60)
        return f"; {left} cell{'s' if left > 1 else ''} to go, about {minutes}:{seconds:02d}"
