"""mergekit's recipes give mergekit's tensors: both are run on the same files and compared.

mergekit 0.1.5 runs in a process of its own, once for all recipes. Inputs are float32, so that no
two magnitudes are tied (mergekit's sort is not stable), and the output is bfloat16.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
from toy import Tensors

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        importlib.util.find_spec("mergekit") is None, reason="mergekit is not installed"
    ),
]

HIDDEN, INNER, WORDS, LAYERS = 32, 48, 64, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": WORDS, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "hidden_act": "silu",
    "max_position_embeddings": 64, "torch_dtype": "float32",
}  # fmt: skip
MODELS = ("base", "ada", "bob", "cyd")
NARROW = {"ada16": ("ada", torch.bfloat16), "bob16": ("bob", torch.float16)}
"""Models of other dtypes, and what they are copies of."""


def llama(seed: int) -> Tensors:
    """A base (seed 0), or what some training made of it."""
    shapes = {"model.embed_tokens.weight": (WORDS, HIDDEN), "lm_head.weight": (WORDS, HIDDEN),
              "model.norm.weight": (HIDDEN,)}  # fmt: skip
    for n in range(LAYERS):
        shapes |= {
            f"model.layers.{n}.{part}.weight": shape
            for part, shape in {
                "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
                "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
                "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
                "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
            }.items()
        }  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    if seed == 0:
        return base
    draw = torch.Generator().manual_seed(seed)
    return {n: t + 0.002 * torch.randn(t.shape, generator=draw) for n, t in base.items()}


def given(weights: Mapping[str, Mapping[str, Any]], base: bool = False) -> list[dict[str, Any]]:
    """The ``models`` of a recipe; mergekit wants the base among them without parameters, or not."""
    found: list[dict[str, Any]] = [{"model": "base"}] if base else []
    return found + [{"model": name, "parameters": dict(own)} for name, own in weights.items()]


def cut(
    *sources: tuple[str, int, int] | tuple[str, int, int, dict[str, Any]], **parameters: Any
) -> dict[str, Any]:
    """One of the ``slices`` of a recipe: models, their layers and parameters."""
    found = []
    for name, start, stop, *own in sources:
        entry = {"model": name, "layer_range": [start, stop]}
        found.append({**entry, "parameters": own[0]} if own else entry)
    return {"sources": found, "parameters": parameters} if parameters else {"sources": found}


def merge(
    method: str, models: list[dict[str, Any]], base: str | None = "base", **parameters: Any
) -> dict[str, Any]:
    """A recipe of whole models."""
    found: dict[str, Any] = {"merge_method": method, "models": models, "parameters": parameters}
    return found if base is None else {**found, "base_model": base}


def stack(
    method: str, *slices: dict[str, Any], base: str | None = None, **parameters: Any
) -> dict[str, Any]:
    """A recipe of slices."""
    found: dict[str, Any] = {
        "merge_method": method,
        "slices": list(slices),
        "parameters": parameters,
    }
    return found if base is None else {**found, "base_model": base}


def when(*conditions: tuple[str, Any], otherwise: Any = None) -> list[dict[str, Any]]:
    """Conditions on names, with a value for the rest."""
    found: list[dict[str, Any]] = [{"filter": word, "value": value} for word, value in conditions]
    return found if otherwise is None else [*found, {"value": otherwise}]


EVEN = {name: {"weight": 1.0} for name in MODELS[1:]}
CROOKED = {"ada": {"weight": 0.7137}, "bob": {"weight": 1.2941}, "cyd": {"weight": -0.4173}}
DENSE = {
    "ada": {"weight": 0.7137, "density": 0.5},
    "bob": {"weight": 0.3173, "density": 0.1},
    "cyd": {"weight": 1.1, "density": 0.93},
}

PLAIN: dict[str, dict[str, Any]] = {"ada": {}, "bob": {}, "cyd": {}}
PAIR = {"ada": {"weight": 0.3}, "bob": {"weight": 0.9}}

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": given(EVEN)},
    "linear, crooked": {"merge_method": "linear", "models": given(CROOKED)},
    "linear, not normalized": {
        "merge_method": "linear", "models": given(CROOKED), "parameters": {"normalize": False}},
    "task arithmetic": {
        "merge_method": "task_arithmetic", "base_model": "base", "models": given(CROOKED)},
    "task arithmetic, lambda": {
        "merge_method": "task_arithmetic", "base_model": "base", "models": given(EVEN, base=True),
        "parameters": {"lambda": 0.3173}},
    "task arithmetic, normalized": {
        "merge_method": "task_arithmetic", "base_model": "base", "models": given(CROOKED),
        "parameters": {"normalize": True, "lambda": 0.7}},
    "ties": {
        "merge_method": "ties", "base_model": "base", "models": given(DENSE),
        "parameters": {"normalize": True}},
    "ties, one density": {
        "merge_method": "ties", "base_model": "base", "models": given(EVEN, base=True),
        "parameters": {"density": 0.2, "int8_mask": True}},
    "ties, not normalized": {
        "merge_method": "ties", "base_model": "base", "models": given(DENSE),
        "parameters": {"normalize": False, "lambda": 0.7137}},
    "ties, negative weight": {
        "merge_method": "ties", "base_model": "base", "models": given(CROOKED),
        "parameters": {"density": 0.4, "lambda": 1.3}},
    "ties, everything": {
        "merge_method": "ties", "base_model": "base", "models": given(CROOKED)},
    "ties, next to nothing": {
        "merge_method": "ties", "base_model": "base", "models": given(EVEN),
        "parameters": {"density": 0.0001}},
    "ties, one model": {
        "merge_method": "ties", "base_model": "base", "models": given({"ada": {"weight": 0.7}}),
        "parameters": {"density": 0.3}},
    "slerp": {
        "merge_method": "slerp", "base_model": "base", "models": given({"base": {}, "ada": {}}),
        "parameters": {"t": 0.3}},
    "slerp, the other end": {
        "merge_method": "slerp", "base_model": "bob", "models": given({"ada": {}, "bob": {}}),
        "parameters": {"t": 0.85}},
    # gradients
    "linear, gradients": merge("linear", given({"ada": {"weight": [0, 1]}, "bob": {"weight": [1, 0.25, 0.5]}}), None),
    "linear, base with a weight for all": merge("linear", given({"ada": {}, "bob": {}}), weight=0.7),
    "linear, base of its own weight": merge("linear", given({"base": {"weight": 0.3}, "bob": {"weight": [0.2, 1.4]}})),
    "linear, one point": merge("linear", given({"ada": {"weight": [0.4]}, "bob": {"weight": 1}}), None),
    "task arithmetic, gradient of lambda": merge("task_arithmetic", given(CROOKED), **{"lambda": [0.1, 0.9, 0.3]}),
    "task arithmetic, gradients": merge("task_arithmetic", given({"ada": {"weight": [0, 0.7, 1]}, "bob": {"weight": [1, 0, 0, 0, -1]}})),
    "ties, gradients": merge("ties", given({"ada": {"weight": [0.2, 1], "density": [0.1, 0.9]}, "bob": {"weight": 0.4, "density": [0.8, 0.3, 0.1]}})),
    "ties, gradient for all": merge("ties", given(EVEN), density=[0.1, 0.7, 0.3], normalize=True),
    "slerp, gradient": merge("slerp", given({"base": {}, "ada": {}}), t=[0, 0.5, 0.3, 0.7, 1]),
    "passthrough, gradient": merge("passthrough", given({"ada": {"scale": [0.5, 2]}}), None),
    # filters
    "slerp, filters with gradients": merge("slerp", given({"base": {}, "bob": {}}), t=when(("self_attn", [0, 0.5, 0.3, 0.7, 1]), ("mlp", [1, 0.5, 0.7, 0.3, 0]), otherwise=0.45)),
    "linear, filters": merge("linear", given({"ada": {"weight": when(("q_proj", 0.1), ("mlp", 2), otherwise=0.6)}, "bob": {"weight": 1}}), None),
    "linear, a star": merge("linear", given({"ada": {"weight": [{"filter": "norm", "value": 0.2}, {"filter": "*", "value": 0.9}]}, "bob": {"weight": 1}}), None),
    "linear, one condition": merge("linear", given({"ada": {"weight": {"value": 0.3}}, "bob": {"weight": 1}}), None),
    "ties, filters fall through": merge("ties", given({"ada": {"weight": when(("mlp", 0.2))}, "bob": {"weight": 0.4, "density": when(("attn", [0.2, 0.8]))}}), weight=0.9, density=when(("down_proj", 0.1), otherwise=0.6)),
    "task arithmetic, filter of lambda": merge("task_arithmetic", given(CROOKED), **{"lambda": when(("layers.1.", 0.2), ("lm_head", 1.7), otherwise=[0.4, 0.8])}),
    "ties, filter of the embedding": merge("ties", given(EVEN), density=when(("embed_tokens", 0.5), otherwise=[0.1, 0.4])),
    # slices
    "passthrough, stacked": stack("passthrough", cut(("ada", 0, 3)), cut(("bob", 1, 4))),
    "passthrough, a layer twice": stack("passthrough", cut(("ada", 0, 2)), cut(("ada", 1, 2)), cut(("ada", 1, 4))),
    "passthrough, one layer": stack("passthrough", cut(("cyd", 2, 3))),
    "passthrough, silenced": stack("passthrough", cut(("ada", 0, 3)), cut(("ada", 1, 3, {"scale": when(("o_proj", 0.0), ("down_proj", 0.0), otherwise=1.0)})), cut(("ada", 3, 4))),
    "passthrough, scaled for all": stack("passthrough", cut(("ada", 0, 2)), cut(("bob", 2, 4), scale=[0.5, 0.25]), scale=2.0),
    "linear, slices": stack("linear", cut(("ada", 0, 2, {"weight": 0.3}), ("bob", 2, 4, {"weight": [1, 0.4]})), cut(("cyd", 1, 3, {"weight": 1}), ("ada", 2, 4, {"weight": 0.5}))),
    "linear, weights of a slice": stack("linear", cut(("ada", 0, 2), ("bob", 0, 2), weight=0.4), cut(("cyd", 2, 4), ("ada", 2, 4, {"weight": 0.5})), weight=[0.1, 0.9], normalize=False),
    "linear, filter of an old name": stack("linear", cut(("ada", 2, 4, {"weight": when(("layers.3.", 0.1), otherwise=0.9)}), ("bob", 0, 2, {"weight": when(("layers.1.", 0.2), otherwise=1)}))),
    "slerp, slices": stack("slerp", cut(("base", 0, 4), ("ada", 0, 4)), base="base", t=when(("self_attn", [0, 0.5, 1]), ("mlp", [1, 0.2]), otherwise=0.5)),
    "slerp, slices crosswise": stack("slerp", cut(("ada", 1, 3), ("base", 0, 2), t=0.2), cut(("base", 2, 4), ("bob", 2, 4)), base="base", t=[0.3, 0.8]),
    "slerp, base of a slice": {**stack("slerp", cut(("ada", 0, 2), ("base", 0, 2), t=0.2), base="base", t=0.6), "slices": [cut(("ada", 0, 2), ("base", 0, 2), t=0.2), {**cut(("ada", 2, 4), ("bob", 2, 4)), "base_model": "bob"}]},
    "task arithmetic, slices": stack("task_arithmetic", cut(("base", 0, 2), ("ada", 0, 2, {"weight": 0.3}), ("bob", 1, 3, {"weight": [1, 0]})), cut(("base", 2, 4), ("cyd", 2, 4, {"weight": 1.2})), base="base"),
    "ties, slices": stack("ties", cut(("base", 0, 4), ("ada", 0, 4, {"weight": 0.3}), ("bob", 0, 4, {"weight": [1, 0]})), base="base", density=[0.2, 0.9]),
    "ties, flags of a slice": stack("ties", cut(("base", 0, 2), ("ada", 0, 2), ("bob", 0, 2), normalize=False, weight=0.4), cut(("base", 2, 4), ("cyd", 2, 4), ("ada", 2, 4)), base="base", density=0.4, weight=0.8),
    # dtypes
    "linear, mixed dtypes": merge("linear", given({"ada16": {"weight": 0.3}, "bob": {"weight": 1}, "bob16": {"weight": 0.2}}), None),
    "task arithmetic, mixed dtypes": merge("task_arithmetic", given({"ada16": {"weight": [0.3, 1]}, "bob16": {"weight": 1}})),
    "ties, mixed dtypes": merge("ties", given({"ada16": {"weight": 0.3}, "bob16": {"weight": 1}}), density=0.4),
    "passthrough, mixed dtypes": stack("passthrough", cut(("ada16", 0, 2)), cut(("bob16", 1, 3)), cut(("cyd", 3, 4))),
    # modules
    "linear, a module": {"merge_method": "linear", "modules": {"default": {"slices": [cut(("ada", 0, 2), ("bob", 0, 2, {"weight": 0.4}))], "parameters": {"weight": [0.3, 0.9]}}}},
    "ties, rescaled": {
        "merge_method": "ties", "base_model": "base", "models": given(DENSE),
        "parameters": {"rescale": True, "lambda": 0.7137}},
    "breadcrumbs": {
        "merge_method": "breadcrumbs", "base_model": "base", "models": given(DENSE)},
    "breadcrumbs, more outliers": {
        "merge_method": "breadcrumbs", "base_model": "base", "models": given(CROOKED),
        "parameters": {"density": 0.7, "gamma": 0.2, "normalize": True, "lambda": 1.3}},
    "breadcrumbs, outliers of some": {
        "merge_method": "breadcrumbs", "base_model": "base",
        "models": given({"ada": {"weight": 1, "gamma": 0.5}, "bob": {"weight": 0.5}}),
        "parameters": {"density": 0.8, "rescale": True}},
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties", "base_model": "base", "models": given(DENSE)},
    "breadcrumbs_ties, rescaled": {
        "merge_method": "breadcrumbs_ties", "base_model": "base", "models": given(CROOKED),
        "parameters": {"density": 0.6, "gamma": 0.03, "rescale": True, "normalize": True}},
    "sce": {
        "merge_method": "sce", "base_model": "base", "models": given(PLAIN),
        "parameters": {"select_topk": 0.3}},
    "sce, everything": {
        "merge_method": "sce", "base_model": "base", "models": given(PLAIN, base=True),
        "parameters": {"int8_mask": True}},
    "ram": {"merge_method": "ram", "base_model": "base", "models": given(PLAIN)},
    "ram, large changes only": {
        "merge_method": "ram", "base_model": "base", "models": given(PLAIN),
        "parameters": {"epsilon": 0.002}},
    "ramplus_tl": {
        "merge_method": "ramplus_tl", "base_model": "base", "models": given(PLAIN),
        "parameters": {"epsilon": 0.003, "r": 0.7, "alpha": 3.0}},
    "model_stock": {"merge_method": "model_stock", "base_model": "base", "models": given(PLAIN)},
    "model_stock, by filter": {
        "merge_method": "model_stock", "base_model": "base", "models": given(PLAIN, base=True),
        "parameters": {"filter_wise": True}},
    "nuslerp": {"merge_method": "nuslerp", "models": given(PAIR)},
    "nuslerp of task vectors": {
        "merge_method": "nuslerp", "base_model": "base", "models": given(PAIR)},
    "nuslerp, rows": {
        "merge_method": "nuslerp", "base_model": "base", "models": given(PAIR),
        "parameters": {"nuslerp_flatten": False}},
    "nuslerp, columns": {
        "merge_method": "nuslerp", "base_model": "base", "models": given(PAIR),
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True}},
    "multislerp": {"merge_method": "multislerp", "models": given(EVEN)},
    "multislerp of task vectors": {
        "merge_method": "multislerp", "base_model": "base", "models": given(EVEN),
        "parameters": {"normalize_weights": False, "eps": 1e-8}},
    "karcher": {"merge_method": "karcher", "models": given(PLAIN)},
    "karcher, the base too": {
        "merge_method": "karcher", "base_model": "base", "models": given(PLAIN),
        "parameters": {"max_iter": 30, "tol": 1e-7}},
    "nearswap": {
        "merge_method": "nearswap", "base_model": "base", "models": given({"ada": {}}),
        "parameters": {"t": 0.0013}},
    # In float32 mergekit's divergences are mostly rounding: the softmax hardly changes.
    "arcee_fusion": {
        "merge_method": "arcee_fusion", "base_model": "base", "models": given({"ada": {}}),
        "dtype": "float64"},
    "passthrough": {"merge_method": "passthrough", "models": given({"ada": {}})},
    "passthrough, scaled": {
        "merge_method": "passthrough", "models": given({"ada": {"scale": 0.7137}})},
}  # fmt: skip
RANDOM: dict[str, dict[str, Any]] = {
    "dare_linear": {
        "merge_method": "dare_linear", "base_model": "base",
        "models": given({"ada": {"weight": 1.0, "density": 0.3}})},
    "dare_linear, not rescaled": {
        "merge_method": "dare_linear", "base_model": "base",
        "models": given({"ada": {"weight": 1.0, "density": 0.6}}),
        "parameters": {"rescale": False}},
    "dare_ties": {
        "merge_method": "dare_ties", "base_model": "base", "models": given(DENSE)},
    "della_linear": {
        "merge_method": "della_linear", "base_model": "base",
        "models": given({"ada": {"weight": 1.0, "density": 0.4, "epsilon": 0.3}})},
    "della_linear, not rescaled": {
        "merge_method": "della_linear", "base_model": "base",
        "models": given({"ada": {"weight": 1.0, "density": 0.6}}),
        "parameters": {"rescale": False}},
    "della": {
        "merge_method": "della", "base_model": "base", "models": given(DENSE),
        "parameters": {"density": 0.5, "epsilon": 0.05}},
    "dare_ties, normalized": {
        "merge_method": "dare_ties", "base_model": "base", "models": given(DENSE),
        "parameters": {"normalize": True}},
}  # fmt: skip
SHARDED = ("ties", "task arithmetic", "slerp", "linear, crooked", "slerp, slices crosswise",
           "passthrough, a layer twice")  # fmt: skip
"""Recipes that are followed over sharded inputs, too."""

ORACLE = """
import json, sys
import torch
torch.set_num_threads(1)
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for recipe, out in json.load(sys.stdin):
    config = MergeConfiguration.model_validate(recipe)
    run_merge(config, out, MergeOptions(quiet=True, copy_tokenizer=False, random_seed=1))
