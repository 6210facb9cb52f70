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
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import xxhash

from suture.checkpoints.checkpoint import Checkpoint
from suture.errors import NonFiniteError, Problems
from suture.kernels import compiled
from suture.tensors.spec import DTYPES, PIECE, Piece, TensorSpec, pieces_of

Array = np.ndarray[Any, Any]
BLOCK = 1 << 17
"""Elements in a block: half a megabyte of float32 a model. Smaller ones stay nearer to the
processor, but then threads wait for the interpreter more than for memory (measured)."""
SPAN = 1 << 18
"""Elements read at once from each file: fewer calls than blocks, and still in the cache."""
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
    lead: Checkpoint | None = None
    """The model that stands for a base where there is none; by default the first."""

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint whose names and shapes count: the base, or the model that leads."""
        if self.base is not None:
            return self.base
        return self.models[0] if self.lead is None else self.lead

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


@dataclass
class Target:
    """Where the finished bytes of a block go, and in which form."""

    raw: Array
    """uint8, the bytes of the block."""
    code: int
    """Of the dtype."""
    kept: int
    """Whether the base has this dtype too (1), so that rounding does not change it."""
    counts: Array
    """int64[3], as in ``kernels.finish``."""
    filled: bool = False
    """Whether ``Block.fuse`` was called, and the bytes are there."""


_NO_KEYS = np.zeros(0, np.uint32)
_NO_BOUNDS = np.zeros(0, np.float32)


class Combine(NamedTuple):
    """How rows become one, by a kernel that ``kernels.fused`` knows."""

    kind: int
    weights: Array
    """float32[models]."""
    keys: Array = _NO_KEYS
    """uint32[models], for the kinds that trim."""
    bounds: Array = _NO_BOUNDS
    """float32[models], for CONSENSUS."""
    options: tuple[int, int, int] = (0, 0, 0)
    """Whole numbers whose meaning is the kind's."""
    factor: float = 1.0
    """The result is multiplied by it."""


class Drops(NamedTuple):
    """Entries that are dropped at random before rows are combined; see ``kernels.drop``."""

    streams: Array = np.zeros(0, np.uint64)
    """uint64[models]: the key of each row's random stream."""
    limits: Array = np.zeros(0, np.int64)
    """int64[models]: random words below this are kept; 2**32 keeps the row as it is."""
    factors: Array = _NO_BOUNDS
    """float32[models]: what is kept is multiplied by it."""


_NO_DROPS = Drops()


@lru_cache(maxsize=4096)
def _numbers(values: tuple[float, ...]) -> Array:
    array = np.array(values, np.float32)
    array.flags.writeable = False  # it is shared
    return array


