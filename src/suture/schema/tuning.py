"""How to train, as data; needs no framework."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le

from suture.errors import RecipeError

Count = Annotated[int, Ge(1)]
Number = Annotated[int, Ge(0)]
Precision = Literal["no", "fp16", "bf16"]


@dataclass(frozen=True)
class TuneSettings:
    """How to train."""

    epochs: Count = 1
    """How often every row is seen."""
    steps: Number = 0
    """Stop after so many steps, if the epochs have more; 0: they decide."""
    batch: Count = 32
    """Rows in a batch."""
    accumulate: Count = 1
    """Batches whose gradients are averaged into one step."""
    lr: Annotated[float, Gt(0)] = 5e-5
    """Peak learning rate."""
    warmup: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the steps over which the rate rises linearly to its peak."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls to 0 after the peak: linear or cosine; or constant, it does not."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """Decoupled weight decay of matrices; vectors (norms, biases) are never decayed."""
    clip: Annotated[float, Gt(0)] = 1.0
    """Largest norm of the gradient."""
    precision: Precision = "no"
    """Mixed precision: no, fp16 or bf16."""
    seed: Number = 0
    """Seed of the order of rows and of dropout."""
    validate_every: Number = 0
    """Steps between looks at the validation rows; 0: after each epoch."""
    patience: Number = 0
    """Stop after so many looks without a better one, and keep the best; 0: never."""
    save_every: Count = 100
    """Steps between checkpoints to resume from."""
    activations: Literal["auto", "memory", "disk", "recompute"] = "auto"
    """Where the activations under the lowest block that is trained are kept: ``memory``, ``disk``
    or nowhere (``recompute``); ``auto``: in memory within its bound, else on disk within its
    bound, else nowhere. The result is the same."""
    activations_memory: Annotated[float, Ge(0)] = 1.0
    """GiB of memory that kept activations may take."""
    activations_disk: Annotated[float, Ge(0)] = 10.0
    """GiB of disk that kept activations may take while the run goes on."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class FinetuneSettings(TuneSettings):
    """How to train in a fine-tuning run."""

    recompute: bool = False
    """Whether activations are computed anew in the backward pass, to save memory."""


@dataclass(frozen=True)
class LearnSettings:
    """How to train the logits."""

    start: Annotated[float, Gt(0), Le(1)] = 0.01
    """Density of the masks at the start: the largest changes are open."""
    logit: Annotated[float, Gt(0)] = 3.0
    """Where open logits start; closed ones start at minus that."""
    reg: Literal["l1", "polarize", "none"] = "l1"
    """``l1`` closes (the paper's penalty), ``polarize`` pushes away from 0 (the released code),
    ``none`` lets the loss decide alone."""
    strength: Annotated[float, Ge(0)] = 0.1
    """Of the penalty; with the steps ``rms`` and ``adam`` relative to the size of the gradient."""
    epochs: Count = 10
    """Steps; each sees every row once."""
    step: Literal["rms", "adam", "raw"] = "rms"
    """``rms``: the gradient with respect to open masks divided by its root mean square; ``adam``;
    ``raw``: the gradient of the summed batches as it is, as released."""
    lr: Annotated[float, Gt(0)] = 10.0
    """Length of a step; ``adam`` wants about 0.3, ``raw`` 1e7."""
    batch: Count = 16
    """Rows that go through the model together."""

    def __post_init__(self) -> None:
        check_bounds(self)


_WITHIN = {"ge": operator.ge, "gt": operator.gt, "le": operator.le}


def check_bounds(settings: TuneSettings | LearnSettings) -> None:
    """Hold settings against the bounds in their types.

    Raises:
        RecipeError: the first that is out of bounds.
    """
    kind: Any = type(settings)
    for name, hint in _hints(kind).items():
        value = getattr(settings, name)
        for bound in getattr(hint, "__metadata__", ()):
            side = type(bound).__name__.lower()
            limit = getattr(bound, side)
            if not _WITHIN[side](value, limit):
                words = {"ge": "at least", "gt": "more than", "le": "at most"}[side]
                raise RecipeError(f"{name} must be {words} {limit}; got {value}")
        known = get_args(hint) if get_origin(hint) is Literal else ()
        if known and value not in known:
            raise RecipeError(f"{name} is one of {', '.join(known)}; got {value!r}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of settings with their bounds."""
    return get_type_hints(kind, include_extras=True)


LEARN_PRESETS: dict[str, LearnSettings] = {
    "default": LearnSettings(),
    "released": LearnSettings(start=1e-5, logit=5.0, reg="polarize", strength=10.0, epochs=10,
                              step="raw", lr=1e7, batch=8),
}  # fmt: skip
"""``released``: the schedule of the published code for its language tasks. Its gradient is the sum
over batches of mean gradients, so that more data make longer steps."""
