"""Whole rows of tensors, for methods that need those and no more.

Blocks are cut without regard to rows. Here the row that a block begins in the middle of, and the
one that it breaks off, are read once more as a whole: a few in a hundred more bytes, and memory for
one row beyond the block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from suture.kernels import compiled
from suture.merges.base import Array
from suture.stream.sweep import Block
from suture.tensors.spec import TensorSpec

Change = Callable[[Block, int, int], None]
"""``change(block, start, number)``: fill ``block.out``, or change ``block.rows``, in ``number``
whole rows that begin at column ``start``. What it does to a row may depend on that row alone."""


def row_width(spec: TensorSpec) -> int:
    """Elements of a row: the last axis; a vector is one row."""
    return max(1, spec.shape[-1] if spec.shape else 1)


class RowBlocks:
    """Lets one change see whole rows, wherever blocks begin and end. Safe from any thread."""

    def __init__(self, change: Change) -> None:
        self.change = change
        self._local = threading.local()

    def __call__(self, block: Block) -> None:
        """Change every row of a block."""
        width = row_width(block.sources.spec(block.name))
        begin, end = block.start, block.stop
        first = -(-begin // width) * width
        last = end // width * width
        if first > last:  # inside one row
            self._part(block, width, begin, end)
            return
        if begin < first:
            self._part(block, width, begin, first)
        if first < last:
            self.change(block, first - begin, (last - first) // width)
        if last < end:
            self._part(block, width, last, end)

    def _part(self, block: Block, width: int, begin: int, end: int) -> None:
        """Change elements ``begin`` to ``end``, which are a part of one row."""
        start = begin // width * width
        row = self._row(block, start, width)
        there, here = (
            slice(begin - start, end - start),
            slice(begin - block.start, end - block.start),
        )
        block.rows[:, here] = row.rows[:, there]
        block.out[here] = row.out[there]

    def _row(self, block: Block, start: int, width: int) -> Block:
        local: Any = self._local
        row: Block | None = getattr(local, "row", None)
        if row is None or row.size < width or row.sources is not block.sources:
            row = local.row = Block(block.sources, max(width, 8))
        elif row.name == block.name and row.start == start and row.count == width:
            return row
        row.count = 0  # not whole until the change is done
        row.load(block.name, start, width)
        self.change(row, 0, 1)
        return row


def row_grams(block: Block, start: int, number: int) -> Array:
    """The Gram matrices of some whole rows, one a row: float64[number, models, models]."""
    models = len(block.rows)
    sums = np.empty((number, models * models))
    width = row_width(block.sources.spec(block.name))
    compiled.row_dots(block.rows, start, number, width, sums)
    return sums.reshape(number, models, models)


__all__ = ["Change", "RowBlocks", "row_grams", "row_width"]
