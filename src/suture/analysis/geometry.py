"""How task vectors lie to each other: norms by layer and role, Gram matrix, angles, bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from suture.analysis.cells import Array, Groups, Matrix, Stack, frozen
from suture.kernels import compiled
from suture.stream.sweep import Block, Visitor
from suture.stream.vector import Gram
from suture.tensors.spec import Piece


@dataclass(frozen=True)
class Move:
    """How far one model moved in one part of the network."""

    model: str
    elements: int
    norm: float
    """Euclidean length of the delta."""
    relative_norm: float | None
    """The same over the length of the base's weights; ``None`` where those are all zero."""
    share: float
    """Squared length over that of the whole task vector: the parts of a model add up to 1."""
    layer: str | None = None
    role: str | None = None


@dataclass(frozen=True)
class Geometry:
    """Lengths of task vectors and the angles between them."""

    models: tuple[str, ...]
    elements: int
    base_norm: float
    gram: Matrix
    """Dot products, float64."""
    cosine: Matrix
    """0 beside a task vector without length."""
    epsilon: float
    """Largest absolute cosine between two different task vectors: 0 where all are orthogonal."""
    largest: float
    """The largest squared length, C of Zeng et al."""
    to_average: tuple[float, ...]
    """Distance of each model to the plain average of all."""
    total: tuple[Move, ...]
    layers: tuple[Move, ...]
    roles: tuple[Move, ...]
    cells: tuple[Move, ...]
    """By layer and role."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Products(Visitor[Stack]):
    """Dot products of all task vectors and the base, tensor by tensor, in one pass."""

    def __init__(self, models: int) -> None:
        self.models = models
        self.gram = Gram(models + 1)

    def local(self) -> Stack:
        """The base under the deltas."""
        return Stack(self.gram)

    def see(self, local: Stack, block: Block) -> None:
        """Add a block."""
        rows = local.fit(block.size)
        rows[:-1, : block.count] = block.rows[:, : block.count]
        rows[-1, : block.count] = block.base[: block.count]
        compiled.gram(rows, block.count, local.lanes[""])

    def end_piece(self, local: Stack, piece: Piece) -> None:
        """Put the lanes of a piece aside."""
        self.gram.end_piece(local.lanes, piece)

    def end_task(self, local: Stack, task: Sequence[Piece]) -> None:
        """Hand the finished pieces over."""
        self.gram.end_task(local.lanes, task)

    def geometry(self, models: Sequence[str], groups: Groups, sizes: Mapping[str, int]) -> Geometry:
        """What was found about the first ``len(models)`` rows, after the sweep."""
        number = len(models)
        names = [n for inside in groups.layers.values() for n in inside]
        whole = self.gram.of(*names)
        gram, base = whole[:number, :number], float(whole[-1, -1])
        squares = np.diag(gram)

        def moves(names: Sequence[str], **where: str) -> list[Move]:
            found = np.diag(self.gram.of(*names))
            elements = sum(sizes[n] for n in names)
            start = float(found[-1])
            return [
                Move(
                    model, elements, math.sqrt(square),
                    math.sqrt(square / start) if start > 0 else None,
                    square / total if total > 0 else 0.0, **where,
                )
                for model, square, total in zip(
                    models, found[:number].tolist(), squares.tolist(), strict=True
                )
            ]  # fmt: skip

        cosine = cosines(gram)
        off = np.abs(cosine - np.diag(np.diag(cosine)))
        average = np.full(number, 1 / number)
        return Geometry(
            tuple(models), sum(sizes[n] for n in names), math.sqrt(base),
            frozen(gram), frozen(cosine), float(off.max(initial=0.0)),
            float(squares.max(initial=0.0)),
            tuple(math.sqrt(squared_distance(gram, average, i)) for i in range(number)),
            tuple(moves(names)),
            tuple(m for k, inside in groups.layers.items() for m in moves(inside, layer=k)),
            tuple(m for k, inside in groups.roles.items() for m in moves(inside, role=k)),
            tuple(m for k, inside in groups.cells.items()
                  for m in moves(inside, layer=k.layer, role=k.role)),
        )  # fmt: skip


def cosines(gram: Array) -> Array:
    """The matrix of cosines that belongs to a Gram matrix; 0 beside a vector without length."""
    lengths = np.sqrt(np.maximum(np.diag(gram), 0.0))
    lengths = np.where(lengths > 0, lengths, np.inf)
    found = np.clip(gram / np.outer(lengths, lengths), -1.0, 1.0)
    found[np.diag_indices_from(found)] = np.isfinite(lengths)
    return np.asarray(found)


def squared_distance(gram: Array, coefficients: Array, task: int) -> float:
    r"""Squared distance of :math:`\sum_j a_j\tau_j` to :math:`\tau_i`, from dot products alone.

    :math:`(a - e_i)^\top G (a - e_i)`; exact for any coefficients.
    """
    offset = np.array(coefficients, np.float64)
    offset[task] -= 1.0
    return max(0.0, float(offset @ gram @ offset))


def gap_bound(
    gram: Array, coefficients: Array, task: int, smoothness: float, slope: float = 0.0
) -> float:
    r"""How much worse than its expert a merge can be on one task, at most.

    .. math:: \ell_i(\theta_m) - \ell_i(\theta_i) \le \langle\nabla\ell_i(\theta_i), \delta_i\rangle
       + \tfrac{L_i}{2}(a - e_i)^\top G (a - e_i)

    It holds where the loss is smooth with constant ``smoothness`` between the two; it is an alarm,
    not a prediction. For uniform weights it is smallest at the plain average, whatever G is, so it
    cannot say why other merges do better.

    Args:
        gram: dot products of the task vectors.
        coefficients: the merge's factor on each task vector.
        task: the number of the task vector whose loss is meant.
        smoothness: L, the largest curvature of that loss.
        slope: the dot product of the loss's gradient at the expert with the way to the merge.
    """
    return slope + smoothness / 2 * squared_distance(gram, coefficients, task)


def addition_bound(largest: float, epsilon: float, smoothness: float, own: float = 0.0) -> float:
    r"""The closed form for convex coefficients: :math:`(1 - a_i) L C (1 + \epsilon)`.

    Source: Zeng et al., "Efficient model editing with task vector bases" (arXiv:2502.01015).
    """
    return (1 - own) * smoothness * largest * (1 + epsilon)


def negation_bound(largest: float, epsilon: float, smoothness: float) -> float:
    r"""What forgetting one task can cost another at most, for a factor up to 1.

    :math:`\ell_j(\theta_0 - a\tau_i) - \ell_j(\theta_j) \le L C (1 + \epsilon)`.
    """
    return smoothness * largest * (1 + epsilon)
