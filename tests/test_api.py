"""The public API: one list, the same in the package, in its types, in docs/api.md and for commands.

``python tests/test_api.py`` writes docs/api.md anew.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import suture
from making import invoke
from suture.errors import RecipeError, did_you_mean, in_python, told_in_python

ROOT = Path(suture.__file__).parent
PAGE = ROOT.parent.parent / "docs" / "api.md"
GROUPS = {
    "Models and what is done with them": [
        "open", "merge", "localize", "save", "load_tuned", "role_of", "blame",
    ],
    "Verbs": list(suture.VERBS),
    "Values": ["Checkpoint", "TaskVector", "Mask", "Patch", "Stats", "Merged", "MergeReport",
               "Metric", "ParamSpace"],
    "Tables": ["METHODS", "PRESETS", "RULES", "STRATEGIES", "REALIGNERS", "EVALS", "VERBS"],
    "Errors": ["SutureError", "RecipeError", "CheckpointError", "MismatchError", "NonFiniteError",
               "OutputError", "MissingExtraError"],
    "Older names": ["run_recipe", "make_patch", "apply_patches", "revert_patch"],
}  # fmt: skip
"""Every public name, in the order of the page."""
NAMES = [name for group in GROUPS.values() for name in group]
MADE = re.compile(r"(<!-- api:(.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def home(name: str) -> Any:
    """The object that a public name stands for; of a callable module, the function."""
    found = getattr(suture, name)
    return found._verb if isinstance(found, ModuleType) else found


def first_line(thing: object) -> str:
    """What stands first in the documentation of something."""
    return (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")


def signature(name: str) -> str:
    """A call, without types: they are in the source, and an editor shows them."""
    parts = []
    star = False
    for parameter in inspect.signature(home(name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            star = True
            parts.append("*")
        mark = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f"={_shown(parameter.default)}"
        parts.append(f"{mark}{parameter.name}{default}")
    return f"suture.{name}({', '.join(parts)})"


def _shown(value: object) -> str:
    return "..." if callable(value) else repr(value)


def listed(group: str) -> str:
    """The names of a group, as the page has them."""
    lines = []
    for name in GROUPS[group]:
        if name.isupper():
            lines.append(f"- `suture.{name}`: {len(getattr(suture, name))} entries")
        elif group == "Older names":
            lines.append(f"- `suture.{name}` is `suture.{home(name).__name__}`")
        elif isinstance(home(name), type):
            lines.append(f"- `suture.{name}`: {first_line(home(name))}")
        else:
            command = suture.VERBS.get(name) if group == "Verbs" else None
            more = f" (`suture {command}`)" if command else ""
            lines.append(f"- `{signature(name)}`  \n  {first_line(home(name))}{more}")
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """The page with its lists made anew."""
    return MADE.sub(lambda m: m[1] + listed(m[2]) + m[4], text)


def test_one_list() -> None:
    """The package, its types and the page have the same names; nothing else is offered."""
    assert sorted([*set(NAMES), "__version__"]) == sorted(suture.__all__)
    assert dir(suture) == sorted(suture.__all__)
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    typed = {
        alias.asname or alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "inspect"
        for alias in node.names
    }
    assert sorted(typed) == sorted(suture.__all__)
    for name, module in typed.items():
        assert module == f"suture.{suture._HOMES[name]}", name
        assert getattr(importlib.import_module(module), name) is home(name)


def test_the_page_is_current() -> None:
    """docs/api.md has what the docstrings say."""
    text = PAGE.read_text(encoding="utf-8")
    assert [m[2] for m in MADE.finditer(text)] == list(GROUPS)
    assert written(text) == text, "run: .venv/bin/python tests/test_api.py"


def test_the_examples_of_the_page_are_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    done = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert done.failed == 0
    assert done.attempted > 10
    assert all(f"suture.{name}" in PAGE.read_text() for name in NAMES)


def test_every_command_is_a_verb() -> None:
    """What ``suture --help`` lists, but for tables, schemas, rows and the demo, is a function."""
    done = subprocess.run([sys.executable, "-m", "suture", "--help"], capture_output=True, text=True,
                          check=True, env={"COLUMNS": "200", "TERM": "dumb", **_ENV})  # fmt: skip
    commands = set(re.findall(r"^[│|]? +([a-z][a-z-]*) {2,}\S", done.stdout, re.MULTILINE))
    assert {"merge", "patch", "demo"} <= commands
    tables = {"methods", "strategies", "realigners", "schema", "demo", "proxy"}
    verbs = {command.split()[0] for command in suture.VERBS.values() if command}
    assert verbs == commands - tables
    shown = invoke("patch", "--help").out
    for command in (c for c in suture.VERBS.values() if c.startswith("patch ")):
        assert command.split()[1] in shown


@pytest.mark.parametrize("name", [n for n in NAMES if not n.isupper()])
def test_every_name_is_documented(name: str) -> None:
    """A plain first sentence, every argument, what is raised, and an example that runs."""
    thing = home(name)
    text = inspect.getdoc(thing) or ""
    assert re.match(r"[A-Z].*[.:]", first_line(thing)), name
    if isinstance(thing, type) or name == "role_of":
        assert ">>> " in text, name
        return
    assert "Raises:\n" in text, name
    assert ">>> " in text, name
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert re.search(rf"^    {parameter.name}: \S", text, re.MULTILINE), parameter
        assert parameter.annotation is not parameter.empty


def test_verbs_have_one_signature() -> None:
    """What is read comes first, ``out`` second or last of what is positional; all else by name."""
    places = {}
    for name in suture.VERBS:
        parameters = list(inspect.signature(home(name)).parameters.values())
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        places[name] = positional
        for option in ("overwrite", "resume", "threads", "device", "restricted"):
            found = next((p for p in parameters if p.name == option), None)
            assert found is None or found.kind is found.KEYWORD_ONLY, (name, option)
    recipes = [n for n, found in places.items() if found == ["recipe", "out"]]
    assert recipes == ["merge_recipe", "localize_recipe", "finetune", "realign", "analyze", "audit",
                       "bench"]  # fmt: skip
    writes = [n for n, found in places.items() if "out" in found]
    assert all(places[name][-1] == "out" for name in writes)
    assert set(suture.VERBS) - set(writes) == {"compare", "inspect", "diff", "measure"}


def test_the_old_ways_still_lead_there() -> None:
    """One release of aliases: what the pages named before."""
    from suture.training.load import load_tuned

    assert load_tuned is suture.load_tuned
    with pytest.raises(TypeError) as wrong:
        load_tuned()
    with pytest.raises(TypeError, match=re.escape(str(wrong.value))):
        suture.finetune.load_tuned()
    assert suture.analyze.analysis is suture.analyze
    assert suture.run_recipe is suture.merge_recipe
    assert suture.make_patch is suture.patch_make


TELLING = ("verbs/merge/explain.py", "verbs/analyze/result.py", "verbs/compare/result.py")
"""What is printed by commands only."""


def test_errors_speak_of_keywords() -> None:
    """Every option that a message of the library names has its keyword, and that keyword exists."""
    texts = {
        "exists; add --overwrite": "exists; add overwrite=True",
        "or --no-resume to start anew": "or resume=False to start anew",
        "go on with --allow-nonfinite": "go on with allow_nonfinite=True",
        "say --on-overlap last": 'say on_overlap="last"',
        "(--rank), or (--energy)": "(rank), or (energy)",
        "`suture inspect MODEL --check`": "`suture.inspect(MODEL, check=True)`",
        "pip install --no-deps -r x": "pip install --no-deps -r x",
        "overwrite=True": "overwrite=True",
    }
    for said, wanted in texts.items():
        assert in_python(said) == wanted
    named = set()
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).as_posix()
        if part.startswith(("cli/", "verbs/report/", "errors")) or part in TELLING:
            continue
        for text in strings(path):
            if re.search(
                r"pip install|accelerate|llama-gguf|suture eval --limit|suture proxy", text
            ):
                continue
            named |= set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", in_python(text)))
    assert named == set(), f"no keyword is known for {named}"
    with pytest.raises(RecipeError) as caught, told_in_python():
        raise RecipeError("one", "--overwrite")
    assert caught.value.args == ("one", "overwrite=True")
    assert "did you mean" in did_you_mean("overwrit", ["overwrite"])


def strings(path: Path) -> list[str]:
    """Every string of a module that is no documentation."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    loose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    return [n.value for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
            and id(n) not in docs | loose]  # fmt: skip


