"""A recipe is read once, into types; whatever is wrong with it is said, all of it, before any file."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from making import RECIPE, invoke, lines_of, write_recipe
from suture.errors import RecipeError
from suture.merges.policy import Policy
from suture.merges.table import METHODS
from suture.schema.text import RECIPE_LIMIT, parse_yaml
from suture.tensors.roles import ParamSpace
from suture.verbs.merge.documents import MergeRecipe, read_recipe


def problems_of(recipe: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe)
    return list(getattr(caught.value, "problems", [str(caught.value)]))


def with_(**changes: Any) -> dict[str, Any]:
    """The usual recipe, changed; a value of ``None`` takes a key out."""
    return {k: v for k, v in {**RECIPE, **changes}.items() if v is not None}


# ------------------------------------------------------------------------------------ what it means


def test_a_recipe_is_types_and_defaults() -> None:
    """What is not said has the documented default, and the paths start beside the file."""
    recipe = read_recipe(RECIPE, Path("there"))

    assert recipe.method is METHODS["ties"]
    assert [(n, e.path) for n, e in recipe.models.items()] == [
        ("math", "./math"),
        ("code", "./code"),
    ]
    assert recipe.base == "./base"
    assert recipe.space == ParamSpace()
    assert recipe.policy == Policy("error", "error", "equal")
    assert recipe.dtype is None
    assert recipe.folder == Path("there").resolve()


def test_models_may_be_paths_or_mappings() -> None:
    """The short form is a path; the long one gives a model parameters of its own."""
    recipe = read_recipe(
        with_(models={"a": {"path": "./a", "density": 0.1, "weight": 2}, "b": "./b"})
    )

    assert recipe.models["a"].parameters == {"density": 0.1, "weight": 2}
    assert [s.default for s in recipe.settings["density"].scalars] == [0.1, 0.5]
    assert [s.default for s in recipe.settings["weight"].scalars] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["./a", "./b"], ["a", "b"]),
        (["x/one/model", "x/two/model"], ["one/model", "two/model"]),
        (["/data/run1/model", "/data/run2/model"], ["run1/model", "run2/model"]),
        (["/a/m", "/b/m"], ["a/m", "b/m"]),
        (["org/llama@v1", "org/mistral@v1"], ["llama", "mistral"]),
        (["./base", "x/base"], ["./base", "x/base"]),
    ],
)
def test_a_list_of_models_names_them_by_their_paths(paths: list[str], names: list[str]) -> None:
    """As few last parts as tell them apart, and never a whole path of the machine."""
    assert list(read_recipe(with_(models=paths)).models) == names


def test_a_resolved_recipe_reads_as_itself() -> None:
    """What ``suture.json`` holds has every default written out and means the same."""
    recipe = read_recipe(
        with_(parameters={"density": {"*mlp*": 0.2, "*": 0.7}}, space={"exclude": ["embedding"]},
              policy={"extra": "drop"}, output={"dtype": "bf16", "shard_size": "1 GiB"})
    )  # fmt: skip
    again = read_recipe(json.loads(json.dumps(recipe.resolved())))

    assert again.resolved() == recipe.resolved()
    assert again.settings == recipe.settings
    assert again.shard_size == 1 << 30
    assert again.dtype == "BF16"


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-1", 0.1), ("1.e-1", 0.1), ("1E-1", 0.1), (".1", 0.1), ("0.1", 0.1), ("1", 1.0)],
)
def test_numbers_are_numbers_however_they_are_written(
    tmp_path: Path, text: str, number: float
) -> None:
    """YAML 1.1 takes ``1e-1`` for a word; a recipe does not."""
    path = write_recipe(
        tmp_path, f"base: b\nmodels: {{a: ./a}}\nmethod: ties\nparameters: {{density: {text}}}"
    )

    assert read_recipe(path).settings["density"].scalars[0].default == number


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    """YAML's means against repetition; a key of one's own overrides what is merged in."""
    text = ("base: b\nmethod: ties\nmodels:\n  a: &a {path: ./a, density: 0.1, weight: 2}\n"
            "  b: {<<: *a, path: ./b, weight: 3}\n")  # fmt: skip
    recipe = read_recipe(write_recipe(tmp_path, text))

    assert recipe.models["b"].path == "./b"
    assert recipe.models["b"].parameters == {"density": 0.1, "weight": 3}


@pytest.mark.parametrize("size", ["5GB", "5 GB", "5gb", "5000000000", 5 * 10**9, "5000MB", 5e9])
def test_sizes_are_read_as_people_write_them(size: object) -> None:
    """A number and a unit, or bytes."""
    assert read_recipe(with_(output={"shard_size": size})).shard_size == 5 * 10**9


def test_a_seed_may_stand_in_every_recipe() -> None:
    """So that a recipe can change its method; it is checked, and used by methods that draw."""
    for name, method in METHODS.items():
        models = dict(list({"a": "./a", "b": "./b"}.items())[: method.most])
        needed = {n: "./files" for n, p in method.parameters.items() if p.required}
        parameters = {"seed": 7, **needed}
        read_recipe({"base": "./base", "models": models, "method": name, "parameters": parameters})
        with pytest.raises(RecipeError, match="seed"):
            read_recipe(
                {"base": "x", "models": models, "method": name, "parameters": {"seed": "x"}}
            )
        assert ("seed" in method.parameters) == method.random


# ------------------------------------------------------------------------------------- what is wrong

WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a misspelt key": (with_(metod="ties"), ["unknown key 'metod'", "'method'"]),
    "a misspelt parameter": (with_(parameters={"densty": 0.5}), ["ties has no 'densty'", "'density'"]),
    "a parameter of another method": (with_(parameters={"t": 0.5}), ["ties has no 't'"]),
    "a misspelt parameter of a model": (
        with_(models={"a": {"path": "a", "wieght": 1}}), ["models.a", "'wieght'", "'weight'"]
    ),
    "a misspelt method": (with_(method="tiess"), ["no merge method 'tiess'", "'ties'"]),
    "no method": (with_(method=None), ["method: missing", "suture methods"]),
    "a method that is a list": (with_(method=["ties"]), ["method"]),
    "no models": (with_(models=None), ["models"]),
    "models that are empty": (with_(models={}), ["at least one"]),
    "models that are a word": (with_(models="./a"), ["models"]),
    "a model without a path": (with_(models={"a": {"weight": 1}}), ["models.a", "path"]),
    "a model that is a number": (with_(models={"a": 3}), ["models.a", "path"]),
    "a path that is a number": (with_(models={"a": {"path": 3}}), ["models.a", "path"]),
    "a model called base": (with_(models={"base": "./a"}), ["'base'"]),
    "a name with a line break": (with_(models={"a\nb": "./a"}), ["name of a model"]),
    "one name twice": (with_(models={1: "./a", "1": "./b"}), ["'1'"]),
    "a model twice": (with_(models=["./a", "./a"]), ["./a stands twice"]),
    "no base": (with_(base=None), ["base", "differences", "name one"]),
    "a base that is a mapping": (
        with_(method="linear", parameters={}, base={"path": "b"}), ["base: a path or hub id"]
    ),
    "three models for slerp": (
        with_(method="slerp", base=None, parameters={}, models=["a", "b", "c"]), ["slerp takes 2, not 3"]
    ),
    "one model for slerp": (
        with_(method="slerp", base=None, parameters={}, models=["a"]), ["slerp takes 2, not 1"]
    ),
    "one model for a method of two or more": (
        with_(method="model_stock", parameters={}, models=["a"]), ["model_stock takes 2 or more, not 1"]
    ),
    "a place beyond the second model": (
        with_(method="slerp", base=None, parameters={"t": 1.5}, models=["a", "b"]), ["parameters.t", "1.5"]
    ),
    "a seed below zero": (with_(method="dare_ties", parameters={"seed": -1}), ["seed", "-1"]),
    "half a seed": (with_(method="dare_ties", parameters={"seed": 0.5}), ["seed", "whole number"]),
    "a seed too large": (with_(method="dare_ties", parameters={"seed": 2**63}), ["seed"]),
    "a weight too large": (with_(parameters={"weight": 1e39}), ["weight", "1e+39"]),
    "a weight of 400 digits": (with_(parameters={"weight": 10**400}), ["weight"]),
    "a scope that is not": (with_(parameters={"scope": "tensors"}), ["'tensors' is not one of", "'tensor'"]),
    "a flag that is a word": (with_(method="task_arithmetic", parameters={"normalize": "yes"}), ["true or false"]),
    "parameters that are a list": (with_(parameters=["density"]), ["parameters: a mapping"]),
    "a wrong number under a pattern": (
        with_(parameters={"density": {"*": 0.5, "*mlp*": 2}}), ["parameters.density['*mlp*']", "got 2"]
    ),
    "a list of no numbers": (with_(parameters={"density": []}), ["parameters.density", "empty list"]),
    "a word in a list": (with_(parameters={"density": [0.1, "x"]}), ["parameters.density[1]", "not a number"]),
    "a list in a list": (with_(parameters={"density": {"*": [0.1, [1]]}}), ["density['*'][1]", "not a number"]),
    "a list for one number": (with_(parameters={"scope": ["global"]}), ["is not one of"]),
    "a misspelt policy": (with_(policy={"mising": "base"}), ["policy", "'mising'", "'missing'"]),
    "a policy that is not": (with_(policy={"missing": "skip"}), ["policy.missing", "'skip'", "error"]),
    "a policy without a base": (
        with_(method="linear", base=None, parameters={}, policy={"missing": "base"}), ["needs a base"]
    ),
    "a misspelt key of space": (with_(space={"exlude": []}), ["space", "'exlude'", "'exclude'"]),
    "a space that is a list": (with_(space=["head"]), ["space: a mapping"]),
    "a space of numbers": (with_(space={"include": [1]}), ["space.include"]),
    "a wrong dtype": (with_(output={"dtype": "bfloat8"}), ["no dtype 'bfloat8'", "'bfloat16'"]),
    "a dtype that is a list": (with_(output={"dtype": ["bf16"]}), ["no dtype"]),
    "a misspelt key of output": (with_(output={"dtyp": "bf16"}), ["output", "'dtyp'", "'dtype'"]),
    **{
        f"a shard size of {size!r:.20}": (with_(output={"shard_size": size}), ["is not a size", "5GB"])
        for size in ("five", "5XB", 0, -5, "-5GB", True, None or "", "1e3GB", "9" * 400, [5], float("inf"))
    },
    **{
        f"a density of {density!r}": (with_(parameters={"density": density}), ["parameters.density", repr(density)])
        for density in (1.5, -1, 0, "0,2", float("nan"), float("inf"), True, False, None, "half", 1.0000001)
    },
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_recipe_is_refused_with_cause_and_remedy(what: str) -> None:
    """One mistake, one problem: it names the place, what stands there, and what would be right."""
    recipe, wanted = WRONG[what]
    found = problems_of(recipe)

    assert len(found) == 1, found
    lines_of(found[0], *wanted)
    assert len(found[0]) < 500


def test_every_mistake_is_told_at_once() -> None:
    """Five mistakes in five places are five problems of one error."""
    recipe = with_(metod="x", parameters={"densty": 1, "weight": "a"}, policy={"missing": "no"},
                   output={"dtype": "f8"})  # fmt: skip

    assert len(problems_of(recipe)) == 5


def test_a_hundred_mistakes_are_counted() -> None:
    """The first twenty are shown, and how many more there are."""
    with pytest.raises(RecipeError) as caught:
        read_recipe(with_(**{f"key{i}": 1 for i in range(100)}))

    lines_of(str(caught.value), "100 problems", "and 80 more")


# ------------------------------------------------------------------------------------- what is no YAML

TEXTS: dict[str, tuple[str, str]] = {
    "nothing": ("", "a recipe is a mapping"),
    "a comment": ("# base: x\n", "a recipe is a mapping"),
    "a list": ("- base\n- models\n", "a recipe is a mapping"),
    "a word": ("ties", "a recipe is a mapping"),
    "a number": ("5", "a recipe is a mapping"),
    "null": ("~", "a recipe is a mapping"),
    "two documents": ("a: 1\n---\nb: 2\n", "2 documents have no name (they begin on lines 1, 3)"),
    "no YAML": ("base: [1, 2\nmodels: }", "not valid YAML"),
    "a tab": ("base:\n\t- x", "not valid YAML"),
    "an unknown alias": ("base: *x", "not valid YAML"),
    "a key twice": ("base: a\nmethod: ties\nbase: b\n", "line 3: the key 'base' stands twice"),
    "a deep key twice": ("parameters:\n  density: 1\n  density: 2\n", "line 3: the key 'density' stands twice"),
    "one number twice": ("1: a\n0x1: b\n", "line 2: the key 1 stands twice"),
    "a key that is a list": ("[a, b]: c\n", "a key must be a word"),
    "a key that is a mapping": ("{a: b}: c\n", "a key must be a word"),
    "keys that are numbers": ("1: a\n", "a recipe is a mapping"),
    "a Python object": ("base: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    "a Python name": ("base: !!python/name:os.system\n", "not valid YAML"),
    "an unknown tag": ("base: !x y\n", "not valid YAML"),
    "a list that holds itself": ("a: &a [*a]\n", "not valid YAML"),
    "a mapping that holds itself": ("a: &a {b: *a}\n", "not valid YAML"),
    "no such day": ("a: 2024-13-45\n", "not valid YAML"),
    "control characters": ("a: \x00\n", "not valid YAML"),
    "deep nesting": ("[" * 50_000, "nested too deeply"),
    "deep mappings": ("{a: " * 50_000, "nested too deeply"),
    "a number of 9000 digits": ("a: " + "9" * 9000, "not valid YAML"),
    "a thousand million laughs": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
        "aliases unfold",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS)
def test_what_is_no_recipe_is_refused_by_name(tmp_path: Path, what: str) -> None:
    """The file is named with the reason; nothing is executed, and nothing takes long."""
    text, reason = TEXTS[what]
    begun = time.perf_counter()
    found = problems_of(write_recipe(tmp_path, text))

    assert len(found) == 1
    lines_of(found[0], str(tmp_path / "recipe.yaml"), reason)
    assert "\n" not in found[0]
    assert len(found[0]) < 1000
    assert time.perf_counter() - begun < 10  # a generous bound against a hang


@given(
    text=st.text(max_size=60) | st.text(alphabet="{}[]:,-&*!|>'\"#%@`?<>=~ \n\tab1.e", max_size=60)
)
def test_any_text_is_a_mapping_or_refused(text: str) -> None:
    """No text crashes the reader of YAML."""
    try:
        assert isinstance(parse_yaml(text, "x.yaml"), dict)
    except RecipeError as error:
        assert str(error).startswith("x.yaml: ")


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
    ["./a", "ties", "slerp", "linear", "base", "*", "embedding", 10**400, "0.5"]
)  # fmt: skip
VALUE = st.recursive(
    PLAIN,
    lambda v: (
        st.lists(v, max_size=3)
        | st.dictionaries(st.text(max_size=6) | st.integers(), v, max_size=3)
    ),
    max_leaves=6,
)
KEYS = ["base", "models", "method", "parameters", "space", "policy", "output",
        "merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source", "slices",
        "modules", "stages"]  # fmt: skip


WORDS = ["sources", "models", "model", "layer_range", "layers", "parameters", "weight", "density", "t",
         "scale", "lambda", "filter", "value", "base_model", "base", "a", "path"]  # fmt: skip
DEEP = st.recursive(
    PLAIN | st.lists(st.integers(-1, 5), min_size=2, max_size=2),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(WORDS), v, max_size=4),
    max_leaves=12,
)


@given(
    slices=DEEP, models=DEEP, parameters=DEEP, method=st.sampled_from([*METHODS]), kit=st.booleans()
)
def test_any_slices_are_a_recipe_or_refused(
    slices: Any, models: Any, parameters: Any, method: str, kit: bool
) -> None:
    """Whatever is nested in slices, models and parameters, of the right words: no crash."""
    raw = {"slices": [slices], "models": models, "parameters": parameters}
    raw |= {"merge_method": method, "base_model": "b"} if kit else {"method": method, "base": "b"}
    for what in (raw, {**raw, "models": None}, {**raw, "slices": None}):
        try:
            assert isinstance(read_recipe(what), MergeRecipe)
        except RecipeError as error:
            assert len(str(error)) < 20_000


@given(
    raw=st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=8),
    method=st.sampled_from([*METHODS, None]),
)
def test_any_values_are_a_recipe_or_refused(raw: dict[str, Any], method: str | None) -> None:
    """Whatever stands under the known keys, in both languages: a recipe, or its problems."""
    if method is not None:
        raw["merge_method" if "base_model" in raw else "method"] = method
    try:
        assert isinstance(read_recipe(raw), MergeRecipe)
    except RecipeError as error:
        assert len(str(error)) < 20_000


def test_a_pipe_is_read(tmp_path: Path) -> None:
    """A recipe may come from another program: ``suture merge <(generate-recipe)``."""
    path = tmp_path / "recipe.yaml"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(json.dumps(RECIPE),))
    writer.start()
    found = read_recipe(path)
    writer.join()

    assert found.resolved() == read_recipe(RECIPE).resolved()


@pytest.mark.parametrize("kind", ["missing", "folder", "binary", "too large"])
def test_what_is_no_text_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    """The path, and what is wrong with it."""
    path = tmp_path / "recipe.yaml"
    reason = {"missing": "No such file", "folder": "is a folder", "binary": "not a text file",
              "too large": "too large"}[kind]  # fmt: skip
    match kind:
        case "folder":
            path.mkdir()
        case "binary":
            path.write_bytes(b"\x80\x04\xff")
        case "too large":
            path.write_text("# " + "x" * RECIPE_LIMIT)

    lines_of(problems_of(path)[0], str(path), reason)


# ----------------------------------------------------------------------------------------- mergekit

KIT: dict[str, Any] = {
    "models": [{"model": "./math", "parameters": {"weight": 1.0, "density": 0.5}},
               {"model": "./code", "parameters": {"weight": 0.5, "density": 0.5}}],
    "merge_method": "ties", "base_model": "./base", "dtype": "bfloat16",
}  # fmt: skip


def kit(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**KIT, **changes}.items() if v is not None}


def test_a_mergekit_recipe_is_read() -> None:
    """The same models, with mergekit's semantics written out in our parameters."""
    recipe = read_recipe(KIT)

    assert recipe.method.name == "ties"
    assert recipe.base == "./base"
    assert recipe.dtype == "BF16"
    assert recipe.space == ParamSpace((), ())
    assert {n: dict(e.parameters) for n, e in recipe.models.items()} == {
        "math": {"weight": 1.0, "density": 0.5}, "code": {"weight": 0.5, "density": 0.5},
    }  # fmt: skip
    assert recipe.parameters["scope"] == "tensor"


