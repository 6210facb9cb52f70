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
