"""Where experts disagree: entries that at least two of them move in opposite directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from suture.analysis.cells import Array, Groups, Matrix, frozen
from suture.stream.sweep import Block, Visitor
from suture.stream.topk import Selection
from suture.tensors.spec import Piece


@dataclass(frozen=True)
class Conflict:
    """How much the experts disagree in one part of the network."""

    shared: int
    """Entries that at least two experts move."""
    opposed: int
    """Those among them that two experts move in opposite directions."""
    rate: float | None
    """``opposed / shared``; ``None`` where nothing is shared."""
    null: float | None
    """The rate that random signs would give: an entry that m experts move is opposed with
    probability 1 - 2**(1 - m)."""
    weighted: float | None
    """The rate with each entry counted by the magnitude that the experts move it in all."""
    cancelled: float | None
    """Share of all magnitude that is lost when the task vectors are added:
    1 - sum|sum_i x_i| / sum sum_i |x_i|."""
    layer: str | None = None
    role: str | None = None


@dataclass(frozen=True)
class Conflicts:
    """Sign conflicts between experts, in all and by layer and role."""

    models: tuple[str, ...]
    density: float | None
    """Only the entries of largest magnitude, so many of each expert; ``None``: all of them."""
    total: Conflict
    layers: tuple[Conflict, ...]
    roles: tuple[Conflict, ...]
    cells: tuple[Conflict, ...]
    pairs: Matrix
    """Rate of each pair of experts (0.5 for random signs); NaN-free: 0 where nothing is shared."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class _Counts:
    """What is counted of one piece."""

    def __init__(self, models: int) -> None:
        self.moved = np.zeros(models + 1, np.int64)
        self.opposed = 0
        self.masses = np.zeros(4)
        self.pairs = np.zeros((2, models, models), np.int64)


class _Local:
    def __init__(self, models: int) -> None:
        self.now = _Counts(models)
        self.pieces: list[tuple[str, _Counts]] = []


class Signs(Visitor[_Local]):
    """Counts conflicts, tensor by tensor; with ``selection`` only among the entries it keeps.

    Counts are exact. Magnitudes are added in float64 block by block within a piece and exactly over
    pieces, so they do not depend on threads.
    """

    def __init__(self, models: int, selection: Selection | None = None) -> None:
        self.models = models
        self.selection = selection
        self._parts: dict[str, list[_Counts]] = {}

    def local(self) -> _Local:
        """The counts of the current piece, and the pieces since the last task."""
        return _Local(self.models)

    def see(self, local: _Local, block: Block) -> None:
        """Count a block."""
        rows = block.rows[: self.models, : block.count]
        if self.selection is not None:
            rows = self._kept(rows, block)
        up, down = rows > 0, rows < 0
        now = local.now
        now.moved += np.bincount((up | down).sum(0), minlength=self.models + 1)
        opposed = up.any(0) & down.any(0)
        now.opposed += int(opposed.sum())
        mass = np.abs(rows).sum(0, dtype=np.float64)
        shared = (up | down).sum(0) > 1
        now.masses += [
            mass[opposed].sum(), mass[shared].sum(), mass.sum(),
            np.abs(rows.sum(0, dtype=np.float64)).sum(),
        ]  # fmt: skip
        ups, downs = np.packbits(up, axis=1), np.packbits(down, axis=1)
        for a, b in combinations(range(self.models), 2):
            both = (ups[a] | downs[a]) & (ups[b] | downs[b])
            against = (ups[a] & downs[b]) | (downs[a] & ups[b])
            now.pairs[0, a, b] += np.bitwise_count(both).sum(dtype=np.int64)
            now.pairs[1, a, b] += np.bitwise_count(against).sum(dtype=np.int64)

    def _kept(self, rows: Array, block: Block) -> Array:
        assert self.selection is not None
        keys = rows.view(np.uint32) & 0x7FFFFFFF
        found = np.zeros_like(rows)
        for start, stop, least in self.selection.segments(block):
            part = slice(start, stop)
            found[:, part] = np.where(keys[:, part] >= least[:, None], rows[:, part], 0)
        return found

    def end_piece(self, local: _Local, piece: Piece) -> None:
        """Put the counts of a piece aside."""
        local.pieces.append((piece.name, local.now))
        local.now = _Counts(self.models)

    def end_task(self, local: _Local, task: Sequence[Piece]) -> None:
        """Hand the finished pieces over."""
        for name, counts in local.pieces:
            self._parts.setdefault(name, []).append(counts)
        local.pieces = []

    def conflicts(self, models: Sequence[str], groups: Groups, density: float | None) -> Conflicts:
        """What was found, after the sweep."""
        names = [n for inside in groups.layers.values() for n in inside]
        shared, opposed = (
            sum((part.pairs[i] for n in names for part in self._parts[n]), np.zeros(()))
            for i in (0, 1)
        )
        rates = np.divide(opposed, shared, out=np.zeros((self.models,) * 2), where=shared > 0)
        return Conflicts(
            tuple(models), density, self._row(names),
            tuple(self._row(inside, layer=k) for k, inside in groups.layers.items()),
            tuple(self._row(inside, role=k) for k, inside in groups.roles.items()),
            tuple(self._row(inside, layer=k.layer, role=k.role)
                  for k, inside in groups.cells.items()),
            frozen(rates + rates.T),
        )  # fmt: skip

    def _row(self, names: Sequence[str], **where: str) -> Conflict:
        parts = [part for n in names for part in self._parts[n]]
        moved = sum((p.moved for p in parts), np.zeros(self.models + 1, np.int64))
        several = range(2, self.models + 1)
        shared = int(moved[2:].sum())
        opposed = sum(p.opposed for p in parts)
        against, together, mass, net = (math.fsum(p.masses[i] for p in parts) for i in range(4))
        chance = sum(float(moved[m]) * (1 - 2.0 ** (1 - m)) for m in several)
        return Conflict(
            shared, opposed,
            opposed / shared if shared else None,
            chance / shared if shared else None,
            against / together if together > 0 else None,
            1 - net / mass if mass > 0 else None,
            **where,
        )  # fmt: skip
