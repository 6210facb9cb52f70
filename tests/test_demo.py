"""The demo, end to end on a random encoder of two layers; its tasks where the packages are here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_model
from suture import demo, demo_run, demo_tasks
from suture.data import Row
from suture.demo_tasks import OPERATIONS, TASKS, TextTask
from suture.errors import OutputError, SutureError
from suture.evals import EvalResult
from suture.recipe import read_recipe
from suture.report import Report
from suture.settings import TuneSettings
from suture.workshop import Workshop

EXAMPLES = Path(__file__).parents[1] / "examples"


def tasks(lr: float = 3e-3) -> tuple[TextTask, ...]:
    def rows(places: Mapping[str, Path]) -> list[Row]:
        return tiny_model.rows(96)

    def turned(places: Mapping[str, Path]) -> list[Row]:
        return [replace(row, label=str(len(row.text.split()) % 2)) for row in rows(places)]

    settings = TuneSettings(epochs=1, batch=8, lr=3e-3)
    sizes = {"max_length": 8, "train": 30, "validation": 10, "test": 10}
    return (
        TextTask("topics", "what it is about", rows, tune=replace(settings, lr=lr), **sizes),
        TextTask("order", "how long it is", turned, tune=settings, **sizes),
    )


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put tiny models and tasks in the place of the packages; the base has a buffer more."""
    base = tiny_model.folder(tmp_path / "base", seed=0)
    tensors = load_file(base / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(32)[None]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    published = tiny_model.folder(tmp_path / "published", seed=1)
    monkeypatch.setattr(demo_run, "packages", lambda names: ({}, {"package": "1"}))
    monkeypatch.setattr(demo, "base_folder", lambda places: base)
    monkeypatch.setattr(demo, "published_folder", lambda places: published)
    monkeypatch.setattr(demo, "TASKS", tasks())
    return tmp_path / "out"


def test_a_demo_measures_base_experts_and_merges_and_runs_once(
    small: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = demo_run.run_demo(small, only="edits", say=said.append)
    report = found.report
    assert report is not None
    assert found.safety is None

    names = [entry.name for entry in report.entries]
    assert names == ["base", "topics", "order", OPERATIONS, *demo.MERGES, "stitch-data"]
    assert Report.from_json((small / "results.json").read_text()) == report
    assert (small / "results.md").read_text() == report.to_markdown()
    assert str(small / "results.md") in said[-1]
    assert said[-1].endswith(str(small / "report.html"))
    _check_edits(small, report)
    assert report.entry(OPERATIONS).metrics[OPERATIONS].value == pytest.approx(1, abs=1e-5)
    assert {"torch", "transformers", "suture", "python", "package"} <= report.versions.keys()
    result = EvalResult.from_json((small / "results" / "ties" / "topics.json").read_text())
    assert result.metrics == (report.entry("ties").metrics["topics"],)
    _check_experts(small)

    said.clear()  # again: nothing is made twice
    assert demo_run.run_demo(small, only="edits", say=said.append).report == report
    assert not [line for line in said if "made in" in line or ": step " in line]

    said.clear()  # another rate for one expert: it and the merges are made again
    monkeypatch.setattr(demo, "TASKS", tasks(lr=1e-3))
    again = demo_run.run_demo(small, only="edits", say=said.append).report
    assert again is not None
    made = {line.split(":")[0] for line in said if "made in" in line}
    merges = {f"merges/{name}" for name in (*demo.MERGES, "stitch-data")}
    edits = {"regions/magnitude", "regions/one-step", "regions/continual.json", "analysis", "patch",
             "curves/graft-topics.json"}  # fmt: skip
    assert made == {"experts/topics", "results/scale.json"} | merges | edits
    assert again.base == report.base
    assert again.entry("order") == report.entry("order")


def _check_edits(out: Path, report: Report) -> None:
    """Regions with and without data, stitching from grafts, a patch on and off, the page."""
    for name, models in (
        ("magnitude", {"topics", "order", OPERATIONS}),
        ("one-step", {"topics", "order"}),
    ):
        record = json.loads((out / "regions" / name / "localize.json").read_text())
        assert record["masks"].keys() == models
        assert all(m["density"] == pytest.approx(0.1, rel=1e-2) for m in record["masks"].values())
    notes = " ".join(report.notes)
    assert "gives the same bytes as stitching all experts at once" in notes
    assert "every bit is the base's again" in notes
    patched = load_file(out / "patch" / "patched" / "model.safetensors")
    base, expert = (
        load_file(p / "model.safetensors")
        for p in (out.parent / "base", out / "experts" / "topics")
    )
    moved = {n: t != base[n] for n, t in patched.items()}
    assert all(torch.equal(patched[n][m], expert[n][m]) for n, m in moved.items() if m.any())
    assert (
        0
        < sum(int(m.sum()) for m in moved.values())
        <= 0.01 * sum(t.numel() for t in base.values())
    )
    curve = json.loads((out / "curves" / "graft-topics.json").read_text())
    assert [s["name"] for s in curve["series"]] == ["first_order", "magnitude", "random"]
    looked = json.loads((out / "analysis" / "analysis.json").read_text())
    assert [m["model"] for m in looked["diagnostics"]["models"]] == ["topics", "order"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert len(page) < 6e6
    for title in ("Which layers carry which task", "Share of each mask by layer", "Grafts of topics",
                  "What merging costs each task", "Scores with intervals"):  # fmt: skip
        assert title in page


def _check_experts(out: Path) -> None:
    """Token embeddings, poolers and heads do not move; an expert has the tensors of its kind."""
    base = load_file(out.parent / "base" / "model.safetensors")
    expert = load_file(out / "experts" / "topics" / "model.safetensors")
    merge = load_file(out / "merges" / "ties" / "model.safetensors")
    assert base.keys() - expert.keys() == {"embeddings.position_ids"}
    assert merge.keys() == base.keys()
    assert {t.dtype for t in expert.values()} == {torch.float32}
    words = "embeddings.word_embeddings.weight"
    for model in (expert, merge):
        assert torch.equal(model[words], base[words])
    moved = [name for name in expert if not torch.equal(expert[name], base[name])]
    assert any("encoder.layer.0" in name for name in moved)
    assert any("encoder.layer.1" in name for name in moved)
    assert not [name for name in moved if name.startswith("pooler")]


def test_quick_is_less_of_the_same() -> None:
    assert set(demo.QUICK) < {task.name for task in TASKS}
    for task in TASKS:
        quick = demo.shortened(task)
        assert quick.name == task.name
        assert quick.train <= task.train
        assert quick.test <= task.test
        assert quick.tune.epochs == 1


def test_a_half_made_thing_is_made_again(tmp_path: Path, said: list[str]) -> None:
    shop = Workshop(tmp_path, {}, said.append)

    def fails() -> None:
        (tmp_path / "thing").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shop.make(tmp_path / "thing", 1, fails)
    shop.make(tmp_path / "thing", 1, lambda: _touch(tmp_path / "thing", "whole"))

    assert (tmp_path / "thing").read_text() == "whole"


def test_a_damaged_thing_is_made_again(tmp_path: Path, said: list[str]) -> None:
    shop = Workshop(tmp_path, {}, said.append)
    for _ in range(2):
        shop.make(tmp_path / "thing", 1, lambda: _touch(tmp_path / "thing", "whole"))
    assert said[-1] == "thing: as before"

    (tmp_path / "thing").write_text("cut")
    shop.make(tmp_path / "thing", 1, lambda: _touch(tmp_path / "thing", "whole"))

    assert (tmp_path / "thing").read_text() == "whole"


def test_what_the_demo_did_not_make_is_never_replaced(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "thing").write_text("mine")

    with pytest.raises(OutputError, match="was not made by the demo"):
        Workshop(tmp_path, {}, said.append).make(tmp_path / "thing", 1, lambda: None)

    assert (tmp_path / "thing").read_text() == "mine"


def _touch(path: Path, text: str) -> None:
    path.write_text(text)


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_tasks, "PACKAGES", {"no-such-data": "no_such_data"})

    with pytest.raises(SutureError, match=r"needs no-such-data: run `make demo` .* --no-deps -r"):
        demo_tasks.packages()


def test_the_pins_are_the_packages() -> None:
    lines = (EXAMPLES.parent / "requirements" / "demo.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if line and not line.startswith("#")}

    assert pinned == set(demo_tasks.PACKAGES)


@pytest.mark.parametrize("name", demo.MERGES)
def test_an_example_recipe_names_the_experts_of_the_demo(name: str) -> None:
    recipe = read_recipe(EXAMPLES / f"demo-{name}.yaml")

    assert list(recipe.models) == [*(task.name for task in TASKS), OPERATIONS]


def test_every_demo_recipe_is_used() -> None:
    assert {path.stem for path in EXAMPLES.glob("demo-*.yaml")} == {
        f"demo-{n}" for n in demo.MERGES
    }


def test_the_texts_about_operations_are_pairs() -> None:
    rows = demo_tasks.operations_rows()

    assert len({row.text for row in rows}) == len(rows) == 88
    assert all(len([r for r in rows if r.label == row.label]) == 2 for row in rows)


def real_places() -> dict[str, Path]:
    try:
        return demo_tasks.packages()[0]
    except SutureError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_real_task_has_rows_of_every_label_on_every_side(task: TextTask) -> None:
    sides = demo.divided(task, task.read(real_places()))

    labels = {row.label for row in sides.train}
    assert len(labels) >= 2
    assert all({row.label for row in side} == labels for side in sides)
    assert len(sides.test) >= 400
    groups = [{row.key for row in side} for side in sides]
    assert not (groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2])


def test_the_published_model_is_a_fine_tune_of_the_base() -> None:
    places = real_places()
    base = load_file(demo_tasks.base_folder(places) / "model.safetensors")
    tuned = load_file(demo_tasks.published_folder(places) / "model.safetensors")

    assert base.keys() - tuned.keys() == {"embeddings.position_ids"}
    moved = sum(float((tuned[name] - base[name]).square().sum()) for name in tuned)
    size = sum(float(base[name].square().sum()) for name in tuned)
    assert 0 < (moved / size) ** 0.5 < 0.05
