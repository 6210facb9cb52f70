"""Realignment: safety that fine-tuning took away, put back; REALIGNERS, the table of the ways.

The public names are loaded when they are first used: the table alone needs torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "REALIGNERS": "methods",
    "Options": "plan",
    "RealignReport": "outcome",
    "describe": "plan",
    "execute": "run",
    "plan_realign": "plan",
    "read_realign": "recipe",
    "realign": "run",
    "report_rows": "outcome",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'suture.realign' has no attribute {name!r}")
    return getattr(import_module(f"suture.realign.{_HOMES[name]}"), name)
