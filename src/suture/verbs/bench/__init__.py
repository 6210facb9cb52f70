"""Compare fine-tuning strategies by task arithmetic."""

from __future__ import annotations

from typing import Any

from suture.runs.verb import Verb

VERB: Verb[dict[str, Any]] = Verb(
    name="bench",
    help="Compare fine-tuning strategies by task arithmetic; interrupted, the same command goes "
    "on.",
    recipe="Base, tasks, strategies, seeds (YAML).",
    out="The folder of cells and tables.",
    purpose="begin",
    flags={
        "overwrite": "Remove what an older benchmark left there, and begin.", "no_resume": "",
        "threads": "Threads to use; default: every core.",
    },
)  # fmt: skip

__all__ = ["VERB"]
