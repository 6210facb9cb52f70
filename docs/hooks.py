"""What the site has besides the pages in docs: the public names, and pages of the repository."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Pages at the top of the repository."""
OLDER = ("apply_patches", "make_patch", "revert_patch")
"""Other names of functions that are on the page."""


def homes() -> dict[str, str]:
    """Return the module of every public name; nothing of Suture is imported."""
    tree = ast.parse((ROOT / "src/suture/__init__.py").read_text(encoding="utf-8"))
    table = next(
        node.value for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"
    )  # fmt: skip
    found: dict[str, str] = ast.literal_eval(table)
    return {name: f"suture.{module}" for name, module in found.items() if name[0] != "_"}


def silent(name: str, module: str) -> list[str]:
    """Return what lacks a docstring: the name where it is defined, public methods of a class."""
    path = ROOT / "src" / (module.replace(".", "/") + ".py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for at, node in enumerate(body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            inner = node.body if isinstance(node, ast.ClassDef) else []
            methods = [m for m in inner if isinstance(m, ast.FunctionDef) and m.name[0] != "_"]
            found = [f"{name}.{m.name}" for m in methods if ast.get_docstring(m) is None]
            return found if ast.get_docstring(node) else [name, *found]
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if name in [word.id for t in targets for word in ast.walk(t) if isinstance(word, ast.Name)]:
            below = body[at + 1] if at + 1 < len(body) else None
            told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            return [] if told else [name]
    return [name]


def public_names() -> str:
    """Return the page of all public names.

    Raises:
        PluginError: one, or a method of one, has no docstring.
    """
    known = homes()
    missing = [what for name, module in known.items() for what in silent(name, module)]
    if missing:
        raise PluginError(f"public names without a docstring: {', '.join(missing)}")
    parts = ["# Public names\n\nEvery name of `suture`, with what it takes, returns and raises.\n"]
    parts += [f"::: {module}.{name}\n" for name, module in sorted(known.items(), key=_order)
              if name not in OLDER]  # fmt: skip
    return "\n".join(parts)


def _order(entry: tuple[str, str]) -> tuple[bool, bool, str]:
    """Functions first, then classes, then tables."""
    return entry[0].isupper(), entry[0][0].isupper(), entry[0]


def on_files(files: Files, config: Any) -> Files:
    """Add the page of public names, and the pages at the top of the repository."""
    files.append(File.generated(config, "python.md", content=public_names()))
    for name in OUTSIDE:
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files of the repository: pages stay links, others become their names."""
    markdown = re.sub(r"\]\(\.\./(C\w+\.md)", r"](\1", markdown)
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?:examples|src|benchmarks)[^)]*\)", r"\1", markdown)
