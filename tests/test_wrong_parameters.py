"""Parameters that would do nothing, and mistakes that hide behind others: all are said at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import making
import tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two models, and their masks."""
    where = tiny_model.workshop(tmp_path_factory.mktemp("made"))
    path = recipe(where, {"density": 0.1})
    assert making.invoke("localize", path, "-o", where / "masks").code == 0
    return where


def recipe(where: Path, more: Mapping[str, Any]) -> Path:
    """A recipe over both models, as a file."""
    what = {"base": "base", "models": {"one": "one", "two": "two"}, **more}
    path = where / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in what.items() if v is not None}, sort_keys=False))  # fmt: skip
    return path


def refused(where: Path, command: str, more: Mapping[str, Any], *wanted: str) -> str:
    """Follow a recipe that must be refused for these reasons, with nothing written."""
    path = recipe(where, more)
    before = making.tree(where)

    said = making.invoke(command, path, "-o", where / "out")

    assert said.code == 2, said.out
    making.lines_of(said.err, "error: ", *wanted)
    assert making.tree(where) == before
    return str(said.err)


LED = {"masks": "./masks", "base_masks": "./masks"}


@pytest.mark.parametrize("method", ["led", "stitch"])
@pytest.mark.parametrize(
    "key", [{"density": 0.2}, {"scope": "layer"}], ids=lambda key: next(iter(key))
)
def test_a_density_beside_masks_is_refused(made: Path, method: str, key: dict[str, Any]) -> None:
    """Masks were made at some density in some scope; another one beside them would do nothing."""
    files = LED if method == "led" else {"masks": "./masks"}
    refused(made, "merge", {"method": method, "parameters": {**key, **files}},
            f"line 7: parameters.{next(iter(key))}: has no meaning beside `masks`")  # fmt: skip


def test_the_density_of_a_model_beside_masks_is_refused(made: Path) -> None:
    """Also where a model has its own."""
    models = {"one": {"path": "one", "density": 0.3}, "two": "two"}
    refused(made, "merge", {"models": models, "method": "stitch", "parameters": {"masks": "./masks"}},
            "models.one.density: has no meaning beside `masks`")  # fmt: skip


def test_a_preset_gives_way_to_masks(made: Path, tmp_path: Path) -> None:
    """The density of a preset is no word of the user's; and the record of a merge by masks, which
    has no density in it, is a recipe that gives the same merge."""
    path = recipe(made, {"preset": "stitch-paper", "parameters": {"masks": "./masks"}})

    one = making.invoke("merge", path, "-o", tmp_path / "one", "--json")
    two = making.invoke("merge", tmp_path / "one" / "suture.json", "-o", tmp_path / "two", "--json")

    assert (one.code, two.code) == (0, 0), one.err + two.err
    assert one.json["fingerprint"] == two.json["fingerprint"]
    assert (
        "density"
        not in json.loads((tmp_path / "one" / "suture.json").read_text())["recipe"]["parameters"]
    )


HIDDEN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a misspelt method": (
        {"method": "tise", "parameters": {"densty": 0.1, "scale": "x"}, "output": {"dtype": "f99"},
         "models": {"one": {"path": "one", "wieght": 2}, "two": "./nowhere"}},
        ("6 problems", "no merge method 'tise'; did you mean 'ties'?", "ties has no 'densty'", "parameters.scale",
         "'f99'", "models.one: unknown key 'wieght'", "./nowhere")),
    "a method like no other": (
        {"method": "zzzz", "parameters": {"densty": 0.1, "weight": 1}, "models": {"one": {"path": "one", "wieght": 2}}},
        ("3 problems", "no merge method 'zzzz'", "no method has 'densty'; did you mean 'density'?",
         "models.one: unknown key 'wieght'; did you mean 'weight'?")),
    "a misspelt preset": (
        {"preset": "ties-papper", "parameters": {"densty": 0.1}},
        ("2 problems", "did you mean 'ties-paper'?", "ties has no 'densty'")),
    "a misspelt method of slices": (
        {"method": "tise", "slices": [{"sources": {"base": [0, 1], "one": [0, 2], "two": [0, 1]},
                                       "parameters": {"densty": 1}}]},
        ("did you mean 'ties'?", "slices[0].parameters: ties has no 'densty'", "as many layers of each model")),
    "a misspelt method before stages": (
        {"method": "tise", "stages": {"first": {"method": "lineer", "base": "base", "models": ["one"],
                                                "parameters": {"wieght": 1}}}},
        ("did you mean 'ties'?", "did you mean 'linear'?", "stage first: parameters: linear has no 'wieght'")),
    "a misspelt method of mergekit's": (
        {"merge_method": "tise", "base_model": "./base", "models": [{"model": "./one", "parameters": {"wieght": 1}}],
         "base": None, "chat_template": 3},
        ("no method 'tise'; did you mean 'ties'?", "ties has no 'wieght'", "chat_template")),
    "a method that mergekit does not know": (
        {"merge_method": "zzzz", "models": [{"model": "./one", "parameters": {"wieght": 1}}], "base": None,
         "chat_template": 3},
        ("no method 'zzzz'", "mergekit has no 'wieght'; did you mean 'weight'?", "chat_template")),
    "a misspelt rule of protection": (
        {"method": "linear", "base": None, "protect": {"model": "on", "rule": "magnitud", "scoop": "layer", "seed": -1}},
        ("6 problems", "protect.model: no model 'on'", "did you mean 'magnitude'?", "unknown key 'scoop'",
         "protect.seed", "protect.density: missing", "name a base")),
}  # fmt: skip


@pytest.mark.parametrize("what", HIDDEN)
def test_an_unknown_method_hides_nothing(made: Path, what: str) -> None:
    """What else is wrong is told with it: as though the nearest method were meant, or, where none
    is near, what no method has."""
    more, wanted = HIDDEN[what]
    refused(made, "merge", more, *wanted)


RULES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "of a name like another": (
        {"rule": "snp", "scope": "globe", "positive": True, "space": {"exclud": ["head"]}, "models": {"one": "./no"}},
        ("6 problems", "line 4: rule: no importance rule 'snp'; did you mean 'snip'?", "line 5: scope: no scope 'globe'",
         "positive: the scores of", "unknown key 'exclud'", "./no", "tasks: the rule snip needs data for 'one'")),
    "that learns": (
        {"rule": "lerned", "density": 0.1, "learn": {"epoch": 3}, "at": "both"},
        ("did you mean 'learned'?", "learn: unknown key 'epoch'", "at: the rule learned trains", "needs data for 'two'")),
    "like no other": ({"rule": "zzzz", "scope": "globe", "density": 3}, ("'zzzz'", "'globe'", "in (0, 1]; got 3")),
}  # fmt: skip


@pytest.mark.parametrize("what", RULES)
def test_an_unknown_rule_hides_nothing(made: Path, what: str) -> None:
    """The same of a localization."""
    more, wanted = RULES[what]
    refused(made, "localize", more, *wanted)
