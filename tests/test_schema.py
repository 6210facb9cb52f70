"""Recipes as models: their faults, their JSON Schema, and that they need no framework."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import yaml
from annotated_types import Ge

from making import invoke
from suture.analysis.basis import BASES
from suture.cli.recipes import RECIPES
from suture.edits.stats import KINDS
from suture.errors import Problems, RecipeError
from suture.schema.export import schema_of
from suture.schema.fields import Listed, NamedEntries, Share
from suture.schema.read import parse, read
from suture.schema.sections import Faults, Recipe, Section, check
from suture.schema.sources import Source
from suture.schema.text import parse_documents
from suture.schema.tuning import LEARN_PRESETS, TuneSettings
from suture.verbs.analyze.recipe import ANALYSES, Request
from suture.verbs.audit.recipe import Audit
from suture.verbs.localize.recipe import Regions

ROOT = Path(__file__).parents[1]
MODELS: dict[str, type[Recipe]] = {
    verb: getattr(import_module(module), name) for verb, (module, name) in RECIPES.items()
}
SCHEMAS = {verb: schema_of(model, verb) for verb, model in MODELS.items()}
ROWS = {"probe": "rows.jsonl", "marked": "rows.jsonl", "benign": "rows.jsonl"}
RIGHT: dict[str, dict[str, Any]] = {
    "audit": {"aligned": "a", "attacked": "b", "languages": ["en", "de"], "rows": ROWS},
    "analyze": {"base": "b", "models": {"one": "m", "two": {"path": "n"}}},
    "localize": {"base": "b", "models": {"one": "m", "two": {"path": "n", "density": 0.5}}},
    "bench": {"tasks": ["bias", "topics"], "control": "harm", "strategies": {"full": {"lr": 1e-5}}},
    "eval": {"evaluations": {"a": {"kind": "loss", "data": "rows.jsonl", "text": "text"}}},
    "merge": {"base": "b", "models": {"one": "m", "two": "n"}, "method": "ties"},
    "finetune": {"base": "b", "strategy": "talos", "data": {"train": "rows.jsonl"}},
    "realign": {
        "aligned": "a",
        "models": {"one": "m"},
        "data": {"train": "rows.jsonl"},
        "method": "somf",
    },
}
SPACE = ({"space": 3, "devise": "cpu"},
         ("space: a mapping, not 3", "unknown key 'devise'; did you mean 'device'?"))  # fmt: skip
FAULTY: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bench": (
        {"control": "hram", "taks": []},
        ("control: no task 'hram'; did you mean 'harm'?; a task of your own has a name and a file",
         "unknown key 'taks'; did you mean 'tasks'?"),
    ),
    "audit": SPACE,
    "analyze": SPACE,
    "localize": SPACE,
    "realign": SPACE,
    "merge": (
        {"method": "teis", "polcy": {}},
        ("method: no merge method 'teis'; did you mean 'ties'?",
         "unknown key 'polcy'; did you mean 'policy'?"),
    ),
    "finetune": (
        {"strategy": "tallos", "trainin": {}},
        ("strategy: no strategy 'tallos'; did you mean 'talos'?",
         "unknown key 'trainin'; did you mean 'training'?"),
    ),
    "eval": (
        {"evaluations": {"a": {"kind": "loss", "data": "rows.jsonl", "limit": -1}}, "dtpye": "x"},
        ("evaluations.a.limit: a whole number from 0, not -1",
         "unknown key 'dtpye'; did you mean 'dtype'?"),
    ),
}  # fmt: skip
"""Two faults of each command, told where no framework is installed."""


def told(model: type[Recipe], raw: Mapping[str, Any], folder: Path = Path()) -> list[str]:
    """Every fault of a recipe."""
    problems = Problems()
    parse(model, raw, folder, problems)
    try:
        problems.raise_if_any()
    except RecipeError as error:
        return list(error.problems)  # type: ignore[attr-defined]
    return []


# ---------------------------------------------------------------------------------------- sections


class Part(Section):
    """A section with a short form."""

    short = "path"

    path: str
    """What is read."""
    low: Annotated[int, Ge(0)] = 0
    high: int = 9

    @check
    def _rising(self) -> Faults:
        if self.low > self.high:
            yield "high", f"at least low, {self.low}; got {self.high}"


class Toy(Recipe):
    """All that a recipe can have."""

    share: Share
    """The share that is kept."""
    kind: Literal["alpha", "beta"] = "alpha"
    part: Part | None = None
    named: Annotated[Mapping[str, Part], NamedEntries(r"\w+", "is no word", "a mapping")] = {}
    words: Annotated[tuple[Literal["red", "blue"], ...], Listed()] = ()

    @check
    def _beta_has_a_part(self) -> Faults:
        if self.kind == "beta" and self.part is None:
            yield "part", "missing; beta needs one"

    @check
    def _high_fits(self) -> Faults:
        if self.part is not None and self.part.high > 99:
            yield "part.high", "at most 99"

    @check
    def _share_fits(self) -> Faults:
        if self.share == 1 and self.kind == "alpha":
            yield "share", "1 leaves nothing to alpha"


def test_every_fault_comes_at_once_in_our_words() -> None:
    """Types, bounds, words, unknown keys at every depth, and what keys say together."""
    faults = told(Toy, {
        "share": True, "kind": "beta", "part": {"path": 3, "low": 5, "high": 100, "hihg": 1},
        "named": {"a": "fine", "b": {"path": "x", "low": -1}, "c-d": "x", "e": 7},
        "words": ["red", "bleu"], "kinds": 1,
    })  # fmt: skip
    assert sorted(faults) == sorted([
        "share: a share of the entries, in (0, 1], not True",
        "part.path: a text, not 3",
        "part: unknown key 'hihg'; did you mean 'high'?",
        "part.high: at most 99",
        "named.b.low: at least 0, not -1",
        "named: 'c-d' is no word",
        "named.e: a mapping, not 7",
        "words[1]: 'bleu' is not known; did you mean 'blue'?",
        "unknown key 'kinds'; did you mean 'kind'?",
    ])  # fmt: skip


def test_checks_that_touch_a_wrong_key_are_skipped_and_no_others() -> None:
    """A wrong share says nothing about alpha; a section without its wrong key is still checked."""
    assert told(Toy, {"share": 1}) == ["share: 1 leaves nothing to alpha"]
    assert told(Toy, {"share": 2}) == ["share: a share of the entries, in (0, 1], not 2"]
    assert told(Toy, {"share": 1, "kind": "gamma"}) == [
        "kind: 'gamma' is not known; known: alpha, beta"
    ]
    assert told(Toy, {"share": None, "kind": "alpha"}) == ["share: missing; the share that is kept"]
    assert told(Toy, {"kind": "beta"}) == [
        "share: missing; the share that is kept", "part: missing; beta needs one",
    ]  # fmt: skip
    assert told(Toy, {"share": 0.5, "part": {"path": "x", "low": 7, "high": 3}}) == [
        "part.high: at least low, 7; got 3"
    ]
    assert told(Toy, {"share": 0.5, "part": {"path": "x", "low": -1, "high": -3}}) == [
        "part.low: at least 0, not -1"
    ]


def test_faults_stand_on_their_lines(tmp_path: Path) -> None:
    """In a file every fault begins with its line; YAML's own faults are told as such."""
    (tmp_path / "r.yaml").write_text(
        "share: 0.5\npart:\n  path: x\n  low: -1\nwords:\n- red\n- no\n"
    )
    problems = Problems()
    assert read(Toy, tmp_path / "r.yaml", problems) is None
    with pytest.raises(RecipeError) as caught:
        problems.raise_if_any()
    assert "line 4: part.low: at least 0, not -1" in str(caught.value)
    assert "line 7: words[1]: False is not known" in str(caught.value)
    (tmp_path / "r.yaml").write_text("share: 0.5\nshare: 1\n")
    problems = Problems()
    assert read(Toy, tmp_path / "r.yaml", problems) is None
    with pytest.raises(RecipeError, match="the key 'share' stands twice"):
        problems.raise_if_any()


