"""Each preset does what its source does: a tool run beside it, or the paper's algorithm."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import suture
import toy
from slow import merges as slow
from slow import more_merges as more
from suture.errors import RecipeError
from suture.merges.presets import PRESETS
from suture.merges.table import METHODS
from suture.verbs.merge.documents import read_recipe
from suture.verbs.merge.mergekit_methods import KITS
from toy import Tensors

N = 4000
WEIGHTS = {"ada": 0.7137, "bob": 1.2941, "cyd": -0.4173}
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="PEFT is not installed"
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path], Any]:
    """A base of zeros, so that the merged delta is what is written, and three float32 models."""
    where = tmp_path_factory.mktemp("presets")
    shapes = {"v": (301,), "w": (40, N // 40), "model.embed_tokens.weight": (20, 10)}
    base = {n: torch.zeros(s) for n, s in shapes.items()}
    models = {}
    common = torch.Generator().manual_seed(9)
    shared = {n: torch.randn(s, generator=common) for n, s in shapes.items()}
    for seed, model in enumerate(WEIGHTS):
        draw = torch.Generator().manual_seed(seed)
        models[model] = {n: x + torch.randn(x.shape, generator=draw) for n, x in shared.items()}
    paths = {m: toy.folder(where / m, t) for m, t in models.items()}
    return toy.folder(where / "base", base), paths, models


def follow(preset: str, large: Any, out: Path, **parameters: Any) -> Tensors:
    """The merged delta of all models, with uneven weights."""
    base, paths, _ = large
    weighs = "weight" in METHODS[PRESETS[preset].method].parameters
    models = {m: {"path": str(p), **({"weight": WEIGHTS[m]} if weighs else {})}
              for m, p in paths.items()}  # fmt: skip
    what = {"base": str(base), "models": models, "preset": preset, "parameters": parameters}
    return toy.run(out, what)[0]


def test_every_preset_is_a_recipe_of_its_method() -> None:
    """Its parameters exist and are in range, and the recipe that names it needs nothing else."""
    for preset in PRESETS.values():
        models = {m: f"./{m}" for m in WEIGHTS}
        recipe = read_recipe({"base": "./base", "models": models, "preset": preset.name})

        assert recipe.method is METHODS[preset.method]
        assert recipe.parameters == preset.parameters
        assert preset.source


def test_what_a_recipe_says_itself_wins() -> None:
    """A preset gives defaults: parameters, models' own and the space stand above it."""
    models = {"a": {"path": "./a", "density": 0.9}, "b": "./b"}
    recipe = read_recipe({"base": "./base", "models": models, "preset": "ties-mergekit",
                          "method": "ties", "parameters": {"scale": 0.5, "scope": "layer"},
                          "space": {"exclude": ["head"]}})  # fmt: skip

    resolved = recipe.resolved()
    assert resolved["parameters"]["scope"] == "layer"
    assert resolved["parameters"]["aggregate"] == "weighted_mean"
    assert resolved["parameters"]["scale"] == 0.5
    assert [s.default for s in recipe.settings["density"].scalars] == [0.9, 1.0]
    assert recipe.space.exclude == ("head",)


@pytest.mark.parametrize(
    ("more_keys", "wanted"),
    [
        ({"preset": "ties-papre"}, ["no preset 'ties-papre'", "'ties-paper'"]),
        ({"preset": "ties-paper", "method": "linear"}, ["ties-paper", "one of ties", "'linear'"]),
        ({"preset": "ties-paper", "parameters": {"densty": 1}}, ["'densty'", "'density'"]),
    ],
)
def test_a_wrong_preset_is_refused(more_keys: Any, wanted: list[str]) -> None:
    """An unknown name, another method's preset, and a misspelt parameter beside it."""
    with pytest.raises(RecipeError) as caught:
        read_recipe({"base": "./base", "models": {"a": "./a"}, **more_keys})

    assert all(word in str(caught.value) for word in wanted), str(caught.value)


def test_python_takes_presets(large: Any, tmp_path: Path) -> None:
    """``merge(preset=...)`` is the recipe's key."""
    place, paths, _ = large
    base = suture.open(place)
    models = {m: suture.open(p) for m, p in paths.items()}

    merged = suture.merge(base, models, preset="ties-paper", weight=WEIGHTS)
    suture.save(merged, tmp_path / "python")

    assert merged.recipe.method.name == "ties"
    recipe = follow("ties-paper", large, tmp_path / "recipe")
    assert toy.same_bytes(toy.read(tmp_path / "python"), recipe) == []


@pytest.mark.parametrize("name", [n for n in PRESETS if n.endswith("-mergekit")])
def test_mergekit_s_presets_are_its_recipes(name: str) -> None:
    """The same parameters as the mergekit recipe that says nothing; that one is run beside it."""
    preset = PRESETS[name]
    kit = KITS[preset.method]
    own = {"weight": 1.0} if "weight" in kit.own else {}
    theirs = read_recipe({
        "merge_method": preset.method, "base_model": "./base",
        "models": [{"model": f"./{m}", "parameters": own} for m in WEIGHTS],
    })  # fmt: skip
    ours = read_recipe({"base": "./base", "models": {m: f"./{m}" for m in WEIGHTS}, "preset": name})

    assert ours.settings.keys() == theirs.settings.keys()
    for key, value in theirs.settings.items():
        mine = ours.settings[key]
        if METHODS[preset.method].parameters[key].per_model:
            assert mine.at("x", len(WEIGHTS)) == value.at("x", len(WEIGHTS)), key
        elif METHODS[preset.method].parameters[key].per_tensor:
            assert mine.at("x") == value.at("x"), key
        else:
            assert mine == value, key
    assert ours.space == theirs.space


