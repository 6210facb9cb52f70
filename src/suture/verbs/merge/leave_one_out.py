"""A merge that is only tried: made in memory, published nowhere; and one without each expert."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from suture.checkpoints.linearized import LINEARIZED, check_forms
from suture.checkpoints.memory import Held, MemorySink, SmallFiles
from suture.errors import Problems, RecipeError, SutureError
from suture.merges.apply import Outcome, Stage
from suture.verbs.merge.lazy import computed
from suture.verbs.merge.plan import Plan, plan_merge
from suture.verbs.merge.recipe import MergeRecipe
from suture.verbs.merge.run import add_files, after_stages, convert_tokenizer, execute, progress_of

MOST = 8 << 30
"""Bytes of a merge that is held in memory; a larger one is written into a temporary folder."""


@dataclass(frozen=True)
class LeftOut:
    """A merge without one of its experts."""

    expert: str
    plan: Plan | None
    """``None`` where it cannot be made."""
    reason: str = ""
    """Why not."""


def ready(plan: Plan, stage: Stage | None = None) -> Plan:
    """The plan with all that comes before it made; the cache of stages keeps it.

    Raises:
        SutureError: a stage cannot be made.
    """
    return after_stages(plan, progress_of(stage)) if plan.stages else plan


def fingerprint_of(plan: Plan, stage: Stage | None = None) -> str:
    """The fingerprint that the output would have; not a byte of it is kept.

    Raises:
        SutureError: an input is at fault.
    """
    return computed(plan, MemorySink(plan.specs, None), stage).fingerprints["output"]


def leave_one_out(plan: Plan) -> list[LeftOut]:
    """The merge without each of its experts; inputs are those that are open already.

    A parameter or file that an expert has to itself goes with it, as does the protection of what
    it alone may write. Nothing else changes.

    Raises:
        RecipeError: the recipe merges one expert only, stacks layers, or cannot lose any of them.
    """
    recipe = plan.recipe
    if recipe.slices:
        raise RecipeError("a recipe with `slices` stacks layers; no model of it can be left out")
    if len(recipe.models) < 2:
        only = ", ".join(recipe.models)
        raise RecipeError(f"the recipe merges {only} alone; to leave one out it takes two experts")
    found = []
    for name in recipe.models:
        rest = {label: c for label, c in plan.inputs.items() if label != name}
        try:
            less = without(recipe, name)
            problems = Problems()
            for _, text in less.faults():
                problems.add(RecipeError, text)
            problems.raise_if_any()
            found.append(LeftOut(name, plan_merge(less, None, plan.options, rest)))
        except SutureError as error:
            found.append(LeftOut(name, None, str(error)))
    if not any(one.plan for one in found):
        told = "; ".join(f"{one.expert}: {one.reason}" for one in found)
        raise RecipeError(f"no expert of the recipe can be left out: {told}")
    return found


def without(recipe: MergeRecipe, name: str) -> MergeRecipe:
    """The recipe without one of its models."""
    models = {n: entry for n, entry in recipe.models.items() if n != name}
    protect = recipe.protect
    known = recipe.method.parameters
    shared = {
        key: {n: v for n, v in value.items() if n != name}
        if key in known and known[key].files and isinstance(value, Mapping) else value
        for key, value in recipe.parameters.items()
    }  # fmt: skip
    return recipe.with_(
        models=models, parameters=shared,
        protect=None if protect is not None and protect.model == name else protect,
        fingerprints={n: f for n, f in recipe.fingerprints.items() if n != name},
    )  # fmt: skip


def prepare(plan: Plan, label: str, folder: Path) -> Held:
    """The checkpoint to be: its small files lie in ``folder``, its tensors are not there yet."""
    folder.mkdir(parents=True)
    beside = SmallFiles(folder)
    add_files(plan, beside)
    convert_tokenizer(plan, beside)
    return Held(label, folder, plan.specs)


def fill(held: Held, plan: Plan, stage: Stage | None = None) -> Outcome:
    """Merge into a prepared checkpoint; what the method has to say of it.

    Raises:
        SutureError: an input is at fault.
    """
    return computed(plan, MemorySink(plan.specs, held.bytes), stage)


def must_be_written(plan: Plan) -> str:
    """Why a merge cannot be evaluated out of memory; empty where it can."""
    models = {n: c for n, c in plan.inputs.items() if n != "base"}
    if check_forms(models, Problems()).kind == LINEARIZED:
        return "linearized models are loaded from folders"
    if plan.nbytes > MOST:
        return f"it has more than {MOST >> 30} GB"
    return ""


def written(plan: Plan, folder: Path, stage: Stage | None = None) -> None:
    """Merge into a folder, as ``suture merge`` does."""
    execute(replace(plan, out=folder, stages={}), progress_of(stage))


def label_of(edit: str, expert: str) -> str:
    """What to call an edit without an expert; fit for the name of a file."""
    return re.sub(r"[^\w.+-]", "-", f"{edit}-without-{expert}")


__all__ = ["LeftOut", "fill", "fingerprint_of", "label_of", "leave_one_out", "must_be_written",
           "prepare", "ready", "without", "written"]  # fmt: skip
