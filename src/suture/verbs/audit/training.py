"""Models that an audit trains itself: the attack, and the same with entries frozen; all marked."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from suture.checkpoints.checkpoint import Checkpoint, open_checkpoint
from suture.edits.mask import Mask
from suture.edits.mask_file import marked
from suture.errors import SutureError
from suture.merges.apply import checkpoint_fingerprint
from suture.runs.ledger import Ledger, digest
from suture.runs.progress import Progress
from suture.training.loop import TrainingStep
from suture.verbs.audit.plan import Plan, tune_plan
from suture.verbs.audit.stitched import Key, Region
from suture.verbs.finetune.run import execute


def train(
    plan: Plan, ledger: Ledger, where: Path, seed: int, region: Region | None, name: str, key: Key
) -> Checkpoint:
    """The model in a folder: as it lies there if it is that of ``key``, else trained now.

    Only the entries of ``region`` move (``None``: all of the space); the update itself is masked,
    so that momentum and weight decay leave the others alone, bit for bit. An interrupted training
    goes on where it stopped.

    Raises:
        SutureError: training failed; its last state is kept.
    """
    fresh = True
    if where.is_dir():
        try:
            there = open_checkpoint(where)
            held = ledger.find(name, digest(key))
            fresh = held is None or held["value"] != checkpoint_fingerprint(there)
        except SutureError:
            fresh = True
        if fresh:
            shutil.rmtree(where)

    def make() -> str:
        allowed = where.with_name(f".{where.name}.mask.safetensors")
        _mask(plan, region).save(allowed)
        tuning = tune_plan(
            plan.recipe, plan.aligned, plan.attack, where, seed, plan.device, allowed
        )

        def tell(phase: str, at: TrainingStep) -> None:
            tenth = max(1, at.steps // 10)
            if at.step % tenth == 0 and at.step < at.steps:
                ledger.say(f"{name}: step {at.step} of {at.steps}, loss {at.loss:.4f}, "
                           f"{at.eta:.0f} s left")  # fmt: skip

        execute(tuning, Progress(say=ledger.say, step=tell))
        allowed.unlink()
        return checkpoint_fingerprint(open_checkpoint(where))

    ledger.cell(("training", ""), name, key, make, fresh=fresh)
    return open_checkpoint(where)


def _mask(plan: Plan, region: Region | None) -> Mask:
    if region is not None:
        found = region.make()
        return Mask(found.shapes, found.bits, marked({}, True))
    every = {n: np.ones(plan.aligned.specs[n].shape, np.bool_) for n in plan.names}
    return Mask.of(every, marked({}, True))


__all__ = ["train"]
