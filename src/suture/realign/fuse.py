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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from suture.errors import Problems, RecipeError, brief, did_you_mean
from suture.recipe_types import refuse_unknown

SCOPES = ("global", "tensor")
KEYS = ("how", "coefficient", "density", "scope", "seed")


class Fuse(NamedTuple):
    """A line of the table of ways to fuse."""

    coefficient: float
    """The factor on the result, unless a recipe says another."""
    density: float = 1.0
    """The share of entries that each task keeps, where the way keeps a share."""
    several: bool = True
    """Whether it takes more than one task."""


FUSES: dict[str, Fuse] = {
    "single": Fuse(1.0, several=False),
    "average": Fuse(1.0),
    "task_arithmetic": Fuse(0.3),
    "ties": Fuse(0.4, 0.2),
    "dare": Fuse(0.3, 0.8),
}
"""The defaults are those of the code published with SOMF (Yi et al. 2024, arXiv:2405.09055)."""


@dataclass(frozen=True)
class Fusing:
    """How a recipe wants task vectors fused."""

    how: str = "single"
    coefficient: float = 1.0
    density: float = 1.0
    scope: str = "global"
    """Over which tensors the entries of a task compete in TIES."""
    seed: int = 0
    """Of the entries that DARE drops, in everything but the steps of training."""

    def resolved(self) -> dict[str, Any]:
        """As plain data that can be read again."""
        return {key: getattr(self, key) for key in KEYS}


def read_fusing(raw: object, tasks: int, problems: Problems) -> Fusing:
    """The key ``fuse`` of a recipe: a word, or a mapping; by default ``single`` or ``average``."""
    default = "single" if tasks < 2 else "average"
    given = {"how": raw} if isinstance(raw, str) else {} if raw is None else raw
    if not isinstance(given, Mapping):
        problems.add(RecipeError, f"fuse: one of {', '.join(FUSES)} or a mapping, not {brief(raw)}")
        return Fusing()
    refuse_unknown(given, KEYS, "fuse: ", problems)
    how = given.get("how", default)
    if how not in FUSES:
        hint = did_you_mean(str(how), list(FUSES))
        problems.add(RecipeError, f"fuse: {brief(how)} is not known; {hint}")
        return Fusing()
    line = FUSES[how]
    if tasks > 1 and not line.several:
        others = ", ".join(k for k, v in FUSES.items() if v.several)
        problems.add(RecipeError, f"fuse: {how} takes one model, here are {tasks}; {others}")
    numbers = {"coefficient": line.coefficient, "density": line.density, "seed": 0}
    for key, like in numbers.items():
        value = given.get(key, like)
        whole = key == "seed"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            problems.add(RecipeError, f"fuse.{key}: a number, not {brief(value)}")
        elif key == "density" and not 0 < value <= 1:
            problems.add(RecipeError, f"fuse.density: the share kept, in (0, 1]; got {value}")
        elif key == "density" and value != 1 and line.density == 1:
            problems.add(RecipeError, f"fuse.density: {how} keeps all; ties and dare do not")
        elif not abs(value) < 2**63 or (whole and value < 0):
            problems.add(RecipeError, f"fuse.{key}: {brief(value)} is out of range")
        else:
            numbers[key] = value
    scope = given.get("scope", "global")
    if scope not in SCOPES:
        problems.add(RecipeError, f"fuse.scope: {did_you_mean(str(scope), SCOPES)}")
    return Fusing(
        how, float(numbers["coefficient"]), float(numbers["density"]), str(scope),
        int(numbers["seed"]),
    )  # fmt: skip


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
    trimmed = [torch.where(k, d, torch.zeros_like(d)) for k, d in zip(kept, deltas, strict=True)]
    with torch.no_grad():
        sign = added(trimmed).sign()
        sign = torch.where(sign == 0, torch.full_like(sign, majority), sign)
        agree = [t.sign() == sign for t in trimmed]
    return added([torch.where(a, t, torch.zeros_like(t)) for a, t in zip(agree, trimmed,
                                                                         strict=True)])  # fmt: skip


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


def cuts(deltas: Mapping[str, Tensor], density: float) -> dict[str, Cut]:
    """The ``round(density * n)`` largest entries of all tensors together; never one that is 0."""
    sizes = torch.cat([d.abs().flatten() for d in deltas.values()])
    count = round(density * sizes.numel())
    if not count:
        return dict.fromkeys(deltas, Cut(float("inf"), 0))
    threshold = sizes.kthvalue(sizes.numel() - count + 1).values
    left = count - int((sizes > threshold).sum()) if threshold > 0 else 0
    found = {}
    for name, delta in deltas.items():
        here = min(left, int((delta.abs() == threshold).sum())) if left else 0
        found[name] = Cut(float(threshold), here)
        left -= here
    return found


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
    found: dict[str, list[Cut]] = {key: [] for key in keys}
    majority: dict[str, float] = {}
    for group in groups:
        tasks = len(deltas(group[0])) if group else 0
        for task in range(tasks):
            for key, cut in cuts({k: deltas(k)[task] for k in group}, how.density).items():
                found[key].append(cut)
        balance = 0.0
        for key in group:
            parts = deltas(key)
            kept = [c.keep(d) for c, d in zip(found[key], parts, strict=True)]
            total = added([k * d for k, d in zip(kept, parts, strict=True)])
            balance += float(total.sign().double().sum())
        majority |= dict.fromkeys(group, 1.0 if balance >= 0 else -1.0)
    return Fuser(how, found, majority, seed)


__all__ = [
    "FUSES", "Cut", "Fuse", "Fuser", "Fusing", "added", "average", "cuts", "dice", "dropped",
    "fuser", "read_fusing", "single", "ties",
]  # fmt: skip