def test_the_base_among_the_models_is_no_model() -> None:
    """mergekit's examples list the base again, without parameters."""
    recipe = read_recipe(kit(models=[{"model": "./base"}, *KIT["models"]]))

    assert list(recipe.models) == ["math", "code"]


def test_options_that_change_nothing_become_notes() -> None:
    """``int8_mask`` saves memory there; here it is accepted, and said to do nothing."""
    recipe = read_recipe(kit(parameters={"int8_mask": True}))

    assert len(recipe.notes) == 1
    assert "int8_mask" in recipe.notes[0]


LATER: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a slice of nothing": (kit(models=None, slices=[{"sources": []}]), ["slices[0].sources", "at least one"]),
    "an unknown method": (kit(merge_method="tiess"), ["no method 'tiess'", "'ties'"]),
    "a gradient of no numbers": (kit(parameters={"density": []}, models=[
        {"model": "./math", "parameters": {"weight": 1}}]), ["parameters.density", "gradient of no numbers"]),
    "a condition without value": (
        kit(parameters={"lambda": [{"filter": "mlp"}, {"value": 1}]}),
        ["parameters.lambda[0]", "no value"],
    ),
    "a misspelt key": (kit(dtpye="bfloat16"), ["unknown key 'dtpye'", "'dtype'"]),
    "a misspelt parameter": (
        kit(models=[{"model": "./math", "parameters": {"weight": 1, "densty": 1}}]), ["'densty'", "'density'"]
    ),
    "a misspelt key of a model": (kit(models=[{"modle": "./math"}]), ["models[0]"]),
    "no weight": (kit(models=[{"model": "./math"}]), ["./math", "models[0]", "needs a weight"]),
    "no base": (kit(base_model=None), ["base", "name one"]),
    "a wrong dtype": (kit(dtype="bloat16"), ["no dtype 'bloat16'", "'bfloat16'"]),
    "models that are a mapping": (kit(models={"a": "./a"}), ["models: a list"]),
    "no models": (kit(models=None), ["models: a list"]),
    "a density beyond 1": (kit(parameters={"density": 1.5}, models=[
        {"model": "./math", "parameters": {"weight": 1}}]), ["density", "1.5"]),
    "slerp without a place": (
        kit(merge_method="slerp", models=[{"model": "./base"}, {"model": "./math"}]), ["t"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LATER)
def test_what_of_mergekit_does_not_work_is_refused_by_name(what: str) -> None:
    """Never a different merge in silence: each option that is not followed is named."""
    recipe, wanted = LATER[what]
    found = problems_of(recipe)

    assert any(all(w in text for w in wanted) for text in found), found


# -------------------------------------------------------------------------------------- suture.json


def record(**changes: Any) -> dict[str, Any]:
    recipe = read_recipe(RECIPE).resolved()
    inputs = {label: {"fingerprint": "0" * 32} for label in ("base", "math", "code")}
    return {"recipe": recipe, "inputs": inputs, **changes}


def test_the_record_of_a_merge_is_a_recipe(tmp_path: Path) -> None:
    """With the fingerprints that its inputs must have."""
    recipe = read_recipe(write_recipe(tmp_path, json.dumps(record()), "suture.json"))

    assert recipe.resolved() == read_recipe(RECIPE).resolved()
    assert dict(recipe.fingerprints) == dict.fromkeys(("base", "math", "code"), "0" * 32)
    assert recipe.folder == tmp_path


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", '{"recipe": 1}', '{"recipe": {}}', "[" * 10**5, "\ufeff{}"]
    + [json.dumps(record(inputs=i)) for i in (None, [], {}, 5, {"base": 1}, {"base": {}})]
    + [json.dumps(record(inputs={**record()["inputs"], "ghost": {"fingerprint": "0"}}))]
    + [json.dumps({"recipe": record()["recipe"]})],
    ids=lambda text: text[:40],
)
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    """A ``suture.json`` that is not what we wrote is an error that names it or what is missing in it."""
    path = write_recipe(tmp_path, text, "suture.json")

    with pytest.raises(RecipeError):
        read_recipe(path)


@given(data=st.data())
def test_a_record_damaged_anywhere_never_crashes(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    """Any value in any place of it: a recipe, or its problems, which are short."""
    found = record()
    place: Any = found
    for _ in range(data.draw(st.integers(0, 2))):
        inner = [v for v in place.values() if isinstance(v, dict) and v]
        place = data.draw(st.sampled_from(inner)) if inner else place
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(VALUE)
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_text(json.dumps(found))
    try:
        assert isinstance(read_recipe(path), MergeRecipe)
    except RecipeError as error:
        assert 0 < len(str(error)) < 20_000


def test_the_examples_of_the_docs_are_recipes() -> None:
    """Every YAML block of the pages that has a method is a recipe we read."""
    import re

    root = Path(__file__).resolve().parent.parent
    pages = [root / "README.md", *(root / "docs").rglob("*.md")]
    read = []
    for page in pages:
        if page.name == "plugins.md":  # its method is another package's: tests/test_plugins.py
            continue
        for body in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.M | re.S):
            for raw in yaml.safe_load_all(body):
                if "method" in raw and "aligned" not in raw:  # with it, it is one of realign
                    read.append(read_recipe(raw).method.name)
    assert {"ties", "stitch", "led"} <= {*read}, "the pages have recipes of these methods"


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("finetune", "base: base\nstrategy: full\ntraning: {}\n"),
        ("localize", "base: base\nrule: magnitude\ndenstiy: 0.1\n"),
        ("analyze", "base: base\nmodels: {a: a}\nanalises: [norms]\n"),
        ("realign", "base: base\nmethod: resta\nalinged: a\n"),
        ("bench", "base: base\ntasks: {}\nlins: {}\n"),
        ("audit", "aligned: base\nlanguages: {}\nshars: [0.1]\n"),
        ("eval", "name: suite\nevaluations: {}\ndecodin: {}\n"),
    ],
)
def test_every_recipe_of_a_file_tells_the_line(tmp_path: Path, command: str, text: str) -> None:
    """Whatever the command, a misspelt key is told with its line."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    given = ["base", "--suite", recipe] if command == "eval" else [recipe]
    said = invoke(command, *given, "-o", tmp_path / "out")
    assert said.code == 2
    lines_of(said.err, "line 3: unknown key")
