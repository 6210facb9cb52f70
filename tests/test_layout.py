"""A module imports only what stands above it; heavy tools have one place each."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import suture
import toy

ROOT = Path(suture.__file__).parent

ROOMS = (
    "version", "errors", "tensors", "schema", "kernels", "checkpoints", "stream", "edits", "merges",
    "training", "evals", "analysis", "runs", "verbs", "plugins", "testing", "api", "cli", "__main__",
)  # fmt: skip
"""The rooms, in the order in which a tensor travels; a file imports from its own and those before."""
BELOW = {"checkpoints.checkpoint": {"stream.vector"}}
"""The one import against the order: subtracting two checkpoints gives a task vector."""
MAY_USE = {
    "analyze": {"localize", "merge"},
    "audit": {"evaluate", "finetune", "localize"},
    "bench": {"finetune"},
    "compare": {"evaluate", "merge"},
    "evaluate": {"merge"},
    "finetune": {"patch"},
    "localize": {"merge"},
}
"""The commands that are made of others: an audit fine-tunes, evaluates and localizes."""
SHAPE = {
    "analyze": "recipe plan run result", "audit": "recipe plan run result",
    "bench": "recipe plan run result", "compare": "recipe run result",
    "evaluate": "recipe plan run result", "extract_lora": "run",
    "finetune": "recipe plan run result", "localize": "recipe plan run result",
    "merge": "recipe plan run result", "patch": "run", "proxy": "run",
    "realign": "recipe plan run result", "report": "run",
}  # fmt: skip
"""The files of the common shape that each command has: those without a recipe plan nothing."""

PLACES = {
    "numba": {"kernels"},
    "llvmlite": {"kernels"},
    "transformers": {"training.models"},
    "tokenizers": {"training.models"},
    "accelerate": {"training.loop"},
    "peft": {"training"},
    "typer": {"cli"},
    "rich": {"cli.terminal"},
    "gguf": {"checkpoints.gguf"},
    "altair": {"verbs.report"},
    "vl_convert": {"verbs.report"},
    "jinja2": {"verbs.report"},
    "scipy": {"analysis"},
    "sklearn": {"analysis"},
    "mergekit": set(),
    "PIL": {"training.images"},
    "pickle": set(),
}
"""Where a tool may be imported, a room or a module; others import it nowhere."""
TORCH = {
    "training", "evals", "analysis.arithmetic", "analysis.vector_space", "analysis.loss_curves",
    "analysis.ancestry", "runs.weights", "checkpoints.checkpoint",
    "verbs.audit", "verbs.bench", "verbs.evaluate", "verbs.extract_lora", "verbs.finetune",
    "verbs.realign", "verbs.localize", "verbs.analyze",
}  # fmt: skip
"""Where torch may be imported, and in ``checkpoint`` only when a torch tensor is asked for."""
TORCH_LATE = {
    "checkpoints.checkpoint",
    "checkpoints.memory",
    "merges.spectral",
    "verbs.merge.lazy",
    "api.algebra",
}
"""Where it is imported inside of functions only: by a torch tensor, by merges of whole matrices."""
PLAIN = {"schema"}
"""Rooms that import neither numpy nor torch; the recipes of commands are held to it, too."""


def name_of(path: Path) -> str:
    """Return the name of a module below ``suture``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
"""Every module, by its name; the package itself has an empty one."""
INSIDE = {name: path for name, path in FILES.items() if name}


def within(name: str, places: Iterable[str]) -> bool:
    """Whether a module is one of some places, or lies below one of them."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


@cache
def tree_of(name: str) -> ast.Module:
    """Return a module's syntax, parsed once for all tests."""
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


@cache
def imported(name: str) -> tuple[tuple[str, bool], ...]:
    """Return every module that a module imports, and whether at its top level.

    Imports for types and inside of functions are counted; a name of a package counts as a module
    where it is one.
    """
    tree, found = tree_of(name), []
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                known = whole.removeprefix("suture.") in FILES
                found.append((whole if known else node.module, id(node) in top))
    return tuple(found)


def uses(name: str) -> set[str]:
    """Return the modules of the package that a module imports, without the arrow of ``BELOW``."""
    found = {n.removeprefix("suture.") for n, _ in imported(name) if n.startswith("suture.")}
    return (found & INSIDE.keys()) - BELOW.get(name, set()) - {name}


