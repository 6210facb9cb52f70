"""Methods that ask, entry by entry, which models moved it: RAM and SCE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from suture.kernels import compiled
from suture.merges.base import Array, Context, Merge, Scale
from suture.merges.elect import Rounding, Sign, scaled
from suture.schema.parameters import Choice, Number
from suture.schema.values import Scalar
from suture.stream.sweep import Block, Visitor, sweep, tasks_of
from suture.stream.topk import Ranking, Selection, rank
from suture.stream.vector import Gram

Epsilon = Annotated[float, Number("a model moved an entry that it changed by more than this", 0)]


def _moved(epsilon: float, models: int) -> Array:
    """The keys from which on entries are larger than ``epsilon``: uint32[models]."""
    return np.full(models, np.array([epsilon], np.float32).view(np.uint32)[0] + 1, np.uint32)


def ram(*, epsilon: Epsilon = 1e-5, scale: Scale = Scalar(1.0)) -> Merge[None]:
    r"""Average the models that moved an entry; what one alone moved arrives whole.

    :math:`\theta = \theta_0 + \lambda \sum_{i \in M} \tau_i / \max(1, |M|)` with :math:`M` the
    models where :math:`|\tau_i| > \epsilon`, entry by entry.
    """

    def combine(block: Block, _: None) -> None:
        models = len(block.rows)
        ones, keys = np.ones(models, np.float32), _moved(epsilon, models)
        compiled.masked_mean(block.rows, ones, keys, 0, block.count, block.out)
        scaled(block, scale)

    return Merge(combine)


Gain = Annotated[float, Number("how much sharing entries strengthens those of a model alone", 0)]
Most = Annotated[float, Number("the largest ratio of shared entries to own ones that counts", 0)]


def ramplus_tl(
    *, gain: Gain = 0.1, most: Most = 0.2, epsilon: Epsilon = 1e-5, scale: Scale = Scalar(1.0)
) -> Merge[dict[str, Array]]:
    r"""As ``ram``, but strengthen what a model alone moved, the more it shares with others.

    With :math:`\rho_i` the entries of a tensor that model i moved together with others, over those
    it moved alone: what it moved alone is multiplied by :math:`1 + r \min(\rho_i, \alpha)`, with
    :math:`r` the ``gain`` and :math:`\alpha` ``most``.
    """

    def prepare(context: Context) -> dict[str, Array]:
        models = len(context.models)
        counts = _Overlaps(models, _moved(epsilon, models))
        sweep(context.sources, tasks_of(context.names, context.sources.reference.specs), counts,
              threads=context.threads, block=context.block, progress=context.progress)  # fmt: skip
        found = {}
        for name in context.names:
            shared, alone = counts.found[name]
            ratio = shared / np.maximum(alone, epsilon or 1e-300)
            found[name] = (1 + gain * np.minimum(ratio, most)).astype(np.float32)
        return found

    def combine(block: Block, factors: dict[str, Array]) -> None:
        keys = _moved(epsilon, len(block.rows))
        compiled.merge_overlaps(block.rows, factors[block.name], keys, block.count, block.out)
        scaled(block, scale)

    return Merge(combine, prepare, passes=1)


class _Overlaps(Visitor["dict[str, Array]"]):
    def __init__(self, models: int, keys: Array) -> None:
        self.models, self.keys = models, keys
        self.found: dict[str, Array] = {}

    def local(self) -> dict[str, Array]:
        return {}

    def see(self, local: dict[str, Array], block: Block) -> None:
        counts = local.setdefault(block.name, np.zeros((2, self.models), np.int64))
        compiled.count_overlaps(block.rows, self.keys, block.count, counts)

    def end_task(self, local: dict[str, Array], task: Any) -> None:
        for name, counts in local.items():
            self.found[name] = self.found.get(name, 0) + counts
        local.clear()


Share = Annotated[
    Scalar, Number("density is the share of entries kept, in (0, 1]", high=1, positive=True)
]
Counted = Annotated[
    Literal["all", "nonzero"],
    Choice("whether density is a share of all entries, or of those in which the models differ"),
]
EqualBelow = Annotated[
    float, Number("models count alike where their mean squares sum to less than this", 0)
]


@dataclass(frozen=True)
class _Selected:
    selection: Selection
    weights: dict[str, Array]


def sce(
    *,
    density: Share = Scalar(0.1),
    scale: Scale = Scalar(1.0),
    counted: Counted = "all",
    rounding: Rounding = "round",
    zero_sign: Sign = "zero",
    equal_below: EqualBelow = 0.0,
) -> Merge[_Selected]:
    r"""Select the entries in which the models differ most, weigh models by their size, erase signs.

    In each tensor the ``density`` entries of the largest variance over the models are kept. With
    :math:`w_i = \operatorname{mean}(\tau_i^2)` over what is kept and :math:`\gamma =
    \operatorname{sgn} \sum_i \tau_i`, :math:`\theta = \theta_0 + \lambda` times the mean, weighted
    by :math:`w_i`, of the :math:`\tau_i` whose sign is :math:`\gamma`. Density 1 keeps everything,
    where models agree, too.
    """

    def counts(shares: Any, n: int) -> list[int]:
        return [round(s * n) if rounding == "round" else int(s * n) for s in shares]

    def prepare(context: Context) -> _Selected:
        specs = context.sources.reference.specs
        thin = [n for n in context.names if density.at(n) < 1]
        how = {"threads": context.threads, "block": context.block, "progress": context.progress}
        ranking = Ranking(
            lambda name: (density.at(name),), counts, (0,), _variance, counted == "nonzero"
        )
        selection = rank(context.sources, thin, ranking, **how)  # type: ignore[arg-type]
        squares = _Squares(len(context.models), selection)
        sweep(context.sources, tasks_of(context.names, specs), squares, **how)  # type: ignore[arg-type]
        weights = {}
        for name in context.names:
            size = max(1, specs[name].numel)
            found = np.diag(squares.of(name)) / size
            total = float(found.sum())
            even = total == 0 or total < equal_below
            weights[name] = (np.full(len(found), 1 / len(found)) if even else found / total).astype(
                np.float32
            )
        return _Selected(selection, weights)

    def combine(block: Block, state: _Selected) -> None:
        _keep(block, state.selection)
        compiled.vote_and_merge(
            block.rows, state.weights[block.name], 0, block.count, block.out, compiled.MASS,
            compiled.WEIGHTED_MEAN, int(zero_sign == "positive"),
        )  # fmt: skip
        scaled(block, scale)

    def facts(state: _Selected) -> dict[str, Any]:
        if not state.selection.groups:
            return {}
        return {"kept": state.selection.kept()[0], "entries": state.selection.total()}

    return Merge(combine, prepare, passes=2, facts=facts)


def _variance(block: Block) -> None:
    """Put the variance over the models in row 0."""
    compiled.variances(block.rows, block.count, block.out)
    block.rows[0, : block.count] = block.out[: block.count]


def _keep(block: Block, selection: Selection) -> None:
    """Zero the entries of all models whose variance was not selected."""
    if block.name not in selection.groups:
        return
    compiled.variances(block.rows, block.count, block.out)
    keys = block.out.view(np.uint32)
    for start, stop, least in selection.segments(block):
        block.rows[:, start:stop] *= keys[start:stop] >= least[0]


class _Squares(Gram):
    """Sums of squares of what is kept."""

    def __init__(self, models: int, selection: Selection) -> None:
        super().__init__(models)
        self.selection = selection

    def see(self, local: dict[str, Array], block: Block) -> None:
        _keep(block, self.selection)
        super().see(local, block)