def test_short_forms_and_empty_sections_are_read() -> None:
    """Text for a section, one word for a list, nothing after the key of a section."""
    found = parse(Toy, {"share": 1, "kind": "beta", "part": "x", "words": "red", "named": None},
                  Path(), Problems())  # fmt: skip
    assert found is not None
    assert (found.part, found.words, found.named) == (Part(path="x"), ("red",), {})
    assert found.resolved() == {
        "share": 1.0, "kind": "beta", "part": {"path": "x", "low": 0, "high": 9}, "named": {},
        "words": ["red"],
    }  # fmt: skip
    again = parse(Toy, found.resolved(), Path(), Problems())
    assert again is not None
    assert again.resolved() == found.resolved()
    with pytest.raises(ValueError, match="frozen"):
        found.share = 0.5


def test_a_wrong_recipe_is_used_as_far_as_it_is_right() -> None:
    """Wrong keys have their defaults, entries of mappings what is right in them."""
    problems = Problems()
    found = parse(
        Regions,
        {"base": "b", "models": {"one": "m", "two": 3}, "density": 7, "seed": "x", "at": "base"},
        Path(), problems, whole=False,
    )  # fmt: skip
    assert found is not None
    assert [*found.models] == ["one"]
    assert (found.base, found.seed, found.at, found.densities) == ("b", 0, "base", {"one": 1.0})
    assert len(problems) == 3


