"""A loaded model and rows in, numbers by row and metrics out; ``EVALS`` is the table.

The names are loaded when they are first used: results are read without a framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from suture.evals.base import Eval, Metric, share

if TYPE_CHECKING:
    from suture.evals.table import EVALS

__all__ = ["EVALS", "Eval", "Metric", "share"]


def __getattr__(name: str) -> Any:
    if name != "EVALS":
        raise AttributeError(f"module 'suture.evals' has no attribute {name!r}")
    return import_module("suture.evals.table").EVALS
