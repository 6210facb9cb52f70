"""Safetensors out: preallocated shards, written in any order from any thread, published whole.

Everything is written into a staging folder beside the output, ``.NAME.suture``::

    model/     the folder to be, shards at their full size from the start
    journal    one line a finished task, with the digests of what it wrote
    linked     the shards that are links to files of an input, and are never written to
    key        what this staging is for: another recipe or changed inputs start anew
    lock       held by the process that writes

``publish`` syncs the files and renames ``model`` to the output in one step. A process that is
killed leaves a staging folder, which the same command picks up: finished tasks whose bytes still
have the digests of the journal are not done again.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from suture.checkpoints.atomic import lock_in, sync_folder, take_place
from suture.errors import OutputError
from suture.tensors.spec import DTYPES, TensorSpec, listed

try:
    import fcntl
except ImportError:  # Windows: it cannot remove a lock that is held
    fcntl = None  # type: ignore[assignment]

Array = np.ndarray[Any, Any]
SHARD_SIZE = 5 * 10**9
_FLUSH = 256 << 20
_OURS = {"model", "journal", "key", "key.new", "linked", "lock", "old"}
"""What a staging folder holds; one with anything else in it is somebody's, and left alone."""


class Shard(NamedTuple):
    """One file to be: its header, and where each tensor's bytes will start."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int
    source: Path | None = None
    """A file with the very bytes that this one will have, which may be linked instead."""


def plan_shards(
    specs: Mapping[str, TensorSpec], limit: int = SHARD_SIZE, whole: Sequence[Shard] = ()
) -> list[Shard]:
    """Lay tensors out in shards of at most ``limit`` bytes (a larger tensor stands alone).

    The order is that of names whatever the order of ``specs``, wider dtypes first in each shard so
    that every tensor is aligned. Files that go over as a ``whole`` follow, laid out as they are.
    """
    groups: list[list[str]] = [[]]
    room = limit
    for name in sorted(specs.keys() - {name for shard in whole for name in shard.offsets}):
        if groups[-1] and specs[name].nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= specs[name].nbytes
    groups = groups if groups[0] or not whole else []
    total = len(groups) + len(whole)
    names = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    names = names if total > 1 else ["model.safetensors"]
    shards = [_shard(name, group, specs) for name, group in zip(names, groups, strict=False)]
    return shards + [s._replace(name=n) for n, s in zip(names[len(groups) :], whole, strict=True)]


def _shard(file: str, names: list[str], specs: Mapping[str, TensorSpec]) -> Shard:
    names = sorted(names, key=lambda name: (-DTYPES[specs[name].dtype].bits, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in names:
        start, end = end, end + specs[name].nbytes
        starts[name] = start
        header[name] = {
            "dtype": specs[name].dtype,
            "shape": list(specs[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return Shard(file, head, {n: len(head) + s for n, s in starts.items()}, len(head) + end)


def index_of(shards: list[Shard], specs: Mapping[str, TensorSpec]) -> str | None:
    """The index that names the shard of each tensor; ``None`` for a single file."""
    if len(shards) == 1:
        return None
    where = {name: shard.name for shard in shards for name in shard.offsets}
    total = sum(spec.nbytes for spec in specs.values())
    found = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return json.dumps(found, indent=2) + "\n"


def staging_of(out: Path) -> Path:
    """The folder in which an output is prepared."""
    return out.parent / f".{out.name}.suture"


class Writer:
    """Writes one output folder; see the module for how. Safe from any thread."""

    def __init__(
        self,
        out: Path,
        specs: Mapping[str, TensorSpec],
        *,
        key: str,
        shard_size: int = SHARD_SIZE,
        overwrite: bool = False,
        resume: bool = True,
        whole: Sequence[Shard] = (),
    ) -> None:
        self.out = out
        self.specs = specs
        self.shards = plan_shards(specs, shard_size, whole)
        self.linked: frozenset[str] = frozenset()
        """Files that are links to those of an input, and are never opened for writing."""
        self.overwrite = overwrite
        self._staging = staging_of(out)
        self._model = self._staging / "model"
        self._places = {n: (i, o) for i, s in enumerate(self.shards) for n, o in s.offsets.items()}
        self._descriptors: list[int] = []
        self._journal = -1
        self._unsynced = 0
        self._flusher: threading.Thread | None = None
        self._fault: OSError | None = None
        self._lock_file = self._take_lock()
        try:
            self.resumed = resume and self._same(key)
            """Whether a staging folder of an interrupted run of the same merge was found."""
            if not self.resumed:
                self._prepare(key)
            self._open()
        except OSError as error:
            self.close()
            raise OutputError(f"{self._staging}: {error.strerror}") from None

    def _take_lock(self) -> int:
        try:
            self._staging.mkdir(parents=True, exist_ok=True)
            held = {p.name for p in self._staging.iterdir()}
            strange = sorted(held - _OURS if "lock" in held else held)
            if strange or self._staging.is_symlink():
                what = f"holds {listed(strange)}" if strange else "is a link"
                raise OutputError(f"{self._staging}: {what}, which no merge left; move it away")
            return lock_in(self._staging, self.out, "writing")
        except OSError as error:
            raise OutputError(f"{self._staging}: cannot write there: {error.strerror}") from None

    def _same(self, key: str) -> bool:
        """Whether the shards of this merge are laid out, headers and all."""
        try:
            if (self._staging / "key").read_bytes() != key.encode():
                return False
            for shard in self.shards:
                with (self._model / shard.name).open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if size != shard.size or file.read(len(shard.header)) != shard.header:
                        return False
            _remove(p for p in self._model.iterdir() if p.name not in {s.name for s in self.shards})
            self.linked = frozenset(json.loads((self._staging / "linked").read_bytes()))
        except (OSError, ValueError):
            return False
        return True

    def _prepare(self, key: str) -> None:
        (self._staging / "key").unlink(missing_ok=True)
        (self._staging / "journal").unlink(missing_ok=True)
        shutil.rmtree(self._model, ignore_errors=True)
        self._model.mkdir()
        linked = []
        for shard in self.shards:
            if shard.source is not None and _link(shard.source, self._model / shard.name):
                linked.append(shard.name)
                continue
            with (self._model / shard.name).open("xb") as file:
                file.write(shard.header)
                file.truncate(shard.size)
        self.linked = frozenset(linked)
        (self._staging / "linked").write_text(json.dumps(linked))
        # The key is written last and in one step: with it, the shards are known to be laid out.
        fresh = self._staging / "key.new"
        fresh.write_bytes(key.encode())
        fresh.replace(self._staging / "key")

    def _open(self) -> None:
        for shard in self.shards:
            access = os.O_RDONLY if shard.name in self.linked else os.O_RDWR
            flags = access | getattr(os, "O_BINARY", 0)
            self._descriptors.append(os.open(self._model / shard.name, flags))
        self._journal = os.open(
            self._staging / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )

    def journal(self) -> list[list[Any]]:
        """The whole lines of the journal; one that was cut short or changed is left out."""
        found = []
        for line in (self._staging / "journal").read_bytes().split(b"\n"):
            digest, _, text = line.partition(b" ")
            if text and xxhash.xxh3_64_hexdigest(text).encode() == digest:
                found.append(json.loads(text))
        return found

    def record(self, line: list[Any]) -> None:
        """Append one line to the journal, after the bytes it speaks of were written."""
        text = json.dumps(line, separators=(",", ":")).encode()
        try:
            digest = xxhash.xxh3_64_hexdigest(text).encode()
            os.write(self._journal, b"\n" + digest + b" " + text + b"\n")
        except OSError as error:
            raise OutputError(f"{self._staging / 'journal'}: {error.strerror}") from None

    def write(self, name: str, start: int, raw: Array) -> None:
        """Write the bytes ``raw`` (uint8) from element ``start`` of a tensor.

        In a file that is a link they stand already.
        """
        file, offset = self._places[name]
        if self.shards[file].name in self.linked:
            return
        offset += start * DTYPES[self.specs[name].dtype].itemsize
        done = 0
        try:
            while done < raw.size:
                done += _pwrite(self._descriptors[file], raw[done:], offset + done)
        except OSError as error:
            raise OutputError(
                f"{self._model / self.shards[file].name}: {error.strerror}; the same command goes "
                "on from here, what is finished is kept"
            ) from None
        self._unsynced += raw.size
        if self._unsynced > _FLUSH:
            self._flush(file)

    def _flush(self, file: int) -> None:
        # The disk works while the processor does: the sync at the end then has little left to do.
        if self._flusher is None or not self._flusher.is_alive():
            self._unsynced = 0
            descriptor = self._descriptors[file]
            self._flusher = threading.Thread(target=self._sync, args=(descriptor,), daemon=True)
            self._flusher.start()

    def _sync(self, descriptor: int) -> None:
        try:
            getattr(os, "fdatasync", os.fsync)(descriptor)
        except OSError as error:  # told only once: the sync in publish() would know nothing of it
            self._fault = error

    def read_back(self, name: str, start: int, raw: Array) -> None:
        """Fill ``raw`` (uint8) with what is written from element ``start`` of a tensor."""
        file, offset = self._places[name]
        offset += start * DTYPES[self.specs[name].dtype].itemsize
        try:
            got = _pread(self._descriptors[file], raw.size, offset)
        except OSError:
            got = b""  # what cannot be read back is written again
        raw[: len(got)] = np.frombuffer(got, np.uint8)

    def add_file(self, name: str, content: bytes | str) -> None:
        """Put a small file beside the weights."""
        data = content.encode() if isinstance(content, str) else content
        path = self._model / name
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if path.parent != self._model:
                sync_folder(path.parent)
        except OSError as error:
            raise OutputError(f"{self._model / name}: {error.strerror}") from None

    def beside(self, name: str) -> Path:
        """Where a large file beside the weights is written, synced, before ``publish``."""
        return self._model / name

    def publish(self) -> None:
        """Sync everything and make the folder appear under its name, whole, in one step.

        Raises:
            OutputError: the disk failed, or something else took the output's name meanwhile.
        """
        index = index_of(self.shards, self.specs)
        if index is not None:
            self.add_file("model.safetensors.index.json", index)
        try:
            if self._flusher is not None:
                self._flusher.join()
            if self._fault is not None:
                raise self._fault
            for descriptor in self._descriptors:
                os.fsync(descriptor)
            sync_folder(self._model)
            self._rename()
            sync_folder(self.out.parent)
        except OSError as error:
            raise OutputError(f"{self.out}: {error.strerror}") from None
        self.discard()

    def _rename(self) -> None:
        take_place(self._model, self.out, self._staging / "old", overwrite=self.overwrite)

    def discard(self) -> None:
        """Drop the staging folder: it was published, or nothing of it can be used again."""
        self._close_files()
        # The lock goes last and is held until then, so that nobody prepares a folder meanwhile.
        with suppress(OSError):
            _remove(p for p in self._staging.iterdir() if p.name != "lock")
            if fcntl is None:
                self.close()
            (self._staging / "lock").unlink()
            self._staging.rmdir()
        self.close()

    def close(self) -> None:
        """Close the files and leave the staging folder for the next run to pick up."""
        self._close_files()
        if self._lock_file >= 0:
            os.close(self._lock_file)
        self._lock_file = -1

    def _close_files(self) -> None:
        if self._flusher is not None:
            self._flusher.join()
        for descriptor in [*self._descriptors, self._journal]:
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptors = []
        self._journal = -1


_CLONE = 0x40049409
"""Linux: the request that makes a file share another one's blocks until it changes."""


def _link(source: Path, place: Path) -> bool:
    """Make ``place`` the same as ``source`` without copying: sharing blocks, else a hard link."""
    if fcntl is not None:
        with suppress(OSError):
            with source.open("rb") as old, place.open("xb") as new:
                fcntl.ioctl(new.fileno(), _CLONE, old.fileno())
                os.fsync(new.fileno())
            return True
        place.unlink(missing_ok=True)
    try:
        place.hardlink_to(source.resolve())
    except OSError:  # another disk, or a file system without links
        return False
    return True


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


if hasattr(os, "pwrite"):

    def _pwrite(descriptor: int, raw: Array, offset: int) -> int:
        return os.pwrite(descriptor, raw.data, offset)

    _pread = os.pread

else:  # Windows
    _seek = threading.Lock()

    def _pwrite(descriptor: int, raw: Array, offset: int) -> int:
        with _seek:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.write(descriptor, raw.data)

    def _pread(descriptor: int, size: int, offset: int, /) -> bytes:
        with _seek:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, size)
