"""How long a merge will take."""

from __future__ import annotations

import time
from collections.abc import Sequence

from suture.merges.apply import MergeJob
from suture.stream.sweep import Block, Visitor, sweep, tasks_of
from suture.tensors.spec import PIECE, Piece


class _Nothing(Visitor[None]):
    """Reads and widens, to see how long that takes."""

    def see(self, local: None, block: Block) -> None:
        _ = block.rows


def estimate(jobs: Sequence[MergeJob], nbytes: int, *, ready: bool) -> float:
    """Return the seconds that a merge will take, from reading a little of it.

    At most 64 MB of each model are read.

    Args:
        jobs: the parts of the merge.
        nbytes: of the output.
        ready: whether all inputs are there; what a stage makes first cannot be read.
    """
    total = sum(job.specs[n].numel * 2 * (job.merge.passes + 1) for job in jobs for n in job.names)
    job = max(jobs, key=lambda job: len(job.names))
    sample = _sample(job)
    if not sample or not ready:
        return nbytes / 5e8
    small = Block(job.sources, job.block)  # compiles the kernels outside of the measure
    small.load(sample[0][0].name, 0, min(8, sample[0][0].stop))
    begun = time.perf_counter()
    sweep(job.sources, sample, _Nothing(), threads=job.threads, block=job.block)
    took = time.perf_counter() - begun
    taken = sum((p.stop - p.start) for task in sample for p in task) or 1
    # Counting or combining costs about as much again as reading; then the output is written.
    return took / taken * total + nbytes / 5e8


def _sample(job: MergeJob) -> list[list[Piece]]:
    """The first tasks of a job, with 16 pieces or fewer."""
    names, most = [], 0
    for name in job.names:
        names.append(name)
        most += job.specs[name].numel
        if most >= 16 * PIECE:
            break
    found: list[list[Piece]] = []
    room = 16 * PIECE
    for task in tasks_of(names, job.specs):
        size = sum(p.stop - p.start for p in task)
        if found and size > room:
            break
        found.append(task)
        room -= size
    return found
