"""What a patch is made of: entries taken from a base and a model in one sweep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.views import View
from suture.edits.mask import Mask
from suture.edits.patch import Patch
from suture.edits.patch_file import Entries, Spool, bits_of
from suture.stream.sweep import (
    RAW,
    Block,
    Hashers,
    Progress,
    Sources,
    Visitor,
    sweep,
    tasks_of,
    tensor_fingerprint,
)
from suture.stream.topk import Selection
from suture.tensors.spec import PIECE, Piece, TensorSpec, pieces_of

Array = np.ndarray[Any, Any]
Pick = Callable[[Block], Array]
"""Which entries of a block are taken: their positions in the block, ascending."""


def differing(block: Block) -> Array:
    """The entries whose bits differ between the base and the model of a sweep."""
    base, other = block.raw(0), block.raw(1)
    assert base is not None
    assert other is not None
    kind = bits_of(block.sources.spec(block.name).dtype)
    return np.flatnonzero(base.view(kind) != other.view(kind))


def masked(mask: Mask) -> Pick:
    """The entries of a mask."""

    def pick(block: Block) -> Array:
        bits = mask.bits[block.name][block.start // 8 : -(-block.stop // 8)]
        return np.flatnonzero(np.unpackbits(bits, count=block.count, bitorder="little"))

    return pick


def selected(selection: Selection) -> Pick:
    """The entries of the largest magnitude."""

    def pick(block: Block) -> Array:
        keys = block.rows[0, : block.count].view(np.uint32) & 0x7FFFFFFF
        return np.concatenate(
            [start + np.flatnonzero(keys[start:stop] >= least[0])
             for start, stop, least in selection.segments(block)]
            or [np.zeros(0, np.int64)]
        )  # fmt: skip

    return pick


def of_patch(patch: Patch) -> Pick:
    """The entries that a patch replaces."""

    def pick(block: Block) -> Array:
        number = block.start // PIECE
        at = patch.near(block.name, number).at
        first = block.start - number * PIECE
        low, high = np.searchsorted(at, np.array([first, first + block.count], np.uint32))
        return at[low:high].astype(np.int64) - first

    return pick


class _Local:
    def __init__(self) -> None:
        self.hashers = Hashers(2)
        self.parts: list[tuple[Array, Array, Array]] = []


class Gather(Visitor[_Local]):
    """Takes entries of a base and a model into a spool, and the fingerprints of both."""

    def __init__(self, pick: Pick, names: frozenset[str], spool: Spool) -> None:
        self.pick, self.names, self.spool = pick, names, spool
        self._lock = threading.Lock()
        self._digests: dict[tuple[str, int], list[str]] = {}

    def local(self) -> _Local:
        """What one thread holds of the current piece."""
        return _Local()

    def see(self, local: _Local, block: Block) -> None:
        """Take the entries of one block."""
        base = block.raw(0)
        assert base is not None
        result = base
        if block.name in self.names and block.count:
            at = self.pick(block)
            kind = bits_of(block.sources.spec(block.name).dtype)
            raw = block.raw(1)
            assert raw is not None
            old, new = base.view(kind)[at], raw.view(kind)[at]
            local.parts.append((at + block.start % PIECE, old, new))
            result = base.copy()
            result.view(kind)[at] = new
        local.hashers.update([base, result])

    def end_piece(self, local: _Local, piece: Piece) -> None:
        """Hand the entries of a piece over."""
        with self._lock:
            self._digests[piece.name, piece.number] = local.hashers.take()
        if local.parts:
            at, old, new = (np.concatenate(parts) for parts in zip(*local.parts, strict=True))
            some = Entries(at.astype(np.uint32), old, new)
            self.spool.add(piece.name, piece.number, piece.stop - piece.start, some)
            local.parts = []

    def prints(self, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[str, str]]:
        """The fingerprints of tensors that were seen, before and after."""
        found = {}
        for name, spec in specs.items():
            digests = [self._digests[name, p.number] for p in pieces_of(name, spec.numel)]
            old, new = (tensor_fingerprint(side) for side in zip(*digests, strict=True))
            found[name] = (old, new)
        return found


@dataclass(frozen=True)
class Checked:
    """What comparing a patch with a model found, tensor by tensor."""

    prints: Mapping[str, tuple[str, str]]
    """Fingerprints of the tensors that are touched, before and after."""
    foreign: tuple[str, ...]
    """Those that are not the base's."""
    changed: tuple[str, ...]
    """Those of them in which an entry that the patch replaces holds other bits."""


def compare(
    patch: Patch, model: Checkpoint, view: View, spool: Spool, *, threads: int | None = None,
    progress: Progress | None = None,
) -> Checked:  # fmt: skip
    """Read every tensor that a patch touches, with and without it, and spool what it does.

    Args:
        patch: the patch.
        model: what it is put on.
        view: the model with the patch on it, forced.
        spool: takes the entries as they really are and become.
        threads: to use; default every core.
        progress: told how many bytes were read.
    """
    sources = Sources((view,), model, how=RAW, allow_nonfinite=True)
    changed: set[str] = set()

    class Comparing(Gather):
        def end_piece(self, local: _Local, piece: Piece) -> None:
            old = [part[1] for part in local.parts]
            if old and (np.concatenate(old) != patch.near(piece.name, piece.number).old).any():
                changed.add(piece.name)
            super().end_piece(local, piece)

    gather = Comparing(of_patch(patch), frozenset(patch.specs), spool)
    sweep(sources, tasks_of(patch.specs, model.specs), gather, threads=threads, progress=progress)
    prints = gather.prints(patch.specs)
    foreign = [n for n, (old, _) in prints.items()
               if patch.prints[n][0] not in (None, old) or n in changed]  # fmt: skip
    return Checked(prints, tuple(foreign), tuple(sorted(changed)))
