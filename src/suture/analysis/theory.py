"""What theory says of a merge beside what is observed: slope, smoothness, bounds; values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from suture.analysis.maps import Curve


@dataclass(frozen=True)
class Secant:
    """Smoothness read off the loss itself, at one place of the way."""

    at: float
    """The part ``t`` of the way from expert to merge."""
    value: float
    """``2 (loss(expert + t d) - loss(expert) - t <gradient, d>) / (t^2 |d|^2)``."""


@dataclass(frozen=True)
class Smoothness:
    """The constant L of a loss around an expert, estimated in three ways.

    Only along the way itself does a value make the bound tight: ``curvature`` is local to the
    expert, ``random`` is that of directions in which nobody goes.
    """

    curvature: float
    """The largest eigenvalue of the loss's second derivatives at the expert."""
    residual: float
    """``|H v - curvature v| / |H v|``: how far the power iteration is from an eigenvector."""
    iterations: int
    """Products with second derivatives that it took."""
    secants: tuple[Secant, ...]
    """Along the way to the merge; none where the merge is the expert."""
    random: float | None
    """The largest secant over random directions as long as the way."""
    directions: int
    """How many random directions were tried."""

    def estimates(self) -> dict[str, float]:
        """L by each way: ``curvature``, ``secant`` (the largest), ``random``."""
        found = {"curvature": self.curvature}
        if self.secants:
            found["secant"] = max(s.value for s in self.secants)
        if self.random is not None:
            found["random"] = self.random
        return found


@dataclass(frozen=True)
class Diagnosis:
    """One expert's loss around it and on the way to the merge."""

    model: str
    rows: int
    base_loss: float
    expert_loss: float
    merged_loss: float
    gradient_norm: float
    """Length of the gradient at the expert: the theory takes it to be almost 0."""
    slope: float
    """Dot product of that gradient with the way to the merge."""
    distance: float
    """Length of the way."""
    smoothness: Smoothness
    gap: float
    """How much worse than the expert the merge is: ``merged_loss - expert_loss``."""
    bounds: Mapping[str, float]
    """The most that the gap can be, ``slope + L/2 distance^2``, for each estimate of L."""
    addition_bounds: Mapping[str, float] | None
    """The closed form ``(1 - a) L C (1 + epsilon)``; ``None`` where factors are not convex."""
    barrier: float
    """The most by which the loss on the way exceeds the straight line between its ends."""


@dataclass(frozen=True)
class Diagnostics:
    """What a merge does to the loss of each expert, beside what theory allows."""

    merge: Mapping[str, Any]
    """Factors on the task vectors (``weights``), or the ``path`` of a merged model."""
    models: tuple[Diagnosis, ...]
    line: Curve
    """The loss of each task from its expert to the merge."""
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def barrier_of(losses: list[float]) -> float:
    """The most by which equally spaced losses exceed the straight line between their ends."""
    last = len(losses) - 1
    line = [losses[0] + (losses[-1] - losses[0]) * i / last for i in range(last + 1)]
    return max(loss - on for loss, on in zip(losses, line, strict=True))
