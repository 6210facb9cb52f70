"""One self-contained HTML page of what a folder holds: interactive, offline, for every reader."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from suture.page.gather import Found, gather
from suture.page.write import draw, render, write_page

_LATE = {"Mark": "tradeoff", "of_benchmark": "tradeoff", "pareto": "tradeoff"}
"""Drawings, which need the extra ``report``."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'suture.page' has no attribute {name!r}")
    return getattr(import_module(f"suture.page.{_LATE[name]}"), name)


__all__ = ["Found", "Mark", "draw", "gather", "of_benchmark", "pareto", "render", "write_page"]
