"""What realignment changes: tensors of the aligned model with the task vectors of the tuned ones.

A part is one tensor of the model. In the space ``delta_w`` it is masked as it is; in the space
``factors`` the two factors of its LoRA are masked, each by its own logits:

    delta_w    W = W_safe + Fuse(m * (W_i - W_safe))
    factors    W = W_0 + s B A,  B = B_safe + Fuse(m_B * (B_i - B_safe)),  A likewise
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from suture.checkpoints.adapters import Adapted, LowRank
from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.views import View
from suture.errors import MismatchError, NonFiniteError, Problems
from suture.stream.vector import TaskVector
from suture.tensors.spec import listed

Fused = Callable[[str, Sequence[Tensor]], Tensor]
"""The change of what a key names, from its task vectors."""
_TRANSPOSED = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$")
"""Matrices of GPT-2, which lie as (inputs, outputs)."""


class Part(Protocol):
    """One tensor of the model, and what is masked of it, in memory."""

    @property
    def name(self) -> str:
        """Of the tensor in the aligned checkpoint."""

    @property
    def deltas(self) -> Mapping[str, list[Tensor]]:
        """The task vectors of what is masked, by its key."""

    def weights(self, fused: Fused) -> Tensor:
        """The tensor with a change on it."""

    def to(self, dtype: torch.dtype) -> Part:
        """The same in another dtype."""


@dataclass(frozen=True)
class Unmasked:
    """A tensor masked as it is."""

    name: str
    safe: Tensor
    tasks: list[Tensor]

    @property
    def deltas(self) -> Mapping[str, list[Tensor]]:
        """The task vectors, under the name of the tensor."""
        return {self.name: self.tasks}

    def weights(self, fused: Fused) -> Tensor:
        """The aligned weights plus the change."""
        return self.safe + fused(self.name, self.tasks)

    def to(self, dtype: torch.dtype) -> Unmasked:
        """The same in another dtype."""
        return Unmasked(self.name, self.safe.to(dtype), [t.to(dtype) for t in self.tasks])


@dataclass(frozen=True)
class Factors:
    """A tensor whose low-rank factors are masked."""

    name: str
    rest: Tensor
    """The weights that the factors are put on."""
    left: Tensor
    right: Tensor
    lefts: list[Tensor]
    rights: list[Tensor]
    scale: float

    @property
    def deltas(self) -> Mapping[str, list[Tensor]]:
        """The task vectors of both factors."""
        return {f"{self.name}:left": self.lefts, f"{self.name}:right": self.rights}

    def weights(self, fused: Fused) -> Tensor:
        """The product of the changed factors, on what they are put on."""
        left = self.left + fused(f"{self.name}:left", self.lefts)
        right = self.right + fused(f"{self.name}:right", self.rights)
        return self.rest + self.scale * (left @ right).view(self.rest.shape)

    def to(self, dtype: torch.dtype) -> Factors:
        """The same in another dtype."""
        return Factors(
            self.name, self.rest.to(dtype), self.left.to(dtype), self.right.to(dtype),
            [t.to(dtype) for t in self.lefts], [t.to(dtype) for t in self.rights], self.scale,
        )  # fmt: skip


def across(key: str) -> int:
    """The axis of outputs of a matrix: 1 where it is stored as (inputs, outputs)."""
    return 1 if _TRANSPOSED.search(key) or key.endswith(":right") else 0


@dataclass(frozen=True)
class RealignModels:
    """The checkpoints of a realignment."""

    aligned: Checkpoint
    tuned: Mapping[str, Checkpoint]
    weights: Mapping[str, float]
    """Factors on the task vectors."""
    names: tuple[str, ...]
    """The tensors that may change."""
    base: Checkpoint | None = None
    """The pretrained ancestor of the aligned model."""
    safety: Checkpoint | None = None
    """A model tuned from the aligned one on safety data alone."""

    def whole(self, name: str, device: str = "cpu") -> Unmasked:
        """One tensor with its task vectors."""
        safe = array(self.aligned, name, device)
        tasks = [self.weights[m] * (array(c, name, device) - safe) for m, c in self.tuned.items()]
        return Unmasked(name, safe, tasks)

    def factors(self, name: str, device: str = "cpu") -> Factors:
        """One tensor with the task vectors of its factors."""
        safe = lens_of(self.aligned, name)
        assert safe is not None
        left, right, scale = safe.product()
        b, a = (torch.tensor(f, device=device) for f in (left, right))
        lefts, rights = [], []
        for model, checkpoint in self.tuned.items():
            lens = lens_of(checkpoint, name)
            assert lens is not None
            other = lens.product()
            share = other.scale / scale  # one factor takes another scale on itself
            weight = self.weights[model]
            lefts.append(weight * (share * torch.tensor(other.left, device=device) - b))
            rights.append(weight * (torch.tensor(other.right, device=device) - a))
        return Factors(
            name, array(safe.origin[0], safe.origin[1], device), b, a, lefts, rights, scale
        )


def masked_shapes(models: RealignModels, space: str) -> dict[str, tuple[int, ...]]:
    """The shapes of what is masked, by its key, from headers alone."""
    found: dict[str, tuple[int, ...]] = {}
    for name in models.names:
        shape, lens = models.aligned.specs[name].shape, lens_of(models.aligned, name)
        if space == "delta_w":
            found[name] = shape
        elif lens is not None:
            rank = lens.adapter.rank(lens.module.name)
            found[f"{name}:left"] = (shape[0], rank)
            found[f"{name}:right"] = (rank, math.prod(shape[1:]))
    return found


def array(checkpoint: Checkpoint, name: str, device: str = "cpu") -> Tensor:
    """A tensor of a checkpoint in float32."""
    return torch.tensor(np.asarray(checkpoint[name], np.float32), device=device)


def lens_of(checkpoint: Checkpoint, name: str) -> LowRank | None:
    """How a tensor is computed from factors; ``None`` where it is not."""
    lens = checkpoint.lenses.get(name) if isinstance(checkpoint, View) else None
    return lens if isinstance(lens, LowRank) else None


def check_factors(models: RealignModels, problems: Problems) -> None:
    """Note what keeps factors from being masked: other modules, other ranks, another ground."""
    if not isinstance(models.aligned, Adapted):
        problems.add(
            MismatchError,
            f"parameters.space: factors: {models.aligned.label} has no adapter whose factors the "
            "tuned ones continue; use delta_w, or name it BASE+ADAPTER",
        )
        return
    names = [n for n in models.aligned.lenses if lens_of(models.aligned, n) is not None]
    for label, tuned in models.tuned.items():
        who = f"models.{label}: {tuned.label} against {models.aligned.label}"
        theirs = [n for n in tuned.specs if lens_of(tuned, n) is not None]
        apart = sorted(set(theirs) ^ set(names))
        if apart:
            problems.add(
                MismatchError,
                f"{who}: only one of them has factors for {listed(apart)}; use "
                "`parameters: {space: delta_w}`, which compares products",
            )
        for name in sorted(set(theirs) & set(names)):
            ours, other = lens_of(models.aligned, name), lens_of(tuned, name)
            assert ours is not None
            assert other is not None
            if ours.magnitude or other.magnitude:
                problems.add(MismatchError, f"{who}: {name} has DoRA's magnitudes; use delta_w")
            ranks = ours.adapter.rank(ours.module.name), other.adapter.rank(other.module.name)
            if ranks[0] != ranks[1]:
                problems.add(
                    MismatchError,
                    f"{who}: {name} has the rank {ranks[1]}, not {ranks[0]}; factors of different "
                    "ranks cannot be subtracted: use `parameters: {space: delta_w}`",
                )
            if ours.origin[0].identity != other.origin[0].identity:
                problems.add(
                    MismatchError, f"{who}: the adapters are put on different weights; use delta_w"
                )
                break


# -- what changed, and whether the models are what they are said to be -----------------------------

UNRELATED = 0.5
"""A change of this share of the weights' own length is no fine-tuning: another model would give
about 1.4."""


@dataclass(frozen=True)
class Distances:
    """Lengths of differences over the tensors that may change."""

    changed: tuple[str, ...]
    """The tensors in which a tuned model differs from the aligned one."""
    moved: tuple[str, ...]
    """The tensors in which the aligned model differs from the base, where there is one."""
    tuned: Mapping[str, float]
    """Of every tuned model from the aligned one."""
    base: Mapping[str, float]
    """Of every tuned model from the base, where there is one."""
    alignment: float | None
    """Of the aligned model from the base."""
    length: float
    """Of the aligned weights themselves, matrices only."""
    matrices: Mapping[str, float]
    """Of every tuned model from the aligned one, matrices only."""


def measure(models: RealignModels, threads: int | None = None) -> Distances:
    """Read every model once; all sums are in float64.

    Raises:
        NonFiniteError: a model holds NaN or infinity.
    """
    aligned, labels = models.aligned, list(models.tuned)
    terms = [(models.tuned[m], 1.0) for m in labels]
    if models.base is not None:
        terms.append((models.base, 1.0))
    gram = TaskVector(aligned, terms, models.names).gram(threads=threads)
    matrices = [n for n in models.names if len(aligned.specs[n].shape) > 1]
    own = sum(float(np.square(aligned[n].astype(np.float64)).sum()) for n in matrices)
    every, inner = gram.of(*models.names), gram.of(*matrices)
    if not np.isfinite(every).all() or not np.isfinite(own):
        raise NonFiniteError("a model holds NaN or infinite weights; `suture inspect` names them")
    own_grams = {n: np.diag(gram.of(n)) for n in models.names}
    last = len(labels)
    changed = tuple(n for n, squares in own_grams.items() if squares[:last].any())
    moved = tuple(n for n, squares in own_grams.items() if squares[last:].any())
    far = {m: float(every[i, i]) ** 0.5 for i, m in enumerate(labels)}
    from_base: dict[str, float] = {}
    if models.base is not None:
        for i, m in enumerate(labels):
            square = every[i, i] + every[last, last] - 2 * every[i, last]
            from_base[m] = float(max(0.0, square)) ** 0.5
    alignment = None if models.base is None else float(every[last, last]) ** 0.5
    return Distances(
        changed, moved, far, from_base, alignment, own**0.5,
        {m: float(inner[i, i]) ** 0.5 for i, m in enumerate(labels)},
    )  # fmt: skip


def check_ancestor(models: RealignModels, found: Distances) -> None:
    """Refuse an aligned model that the tuned ones were not tuned from, as distances tell.

    Raises:
        MismatchError: a tuned model is the aligned one, lies nearer to the base than to the
            aligned one, or is about as far from it as another model would be.
    """
    problems = Problems()
    for label, far in found.tuned.items():
        who = f"models.{label}: {models.tuned[label].label}"
        trust = "; if it is, say `ancestor: trust`"
        if not far:
            problems.add(
                MismatchError, f"{who}: is the aligned model itself; there is nothing to realign"
            )
        elif found.base and found.alignment and far > found.base[label]:
            problems.add(
                MismatchError,
                f"{who}: lies nearer to the base ({found.base[label]:.4g}) than to the aligned "
                f"model ({far:.4g}), so it was hardly tuned from that: name the model that it "
                f"started from as `aligned`{trust}",
            )
        elif found.matrices[label] > UNRELATED * found.length:
            share = found.matrices[label] / max(found.length, 1e-30)
            problems.add(
                MismatchError,
                f"{who}: differs from {models.aligned.label} by {share:.0%} of the length of its "
                f"weights; a model tuned from it would differ by a few percent: name the model "
                f"that it started from as `aligned`{trust}",
            )
    problems.raise_if_any()


def held(
    models: RealignModels, names: Sequence[str], space: str, device: str = "cpu"
) -> Iterator[Part]:
    """The parts of a space, read into memory one after the other."""
    for name in names:
        if space == "factors":
            if lens_of(models.aligned, name) is not None:
                yield models.factors(name, device)
        else:
            yield models.whole(name, device)


__all__ = [
    "Distances",
    "Factors",
    "Part",
    "RealignModels",
    "Unmasked",
    "across",
    "array",
    "check_ancestor",
    "check_factors",
    "held",
    "lens_of",
    "masked_shapes",
    "measure",
]  # fmt: skip