def test_wrong_calls_are_told_by_the_names_of_arguments(tmp_path: Path) -> None:
    """What is misspelt, what is no recipe, what is no list of models."""
    calls: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: suture.evaluate("x", {}, devices="cpu"),
            "no keyword 'devices'; did you mean 'device'",
        ),
        (
            lambda: suture.save({}, "out", overwite=True),
            "no keyword 'overwite'; did you mean 'overwrite'",
        ),
        (lambda: suture.merge_recipe(3, "out"), "recipe: a file or a mapping, not int"),  # type: ignore[arg-type]
        (lambda: suture.merge(None, 3), "models: a mapping from names to models, or a list"),  # type: ignore[arg-type]
        (lambda: suture.localize("x"), "vector: a task vector"),  # type: ignore[arg-type]
        (lambda: suture.open("x", label="y"), "label: is for a model in memory"),
        (lambda: suture.open({}, files=tmp_path / "no"), "files: .* is no folder"),
        (lambda: suture.patch_apply({}, [], "out"), "patches: name at least one"),
    ]
    for call, text in calls:
        with pytest.raises(RecipeError, match=text):
            call()


def test_importing_and_looking_cost_nothing() -> None:
    """Neither numpy nor torch for the package, its names and its errors."""
    code = """
import json, sys
import suture
dir(suture), suture.SutureError, suture.__version__, suture.open.__name__
early = "torch" in sys.modules
suture.merge, suture.Merged, suture.finetune, suture.analyze, suture.METHODS
print(json.dumps([early, "torch" in sys.modules, "transformers" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, False, False]


_ENV = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT.parent)}


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
