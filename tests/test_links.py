"""Files that a merge leaves as they are can be links: the same bytes, and inputs stay untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import toy
from suture.checkpoints import writer
from suture.runs.place import MergeOptions
from suture.verbs.merge.plan import make_plan
from suture.verbs.merge.run import execute

ONLY = {"space": {"include": ["model.layers.0.*"], "exclude": []}}


def family(where: Path, *, shards: int = 1, dtype: str = "f32") -> dict[str, Any]:
    """A base whose layers stand in files of their own, and a recipe that changes one layer only."""
    base = toy.base_tensors(dtype)
    first = {n: t for n, t in base.items() if n.startswith("model.layers.0.")}
    rest = {n: t for n, t in base.items() if n not in first}
    names = [*first, *rest] if shards == 2 else list(base)
    for name, tensors in (("base", base), ("ada", toy.tuned(base, 1))):
        folder = where / name
        if shards == 1:
            toy.folder(folder, tensors)
            continue
        folder.mkdir()
        parts = ({n: tensors[n] for n in first}, {n: tensors[n] for n in rest})
        weight_map = {}
        for number, part in enumerate(parts, 1):
            file = f"model-{number:05}-of-00002.safetensors"
            toy.save_in_order(folder / file, part, [n for n in names if n in part])
            weight_map |= dict.fromkeys(part, file)
        index = f'{{"weight_map": {str(weight_map).replace(chr(39), chr(34))}}}'
        (folder / "model.safetensors.index.json").write_text(index)
    return toy.recipe("task_arithmetic", {"ada": where / "ada"}, where / "base", **ONLY)


def twins(out: Path, base: Path) -> list[str]:
    """The files of an output that are an input's under another name."""
    theirs = {p.stat().st_ino for p in base.glob("*.safetensors")}
    return sorted(p.name for p in out.glob("*.safetensors") if p.stat().st_ino in theirs)


@pytest.fixture
def no_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot share blocks, so that links are hard links everywhere."""

    def refuse(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(writer.fcntl, "ioctl", refuse)


@pytest.mark.usefixtures("no_clones")
def test_a_file_that_stays_as_it_is_is_linked(tmp_path: Path) -> None:
    """Its tensors are the same as without; the index names it; the input is left alone."""
    recipe = family(tmp_path, shards=2)
    before = toy.files_digest(tmp_path / "base")
    plain, one = toy.run(tmp_path / "plain", recipe)
    linked, other = toy.run(tmp_path / "out", recipe, link=True)

    assert twins(tmp_path / "plain", tmp_path / "base") == []
    assert twins(tmp_path / "out", tmp_path / "base") == ["model-00002-of-00002.safetensors"]
    assert toy.same_bytes(plain, linked) == []
    assert one.fingerprint == other.fingerprint
    assert toy.files_digest(tmp_path / "base") == before
    assert any("1 files are links" in note for note in other.notes)
    again, _ = toy.run(tmp_path / "again", tmp_path / "out" / "suture.json", link=True)  # type: ignore[arg-type]
    assert toy.same_bytes(plain, again) == []


@pytest.mark.usefixtures("no_clones")
def test_a_file_with_one_change_is_written(tmp_path: Path) -> None:
    """Only whole files are linked, and never one whose dtype changes."""
    one = toy.run(tmp_path / "out", family(tmp_path), link=True)[1]
    (tmp_path / "more").mkdir()
    recipe = {**family(tmp_path / "more", shards=2), "output": {"dtype": "bfloat16"}}
    other = toy.run(tmp_path / "other", recipe, link=True)[1]

    for report in (one, other):
        assert any("no file could be linked" in note for note in report.notes)
    assert twins(tmp_path / "out", tmp_path / "base") == []
    assert twins(tmp_path / "other", tmp_path / "more" / "base") == []


def test_without_links_the_bytes_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without links: the same folder, with a file of its own."""
    monkeypatch.setattr(writer, "_link", lambda source, place: False)
    recipe = family(tmp_path, shards=2)
    plain, _ = toy.run(tmp_path / "plain", recipe)
    copied, report = toy.run(tmp_path / "out", recipe, link=True)

    assert twins(tmp_path / "out", tmp_path / "base") == []
    assert toy.same_bytes(plain, copied) == []
    assert any("no file could be linked" in note for note in report.notes)


@pytest.mark.usefixtures("no_clones")
def test_an_interrupted_run_with_links_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The links of the first run are known in the second, and the input keeps its bytes."""
    recipe = family(tmp_path, shards=2)
    before = toy.files_digest(tmp_path / "base")
    plan = make_plan(recipe, tmp_path / "out", MergeOptions(link=True))
    with monkeypatch.context() as patch:
        patch.setattr(
            writer.Writer, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            execute(plan)
    linked, report = toy.run(tmp_path / "out", recipe, link=True)

    assert report.resumed > 0
    assert twins(tmp_path / "out", tmp_path / "base") == ["model-00002-of-00002.safetensors"]
    assert toy.files_digest(tmp_path / "base") == before
    assert toy.same_bytes(linked, toy.run(tmp_path / "plain", recipe)[0]) == []
    other = {**recipe, "parameters": {"weight": 0.5}}  # replaced: names go, files of others stay
    toy.run(tmp_path / "out", other, overwrite=True)
    assert toy.files_digest(tmp_path / "base") == before
    assert (tmp_path / "base" / "model-00002-of-00002.safetensors").stat().st_nlink == 1
