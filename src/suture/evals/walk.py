"""A loaded encoder moved along task vectors in place: what line and disentanglement maps evaluate.

``suture.analysis.disentanglement`` and ``suture.analysis.along`` ask for predictions or scores of
the base plus given amounts of task vectors; ``Walk`` gives them without writing a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from suture.data import Batch
from suture.errors import MismatchError, RecipeError
from suture.models import Classifier, Encoder, Head, evaluating
from suture.spec import listed

Array = np.ndarray[Any, Any]
Batches = Callable[[], Iterable[Batch]]
"""Gives the rows of a task anew whenever they are read."""


class Walk:
    """The base plus amounts of task vectors, as one encoder whose weights are written over.

    Every point is computed from the base anew, in float32, so that no error adds up on the way;
    memory is the encoder and one delta a task vector.
    """

    def __init__(self, encoder: Encoder, deltas: Sequence[Mapping[str, Array]]) -> None:
        """Take a base encoder and task vectors over it, by the names that the checkpoint has.

        Raises:
            MismatchError: a task vector has tensors that the encoder lacks, or in other shapes.
        """
        self.encoder = encoder
        self.parameters = dict(encoder.backbone.named_parameters())
        self.base: dict[str, Tensor] = {}
        self.deltas: list[dict[str, Tensor]] = []
        for number, delta in enumerate(deltas):
            wrong = sorted(
                n for n in delta
                if n not in self.parameters
                or tuple(self.parameters[n].shape) != tuple(delta[n].shape)
            )  # fmt: skip
            if wrong:
                raise MismatchError(
                    f"task vector {number + 1} does not fit the encoder: {listed(wrong)}; select "
                    "the tensors that the loaded model has"
                )
            self.deltas.append({n: torch.from_numpy(np.array(delta[n])) for n in delta})
        for name in {n for delta in self.deltas for n in delta}:
            self.base[name] = self.parameters[name].detach().clone()

    @torch.no_grad()
    def move(self, amounts: Sequence[float]) -> Encoder:
        """The encoder at the base plus ``amounts`` of the task vectors; all zero is the base."""
        if len(amounts) != len(self.deltas):
            raise RecipeError(f"{len(amounts)} amounts for {len(self.deltas)} task vectors")
        for name, start in self.base.items():
            value = start.float()
            for amount, delta in zip(amounts, self.deltas, strict=True):
                if amount and name in delta:
                    value = value + amount * delta[name]
            self.parameters[name].copy_(value)
        return self.encoder

    def predict(
        self, heads: Sequence[Head], rows: Sequence[Batches]
    ) -> Callable[[Sequence[float], int], Array]:
        """The callable that ``disentanglement`` asks for: classes of a task's rows, by its head.

        Args:
            heads: the read-out of each task.
            rows: the rows of each task; labels are not looked at.
        """

        def predict(amounts: Sequence[float], task: int) -> Array:
            model = Classifier(self.move(amounts), heads[task])
            return classes(model, rows[task]())

        return predict


@torch.inference_mode()
def classes(model: nn.Module, batches: Iterable[Batch]) -> Array:
    """The most likely class of every row, int64[rows], in the order of the data."""
    numbers: list[int] = []
    found: list[int] = []
    with evaluating(model):
        for batch in batches:
            found += model(batch.input_ids, batch.attention_mask).argmax(1).tolist()
            numbers += list(batch.rows)
    if not numbers:
        raise RecipeError("there are no rows to predict")
    ordered = np.empty(len(found), np.int64)
    ordered[np.array(numbers)] = found
    return ordered
