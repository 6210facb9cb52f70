"""What elections came to: counts, overlaps, norms and rank correlations; no merge."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from suture.edits.mask_file import popcount
from suture.kernels import compiled
from suture.merges.base import Array
from suture.merges.marks import Ranked, unpacked
from suture.stream.sweep import Block, Visitor
from suture.tensors.spec import Piece, TensorSpec


class Votes(NamedTuple):
    """Marks of some entries, each uint8[models, bytes]."""

    expert: Array
    """What matters to each model."""
    base: Array
    """What matters to the base on its rows."""
    elected: Array
    owned: Array
    """What each model writes."""


Look = Callable[[str, int, int], Votes]
"""The votes on some entries: name of the tensor, start, count."""
RUN, RUNS = 512, 8
"""Entries of a tensor whose ranks are compared: so many runs of so many, evenly spaced."""


class _Local:
    """One thread's counts since its last piece."""

    def __init__(self, models: int) -> None:
        self.models = models
        self.squares: list[tuple[str, int, list[float]]] = []
        self.clear()

    def clear(self) -> None:
        """Begin a piece."""
        self.counts: dict[str, Array] = {}
        self.lanes = np.zeros((2 * self.models, 1, 1, 8))


class Census(Visitor[_Local]):
    """Counts what every model elects and writes, in one sweep over their task vectors.

    The sums depend on neither threads nor blocks: counts are whole numbers, and squares are added
    in lanes of fixed order, piece by piece.
    """

    def __init__(self, names: Sequence[str], models: int, look: Look) -> None:
        self.models, self.look = models, look
        self.pairs = list(combinations(range(models), 2))
        self.elected = {n: [0] * models for n in names}
        """Entries that each model elects, by tensor."""
        self.owned = {n: [0] * models for n in names}
        """Entries that each model writes."""
        self.agreed = [0] * models
        self.shared = [0] * len(self.pairs)
        self.sizes: dict[str, int] = {}
        self._squares: dict[tuple[str, int], list[float]] = {}
        self._lock = threading.Lock()

    def local(self) -> _Local:
        """The counts of one thread."""
        return _Local(self.models)

    def see(self, local: _Local, block: Block) -> None:
        """Count a block."""
        if not block.count:
            return
        expert, base, elected, owned = self.look(block.name, block.start, block.count)
        counts = [[popcount(row) for row in elected], [popcount(row) for row in owned],
                  [popcount(a & b) for a, b in zip(expert, base, strict=True)],
                  [popcount(elected[a] & elected[b]) for a, b in self.pairs]]  # fmt: skip
        for number, row in enumerate(block.rows):
            mine = row[: block.count]
            kept = np.where(unpacked(owned[number], block.count), mine, np.float32(0))
            compiled.gram(mine[None], block.count, local.lanes[2 * number])
            compiled.gram(kept[None], block.count, local.lanes[2 * number + 1])
        with self._lock:
            self.sizes[block.name] = self.sizes.get(block.name, 0) + block.count
            for total, more in zip(
                (self.elected[block.name], self.owned[block.name], self.agreed, self.shared),
                counts,
                strict=True,
            ):
                for i, count in enumerate(more):
                    total[i] += count

    def end_piece(self, local: _Local, piece: Piece) -> None:
        """Put the squares of a piece aside."""
        sums = [math.fsum(lanes.ravel().tolist()) for lanes in local.lanes]
        with self._lock:
            self._squares[piece.name, piece.number] = sums
        local.clear()

    def facts(self, models: Sequence[str], entries: int, both: bool) -> dict[str, Any]:
        """What was counted, as plain data: shares of all entries.

        Args:
            models: their names.
            entries: how many there are.
            both: whether base and expert were scored, so that their agreement means something.
        """
        total = max(1, entries)
        elected, owned = (
            [sum(own[i] for own in counts.values()) for i in range(self.models)]
            for counts in (self.elected, self.owned)
        )
        whole, kept = (
            [math.fsum(s[2 * i + at] for s in self._squares.values()) for i in range(self.models)]
            for at in (0, 1)
        )
        by_chance = [
            math.fsum(own[a] * own[b] / max(1, self.sizes.get(n, 0))
                      for n, own in self.elected.items())
            for a, b in self.pairs
        ]  # fmt: skip
        return {
            "density": [n / total for n in owned],
            "elected": {m: n / total for m, n in zip(models, elected, strict=True)},
            "owned": {m: n / total for m, n in zip(models, owned, strict=True)},
            **({"agreed": {m: n / total for m, n in zip(models, self.agreed, strict=True)}}
               if both else {}),
            "norm_kept": {m: k / w if w else 0.0
                          for m, k, w in zip(models, kept, whole, strict=True)},
            "overlaps": [
                {"models": [models[a], models[b]], "share": n / total, "by_chance": c / total}
                for (a, b), n, c in zip(self.pairs, self.shared, by_chance, strict=True)
            ],
        }  # fmt: skip


def correlations(
    ranking: Ranked, models: Sequence[str], specs: Mapping[str, TensorSpec]
) -> dict[str, Any]:
    """Spearman's rank correlations of scores: between models, and of each with the base.

    They are taken inside tensors, where entries compete, on at most 4,096 entries of each, and
    averaged with the tensors' sizes as weights.
    """
    number = len(models)
    columns = len(ranking.sources.models)
    pairs = list(combinations(range(number), 2))
    pairs += [(i, number + i) for i in range(number)] if columns > number else []
    above, below = [0.0] * len(pairs), [0.0] * len(pairs)
    for name, spec in ((n, s) for n, s in specs.items() if s.numel):
        scores = _sampled(ranking, name, spec.numel)
        ranks = [_ranks(row) for row in scores]
        for i, (a, b) in enumerate(pairs):
            found = _pearson(ranks[a], ranks[b])
            if found is not None:
                above[i] += found * spec.numel
                below[i] += spec.numel
    means = [a / b if b else 0.0 for a, b in zip(above, below, strict=True)]
    many = len(list(combinations(range(number), 2)))
    return {
        "models": [{"models": [models[a], models[b]], "spearman": r}
                   for (a, b), r in zip(pairs[:many], means[:many], strict=True)],
        "base_and_model": dict(zip(models if columns > number else (), means[many:], strict=True)),
    }  # fmt: skip


def _sampled(ranking: Ranked, name: str, numel: int) -> Array:
    if numel <= RUN * RUNS:
        return ranking.scores(name, 0, numel).copy()
    step = numel // RUNS // 8 * 8
    parts = [ranking.scores(name, at * step, RUN).copy() for at in range(RUNS)]
    return np.concatenate(parts, axis=1)


def _ranks(scores: Array) -> Array:
    """Ranks from 0 on, equal scores sharing the mean of theirs: float64."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Array = (ends - (counts + 1) / 2)[inverse]
    return means


def _pearson(one: Array, other: Array) -> float | None:
    """The correlation of two rows; ``None`` where one of them is constant."""
    if one.size < 2:
        return None
    a, b = one - one.mean(), other - other.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else None


__all__ = ["Census", "correlations"]
