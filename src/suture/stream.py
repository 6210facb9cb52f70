"""The one loop: the same elements of every checkpoint, block by block, on all cores.

Everything that walks over tensors - a threshold, a norm, a merge - is a ``Visitor`` of ``sweep``.
A block is small enough to stay in the processor's cache from the moment it is read until what was
made of it is written; memory is a few blocks a thread, whatever the size of the model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash

from suture import kernels
from suture.checkpoint import Checkpoint
from suture.errors import NonFiniteError
from suture.spec import DTYPES, F64, PIECE, Piece, TensorSpec, pieces_of

Array = np.ndarray[Any, Any]
BLOCK = 1 << 16
"""Elements in a block: half a megabyte of float32 for a base and a model."""
TASK_PIECES = 512
"""At most so many small tensors are handed to a thread together."""

DELTA = "delta"
"""Rows are models minus base."""
WEIGHT = "weight"
"""Rows are the models themselves."""
RAW = "raw"
"""No rows, only bytes."""


@dataclass(frozen=True)
class Sources:
    """The checkpoints that are read together, and how rows are made of each tensor."""

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None = None
    how: str = DELTA
    raw: frozenset[str] = frozenset()
    """Tensors of which only the bytes are wanted."""
    allow_nonfinite: bool = False

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint whose names and shapes count: the base, or else the first model."""
        return self.base if self.base is not None else self.models[0]

    @property
    def all(self) -> tuple[Checkpoint, ...]:
        """Every checkpoint, the base first."""
        return self.models if self.base is None else (self.base, *self.models)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor in the reference."""
        return self.reference.specs[name]

    def how_of(self, name: str) -> str:
        """How the rows of this tensor are made."""
        return RAW if name in self.raw else self.how


class Block:
    """Elements ``start`` to ``start + count`` of one tensor, in one thread's buffers.

    ``rows`` is float32[models, block]; only the first ``count`` columns are filled. Models that
    lack the tensor (where the recipe allows it) have the base's values: a delta of zero.
    """

    def __init__(self, sources: Sources, size: int) -> None:
        self.sources = sources
        self.size = size
        self.name = ""
        self.start = 0
        self.count = 0
        self.rows = np.zeros((len(sources.models), size), np.float32)
        self.base = np.zeros(size, np.float32)
        self.out = np.zeros(size, np.float32)
        self.words = np.zeros(size, np.uint32)
        self._buffers = np.zeros((len(sources.all), size * 8), np.uint8)
        self.raw: list[Array | None] = []
        """The bytes of each checkpoint of ``sources.all``; ``None`` where it lacks the tensor."""

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + self.count

    def load(self, name: str, start: int, count: int) -> None:
        """Read and widen one block of a tensor.

        Raises:
            NonFiniteError: a model holds NaN or infinity here and that is not allowed.
        """
        self.name, self.start, self.count = name, start, count
        sources = self.sources
        self.raw = []
        for number, checkpoint in enumerate(sources.all):
            spec = checkpoint.specs.get(name)
            if spec is None:
                self.raw.append(None)
                continue
            raw = self._buffers[number, : count * DTYPES[spec.dtype].itemsize]
            checkpoint.read_into(name, start, raw)
            self.raw.append(raw)
        how = sources.how_of(name)
        if how != RAW and count:
            self._widen(name, count, how)

    def _widen(self, name: str, count: int, how: str) -> None:
        sources = self.sources
        based = sources.base is not None
        base_code, first = -1, self.raw[0]
        if sources.base is not None and first is not None:
            base_code = DTYPES[sources.base.specs[name].dtype].code
            wild = kernels.widen(first, base_code, count, self.base)
            if wild:
                self._refuse(sources.base)
        for number, (model, raw) in enumerate(zip(sources.models, self.raw[based:], strict=True)):
            row = self.rows[number]
            if raw is None:
                row[:count] = 0 if how == DELTA else self.base[:count]
                continue
            code = DTYPES[model.specs[name].dtype].code
            if how == DELTA and code == F64 == base_code and first is not None:
                kernels.subtract_double(raw, first, count, row)
                wild = count - int(np.isfinite(row[:count]).sum())
            elif how == DELTA:
                wild = kernels.widen_delta(raw, code, count, self.base, row)
            else:
                wild = kernels.widen(raw, code, count, row)
            if wild:
                self._refuse(model)

    def _refuse(self, checkpoint: Checkpoint) -> None:
        if self.sources.allow_nonfinite:
            return
        name = self.name
        count = count_nonfinite(checkpoint, name)
        file = checkpoint.files[checkpoint.places[name].file]
        raise NonFiniteError(
            f"{file}: {name} holds {count} NaN or infinite values of "
            f"{checkpoint.specs[name].numel}; repair the model or fetch it again (`suture inspect "
            "MODEL --check` finds them all), or go on with --allow-nonfinite"
        )


def count_nonfinite(checkpoint: Checkpoint, name: str) -> int:
    """How many elements of a floating tensor are NaN, infinite, or too large for float32."""
    spec = checkpoint.specs[name]
    dtype = DTYPES[spec.dtype]
    row = np.empty(BLOCK, np.float32)
    raw = np.empty(BLOCK * dtype.itemsize, np.uint8)
    wild = 0
    for start in range(0, spec.numel if dtype.computable else 0, BLOCK):
        count = min(BLOCK, spec.numel - start)
        part = raw[: count * dtype.itemsize]
        checkpoint.read_into(name, start, part)
        wild += int(kernels.widen(part, dtype.code, count, row))
    return wild


T = TypeVar("T")


class Visitor(Generic[T]):
    """What is done with the blocks of a sweep. Blocks of one piece come in order, in one thread.

    ``see`` and ``end_piece`` run in many threads at once, each with its own ``local``;
    ``end_task`` and ``finish`` run in one thread at a time.
    """

    def local(self) -> T:
        """What one thread keeps to itself."""
        return None  # type: ignore[return-value]

    def see(self, local: T, block: Block) -> None:
        """Look at one block."""

    def end_piece(self, local: T, piece: Piece) -> None:
        """All blocks of a piece were seen."""

    def end_task(self, local: T, task: Sequence[Piece]) -> None:
        """All pieces of a task were seen."""

    def finish(self, local: T) -> None:
        """The thread has no more to do."""


Progress = Callable[[str, int], None]
"""Called with the name of a tensor and how many bytes were read and written since the last call."""


@dataclass
class _Queue:
    tasks: list[list[Piece]]
    next: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    exclusive: threading.Lock = field(default_factory=threading.Lock)
    error: BaseException | None = None

    def take(self) -> list[Piece] | None:
        with self.lock:
            if self.error is not None or self.next >= len(self.tasks):
                return None
            self.next += 1
            return self.tasks[self.next - 1]


def tasks_of(names: Iterable[str], specs: Mapping[str, TensorSpec]) -> list[list[Piece]]:
    """Cut tensors into pieces, and put small ones together, in the order of ``names``."""
    tasks: list[list[Piece]] = []
    room = 0
    for name in names:
        for piece in pieces_of(name, specs[name].numel):
            size = piece.stop - piece.start
            if not tasks or size > room or len(tasks[-1]) >= TASK_PIECES:
                tasks.append([])
                room = PIECE
            tasks[-1].append(piece)
            room -= size
    return tasks


def sweep(
    sources: Sources,
    tasks: list[list[Piece]],
    visitor: Visitor[Any],
    *,
    threads: int | None = None,
    block: int = BLOCK,
    progress: Progress | None = None,
) -> None:
    """Show every piece of ``tasks`` to the visitor, in order of the list, from several threads.

    Raises:
        SutureError: whatever the visitor or a read raises; the first one stops all threads.
    """
    if block & (block - 1) or not 8 <= block <= PIECE:
        raise ValueError(f"a block is a power of two from 8 to {PIECE}, not {block}")
    queue = _Queue(tasks)
    number = max(1, min(threads or cores(), len(tasks)))
    if number == 1:
        _work(sources, queue, visitor, block, progress)
    else:
        workers = [
            threading.Thread(
                target=_work, args=(sources, queue, visitor, block, progress), daemon=True
            )
            for _ in range(number)
        ]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        except BaseException as error:
            queue.error = error
            for worker in workers:
                if worker.is_alive():
                    worker.join()
            raise
    if queue.error is not None:
        raise queue.error


def _work(
    sources: Sources, queue: _Queue, visitor: Visitor[Any], size: int, progress: Progress | None
) -> None:
    try:
        block = Block(sources, size)
        local = visitor.local()
        while (task := queue.take()) is not None:
            for piece in task:
                for start in range(piece.start, max(piece.stop, piece.start + 1), size):
                    if queue.error is not None:
                        return
                    block.load(piece.name, start, min(size, piece.stop - start))
                    visitor.see(local, block)
                visitor.end_piece(local, piece)
                if progress is not None and (
                    piece.stop - piece.start == PIECE or piece is task[-1]
                ):
                    _tell(sources, task, piece, progress)
            with queue.exclusive:
                visitor.end_task(local, task)
        with queue.exclusive:
            visitor.finish(local)
    except BaseException as error:  # noqa: BLE001  handed over to the thread that waits
        with queue.lock:
            queue.error = queue.error or error


def _tell(sources: Sources, task: Sequence[Piece], piece: Piece, progress: Progress) -> None:
    size = 0
    for p in task:
        for c in sources.all:
            if p.name in c.specs:
                size += (p.stop - p.start) * DTYPES[c.specs[p.name].dtype].itemsize
    progress(piece.name, size)


def cores() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


class Hashers:
    """Fingerprints of one piece of several byte streams, taken while the bytes are in the cache."""

    def __init__(self, number: int) -> None:
        self._states = [xxhash.xxh3_128() for _ in range(number)]
        self._used = [False] * number

    def update(self, raws: Sequence[Array | None]) -> None:
        """Add the next bytes of each stream; ``None`` adds nothing."""
        for number, raw in enumerate(raws):
            if raw is not None:
                self._states[number].update(raw.data)
                self._used[number] = True

    def take(self) -> list[str]:
        """The digests since the last call, in hexadecimal; empty for a stream without bytes."""
        found = [
            s.hexdigest() if used else "" for s, used in zip(self._states, self._used, strict=True)
        ]
        for state in self._states:
            state.reset()
        self._used = [False] * len(self._used)
        return found


def tensor_fingerprint(digests: Sequence[str]) -> str:
    """The fingerprint of a tensor: xxh3-128 over the digests of its pieces of 2**20 elements."""
    return xxhash.xxh3_128_hexdigest(b"".join(bytes.fromhex(d) for d in digests))


def fingerprint(specs: Mapping[str, TensorSpec], tensors: Mapping[str, str]) -> str:
    """The fingerprint of a checkpoint: over names, dtypes, shapes and tensor fingerprints, by name.

    It does not depend on how the tensors are spread over files. Fast identity, not security.
    """
    state = xxhash.xxh3_128()
    for name in sorted(tensors):
        spec = specs[name]
        state.update(f"{name}\0{spec.dtype}\0{list(spec.shape)}\0{tensors[name]}\n".encode())
    return str(state.hexdigest())
