"""Merges weighed by statistics: Fisher merging and RegMean are their formulas, paired by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
from suture.edits.stats import Stats
from suture.errors import MismatchError, RecipeError, SutureError
from suture.merges.table import METHODS

NEED_STATS = [name for name, line in METHODS.own.items() if line.example.files]

Array = np.ndarray[Any, Any]
NAMES = ("ada", "bob", "cyd")


@pytest.mark.parametrize("normalize", [False, True])
def test_fisher_merging_is_the_weighted_mean_of_the_models(
    normalize: bool, family: Any, tmp_path: Path
) -> None:
    """Entry by entry, with each model's own Fisher information, by its norm where that is asked for."""
    models = family("f32")
    own = {"bob": {"weight": 2.0}}
    what = toy.recipe(
        "fisher_merging", models.some(*NAMES), models.base_path, own=own, normalize=normalize
    )

    out, report = toy.run(tmp_path / "out", what)

    stats = {n: Stats.load(Path(what["parameters"]["stats"][n])) for n in NAMES}
    names = toy.editable(models.base)
    norms = {n: np.sqrt(sum((s.whole("fisher", k).astype(float) ** 2).sum() for k in names))
             for n, s in stats.items()}  # fmt: skip
    for name in names:
        shares = {
            n: own.get(n, {}).get("weight", 1.0)
            * (
                stats[n].whole("fisher", name).astype(float) / (norms[n] if normalize else 1)
                + 1e-10
            )
            for n in NAMES
        }
        total = sum(shares[n] * models.models[n][name].double().numpy() for n in NAMES)
        np.testing.assert_allclose(
            out[name].numpy(), total / sum(shares.values()), rtol=2e-5, atol=1e-6
        )
    assert len(report.facts["statistics"]) == 3


def linear_models(folder: Path, outputs: int = 70, inputs: int = 12) -> Any:
    """A base and two linear layers, with inputs of their own."""
    draw = np.random.default_rng(0)
    weights = {n: draw.standard_normal((outputs, inputs)) for n in ("base", "a", "b")}
    xs = {
        n: draw.standard_normal((200, inputs)) @ draw.standard_normal((inputs, inputs))
        for n in "ab"
    }
    paths = {n: toy.folder(folder / n, {"fc1.weight": torch.from_numpy(w), "fc1.bias": torch.from_numpy(w[:, 0].copy())})
             for n, w in weights.items()}  # fmt: skip
    files = {}
    for n, x in xs.items():
        files[n] = str(folder / f"{n}.stats.safetensors")
        gram = (x.T @ x / len(x)).astype(np.float32)
        Stats({"gram/fc1.weight": gram}, {}, "").save(Path(files[n]))
    return weights, xs, paths, files


def test_regmean_is_pooled_least_squares(tmp_path: Path) -> None:
    """With ``alpha`` 1 and equal rows: the layer that fits both teachers' outputs on both inputs best."""
    weights, xs, paths, files = linear_models(tmp_path)
    what = toy.recipe("regmean", {n: paths[n] for n in "ab"}, paths["base"], stats=files, alpha=1.0)

    out, _ = toy.run(tmp_path / "out", what)

    x = np.concatenate([xs["a"], xs["b"]])
    y = np.concatenate([xs[n] @ weights[n].T for n in "ab"])
    best = np.linalg.lstsq(x, y, rcond=None)[0].T
    np.testing.assert_allclose(out["fc1.weight"].numpy(), best, rtol=1e-3, atol=1e-3)
    mean = (weights["a"][:, 0] + weights["b"][:, 0]) / 2
    np.testing.assert_allclose(out["fc1.bias"].numpy(), mean, rtol=1e-6, atol=1e-6)
    fit = np.abs(x @ out["fc1.weight"].numpy().T - y).mean()
    average = np.abs(x @ ((weights["a"] + weights["b"]) / 2).T - y).mean()
    assert fit < 0.9 * average


