"""The folder of a run's checkpoints: locked while it runs, kept until the output is whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from suture.runs.place import Options
from suture.runs.workspace import Workspace, workspace
from suture.verbs.finetune.plan import Plan, named_files
from suture.verbs.finetune.result import data_digest

KEPT = "; the training is kept, and the same command goes on from it"
"""What is said after a failure of the disk."""


@contextmanager
def workshop(plan: Plan, fingerprint: str) -> Iterator[Workspace]:
    """The folder of a run's checkpoints, locked; removed when the run is done."""
    recipe = plan.recipe.resolved() | {"base": "", "output": None, "device": ""}
    recipe["data"] |= {"train": "", "validation": ""}  # what they hold counts, not where they lie
    how = recipe["training"]  # where activations are kept changes no bit
    recipe["training"] = {k: v for k, v in how.items() if not k.startswith("activations")}
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
    with training_space(plan.out, "finetune", facts, plan.options) as space:
        yield space


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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
