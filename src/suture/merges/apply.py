"""A merge applied: from checkpoints to a folder, through the one loop.

``apply`` knows nothing of methods: it lets the method prepare, shows every block of every tensor to
its ``combine``, adds the base, rounds once, and hands the bytes to the writer, taking fingerprints
of everything that passes while it is in the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.views import Same, View
from suture.errors import NonFiniteError
from suture.kernels import compiled
from suture.merges.base import Context, Merge
from suture.stream import topk
from suture.stream.sweep import (
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
from suture.tensors.roles import role_of
from suture.tensors.spec import (
    DTYPES,
    F64,
    PIECE,
    PROMOTED,
    WORD_OF,
    Piece,
    TensorSpec,
    pieces_of,
    promoted,
)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class MergeJob:
    """What is merged, how, and into which tensors; a merge of slices is one job for each."""

    sources: Sources
    models: tuple[str, ...]
    """The names of the models, in the order of ``sources.models``."""
    merge: Merge[Any]
    names: tuple[str, ...]
    """The tensors that are merged, sorted; all others are copied from the reference."""
    specs: Mapping[str, TensorSpec]
    """The tensors of the output that this job makes."""
    equal_buffers: bool = True
    """Whether integer and boolean tensors must be the same in all models."""
    threads: int | None = None
    block: int = BLOCK

    @property
    def labels(self) -> tuple[str, ...]:
        """What to call each checkpoint of ``sources.all``."""
        return self.models if self.sources.base is None else ("base", *self.models)


def output_specs(
    reference: Checkpoint, dtype: str | None, models: Sequence[Checkpoint] = ()
) -> dict[str, TensorSpec]:
    """The tensors of the output: those of the reference, in another floating dtype if asked."""
    found = {}
    for name, spec in reference.specs.items():
        if DTYPES[spec.dtype].computable and role_of(name).kind != "buffer":
            own = [c.stored(name) for c in (reference, *models) if name in c.specs]
            new = own[0] if dtype is None else promoted(own) if dtype == PROMOTED else dtype
            spec = TensorSpec(new, spec.shape) if new != spec.dtype else spec
        found[name] = spec
    return found


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
    told: tuple[str, ...] = ()
    """What the methods have to say, a line each."""

    @property
    def writeback_loss(self) -> float | None:
        """Share of the moved entries that were lost; ``None`` when nothing moved."""
        moved = sum(self.moved.values())
        return sum(self.lost.values()) / moved if moved else None


class Sink(Protocol):
    """Where a merge goes: a ``Writer``, or memory."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The tensors of the output."""

    @property
    def resumed(self) -> bool:
        """Whether an interrupted run has left something."""

    def journal(self) -> list[list[Any]]:
        """What it noted."""

    def record(self, line: list[Any]) -> None:
        """Note what was written."""

    def write(self, name: str, start: int, raw: Array) -> None:
        """Take the bytes ``raw`` (uint8) from element ``start`` of a tensor, from any thread."""

    def read_back(self, name: str, start: int, raw: Array) -> None:
        """Fill ``raw`` with what was written."""


class _Done:
    """What the journal holds: digests and counts of every finished piece."""

    def __init__(self) -> None:
        self.pieces: dict[tuple[str, int], tuple[list[str], int, int]] = {}

    def add(self, entry: Sequence[Any]) -> None:
        name, number, digests, moved, lost = entry
        self.pieces[name, number] = (digests, moved, lost)

    def nbytes(self, specs: Mapping[str, TensorSpec]) -> int:
        """Bytes of the output's finished pieces."""
        return sum(
            (p.stop - p.start) * DTYPES[spec.dtype].itemsize
            for name, spec in specs.items()
            for p in pieces_of(name, spec.numel)
            if (name, p.number) in self.pieces
        )

    def verify(self, writer: Sink, progress: Progress | None) -> None:
        """Keep only the pieces whose bytes on disk still have the digest that was noted."""
        hashers = Hashers(1)
        for name, spec in writer.specs.items():
            width = DTYPES[spec.dtype].itemsize
            for piece in pieces_of(name, spec.numel):
                noted = self.pieces.get((name, piece.number))
                if noted is None:
                    continue
                raw = np.empty((piece.stop - piece.start) * width, np.uint8)
                writer.read_back(name, piece.start, raw)
                if progress is not None:
                    progress(name, raw.size)
                hashers.update([raw])
                if hashers.take()[0] != noted[0][-1]:
                    del self.pieces[name, piece.number]

    def tensor(self, which: int, name: str, spec: TensorSpec) -> str | None:
        """The fingerprint of a tensor in input ``which`` of its job (-1: in the output)."""
        found = [self.pieces.get((name, p.number)) for p in pieces_of(name, spec.numel)]
        return tensor_fingerprint([p[0][which] for p in found if p]) if all(found) else None