each_module = pytest.mark.parametrize("name", INSIDE)


def test_every_module_lies_in_a_room() -> None:
    """A module at the top is a room of its own; the rooms are those of the list."""
    assert {name.split(".")[0] for name in INSIDE} == set(ROOMS)


@each_module
def test_a_module_imports_only_from_rooms_before_its_own(name: str) -> None:
    """For types and inside of functions, too."""
    room = name.split(".")[0]
    allowed = {"", *ROOMS[: ROOMS.index(room) + 1]}
    for other in uses(name):
        assert other.split(".")[0] in allowed, f"{name} imports {other}"


def test_commands_use_only_the_commands_they_are_made_of() -> None:
    """``MAY_USE`` lists them, and lists nothing that is not used."""
    arrows: dict[str, set[str]] = {}
    for name in INSIDE:
        if name.startswith("verbs."):
            verb = name.split(".")[1]
            others = {o.split(".")[1] for o in uses(name) if o.startswith("verbs.")} - {verb}
            arrows.setdefault(verb, set()).update(others)
    assert {verb: others for verb, others in arrows.items() if others} == MAY_USE


def test_commands_are_of_one_shape() -> None:
    """Whoever has read one folder knows where the others keep keys, checks, work and result."""
    folders = {p.parent.name: p.parent for p in (ROOT / "verbs").glob("*/__init__.py")}
    common = ("recipe", "plan", "run", "result")
    assert {
        verb: " ".join(part for part in common if (folder / f"{part}.py").exists())
        for verb, folder in sorted(folders.items())
    } == SHAPE


def test_recipes_are_read_without_numpy_and_torch() -> None:
    """The schema, and every ``recipe.py``, import neither by themselves."""
    for name in INSIDE:
        if within(name, PLAIN) or (name.startswith("verbs.") and name.endswith(".recipe")):
            tools = {other.split(".")[0] for other, _ in imported(name)}
            assert not tools & {"numpy", "torch"}, name


def test_no_class_name_is_taken_twice_below_the_commands() -> None:
    """Outside of commands, where ``Plan`` is each one's own, a class is known by its name."""
    homes: dict[str, list[str]] = {}
    for name in INSIDE:
        if not name.startswith("verbs."):
            for node in tree_of(name).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes.setdefault(node.name, []).append(name)
    assert {n: found for n, found in homes.items() if len(found) > 1} == {}