class Block:
    """Elements ``start`` to ``start + count`` of one tensor, in one thread's buffers.

    ``rows`` is float32[models, block]; only the first ``count`` columns are filled. Models that
    lack the tensor (where the recipe allows it) have the base's values: a delta of zero. Bytes are
    read in *spans* of several blocks; ``span`` holds those of the current one. They become rows
    when somebody looks at ``rows`` or ``base``; ``fuse`` goes from bytes to bytes without them.
    """

    def __init__(self, sources: Sources, size: int) -> None:
        self.sources = sources
        self.size = size
        self.name = ""
        self.start = 0
        self.count = 0
        self.models = len(sources.models)
        self.out = np.zeros(size, np.float32)
        self.target: Target | None = None
        """Where ``fuse`` puts the finished bytes; without it ``out`` is filled."""
        self.words = np.zeros(size, np.uint32)
        self.span: list[Array | None] = []
        """The bytes of the span in each checkpoint of ``sources.all``; ``None`` where it lacks the
        tensor."""
        self.span_start = 0
        self.span_stop = 0
        self._buffers = np.zeros((len(sources.all), span_of(size) * 8), np.uint8)
        self._codes = np.zeros(len(sources.all), np.int64)
        self._wild = np.zeros(len(sources.all), np.int64)
        self._rows = np.zeros((self.models, size), np.float32)
        self._base = np.zeros(size, np.float32)
        self._out_bytes = self.out.view(np.uint8)
        self._loaded = True
        self._counts = np.zeros(3, np.int64)
        self._strip = [np.zeros((self.models, compiled.TILE), np.float32),
                       *(np.zeros(compiled.TILE, np.float32) for _ in range(2))]  # fmt: skip

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + self.count

    @property
    def ends_span(self) -> bool:
        """Whether this is the last block of its span."""
        return self.stop == self.span_stop

    def numbers(self, values: tuple[float, ...]) -> Array:
        """Return one number a model as float32[models]; the array is shared and read-only."""
        return _numbers(values)

    def raw(self, number: int) -> Array | None:
        """The block's bytes in one checkpoint of ``sources.all``."""
        span = self.span[number]
        if span is None:
            return None
        spec = self.sources.all[number].specs[self.name]
        width = DTYPES[spec.dtype].itemsize
        first = (self.start - self.span_start) * width
        return span[first : first + self.count * width]

    def read(self, name: str, start: int, stop: int) -> None:
        """Read the bytes of a span from every checkpoint."""
        self.name, self.span_start, self.span_stop = name, start, stop
        self.span = []
        for number, checkpoint in enumerate(self.sources.all):
            spec = checkpoint.specs.get(name)
            if spec is None:
                self.span.append(None)
                self._codes[number] = -1
                continue
            dtype = DTYPES[spec.dtype]
            raw = self._buffers[number, : (stop - start) * dtype.itemsize]
            checkpoint.read_into(name, start, raw)
            self.span.append(raw)
            self._codes[number] = dtype.code

    def show(self, start: int, count: int) -> None:
        """Go to one block of the span; its bytes become rows when they are asked for."""
        self.start, self.count = start, count
        self.target = None
        self._loaded = self.sources.how_of(self.name) == RAW or not count

    def load(self, name: str, start: int, count: int) -> None:
        """Read a single block."""
        self.read(name, start, start + count)
        self.show(start, count)

    @property
    def rows(self) -> Array:
        """float32[models, block]: the models' weights, or what they add to the base.

        Raises:
            NonFiniteError: a model holds NaN or infinity here and that is not allowed.
        """
        if not self._loaded:
            self._load()
        return self._rows

    @property
    def base(self) -> Array:
        """float32[block]: the base's weights, where there is one. Raises as ``rows`` does."""
        if not self._loaded:
            self._load()
        return self._base

    def _load(self) -> None:
        self._loaded = True
        sources = self.sources
        compiled.load_rows(
            self._buffers, self._codes, self.start - self.span_start, self.count,
            int(sources.how_of(self.name) == DELTA), int(sources.base is not None),
            self._base, self._rows, self._wild,
        )  # fmt: skip
        self._check()

    def _check(self) -> None:
        if self._wild.any():
            guilty = [c for c, w in zip(self.sources.all, self._wild, strict=True) if w]
            self._wild[:] = 0
            self.refuse(guilty)

    def fuse(
        self, how: Combine, drops: Drops = _NO_DROPS, start: int = 0, stop: int | None = None
    ) -> None:
        """Combine columns ``start`` to ``stop`` straight from the bytes, in the nearest cache.

        The result goes to ``target`` where there is one, finished, or else to ``out``. The rows
        are not looked at: a caller that changed them calls the kernel of that kind itself.

        Raises:
            NonFiniteError: a model holds NaN or infinity here and that is not allowed.
        """
        stop = self.count if stop is None else stop
        target = self.target
        if target is None:
            code, kept, counts = compiled.AS_FLOAT, 0, self._counts
            raw = self._out_bytes[4 * start : 4 * stop]
        else:
            code, kept, counts = target.code, target.kept, target.counts
            width = target.raw.size // self.count
            raw = target.raw[width * start : width * stop]
            target.filled = True
        rows, base, out = self._strip
        compiled.fused(
            rows, base, out, self._buffers, self._codes, self.start - self.span_start + start,
            stop - start, int(self.sources.how == DELTA), int(self.sources.base is not None),
            drops.streams, self.start + start, drops.limits, drops.factors, how.kind, how.weights,
            how.keys, how.bounds, *how.options, how.factor, code, kept, raw, counts, self._wild,
        )  # fmt: skip
        self._check()

    def gather(self, lows: Array, widths: Array, inside: Array, found: Array) -> None:
        """Find the magnitudes around each row's threshold, as ``kernels.gather_brackets`` does.

        Raises:
            NonFiniteError: a model holds NaN or infinity here and that is not allowed.
        """
        rows, base, _ = self._strip
        compiled.gather_brackets(
            rows, base, self._buffers, self._codes, self.start - self.span_start, self.count,
            int(self.sources.how == DELTA), int(self.sources.base is not None), lows, widths,
            inside, found, self._wild,
        )  # fmt: skip
        self._check()

    def refuse(self, guilty: Iterable[Checkpoint]) -> None:
        """Say which checkpoints hold NaN or infinity in this tensor, unless that is allowed.

        Raises:
            NonFiniteError: names file, tensor and count.
        """
        if self.sources.allow_nonfinite:
            return
        problems = Problems()
        for checkpoint in guilty:
            spec = checkpoint.specs[self.name]
            count = count_nonfinite(checkpoint, self.name)
            file = checkpoint.home(self.name)
            problems.add(
                NonFiniteError,
                f"{file}: {self.name} holds {count} NaN or infinite values of {spec.numel}; repair "
                "the model or fetch it again (`suture inspect MODEL --check` finds them all), or "
                "go on with --allow-nonfinite",
            )
        problems.raise_if_any()


