"""Heads of classifiers: read off the labels' texts, fitted on the base, learned along, or saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from suture.errors import MismatchError, Problems
from suture.schema.paths import place_of
from suture.training.data import Dataset, tokenise
from suture.training.labelled import rows_of
from suture.training.models import Encoder, Head, embed, load_head
from suture.training.probe import fit_head

TEMPLATES = ("{}", "this text is about {}", "it refers to {}")
SHARPNESS = 20.0
"""Factor on cosines; sentence encoders are trained with one like it."""


def make_head(
    kind: str, encoder: Encoder, tokenizer: Any, data: Dataset, labels: Sequence[str],
    texts: Mapping[str, str], *, folder: Path, device: str,
) -> Head:  # fmt: skip
    """The head of a task, as a recipe asks for it.

    Raises:
        MismatchError: a saved head is for other labels or another width.
    """
    if kind == "zero-shot":
        return zero_shot(
            encoder, tokenizer, [texts.get(x, x.replace("_", " ")) for x in labels], labels, device
        )
    if kind in ("probe", "learned"):
        features = embed(encoder, data.batches(64), device=device)
        return fit_head(features, torch.tensor(data.labels), labels)
    return saved_head(kind, folder, labels, encoder.dim)


def saved_head(path: str, folder: Path, labels: Sequence[str], dim: int | None) -> Head:
    """A head that was saved, for these labels and an encoder of this width, if it is known.

    Raises:
        CheckpointError: there is none.
        MismatchError: it is for other labels or another width.
    """
    head, problems = load_head(place_of(path, folder)), Problems()
    if head.labels != tuple(labels):
        problems.add(
            MismatchError,
            f"head: {path} is for the labels {', '.join(head.labels[:8])}; "
            f"the rows have {', '.join(labels[:8])}",
        )
    if dim is not None and head.weight.shape[1] != dim:
        problems.add(
            MismatchError,
            f"head: {path} reads {head.weight.shape[1]} numbers, the base gives {dim}",
        )
    problems.raise_if_any()
    return head


def zero_shot(
    encoder: Encoder,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[str],
    device: str = "cpu",
) -> Head:
    """Cosines with the mean vector of each label's text in a few sentences, times a constant."""
    total = torch.zeros(len(labels), encoder.dim)
    for template in TEMPLATES:
        rows = rows_of((template.format(text), "") for text in texts)
        data = tokenise(rows, tokenizer, max_length=64)
        total += F.normalize(embed(encoder, data.batches(64), device=device), dim=-1)
    weight = SHARPNESS * F.normalize(total, dim=-1)
    return Head(tuple(labels), weight, torch.zeros(len(labels)), cosine=True)
