"""Methods that thin task vectors by rank: both tails cut (breadcrumbs), or drawn (DELLA)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from suture.kernels import compiled
from suture.merges.base import Context, Density, Merge, Scale, Scope, Seed, Weight
from suture.merges.dare import stream_key
from suture.merges.elect import Aggregate, Elect, Rounding, Sign, Votes
from suture.merges.linear import Normalize
from suture.merges.row_blocks import RowBlocks, row_width
from suture.merges.trim import L1, Finish, Thinned, Thinning, summed, thinned, voted
from suture.schema.parameters import Choice, Number
from suture.schema.values import PerModel, Scalar, each
from suture.stream.sweep import Block
from suture.stream.topk import Ranking, Selection, rank

Gamma = Annotated[
    PerModel, Number("share of the largest entries that are dropped as outliers", 0, 1)
]


def _crumbs(density: PerModel, gamma: PerModel, scope: str, rounding: str) -> Thinning[Selection]:
    """Keep a band of magnitudes: neither the largest entries, nor the many small ones."""

    def shares(context: Context, name: str) -> list[float]:
        models = len(context.models)
        return [*density.at(name, models), *gamma.at(name, models)]

    def counts(numbers: Sequence[float], n: int) -> list[int]:
        models = len(numbers) // 2
        inner, outer = [], []
        for keep, top in zip(numbers[:models], numbers[models:], strict=True):
            kept = _count(keep, n, rounding) if keep < 1 else n
            # Where few are dropped, the outliers make room, so that the density holds.
            above = min(_count(top, n, rounding), n - kept)
            inner.append(above)
            outer.append(above + kept)
        return [*outer, *inner]

    def prepare(context: Context) -> Selection:
        rows = [*range(len(context.models))] * 2
        ranking = Ranking(lambda name: shares(context, name), counts, rows)
        return rank(context.sources, context.names, ranking, scope, threads=context.threads,
                    block=context.block, progress=context.progress)  # fmt: skip

    def thin(block: Block, selection: Selection) -> None:
        models = len(block.rows)
        for start, stop, keys in selection.segments(block):
            compiled.keep_between(block.rows, keys[:models], keys[models:], start, stop)

    def facts(selection: Selection) -> dict[str, Any]:
        kept = selection.kept()
        models = len(kept) // 2
        dropped = kept[models:]
        total = max(1, selection.total())
        kept = [a - b for a, b in zip(kept[:models], dropped, strict=True)]
        return {"kept": kept, "density": [k / total for k in kept], "outliers": dropped,
                "entries": selection.total()}  # fmt: skip

    return Thinning(prepare, thin, 1, facts)


def _count(share: float, n: int, rounding: str) -> int:
    return min(n, round(share * n) if rounding == "round" else int(share * n))


def breadcrumbs(
    *,
    weight: Weight = each(1.0),
    density: Density = each(0.14),
    gamma: Gamma = each(0.01),
    scale: Scale = Scalar(1.0),
    scope: Scope = "tensor",
    rescale: L1 = "none",
    normalize: Normalize = False,
    rounding: Rounding = "round",
) -> Merge[Thinned[Selection]]:
    r"""Drop the largest ``gamma`` share of each task vector, keep the next ``density``, then add.

    :math:`\theta = \theta_0 + \lambda \sum_i w_i m_i \tau_i`, where :math:`m_i` keeps a band of
    magnitudes: outliers are dropped like the many small entries (in the paper the smallest 85 % and
    the largest 1 %).
    """
    thin = _crumbs(density, gamma, scope, rounding)
    return thinned(thin, rescale == "l1", summed(weight, scale, normalize))


def breadcrumbs_ties(
    *,
    weight: Weight = each(1.0),
    density: Density = each(0.14),
    gamma: Gamma = each(0.01),
    scale: Scale = Scalar(1.0),
    scope: Scope = "tensor",
    rescale: L1 = "none",
    elect: Elect = "mass",
    aggregate: Aggregate = "mean",
    zero_sign: Sign = "zero",
    votes: Votes = "weighted",
    rounding: Rounding = "round",
) -> Merge[Thinned[Selection]]:
    r"""Thin as ``breadcrumbs`` does, then elect signs and merge as TIES does."""
    finish = voted(weight, scale, elect, aggregate, int(zero_sign == "positive"), votes)
    return thinned(_crumbs(density, gamma, scope, rounding), rescale == "l1", finish)


Epsilon = Annotated[
    PerModel, Number("half the width of the window of probabilities around the density", 0, 0.5)
]
ByRank = Annotated[
    Literal["probability", "l1", "none"],
    Choice(
        "divide each kept entry by its own probability, or restore each tensor's sum of "
        "magnitudes, or neither"
    ),
]


class _Scratch:
    """What one thread needs to rank the rows of a block."""

    def __init__(self, size: int, width: int) -> None:
        self.size, self.width = size, width
        self.ranks = np.zeros(size, np.uint32)
        self.words = np.zeros(size + 8, np.uint32)
        self.spare = np.zeros(3 * width + compiled.RANK_SPARE, np.uint32)


class _MagPrune:
    """Drops entries with a probability that falls with their rank in the row."""

    def __init__(
        self, models: Sequence[str], density: PerModel, epsilon: PerModel, seed: int, own: bool
    ) -> None:
        self.models, self.density, self.epsilon = models, density, epsilon
        self.seed, self.own = seed, own
        self.rows = RowBlocks(self._prune)
        self._local = threading.local()

    def _prune(self, block: Block, start: int, number: int) -> None:
        width = row_width(block.sources.spec(block.name))
        count = number * width
        scratch = self._scratch(block.size, width)
        position = block.start + start
        first = position - position % 4  # words come in fours
        numbers = zip(
            self.models, self.density.at(block.name, len(self.models)),
            self.epsilon.at(block.name, len(self.models)), block.rows, strict=True,
        )  # fmt: skip
        for model, density, epsilon, row in numbers:
            if density >= 1:
                continue
            key = stream_key(self.seed, model, block.name)
            compiled.random_words(key, first, count + position - first, scratch.words)
            compiled.rank_rows(row, start, number, width, scratch.ranks, scratch.spare)
            alone = width == 1
            compiled.drop_by_rank(
                row, scratch.ranks, scratch.words, start, count, position - first,
                density if alone else density - epsilon,
                0.0 if alone else 2 * epsilon / (width - 1), int(self.own), 1.0,
            )  # fmt: skip

    def _scratch(self, size: int, width: int) -> _Scratch:
        held: _Scratch | None = getattr(self._local, "scratch", None)
        if held is None or held.size < size or held.width < width:
            held = self._local.scratch = _Scratch(
                max(size, held.size if held else 0), max(width, held.width if held else 0)
            )
        return held


def _della(
    density: PerModel, epsilon: PerModel, seed: int, rescale: str, finish: Finish
) -> Merge[Thinned[_MagPrune]]:
    def prepare(context: Context) -> _MagPrune:
        return _MagPrune(context.models, density, epsilon, seed, rescale == "probability")

    def check(names: Sequence[str], models: Sequence[str]) -> Iterator[str]:
        seen = set()
        for name in names:
            numbers = zip(models, density.at(name, len(models)), epsilon.at(name, len(models)),
                          strict=True)  # fmt: skip
            for model, share, half in numbers:
                if share < 1 and not half <= share <= 1 - half and (model, share, half) not in seen:
                    seen.add((model, share, half))
                    yield (
                        f"{model}: density {share:g} with epsilon {half:g} gives probabilities "
                        f"from {share - half:g} to {share + half:g}; epsilon may be "
                        f"{min(share, 1 - share):g} at most"
                    )

    pruning = Thinning(prepare, lambda block, state: state.rows(block), check=check)
    return thinned(pruning, rescale == "l1", finish)


def della_linear(
    *,
    weight: Weight = each(1.0),
    density: Density = each(0.7),
    epsilon: Epsilon = each(0.07),
    scale: Scale = Scalar(1.0),
    seed: Seed = 0,
    rescale: ByRank = "probability",
    normalize: Normalize = False,
) -> Merge[Thinned[_MagPrune]]:
    r"""Drop entries at random, small ones more often, divide by the probability, then add.

    In each row of n entries the one of rank r (0 is the smallest magnitude) is kept with
    probability :math:`p = \rho - \epsilon + 2 \epsilon r / (n - 1)`: :math:`\theta = \theta_0 +
    \lambda \sum_i w_i m_i \tau_i / p_i`. A vector is one row; a row of one entry has :math:`p =
    \rho`.
    """
    return _della(density, epsilon, seed, rescale, summed(weight, scale, normalize))


def della(
    *,
    weight: Weight = each(1.0),
    density: Density = each(0.7),
    epsilon: Epsilon = each(0.07),
    scale: Scale = Scalar(1.0),
    seed: Seed = 0,
    rescale: ByRank = "probability",
    elect: Elect = "mass",
    aggregate: Aggregate = "mean",
    zero_sign: Sign = "zero",
    votes: Votes = "weighted",
) -> Merge[Thinned[_MagPrune]]:
    r"""Drop and rescale as ``della_linear`` does, then elect signs and merge as TIES does."""
    finish = voted(weight, scale, elect, aggregate, int(zero_sign == "positive"), votes)
    return _della(density, epsilon, seed, rescale, finish)
