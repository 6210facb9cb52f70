"""Where the safety of a model lives: an audit of few weights, languages, derivatives and freezing.

The public names are loaded when they are first used: reading a recipe needs no model.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Audit": "recipe",
    "Options": "plan",
    "audit": "run",
    "describe": "plan",
    "execute": "run",
    "lines": "outcome",
    "plan_audit": "plan",
    "read_audit": "recipe",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'suture.audit' has no attribute {name!r}")
    return getattr(import_module(f"suture.audit.{_HOMES[name]}"), name)
