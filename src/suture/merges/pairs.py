"""One model taken over, as a whole or where its difference to the base is of the right size."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from suture.merges.base import Array, Context, Merge
from suture.merges.row_blocks import RowBlocks, row_width
from suture.schema.parameters import Number
from suture.schema.values import Scalar
from suture.stream.sweep import Block, Visitor, sweep, tasks_of
from suture.stream.topk import Ranking, Selection, rank

Distance = Annotated[Scalar, Number("how far an entry may move from the base", 0)]


def nearswap(*, t: Distance = Scalar(1e-4)) -> Merge[None]:
    r"""Move every entry of the base towards the model's, but by no more than ``t``.

    :math:`\theta = \theta_0 + \operatorname{clip}(\tau, -t, t)`: where the two are nearer than
    ``t`` the model's value is taken.
    """

    def combine(block: Block, _: None) -> None:
        bound = np.float32(t.at(block.name))
        np.clip(block.rows[0, : block.count], -bound, bound, out=block.out[: block.count])

    return Merge(combine)


Spread = Annotated[Scalar, Number("how many interquartile ranges above the median importance is")]
_TINY = 1e-8


class _Importance:
    """What fusion ranks: the change of an entry times how much its row's distribution changed."""

    def __init__(self, divergences: dict[str, Array]) -> None:
        self.divergences = divergences
        self.selection: Selection | None = None

    def of(self, block: Block) -> Array:
        """Of the entries of a block, with the deltas in row 0: float32[count]."""
        found = np.abs(block.rows[0, : block.count])
        if not block.count:
            return found
        width = row_width(block.sources.spec(block.name))
        first, last = block.start // width, (block.stop - 1) // width
        rows = self.divergences[block.name][first : last + 1]
        if first == last:
            found *= rows[0]
        else:
            skip = block.start - first * width
            found *= np.repeat(rows, width)[skip : skip + block.count]
        return found

    def rank(self, block: Block) -> None:
        """Put the importances where the deltas were."""
        block.rows[0, : block.count] = self.of(block)

    def threshold(self, name: str, spread: float) -> float:
        """From which importance on entries of a tensor are taken over."""
        assert self.selection is not None
        keys = self.selection.limits[self.selection.groups[name]].keys
        low, middle, high = keys.astype(np.uint32).view(np.float32).astype(np.float64)
        return float(middle + spread * (high - low))


class _Divergences(Visitor[None]):
    """The Kullback-Leibler divergence between model and base, row by row."""

    def __init__(self, context: Context) -> None:
        specs = context.sources.reference.specs
        self.found = {
            n: np.zeros(specs[n].numel // row_width(specs[n]), np.float32) for n in context.names
        }
        self._rows = RowBlocks(self._measure)

    def see(self, local: None, block: Block) -> None:
        self._rows(block)

    def _measure(self, block: Block, start: int, number: int) -> None:
        width = row_width(block.sources.spec(block.name))
        columns = slice(start, start + number * width)
        base = block.base[columns].astype(np.float64).reshape(number, width)
        tuned = base + block.rows[0, columns].reshape(number, width)
        p, q = _softmax(tuned), _softmax(base)
        first = (block.start + start) // width
        p += _TINY
        q += _TINY
        np.log(np.divide(p, q, out=q), out=q)
        self.found[block.name][first : first + number] = (p * q).sum(1)


def _softmax(rows: Array) -> Array:
    found: Array = np.exp(rows - rows.max(1, keepdims=True))
    found /= found.sum(1, keepdims=True)
    return found


def arcee_fusion(*, spread: Spread = Scalar(1.5)) -> Merge[_Importance]:
    r"""Take over the entries of one model that matter most, leave the base elsewhere.

    The importance of an entry is :math:`|\tau|` times the Kullback-Leibler divergence between the
    softmax of its row in the model and in the base. Taken over is what reaches, in its tensor, the
    median plus ``spread`` times the interquartile range of the importances; both are exact.
    """

    def prepare(context: Context) -> _Importance:
        specs = context.sources.reference.specs
        divergences = _Divergences(context)
        sweep(context.sources, tasks_of(context.names, specs), divergences,
              threads=context.threads, block=context.block, progress=context.progress)  # fmt: skip
        state = _Importance(divergences.found)
        # The quartiles are entries of the sorted importances: the one at floor(q * (n - 1)).
        ranking = Ranking(
            lambda name: (0.25, 0.5, 0.75), lambda q, n: [n - int(x * (n - 1)) for x in q],
            (0, 0, 0), state.rank,
        )  # fmt: skip
        state.selection = rank(
            context.sources, context.names, ranking, threads=context.threads, block=context.block,
            progress=context.progress,
        )  # fmt: skip
        return state

    def combine(block: Block, state: _Importance) -> None:
        least = state.threshold(block.name, spread.at(block.name))
        taken = state.of(block).astype(np.float64) >= least
        np.multiply(block.rows[0, : block.count], taken, out=block.out[: block.count])

    return Merge(combine, prepare, passes=2)
