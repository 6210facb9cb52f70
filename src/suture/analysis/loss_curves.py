r"""Theory's quantities at work: gradient, smoothness and losses between an expert and a merge.

Everything is measured over the tensors that edits may touch; the others are the base's throughout,
at the expert, too. With :math:`d = \theta_m - \theta_i` from an expert to a merge:

    loss(theta_i + t d) <= loss(theta_i) + t <gradient, d> + L/2 t^2 |d|^2

Source: Zeng et al., "Efficient model editing with task vector bases" (arXiv:2502.01015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from suture.analysis.geometry import addition_bound
from suture.analysis.maps import Point, Series
from suture.analysis.theory import Diagnosis, Secant, Smoothness, barrier_of
from suture.errors import NonFiniteError
from suture.evals.walk import Walk
from suture.training.data import Dataset
from suture.training.loss import to
from suture.training.measure import OBJECTIVES, Objective, check_rows
from suture.training.models import evaluating

Vector = dict[str, Tensor]
"""A direction in the space of the parameters, by name."""
SECANTS = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Looks:
    """How closely to look."""

    iterations: int = 20
    """Products with second derivatives at most."""
    tolerance: float = 1e-3
    """Power iteration ends when its residual is below."""
    directions: int = 4
    """Random directions."""
    points: int = 11
    """On the way, both ends included."""
    batch: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Convex:
    """What the closed form of the bound is made of, where a merge has convex factors."""

    own: float
    """The factor of the expert's own task vector."""
    largest: float
    """The largest squared length of a task vector, C."""
    epsilon: float
    """The largest cosine between two of them."""


class Field:
    """The loss of a task as a function of the parameters: values, gradients, curvature."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], data: Dataset,
        objective: Objective, batch: int, device: str = "cpu",
    ) -> None:  # fmt: skip
        check_rows(data, objective)
        self.model, self.parameters, self.data = model, dict(parameters), data
        self.objective, self.batch, self.device = objective, batch, torch.device(device)

    def _parts(self) -> Iterator[Tensor]:
        """The share of the mean loss that each batch has."""
        for part in self.data.batches(self.batch):
            found = to(part, self.device)
            losses = self.objective.losses(self.objective.logits(self.model, found), found)
            yield losses.double().sum() / len(self.data)

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss of a row.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        return _finite(sum(float(part) for part in self._parts()))

    def gradient(self) -> tuple[float, Vector]:
        """The mean loss and its gradient.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        total, found = 0.0, self.zeros()
        for part in self._parts():
            total += float(part.detach())
            self._add(found, torch.autograd.grad(part, self._wanted(), allow_unused=True))
        return _finite(total), found

    def curve(self, direction: Vector) -> Vector:
        """The second derivatives of the mean loss times a direction, without a matrix."""
        found = self.zeros()
        # Only the plain attention kernel has second derivatives.
        with sdpa_kernel(SDPBackend.MATH):
            for part in self._parts():
                slopes = torch.autograd.grad(
                    part, self._wanted(), create_graph=True, allow_unused=True
                )
                pairs = [
                    (slope, direction[name])
                    for name, slope in zip(self.parameters, slopes, strict=True)
                    if slope is not None and slope.requires_grad
                ]
                if pairs:
                    along = torch.stack([(s.double() * d.double()).sum() for s, d in pairs]).sum()
                    self._add(found, torch.autograd.grad(along, self._wanted(), allow_unused=True))
        return found

    def zeros(self) -> Vector:
        """The direction that leads nowhere."""
        return {n: torch.zeros_like(p, requires_grad=False) for n, p in self.parameters.items()}

    def drawn(self, seed: int, length: float) -> Vector:
        """A random direction of a length, the same for a seed on every machine."""
        draw = torch.Generator().manual_seed(seed)
        found = {
            n: torch.randn(p.shape, generator=draw, dtype=p.dtype).to(p.device)
            for n, p in self.parameters.items()
        }
        return scaled(found, length / max(norm(found), 1e-30))

    def _wanted(self) -> list[nn.Parameter]:
        return list(self.parameters.values())

    def _add(self, to: Vector, more: Sequence[Tensor | None]) -> None:
        for name, part in zip(self.parameters, more, strict=True):
            if part is not None:
                to[name] += part


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the mean loss is {loss}: the model is broken, or too large for its dtype"
        )
    return loss


def dot(one: Vector, other: Vector) -> float:
    """Dot product, summed in float64."""
    return sum(float((one[n].double() * other[n].double()).sum()) for n in one)


def norm(vector: Vector) -> float:
    """Length."""
    return math.sqrt(max(0.0, dot(vector, vector)))


def scaled(vector: Vector, factor: float) -> Vector:
    """A multiple of a direction."""
    return {n: factor * v for n, v in vector.items()}


