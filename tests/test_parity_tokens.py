"""Tokenizers and embeddings of merged models are mergekit's: both run on the same folders.

mergekit 0.1.5 runs in a process of its own, once for all recipes. It orders the tokens that a union
appends by chance, so rows are compared by token, and by id wherever ids are determined.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

import talk
import toy

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        importlib.util.find_spec("mergekit") is None, reason="mergekit is not installed"
    ),
]

MODELS = ("base", "ada", "bob", "cyd", "tied", "tied2", "padded")
LINEAR = {"merge_method": "linear", "parameters": {"weight": 0.5}}
TASK = {"merge_method": "task_arithmetic", "base_model": "base"}
HALF = {"parameters": {"weight": 0.6}}


def of(*names: str, **more: Any) -> dict[str, Any]:
    """A linear merge of some models."""
    return {**LINEAR, "models": [{"model": n} for n in names], **more}


def on_base(*names: str, **more: Any) -> dict[str, Any]:
    """A merge of task vectors."""
    return {**TASK, "models": [{"model": n, **HALF} for n in names], **more}


def token(model: str, **which: Any) -> dict[str, Any]:
    """The row of another token."""
    return {"kind": "model_token", "model": model, **which}


RECIPES: dict[str, dict[str, Any]] = {
    "base, linear": of("ada", "bob", base_model="ada", tokenizer_source="base"),
    "base, task arithmetic": on_base("ada", "bob", tokenizer_source="base"),
    "a model": on_base("ada", "bob", tokenizer_source="bob"),
    "union of a few": on_base("ada", tokenizer_source="union"),
    "union of different ones": of("ada", "bob", "cyd", base_model="ada", tokenizer_source="union"),
    "union without a base": of("bob", "cyd", tokenizer={"source": "union"}),
    "union, task arithmetic": on_base("ada", "bob", "cyd", tokenizer={"source": "union"}),
    "rules": on_base("ada", "bob", tokenizer={"source": "union", "tokens": {
        "<|go|>": {"source": "ada"},
        "<|a|>": {"source": token("bob", token="<s>"), "force": True},
        "<|new|>": {"source": token("bob", token_id=5)},
        "<|none|>": {"source": {"kind": "zero"}},
        "</s>": {"source": "base", "force": True}}}),
    "padding": on_base("ada", "bob", tokenizer={"source": "union", "pad_to_multiple_of": 64}),
    "more rows than tokens": of("padded", "ada", base_model="padded", tokenizer_source="base"),
    "tied": of("tied", "tied2", base_model="tied", tokenizer_source="union"),
    "untied base, tied model": of("base", "tied", base_model="base", tokenizer_source="union"),
}  # fmt: skip

ORACLE = """
import json, sys
import torch
torch.set_num_threads(1)
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for recipe, out in json.load(sys.stdin):
    config = MergeConfiguration.model_validate(recipe)
    run_merge(config, out, MergeOptions(quiet=True, random_seed=1))
"""


def placed(recipe: dict[str, Any], where: Path) -> dict[str, Any]:
    """The recipe with the folders of its models."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: moved(v) if k != "merge_method" else v for k, v in value.items()}
        if isinstance(value, list):
            return [moved(v) for v in value]
        return str(where / value) if value in MODELS else value

    found = {k: moved(v) for k, v in recipe.items()}
    for key in ("tokenizer_source", "tokenizer"):  # `base` is a word there, not a folder
        if key in recipe:
            plain = recipe[key] if isinstance(recipe[key], str) else recipe[key]["source"]
            if plain in ("base", "union"):
                found[key] = plain if key == "tokenizer_source" else found[key] | {"source": plain}
    return {**found, "dtype": "float32", "out_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with different tokenizers, and everything that mergekit makes of them."""
    where = tmp_path_factory.mktemp("tokens")
    plain = talk.tokenizer(talk.PROSE, 90)
    special = talk.tokenizer(
        talk.PROSE, 90,
        ["<|go|>", "<|a|>", AddedToken("<|b|>", lstrip=True, special=True)],
    )  # fmt: skip
    code = talk.tokenizer(talk.CODE, 100, ["<|a|>"])
    both = talk.tokenizer(talk.CODE + talk.PROSE, 110, ["<|go|>"])
    talk.model(where / "base", plain, 1)
    talk.model(where / "ada", special, 2)
    talk.model(where / "bob", code, 3)
    talk.model(where / "cyd", both, 4)
    talk.model(where / "tied", plain, 5, tied=True)
    talk.model(where / "tied2", special, 6, tied=True)
    talk.model(where / "padded", plain, 7, rows=96)
    jobs = [(placed(r, where), str(where / "mergekit" / n)) for n, r in RECIPES.items()]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ORACLE], input=json.dumps(jobs), text=True,
        capture_output=True, timeout=300, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"mergekit failed:\n{done.stderr[-3000:]}"
    return where


def apart(one: torch.Tensor, other: torch.Tensor) -> int:
    """The most bfloat16 steps between two tensors, dust aside."""
    steps = toy.steps_apart(one, other)
    dust = (one.float() - other.float()).abs().reshape(-1).numpy() < 1e-8
    return int(np.where(dust, np.minimum(steps, 1), steps).max(initial=0))


@pytest.mark.parametrize("name", list(RECIPES))
def test_embeddings_and_tokenizer_are_mergekit_s(name: str, place: Path, tmp_path: Path) -> None:
    """Every row within one bfloat16 step, by token; the same tokens, and the same encoding."""
    ours, _ = toy.run(tmp_path / "out", placed(RECIPES[name], place))
    theirs = toy.read(place / "mergekit" / name)
    mine, other = talk.loaded(tmp_path / "out"), talk.loaded(place / "mergekit" / name)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"

    assert mine.get_vocab().keys() == other.get_vocab().keys()
    if "union" not in json.dumps(RECIPES[name]):
        assert mine.get_vocab() == other.get_vocab()
    # Without a base, mergekit starts from any of the models: how text is cut is then chance.
    for text in talk.TEXTS if "base_model" in RECIPES[name] else ():
        assert mine.tokenize(text) == other.tokenize(text), text
    assert ours.keys() == theirs.keys() - ({head} if name == "tied" else set())
    assert settings["tie_word_embeddings"] == (head not in ours)
    for tensor in ours:
        assert ours[tensor].shape == theirs[tensor].shape, tensor
        if tensor not in (head, embedding):
            assert apart(ours[tensor], theirs[tensor]) <= 1, tensor
            continue
        assert settings["vocab_size"] == len(ours[tensor])
        rows, wanted = talk.by_token(ours, tensor, mine), talk.by_token(theirs, tensor, other)
        for word, row in rows.items():
            assert apart(row, wanted[word]) <= 1, (tensor, word)
        for spare in range(len(mine.get_vocab()), len(ours[tensor])):
            assert torch.allclose(
                ours[tensor][spare].float(), theirs[tensor][spare].float(), atol=1e-3
            )


def test_a_union_with_one_more_token_has_mergekit_s_ids(place: Path, tmp_path: Path) -> None:
    """Where chance has nothing to order, ids are the same, and the text comes back."""
    toy.run(tmp_path / "out", placed(RECIPES["tied"], place))
    mine, other = talk.loaded(tmp_path / "out"), talk.loaded(place / "mergekit" / "tied")

    assert mine.get_vocab() == other.get_vocab()
    for text in talk.TEXTS:
        assert mine(text)["input_ids"] == other(text)["input_ids"]
    assert mine.decode(mine("the sea is quiet<|go|>")["input_ids"]) == "the sea is quiet<|go|>"
