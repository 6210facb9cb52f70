"""Find out where the safety of a model lives."""

from __future__ import annotations

from typing import Any

from suture.runs.verb import Verb

VERB: Verb[dict[str, Any]] = Verb(
    name="audit",
    help="Find out where the safety of a model lives; interrupted, the same command goes on.",
    recipe="Models, rows by language, shares (YAML).",
    out="The folder of cells and results.",
    purpose="begin",
    flags={
        "device": "", "overwrite": "Remove what an older audit left there, and begin.",
        "no_resume": "", "threads": "Threads to use; default: every core.",
    },
)  # fmt: skip

__all__ = ["VERB"]
