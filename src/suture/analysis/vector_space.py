"""The base plus amounts of task vectors, asked what it says: plain, and linearized.

Both answer the same question, the classes of a task's rows at an amount of every task vector, and
remember what they were asked. Nothing is written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from suture.evals.walk import classes
from suture.training.data import Dataset
from suture.training.models import (
    Classifier,
    Encoder,
    Head,
    device_of,
    embed,
    evaluating,
    parameters_of,
)
from suture.training.tangent import product

Array = np.ndarray[Any, Any]
Amounts = tuple[float, ...]


BATCH = 64
"""Rows of a batch where nothing is trained."""
Vector = Mapping[str, Tensor]
"""A task vector: what moved, by the names of the base's files."""


@dataclass(frozen=True)
class Side:
    """A task of one seed: its rows by side, and its frozen head."""

    name: str
    head: Head
    data: Mapping[str, Dataset]
    """``train``, ``validation`` and ``test``."""
    key: str
    """Identifies rows and head."""


class Space(Protocol):
    """Points are amounts of the task vectors; tasks are counted as the sides are."""

    sides: Sequence[Side]
    count: int
    """How many task vectors there are."""

    vectors: Sequence[Vector]

    def predict(self, amounts: Amounts, task: int, part: str) -> Array:
        """The classes of all rows of a part (``validation``, ``test``, ``probe``) of a task."""

    def features(self, amounts: Amounts, task: int, part: str) -> Tensor:
        """The encoder's vectors of these rows, before the head."""


def accuracy(space: Space, amounts: Amounts, task: int, part: str) -> float:
    """The share of right answers of a part."""
    right = np.asarray(_part(space.sides[task], part).labels)
    return float(np.mean(space.predict(amounts, task, part) == right))


def alone(count: int, which: int, amount: float = 1.0) -> Amounts:
    """The point of one task vector."""
    return tuple(amount if i == which else 0.0 for i in range(count))


def _part(side: Side, part: str) -> Dataset:
    return side.data[part]


class _Moved:
    """One parameter at the base plus amounts; where few entries move, only those are written."""

    def __init__(self, parameter: Tensor, deltas: Sequence[Tensor | None]) -> None:
        self.flat = parameter.detach().view(-1) if parameter.is_contiguous() else None
        flat = [None if d is None else d.reshape(-1).to(parameter.device) for d in deltas]
        given = [d for d in flat if d is not None]
        at = torch.stack([d != 0 for d in given]).any(0).nonzero().flatten()
        self.at = at if self.flat is not None and 4 * len(at) < parameter.numel() else None
        self.whole = parameter.detach()
        self.base = self.whole.reshape(-1).clone() if self.at is None else self._now()[self.at]
        self.deltas = flat if self.at is None else [None if d is None else d[at] for d in flat]

    def _now(self) -> Tensor:
        assert self.flat is not None
        return self.flat

    def to(self, amounts: Amounts) -> None:
        """Write the values at a point, computed from the base anew."""
        value = self.base.clone()
        for amount, delta in zip(amounts, self.deltas, strict=True):
            if amount and delta is not None:
                value.add_(delta, alpha=amount)
        if self.at is None:
            self.whole.copy_(value.view(self.whole.shape))
        else:
            self._now()[self.at] = value


class PlainSpace:
    """Weights are written into an encoder of its own, each point from the base anew."""

    def __init__(self, encoder: Encoder, vectors: Sequence[Vector], sides: Sequence[Side]) -> None:
        """Copy the encoder; of sparse vectors only the entries that move are written."""
        self.encoder = copy.deepcopy(encoder)
        self.vectors, self.sides, self.count = vectors, sides, len(vectors)
        names = sorted({name for vector in vectors for name in vector})
        self.moved = {
            name: _Moved(parameter, [v.get(name) for v in vectors])
            for name, parameter in (parameters_of(self.encoder, names) if names else {}).items()
        }
        self._at: Amounts = (0.0,) * self.count
        self._known: dict[tuple[Amounts, int, str], Array] = {}

    def predict(self, amounts: Amounts, task: int, part: str) -> Array:
        """See ``Space``."""
        key = amounts, task, part
        if key not in self._known:
            self._move(amounts)
            side = self.sides[task]
            model = Classifier(self.encoder, side.head).to(device_of(self.encoder))
            self._known[key] = classes(model, _part(side, part).batches(BATCH))
        return self._known[key]

    def features(self, amounts: Amounts, task: int, part: str) -> Tensor:
        """See ``Space``."""
        self._move(amounts)
        batches = _part(self.sides[task], part).batches(BATCH)
        return embed(self.encoder, batches, device=str(device_of(self.encoder)))

    @torch.no_grad()
    def _move(self, amounts: Amounts) -> None:
        if amounts == self._at:
            return
        for moved in self.moved.values():
            moved.to(amounts)
        self._at = amounts


