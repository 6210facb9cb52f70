"""Importance rules, ``RULES``: the numbers by which the entries of a task vector are ranked.

A rule is a pure function of a ``Look``: one stretch of one tensor, its delta, its weights and its
statistics. Scores are computed when they are read, block by block, by a view of the model whose
values they are; so the exact top-k of ``select`` ranks them like magnitudes, and nothing is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from suture.checkpoints.checkpoint import Array, Checkpoint
from suture.checkpoints.views import View
from suture.edits.stats import OF_INPUTS, Stats
from suture.errors import NonFiniteError
from suture.kernels import compiled
from suture.schema.table import Line, Table
from suture.stream.sweep import count_nonfinite
from suture.tensors.spec import DTYPES, TensorSpec


class RuleInput(NamedTuple):
    """What a rule sees: ``size`` entries of one flattened tensor from ``start`` on."""

    name: str
    start: int
    size: int
    shape: tuple[int, ...]
    """Of the whole tensor."""
    delta: Array
    """Tuned minus base: float32[size]; empty for rules that do not look at it."""
    weight: Array
    """The weights of the model that the statistics are of: float32[size]; empty likewise."""
    stats: Stats | None
    key: int
    """Of the random stream of this tensor."""

    def stat(self, kind: str) -> Array:
        """A statistic of these entries, float32[size]: of its input for those of inputs."""
        assert self.stats is not None
        if kind not in OF_INPUTS:
            return self.stats.read(kind, self.name, self.start, self.size)
        columns = np.arange(self.start, self.start + self.size) % self.shape[-1]
        return self.stats.whole(kind, self.name)[columns]


def magnitude(look: RuleInput) -> Array:
    r"""The size of the change: :math:`|\delta|`. Needs no data (dataless localization)."""
    return np.abs(look.delta)


def random(look: RuleInput) -> Array:
    """A number drawn for each entry: the control that every other rule has to beat.

    The draw depends on seed, model, tensor and position and on nothing else.
    """
    first = look.start // 4 * 4
    words = np.zeros((look.start - first + look.size + 3) // 4 * 4, np.uint32)
    compiled.random_words(look.key, first, words.size, words)
    drawn = words[look.start - first :][: look.size]
    return ((drawn >> 2) + np.uint32(1)).view(np.float32)  # 30 bits and never 0: only order counts


def fisher(look: RuleInput) -> Array:
    r"""Change weighed by sensitivity: :math:`\delta^2 F`, with :math:`F` the Fisher diagonal.

    The score is its square root, :math:`|\delta| \sqrt F`, which has the same order and no
    underflow.
    """
    return np.abs(look.delta) * np.sqrt(np.maximum(look.stat("fisher"), 0))


def empirical_fisher(look: RuleInput) -> Array:
    r"""The same with the gradients of the given labels: :math:`\delta^2 \hat F`."""
    return np.abs(look.delta) * np.sqrt(np.maximum(look.stat("empirical_fisher"), 0))


def snip(look: RuleInput) -> Array:
    r"""Weight times gradient, row by row: :math:`E_x |w \, \partial \ell(x) / \partial w|`."""
    return np.abs(look.weight) * look.stat("abs_grad")


def delta_grad(look: RuleInput) -> Array:
    r"""Change times gradient, row by row: :math:`E_x |\delta \, \partial \ell(x) / \partial w|`.

    To first order, how much the loss of a row changes when this entry alone is taken back.
    """
    return np.abs(look.delta) * look.stat("abs_grad")


def delta_sum_grad(look: RuleInput) -> Array:
    r"""Change times mean gradient: :math:`|\delta \, E_x \partial \ell(x) / \partial w|`.

    Rows whose gradients point apart cancel each other, as in SNIP over one large batch.
    """
    return np.abs(look.delta) * np.abs(look.stat("grad"))


def first_order(look: RuleInput) -> Array:
    r"""What the entry saves, to first order: :math:`-\delta \, E_x \partial \ell(x) / \partial w`.

    It has a sign: an entry whose score is negative makes the loss larger.
    """
    return -look.delta * look.stat("grad")


def wanda(look: RuleInput) -> Array:
    r"""Weight times the norm of its input: :math:`|W_{ij}| \, \lVert x_j \rVert`.

    Linear layers only; an entry of any other tensor has the score 0 and is never kept.
    """
    if look.stats is None or look.stats.shape("input_norm", look.name) is None:
        return np.zeros(look.size, np.float32)
    return np.abs(look.weight) * look.stat("input_norm")


def learned(look: RuleInput) -> Array:
    r"""The trained logit of the entry: Localize-and-Stitch with data; above 0 the mask is open."""
    return look.stat("logit")


@dataclass(frozen=True)
class Rule(Line):
    """A line of the table: ``make(look)`` gives the scores, float32[size]."""

    inputs: ClassVar[int] = 1
    needs: tuple[str, ...] = ()
    """Kinds of statistics."""
    signed: bool = False
    """Whether scores may be negative; where not, an entry whose score is 0 is never kept."""
    seeded: bool = False
    delta: bool = True
    """Whether the change is looked at; where not, it is not read."""
    weight: bool = True
    """The same of the weights."""

    @property
    def requires(self) -> str:
        """What a recipe must give, in a sentence."""
        return f"Needs statistics: {', '.join(self.needs)}." if self.needs else ""


RULES = Table("importance rule", Rule, (
    Rule(magnitude, "Magnitude", "He et al. 2025, arXiv:2408.13656", weight=False),
    Rule(random, "Random (control)", "", seeded=True, delta=False, weight=False),
    Rule(fisher, "Fisher", "Matena and Raffel 2022, arXiv:2111.09832", ("fisher",),
         weight=False),
    Rule(empirical_fisher, "Empirical Fisher", "Kunstner et al. 2019, arXiv:1905.12558",
         ("empirical_fisher",), weight=False),
    Rule(snip, "SNIP, row by row", "Lee et al. 2019, arXiv:1810.02340", ("abs_grad",),
         delta=False),
    Rule(delta_grad, "SNIP of the change", "Wei et al. 2024, arXiv:2402.05162", ("abs_grad",),
         weight=False),
    Rule(delta_sum_grad, "SNIP of the change, summed", "Lee et al. 2019, arXiv:1810.02340",
         ("grad",), weight=False),
    Rule(first_order, "First-order saving", "Molchanov et al. 2017, arXiv:1611.06440",
         ("grad",), signed=True, weight=False),
    Rule(wanda, "Wanda", "Sun et al. 2024, arXiv:2306.11695", ("input_norm",),
         delta=False),
    Rule(learned, "Localize-and-Stitch, learned", "He et al. 2025, arXiv:2408.13656",
         ("logit",), signed=True, weight=False),
), group="suture.rules")  # fmt: skip
"""Every importance rule; another package adds one by an entry point, see docs/plugins.md."""


_LOW = int(np.float32(2.0**-63).view(np.uint32))
_HIGH = int(np.float32(2.0**63).view(np.uint32))
_MIDDLE = _HIGH - _LOW + 1


def ordered(scores: Array) -> Array:
    """Positive float32 numbers in the order of ``scores``, which may be negative.

    A float32 has 32 bits and a magnitude 31; sizes between 2**-63 and 2**63 need one bit less, so
    the order of all of them fits, and two scores are equal afterwards only if they were before
    (smaller ones count as 0, larger ones as 2**63).
    """
    bits = np.ascontiguousarray(scores, np.float32).view(np.uint32)
    size = np.clip((bits & 0x7FFFFFFF).astype(np.int32), _LOW - 1, _HIGH) - (_LOW - 1)
    keys = _MIDDLE + 1 + np.where(bits >> 31, -size, size)
    return keys.astype(np.uint32).view(np.float32)


@lru_cache(maxsize=1 << 16)
def stream_key(seed: int, model: str, tensor: str) -> int:
    """The 64-bit key of the random stream that ranks one tensor of one model.

    It is not the stream with which a random merge thins the same tensor.
    """
    text = f"importance\0{seed}\0{model}\0{tensor}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


_UNREAD = np.zeros(0, np.float32)


class Bits(Protocol):
    """A mask, in memory or on disk."""

    shapes: Any
    """Of its tensors, by name."""

    def read(self, name: str, start: int, out: Array) -> None:
        """Fill ``out`` (uint8) with packed bits from entry ``start``, a multiple of 8, on."""


def _inside(mask: Bits, name: str, start: int, count: int) -> Array:
    """Which of some entries a mask marks: booleans; none of a tensor that it does not have."""
    if name not in mask.shapes:
        return np.zeros(count, bool)
    skipped = start % 8
    packed = np.empty(-(-(skipped + count) // 8), np.uint8)
    mask.read(name, start - skipped, packed)
    found = np.unpackbits(packed, count=skipped + count, bitorder="little")
    return found[skipped:].view(bool)


@dataclass(frozen=True)
class Scoring:
    """A rule with what it needs to score one task vector."""

    rule: Rule
    base: Checkpoint
    tuned: Checkpoint
    stats: Stats | None = None
    seed: int = 0
    label: str = ""
    """The name of the model, which chooses the random stream."""
    positive: bool = False
    """Whether only entries with a score above 0 may be kept."""
    factor: float = 1.0
    """Of the task vector: what its delta is multiplied by."""
    without: Bits | None = None
    """Entries that are never kept, whatever their score."""

    @property
    def weights(self) -> Checkpoint:
        """The model whose weights a rule sees: the one that was measured."""
        at = "tuned" if self.stats is None else self.stats.facts.get("at", "tuned")
        return self.base if at == "base" else self.tuned

    def view(self, names: Sequence[str]) -> View:
        """A checkpoint whose tensors are the scores."""
        return View(self.tuned, {name: _Score(self, name) for name in names}, {})

    def scores(self, name: str, start: int, count: int) -> Array:
        """The scores of some entries as the rule gives them: float32[size].

        Raises:
            NonFiniteError: a model, or the statistics, hold NaN or infinity here.
        """
        delta = weight = _UNREAD
        if self.rule.delta:
            delta = self._delta(name, start, count) * np.float32(self.factor)
        if self.rule.weight:
            weight = _widened(self.weights, name, start, count)
        shape = self.base.specs[name].shape
        key = stream_key(self.seed, self.label, name) if self.rule.seeded else 0
        look = RuleInput(name, start, count, shape, delta, weight, self.stats, key)
        found: Array = self.rule.make(look).astype(np.float32, copy=False)
        if not np.isfinite(found).all():
            where = "the weights" if self.stats is None else self.stats.where
            raise NonFiniteError(
                f"{name}: {self.rule.name} gives NaN or infinity near entry {start}: {where} hold "
                "no finite number there; measure again, with a smaller or cleaner set of rows"
            )
        return found

    def _delta(self, name: str, start: int, count: int) -> Array:
        if self.base.specs[name].dtype == self.tuned.specs[name].dtype == "F64":
            one, other = (_double(c, name, start, count) for c in (self.tuned, self.base))
            return (one - other).astype(np.float32)
        one, other = (_widened(c, name, start, count) for c in (self.tuned, self.base))
        return one - other


def _double(checkpoint: Checkpoint, name: str, start: int, count: int) -> Array:
    _widened(checkpoint, name, start, count)  # refuses what is not finite
    row = np.empty(count, np.float64)
    checkpoint.read_into(name, start, row.view(np.uint8))
    return row


def _widened(checkpoint: Checkpoint, name: str, start: int, count: int) -> Array:
    dtype = DTYPES[checkpoint.specs[name].dtype]
    row = np.empty(count, np.float32)
    raw = np.empty(count * dtype.itemsize, np.uint8)
    checkpoint.read_into(name, start, raw)
    if compiled.widen(raw, dtype.code, count, row):
        spec, wild = checkpoint.specs[name], count_nonfinite(checkpoint, name)
        file = checkpoint.home(name)
        raise NonFiniteError(
            f"{file}: {name} holds {wild} NaN or infinite values of {spec.numel}; repair the model "
            "or fetch it again (`suture inspect MODEL --check` finds them all)"
        )
    return row


class _Score:
    """A lens: the scores of one tensor, as numbers that are never negative."""

    def __init__(self, scoring: Scoring, name: str) -> None:
        self.scoring, self.name = scoring, name
        self.origin = (scoring.tuned, name)
        self.sources = (scoring.tuned, scoring.base)
        self.spec = TensorSpec("F32", scoring.base.specs[name].shape)
        self.identity: Any = [scoring.rule.name, scoring.seed, scoring.label, scoring.positive]

    def read(self, start: int, raw: Array) -> None:
        found = self.scoring.scores(self.name, start, raw.size // 4)
        if self.scoring.positive:
            found = np.maximum(found, 0)
        elif self.scoring.rule.signed:
            found = ordered(found)
        without = self.scoring.without
        if without is not None:
            found = np.where(_inside(without, self.name, start, found.size), np.float32(0), found)
        raw.view(np.float32)[:] = found


__all__ = ["RULES", "Bits", "Rule", "RuleInput", "Scoring", "ordered", "stream_key"]
