"""Merges weighed by statistics of each model on its own data: Fisher merging and RegMean."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np

from suture.edits.stats import Stats, stored_stats
from suture.errors import Problems
from suture.merges.base import Array, Beside, Context, Merge, ModelFiles, Scale, Weight
from suture.merges.elect import scaled
from suture.schema.parameters import Choice, Number
from suture.schema.values import Scalar, each
from suture.stream.sweep import DELTA, Block, Sources

Statistics = Annotated[
    Mapping[str, str],
    ModelFiles("the statistics of each model: a folder such as MASKS/stats, or a file a model"),
]
FisherKind = Annotated[
    Literal["fisher", "empirical_fisher"], Choice("which squared gradients are used")
]
Floor = Annotated[float, Number("added to every Fisher entry, so that none is 0", 0)]
Normalize = Annotated[bool, Choice("divide the Fisher of each model by its Euclidean norm")]
Alpha = Annotated[float, Number("share of the off-diagonal of Gram matrices, 0 to 1", 0, 1)]


def _stats(files: Mapping[str, str], context: Context) -> list[Stats]:
    return [stored_stats(files[model]) for model in context.models]


def _beside(files: Mapping[str, str], kind: str, context: Context, problems: Problems) -> Beside:
    """Check the statistics against the models by their headers."""
    identity, expected, marked = [], {}, []
    specs = {name: context.sources.spec(name) for name in context.names}
    for model in context.models:
        with problems.collecting(f"parameters.stats.{model}: "):
            stats = stored_stats(files[model])
            stats.check([kind], specs)
            identity.append(tuple(stats.tensors.identity))  # type: ignore[attr-defined]
            marked += [model] if stats.restricted else []
            label = "base" if stats.facts.get("at") == "base" else model
            if isinstance(stats.facts.get("model"), str):
                expected[label] = stats.facts["model"]
    return Beside(tuple(identity), expected, tuple(marked))


def _facts(stats: list[Stats]) -> dict[str, Any]:
    shown = ("model", "data", "rows", "loss", "objective")
    return {"statistics": [{k: s.facts.get(k) for k in shown} for s in stats]}


@dataclass(frozen=True)
class _Fishers:
    stats: list[Stats]
    factors: Array
    """One over each model's norm, or ones: float64[models]."""


def fisher_merging(
    *,
    stats: Statistics,
    weight: Weight = each(1.0),
    kind: FisherKind = "fisher",
    floor: Floor = 1e-10,
    normalize: Normalize = False,
    scale: Scale = Scalar(1.0),
) -> Merge[_Fishers]:
    r"""Average with the sensitivity of each model as its weight, entry by entry.

    :math:`\theta = \theta_0 + \lambda \sum_i w_i F_i \tau_i / \sum_i w_i F_i`, which is
    :math:`\sum_i w_i F_i \theta_i / \sum_i w_i F_i` for :math:`\lambda = 1`; :math:`F_i` is the
    diagonal Fisher information of model i on its own data, from ``suture localize`` with the rule
    ``fisher`` (its ``stats`` folder) or from ``measure``.
    """

    def prepare(context: Context) -> _Fishers:
        opened = _stats(stats, context)
        factors = np.ones(len(opened))
        if normalize:
            norms = [_norm(s, kind, context) for s in opened]
            factors = np.array([1 / n if n else 1.0 for n in norms])
        return _Fishers(opened, factors)

    def combine(block: Block, state: _Fishers) -> None:
        above = np.zeros(block.count)
        below = np.zeros(block.count)
        weights = weight.row(block)
        for row, own, factor, w in zip(
            block.rows, state.stats, state.factors, weights, strict=True
        ):
            found = own.read(kind, block.name, block.start, block.count).astype(np.float64)
            share = w * (found * factor + floor)
            above += share * row[: block.count]
            below += share
        with np.errstate(divide="ignore", invalid="ignore"):
            block.out[: block.count] = np.where(below != 0, above / below, 0)
        scaled(block, scale)

    return Merge(combine, prepare, facts=lambda s: _facts(s.stats),
                 beside=lambda c, p: _beside(stats, kind, c, p))  # fmt: skip


def _norm(stats: Stats, kind: str, context: Context) -> float:
    total = 0.0
    for name in context.names:
        numel = context.sources.spec(name).numel
        for start in range(0, numel, 1 << 20):
            part = stats.read(kind, name, start, min(1 << 20, numel - start)).astype(np.float64)
            total += float(part @ part)
    return float(np.sqrt(total))


