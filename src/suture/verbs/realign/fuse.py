"""How masked task vectors become one change of the aligned model; differentiable by every task.

Each Fuse is a function of tensors, so that the gradient reaches the mask through every task. What
is not differentiable (which entries TIES keeps, their majority sign, which entries DARE drops) is
chosen before and constant within a step.

    single            c * d_1
    average           c * mean_i d_i
    task_arithmetic   c * sum_i d_i
    ties              c * sum_i of the kept d_i whose sign is that of the sum of all kept
    dare              c * sum_i kept_i * d_i / density
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from suture.verbs.realign.fusing import Fusing

# -- the functions ---------------------------------------------------------------------------------


def single(deltas: Sequence[Tensor]) -> Tensor:
    """The only task vector."""
    return deltas[0]


def average(deltas: Sequence[Tensor]) -> Tensor:
    """The mean of task vectors."""
    return added(deltas) / len(deltas)


def added(deltas: Sequence[Tensor]) -> Tensor:
    """The sum of task vectors."""
    total = deltas[0]
    for delta in deltas[1:]:
        total = total + delta
    return total


def ties(deltas: Sequence[Tensor], kept: Sequence[Tensor], majority: float) -> Tensor:
    """The sum of kept entries that have the sign of the sum of all kept ones.

    Args:
        deltas: of each task.
        kept: which entries each task keeps, booleans.
        majority: the sign where that sum is 0.
    """
    with torch.no_grad():
        total = added(_where(kept, deltas))
        up = total >= 0 if majority > 0 else total > 0
        agree = [k & ((d > 0) == up) for k, d in zip(kept, deltas, strict=True)]
    return added(_where(agree, deltas))


def _where(kept: Sequence[Tensor], deltas: Sequence[Tensor]) -> list[Tensor]:
    return [d.masked_fill(~k, 0) for k, d in zip(kept, deltas, strict=True)]


def dropped(deltas: Sequence[Tensor], kept: Sequence[Tensor], density: float) -> Tensor:
    """The sum of kept entries, each divided by the share that is kept."""
    return added([k * d for k, d in zip(kept, deltas, strict=True)]) / density


# -- what is chosen before -------------------------------------------------------------------------


class Cut(NamedTuple):
    """Where a ranking by magnitude is cut: exactly so many entries are above it."""

    threshold: float
    equal: int
    """How many entries of exactly this magnitude are kept, the first by position."""

    def keep(self, delta: Tensor) -> Tensor:
        """Which entries are kept."""
        size = delta.abs()
        kept = size > self.threshold
        if self.equal:
            tied = (size == self.threshold).flatten()
            kept |= (tied & (tied.cumsum(0) <= self.equal)).view(size.shape)
        return kept


_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
COARSE = 1 << 15
"""Classes into which magnitudes are counted first: the upper bits of a float, without its sign."""


class Counted:
    """Counts the magnitudes of one task over all tensors, to find where a ranking is cut.

    The bits of a magnitude, read as an integer, have its order: the upper ones are counted in a
    first pass; the second gathers the magnitudes of the one class in which the cut lies.
    """

    def __init__(self, density: float) -> None:
        self.density, self.size, self.above = density, 0, 0
        self.count: Tensor | None = None
        self.gathered: dict[str, Tensor] = {}
        self.coarse = COARSE

    def add(self, delta: Tensor) -> None:
        """The first pass over a tensor."""
        found = torch.bincount(_coarse(delta).flatten(), minlength=COARSE)
        self.count = found if self.count is None else self.count + found
        self.size += delta.numel()

    def turn(self) -> None:
        """Find the class of the cut; ``above`` entries are in higher classes."""
        wanted = round(self.density * self.size)
        if self.count is None or not wanted:
            return
        down = self.count.flip(0).cumsum(0)
        place = int(torch.searchsorted(down, wanted))
        self.coarse = COARSE - 1 - place
        self.above = int(down[place - 1]) if place else 0

    def gather(self, key: str, delta: Tensor) -> None:
        """The second pass over a tensor."""
        if self.coarse < COARSE:
            self.gathered[key] = delta.abs()[_coarse(delta) == self.coarse]

    def cuts(self, keys: Sequence[str]) -> dict[str, Cut]:
        """The ``round(density * n)`` largest entries; ties go by position; never one that is 0."""
        if self.coarse == COARSE:
            return dict.fromkeys(keys, Cut(float("inf"), 0))
        sizes = torch.cat([self.gathered[key] for key in keys])
        wanted = round(self.density * self.size) - self.above
        threshold = sizes.kthvalue(sizes.numel() - wanted + 1).values
        left = wanted - int((sizes > threshold).sum()) if threshold > 0 else 0
        found = {}
        for key in keys:
            here = min(left, int((self.gathered[key] == threshold).sum())) if left else 0
            found[key] = Cut(float(threshold), here)
            left -= here
        return found


def _coarse(delta: Tensor) -> Tensor:
    bits = delta.abs().view(_WHOLE[delta.element_size()])
    return bits >> (8 * bits.element_size() - 16)


def dice(seed: int, *words: object) -> torch.Generator:
    """Random numbers that depend on a seed and names only, not on the order of tensors."""
    text = "/".join(map(str, (seed, *words)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


Deltas = Callable[[str], list[Tensor]]
"""The task vectors of one tensor, one a task."""


@dataclass(frozen=True)
class Fuser:
    """One Fuse with all that was chosen for it."""

    how: Fusing
    cuts: Mapping[str, Sequence[Cut]] = field(default_factory=dict)
    majority: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def __call__(self, key: str, deltas: Sequence[Tensor]) -> Tensor:
        """The change of one tensor from its masked task vectors."""
        how = self.how
        if how.how == "single":
            found = single(deltas)
        elif how.how == "average":
            found = average(deltas)
        elif how.how == "task_arithmetic":
            found = added(deltas)
        elif how.how == "ties":
            kept = [cut.keep(d.detach()) for cut, d in zip(self.cuts[key], deltas, strict=True)]
            found = ties(deltas, kept, self.majority[key])
        else:
            kept = [self._dropped(key, task, d) for task, d in enumerate(deltas)]
            found = dropped(deltas, kept, how.density)
        return how.coefficient * found

    def _dropped(self, key: str, task: int, delta: Tensor) -> Tensor:
        draw = torch.rand(delta.shape, generator=dice(self.seed, "dare", task, key))
        return (draw < self.how.density).to(delta.device, delta.dtype)


@torch.no_grad()
def fuser(how: Fusing, keys: Sequence[str], deltas: Deltas, seed: int | None = None) -> Fuser:
    """Choose what a Fuse needs to know of all tensors together.

    Args:
        how: what the recipe says.
        keys: the tensors.
        deltas: reads the masked task vectors of one; only TIES asks.
        seed: of DARE's pattern; by default the recipe's.
    """
    seed = how.seed if seed is None else seed
    if how.how != "ties":
        return Fuser(how, seed=seed)
    groups = [list(keys)] if how.scope == "global" else [[key] for key in keys]
    found: dict[str, list[Cut]] = {}
    majority: dict[str, float] = {}
    for group in groups:
        tasks: list[Counted] = []
        for key in group:
            parts = deltas(key)
            tasks = tasks or [Counted(how.density) for _ in parts]
            for task, delta in zip(tasks, parts, strict=True):
                task.add(delta)
        for task in tasks:
            task.turn()
        for key in group:
            for task, delta in zip(tasks, deltas(key), strict=True):
                task.gather(key, delta)
        every = [task.cuts(group) for task in tasks]
        balance = 0
        for key in group:
            found[key] = [own[key] for own in every]
            parts = deltas(key)
            kept = [c.keep(d) for c, d in zip(found[key], parts, strict=True)]
            total = added(_where(kept, parts))
            balance += int((total > 0).sum()) - int((total < 0).sum())
        majority |= dict.fromkeys(group, 1.0 if balance >= 0 else -1.0)
    return Fuser(how, found, majority, seed)


__all__ = [
    "Counted", "Cut", "Fuser", "added", "average", "dice", "dropped",
    "fuser", "single", "ties",
]  # fmt: skip
