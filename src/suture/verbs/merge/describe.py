"""What a plan will do, how long it takes, and where two languages of recipes differ, in words."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suture.checkpoints.writer import plan_shards
from suture.merges.apply import MergeJob, peak_memory
from suture.stream.sweep import Block, Visitor, sweep, tasks_of
from suture.tensors.spec import PIECE, Piece
from suture.verbs.merge.documents import read_recipe
from suture.verbs.merge.plan import Plan, stage_folder


def describe(plan: Plan) -> dict[str, Any]:
    """What a plan will do, as plain data: inputs, output, bytes, memory, time, notes."""
    elements = sum(job.specs[n].numel for job in plan.jobs for n in job.names)
    passes = [job.merge.passes + 1 for job in plan.jobs]
    return {
        "method": plan.recipe.method.name,
        "parameters": plan.recipe.resolved()["parameters"],
        "inputs": {
            label: {"path": c.label, "tensors": len(c), "bytes": c.nbytes, "files": len(c.files),
                    "tied": c.aliases}
            for label, c in plan.inputs.items()
        },
        "output": {
            "path": None if plan.out is None else str(plan.out),
            "tensors": len(plan.specs),
            "merged": plan.merged,
            "merged_elements": elements,
            "copied": len(plan.specs) - plan.merged,
            "bytes": plan.nbytes,
            "shards": len(plan_shards(plan.specs, plan.recipe.shard_size, plan.whole)),
        },
        "bytes_read": plan.reads,
        "passes": max(passes),
        "threads": plan.jobs[0].threads,
        "peak_memory": peak_memory(plan.jobs),
        "seconds": estimate(plan),
        "notes": list(plan.notes),
        "stages": {
            name: {"method": one.recipe.method.name, "tensors": len(one.specs),
                   "bytes": one.nbytes, "path": str(stage_folder(one)),
                   "kept": stage_folder(one).exists()}
            for name, one in plan.stages.items()
        },
    }  # fmt: skip


def explain(recipe: Path | Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe means in Suture's terms, and where Suture's defaults would differ.

    Raises:
        RecipeError: everything that is wrong with it, at once; models are not opened.
    """
    from suture.verbs.merge.mergekit import differences, native

    found = read_recipe(recipe)
    merges = {**found.stages, "": found}
    return {
        "mergekit": found.kit is not None or any(s.kit for s in found.stages.values()),
        "differences": {
            name: differences(one) for name, one in merges.items() if one.kit is not None
        },
        "native": native(found),
        "notes": [
            note
            for one in merges.values()
            for note in (*one.notes, *([one.protect.told] if one.protect is not None else ()))
        ],
    }


class _Nothing(Visitor[None]):
    """Reads and widens, to see how long that takes."""

    def see(self, local: None, block: Block) -> None:
        _ = block.rows


def estimate(plan: Plan) -> float:
    """Seconds that the merge will take, from reading a little of it (at most 64 MB a model)."""
    total = sum(
        job.specs[n].numel * 2 * (job.merge.passes + 1) for job in plan.jobs for n in job.names
    )
    job = max(plan.jobs, key=lambda job: len(job.names))
    sample = _sample(job)
    if not sample or not plan.ready:
        return plan.nbytes / 5e8
    small = Block(job.sources, job.block)  # compiles the kernels outside of the measure
    small.load(sample[0][0].name, 0, min(8, sample[0][0].stop))
    begun = time.perf_counter()
    sweep(job.sources, sample, _Nothing(), threads=job.threads, block=job.block)
    took = time.perf_counter() - begun
    taken = sum((p.stop - p.start) for task in sample for p in task) or 1
    # Counting or combining costs about as much again as reading; then the output is written.
    return took / taken * total + plan.nbytes / 5e8


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
