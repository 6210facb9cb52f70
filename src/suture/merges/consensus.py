"""Keep what several tasks agree is theirs (TALL masks)."""

from __future__ import annotations

from typing import Annotated

from suture.kernels import compiled
from suture.merges.base import Merge, Scale, Weight
from suture.schema.parameters import Number
from suture.schema.values import PerModel, Scalar, each
from suture.stream.sweep import Block, Combine

Bound = Annotated[
    PerModel, Number("how many times the others' sum an entry must reach (lambda_t)", low=0)
]
Tasks = Annotated[int, Number("how many masks must hold an entry for it to be kept", 0, whole=True)]


def consensus(
    *,
    weight: Weight = each(1.0),
    tall_threshold: Bound = each(0.4),
    min_tasks: Tasks = 2,
    scale: Scale = Scalar(1.0),
) -> Merge[None]:
    r"""Add task vectors, but only where at least ``min_tasks`` tasks find their part important.

    With :math:`\tau = \sum_i w_i \tau_i` and masks :math:`m_i = 1[|w_i \tau_i| \ge \lambda_i
    |\tau - w_i \tau_i|]`: :math:`\theta = \theta_0 + \alpha\, 1[\sum_i m_i \ge k] \odot \tau`.
    ``min_tasks: 0`` is task arithmetic, ``min_tasks: 1`` only drops what no task claims.
    """

    def combine(block: Block, _: None) -> None:
        bounds = tall_threshold.row(block)
        block.fuse(Combine(compiled.CONSENSUS, weight.row(block), bounds=bounds,
                           options=(min_tasks, 0, 0), factor=scale.at(block.name)))  # fmt: skip

    return Merge(combine)
