r"""Linearized models: :math:`f_{lin}(x, \tau) = f(x, \theta_0) + J_\theta f(x, \theta_0)\,\tau`.

Only the body (the encoder) is linearized; a head stays what it is (Ortiz-Jimenez et al. 2023,
arXiv:2305.12827). A tuned checkpoint :math:`\theta_0 + \tau` of this kind means nothing without
its base: it is evaluated, added and scaled as a linearized model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from suture.training.data import Batch
from suture.training.loss import Loss, LossStep, classification
from suture.training.models import Classifier

with warnings.catch_warnings():  # torch's first use of forward mode warns of its own innards
    warnings.simplefilter("ignore", DeprecationWarning)
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))  # type: ignore[no-untyped-call]


def body_of(model: nn.Module) -> nn.Module:
    """The part that is linearized: the encoder of a classifier, else the whole model."""
    return model.encoder if isinstance(model, Classifier) else model


def product(
    body: nn.Module, tau: Mapping[str, Tensor], input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of ``body`` at its own weights, and its derivative along ``tau``.

    Forward-mode differentiation knows no fused attention: the plain one is used inside.
    """
    known = dict(body.named_parameters())
    dual_of: Any = forward_ad.make_dual
    parts_of: Any = forward_ad.unpack_dual
    # inference mode would lose the tangent without a word: it is left inside
    plain = torch.inference_mode(False)
    with plain, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        dual = {n: dual_of(known[n].detach(), t.detach()) for n, t in tau.items()}
        out = torch.func.functional_call(body, dual, (input_ids, attention_mask))
        value, tangent = parts_of(out)
        return value, torch.zeros_like(value) if tangent is None else tangent


class LinearizedBody(nn.Module):
    """The linearized body, for evaluation; weights may be sums of several ``tau``."""

    def __init__(self, body: nn.Module, tau: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.body = body
        self.tau = tau

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.body.dim)  # type: ignore[arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the body gives, to first order in ``tau``."""
        value, tangent = product(self.body, self.tau, input_ids, attention_mask)
        return value + tangent


class _Given(nn.Module):
    """A body that gives what it was given: the head then sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.empty(0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.out


class Tangent(LossStep):
    r"""Trains :math:`\tau` by two ordinary passes, exactly.

    :math:`\theta_0` is constant, so :math:`\nabla_\tau L(f_0 + J\tau) = J^\top g` with
    :math:`g = \partial L / \partial f_{lin}`: a forward-mode pass without a graph gives
    :math:`J\tau`, the loss gives :math:`g`, and an ordinary backward pass of :math:`f_0` from
    :math:`g` gives the gradient. The body runs without dropout, since both passes must see the
    same function. Weight decay acts on :math:`\theta_0 + \tau`.
    """

    def __init__(self, model: nn.Module, loss: Loss = classification) -> None:
        super().__init__(model, loss)
        self.body = body_of(model)
        self.base = {n: p for n, p in self.body.named_parameters() if p.requires_grad}
        self.tau = {
            n: nn.Parameter(torch.zeros_like(p, dtype=torch.float32)) for n, p in self.base.items()
        }
        inner = {id(p) for p in self.base.values()}
        self._rest = {
            n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in inner
        }
        self._given = _Given()
        self._decay = 0.0

    def trained(self) -> dict[str, nn.Parameter]:
        """``tau``, and what of the head is learned."""
        return {**{f"tau/{n}": t for n, t in self.tau.items()}, **self._rest}

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """No decay here: AdamW would pull ``tau`` to 0, not the weights; see ``before``."""
        self._decay = weight_decay
        return [{"params": list(self.trained().values()), "weight_decay": 0.0}]

    def prepare(self, accelerator: Any) -> None:
        """The model is not wrapped: gradients are exchanged below."""

    def gradients(self, accelerator: Any, batch: Batch, share: float, last: bool) -> float:
        """Add the gradient of the linearized loss of a batch."""
        self.body.eval()
        ids, mask = batch.input_ids, batch.attention_mask
        _, moved = product(self.body, self.tau, ids, mask)
        with torch.enable_grad(), accelerator.autocast():
            start = self.body(ids, mask)
        self._given.out = (start.detach() + moved.to(start.dtype)).requires_grad_()
        with accelerator.autocast():
            value = self.loss(self._headed(self._given), batch) * share
        accelerator.backward(value)
        start.backward(self._given.out.grad)
        for name, parameter in self.base.items():
            if parameter.grad is not None:
                tau, found = self.tau[name], parameter.grad.float()
                tau.grad = found if tau.grad is None else tau.grad.add_(found)
                parameter.grad = None
        return float(value.detach())

    def before(self, accelerator: Any, lr: float) -> None:
        """Exchange gradients between processes, and decay the weights ``theta_0 + tau``."""
        if accelerator.num_processes > 1:
            for parameter in self.trained().values():
                if parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
        if self._decay:
            with torch.no_grad():
                for name, tau in self.tau.items():
                    if tau.ndim > 1:
                        tau.sub_(lr * self._decay * (self.base[name] + tau))

    def _headed(self, body: nn.Module) -> nn.Module:
        if not isinstance(self.model, Classifier):
            return body
        return self.model.with_body(body)

    @property
    def evaluated(self) -> nn.Module:
        """The linearized model."""
        return self._headed(LinearizedBody(self.body, self.tau))

    @torch.no_grad()
    def move(self) -> None:
        """Turn the weights of the body into ``theta_0 + tau``, to be saved; at the end."""
        for name, tau in self.tau.items():
            self.base[name].add_(tau)
