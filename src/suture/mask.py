"""Masks: one bit an entry, by tensor; set algebra, and the entries of largest magnitude."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from suture import kernels
from suture.checkpoint import Array, Checkpoint, read_header
from suture.errors import RecipeError, SutureError, did_you_mean
from suture.select import SCOPES, Selection, select
from suture.spec import Piece, TensorSpec
from suture.stream import Block, Sources, Visitor, sweep, tasks_of
from suture.vector import TaskVector


class Mask:
    """A set of entries of named tensors, one bit each (bit i of byte j is entry 8 j + i).

    ``&``, ``|``, ``-`` and ``~`` are those of sets, over the same tensors.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        bits: Mapping[str, Array],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.shapes = dict(shapes)
        self.bits = dict(bits)
        self.about = dict(about or {})
        """How it was made and of what, for those who read the file; set algebra drops it."""

    @classmethod
    def of(cls, entries: Mapping[str, Array], about: Mapping[str, Any] | None = None) -> Mask:
        """A mask of boolean arrays."""
        bits = {n: np.packbits(e.reshape(-1), bitorder="little") for n, e in entries.items()}
        return cls({n: tuple(e.shape) for n, e in entries.items()}, bits, about)

    def __getitem__(self, name: str) -> Array:
        """The mask of one tensor as booleans in its shape."""
        shape = self.shapes[name]
        count = TensorSpec("BOOL", shape).numel
        return (
            np.unpackbits(self.bits[name], count=count, bitorder="little").view(bool).reshape(shape)
        )

    def _combined(self, other: Mask, how: Callable[[Array, Array], Array]) -> Mask:
        if not isinstance(other, Mask) or self.shapes != other.shapes:
            raise SutureError("masks combine only over the same tensors")
        return Mask(self.shapes, {n: how(b, other.bits[n]) for n, b in self.bits.items()})

    def __and__(self, other: Mask) -> Mask:
        return self._combined(other, np.bitwise_and)

    def __or__(self, other: Mask) -> Mask:
        return self._combined(other, np.bitwise_or)

    def __sub__(self, other: Mask) -> Mask:
        return self._combined(other, lambda a, b: a & ~b)

    def __invert__(self) -> Mask:
        found = {}
        for name, bits in self.bits.items():
            flipped = ~bits
            spare = -TensorSpec("BOOL", self.shapes[name]).numel % 8
            if spare:
                flipped[-1] &= 0xFF >> spare
            found[name] = flipped
        return Mask(self.shapes, found)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Mask)
            and self.shapes == other.shapes
            and all(np.array_equal(b, other.bits[n]) for n, b in self.bits.items())
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def count(self) -> int:
        """Entries in the set."""
        return sum(int(np.bitwise_count(b).sum(dtype=np.int64)) for b in self.bits.values())

    @property
    def size(self) -> int:
        """Entries there are."""
        return sum(TensorSpec("BOOL", shape).numel for shape in self.shapes.values())

    @property
    def density(self) -> float:
        """Share of entries in the set."""
        return self.count / max(1, self.size)

    def jaccard(self, other: Mask) -> float:
        """Size of the intersection over size of the union; 0 for two empty masks."""
        union = (self | other).count
        return (self & other).count / union if union else 0.0

    def save(self, path: Path) -> None:
        """Write the mask as a safetensors file: bits as U8, shapes in the metadata."""
        from safetensors.numpy import save_file

        metadata = {f"shape {n}": ",".join(map(str, s)) for n, s in self.shapes.items()}
        if self.about:
            metadata["about"] = json.dumps(self.about, sort_keys=True)
        save_file(self.bits, path, metadata={"format": "suture.mask", **metadata})

    @classmethod
    def load(cls, path: Path) -> Mask:
        """Read a mask that ``save`` wrote.

        Raises:
            SutureError: the file is not a mask.
        """
        path = Path(path)
        metadata = read_header(path).metadata
        if metadata.get("format") != "suture.mask":
            raise SutureError(f"{path}: not a mask")
        checkpoint = Checkpoint(path, str(path), [path])
        shapes = {}
        for name, spec in checkpoint.specs.items():
            words = metadata.get(f"shape {name}", "?").split(",")
            if not all(w.isdecimal() or not w for w in words):
                raise SutureError(f"{path}: the mask of {name} has no shape")
            shapes[name] = tuple(int(w) for w in words if w)
            bits = TensorSpec("BOOL", shapes[name]).numel
            if spec.dtype != "U8" or spec.shape != (-(-bits // 8),):
                raise SutureError(f"{path}: the mask of {name} does not have {bits} bits")
        try:
            about = json.loads(metadata.get("about", "{}"))
        except ValueError:
            about = None
        if not isinstance(about, dict):
            raise SutureError(f"{path}: what it says about itself is not a JSON object")
        return cls(shapes, dict(checkpoint), about)


class _Packing(Visitor[None]):
    def __init__(self, selection: Selection, bits: dict[str, Array]) -> None:
        self.selection, self.bits = selection, bits
        self.lock = threading.Lock()

    def see(self, local: None, block: Block) -> None:
        # A block starts at a multiple of 8 elements, so no two threads share a byte.
        for start, stop, keys in self.selection.segments(block):
            kernels.pack_selected(block.rows[0], start, stop, int(keys[0]), self.bits[block.name],
                                  block.start + start)  # fmt: skip

    def end_task(self, local: None, task: Sequence[Piece]) -> None:
        """Nothing to gather: each block wrote its own bytes."""


def localize(
    vector: TaskVector,
    rule: str = "magnitude",
    *,
    density: float,
    scope: str = "global",
    threads: int | None = None,
) -> Mask:
    """The entries of a task vector that matter most by a rule; exactly ``round(density * n)``.

    ``magnitude`` (dataless localization, He et al. 2025, arXiv:2408.13656) is the only rule so far.

    Raises:
        RecipeError: no such rule or scope, or ``density`` is not in (0, 1].
    """
    if rule != "magnitude":
        raise RecipeError(f"no importance rule {rule!r}; {did_you_mean(rule, ['magnitude'])}")
    if scope not in SCOPES:
        raise RecipeError(f"no scope {scope!r}; {did_you_mean(scope, SCOPES)}")
    if not 0 < density <= 1:
        raise RecipeError(f"density is the share of entries kept, in (0, 1]; got {density}")
    if len(vector.terms) != 1:
        raise RecipeError("localize one task vector at a time, not a sum of them")
    specs = vector.base.specs
    sources = Sources((vector.terms[0][0],), vector.base)
    selection = select(sources, vector.names, lambda _: [density], scope=scope, threads=threads)
    bits = {n: np.zeros(-(-specs[n].numel // 8), np.uint8) for n in vector.names}
    sweep(sources, tasks_of(vector.names, specs), _Packing(selection, bits), threads=threads)
    return Mask({n: specs[n].shape for n in vector.names}, bits)
