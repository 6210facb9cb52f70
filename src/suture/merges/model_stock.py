"""Model Stock: how far to go from the base towards the average, read off the angles."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np

from suture.kernels import compiled
from suture.merges.base import Array, Context, Merge, Scale
from suture.merges.linear import grams
from suture.merges.row_blocks import RowBlocks, row_grams, row_width
from suture.schema.parameters import Choice, Number
from suture.schema.values import Scalar
from suture.stream.sweep import Block

Over = Annotated[
    Literal["tensor", "row"], Choice("what is one vector: a whole tensor, or each row (a filter)")
]
Clamp = Annotated[bool, Choice("hold the ratio between the base (0) and the average (1)")]
LeastNorm = Annotated[
    float, Number("products of norms below this count as this, which lowers the cosine", 0)
]


def model_stock(
    *,
    over: Over = "tensor",
    clamp: Clamp = True,
    least_norm: LeastNorm = 0.0,
    scale: Scale = Scalar(1.0),
) -> Merge[dict[str, float]]:
    r"""Go from the base towards the average of the models, as far as their angles suggest.

    With :math:`N` models and :math:`c` the mean cosine between two task vectors: :math:`t = N c /
    (1 + (N - 1) c)` and :math:`\theta = \theta_0 + t \cdot \frac{1}{N} \sum_i \tau_i`, for each
    tensor or each row. Task vectors that point apart give a negative ratio, which ``clamp`` holds
    at the base.
    """

    def by_row(block: Block, start: int, number: int) -> None:
        ratios = _ratios(row_grams(block, start, number), clamp, least_norm)
        factors = np.repeat(_even(ratios, block, scale)[:, None], len(block.rows), 1)
        width = row_width(block.sources.spec(block.name))
        compiled.sum_by_row(block.rows, factors, start, number, width, block.out)

    rows = RowBlocks(by_row)

    def prepare(context: Context) -> dict[str, float]:
        if over == "row":
            return {}
        gram = grams(context)
        return {n: float(_ratios(gram.of(n)[None], clamp, least_norm)[0]) for n in context.names}

    def combine(block: Block, ratios: dict[str, float]) -> None:
        if over == "row":
            rows(block)
            return
        factor = _even(np.array([ratios[block.name]]), block, scale)
        factors = np.repeat(factor, len(block.rows))
        compiled.weighted_sum(block.rows, factors, 0, block.count, block.out)

    return Merge(combine, prepare, passes=int(over == "tensor"), facts=_facts)


def _even(ratios: Array, block: Block, scale: Scalar) -> Array:
    return (ratios * scale.at(block.name) / len(block.rows)).astype(np.float32)


def _ratios(gram: Array, clamp: bool, least_norm: float) -> Array:
    """The ratio t of each Gram matrix: float64[number]."""
    models = gram.shape[1]
    lengths = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    products = lengths[:, :, None] * lengths[:, None, :]
    products = np.maximum(products, max(least_norm, 1e-300))
    above = np.triu_indices(models, 1)
    cosine = np.clip(gram / products, -1, 1)[:, above[0], above[1]].mean(1)
    below = 1 + (models - 1) * cosine
    flat = np.abs(below) < 1e-6
    ratios = np.where(flat, 0, models * cosine / np.where(flat, 1, below))
    return np.clip(ratios, 0, 1) if clamp else ratios


def _facts(ratios: dict[str, float]) -> dict[str, Any]:
    values = sorted(ratios.values())
    if not values:
        return {}
    return {"ratio": {"least": values[0], "mean": sum(values) / len(values), "most": values[-1]}}
