"""Task vectors looked at: every number against its definition, computed plainly in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import toy
from suture.analysis.basis import BASES, apart, loss_of, make_basis, normalised, project
from suture.analysis.cells import Together, groups_of
from suture.analysis.conflicts import Signs
from suture.analysis.geometry import Products, addition_bound, gap_bound, negation_bound
from suture.analysis.maps import along, disagreement, disentanglement
from suture.analysis.overlap import Masked, independent_jaccard
from suture.checkpoints.checkpoint import open_checkpoint
from suture.edits.mask import Mask, localize
from suture.errors import MissingExtraError, RecipeError
from suture.stream.sweep import Sources, sweep, tasks_of
from suture.stream.topk import select

Array = np.ndarray[Any, Any]
MODELS = ("ada", "bob", "cyd")


class Looked:
    """Three task vectors, by the analyses and as float32 arrays read by another way."""

    def __init__(self, family: Any, density: float | None = 0.3) -> None:
        self.base = open_checkpoint(family.base_path)
        self.models = [open_checkpoint(family.paths[m]) for m in MODELS]
        self.names = family.names
        self.sizes = {n: self.base.specs[n].numel for n in self.names}
        self.sources = Sources(tuple(self.models), self.base)
        self.density = density
        self.deltas = {
            n: np.stack([
                (family.models[m][n].float() - family.base[n].float()).reshape(-1).numpy()
                for m in MODELS
            ])
            for n in self.names
        }  # fmt: skip
        self.groups = groups_of(self.names)

    def flat(self, names: Sequence[str] | None = None) -> Array:
        return np.concatenate([self.deltas[n] for n in names or self.names], axis=1)

    def look(self, visitor: Any, **how: Any) -> Any:
        sweep(self.sources, tasks_of(self.names, self.base.specs), visitor, **how)
        return visitor


@pytest.fixture(params=["f32", "bf16"])
def looked(request: pytest.FixtureRequest, family: Callable[..., Any]) -> Looked:
    return Looked(family(request.param))


# -- lengths and angles ----------------------------------------------------------------------------


def test_geometry_is_that_of_the_flattened_task_vectors(looked: Looked) -> None:
    """Gram matrix, cosines, norms, shares, C, epsilon and distances agree with plain float64."""
    found = looked.look(Products(3)).geometry(MODELS, looked.groups, looked.sizes)
    flat = looked.flat().astype(np.float64)
    gram = flat @ flat.T

    np.testing.assert_allclose(found.gram, gram, rtol=1e-12)
    lengths = np.sqrt(np.diag(gram))
    np.testing.assert_allclose(found.cosine, gram / np.outer(lengths, lengths), atol=1e-12)
    off = np.abs(np.array(found.cosine) - np.eye(3))
    assert found.epsilon == pytest.approx(off.max())
    assert found.largest == pytest.approx(np.diag(gram).max())
    centre = flat.mean(0)
    distances = np.linalg.norm(flat - centre, axis=1)
    np.testing.assert_allclose(found.to_average, distances, rtol=1e-6)
    for move in found.cells:
        names = looked.groups.cells[(move.layer, move.role)]
        part = looked.flat(names)[MODELS.index(move.model)].astype(np.float64)
        assert move.norm == pytest.approx(np.linalg.norm(part), rel=1e-12)
        assert move.elements == part.size
    for model, total in zip(MODELS, found.total, strict=True):
        for parts in (found.cells, found.layers, found.roles):
            assert math.fsum(p.share for p in parts if p.model == model) == pytest.approx(1)
        assert total.relative_norm == pytest.approx(total.norm / found.base_norm)


def test_geometry_does_not_depend_on_threads_or_blocks(looked: Looked) -> None:
    """The same numbers, to the last bit, whoever adds them up."""
    found = [
        looked.look(Products(3), threads=threads, block=block).geometry(
            MODELS, looked.groups, looked.sizes
        )
        for threads, block in ((1, 1 << 17), (3, 8), (2, 64))
    ]

    assert found[0] == found[1] == found[2]


def test_layers_come_in_the_order_of_depth() -> None:
    """Layer 10 stands after layer 9, and what is in no layer before them."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (10, 9, 0)] + ["model.norm.weight"]

    assert list(groups_of(names).layers) == [
        "(norm)", "model.layers.0", "model.layers.9", "model.layers.10",
    ]  # fmt: skip


