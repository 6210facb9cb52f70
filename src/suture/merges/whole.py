"""Merged tensors that have to be computed at once, handed out block by block.

The engine asks for blocks from several threads and knows nothing of this: whoever comes first
computes the tensor, the others wait for it, and it is forgotten once its last block was taken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from suture.merges.base import Array
from suture.stream.sweep import BLOCK, Block, Sources

Compute = Callable[[str, Array], Array]
"""``compute(name, rows)``: the merged tensor as float32[elements], from float32[models, elements],
which it may change. What it gives must not depend on the thread or on other tensors."""
HELD = 2
"""Tensors that are kept although blocks of them may never be asked for."""


@dataclass
class _Entry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    value: Array | None = None
    given: int = 0
    """Elements handed out."""


class WholeTensor:
    """Computes each tensor once and fills blocks from it. Safe from any thread.

    Memory is at most that of ``HELD`` merged tensors and of one computation a thread. A tensor that
    had to be forgotten before its last block was taken is computed again.
    """

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def fill(self, block: Block) -> None:
        """Fill ``block.out`` with its part of the merged tensor."""
        with self._lock:
            entry = self._entries.setdefault(block.name, _Entry())
        with entry.lock:
            if entry.value is None:
                rows = load_whole(block.sources, block.name)
                entry.value = self.compute(block.name, rows)
            value = entry.value
        block.out[: block.count] = value[block.start : block.stop]
        self._taken(block, entry, value.size)

    def _taken(self, block: Block, entry: _Entry, size: int) -> None:
        with self._lock:
            entry.given += block.count
            if entry.given >= size:
                self._entries.pop(block.name, None)
            ready = [name for name, e in self._entries.items()
                     if e.value is not None and name != block.name]  # fmt: skip
            for name in ready[: len(ready) - HELD]:
                del self._entries[name]


def load_whole(sources: Sources, name: str) -> Array:
    """The rows of all elements of a tensor: float32[models, elements].

    Raises:
        NonFiniteError: a model holds NaN or infinity and that is not allowed.
    """
    count = sources.spec(name).numel
    rows = np.empty((len(sources.models), count), np.float32)
    block = Block(sources, min(BLOCK, max(8, count)))
    for start in range(0, count, block.size):
        much = min(block.size, count - start)
        block.load(name, start, much)
        rows[:, start : start + much] = block.rows[:, :much]
    return rows


__all__ = ["HELD", "WholeTensor", "load_whole"]