"""


def placed(recipe: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The recipe with the folders of its models, dtypes as the module says."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(v) for v in value]
        if not isinstance(value, Mapping):
            return value
        return {
            k: str(where / v) if k in ("model", "base_model") else moved(v)
            for k, v in value.items()
        }

    found = {"dtype": "float32", "out_dtype": "bfloat16", **moved(recipe)}
    return {k: v for k, v in found.items() if v is not None}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, in one file and in three shards, and everything that mergekit makes of them."""
    where = tmp_path_factory.mktemp("parity")
    for seed, name in enumerate(MODELS):
        toy.folder(where / "single" / name, llama(seed), config=CONFIG)
        toy.folder(where / "sharded" / name, llama(seed), shards=3, config=CONFIG)
    for name, (same, dtype) in NARROW.items():
        tensors = {n: t.to(dtype) for n, t in llama(MODELS.index(same)).items()}
        toy.folder(where / "single" / name, tensors, config=CONFIG)
    jobs = [
        (placed(recipe, where / "single"), str(where / "mergekit" / name))
        for name, recipe in {**RECIPES, **RANDOM}.items()
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ORACLE], input=json.dumps(jobs), text=True,
        capture_output=True, timeout=300, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"mergekit failed:\n{done.stderr[-3000:]}"
    return where


