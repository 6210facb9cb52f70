"""Fine-tuning by any strategy of one table; from a recipe to a folder.

The public names are loaded when they are first used: the table alone needs torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "STRATEGIES": "strategies",
    "FinetuneReport": "run",
    "Options": "run",
    "describe": "run",
    "execute": "run",
    "finetune": "run",
    "load_tuned": "load",
    "plan_finetune": "run",
    "read_finetune": "recipe",
    "report_rows": "run",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'suture.finetune' has no attribute {name!r}")
    return getattr(import_module(f"suture.finetune.{_HOMES[name]}"), name)
