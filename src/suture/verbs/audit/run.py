"""From a recipe to an audit: attack, score, stitch, ask, judge; every number a cell on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from suture.checkpoints.atomic import alone, write_whole
from suture.merges.apply import checkpoint_fingerprint
from suture.runs.ledger import Say, digest
from suture.runs.place import Options
from suture.verbs.audit.cells import Run, made_with
from suture.verbs.audit.experiment import Case
from suture.verbs.audit.plan import CELLS, RECORD, Plan, check_finished, plan_audit
from suture.verbs.audit.result import card, finished, record_of
from suture.verbs.audit.verdicts import judge


def audit(
    recipe: Path | Mapping[str, Any],
    out: Path,
    *,
    say: Say = lambda _: None,
    folder: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Follow a recipe file (or mapping) into a folder; keywords as the fields of ``Options``.

    Args:
        recipe: a YAML file, or what stands in it.
        out: the folder of cells and results.
        say: is told what is being done.
        folder: where the relative paths of the recipe start; by default the file's folder or the
            current one.
        **options: the fields of ``Options``.

    Raises:
        SutureError: the recipe, an input or the output is at fault; all problems at once.
    """
    return execute(plan_audit(recipe, out, Options(**options), folder), say=say)


def execute(plan: Plan, *, say: Say = lambda _: None) -> dict[str, Any]:
    """Audit as planned: what ``audit.json`` holds. Interrupted, the same call goes on.

    Raises:
        MismatchError: the attacked model was not tuned from the aligned one, or is the same.
        NonFiniteError: a model or a gradient holds NaN or infinity.
        SutureError: an input or the output is at fault; finished cells are kept.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(plan.options.threads or before)
    try:
        prints = {label: checkpoint_fingerprint(c) for label, c in plan.inputs.items()}
        key = digest([plan.recipe.resolved(), prints, {n: q.key for n, q in plan.asked.items()},
                      plan.material.probe_key(), made_with()])  # fmt: skip
        check_finished(plan, key)
        with alone(plan.out / CELLS, plan.out, "working on"):
            if plan.options.overwrite or not plan.options.resume:
                _clear(plan.out)
            return _all(Run(plan, prints, key, say))
    finally:
        torch.set_num_threads(before)


def _clear(out: Path) -> None:
    """Remove what an older run left: cells, regions, models that were trained there."""
    for path in sorted(out.iterdir()):
        if path.name == CELLS:
            for cell in path.iterdir():
                if cell.name != "lock":  # it is held
                    cell.unlink()
        elif path.name == "regions" or path.name.lstrip(".").startswith("attacked"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif path.name in (RECORD, "README.md"):
            path.unlink()


def _all(run: Run) -> dict[str, Any]:
    """Every seed, then the record."""
    for label in run.plan.inputs:
        if label != "aligned":  # what is no relative is refused before a model is asked
            run.given(label)
    aligned = run.ask("aligned", None)
    befores = {name: run.ask(f"onto-{name}", None, name) for name in run.plan.onto}
    seeds, verdicts = {}, []
    several = len(run.recipe.seeds) > 1
    for seed in run.recipe.seeds:
        suffix = f"-seed{seed}" if several else ""
        made, found = Case(run, seed, suffix).measured(aligned, befores)
        seeds[str(seed)] = made
        verdicts.append(judge(found))
        seeds[str(seed)]["verdicts"] = [v.plain() for v in verdicts[-1]]
    for checkpoint in run.plan.inputs.values():
        checkpoint.check_unchanged()
    record = record_of(run.plan, run.prints, run.key, aligned, seeds, verdicts)
    write_whole(run.plan.out / "README.md", card(record, run.plan.out.name))
    text = finished(record)
    write_whole(run.plan.out / RECORD, text)
    told: dict[str, Any] = json.loads(text)
    return told


__all__ = ["audit", "execute"]
