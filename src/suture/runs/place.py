"""How a run is done, and where it may write: nothing of value is destroyed, and there is room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from suture.checkpoints.atomic import LOCK
from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.writer import staging_of
from suture.errors import OutputError, Problems
from suture.stream.sweep import BLOCK
from suture.tensors.spec import listed, readable

RECORD = "suture.json"
"""The record of every folder with a model."""
WRITERS = {
    RECORD: "suture",
    "localize.json": "`suture localize`",
    "analysis.json": "`suture analyze`",
}
"""What writes a folder with a record of this name."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a command runs, as opposed to what it makes: on one device none of it changes a byte."""

    overwrite: bool = False
    """Whether an older output may be replaced."""
    resume: bool = True
    """Whether to go on with what an interrupted run of the same left."""
    threads: int | None = None
    """Cores to use; by default all."""
    device: str | None = None
    """Overrides the recipe's."""
    restricted: bool = False
    """Whether the output is marked: neither it nor what is made with it may be passed on."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    """How a merge or a patch is made."""

    block: int = BLOCK
    allow_nonfinite: bool = False
    link: bool = False
    """Whether files of the output that would be copies of an input's may be links to it."""


def check_place(
    out: Path, inputs: Mapping[str, Checkpoint], overwrite: bool, problems: Problems,
    files: Mapping[str, Collection[Path]] = MappingProxyType({}), record: str = RECORD,
    grows: str = "",
) -> None:  # fmt: skip
    """Note what keeps an output from being written, or what it would destroy.

    Args:
        out: the folder that will be.
        inputs: the models that are read, by label.
        overwrite: whether something older may be replaced.
        problems: takes the notes.
        files: other files that are read, by the key that names them.
        record: the file by which an older output of the same command is known.
        grows: the command whose output of before is gone on with, not replaced.
    """
    try:
        held = {label: {c.path, *c.files} for label, c in inputs.items()}
        held |= {label: {p.resolve() for p in paths} for label, paths in files.items()}
        if apart(out, held, problems):
            check_free(out, out.resolve(), overwrite, problems, record, grows)
            with problems.collecting():
                refuse_foreign(staging_of(out.resolve()))
    except (OSError, RuntimeError) as error:  # a name too long, a link to itself
        problems.add(OutputError, f"{out}: {getattr(error, 'strerror', None) or error}")


def apart(out: Path, held: Mapping[str, Collection[Path]], problems: Problems) -> bool:
    """Whether an output, and the place where it is prepared, are apart from what is read."""
    place = out.resolve()
    ours = (place, staging_of(place))
    for label, paths in held.items():
        for what, inside in (
            ("holds", any(p.is_relative_to(o) for p in paths for o in ours)),
            ("lies in", any(o.is_relative_to(p) for p in paths for o in ours)),
        ):
            if inside:
                text = f"{out}: {what} the input {label!r}; write somewhere else"
                problems.add(OutputError, text)
                return False
    return True


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder in a workspace's place that Suture did not make.

    Raises:
        OutputError: it is a link, or holds something and no lock.
    """
    if folder.is_symlink():
        raise OutputError(f"{folder}: is a link, which no run left; move it away")
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if names and LOCK not in names:
        raise OutputError(
            f"{folder}: holds {listed(sorted(names))}, which no run left; move it away"
        )


def check_recipe_stays(recipe: Path, out: Path, problems: Problems) -> None:
    """An output is replaced as a whole: a recipe in it would be gone before it could be repeated.

    The record that Suture itself writes there is no loss: the new output has its own.
    """
    try:
        inside = recipe.resolve().is_relative_to(out.resolve())
    except (OSError, RuntimeError):
        return  # check_place says what is wrong with the path
    if inside and recipe.name != RECORD:
        problems.add(
            OutputError, f"{out}: --overwrite would remove the recipe {recipe} in it; move it first"
        )


def check_free(
    out: Path, place: Path, overwrite: bool, problems: Problems, record: str = RECORD,
    grows: str = "",
) -> None:  # fmt: skip
    """Note what stands where an output is to be, or why nothing can be written there."""
    staging_of(place).exists()  # its name is longer still: too long is seen here, not later
    if place.exists():
        empty = place.is_dir() and not any(place.iterdir())
        if not place.is_dir():
            problems.add(OutputError, f"{out}: is a file; name a folder")
        elif not empty and not (place / record).exists():
            problems.add(
                OutputError,
                f"{out}: exists, and was not written by {WRITERS.get(record, grows)}, so it is "
                "never replaced; name another folder, or remove it yourself",
            )
        elif not empty and not overwrite and not grows:
            problems.add(OutputError, f"{out}: exists; name another folder, or add --overwrite")
    check_parent(place, out, problems)


def check_parent(place: Path, out: Path, problems: Problems) -> bool:
    """Whether something can be made at ``place``; where not, a note that names ``out``."""
    parent = existing(place)
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK) and _writable(parent):
        return True
    problems.add(OutputError, f"{out}: cannot write in {parent}")
    return False


def _writable(folder: Path) -> bool:
    """Whether the file system takes writes: a read-only one refuses even the superuser."""
    try:
        return not os.statvfs(folder).f_flag & os.ST_RDONLY
    except (AttributeError, OSError):
        return True


def check_room(out: Path, nbytes: int, resume: bool, problems: Problems, spared: int = 0) -> None:
    """Note where a disk has too little room for an output.

    Args:
        out: the folder that will be.
        nbytes: of its tensors.
        resume: whether what an interrupted run left is used again.
        problems: takes the note.
        spared: bytes that are not written, because they are links.
    """
    staged = 0
    folder = staging_of(out.resolve()) / "model"
    if resume and folder.is_dir():
        staged = sum(p.stat().st_blocks * 512 for p in folder.iterdir() if p.is_file())
    free = shutil.disk_usage(existing(out)).free
    needed = nbytes - max(staged, spared)
    if needed > free:
        problems.add(
            OutputError, f"{out}: needs {readable(needed)} of disk, {readable(free)} are free"
        )


def existing(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent


SCHEMA = 1
"""Version of the layout of ``suture.json``."""
