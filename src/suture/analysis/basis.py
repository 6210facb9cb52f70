r"""Task vector bases: fewer vectors that stand for many, found from dot products alone.

With :math:`V = [\tau_1 \ldots \tau_T]` every basis here is :math:`S = V B` with coefficients
:math:`W`, so that :math:`\hat V = S W`. Everything - losses, coefficients, nearest vectors - needs
only the Gram matrix :math:`G = V^\top V`; B says how to write the vectors. G is divided by its mean
diagonal first, so that nothing depends on how far the models moved.

Source: Zeng et al., "Efficient model editing with task vector bases" (arXiv:2502.01015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations
from typing import Any

import numpy as np

from suture.analysis.cells import Array, Matrix, frozen
from suture.analysis.geometry import cosines
from suture.errors import MissingExtraError, RecipeError, did_you_mean


@dataclass(frozen=True)
class Basis:
    """A few vectors, each a weighted sum of task vectors, and how to get the task vectors back."""

    kind: str
    tasks: tuple[str, ...]
    names: tuple[str, ...]
    """What to call the basis vectors."""
    vectors: Matrix
    """B, T x M: column m says of which task vectors basis vector m is the sum."""
    coefficients: Matrix
    """W, M x T: column t gives task vector t as a sum of basis vectors."""
    loss: float
    """Mean squared error of the rebuilt task vectors over their mean squared length."""
    bound: float
    """The least loss that any M vectors can have: the eigenvalues of G beyond the M largest."""
    errors: tuple[float, ...]
    """For each task: length of what is missing over the length of the task vector."""
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def addition(self, wanted: dict[str, float]) -> dict[str, float]:
        """Factors on the basis vectors that add some tasks: ``W a``.

        ``addition({"math": 1, "code": 1})`` adds two tasks, ``addition({"math": -1})`` negates one;
        use them as the weights of a merge by task arithmetic over the written basis.

        Raises:
            RecipeError: no such task.
        """
        amounts = np.zeros(len(self.tasks))
        for task, amount in wanted.items():
            if task not in self.tasks:
                raise RecipeError(f"no task {task!r}; {did_you_mean(task, self.tasks)}")
            amounts[self.tasks.index(task)] = amount
        return dict(zip(self.names, (np.array(self.coefficients) @ amounts).tolist(), strict=True))

    def sum_basis(self, scale: float = 1.0) -> dict[str, float]:
        """The published rule: every basis vector once, times a scale that validation chooses.

        Its total mass is M instead of T, so the best scale is about T/M times that of addition.
        """
        return dict.fromkeys(self.names, scale)

    def nearest(self, gram: Array, products: Sequence[float], square: float) -> Nearest:
        """Which basis vector is most like a task vector that it was not made from.

        Args:
            gram: dot products of the task vectors, T x T.
            products: those of the new task vector with each of them.
            square: its squared length.
        """
        made = np.array(self.vectors)
        inner = made.T @ np.array(products, np.float64)
        small = made.T @ np.array(gram, np.float64) @ made
        lengths = np.sqrt(np.maximum(np.diag(small), 0) * square)
        found = np.divide(inner, lengths, out=np.zeros_like(inner), where=lengths > 0)
        factors = np.linalg.lstsq(small, inner, rcond=1e-12)[0]
        missing = square - float(factors @ inner)
        best = int(np.argmax(found))
        return Nearest(
            self.names[best], tuple(found.tolist()), tuple(factors.tolist()),
            math.sqrt(max(0.0, missing) / square) if square > 0 else 0.0,
        )  # fmt: skip


@dataclass(frozen=True)
class Nearest:
    """Where a new task vector lies to a basis."""

    name: str
    """The basis vector of largest cosine."""
    cosines: tuple[float, ...]
    projection: tuple[float, ...]
    """The factors on the basis vectors that come nearest to it."""
    error: float
    """Length of what no sum of basis vectors reaches, over its own length."""


def normalised(gram: Array) -> Array:
    """G over its mean diagonal, symmetric.

    Raises:
        RecipeError: every task vector is zero.
    """
    found = np.array(gram, np.float64)
    found = (found + found.T) / 2
    scale = float(np.diag(found).mean()) if len(found) else 0.0
    if not scale > 0:
        raise RecipeError("a basis needs task vectors that are not all zero")
    return np.asarray(found / scale)


def project(gram: Array, made: Array) -> Array:
    r"""The best coefficients for given vectors: :math:`W = (B^\top G B)^{+} B^\top G`."""
    return np.asarray(np.linalg.lstsq(made.T @ gram @ made, made.T @ gram, rcond=1e-12)[0])


def loss_of(gram: Array, made: Array, coefficients: Array) -> float:
    r"""Mean squared error over mean squared length: :math:`tr(E^\top G E)/tr\,G, E = BW - I`."""
    missing = made @ coefficients - np.eye(len(gram))
    return max(0.0, float(np.trace(missing.T @ gram @ missing)) / float(np.trace(gram)))


def bound_of(gram: Array, size: int) -> float:
    """The least loss of any ``size`` vectors (Eckart and Young, 1936)."""
    values = np.linalg.eigvalsh(gram)[::-1]
    return float(np.maximum(values[size:], 0).sum() / values.sum())


def clusters(gram: Array, size: int | None, seed: int) -> tuple[Array, Array, dict[str, Any]]:
    """The mean of each cluster of similar task vectors; the number may be left to the eigengap.

    Spectral clustering on cosines, negative ones taken as 0; the largest gap between neighbouring
    eigenvalues of the unnormalised Laplacian chooses the number (von Luxburg, 2007).
    """
    try:
        from sklearn.cluster import SpectralClustering
    except ImportError:
        raise MissingExtraError("clustering", "analysis") from None
    near = np.maximum(cosines(gram), 0.0)
    number = eigengap(near) if size is None else size
    if number in (1, len(gram)):
        labels = np.zeros(len(gram), int) if number == 1 else np.arange(len(gram))
    else:
        # A little of everything, so that the graph hangs together: what is near stays nearest.
        found = SpectralClustering(number, affinity="precomputed", random_state=seed % 2**32)
        labels = found.fit(near + 1e-9).labels_
    first = list(dict.fromkeys(labels.tolist()))
    made = np.stack([(labels == label) / (labels == label).sum() for label in first], axis=1)
    chosen = [first.index(label) for label in labels.tolist()]
    return made, project(gram, made), {"cluster": chosen, "by_eigengap": size is None}


def eigengap(near: Array) -> int:
    """The number of clusters that the largest gap of the Laplacian's eigenvalues suggests."""
    if len(near) < 2:
        return len(near)
    off = near - np.diag(np.diag(near))
    values = np.linalg.eigvalsh(np.diag(off.sum(1)) - off)
    return int(np.argmax(np.diff(values))) + 1


