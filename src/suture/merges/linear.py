"""Weighted sums: model soups, task arithmetic, spherical interpolation."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np

from suture.kernels import compiled
from suture.merges.base import Array, Context, Merge, Scale, Weight
from suture.schema.parameters import Choice, Number
from suture.schema.values import PerModel, Scalar, each
from suture.stream.sweep import WEIGHT, Block, Combine, sweep, tasks_of
from suture.stream.vector import Gram

Normalize = Annotated[bool, Choice("divide by the sum of the weights, unless that is 0")]


def normalized(weights: Array, normalize: bool) -> Array:
    """The weights over their sum, where that is asked for and not zero: float32[models]."""
    total = float(weights.sum(dtype=np.float64))
    return weights / np.float32(total) if normalize and abs(total) >= 1e-8 else weights


def linear(*, weight: Weight = each(1.0), normalize: Normalize = True) -> Merge[None]:
    r"""Average the models' weights: :math:`\theta = \sum_i w_i \theta_i / \sum_i w_i`.

    Equal weights make a model soup. No base is needed; without ``normalize`` the weights are used
    as they are.
    """

    def combine(block: Block, _: None) -> None:
        weights = normalized(weight.row(block), normalize)
        block.fuse(Combine(compiled.WEIGHTED_SUM, weights))

    return Merge(combine, how=WEIGHT)


def task_arithmetic(
    *, weight: Weight = each(1.0), scale: Scale = Scalar(1.0), normalize: Normalize = False
) -> Merge[None]:
    r"""Add task vectors: :math:`\theta = \theta_0 + \lambda \sum_i w_i \tau_i`.

    A negative weight makes the model forget (negation). For the analogy "A is to B as C is to D"
    give C and B the weight 1 and A the weight -1.
    """

    def combine(block: Block, _: None) -> None:
        weights = normalized(weight.row(block), normalize) * np.float32(scale.at(block.name))
        block.fuse(Combine(compiled.WEIGHTED_SUM, weights))

    return Merge(combine)


Factor = Annotated[PerModel, Number("factor on the model's entries")]


def passthrough(*, scale: Factor = each(1.0)) -> Merge[None]:
    r"""Take one model as it is, or times a number: :math:`\theta = s\,\theta_1`.

    It is for slices: layers of several models one after another. A tensor whose factor is 1 is
    copied bit for bit.
    """

    def combine(block: Block, _: None) -> None:
        compiled.weighted_sum(block.rows, scale.row(block), 0, block.count, block.out)

    return Merge(combine, how=WEIGHT, keeps=lambda name: scale.at(name, 1)[0] == 1)


Position = Annotated[Scalar, Number("place between the first model (0) and the second (1)", 0, 1)]
_PARALLEL = 0.9995
_TINY = 1e-8


def slerp(*, t: Position = Scalar(0.5)) -> Merge[dict[str, Array]]:
    r"""Interpolate on the sphere, tensor by tensor, between two models.

    With :math:`\Omega` the angle between the flattened tensors, :math:`\theta =
    \frac{\sin((1-t)\Omega)}{\sin\Omega}\theta_1 + \frac{\sin(t\Omega)}{\sin\Omega}\theta_2`. Nearly
    parallel tensors (cosine beyond 0.9995) are interpolated linearly; one without length counts as
    perpendicular to the other.
    """

    def prepare(context: Context) -> dict[str, Array]:
        gram = grams(context)
        return {name: _coefficients(gram.of(name), t.at(name)) for name in context.names}

    def combine(block: Block, coefficients: dict[str, Array]) -> None:
        block.fuse(Combine(compiled.WEIGHTED_SUM, coefficients[block.name]))

    return Merge(combine, prepare, how=WEIGHT, passes=1)


def grams(context: Context) -> Gram:
    """Dot products between all models, tensor by tensor; one pass."""
    gram = Gram(len(context.models))
    sweep(context.sources, tasks_of(context.names, context.sources.reference.specs), gram,
          threads=context.threads, block=context.block, progress=context.progress)  # fmt: skip
    return gram


def _coefficients(gram: Array, t: float) -> Array:
    lengths = [math.sqrt(gram[i, i]) if math.sqrt(gram[i, i]) > _TINY else 1.0 for i in (0, 1)]
    cosine = min(1.0, max(-1.0, float(gram[0, 1]) / (lengths[0] * lengths[1])))
    if abs(cosine) > _PARALLEL:
        return np.array([1 - t, t], np.float32)
    angle = math.acos(cosine)
    sines = np.array([math.sin((1 - t) * angle), math.sin(t * angle)])
    return (sines / math.sin(angle)).astype(np.float32)