# -- conflicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("block", [8, 1 << 17])
def test_conflicts_are_those_counted_one_by_one(
    family: Callable[..., Any], density: float | None, block: int
) -> None:
    """A slow twin goes over every entry: counts, rates, weights, chance and pairs are the same."""
    looked = Looked(family("f32", grid=True))
    selection = (
        None if density is None
        else select(looked.sources, looked.names, lambda _: [density] * 3, scope="global")
    )  # fmt: skip
    found = looked.look(Signs(3, selection), block=block).conflicts(MODELS, looked.groups, density)
    flat = looked.flat().astype(np.float64)
    if density is not None:
        # exactly round(density * n), ties by position: what the mask keeps
        for row, model in zip(flat, looked.models, strict=True):
            vector = (model - looked.base).select(*looked.names)
            mask = localize(vector, density=density)
            row[~np.concatenate([mask[n].ravel() for n in looked.names])] = 0

    shared = opposed = 0
    chance = against = together = net = mass = 0.0
    pairs = np.zeros((2, 3, 3))
    for entry in flat.T:
        signs = np.sign(entry)
        moved = int((signs != 0).sum())
        mass += np.abs(entry).sum()
        net += abs(entry.sum())
        if moved > 1:
            shared += 1
            chance += 1 - 2.0 ** (1 - moved)
            together += np.abs(entry).sum()
            if signs.max() > 0 > signs.min():
                opposed += 1
                against += np.abs(entry).sum()
        for a, b in combinations(range(3), 2):
            pairs[0, a, b] += signs[a] != 0 and signs[b] != 0
            pairs[1, a, b] += signs[a] * signs[b] < 0

    assert (found.total.shared, found.total.opposed) == (shared, opposed)
    assert found.total.rate == pytest.approx(opposed / shared)
    assert found.total.null == pytest.approx(chance / shared)
    assert found.total.weighted == pytest.approx(against / together)
    assert found.total.cancelled == pytest.approx(1 - net / mass)
    for a, b in combinations(range(3), 2):
        assert found.pairs[a][b] == pytest.approx(pairs[1, a, b] / pairs[0, a, b])
        assert found.pairs[a][b] == found.pairs[b][a]
    for parts in (found.layers, found.roles, found.cells):
        assert sum(p.shared for p in parts) == shared
        assert sum(p.opposed for p in parts) == opposed


def test_the_null_of_conflicts_is_what_random_signs_give() -> None:
    """With random signs the measured rate comes out near the null, for two and three models."""
    draw = np.random.Generator(np.random.Philox(0))
    signs = draw.choice([-1.0, 0.0, 1.0], size=(3, 200_000))
    several = (signs != 0).sum(0) > 1
    opposed = (signs.max(0) > 0) & (signs.min(0) < 0)
    moved = (signs != 0).sum(0)[several]

    assert opposed[several].mean() == pytest.approx((1 - 2.0 ** (1 - moved)).mean(), abs=0.005)


# -- masks -----------------------------------------------------------------------------------------


def test_overlaps_are_those_of_sets(looked: Looked) -> None:
    """Jaccard, cosine of masked vectors, density, share, enrichment and energy by definition."""
    masks = [localize((m - looked.base).select(*looked.names), density=0.3) for m in looked.models]
    found = looked.look(Masked(masks), block=8).overlap(MODELS, looked.groups, "test")
    flat = looked.flat().astype(np.float64)
    kept = np.stack([np.concatenate([m[n].ravel() for n in looked.names]) for m in masks])
    cut = flat * kept

    for a, b in combinations(range(3), 2):
        both, either = (kept[a] & kept[b]).sum(), (kept[a] | kept[b]).sum()
        assert found.jaccard[a][b] == pytest.approx(both / either)
        cosine = cut[a] @ cut[b] / np.linalg.norm(cut[a]) / np.linalg.norm(cut[b])
        assert found.cosine[a][b] == pytest.approx(cosine, abs=1e-12)
        whole = flat[a] @ flat[b] / np.linalg.norm(flat[a]) / np.linalg.norm(flat[b])
        assert found.unmasked[a][b] == pytest.approx(whole, abs=1e-12)
    for total, row, delta in zip(found.total, kept, flat, strict=True):
        assert total.density == pytest.approx(row.mean())
        assert (total.share, total.enrichment) == (1, pytest.approx(1))
        assert total.energy == pytest.approx((delta[row] ** 2).sum() / (delta**2).sum())
    for cell in found.cells:
        names = looked.groups.cells[(cell.layer, cell.role)]
        i = MODELS.index(cell.model)
        inside = np.concatenate([masks[i][n].ravel() for n in names])
        assert cell.density == pytest.approx(inside.mean() if inside.size else 0)
        assert cell.share == pytest.approx(inside.sum() / kept[i].sum())
        assert cell.enrichment == pytest.approx(cell.density / kept[i].mean())