def test_identical_experts_come_back(family: Any, tmp_path: Path) -> None:
    """Three copies of one model merge to it, however they are weighed."""
    models = family("f32")
    for method in ("fisher_merging", "regmean"):
        what = toy.recipe(method, models.some(*NAMES), models.base_path)
        copies = {n: {"path": str(models.paths["bob"])} for n in NAMES}
        out, _ = toy.run(tmp_path / method, {**what, "models": copies})
        for name in toy.editable(models.base):
            torch.testing.assert_close(out[name], models.models["bob"][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", NEED_STATS)
def test_statistics_are_paired_by_name(method: str, family: Any, tmp_path: Path) -> None:
    """A missing, an additional or another model's file is refused; the order of names is not looked at."""
    models = family("f32")
    right = toy.recipe(method, models.some(*NAMES), models.base_path)
    files = right["parameters"]["stats"]

    def refused(stats: Any, match: str, kind: type[SutureError] = RecipeError) -> None:
        parameters = {**right["parameters"], "stats": stats}
        with pytest.raises(kind, match=match):
            toy.run(tmp_path / "out", {**right, "parameters": parameters})
        assert not (tmp_path / "out").exists()

    refused(None, "stats: missing")
    refused({k: v for k, v in files.items() if k != "bob"}, "'bob' has no file")
    refused({**files, "bobb": files["bob"]}, "did you mean 'bob'")
    refused(str(tmp_path), "ada.safetensors", SutureError)
    other = tmp_path / "other.safetensors"
    loaded = Stats.load(Path(files["bob"]))
    Stats({k: loaded.tensors[k] for k in loaded.tensors}, {"model": "00"}, "").save(other)
    refused({**files, "bob": str(other)}, "bob: .* is not the model", MismatchError)
    one, _ = toy.run(tmp_path / "one", right)
    two, _ = toy.run(
        tmp_path / "two",
        {**right, "parameters": {**right["parameters"], "stats": dict(reversed(files.items()))}},
    )
    assert toy.same_bytes(one, two) == []


@pytest.mark.parametrize("method", [*NEED_STATS, "stitch"])
def test_files_about_whole_models_are_refused_beside_slices(
    method: str, family: Any, tmp_path: Path
) -> None:
    """Slices give layers other numbers, so that statistics or masks would meet the wrong ones."""
    models = family("f32")
    more = {"masks": str(tmp_path)} if method == "stitch" else {}
    what = toy.recipe(method, models.some("ada"), models.base_path, **more)
    what["slices"] = [{"sources": {"base": [0, 1], "ada": [0, 1]}}]

    with pytest.raises(RecipeError, match="slices: .* reads files about whole models") as caught:
        toy.run(tmp_path / "out", what)

    assert "missing" not in str(caught.value)


def test_layers_that_read_one_input_share_its_matrix(tmp_path: Path) -> None:
    """Statistics that name the layer whose input another one reads are those of both."""
    draw = np.random.default_rng(1)
    layers = ("k_proj.weight", "q_proj.weight")
    shape, paths, own, shared = (5, 6), {}, {}, {}
    for name in ("base", "a", "b"):
        tensors = {n: torch.from_numpy(draw.standard_normal(shape)) for n in layers}
        paths[name] = toy.folder(tmp_path / name, tensors)
        gram = np.cov(draw.standard_normal((6, 40))).astype(np.float32)
        own[name], shared[name] = (str(tmp_path / f"{name}.{kind}") for kind in ("own", "shared"))
        Stats({f"gram/{n}": gram for n in layers}, {}, "").save(Path(own[name]))
        facts = {"shared": {layers[1]: layers[0]}}
        Stats({f"gram/{layers[0]}": gram}, facts, "").save(Path(shared[name]))

    outs = [
        toy.run(
            tmp_path / kind,
            toy.recipe("regmean", {n: paths[n] for n in "ab"}, paths["base"],
                       stats={n: files[n] for n in "ab"}),
        )[0]
        for kind, files in (("one", own), ("two", shared))
    ]  # fmt: skip

    for name in layers:
        assert torch.equal(outs[0][name], outs[1][name])
        mean = (toy.read(paths["a"])[name] + toy.read(paths["b"])[name]) / 2
        assert (outs[0][name] - mean).abs().max() > 0.01  # no plain average
