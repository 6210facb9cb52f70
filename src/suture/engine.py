"""A merge applied: from checkpoints to a folder, through the one loop.

``apply`` knows nothing of methods: it lets the method prepare, shows every block of every tensor to
its ``combine``, adds the base, rounds once, and hands the bytes to the writer, taking fingerprints
of everything that passes while it is in the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from suture import kernels, select
from suture.checkpoint import Checkpoint
from suture.errors import NonFiniteError
from suture.merges import Context, Merge
from suture.roles import role_of
from suture.spec import DTYPES, F64, PIECE, WORD_OF, Piece, TensorSpec, pieces_of
from suture.stream import (
    BLOCK,
    DELTA,
    RAW,
    WEIGHT,
    Block,
    Hashers,
    Progress,
    Sources,
    Target,
    Visitor,
    fingerprint,
    span_of,
    sweep,
    tasks_of,
    tensor_fingerprint,
)
from suture.writer import Writer

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Job:
    """What is merged, how, and into which tensors."""

    sources: Sources
    models: tuple[str, ...]
    """The names of the models, in the order of ``sources.models``."""
    merge: Merge[Any]
    names: tuple[str, ...]
    """The tensors that are merged, sorted; all others are copied from the reference."""
    specs: Mapping[str, TensorSpec]
    """Every tensor of the output."""
    equal_buffers: bool = True
    """Whether integer and boolean tensors must be the same in all models."""
    threads: int | None = None
    block: int = BLOCK

    @property
    def labels(self) -> tuple[str, ...]:
        """What to call each checkpoint of ``sources.all``."""
        return self.models if self.sources.base is None else ("base", *self.models)


def output_specs(reference: Checkpoint, dtype: str | None) -> dict[str, TensorSpec]:
    """The tensors of the output: those of the reference, in another floating dtype if asked."""
    return {
        name: TensorSpec(dtype, spec.shape)
        if dtype is not None and DTYPES[spec.dtype].computable and role_of(name).kind != "buffer"
        else spec
        for name, spec in reference.specs.items()
    }


@dataclass
class Outcome:
    """What happened while a merge was applied."""

    fingerprints: dict[str, str]
    """Of every input, by label, and of the output as ``output``."""
    tensors: dict[str, str]
    """Fingerprint of every tensor of the output."""
    moved: dict[str, int]
    """Entries with a non-zero merged delta, by tensor."""
    lost: dict[str, int]
    """Those among them that rounding to the output dtype made equal to the base again."""
    facts: dict[str, Any]
    resumed: int
    """Pieces that an earlier, interrupted run had finished."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def writeback_loss(self) -> float | None:
        """Share of the moved entries that were lost; ``None`` when nothing moved."""
        moved = sum(self.moved.values())
        return sum(self.lost.values()) / moved if moved else None


class _Done:
    """What the journal holds: digests and counts of every finished piece."""

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.pieces: dict[tuple[str, int], tuple[list[str], int, int]] = {}

    def add(self, entry: Sequence[Any]) -> None:
        name, number, digests, moved, lost = entry
        self.pieces[name, number] = (digests, moved, lost)

    def verify(self, writer: Writer, names: Iterable[str]) -> None:
        """Keep only the pieces whose bytes on disk still have the digest that was noted."""
        hashers = Hashers(1)
        for name in names:
            width = DTYPES[writer.specs[name].dtype].itemsize
            for piece in pieces_of(name, writer.specs[name].numel):
                noted = self.pieces.get((name, piece.number))
                if noted is None:
                    continue
                raw = np.empty((piece.stop - piece.start) * width, np.uint8)
                writer.read_back(name, piece.start, raw)
                hashers.update([raw])
                if hashers.take()[0] != noted[0][-1]:
                    del self.pieces[name, piece.number]

    def fingerprint(
        self, which: int, specs: Mapping[str, TensorSpec]
    ) -> tuple[str, dict[str, str]]:
        """The fingerprint of input ``which`` (-1: the output), and of its tensors."""
        tensors = {}
        for name, spec in specs.items():
            pieces = pieces_of(name, spec.numel)
            if all((name, p.number) in self.pieces for p in pieces):
                digests = [self.pieces[name, p.number][0][which] for p in pieces]
                tensors[name] = tensor_fingerprint(digests)
        return fingerprint(specs, tensors), tensors


