"""TIES: entries selected by magnitude, a sign elected, the entries that agree merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from suture.kernels import compiled
from suture.merges.base import Array, Context, Density, Merge, Scale, Scope, Weight
from suture.merges.elect import AGGREGATE, ELECT, Aggregate, Elect, Rounding, Votes, ZeroSign
from suture.merges.trim import L1, l1_factors, rescaled, voted
from suture.schema.values import PerModel, Scalar, each
from suture.stream.sweep import Block, Combine, Visitor, sweep, tasks_of
from suture.stream.topk import Count, Selection, exact_count, select

ABOVE = 0x80000000
"""A key above that of every magnitude."""


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
    factors: Mapping[str, Array]
    zero: int

    def trim(self, block: Block) -> None:
        """Zero what is not kept, and rescale the rest where that is asked for."""
        above = np.full(block.models, ABOVE, np.uint32)
        for start, stop, keys in self.selection.segments(block):
            compiled.keep_between(block.rows, keys, above, start, stop)
        rescaled(block, self.factors)


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
    votes: Votes = "weighted",
    rescale: L1 = "none",
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
        state = _Trimmed(selection, {}, int(zero_sign == "positive"))
        if rescale == "l1":
            state = replace(state, factors=l1_factors(context, state.trim))
        if zero_sign == "majority":
            counted = weight if votes == "weighted" else each(1.0)
            state = replace(state, zero=_majority(context, state, counted, ELECT[elect]))
        return state

    def combine(block: Block, state: _Trimmed) -> None:
        if votes == "equal" or state.factors:
            state.trim(block)
            voted(weight, scale, elect, aggregate, state.zero, votes)(block)
            return
        weights, options = weight.row(block), (ELECT[elect], AGGREGATE[aggregate], state.zero)
        for start, stop, keys in state.selection.segments(block):
            block.fuse(Combine(compiled.ELECTED, weights, keys, options=options,
                               factor=scale.at(block.name)), start=start, stop=stop)  # fmt: skip

    def facts(state: _Trimmed) -> dict[str, Any]:
        return selection_facts(state.selection) | (
            {"majority_sign": state.zero} if zero_sign == "majority" else {}
        )

    passes = 1 + (zero_sign == "majority") + (rescale == "l1")
    return Merge(combine, prepare, passes=passes, facts=facts)


class _Balance(Visitor["list[int]"]):
    def __init__(self, state: _Trimmed, weight: PerModel, elect: int) -> None:
        self.state, self.weight, self.elect = state, weight, elect
        self.total = 0

    def local(self) -> list[int]:
        return [0]

    def see(self, local: list[int], block: Block) -> None:
        weights = self.weight.row(block)
        if self.state.factors:
            self.state.trim(block)
            everything = np.zeros(block.models, np.uint32)
            local[0] += compiled.count_elected_signs(
                block.rows, weights, everything, 0, block.count, self.elect
            )
            return
        for start, stop, keys in self.state.selection.segments(block):
            local[0] += compiled.count_elected_signs(
                block.rows, weights, keys, start, stop, self.elect
            )

    def finish(self, local: list[int]) -> None:
        self.total += local[0]


def _majority(context: Context, state: _Trimmed, weight: PerModel, elect: int) -> int:
    balance = _Balance(state, weight, elect)
    sweep(context.sources, tasks_of(context.names, context.sources.reference.specs), balance,
          threads=context.threads, block=context.block, progress=context.progress)  # fmt: skip
    return (balance.total > 0) - (balance.total < 0)
