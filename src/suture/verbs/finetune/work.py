"""The folder of a run's checkpoints: locked while it runs, kept until the output is whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from suture.runs.workspace import Workspace, training_space
from suture.training.data import data_digest
from suture.verbs.finetune.plan import Plan, named_files


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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
