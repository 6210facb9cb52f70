"""The folder of a run's checkpoints: locked while it runs, kept until the output is whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import suture
from suture.errors import OutputError
from suture.finetune.outcome import data_digest
from suture.finetune.plan import Plan, named_files
from suture.publish import alone


def work_of(out: Path) -> Path:
    """The folder in which a run keeps its checkpoints."""
    return out.parent / f".{out.name}.finetune"


@contextmanager
def workshop(plan: Plan, fingerprint: str) -> Iterator[Path]:
    """The folder of a run's checkpoints, locked; removed when the run is done."""
    recipe = plan.recipe.resolved() | {"base": "", "output": None, "device": ""}
    recipe["data"] |= {"train": "", "validation": ""}  # what they hold counts, not where they lie
    facts: dict[str, Any] = {
        "recipe": recipe,
        "base": fingerprint,
        "rows": [
            data_digest(plan.rows.train),
            data_digest(plan.rows.validation),
            list(plan.rows.labels),
        ],
    }
    if files := named_files(plan.recipe):
        facts["files"] = {key: _digest(path) for key, path in files.items()}
    with locked_work(plan.out, work_of(plan.out.resolve()), facts, plan.options.resume) as work:
        yield work


@contextmanager
def locked_work(out: Path, work: Path, facts: Mapping[str, Any], resume: bool) -> Iterator[Path]:
    """A folder for what a run makes once, locked; removed when the run is done.

    Args:
        out: the output, for messages.
        work: the folder.
        facts: what decides the bytes of the run, as plain data; versions are added.
        resume: whether to go on with what is there.

    Raises:
        OutputError: it belongs to another run, or one is going on.
    """
    versions = [suture.__version__, version("torch"), version("transformers")]
    text = json.dumps({**facts, "versions": versions}, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()
    with alone(work, out, "training"):
        try:
            _same_run(work, key, resume)
            yield work
            shutil.rmtree(work, ignore_errors=True)
        finally:
            with suppress(OSError):  # nothing was saved: leave no trace
                if {p.name for p in work.iterdir()} <= {"lock", "key"}:
                    shutil.rmtree(work)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _same_run(work: Path, key: str, resume: bool) -> None:
    path = work / "key"
    held = [p for p in work.iterdir() if p.name not in ("lock", "key")]
    if resume and held and (not path.is_file() or path.read_bytes() != key.encode()):
        raise OutputError(
            f"{work}: holds checkpoints of a run with another recipe, base or rows; take the old "
            "recipe to go on with them, or --no-resume to start anew"
        )
    if not resume:
        for stale in held:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    path.write_text(key)
