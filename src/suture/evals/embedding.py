"""How an encoder arranges texts: agreement with a reference, and nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suture.errors import MismatchError, RecipeError
from suture.evals.base import Eval, Metric, mean, share
from suture.evals.kinds import Column, EvalJob, Models, Prepare, Run, Score, dataset_of
from suture.training.data import Batch
from suture.training.models import Encoder, embed


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
    found = nearest(model, list(batches), device=device)
    return (share("neighbour", sum(hit == 1.0 for hit in found.values()), len(found)),)


def nearest(model: nn.Module, held: Sequence[Batch], *, device: str = "cpu") -> dict[int, float]:
    """1 for every row whose nearest other row has the same label, else 0; NaN without a vector.

    Raises:
        RecipeError: there are fewer than two rows, or a row has no label.
    """
    labels = torch.full((sum(len(batch.rows) for batch in held),), -1)
    for batch in held:
        labels[list(batch.rows)] = batch.labels
    if len(labels) < 2 or (labels < 0).any():
        raise RecipeError("neighbour needs at least two rows, and a label on every one")
    vectors = F.normalize(embed(_encoder(model), held, device=device), dim=1)
    whole = vectors.isfinite().all(1)
    found: list[float] = []
    for start in range(0, len(vectors), 1024):  # never all pairs at once
        near = vectors[start : start + 1024] @ vectors.nan_to_num().T
        rows = torch.arange(start, start + len(near))
        near[torch.arange(len(near)), rows] = -2.0
        right = (labels[near.argmax(1)] == labels[rows]).double()
        right[~whole[rows]] = torch.nan
        found += right.tolist()
    return dict(enumerate(found))


def neighbours(text: Column = "text", label: Column = "label") -> Prepare:
    """The share of rows whose nearest other row, by cosine of vectors, has the same label."""

    def prepare(job: EvalJob) -> Run:
        texts, told = job.column(text), job.column(label)
        numbers = {name: i for i, name in enumerate(dict.fromkeys(told.values()))}
        rows = [n for n in texts if n in told]
        read = zip(rows, job.ids([texts[n] for n in rows]), strict=True)
        fitting = {n: fit for n, ids in read if (fit := job.fit(n, ids)) is not None}
        if len(fitting) < 2 and not job.problems:
            job.refuse("data: a nearest neighbour needs at least two rows")
        data, order = dataset_of(
            fitting, job.tokenizer, labels={n: numbers[told[n]] for n in fitting}
        )

        def run(models: Models) -> tuple[Score, ...]:
            found = nearest(models.model, list(data.batches(job.batch)), device=models.device)
            models.tick(len(order))
            return (Score("neighbour", {order[n]: v for n, v in found.items()}, "share"),)

        return run

    return prepare


def _encoder(model: nn.Module) -> Encoder:
    if not isinstance(model, Encoder):
        raise RecipeError(f"this evaluation needs an encoder, not a {type(model).__name__}")
    return model
