"""Task arithmetic as a benchmark: strategies beside controls, every number a file of its own.

The public names are loaded when they are first used: reading a recipe needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Bench": "recipe",
    "TASKS": "tasks",
    "bench": "run",
    "describe": "plan",
    "divide": "tasks",
    "package_folders": "tasks",
    "plan_bench": "plan",
    "read_bench": "recipe",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'suture.bench' has no attribute {name!r}")
    return getattr(import_module(f"suture.bench.{_HOMES[name]}"), name)
