"""Steps that run one after another, each once: what a step does, and what is left.

A step's output is that of a verb of Suture, which appears whole and goes on after an interruption.
Beside the outputs, in ``.demo``, stands for every step what it was made from: the same command run
again, after a kill too, skips what is there and goes on with the rest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suture.checkpoints.atomic import alone, appearing
from suture.errors import OutputError

OWN = ".demo"
"""What marks a folder as the demo's."""


@dataclass(frozen=True)
class Now:
    """What a step is told when it runs."""

    resume: bool
    """Whether what an interrupted run left is of this very step, so that it may go on from it."""
    tick: Callable[[float], None]
    """Takes the share of the step that is done."""


@dataclass(frozen=True)
class Step:
    """One thing to be made."""

    name: str
    """Unique; that of its output below the demo's folder."""
    does: str
    """For the reader: ``tune the expert "languages": 720 rows, 1 epoch``."""
    inputs: Any
    """Plain data that decides what comes out, besides the steps that it needs."""
    make: Callable[[Now], str]
    """Makes the output; gives a few words to tell, or none."""
    needs: tuple[str, ...] = ()
    """Names of steps whose outputs it reads; they stand before it."""
    seconds: float = 1.0
    """On two idle cores, about."""
    megabytes: float = 0.0
    """Of disk, about."""


@dataclass
class Journal:
    """What was made from what, as files in a folder's ``.demo``."""

    folder: Path
    made_with: Mapping[str, str]
    """Versions of what the outputs depend on."""
    keys: dict[str, str] = field(default_factory=dict)

    def enter(self, steps: Sequence[Step]) -> None:
        """Work out the key of every step: a hash of its inputs and of the steps it needs."""
        for step in steps:
            needed = [self.keys[name] for name in step.needs]
            text = json.dumps([dict(self.made_with), step.name, step.inputs, needed],
                              sort_keys=True, default=list)  # fmt: skip
            self.keys[step.name] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def entry(self, name: str) -> dict[str, Any]:
        """What is known of a step's output; nothing where no run has begun it."""
        try:
            found = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def done(self, name: str) -> bool:
        """Whether the output is there, whole, made from the same inputs."""
        entry = self.entry(name)
        same = entry.get("key") == self.keys[name] and "sizes" in entry
        return same and entry["sizes"] == sizes(self.folder / name)

    def begin(self, name: str) -> bool:
        """Note that a step begins; whether it may go on from what an interrupted run left.

        It may not where a run of other inputs was the last, until this one has replaced its work.

        Raises:
            OutputError: something stands there that no run of the demo has made.
        """
        entry = self.entry(name)
        if not entry and (self.folder / name).exists():
            raise OutputError(f"{self.folder / name} was not made by the demo; move it, or name "
                              "another folder with --out")  # fmt: skip
        same = entry.get("key") == self.keys[name] and bool(entry.get("resume", True))
        self.note(name, resume=same or not entry)
        return same or not entry

    def note(self, name: str, *, resume: bool) -> None:
        """Note whether what a running step has left so far is of this very step."""
        self._write(name, {"key": self.keys[name], "resume": resume})

    def finish(self, name: str, seconds: float, told: str) -> None:
        """Note that the output is there."""
        self._write(name, {"key": self.keys[name], "seconds": round(seconds, 2), "told": told,
                           "sizes": sizes(self.folder / name)})  # fmt: skip

    def remove_others(self, half: str) -> None:
        """Remove outputs below ``half/`` that earlier runs have made and this one does not."""
        for path in sorted((self.folder / OWN).glob("*.json")):
            name = _name(path)
            if name.startswith(f"{half}/") and name not in self.keys:
                output = self.folder / name
                shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
                path.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / OWN / f"{name.replace('/', '+')}.json"

    def _write(self, name: str, entry: Mapping[str, Any]) -> None:
        with appearing(self._path(name)) as file:
            file.write(json.dumps(entry).encode())


def _name(path: Path) -> str:
    return path.stem.replace("+", "/")


def sizes(path: Path) -> dict[str, int]:
    """The size of a file, or of every visible file in a folder, by its name in there."""
    if path.is_file():
        return {"": path.stat().st_size}
    inside = (p for p in path.rglob("*") if p.is_file())
    found = {p.relative_to(path): p.stat().st_size for p in inside}
    return {p.as_posix(): size for p, size in sorted(found.items())
            if not any(part.startswith(".") for part in p.parts)}  # fmt: skip


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for one run of the demo.

    Raises:
        OutputError: it holds something else, or another run of the demo holds it.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; name a folder with --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / OWN).is_dir():
        raise OutputError(f"{folder}: holds something that this demo did not make; name another "
                          "folder with --out, or remove it yourself")  # fmt: skip
    with alone(folder / OWN, folder, "making the demo in"):
        yield


class Clock:
    """How long the steps that are left will take, corrected by how long those so far took."""

    def __init__(self, seconds: float) -> None:
        self.left, self.expected, self.took = seconds, 0.0, 0.0

    def count(self, expected: float, took: float) -> None:
        """Take note of a step that ran."""
        self.left, self.expected = self.left - expected, self.expected + expected
        self.took += took

    def words(self) -> str:
        """The time that is left, in words."""
        # The guess counts as much as a minute of what was seen.
        factor = (self.took + 60) / (self.expected + 60)
        return f"about {duration(self.left * factor)} left" if self.left > 0.5 else "done"


def duration(seconds: float) -> str:
    """A time in words: ``40 s``, ``3 min``."""
    if seconds < 55:
        return f"{max(5, 5 * round(seconds / 5))} s"
    return f"{max(1, round(seconds / 60))} min"


def run_steps(journal: Journal, steps: Sequence[Step], write: Callable[[str], object]) -> None:
    """Run what is not there yet, in order; ``write`` takes pieces of lines.

    Raises:
        SutureError: a step failed; what was made before it is kept.
    """
    clock = Clock(sum(step.seconds for step in steps if not journal.done(step.name)))
    for number, step in enumerate(steps, 1):
        write(f"[{number}/{len(steps)}] {step.does} ... ")
        if journal.done(step.name):
            write("there already\n")
            continue
        resume = journal.begin(step.name)
        began = time.perf_counter()
        (journal.folder / step.name).parent.mkdir(parents=True, exist_ok=True)
        try:
            told = step.make(Now(resume, _ticks(journal, step.name, resume, write)))
        except BaseException:
            write("stopped\n")
            raise
        took = time.perf_counter() - began
        journal.finish(step.name, took, told)
        clock.count(step.seconds, took)
        write(f"{f'{told}; ' if told else ''}{took:.1f} s ({clock.words()})\n")


def _ticks(
    journal: Journal, name: str, resume: bool, write: Callable[[str], object]
) -> Callable[[float], None]:
    """Tell each quarter of a step, once; once it moves, what it leaves is its own."""
    told, noted = [0], [resume]

    def tick(share: float) -> None:
        if not noted[0]:
            noted[0] = True
            journal.note(name, resume=True)
        quarter = min(3, int(4 * share))
        if quarter > told[0]:
            told[0] = quarter
            write(f"{25 * quarter} % ")

    return tick


__all__ = ["OWN", "Clock", "Journal", "Now", "Step", "duration", "own_folder", "run_steps", "sizes"]
