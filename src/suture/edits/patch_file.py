"""The file of a patch: which entries it replaces, by what, and what stood there before.

One safetensors file. Each tensor that is touched has three in the file, and a fourth if it is
longer than a piece (2**20 entries)::

    at:NAME      U8         positions, piece by piece
    old:NAME     its dtype  the entries of the base, in order of position
    new:NAME     its dtype  the entries that replace them
    pieces:NAME  U32[p, 2]  entries, and bytes of positions, of each piece

The positions of a piece are *gaps* (how many entries lie between one and the next, 7 bits a byte,
the lowest first, the high bit set on all but the last byte) or, where that takes no fewer bytes, a
*bitmap* (bit i of byte j is entry 8 j + i); the number of bytes tells which. Within a piece no gap
takes more than 3 bytes, so that 4-byte indices could never be smaller.

Old and new bits are both kept, and not only their exclusive or, which alone would do to apply and
to revert on the very base: for one hundredth of the model's size more at a density of 1 %, the
patch is a task vector by itself. It is scaled, averaged and inverted without its base, every entry
that it replaces is checked first, and it can be added to another model. No arithmetic touches the
bits, so payloads of NaN, -0.0 and infinities come back as they were.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from suture.checkpoints.atomic import locked, sync_folder
from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.checksum import BLANK, unbroken
from suture.checkpoints.headers import parse_object, read_header
from suture.errors import CheckpointError, OutputError, brief
from suture.tensors.spec import DTYPES, PIECE, TensorSpec, pieces_of

Array = np.ndarray[Any, Any]
FORMAT, VERSION = "suture.patch", "1"


class Entries(NamedTuple):
    """Some entries of one piece, as raw bits."""

    at: Array
    """uint32[k]: positions in the piece, ascending."""
    old: Array
    """The entries of the base, unsigned integers as wide as the dtype."""
    new: Array
    """What replaces them."""
    delta: Array | None = None
    """float32[k], where ``new`` was computed as old + delta; otherwise it is new - old."""


def bits_of(dtype: str) -> np.dtype[Any]:
    """The unsigned integers that hold the bits of a dtype."""
    return np.dtype(f"<u{DTYPES[dtype].itemsize}")


def nothing(dtype: str) -> Entries:
    """No entries."""
    return Entries(np.zeros(0, np.uint32), *(np.zeros(0, bits_of(dtype)) for _ in range(2)))


def encode(at: Array, size: int) -> Array:
    """The positions ``at`` (ascending) in a piece of ``size`` entries, as bytes: uint8."""
    gaps: Array = np.diff(at.astype(np.int64), prepend=-1) - 1
    lengths = 1 + (gaps >= 1 << 7) + (gaps >= 1 << 14)
    total = int(lengths.sum())
    if total >= -(-size // 8):
        chosen = np.zeros(size, bool)
        chosen[at] = True
        return np.packbits(chosen, bitorder="little")
    raw = np.zeros(total, np.uint8)
    starts = np.cumsum(lengths) - lengths
    for byte in range(3):
        here = lengths > byte
        more = (lengths[here] > byte + 1) * 128
        raw[starts[here] + byte] = (gaps[here] >> 7 * byte) & 127 | more
    return raw


def decode(raw: Array, size: int, count: int) -> Array:
    """The positions in a piece of ``size`` entries: uint32[count].

    Raises:
        ValueError: the bytes are no positions, or not so many.
    """
    bitmap = -(-size // 8)
    if raw.size > bitmap:
        raise ValueError(f"{raw.size} bytes of positions, more than the bitmap's {bitmap}")
    if raw.size == bitmap:
        chosen = np.unpackbits(raw, bitorder="little")
        at = np.flatnonzero(chosen)
    else:
        at = np.cumsum(_gaps(raw) + 1) - 1
    if at.size and at[-1] >= size:
        raise ValueError(f"position {at[-1]} in a piece of {size} entries")
    if at.size != count:
        raise ValueError(f"{at.size} positions for {count} entries")
    return at.astype(np.uint32)


def _gaps(raw: Array) -> Array:
    ends = np.flatnonzero(raw < 128)
    if raw.size and (not ends.size or ends[-1] != raw.size - 1):
        raise ValueError("the last gap is cut short")
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])[: ends.size]
    lengths = ends - starts + 1
    if (lengths > 3).any() or ((raw[ends] == 0) & (lengths > 1)).any():
        raise ValueError("a gap is written with too many bytes")
    gaps = np.zeros(ends.size, np.int64)
    for byte in range(3):
        here = lengths > byte
        gaps[here] |= (raw[starts[here] + byte].astype(np.int64) & 127) << 7 * byte
    return gaps


class Spool:
    """Takes the entries of pieces in any order, from any thread, until all of them are known.

    They wait in a file without a name, which vanishes with the process, however that ends.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by close()
        except OSError as error:
            raise OutputError(f"{folder}: cannot write there: {error.strerror}") from None
        self._lock = threading.Lock()
        self._end = 0
        self._places: dict[str, dict[int, tuple[int, int, int]]] = {}
        """Offset, entries and bytes of positions, by tensor and number of the piece."""

    def add(self, name: str, number: int, size: int, entries: Entries) -> None:
        """Keep the entries of one piece of ``size``."""
        if not entries.at.size:
            return
        at = encode(entries.at, size)
        raw = at.tobytes() + entries.old.tobytes() + entries.new.tobytes()
        with self._lock:
            try:
                self._file.seek(self._end)
                self._file.write(raw)
            except OSError as error:
                raise OutputError(f"no room to gather the patch: {error.strerror}") from None
            place = (self._end, entries.at.size, at.size)
            self._places.setdefault(name, {})[number] = place
            self._end += len(raw)

    @property
    def names(self) -> list[str]:
        """The tensors of which some entries are kept, sorted."""
        return sorted(self._places)

    def counts(self, name: str, spec: TensorSpec) -> Array:
        """Entries, and bytes of positions, of each piece of a tensor: uint32[pieces, 2]."""
        table = np.zeros((len(pieces_of(name, spec.numel)), 2), np.uint32)
        for number, (_, entries, nbytes) in self._places[name].items():
            table[number] = entries, nbytes
        return table

    def parts(self, kind: str, name: str, spec: TensorSpec) -> Iterator[bytes]:
        """What stands in the file under ``kind:name``, part by part."""
        if kind == "pieces":
            yield self.counts(name, spec).astype("<u4").tobytes()
            return
        width = DTYPES[spec.dtype].itemsize
        for _, (offset, entries, nbytes) in sorted(self._places[name].items()):
            first = {"at": 0, "old": nbytes, "new": nbytes + entries * width}[kind]
            self._file.seek(offset + first)
            yield self._file.read(nbytes if kind == "at" else entries * width)

    def close(self) -> None:
        """Let go of everything."""
        self._file.close()


