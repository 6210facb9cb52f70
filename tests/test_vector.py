"""Task vectors: lazy differences with the arithmetic of vectors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import suture
import toy
from suture.checkpoints.checkpoint import Checkpoint
from suture.errors import MismatchError, RecipeError, SutureError
from suture.stream import sweep
from suture.stream.vector import TaskVector
from suture.tensors import spec


def opened(family: Any, *names: str) -> list[Checkpoint]:
    return [suture.open(family.base_path), *(suture.open(family.paths[n]) for n in names)]


def exact(family: Any, name: str) -> dict[str, np.ndarray[Any, Any]]:
    """The differences in float64, rounded to float32 once."""
    return {
        n: (family.models[name][n].double() - t.double()).float().numpy()
        for n, t in family.base.items()
        if t.is_floating_point() and n not in toy.BUFFERS
    }


@pytest.mark.parametrize("flavour", toy.FLAVOURS)
def test_a_task_vector_is_tuned_minus_base(flavour: str, family: Any) -> None:
    """``tuned - base``: float32, by name, in the model's shapes; embeddings in, buffers out."""
    models = family(flavour)
    base, ada = opened(models, "ada")

    tau = ada - base

    expected = exact(models, "ada")
    assert list(tau) == sorted(expected)
    assert len(tau) == len(expected)
    assert toy.EMBEDDING in tau
    for name, delta in tau.items():
        assert delta.dtype == np.float32
        np.testing.assert_array_equal(delta, expected[name], err_msg=name)


def test_nothing_is_read_before_it_is_asked_for(family: Any, tmp_path: Path) -> None:
    """Making, scaling and adding task vectors opens no tensor: the file may even be gone."""
    models = family("f32")
    base = suture.open(models.base_path)
    gone = suture.open(toy.folder(tmp_path / "gone", models.models["ada"]))
    (tmp_path / "gone" / "model.safetensors").unlink()

    tau = 2 * (gone - base) - (gone - base)

    assert len(tau.terms) == 2
    with pytest.raises(SutureError, match="gone"):
        tau["model.norm.weight"]


def test_vectors_add_subtract_and_scale(family: Any) -> None:
    """2 (a - base) - (b - base) / 2 + 0 (c - base), name by name."""
    models = family("f64")
    base, *tuned = opened(models, "ada", "bob", "cyd")
    a, b, c = (t - base for t in tuned)

    tau = 2 * a - b * 0.5 + 0 * c

    for name in tau:
        np.testing.assert_allclose(tau[name], 2 * a[name] - b[name] / 2, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal((-a)[name], -(a[name]))


@pytest.mark.parametrize("flavour", ["f32", "bf16", "mixed"])
@pytest.mark.parametrize("block", [8, 1 << 10, 1 << 16])
def test_dot_and_norm_are_exact(flavour: str, block: int, family: Any) -> None:
    """Inner products are those of float64, for sums of terms, whatever the block."""
    models = family(flavour)
    base, *tuned = opened(models, "ada", "bob")
    a, b = (t - base for t in tuned)
    one, other = 2 * a - b, a + 3 * b
    x, y = (
        np.concatenate([p * a[n].astype(np.float64).ravel() + q * b[n].astype(np.float64).ravel()
                        for n in a]) for p, q in ((2, -1), (1, 3))
    )  # fmt: skip

    assert one.dot(other, block=block, threads=2) == pytest.approx(math.fsum(x * y), rel=1e-12)
    assert one.norm(block=block) == pytest.approx(math.sqrt(math.fsum(x * x)), rel=1e-12)
    assert (a - a).norm() == pytest.approx(0, abs=1e-7)


def test_dot_is_the_same_for_threads_and_blocks(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: lanes are added in one order, pieces exactly."""
    models = family("f32")
    base, *tuned = opened(models, "ada", "bob")
    a, b = (t - base for t in tuned)

    found = {a.dot(b, threads=t, block=1 << s) for t in (1, 2, 4) for s in (3, 7, 12, 18)}

    assert len(found) == 1


def test_a_norm_takes_in_every_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of many pieces, in several threads: all pieces count."""
    monkeypatch.setattr(spec, "PIECE", 1 << 10)
    monkeypatch.setattr(sweep, "PIECE", 1 << 10)
    delta = torch.randn(9001, generator=torch.Generator().manual_seed(1))
    tuned = suture.open(toy.folder(tmp_path / "t", {"w": delta}))
    base = suture.open(toy.folder(tmp_path / "b", {"w": torch.zeros(9001)}))

    norm = (tuned - base).norm(threads=3, block=1 << 8)

    assert norm == pytest.approx(float(delta.double().norm()), rel=1e-12)


def test_select_narrows_by_role_and_name(family: Any) -> None:
    """Roles and globs choose, the rest is not part of the vector any more."""
    base, ada = opened(family("f32"), "ada")
    tau = ada - base

    attention = tau.select("q", "k", exclude=["*.layers.1.*"])

    assert list(attention) == [
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    assert tau.select("*.mlp.*").norm() < tau.norm()
    with pytest.raises(KeyError):
        attention["model.norm.weight"]
    with pytest.raises(RecipeError, match=r"'nothing.fits' is no role and fits no tensor"):
        tau.select("nothing.fits")


def test_vectors_of_another_base_do_not_add(family: Any) -> None:
    """Only differences to the same open base over the same tensors add; checkpoints never do."""
    models = family("f32")
    base, ada, bob = opened(models, "ada", "bob")
    again = suture.open(models.base_path)

    with pytest.raises(SutureError, match="same base"):
        (ada - base) + (bob - again)
    with pytest.raises(SutureError, match="same base"):
        (ada - base) + (bob - base).select("q")
    with pytest.raises(SutureError, match="two checkpoints cannot be added"):
        _ = ada + bob
    with pytest.raises(SutureError, match="cannot be added"):
        _ = (ada - base) + 1


def test_a_vector_of_models_that_do_not_fit_is_refused(family: Any, tmp_path: Path) -> None:
    """Every name and shape that differs is told, before anything is read."""
    models = family("f32")
    other = {**models.models["ada"], "more": torch.zeros(1), toy.ZERO: torch.zeros(15)}
    del other["model.norm.weight"]
    base = suture.open(models.base_path)
    odd = suture.open(toy.folder(tmp_path / "odd", other))

    with pytest.raises(MismatchError) as caught:
        odd - base

    for word in ("model.norm.weight", "more", toy.ZERO):
        assert word in str(caught.value)


@given(
    a=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20),
    factor=st.floats(-4, 4),
)
def test_scaling_scales_the_norm(
    a: list[float], factor: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """|c tau| = |c| |tau|, and tau . tau = |tau|^2, for any values."""
    where = tmp_path_factory.mktemp("vector")
    tuned = suture.open(toy.folder(where / "t", {"w": torch.tensor(a, dtype=torch.float32)}))
    base = suture.open(toy.folder(where / "b", {"w": torch.zeros(len(a))}))
    tau: TaskVector = tuned - base

    assert (factor * tau).norm() == pytest.approx(abs(factor) * tau.norm(), rel=1e-9, abs=1e-12)
    assert tau.dot(tau) == pytest.approx(tau.norm() ** 2, rel=1e-9, abs=1e-12)
