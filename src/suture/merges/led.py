"""LED-Merging: entries that matter to base and expert alike, each given to one expert at most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from suture.kernels import compiled
from suture.merges.base import Density, Merge, ModelFiles, Scale, Scope, Seed, Weight
from suture.merges.elect import scaled
from suture.merges.elections import Elected, Election, lines
from suture.merges.marks import buffers
from suture.schema.parameters import Choice, ModelName, Number
from suture.schema.values import PerModel, Scalar, each
from suture.stream.sweep import Block, cores

Statistics = Annotated[
    Mapping[str, str] | None,
    ModelFiles(
        "absolute gradients of each model on its own rows: a folder such as MASKS/stats, or a "
        "file a model"
    ),
]
BaseStatistics = Annotated[
    Mapping[str, str] | None,
    ModelFiles(
        "those of the base on the rows of each model: a folder such as MASKS/stats/base, or a "
        "file a model"
    ),
]
Masks = Annotated[
    Mapping[str, str] | None,
    ModelFiles(
        "instead of statistics, the mask of each model: a folder that `suture localize` wrote, "
        "or a file a model",
        instead=("density", "scope"),
    ),
]
BaseMasks = Annotated[
    Mapping[str, str] | None,
    ModelFiles(
        "the masks of the base on the rows of each model: a folder such as MASKS/base, or a file "
        "a model"
    ),
]
Elect = Annotated[
    Literal["both", "expert", "base", "either", "expert_only", "base_only", "neither"],
    Choice("which entries a model elects: those that matter to base and expert, to the expert, "
           "..."),
]  # fmt: skip
Disjoint = Annotated[
    Literal["exclusive", "safety_first", "priority"],
    Choice("who gets an entry that several models elect: nobody, the safety expert, or the model "
           "of the highest priority"),
]  # fmt: skip
Safety = Annotated[str | None, ModelName("which model is the safety expert")]
Priority = Annotated[
    PerModel, Number("who comes first, with `disjoint: priority`: the higher number")
]
RuleName = Annotated[
    Literal["snip", "magnitude", "random"],
    Choice("how entries are ranked: weight times gradient, or a control by the size of the change "
           "or by chance"),
]  # fmt: skip
Match = Annotated[
    Literal["elected", "written"],
    Choice("what a control has as many of in each tensor as the election: entries that a model "
           "elects, or that it writes"),
]  # fmt: skip
Embeddings = Annotated[
    Literal["elected", "base", "safety"],
    Choice("token embeddings and heads, where the space has them: elected like all others, left "
           "to the base, or the safety expert's as a whole"),
]  # fmt: skip
Flip = Annotated[
    bool,
    Choice("elect the least important entries of all but embeddings and heads, as the released "
           "scripts do by mistake"),
]  # fmt: skip


def led(
    *,
    stats: Statistics = None,
    base_stats: BaseStatistics = None,
    masks: Masks = None,
    base_masks: BaseMasks = None,
    density: Density = each(0.4),
    weight: Weight = each(1.0),
    elect: Elect = "both",
    disjoint: Disjoint = "exclusive",
    safety: Safety = None,
    priority: Priority = each(0.0),
    scale: Scale = Scalar(1.0),
    scope: Scope = "tensor",
    embeddings: Embeddings = "elected",
    rule: RuleName = "snip",
    match: Match = "elected",
    seed: Seed = 0,
    flip: Flip = False,
) -> Merge[Elected]:
    r"""Locate, elect, and keep apart: each entry is written by one model at most.

    On the rows :math:`X_i` of model i the base and the model are scored entry by entry,
    :math:`I(\theta) = E_{x \in X_i} |\theta \odot \nabla \ell_x(\theta)|`. With the
    :math:`\lfloor r_i n \rfloor` best of each tensor, :math:`N_i^b` of the base and :math:`N_i^f`
    of the model (only scores above 0), :math:`E_i = N_i^b \cap N_i^f`, :math:`D_i = E_i \setminus
    \bigcup_{j \ne i} E_j` and :math:`\theta = \theta_0 + \lambda \sum_i w_i 1[D_i] \odot \tau_i`.
    ``density`` is the paper's ratio :math:`r_i`, of each model. With ``safety_first`` the safety
    expert keeps all it elects. ``suture localize`` with the rule ``snip`` and ``at: both`` measures
    what is needed. Masks that it wrote stand for :math:`N_i^f` and :math:`N_i^b` themselves:
    ``density`` and ``scope`` were chosen there, and are refused beside them. The controls
    ``magnitude`` and ``random`` mark as many entries of each tensor as the election would, and then
    keep apart what several mark;
    with ``match: written`` models take turns, the one that writes least first, until each writes
    as many as after the election. Without ``stats`` and ``masks`` they mark the share ``density``.
    """
    how = Election(stats, base_stats, masks, base_masks, density, elect, disjoint, safety, priority,
               scope, embeddings, rule, match, seed, flip)  # fmt: skip

    def combine(block: Block, state: Elected) -> None:
        owned = state.look(block.name, block.start, block.count).owned
        compiled.stitched(block.rows, weight.row(block), owned, block.count, block.out)
        scaled(block, scale)

    return Merge(combine, how.prepare, passes=2 + 2 * how.matched, facts=lambda s: s.facts,
                 tell=lambda s: lines(s.facts), beside=how.beside, check=how.check,
                 memory=lambda spec, models: cores() * buffers(2 * models))  # fmt: skip


__all__ = ["led"]
