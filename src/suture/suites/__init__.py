"""Suites of evaluations: from a file of questions to results, and results side by side.

The public names are loaded when they are first used: comparing needs no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Comparison": "comparison",
    "Options": "plan",
    "Suite": "suite",
    "compare": "comparison",
    "describe": "plan",
    "evaluate": "work",
    "execute": "work",
    "plan_suite": "plan",
    "read_suite": "suite",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'suture.suites' has no attribute {name!r}")
    return getattr(import_module(f"suture.suites.{_HOMES[name]}"), name)
