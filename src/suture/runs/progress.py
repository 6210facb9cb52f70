"""What a run says while it goes on: a few functions that a terminal, a test or nobody gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

Say: TypeAlias = Callable[[str], None]
"""Takes a sentence."""
Stage: TypeAlias = Callable[[str, int], Callable[[str, int], None] | None]
"""Takes the name of a pass over tensors and its bytes; returns what takes a tensor's name and the
bytes that were read of it, or ``None``."""


def _say(text: str) -> None:
    """Say nothing."""


def _stage(name: str, nbytes: int) -> None:
    """Count nothing."""


def _step(phase: str, at: Any) -> None:
    """Show nothing."""


def _asked(at: Any) -> None:
    """Show nothing."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How a run says how far it is; by default it says nothing."""

    say: Say = _say
    """Sentences."""
    stage: Stage = _stage
    """Passes over tensors, in bytes."""
    step: Callable[[str, Any], None] = _step
    """Steps of a training: the phase, and a ``training.loop.TrainingStep``."""
    asked: Callable[[Any], None] = _asked
    """Rows of an evaluation: a ``verbs.evaluate.run.At``."""


__all__ = ["Progress", "Say", "Stage"]
