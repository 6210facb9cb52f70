"""Parameters that would do nothing, and mistakes that hide behind others: all are said at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import making
import refusing
import tiny_model
from suture.verbs.realign.plan import make_plan as plan_realign


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
    "that learns by values of other kinds": (
        {"rule": "learned", "density": 0.1, "learn": {"preset": ["x"], "epochs": "many", "lr": float("nan")}},
        ("learn.preset: ['x'] is not known", "learn.epochs: a whole number", "learn.lr: a number, not nan")),
    "on no device": (
        {"rule": "snip", "density": 0.1, "models": {"one": "one"}, "device": "gpu",
         "tasks": {"one": {"data": "rows.jsonl", "head": "head.safetensors"}}},
        ("line 6: device: 'gpu' is none; auto, cpu or cuda",)),
    "like no other": ({"rule": "zzzz", "scope": "globe", "density": 3}, ("'zzzz'", "'globe'", "in (0, 1], not 3")),
}  # fmt: skip


@pytest.mark.parametrize("what", RULES)
def test_an_unknown_rule_hides_nothing(made: Path, what: str) -> None:
    """The same of a localization."""
    more, wanted = RULES[what]
    refused(made, "localize", more, *wanted)


FILES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "statistics of a localization": (
        "localize", {"rule": "snip", "density": 0.1, "stats": {"one": "no.safetensors", "two": "rows.jsonl"}},
        ("2 problems", "line 8: stats.one: ", "no.safetensors: No such file", "line 9: stats.two: ", "rows.jsonl")),
    "statistics of a merge, beside another mistake": (
        "merge", {"method": "fisher_merging", "parameters": {"stats": "./no", "wieght": 1}},
        ("3 problems", "line 7: parameters.stats.one: no such file", "line 7: parameters.stats.two: no such file",
         "'wieght'")),
    "statistics of a base": (
        "merge", {"method": "led", "parameters": {
            "stats": {"one": "rows.jsonl", "two": "rows.jsonl"},
            "base_stats": {"one": "head.safetensors", "two": "head.safetensors"}}},
        ("4 problems", "line 8: parameters.stats.one: ", "rows.jsonl", "line 12: parameters.base_stats.two: ",
         "not a file of statistics")),
    "masks": ("merge", {"method": "stitch", "parameters": {"masks": {"one": "head.safetensors", "two": "no"}}},
              ("line 9: parameters.masks.two: no such file",)),
    "a mask of a protection": (
        "merge", {"method": "linear", "protect": {"model": "one", "mask": "head.safetensors"}},
        ("line 8: protect.mask: ", "head.safetensors: not a mask")),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_missing_or_none_is_told_with_its_line(made: Path, what: str) -> None:
    """Statistics and masks that a recipe names: the key and the line stand before the file."""
    command, more, wanted = FILES[what]
    refused(made, command, more, *wanted)


TUNINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "of a name like another": (
        {"strategy": "taloss", "parameters": {"densty": 1}, "base": "./no", "training": {"patience": 2, "lr": -1},
         "data": {"train": "rows.jsonl", "validation": 0}},
        ("4 problems", "line 2: strategy: no strategy 'taloss'; did you mean 'talos'?", "talos has no 'densty'",
          "training.lr: a positive number, not -1", "line 1: ./no")),
    "like no other": (
        {"strategy": "zzzz", "parameters": {"densty": 1}, "training": {"patience": 2}, "output": {"dtype": "f99"},
         "data": {"train": "rows.jsonl", "validation": 0}},
        ("no strategy 'zzzz'", "no strategy has 'densty'; did you mean 'density'?", "'f99'",
         "training.patience: needs validation rows")),
    "and rows": (
        {"strategy": "taloss", "data": {"train": "rows.jsonl", "text": "body", "max_length": 9}},
        ("2 problems", "did you mean 'talos'?", "line 3: data: no row has a column 'body'")),
    "of values of other kinds": (
        {"strategy": ["full"], "data": {"train": "rows.jsonl"}, "training": {"seed": -1}, "output": {"dtype": "f3"}},
        ("3 problems", "strategy: a name, not ['full']", "training.seed: at least 0, not -1", "output.dtype: no dtype")),
    "and no rows": ({"strategy": "taloss", "data": {"train": "no.jsonl"}, "base": "./no", "head": "none"},
                    ("4 problems", "did you mean 'talos'?", "no file", "./no", "head: no file")),
}  # fmt: skip


@pytest.mark.parametrize("what", TUNINGS)
def test_an_unknown_strategy_hides_nothing(made: Path, what: str) -> None:
    """The same of a fine-tuning: its parameters, its base and its rows are looked at all the same."""
    more, wanted = TUNINGS[what]
    refused(made, "finetune", {"models": None, **more}, *wanted)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aligned model, a tuned one, pairs, and what they were made of."""
    return refusing.family(tmp_path_factory.mktemp("aligned"))


