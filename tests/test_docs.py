"""What the documents say is true: links lead somewhere, quoted help is current, examples parse.

``python tests/test_docs.py`` writes the quoted help texts anew.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from suture.merges.presets import PRESETS
from suture.merges.table import METHODS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
TABLE = re.compile(r"(<!-- (methods|presets) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
HELP = re.compile(r"(<!-- help:(.*?)-->\n```text\n)(.*?)(```\n)", re.DOTALL)

# No page may hold what is true of one machine or one person only.
PRIVATE = {
    "an absolute path": re.compile(r"(?<![\w./~-])/(?:home|Users|root|work|workspace)/[\w.-]"),
    "an e-mail address": re.compile(r"[\w.+-]+@(?!example\.)(?:[\w-]+\.)+[A-Za-z]{2,}\b"),
}


def page_id(path: object) -> str:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)


def headings(text: str) -> set[str]:
    """The anchors that a page offers, made as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            if not re.match(r"[a-z]+:", target):
                yield page, target


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for found, body in FENCE.findall(page.read_text(encoding="utf-8")):
            if found == language:
                yield page, body


def quoted_help() -> Iterator[tuple[Path, str, str]]:
    for page in PAGES:
        for _, arguments, body, _ in HELP.findall(page.read_text(encoding="utf-8")):
            yield page, arguments.strip(), body


def printed_help(arguments: str) -> str:
    """What ``suture ARGUMENTS --help`` prints to a plain terminal of 100 columns."""
    plain = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    drop = {"FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "GITHUB_ACTIONS", "LINES"}
    environment = {k: v for k, v in os.environ.items() if k not in drop} | plain
    command = [sys.executable, "-m", "suture", *arguments.split(), "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n") + "\n"


def repository_files() -> list[Path]:
    """All files that are or may be committed; without git, all that are not hidden."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        hidden = re.compile(r"(^|/)(\.|__pycache__)")
        paths = [p for p in ROOT.rglob("*") if not hidden.search(p.relative_to(ROOT).as_posix())]
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize(("page", "target"), list(links()), ids=page_id)
def test_a_relative_link_leads_somewhere(page: Path, target: str) -> None:
    """A link to a file finds the file, a link to a heading finds the heading."""
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page

    assert path.exists(), f"{page_id(page)} links to {target}, which does not exist"
    if anchor and path.suffix == ".md":
        assert anchor in headings(path.read_text(encoding="utf-8")), f"no heading for {target}"


@pytest.mark.skipif(not (ROOT / "src/suture/cli").exists(), reason="no command line yet")
@pytest.mark.parametrize(("page", "arguments", "quoted"), list(quoted_help()), ids=page_id)
def test_quoted_help_is_current(page: Path, arguments: str, quoted: str) -> None:
    """The help text in the docs is the one the command prints."""
    remedy = f"{page_id(page)} is out of date: run python tests/test_docs.py"

    assert quoted == printed_help(arguments), remedy


@pytest.mark.parametrize(("page", "body"), list(blocks("python")), ids=page_id)
def test_python_examples_name_what_there_is(page: Path, body: str) -> None:
    """Python in a page is Python, and what it takes of Suture is there under that name."""
    source = doctest.script_from_examples(body) if body.startswith(">>>") else body
    tree = ast.parse(source, filename=str(page))
    named = [(n.module, a.name) for n in ast.walk(tree)
             if isinstance(n, ast.ImportFrom) and str(n.module).split(".")[0] == "suture"
             for a in n.names]  # fmt: skip
    named += [("suture", n.attr) for n in ast.walk(tree)
              if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "suture"]  # fmt: skip

    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert named or "suture" in imported, f"{page_id(page)}: an example that uses nothing of Suture"
    for module, name in named:
        assert hasattr(importlib.import_module(str(module)), name), f"{module} has no {name}"


@pytest.mark.parametrize(("page", "body"), list(blocks("yaml")), ids=page_id)
def test_yaml_examples_parse(page: Path, body: str) -> None:
    """YAML in a page is mappings, or one list of rules."""
    for found in yaml.safe_load_all(body):
        assert isinstance(found, dict | list), f"{page_id(page)}:\n{body}"


def test_no_file_names_a_machine_or_a_person() -> None:
    """No file of the repository holds a path into someone's home or an e-mail address."""
    found = []
    for path in repository_files():
        raw = path.read_bytes()
        if b"\0" in raw:
            continue
        for line, text in enumerate(raw.decode("utf-8", errors="replace").splitlines(), start=1):
            for what, pattern in PRIVATE.items():
                if pattern.search(text):
                    found.append(f"{page_id(path)}:{line}: {what}: {text.strip()[:100]}")

    assert found == []


def generated(what: str) -> str:
    """A table of the docs, made of the tables in the code."""
    if what == "presets":
        rows = [f"| `{p.name}` | `{p.method}` | {p.source} |" for p in PRESETS.values()]
        return "\n".join(["| preset | method | source |", "|---|---|---|", *rows]) + "\n"
    rows = []
    for name, m in METHODS.own.items():
        base = "yes" if m.needs_base else "if given" if m.optional_base else "no"
        number = f"{m.least}" if m.most == m.least else f"{m.least} or more"
        needed: dict[str, dict[str, str]] = {n: {} for n, p in m.parameters.items() if p.required}
        kind = "whole" if m.tensorwise else str(m.make(**needed).passes + 1)
        rows.append(f"| `{name}` | {m.title} | {number} | {base} | {kind} | {m.paper} |")
    head = "| method | | models | base | passes | source |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows]) + "\n"


@pytest.mark.parametrize("what", ["methods", "presets"])
def test_tables_of_methods_are_current(what: str) -> None:
    """Every method and preset stands in the docs, as the code has it."""
    found = TABLE.findall((ROOT / "docs/methods.md").read_text(encoding="utf-8"))

    assert dict((name, body) for _, name, body, _ in found)[what] == generated(what), (
        "docs/methods.md is out of date: run python tests/test_docs.py"
    )


def write_help() -> None:
    """Put the current help texts and tables into the pages that quote them."""
    page = ROOT / "docs/methods.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(TABLE.sub(lambda m: m[1] + generated(m[2]) + m[4], text), encoding="utf-8")
    for page in {page for page, _, _ in quoted_help()}:
        text = page.read_text(encoding="utf-8")
        new = HELP.sub(lambda m: m[1] + printed_help(m[2].strip()) + m[4], text)
        page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    write_help()
