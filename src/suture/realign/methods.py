"""The ways to realign: each a function of its parameters, read from its signature, and a line."""

from __future__ import annotations

from typing import Annotated, Literal

from suture.errors import RecipeError, did_you_mean
from suture.merges.base import Choice, Number
from suture.realign.base import Realigner, Way
from suture.realign.concrete import Masking
from suture.realign.somf import Learning, learn

Space = Annotated[
    Literal["delta_w", "factors"],
    Choice("what is masked: weights, or the low-rank factors of adapters"),
]
Granularity = Annotated[
    Literal["entry", "row", "tensor"], Choice("what has a logit of its own; row: an output")
]
Temperature = Annotated[float, Number("of the binary Concrete distribution", positive=True)]
Rescale = Annotated[
    Literal["mean", "none"], Choice("whether a tensor's mask is divided by its own mean")
]
Beta = Annotated[float, Number("strength of DPO", positive=True)]
Seed = Annotated[int, Number("seed, 0 to 2**53", 0, 2**53, whole=True)]


def somf(  # noqa: PLR0913 - the signature is the list of its parameters
    space: Space = "delta_w",
    granularity: Granularity = "entry",
    temperature: Temperature = 0.5,
    rescale: Rescale = "mean",
    beta: Beta = 0.1,
    reference: Annotated[
        Literal["fused", "aligned"], Choice("whose log-probabilities DPO compares with")
    ] = "fused",
    export: Annotated[
        Literal["soft", "hard", "averaged"],
        Choice("what is written: sigmoid(logit), logit > 0, or the mean of some draws"),
    ] = "soft",
    draws: Annotated[int, Number("of the export averaged", 1, 4096, whole=True)] = 8,
    start: Annotated[float, Number("where the logits start", -50, 50)] = 0.0,
    seed: Seed = 0,
) -> Way:
    r"""Learn by DPO which entries of the task vectors may stay on the aligned model.

    :math:`\theta = \theta_{safe} + Fuse(\{\hat m \odot \delta_i\})` with
    :math:`\hat m = m / mean(m)` and :math:`m = \sigma((logit + \log u - \log(1 - u)) / T)`.
    Logits are shared by all tasks; weights stay frozen.
    """
    if granularity == "tensor" and rescale == "mean":
        raise RecipeError(
            "parameters.granularity: tensor: a mask of one number a tensor, divided by its mean, "
            "is 1 whatever was learned; say `rescale: none`"
        )
    masking = Masking(granularity, temperature, rescale)
    how = Learning(beta, reference, export, draws, start, seed)
    return lambda job: learn(job, space, masking, how)


_LINES = [
    Realigner(
        somf, "SOMF: a learned mask over the task vectors", "Yi et al. 2024, arXiv:2405.09055",
        needs=("data",), trains=True,
    ),
]  # fmt: skip

METHODS: dict[str, Realigner] = {line.name: line for line in _LINES}


def method(name: str) -> Realigner:
    """The way of this name.

    Raises:
        RecipeError: there is none.
    """
    if name not in METHODS:
        raise RecipeError(
            f"method: no way {name!r} to realign; {did_you_mean(name, list(METHODS))}"
        )
    return METHODS[name]


__all__ = ["METHODS", "method"]
