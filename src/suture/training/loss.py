"""What training moves: losses of a batch, and how batches become gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suture.training.data import Batch
from suture.training.models import LanguageModel

Loss = Callable[[nn.Module, Batch], Tensor]
"""Mean loss of one batch, a scalar; the batch is on the model's device."""


def classification(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a classifier."""
    return F.cross_entropy(model(batch.input_ids, batch.attention_mask).float(), batch.labels)


ROWS = 512
"""Positions whose logits are held at once."""


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a language model over the tokens that are targets, a mean over them.

    A model with a plain read-out computes logits at these positions only, some at a time, and their
    gradient at once: a vocabulary is many times as wide as a hidden state, and nothing of its width
    is kept for the backward pass.
    """
    ids, counts = batch.input_ids, wanted(batch)[:, 1:] != 0
    head = model.read_out() if isinstance(model, LanguageModel) else None
    if head is not None and torch.is_grad_enabled():
        assert isinstance(model, LanguageModel)
        states = model.hidden(ids, batch.attention_mask)[:, :-1][counts]
        apply: Callable[..., Tensor] = ReadOutLoss.apply
        return apply(states, head.weight, head.bias, ids[:, 1:][counts])
    logits = model(ids, batch.attention_mask)[:, :-1]
    targets = ids[:, 1:].masked_fill(~counts, -100)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class ReadOutLoss(torch.autograd.Function):
    r"""Mean cross-entropy of ``states @ weight.T + bias``; gradients are made in the forward pass.

    .. math:: \nabla_z L = (\operatorname{softmax}(z) - e_t) / n, \qquad
              \nabla_h L = W^\top \nabla_z L

    so that logits :math:`z` are needed once. float32 inside, whatever the states are.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        """The loss of ``states`` ``(n, dim)`` for ``targets`` ``(n,)``."""
        asks = ctx.needs_input_grad
        like = [states, weight, bias]
        found = [
            torch.zeros_like(t, dtype=torch.float32) if t is not None and asks[i] else None
            for i, t in enumerate(like)
        ]
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for start in range(0, len(targets), ROWS):
            rows = slice(start, start + ROWS)
            h, target = states[rows], targets[rows, None]
            logs = F.linear(h, weight, bias).float().log_softmax(-1)
            total -= logs.gather(1, target).sum()
            g = logs.exp_()
            g.scatter_add_(1, target, torch.full_like(target, -1, dtype=g.dtype))
            if found[0] is not None:
                found[0][rows] = g.to(weight.dtype) @ weight
            if found[1] is not None:
                found[1] += g.T @ h.float()
            if found[2] is not None:
                found[2] += g.sum(0)
        count = max(1, len(targets))
        ctx.save_for_backward(*(None if t is None else t.div_(count) for t in found))
        ctx.dtypes = [None if t is None else t.dtype for t in like]
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """What the forward pass has made, times the gradient of the loss."""
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if t is None else (t * grads[0]).to(d) for t, d in pairs), None)


def wanted(batch: Batch) -> Tensor:
    """1 where a token is a target: the answer, where rows have a prompt; else every token."""
    return batch.attention_mask if batch.targets is None else batch.targets


class LossStep:
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

    def weight(self, batch: Batch) -> int:
        """What the loss of a batch is a mean over: its target tokens for texts, else its rows."""
        if self.loss is next_token:
            return int((wanted(batch)[:, 1:] != 0).sum())
        return len(batch.rows)

    def asked(self, batch: Batch) -> Batch:
        """What the model is asked for a batch of the loop: the same, where rows are no pairs."""
        return batch

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