# -------------------------------------------------------------------------------- the ported verbs


def test_paths_and_rows_are_taken_from_the_folder_of_the_recipe(tmp_path: Path) -> None:
    """Rows and files lie where the recipe lies; defaults of one key come from another."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "suite.yaml").write_text("{}\n")
    (tmp_path / "audit.yaml").write_text(yaml.safe_dump({
        **RIGHT["audit"], "attacked": None, "utility": "suite.yaml", "freeze": True, "share": 0.3,
        "attack": {"train": {"path": "rows.jsonl"}, "training": {"epochs": 1e0, "precision": False}},
    }))  # fmt: skip
    problems = Problems()
    found = read(Audit, tmp_path / "audit.yaml", problems)
    problems.raise_if_any()
    assert found is not None
    assert found.attack is not None
    assert found.freeze is not None
    rows = Source(str(tmp_path / "rows.jsonl"))
    assert found.attack.train == found.languages["de"].probe == rows
    assert found.attack.training == TuneSettings(
        epochs=1, batch=4, accumulate=2, lr=5e-5, schedule="cosine"
    )
    assert (found.region, found.freeze.share) == ("en", 0.3)
    assert found.utility == tmp_path / "suite.yaml"
    plain = found.resolved()
    assert str(tmp_path) not in json.dumps(plain)
    assert plain["attack"]["train"] == "rows.jsonl"


def test_the_words_of_recipes_are_those_of_the_tables() -> None:
    """Kinds of bases, statistics and presets are written out, so that editors know them."""
    faults = told(Request, {**RIGHT["analyze"], "bases": {"kinds": [*BASES]}})
    faults += told(Request, {**RIGHT["analyze"], "analyses": ["geometry", "bases"]})
    measured = [k for k in KINDS if k != "logit"]
    faults += told(Regions, {**RIGHT["localize"], "measure": measured})
    for preset in LEARN_PRESETS:
        learn = {"rule": "learned", "learn": {"preset": preset}}
        faults += told(Regions, {**RIGHT["localize"], **learn})
    assert faults == []
    known = told(Regions, {**RIGHT["localize"], "measure": ["?"]})[0].partition("known: ")[2]
    assert known.split(", ") == measured
    kinds = told(Request, {**RIGHT["analyze"], "bases": {"kinds": ["?"]}})[0].partition("known: ")
    assert kinds[2].split(", ") == [*BASES]


BLOCKED = """
import json, sys
from importlib import import_module
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors", "peft"):
            raise ModuleNotFoundError(f"{name} is not installed", name=name.partition(".")[0])

