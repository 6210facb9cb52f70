"""Means on a sphere of two or of many models. All of them lie in the span of their inputs.

So the dot products between the models decide the factors, and one pass computes those. What follows
is float64 on a matrix as small as the number of models, and then a weighted sum.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np

from suture.kernels import compiled
from suture.merges.base import EITHER, Array, Context, Merge, Weight
from suture.merges.linear import Normalize, grams
from suture.merges.row_blocks import RowBlocks, row_grams, row_width
from suture.schema.parameters import Choice, Number
from suture.schema.values import PerModel, each
from suture.stream.sweep import WEIGHT, Block, Visitor, sweep, tasks_of
from suture.tensors.spec import PIECE, Piece, TensorSpec

Over = Annotated[
    Literal["tensor", "row", "column"],
    Choice("what is one vector: a whole tensor, each row of it, or each column"),
]
_SHORT = 1e-7
"""Vectors shorter than this have no direction."""


def nuslerp(*, weight: Weight = each(1.0), over: Over = "tensor") -> Merge[dict[str, Array]]:
    r"""Interpolate on the sphere between two models, or between two task vectors.

    With :math:`t = w_2 / (w_1 + w_2)` (a half where the sum is 0) and :math:`\Omega` the angle
    between the two: :math:`\frac{\sin((1-t)\Omega)}{\sin\Omega}\theta_1 +
    \frac{\sin(t\Omega)}{\sin\Omega}\theta_2`, for each tensor, or each row or column of it.
    Parallel vectors are interpolated linearly, and one without length counts as perpendicular to
    the other. With a base, the task vectors are merged and added to it.
    """

    def places(name: str) -> float:
        one, two = (float(w) for w in weight.at(name, 2))
        return 0.5 if abs(one + two) < 1e-6 else two / (one + two)

    def by_row(block: Block, start: int, number: int) -> None:
        factors = _arc(row_grams(block, start, number), places(block.name)).astype(np.float32)
        width = row_width(block.sources.spec(block.name))
        compiled.sum_by_row(block.rows, factors, start, number, width, block.out)

    rows = RowBlocks(by_row)

    def prepare(context: Context) -> dict[str, Array]:
        if over == "tensor":
            gram = grams(context)
            return {n: _arc(gram.of(n)[None], places(n))[0].astype(np.float32)
                    for n in context.names}  # fmt: skip
        if over == "row":
            return {}
        specs = context.sources.reference.specs
        dots = _ColumnDots(len(context.models), specs)
        flat = [n for n in context.names if len(specs[n].shape) > 1]
        sweep(context.sources, tasks_of(flat, specs), dots, threads=context.threads,
              block=context.block, progress=context.progress)  # fmt: skip
        return {n: np.ascontiguousarray(_arc(dots.of(n), places(n)).T, np.float32) for n in flat}

    def combine(block: Block, factors: dict[str, Array]) -> None:
        found = factors.get(block.name)
        if found is None:  # rows, and vectors, which are one row
            rows(block)
        elif found.ndim == 2:
            compiled.sum_by_column(block.rows, found, block.count, block.start, block.out)
        else:
            compiled.weighted_sum(block.rows, found, 0, block.count, block.out)

    return Merge(combine, prepare, how=EITHER, passes=int(over != "row"))


def _arc(gram: Array, t: float) -> Array:
    """Factors of two vectors on the arc between them: float64[number, 2] from Gram matrices."""
    lengths = np.maximum(np.sqrt(gram[:, [0, 1], [0, 1]]), _SHORT)
    cosine = np.clip(gram[:, 0, 1] / (lengths[:, 0] * lengths[:, 1]), -1, 1)
    straight = 1 - cosine**2 <= 1e-16
    angle = np.arccos(np.where(straight, 0, cosine))
    sines = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)], 1) / np.sin(angle)[:, None]
    return np.where(straight[:, None], [1 - t, t], sines)


class _ColumnDots(Visitor["dict[int, Array]"]):
    """Dot products between the models, column by column, in an order that no thread changes."""

    def __init__(self, models: int, specs: Any) -> None:
        self.models = models
        self.specs: dict[str, TensorSpec] = dict(specs)
        self._parts: dict[str, dict[int, Array]] = {}

    def columns(self, name: str) -> int:
        spec = self.specs[name]
        return max(1, spec.numel // max(1, spec.shape[0]))

    def local(self) -> dict[int, Array]:
        return {}

    def see(self, local: dict[int, Array], block: Block) -> None:
        # A piece sees at most as many columns as it has elements; it begins at its own column 0.
        piece = block.start - block.start % PIECE
        if not local:
            spec = self.specs[block.name]
            width = min(self.columns(block.name), spec.numel - piece, PIECE)
            local[piece] = np.zeros((self.models**2, max(1, width)))
        compiled.column_dots(block.rows, block.count, block.start - piece, local[piece])

    def end_piece(self, local: dict[int, Array], piece: Piece) -> None:
        self._parts.setdefault(piece.name, {}).update(local)
        local.clear()

    def of(self, name: str) -> Array:
        """The Gram matrices: float64[columns, models, models]."""
        columns = self.columns(name)
        sums = np.zeros((self.models**2, columns))
        for start, part in sorted(self._parts[name].items()):
            place = (start + np.arange(part.shape[1])) % columns
            sums[:, place] += part
        lower = np.tril(sums.T.reshape(columns, self.models, self.models))
        return lower + np.tril(lower, -1).transpose(0, 2, 1)


def multislerp(
    *, weight: Weight = each(1.0), normalize: Normalize = True
) -> Merge[dict[str, Array]]:
    r"""Average the directions of many models and give the mean their average length.

    With units :math:`u_i = \theta_i / \lVert\theta_i\rVert`, tensor by tensor: :math:`\sum_i w_i
    \lVert\theta_i\rVert \cdot \sum_i w_i u_i / \lVert\sum_i w_i u_i\rVert`. (The source adds a step
    in the tangent space of this mean; it is zero there.) Where directions cancel, the weighted sum
    is taken. With a base, the task vectors are merged and added to it.
    """

    def prepare(context: Context) -> dict[str, Array]:
        gram = grams(context)
        return {n: _barycentre(gram.of(n), _shares(weight, n, len(context.models), normalize))
                for n in context.names}  # fmt: skip

    return Merge(_weighted, prepare, how=EITHER, passes=1)


def _weighted(block: Block, factors: dict[str, Array]) -> None:
    compiled.weighted_sum(block.rows, factors[block.name], 0, block.count, block.out)


def _shares(weight: PerModel, name: str, models: int, normalize: bool) -> Array:
    weights = np.array(weight.at(name, models), np.float64)
    total = weights.sum()
    return weights / total if normalize and abs(total) >= 1e-8 else weights


def _barycentre(gram: Array, weights: Array) -> Array:
    lengths = np.sqrt(np.diag(gram))
    if len(weights) == 1:
        return np.ones(1, np.float32)
    factors = np.where(lengths > 0, weights / np.where(lengths > 0, lengths, 1), 0)
    length = math.sqrt(max(0.0, float(factors @ gram @ factors)))
    if length < 1e-8:
        return weights.astype(np.float32)
    return (factors * (float(weights @ lengths) / length)).astype(np.float32)


Steps = Annotated[int, Number("steps towards the mean, at most", 1, 10_000, whole=True)]
Tolerance = Annotated[float, Number("a step shorter than this, in radians, is the last", 0)]


def karcher(
    *, weight: Weight = each(1.0), max_iter: Steps = 10, tolerance: Tolerance = 1e-5
) -> Merge[dict[str, Array]]:
    r"""Average the models on the sphere: the point whose squared distances along it are least.

    Units :math:`u_i` of the flattened tensors; :math:`\mu \leftarrow \exp_\mu \sum_i w_i \log_\mu
    u_i` until the step is shorter than ``tolerance`` (the Riemannian centre of mass), then
    :math:`\theta = \mu \sum_i w_i \lVert\theta_i\rVert`. Weights count by their ratio.
    """

    def prepare(context: Context) -> dict[str, Array]:
        gram, models = grams(context), len(context.models)
        return {n: _centre(gram.of(n), _shares(weight, n, models, True), max_iter, tolerance)
                for n in context.names}  # fmt: skip

    return Merge(_weighted, prepare, how=WEIGHT, passes=1)


def _centre(gram: Array, weights: Array, steps: int, tolerance: float) -> Array:
    """Factors of the Karcher mean, found in the coordinates of the units."""
    lengths = np.sqrt(np.diag(gram))
    there = lengths > tolerance
    if not there.any():
        return np.zeros(len(weights), np.float32)
    cosines = (gram / np.outer(lengths, lengths).clip(min=1e-300))[np.ix_(there, there)]
    shares = weights[there] / (weights[there].sum() or 1.0)
    mean = shares.copy()
    length = _length(mean, cosines)
    mean = mean / length if length >= tolerance else np.eye(len(shares))[0]
    for _ in range(steps):
        dots = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(dots)
        far = angles >= tolerance
        pulls = np.where(far, shares * angles / np.where(far, np.sin(angles), 1), 0)
        tangent = pulls - float(pulls @ dots) * mean
        step = _length(tangent, cosines)
        if step < tolerance:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean /= _length(mean, cosines)
    factors = np.zeros(len(weights))
    factors[there] = mean / lengths[there] * float(weights @ lengths)
    return factors.astype(np.float32)


def _length(factors: Array, gram: Array) -> float:
    return math.sqrt(max(0.0, float(factors @ gram @ factors)))