REALIGN = {"base": "./start", "aligned": "./aligned", "models": {"tuned": "./tuned"}}
WAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "of a name like another": (
        {"method": "somv", "parameters": {"betta": 1, "draws": 0}, "models": {"tuned": "./no"},
         "data": {"train": "pairs.jsonl", "chosen": "best"}},
        ("5 problems", "did you mean 'somf'?", "somf has no 'betta'", "line 8: parameters.draws", "line 3: models.tuned",
         "'best'")),
    "like no other": (
        {"method": "zzzz", "parameters": {"betta": 1}, "aligned": "./no", "fuse": "tis"},
        ("4 problems", "no way to realign 'zzzz'", "no way to realign has 'betta'; did you mean 'beta'?", "line 4: aligned: ./no",
         "did you mean 'ties'?")),
    "and values of other kinds": (
        {"method": ["dare"], "fuse": {"how": ["ties"]}, "data": {"train": {"path": "pairs.jsonl", "split": 3}}},
        ("3 problems", "method: a name, not ['dare']", "fuse.how: ['ties'] is not known", "data.train.split: a text, not 3")),
    "that contradicts itself": (
        {"method": "somf", "parameters": {"granularity": "tensor"}, "device": 3},
        ("3 problems", "whatever was learned", "data: missing", "device: auto")),
}  # fmt: skip


@pytest.mark.parametrize("what", WAYS)
def test_an_unknown_way_to_realign_hides_nothing(aligned: Path, what: str) -> None:
    """The same of a realignment, with the lines of what cannot be opened."""
    more, wanted = WAYS[what]
    refused(aligned, "realign", {**REALIGN, **more}, *wanted)


IDLE: dict[str, tuple[dict[str, Any], str]] = {
    "draws of a soft mask": ({"method": "somf", "parameters": {"draws": 4}}, "parameters.draws"),
    "how many, beside a threshold": ({"method": "safelora", "parameters": {"number": 3}}, "parameters.number"),
    "a threshold, beside how many": (
        {"method": "safelora", "parameters": {"select": "number", "threshold": 0.1}}, "parameters.threshold"),
    "a density beside a mask": (
        {"method": "protect", "parameters": {"mask": "m.safetensors", "density": 0.2}}, "parameters.density"),
    "a scope where nothing is ranked": (
        {"method": "dare", "fuse": {"how": "average", "scope": "tensor"}}, "fuse.scope: average ranks no entries"),
    "a density where all is kept": (
        {"method": "dare", "fuse": {"density": 0.5}}, "fuse.density: single keeps all"),
}  # fmt: skip


@pytest.mark.parametrize("what", IDLE)
def test_a_parameter_that_would_do_nothing_is_refused(aligned: Path, what: str) -> None:
    """Where one parameter of a realignment decides that another is never read."""
    more, wanted = IDLE[what]
    data = {"data": {"train": "pairs.jsonl"}} if more["method"] == "somf" else {}
    refused(aligned, "realign", {**REALIGN, **data, **more}, wanted)


def test_what_a_way_to_realign_does_not_read_is_told(aligned: Path, tmp_path: Path) -> None:
    """Recipes for several methods share their sections, so what this one leaves alone is a note: a
    safety model, the training of a method that does not train, a base that nothing asks. The
    record of the run has only what was read, and is a recipe without such notes."""
    what = {**REALIGN, "method": "magnitude", "safety": "./other", "ancestor": "trust",
            "training": {"lr": 0.1, "epochs": 2, "batch": 4}, "utility": "utility.jsonl"}  # fmt: skip
    plan = plan_realign({k: located(aligned, v) for k, v in what.items()}, tmp_path / "out")

    assert plan.notes[:3] == (
        "safety: magnitude reads no such model; it is left out",
        "training: magnitude does not train, so lr, epochs have no effect",
        "base: only the check of the ancestor would read it, and `ancestor: trust` forgoes it",
    )
    assert "safety" not in plan.inputs
    assert plan.recipe.resolved()["training"] == {
        "batch": 4, "activations": "auto", "activations_memory": 1.0, "activations_disk": 10.0
    }  # fmt: skip
    again = plan_realign({**plan.recipe.resolved(), "base": None}, tmp_path / "out")
    assert not again.notes
    checked = plan_realign({**plan.recipe.resolved(), "ancestor": "check"}, tmp_path / "out")
    assert not checked.notes


def located(where: Path, value: Any) -> Any:
    """Paths from a folder on."""
    if isinstance(value, str) and (where / value).exists():
        return str(where / value)
    return {k: located(where, v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize(
    "command", [("diff",), ("extract-lora", "--rank", "2", "-o", "lora")], ids=lambda c: c[0]
)
def test_checks_come_before_what_is_told(
    made: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Of two models that do not fit: the error alone, no word of what would be read."""
    tiny_model.save_model(tiny_model.language_model(), tiny_model.tokenizer(), tmp_path / "other")
    name, *options = command

    said = making.invoke(name, made / "base", tmp_path / "other", *options)

    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("error: "), said.err


def test_the_estimate_counts_what_protection_holds(made: Path) -> None:
    """Marks and the entries of one model, and scores where they come from a rule."""
    needs = []
    for protect in (None, {"model": "one", "mask": "masks/one.safetensors"},
                    {"model": "one", "rule": "magnitude", "density": 0.1}):  # fmt: skip
        path = recipe(made, {"method": "linear", "protect": protect})
        said = making.invoke("merge", path, "-o", made / "out", "--dry-run", "--json")
        needs.append(said.json["peak_memory"])
    assert needs == sorted(set(needs)), needs


def test_an_output_inside_of_an_input_is_told_as_that(made: Path) -> None:
    """It lies in the model, and does not hold it."""
    said = making.invoke("merge", recipe(made, {"method": "linear"}), "-o", made / "one" / "out")

    assert said.code == 2
    making.lines_of(said.err, "out: lies in the input 'one'; write somewhere else")
