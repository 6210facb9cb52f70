"""A linear probe, fitted to its only minimum.

It is what a classifier starts from when only its encoder shall learn afterwards (linear probing,
then fine-tuning: Kumar et al., 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from suture.errors import RecipeError
from suture.training.models import Head


def fit_head(
    features: Tensor, targets: Tensor, labels: Sequence[str], *, l2: float = 1e-3, steps: int = 200
) -> Head:
    """Fit a linear probe: multinomial logistic regression by L-BFGS, to its only minimum.

    Minimises the mean cross-entropy plus ``l2 / 2`` times the squared norm of the weights, on
    features that are centred and divided by one number, their mean spread, so that ``l2`` means
    the same for every encoder; the head that comes back reads plain features. Dimensions are not
    scaled one by one: some encoders have constant ones, and noise there would rule the head.
    ``features`` are ``(n, dim)``, ``targets`` ``(n,)`` class numbers.
    """
    if not len(targets) or len(features) != len(targets):
        raise RecipeError(f"{len(features)} rows of features for {len(targets)} labels")
    x = features.double()
    middle = x.mean(0)
    spread = (x - middle).square().mean().sqrt().clamp(min=1e-9)
    x = (x - middle) / spread
    weight = x.new_zeros(len(labels), x.shape[1], requires_grad=True)
    bias = x.new_zeros(len(labels), requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, targets) + l2 / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(objective)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        plain = weight / spread
        return Head(tuple(labels), plain.float(), (bias - plain @ middle).float())


__all__ = ["fit_head"]
