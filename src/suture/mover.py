"""What training moves: losses of a batch, and how batches become gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suture.data import Batch

Loss = Callable[[nn.Module, Batch], Tensor]
"""Mean loss of one batch, a scalar; the batch is on the model's device."""


def classification(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a classifier."""
    return F.cross_entropy(model(batch.input_ids, batch.attention_mask).float(), batch.labels)


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a language model over the tokens that are targets, a mean over them."""
    logits = model(batch.input_ids, batch.attention_mask)[:, :-1]
    targets = batch.input_ids[:, 1:].masked_fill(wanted(batch)[:, 1:] == 0, -100)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def wanted(batch: Batch) -> Tensor:
    """1 where a token is a target: the answer, where rows have a prompt; else every token."""
    return batch.attention_mask if batch.targets is None else batch.targets


class Mover:
    """How batches become gradients and a step becomes weights. This one is plain training.

    Strategies that train something else than the parameters that ask for gradients (a few entries
    of them, a direction from them) are movers of their own; the loop is the same for all.
    """

    def __init__(self, model: nn.Module, loss: Loss = classification) -> None:
        self.model = model
        self.loss = loss
        self._wrapped = model

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name; also what a checkpoint holds."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The same as groups of an optimizer: matrices decay, vectors do not."""
        every = list(self.trained().values())
        return [
            {"params": [p for p in every if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
        ]

    def prepare(self, accelerator: Any) -> None:
        """Called once before the first batch."""
        self._wrapped = accelerator.prepare(self.model)

    def gradients(self, accelerator: Any, batch: Batch, share: float, last: bool) -> float:
        """Add the gradient of ``share`` times the loss of a batch; that product."""
        # processes exchange gradients once a step, not once a batch
        sync = nullcontext() if last else accelerator.no_sync(self._wrapped)
        with sync, accelerator.autocast():
            value = self.loss(self._wrapped, batch) * share
            accelerator.backward(value)
        return float(value.detach())

    def before(self, accelerator: Any, lr: float) -> None:
        """Between the last gradient of a step and clipping."""

    def after(self) -> None:
        """After a step of the optimizer, or after weights were put back."""

    @property
    def evaluated(self) -> nn.Module:
        """The model to look at: what the trained parameters mean."""
        return self.model


def to(batch: Batch, device: torch.device) -> Batch:
    """The same batch on a device."""
    moved = [
        None if t is None else t.to(device)
        for t in (batch.input_ids, batch.attention_mask, batch.labels, batch.targets)
    ]
    return Batch(moved[0], moved[1], moved[2], batch.rows, moved[3])  # type: ignore[arg-type]