@pytest.mark.parametrize(("density", "expected"), [(0.01, 0.005), (0.05, 0.026), (0.1, 0.053)])
def test_independent_masks_share_little(density: float, expected: float) -> None:
    """The null of two masks of density s is s / (2 - s)."""
    assert independent_jaccard(density, density) == pytest.approx(density / (2 - density))
    assert independent_jaccard(density, density) == pytest.approx(expected, abs=5e-4)


def test_the_nulls_are_what_random_masks_have(tmp_path: Path) -> None:
    """Masks drawn at random, with the same number in each tensor, come out at ``placed``; drawn
    over everything, at ``independent``."""
    shapes = {"model.layers.0.self_attn.q_proj.weight": (100, 80), "model.layers.0.mlp.up_proj.weight": (90, 100)}  # fmt: skip
    base = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    from safetensors.numpy import save_file

    save_file(base, tmp_path / "base.safetensors")
    checkpoint = open_checkpoint(tmp_path / "base.safetensors")
    draw = np.random.Generator(np.random.Philox(4))

    def mask(shares: Sequence[float]) -> Mask:
        bits = {}
        for (name, shape), share in zip(shapes.items(), shares, strict=True):
            size = math.prod(shape)
            row = np.zeros(size, bool)
            row[draw.choice(size, round(share * size), replace=False)] = True
            bits[name] = np.packbits(row, bitorder="little")
        return Mask(shapes, bits)

    found = []
    for _ in range(30):
        visitor = Masked([mask((0.4, 0.05)), mask((0.3, 0.02))])
        sweep(
            Sources((checkpoint, checkpoint), checkpoint),
            tasks_of(sorted(shapes), checkpoint.specs),
            visitor,
        )
        found.append(visitor.overlap(("a", "b"), groups_of(shapes), ""))
    measured = np.mean([f.jaccard[0][1] for f in found])

    assert found[0].placed[0][1] == pytest.approx(measured, rel=0.03)
    assert found[0].independent[0][1] < 0.6 * measured
    total = sum(math.prod(s) for s in shapes.values())
    p = (0.4 * 8000 + 0.05 * 9000) / total
    q = (0.3 * 8000 + 0.02 * 9000) / total
    assert found[0].independent[0][1] == pytest.approx(independent_jaccard(p, q))


def test_visitors_together_see_what_each_sees_alone(looked: Looked) -> None:
    """One sweep for all analyses changes no number."""
    products, signs = Products(3), Signs(3)
    looked.look(Together([products, signs]), threads=2)

    alone = looked.look(Products(3)).geometry(MODELS, looked.groups, looked.sizes)
    assert products.geometry(MODELS, looked.groups, looked.sizes) == alone
    assert signs.conflicts(MODELS, looked.groups, None) == looked.look(Signs(3)).conflicts(
        MODELS, looked.groups, None
    )


# -- bases -----------------------------------------------------------------------------------------


def vectors(tasks: int = 6, length: int = 40, rank: int | None = None, seed: int = 0) -> Array:
    """Task vectors with something in common, ``length x tasks``."""
    draw = np.random.Generator(np.random.Philox(seed))
    inner = rank or tasks
    return (draw.normal(size=(length, inner)) + 0.3) @ np.abs(draw.normal(size=(inner, tasks)))