class _Local:
    """One thread's output buffer, digests and counts."""

    def __init__(self, job: MergeJob) -> None:
        self.hashers = Hashers(len(job.sources.all) + 1)
        self.raw = np.zeros(span_of(job.block) * 8, np.uint8)
        self.counts = np.zeros(3, np.int64)
        self.entries: list[list[Any]] = []


def _bytes(raw: Array | None) -> Array:
    assert raw is not None
    return raw


class _Merging(Visitor[_Local]):
    """The visitor that writes."""

    def __init__(self, job: MergeJob, state: Any, writer: Sink, done: _Done) -> None:
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
        if learned and compiled.widen(raw, DTYPES[spec.dtype].code, block.count, block.out):
            block.refuse([self.job.sources.reference])
        if spec.dtype == new.dtype:
            out[:] = raw
            return
        wild = compiled.narrow(block.out, DTYPES[new.dtype].code, block.count, out)
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
            compiled.finish_double(_bytes(block.raw(0)), block.out, block.count, out, counts)
        elif self.job.sources.how == WEIGHT and not target.filled:
            counts[2] += compiled.narrow(block.out, code, block.count, out)
        elif not target.filled:
            compiled.finish(block.base, block.out, code, kept, block.count, out, counts)
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


def bytes_read(job: MergeJob, names: Iterable[str]) -> int:
    """Bytes of some tensors in all inputs."""
    return sum(c.specs[n].nbytes for n in names for c in job.sources.all if n in c.specs)


def prepared(jobs: Sequence[MergeJob], stage: Stage = _silent) -> list[Any]:
    """What each merge has to know of all tensors before it makes one: read once, in order."""
    progress = stage("prepare", sum(bytes_read(j, j.names) * j.merge.passes for j in jobs))
    return [
        job.merge.prepare(
            Context(job.sources, job.names, job.models, job.threads, job.block, progress)
        )
        for job in jobs
    ]


def make_tensor(name: str, jobs: Sequence[MergeJob], states: Sequence[Any], writer: Sink) -> None:
    """Merge one tensor alone, into the writer: the bytes that ``apply`` gives it.

    Args:
        name: of the tensor; one of the jobs makes it.
        jobs: of the whole merge.
        states: what ``prepared`` gave for them.
        writer: where the tensor goes.

    Raises:
        SutureError: an input is at fault.
    """
    for job, state in zip(jobs, states, strict=True):
        if name in job.specs:
            merging = _Merging(job, state, writer, _Done())
            sweep(job.sources, tasks_of([name], job.specs), merging, threads=job.threads,
                  block=job.block)  # fmt: skip


def apply(
    jobs: Sequence[MergeJob], writer: Sink, inputs: Mapping[str, Checkpoint], stage: Stage = _silent
) -> Outcome:
    """Merge into the writer's staging folder, or memory; the caller adds its files and publishes.

    Args:
        jobs: what makes the output's tensors, each of them one.
        writer: where they go.
        inputs: the models by label, whose fingerprints are taken.
        stage: told of each stage.

    Raises:
        SutureError: an input or the output is at fault; what was finished stays for a later run.
    """
    begun = time.perf_counter()
    done = _Done()
    if writer.resumed:
        for line in writer.journal():
            for entry in line:
                done.add(entry)
        done.verify(writer, stage("verify", done.nbytes(writer.specs)))
    resumed = len(done.pieces)
    work = [_left(job, done) for job in jobs]
    # Also where nothing is left to do: the state has the facts of the record.
    states = prepared(jobs, stage)
    ready = time.perf_counter()
    left = sum(
        _nbytes(job, piece)
        for job, tasks in zip(jobs, work, strict=True)
        for task in tasks
        for piece in task
    )
    progress = stage("merge", left)
    for job, tasks, state in zip(jobs, work, states, strict=True):
        merging = _Merging(job, state, writer, done)
        sweep(job.sources, tasks, merging, threads=job.threads, block=job.block,
              progress=progress)  # fmt: skip
    outcome = _outcome(jobs, done, states, inputs, writer.specs, resumed)
    outcome.seconds = {
        "prepare": ready - begun,
        "merge": time.perf_counter() - ready,
    }
    return outcome


