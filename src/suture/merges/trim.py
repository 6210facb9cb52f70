"""What methods share that drop entries, rescale the rest, and then add or vote."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np

from suture.kernels import compiled
from suture.merges.base import Array, Context, Merge
from suture.merges.elect import AGGREGATE, ELECT, scaled
from suture.merges.linear import normalized
from suture.schema.parameters import Choice
from suture.schema.values import PerModel, Scalar
from suture.stream.sweep import Block, Visitor, sweep, tasks_of
from suture.tensors.spec import Piece

S = TypeVar("S")
Finish = Callable[[Block], None]
L1 = Annotated[
    Literal["none", "l1"],
    Choice("leave what is kept as it is, or restore each tensor's sum of magnitudes"),
]
"""Whether thinned task vectors are rescaled."""


@dataclass(frozen=True)
class Thinning(Generic[S]):
    """How entries are dropped: a state made once, and a change of the rows of any block."""

    prepare: Callable[[Context], S]
    thin: Callable[[Block, S], None]
    passes: int = 0
    facts: Callable[[S], dict[str, Any]] = lambda state: {}
    check: Callable[[Sequence[str], Sequence[str]], Iterable[str]] = lambda names, models: ()


@dataclass(frozen=True)
class Thinned(Generic[S]):
    """The state of a merge that thins: its own, and factors that restore lengths."""

    inner: S
    factors: dict[str, Array] = field(default_factory=dict)
    """float32[models] by tensor; none where nothing is restored."""


def thinned(thinning: Thinning[S], l1: bool, finish: Finish) -> Merge[Thinned[S]]:
    """Thin the task vectors, restore their sums of magnitudes if asked, and finish."""

    def prepare(context: Context) -> Thinned[S]:
        state = thinning.prepare(context)
        if not l1:
            return Thinned(state)
        return Thinned(state, l1_factors(context, lambda block: thinning.thin(block, state)))

    def combine(block: Block, state: Thinned[S]) -> None:
        thinning.thin(block, state.inner)
        rescaled(block, state.factors)
        finish(block)

    return Merge(
        combine, prepare, passes=thinning.passes + l1, check=thinning.check,
        facts=lambda state: thinning.facts(state.inner),
    )  # fmt: skip


def rescaled(block: Block, factors: Mapping[str, Array]) -> None:
    """Multiply each model's row by its factor, where there are factors."""
    if factors:
        block.rows[:, : block.count] *= factors[block.name][:, None]


def summed(weight: PerModel, scale: Scalar, normalize: bool) -> Finish:
    """Add the weighted rows."""

    def finish(block: Block) -> None:
        weights = normalized(weight.row(block), normalize) * np.float32(scale.at(block.name))
        compiled.weighted_sum(block.rows, weights, 0, block.count, block.out)

    return finish


def voted(
    weight: PerModel, scale: Scalar, elect: str, aggregate: str, zero: int, votes: str = "weighted"
) -> Finish:
    """Elect a sign per entry and merge what agrees with it; votes count with weights or without."""

    def finish(block: Block) -> None:
        how = (ELECT[elect], AGGREGATE[aggregate], zero)
        if votes == "weighted":
            everything = np.zeros(len(block.rows), np.uint32)
            compiled.elect_and_merge(block.rows, weight.row(block), everything, 0, block.count,
                                    block.out, *how)  # fmt: skip
        else:
            compiled.vote_and_merge(block.rows, weight.row(block), 0, block.count, block.out, *how)
        scaled(block, scale)

    return finish


def l1_factors(context: Context, thin: Callable[[Block], None]) -> dict[str, Array]:
    """What restores the sums of magnitudes that thinning takes away: float32[models] by tensor."""
    sums = _Magnitudes(len(context.models), thin)
    sweep(context.sources, tasks_of(context.names, context.sources.reference.specs), sums,
          threads=context.threads, block=context.block, progress=context.progress)  # fmt: skip
    return {name: sums.factors(name) for name in context.names}


class _Magnitudes(Visitor["dict[str, Array]"]):
    """Sums of magnitudes before and after thinning, in an order that no thread changes."""

    def __init__(self, models: int, thin: Callable[[Block], None]) -> None:
        self.models, self.thin = models, thin
        self._parts: dict[str, list[Array]] = {}

    def local(self) -> dict[str, Array]:
        return {"": np.zeros((2, self.models, 8))}

    def see(self, local: dict[str, Array], block: Block) -> None:
        before, after = local[""]
        compiled.add_magnitudes(block.rows, block.count, before)
        self.thin(block)
        compiled.add_magnitudes(block.rows, block.count, after)

    def end_piece(self, local: dict[str, Array], piece: Piece) -> None:
        local[f"{piece.start} {piece.name}"] = local[""]
        local[""] = np.zeros_like(local[""])

    def end_task(self, local: dict[str, Array], task: Any) -> None:
        for key in [k for k in local if k]:
            self._parts.setdefault(key.split(" ", 1)[1], []).append(local.pop(key))

    def factors(self, name: str) -> Array:
        found = np.ones(self.models, np.float32)
        for model in range(self.models):
            whole, kept = (
                math.fsum(x for part in self._parts[name] for x in part[i, model].tolist())
                for i in (0, 1)
            )
            if whole >= 1e-7 and kept >= 1e-7:
                found[model] = whole / kept
        return found
