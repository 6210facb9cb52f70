"""Put safety that fine-tuning took away back into a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suture.runs.verb import Verb

if TYPE_CHECKING:
    from suture.verbs.realign.result import RealignReport

VERB: Verb[RealignReport] = Verb(
    name="realign",
    help="Put safety that fine-tuning took away back into a new model; interrupted, it goes on.",
    purpose="realign",
    flags={"device": "", "overwrite": "", "no_resume": "", "threads": "", "log": ""},
)

__all__ = ["VERB"]
