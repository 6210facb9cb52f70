"""Layers of several models in one, values over depth, and merges in stages: native and mergekit's."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import making
from making import CONFIG, Tensors, invoke, lines_of, llama, packed, read_model, save_model
from suture.checkpoints.checkpoint import open_checkpoint
from suture.checkpoints.layers import depths, sliced_config, stacks
from suture.errors import SutureError
from suture.merges.apply import checkpoint_fingerprint
from suture.runs.place import MergeOptions
from suture.schema.values import DepthCurve, Scalar
from suture.verbs.merge import VERB as merge
from suture.verbs.merge.documents import read_recipe
from suture.verbs.merge.mergekit import native
from suture.verbs.merge.plan import describe, make_plan

LAYERS = 4
CONFIG4 = {**CONFIG, "num_hidden_layers": LAYERS}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two tuned models of four layers, and a cache of its own."""
    monkeypatch.setenv("SUTURE_CACHE", str(tmp_path / "cache"))
    making.quick_disk(monkeypatch)
    return making.family(tmp_path, "math", "code", config=CONFIG4, layers=LAYERS)


def layer_of(tensors: Tensors, layer: int) -> dict[str, bytes]:
    """One layer, by the rest of its names."""
    at = f"model.layers.{layer}."
    return {n.removeprefix(at): t.data for n, t in tensors.items() if n.startswith(at)}


def follow(here: Path, recipe: dict[str, Any], name: str = "out", **options: Any) -> Tensors:
    merge(recipe, here / name, folder=here, **options)
    return read_model(here / name)


STACK: dict[str, Any] = {
    "models": {"math": "./math", "code": "./code"},
    "method": "passthrough",
    "slices": [{"sources": {"math": [0, 3]}}, {"sources": {"code": [1, 2]}},
               {"sources": {"code": [1, 4]}}],
    "space": {"exclude": []},
}  # fmt: skip


# ---------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize(
    ("points", "depth", "value"),
    [
        ((3.0,), 0.0, 3.0), ((3.0,), 1.0, 3.0), ((0.0, 1.0), 0.25, 0.25), ((0.0, 1.0), 1.0, 1.0),
        ((0.0, 1.0, 0.0), 0.5, 1.0), ((0.0, 1.0, 0.0), 0.75, 0.5), ((2.0, 4.0, 8.0), 1.0, 8.0),
    ],
)  # fmt: skip
def test_a_curve_is_linear_between_its_points(
    points: tuple[float, ...], depth: float, value: float
) -> None:
    """The points are spread evenly over the depth; ends included."""
    assert DepthCurve(points).at(depth) == value


def test_a_scalar_settles_its_curves_once() -> None:
    """After ``bound`` a name has a number, by its old name where it had another."""
    scalar = Scalar(1.0, (("*.3.*", 7.0), ("*", DepthCurve((0.0, 1.0)))))

    found = scalar.bound([("l.0.w", "l.3.w", 0.0), ("l.1.w", "l.4.w", 0.5), ("x", "x", 0.0)])

    assert [found.at(n) for n in ("l.0.w", "l.1.w", "x")] == [7.0, 0.5, 0.0]


def test_depth_is_counted_in_each_stack() -> None:
    """From 0 in the first layer to 1 in the last; 0 outside; 1 where there is one layer only."""
    names = [f"model.layers.{i}.w" for i in range(5)] + ["model.embed.w", "lm_head.w"]
    names += ["vision.blocks.0.w", "enc.layers.0.experts.1.w", "enc.layers.1.experts.9.w"]
    found = depths(names)

    assert stacks(names) == {"model.layers.": 5, "vision.blocks.": 1, "enc.layers.": 2}
    assert [found[n] for n in names] == [0, 0.25, 0.5, 0.75, 1, 0, 0, 1, 0, 1]