sys.meta_path.insert(0, Blocked())
from suture.errors import Problems, RecipeError
from suture.schema.read import read

told = {}
for verb, module, name, right, wrong in json.loads(sys.argv[1]):
    model = getattr(import_module(module), name)
    problems = Problems()
    assert read(model, Path(right), problems) is not None, problems._found
    assert not problems
    assert read(model, Path(wrong), problems) is None
    try:
        problems.raise_if_any()
    except RecipeError as error:
        told[verb] = error.problems
print(json.dumps(told))
"""


def test_recipes_are_read_where_no_framework_is_installed(tmp_path: Path) -> None:
    """A right recipe of every command is read, the faults of a wrong one are told."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    asked = []
    for verb, (module, name) in RECIPES.items():
        right, wrong = tmp_path / f"{verb}.yaml", tmp_path / f"{verb}-wrong.yaml"
        right.write_text(yaml.safe_dump(RIGHT[verb]))
        wrong.write_text(yaml.safe_dump({**RIGHT[verb], **FAULTY[verb][0]}))
        asked.append([verb, module, name, str(right), str(wrong)])
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(asked)], capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for verb, faults in json.loads(done.stdout).items():
        assert len(faults) == 2, verb
        for text in FAULTY[verb][1]:
            assert any(re.fullmatch(rf"line \d+: {re.escape(text)}", f) for f in faults), faults


# ------------------------------------------------------------------------------------- JSON Schema


def verb_of(page: str, raw: Mapping[str, Any]) -> str | None:
    """The command that a recipe is for, by page and keys; ``None`` for those without a schema."""
    if {"aligned", "languages"} <= raw.keys():
        return "audit"
    if "aligned" in raw:
        return "realign"
    if {"tasks", "strategies"} <= raw.keys():
        return "bench"
    if "strategy" in raw:
        return "finetune"
    if "evaluations" in raw:
        return "eval"
    if {"method", "preset"} & raw.keys():
        return None if raw.get("method") == "median" else "merge"  # a plug-in's, in plugins.md
    if "merge_method" in raw or not {"base", "models"} <= raw.keys():
        return None
    if page == "analyze.md" or "analyses" in raw:
        return "analyze"
    return "localize" if "rule" in raw or page == "localize.md" else None


def documented() -> list[Any]:
    """Every recipe of a command with a schema in the examples and the docs."""
    found = []
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        if path.stem != "gate":  # a list of rules
            found += [(path.name, raw) for raw in parse_documents(path.read_text(), path.name)]
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S):
            with suppress(RecipeError):  # a part of a recipe, or a list
                found += [(page.name, raw) for raw in parse_documents(block, page.name)]
    asked = [(name, verb_of(name, raw), raw) for name, raw in found if isinstance(raw, Mapping)]
    kept = [(name, verb, raw) for name, verb, raw in asked if verb is not None]
    return [pytest.param(v, r, id=f"{n}-{v}-{i}") for i, (n, v, r) in enumerate(kept)]


def test_documented_recipes_are_found() -> None:
    """Of every command there is one at least, so that the next test asks something."""
    assert {p.values[0] for p in documented()} == set(RECIPES)


@pytest.mark.parametrize(("verb", "raw"), documented())
def test_documented_recipes_are_valid(verb: str, raw: Any) -> None:
    """Editors accept them; our reader finds no fault but files that are not there."""
    jsonschema.validate(raw, SCHEMAS[verb])
    assert [f for f in told(MODELS[verb], raw) if not re.search("no file|not installed", f)] == []


@pytest.mark.parametrize("verb", list(RECIPES))
def test_schemas_are_schemas_with_a_word_on_every_key(verb: str) -> None:
    """Valid themselves, a right recipe is valid, and keys at the top say what they are."""
    schema = SCHEMAS[verb]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(RIGHT[verb], schema)
    assert set(schema["properties"]) == set(MODELS[verb].model_fields)
    assert schema["additionalProperties"] is False
    described = [k for k, v in schema["properties"].items() if "description" in v]
    assert len(described) >= len(schema["properties"]) / 2


