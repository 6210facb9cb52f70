"""How entries vote on a sign, and what becomes of those that agree: words of several methods."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np

from suture.kernels import compiled
from suture.schema.parameters import Choice
from suture.schema.values import Scalar
from suture.stream.sweep import Block

Elect = Annotated[
    Literal["mass", "count"], Choice("the sign of the sum of the entries, or of the sum of signs")
]
Aggregate = Annotated[
    Literal["mean", "sum", "weighted_mean", "max"], Choice("what becomes of the agreeing entries")
]
ZeroSign = Annotated[
    Literal["zero", "majority", "positive"],
    Choice("the sign elected where the vote is 0: none, that of most entries, or plus"),
]
Sign = Annotated[Literal["zero", "positive"], Choice("the sign elected where the vote is 0")]
Votes = Annotated[
    Literal["weighted", "equal"],
    Choice("whether weights are applied before the signs are elected, or after"),
]
Rounding = Annotated[
    Literal["round", "floor"],
    Choice("how density * n becomes a count: nearest, or down but at least one"),
]

ELECT = {"mass": compiled.MASS, "count": compiled.COUNT}
AGGREGATE = {
    "mean": compiled.MEAN,
    "sum": compiled.SUM,
    "weighted_mean": compiled.WEIGHTED_MEAN,
    "max": compiled.MAX,
}


def scaled(block: Block, scale: Scalar) -> None:
    """Multiply the merged delta of a block by its scale."""
    factor = scale.at(block.name)
    if factor != 1:
        block.out[: block.count] *= np.float32(factor)