@pytest.mark.parametrize("kind", list(BASES))
@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_a_basis_loses_what_it_says_and_never_less_than_the_bound(kind: str, size: int) -> None:
    """The loss from the Gram matrix is that of the written vectors, and at least the bound."""
    found_vectors = vectors()
    gram = found_vectors.T @ found_vectors
    basis = make_basis(gram, [f"t{i}" for i in range(6)], kind, size)
    rebuilt = found_vectors @ np.array(basis.vectors) @ np.array(basis.coefficients)

    missing = ((rebuilt - found_vectors) ** 2).sum() / (found_vectors**2).sum()
    assert basis.loss == pytest.approx(missing, abs=1e-9)
    assert basis.loss >= basis.bound - 1e-9
    errors = np.linalg.norm(rebuilt - found_vectors, axis=0) / np.linalg.norm(found_vectors, axis=0)
    np.testing.assert_allclose(basis.errors, errors, atol=1e-4)
    values = np.linalg.svd(found_vectors, compute_uv=False) ** 2
    assert basis.bound == pytest.approx(values[len(basis.names) :].sum() / values.sum(), abs=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_spectral_basis_reaches_the_bound(size: int) -> None:
    """Without constraint no basis is better."""
    made = vectors()
    basis = make_basis(made.T @ made, list("abcdef"), "spectral", size)

    assert basis.loss == pytest.approx(basis.bound, abs=1e-9)


def test_the_autoencoder_is_convex_and_exact_where_there_are_enough_vectors() -> None:
    """Columns of B are shares of one; with as many vectors as the rank nothing is lost."""
    made = vectors(rank=3)
    basis = make_basis(made.T @ made, list("abcdef"), "autoencoder", 3)

    columns = np.array(basis.vectors)
    assert (columns >= 0).all()
    np.testing.assert_allclose(columns.sum(0), 1)
    assert basis.bound == pytest.approx(0, abs=1e-12)
    assert basis.loss == pytest.approx(0, abs=1e-6)
    every = make_basis(made.T @ made, list("abcdef"), "autoencoder", 6)
    assert every.loss == pytest.approx(0, abs=1e-6)


def test_convex_columns_move_apart_within_their_span() -> None:
    """They stay convex and lose the same, and each has an entry of 0 where another has none."""
    draw = np.random.Generator(np.random.Philox(2))
    mixed = draw.dirichlet(np.ones(6), 3).T
    found = apart(mixed)

    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(0), 1)
    made = vectors()
    gram = normalised(made.T @ made)
    before, after = (loss_of(gram, b, project(gram, b)) for b in (mixed, found))
    assert after == pytest.approx(before, abs=1e-9)
    assert np.linalg.cond(found) < np.linalg.cond(mixed)
    np.testing.assert_allclose(found.min(0), 0, atol=1e-9)


def test_the_autoencoder_reaches_the_bound_on_vectors_that_agree() -> None:
    """Where the leading direction is a positive mixture, the softmax costs nothing."""
    made = np.abs(vectors())
    basis = make_basis(made.T @ made, list("abcdef"), "autoencoder", 1)

    assert basis.loss == pytest.approx(basis.bound, rel=1e-6)


