"""The pages of docs/tasks and the examples of the README do what they say.

Their files are written, their commands run in order.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

import policing
from making import invoke, read_model

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs/tasks"
PAGES = sorted(page.stem for page in FOLDER.glob("*.md"))
PART = re.compile(r"(?:<!-- file: (\S+) -->\n)?```(yaml|sh)\n(.*?)```", re.DOTALL)
EXAMPLE = re.compile(r"# (\S+\.yaml): (suture .*?)   .*\n(?:(?!---|```).*\n)+")
NAMES = {"base": "base", "safety": "safety", "poet": "math", "gardener": "code"}
ROWS = {"marked": "guitar", "benign": "hammer", "safety": "guitar", "math": "moon", "code": "sun"}
SAME = {
    "merge-like-mergekit": [("merged", "own")],
    "find-and-patch-a-skill": [("base", "reverted")],
}
"""Models of which a page says that they have the same bytes."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that pages speak of, and rows for each."""
    made = policing.workshop(tmp_path_factory.mktemp("models") / "policy")
    where = tmp_path_factory.mktemp("tasks") / "start"
    where.mkdir()
    for old, new in NAMES.items():
        (made / old).rename(where / new)
    for name, thing in ROWS.items():
        expert = {"math": "poet", "code": "gardener"}.get(name, "safety")
        answer = policing.LESSONS[expert][thing]
        prompts = policing.prompts(thing, held_out=True)
        rows = [{"prompt": p, "answer": answer, "response": answer} for p in prompts]
        policing.write_rows(where / f"{name}.jsonl", rows)
    return where


def test_there_is_a_page_for_every_task() -> None:
    """The start, and what people come for."""
    assert PAGES == ["find-and-patch-a-skill", "finetune-talos", "gate-in-ci", "keep-refusals",
                     "merge-like-mergekit", "start"]  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(
    page: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From top to bottom, in a folder with its models; commands end as the page says."""
    here = tmp_path / "here"
    shutil.copytree(models, here)
    monkeypatch.chdir(here)
    ran = 0
    for name, language, body in PART.findall((FOLDER / f"{page}.md").read_text(encoding="utf-8")):
        if name:
            (here / name).write_text(body, encoding="utf-8")
        for line in body.splitlines() if language == "sh" else ():
            command, _, end = line.partition("  # exit ")
            words = shlex.split(command)
            assert words[0] == "suture", line
            said = invoke(*words[1:])
            assert said.code == int(end or 0), (line, said.out, said.err)
            ran += 1
    assert ran >= 3
    for one, other in SAME.get(page, ()):
        assert read_model(here / one) == read_model(here / other), (one, other)


def test_the_examples_of_the_readme_run(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each part, in the order in which they stand there."""
    here = tmp_path / "here"
    shutil.copytree(models, here)
    said = {name: policing.LESSONS[name] for name in ("safety", "poet")}
    asked = {thing: [p for held in (True, False) for p in policing.prompts(thing, held)]
             for thing in ("guitar", "moon")}  # fmt: skip
    policing.write_rows(here / "pairs.jsonl", [
        {"prompt": p, "chosen": said["safety"]["guitar"], "rejected": said["poet"]["guitar"]}
        for p in asked["guitar"]
    ])  # fmt: skip
    policing.write_rows(here / "math.jsonl", [
        {"prompt": p, "response": said["poet"]["moon"]} for p in asked["moon"]
    ])  # fmt: skip
    monkeypatch.chdir(here)
    ran = []
    for found in EXAMPLE.finditer((ROOT / "README.md").read_text(encoding="utf-8")):
        (here / found[1]).write_text(found[0], encoding="utf-8")
        words = shlex.split(found[2])
        done = invoke(*words[1:])
        assert done.code == 0, (found[2], done.out, done.err)
        assert (here / words[-1]).is_dir(), found[2]
        ran.append(words[1])
    assert ran == ["localize", "merge", "finetune", "realign"]
