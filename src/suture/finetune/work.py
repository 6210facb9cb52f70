"""The folder of a run's checkpoints: locked while it runs, kept until the output is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import suture
from suture.errors import OutputError
from suture.finetune.outcome import data_digest
from suture.finetune.plan import Plan
from suture.writer import locked


def work_of(out: Path) -> Path:
    """The folder in which a run keeps its checkpoints."""
    return out.parent / f".{out.name}.finetune"


@contextmanager
def workshop(plan: Plan, fingerprint: str) -> Iterator[Path]:
    """The folder of a run's checkpoints, locked; removed when the run is done."""
    out = plan.out.resolve()
    work = work_of(out)
    facts = {
        "recipe": {**plan.recipe.resolved(), "base": "", "output": None, "device": ""},
        "base": fingerprint,
        "rows": [
            data_digest(plan.rows.train),
            data_digest(plan.rows.validation),
            list(plan.rows.labels),
        ],
        "versions": [suture.__version__, version("torch"), version("transformers")],
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"{work}: cannot write there: {error.strerror}") from None
    try:
        if not locked(lock):
            raise OutputError(f"{plan.out}: another process is training it just now")
        _same_run(work, key, plan)
        yield work
        shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)
        with suppress(OSError):  # nothing was saved: leave no trace
            if {p.name for p in work.iterdir()} <= {"lock", "key"}:
                shutil.rmtree(work)


def _same_run(work: Path, key: str, plan: Plan) -> None:
    path = work / "key"
    held = [p for p in work.iterdir() if p.name not in ("lock", "key")]
    if plan.options.resume and held and (not path.is_file() or path.read_text() != key):
        raise OutputError(
            f"{work}: holds checkpoints of a run with another recipe, base or rows; take the old "
            "recipe to go on with them, or --no-resume to start anew"
        )
    if not plan.options.resume:
        for stale in held:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    path.write_text(key)