@pytest.mark.parametrize("kind", list(BASES))
def test_a_basis_does_not_depend_on_how_far_models_moved(kind: str) -> None:
    """Task vectors 10,000 times shorter have the same basis and the same relative errors."""
    made = vectors()
    long = make_basis(made.T @ made, list("abcdef"), kind, 3)
    short = make_basis((1e-4 * made).T @ (1e-4 * made), list("abcdef"), kind, 3)

    assert short.loss == pytest.approx(long.loss, abs=1e-7)
    np.testing.assert_allclose(short.errors, long.errors, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_principal_components_add_up_to_the_exact_sum(size: int) -> None:
    """Sum_t v_t = Sum_t tau_t for any number of components; the mean vector alone does it."""
    made = vectors()
    basis = make_basis(made.T @ made, list("abcdef"), "pca", size)
    rebuilt = made @ np.array(basis.vectors) @ np.array(basis.coefficients)

    np.testing.assert_allclose(rebuilt.sum(1), made.sum(1), atol=1e-9)
    weights = basis.addition(dict.fromkeys("abcdef", 1.0))
    assert weights.pop("pca-mean") == pytest.approx(6)
    assert max(map(abs, weights.values())) < 1e-9
    np.testing.assert_allclose(made @ np.array(basis.vectors)[:, 0], made.mean(1), atol=1e-12)


def test_addition_of_a_subset_and_negation_use_the_rebuilt_vectors() -> None:
    """``S (W a)`` is the sum of the rebuilt task vectors with the factors asked for."""
    made = vectors()
    basis = make_basis(made.T @ made, list("abcdef"), "autoencoder", 4)
    stored = made @ np.array(basis.vectors)
    rebuilt = stored @ np.array(basis.coefficients)

    two = stored @ np.array(list(basis.addition({"a": 1.0, "d": 0.5}).values()))
    np.testing.assert_allclose(two, rebuilt[:, 0] + 0.5 * rebuilt[:, 3], atol=1e-9)
    minus = stored @ np.array(list(basis.addition({"b": -0.3}).values()))
    np.testing.assert_allclose(minus, -0.3 * rebuilt[:, 1], atol=1e-9)
    assert basis.sum_basis(0.5) == dict.fromkeys(basis.names, 0.5)
    with pytest.raises(RecipeError, match="no task 'z'"):
        basis.addition({"z": 1.0})


def test_clusters_are_found_and_counted() -> None:
    """Three planted groups come out by the eigengap, each with its mean."""
    draw = np.random.Generator(np.random.Philox(1))
    centres = np.linalg.qr(draw.normal(size=(60, 3)))[0]
    planted = [0, 1, 2, 1, 0, 2, 2]
    made = centres[:, planted] + 0.03 * draw.normal(size=(60, 7))
    basis = make_basis(made.T @ made, list("abcdefg"), "clusters")

    assert basis.facts == {"cluster": planted, "by_eigengap": True}
    np.testing.assert_allclose(
        made @ np.array(basis.vectors)[:, 0], made[:, [0, 4]].mean(1), atol=1e-12
    )


def test_the_nearest_basis_vector_of_an_unseen_task() -> None:
    """Cosines, projection and what is left over are those of the vectors themselves."""
    made = vectors()
    basis = make_basis(made.T @ made, list("abcdef"), "random", 3, seed=5)
    stored = made @ np.array(basis.vectors)
    new = 0.8 * stored[:, 1] + 0.1 * vectors(1, 40, seed=9)[:, 0]
    found = basis.nearest(made.T @ made, (new @ made).tolist(), float(new @ new))

    cosines = new @ stored / np.linalg.norm(new) / np.linalg.norm(stored, axis=0)
    np.testing.assert_allclose(found.cosines, cosines, rtol=1e-9)
    assert found.name == basis.names[1]
    factors = np.linalg.lstsq(stored, new, rcond=None)[0]
    np.testing.assert_allclose(found.projection, factors, rtol=1e-6)
    left = np.linalg.norm(new - stored @ factors) / np.linalg.norm(new)
    assert found.error == pytest.approx(left, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "size", "scale", "says"),
    [("autoencode", 2, 1.0, "did you mean 'autoencoder'"), ("pca", 0, 1.0, "1 to 6, not 0"),
     ("pca", 7, 1.0, "1 to 6, not 7"), ("pca", 2, 0.0, "not all zero")],
)  # fmt: skip
def test_what_is_no_basis_is_refused(kind: str, size: int, scale: float, says: str) -> None:
    """Kind, size and vectors are checked, with a remedy."""
    made = scale * vectors()
    with pytest.raises(RecipeError, match=says):
        make_basis(made.T @ made, list("abcdef"), kind, size)


