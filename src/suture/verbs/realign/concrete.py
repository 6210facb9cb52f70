"""Binary Concrete masks (Maddison et al. 2017, arXiv:1611.00712) as SOMF learns them.

    m      = sigmoid((logit + log u - log(1 - u)) / T)        u uniform on (0, 1), drawn anew
    m_hat  = m / mean(m)                                      over a tensor; rescale: none leaves m

One logit an entry, an output row or a tensor, shared by all tasks. As T -> 0 the draw becomes
Bernoulli(sigmoid(logit)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from suture.verbs.realign.fuse import dice

FLOOR = 1e-3
"""Means of masks count as at least this when a mask is divided by its own: a closed one stays."""


@dataclass(frozen=True)
class Masking:
    """What a mask is."""

    granularity: str = "entry"
    temperature: float = 0.5
    rescale: str = "mean"


def logit_shape(shape: tuple[int, ...], granularity: str, across: int = 0) -> tuple[int, ...]:
    """The shape of the logits of a tensor; it broadcasts over the tensor.

    Args:
        shape: of the tensor.
        granularity: ``entry``, ``row`` or ``tensor``.
        across: the axis of outputs: 0, or 1 where matrices are stored the other way round.
    """
    if granularity == "entry" or not shape:
        return shape
    if granularity == "tensor":
        return (1,) * len(shape)
    axis = across if len(shape) == 2 else 0
    return tuple(size if at == axis else 1 for at, size in enumerate(shape))


def concrete(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """A draw of the mask from logistic noise, differentiable by the logits."""
    return ((logits + noise) / temperature).sigmoid()


def rescaled(mask: Tensor, rescale: str) -> Tensor:
    """The mask divided by its mean, through which the gradient flows, too; or as it is."""
    return mask if rescale == "none" else mask / mask.mean().clamp(min=FLOOR)


def logistic(logits: Tensor, seed: int, key: str) -> Tensor:
    """``log u - log(1 - u)`` for the logits of one tensor, u strictly between 0 and 1."""
    tiny = torch.finfo(torch.float32).eps
    u = torch.rand(logits.shape, generator=dice(seed, "mask", key)).clamp_(tiny, 1 - tiny)
    return u.logit_().to(logits)


Draw = Callable[[str], Tensor]
"""The mask of one tensor, rescaled; it broadcasts over the tensor."""


class Masks:
    """The logits of every masked tensor, and what may be made of them."""

    def __init__(self, logits: Mapping[str, nn.Parameter], how: Masking) -> None:
        self.logits, self.how = dict(logits), how

    @classmethod
    def fresh(
        cls, shapes: Mapping[str, tuple[int, ...]], how: Masking, across: Mapping[str, int],
        start: float = 0.0, device: str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> Masks:  # fmt: skip
        """Logits that all have the same value.

        Args:
            shapes: of the tensors that are masked.
            how: what the masks are.
            across: the axis of outputs of each.
            start: that value.
            device: where they are.
            dtype: of the logits.
        """
        logits = {}
        for key, shape in shapes.items():
            size = logit_shape(shape, how.granularity, across[key])
            logits[key] = nn.Parameter(torch.full(size, start, device=device, dtype=dtype))
        return cls(logits, how)

    def drawn(self, seed: int, keep: bool = False) -> Draw:
        """A fresh sample; the same seed gives the same one.

        Args:
            seed: of the noise.
            keep: whether the noise is remembered, for a draw that is asked for several times.
        """
        kept: dict[str, Tensor] = {}

        def draw(key: str) -> Tensor:
            noise = kept.get(key)
            if noise is None:
                noise = logistic(self.logits[key].detach(), seed, key)
            if keep:
                kept[key] = noise
            return rescaled(
                concrete(self.logits[key], noise, self.how.temperature), self.how.rescale
            )

        return draw

    def soft(self) -> Draw:
        """``sigmoid(logit)``: the share of draws that are open as T -> 0."""
        return lambda key: rescaled(self.logits[key].detach().sigmoid(), self.how.rescale)

    def hard(self) -> Draw:
        """1 where the logit is above 0, else 0."""
        return lambda key: rescaled(
            (self.logits[key].detach() > 0).to(self.logits[key].dtype), self.how.rescale
        )

    def exported(self, export: str, draws: int, seed: int) -> list[Draw]:
        """The masks whose fused models are averaged into the one that is written."""
        if export == "averaged":
            return [self.drawn(seed + 1 + number) for number in range(draws)]
        return [self.soft() if export == "soft" else self.hard()]

    @torch.no_grad()
    def mean(self, sizes: Mapping[str, int]) -> float:
        """The mean of ``sigmoid(logit)`` over all entries; NaN where a logit is."""
        total = sum(float(p.sigmoid().mean(dtype=torch.float64)) * sizes[key]
                    for key, p in self.logits.items())  # fmt: skip
        return total / max(1, sum(sizes.values()))


__all__ = [
    "FLOOR", "Draw", "Masking", "Masks", "concrete",
    "logistic", "logit_shape", "rescaled",
]  # fmt: skip