def test_a_list_is_a_curve_in_a_recipe_of_ours(here: Path) -> None:
    """Layer by layer the weights are the curve's, by pattern and by model, to the last bit."""
    recipe = {
        "base": "./base", "method": "task_arithmetic", "space": {"exclude": []},
        "models": {"math": {"path": "./math", "weight": {"*mlp*": [0.0, 1.0], "*": 0.5}}},
        "parameters": {"scale": [1.0, 0.25]},
    }  # fmt: skip
    made = follow(here, recipe)
    base, math = read_model(here / "base"), read_model(here / "math")

    for name, tensor in base.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        depth = layer / (LAYERS - 1)
        weight = depth if "mlp" in name else 0.5
        delta = math[name].values - tensor.values
        factor = np.float32(weight) * np.float32(1 - 0.75 * depth)
        assert np.allclose(
            made[name].values, tensor.values + factor * delta, rtol=1e-6, atol=1e-8
        ), name


# ---------------------------------------------------------------------------------------- slices


def test_layers_are_stacked_bit_for_bit(here: Path) -> None:
    """The layers asked for, in order; what is below from the first slice, above from the last."""
    made = follow(here, STACK)
    math, code = read_model(here / "math"), read_model(here / "code")

    wanted = [(math, 0), (math, 1), (math, 2), (code, 1), (code, 1), (code, 2), (code, 3)]
    for layer, (model, old) in enumerate(wanted):
        assert layer_of(made, layer) == layer_of(model, old), layer
    assert made["model.embed_tokens.weight"] == math["model.embed_tokens.weight"]
    assert made["model.norm.weight"] == code["model.norm.weight"]
    assert made["lm_head.weight"] == code["lm_head.weight"]
    assert len(made) == 3 + 7 * 9
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(wanted)


def test_the_fingerprints_are_those_of_the_whole_inputs(here: Path) -> None:
    """Layers that are used twice, or not at all, change nothing: the models are what is named."""
    report = merge(STACK, here / "out", folder=here)
    record = json.loads((here / "out" / "suture.json").read_text())

    for name in ("math", "code"):
        whole = checkpoint_fingerprint(open_checkpoint(here / name))
        assert record["inputs"][name]["fingerprint"] == whole
    assert report.fingerprint == checkpoint_fingerprint(open_checkpoint(here / "out"))
    assert record["results"]["copied_tensors"] == report.tensors == 3 + 7 * 9
    again = invoke("merge", here / "out" / "suture.json", "-o", here / "again")
    assert again.code == 0, again
    assert making.weights(here / "again") == making.weights(here / "out")


def test_a_changed_input_is_not_the_recorded_one(here: Path) -> None:
    """A layer that no slice uses was changed: the record refuses it, for the model is another."""
    merge(STACK, here / "out", folder=here)
    tensors = read_model(here / "code")
    name = "model.layers.0.input_layernorm.weight"
    tensors[name] = packed(tensors[name].values + 1)
    save_model(here / "code", tensors, config=CONFIG4)

    said = invoke("merge", here / "out" / "suture.json", "-o", here / "again")

    assert said.code == 2
    lines_of(said.err, "code", "is not the model that was merged")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block", [1 << 12, 1 << 17])
def test_threads_and_blocks_change_no_byte_of_slices(here: Path, threads: int, block: int) -> None:
    """Slices of a method that reads twice: the same files whatever does the work."""
    recipe = {
        "base": "./base", "models": {"math": "./math", "code": "./code"}, "method": "ties",
        "parameters": {"density": [0.2, 0.7], "scope": "tensor"},
        "slices": [
            {"sources": {"base": [0, 2], "math": {"layers": [2, 4], "weight": [0.5, 1]}}},
            {"sources": {"base": [1, 4], "math": [1, 4], "code": [0, 3]},
             "parameters": {"density": 0.4}}],
    }  # fmt: skip
    one = merge(recipe, here / "one", folder=here, threads=1, block=1 << 14)
    other = merge(recipe, here / "other", folder=here, threads=threads, block=block)

    assert one.fingerprint == other.fingerprint
    assert making.weights(here / "one") == making.weights(here / "other")
    assert one.writeback_loss == other.writeback_loss is not None
    assert len(one.facts["slices"]) == 2


