"""From a recipe to an audit: attack, score, stitch, ask, judge; every number a cell on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from suture.checkpoints.atomic import write_whole
from suture.merges.apply import checkpoint_fingerprint
from suture.runs.ledger import cells_of, digest
from suture.runs.progress import Progress
from suture.training.threads import torch_threads
from suture.verbs.audit.cells import Run, made_with
from suture.verbs.audit.experiment import Case
from suture.verbs.audit.plan import RECORD, Plan, check_finished
from suture.verbs.audit.result import card, finished, record_of
from suture.verbs.audit.verdicts import judge


def execute(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Audit as planned: what ``audit.json`` holds. Interrupted, the same call goes on.

    Raises:
        MismatchError: the attacked model was not tuned from the aligned one, or is the same.
        NonFiniteError: a model or a gradient holds NaN or infinity.
        SutureError: an input or the output is at fault; finished cells are kept.
    """
    with torch_threads(plan.options.threads):
        prints = {label: checkpoint_fingerprint(c) for label, c in plan.inputs.items()}
        key = digest([plan.recipe.resolved(), prints, {n: q.key for n, q in plan.asked.items()},
                      plan.material.probe_key(), made_with()])  # fmt: skip
        check_finished(plan, key)
        with cells_of(plan.out, plan.options, _written):
            return _all(Run(plan, prints, key, progress.say))


def _written(path: Path) -> bool:
    """Whether an audit left it: regions, models that were trained there, the record."""
    name = path.name
    return name in ("regions", RECORD, "README.md") or name.lstrip(".").startswith("attacked")


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


__all__ = ["execute"]
