"""The trainings of the strategies: each a function of a job and the strategy's parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints.linearized import LINEARIZED
from suture.errors import RecipeError, did_you_mean
from suture.schema.paths import place_of
from suture.tensors.roles import role_of
from suture.training.calibrate import (
    Calibration,
    calibrate,
    prunable,
    sensitivity,
    smallest,
    structure,
    upper,
)
from suture.training.compact import Compact
from suture.training.lora import LoraUpdates
from suture.training.loss import LossStep
from suture.training.strategies import MASKS
from suture.training.strategy import TrainJob, Tuned, entries, given_mask, ones
from suture.training.tangent import Tangent


def full(job: TrainJob, embeddings: bool, blocks: int) -> Tuned:
    """Train every weight of the body, or those of the last blocks."""
    count = _everything(job, embeddings, blocks)
    return Tuned(job.train(LossStep(job.model, job.loss)), count)


def _everything(job: TrainJob, embeddings: bool, blocks: int) -> int:
    """Let every parameter of the body ask for gradients; how many entries that is."""
    names = [n for n, _ in job.model.named_parameters() if n.startswith(job.body)]
    learning = {
        n
        for n in upper(names, blocks)
        if n in job.places and (embeddings or role_of(n).kind not in ("embedding", "position"))
    }
    count = 0
    for name in names:
        parameter = job.model.get_parameter(name)
        parameter.requires_grad_(name in learning)
        count += parameter.numel() if name in learning else 0
    return count


def linearized(job: TrainJob, embeddings: bool, blocks: int) -> Tuned:
    """Train the first-order expansion of the model."""
    count = _everything(job, embeddings, blocks)
    step = Tangent(job.model, job.loss)
    result = job.train(step)
    return Tuned(result, count, form=LINEARIZED, evaluated=step.evaluated, finish=step.move)


def lora(
    job: TrainJob, rank: int, alpha: float, targets: tuple[str, ...], dropout: float, blocks: int
) -> Tuned:
    """Train low-rank updates; they are merged into the weights at the end."""
    adapter = LoraUpdates(
        job, rank=rank, alpha=alpha, targets=targets, dropout=dropout, seed=job.settings.seed,
        blocks=blocks,
    )  # fmt: skip
    count = adapter.count
    result = job.train(LossStep(job.model, job.loss))
    return Tuned(result, count, save=adapter.save, finish=adapter.merge)


def linearized_lora(
    job: TrainJob, rank: int, alpha: float, targets: tuple[str, ...], seed: int, blocks: int
) -> Tuned:
    """Train one half of low-rank updates; the other is drawn from ``seed`` and stays."""
    adapter = LoraUpdates(
        job, rank=rank, alpha=alpha, targets=targets, dropout=0.0, seed=seed, blocks=blocks
    )
    digest = adapter.freeze_a()
    count = adapter.count
    result = job.train(LossStep(job.model, job.loss))
    return Tuned(result, count, adapter=digest, save=adapter.save, finish=adapter.merge)


def lota(job: TrainJob, density: float, dense_steps: int, dense_lr: float) -> Tuned:
    """Train all in a dense phase, go back, and train the entries that moved most."""
    names = _trainable(job, prunable(job.model))

    def largest() -> dict[str, Tensor]:
        known = dict(job.model.named_parameters())
        start = {n: p.detach().clone() for n, p in known.items() if n in names or n in job.head()}
        job.freeze()
        for name in names:
            known[name].requires_grad_()
        settings = replace(
            job.settings, steps=dense_steps or job.settings.steps, lr=dense_lr or job.settings.lr
        )
        job.say("dense phase")
        job.train(LossStep(job.model, job.loss), "dense", settings)
        with torch.no_grad():
            moved = {n: (known[n] - start[n]).abs() for n in names}
            for name, value in start.items():
                known[name].copy_(value)  # rewind
        budget = _budget(density, moved)
        return smallest(moved, ones(moved), budget, largest=True)

    masks = job.once("mask", largest, {"rule": "lota", "density": density})
    job.say("sparse phase")
    return _sparse(job, masks)


def talos(job: TrainJob, how: Calibration, blocks: int) -> Tuned:
    """Train the entries that the outputs are least sensitive to."""

    def make() -> dict[str, Tensor]:
        names = _trainable(job, prunable(job.model, blocks=blocks))
        return calibrate(job.model, job.calibration, names, how, device=job.device, say=job.say)

    about = {"rule": "talos", **vars(how), "blocks": blocks}
    return _sparse(job, job.once("mask", make, about))


def masked(
    job: TrainJob, mask: str, density: float, only: tuple[str, ...], rows: int, seed: int
) -> Tuned:
    """Train the entries of a mask that is given or named."""

    def make() -> dict[str, Tensor]:
        if mask in MASKS:
            return _named_mask(job, mask, density, only, Calibration(rows=rows, seed=seed))
        path = place_of(mask, job.folder)
        if not path.is_file():
            raise RecipeError(f"parameters.mask: no file {path}; {did_you_mean(mask, MASKS)}")
        return job.masks_of(given_mask(path), str(path))

    about = {"rule": f"masked: {Path(mask).name}", "density": density}
    return _sparse(job, job.once("mask", make, about))


def _named_mask(
    job: TrainJob, mask: str, density: float, only: tuple[str, ...], how: Calibration
) -> dict[str, Tensor]:
    known = dict(job.model.named_parameters())
    names = _trainable(job, prunable(job.model))
    budget = _budget(density, {n: known[n] for n in names})
    names = [n for n in names if not only or _part(n) in only]
    if not names:
        raise RecipeError(f"parameters.only: no prunable tensor is {' or '.join(only)}")
    everything = ones({n: known[n] for n in names})
    if mask == "dense":
        return everything
    if mask == "random":
        dice = torch.Generator().manual_seed(how.seed)
        scores = {n: torch.rand(known[n].shape, generator=dice).to(known[n].device) for n in names}
    else:
        scores = sensitivity(job.model, job.calibration, names, how, device=job.device)
    budget = min(budget, sum(m.numel() for m in everything.values()))
    return smallest(scores, everything, budget, largest=mask == "most-sensitive")


def _part(name: str) -> str:
    """The role of a parameter; a bias counts with its weight."""
    kind = role_of(name).kind
    return role_of(name.removesuffix("bias") + "weight").kind if kind == "bias" else kind


def _trainable(job: TrainJob, names: list[str]) -> list[str]:
    return [n for n in names if n in job.places]


def _budget(density: float, tensors: dict[str, Tensor]) -> int:
    budget = int(density * sum(t.numel() for t in tensors.values()) + 1e-9)
    if not budget:
        raise RecipeError(f"parameters.density: {density} of the prunable entries is not even one")
    return budget


def _sparse(job: TrainJob, masks: dict[str, Tensor]) -> Tuned:
    """Train the chosen entries, and a learned head with them."""
    head = ones(job.head())
    mover = Compact(job.model, {**masks, **head}, job.loss)
    result = job.train(mover)
    mover.close()
    facts: dict[str, Any] = {
        "structure": structure(masks),
        "tensors": sum(bool(m.any()) for m in masks.values()),
    }
    return Tuned(result, entries(masks), masks, facts=facts)


__all__ = ["full", "linearized", "linearized_lora", "lora", "lota", "masked", "talos"]
