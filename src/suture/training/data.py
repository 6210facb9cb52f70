"""Tokenised rows and padded batches; no model."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from suture.errors import RecipeError, did_you_mean
from suture.training.labelled import LabelledText

if TYPE_CHECKING:
    from suture.training.models import Tokenizer


class Batch(NamedTuple):
    """Padded rows, ready for a model."""

    input_ids: Tensor
    """``(batch, length)`` int64, padded on the right; pixels of images, float32
    ``(batch, channels, height, width)``."""
    attention_mask: Tensor
    """``(batch, length)`` int64: 1 for a token, 0 for padding; one 1 for an image."""
    labels: Tensor
    """``(batch,)`` int64: the position of each label in the list of labels; -1 without one."""
    rows: tuple[int, ...]
    """The positions of these rows in the data."""
    targets: Tensor | None = None
    """``(batch, length)`` int64: 1 where a language model shall learn to predict the token;
    without it, every token counts."""


@dataclass(frozen=True)
class Dataset:
    """Tokenised rows."""

    unit: ClassVar[str] = "tokens"
    """What a row is made of, for speeds."""

    ids: tuple[tuple[int, ...], ...]
    """Token ids of every row."""
    labels: tuple[int, ...]
    """Position of every row's label; -1 without one."""
    pad: int
    """The id that fills short rows."""
    targets: tuple[tuple[int, ...], ...] | None = None
    """1 for every token that is to be predicted, where not all are."""

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """All rows once, in batches of ``size`` rows of similar length; the last may be smaller.

        Without a seed the longest rows come first, so that memory is known after one batch. With
        a seed the rows are shuffled into buckets of 16 batches, sorted by length inside a bucket,
        and the batches shuffled: little padding, and a new order for every seed.
        """
        for rows in plan([len(row) for row in self.ids], size, seed=seed):
            yield self.collate(rows)

    def collate(self, rows: Sequence[int]) -> Batch:
        """The rows at these positions, padded on the right to the longest of them."""
        longest = max(len(self.ids[i]) for i in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros((len(rows), longest), dtype=torch.int64)
        for at, i in enumerate(rows):
            length = len(self.ids[i])
            ids[at, :length] = torch.tensor(self.ids[i], dtype=torch.int64)
            mask[at, :length] = 1
        targets = None
        if self.targets is not None:
            targets = torch.zeros_like(mask)
            for at, i in enumerate(rows):
                targets[at, : len(self.ids[i])] = torch.tensor(self.targets[i], dtype=torch.int64)
        return Batch(ids, mask, torch.tensor([self.labels[i] for i in rows]), tuple(rows), targets)


def plan(lengths: Sequence[int], size: int, *, seed: int | None) -> list[list[int]]:
    """Positions of the rows of every batch; see ``Dataset.batches``."""
    if size < 1:
        raise RecipeError(f"a batch holds at least one row; got {size}")
    if seed is None:
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        return [order[at : at + size] for at in range(0, len(order), size)]
    generator = random.Random(seed)
    order = list(range(len(lengths)))
    generator.shuffle(order)
    bucket = 16 * size
    batches: list[list[int]] = []
    for start in range(0, len(order), bucket):
        part = sorted(order[start : start + bucket], key=lambda i: -lengths[i])
        batches += [part[at : at + size] for at in range(0, len(part), size)]
    generator.shuffle(batches)
    return batches


def fixed_plan(lengths: Sequence[int], size: int, *, seed: int) -> list[list[int]]:
    """Batches that stay together in every epoch: sorted by length, equal lengths by chance.

    Examples:
        >>> sorted(map(len, fixed_plan([5, 3, 4], 2, seed=0)))
        [1, 2]
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    return [[order[i] for i in rows] for rows in plan([lengths[i] for i in order], size, seed=None)]


def collate(data: Dataset, rows: Sequence[int]) -> Batch:
    """The rows at these positions as a batch."""
    return data.collate(rows)


def tokenise(
    rows: Sequence[LabelledText],
    tokenizer: Tokenizer,
    *,
    labels: Sequence[str] = (),
    max_length: int,
) -> Dataset:
    """Tokenise rows, cut to ``max_length`` tokens; ``labels`` gives every label its number.

    Raises:
        RecipeError: a row has a label that is not listed, or no tokens at all.
    """
    numbers = {label: i for i, label in enumerate(labels)}
    for row in rows if labels else ():
        if row.label not in numbers:
            hint = did_you_mean(row.label, labels)
            raise RecipeError(f"label {row.label!r} is not listed; {hint}")
    if not rows:
        return Dataset((), (), 0)
    encoded = tokenizer([row.text for row in rows], truncation=True, max_length=max_length)
    ids = tuple(tuple(row) for row in encoded["input_ids"])
    if () in ids:
        raise RecipeError(f"row {ids.index(())} has no tokens: is its text empty?")
    pad = tokenizer.pad_token_id or 0  # masked, so any id does
    return Dataset(ids, tuple(numbers.get(row.label, -1) for row in rows), pad)


def data_digest(data: Dataset) -> str:
    """A hash of tokenised rows."""
    text = json.dumps([data.ids, data.labels, data.targets], separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
