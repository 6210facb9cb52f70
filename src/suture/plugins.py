"""What methods of other packages are made of, in one place that stays: see docs/plugins.md.

Names that need torch are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from suture.edits.importance import Rule, RuleInput
from suture.merges.base import (
    EITHER,
    Beside,
    Context,
    Density,
    Example,
    Merge,
    Method,
    Scale,
    Scope,
    Seed,
    Weight,
)
from suture.schema.parameters import Choice, Files, Meaning, ModelName, Number, Text, Words
from suture.schema.values import PerModel, Scalar, each
from suture.stream.sweep import DELTA, WEIGHT, Block

if TYPE_CHECKING:
    from suture.evals.kinds import Column, EvalJob, Kind, Models, Prepare, Run, Score, Template
    from suture.training.loss import LossStep
    from suture.training.strategy import Strategy, TrainJob, Tuned
    from suture.verbs.realign.base import Realigned, Realigner, RealignJob

_HOMES = {
    "Column": ("evals.kinds", "Column"),
    "EvalJob": ("evals.kinds", "Job"),
    "Kind": ("evals.kinds", "Kind"),
    "Models": ("evals.kinds", "Models"),
    "LossStep": ("training.loss", "LossStep"),
    "Prepare": ("evals.kinds", "Prepare"),
    "RealignJob": ("verbs.realign.base", "Job"),
    "Realigned": ("verbs.realign.base", "Realigned"),
    "Realigner": ("verbs.realign.base", "Realigner"),
    "Run": ("evals.kinds", "Run"),
    "Score": ("evals.kinds", "Score"),
    "Strategy": ("training.strategy", "Strategy"),
    "Template": ("evals.kinds", "Template"),
    "TrainJob": ("training.strategy", "Job"),
    "Tuned": ("training.strategy", "Tuned"),
}

__all__ = [
    "DELTA",
    "EITHER",
    "WEIGHT",
    "Beside",
    "Block",
    "Choice",
    "Column",
    "Context",
    "Density",
    "EvalJob",
    "Example",
    "Files",
    "Kind",
    "LossStep",
    "Meaning",
    "Merge",
    "Method",
    "ModelName",
    "Models",
    "Number",
    "PerModel",
    "Prepare",
    "RealignJob",
    "Realigned",
    "Realigner",
    "Rule",
    "RuleInput",
    "Run",
    "Scalar",
    "Scale",
    "Scope",
    "Score",
    "Seed",
    "Strategy",
    "Template",
    "Text",
    "TrainJob",
    "Tuned",
    "Weight",
    "Words",
    "each",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'suture.plugins' has no attribute {name!r}")
    module, of = _HOMES[name]
    return getattr(import_module(f"suture.{module}"), of)