def test_an_interrupted_merge_of_slices_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first slices wrote is taken over, and the result is the same, byte for byte."""
    from suture.merges import apply

    whole = merge(STACK, here / "whole", folder=here, threads=1)
    seen = 0
    plain = apply._Merging.end_task

    def stopped(self: Any, local: Any, task: Any) -> None:
        nonlocal seen
        plain(self, local, task)
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(apply._Merging, "end_task", stopped)
        with pytest.raises(KeyboardInterrupt):
            merge(STACK, here / "out", folder=here, threads=1)
    report = merge(STACK, here / "out", folder=here, threads=1)

    assert 0 < report.resumed < report.tensors
    assert report.fingerprint == whole.fingerprint
    assert making.weights(here / "out") == making.weights(here / "whole")
    assert making.record_inputs(here / "out") == making.record_inputs(here / "whole")


def test_a_stack_of_models_loads_and_runs(here: Path) -> None:
    """transformers makes a model of it, with as many layers, and what it computes is finite."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    merge(STACK, here / "out", folder=here)

    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        here / "out", output_loading_info=True
    )
    words = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        logits = model(words).logits
        made = model.generate(words, max_new_tokens=4, do_sample=False, pad_token_id=0)

    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert len(model.model.layers) == 7
    assert torch.isfinite(logits).all()
    assert made.shape == (1, 8)