class LinearSpace:
    r"""Features are :math:`f(x, \theta_0) + \sum_t a_t J \tau_t`: each product is computed once."""

    def __init__(self, encoder: Encoder, vectors: Sequence[Vector], sides: Sequence[Side]) -> None:
        self.encoder, self.vectors, self.sides = encoder, vectors, sides
        self.count = len(vectors)
        own = {id(parameter): name for name, parameter in encoder.named_parameters()}
        names = sorted({name for vector in vectors for name in vector})
        self._names = {
            name: own[id(parameter)] for name, parameter in parameters_of(encoder, names).items()
        }
        self._base: dict[tuple[int, str], Tensor] = {}
        self._slopes: dict[tuple[Amounts, int, str], Tensor] = {}

    @torch.no_grad()
    def predict(self, amounts: Amounts, task: int, part: str) -> Array:
        """See ``Space``."""
        given = _Given(self.features(amounts, task, part))
        head = Classifier(self.encoder, self.sides[task].head).with_body(given).to("cpu")
        nothing = torch.zeros(1, 1, dtype=torch.int64)
        return np.asarray(head(nothing, nothing).argmax(1).numpy())

    @torch.no_grad()
    def features(self, amounts: Amounts, task: int, part: str) -> Tensor:
        """See ``Space``."""
        at = task, part
        if at not in self._base:
            batches = _part(self.sides[task], part).batches(BATCH)
            self._base[at] = embed(self.encoder, batches, device=str(device_of(self.encoder)))
        features = self._base[at].clone()
        for direction, amount in _directions(amounts):
            features += amount * self._slope(direction, task, part)
        return features

    def _slope(self, direction: Amounts, task: int, part: str) -> Tensor:
        key = direction, task, part
        if key not in self._slopes:
            data = _part(self.sides[task], part)
            tau = self._sum(direction)
            out = torch.empty(len(data), self.encoder.dim)
            device = device_of(self.encoder)
            tau = {name: delta.to(device) for name, delta in tau.items()}
            with evaluating(self.encoder):
                for batch in data.batches(BATCH):
                    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
                    _, slope = product(self.encoder, tau, ids, mask)
                    out[list(batch.rows)] = slope.cpu()
            self._slopes[key] = out
        return self._slopes[key]

    def _sum(self, direction: Amounts) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for amount, vector in zip(direction, self.vectors, strict=True):
            for name, delta in vector.items() if amount else ():
                own = self._names[name]
                total[own] = total[own] + amount * delta if own in total else amount * delta
        return total


def _directions(amounts: Amounts) -> list[tuple[Amounts, float]]:
    """Directions with amounts that sum up to a point: equal sums of many are one, else each alone.

    A product with a sum costs as much as one with a single vector, but is of use for it alone.
    """
    moved = [i for i, amount in enumerate(amounts) if amount]
    if len(moved) > 2 and len({amounts[i] for i in moved}) == 1:
        return [(tuple(1.0 if a else 0.0 for a in amounts), amounts[moved[0]])]
    return [(alone(len(amounts), i), amounts[i]) for i in moved]


class _Given(nn.Module):
    """A body whose vectors are known already."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.features


def space_of(
    linear: bool, encoder: Encoder, vectors: Sequence[Vector], sides: Iterable[Side]
) -> Space:
    """The space in which vectors of this kind mean what they were trained for."""
    kind = LinearSpace if linear else PlainSpace
    return kind(encoder, vectors, list(sides))


def vector_from(delta: Mapping[str, Array]) -> Vector:
    """A task vector out of arrays, in float32; tensors that do not move are left out."""
    held = {n: torch.from_numpy(np.array(delta[n], np.float32)) for n in delta}
    return {n: t for n, t in held.items() if bool(t.any())}
