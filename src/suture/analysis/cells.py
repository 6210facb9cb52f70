"""What the analyses share: groups of tensors, matrices as plain data, several visitors at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from suture.stream.sweep import Block, Visitor
from suture.stream.vector import Gram
from suture.tensors.roles import layer_key, role_of
from suture.tensors.spec import Piece

Array = np.ndarray[Any, Any]
Matrix = tuple[tuple[float, ...], ...]
"""Rows of numbers; frozen, and plain data once it is JSON."""


def frozen(array: Array) -> Matrix:
    """An array of two dimensions as plain, frozen data."""
    return tuple(tuple(float(x) for x in row) for row in array)


class CellPlace(NamedTuple):
    """A layer and a role: what the tensors of one cell of a heat map have in common."""

    layer: str
    role: str


def place_of(name: str) -> CellPlace:
    """The cell of the heat map that a tensor belongs to."""
    return CellPlace(layer_key(name), role_of(name).kind)


class Groups(NamedTuple):
    """The same tensors divided three ways, each group in the order of the model's depth."""

    layers: dict[str, list[str]]
    roles: dict[str, list[str]]
    cells: dict[CellPlace, list[str]]


def groups_of(names: Iterable[str]) -> Groups:
    """Divide tensors by layer, by role, and by both."""
    found = Groups({}, {}, {})
    for name in sorted(names, key=_depth):
        place = place_of(name)
        found.layers.setdefault(place.layer, []).append(name)
        found.roles.setdefault(place.role, []).append(name)
        found.cells.setdefault(place, []).append(name)
    return found


def _depth(name: str) -> tuple[bool, str, int, str]:
    layer = role_of(name).layer
    return (layer is not None, layer_key(name).rstrip("0123456789"), layer or 0, name)


class Stack:
    """One thread's rows of several kinds under one another, and the lanes of their dot products."""

    def __init__(self, gram: Gram) -> None:
        self.lanes = gram.local()
        self.rows = np.zeros((gram.rows, 0), np.float32)

    def fit(self, size: int) -> Array:
        """The rows, float32[rows, size]; what they held is of no use any more."""
        if self.rows.shape[1] != size:
            self.rows = np.zeros((len(self.rows), size), np.float32)
        return self.rows


class Together(Visitor[list[Any]]):
    """Several visitors of one sweep: the models are read once for all of them."""

    def __init__(self, visitors: Sequence[Visitor[Any]]) -> None:
        self.visitors = list(visitors)

    def local(self) -> list[Any]:
        """What each visitor keeps to the thread."""
        return [visitor.local() for visitor in self.visitors]

    def see(self, local: list[Any], block: Block) -> None:
        """Show the block to each; none of them changes it."""
        for visitor, mine in zip(self.visitors, local, strict=True):
            visitor.see(mine, block)

    def end_piece(self, local: list[Any], piece: Piece) -> None:
        """Tell each."""
        for visitor, mine in zip(self.visitors, local, strict=True):
            visitor.end_piece(mine, piece)

    def end_task(self, local: list[Any], task: Sequence[Piece]) -> None:
        """Tell each."""
        for visitor, mine in zip(self.visitors, local, strict=True):
            visitor.end_task(mine, task)

    def finish(self, local: list[Any]) -> None:
        """Tell each."""
        for visitor, mine in zip(self.visitors, local, strict=True):
            visitor.finish(mine)
