"""A localization whose inputs are opened and checked; no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint
from suture.edits.importance import RULES, Rule
from suture.edits.inputs import open_input
from suture.edits.mask import check_question, check_without
from suture.edits.mask_file import StoredMask
from suture.edits.stats import Stats
from suture.errors import Problems, RecipeError
from suture.runs import place
from suture.runs.place import check_place as check_output
from suture.runs.place import check_recipe_stays
from suture.schema.read import read
from suture.stream.vector import align
from suture.tensors.roles import names_in
from suture.verbs.localize.recipe import Regions
from suture.verbs.localize.tasks import Material, check_loadable, read_material

RECORD = "localize.json"


@dataclass(frozen=True, kw_only=True)
class Options(place.Options):
    """How to localize, as opposed to what."""

    values: bool = False
    """Whether the marked weights are written beside the bits: grafts."""


@dataclass(frozen=True)
class Plan:
    """A localization whose every input was opened and checked; no tensor was read."""

    recipe: Regions
    rule: Rule
    base: Checkpoint
    models: Mapping[str, Checkpoint]
    names: tuple[str, ...]
    stats: Mapping[str, Stats]
    material: Mapping[str, Material]
    without: Mapping[str, StoredMask]
    """Masks of entries that are never kept, by model."""
    out: Path
    options: Options

    @property
    def inputs(self) -> dict[str, Checkpoint]:
        """The models by label, the base first."""
        return {"base": self.base, **self.models}


def make_plan(
    recipe: Path | Mapping[str, Any],
    out: Path,
    options: Options | None = None,
    folder: Path | None = None,
) -> Plan:
    """Read a recipe, open its models, and check everything but the values of tensors.

    Args:
        recipe: a YAML file, or what stands in it.
        out: the folder to write.
        options: how to run.
        folder: where relative paths start; by default the file's folder or the current one.

    Raises:
        SutureError: all problems at once.
    """
    options, source = options or Options(), recipe
    problems = Problems()
    regions = read(Regions, source, problems, folder, whole=False)
    if regions is None:
        problems.raise_if_any()
    assert regions is not None
    rule = _question(regions, problems)
    base, models = _opened(regions, problems)
    names = _names(regions, base, problems)
    stats = _stats(regions, rule, base, names, problems)
    without = _without(regions, base, names, problems)
    material = (
        {}
        if rule is None or not regions.needs(rule)
        else _material(regions, rule, base, models, problems)
    )
    inputs = {} if base is None else {"base": base}
    check_output(out, inputs | models, options.overwrite, problems, _files(regions), RECORD)
    if isinstance(source, Path) and options.overwrite:
        check_recipe_stays(source, out, problems)
    problems.raise_if_any()
    assert base is not None
    assert rule is not None
    return Plan(regions, rule, base, models, names, stats, material, without, out, options)


def describe(plan: Plan) -> dict[str, Any]:
    """Return what a plan will do, as plain data."""
    entries = sum(plan.base.specs[n].numel for n in plan.names)
    return {
        "rule": plan.rule.name,
        "needs": list(plan.recipe.needs(plan.rule)),
        "scope": plan.recipe.scope,
        "tensors": len(plan.names),
        "entries": entries,
        "densities": dict(plan.recipe.densities),
        "models": {m: c.label for m, c in plan.models.items()},
        "rows": {m: len(material.rows) for m, material in plan.material.items()},
        "output": {"path": str(plan.out), "bytes": len(plan.models) * -(-entries // 8)},
    }


def _question(recipe: Regions, problems: Problems) -> Rule | None:
    """Check the words of the recipe; the rule, if there is such."""
    some = Stats({}, {}, "")
    for density in set(recipe.densities.values()) or {None}:
        for text in check_question(recipe.rule, density, recipe.scope, some, recipe.positive):
            problems.add(RecipeError, text)
    rule = RULES.likely(recipe.rule)
    if rule is None:
        return None
    if recipe.at == "both" and recipe.stats:
        problems.add(RecipeError, "at: both measures model and base together; leave out `stats`")
    for name in recipe.models if recipe.needs(rule) else ():
        if name not in recipe.stats and name not in recipe.tasks:
            problems.add(
                RecipeError,
                f"tasks: {_why(recipe, rule)} needs data for {name!r}: `tasks: {{{name}: {{data: "
                f"..., head: ...}}}}`, or `stats: {{{name}: FILE}}` measured before",
            )
    return rule


def _why(recipe: Regions, rule: Rule) -> str:
    return f"the rule {rule.name}" if rule.needs else f"measure: {', '.join(recipe.measure)}"


def _opened(recipe: Regions, problems: Problems) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
    base = None
    models = {}
    if recipe.base:
        with problems.collecting():
            base = open_input(recipe.base, recipe.folder, None)
    for name, entry in recipe.models.items():
        with problems.collecting():
            models[name] = open_input(entry.path, recipe.folder, base)
            if base is not None:
                align(base, models[name], problems, buffers=True)
    return base, models


def _names(recipe: Regions, base: Checkpoint | None, problems: Problems) -> tuple[str, ...]:
    if base is None:
        return ()
    return names_in(recipe.space, base.specs, "localize in", problems)


def _stats(
    recipe: Regions, rule: Rule | None, base: Checkpoint | None, names: Sequence[str],
    problems: Problems,
) -> dict[str, Stats]:  # fmt: skip
    found = {}
    for name, path in recipe.stats.items():
        with problems.collecting(f"stats.{name}: "):
            found[name] = Stats.load(path)
            if rule is not None and base is not None:
                found[name].check(recipe.needs(rule), {n: base.specs[n] for n in names})
    return found


def _without(
    recipe: Regions, base: Checkpoint | None, names: Sequence[str], problems: Problems
) -> dict[str, StoredMask]:
    found, opened = {}, dict[Path, StoredMask]()
    for name, path in recipe.masks_without.items() if base is not None else ():
        with problems.collecting():
            if path not in opened:
                mask = opened[path] = StoredMask(path)
                assert base is not None
                check_without(mask, {n: base.specs[n] for n in names})
            found[name] = opened[path]
    return found


def _material(
    recipe: Regions, rule: Rule, base: Checkpoint | None, models: Mapping[str, Checkpoint],
    problems: Problems,
) -> dict[str, Material]:  # fmt: skip
    """Rows and heads of the models that are to be measured; text only."""
    wanted = {n: t for n, t in recipe.tasks.items() if n not in recipe.stats}
    at_base = rule.name == "learned" or recipe.at in ("base", "both")
    if wanted:
        with problems.collecting():
            from suture.training.models import device_named

            device_named(recipe.device)
    if wanted and at_base and base is not None:
        check_loadable(base, "base", f"the rule {rule.name}", problems)
    for name in wanted:
        if name in models and rule.name != "learned" and recipe.at != "base":
            check_loadable(models[name], f"models.{name}", f"the rule {rule.name}", problems)
    return read_material(wanted, problems, seed=recipe.seed)


def check_place(plan: Plan, problems: Problems) -> None:
    """Note what keeps the masks from being written, or what they would destroy."""
    files = _files(plan.recipe)
    check_output(plan.out, plan.inputs, plan.options.overwrite, problems, files, RECORD)


def _files(recipe: Regions) -> dict[str, set[Path]]:
    """The files that are read besides models, by the key that names them."""
    found = {f"stats.{name}": {path} for name, path in recipe.stats.items()}
    found |= {f"without.{name}": {path} for name, path in recipe.masks_without.items()}
    for name, task in recipe.tasks.items():
        found[f"tasks.{name}"] = {p for p in (task.data, task.head) if p is not None}
    return found


__all__ = ["RECORD", "Options", "Plan", "check_place", "describe", "make_plan"]