TILE = 64
"""Rows of a matrix that are multiplied together. Fixed, because a product's last bit may depend on
how many rows it has, and a merge must not depend on how it is cut."""


@dataclass
class _Products:
    """The matrices that RegMean multiplies by, made when they are needed."""

    stats: list[Stats]
    sources: Sources
    alpha: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    last: threading.local = field(default_factory=threading.local)
    """The tile that a thread computed last: the next block often begins inside it."""

    def __post_init__(self) -> None:
        self._mixers = lru_cache(maxsize=2)(self._made)

    def mixers(self, name: str) -> list[Array] | None:
        """What each model's delta is multiplied by, or ``None``: ``(inputs, inputs)`` a model."""
        if any(s.shape("gram", name) is None for s in self.stats):
            return None
        with self.lock:  # layers that read the same input, such as queries and keys, share them
            return self._mixers(tuple(s.key("gram", name) for s in self.stats))

    def _made(self, keys: tuple[str, ...]) -> list[Array]:
        grams = []
        for stats, key in zip(self.stats, keys, strict=True):
            gram = stats.tensors[key].astype(np.float64)
            diagonal = np.diagonal(gram).copy()
            gram *= self.alpha
            # A ridge keeps the sum invertible where an input was always zero.
            gram[np.diag_indices_from(gram)] = diagonal + 1e-6 * diagonal.mean() + 1e-30
            grams.append(gram)
        total = np.sum(grams, axis=0)
        return [np.linalg.solve(total, gram).T for gram in grams]  # both are symmetric

    def tile(self, name: str, number: int, mixers: list[Array]) -> Array:
        """Merged deltas of one group of rows: float32[rows * inputs]."""
        key = (name, number)
        if getattr(self.last, "key", None) == key:
            found: Array = self.last.found
            return found
        outputs, inputs = self.sources.spec(name).shape
        first, last = number * TILE, min(outputs, (number + 1) * TILE)
        total = np.zeros((last - first, inputs))
        block = self._block((last - first) * inputs)
        block.load(name, first * inputs, (last - first) * inputs)
        for row, mixer in zip(block.rows, mixers, strict=True):
            total += row[: total.size].reshape(total.shape).astype(np.float64) @ mixer
        self.last.key, self.last.found = key, total.astype(np.float32).reshape(-1)
        return self.last.found  # type: ignore[no-any-return]

    def _block(self, size: int) -> Block:
        block: Block | None = getattr(self.last, "block", None)
        if block is None or block.size < size:
            self.last.block = block = Block(self.sources, size)
        return block


def regmean(
    *, stats: Statistics, alpha: Alpha = 0.9, scale: Scale = Scalar(1.0)
) -> Merge[_Products]:
    r"""Merge linear layers so that each model's outputs on its own inputs are kept best.

    With Gram matrices :math:`G_i = X_i^\top X_i / n_i` of the inputs, and :math:`\hat G_i` the same
    with its off-diagonal times ``alpha``: :math:`W = \sum_i W_i \hat G_i (\sum_i \hat G_i)^{-1}`.
    All other tensors are averaged. Gram matrices come from ``measure`` (kind ``gram``).
    """

    def prepare(context: Context) -> _Products:
        return _Products(_stats(stats, context), context.sources, alpha)

    def combine(block: Block, state: _Products) -> None:
        mixers = state.mixers(block.name)
        if mixers is None:
            rows = block.rows[:, : block.count].astype(np.float64)
            block.out[: block.count] = rows.sum(0) / len(rows)
        else:
            _, inputs = state.sources.spec(block.name).shape
            size = TILE * inputs
            for number in range(block.start // size, -(-block.stop // size)):
                tile = state.tile(block.name, number, mixers)
                first, last = max(block.start, number * size), min(block.stop, (number + 1) * size)
                part = tile[first - number * size : last - number * size]
                block.out[first - block.start : last - block.start] = part
        scaled(block, scale)

    return Merge(combine, prepare, how=DELTA, facts=lambda s: _facts(s.stats),
                 beside=lambda c, p: _beside(stats, "gram", c, p))  # fmt: skip


__all__ = ["fisher_merging", "regmean"]
