"""What SOMF is compared with: weights computed tensor by tensor, without training.

``fused`` is the aligned model plus the fused task vectors, ``delta`` that change alone, and ``v``
the alignment itself: aligned minus base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suture.analysis.ancestry import across, array
from suture.checkpoints.checkpoint import Checkpoint
from suture.edits.mask import Mask, localize
from suture.schema.paths import place_of
from suture.stream.vector import TaskVector
from suture.tensors.roles import role_of
from suture.verbs.realign.base import Edit, Realigned, RealignJob, needed
from suture.verbs.realign.concrete import rescaled
from suture.verbs.realign.fuse import dice

VOCABULARY = ("embedding", "head", "position")
"""Roles whose matrices are no maps between features, and have no subspace to project on."""


def resta(job: RealignJob, gamma: float, density: float, seed: int) -> Realigned:
    """``fused + gamma v``; below a density of 1 with DARE on ``v``."""
    fused, base = job.fused(), needed(job.models.base, "base")

    def edit(name: str) -> Tensor:
        v = job.aligned(name) - array(base, name)
        if density < 1:
            v = v * _kept(v, density, seed, name) / density
        return fused(name) + gamma * v

    return Realigned(edit)


def dare(job: RealignJob, density: float, seed: int) -> Realigned:
    """Entries of every task vector dropped at random, the rest divided by their share."""

    def mask(task: int) -> Callable[[str], Tensor]:
        def kept(name: str) -> Tensor:
            delta = job.aligned(name)
            return _kept(delta, density, seed, task, name) / density

        return kept

    return Realigned(job.masked([mask(task) for task in range(len(job.models.tuned))]))


def _kept(like: Tensor, density: float, seed: int, *words: object) -> Tensor:
    draw = torch.rand(like.shape, generator=dice(seed, "drop", *words))
    return (draw < density).to(like)


def masked(
    job: RealignJob, rule: str, density: float, scope: str, rescale: str, seed: int
) -> Realigned:
    """Task vectors through masks of exactly this density; random ones are shared by all tasks."""
    tuned = job.models.tuned
    masks = {}
    for label, model in tuned.items():
        vector = TaskVector(job.models.aligned, [(model, 1.0)], job.names)
        masks[label] = localize(vector, rule, density=density, scope=scope, seed=seed,
                                threads=job.threads)  # fmt: skip
        if rule == "random":
            masks = dict.fromkeys(tuned, masks[label])
            break

    def way(mask: Mask) -> Callable[[str], Tensor]:
        return lambda name: rescaled(torch.from_numpy(mask[name].astype(np.float32)), rescale)

    one = rule == "random" or len(tuned) == 1
    files = {"mask": next(iter(masks.values()))} if one else {f"mask-{m}": k for m, k in
                                                              masks.items()}  # fmt: skip
    edit = job.masked([way(mask) for mask in masks.values()])
    shares = {name: (sum(_mean(m, name) for m in masks.values()) / len(masks), _size(job, name))
              for name in job.names}  # fmt: skip
    return Realigned(edit, {"density": next(iter(masks.values())).density}, files, shares=shares)


def _mean(mask: Mask, name: str) -> float:
    return float(mask[name].mean()) if name in mask.shapes else 0.0


def _size(job: RealignJob, name: str) -> int:
    return job.models.aligned.specs[name].numel


def protect(job: RealignJob, density: float, mask: str) -> Realigned:
    """``fused``, with the entries that matter for safety put back to their aligned values.

    They are those of a mask, or those in which the alignment moved the base the most.
    """
    fused = job.fused()
    if mask:
        found = Mask.load(place_of(mask, job.folder))
    else:
        base = needed(job.models.base, "base")
        vector = TaskVector(base, [(job.models.aligned, 1.0)], job.models.names)
        found = localize(vector, "magnitude", density=density, threads=job.threads)

    def edit(name: str) -> Tensor:
        new = fused(name)
        if name not in found.shapes:
            return new
        return torch.where(torch.from_numpy(found[name]), job.aligned(name), new)

    shares = {name: (1.0 - _mean(found, name), _size(job, name)) for name in job.names}
    return Realigned(edit, {"density": found.density}, {"mask": found}, shares=shares)


# -- projections on the subspace of the alignment --------------------------------------------------


class Projections:
    """``C delta`` and how much it looks like ``delta``, for every matrix that both moved.

    ``C = v v^T / |v|`` is no projector: its eigenvalues are those of ``v v^T`` over ``|v|``.
    ``normalise`` divides by the largest of ``v v^T`` instead, so that nothing grows or vanishes.
    """

    def __init__(self, job: RealignJob, normalise: bool) -> None:
        self.job, self.normalise = job, normalise
        self.base: Checkpoint = needed(job.models.base, "base")
        self.fused = job.fused()
        self.cosines: dict[str, float] = {}
        """By tensor, of ``delta`` and ``C delta``; matrices that lie still have none."""
        for name in job.names:
            shape = job.models.aligned.specs[name].shape
            if len(shape) != 2 or role_of(name).kind in VOCABULARY:
                continue
            delta = self.delta(name)
            projected = self.projected(name, delta)
            lengths = float(delta.norm()) * float(projected.norm())
            if lengths:
                self.cosines[name] = float((delta.double() * projected.double()).sum()) / lengths

    def delta(self, name: str) -> Tensor:
        """What was fused, of one tensor."""
        return self.fused(name) - self.job.aligned(name)

    def projected(self, name: str, delta: Tensor) -> Tensor:
        """``C delta``, outputs first; C is not formed where that is dearer."""
        v = self.job.aligned(name) - array(self.base, name)
        flip = across(name) == 1
        v, d = (v.T, delta.T) if flip else (v, delta)
        found = v @ (v.T @ d) if v.shape[1] <= v.shape[0] else (v @ v.T) @ d
        length = torch.linalg.matrix_norm(v, 2) ** 2 if self.normalise else v.norm()
        found = found / length if float(length) else found
        return found.T if flip else found


def safelora(
    job: RealignJob, select: str, threshold: float, number: int, normalise: bool
) -> Realigned:
    """``aligned + C delta`` for matrices whose change the alignment's subspace explains least."""
    found = Projections(job, normalise)
    if select == "threshold":
        chosen = {n for n, cosine in found.cosines.items() if cosine <= threshold}
    else:
        order = sorted(found.cosines, key=lambda n: (found.cosines[n], n))
        chosen = set(order[:number])

    def edit(name: str) -> Tensor:
        if name not in chosen:
            return found.fused(name)
        return job.aligned(name) + found.projected(name, found.delta(name))

    return Realigned(edit, _chosen(found, chosen))


