"""The evaluations that a suite may name: a line each."""

from __future__ import annotations

from suture.evals import accuracy, choice, embedding, exact, loss
from suture.evals.kinds import Kind

EVALS: dict[str, Kind] = {
    "accuracy": Kind(accuracy.classes, "classification", "classifier", accuracy.accuracy),
    "choice": Kind(choice.choice, "multiple choice by log-likelihood", "language-model"),
    "exact-match": Kind(exact.exact_match, "generated answers", "language-model"),
    "loss": Kind(loss.prediction, "loss and perplexity", "language-model", loss.loss),
    "neighbour": Kind(embedding.neighbours, "nearest neighbours", "encoder", embedding.neighbour),
}
"""By the name in suites: maker, what it measures, what it needs, and what scores batches."""
