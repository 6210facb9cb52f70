"""How an encoder arranges texts: agreement with a reference, and nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suture.data import Batch
from suture.errors import MismatchError, RecipeError
from suture.evals.base import Eval, Metric, mean, share
from suture.models import Encoder, embed


def agreement(reference: Tensor) -> Eval:
    """An evaluation against the vectors ``(n, dim)`` that another encoder gives the same rows.

    It gives the mean cosine between the two vectors of a row, with a bootstrap interval over rows.
    1 says that the encoder places every text where the reference does, not that this is good.
    """

    def evaluate(
        model: nn.Module, batches: Iterable[Batch], *, device: str = "cpu"
    ) -> tuple[Metric, ...]:
        vectors = embed(_encoder(model), batches, device=device)
        if vectors.shape != reference.shape:
            found, wanted = tuple(vectors.shape), tuple(reference.shape)
            raise MismatchError(f"agreement: vectors of {found}, the reference has {wanted}")
        cosines = F.cosine_similarity(vectors, reference, dim=1)
        return (mean("agreement", cosines.tolist()),)

    return evaluate


def neighbour(
    model: nn.Module, batches: Iterable[Batch], *, device: str = "cpu"
) -> tuple[Metric, ...]:
    """Share of rows whose nearest other row, by cosine, has the same label (Wilson interval).

    With two rows a label, such as a question and its answer, this is retrieval among all rows.

    Raises:
        RecipeError: there are fewer than two rows, or a row has no label.
    """
    held = list(batches)
    labels = torch.full((sum(len(batch.rows) for batch in held),), -1)
    for batch in held:
        labels[list(batch.rows)] = batch.labels
    if len(labels) < 2 or (labels < 0).any():
        raise RecipeError("neighbour needs at least two rows, and a label on every one")
    vectors = F.normalize(embed(_encoder(model), held, device=device), dim=1)
    hits = 0
    for start in range(0, len(vectors), 1024):  # never all pairs at once
        near = vectors[start : start + 1024] @ vectors.T
        rows = torch.arange(start, start + len(near))
        near[torch.arange(len(near)), rows] = -2.0
        hits += int((labels[near.argmax(1)] == labels[rows]).sum())
    return (share("neighbour", hits, len(labels)),)


def _encoder(model: nn.Module) -> Encoder:
    if not isinstance(model, Encoder):
        raise RecipeError(f"this evaluation needs an encoder, not a {type(model).__name__}")
    return model