def circles(uses: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other by what they import, sorted."""
    reach = {name: set(others) for name, others in uses.items()}
    for middle in reach:
        for others in reach.values():
            if middle in others:
                others |= reach[middle]
    groups = {tuple(sorted(o for o in reach[n] if n in reach[o])) for n in reach if n in reach[n]}
    return sorted(map(list, groups))


def test_circles_are_seen() -> None:
    """Two circles apart from each other, and one who only looks on."""
    uses = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e", "a"}, "e": {"d"}, "f": {"a", "d"}}
    assert circles(uses) == [["a", "b", "c"], ["d", "e"]]


def test_no_modules_import_each_other() -> None:
    """Not in a circle of any length; imports for types and inside of functions are counted."""
    assert circles({name: uses(name) for name in INSIDE}) == []


def test_every_room_serves_a_later_one() -> None:
    """All but the doors; run with ``-s`` to see how many imports lead from room to room."""
    arrows: dict[str, Counter[str]] = {room: Counter() for room in ROOMS}
    for name in INSIDE:
        room = name.split(".")[0]
        arrows[room].update(o.split(".")[0] for o in uses(name) if o.split(".")[0] != room)
    for room, others in arrows.items():
        print(f"{room:<12}", " ".join(f"{other} {n}" for other, n in others.most_common()))
    assert set(ROOMS) - set().union(*arrows.values()) == DOORS


DOORS = {"api", "plugins", "testing", "__main__"}
"""What nobody inside needs: people, plug-ins and the shell come in there."""


@each_module
def test_what_is_private_stays_where_it_is(name: str) -> None:
    """No module imports a name of another that begins with an underscore."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("suture"):
            private = [a.name for a in node.names if a.name[0] == "_" and a.name[1] != "_"]
            assert not private, f"{name} imports {private} from {node.module}"


@each_module
def test_heavy_tools_have_one_place(name: str) -> None:
    """The compiler in kernels, transformers in models, the terminal in terminal; no pickle."""
    for other, at_top in imported(name):
        tool = other.split(".")[0]
        assert tool not in PLACES or within(name, PLACES[tool]), f"{name} imports {other}"
        if tool == "torch":
            assert within(name, TORCH | TORCH_LATE), f"{name} imports {other}"
            assert name not in TORCH_LATE or not at_top, "a merge would import torch"


@each_module
def test_nothing_is_evaluated(name: str) -> None:
    """No ``eval``, ``exec``, ``yaml.unsafe_load`` or pickle; ``print`` in terminal only."""
    for node in ast.walk(tree_of(name)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "__import__", "yaml.unsafe_load", "torch.load"), (
            called
        )
        assert called != "print" or name == "cli.terminal", f"{name} prints"


def python(code: str, *args: str) -> Any:
    """Run code in a fresh interpreter; what it prints last is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


HEAVY = ("torch", "transformers", "safetensors", "huggingface_hub")


def test_merges_import_neither_torch_nor_transformers(family: Any, tmp_path: Path) -> None:
    """Every entrywise method runs from recipe to folder without them: small merges are fast."""
    models = family("bf16")
    recipes = [
        toy.recipe(
            name,
            models.some(*("ada", "bob", "cyd")[: method.most]),
            models.base_path if method.needs_base else None,
        )
        for name, method in suture.METHODS.items()
        if not method.tensorwise
    ]
    code = """
import json, sys
from pathlib import Path
from suture.verbs.merge import VERB as merge
recipes, out = json.loads(sys.argv[1]), Path(sys.argv[2])
for recipe in recipes:
    merge(recipe, out / recipe["method"])
print(json.dumps(sorted(sys.modules)))
"""
    loaded = python(code, json.dumps(recipes), str(tmp_path))

    assert not set(loaded) & set(HEAVY)
    assert "numpy" in loaded
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(r["method"] for r in recipes)


def test_help_imports_nothing_heavy() -> None:
    """``suture --help`` answers without numpy, numba or torch."""
    code = """
import json, sys
sys.argv = ["suture", "--help"]
from suture.cli import main
try:
    main()
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)))
"""
    assert not set(python(code)) & {*HEAVY, "numpy", "numba", "llvmlite", "yaml", "pydantic"}


def test_importing_suture_costs_nothing() -> None:
    """The public names are loaded when they are used, not before."""
    loaded = python("import json, sys, suture; print(json.dumps(sorted(sys.modules)))")

    assert [name for name in loaded if name.startswith("suture")] == ["suture"]
    assert not set(loaded) & {*HEAVY, "numpy"}


def test_every_public_name_is_there() -> None:
    """What ``__all__`` lists can be had, and nothing else is offered."""
    for name in suture.__all__:
        assert getattr(suture, name) is not None
    assert dir(suture) == sorted(suture.__all__)
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = suture.nonesuch


VERBS = {
    "suture", "suture.checkpoints.atomic", "suture.errors", "suture.evals.results",
    "suture.runs.progress", "suture.stream.sweep", "suture.verbs", "suture.verbs.bench.tasks",
    "suture.verbs.compare.result", "suture.verbs.compare.run", "suture.verbs.proxy",
    "suture.verbs.report.run",
}  # fmt: skip
"""What the demo may import: verbs, what reads and shows their results, errors, locks, cores."""


def test_the_demo_uses_verbs_and_the_product_uses_nothing_of_the_demo() -> None:
    """The demo is an example: it needs nothing that others cannot use, and nothing needs it."""
    demo = ROOT.parents[1] / "examples" / "demo"
    files = sorted(demo.glob("*.py"))
    assert len(files) >= 8
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module is not None
                if node.module.split(".")[0] == "suture":
                    assert node.module in VERBS, f"{path.name}: {node.module}"
            elif isinstance(node, ast.Import):
                inside = {a.name for a in node.names if a.name.split(".")[0] == "suture"}
                assert inside <= {"suture"}, path.name
    for name in INSIDE:
        assert not [
            n for n, _ in imported(name) if n.split(".")[0] in ("demo", "suture_demo", "examples")
        ]
