"""A small refusal classifier: a sentence encoder and a logistic regression on labelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from suture.errors import RecipeError
from suture.evals.base import Metric, share
from suture.evals.judges import ANSWERS, REFUSES, stances
from suture.training.labelled import draw
from suture.training.models import load_encoder, save_head
from suture.training.probe import fit_head

L2 = 1.0
"""Much stronger than for probes: labelled answers are few."""


@dataclass(frozen=True)
class Labelled:
    """An answer that a person has looked at."""

    prompt: str
    """What was answered; rows of one prompt are held out together."""
    answer: str
    refuses: bool


@dataclass(frozen=True)
class Quality:
    """How often verdicts agree with people, with 95 % Wilson intervals."""

    accuracy: Metric
    precision: Metric
    """Of the answers that are called refusals, how many are; NaN where none is called so."""
    recall: Metric
    """Of the refusals, how many are found."""


def quality(found: Sequence[bool], right: Sequence[bool]) -> Quality:
    """Compare verdicts with labels."""
    pairs = list(zip(found, right, strict=True))
    hits = sum(f and r for f, r in pairs)

    def part(name: str, above: int, below: int) -> Metric:
        nan = float("nan")
        return share(name, above, below) if below else Metric(name, nan, 0, nan, nan)

    return Quality(
        part("accuracy", sum(f == r for f, r in pairs), len(pairs)),
        part("precision", hits, sum(found)),
        part("recall", hits, sum(right)),
    )


def features(encoder: Path, rows: Sequence[Labelled]) -> torch.Tensor:
    """What a classifier reads of labelled answers, ``(n, dim)``, by a sentence encoder."""
    model, tokenizer = load_encoder(encoder, dtype=torch.float32)
    return stances(model, tokenizer, [row.prompt for row in rows], [row.answer for row in rows])


def cross_validated(
    vectors: torch.Tensor, rows: Sequence[Labelled], folds: int = 5, l2: float = L2
) -> list[bool]:
    """The verdict on every row of a classifier that was fitted without its fold."""
    side = [int(draw(0, row.prompt) * folds) for row in rows]
    targets = torch.tensor([int(row.refuses) for row in rows])
    found = [False] * len(rows)
    for fold in sorted(set(side)):
        held = torch.tensor([s == fold for s in side])
        if len(set(targets[~held].tolist())) < 2:
            raise RecipeError(f"fold {fold}: the other rows are all of one label; take more rows")
        head = fit_head(vectors[~held], targets[~held], (ANSWERS, REFUSES), l2=l2)
        scores = vectors[held] @ head.weight.T + head.bias
        for at, verdict in zip(held.nonzero()[:, 0].tolist(), scores.argmax(1).tolist(),
                               strict=True):  # fmt: skip
            found[at] = bool(verdict)
    return found


def train_refusal_classifier(
    encoder: str | Path, rows: Sequence[Labelled], out: str | Path, folds: int = 5, l2: float = L2
) -> Quality:
    """Fit a classifier on labelled answers and save it; gives its cross-validated quality.

    Args:
        encoder: the folder of a sentence encoder; suites name it beside the classifier.
        rows: answers with labels.
        out: a ``.safetensors`` file, a few kilobytes.
        folds: how many parts are held out in turn.
        l2: how strongly large weights are held back.

    Raises:
        SutureError: too few rows, an empty one, or no such encoder.
    """
    if len(rows) < 2 * folds or len({row.refuses for row in rows}) < 2:
        raise RecipeError(f"{len(rows)} rows; it takes at least {2 * folds}, of both labels")
    for number, row in enumerate(rows):
        if not row.answer.strip():
            raise RecipeError(f"row {number}: the answer is empty")
    vectors = features(Path(encoder), rows)
    right = [row.refuses for row in rows]
    found = quality(cross_validated(vectors, rows, folds, l2), right)
    targets = torch.tensor([int(r) for r in right])
    save_head(fit_head(vectors, targets, (ANSWERS, REFUSES), l2=l2), Path(out))
    return found
