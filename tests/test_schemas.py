"""The schemas in docs/schemas are current, and every example of their verbs names its own.

``python tests/test_schemas.py`` writes docs/schemas anew. That broken recipes are refused by the
schemas is asked in test_schema.py.
"""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import jsonschema
import pytest

from making import invoke
from suture.cli.recipes import RECIPES
from suture.schema.export import schema_of
from suture.schema.text import parse_documents

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/schemas"
FIRST = re.compile(r"# yaml-language-server: \$schema=(\S+)")

VERBS = {
    "audit": "audit", "bench-quick": "bench", "bench": "bench", "eval-quick": "eval", "gate": "compare",
    "led-locate": "localize", "led-magnitude": "merge", "led-random": "merge",
    "led-safety-first": "merge", "led": "merge", "protect-magnitude": "merge", "protect-random": "merge",
    "protect": "merge", "realign": "realign", "safety-average": "merge", "safety-proxy": "eval",
    "safety-task-arithmetic": "merge", "safety": "eval", "demo/merges/average": "merge",
    "demo/merges/consensus": "merge", "demo/merges/dare-ties": "merge",
    "demo/merges/random-mask": "merge", "demo/merges/task-arithmetic": "merge",
    "demo/merges/ties": "merge",
}  # fmt: skip
"""The command that reads each example."""
WITH_SCHEMA = [(name, verb) for name, verb in VERBS.items() if verb in RECIPES]


def written(verb: str) -> str:
    """Return what the file of a command's schema holds: what ``suture schema VERB`` prints."""
    module, name = RECIPES[verb]
    schema = schema_of(getattr(import_module(module), name), f"Recipe of suture {verb}")
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def test_there_is_one_file_for_each_schema() -> None:
    """None is missing, and none is left of a command that has none."""
    assert sorted(p.name for p in FOLDER.iterdir()) == sorted(f"{verb}.json" for verb in RECIPES)


@pytest.mark.parametrize("verb", list(RECIPES))
def test_the_file_is_what_the_command_prints(verb: str) -> None:
    """Byte for byte, so that nobody completes keys of yesterday."""
    remedy = "docs/schemas is out of date: run python tests/test_schemas.py"
    assert (FOLDER / f"{verb}.json").read_text(encoding="utf-8") == written(verb), remedy
    assert invoke("schema", verb).out == written(verb)


def test_every_example_has_its_command_here() -> None:
    """A new example says who reads it, so that the next test asks about it."""
    examples = {p.relative_to(ROOT / "examples") for p in (ROOT / "examples").rglob("*.yaml")}
    assert {p.with_suffix("").as_posix() for p in examples} == set(VERBS)


@pytest.mark.parametrize(("name", "verb"), WITH_SCHEMA)
def test_an_example_names_its_schema_and_is_valid(name: str, verb: str) -> None:
    """Its first line leads an editor to the file, and the file accepts the example."""
    path = ROOT / "examples" / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    first = FIRST.fullmatch(text.splitlines()[0])

    assert first, f"{name}.yaml does not begin with '# yaml-language-server: $schema=...'"
    schema = (path.parent / first[1]).resolve()
    assert schema == FOLDER / f"{verb}.json"
    known = json.loads(schema.read_text(encoding="utf-8"))
    for raw in parse_documents(text, name):
        jsonschema.validate(raw, known)


@pytest.mark.parametrize("name", [name for name, verb in VERBS.items() if verb not in RECIPES])
def test_other_examples_promise_no_schema(name: str) -> None:
    """An editor would mark every key as wrong."""
    path = ROOT / "examples" / f"{name}.yaml"
    assert "yaml-language-server" not in path.read_text(encoding="utf-8")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for verb in RECIPES:
        (FOLDER / f"{verb}.json").write_text(written(verb), encoding="utf-8")
