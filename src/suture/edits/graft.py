"""Grafts: a mask with the tuned weights that it marks, all that stitching needs of a checkpoint.

The state of a stitched model is the set of its grafts. Each is small (the marked weights in their
own dtype and one bit an entry), belongs to one task, and is never changed. So a task is added or
removed by adding or removing its file, without the checkpoints of the others, and the result cannot
depend on the order in which tasks came: sums are formed anew, in the order of names. (Keeping the
running sums A and C instead would be smaller for very many tasks, but floating sums depend on
their order, and subtracting a task would not give back the sum without it.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from suture.checkpoints.checkpoint import Array, Checkpoint
from suture.checkpoints.headers import read_header
from suture.checkpoints.views import Same, View
from suture.edits.mask_file import GRAFT, MaskFile, StoredMask, marked, popcount
from suture.errors import CheckpointError, MismatchError, Problems, SutureError
from suture.tensors.spec import DTYPES, TensorSpec, listed

VALUES = "values "
"""Before the name of a tensor: its marked weights, in order of position."""
_STEP = 1 << 16
_READ = 1 << 18


def write_graft(
    path: Path, tuned: Checkpoint, mask: StoredMask, about: Mapping[str, Any] | None = None
) -> None:
    """Write the mask and the weights of ``tuned`` that it marks as one file.

    Raises:
        MismatchError: the mask is that of other tensors.
        OutputError: the file cannot be written.
    """
    check_shapes(mask, tuned)
    counts = {n: mask.count(n) for n in mask.shapes}
    order = sorted(counts, key=lambda n: (-DTYPES[tuned.specs[n].dtype].bits, n))
    values = {VALUES + n: TensorSpec(tuned.specs[n].dtype, (counts[n],)) for n in order}
    known = marked({**mask.about, **(about or {})}, mask.restricted or tuned.restricted)
    with MaskFile(path, mask.shapes, known, values) as file:
        for name in mask.shapes:
            spec = tuned.specs[name]
            dtype, at = DTYPES[spec.dtype], 0
            for start in range(0, spec.numel, _READ):
                count = min(_READ, spec.numel - start)
                bits, raw = np.empty(-(-count // 8), np.uint8), np.empty(count, dtype.storage)
                mask.read(name, start, bits)
                tuned.read_into(name, start, raw.view(np.uint8))
                chosen = raw[np.unpackbits(bits, count=count, bitorder="little").view(bool)]
                file.put(name, start // 8, bits)
                file.put(VALUES + name, at, chosen.view(np.uint8))
                at += chosen.nbytes


def check_shapes(mask: StoredMask, model: Checkpoint, label: str = "") -> None:
    """Refuse a mask of another model.

    Raises:
        MismatchError: it marks tensors that the model lacks, or that have another shape there.
    """
    who = f"{mask.path} against {label or model.label}"
    missing = sorted(mask.shapes.keys() - model.specs.keys())
    odd = [n for n, s in mask.shapes.items() if n not in missing and model.specs[n].shape != s]
    if missing:
        raise MismatchError(f"{who}: the model lacks {listed(missing)}: a mask of another model?")
    if odd:
        there, here = list(model.specs[odd[0]].shape), list(mask.shapes[odd[0]])
        raise MismatchError(
            f"{who}: {odd[0]} is {there} in the model and {here} in the mask: a mask of another "
            "model?"
        )


def is_graft(path: Path) -> bool:
    """Whether a path is a file that ``write_graft`` wrote."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        return read_header(path).metadata.get("format") == GRAFT
    except SutureError:
        return False


def open_graft(path: Path, base: Checkpoint) -> View:
    """The base with a graft's weights in their places: a model as far as the mask reaches.

    Raises:
        SutureError: the file is no graft, or damaged; all of it is read.
        MismatchError: it belongs to another base.
    """
    mask = StoredMask(path)
    held = mask.checkpoint.specs
    if any(VALUES + n not in held for n in mask.shapes):
        raise SutureError(f"{path}: damaged: weights that its mask marks are missing")
    check_shapes(mask, base)
    mask.check()
    problems = Problems()
    for name in mask.shapes:
        if held[VALUES + name].dtype != base.specs[name].dtype:
            problems.add(
                MismatchError,
                f"{path} against {base.label}: {name} is {base.specs[name].dtype} in the base and "
                f"{held[VALUES + name].dtype} in the graft; graft models of the base's dtype",
            )
    problems.raise_if_any()
    grafted = {n: _Grafted(base, mask, n) for n in mask.shapes}
    view = View(base, {n: grafted.get(n) or Same(base, n) for n in base.specs})
    view.path, view.label, view.folder = path, str(path), path.parent
    return view


class _Grafted:
    """A lens: the base, with the graft's weights where its mask is set."""

    identity: object = "graft"

    def __init__(self, base: Checkpoint, mask: StoredMask, name: str) -> None:
        self.base, self.mask, self.name = base, mask, name
        self.origin = (base, name)
        self.sources = (base, mask.checkpoint)
        self._before: Array | None = None
        """Entries marked before every 65,536th position, counted at the first read."""

    @property
    def spec(self) -> TensorSpec:
        return self.base.specs[self.name]

    def read(self, start: int, raw: Array) -> None:
        self.base.read_into(self.name, start, raw)
        storage = DTYPES[self.spec.dtype].storage
        row = raw.view(storage)
        first = start // 8 * 8
        bits = np.empty(-(-(start + row.size) // 8) - first // 8, np.uint8)
        self.mask.read(self.name, first, bits)
        marks = np.unpackbits(bits, bitorder="little").view(bool)
        before = int(marks[: start - first].sum())
        marks = marks[start - first :][: row.size]
        values = np.empty(int(marks.sum()), storage)
        at = self._rank(first) + before
        self.mask.checkpoint.read_into(VALUES + self.name, at, values.view(np.uint8))
        row[marks] = values

    def _rank(self, position: int) -> int:
        """How many entries are marked before this position, a multiple of 8."""
        if self._before is None:
            self._before = self._ranks()
        step = position // _STEP
        return int(self._before[step]) + self._marked(step * _STEP, position)

    def _marked(self, start: int, stop: int) -> int:
        bits = np.empty(-(-(stop - start) // 8), np.uint8)
        self.mask.read(self.name, start, bits)
        return popcount(bits)

    def _ranks(self) -> Array:
        numel = self.spec.numel
        counts = [self._marked(at, min(at + _STEP, numel)) for at in range(0, numel, _STEP)]
        ranks = np.cumsum([0, *counts], dtype=np.int64)
        held = self.mask.checkpoint.specs[VALUES + self.name].shape
        if held != (ranks[-1],):  # others would be read from what stands behind them in the file
            raise CheckpointError(
                f"{self.mask.path}: damaged: {ranks[-1]} entries of {self.name} are marked, and "
                f"its weights are {list(held)}; make it again"
            )
        return ranks


__all__ = ["VALUES", "check_shapes", "is_graft", "open_graft", "write_graft"]
