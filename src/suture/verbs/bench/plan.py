"""A benchmark held against its packages and files: all problems before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suture.errors import Problems, RecipeError
from suture.runs.ledger import Kind, check_cells
from suture.runs.place import Options
from suture.schema.paths import place_of
from suture.training.labelled import Split, labels_of
from suture.training.models import Tokenizer, load_tokenizer
from suture.verbs.bench.recipe import MINILM, Bench, read_bench
from suture.verbs.bench.tasks import BASE, BenchTask, base_folder, divide, package_folders


@dataclass(frozen=True)
class Plan:
    """A benchmark whose inputs were found and read; no weight was."""

    bench: Bench
    folder: Path
    """Of the base."""
    splits: Mapping[int, Mapping[str, Split]]
    """By seed and task."""
    tokenizer: Tokenizer
    out: Path
    options: Options


def make_plan(
    recipe: Path | Mapping[str, Any],
    out: Path,
    options: Options | None = None,
    folder: Path | None = None,
) -> Plan:
    """Read a recipe, find its packages and files, divide the rows.

    Args:
        recipe: a YAML file, or what stands in it.
        out: the folder of cells and tables.
        options: how to run.
        folder: where the relative paths of the recipe start; by default the file's folder or the
            current one.

    Raises:
        SutureError: all problems at once.
    """
    problems = Problems()
    found = read_bench(recipe, problems, folder)
    problems.raise_if_any()
    assert found is not None
    needed = {name for task in found.everything for name in task.needs}
    places = package_folders(needed | ({BASE} if found.base == MINILM else set()))
    base = base_folder(places) if found.base == MINILM else place_of(found.base, found.folder)
    if not (base / "config.json").is_file():
        problems.add(RecipeError, f"base: {base}: no model folder: it has no config.json")
    options = options or Options()
    check_cells(out, "bench", {}, options, problems)
    splits: dict[int, dict[str, Split]] = {seed: {} for seed in found.seeds}
    for task in found.everything:
        with problems.collecting():
            rows = list(task.read(places))
            for seed in found.seeds:
                splits[seed][task.name] = _divided(found, task, rows, seed)
    problems.raise_if_any()
    return Plan(found, base, splits, load_tokenizer(base), out, options)


def _divided(bench: Bench, task: BenchTask, rows: list[Any], seed: int) -> Split:
    sizes = bench.rows
    control = bench.control is not None and task.name == bench.control.name
    validation, test = (sizes.control,) * 2 if control else (sizes.validation, sizes.test)
    try:
        return divide(rows, train=sizes.train, validation=validation, test=test, seed=seed)
    except RecipeError as error:
        raise RecipeError(f"tasks: {task.name}: {error}") from None


def describe(plan: Plan) -> dict[str, Any]:
    """What a plan will do, as plain data."""
    first = plan.splits[plan.bench.seeds[0]]
    return {
        "base": str(plan.folder),
        "tasks": {
            name: {"train": len(s.train), "validation": len(s.validation), "test": len(s.test),
                   "labels": len(labels_of(s.train))}
            for name, s in first.items()
        },
        "strategies": [line.name for line in plan.bench.lines],
        "seeds": list(plan.bench.seeds),
        "measure": list(plan.bench.measure),
        "cells": sum(expected(plan.bench).values()),
    }  # fmt: skip


def expected(bench: Bench) -> Counter[Kind]:
    """The cells that will come, by kind, for the clock; a few more may turn out to be needed."""
    pending: Counter[Kind] = Counter()
    tasks, seeds = len(bench.tasks), len(bench.seeds)
    pending["base", ""] = seeds
    pending["sensitivity", ""] = seeds * tasks * ("sensitivity" in bench.measure)
    for line in bench.lines:
        asked = len(bench.choose_on or bench.tasks) if len(line.rates) > 1 else 0
        # the chosen rate is met twice on the first seed
        pending["train", line.name] = seeds * tasks + len(line.rates) * asked
        points = len(bench.checkpoints) if line.name == bench.reference else 1
        for part in ("addition", "disentanglement", "movement"):
            pending[part, line.name] = seeds * points * (part in bench.measure)
        for part, has in (("negation", line.negation), ("masks", line.strategy.sparse)):
            pending[part, line.name] = seeds * (has and part in bench.measure)
    return pending
