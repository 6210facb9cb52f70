"""The ways to fuse task vectors, and their defaults; what they compute is in ``fuse``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Fuse(NamedTuple):
    """A line of the table of ways to fuse."""

    coefficient: float
    """The factor on the result, unless a recipe says another."""
    density: float = 1.0
    """The share of entries that each task keeps, where the way keeps a share."""
    several: bool = True
    """Whether it takes more than one task."""


FUSES: dict[str, Fuse] = {
    "single": Fuse(1.0, several=False),
    "average": Fuse(1.0),
    "task_arithmetic": Fuse(0.3),
    "ties": Fuse(0.4, 0.2),
    "dare": Fuse(0.3, 0.8),
}
"""The defaults are those of the code published with SOMF (Yi et al. 2024, arXiv:2405.09055)."""


@dataclass(frozen=True)
class Fusing:
    """How a recipe wants task vectors fused."""

    how: str = "single"
    coefficient: float = 1.0
    density: float = 1.0
    scope: str = "global"
    """Over which tensors the entries of a task compete in TIES."""
    seed: int = 0
    """Of the entries that DARE drops, in everything but the steps of training."""


__all__ = ["FUSES", "Fuse", "Fusing"]
