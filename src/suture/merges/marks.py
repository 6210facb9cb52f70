"""Which entries of tensors are marked: the bits of stored masks, or scores ranked and read again.

Scores are ranked once, exactly; later a block's marks are found by reading its scores again and
holding them against the thresholds. So no mask is kept, whatever the size of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.views import LazyTensor, View
from suture.edits.graft import check_shapes, is_graft
from suture.edits.importance import Scoring
from suture.edits.mask_file import StoredMask
from suture.edits.stats import Stats
from suture.errors import MismatchError, Problems
from suture.kernels import compiled
from suture.merges.base import Array, Context
from suture.stream.sweep import BLOCK, SPAN, WEIGHT, Block, Sources
from suture.stream.topk import Ranking, Selection, rank
from suture.tensors.roles import role_of
from suture.tensors.spec import TensorSpec, listed


def buffers(columns: int) -> int:
    """Bytes that a thread holds to read so many columns of scores."""
    return columns * (8 * SPAN + 4 * BLOCK) + 16 * BLOCK


def packed(count: int) -> int:
    """Bytes that the marks of so many entries take."""
    return -(-count // 8)


def unpacked(bits: Array, count: int) -> Array:
    """Marks as booleans: bool[..., count]."""
    return np.unpackbits(bits, axis=-1, count=count, bitorder="little").view(bool)


@dataclass
class Ranked:
    """Scores of several columns with their thresholds."""

    sources: Sources
    """Checkpoints whose tensors are the scores, one a column."""
    selection: Selection
    size: int
    """Elements in a block."""
    _own: threading.local = field(default_factory=threading.local)

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return len(self.sources.models)

    def scores(self, name: str, start: int, count: int) -> Array:
        """float32[columns, count], valid until the thread asks again."""
        return self._at(name, start, count).rows[:, :count]

    def bits(self, name: str, start: int, count: int) -> Array:
        """The marks of some entries from a multiple of 8 on: uint8[columns, packed(count)]."""
        block = self._at(name, start, count)
        found = np.zeros((block.models, packed(count)), np.uint8)
        for first, stop, keys in self.selection.segments(block):
            for row, key, mine in zip(block.rows, keys, found, strict=True):
                compiled.pack_selected(row, first, stop, int(key), mine, first)
        return found

    def _at(self, name: str, start: int, count: int) -> Block:
        block: Block | None = getattr(self._own, "block", None)
        if block is None or block.size < count:
            self._own.block = block = Block(self.sources, max(self.size, count))
        block.load(name, start, count)
        return block


def ranked(
    context: Context,
    scorings: Sequence[Scoring],
    numbers: Callable[[str], Sequence[float]],
    count: Callable[[float, int], int],
    scope: str,
    flip: bool = False,
    taken: Sequence[Ranked] = (),
) -> Ranked:
    """Rank the scores of the tensors that are merged; only scores above 0 can be marked.

    Args:
        context: of the merge.
        scorings: one a column.
        numbers: by tensor, a number for each column, from which ``count`` makes a count.
        count: how many of n entries a number keeps.
        scope: over which tensors entries compete.
        flip: mark the least scores above 0 instead, but for embeddings and heads.
        taken: what they mark cannot be marked again.
    """
    views = []
    for scoring in scorings:
        held = [n for n in context.names if n in scoring.tuned.specs]
        lenses: dict[str, LazyTensor] = dict(scoring.view(held).lenses)
        for name in held if flip else ():
            if role_of(name).kind not in ("embedding", "head"):
                lenses[name] = _Flipped(lenses[name])
        for name in held if taken else ():
            lenses[name] = _Free(lenses[name], name, taken)
        lacking = {n: _Nothing(scoring.base, n) for n in context.names if n not in lenses}
        views.append(View(scoring.tuned, {**lenses, **lacking}, {}))
    sources = Sources(tuple(views), how=WEIGHT)
    how = Ranking(numbers, lambda own, n: [count(x, n) for x in own], range(len(views)))
    found = rank(sources, context.names, how, scope, threads=context.threads, block=context.block,
                 progress=context.progress)  # fmt: skip
    return Ranked(sources, found, context.block)


class _Nothing:
    """A lens: no entry of this tensor has any importance."""

    identity: object = None

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.origin = (checkpoint, name)
        self.sources = (checkpoint,)
        self.spec = TensorSpec("F32", checkpoint.specs[name].shape)

    def read(self, start: int, raw: Array) -> None:
        raw[:] = 0


_TOP = np.uint32(0x7F800000)


class _Flipped:
    """A lens: scores above 0 in reverse order; 0 stays 0."""

    identity: object = None

    def __init__(self, scores: LazyTensor) -> None:
        self.scores = scores
        self.origin, self.sources, self.spec = scores.origin, scores.sources, scores.spec

    def read(self, start: int, raw: Array) -> None:
        self.scores.read(start, raw)
        keys = raw.view(np.uint32)  # the bits of a positive float have its order
        keys[:] = np.where(keys == 0, 0, _TOP - keys)


class _Free:
    """A lens: scores, but 0 where an entry is marked by somebody else."""

    identity: object = None

    def __init__(self, scores: LazyTensor, name: str, taken: Sequence[Ranked]) -> None:
        self.scores, self.name, self.taken = scores, name, taken
        self.origin, self.sources, self.spec = scores.origin, scores.sources, scores.spec

    def read(self, start: int, raw: Array) -> None:
        self.scores.read(start, raw)
        row = raw.view(np.float32)
        first = start // 8 * 8
        count = start - first + row.size
        for marks in self.taken:
            for bits in marks.bits(self.name, first, count):
                row[unpacked(bits, count)[start - first :]] = 0


@dataclass(frozen=True)
class Joined:
    """Several rankings side by side."""

    parts: tuple[Ranked, ...]

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return sum(part.columns for part in self.parts)

    def bits(self, name: str, start: int, count: int) -> Array:
        """The marks of some entries from a multiple of 8 on: uint8[columns, packed(count)]."""
        return np.concatenate([part.bits(name, start, count) for part in self.parts])


@dataclass(frozen=True)
class StoredMasks:
    """Stored masks, one a column."""

    masks: tuple[StoredMask, ...]

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return len(self.masks)

    def bits(self, name: str, start: int, count: int) -> Array:
        """The marks of some entries from a multiple of 8 on: uint8[columns, packed(count)]."""
        found = np.zeros((len(self.masks), packed(count)), np.uint8)
        for row, mask in zip(found, self.masks, strict=True):
            if name in mask.shapes:  # a tensor outside of the mask's space has no marks
                mask.read(name, start, row)
        return found


def check_mask(
    mask: StoredMask, model: Checkpoint, label: str, names: Sequence[str]
) -> dict[str, str]:
    """Hold a mask against its digest and the model that it is of; reads all of the mask, once.

    Returns the fingerprints that base and model must have.

    Raises:
        CheckpointError: the mask is damaged.
        MismatchError: it is a mask of other tensors.
    """
    check_shapes(mask, model, label)
    mask.check()
    beyond = sorted(mask.shapes.keys() - set(names))
    if beyond:
        raise MismatchError(
            f"{mask.path}: marks {listed(beyond)}, which the space of this recipe leaves "
            "out; give both recipes the same `space`"
        )
    prints = {"base": mask.about.get("base"), label: mask.about.get("model")}
    if is_graft(model.path):  # it has but the marked part of its model
        del prints[label]
    return {where: p for where, p in prints.items() if isinstance(p, str)}


def check_stats(
    stats: Stats, kinds: Sequence[str], context: Context, model: str, at: str
) -> dict[str, str]:
    """Hold statistics against the model that they are of; the fingerprint that it must have.

    Args:
        stats: what was measured.
        kinds: what is needed of it.
        context: of the merge.
        model: whose rows they were measured on.
        at: where they should have been measured, ``tuned`` or ``base``.

    Raises:
        RecipeError: a kind is missing.
        MismatchError: they are of other tensors, or were measured elsewhere.
    """
    held = context.sources.models[context.models.index(model)].specs
    stats.check(kinds, {n: context.sources.spec(n) for n in context.names if n in held})
    measured = stats.facts.get("at", at)
    if measured != at:
        raise MismatchError(
            f"{stats.where}: measured on the {measured} model; those of the {at} one belong here"
        )
    found = stats.facts.get("model")
    return {"base" if at == "base" else model: found} if isinstance(found, str) else {}


def agreed(
    expected: dict[str, str], more: Mapping[str, str], where: object, problems: Problems
) -> None:
    """Add fingerprints to those that are expected, and note where they contradict each other."""
    for label, found in more.items():
        if expected.setdefault(label, found) != found:
            problems.add(MismatchError, f"{where}: was made for another {label} than the others")


__all__ = [
    "Joined",
    "Ranked",
    "StoredMasks",
    "agreed",
    "buffers",
    "check_mask",
    "check_stats",
    "packed",
    "ranked",
    "unpacked",
]