@pytest.mark.parametrize(("kind", "module"), [("autoencoder", "scipy.optimize"), ("clusters", "sklearn.cluster")])  # fmt: skip
def test_a_missing_extra_is_named(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library the message says which extra brings it."""
    monkeypatch.setitem(__import__("sys").modules, module, None)
    made = vectors()
    with pytest.raises(MissingExtraError, match=r"suture\[analysis\]"):
        make_basis(made.T @ made, list("abcdef"), kind, 3)


# -- bounds ----------------------------------------------------------------------------------------


@given(st.integers(0, 2**16), st.integers(2, 5))
def test_the_bounds_hold_on_quadratic_losses(seed: int, tasks: int) -> None:
    """l_i = (theta - theta_i)' H_i (theta - theta_i) / 2 has smoothness L = the largest eigenvalue:
    the gap of any merge is within the exact form, that of a convex one within the closed form."""
    draw = np.random.Generator(np.random.Philox(seed))
    made = draw.normal(size=(7, tasks))
    gram = made.T @ made
    lengths = np.sqrt(np.diag(gram))
    epsilon = float(np.abs(gram / np.outer(lengths, lengths) - np.eye(tasks)).max())
    largest = float(np.diag(gram).max())
    convex = draw.dirichlet(np.ones(tasks))
    for i in range(tasks):
        root = draw.normal(size=(7, 7))
        curvature = root @ root.T
        smooth = float(np.linalg.eigvalsh(curvature)[-1])

        def loss(point: Array, centre: Array = made[:, i], curve: Array = curvature) -> float:
            away = point - centre
            return float(away @ curve @ away) / 2

        free = draw.normal(size=tasks)
        assert loss(made @ free) <= gap_bound(gram, free, i, smooth) * (1 + 1e-9)
        gap = loss(made @ convex)
        exact = gap_bound(gram, convex, i, smooth)
        closed = addition_bound(largest, epsilon, smooth, float(convex[i]))
        assert gap <= exact * (1 + 1e-9) <= closed * (1 + 1e-6)
        for j in range(tasks):
            if j != i:
                forgotten = loss(-draw.uniform() * made[:, j])
                assert forgotten <= negation_bound(largest, epsilon, smooth) * (1 + 1e-9)


# -- maps and lines --------------------------------------------------------------------------------


def test_the_disentanglement_error_is_its_definition() -> None:
    """Two linear classifiers: xi is the sum of the shares of rows whose class changes."""
    draw = np.random.Generator(np.random.Philox(3))
    rows = [draw.normal(size=(50, 4)), draw.normal(size=(70, 4))]
    base, first, second = (draw.normal(size=(4, 3)) for _ in range(3))

    def predict(amounts: Sequence[float], task: int) -> Array:
        return np.argmax(rows[task] @ (base + amounts[0] * first + amounts[1] * second), axis=1)

    found = disentanglement(predict, ("a", "b"), [-1, 0, 0.5, 1])

    def changed(task: int, one: Sequence[float], other: Sequence[float]) -> float:
        return float(np.mean(predict(one, task) != predict(other, task)))

    for i, a in enumerate(found.amounts):
        for j, b in enumerate(found.amounts):
            expected = changed(0, (a, 0), (a, b)) + changed(1, (0, b), (a, b))
            assert found.error[i][j] == pytest.approx(expected)
    assert found.at_one == found.error[3][3]
    assert found.mean == pytest.approx(np.mean([row[1:] for row in found.error[1:]]))
    assert found.rows == 120
    assert found.error[1][1] == 0
    assert found.to_dict()["kind"] == "disentanglement"


def test_tasks_on_separate_features_do_not_disturb_each_other() -> None:
    """Where each task vector touches only weights that the other's rows do not use, xi is 0."""
    rows = [np.eye(4)[[0, 1]], np.eye(4)[[2, 3]]]
    first, second = np.zeros((4, 2)), np.zeros((4, 2))
    first[:2], second[2:] = 1.0, -1.0

    found = disentanglement(
        lambda a, t: np.argmax(rows[t] @ (np.ones((4, 2)) + a[0] * first + a[1] * second), axis=1),
        ("a", "b"), [0, 1, 2],
    )  # fmt: skip

    assert np.max(found.error) == 0
    assert found.mean == 0


def test_a_line_goes_from_end_to_end() -> None:
    """Eleven points of every task, the first and the last being the ends."""
    found = along(lambda a: [a[0] ** 2, a[1]], [1.0, 0.0], [0.5, 2.0], ["one", "two"])

    one, two = (s.points for s in found.series)
    assert len(one) == 11
    assert (one[0].value, one[-1].value) == (1.0, 0.25)
    assert [p.value for p in two] == pytest.approx(np.linspace(0, 2, 11).tolist())


def test_maps_and_lines_refuse_what_they_cannot_draw() -> None:
    """One amount is no map, one step no line, and unlike predictions cannot be compared."""
    with pytest.raises(RecipeError, match="two different amounts"):
        disentanglement(lambda a, t: np.zeros(3), ("a", "b"), [1, 1])
    with pytest.raises(RecipeError, match="two steps or more"):
        along(lambda a: [0.0], [0.0], [1.0], ["a"], steps=1)
    with pytest.raises(RecipeError, match="3 and 2 predictions"):
        disagreement(np.zeros(3), np.zeros(2))


def test_toy_models_share_names() -> None:
    """The family really has what the tests above rely on: several layers and roles."""
    groups = groups_of(toy.editable(toy.base_tensors()))

    assert {"model.layers.0", "model.layers.1"} <= groups.layers.keys()
    assert {"q", "k", "norm", "mlp.down"} <= groups.roles.keys()