class _Local:
    """One thread's output buffer, digests and counts."""

    def __init__(self, job: Job) -> None:
        self.hashers = Hashers(len(job.sources.all) + 1)
        self.raw = np.zeros(span_of(job.block) * 8, np.uint8)
        self.counts = np.zeros(3, np.int64)
        self.entries: list[list[Any]] = []


def _bytes(raw: Array | None) -> Array:
    assert raw is not None
    return raw


class _Merging(Visitor[_Local]):
    """The visitor that writes."""

    def __init__(self, job: Job, state: Any, writer: Writer, done: _Done) -> None:
        self.job, self.state, self.writer, self.done = job, state, writer, done

    def local(self) -> _Local:
        return _Local(self.job)

    def see(self, local: _Local, block: Block) -> None:
        width = DTYPES[self.job.specs[block.name].dtype].itemsize
        first = (block.start - block.span_start) * width
        out = local.raw[first : first + block.count * width]
        if self.job.sources.how_of(block.name) == RAW:
            self._copied(block, out)
        elif block.count:
            self._merged(block, out, local.counts)
        if block.ends_span:
            whole = local.raw[: (block.span_stop - block.span_start) * width]
            local.hashers.update([*block.span, whole])
            self.writer.write(block.name, block.span_start, whole)

    def _copied(self, block: Block, out: Array) -> None:
        raw = _bytes(block.raw(self.job.sources.all.index(self.job.sources.reference)))
        spec, new = self.job.sources.spec(block.name), self.job.specs[block.name]
        learned = DTYPES[spec.dtype].computable and role_of(block.name).kind != "buffer"
        if learned and kernels.widen(raw, DTYPES[spec.dtype].code, block.count, block.out):
            block.refuse([self.job.sources.reference])
        if spec.dtype == new.dtype:
            out[:] = raw
            return
        wild = kernels.narrow(block.out, DTYPES[new.dtype].code, block.count, out)
        self._check(wild, block, new)

    def _merged(self, block: Block, out: Array, counts: Array) -> None:
        old, new = self.job.sources.spec(block.name), self.job.specs[block.name]
        code, kept = DTYPES[new.dtype].code, int(old.dtype == new.dtype)
        before = int(counts[2])
        target = Target(out, code, kept, counts)
        doubles = code == F64 and kept and self.job.sources.how == DELTA
        if not doubles:  # those are added in float64, which no kernel of `fuse` does
            block.target = target
        self.job.merge.combine(block, self.state)
        if doubles:
            kernels.finish_double(_bytes(block.raw(0)), block.out, block.count, out, counts)
        elif self.job.sources.how == WEIGHT and not target.filled:
            counts[2] += kernels.narrow(block.out, code, block.count, out)
        elif not target.filled:
            kernels.finish(block.base, block.out, code, kept, block.count, out, counts)
        self._check(int(counts[2]) - before, block, new)

    def _check(self, wild: int, block: Block, new: TensorSpec) -> None:
        if wild and not self.job.sources.allow_nonfinite:
            raise NonFiniteError(
                f"{block.name}: {wild} merged values near element {block.start} do not fit into "
                f"{WORD_OF[new.dtype]}; choose a wider `output: {{dtype: ...}}`, or smaller weights"
            )

    def end_piece(self, local: _Local, piece: Piece) -> None:
        moved, lost = int(local.counts[0]), int(local.counts[1])
        local.counts[:] = 0
        local.entries.append([piece.name, piece.number, local.hashers.take(), moved, lost])

    def end_task(self, local: _Local, task: Sequence[Piece]) -> None:
        self.writer.record(local.entries)
        for entry in local.entries:
            self.done.add(entry)
        local.entries = []


Stage = Callable[[str, int], "Progress | None"]
"""Called with a stage and the bytes it will read; gives the callback for its progress."""


def _silent(stage: str, nbytes: int) -> Progress | None:
    return None


def bytes_read(job: Job, names: Iterable[str]) -> int:
    """Bytes of some tensors in all inputs."""
    return sum(c.specs[n].nbytes for n in names for c in job.sources.all if n in c.specs)


