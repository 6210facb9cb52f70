"""The evaluations that a suite may name: a line each."""

from __future__ import annotations

from suture.evals import (
    accuracy,
    choice,
    drift,
    embedding,
    exact,
    judged,
    loss,
    odds,
    preference,
    refusal,
)
from suture.evals.kinds import Kind

EVALS: dict[str, Kind] = {
    "accuracy": Kind(accuracy.classes, "classification", "classifier", accuracy.accuracy),
    "choice": Kind(choice.choice, "multiple choice by log-likelihood", "language-model"),
    "depth": Kind(odds.depth, "depth of refusals", "language-model"),
    "drift": Kind(drift.drift, "divergence from a reference", "language-model", reference=True),
    "exact-match": Kind(exact.exact_match, "generated answers", "language-model"),
    "image-accuracy": Kind(accuracy.images, "classification of images", "image-classifier"),
    "judged": Kind(judged.judged, "answers before a judge", "language-model", asks=True),
    "loss": Kind(loss.prediction, "loss and perplexity", "language-model", loss.loss),
    "neighbour": Kind(embedding.neighbours, "nearest neighbours", "encoder", embedding.neighbour),
    "preferred": Kind(
        judged.preferred, "pairs of answers before a judge", "language-model", reference=True
    ),
    "preference": Kind(preference.preference, "safe against unsafe answers", "language-model"),
    "refusal": Kind(refusal.refusal, "answers that say no", "language-model", asks=True),
    "refusal-odds": Kind(odds.refusal_odds, "odds of beginning with a refusal", "language-model"),
}
"""By the name in suites: maker, what it measures, what it needs, and what scores batches."""