def autoencoder(
    gram: Array, size: int, seed: int, *, restarts: int = 4, temperature: float = 1.0
) -> tuple[Array, Array, dict[str, Any]]:
    r"""Convex combinations of task vectors that rebuild all of them best.

    :math:`B = softmax(A/\kappa)` down each column. The decoder is eliminated: for given B the best
    W has a closed form, so that
    :math:`L(B) = [tr\,G - tr(G B (B^\top G B)^{-1} B^\top G)]/tr\,G` is minimised over A alone, by
    L-BFGS from several starts.
    """
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise MissingExtraError("the autoencoder basis", "analysis") from None
    tasks = len(gram)
    total = float(np.trace(gram))

    def encoded(flat: Array) -> Array:
        logits = flat.reshape(tasks, size) / temperature
        powers = np.exp(logits - logits.max(0))
        return np.asarray(powers / powers.sum(0))

    def objective(flat: Array, ridge: float, decay: float) -> tuple[float, Array]:
        made = encoded(flat)
        inner = made.T @ gram
        best = np.linalg.solve(inner @ made + ridge * np.eye(size), inner)
        loss = (total - float((inner * best).sum())) / total
        # W is at its optimum, so only B's own part of the derivative remains.
        slope = 2 / total * gram @ (made @ best - np.eye(tasks)) @ best.T
        through = made * (slope - (made * slope).sum(0)) / temperature
        return loss + decay * float(flat @ flat) / 2, through.ravel() + decay * flat

    def descend(start: Array, ridge: float, decay: float = 0.0) -> Any:
        return minimize(objective, start, (ridge, decay), jac=True, method="L-BFGS-B",
                        options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10})  # fmt: skip

    # A decay first keeps the logits where the softmax still has a slope.
    draw = np.random.Generator(np.random.Philox(seed))
    starts = [draw.normal(size=tasks * size) for _ in range(restarts)]
    runs = [descend(descend(start, 1e-2, 1e-3).x, 1e-10) for start in starts]
    best = min(runs, key=lambda run: float(run.fun))
    made = apart(encoded(best.x))
    return made, project(gram, made), {"steps": int(best.nit), "restarts": restarts}


