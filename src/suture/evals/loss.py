"""How well a language model predicts documents: loss and perplexity per token."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suture.data import Batch
from suture.errors import NonFiniteError
from suture.evals.base import Metric, ratio
from suture.models import evaluating


@torch.inference_mode()
def loss(model: nn.Module, batches: Iterable[Batch], *, device: str = "cpu") -> tuple[Metric, ...]:
    """Mean next-token loss (nats) and perplexity over all tokens but the first of each document.

    Documents count by their tokens; the intervals come from resampling whole documents, and
    ``n`` is the number of documents that have at least two tokens.

    Raises:
        NonFiniteError: the model gave NaN or infinity.
    """
    sums: list[float] = []
    counts: list[float] = []
    with evaluating(model):
        for batch in batches:
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            if batch.targets is not None:  # the answer is judged, not the prompt
                mask = batch.targets.to(device)
                each = token_losses(model(ids, batch.attention_mask.to(device)), ids, mask)
            else:
                each = token_losses(model(ids, mask), ids, mask)
            sums += each.sum(1).tolist()
            counts += (mask[:, 1:].sum(1)).tolist()
    if not all(map(math.isfinite, sums)):
        raise NonFiniteError("the model gave a loss that is not a finite number")
    pairs = [(s, c) for s, c in zip(sums, counts, strict=True) if c]
    nats = ratio("loss", [s for s, _ in pairs], [c for _, c in pairs])
    ends = (math.exp(nats.value), nats.n, math.exp(nats.low), math.exp(nats.high))
    return nats, Metric("perplexity", *ends)


def wide(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 where the model is."""
    return logits if logits.dtype == torch.float64 else logits.float()


def token_losses(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Loss of predicting every token from those before it; 0 where the target is padding.

    ``logits`` are ``(batch, length, vocabulary)``, the result is ``(batch, length - 1)`` float32.
    """
    targets = input_ids[:, 1:]
    flat = F.cross_entropy(wide(logits[:, :-1]).flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view(targets.shape) * attention_mask[:, 1:]
