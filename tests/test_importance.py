"""Importance rules: each is its equation, and each is ranked exactly, out of core."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import suture
import toy
from slow import topk
from suture import RULES
from suture.edits.importance import Scoring, ordered
from suture.edits.stats import Stats
from suture.errors import MismatchError, NonFiniteError, RecipeError

Array = np.ndarray[Any, Any]
NAME = "model.layers.0.mlp.up_proj.weight"


def statistics(tau: Any, at: str = "tuned", seed: int = 0, **shapes: Any) -> Stats:
    """Invented statistics of every kind for the tensors of a task vector."""
    draw = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for name in tau:
        shape = tau[name].shape
        for kind in ("fisher", "empirical_fisher", "abs_grad"):
            found[f"{kind}/{name}"] = draw.random(shape, np.float32)
        for kind in ("grad", "logit"):
            found[f"{kind}/{name}"] = draw.standard_normal(shape, np.float32)
        if len(shape) == 2:
            found[f"input_norm/{name}"] = draw.random(shape[1], np.float32)
    return Stats(found, {"at": at}, "invented")


def vector(family: Any, flavour: str = "f32", grid: bool = False) -> Any:
    models = family(flavour, grid=grid)
    tau = suture.open(models.paths["ada"]) - suture.open(models.base_path)
    return tau.select(exclude=["embedding", "head"])


def equation(rule: str, tau: Any, name: str, stats: Stats) -> Array:
    """The paper's formula over a whole tensor, in float64."""
    delta = tau[name].astype(np.float64)
    model = tau.base if stats.facts["at"] == "base" else tau.terms[0][0]
    weight = np.abs(model[name].astype(np.float64))

    def stat(kind: str) -> Array:
        return stats.whole(kind, name).astype(np.float64)

    if rule == "wanda":
        return weight * stat("input_norm") if delta.ndim == 2 else np.zeros_like(delta)
    return {
        "magnitude": lambda: abs(delta),
        "fisher": lambda: np.sqrt(delta**2 * stat("fisher")),
        "empirical_fisher": lambda: np.sqrt(delta**2 * stat("empirical_fisher")),
        "snip": lambda: weight * stat("abs_grad"),
        "delta_grad": lambda: abs(delta) * stat("abs_grad"),
        "delta_sum_grad": lambda: abs(delta * stat("grad")),
        "first_order": lambda: -delta * stat("grad"),
        "learned": lambda: stat("logit"),
    }[rule]()