def apply(job: Job, writer: Writer, stage: Stage = _silent) -> Outcome:
    """Merge into the writer's staging folder; the caller adds its files and publishes.

    Raises:
        SutureError: an input or the output is at fault; what was finished stays for a later run.
    """
    begun = time.perf_counter()
    done = _Done(len(job.sources.all))
    if writer.resumed:
        for line in writer.journal():
            for entry in line:
                done.add(entry)
        done.verify(writer, job.specs)
    resumed = len(done.pieces)
    tasks = [
        todo
        for task in tasks_of(_in_file_order(job), job.specs)
        if (todo := [p for p in task if (p.name, p.number) not in done.pieces])
    ]
    state = None
    if tasks or job.merge.passes:
        ahead = stage("prepare", bytes_read(job, job.names) * job.merge.passes)
        context = Context(job.sources, job.names, job.models, job.threads, job.block, ahead)
        state = job.merge.prepare(context)
    prepared = time.perf_counter()
    merging = _Merging(job, state, writer, done)
    left = sum(_nbytes(job, piece) for task in tasks for piece in task)
    sweep(job.sources, tasks, merging, threads=job.threads, block=job.block,
          progress=stage("merge", left))  # fmt: skip
    outcome = _outcome(job, done, state, resumed)
    outcome.seconds = {
        "prepare": prepared - begun,
        "merge": time.perf_counter() - prepared,
    }
    return outcome


def _nbytes(job: Job, piece: Piece) -> int:
    return sum(
        (piece.stop - piece.start) * DTYPES[c.specs[piece.name].dtype].itemsize
        for c in job.sources.all
        if piece.name in c.specs
    )


def _in_file_order(job: Job) -> list[str]:
    """The order in which the reference's files hold the tensors, so that disks read forward."""
    places = job.sources.reference.places
    return sorted(job.specs, key=lambda name: places[name])


def _outcome(job: Job, done: _Done, state: Any, resumed: int) -> Outcome:
    prints = {}
    for number, (label, checkpoint) in enumerate(zip(job.labels, job.sources.all, strict=True)):
        shared = {n: s for n, s in checkpoint.specs.items() if n in job.specs}
        _, tensors = done.fingerprint(number, shared)
        beyond = {n: s for n, s in checkpoint.specs.items() if n not in job.specs}
        tensors |= tensor_fingerprints(checkpoint, list(beyond)) if beyond else {}
        prints[label] = fingerprint(checkpoint.specs, tensors)
    prints["output"], tensors = done.fingerprint(-1, job.specs)
    moved: dict[str, int] = {}
    lost: dict[str, int] = {}
    for (name, _), (_, more, less) in done.pieces.items():
        moved[name] = moved.get(name, 0) + more
        lost[name] = lost.get(name, 0) + less
    facts = job.merge.facts(state) if state is not None else {}
    return Outcome(prints, tensors, moved, lost, facts, resumed)


class _Hashing(Visitor[Hashers]):
    def __init__(self) -> None:
        self.digests: dict[tuple[str, int], str] = {}

    def local(self) -> Hashers:
        return Hashers(1)

    def see(self, local: Hashers, block: Block) -> None:
        if block.ends_span:
            local.update(block.span)

    def end_piece(self, local: Hashers, piece: Piece) -> None:
        self.digests[piece.name, piece.number] = local.take()[0]


def tensor_fingerprints(
    checkpoint: Checkpoint, names: Sequence[str], progress: Progress | None = None
) -> dict[str, str]:
    """The fingerprints of some tensors, read now."""
    hashing = _Hashing()
    sources = Sources((checkpoint,), how=RAW)
    sweep(sources, tasks_of(names, checkpoint.specs), hashing, progress=progress)
    return {
        name: tensor_fingerprint(
            [hashing.digests[name, p.number] for p in pieces_of(name, checkpoint.specs[name].numel)]
        )
        for name in names
    }


def checkpoint_fingerprint(checkpoint: Checkpoint, progress: Progress | None = None) -> str:
    """The fingerprint of a whole checkpoint, read now."""
    return fingerprint(
        checkpoint.specs, tensor_fingerprints(checkpoint, list(checkpoint), progress)
    )


def peak_memory(job: Job) -> int:
    """Bytes that a merge holds at most, above the interpreter and the compiled kernels."""
    models, inputs = len(job.sources.models), len(job.sources.all)
    threads = job.threads or 1
    blocks = job.block * (4 * models + 3 * 4) + span_of(job.block) * 8 * (inputs + 1)
    counting = models * (2 * 4 * kernels.BINS + 4 * select.WIDTH)
    shared = models * 8 * select.WIDTH
    per_thread = 2 * blocks + (counting if job.merge.passes else 0)
    journal = sum(max(1, -(-s.numel // PIECE)) for s in job.specs.values()) * 200 * (inputs + 2)
    return threads * per_thread + shared + journal


__all__ = [
    "DELTA",
    "Job",
    "Outcome",
    "apply",
    "checkpoint_fingerprint",
    "output_specs",
    "peak_memory",
]