def apart(made: Array) -> Array:
    """Convex columns with the same span, as unlike one another as convexity allows.

    Many B span the same space and lose the same. Taking from each column as much of every other as
    leaves no entry negative makes vectors that speak of few tasks, and coefficients that are small.
    """
    made = made.copy()
    for _ in range(3):
        for i, j in permutations(range(made.shape[1]), 2):
            there = made[:, j] > 0
            much = float((made[there, i] / made[there, j]).min())
            if 0 < much < 1 - 1e-6:
                made[:, i] = np.maximum(made[:, i] - much * made[:, j], 0)
                made[:, i] /= made[:, i].sum()
    return made


def spectral(gram: Array, size: int, seed: int) -> tuple[Array, Array, dict[str, Any]]:
    """The best basis without any constraint: the directions of the ``size`` largest eigenvalues.

    The encoder is linear and may subtract; its loss is the bound.
    """
    made = np.linalg.eigh(gram)[1][:, ::-1][:, :size]
    return made, made.T.copy(), {}


def pca(gram: Array, size: int, seed: int) -> tuple[Array, Array, dict[str, Any]]:
    r"""Principal components around the mean: :math:`\hat\tau_t = \mu + \sum_m c_{mt} s_m`.

    The mean is the first vector, so that one more is stored. Coefficients sum to 0 over tasks:
    adding all tasks gives the exact sum for any number of components, which the mean alone holds.
    """
    tasks = len(gram)
    centre = np.eye(tasks) - 1 / tasks
    number = min(size, tasks - 1)
    directions = np.linalg.eigh(centre @ gram @ centre)[1][:, ::-1][:, :number]
    directions = centre @ directions  # the all-ones vector is in the null space, up to rounding
    made = np.concatenate([np.full((tasks, 1), 1 / tasks), directions], axis=1)
    weights = np.concatenate([np.ones((1, tasks)), directions.T], axis=0)
    return made, weights, {"mean": "the first vector is the mean of all task vectors"}


def sample(gram: Array, size: int, seed: int) -> tuple[Array, Array, dict[str, Any]]:
    """Some of the task vectors themselves, drawn at random: the control for the others."""
    draw = np.random.Generator(np.random.Philox(seed))
    chosen = sorted(draw.choice(len(gram), size, replace=False).tolist())
    made = np.eye(len(gram))[:, chosen]
    return made, project(gram, made), {"drawn": chosen}


BASES: dict[str, Callable[[Array, int, int], tuple[Array, Array, dict[str, Any]]]] = {
    "autoencoder": autoencoder,
    "spectral": spectral,
    "pca": pca,
    "clusters": clusters,
    "random": sample,
}
"""Every kind of basis; each gets a normalised Gram matrix, a size and a seed."""


def make_basis(
    gram: Array, tasks: Sequence[str], kind: str = "autoencoder",
    size: int | None = None, seed: int = 0,
) -> Basis:  # fmt: skip
    """Find a basis for some task vectors from their dot products.

    Args:
        gram: float64[T, T].
        tasks: the names of the T task vectors.
        kind: a line of ``BASES``.
        size: how many vectors; by default half as many as tasks (``clusters``: by the eigengap).
        seed: of random starts and draws.

    Raises:
        RecipeError: no such kind, a size that is not between 1 and T, only zero vectors.
        MissingExtraError: scipy or scikit-learn is not installed.
    """
    if kind not in BASES:
        raise RecipeError(f"no kind of basis {kind!r}; {did_you_mean(kind, list(BASES))}")
    if size is not None and not 1 <= size <= len(tasks):
        raise RecipeError(f"a basis of {len(tasks)} task vectors has 1 to {len(tasks)}, not {size}")
    matrix = normalised(gram)
    number = max(1, len(tasks) // 2) if size is None else size
    if kind == "clusters":
        made, weights, facts = clusters(matrix, size, seed)
    else:
        made, weights, facts = BASES[kind](matrix, number, seed)
    missing = made @ weights - np.eye(len(matrix))
    squares = np.maximum(np.einsum("at,ab,bt->t", missing, matrix, missing), 0)
    own = np.diag(matrix)
    errors = np.sqrt(np.divide(squares, own, out=np.zeros_like(own), where=own > 0))
    return Basis(
        kind, tuple(tasks), tuple(_names(kind, made.shape[1])), frozen(made), frozen(weights),
        loss_of(matrix, made, weights), bound_of(matrix, made.shape[1]), tuple(errors.tolist()),
        facts,
    )  # fmt: skip


def _names(kind: str, number: int) -> list[str]:
    numbered = [f"{kind}-{i}" for i in range(1, number + 1)]
    return ["pca-mean", *numbered[:-1]] if kind == "pca" else numbered
