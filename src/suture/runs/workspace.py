"""The folder in which a run prepares its output: locked, keyed, resumed, and published whole.

It stands beside the output NAME as ``.NAME.suture``::

    model/   holds the folder to be, under the output's name
    key      what this workspace is for: the command, and a digest of recipe, inputs and versions
    lock     held by the process that works in it
    ...      what the run keeps so that it need not be made again: checkpoints, statistics

A run that is killed leaves it, and the same command goes on from what it keeps.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from suture.checkpoints.atomic import LOCK, alone, publish
from suture.checkpoints.writer import staging_of
from suture.errors import OutputError
from suture.runs.place import Options, refuse_foreign
from suture.version import __version__

MADE = "model"
"""Where in a workspace the folder to be stands."""
KEY = "key"


@dataclass(frozen=True)
class Workspace:
    """A locked folder beside an output."""

    out: Path
    """The output as the user named it."""
    folder: Path
    """The workspace itself; what stands directly in it is kept after an interruption."""
    overwrite: bool = False
    resumed: bool = False
    """Whether it holds what an interrupted run of the same key left."""

    @property
    def made(self) -> Path:
        """The folder that ``publish`` will give the output's name."""
        return self.folder / MADE / self.out.resolve().name

    def fresh(self) -> Path:
        """Return ``made``, emptied of what an interrupted run left half done."""
        remove(self.folder / MADE)
        self.made.mkdir(parents=True)
        return self.made

    def publish(self) -> None:
        """Sync ``made`` and rename it to the output, in one step.

        Raises:
            OutputError: something else took the output's name meanwhile.
            OSError: the disk failed; what the workspace keeps is still there.
        """
        publish(self.made, self.out.resolve(), overwrite=self.overwrite)


@contextmanager
def workspace(
    out: Path,
    command: str,
    key: Mapping[str, Any] | None = None,
    *,
    resume: bool = True,
    overwrite: bool = False,
    precious: str = "",
    remedy: str = "",
    fatal: tuple[type[Exception], ...] = (),
) -> Iterator[Workspace]:
    """Hold the workspace of an output; it is removed once the block ends without an error.

    After an error it stays if something is kept in it, so that the same command can go on.

    Args:
        out: the folder that will be.
        command: the command that works in it, such as ``localize``, for those who find it there.
        key: all that decides the bytes of the output, as plain data; Suture's version is added.
            Without a key nothing is ever gone on with.
        resume: go on with what an interrupted run of the same key left; otherwise start anew.
        overwrite: whether an older output may be replaced.
        remedy: what to say after a failure of the disk.
        precious: what an interrupted run of another key left, in a word ("checkpoints"): it is then
            refused instead of removed.
        fatal: errors that the same run would meet again: nothing is kept after them.

    Raises:
        OutputError: another process holds it, it holds what no run of Suture left, it is of another
            run and precious, or nothing can be written there.
    """
    folder = staging_of(out.resolve())
    refuse_foreign(folder)
    keep = True
    with alone(folder, out, "training" if precious else "writing"):
        try:
            resumed = _claim(folder, command, key, resume, precious)
            yield Workspace(out, folder, overwrite, resumed)
            keep = False
        except fatal:
            keep = False
            raise
        except OSError as error:
            why = error.strerror or error
            raise OutputError(f"{out}: cannot be written: {why}{remedy}") from error
        finally:
            if not keep or not _kept(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _claim(
    folder: Path, command: str, key: Mapping[str, Any] | None, resume: bool, precious: str
) -> bool:
    """Make the workspace one of this key; whether something is kept that it can go on from."""
    path = folder / KEY
    text = json.dumps({"command": command, "key": None if key is None else _digest(key)})
    if _kept(folder) and resume and key is not None:
        if path.is_file() and path.read_bytes() == text.encode():
            return True
        if precious:
            raise OutputError(
                f"{folder}: holds {precious} of a run with another recipe, base or rows; take the "
                "old recipe to go on with them, or --no-resume to start anew"
            )
    for stale in folder.iterdir():
        if stale.name != LOCK:
            remove(stale)
    path.write_text(text, encoding="utf-8")
    return False


def _digest(key: Mapping[str, Any]) -> str:
    text = json.dumps({**key, "suture": __version__}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _kept(folder: Path) -> Sequence[Path]:
    """The files from which a run can go on."""
    with suppress(OSError):
        parts = [p for p in folder.iterdir() if p.name not in (LOCK, KEY, MADE)]
        return [f for p in parts for f in (p, *p.rglob("*")) if f.is_file()]
    return []


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there; no link is followed.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


KEPT = "; the training is kept, and the same command goes on from it"
"""What is said after a failure of the disk."""


@contextmanager
def training_space(
    out: Path, command: str, facts: Mapping[str, Any], options: Options
) -> Iterator[Workspace]:
    """Hold the workspace of a run that trains; checkpoints of another run in it are precious.

    Args:
        out: the output.
        command: the command that trains.
        facts: what decides the bytes of the run, as plain data; versions are added.
        options: whether to go on with what is there, and to replace an older output.

    Raises:
        OutputError: it belongs to another run, or one is going on.
    """
    key = {**facts, "versions": [version("torch"), version("transformers")]}
    with workspace(out, command, key, resume=options.resume, overwrite=options.overwrite,
                   precious="checkpoints", remedy=KEPT) as space:  # fmt: skip
        yield space


__all__ = ["MADE", "Workspace", "remove", "training_space", "workspace"]
