"""Fine-tune a model by a strategy into a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suture.runs.verb import Verb

if TYPE_CHECKING:
    from suture.verbs.finetune.result import FinetuneReport

VERB: Verb[FinetuneReport] = Verb(
    name="finetune",
    help="Fine-tune a model by a recipe into a new folder; interrupted, the same command goes on.",
    purpose="train",
    flags={
        "device": "", "overwrite": "", "no_resume": "",
        "restricted": "Mark it, and what is made with it: not to share.", "log": "",
    },
)  # fmt: skip

__all__ = ["VERB"]