def compared(ours: Tensors, theirs: Tensors) -> dict[str, Any]:
    """The worst difference of two bfloat16 models, in steps and by tensor, and how many differ."""
    assert ours.keys() == theirs.keys()
    worst, where, unequal, total = 0, "", 0, 0
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        steps = toy.steps_apart(ours[name], tensor)
        # Where base and delta cancel, float32 leaves both a dust of many tiny steps.
        dust = (ours[name].float() - tensor.float()).abs().reshape(-1).numpy() < 1e-8
        most = int(np.where(dust, np.minimum(steps, 1), steps).max(initial=0))
        if most > worst:
            worst, where = most, name
        unequal, total = unequal + int((steps > 0).sum()), total + steps.size
    return {"worst": worst, "where": where, "unequal": unequal, "of": total}


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "single") for name in RECIPES), *((name, "sharded") for name in SHARDED)],
)
def test_the_tensors_are_mergekit_s(name: str, layout: str, place: Path, tmp_path: Path) -> None:
    """Every tensor is mergekit's within one bfloat16 step; almost all numbers are the same."""
    ours, _ = toy.run(tmp_path / "out", placed(RECIPES[name], place / layout))

    theirs = toy.read(place / "mergekit" / name)
    found = compared(ours, theirs)

    unmerged = {n: t.to(torch.bfloat16) for n, t in llama(0).items()}
    common = {n: t for n, t in theirs.items() if n in unmerged}
    assert compared(common, {n: unmerged[n] for n in common})["unequal"] > 0, "mergekit did nothing"
    assert found["worst"] <= 1, f"{name}: {found}"
    assert found["unequal"] <= found["of"] / 1000, f"{name}: {found}"