@pytest.mark.parametrize("at", ["base", "tuned"])
@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"random"}))
def test_a_score_is_its_equation(rule: str, at: str, family: Any) -> None:
    """Every rule gives its formula, on any stretch of a tensor, with the weights that were measured."""
    tau = vector(family)
    stats = statistics(tau, at)
    scoring = Scoring(RULES.find(rule), tau.base, tau.terms[0][0], stats)

    for name in tau:
        expected = equation(rule, tau, name, stats).ravel()
        size = expected.size
        for start, stop in ((0, size), (size // 3, size // 2), (size - size % 5, size)):
            found = scoring.scores(name, start, stop - start)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected[start:stop], rtol=1e-6, atol=1e-30)


def first(scores: dict[str, Array], count: int) -> dict[str, Array]:
    """The ``count`` highest scores over all tensors, ties by position: a sort in plain Python."""
    flat = [(-s, n, i) for n in sorted(scores) for i, s in enumerate(scores[n].ravel().tolist())]
    marks = {n: np.zeros(s.size, bool) for n, s in scores.items()}
    for _, name, i in sorted(flat)[:count]:
        marks[name][i] = True
    return {n: m.reshape(scores[n].shape) for n, m in marks.items()}


@pytest.mark.parametrize("density", [0.01, 0.25, 0.8])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_masks_are_the_highest_scores(rule: str, density: float, family: Any) -> None:
    """Exactly ``round(density * n)`` entries, those a sort of the scores gives, ties by position."""
    tau = vector(family, "bf16", grid=True)
    stats = statistics(tau)
    scoring = Scoring(RULES.find(rule), tau.base, tau.terms[0][0], stats, 5, "ada")
    scores = {n: scoring.scores(n, 0, tau[n].size).reshape(tau[n].shape) for n in tau}
    size = sum(s.size for s in scores.values())
    wanted = round(density * size)
    some = sum(int((s > 0).sum()) for s in scores.values())

    mask = suture.localize(tau, rule, density=density, stats=stats, seed=5, label="ada", threads=2)

    expected = first(scores, wanted if RULES[rule].signed else min(wanted, some))
    assert all(np.array_equal(mask[n], expected[n]) for n in tau)
    assert mask.count == (wanted if RULES[rule].signed or rule == "random" else min(wanted, some))


@pytest.mark.parametrize("scope", ["layer", "tensor"])
def test_scopes_hold_for_scores(scope: str, family: Any) -> None:
    """In each layer or tensor the scores compete among themselves."""
    tau = vector(family)
    stats = statistics(tau)
    scores = {n: equation("delta_grad", tau, n, stats).astype(np.float32).ravel() for n in tau}

    mask = suture.localize(tau, "delta_grad", density=0.3, scope=scope, stats=stats)

    expected = topk.kept(scores, list(scores), lambda name: [0.3], 0, scope)
    for name in tau:
        assert mask[name].ravel().tolist() == expected[name].tolist()


@pytest.mark.parametrize("rule", ["first_order", "learned"])
def test_positive_scores_only(rule: str, family: Any) -> None:
    """``positive`` keeps all entries above 0, or the highest of them, and never more."""
    tau = vector(family)
    stats = statistics(tau)
    above = {n: equation(rule, tau, n, stats) > 0 for n in tau}

    mask = suture.localize(tau, rule, stats=stats, positive=True)
    few = suture.localize(tau, rule, density=0.1, stats=stats, positive=True)

    assert all(np.array_equal(mask[n], above[n]) for n in tau)
    assert few.count == round(0.1 * few.size)
    assert (few - mask).count == 0


@given(
    arrays(
        np.float32,
        st.integers(2, 60),
        elements=st.floats(-(2.0**63), 2.0**63, width=32).filter(
            lambda x: x == 0 or abs(x) >= 2.0**-62
        ),
    )
)
def test_order_is_kept_where_scores_have_signs(scores: Array) -> None:
    """The positive numbers that stand for signed scores are ordered alike, and tied alike."""
    found = ordered(scores)

    assert np.isfinite(found).all()
    assert (found > 0).all()
    assert np.array_equal(np.sign(np.subtract.outer(found.astype(np.float64), found)),
                          np.sign(np.subtract.outer(scores.astype(np.float64), scores)))  # fmt: skip


def test_neighbours_stay_apart() -> None:
    """Even scores one step of float32 apart are told apart, at every size and sign."""
    sizes = np.float32(2.0) ** np.arange(-60, 63, dtype=np.float32)
    values = np.concatenate([sizes, np.nextafter(sizes, np.float32(np.inf), dtype=np.float32)])
    values = np.sort(np.concatenate([values, -values]))

    assert (np.diff(ordered(values).view(np.uint32).astype(np.int64)) > 0).all()


def test_random_masks_are_drawn_by_position(family: Any) -> None:
    """Seed, model and tensor name choose a mask; blocks and threads do not; its overlap is chance."""
    tau = vector(family)

    one, again, label, seed = (
        suture.localize(tau, "random", density=0.5, seed=s, label=m, threads=t)
        for s, m, t in ((1, "a", 1), (1, "a", 2), (1, "b", 1), (2, "a", 1))
    )

    assert one == again
    assert one.count == round(0.5 * one.size)
    for other in (label, seed):
        assert abs(one.jaccard(other) - 1 / 3) < 6 * math.sqrt(1 / one.size)


def test_scores_need_their_statistics(family: Any, tmp_path: Path) -> None:
    """Missing or foreign statistics are refused before anything is ranked."""
    tau = vector(family)
    stats = statistics(tau)
    del stats.tensors[f"abs_grad/{NAME}"]  # type: ignore[attr-defined]

    with pytest.raises(RecipeError, match="the rule snip needs statistics: abs_grad"):
        suture.localize(tau, "snip", density=0.1)
    with pytest.raises(MismatchError, match=f"no abs_grad of {NAME}"):
        suture.localize(tau, "snip", density=0.1, stats=stats)
    with pytest.raises(RecipeError, match="never negative"):
        suture.localize(tau, "fisher", positive=True, stats=stats)
    with pytest.raises(RecipeError, match="density: missing"):
        suture.localize(tau, "first_order", stats=stats)


def test_scores_that_are_no_numbers_are_refused(family: Any, tmp_path: Path) -> None:
    """NaN in statistics or in a model: an error that names the place, and no mask."""
    tau = vector(family)
    stats = statistics(tau)
    stats.tensors[f"grad/{NAME}"].reshape(-1)[7] = np.nan
    models = family("f32")
    broken = {n: t.clone() for n, t in models.models["bob"].items()}
    broken[NAME].view(-1)[3] = float("inf")
    place = toy.folder(tmp_path / "broken", broken)
    bad = (suture.open(place) - suture.open(models.base_path)).select(NAME)

    with pytest.raises(NonFiniteError, match=f"{NAME}: first_order gives NaN"):
        suture.localize(tau, "first_order", density=0.1, stats=stats)
    with pytest.raises(NonFiniteError, match=rf"{NAME} holds 1 NaN or infinite values"):
        suture.localize(bad, "delta_grad", density=0.1, stats=statistics(bad))


def test_every_rule_is_documented() -> None:
    """Each rule has a title, an equation or a reason, and a place in the docs."""
    page = (Path(__file__).parent.parent / "docs" / "localize.md").read_text(encoding="utf-8")
    for name, rule in RULES.items():
        assert rule.equation
        assert rule.title
        assert f"`{name}`" in page
