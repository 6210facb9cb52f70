"""Numbers that differ from tensor to tensor and from model to model, as recipes give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from suture.tensors.roles import selects


@dataclass(frozen=True)
class DepthCurve:
    """A number that changes with depth: the points are spread evenly from first to last layer."""

    points: tuple[float, ...]

    def at(self, depth: float) -> float:
        """The value at a depth from 0 to 1, linear between the two nearest points."""
        place = depth * (len(self.points) - 1)
        before = int(place)
        after = min(before + 1, len(self.points) - 1)
        share = place - before
        return (1 - share) * self.points[before] + share * self.points[after]


Value = float | DepthCurve


@dataclass(frozen=True)
class Scalar:
    """A number that may differ from tensor to tensor: the first rule that fits counts.

    Where a curve is among the values, ``bound`` makes numbers of it before anything asks.
    """

    default: Value
    rules: tuple[tuple[str, Value], ...] = ()
    table: Mapping[str, float] = field(default_factory=dict)
    """The numbers of tensors that are settled; they stand above the rules."""

    @property
    def curved(self) -> bool:
        """Whether it depends on depth."""
        return any(isinstance(v, DepthCurve) for v in (self.default, *(v for _, v in self.rules)))

    def at(self, name: str) -> float:
        """The number for one tensor."""
        if name in self.table:
            return self.table[name]
        value = self.rule(name) if self.rules else self.default
        assert not isinstance(value, DepthCurve), f"{name}: the depth of a curve was not settled"
        return value

    def rule(self, name: str) -> Value:
        """The number or curve that the rules give a tensor of this name."""
        return next((v for p, v in self.rules if selects(p, name)), self.default)

    def bound(self, names: Iterable[tuple[str, str, float]]) -> Scalar:
        """The same, with a number for each tensor.

        Args:
            names: of each tensor its name, the name by which the rules know it, and its depth.
        """
        if not self.rules and not isinstance(self.default, DepthCurve):
            return self
        numbers = {}
        for name, known, depth in names:
            value = self.rule(known)
            numbers[name] = value.at(depth) if isinstance(value, DepthCurve) else value
        return replace(self, table=numbers)


@dataclass(frozen=True)
class PerModel:
    """One ``Scalar`` a model; a single one stands for every model."""

    scalars: tuple[Scalar, ...]

    def at(self, name: str, models: int) -> tuple[float, ...]:
        """The numbers for one tensor, in the order of models."""
        scalars = self.scalars * models if len(self.scalars) == 1 else self.scalars
        return tuple(s.at(name) for s in scalars)

    def row(self, block: Any) -> Any:
        """The same as float32[models], for the tensor of a block of the stream."""
        return block.numbers(self.at(block.name, block.models))


def each(value: float) -> PerModel:
    """The same number for every model and tensor."""
    return PerModel((Scalar(value),))


__all__ = ["DepthCurve", "PerModel", "Scalar", "Value", "each"]