BROKEN: dict[str, list[dict[str, Any]]] = {
    "bench": [
        {"tasks": 3}, {"tasks": [3]}, {"tasks": ["bias", {"file": "rows.jsonl"}]}, {"tasks": ["bias", "../x"]},
        {"control": 3}, {"head": "proof"}, {"rows": {"train": 1}}, {"rows": {"trian": 10}}, {"seeds": []},
        {"seeds": [0.5]}, {"seeds": [-1]}, {"measure": []}, {"measure": ["adition"]}, {"strategies": {}},
        {"strategies": {"a/b": {"lr": 1e-3}}}, {"strategies": {"full": 3}}, {"strategies": {"full": {}}},
        {"strategies": {"full": {"lr": 0}}}, {"strategies": {"full": {"lr": "fast"}}},
        {"training": {"lr": 1e-3}}, {"training": {"schedule": "wavy"}}, {"training": {"checkpoints": []}},
        {"addition": {"alphas": [20]}}, {"negation": {"keep": 2}}, {"sensitivity": {"shares": [0]}}, {"base": ""},
    ],
    "audit": [
        {"sahre": 0.2}, {"aligned": ""}, {"aligned": 3}, {"languages": []}, {"languages": {"e n": {}}},
        {"languages": ["en", "en"]}, {"rows": {"prompt": ""}}, {"rows": {"probes": "x"}},
        {"scores": {"at": "nowhere"}}, {"scores": {"rows": 0}}, {"shares": []}, {"shares": [0.1, 2]},
        {"share": 0}, {"share": True}, {"controls": ["rnadom"]}, {"freeze": {"share": 1.5}},
        {"onto": {"aligned": "x"}}, {"seeds": [-1]}, {"ancestor": "ask"}, {"deltas": "yes"},
        {"evaluation": {"broken": 1}}, {"evaluation": {"families": ["nobody"]}},
        {"attack": {"train": "x", "training": {"lr": 0}}}, {"attack": {"limit": 3}},
    ],
    "analyze": [
        {"analyses": ["angles"]}, {"density": 0}, {"scope": "world"}, {"bases": {"kinds": ["pka"]}},
        {"seed": -1}, {"models": {}}, {"models": {"base": "x"}}, {"sensitivity": {"shares": [1]}},
        {"diagnostics": {"points": 1}}, {"diagnostics": {"dtype": "int8"}}, {"rows": 0},
        {"disentanglement": {"metric": "miles"}}, {"diagnostics": {"weights": "all"}},
    ],
    "eval": [
        {"dtype": "bf16"}, {"decoding": {"max_tokens": 0}}, {"decoding": {"heat": 1}}, {"evaluations": {}},
        {"evaluations": {"base": {"kind": "loss", "data": "x"}}}, {"evaluations": {"a": {"kind": "los", "data": "x"}}},
        {"evaluations": {"a": {"kind": "loss"}}}, {"evaluations": {"a": {"kind": "loss", "data": "x", "txet": "t"}}},
        {"evaluations": {"a": {"kind": "loss", "data": "x", "too_long": "crop"}}},
    ],
    "finetune": [
        {"bse": "x"}, {"base": 3}, {"base": ""}, {"strategy": 3}, {"strategy": ""}, {"task": "translation"},
        {"data": 3}, {"data": {"trian": "x"}}, {"data": {"train": "x", "validation": 1.5}},
        {"data": {"train": "x", "too_long": "crop"}}, {"data": {"train": "x", "limit": -1}},
        {"data": {"train": "x", "format": "json"}}, {"training": {"lr": 0}}, {"training": {"epochs": "three"}},
        {"training": {"batch": 0}}, {"training": {"schedule": "linaer"}}, {"training": {"precision": "fp8"}},
        {"output": {"form": "ptach"}}, {"output": {"dytpe": "bf16"}}, {"parameters": 3}, {"device": ""},
        {"strategy": "tallos"}, {"parameters": {"sparsty": 0.1}},
    ],
    "realign": [
        {"aligned": 3}, {"aligned": ""}, {"models": {}}, {"models": {"a": 1}}, {"models": {"one": {"path": "m", "weigth": 1}}},
        {"method": 3}, {"data": {"train": "x", "chosn": "y"}}, {"data": {"train": "x", "too_long": "crop"}},
        {"training": {"lr": "fast"}}, {"ancestor": "chek"}, {"space": {"include": 3}}, {"spase": {}},
        {"fuse": {"how": 3}}, {"method": "somv"}, {"parameters": {"lamda": 3}},
    ],
    "merge": [
        {"method": "teis"}, {"method": 3}, {"parameters": {"densty": 1}},
        {"preset": "nobody"}, {"models": {}}, {"models": 3}, {"models": {"base": "x"}},
        {"models": {"one": 3}}, {"base": ""}, {"base": 3}, {"polcy": {}}, {"policy": {"missing": "drop"}},
        {"policy": {"mising": "base"}}, {"output": {"dytpe": "bf16"}}, {"output": {"shard_size": []}},
        {"space": {"include": 3}}, {"slices": []}, {"slices": 3}, {"slices": [{"parameters": {}}]},
        {"slices": [{"sources": {"one": [0, 1, 2]}}]}, {"slices": [{"sources": {"one": ["a", "b"]}}]},
        {"slices": [{"sources": {}}]}, {"protect": "one"}, {"protect": {"mask": "m"}},
        {"protect": {"model": "one", "masks": "m"}}, {"protect": {"model": "one", "rule": "magnitude", "density": 2}},
        {"protect": {"model": "one", "rule": "magnitude", "density": 0.1, "scope": "world"}},
        {"tokenizer": 3}, {"tokenizer": {"sorce": "union"}}, {"tokenizer": {"pad_to_multiple_of": 0}},
        {"tokenizer": {"tokens": {"a": 1}}}, {"chat_template": 3}, {"parameters": 3}, {"stages": 3},
    ],
    "localize": [
        {"densty": 0.1}, {"models": {"a/b": "x"}}, {"models": {"one": {"path": "m", "weight": 1}}},
        {"at": "here"}, {"measure": ["logit"]}, {"learn": {"reg": "l2"}}, {"learn": {"start": 2}},
        {"keep_stats": "no"}, {"tasks": {"one": {"kind": "causal"}}},
        {"tasks": {"one": {"data": "x", "rows": 0}}}, {"space": {"include": 3}},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "wrong"), [(verb, wrong) for verb, each in BROKEN.items() for wrong in each]
)
def test_broken_recipes_are_refused_by_both(verb: str, wrong: dict[str, Any]) -> None:
    """The editor marks what our reader refuses, and the reader names the key."""
    raw = {**RIGHT[verb], **wrong}
    assert not jsonschema.Draft202012Validator(SCHEMAS[verb]).is_valid(raw)
    faults = [f for f in told(MODELS[verb], raw) if "no file" not in f]
    assert any(str(next(iter(wrong))) in fault for fault in faults), faults


def test_the_command_prints_schemas() -> None:
    """By name; without one it lists them, and a misspelt one is told."""
    for verb in RECIPES:
        assert json.loads(invoke("schema", verb).out)["properties"] == SCHEMAS[verb]["properties"]
    assert invoke("schema").out.split() == list(RECIPES)
    said = invoke("schema", "adit")
    assert (said.code, "did you mean 'audit'?" in said.err) == (2, True)


def test_analyses_are_listed_in_the_schema() -> None:
    """Every analysis can be completed."""
    assert [*ANALYSES] == SCHEMAS["analyze"]["properties"]["analyses"]["anyOf"][0]["anyOf"][0][
        "enum"
    ]
