"""Files and folders that appear whole: held by one process, synced, and renamed in one step.

Whatever is written here stands beside its place first. A process that is killed leaves a name that
nobody takes for finished, and what stood in the place before still does.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from suture.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: two processes on one output are not told apart there
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
"""The file in a folder by which a process holds it."""


@contextmanager
def alone(folder: Path, out: Path, doing: str) -> Iterator[None]:
    """Hold a folder against other processes of ours; it is made where it is missing.

    Args:
        folder: to be held; has a file ``lock`` from then on.
        out: what the message names.
        doing: what another process is said to be doing.

    Raises:
        OutputError: another process holds it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_in(folder, out, doing)
    except OSError as error:
        raise OutputError(f"{folder}: cannot write there: {error.strerror}") from None
    try:
        yield
    finally:
        os.close(lock)


def lock_in(folder: Path, out: Path, doing: str) -> int:
    """Lock the file ``lock`` of a folder: its open descriptor.

    Raises:
        OutputError: another process holds it.
        OSError: nothing can be written there.
    """
    path = folder / LOCK
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not locked(lock):
            os.close(lock)
            raise OutputError(f"{out}: another process is {doing} it just now")
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(lock)):
                return lock
        os.close(lock)  # it was removed between opening and locking: it locks nothing
        folder.mkdir(parents=True, exist_ok=True)


def locked(descriptor: int) -> bool:
    """Lock an open file for this process; whether it could, where the system knows locks."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; it becomes ``path``, synced, once the block ends.

    Raises:
        OSError: the disk is full or refuses; what stood there before still does.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets its name whole and synced, when the block ends without an error.

    Raises:
        OutputError: it cannot be written; what stood there before still does.
    """
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            yield file
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file, which gets its name whole and synced; text is UTF-8.

    Raises:
        OutputError: it cannot be written; what stood there before still does.
    """
    with appearing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def publish(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Sync a folder and make it appear under its name, whole, in one step.

    What it replaces, and it alone, is left beside the folder or in its place: the caller drops it.

    Raises:
        OutputError: something else took the output's name meanwhile.
        OSError: the disk failed.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
    take_place(folder, out, folder.with_name(f"{folder.name}.old"), overwrite=overwrite)
    sync_folder(out.parent)


def take_place(folder: Path, out: Path, old: Path, *, overwrite: bool) -> None:
    """Rename a folder to ``out``; what stood there goes to ``old``, or where the folder was.

    Raises:
        OutputError: there is something, and it must not be replaced.
        OSError: the disk failed.
    """
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()  # an empty folder may stand in the way
    if not out.exists():
        folder.rename(out)
    elif not overwrite:
        raise OutputError(f"{out}: appeared while its run was going on; it was left alone")
    elif not _exchange(folder, out):
        out.rename(old)
        folder.rename(out)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step where the system can (Linux: renameat2)."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


__all__ = [
    "LOCK", "alone", "appearing", "lock_in", "locked", "publish", "sync_folder", "take_place",
]  # fmt: skip