def _left(job: MergeJob, done: _Done) -> list[list[Piece]]:
    """The pieces of a job that are still to do, in tasks."""
    return [
        todo
        for task in tasks_of(_in_file_order(job), job.specs)
        if (todo := [p for p in task if (p.name, p.number) not in done.pieces])
    ]


def _nbytes(job: MergeJob, piece: Piece) -> int:
    return sum(
        (piece.stop - piece.start) * DTYPES[c.specs[piece.name].dtype].itemsize
        for c in job.sources.all
        if piece.name in c.specs
    )


def _in_file_order(job: MergeJob) -> list[str]:
    """The order in which the reference's files hold the tensors, so that disks read forward."""
    places = job.sources.reference.places
    return sorted(job.specs, key=lambda name: places[name])


def _outcome(
    jobs: Sequence[MergeJob], done: _Done, states: Sequence[Any], inputs: Mapping[str, Checkpoint],
    specs: Mapping[str, TensorSpec], resumed: int,
) -> Outcome:  # fmt: skip
    seen = _seen(jobs, done, list(inputs.values()))
    prints = {}
    for label, checkpoint in inputs.items():
        tensors = seen[checkpoint]
        beyond = [name for name in checkpoint.specs if name not in tensors]
        tensors |= tensor_fingerprints(checkpoint, beyond) if beyond else {}
        prints[label] = fingerprint(checkpoint.specs, tensors)
    made = {name: found for name, spec in specs.items() if (found := done.tensor(-1, name, spec))}
    prints["output"] = fingerprint(specs, made)
    moved: dict[str, int] = {}
    lost: dict[str, int] = {}
    for (name, _), (_, more, less) in done.pieces.items():
        moved[name] = moved.get(name, 0) + more
        lost[name] = lost.get(name, 0) + less
    facts = [
        {} if state is None else job.merge.facts(state)
        for job, state in zip(jobs, states, strict=True)
    ]
    told = facts[0] if len(facts) == 1 else {"slices": facts} if any(facts) else {}
    lines = (
        line
        for job, state in zip(jobs, states, strict=True)
        if state is not None
        for line in job.merge.tell(state)
    )
    return Outcome(prints, made, moved, lost, told, resumed, told=tuple(lines))


def _seen(
    jobs: Sequence[MergeJob], done: _Done, inputs: Sequence[Checkpoint]
) -> dict[Checkpoint, dict[str, str]]:
    """The fingerprints of the inputs' tensors that the jobs read, under their own names."""
    found: dict[Checkpoint, dict[str, str]] = {checkpoint: {} for checkpoint in inputs}
    for job in jobs:
        for number, source in enumerate(job.sources.all):
            for name in job.specs:
                place = _home(source, name, found) if name in source.specs else None
                if place is None or place[1] in found[place[0]]:
                    continue
                print_ = done.tensor(number, name, source.specs[name])
                if print_ is not None:
                    found[place[0]][place[1]] = print_
    return found


def _home(
    source: Checkpoint, name: str, inputs: Collection[Checkpoint]
) -> tuple[Checkpoint, str] | None:
    """The tensor of an input that a view shows under this name, as it is."""
    while source not in inputs:
        lens = source.lenses[name] if isinstance(source, View) else None
        if not isinstance(lens, Same):
            return None
        source, name = lens.origin
    return source, name


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


def peak_memory(jobs: Sequence[MergeJob]) -> int:
    """Bytes that a merge holds at most, above the interpreter and the compiled kernels."""
    journal = sum(
        max(1, -(-spec.numel // PIECE)) * 200 * (len(job.sources.all) + 2)
        for job in jobs
        for spec in job.specs.values()
    )
    return max(_buffers(job) for job in jobs) + journal


def _buffers(job: MergeJob) -> int:
    models, inputs = len(job.sources.models), len(job.sources.all)
    threads = job.threads or 1
    blocks = job.block * (4 * models + 3 * 4) + span_of(job.block) * 8 * (inputs + 1)
    counting = models * (2 * 4 * compiled.BINS + 4 * topk.WIDTH)
    shared = models * 8 * topk.WIDTH
    per_thread = 2 * blocks + (counting if job.merge.passes else 0)
    whole = max((job.merge.memory(job.specs[n], models) for n in job.names), default=0)
    return threads * per_thread + shared + whole


__all__ = [
    "DELTA",
    "MergeJob",
    "Outcome",
    "apply",
    "checkpoint_fingerprint",
    "make_tensor",
    "output_specs",
    "peak_memory",
    "prepared",
]
