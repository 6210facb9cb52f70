"""Merge models by a recipe into one folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suture.runs.verb import Verb

if TYPE_CHECKING:
    from suture.verbs.merge.result import MergeReport

VERB: Verb[MergeReport] = Verb(
    name="merge",
    help="Merge models by a recipe into a new folder; interrupted, the same command goes on.",
    recipe="A recipe (YAML), also mergekit's, or a suture.json.",
    purpose="merge",
    flags={
        "threads": "",
        "explain": "Say what a mergekit recipe means here, and where Suture's defaults differ.",
        "overwrite": "Replace an older output with all that is in it, in one step, at the end.",
        "no_resume": "", "allow_nonfinite": "", "link": "",
    },
)  # fmt: skip

__all__ = ["VERB"]
