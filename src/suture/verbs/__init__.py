"""The commands: a folder each, the ones with a recipe of one shape (see ``suture.runs.verb``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from suture.runs.verb import Verb
from suture.verbs.analyze import VERB as ANALYZE
from suture.verbs.audit import VERB as AUDIT
from suture.verbs.bench import VERB as BENCH
from suture.verbs.finetune import VERB as FINETUNE
from suture.verbs.localize import VERB as LOCALIZE
from suture.verbs.merge import VERB as MERGE
from suture.verbs.realign import VERB as REALIGN

VERBS: Mapping[str, Verb[Any]] = {
    verb.name: verb for verb in (MERGE, LOCALIZE, ANALYZE, FINETUNE, REALIGN, AUDIT, BENCH)
}
"""The commands that follow a recipe into a folder, by name."""

__all__ = ["VERBS"]
