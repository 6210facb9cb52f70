"""A module imports only what stands above it; heavy tools have one place each."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import suture
import toy

ROOT = Path(suture.__file__).parent

ORDER = [
    "version", "errors", "places", "spec", "roles", "sources", "settings", "schema", "task_rows", "loops", "ranks", "machine", "kernels", "headers", "checkpoint", "seal", "views", "layers",
    "vocabulary", "chat", "embeddings", "adapters", "ggufs", "opening", "forms", "publish", "writer", "held",
    "stream", "vector", "profile", "select", "stats", "importance", "maskfile", "mask", "graft", "patchfile",
    "patch", "gather", "analysis", "merges", "engine", "recipe_types", "mergekit", "recipe",
    "card", "models", "networks", "data", "images", "persample", "snapshot", "mover", "split", "kept",
    "probe", "tune", "evals", "measure",
    "learned", "diagnose", "report", "page", "outputs", "workspace",
    "parts", "planning", "merged", "record", "telling", "run", "testing", "trial", "patching", "lowrank", "finetune", "tasks",
    "arithmetic", "regions", "analyze", "suites", "realign", "plugins", "policy",
    "bench", "audit", "algebra", "api", "terminal", "cli", "__main__",
]  # fmt: skip
"""The way of a tensor, top to bottom."""

PLACES = {
    "numba": {"loops", "machine"},
    "llvmlite": {"loops", "machine"},
    "transformers": {"models"},
    "tokenizers": {"models"},
    "accelerate": {"tune"},
    "peft": {"finetune"},
    "typer": {"cli"},
    "rich": {"terminal"},
    "gguf": {"ggufs"},
    "altair": {"page"},
    "vl_convert": {"page"},
    "jinja2": {"page"},
    "scipy": {"analysis"},
    "sklearn": {"analysis"},
    "mergekit": set(),
    "PIL": {"images"},
    "pickle": set(),
}
"""Where a tool may be imported; others import it nowhere."""
TORCH = {
    "checkpoint", "models", "networks", "data", "images", "persample", "snapshot", "mover", "split", "kept",
    "probe", "tune", "evals", "finetune",
    "arithmetic", "bench",  "lowrank", "measure", "learned", "diagnose", "suites", "realign",
    "audit",
}  # fmt: skip
"""Where torch may be imported, and in ``checkpoint`` only when a torch tensor is asked for."""
BELOW = {"checkpoint": {"vector"}}
"""The one import against the order: subtracting two checkpoints gives a task vector."""
TORCH_LATE = {"checkpoint.py", "held.py", "merges/spectral.py"}
"""Where it is imported inside of functions only: by a torch tensor, by merges of whole matrices."""


def sources() -> Iterator[tuple[str, Path]]:
    """Every module with the entry of ORDER that it belongs to."""
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part != "__init__":
            yield part, path


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports by an absolute name, and whether at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            if node.module == "suture":
                for alias in node.names:
                    yield f"suture.{alias.name}", id(node) in top
            elif node.module is not None:
                yield node.module, id(node) in top


each_module = pytest.mark.parametrize(
    ("part", "path"), [pytest.param(p, f, id=str(f.relative_to(ROOT))) for p, f in sources()]
)


def test_every_module_has_its_place() -> None:
    """A new module is entered into the listing, and a removed one leaves it."""
    assert {part for part, _ in sources()} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@each_module
def test_a_module_imports_only_what_stands_above_it(part: str, path: Path) -> None:
    """The listing is also the import rule, for imports inside of functions, too."""
    allowed = {*ORDER[: ORDER.index(part) + 1], "__version__", *BELOW.get(part, ())}
    for name, _ in imported(path):
        if name.startswith("suture."):
            assert name.split(".")[1] in allowed, f"{path.name} imports {name}"


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
    files = {
        ".".join(("suture", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for path in ROOT.rglob("*.py")
    }
    uses: dict[str, set[str]] = {}
    for name, path in files.items():
        uses[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                uses[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    one = f"{node.module}.{alias.name}"
                    uses[name].add(one if one in files else str(node.module))
        uses[name] &= files.keys()
    uses["suture.checkpoints.checkpoint"] -= {f"suture.{below}" for below in BELOW["checkpoint"]}
    assert circles(uses) == []


@each_module
def test_what_is_private_stays_where_it_is(part: str, path: Path) -> None:
    """No module imports a name of another that begins with an underscore."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("suture"):
            private = [a.name for a in node.names if a.name[0] == "_" and a.name[1] != "_"]
            assert not private, f"{path.name} imports {private} from {node.module}"


@each_module
def test_heavy_tools_have_one_place(part: str, path: Path) -> None:
    """The compiler in loops and machine, transformers in models, the terminal in terminal; no pickle."""
    for name, at_top in imported(path):
        tool = name.split(".")[0]
        assert part in PLACES.get(tool, {part}), f"{path.name} imports {name}"
        if tool == "torch":
            place = path.relative_to(ROOT).as_posix()
            assert part in TORCH or place in TORCH_LATE, f"{path.name} imports {name}"
            assert place not in TORCH_LATE or not at_top, "a merge would import torch"


@each_module
def test_nothing_is_evaluated(part: str, path: Path) -> None:
    """No ``eval``, ``exec``, ``yaml.unsafe_load`` or pickle; ``print`` in terminal only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "__import__", "yaml.unsafe_load", "torch.load"), (
            called
        )
        assert called != "print" or part == "terminal", f"{path.name} prints"


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
from suture.run import merge
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
    "suture", "suture.analyze", "suture.bench", "suture.finetune", "suture.page", "suture.verbs.proxy.run", "suture.realign",
    "suture.regions", "suture.evals.results", "suture.verbs.compare.run", "suture.verbs.evaluate.result",
    "suture.errors", "suture.checkpoints.atomic", "suture.stream.sweep",
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
    for _, path in sources():
        assert not [
            n for n, _ in imported(path) if n.split(".")[0] in ("demo", "suture_demo", "examples")
        ]
