"""A loaded model moved along task vectors in place: what line and disentanglement maps evaluate.

``disentanglement`` and ``along`` of ``suture.analysis`` ask for predictions or scores of
the base plus given amounts of task vectors; ``Walk`` gives them without writing a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from suture.errors import MismatchError, NonFiniteError, RecipeError
from suture.tensors.spec import listed
from suture.training.data import Batch
from suture.training.models import Classifier, Encoder, Head, device_of, evaluating, parameters_of

Array = np.ndarray[Any, Any]
Batches = Callable[[], Iterable[Batch]]
"""Gives the rows of a task anew whenever they are read."""


class Walk:
    """The base plus amounts of task vectors, as one model whose weights are written over.

    Every point is computed from the base anew, in float32 (float64 where the model is), so that no
    error adds up on the way; memory is the model and one delta a task vector.
    """

    def __init__(self, model: nn.Module, deltas: Sequence[Mapping[str, Array]]) -> None:
        """Take a loaded base and task vectors over it, by the names that the checkpoint has.

        Raises:
            MismatchError: a task vector has tensors that the model lacks, or in other shapes.
        """
        self.model = model
        names = list(dict.fromkeys(n for delta in deltas for n in delta))
        try:
            self.moved = parameters_of(model, names)
            """The parameters that a task vector moves, by name."""
        except MismatchError as error:
            raise MismatchError(
                f"a task vector does not fit the loaded model: {error}; select the tensors that "
                "it has"
            ) from None
        self.deltas: list[dict[str, Tensor]] = []
        for number, delta in enumerate(deltas):
            wrong = sorted(n for n in delta if tuple(self.moved[n].shape) != tuple(delta[n].shape))
            if wrong:
                raise MismatchError(
                    f"task vector {number + 1} does not fit the model: {listed(wrong)}; select "
                    "the tensors that the loaded model has"
                )
            self.deltas.append({
                n: torch.from_numpy(np.array(delta[n])).to(self.moved[n].device) for n in delta
            })  # fmt: skip
        self.base = {n: p.detach().clone() for n, p in self.moved.items()}

    @torch.no_grad()
    def move(self, amounts: Sequence[float], step: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The model at the base plus ``amounts`` of the task vectors; all zero is the base.

        Args:
            amounts: one for each task vector.
            step: one more direction to go in, by name.
        """
        if len(amounts) != len(self.deltas):
            raise RecipeError(f"{len(amounts)} amounts for {len(self.deltas)} task vectors")
        for name, start in self.base.items():
            value = start if start.dtype == torch.float64 else start.float()
            for amount, delta in zip(amounts, self.deltas, strict=True):
                if amount and name in delta:
                    value = value + amount * delta[name]
            if step is not None and name in step:
                value = value + step[name]
            self.moved[name].copy_(value)
        return self.model

    def direction(self, number: int) -> dict[str, Tensor]:
        """A task vector in the dtype of the model, 0 where it moves nothing."""
        delta = self.deltas[number]
        return {
            n: delta[n].to(p.dtype) if n in delta else torch.zeros_like(p, requires_grad=False)
            for n, p in self.moved.items()
        }

    def predict(
        self, heads: Sequence[Head], rows: Sequence[Batches]
    ) -> Callable[[Sequence[float], int], Array]:
        """The callable that ``disentanglement`` asks for: classes of a task's rows, by its head.

        The model is an encoder.

        Args:
            heads: the read-out of each task.
            rows: the rows of each task; labels are not looked at.
        """

        def predict(amounts: Sequence[float], task: int) -> Array:
            encoder = self.move(amounts)
            assert isinstance(encoder, Encoder)
            return classes(Classifier(encoder, heads[task]), rows[task]())

        return predict


@torch.inference_mode()
def classes(model: nn.Module, batches: Iterable[Batch]) -> Array:
    """The most likely class of every row, int64[rows], in the order of the data.

    Raises:
        NonFiniteError: the model gives NaN for a row, of which no class is the most likely.
        RecipeError: there are no rows.
    """
    numbers: list[int] = []
    found: list[int] = []
    device = device_of(model)
    with evaluating(model):
        for batch in batches:
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            logits = model(ids, mask)
            if bool(logits.isnan().any()):
                raise NonFiniteError("the model gives NaN instead of logits; its weights may be "
                                     "too large (smaller amounts?), or NaN themselves")  # fmt: skip
            found += logits.argmax(1).tolist()
            numbers += list(batch.rows)
    if not numbers:
        raise RecipeError("there are no rows to predict")
    ordered = np.empty(len(found), np.int64)
    ordered[np.array(numbers)] = found
    return ordered
