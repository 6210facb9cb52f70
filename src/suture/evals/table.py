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
from suture.schema.table import Table

EVALS = Table("evaluation", Kind, (
    Kind(accuracy.classes, "classification", "", "classifier", accuracy.accuracy,
         called="accuracy"),
    Kind(choice.choice, "multiple choice by log-likelihood", ""),
    Kind(odds.depth, "depth of refusals", ""),
    Kind(drift.drift, "divergence from a reference", "", reference=True),
    Kind(exact.exact_match, "generated answers", ""),
    Kind(accuracy.images, "classification of images", "", "image-classifier",
         called="image-accuracy"),
    Kind(judged.judged, "answers before a judge", "", asks=True),
    Kind(loss.prediction, "loss and perplexity", "", score=loss.loss, called="loss"),
    Kind(embedding.neighbours, "nearest neighbours", "", "encoder", embedding.neighbour,
         called="neighbour"),
    Kind(judged.preferred, "pairs of answers before a judge", "", reference=True),
    Kind(preference.preference, "safe against unsafe answers", ""),
    Kind(refusal.refusal, "answers that say no", "", asks=True),
    Kind(odds.refusal_odds, "odds of beginning with a refusal", ""),
), group="suture.evals")  # fmt: skip
"""Every evaluation: what it measures, what it asks, and what scores batches; another package adds
one, see docs/plugins.md."""