def span_of(block: int) -> int:
    """Elements that are read at once, for blocks of this size."""
    return max(block, SPAN)


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
        wild += int(compiled.widen(part, dtype.code, count, row))
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
    if number > 1 and _interpreted(tasks):
        number = 1
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


_TINY = 1 << 13
"""Elements in a piece below which the interpreter has more to do than the processor."""


def _interpreted(tasks: list[list[Piece]]) -> bool:
    """Whether threads would only wait for the interpreter: most pieces are tiny."""
    pieces = sum(len(task) for task in tasks)
    return pieces > 1000 and sum(p.stop - p.start for t in tasks for p in t) < _TINY * pieces


def _work(
    sources: Sources, queue: _Queue, visitor: Visitor[Any], size: int, progress: Progress | None
) -> None:
    try:
        block = Block(sources, size)
        local = visitor.local()
        while (task := queue.take()) is not None:
            untold: list[Piece] = []
            for piece in task:
                for first in range(piece.start, max(piece.stop, piece.start + 1), span_of(size)):
                    last = min(first + span_of(size), piece.stop)
                    block.read(piece.name, first, last)
                    for start in range(first, max(last, first + 1), size):
                        if queue.error is not None:
                            return
                        block.show(start, min(size, last - start))
                        visitor.see(local, block)
                visitor.end_piece(local, piece)
                untold.append(piece)
                if progress is not None and (
                    piece.stop - piece.start == PIECE or piece is task[-1]
                ):
                    _tell(sources, untold, progress)
                    untold = []
            with queue.exclusive:
                visitor.end_task(local, task)
        with queue.exclusive:
            visitor.finish(local)
    except BaseException as error:  # noqa: BLE001  handed over to the thread that waits
        with queue.lock:
            queue.error = queue.error or error


def _tell(sources: Sources, pieces: Sequence[Piece], progress: Progress) -> None:
    size = 0
    for p in pieces:
        for c in sources.all:
            if p.name in c.specs:
                size += (p.stop - p.start) * DTYPES[c.specs[p.name].dtype].itemsize
    progress(pieces[-1].name, size)


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