def top_curvature(field: Field, looks: Looks) -> tuple[float, float, int]:
    """The largest eigenvalue of the second derivatives, the residual, and the products it took.

    Power iteration finds the eigenvalue of largest size. Where that is negative (the expert is no
    minimum), a second iteration on the matrix shifted by it finds the largest one.
    """
    value, residual, used, _ = _power(field, looks, 0.0)
    if value >= 0:
        return value, residual, used
    shifted, residual, more, size = _power(field, looks, value)
    return shifted, residual * size / max(abs(shifted), 1e-30), used + more


def _power(field: Field, looks: Looks, shift: float) -> tuple[float, float, int, float]:
    direction = field.drawn(looks.seed, 1.0)
    value, residual, size = 0.0, math.inf, 0.0
    for count in range(1, looks.iterations + 1):
        moved = field.curve(direction)
        value = dot(direction, moved)
        for name in moved if shift else ():
            moved[name] -= shift * direction[name]
        size = norm(moved)
        if size == 0.0:  # the loss is flat
            return shift, 0.0, count, 0.0
        along = value - shift
        off = math.sqrt(max(0.0, size**2 - along**2))
        residual = off / size
        if residual <= looks.tolerance:
            return value, residual, count, size
        direction = scaled(moved, 1 / size)
    return value, residual, looks.iterations, size


def diagnose(
    walk: Walk,
    name: str,
    data: Dataset,
    *,
    objective: Objective = OBJECTIVES["classification"],
    looks: Looks = Looks(),
    convex: Convex | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> tuple[Diagnosis, Series]:
    """Look at the loss of one task around its expert and on the way to a merge.

    Args:
        walk: the loaded base with two task vectors: that of the expert, and the way from the expert
            to the merge. It is left at the base.
        name: of the expert.
        data: rows of its task.
        objective: what the loss of a row is.
        looks: how closely to look.
        convex: for the closed form of the bound.
        device: where model and batches are.
        progress: called with the name of each step.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
        RecipeError: there are no rows, or labels are missing.
    """
    tell = progress or (lambda what: None)
    field = Field(walk.model, walk.moved, data, objective, looks.batch, device)
    way = walk.direction(1)
    distance = norm(way)
    with evaluating(walk.model), _moving(walk):
        walk.move((0.0, 0.0))
        base_loss = field.loss()
        walk.move((1.0, 0.0))
        tell(f"{name}: gradient")
        expert_loss, gradient = field.gradient()
        slope = dot(gradient, way)
        tell(f"{name}: second derivatives")
        curvature, residual, used = top_curvature(field, looks)

        def secant(t: float, loss: float, slope: float = slope) -> float:
            return 2 * (loss - expert_loss - t * slope) / (t * distance) ** 2

        tell(f"{name}: the way to the merge")
        losses: dict[float, float] = {0.0: expert_loss}
        grid = [i / (looks.points - 1) for i in range(looks.points)]
        for t in sorted({*grid, *SECANTS} - {0.0}):
            walk.move((1.0, t))
            losses[t] = field.loss()
        secants = tuple(Secant(t, secant(t, losses[t])) for t in SECANTS) if distance else ()
        drawn = []
        for number in range(looks.directions if distance else 0):
            step = field.drawn(looks.seed + 1 + number, distance)
            walk.move((1.0, 0.0), step)
            drawn.append(secant(1.0, field.loss(), dot(gradient, step)))
    smooth = Smoothness(
        curvature, residual, used, secants, max(drawn) if drawn else None, len(drawn)
    )
    estimates = smooth.estimates()
    found = Diagnosis(
        name, len(data), base_loss, expert_loss, losses[1.0], norm(gradient), slope, distance,
        smooth, losses[1.0] - expert_loss,
        {k: slope + value / 2 * distance**2 for k, value in estimates.items()},
        None if convex is None else
        {k: addition_bound(convex.largest, convex.epsilon, value, convex.own)
         for k, value in estimates.items()},
        barrier_of([losses[t] for t in grid]),
    )  # fmt: skip
    return found, Series(name, tuple(Point(t, losses[t]) for t in grid))


@contextmanager
def _moving(walk: Walk) -> Iterator[None]:
    """Let only the parameters that move ask for gradients inside, and go back to the base."""
    before = {p: p.requires_grad for p in walk.model.parameters()}
    chosen = {id(p) for p in walk.moved.values()}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        walk.move((0.0, 0.0))
        for parameter, asked in before.items():
            parameter.requires_grad_(asked)


__all__ = [
    "SECANTS", "Convex", "Field", "Looks", "diagnose", "dot", "norm", "scaled", "top_curvature",
]  # fmt: skip
