"""Find the entries that carry skills: a folder of masks."""

from __future__ import annotations

from typing import Any

from suture.runs.verb import Verb

VERB: Verb[dict[str, Any]] = Verb(
    name="localize",
    help="Find the entries that carry a model's skill: a mask for each model, by an importance "
    "rule.",
    recipe="A recipe (YAML): base, models, rule, density.",
    out="The folder of masks to write.",
    purpose="localize",
    flags={
        "threads": "", "overwrite": "Replace an older folder of masks.",
        "values": "Write the marked weights, too: grafts, which stitch without their models.",
        "restricted": "Mark them, and what is made with them: not to share.",
    },
)  # fmt: skip

__all__ = ["VERB"]
