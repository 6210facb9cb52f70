"""``kill -9`` at random moments of a real merge: nothing that looks finished, nothing lost."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest

import making

METHODS = {
    "ties": {"method": "ties", "parameters": {"density": 0.3}},
    "dare_ties": {"method": "dare_ties", "parameters": {"density": 0.4, "seed": 3}},
}


def killed(folder: Path, out: str, after: float) -> bool:
    """Start the merge, kill it after some seconds; whether it was still running then."""
    with making.start("merge", f"{out}.yaml", "-o", out, "--json", cwd=folder) as process:
        time.sleep(after)
        alive = process.poll() is None
        process.kill()
        process.communicate()
    return alive


def trial(folder: Path, kills: int, draw: random.Random) -> dict[str, int]:
    """Kill merges ``kills`` times; after each, look; now and then let one run to its end."""
    making.family(folder, hidden=512, layers=3, vocabulary=1000, dtype="BF16")
    expected, lasting = {}, {}
    for name, how in METHODS.items():
        making.write_recipe(folder, {**making.RECIPE, **how}, f"{name}.yaml")
        assert making.suture("merge", f"{name}.yaml", "-o", "ready", cwd=folder).code == 0
        begun = time.monotonic()
        assert making.suture("merge", f"{name}.yaml", "-o", "truth", cwd=folder).code == 0
        lasting[name] = time.monotonic() - begun
        expected[name] = making.weights(folder / "truth")
        for done in ("ready", "truth"):
            shutil.rmtree(folder / done)
    inputs = {m: making.tree(folder / m) for m in ("base", "math", "code")}
    seen = {"killed": 0, "finished first": 0, "resumed": 0, "completed": 0}
    for number in range(kills):
        name = draw.choice(list(METHODS))
        alive = killed(folder, name, draw.uniform(0.2, 1.1) * lasting[name])
        seen["killed" if alive else "finished first"] += 1
        if (folder / name).exists():
            assert making.weights(folder / name) == expected[name], (
                "a finished folder that is wrong"
            )
            assert (folder / name / "suture.json").exists()
            assert (folder / name / "README.md").exists()
        assert {m: making.tree(folder / m) for m in inputs} == inputs, "an input was touched"
        if number % 5 == 4:
            for each in METHODS:
                complete(folder, each, expected[each], seen)
    for each in METHODS:
        complete(folder, each, expected[each], seen)
    assert not [p for p in folder.iterdir() if p.name.endswith(".suture")]
    return seen


def complete(folder: Path, name: str, expected: dict[str, str], seen: dict[str, int]) -> None:
    """Run the same command to its end, look at the bytes, and clear the way for the next."""
    if not (folder / name).exists():
        said = making.suture("merge", f"{name}.yaml", "-o", name, cwd=folder)
        assert said.code == 0, said.err
        seen["resumed"] += "took over" in said.out
    assert making.weights(folder / name) == expected
    shutil.rmtree(folder / name)
    seen["completed"] += 1


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """200 kills of two methods: never a wrong folder, inputs untouched, the same bytes each time."""
    seen = trial(tmp_path, 200, random.Random(1))

    with capsys.disabled():
        print(f"\n200 kills: {seen}")
    assert seen["killed"] > 100
    assert seen["resumed"] > 0  # how many depends on how busy the machine is


def test_a_few_kills(tmp_path: Path) -> None:
    """The same, six times, for every run of the tests."""
    seen = trial(tmp_path, 6, random.Random(2))

    assert seen["killed"] + seen["finished first"] == 6
    assert seen["completed"] >= 2
