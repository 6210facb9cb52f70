"""Share of rows whose most likely class is the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import torch
from torch import nn

from suture.errors import RecipeError, did_you_mean
from suture.evals.base import Metric, share
from suture.evals.kinds import Column, EvalJob, Models, Prepare, Run, Score, dataset_of
from suture.schema.parameters import Text, TextByWord, Words
from suture.training.data import Batch, Dataset
from suture.training.images import Image, Images, ImageTransform, checked
from suture.training.models import evaluating


@torch.inference_mode()
def hits(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: str = "cpu",
    tick: Callable[[int], None] = lambda rows: None,
) -> dict[int, float]:
    """1 for every row with the right class, else 0, by row; NaN where a logit is not finite.

    Raises:
        RecipeError: a row has no label.
    """
    found: dict[int, float] = {}
    with evaluating(model):
        for batch in batches:
            if (batch.labels < 0).any():
                raise RecipeError("accuracy needs a label on every row")
            logits = model(batch.input_ids.to(device), batch.attention_mask.to(device)).cpu()
            right = (logits.argmax(1) == batch.labels).double()
            right[~logits.isfinite().all(1)] = torch.nan
            found.update(zip(batch.rows, right.tolist(), strict=True))
            tick(len(batch.rows))
    return found


def accuracy(
    model: nn.Module, batches: Iterable[Batch], *, device: str = "cpu"
) -> tuple[Metric, ...]:
    """Accuracy of a classifier that gives logits ``(batch, classes)``, with a Wilson interval.

    Raises:
        RecipeError: there are no rows, or a row has no label.
    """
    found = hits(model, batches, device=device).values()
    return (share("accuracy", sum(hit == 1.0 for hit in found), len(found)),)


def classes(
    text: Column = "text",
    label: Column = "label",
    head: Annotated[
        str, Text("`model` for the head in the model's folder, `zero-shot`, or a file")
    ] = "model",
    labels: Annotated[tuple[str, ...], Words("the labels of a zero-shot head, in order")] = (),
    label_texts: Annotated[
        dict[str, str] | None, TextByWord("what a zero-shot head reads for a label")
    ] = None,
) -> Prepare:
    """The share of rows whose most likely class is the label.

    The head is the one beside the model's weights, a saved one, the same for all models, or made of
    the labels' texts by the model itself.
    """

    def prepare(job: EvalJob) -> Run:
        texts = job.column(text)
        told, numbers = _labels(job, label)
        rows = [n for n in texts if told.get(n) in numbers]
        read = zip(rows, job.ids([texts[n] for n in rows]), strict=True)
        fitting = {n: fit for n, ids in read if (fit := job.fit(n, ids)) is not None}
        data, order = dataset_of(
            fitting, job.tokenizer, labels={n: numbers[told[n]] for n in fitting}
        )
        return _scored(data, order, job.batch)

    return prepare


def images(
    image: Column = "image",
    label: Column = "label",
    head: Annotated[str, Text("`model` for the head in the model's folder, or a file")] = ("model"),
) -> Prepare:
    """The share of images whose most likely class is the label.

    The data are a folder with one folder for each label, an ``.npz`` or IDX file, or rows that name
    files or hold their bytes. Images are scaled to what the model was made for.
    """

    def prepare(job: EvalJob) -> Run:
        told, numbers = _labels(job, label)
        held: dict[int, tuple[int, Image]] = {}
        for number, row in enumerate(job.rows):
            given: Any = row.cells[image]
            with job.problems.collecting():
                held[number] = checked(given, row.where), given
        order = [n for n in held if told.get(n) in numbers]
        data = Images(
            tuple((held[n][0],) for n in order), tuple(numbers[told[n]] for n in order), 0,
            images=tuple(held[n][1] for n in order), look=job.look or ImageTransform((224, 224)),
        )  # fmt: skip
        return _scored(data, order, job.batch)

    return prepare


def _scored(data: Dataset | Images, order: Sequence[int], size: int) -> Run:
    """The way to count hits on data whose rows have these numbers."""

    def run(models: Models) -> tuple[Score, ...]:
        batches = data.batches(size)
        found = hits(models.model, batches, device=models.device, tick=models.tick)
        return (Score("accuracy", {order[n]: v for n, v in found.items()}, "share"),)

    return run


def _labels(job: EvalJob, column: str) -> tuple[dict[int, str], dict[str, int]]:
    """The label of every row, and the number of each label; unknown ones are noted."""
    told = job.column(column)
    numbers = {name: i for i, name in enumerate(job.labels)}
    for number, name in told.items():
        if numbers and name not in numbers:
            job.refuse(
                f"{job.rows[number].where}: the label {name!r} is not one of the head's; "
                f"{did_you_mean(name, job.labels)}"
            )
    return told, numbers
