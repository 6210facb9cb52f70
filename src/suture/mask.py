"""Masks: one bit an entry, by tensor; set algebra, overlap against chance, localization."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from suture import kernels
from suture.checkpoint import Array, Checkpoint, read_header
from suture.errors import OutputError, RecipeError, SutureError, did_you_mean
from suture.importance import Scoring, likely_rule, rule_named
from suture.select import SCOPES, Selection, exact_count, select
from suture.spec import TensorSpec
from suture.stats import Stats
from suture.stream import WEIGHT, Block, Progress, Sources, Visitor, sweep, tasks_of
from suture.vector import TaskVector

FORMAT = "suture.mask"
_CHUNK = 1 << 20
"""Bytes that are counted at once: they stay in the cache."""


def packed_bytes(shape: tuple[int, ...]) -> int:
    """Bytes that the mask of a tensor of this shape takes."""
    return -(-TensorSpec("BOOL", shape).numel // 8)


def popcount(
    bits: Array, other: Array | None = None, how: Callable[..., Array] | None = None
) -> int:
    """How many bits are set in ``bits``, or in ``how(bits, other)``, piece by piece."""
    total = 0
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK]
        if other is not None and how is not None:
            part = how(part, other[start : start + _CHUNK])
        whole = part.size // 8 * 8
        words = np.ascontiguousarray(part[:whole]).view(np.uint64)
        total += int(np.bitwise_count(words).sum(dtype=np.int64))
        total += int(np.bitwise_count(part[whole:]).sum(dtype=np.int64))
    return total


class Overlap(NamedTuple):
    """How much two masks share, beside what chance gives."""

    jaccard: float
    """Size of the intersection over size of the union."""
    independent: float
    """Expected of masks of the same two densities, drawn over the whole space: ``s / (2 - s)`` for
    equal densities ``s``."""
    matched: float
    """Expected when each mask is permuted within every tensor: what the profile over tensors, for
    example a liking for tensors of large changes, explains alone."""
    low: float
    """Lower end of the 95 % interval of that null."""
    high: float
    """Upper end of the 95 % interval of that null."""


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

    def overlap(self, other: Mask, *, seed: int = 0, draws: int = 1000) -> Overlap:
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

    def save(self, path: Path) -> None:
        """Write the mask as a safetensors file: bits as U8, shapes in the metadata.

        Raises:
            OutputError: it cannot be written.
        """
        with MaskFile(Path(path), self.shapes, self.about) as file:
            for name, bits in self.bits.items():
                file.put(name, 0, bits)

    @classmethod
    def load(cls, path: Path) -> Mask:
        """Read a mask that ``save`` wrote, or the mask in a file of marked weights.

        Raises:
            SutureError: the file is not a mask.
        """
        stored = StoredMask(Path(path))
        return cls(stored.shapes, {n: stored.checkpoint[n] for n in stored.shapes}, stored.about)


def marked(about: Mapping[str, Any], restricted: bool) -> dict[str, Any]:
    """What a file says of itself, with the mark of what must not be passed on where it has one."""
    return {**about, "restricted": True} if restricted else dict(about)


class Shared(NamedTuple):
    """What two masks of one tensor have in common."""

    size: int
    one: int
    other: int
    both: int


def overlap_of(counts: Mapping[str, Shared], *, seed: int = 0, draws: int = 1000) -> Overlap:
    """The overlap of two masks from their counts, by tensor; see ``Mask.overlap``."""
    total, mine, others, both = (sum(c[i] for c in counts.values()) for i in range(4))
    draw = np.random.Generator(np.random.Philox(seed))
    shared = np.zeros(draws, np.int64)
    for _, c in sorted(counts.items()):
        shared += _intersections(draw, c.size, c.one, c.other, draws)
    expected = sum(c.one * c.other / max(1, c.size) for c in counts.values())
    low, high = np.quantile(shared, [0.025, 0.975]) if draws else (expected, expected)

    def index(common: float) -> float:
        union = mine + others - common
        return float(common / union) if union else 0.0

    return Overlap(index(both), index(mine * others / max(1, total)), index(expected),
                   index(float(low)), index(float(high)))  # fmt: skip


def _intersections(
    draw: np.random.Generator, size: int, a: int, b: int, draws: int
) -> np.ndarray[Any, Any]:
    if size < 10**9:
        return draw.hypergeometric(a, size - a, b, draws)
    mean = a * b / size  # numpy draws no larger ones; they are normal to many digits
    spread = (mean * (1 - a / size) * (size - b) / (size - 1)) ** 0.5
    return np.rint(draw.normal(mean, spread, draws)).astype(np.int64)


GRAFT = "suture.graft"
"""The format of a mask with the weights that it marks; see ``suture.graft``."""


class StoredMask:
    """A mask on disk, read bit by bit when asked; only its header is read here.

    Raises:
        SutureError: the file is not a mask.
    """

    def __init__(self, path: Path) -> None:
        metadata = read_header(path).metadata
        if metadata.get("format") not in (FORMAT, GRAFT):
            raise SutureError(f"{path}: not a mask")
        self.path = path
        self.checkpoint = Checkpoint(path, str(path), [path])
        self.about = _about(path, metadata)
        self.restricted = self.about.get("restricted") is True
        self.checkpoint.restricted = self.restricted
        self.shapes: dict[str, tuple[int, ...]] = {}
        for key, text in metadata.items():
            if key.startswith("shape "):
                self._add(key.removeprefix("shape "), text)
        if metadata["format"] == FORMAT:
            for name in self.checkpoint.specs.keys() - self.shapes.keys():
                raise SutureError(f"{path}: the mask of {name} has no shape")

    def _add(self, name: str, text: str) -> None:
        words = text.split(",")
        if not all(w.isdecimal() or not w for w in words):
            raise SutureError(f"{self.path}: the mask of {name} has no shape")
        shape = tuple(int(w) for w in words if w)
        spec = self.checkpoint.specs.get(name)
        if spec is None or spec.dtype != "U8" or spec.shape != (packed_bytes(shape),):
            bits = TensorSpec("BOOL", shape).numel
            raise SutureError(f"{self.path}: the mask of {name} does not have {bits} bits")
        self.shapes[name] = shape

    def read(self, name: str, start: int, out: Array) -> None:
        """Fill ``out`` (uint8) with packed bits from entry ``start``, a multiple of 8, on."""
        self.checkpoint.read_into(name, start // 8, out)

    def count(self, name: str) -> int:
        """How many entries of a tensor are marked."""
        whole = packed_bytes(self.shapes[name])
        bits, total = np.empty(min(whole, _CHUNK), np.uint8), 0
        for at in range(0, whole, _CHUNK):
            part = bits[: min(_CHUNK, whole - at)]
            self.read(name, 8 * at, part)
            total += popcount(part)
        return total

    def overlap(self, other: StoredMask, *, seed: int = 0, draws: int = 1000) -> Overlap:
        """As ``Mask.overlap``, in the memory of two pieces.

        Raises:
            SutureError: the masks are those of other tensors.
        """
        if self.shapes != other.shapes:
            raise SutureError("masks combine only over the same tensors")
        one, two = np.empty(_CHUNK, np.uint8), np.empty(_CHUNK, np.uint8)
        counts = {}
        for name, shape in self.shapes.items():
            found = np.zeros(3, np.int64)
            for at in range(0, packed_bytes(shape), _CHUNK):
                size = min(_CHUNK, packed_bytes(shape) - at)
                self.read(name, 8 * at, one[:size])
                other.read(name, 8 * at, two[:size])
                found += (
                    popcount(one[:size]),
                    popcount(two[:size]),
                    popcount(one[:size], two[:size], np.bitwise_and),
                )
            counts[name] = Shared(TensorSpec("BOOL", shape).numel, *map(int, found))
        return overlap_of(counts, seed=seed, draws=draws)


def _about(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get("about", "{}"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SutureError(f"{path}: damaged: what it says of itself is not JSON")
    return found


class MaskFile:
    """Writes packed bits, and what goes with them, straight to their place in a new file.

    The file appears whole or not at all: under its name when the block ends without an error.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        about: Mapping[str, Any],
        values: Mapping[str, TensorSpec] | None = None,
    ) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._lock = threading.Lock()
        metadata = {"format": FORMAT if values is None else GRAFT, "about": json.dumps(about)}
        metadata |= {f"shape {n}": ",".join(map(str, s)) for n, s in shapes.items()}
        specs = {n: TensorSpec("U8", (packed_bytes(shape),)) for n, shape in shapes.items()}
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
        self._places: dict[str, int] = {}
        end = 0
        # Wide dtypes first, so that every tensor is aligned to its own width.
        for name, spec in [*(values or {}).items(), *sorted(specs.items())]:
            span = [end, end + spec.nbytes]
            header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": span}
            self._places[name], end = span
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("wb")
            self._file.write(len(text).to_bytes(8, "little") + text)
            self._file.truncate(self._start + end)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error

    def put(self, name: str, at: int, raw: Array) -> None:
        """Write bytes from byte ``at`` of a tensor on; from any thread."""
        try:
            with self._lock:
                self._file.seek(self._start + self._places[name] + at)
                self._file.write(np.ascontiguousarray(raw).data)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error

    def __enter__(self) -> MaskFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None:
            self._partial.replace(self.path)
        else:
            self._partial.unlink(missing_ok=True)


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
            kernels.pack_selected(block.rows[0], start, stop, int(keys[0]), part, start)
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
    if scoring.rule.name == "magnitude" and not scoring.rule.needs:
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
    found = likely_rule(rule)
    try:
        rule_named(rule)
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
    threads: int | None = None,
) -> Mask:
    """The entries of a task vector that matter most by a rule; exactly ``round(density * n)``.

    Ties are broken by position. Entries that cannot matter, whose score is 0 by a rule without
    signs, are never kept, even if fewer are left.

    Args:
        vector: tuned minus base, over the tensors that compete.
        rule: one of ``RULES``; ``magnitude`` needs no data (He et al. 2025, arXiv:2408.13656).
        density: the share to keep, in (0, 1]; may be left out with ``positive``.
        scope: whether entries compete over all tensors (``global``), a ``layer``, a ``tensor``.
        stats: what the rule needs, from ``measure``, or the file it was saved to.
        positive: keep only entries whose score is above 0 (rules with a sign).
        seed: of the rule ``random``.
        label: the name of the model, from which ``random`` draws another mask for each.
        threads: default every core; changes no bit.

    Raises:
        RecipeError: no such rule or scope, ``density`` is not in (0, 1], statistics are missing.
        MismatchError: the statistics are those of other tensors.
    """
    if isinstance(stats, str | Path):
        stats = Stats.load(Path(stats))
    for problem in check_question(rule, density, scope, stats, positive):
        raise RecipeError(problem)
    if len(vector.terms) != 1:
        raise RecipeError("localize one task vector at a time, not a sum of them")
    specs = {n: vector.base.specs[n] for n in vector.names}
    found = rule_named(rule)
    if stats is not None:
        stats.check(found.needs, specs)
    tuned, factor = vector.terms[0]
    scoring = Scoring(found, vector.base, tuned, stats, seed, label, positive, factor)
    shapes = {n: spec.shape for n, spec in specs.items()}
    bits = {n: np.zeros(packed_bytes(shape), np.uint8) for n, shape in shapes.items()}

    def sink(name: str, at: int, part: Array) -> None:
        bits[name][at : at + part.size] = part

    share = 1.0 if density is None else density
    located = locate(scoring, vector.names, share, scope, sink, threads=threads)
    about = {"rule": rule, "scope": scope, "density": density, "tied": located.tied}
    restricted = vector.base.restricted or tuned.restricted
    restricted = restricted or (stats is not None and stats.restricted)
    return Mask(shapes, bits, marked(about, restricted))


__all__ = [
    "FORMAT",
    "GRAFT",
    "Located",
    "Mask",
    "MaskFile",
    "Overlap",
    "Shared",
    "StoredMask",
    "check_question",
    "localize",
    "locate",
    "marked",
    "overlap_of",
    "packed_bytes",
    "popcount",
]  # fmt: skip
