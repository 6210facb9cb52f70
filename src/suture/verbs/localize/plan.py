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
from suture.runs.place import check_place as check_output
from suture.runs.place import check_recipe_stays
from suture.schema.read import read
from suture.stream.vector import align
from suture.tensors.roles import names_in
from suture.verbs.localize.recipe import Regions
from suture.verbs.localize.tasks import Material, check_loadable, read_material

RECORD = "localize.json"


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
    threads: int | None = None
    overwrite: bool = False
    values: bool = False
    restricted: bool = False
    """Whether every mask is to be marked: not to be passed on."""

    @property
    def inputs(self) -> dict[str, Checkpoint]:
        """The models by label, the base first."""
        return {"base": self.base, **self.models}

    def describe(self) -> dict[str, Any]:
        """What will be done, as plain data."""
        entries = sum(self.base.specs[n].numel for n in self.names)
        return {
            "rule": self.rule.name,
            "needs": list(self.recipe.needs(self.rule)),
            "scope": self.recipe.scope,
            "tensors": len(self.names),
            "entries": entries,
            "densities": dict(self.recipe.densities),
            "models": {m: c.label for m, c in self.models.items()},
            "rows": {m: len(found.rows) for m, found in self.material.items()},
            "output": {"path": str(self.out), "bytes": len(self.models) * -(-entries // 8)},
        }


def plan_regions(
    source: Path | Mapping[str, Any],
    out: Path,
    *,
    folder: Path | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    values: bool = False,
    restricted: bool = False,
) -> Plan:
    """Read a recipe, open its models, and check everything but the values of tensors.

    Args:
        source: a YAML file, or what stands in it.
        out: the folder to write.
        folder: where relative paths start; by default the file's folder or the current one.
        threads: default every core; changes no bit.
        overwrite: replace an older output.
        values: write the marked weights beside the bits: grafts.
        restricted: mark the masks: neither they nor what is made with them may be passed on.

    Raises:
        SutureError: all problems at once.
    """
    problems = Problems()
    recipe = read(Regions, source, problems, folder, whole=False)
    if recipe is None:
        problems.raise_if_any()
    assert recipe is not None
    rule = _question(recipe, problems)
    base, models = _opened(recipe, problems)
    names = _names(recipe, base, problems)
    stats = _stats(recipe, rule, base, names, problems)
    without = _without(recipe, base, names, problems)
    material = (
        {}
        if rule is None or not recipe.needs(rule)
        else _material(recipe, rule, base, models, problems)
    )
    inputs = {} if base is None else {"base": base}
    check_output(out, inputs | models, overwrite, problems, _files(recipe), RECORD)
    if isinstance(source, Path) and overwrite:
        check_recipe_stays(source, out, problems)
    problems.raise_if_any()
    assert base is not None
    assert rule is not None
    return Plan(recipe, rule, base, models, names, stats, material, without, out, threads,
                overwrite, values, restricted)  # fmt: skip


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
    check_output(plan.out, plan.inputs, plan.overwrite, problems, files, RECORD)


def _files(recipe: Regions) -> dict[str, set[Path]]:
    """The files that are read besides models, by the key that names them."""
    found = {f"stats.{name}": {path} for name, path in recipe.stats.items()}
    found |= {f"without.{name}": {path} for name, path in recipe.masks_without.items()}
    for name, task in recipe.tasks.items():
        found[f"tasks.{name}"] = {p for p in (task.data, task.head) if p is not None}
    return found


__all__ = ["RECORD", "Plan", "check_place", "plan_regions"]
