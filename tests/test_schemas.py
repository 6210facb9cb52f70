"""The schemas of recipes and the pages made of them are current; every example names its schema.

``python tests/test_schemas.py`` writes docs/schemas and docs/reference anew. That broken recipes are
refused by the schemas is asked in test_schema.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

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


# ------------------------------------------------------------------------------- pages of recipes

WORDS = {"string": "text", "integer": "a whole number", "number": "a number",
         "boolean": "true or false", "null": "nothing"}  # fmt: skip
BOUNDS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
}


def heading(name: str) -> str:
    """The name of a section's class as words."""
    words = re.sub(r"Keys$|Settings(?=Keys)", "", name)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words).capitalize()


def typed(entry: Any, defs: Mapping[str, Any], sections: list[str]) -> str:
    """What may stand after a key, in words; names of sections are added to ``sections``."""
    if "$ref" in entry:
        name = entry["$ref"].rpartition("/")[2]
        if name not in defs:
            return "a recipe"
        target = defs[name]
        if "properties" in target:
            sections += [name] if name not in sections else []
            return f"[{heading(name).lower()}](#{heading(name).lower().replace(' ', '-')})"
        return typed(target, defs, sections)
    if "anyOf" in entry:
        parts = [typed(one, defs, sections) for one in entry["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if "enum" in entry:
        return ", ".join(f"`{word}`" for word in entry["enum"] if word)
    if "const" in entry:
        return f"`{entry['const']}`"
    kind = entry.get("type")
    if kind == "array":
        return f"a list: {typed(entry.get('items', {}), defs, sections)}"
    if kind == "object":
        more = entry.get("additionalProperties")
        inner = typed(more, defs, sections) if isinstance(more, dict) and more else ""
        return f"a mapping{f' from names to {inner}' if inner else ''}"
    bounds = [
        f"{words} {entry[key]:g}" for key, words in BOUNDS.items()
        if key in entry and abs(entry[key]) < 1 << 31
    ]  # fmt: skip
    return " ".join([WORDS.get(kind, "any value"), ", ".join(bounds)]).strip()


def shown(entry: Mapping[str, Any]) -> str:
    """The default of a key; empty for none, and for a section's, whose own keys tell theirs."""
    default = entry.get("default")
    if default is None or "$ref" in json.dumps(entry) or isinstance(default, dict):
        return ""
    words = default if isinstance(default, list) else [default]
    texts = [str(w).lower() if isinstance(w, bool) else f"{w:g}" if isinstance(w, float) else str(w)
             for w in words]  # fmt: skip
    return ", ".join(f"`{text}`" for text in texts if text)


def keys(schema: Mapping[str, Any], defs: Mapping[str, Any], sections: list[str]) -> str:
    """The keys of a section as a table, those that are required first; long lists of words below."""
    lines = ["| key | what may stand there | by default | |", "|---|---|---|---|"]
    needed, lists = schema.get("required", ()), []
    for key, entry in sorted(schema["properties"].items(), key=lambda pair: pair[0] not in needed):
        default = "required" if key in schema.get("required", ()) else shown(entry)
        refs = re.findall(r"#/\$defs/(\w+)", json.dumps(entry))
        inner = next((defs[r].get("description", "") for r in refs), "")
        about = entry.get("description", inner).replace("|", "\\|").replace("``", "`")
        kind = typed(entry, defs, sections)
        if kind.count("`, `") > 8:
            lists.append(f"`{key}` is one of {kind}.")
            kind = "a name, see below"
        lines.append(f"| `{key}` | {kind} | {default} | {about} |")
    return "\n\n".join(["\n".join(lines), *lists])


def page(verb: str) -> str:
    """The page of a command's recipes: each section with its keys, in the order of their use."""
    schema = json.loads(written(verb))
    defs = {n: next((o for o in d.get("anyOf", ()) if "properties" in o), d)
            for n, d in schema.get("$defs", {}).items()}  # fmt: skip
    sections: list[str] = []
    parts = [f"# Recipe of `suture {verb}`", schema["description"], (
        f"Editors complete and check it by [its schema](../schemas/{verb}.json), which "
        f"`suture schema {verb}` prints; a first line such as"
    ), f"```text\n# yaml-language-server: $schema={verb}.json\n```", "names it.",
        keys(schema, defs, sections)]  # fmt: skip
    done = 0
    while done < len(sections):  # a section may name further ones
        name = sections[done]
        done += 1
        parts += [
            f"## {heading(name)}",
            defs[name].get("description", ""),
            keys(defs[name], defs, sections),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


@pytest.mark.parametrize("verb", list(RECIPES))
def test_the_page_of_a_recipe_is_current(verb: str) -> None:
    """It is made of the recipe's model, with every key and what it is for."""
    remedy = "docs/reference is out of date: run python tests/test_schemas.py"
    text = (FOLDER.parent / f"reference/{verb}.md").read_text(encoding="utf-8")
    assert text == page(verb), remedy
    for key in json.loads(written(verb))["properties"]:
        assert f"| `{key}` |" in text
    silent = [row for row in text.splitlines() if row.startswith("| `") and row.endswith("|  |")]
    assert silent == [], "these keys do not say what they are for"


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
        (FOLDER.parent / f"reference/{verb}.md").write_text(page(verb), encoding="utf-8")
