"""Share of rows whose most likely class is the right one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from suture.data import Batch
from suture.errors import RecipeError
from suture.evals.base import Metric, share
from suture.models import evaluating


@torch.inference_mode()
def accuracy(
    model: nn.Module, batches: Iterable[Batch], *, device: str = "cpu"
) -> tuple[Metric, ...]:
    """Accuracy of a classifier that gives logits ``(batch, classes)``, with a Wilson interval.

    Raises:
        RecipeError: there are no rows, or a row has no label.
    """
    hits, n = 0, 0
    with evaluating(model):
        for batch in batches:
            if (batch.labels < 0).any():
                raise RecipeError("accuracy needs a label on every row")
            logits = model(batch.input_ids.to(device), batch.attention_mask.to(device))
            hits += int((logits.argmax(1).cpu() == batch.labels).sum())
            n += len(batch.labels)
    return (share("accuracy", hits, n),)
