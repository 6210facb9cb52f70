"""A loaded model and rows in, metrics out: ``EVALS``, the table of what there is."""

from __future__ import annotations

from suture.evals import accuracy, embedding, loss
from suture.evals.base import Eval, EvalResult, Metric, share

__all__ = ["EVALS", "Eval", "EvalResult", "Metric", "share"]

EVALS: dict[str, Eval] = {
    "accuracy": accuracy.accuracy,
    "loss": loss.loss,
    "neighbour": embedding.neighbour,
}
