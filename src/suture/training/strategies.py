"""The strategies: each a function of its parameters, read from its signature, and a table line.

What they do is in ``trainers``, which is imported when one of them trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from suture.schema.parameters import Choice, Number, Text, Words
from suture.schema.table import Deferred, Line, Table
from suture.schema.tuning import TuneSettings
from suture.tensors.roles import ROLES

if TYPE_CHECKING:
    from suture.training.strategy import TrainJob, Tuned

    Way: TypeAlias = Callable[[TrainJob], Tuned]
else:  # signatures are read where no framework is
    Way = Callable[..., Any]

trainers = Deferred("suture.training.trainers")


@dataclass(frozen=True)
class Strategy(Line):
    """A line of the table: the function that makes the training, and what to know of it."""

    joint: ClassVar[str] = "-"
    sparse: bool = False
    """Whether it moves chosen entries only; a mask is then saved beside the weights."""
    lr: float = TuneSettings.lr
    """The peak rate where a recipe names none: fewer or slower entries need a larger one."""


Share = Annotated[
    float, Number("share of the prunable entries that is trained, in (0, 1]", high=1, positive=True)
]
Embeddings = Annotated[bool, Choice("whether token and position embeddings are trained, too")]
Blocks = Annotated[
    int, Number("only the last so many transformer blocks; 0 for all", 0, 10**6, whole=True)
]
Rank = Annotated[int, Number("rank of the updates", 1, 65536, whole=True)]
Alpha = Annotated[float, Number("updates are scaled by alpha / rank", positive=True)]
Targets = Annotated[
    tuple[str, ...], Words("the matrices that get updates, by role", tuple(ROLES), single=True)
]
Rows = Annotated[int, Number("rows that sensitivity is measured on", 1, 2**31, whole=True)]
Seed = Annotated[int, Number("seed of the mask, 0 to 2**63 - 1", 0, 2**63 - 1, whole=True)]
Score = Annotated[
    Literal["fisher", "logit"],
    Choice("what is differentiated: log-probability or logit of a drawn label"),
]


def full(embeddings: Embeddings = True, blocks: Blocks = 0) -> Way:
    """Train every weight of the pretrained part.

    With ``blocks``, only those of the last so many transformer blocks and of the norm above them:
    embeddings, what stands below these blocks and the read-out stay as they are.
    """
    return lambda job: trainers.full(job, embeddings, blocks)


def linearized(embeddings: Embeddings = True, blocks: Blocks = 0) -> Way:
    r"""Train the model's first-order expansion, :math:`f(x, \theta_0) + J \tau`, exactly.

    The output says that it is linearized; it is evaluated and combined as such. ``blocks`` means
    what it means to ``full``.
    """
    return lambda job: trainers.linearized(job, embeddings, blocks)


def lora(
    rank: Rank = 16,
    alpha: Alpha = 32.0,
    targets: Targets = ("q", "v"),
    dropout: Annotated[float, Number("share of inputs dropped in training", 0, 0.99)] = 0.0,
    blocks: Blocks = 0,
) -> Way:
    r"""Train low-rank updates, :math:`W = W_0 + (\alpha / r) B A`.

    They are merged into the weights at the end, and also saved as an adapter that PEFT reads.
    """
    return lambda job: trainers.lora(job, rank, alpha, targets, dropout, blocks)


def linearized_lora(
    rank: Rank = 16,
    alpha: Alpha = 32.0,
    targets: Targets = ("q", "v"),
    adapter_seed: Annotated[
        int, Number("seed of the frozen halves; the same for all tasks", 0, 2**31, whole=True)
    ] = 0,
    blocks: Blocks = 0,
) -> Way:
    r"""Low-rank updates, each linearized: :math:`W = W_0 + (\alpha / r) B A_0`, frozen :math:`A_0`.

    Updates of several tasks add up because :math:`A_0` is the same for all; its hash is saved, and
    merging checks it.
    """
    return lambda job: trainers.linearized_lora(job, rank, alpha, targets, adapter_seed, blocks)


def lota(
    density: Share = 0.1,
    dense_steps: Annotated[
        int,
        Number("steps of the dense phase; 0 for as many as the sparse one", 0, 2**31, whole=True),
    ] = 0,
    dense_lr: Annotated[
        float, Number("peak rate of the dense phase; 0 for that of the sparse one", 0)
    ] = 0.0,
) -> Way:
    r"""Train all, keep the entries that moved most, go back to the base, train these only.

    The mask holds the :math:`\lfloor \kappa N \rfloor` prunable entries with the largest
    :math:`|\theta - \theta_0|`.
    """
    return lambda job: trainers.lota(job, density, dense_steps, dense_lr)


def talos(
    density: Share = 0.1,
    rounds: Annotated[int, Number("rounds of calibration", 1, 100, whole=True)] = 4,
    damping: Annotated[
        float,
        Number("factor on rejected entries in the next round, in (0, 1]", high=1, positive=True),
    ] = 0.1,
    draws: Annotated[
        int, Number("labels drawn from the model for each row", 1, 1000, whole=True)
    ] = 1,
    score: Score = "fisher",
    rows: Rows = 256,
    structure: Annotated[
        Literal["entry", "row"],
        Choice("whether single entries are chosen, or whole rows of matrices"),
    ] = "entry",
    blocks: Blocks = 0,
    least: Annotated[
        float, Number("a tensor with a smaller share chosen is left alone", 0, 1)
    ] = 0.01,
    seed: Seed = 0,
) -> Way:
    r"""Train only the entries that the model's outputs are least sensitive to.

    Rounds :math:`r = 1..K` keep the :math:`N \kappa^{r/K}` entries of smallest Fisher information
    and damp the others; the mask has exactly :math:`\lfloor \kappa N \rfloor` entries of the
    prunable ones (Linear, convolution and norms; no embeddings, heads or biases of keys).
    """
    given = (density, rounds, damping, draws, score, rows, structure, least, seed)
    return lambda job: trainers.talos(job, trainers.Calibration(*given), blocks)


MASKS = ("dense", "random", "least-sensitive", "most-sensitive")
"""What ``mask`` may be, besides a file."""


def masked(
    mask: Annotated[
        str, Text("a mask or patch file, or dense, random, least-sensitive, most-sensitive")
    ],
    density: Share = 0.1,
    only: Annotated[
        tuple[str, ...], Words("roles that are trained; none given: all", tuple(ROLES), single=True)
    ] = (),
    rows: Rows = 256,
    seed: Seed = 0,
) -> Way:
    """Train the entries of a given mask: a saved one, those of a patch, or a control by name.

    ``random`` and the one-shot rankings choose the same number of entries as TaLoS of this density;
    ``dense`` takes all entries of the roles that ``only`` names.
    """
    return lambda job: trainers.masked(job, mask, density, only, rows, seed)


STRATEGIES = Table(
    "strategy",
    Strategy,
    (
        Strategy(full, "Full fine-tuning", "Ilharco et al. 2023, arXiv:2212.04089"),
        Strategy(
            linearized,
            "Linearized fine-tuning",
            "Ortiz-Jimenez et al. 2023, arXiv:2305.12827",
            lr=1e-4,
        ),
        Strategy(lora, "LoRA", "Hu et al. 2022, arXiv:2106.09685", lr=3e-4),
        Strategy(linearized_lora, "Linearized LoRA", "Tang et al. 2024, arXiv:2310.04742", lr=1e-3),
        Strategy(lota, "LoTA", "Panda et al. 2024, arXiv:2406.16797", sparse=True, lr=1e-4),
        Strategy(talos, "TaLoS", "Iurada et al. 2025, arXiv:2504.02620", sparse=True, lr=5e-4),
        Strategy(
            masked,
            "Training of a given mask",
            "Iurada et al. 2025, arXiv:2504.02620",
            sparse=True,
            lr=3e-4,
        ),
    ),
    group="suture.strategies",
)
"""Every fine-tuning strategy; another package adds one, see docs/plugins.md."""

__all__ = ["MASKS", "STRATEGIES", "Strategy", "Way"]
