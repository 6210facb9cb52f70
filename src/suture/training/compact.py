r"""Training of chosen entries only: one flat AdamW over them, and nothing for the others.

With a mask :math:`c` the step is

.. math:: \theta \leftarrow \theta - \gamma \lambda (c \odot \theta)
          - \gamma\, c \odot \hat m / (\sqrt{\hat v} + \epsilon)

(Iurada et al. 2025, arXiv:2504.02620). Where :math:`c = 1` this is ordinary AdamW on the same
gradient; where :math:`c = 0` moments would never be read, so here they do not exist. The chosen
entries are gathered into flat float32 parameters, which any optimizer, gradient clipping and
gradient scaler can handle; after a step they are written back to their places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from suture.errors import RecipeError
from suture.training.data import Batch
from suture.training.loss import Loss, LossStep, classification


def _on_gradient(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> Any:
    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


class Chosen(NamedTuple):
    """The chosen entries of one parameter, and their place in a flat one."""

    parameter: nn.Parameter
    positions: Tensor | None
    """Positions in the flattened parameter, sorted; ``None`` for all of them."""
    flat: str
    start: int
    stop: int


class Compact(LossStep):
    """Moves the entries that masks choose, bit for bit nothing else.

    A tensor without a chosen entry is frozen: it gets no gradient, and what only its gradient
    would need is not saved in the forward pass. The gradient of a tensor with chosen entries is
    gathered as soon as it is there and freed, so that at most one is alive; masked entries are
    therefore gone before gradients are clipped.
    """

    def __init__(
        self, model: nn.Module, masks: Mapping[str, Tensor], loss: Loss = classification
    ) -> None:
        """Freeze ``model`` but for the entries of ``masks``, booleans by name of parameter."""
        super().__init__(model, loss)
        known = dict(model.named_parameters())
        for name, mask in masks.items():
            if name not in known or known[name].shape != mask.shape:
                raise RecipeError(f"the mask of {name} {tuple(mask.shape)} fits no parameter")
        self.chosen: dict[str, Chosen] = {}
        ends = {"matrices": 0, "vectors": 0}
        for name, parameter in known.items():
            found = masks.get(name)
            count = 0 if found is None else int(found.count_nonzero())
            parameter.requires_grad_(count > 0)
            parameter.grad = None
            if found is None or not count:
                continue
            index: Tensor | None = None
            if count < found.numel():
                small = found.numel() < 2**31
                index = (
                    found.flatten()
                    .nonzero()
                    .flatten()
                    .to(parameter.device, torch.int32 if small else torch.int64)
                )
            flat = "matrices" if parameter.ndim > 1 else "vectors"
            start, ends[flat] = ends[flat], ends[flat] + count
            self.chosen[name] = Chosen(parameter, index, flat, start, ends[flat])
        devices = {part.parameter.device for part in self.chosen.values()}
        if len(devices) > 1:
            raise RecipeError("the chosen tensors lie on several devices; train on one")
        device = devices.pop() if devices else torch.device("cpu")
        self.flats = {
            word: nn.Parameter(torch.empty(end, dtype=torch.float32, device=device))
            for word, end in ends.items()
            if end
        }
        self._sums = {word: torch.zeros_like(flat) for word, flat in self.flats.items()}
        self._gather_values()
        self._handles = [
            _on_gradient(part.parameter, self._gather(part)) for part in self.chosen.values()
        ]

    @torch.no_grad()
    def _gather_values(self) -> None:
        for part in self.chosen.values():
            values = part.parameter.detach().reshape(-1)
            values = values if part.positions is None else values.index_select(0, part.positions)
            self.flats[part.flat][part.start : part.stop] = values

    def _gather(self, part: Chosen) -> Callable[[Tensor], None]:
        flat, total = self.flats[part.flat], self._sums[part.flat]

        @torch.no_grad()
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.reshape(-1)
            if flat.grad is None:  # the first of this step
                flat.grad = total.zero_()
            if part.positions is not None:
                gradient = gradient.index_select(0, part.positions)
            flat.grad[part.start : part.stop] += gradient
            parameter.grad = None

        return hook

    @property
    def count(self) -> int:
        """Entries that are trained."""
        return sum(flat.numel() for flat in self.flats.values())

    def trained(self) -> dict[str, nn.Parameter]:
        """The flat parameters."""
        return dict(self.flats)

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Entries of matrices decay, those of vectors do not."""
        decay = {"matrices": weight_decay, "vectors": 0.0}
        return [{"params": [p], "weight_decay": decay[word]} for word, p in self.flats.items()]

    def prepare(self, accelerator: Any) -> None:
        """The model is not wrapped: processes exchange the chosen gradients only, below."""

    def gradients(self, accelerator: Any, batch: Batch, share: float, last: bool) -> float:
        """Add the chosen gradients of a batch."""
        with accelerator.autocast():
            value = self.loss(self.model, batch) * share
            accelerator.backward(value)
        return float(value.detach())

    def before(self, accelerator: Any, lr: float) -> None:
        """Average the chosen gradients over processes."""
        if accelerator.num_processes > 1:
            for flat in self.flats.values():
                flat.grad = accelerator.reduce(flat.grad, reduction="mean")

    @torch.no_grad()
    def after(self) -> None:
        """Write the entries back to their places."""
        for part in self.chosen.values():
            values = self.flats[part.flat][part.start : part.stop].to(part.parameter.dtype)
            if part.positions is None:
                part.parameter.copy_(values.view(part.parameter.shape))
            else:
                part.parameter.view(-1).scatter_(0, part.positions.long(), values)

    def close(self) -> None:
        """Leave the model as an ordinary one: no hooks, its trained values in place."""
        for handle in self._handles:
            handle.remove()
