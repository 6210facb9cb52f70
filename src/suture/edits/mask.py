"""Masks: one bit an entry, by tensor; set algebra, overlap against chance, localization."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from suture.checkpoints.checkpoint import Array
from suture.edits.importance import RULES, Scoring
from suture.edits.mask_file import (
    MaskFile,
    MaskOverlap,
    Shared,
    StoredMask,
    marked,
    overlap_of,
    packed_bytes,
    popcount,
)
from suture.edits.stats import Stats
from suture.errors import MismatchError, RecipeError, SutureError, did_you_mean
from suture.kernels import compiled
from suture.stream.sweep import WEIGHT, Block, Progress, Sources, Visitor, sweep, tasks_of
from suture.stream.topk import SCOPES, Selection, exact_count, select
from suture.stream.vector import TaskVector
from suture.tensors.spec import TensorSpec


class Mask:
    """A set of entries of named tensors, one bit each (bit i of byte j is entry 8 j + i).

    ``&``, ``|``, ``-`` and ``~`` are those of sets, over the same tensors.

    Examples:
        >>> import numpy as np, suture
        >>> one = suture.Mask.of({"w": np.array([True, True, False, False])})
        >>> two = suture.Mask.of({"w": np.array([True, False, True, False])})
        >>> (one & two)["w"].tolist()
        [True, False, False, False]
        >>> (~one).count, round(one.jaccard(two), 3)
        (2, 0.333)
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
        """How it was made and of what, for those who read the file; set algebra drops it, but for
        the mark ``restricted``."""

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

    def read(self, name: str, start: int, out: Array) -> None:
        """Fill ``out`` (uint8) with packed bits from entry ``start``, a multiple of 8, on."""
        out[:] = self.bits[name][start // 8 :][: out.size]

    @property
    def restricted(self) -> bool:
        """Whether it, and what is made with it, must not be passed on."""
        return self.about.get("restricted") is True

    def _same(self, other: object) -> Mask:
        if not isinstance(other, Mask) or self.shapes != other.shapes:
            raise SutureError("masks combine only over the same tensors")
        return other

    def _combined(self, other: Mask, how: Callable[[Array, Array], Array]) -> Mask:
        theirs = self._same(other).bits
        bits = {n: how(b, theirs[n]) for n, b in self.bits.items()}
        return Mask(self.shapes, bits, marked({}, self.restricted or other.restricted))

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
        return Mask(self.shapes, found, marked({}, self.restricted))

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
        return sum(popcount(b) for b in self.bits.values())

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
        theirs = self._same(other).bits
        union = sum(popcount(b, theirs[n], np.bitwise_or) for n, b in self.bits.items())
        both = sum(popcount(b, theirs[n], np.bitwise_and) for n, b in self.bits.items())
        return both / union if union else 0.0

    def overlap(self, other: Mask, *, seed: int = 0, draws: int = 1000) -> MaskOverlap:
        """The Jaccard index beside its two nulls; ``draws`` permutations are drawn for the second.

        Permuting a mask within a tensor of ``N`` entries makes the intersection of ``a`` and ``b``
        marked entries hypergeometric, so that it is drawn without permuting anything.
        """
        theirs = self._same(other).bits
        counts = {}
        for name, bits in self.bits.items():
            both = popcount(bits, theirs[name], np.bitwise_and)
            size = TensorSpec("BOOL", self.shapes[name]).numel
            counts[name] = Shared(size, popcount(bits), popcount(theirs[name]), both)
        return overlap_of(counts, seed=seed, draws=draws)

    def __repr__(self) -> str:
        tensors = f"{len(self.shapes)} tensor{'' if len(self.shapes) == 1 else 's'}"
        return f"Mask({self.count:,} of {self.size:,} entries, {self.density:.3%}, {tensors})"

    def stored(self) -> StoredMask:
        """The mask as merges read one, by pieces; its bits stay where they are."""
        return StoredMask.in_memory(self.name, self.shapes, self.bits, self.about)

    @property
    def name(self) -> str:
        """What records call it where it is in no file: ``mask-`` and a digest of its bits."""
        digest = hashlib.blake2b(digest_size=8)
        for name, bits in sorted(self.bits.items()):
            digest.update(f"{name} {self.shapes[name]}".encode())
            digest.update(np.ascontiguousarray(bits).data)
        return f"mask-{digest.hexdigest()}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as a safetensors file, with a digest of all of it; see ``maskfile``.

        Raises:
            OutputError: it cannot be written.
        """
        with MaskFile(Path(path), self.shapes, self.about) as file:
            for name, bits in self.bits.items():
                file.put(name, 0, bits)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read a mask that ``save`` wrote, or the mask in a file of marked weights.

        Raises:
            SutureError: the file is not a mask.
        """
        stored = StoredMask(Path(path))
        stored.check()
        return cls(stored.shapes, {n: stored.whole(n) for n in stored.shapes}, stored.about)


def stored_mask(source: str | os.PathLike[str] | Mask) -> StoredMask:
    """A mask as merges read one, of a file or of a mask in memory.

    Raises:
        SutureError: the file is not a mask, or it is none.
    """
    if isinstance(source, Mask):
        return source.stored()
    if not isinstance(source, str | os.PathLike):
        raise SutureError(f"a mask, or the file of one, not {type(source).__name__}")
    return StoredMask(Path(source))


Sink = Callable[[str, int, Array], None]


class _Packing(Visitor[Array]):
    def __init__(self, selection: Selection, sink: Sink) -> None:
        self.selection, self.sink = selection, sink
        self.counts: dict[str, int] = {}
        self.lock = threading.Lock()

    def local(self) -> Array:
        return np.zeros(0, np.uint8)

    def see(self, local: Array, block: Block) -> None:
        # A block starts at a multiple of 8 elements, so no two threads share a byte.
        part = np.zeros(-(-block.count // 8), np.uint8)
        for start, stop, keys in self.selection.segments(block):
            compiled.pack_selected(block.rows[0], start, stop, int(keys[0]), part, start)
        self.sink(block.name, block.start // 8, part)
        count = popcount(part)
        with self.lock:
            self.counts[block.name] = self.counts.get(block.name, 0) + count


@dataclass(frozen=True)
class Located:
    """What a localization found, without the bits."""

    counts: Mapping[str, int]
    """Entries kept, by tensor."""
    sizes: Mapping[str, int]
    """Entries there are, by tensor."""
    wanted: int
    """``round(density * n)``, summed over the groups of the scope."""
    tied: int
    """Entries whose score equals a threshold; some are kept, some not."""

    @property
    def kept(self) -> int:
        """Entries kept: fewer than wanted where the rest have no importance at all."""
        return sum(self.counts.values())

    @property
    def density(self) -> float:
        """The share kept."""
        return self.kept / max(1, sum(self.sizes.values()))


def locate(
    scoring: Scoring,
    names: tuple[str, ...],
    density: float,
    scope: str,
    sink: Sink,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Located:
    """Rank every entry, and hand the packed bits of those that are kept to ``sink``.

    Raises:
        NonFiniteError: a model or the statistics hold NaN or infinity.
    """
    specs = {n: scoring.base.specs[n] for n in names}
    if scoring.rule is RULES["magnitude"] and scoring.factor and scoring.without is None:
        sources = Sources((scoring.tuned,), scoring.base)  # a delta's magnitude needs no view
    else:
        sources = Sources((scoring.view(names),), how=WEIGHT)
    selection = select(sources, names, lambda _: [density], scope=scope, threads=threads,
                       progress=progress)  # fmt: skip
    packing = _Packing(selection, sink)
    sweep(sources, tasks_of(names, specs), packing, threads=threads, progress=progress)
    wanted = sum(exact_count(density, size) for size in selection.sizes.values())
    sizes = {n: spec.numel for n, spec in specs.items()}
    counts = {n: packing.counts.get(n, 0) for n in names}
    return Located(counts, sizes, wanted, selection.tied()[0])


def check_question(
    rule: str, density: float | None, scope: str, stats: Stats | None, positive: bool
) -> Iterator[str]:
    """What is wrong with the words of a localization, a line each."""
    found = RULES.likely(rule)
    try:
        RULES.find(rule)
    except RecipeError as error:
        yield f"rule: {error}"
    if scope not in SCOPES:
        yield f"scope: no scope {scope!r}; {did_you_mean(str(scope), SCOPES)}"
    if density is None and not positive:
        yield "density: missing; give the share of entries to keep, or keep all `positive` scores"
    if density is not None and not 0 < density <= 1:
        yield f"density is the share of entries kept, in (0, 1]; got {density}"
    if positive and found is not None and not found.signed:
        signed = "first_order, learned"
        yield f"positive: the scores of {rule} are never negative; only {signed} have a sign"
    if found is not None and found.needs and stats is None:
        yield f"the rule {rule} needs statistics: {', '.join(found.needs)}"


def check_without(mask: Mask | StoredMask, specs: Mapping[str, TensorSpec]) -> None:
    """Check that the entries of a mask are entries of tensors that compete.

    Raises:
        MismatchError: none of its tensors is one of them, or one has another shape there.
    """
    where = mask.path if isinstance(mask, StoredMask) else "the mask"
    common = [n for n in mask.shapes if n in specs]
    if not common:
        raise MismatchError(f"{where}: has none of the tensors that compete")
    for name in common:
        if mask.shapes[name] != specs[name].shape:
            raise MismatchError(
                f"{where}: {name} has the shape {mask.shapes[name]}, not {specs[name].shape}"
            )


def localize(  # noqa: PLR0913  every word of the question
    vector: TaskVector,
    rule: str = "magnitude",
    *,
    density: float | None = None,
    scope: str = "global",
    stats: Stats | Path | str | None = None,
    positive: bool = False,
    seed: int = 0,
    label: str = "",
    without: Mask | StoredMask | None = None,
    threads: int | None = None,
) -> Mask:
    """Return the entries of a task vector that matter most by a rule: ``round(density * n)``.

    Arguments and errors are those of ``suture.localize``.
    """
    if isinstance(stats, str | Path):
        stats = Stats.load(Path(stats))
    for problem in check_question(rule, density, scope, stats, positive):
        raise RecipeError(problem)
    if len(vector.terms) != 1:
        raise RecipeError("localize one task vector at a time, not a sum of them")
    specs = {n: vector.base.specs[n] for n in vector.names}
    found = RULES.find(rule)
    if stats is not None:
        stats.check(found.needs, specs)
    if without is not None:
        check_without(without, specs)
        if isinstance(without, StoredMask):
            without.check()
    tuned, factor = vector.terms[0]
    scoring = Scoring(found, vector.base, tuned, stats, seed, label, positive, factor, without)
    shapes = {n: spec.shape for n, spec in specs.items()}
    bits = {n: np.zeros(packed_bytes(shape), np.uint8) for n, shape in shapes.items()}

    def sink(name: str, at: int, part: Array) -> None:
        bits[name][at : at + part.size] = part

    share = 1.0 if density is None else density
    located = locate(scoring, vector.names, share, scope, sink, threads=threads)
    about = {"rule": rule, "scope": scope, "density": density, "tied": located.tied}
    restricted = vector.base.restricted or tuned.restricted
    restricted = restricted or any(x is not None and x.restricted for x in (stats, without))
    return Mask(shapes, bits, marked(about, restricted))


__all__ = [
    "Located",
    "Mask",
    "check_question",
    "check_without",
    "localize",
    "locate",
    "stored_mask",
]
