"""Look at several task vectors at once: a folder with ``analysis.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suture.runs.verb import Verb

if TYPE_CHECKING:
    from suture.verbs.analyze.run import Analysis

VERB: Verb[Analysis] = Verb(
    name="analyze",
    help="Look at several task vectors at once: profiles, angles, conflicts, masks, bases.",
    recipe="What to look at (YAML).",
    purpose="analyze",
    flags={"threads": "", "overwrite": "Replace an older analysis, at the end."},
)

__all__ = ["VERB"]
