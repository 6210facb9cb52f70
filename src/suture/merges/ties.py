"""TIES: entries selected by magnitude, a sign elected, the entries that agree merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from suture import kernels
from suture.merges.base import (
    Choice,
    Context,
    Density,
    Merge,
    PerModel,
    Scalar,
    Scale,
    Scope,
    Weight,
    each,
)
from suture.select import Count, Selection, exact_count, select
from suture.stream import Block, Visitor, sweep, tasks_of

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
Rounding = Annotated[
    Literal["round", "floor"],
    Choice("how density * n becomes a count: nearest, or down but at least one"),
]

ELECT = {"mass": kernels.MASS, "count": kernels.COUNT}
AGGREGATE = {
    "mean": kernels.MEAN,
    "sum": kernels.SUM,
    "weighted_mean": kernels.WEIGHTED_MEAN,
    "max": kernels.MAX,
}


def _floor(density: float, n: int) -> int:
    return min(n, max(1, int(density * n)))


def selected(context: Context, density: PerModel, scope: str, count: Count) -> Selection:
    """Threshold every task vector at its density."""
    models = len(context.models)
    return select(
        context.sources, context.names, lambda name: density.at(name, models), scope=scope,
        count=count, threads=context.threads, block=context.block, progress=context.progress,
    )  # fmt: skip


def selection_facts(selection: Selection) -> dict[str, Any]:
    """What a report tells of a selection: entries kept of how many, and ties at the thresholds."""
    total = max(1, selection.total())
    return {
        "kept": selection.kept(),
        "density": [kept / total for kept in selection.kept()],
        "tied_at_threshold": selection.tied(),
        "entries": selection.total(),
    }


@dataclass(frozen=True)
class _Trimmed:
    selection: Selection
    zero: int


def ties(
    *,
    weight: Weight = each(1.0),
    density: Density = each(0.2),
    scale: Scale = Scalar(1.0),
    scope: Scope = "global",
    elect: Elect = "mass",
    aggregate: Aggregate = "mean",
    zero_sign: ZeroSign = "zero",
    rounding: Rounding = "round",
) -> Merge[_Trimmed]:
    r"""Trim each task vector, elect a sign per entry, merge the entries that agree with it.

    With :math:`\hat\tau_i` the ``density`` largest entries of :math:`\tau_i` and :math:`\gamma =
    \operatorname{sgn} \sum_i w_i \hat\tau_i`: :math:`\theta = \theta_0 + \lambda` times the mean of
    the :math:`w_i \hat\tau_i` whose sign is :math:`\gamma`, entry by entry. ``scope: global`` trims
    as the paper does; other tools trim tensor by tensor.
    """

    def prepare(context: Context) -> _Trimmed:
        count = exact_count if rounding == "round" else _floor
        selection = selected(context, density, scope, count)
        zero = {"zero": 0, "positive": 1}.get(zero_sign)
        if zero is None:
            zero = _majority(context, selection, weight, ELECT[elect])
        return _Trimmed(selection, zero)

    def combine(block: Block, state: _Trimmed) -> None:
        weights = weight.row(block)
        for start, stop, keys in state.selection.segments(block):
            kernels.elect_and_merge(block.rows, weights, keys, start, stop, block.out,
                                    ELECT[elect], AGGREGATE[aggregate], state.zero)  # fmt: skip
        scaled(block, scale)

    def facts(state: _Trimmed) -> dict[str, Any]:
        return selection_facts(state.selection) | (
            {"majority_sign": state.zero} if zero_sign == "majority" else {}
        )

    return Merge(combine, prepare, passes=2 if zero_sign == "majority" else 1, facts=facts)


def scaled(block: Block, scale: Scalar) -> None:
    """Multiply the merged delta of a block by its scale."""
    factor = scale.at(block.name)
    if factor != 1:
        block.out[: block.count] *= np.float32(factor)


class _Balance(Visitor["list[int]"]):
    def __init__(self, selection: Selection, weight: PerModel, elect: int) -> None:
        self.selection, self.weight, self.elect = selection, weight, elect
        self.total = 0

    def local(self) -> list[int]:
        return [0]

    def see(self, local: list[int], block: Block) -> None:
        weights = self.weight.row(block)
        for start, stop, keys in self.selection.segments(block):
            local[0] += kernels.count_elected_signs(
                block.rows, weights, keys, start, stop, self.elect
            )

    def finish(self, local: list[int]) -> None:
        self.total += local[0]


def _majority(context: Context, selection: Selection, weight: PerModel, elect: int) -> int:
    balance = _Balance(selection, weight, elect)
    sweep(context.sources, tasks_of(context.names, context.sources.reference.specs), balance,
          threads=context.threads, block=context.block, progress=context.progress)  # fmt: skip
    return (balance.total > 0) - (balance.total < 0)