def safemerge(job: RealignJob, threshold: float, weight: float, normalise: bool) -> Realigned:
    """``weight delta + (1 - weight) (safety - aligned)`` for matrices below the threshold."""
    found, safety = Projections(job, normalise), needed(job.models.safety, "safety")
    chosen = {n for n, cosine in found.cosines.items() if cosine < threshold}

    def edit(name: str) -> Tensor:
        if name not in chosen:
            return found.fused(name)
        aligned = job.aligned(name)
        mixed = weight * found.delta(name) + (1 - weight) * (array(safety, name) - aligned)
        return aligned + mixed

    return Realigned(edit, _chosen(found, chosen))


def _chosen(found: Projections, chosen: set[str]) -> dict[str, Any]:
    cosines = sorted(found.cosines.values())
    middle = cosines[len(cosines) // 2] if cosines else None
    return {"matrices": len(cosines), "realigned": len(chosen), "cosine": middle}


# -- how far back is far enough --------------------------------------------------------------------


def line_search(job: RealignJob, metric: str, retain: float, points: int) -> Realigned:
    """``fused + c (aligned - fused)`` with the c that passes at the least loss of utility.

    Points pass where the metric of the validation pairs is at least ``tuned + retain (aligned -
    tuned)``. Without utility rows the smallest c that passes is taken.
    """
    pairs, fused = needed(job.validation, "data.validation"), job.fused()
    rows = job.utility if job.choosing is None else job.choosing

    def at(c: float) -> Edit:
        return lambda name: torch.lerp(fused(name), job.aligned(name), c)

    shares: Sequence[float] = np.linspace(0.0, 1.0, points).tolist()
    looks = []
    for c in shares:
        job.place(at(c))
        looks.append(job.scores(pairs, rows))
        job.say(f"c = {c:.3g}: {metric} {looks[-1][metric].value:.4g}")
    values = [look[metric].value for look in looks]
    least = values[0] + retain * (values[-1] - values[0])
    passing = [i for i, value in enumerate(values) if value >= least or i == len(values) - 1]
    best = min(
        passing, key=lambda i: (looks[i]["utility"].value if "utility" in looks[i] else 0.0, i)
    )
    line = [{"c": c, **{k: m.value for k, m in look.items()}}
            for c, look in zip(shares, looks, strict=True)]  # fmt: skip
    return Realigned(at(shares[best]), {"coefficient": shares[best], "gate": least, "line": line})


__all__ = [
    "Projections", "dare", "line_search", "masked", "protect", "resta", "safelora", "safemerge",
]  # fmt: skip