@pytest.mark.parametrize("name", list(RANDOM))
def test_random_methods_have_mergekit_s_statistics(name: str, place: Path, tmp_path: Path) -> None:
    """Share of changed entries, mean and spread of the change agree within sampling error."""
    what = {**placed(RANDOM[name], place / "single"), "out_dtype": "float32"}
    ours, _ = toy.run(tmp_path / "out", what)
    theirs = toy.read(place / "mergekit" / name)
    base = llama(0)
    large = [n for n in base if base[n].ndim == 2]

    changes = []
    for tensors in (ours, theirs):
        parts = [(tensors[n].double() - base[n].double()).reshape(-1) for n in large]
        changes.append(torch.cat(parts))
    one, other = changes
    n = one.numel()
    coarse = 2e-4  # more than rounding to bfloat16 moves an entry, less than most deltas
    shares = [float((x.abs() > coarse).double().mean()) for x in changes]
    for entry in RANDOM[name]["models"] if len(RANDOM[name]["models"]) == 1 else []:
        kept = float((one != 0).double().mean())
        density = entry["parameters"]["density"]
        assert abs(kept - density) < 5 * math.sqrt(density * (1 - density) / n), (name, kept)
    spread = float(other.std())

    assert abs(shares[0] - shares[1]) < 7 / math.sqrt(n), (name, shares)
    assert abs(float(one.mean() - other.mean())) < 7 * spread / math.sqrt(n), name
    assert abs(float(one.std()) / spread - 1) < 7 / math.sqrt(n), (name, float(one.std()), spread)


def test_every_supported_method_is_compared() -> None:
    """What the recipe reader translates is run against mergekit here."""
    from suture.verbs.merge.mergekit_methods import KITS

    run = {recipe["merge_method"] for recipe in [*RECIPES.values(), *RANDOM.values()]}
    assert run == set(KITS)