# ------------------------------------------------------------------------------------- PEFT


def peft_s(name: str) -> Callable[..., torch.Tensor]:
    from peft.utils import merge_utils

    return getattr(merge_utils, name)  # type: ignore[no-any-return]


@needs_peft
@pytest.mark.oracle
@pytest.mark.parametrize("density", [0.2, 0.73])
def test_ties_peft_is_peft_s(density: float, large: Any, tmp_path: Path) -> None:
    """Trim by tensor, vote without weights, divide by the count: PEFT's own function agrees."""
    out = follow("ties-peft", large, tmp_path / "out", density=density)

    for name, found in out.items():
        deltas = [tensors[name] for tensors in large[2].values()]
        wanted = peft_s("ties")(deltas, torch.tensor(list(WEIGHTS.values())), density)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@needs_peft
@pytest.mark.oracle
@pytest.mark.parametrize("name", ["dare-peft", "dare-ties-peft"])
def test_dare_peft_has_peft_s_statistics(name: str, large: Any, tmp_path: Path) -> None:
    """Mean, spread and share of zeros agree within sampling error; each kept entry is exact."""
    density = 0.6
    out = follow(name, large, tmp_path / "out", density=density)["w"].double()
    deltas = [tensors["w"] for tensors in large[2].values()]
    torch.manual_seed(0)
    with_name = {"dare-peft": "dare_linear", "dare-ties-peft": "dare_ties"}[name]
    wanted = peft_s(with_name)(deltas, torch.tensor(list(WEIGHTS.values())), density).double()

    spread = float(wanted.std())
    assert abs(float((out - wanted).mean())) < 6 * spread * math.sqrt(2 / N)
    assert abs(float(out.std()) / spread - 1) < 6 * math.sqrt(2 / N)
    zeros = [float((x == 0).double().mean()) for x in (out, wanted)]
    assert abs(zeros[0] - zeros[1]) < 6 * math.sqrt(0.25 * 2 / N)


# ------------------------------------------------------------------------- papers and MergeBench


def deltas_of(large: Any) -> dict[str, dict[str, Any]]:
    names = ["v", "w"]  # by default embeddings stay
    return {m: {n: t[n].double().reshape(-1).numpy() for n in names} for m, t in large[2].items()}


def shares(value: float) -> slow.Shares:
    return lambda name: [value] * len(WEIGHTS)


def one(value: float) -> Callable[[str], float]:
    return lambda name: value


SHAPES = {"v": (301,), "w": (40, N // 40)}
W: slow.Shares = lambda name: list(WEIGHTS.values())  # noqa: E731
PAPERS: dict[str, Callable[[Any], Mapping[str, Any]]] = {
    "ties-paper": lambda d: slow.ties(d, W, shares(0.2), one(1.0), zero_sign="majority"),
    "dare-paper": lambda d: slow.dare_linear(d, W, shares(0.1), one(1.0)),
    "dare-ties-paper": lambda d: slow.dare_ties(d, W, shares(0.1), one(1.0)),
    "della-paper": lambda d: more.voted(
        more.magprune(d, SHAPES, shares(0.7), shares(0.07), 0, "probability"), W, one(1.1)),
    "breadcrumbs-paper": lambda d: more.breadcrumbs(
        d, W, shares(0.14), shares(0.01), one(0.3)),
    "consensus-paper": lambda d: slow.consensus(d, W, shares(0.4), one(1.0), min_tasks=2),
    "stitch-paper": lambda d: slow.stitch(d, W, shares(0.05), one(1.0)),
    "sce-paper": lambda d: more.sce(d, one(0.1), one(1.0)),
    "model-stock-paper": lambda d: more.model_stock(d, SHAPES, one(1.0)),
    "mergebench-soup": lambda d: slow.linear(d, W),
    "mergebench-task-arithmetic": lambda d: slow.task_arithmetic(d, W, one(0.4)),
    "mergebench-ties": lambda d: slow.ties(
        d, W, shares(0.3), one(0.4), aggregate="sum", zero_sign="majority"),
    "mergebench-dare": lambda d: slow.dare_linear(d, W, shares(0.1), one(0.4)),
    "mergebench-consensus": lambda d: slow.consensus(d, W, shares(0.2), one(0.4), min_tasks=2),
    "mergebench-stitch": lambda d: slow.stitch(d, W, shares(0.1), one(1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PAPERS))
def test_a_paper_s_preset_is_its_algorithm(name: str, large: Any, tmp_path: Path) -> None:
    """With the paper's numbers written out, the slow twin gives the same tensors."""
    out = follow(name, large, tmp_path / "out")

    for tensor, wanted in PAPERS[name](deltas_of(large)).items():
        found = out[tensor].double().reshape(-1).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
        assert np.abs(found).max() > 0
    assert not out["model.embed_tokens.weight"].any() or name == "mergebench-soup"


def test_every_preset_is_proven() -> None:
    """By its paper's algorithm, by PEFT, or by mergekit."""
    led = {"led-paper", "led-released", "led-released-head"}  # tests/test_led.py
    proven = {*PAPERS, "ties-peft", "dare-peft", "dare-ties-peft", *led}
    assert proven | {n for n in PRESETS if n.endswith("-mergekit")} == PRESETS.keys()
