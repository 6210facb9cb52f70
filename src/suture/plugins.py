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
    from suture.training.strategies import Strategy
    from suture.training.strategy import TrainJob, Tuned
    from suture.verbs.realign.base import Realigned, RealignJob
    from suture.verbs.realign.methods import Realigner

_HOMES = {
    "evals.kinds": (
        "Column", "EvalJob", "Kind", "Models", "Prepare", "Run", "Score", "Template",
    ),
    "training.loss": ("LossStep",),
    "training.strategies": ("Strategy",),
    "training.strategy": ("TrainJob", "Tuned"),
    "verbs.realign.base": ("RealignJob", "Realigned"),
    "verbs.realign.methods": ("Realigner",),
}  # fmt: skip
"""Names that are imported when they are asked for, by module: most need a framework."""

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
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"suture.{module}"), name)
    raise AttributeError(f"module 'suture.plugins' has no attribute {name!r}")
