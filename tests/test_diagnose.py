"""What theory says of a merge: against quadratics, where all is known, and against autograd."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.func import functional_call

import making
import suture
import tiny_model
from suture.analysis.geometry import cosines, gap_bound, squared_distance
from suture.analysis.loss_curves import Convex, Field, Looks, diagnose, dot, norm, top_curvature
from suture.analysis.theory import barrier_of
from suture.errors import NonFiniteError, RecipeError
from suture.evals.walk import Walk, classes
from suture.training.data import Dataset, tokenise
from suture.training.measure import OBJECTIVES, Objective
from suture.training.models import Classifier, Head, load_encoder, save_head, save_model

Array = np.ndarray[Any, Any]
DIM = 12
ROWS = Dataset(((1, 0), (2, 0), (3, 0), (4, 0)), (0, 0, 0, 0), 0)
"""Four rows; the first token of each is the place of its minimum."""
QUADRATIC = Objective(
    "quadratic", lambda model, batch: model(batch.input_ids, batch.attention_mask),
    lambda values, batch: values, OBJECTIVES["causal"].labellings, labelled=False,
)  # fmt: skip


class Quadratic(nn.Module):
    """The loss of a row is ``1/2 (w - c_row)' A (w - c_row)``; ``w`` lies in two tensors."""

    def __init__(self, matrix: Array, minima: Array) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(DIM // 3, dtype=torch.float64))
        self.two = nn.Parameter(torch.zeros(2, DIM // 3, dtype=torch.float64))
        self.matrix, self.minima = torch.from_numpy(matrix), torch.from_numpy(minima)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        off = torch.cat([self.one, self.two.reshape(-1)]) - self.minima[ids[:, 0] - 1]
        return 0.5 * torch.einsum("ri,ij,rj->r", off, self.matrix, off)


def cut(vector: Array) -> dict[str, Array]:
    """A vector as the two tensors."""
    vector = vector.astype(np.float32)
    return {"one": vector[: DIM // 3], "two": vector[DIM // 3 :].reshape(2, DIM // 3)}


def symmetric(draw: np.random.Generator, values: Array) -> Array:
    """A symmetric matrix with these eigenvalues."""
    turned, _ = np.linalg.qr(draw.normal(size=(DIM, DIM)))
    return np.asarray(turned @ np.diag(values) @ turned.T)


SPECTRA = {
    "convex": np.linspace(0.1, 4.0, DIM),
    "saddle": np.array([-6.0, -2.0, *np.linspace(0.1, 3.0, DIM - 2)]),
    "summit": -np.linspace(1.0, 5.0, DIM),
    "flat": np.zeros(DIM),
}


@pytest.mark.parametrize("kind", SPECTRA)
def test_everything_is_right_on_a_quadratic(kind: str) -> None:
    """Gradient, slope, curvature, secants, gap, bounds and barrier have their closed forms."""
    draw = np.random.default_rng(3)
    matrix, minima = symmetric(draw, SPECTRA[kind]), draw.normal(size=(4, DIM))
    tau, way = (draw.normal(size=DIM).astype(np.float32).astype(np.float64) for _ in range(2))
    model = Quadratic(matrix, minima)
    looks = Looks(iterations=800, tolerance=1e-7, directions=6, batch=3)

    found, line = diagnose(
        Walk(model, [cut(tau), cut(way)]), "m", ROWS, objective=QUADRATIC, looks=looks
    )

    def loss(at: Array) -> float:
        return float(np.mean([0.5 * (at - c) @ matrix @ (at - c) for c in minima]))

    gradient = matrix @ (tau - minima.mean(0))
    close: Callable[[float], Any] = lambda x: pytest.approx(x, rel=1e-5, abs=1e-9)  # noqa: E731
    assert found.rows == 4
    assert found.base_loss == close(loss(np.zeros(DIM)))
    assert found.expert_loss == close(loss(tau))
    assert found.merged_loss == close(loss(tau + way))
    assert found.gradient_norm == close(float(np.linalg.norm(gradient)))
    assert found.slope == close(float(gradient @ way))
    assert found.distance == close(float(np.linalg.norm(way)))
    assert found.gap == close(loss(tau + way) - loss(tau))
    assert found.smoothness.curvature == close(float(SPECTRA[kind].max()))
    assert found.smoothness.residual < 1e-3
    along = float(way @ matrix @ way / (way @ way))
    assert [s.at for s in found.smoothness.secants] == [0.25, 0.5, 1.0]
    assert all(s.value == close(along) for s in found.smoothness.secants)
    assert found.smoothness.random is not None
    assert found.smoothness.random <= SPECTRA[kind].max() + 1e-9
    assert found.bounds["secant"] == close(found.gap)
    assert found.bounds["curvature"] >= found.gap - 1e-9
    middle = -along * float(way @ way) / 8  # of a parabola, against its chord
    assert found.barrier == pytest.approx(max(0.0, middle), rel=1e-4, abs=1e-9)
    assert [p.x for p in line.points] == pytest.approx(np.linspace(0, 1, 11))
    assert all(p.value == close(loss(tau + p.x * way)) for p in line.points)
    assert all(float(p.detach().abs().max()) == 0.0 for p in model.parameters()), (
        "it is back at the base"
    )


def test_the_bounds_of_the_theory_hold_where_its_conditions_do() -> None:
    """Three tasks with minima at their experts: no gap exceeds its exact bound, nor that the closed
    form, for random convex factors and a known L."""
    draw = np.random.default_rng(5)
    taus = [draw.normal(size=DIM).astype(np.float32).astype(np.float64) for _ in range(3)]
    gram = np.array([[a @ b for b in taus] for a in taus])
    cosine = cosines(gram) - np.eye(3)
    largest, epsilon = float(np.diag(gram).max()), float(np.abs(cosine).max())
    for _ in range(5):
        weights = draw.dirichlet(np.ones(3))
        for i, tau in enumerate(taus):
            matrix = symmetric(draw, np.linspace(0.05, 2.0, DIM))
            walk = Walk(
                Quadratic(matrix, np.tile(tau, (4, 1))),
                [cut(tau), cut(sum(w * t for w, t in zip(weights, taus, strict=True)) - tau)],
            )
            found, _ = diagnose(
                walk, "m", ROWS, objective=QUADRATIC, looks=Looks(iterations=500, directions=1),
                convex=Convex(float(weights[i]), largest, epsilon),
            )  # fmt: skip
            assert found.distance**2 == pytest.approx(squared_distance(gram, weights, i), rel=1e-5)
            exact = gap_bound(gram, weights, i, found.smoothness.curvature, found.slope)
            assert found.bounds["curvature"] == pytest.approx(exact, rel=1e-5)
            assert found.addition_bounds is not None
            assert (
                found.gap <= exact * (1 + 1e-6) <= found.addition_bounds["curvature"] * (1 + 1e-5)
            )
            assert found.gradient_norm < 1e-6


def test_a_merge_that_is_the_expert_has_no_way() -> None:
    """No secant, no random direction, no division by zero."""
    model = Quadratic(np.eye(DIM), np.zeros((4, DIM)))
    found, _ = diagnose(
        Walk(model, [cut(np.ones(DIM)), cut(np.zeros(DIM))]), "m", ROWS, objective=QUADRATIC
    )

    assert (found.distance, found.gap, found.barrier) == (0.0, 0.0, 0.0)
    assert found.smoothness.secants == ()
    assert found.smoothness.random is None
    assert found.bounds == {"curvature": 0.0}


def test_a_barrier_is_what_exceeds_the_chord() -> None:
    """Convex losses have none."""
    assert barrier_of([1.0, 3.0, 2.0]) == 1.5
    assert barrier_of([1.0, 0.0, 2.0]) == 0.0


def networks() -> dict[str, tuple[nn.Module, Dataset, Objective]]:
    """An encoder with a head, one whose features are normalised, and a causal language model."""
    rows = tiny_model.rows(10)
    labels = ("colour", "sky")
    data = tokenise(rows, tiny_model.tokenizer(), labels=labels, max_length=8)
    texts = tokenise(rows, tiny_model.tokenizer(), max_length=8)
    weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    found: dict[str, tuple[nn.Module, Dataset, Objective]] = {
        "causal": (tiny_model.language_model(), texts, OBJECTIVES["causal"])
    }
    for cosine in (False, True):
        model = Classifier(tiny_model.encoder(), Head(labels, weight, torch.zeros(2), cosine))
        name = "cosine" if cosine else "classifier"
        found[name] = (model, data, OBJECTIVES["classification"])
    return found


@pytest.mark.parametrize("kind", ["classifier", "cosine", "causal"])
def test_gradient_and_curvature_are_those_of_autograd(kind: str) -> None:
    """Against the whole matrix of second derivatives of all biases, made by another way."""
    model, data, objective = networks()[kind]
    model = model.double().eval()
    body = next(m for m in model.modules() if hasattr(m, "base_model_prefix"))
    parameters = {n: p for n, p in body.named_parameters() if n.endswith("bias")}
    own = {id(p): n for n, p in model.named_parameters()}
    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
    (batch,) = data.batches(len(data))

    def loss(values: Tensor) -> Tensor:
        parts = values.split([p.numel() for p in parameters.values()])
        put = {own[id(p)]: v.view_as(p) for p, v in zip(parameters.values(), parts, strict=True)}
        logits = functional_call(model, put, (batch.input_ids, batch.attention_mask))
        return objective.losses(logits, batch).mean()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, flat).numpy()
    (slope,) = torch.autograd.grad(loss(flat.requires_grad_()), flat)
    field = Field(model, parameters, data, objective, batch=4)
    looks = Looks(iterations=3000, tolerance=1e-6)

    value, gradient = field.gradient()
    direction = field.drawn(3, 2.0)
    curvature, residual, _ = top_curvature(field, looks)

    joined = torch.cat([g.reshape(-1) for g in gradient.values()])
    torch.testing.assert_close(joined, slope, rtol=1e-8, atol=1e-10)
    assert value == pytest.approx(float(loss(flat).detach()), rel=1e-10)
    moved = torch.cat([g.reshape(-1) for g in field.curve(direction).values()]).numpy()
    ahead = torch.cat([g.reshape(-1) for g in direction.values()]).numpy()
    np.testing.assert_allclose(moved, hessian @ ahead, rtol=1e-7, atol=1e-10)
    assert norm(direction) == pytest.approx(2.0)
    assert dot(direction, direction) == pytest.approx(4.0)
    assert curvature == pytest.approx(float(np.linalg.eigvalsh(hessian)[-1]), rel=1e-4)
    assert residual < 1e-2


def test_a_loss_that_is_no_number_is_refused() -> None:
    """Before anything is made of it; rows and labels are asked for, too."""
    model = Quadratic(np.full((DIM, DIM), np.nan), np.zeros((4, DIM)))
    walk = Walk(model, [cut(np.ones(DIM)), cut(np.ones(DIM))])
    with pytest.raises(NonFiniteError, match="mean loss is nan"):
        diagnose(walk, "m", ROWS, objective=QUADRATIC)
    with pytest.raises(RecipeError, match="there are no rows"):
        diagnose(walk, "m", Dataset((), (), 0), objective=QUADRATIC)
    bare = Dataset(ROWS.ids, (-1,) * 4, 0)
    with pytest.raises(RecipeError, match="4 of 4 rows have no label"):
        diagnose(walk, "m", bare)


# -- from the command line -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, two models near it, heads, rows."""
    folder = tmp_path_factory.mktemp("shop")
    tiny_model.folder(folder / "base")
    for number, name in enumerate(("one", "two")):
        loaded = load_encoder(folder / "base", dtype=torch.float32)
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for n, p in loaded.model.backbone.named_parameters():
                if "embeddings" not in n:
                    p.add_(0.02 * torch.randn(p.shape, generator=draw))
        save_model(loaded.model, loaded.tokenizer, folder / name)
        head = Head(("colour", "sky"), torch.randn(2, 16, generator=draw), torch.zeros(2))
        save_head(head, folder / f"{name}-head.safetensors")
    rows = [{"text": r.text, "label": r.label} for r in tiny_model.rows(20)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe(shop: Path, name: str, **more: Any) -> Path:
    entry = {"data": "rows.jsonl", "max_length": 16}
    found = {
        "base": "base", "models": {"one": "one", "two": "two"}, "analyses": ["diagnostics"],
        "tasks": {m: {**entry, "head": f"{m}-head.safetensors"} for m in ("one", "two")}, **more,
    }  # fmt: skip
    (shop / name).write_text(yaml.safe_dump(found))
    return shop / name


def test_analyze_diagnoses_a_merge(shop: Path, tmp_path: Path) -> None:
    """By factors and by a merged model: the same numbers; losses are those of the folders."""
    how = {"iterations": 5, "directions": 2, "dtype": "float64"}
    weights = {"one": 0.3, "two": 0.7}
    plan = {"base": str(shop / "base"), "method": "task_arithmetic",
            "models": {m: {"path": str(shop / m), "weight": w} for m, w in weights.items()}}  # fmt: skip
    suture.merge_recipe(plan, tmp_path / "merged")  # type: ignore[attr-defined]
    found = {}
    for kind, which in (
        ("factors", {"weights": weights}),
        ("folder", {"merged": str(tmp_path / "merged")}),
    ):
        where = recipe(shop, f"{kind}.yaml", diagnostics={**how, **which})
        said = making.invoke("analyze", where, "-o", tmp_path / kind)
        assert said.code == 0, said.err
        making.lines_of(said.out, "one: loss ", "gap ", "barrier ")
        found[kind] = json.loads((tmp_path / kind / "analysis.json").read_text())["diagnostics"]

    for one, other in zip(found["factors"]["models"], found["folder"]["models"], strict=True):
        for key in ("base_loss", "expert_loss", "merged_loss", "gradient_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)
        assert one["gap"] == pytest.approx(other["gap"], rel=1e-3)
        assert one["bounds"]["curvature"] == pytest.approx(other["bounds"]["curvature"], rel=1e-2)
        assert other["addition_bounds"] is None
        assert one["addition_bounds"]["curvature"] > 0
        assert len(one["smoothness"]["secants"]) == 3
    rows = tiny_model.rows(20)
    for number, name in enumerate(("one", "two")):
        for key, folder in (("merged_loss", tmp_path / "merged"), ("expert_loss", shop / name),
                            ("base_loss", shop / "base")):  # fmt: skip
            loaded = load_encoder(folder, dtype=torch.float32)
            head = suture.training.models.load_head(shop / f"{name}-head.safetensors")  # type: ignore[attr-defined]
            data = tokenise(rows, loaded.tokenizer, labels=head.labels, max_length=16)
            (batch,) = data.batches(20)
            logits = Classifier(loaded.model, head)(batch.input_ids, batch.attention_mask)
            true = float(nn.functional.cross_entropy(logits, batch.labels).detach())
            assert found["factors"]["models"][number][key] == pytest.approx(true, rel=1e-5)
    record = json.loads((tmp_path / "factors" / "analysis.json").read_text())
    again = making.invoke(
        "analyze",
        write(tmp_path / "factors" / "again.yaml", record["request"]),
        "-o",
        tmp_path / "again",
    )
    assert again.code == 0, again.err
    repeated = json.loads((tmp_path / "again" / "analysis.json").read_text())["diagnostics"]
    assert repeated == found["factors"]


def write(path: Path, what: Any) -> Path:
    path.write_text(yaml.safe_dump(what))
    return path


def test_language_models_are_diagnosed_without_a_head(shop: Path, tmp_path: Path) -> None:
    """The plain average by default, on a part of the models; at most so many rows are read."""
    for number, name in enumerate(("base", "tuned", "other")):
        save_model(tiny_model.language_model(number), tiny_model.tokenizer(), tmp_path / name)
    what = {
        "base": "base", "models": {"m": "tuned", "o": "other"},
        "tasks": {"m": {"data": str(shop / "rows.jsonl"), "kind": "causal", "max_length": 8}},
        "diagnostics": {"rows": 7, "iterations": 2, "directions": 0, "points": 3},
    }  # fmt: skip

    said = making.invoke(
        "analyze", write(tmp_path / "r.yaml", what), "-o", tmp_path / "out", "--json"
    )

    assert said.code == 0, said.err
    found = said.json["diagnostics"]
    assert found["merge"] == {"weights": {"m": 0.5, "o": 0.5}}
    assert [m["model"] for m in found["models"]] == ["m"]
    assert found["models"][0]["rows"] == 7
    assert [p["x"] for p in found["line"]["series"][0]["points"]] == [0, 0.5, 1]
    assert math.isfinite(found["models"][0]["smoothness"]["curvature"])


def test_what_cannot_be_diagnosed_is_told_at_once(shop: Path, tmp_path: Path) -> None:
    """Words, numbers, rows, labels: one message, nothing written."""
    (shop / "bare.jsonl").write_text('{"text": "red sun"}\n')
    where = recipe(
        shop, "wrong.yaml",
        tasks={"one": {"data": "bare.jsonl", "head": "one-head.safetensors"},
               "two": {"data": "none.jsonl", "head": "two-head.safetensors"}, "six": {"data": "x"}},
        diagnostics={"rows": 0, "points": 1, "weights": {"one": "a", "tow": 1}, "dtype": "int8",
                     "merged": "nowhere", "step": 1}, device=3,
    )  # fmt: skip

    said = making.invoke("analyze", where, "-o", tmp_path / "out")

    assert said.code == 2
    making.lines_of(
        said.err, "diagnostics.rows: a whole number from 1", "diagnostics.points", "weights.one: a number",
        "known: float32, float64", "nowhere: no such file", "unknown key 'step'", "no column 'label'",
        "none.jsonl", "device: a word",
    )  # fmt: skip
    names = recipe(
        shop, "names.yaml", tasks={"one": {"data": "rows.jsonl", "head": "one-head.safetensors"},
                                   "six": {"data": "rows.jsonl", "head": "two-head.safetensors"}},
        diagnostics={"weights": {"one": 1, "tow": 1}},
    )  # fmt: skip
    said_names = making.invoke("analyze", names, "-o", tmp_path / "out")
    making.lines_of(said_names.err, "no model 'tow'; did you mean 'two'?", "no model 'six'")
    assert not list(tmp_path.iterdir())
    alone = making.invoke("analyze", recipe(shop, "none.yaml", tasks=None), "-o", tmp_path / "out")
    assert alone.code == 2
    assert "diagnostics run the model; give rows" in alone.err


def test_a_loss_that_is_nan_writes_nothing(shop: Path, tmp_path: Path) -> None:
    """The model at fault is named."""
    head = Head(("colour", "sky"), torch.full((2, 16), float("nan")), torch.zeros(2))
    save_head(head, shop / "broken-head.safetensors")
    entry = {"data": "rows.jsonl", "head": "broken-head.safetensors"}
    where = recipe(shop, "nan.yaml", tasks={"two": entry})

    said = making.invoke("analyze", where, "-o", tmp_path / "out")

    assert said.code == 2
    making.lines_of(said.err, "mean loss is nan", "while diagnosing two")
    assert not list(tmp_path.iterdir())


def test_rows_go_to_where_the_weights_are() -> None:
    """Classes are asked for on the model's own device; here one that only knows shapes."""

    class Far(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1, device="meta"))

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            assert {ids.device.type, mask.device.type} == {"meta"}
            return torch.eye(3)[: ids.shape[0]]

    data = Dataset(((1, 2), (3, 4), (5, 6)), (0, 1, 2), 0)
    assert classes(Far(), data.batches(3)).tolist() == [0, 1, 2]