def test_a_tied_and_an_untied_model_make_an_untied_one(tmp_path: Path) -> None:
    """The head of the tied one is written out, so that no loader puts the wrong one in its place."""
    tied = {**CONFIG, "tie_word_embeddings": True}
    save_model(tmp_path / "tied", llama(1, head=False), config=tied)
    save_model(tmp_path / "free", llama(2), config=CONFIG)
    for first, last in (("tied", "free"), ("free", "tied")):
        recipe = {
            "models": {first: f"./{first}", last: f"./{last}"}, "method": "passthrough",
            "slices": [{"sources": {first: [0, 2]}}, {"sources": {last: [1, 2]}}],
        }  # fmt: skip
        made = follow(tmp_path, recipe, f"{first}-first")
        head = "lm_head.weight" if last == "free" else "model.embed_tokens.weight"

        config = json.loads((tmp_path / f"{first}-first" / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        assert made["lm_head.weight"].data == read_model(tmp_path / last)[head].data


def test_lists_of_a_configuration_follow_the_layers() -> None:
    """One entry for each layer, from the model it comes from; numbers of layers are counted anew."""
    one = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "mlp_only_layers": [0, 2],
           "eos_token_id": [1, 2, 3], "text_config": {"num_hidden_layers": 3}}  # fmt: skip
    other = {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"], "mlp_only_layers": [1]}

    found = sliced_config(one, 3, [(one, 1, 3), (one, 2, 3), (other, 0, 3), (other, 1, 3)])

    assert found["num_hidden_layers"] == found["text_config"]["num_hidden_layers"] == 4
    assert found["layer_types"] == ["b", "c", "x", "y"]
    assert found["mlp_only_layers"] == [1, 3]
    assert found["eos_token_id"] == [1, 2, 3]
    assert one["num_hidden_layers"] == 3


# ---------------------------------------------------------------------------------------- stages

STAGES = """name: first
merge_method: linear
models:
  - {model: ./math, parameters: {weight: 1}}
  - {model: ./code, parameters: {weight: [0, 1]}}
dtype: float32
---
name: second
merge_method: task_arithmetic
base_model: ./base
models:
  - {model: first, parameters: {weight: 0.5}}
  - {model: ./code, parameters: {weight: 0.5}}
---
method: passthrough
models: {second: second, first: first}
slices:
  - sources: {second: [0, 3]}
  - sources: {first: [1, 4]}
"""


def stages_of(here: Path) -> list[str]:
    return sorted(p.name for p in (here / "cache" / "stages").iterdir() if p.name[0] != ".")


def test_stages_are_made_in_order_and_kept(here: Path) -> None:
    """As if each had been merged by hand; the second time nothing is made again."""
    path = here / "recipe.yaml"
    path.write_text(STAGES)
    documents = list(yaml.safe_load_all(STAGES))
    for name in ("first", "second"):
        raw = next(d for d in documents if d.get("name") == name)
        del raw["name"]
        (here / f"{name}.yaml").write_text(yaml.safe_dump(raw))
        merge(here / f"{name}.yaml", here / name)
    by_hand = {**documents[2], "models": {"second": "./second", "first": "./first"}}
    for folder in ("first", "second"):  # one folder may stand in the way of a stage's name
        assert (here / folder).is_dir()
    merge(by_hand, here / "by-hand", folder=here)

    dry = invoke("merge", path, "-o", here / "out", "--dry-run")
    assert dry.code == 0, dry
    lines_of(dry.out, "stage    first: linear", "stage    second: task_arithmetic", "to be made")
    assert not (here / "cache" / "stages").exists()
    made = invoke("merge", path, "-o", here / "out")
    kept = stages_of(here)
    again = invoke("merge", path, "-o", here / "again")

    assert made.code == again.code == 0, made
    lines_of(made.out, "stage first: made", "stage second: made")
    lines_of(again.out, "stage first: taken from", "stage second: taken from")
    assert len(kept) == 2
    assert stages_of(here) == kept
    assert making.weights(here / "out") == making.weights(here / "by-hand")
    assert making.weights(here / "again") == making.weights(here / "out")
    record = (here / "out" / "suture.json").read_bytes()
    assert record == (here / "again" / "suture.json").read_bytes()
    assert str(here).encode() not in record
    repeated = invoke("merge", here / "out" / "suture.json", "-o", here / "repeated")
    assert repeated.code == 0, repeated
    assert making.weights(here / "repeated") == making.weights(here / "out")


@pytest.mark.parametrize("what", ["recipe", "input"])
def test_a_stage_is_never_stale(here: Path, what: str) -> None:
    """Another number in its recipe, or another model under its path: it is made anew."""
    path = here / "recipe.yaml"
    path.write_text(STAGES)
    merge(path, here / "before")
    if what == "recipe":
        path.write_text(STAGES.replace("weight: [0, 1]", "weight: [0, 0.5]"))
    else:
        tensors = {n: packed(t.values * 2) for n, t in read_model(here / "code").items()}
        save_model(here / "code", tensors, config=CONFIG4)
    merge(path, here / "after")

    assert making.weights(here / "before") != making.weights(here / "after")
    assert len(stages_of(here)) == 4


def test_a_kept_stage_that_was_changed_is_refused(here: Path) -> None:
    """What is read from the cache is what was written there."""
    path = here / "recipe.yaml"
    path.write_text(STAGES)
    merge(path, here / "out")
    for folder in (here / "cache" / "stages").iterdir():
        tensors = {n: packed(t.values * 2) for n, t in read_model(folder).items()}
        save_model(folder, tensors)

    with pytest.raises(SutureError, match="was changed since it was made; remove it"):
        merge(path, here / "again")


# ---------------------------------------------------------------------------------- explanations

KIT: dict[str, Any] = {
    "merge_method": "ties", "base_model": "./base", "dtype": "bfloat16",
    "models": [{"model": "./math", "parameters": {"weight": [0, 1]}},
               {"model": "./code", "parameters": {"weight": [{"filter": "mlp", "value": 0.3},
                                                             {"value": 0.5}]}}],
    "parameters": {"density": 0.4},
}  # fmt: skip


def test_an_explanation_says_why_and_gives_the_same_merge(here: Path) -> None:
    """Every difference has its reason, and the recipe that is printed writes the same bytes."""
    path = making.write_recipe(here, KIT)
    said = invoke("merge", path, "--explain")
    found = invoke("merge", path, "--explain", "--json").json

    assert said.code == 0
    lines_of(said.out, "scope: mergekit trims every tensor", "rounding:", "aggregate:", "zero_sign:",
             "space: mergekit merges everything", "dtype: mergekit casts")  # fmt: skip
    assert yaml.safe_load(said.out) == found["native"]
    (here / "native.yaml").write_text(said.out)
    merge(path, here / "kit")
    merge(here / "native.yaml", here / "native")
    assert making.weights(here / "kit") == making.weights(here / "native")


def test_the_native_recipe_means_the_same_for_every_form(here: Path) -> None:
    """Slices, stages and curves, too: read again, the recipe resolves to the same."""
    (here / "recipe.yaml").write_text(STAGES)
    for recipe in (read_recipe(KIT), read_recipe(STACK), read_recipe(here / "recipe.yaml")):
        assert read_recipe(native(recipe)).resolved() == recipe.resolved()


def test_a_merge_needs_a_place(here: Path) -> None:
    """Without -o only --explain has something to do."""
    said = invoke("merge", making.write_recipe(here, KIT))
    assert said.code == 2
    lines_of(said.err, "-o OUT")


def test_an_unused_filter_is_told(here: Path) -> None:
    """Legal in mergekit, and most often a mistake: a note, and the rest is followed."""
    kit = {**KIT, "parameters": {"density": [{"filter": "mpl", "value": 0.1}, {"value": 0.5}]}}
    plan = make_plan(kit, None, MergeOptions(), here)

    assert "density: the filter mpl fits no tensor" in describe(plan)["notes"]


def test_without_a_dtype_the_widest_is_written(here: Path) -> None:
    """A bfloat16 base and a float32 model: mergekit writes float32, so does its recipe here."""
    for name, dtype in (("narrow", "BF16"), ("wide", "F32")):
        save_model(here / name, llama(3, dtype=dtype), config=CONFIG)
    models = [{"model": f"./{name}", "parameters": {"weight": 1}} for name in ("narrow", "wide")]
    made = follow(here, {"merge_method": "linear", "models": models})

    assert {t.dtype for t in made.values()} == {"F32"}
    assert json.loads((here / "out" / "config.json").read_text())["torch_dtype"] == "float32"


# ----------------------------------------------------------------------------- forms of a recipe

FORMS: dict[str, str] = {
    "gradients by filter": """
        slices:
          - sources:
              - model: ./math
                layer_range: [0, 4]
              - model: ./code
                layer_range: [0, 4]
        merge_method: slerp
        base_model: ./math
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5 # what is left
        dtype: float16
        """,
    "weights and densities by layer": """
        models:
          - model: ./base # no parameters
          - model: ./math
            parameters:
              density: [1, 0.7, 0.1]
              weight: 1.0
          - model: ./code
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: ./base
        parameters:
          normalize: true
          int8_mask: true
        dtype: float16
        """,
    "a taller model": """
        slices:
        - sources:
          - {model: ./math, layer_range: [0, 3]}
        - sources:
          - {model: ./code, layer_range: [1, 4]}
        merge_method: passthrough
        dtype: bfloat16
        """,
    "a layer that adds nothing": """
        merge_method: passthrough
        slices:
          - sources: [{model: ./math, layer_range: [0, 2]}]
          - sources:
              - model: ./math
                layer_range: [1, 2]
                parameters:
                  scale:
                    - {filter: o_proj, value: 0.0}
                    - {filter: down_proj, value: 0.0}
                    - value: 1.0
          - sources: [{model: ./math, layer_range: [2, 4]}]
        """,
    "the long form of a model": """
        merge_method: linear
        models:
          - model: {model: {path: ./math}}
            parameters: {weight: 1.0}
          - model: {path: ./code}
            parameters: {weight: '0.3'}
        out_dtype: bfloat16
        dtype: float32
        """,
    "scientific notation": """
        merge_method: dare_linear
        base_model: ./base
        models: [{model: ./math, parameters: {weight: 1e-1, density: 5.e-1}}]
        parameters: {lambda: 1, rescale: yes}
        """,
    "a module": """
        merge_method: linear
        modules:
          default:
            parameters: {weight: 0.5}
            models: [{model: ./math}, {model: ./code, parameters: {weight: [0, 1]}}]
        """,
    "several documents": """
        name: calm
        merge_method: task_arithmetic
        base_model: ./base
        models: [{model: ./math, parameters: {weight: 0.5}}]
        ---
        name: unused
        merge_method: linear
        models: [{model: calm, parameters: {weight: 1}}]
        ---
        name: last but one
        merge_method: slerp
        base_model: calm
        models: [{model: calm}, {model: ./code}]
        parameters: {t: 0.4}
        ---
        merge_method: passthrough
        slices:
          - sources: [{model: last but one, layer_range: [0, 2]}]
          - sources: [{model: calm, layer_range: [0, 4]}]
        """,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_mergekit_recipe_is_followed(here: Path, form: str) -> None:
    """From YAML to a folder whose tensors are finite, with the layers that were asked for."""
    (here / "recipe.yaml").write_text(textwrap.dedent(FORMS[form]))
    merge(here / "recipe.yaml", here / "out")

    made = read_model(here / "out")
    config = json.loads((here / "out" / "config.json").read_text())
    layers = {"a taller model": 6, "a layer that adds nothing": 5, "several documents": 6}
    assert stacks(made) == {"model.layers.": layers.get(form, LAYERS)}
    assert config["num_hidden_layers"] == layers.get(form, LAYERS)
    for name, tensor in numbers_of(made).items():
        assert np.isfinite(tensor).all(), name


def numbers_of(tensors: Tensors) -> dict[str, Any]:
    """The numbers of a model, float16 included."""
    return {
        n: np.frombuffer(t.data, "<f2") if t.dtype == "F16" else t.values
        for n, t in tensors.items()
    }


# --------------------------------------------------------------------------------- wrong recipes

LINEAR = """merge_method: linear
models:
  - model: ./math
    parameters:
      weight: 1
"""
SLICED = """merge_method: passthrough
slices:
  - sources:
      - model: ./math
        layer_range: [0, 2]
"""
OURS = """method: linear
models: {math: ./math, code: ./code}
slices:
  - sources: {math: [0, 2], code: [2, 4]}
"""
WRONG: dict[str, tuple[str, int, list[str]]] = {
    "a backward range": (SLICED.replace("[0, 2]", "[2, 0]"), 5, ["layer_range", "lower number first"]),
    "a range of nothing": (SLICED.replace("[0, 2]", "[2, 2]"), 5, ["layer_range", "no layer"]),
    "a range below zero": (SLICED.replace("[0, 2]", "[-1, 2]"), 5, ["layer_range", "count from 0"]),
    "a range of words": (SLICED.replace("[0, 2]", "[a, b]"), 5, ["layer_range", "[0, 16]"]),
    "a range of three": (SLICED.replace("[0, 2]", "[0, 1, 2]"), 5, ["layer_range", "[0, 16]"]),
    "a range of halves": (SLICED.replace("[0, 2]", "[0, 1.5]"), 5, ["layer_range", "[0, 16]"]),
    "layers beyond the model": (SLICED.replace("[0, 2]", "[3, 9]"), 5, ["has 4 layers", "[0, 4] are all"]),
    "no range": (SLICED.replace("layer_range", "layers"), 5, ["unknown key 'layers'", "layer_range"]),
    "two models for passthrough": (
        SLICED + "      - model: ./code\n        layer_range: [0, 2]\n", 3, ["passthrough takes 1, not 2"]),
    "a model twice in a slice": (
        SLICED.replace("passthrough", "linear") + "      - model: ./math\n        layer_range: [0, 2]\n", 3,
        ["./math stands twice"]),
    "unequal lengths": (
        SLICED.replace("passthrough", "linear") + "      - model: ./code\n        layer_range: [0, 3]\n"
        "parameters: {weight: 1}\n", 3, ["as many layers of each model", "math: 2", "code: 3"]),
    "a slice without sources": (SLICED + "  - parameters: {scale: 1}\n", 6, ["slices[1]", "list of sources"]),
    "an unknown key of a slice": (SLICED + "    layer_range: [0, 1]\n", 6, ["slices[0]", "unknown key 'layer_range'"]),
    "slices and models": (SLICED + "models: [{model: ./math}]\n", 2, ["slices: models are given, too"]),
    "slices without the base": (
        SLICED.replace("passthrough", "ties") + "base_model: ./base\nparameters: {weight: 1}\n", 3,
        ["differences to a base", "base_model"]),
    "a gradient of nothing": (LINEAR.replace("weight: 1", "weight: []"), 5, ["gradient of no numbers"]),
    "a word in a gradient": (LINEAR.replace("weight: 1", "weight: [0, x]"), 5, ["'x' is not a number"]),
    "a condition without value": (LINEAR.replace("weight: 1", "weight: [{filter: mlp}]"), 5, ["no value"]),
    "an unknown key of a condition": (
        LINEAR.replace("weight: 1", "weight: [{fitler: mlp, value: 1}]"), 5, ["'fitler'", "'filter'"]),
    "a condition that is a number": (
        LINEAR.replace("weight: 1", "weight: [1, {filter: mlp, value: 1}]"), 5, ["do not mix"]),
    "a filter that is a number": (
        LINEAR.replace("weight: 1", "weight: [{filter: 3, value: 1}]"), 5, ["filter", "part of tensor names"]),
    "no condition for the rest": (
        LINEAR.replace("weight: 1", "weight: [{filter: mlp, value: 1}]"), 0, ["no condition fits", "{value: 1.0}"]),
    "an unknown parameter": (LINEAR.replace("weight: 1", "wieght: 1"), 5, ["'wieght'", "'weight'"]),
    "an unknown key of a model": (LINEAR + "    paramters: {}\n", 6, ["'paramters'", "'parameters'"]),
    "an unknown key": (LINEAR + "dtpye: float32\n", 6, ["'dtpye'", "'dtype'"]),
    "an unknown dtype": (LINEAR + "dtype: float33\n", 6, ["no dtype 'float33'"]),
    "a flag that is a list": (LINEAR + "parameters: {normalize: [true]}\n", 6, ["true or false"]),
    "two modules": ("merge_method: linear\nmodules:\n  a: {models: []}\n  b: {models: []}\n", 2, ["one module is read"]),
    "a missing model": (LINEAR.replace("./math", "./maths"), 3, ["no such file", "did you mean 'math'?"]),
    "a tokenizer that is not there": (LINEAR + "tokenizer: {source: union}\n", 3, ["./math", "has no tokenizer"]),
    "ours: a model that is none": (OURS + "  - sources: {maths: [0, 1]}\n", 5, ["no model 'maths'", "'math'"]),
    "ours: a model in no slice": (OURS.replace(", code: [2, 4]", ""), 2, ["models.code", "no slice"]),
    "ours: layers beyond": (OURS.replace("[2, 4]", "[4, 6]"), 4, ["sources.code.layers", "has 4 layers"]),
    "ours: unequal lengths": (OURS.replace("[2, 4]", "[3, 4]"), 4, ["as many layers"]),
    "ours: no layers": (OURS.replace("[2, 4]", "{weight: 1}"), 4, ["layers: missing"]),
    "ours: an unknown key": (OURS + "    weights: 1\n", 5, ["'weights'", "slices[0]"]),
    "ours: an unknown parameter": (OURS.replace("[2, 4]", "{layers: [2, 4], density: 1}"), 4, ["'density'"]),
    "ours: a curve of nothing": (OURS + "    parameters: {weight: []}\n", 5, ["empty list"]),
    "ours: slices that are none": (OURS.split("slices")[0] + "slices: 3\n", 3, ["slices: a list, not 3"]),
    "a stage that names itself": (f"name: a\n{LINEAR.replace('./math', 'a')}---\n{LINEAR.replace('./math', 'a')}", 1,
                                  ["a names itself"]),
    "stages in a circle": (
        f"name: a\n{LINEAR.replace('./math', 'b')}---\nname: b\n{LINEAR.replace('./math', 'a')}---\n"
        f"{LINEAR.replace('./math', 'a')}", 1, ["a needs b needs a"]),
    "two stages of one name": (f"name: a\n{LINEAR}---\nname: a\n{LINEAR}---\n{LINEAR.replace('./math', 'a')}", 8,
                               ["name of another document"]),
    "a stage that is none": (f"name: a\n{LINEAR}---\n{LINEAR.replace('./math', 'aa')}", 10, ["aa: no such file"]),
    "two last merges": (f"{LINEAR}---\n{LINEAR}", 0, ["2 documents have no name"]),
    "a mistake in a stage": (f"name: a\n{LINEAR}dtpye: 1\n---\n{LINEAR.replace('./math', 'a')}", 7,
                             ["stage a", "'dtpye'"]),
    "a missing model of a stage": (f"name: a\n{LINEAR.replace('./math', './no')}---\n{LINEAR.replace('./math', 'a')}", 0,
                                   ["stage a", "./no: no such file"]),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_recipe_is_refused_at_its_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Before anything is read: file, line, cause and remedy."""
    from suture.checkpoints.checkpoint import Checkpoint

    def never(self: Any, *_: Any) -> None:
        raise AssertionError(f"{self.label} was read")

    monkeypatch.setattr(Checkpoint, "read_at", never)
    text, line, wanted = WRONG[what]
    path = here / "recipe.yaml"
    path.write_text(text)
    said = invoke("merge", path, "-o", here / "out")

    assert said.code == 2, said
    lines_of(said.err, *wanted, str(path))
    if line:
        places = [row for row in said.err.splitlines() if f"line {line}: " in row]
        assert any(all(w in row for w in wanted) for row in places), said.err
    assert not (here / "out").exists()
    assert not (here / "cache").exists()


def test_all_mistakes_of_all_documents_are_told_at_once(here: Path) -> None:
    """In a stage, in the last merge, and in what the models hold."""
    (here / "recipe.yaml").write_text(
        f"name: a\n{LINEAR}dtpye: 1\n---\n"
        + SLICED.replace("[0, 2]", "[0, 9]").replace("passthrough", "linear")
        + "  - sources: [{model: a, layer_range: [3, 1]}]\nparameters: {weight: [x]}\n"
    )
    said = invoke("merge", here / "recipe.yaml", "-o", here / "out")

    lines_of(said.err, "line 7: stage a: unknown key 'dtpye'", "has 4 layers",
             "line 14: slices[1].sources[0].layer_range", "line 15: parameters.weight[0]")  # fmt: skip


def test_layers_of_another_shape_do_not_stack(here: Path) -> None:
    """A wider model on a narrower one is no model; it is refused, with both names."""
    save_model(here / "wide", llama(5, hidden=32), config={**CONFIG, "hidden_size": 32})
    recipe = {**STACK, "models": {"math": "./math", "wide": "./wide"},
              "slices": [{"sources": {"math": [0, 3]}}, {"sources": {"wide": [0, 2]}}]}  # fmt: skip

    with pytest.raises(SutureError, match="wide on ./math: .* one model cannot hold both"):
        merge(recipe, here / "out", folder=here)


def test_models_of_several_stacks_are_not_cut(tmp_path: Path) -> None:
    """Encoder and decoder have layers of the same numbers: which are meant cannot be told."""
    tensors = {
        f"{part}.layers.{i}.w": packed([1.0]) for part in ("encoder", "decoder") for i in (0, 1)
    }
    save_model(tmp_path / "both", tensors)
    recipe = {"models": {"both": "./both"}, "method": "passthrough",
              "slices": [{"sources": {"both": [0, 1]}}]}  # fmt: skip

    with pytest.raises(SutureError, match=r"one stack of layers; it has decoder\.layers\."):
        merge(recipe, tmp_path / "out", folder=tmp_path)