def layout(spool: Spool, specs: Mapping[str, TensorSpec]) -> dict[tuple[str, str], TensorSpec]:
    """What will stand in the file, by kind and tensor, in that order: wider dtypes first."""
    found: dict[tuple[str, str], TensorSpec] = {}
    for name in spool.names:
        table = spool.counts(name, specs[name]).astype(np.int64)
        entries, nbytes = (int(x) for x in table.sum(0))
        found["at", name] = TensorSpec("U8", (nbytes,))
        found["old", name] = found["new", name] = TensorSpec(specs[name].dtype, (entries,))
        if len(table) > 1:
            found["pieces", name] = TensorSpec("U32", table.shape)
    order = sorted(found, key=lambda key: (-DTYPES[found[key].dtype].bits, key[1], key[0]))
    return {key: found[key] for key in order}


def _head(held: Mapping[tuple[str, str], TensorSpec], facts: Mapping[str, Any]) -> bytes:
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "digest": BLANK,
        "patch": json.dumps(facts, separators=(",", ":"), sort_keys=True, ensure_ascii=False),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for (kind, name), spec in held.items():
        header[f"{kind}:{name}"] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_patch(
    path: Path,
    spool: Spool,
    specs: Mapping[str, TensorSpec],
    facts: Mapping[str, Any],
    *,
    overwrite: bool,
) -> int:
    """Write what was spooled as a patch; it appears whole or not at all. Returns its bytes.

    Raises:
        OutputError: the file cannot be written, another process is writing it, or one appeared
            meanwhile and must not be replaced.
    """
    fresh = path.with_name(f".{path.name}.part")
    held = layout(spool, specs)
    head = _head(held, facts)
    try:
        file = os.open(fresh, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
    except OSError as error:
        raise OutputError(f"{path}: cannot write there: {error.strerror}") from None
    try:
        with os.fdopen(file, "r+b") as out:
            if not locked(file):
                raise BlockingIOError
            if not os.path.samestat(fresh.stat(), os.fstat(file)):
                raise BlockingIOError  # it was renamed between opening and locking: not ours
            out.truncate(0)
            out.write(head)
            state = xxhash.xxh3_128(head)
            for kind, name in held:
                for part in spool.parts(kind, name, specs[name]):
                    out.write(part)
                    state.update(part)
            size = out.tell()
            out.seek(head.index(BLANK.encode()))
            out.write(state.hexdigest().encode())
            out.flush()
            os.fsync(file)
            _take_place(fresh, path, overwrite)
        sync_folder(path.parent)
    except FileExistsError:
        fresh.unlink()
        raise OutputError(f"{path}: appeared meanwhile; it was left alone") from None
    except (BlockingIOError, FileNotFoundError):
        raise OutputError(f"{path}: another process is writing it just now") from None
    except BaseException as error:
        with suppress(OSError):
            fresh.unlink()
        if isinstance(error, OSError):
            raise OutputError(f"{path}: {error.strerror}") from None
        raise
    return size


def _take_place(fresh: Path, path: Path, overwrite: bool) -> None:
    """Rename a file; over another one only if that is meant.

    Raises:
        FileExistsError: there is one, and it must stay.
    """
    if overwrite:
        fresh.replace(path)
        return
    try:
        os.link(fresh, path)  # unlike a rename, never over another file
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        if path.exists():
            raise FileExistsError from None
        fresh.replace(path)
    else:
        fresh.unlink()


def is_patch(checkpoint: Checkpoint) -> bool:
    """Whether a file that was opened as a checkpoint is a patch."""
    path = checkpoint.path
    alone = len(checkpoint.files) == 1 and path.is_file() and path.suffix == ".safetensors"
    return alone and read_header(checkpoint.path).metadata.get("format") == FORMAT


class PatchFile:
    """An open patch: its header was checked; ``check`` reads the rest.

    Raises:
        CheckpointError: the file is no patch, or one that contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held = Checkpoint(path.resolve(), str(path), [path.resolve()])
        self.nbytes = path.stat().st_size
        metadata = read_header(path).metadata
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not a patch; `suture patch make` writes one")
        if metadata.get("version") != VERSION:
            version = brief(metadata.get("version"))
            raise CheckpointError(
                f"{path}: a patch of version {version}; this Suture reads version {VERSION}"
            )
        self.digest = metadata.get("digest", "")
        self.facts = parse_object(metadata.get("patch", "").encode(), f"{path}: its metadata")
        self.specs: dict[str, TensorSpec] = {}
        """The tensors that are touched, sorted, as the base has them."""
        for name, entry in sorted(self._tensors().items()):
            self.specs[name] = self._spec(name, entry)
        self._check_names()
        self.tables = {name: self._table(name) for name in self.specs}
        """Offsets of entries and of bytes of positions, of each piece and of the end."""

    def _wrong(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}; the patch is damaged, fetch or make it again")

    def _tensors(self) -> dict[str, Any]:
        found = self.facts.get("tensors")
        if not isinstance(found, dict) or not found:
            raise self._wrong("its metadata names no tensors")
        texts = [self.facts.get("base"), self.facts.get("result")]
        for entry in found.values():
            if not isinstance(entry, dict):
                raise self._wrong("its metadata has no facts of a tensor")
            texts += [entry.get("old"), entry.get("new")]
        if not all(t is None or isinstance(t, str) for t in texts):
            raise self._wrong("a fingerprint in its metadata is no text")
        if not isinstance(self.facts.get("restricted"), bool):
            raise self._wrong("its metadata does not say whether it is restricted")
        return found

    def _spec(self, name: str, entry: Mapping[str, Any]) -> TensorSpec:
        shape = entry.get("shape")
        if not isinstance(shape, list) or not all(
            type(s) is int and 0 < s < 1 << 60 for s in shape
        ):
            raise self._wrong(f"the shape of {name} is {brief(shape)}")
        kinds = [self.held.specs.get(f"{kind}:{name}") for kind in ("at", "old", "new")]
        at, old, new = kinds
        if at is None or old is None or new is None:
            raise self._wrong(f"{name} lacks its positions, old or new entries")
        if old != new or len(old.shape) != 1 or at.dtype != "U8" or len(at.shape) != 1:
            raise self._wrong(f"{name} has old entries {old}, new {new} and positions {at}")
        return TensorSpec(new.dtype, tuple(shape))

    def _check_names(self) -> None:
        kinds = ("at", "old", "new")
        wanted = {f"{kind}:{name}" for name in self.specs for kind in kinds}
        wanted |= {f"pieces:{n}" for n, spec in self.specs.items() if spec.numel > PIECE}
        if wanted != self.held.specs.keys():
            odd = sorted(wanted ^ self.held.specs.keys())
            raise self._wrong(f"{brief(odd[0])} is missing, or belongs to nothing")

    def _table(self, name: str) -> Array:
        at, new = (self.held.specs[f"{kind}:{name}"] for kind in ("at", "new"))
        pieces = -(-self.specs[name].numel // PIECE)
        total = np.array([new.numel, at.numel])
        table = np.zeros((2, 2), np.int64)
        table[1] = total
        if pieces > 1:
            spec = self.held.specs[f"pieces:{name}"]
            if spec != TensorSpec("U32", (pieces, 2)):
                raise self._wrong(f"{name} has {pieces} pieces, but its table is {spec}")
            raw = np.empty(spec.nbytes, np.uint8)
            self.held.read_into(f"pieces:{name}", 0, raw)
            table = np.zeros((pieces + 1, 2), np.int64)
            np.cumsum(raw.view("<u4").reshape(-1, 2), axis=0, out=table[1:])
        if not new.numel or (table[-1] != total).any():
            raise self._wrong(f"the counts of {name} do not add up")
        return table

    def count(self, name: str) -> int:
        """Entries of a tensor that are replaced."""
        return int(self.tables[name][-1, 0])

    def positions(self, name: str, number: int) -> Array:
        """The positions in one piece: uint32[k].

        Raises:
            CheckpointError: they are not in order, not in the tensor, or not as many as entries.
        """
        (first, start), (last, stop) = self.tables[name][number : number + 2].tolist()
        raw = np.empty(stop - start, np.uint8)
        self.held.read_into(f"at:{name}", start, raw)
        size = min(PIECE, self.specs[name].numel - number * PIECE)
        try:
            return decode(raw, size, last - first)
        except ValueError as error:
            raise self._wrong(f"{name}, piece {number}: {error}") from None

    def entries(self, name: str, number: int) -> Entries:
        """The entries of one piece."""
        first, last = self.tables[name][number : number + 2, 0].tolist()
        found = nothing(self.specs[name].dtype)
        if first == last:
            return found
        values = []
        for kind in ("old", "new"):
            part = np.empty(last - first, found.old.dtype)
            self.held.read_into(f"{kind}:{name}", first, part.view(np.uint8))
            values.append(part)
        return Entries(self.positions(name, number), *values)

    def check(self) -> None:
        """Read every byte.

        Raises:
            CheckpointError: the bytes are not those that were written, or make no sense.
        """
        if not unbroken(self.held, self.digest):
            raise self._wrong("its bytes do not have the digest that it states")
        for name, table in self.tables.items():
            for number, (one, other) in enumerate(pairwise(table[:, 0].tolist())):
                if one != other:
                    self.positions(name, number)
