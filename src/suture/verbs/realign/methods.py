"""The ways to realign: each a function of its parameters, read from its signature, and a line.

What they do is in ``baselines`` and ``somf``, which are imported when one of them works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from suture.errors import RecipeError
from suture.merges.base import Scope
from suture.schema.parameters import Choice, Number, Text
from suture.schema.table import Deferred, Line, Table

if TYPE_CHECKING:
    from suture.verbs.realign.base import Realigned, RealignJob

    Way: TypeAlias = Callable[[RealignJob], Realigned]
else:  # signatures are read where no framework is
    Way = Callable[..., Any]

baselines = Deferred("suture.verbs.realign.baselines")
learned = Deferred("suture.verbs.realign.somf")


@dataclass(frozen=True)
class Realigner(Line):
    """A line of the table: the function that makes the way, and what it asks of a recipe."""

    joint: ClassVar[str] = "-"
    needs: tuple[str, ...] = ()
    """Of ``base``, ``safety``, ``data``: what a recipe must name."""
    trains: bool = False
    """Whether it learns something by gradients."""
    chooses: bool = False
    """Whether it chooses one of several models by rows that are held out."""

    @property
    def requires(self) -> str:
        """What a recipe must give, in a sentence."""
        return "needs " + ", ".join(("aligned", "models", *self.needs))


Space = Annotated[
    Literal["delta_w", "factors"],
    Choice("what is masked: weights, or the low-rank factors of adapters"),
]
Granularity = Annotated[
    Literal["entry", "row", "tensor"], Choice("what has a logit of its own; row: an output")
]
Temperature = Annotated[
    float, Number("of the binary Concrete distribution, above 0", positive=True)
]
Rescale = Annotated[
    Literal["mean", "none"], Choice("whether a tensor's mask is divided by its own mean")
]
Beta = Annotated[float, Number("strength of DPO, above 0", positive=True)]
Share = Annotated[float, Number("share of entries kept, in (0, 1]", high=1, positive=True)]
Threshold = Annotated[float, Number("cosine below which a matrix is realigned, in [-1, 1]", -1, 1)]
Normalise = Annotated[
    bool, Choice("whether C is divided by its largest eigenvalue, so that it does not scale")
]
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
    draws: Annotated[int, Number("of the export averaged, 1 to 4096", 1, 4096, whole=True)] = 8,
    start: Annotated[float, Number("where the logits start, in [-50, 50]", -50, 50)] = 0.0,
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
    if draws != 8 and export != "averaged":
        raise RecipeError(f"parameters.draws: nothing is drawn for `export: {export}`; leave it "
                          "out, or say `export: averaged`")  # fmt: skip
    return lambda job: learned.learn(
        job, space, learned.Masking(granularity, temperature, rescale),
        learned.Learning(beta, reference, export, draws, start, seed),
    )  # fmt: skip


def resta(
    gamma: Annotated[float, Number("factor on the alignment that is added")] = 0.5,
    density: Share = 1.0,
    seed: Seed = 0,
) -> Way:
    r"""Add the alignment once more.

    :math:`\theta = \theta_{fused} + \gamma (\theta_{safe} - \theta_0)`. With a density below 1
    DARE thins what is added (RESTA with DARE; the paper keeps 0.7).
    """
    return lambda job: baselines.resta(job, gamma, density, seed)


def safelora(
    select: Annotated[
        Literal["threshold", "number"], Choice("how matrices are chosen: by a cosine, or how many")
    ] = "threshold",
    threshold: Threshold = 0.5,
    number: Annotated[
        int, Number("matrices that are projected, 0 to 2**31", 0, 2**31, whole=True)
    ] = 10,
    normalise: Normalise = False,
) -> Way:
    r"""Project the changes that look least like the alignment on its subspace.

    :math:`C = V V^T / ||V||` with :math:`V = W_{safe} - W_0`; where
    :math:`cos(C \delta, \delta)` is small, :math:`W = W_{safe} + C \delta`. C is no projector: it
    scales, too.
    """
    if select == "number" and threshold != 0.5:
        raise RecipeError("parameters.threshold: `select: number` does not ask for it; leave it "
                          "out")  # fmt: skip
    if select == "threshold" and number != 10:
        raise RecipeError("parameters.number: `select: threshold` does not ask for it; leave it "
                          "out, or say `select: number`")  # fmt: skip
    return lambda job: baselines.safelora(job, select, threshold, number, normalise)


def safemerge(
    threshold: Threshold = 0.35,
    weight: Annotated[float, Number("share of the tuned change, in [0, 1]", 0, 1)] = 0.8,
    normalise: Normalise = False,
) -> Way:
    r"""Mix a safety model into the changes that look least like the alignment.

    Where :math:`cos(C \delta, \delta)` is below the threshold (C as in ``safelora``),
    :math:`W = W_{safe} + w \delta + (1 - w) (W_{safety} - W_{safe})`: sums of weights, not of
    factors.
    """
    return lambda job: baselines.safemerge(job, threshold, weight, normalise)


def dare(density: Share = 0.7, seed: Seed = 0) -> Way:
    r"""Drop entries of every task vector at random and scale the rest.

    :math:`\theta = \theta_{safe} + Fuse(\{b_i \odot \delta_i / d\})`, b_i 1 with probability d.
    """
    return lambda job: baselines.dare(job, density, seed)


def random(density: Share = 0.5, rescale: Rescale = "mean", seed: Seed = 0) -> Way:
    r"""The control of SOMF: a random mask of exactly this density, shared by all tasks.

    :math:`\theta = \theta_{safe} + Fuse(\{\hat m \odot \delta_i\})`.
    """
    return lambda job: baselines.masked(job, "random", density, "global", rescale, seed)


def magnitude(density: Share = 0.5, scope: Scope = "global", rescale: Rescale = "none") -> Way:
    r"""Keep the largest entries of every task vector; the others fall back to the aligned model.

    :math:`\theta = \theta_{safe} + Fuse(\{m_i \odot \delta_i\})`.
    """
    return lambda job: baselines.masked(job, "magnitude", density, scope, rescale, 0)


def protect(
    density: Share = 0.1,
    mask: Annotated[str, Text("a mask of entries to protect, instead of the largest", True)] = "",
) -> Way:
    r"""Put the entries that carry safety back to their aligned values.

    :math:`\theta = m \odot \theta_{safe} + (1 - m) \odot \theta_{fused}`, m a mask of yours, or the
    largest entries of :math:`|\theta_{safe} - \theta_0|`.
    """
    if mask and density != 0.1:
        raise RecipeError("parameters.density: has no meaning beside `mask`; leave one of them out")
    return lambda job: baselines.protect(job, density, mask)


def line_search(
    metric: Annotated[
        Literal["margin", "preferred"], Choice("what must pass, of the validation pairs")
    ] = "margin",
    retain: Annotated[
        float, Number("share of what was lost that must come back, in [0, 1]", 0, 1)
    ] = 0.9,
    points: Annotated[
        int, Number("coefficients that are tried, 2 to 10001", 2, 10_001, whole=True)
    ] = 11,
) -> Way:
    r"""Go back towards the aligned model as far as it takes, and no further.

    :math:`\theta = \theta_{fused} + c (\theta_{safe} - \theta_{fused})` with the c in [0, 1] that
    passes the gate at the smallest loss of utility.
    """
    return lambda job: baselines.line_search(job, metric, retain, points)


REALIGNERS = Table("way to realign", Realigner, [
    Realigner(
        somf, "SOMF: a learned mask over the task vectors", "Yi et al. 2024, arXiv:2405.09055",
        needs=("data",), trains=True,
    ),
    Realigner(
        resta, "RESTA: the alignment added once more", "Bhardwaj et al. 2024, arXiv:2402.11746",
        needs=("base",),
    ),
    Realigner(
        safelora, "Safe LoRA: changes projected on the alignment",
        "Hsu et al. 2024, arXiv:2405.16833", needs=("base",),
    ),
    Realigner(
        safemerge, "SafeMERGE: a safety model mixed in where it is needed",
        "Djuhera et al. 2025, arXiv:2503.17239", needs=("base", "safety"),
    ),
    Realigner(dare, "DARE on the task vectors", "Yu et al. 2024, arXiv:2311.03099"),
    Realigner(random, "A random mask", "a control: SOMF's mask at logits that never moved"),
    Realigner(magnitude, "A mask by magnitude", "a control of equal density"),
    Realigner(
        protect, "Entries of safety put back", "the control beside LED-Merging, arXiv:2502.16770",
    ),
    Realigner(
        line_search, "Interpolation towards the aligned model", "WiSE-FT, Wortsman et al. 2022",
        needs=("data",), chooses=True,
    ),
], group="suture.realigners")  # fmt: skip
"""Every way to realign; another package adds one, see docs/plugins.md."""

__all__ = ["REALIGNERS", "Realigner", "Way"]
