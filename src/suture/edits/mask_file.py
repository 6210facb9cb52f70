"""The file of a mask: packed bits by tensor, and what is counted of them piece by piece.

A safetensors file: the bits of each tensor as U8 under its name (bit i of byte j is entry 8 j + i),
its shape in the metadata, and before that ``format``, ``version`` and ``digest`` of the whole file.
Version 1, which told neither, had no digest; such files still open, their bits are then taken as
they are.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from suture.checkpoints.atomic import sync_folder
from suture.checkpoints.checkpoint import MEMORY, Array, Checkpoint, refuse_memory
from suture.checkpoints.checksum import BLANK, seal, unbroken
from suture.checkpoints.headers import read_header
from suture.checkpoints.memory import TensorCheckpoint
from suture.errors import CheckpointError, OutputError, SutureError, brief
from suture.tensors.spec import TensorSpec

FORMAT, VERSION = "suture.mask", "2"
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


class MaskOverlap(NamedTuple):
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


def marked(about: Mapping[str, Any], restricted: bool) -> dict[str, Any]:
    """What a file says of itself, with the mark of what must not be passed on where it has one."""
    return {**about, "restricted": True} if restricted else dict(about)


class Shared(NamedTuple):
    """What two masks of one tensor have in common."""

    size: int
    one: int
    other: int
    both: int


def overlap_of(counts: Mapping[str, Shared], *, seed: int = 0, draws: int = 1000) -> MaskOverlap:
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

    return MaskOverlap(index(both), index(mine * others / max(1, total)), index(expected),
                   index(float(low)), index(float(high)))  # fmt: skip


def _intersections(
    draw: np.random.Generator, size: int, a: int, b: int, draws: int
) -> np.ndarray[Any, Any]:
    if size < 10**9:
        return draw.hypergeometric(a, size - a, b, draws)
    mean = a * b / size  # numpy draws no larger ones; they are normal to many digits
    spread = (mean * (1 - a / size) * (size - b) / (size - 1)) ** 0.5
    return np.rint(draw.normal(mean, spread, draws)).astype(np.int64)


_DAMAGED = "the mask is damaged, fetch or make it again"
GRAFT = "suture.graft"
"""The format of a mask with the weights that it marks; see ``suture.edits.graft``."""


class StoredMask:
    """A mask on disk, read bit by bit when asked; only its header is read here.

    Raises:
        SutureError: the file is not a mask.
    """

    def __init__(self, path: Path) -> None:
        refuse_memory(str(path))
        metadata = read_header(path).metadata
        if metadata.get("format") not in (FORMAT, GRAFT):
            raise SutureError(f"{path}: not a mask")
        self.digest = metadata.get("digest")
        if metadata.get("version") not in (None, VERSION):
            version = brief(metadata["version"])
            raise SutureError(
                f"{path}: a mask of version {version}; this Suture reads version {VERSION}"
            )
        if self.digest is None and "version" in metadata:
            raise CheckpointError(f"{path}: its metadata has no digest; {_DAMAGED}")
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

    @classmethod
    def in_memory(
        cls, name: str, shapes: Mapping[str, tuple[int, ...]], bits: Mapping[str, Array],
        about: Mapping[str, Any],
    ) -> StoredMask:  # fmt: skip
        """Packed bits that lie in memory, read as those of a file are; see ``Mask.stored``."""
        made = cls.__new__(cls)
        made.path, made.digest = Path(f"{MEMORY}{name}"), None
        made.checkpoint = TensorCheckpoint(bits, name)
        made.about, made.shapes = dict(about), dict(shapes)
        made.restricted = made.checkpoint.restricted = about.get("restricted") is True
        return made

    def _add(self, name: str, text: str) -> None:
        words = text.split(",")
        if not all((w.isdecimal() and len(w) < 20) or not w for w in words):
            raise SutureError(f"{self.path}: the mask of {name} has no shape")
        shape = tuple(int(w) for w in words if w)
        spec = self.checkpoint.specs.get(name)
        if spec is None or spec.dtype != "U8" or spec.shape != (packed_bytes(shape),):
            bits = TensorSpec("BOOL", shape).numel
            raise SutureError(f"{self.path}: the mask of {name} does not have {bits} bits")
        self.shapes[name] = shape

    def check(self) -> None:
        """Read every byte; a file of version 1 has nothing to hold them against.

        Raises:
            CheckpointError: the bytes are not those that were written.
        """
        if self.digest is not None and not unbroken(self.checkpoint, self.digest):
            raise CheckpointError(
                f"{self.path}: its bytes do not have the digest that it states; {_DAMAGED}"
            )

    def read(self, name: str, start: int, out: Array) -> None:
        """Fill ``out`` (uint8) with packed bits from entry ``start``, a multiple of 8, on.

        Raises:
            SutureError: bits are set beyond the last entry, where no mask has any.
        """
        self.checkpoint.read_into(name, start // 8, out)
        beyond = start + 8 * out.size - TensorSpec("BOOL", self.shapes[name]).numel
        if beyond > 0 and out[-1] >> (8 - beyond):
            raise SutureError(f"{self.path}: damaged: the mask of {name} marks more than it has")

    def whole(self, name: str) -> Array:
        """The packed bits of a tensor."""
        bits = np.empty(packed_bytes(self.shapes[name]), np.uint8)
        self.read(name, 0, bits)
        return bits

    def count(self, name: str) -> int:
        """How many entries of a tensor are marked."""
        whole = packed_bytes(self.shapes[name])
        bits, total = np.empty(min(whole, _CHUNK), np.uint8), 0
        for at in range(0, whole, _CHUNK):
            part = bits[: min(_CHUNK, whole - at)]
            self.read(name, 8 * at, part)
            total += popcount(part)
        return total

    def overlap(self, other: StoredMask, *, seed: int = 0, draws: int = 1000) -> MaskOverlap:
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
        metadata = {"about": json.dumps(about)}
        metadata |= {f"shape {n}": ",".join(map(str, s)) for n, s in shapes.items()}
        kind = {"format": FORMAT if values is None else GRAFT, "version": VERSION, "digest": BLANK}
        specs = {n: TensorSpec("U8", (packed_bytes(shape),)) for n, shape in shapes.items()}
        header: dict[str, Any] = {"__metadata__": kind | dict(sorted(metadata.items()))}
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
            self._file = self._partial.open("w+b")
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
        try:
            with self._file:
                if kind is None:
                    seal(self._file)
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                self._partial.replace(self.path)
                sync_folder(self.path.parent)
        except OSError as error:
            kind = type(error)
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error
        finally:
            if kind is not None:
                self._partial.unlink(missing_ok=True)


__all__ = [
    "FORMAT", "GRAFT", "VERSION", "MaskFile", "MaskOverlap", "Shared", "StoredMask", "marked",
    "overlap_of", "packed_bytes", "popcount",
]  # fmt: skip
