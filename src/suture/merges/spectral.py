"""Merges by singular values of whole matrices, the only ones with torch: TSV-Merge, Iso-C, Iso-CTS.

Tensors that are no matrices are averaged, as the papers do. A decomposition runs on one thread, so
that its bits do not depend on how many there are; those of different models, and of the two sides,
run beside each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from suture.kernels import compiled
from suture.merges.base import Array, Context, Merge, Scale, Weight
from suture.merges.elect import scaled
from suture.merges.whole import HELD, WholeTensor
from suture.schema.parameters import Number
from suture.schema.values import PerModel, Scalar, each
from suture.stream.sweep import Block, cores
from suture.tensors.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

Isotropy = Annotated[
    float, Number("how far singular values go towards their mean: 0 not at all, 1 to it", 0, 1)
]
Common = Annotated[
    float, Number("share of the directions that are taken from the sum of all models", 0, 1)
]
Matrices = Callable[[Sequence["Tensor"], "Beside"], "Tensor"]
Beside = Callable[[Callable[..., Any], Iterable[Any]], list[Any]]
"""Maps a function over values, in several threads; the order of results is that of the values."""


def tsv_merge(*, weight: Weight = each(1.0), scale: Scale = Scalar(1.0)) -> Merge[WholeTensor]:
    r"""Keep each model's strongest directions, make them orthogonal to one another, and add.

    Of :math:`T` task vectors :math:`\tau_t = U_t \Sigma_t V_t^\top` the first :math:`k = \lfloor
    \min(m, n) / T \rfloor` singular triples (at least one) stand side by side in :math:`U, \Sigma,
    V`; with their nearest orthogonal factors :math:`\theta = \theta_0 + \lambda \hat U \Sigma \hat
    V^\top`. Tensors that are no matrices are averaged. Holds about
    :math:`3 T + 8` matrices of float32.
    """

    def merge(deltas: Sequence[Tensor], beside: Beside) -> Tensor:
        import torch

        rank = max(1, min(deltas[0].shape) // len(deltas))
        parts = beside(_svd, deltas)
        left = torch.cat([u[:, :rank] for u, _, _ in parts], 1)
        values = torch.cat([s[:rank] for _, s, _ in parts])
        right = torch.cat([v[:rank] for _, _, v in parts], 0)
        del parts
        left, right = beside(_polar, [left, right])
        out: Tensor = (left * values) @ right
        return out

    return _by_matrix(merge, weight, scale)


def iso_c(
    *, weight: Weight = each(1.0), scale: Scale = Scalar(1.0), isotropy: Isotropy = 1.0
) -> Merge[WholeTensor]:
    r"""Add the task vectors and give all singular directions of the sum the same strength.

    With :math:`\sum_t w_t \tau_t = U \Sigma V^\top` and :math:`\bar\sigma` the mean singular value:
    :math:`\theta = \theta_0 + \lambda \bar\sigma U V^\top`. Tensors that are no matrices are
    averaged. ``isotropy`` below 1 stops on the way from :math:`\Sigma`. Holds about :math:`T + 8`
    matrices of float32.
    """

    def merge(deltas: Sequence[Tensor], beside: Beside) -> Tensor:
        total = deltas[0].clone()
        for delta in deltas[1:]:
            total += delta
        left, values, right = _svd(total)
        return (left * _flat(values, isotropy)) @ right

    return _by_matrix(merge, weight, scale)


def iso_cts(
    *,
    weight: Weight = each(1.0),
    scale: Scale = Scalar(1.0),
    common: Common = 0.8,
    isotropy: Isotropy = 1.0,
) -> Merge[WholeTensor]:
    r"""As ``iso_c``, with some directions given to what each model has beyond the common ones.

    The first :math:`k` directions :math:`U_c, V_c` of the sum are common; of each residual
    :math:`(I - U_c U_c^\top) w_t \tau_t` the first :math:`s` are added, with :math:`s` the rounded
    share :math:`(1 - \mathrm{common}) / T` of all :math:`r = \min(m, n)` and :math:`k = r - s T`.
    All together are made orthogonal and get the mean of their singular values. Tensors that are no
    matrices are averaged. Holds about :math:`3 T + 8` matrices of float32.
    """

    def merge(deltas: Sequence[Tensor], beside: Beside) -> Tensor:
        import torch

        total = deltas[0].clone()
        for delta in deltas[1:]:
            total += delta
        rank = min(total.shape)
        own = min(round((rank - int(rank * common)) / len(deltas)), rank // len(deltas))
        shared = rank - own * len(deltas)
        left, values, right = _svd(total)
        lefts, strengths, rights = [left[:, :shared]], [values[:shared]], [right[:shared]]
        base = lefts[0]

        def residual(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            u, s, v = _svd(delta - base @ (base.T @ delta))
            return u[:, :own], s[:own], v[:own]

        for u, s, v in beside(residual, deltas if own else []):
            lefts.append(u)
            strengths.append(s)
            rights.append(v)
        left, right = beside(_polar, [torch.cat(lefts, 1), torch.cat(rights, 0)])
        out: Tensor = (left * _flat(torch.cat(strengths), isotropy)) @ right
        return out

    return _by_matrix(merge, weight, scale)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    found: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(matrix, full_matrices=False)
    return found


def _polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns; in float64, for stacks near singular."""
    left, _, right = _svd(matrix.double())
    return (left @ right).float()


def _flat(values: Tensor, isotropy: float) -> Tensor:
    return values + isotropy * (values.mean() - values)


def _by_matrix(merge: Matrices, weight: PerModel, scale: Scalar) -> Merge[WholeTensor]:
    """A merge that gives matrices to ``merge`` whole, and averages all other tensors."""

    def prepare(context: Context) -> WholeTensor:
        specs = context.sources.reference.specs

        def compute(name: str, rows: Array) -> Array:
            import torch

            factors = np.array(weight.at(name, len(rows)), np.float32)
            rows *= factors[:, None]
            deltas = torch.from_numpy(rows).view(len(rows), *specs[name].shape)
            with _one_thread(), ThreadPoolExecutor(context.threads or cores()) as pool:
                found = merge(list(deltas), lambda f, values: list(pool.map(f, values)))
            return np.ascontiguousarray(found.numpy().reshape(-1))

        return WholeTensor(compute)

    def combine(block: Block, whole: WholeTensor) -> None:
        shape = block.sources.spec(block.name).shape
        if len(shape) == 2 and block.count:
            whole.fill(block)
        else:
            weights = weight.row(block) / np.float32(len(block.rows))
            compiled.weighted_sum(block.rows, weights, 0, block.count, block.out)
        scaled(block, scale)

    def check(names: Sequence[str], models: Sequence[str]) -> Iterator[str]:
        if find_spec("torch") is None:
            yield "needs torch; install it with `pip install 'suture[models]'`"

    return Merge(combine, prepare, check=check, memory=_memory)


def _memory(spec: TensorSpec, models: int) -> int:
    """Models, their factors (two sides each), and the working space of one decomposition."""
    return 4 * spec.numel * (3 * models + 6 + HELD) if len(spec.shape) == 2 else 0


_users = 0
_before = 1
_lock = threading.Lock()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for each operation of torch; what was set before comes back with the last user."""
    global _users, _before
    import torch

    with _lock:
        if not _users:
            _before = torch.get_num_threads()
        _users += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                torch.set_num_threads(_before)
