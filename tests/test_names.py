"""Names that collide, inputs that an output would replace, words that a recipe says in passing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from making import (
    CONFIG,
    environment,
    family,
    invoke,
    lines_of,
    llama,
    quick_disk,
    read_model,
    save_model,
    tree,
    weights,
    write_recipe,
)
from suture.schema.text import parse_yaml
from suture.verbs.merge import VERB as merge
from suture.verbs.merge.documents import read_recipe
from suture.verbs.merge.mergekit import native


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_disk(monkeypatch)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A base and two models near it."""
    return family(tmp_path, "math", "code", config=CONFIG)


@pytest.mark.parametrize("name", ["base", "output"])
def test_a_folder_may_be_called_what_reports_call_things(here: Path, name: str) -> None:
    """A row of the merge like any other: nothing is dropped, and the record repeats it."""
    if name != "base":
        shutil.move(here / "base", here / name)
    recipe = {"merge_method": "linear", "models": [
        {"model": name, "parameters": {"weight": 1}},
        {"model": "math", "parameters": {"weight": 3}}]}  # fmt: skip
    merge(recipe, here / "out", folder=here)

    made, one, two = (read_model(here / n) for n in ("out", name, "math"))
    for tensor, raw in made.items():
        expected = (one[tensor].values + 3 * two[tensor].values) / 4
        np.testing.assert_allclose(raw.values, expected, rtol=1e-5, atol=1e-7)
    merge(here / "out" / "suture.json", here / "again")
    assert weights(here / "again") == weights(here / "out")


def test_the_tour_of_the_readme_runs_in_a_process_of_its_own(here: Path) -> None:
    """Models that were opened subtract, with nothing else imported before."""
    code = ("import suture\nbase, math = map(suture.open, ('base', 'math'))\n"
            "tau = math - base\nprint(tau.norm() > 0, suture.localize(tau, density=0.5).density)")  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code], cwd=here, env=environment(), text=True,
                          capture_output=True, check=True)  # fmt: skip

    assert said.stdout.split() == ["True", "0.5"]


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_an_output_is_not_what_a_stage_reads(here: Path, flags: tuple[str, ...]) -> None:
    """The model of a stage is an input, too: an output that would replace it is refused."""
    (here / "out").mkdir()
    (here / "out" / "suture.json").write_text("{}")
    shutil.move(here / "math", here / "out" / "math")
    stage = {"base": "./base", "models": {"math": "./out/math"}, "method": "task_arithmetic"}
    recipe = {"stages": {"first": stage}, "base": "./base", "models": {"one": "first"},
              "method": "task_arithmetic"}  # fmt: skip
    path, before = write_recipe(here, recipe), tree(here)

    for out in ("out", "out/math"):
        said = invoke("merge", path, "-o", here / out, *flags)

        assert said.code == 2
        lines_of(said.err, "holds the input 'math of stage first'")
        assert tree(here) == before


def test_keys_of_a_model_s_long_form_are_known(here: Path) -> None:
    """A misspelt revision or adapter is an error with a suggestion, in both forms."""
    for model, wanted in (
        ({"model": {"path": "./math", "revison": "x"}}, "'revision'"),
        ({"model": "./math", "lroa": "./lora"}, "'lora'"),
        ({"path": "./math", "revison": "x"}, "'revision'"),
    ):
        recipe = {"merge_method": "linear",
                  "models": [{"model": model, "parameters": {"weight": 1}}]}  # fmt: skip
        said = invoke("merge", write_recipe(here, recipe), "-o", here / "out")

        assert said.code == 2
        lines_of(said.err, "unknown key", f"did you mean {wanted}?")


def test_explained_recipes_say_all_that_they_mean() -> None:
    """The native recipe resolves to the same, tokenizer, template, policy and output included."""
    raw: dict[str, Any] = {
        "merge_method": "ties", "base_model": "./base", "dtype": "float32", "out_dtype": "bfloat16",
        "models": [{"model": "./math", "parameters": {"weight": 1, "density": [0.2, 0.8]}}],
        "tokenizer": {"source": "union", "tokens": {"<x>": {"source": "./math"}}},
        "chat_template": "chatml",
    }  # fmt: skip
    recipe = read_recipe(raw)
    told = read_recipe(native(recipe))

    assert told.resolved() == recipe.resolved()
    assert told.chat_template == "chatml"
    assert told.tokenizer == recipe.tokenizer


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("output: {shard_size: 1}", ("output.shard_size: 1 bytes", "1GB")),
        ("output: {shard_size: lots}", ("output.shard_size:", "not a size")),
        ("output: {dtype: bf17}", ("output.dtype:", "'bf17'")),
    ],
)
def test_what_an_output_is_like_is_checked_by_its_key(
    here: Path, text: str, wanted: tuple[str, ...]
) -> None:
    """A number without its unit was not meant; each problem names its key."""
    recipe = f"base: ./base\nmodels: {{math: ./math}}\nmethod: task_arithmetic\n{text}\n"
    said = invoke("merge", write_recipe(here, recipe), "-o", here / "out")

    assert said.code == 2
    lines_of(said.err, "line 4", *wanted)


def test_a_yaml_word_is_no_name(here: Path) -> None:
    """YAML reads `no` as false; such a model is refused, not renamed."""
    recipe = "base: ./base\nmodels: {no: ./math}\nmethod: task_arithmetic\n"
    said = invoke("merge", write_recipe(here, recipe), "-o", here / "out")

    assert parse_yaml(recipe, "here")["models"] == {False: "./math"}
    assert said.code == 2
    lines_of(said.err, "False is no name", "quotes")


def test_buffers_that_a_model_lacks_stop_no_mergekit_recipe(tmp_path: Path) -> None:
    """Position ids that one checkpoint carries and another does not come from the base."""
    base = llama(0)
    ids = next(r for r in llama(0).values())
    base["model.rotary_emb.inv_freq"] = ids
    save_model(tmp_path / "base", base, config=CONFIG)
    save_model(tmp_path / "math", llama(1), config=CONFIG)
    recipe = {"merge_method": "task_arithmetic", "base_model": "./base",
              "models": [{"model": "./math", "parameters": {"weight": 1}}]}  # fmt: skip
    merge(recipe, tmp_path / "out", folder=tmp_path)

    made = read_model(tmp_path / "out")
    assert made["model.rotary_emb.inv_freq"].data == ids.data
    record = json.loads((tmp_path / "out" / "suture.json").read_text())
    assert record["results"]["copied_tensors"] == 1
