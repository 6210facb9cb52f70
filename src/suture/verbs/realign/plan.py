"""A recipe held against its models, rows and output: all problems before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from suture.analysis.ancestry import RealignModels, across, check_factors, masked_shapes
from suture.checkpoints.checkpoint import Checkpoint, refuse_uncomputable
from suture.checkpoints.open import open_model
from suture.edits.mask import Mask
from suture.errors import CheckpointError, MismatchError, Problems, RecipeError, SutureError
from suture.runs.place import Options, check_place, check_room
from suture.schema.paths import place_of
from suture.stream.vector import align
from suture.tensors.roles import check_selectors
from suture.tensors.spec import listed, readable
from suture.training.data import Dataset
from suture.training.models import device_named, load_tokenizer, longest_of
from suture.training.rows import language_rows
from suture.verbs.realign.concrete import logit_shape
from suture.verbs.realign.pairs import PairRows, read_pairs
from suture.verbs.realign.recipe import Realign, read_realign


@dataclass(frozen=True)
class Plan:
    """A realignment whose inputs were opened and checked; no weight was read."""

    recipe: Realign
    models: RealignModels
    rows: PairRows | None
    utility: Dataset | None
    choosing: Dataset | None
    """Rows of utility by which a method chooses; ``None`` where none are held out."""
    out: Path
    device: str
    options: Options

    @property
    def inputs(self) -> dict[str, Checkpoint]:
        """Every model by what the recipe calls it."""
        return _labelled(self.models)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know about the recipe and its rows."""
        base, lies_on = self.models.base, self.models.aligned.put_on
        unread = base is not None and base is not lies_on and not self.recipe.reads_base
        idle = (
            "base: only the check of the ancestor would read it, and `ancestor: trust` forgoes it"
        )
        blind = (
            "utility.validation: without rows held out, the step is chosen by those that are "
            "reported"
        )
        chooses = self.recipe.line.chooses and self.utility is not None and self.choosing is None
        rows = () if self.rows is None else self.rows.notes
        own = [*([idle] if unread else ()), *([blind] if chooses else ())]
        return (*self.recipe.notes, *own, *rows)

    @property
    def looks(self) -> bool:
        """Whether a model is loaded, to be trained or looked at."""
        return self.rows is not None or self.utility is not None

    @property
    def trains(self) -> bool:
        """Whether the method trains."""
        return self.recipe.line.trains

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        if self.rows is None or not self.trains:
            return 0
        how = self.recipe.training
        batches = -(-len(self.rows.train) // how.batch)
        steps = -(-batches // how.accumulate) * how.epochs
        return min(steps, how.steps or steps)

    def memory(self) -> dict[str, int]:
        """Bytes that are needed at most, without activations, by what they are for."""
        specs = self.models.aligned.specs
        found = {"model": 4 * self.models.aligned.numel} if self.looks else {}
        tasks = len(self.models.tuned)
        if not self.trains:
            largest = max(specs[n].numel for n in self.models.names)
            ranked = sum(specs[n].numel for n in self.models.names) * 12
            found |= {"ranking": ranked} if self.recipe.fusing.how == "ties" else {}
            return found | {"a tensor": 4 * largest * (4 + tasks)}
        how = self.recipe.settings
        shapes = masked_shapes(self.models, how["space"])
        entries = sum(math.prod(shape) for shape in shapes.values())
        logits = sum(
            math.prod(logit_shape(shape, how["granularity"], across(key)))
            for key, shape in shapes.items()
        )
        weights = 4 * sum(specs[n].numel for n in {key.partition(":")[0] for key in shapes})
        found |= {
            "gradients": weights,
            "aligned weights": weights,
            "task vectors": 4 * tasks * entries,
            "logits, noise and optimizer": 20 * logits,
        }
        if self.recipe.fusing.how == "ties":
            found["ranking"] = 12 * entries
        return found


def make_plan(
    recipe: Path | Mapping[str, Any],
    out: Path,
    options: Options | None = None,
    folder: Path | None = None,
) -> Plan:
    """Read a recipe, open its models, read and tokenise its rows; check all that can be checked.

    Args:
        recipe: a YAML file, or what stands in it.
        out: the folder to write.
        options: how to run.
        folder: where the relative paths of the recipe start; by default the file's folder or the
            current one.

    Raises:
        SutureError: all problems at once.
    """
    options = options or Options()
    problems = Problems()
    found = read_realign(recipe, problems, folder)
    if found is None:
        check_place(out, {}, options.overwrite, problems)
        problems.raise_if_any()
    assert found is not None
    opened, models = _models(found, problems)
    check_place(out, opened, options.overwrite, problems)
    device = options.device or found.device
    with problems.collecting():
        device = device_named(device)
    if models is not None and found.settings.get("space") == "factors":
        check_factors(models, problems)
    rows = utility = choosing = None
    aligned = opened.get("aligned")
    if aligned is not None:
        rows, utility, choosing = _rows(found, aligned, problems)
        _check_needs(found, aligned, rows, problems)
        check_room(out, aligned.nbytes * 2, False, problems)
    problems.raise_if_any()
    assert models is not None
    return Plan(found, models, rows, utility, choosing, out, device, options)


def _rows(
    recipe: Realign, aligned: Checkpoint, problems: Problems
) -> tuple[PairRows | None, Dataset | None, Dataset | None]:
    """Pairs, and rows of utility to report and to choose by, as tokens of the aligned model."""
    rows = utility = choosing = None
    if recipe.data is None and recipe.utility is None:
        return rows, utility, choosing
    with problems.collecting():
        _check_model(aligned)
        tokenizer = load_tokenizer(aligned.folder)
        longest = longest_of(aligned.config, tokenizer)
        for key, spec in (("data", recipe.data), ("utility", recipe.utility)):
            if spec is not None and spec.max_length > longest:
                problems.add(
                    RecipeError,
                    f"{key}.max_length: the model reads at most {longest} tokens, "
                    f"not {spec.max_length}",
                )
        if recipe.data is not None:
            with problems.collecting():
                rows = read_pairs(recipe.data, tokenizer, longest, recipe.training.seed)
        if recipe.utility is not None:
            with problems.collecting():
                found = language_rows(recipe.utility, tokenizer, longest, 0)
                utility, choosing = found.train, found.validation if found.validation else None
    return rows, utility, choosing


def _check_needs(
    recipe: Realign, aligned: Checkpoint, rows: PairRows | None, problems: Problems
) -> None:
    """Note what parameters ask for besides what a method's line in the table says."""
    if rows is not None and not len(rows.validation):
        if recipe.line.chooses:
            problems.add(RecipeError, "data.validation: a line search chooses by pairs that are "
                                      "held out")  # fmt: skip
        if recipe.training.patience and recipe.line.trains:
            problems.add(RecipeError, "training.patience: needs validation pairs")
    if recipe.line.name != "protect":
        return
    mask = recipe.settings.get("mask")
    if mask:
        with problems.collecting():
            shapes, specs = Mask.load(place_of(mask, recipe.folder)).shapes, aligned.specs
            odd = [n for n, shape in shapes.items() if n not in specs or specs[n].shape != shape]
            if odd:
                raise MismatchError(
                    f"parameters.mask: {mask} masks {listed(odd)}: of another model?"
                )
    elif recipe.base is None:
        problems.add(
            RecipeError,
            "base: missing; protect finds what the alignment moved, or takes `parameters: {mask: "
            "FILE}`",
        )


def _labelled(models: RealignModels) -> dict[str, Checkpoint]:
    found = {"aligned": models.aligned, **{f"models.{m}": c for m, c in models.tuned.items()}}
    for label, checkpoint in (("base", models.base), ("safety", models.safety)):
        if checkpoint is not None:
            found[label] = checkpoint
    return found


def _models(
    recipe: Realign, problems: Problems
) -> tuple[dict[str, Checkpoint], RealignModels | None]:
    """Open every model; an adapter alone is put on what the aligned model's adapter is put on.

    What could be opened comes back by what the recipe calls it, and all of it where it fits.
    """
    before = len(problems)
    base = _opened("base", recipe.base, recipe, None, problems)
    aligned = _opened("aligned", recipe.aligned or None, recipe, base, problems)
    if aligned is None:
        return {} if base is None else {"base": base}, None
    ground = aligned
    while ground.put_on is not None:
        ground = ground.put_on
    tuned = {
        m: found for m, model in recipe.tuned.items()
        if (found := _opened(f"models.{m}", model.path, recipe, ground, problems)) is not None
    }  # fmt: skip
    safety = _opened("safety", recipe.safety, recipe, ground, problems)
    models = RealignModels(aligned, tuned, recipe.weights, (), base, safety)
    for other in (base, safety, *tuned.values()):
        if other is not None:
            align(aligned, other, problems, buffers=True)
    names = recipe.space.names(aligned.specs)
    with problems.collecting():
        words = (*recipe.space.include, *recipe.space.exclude)
        check_selectors(words, tuple(aligned.specs), "space")
    if not names:
        problems.add(RecipeError, "space: no tensor is left that may change")
    whole = len(problems) == before and bool(tuned)
    return _labelled(models), replace(models, names=tuple(names)) if whole else None


def _opened(
    label: str, path: str | None, recipe: Realign, ground: Checkpoint | None, problems: Problems
) -> Checkpoint | None:
    if path is None:
        return None
    try:
        found = open_model(path, recipe.folder, ground)
        refuse_uncomputable(found)
    except SutureError as error:
        for line in getattr(error, "problems", (str(error),)):
            problems.add(type(error), f"{label}: {line}")
        return None
    return found


def _check_model(aligned: Checkpoint) -> None:
    if not aligned.path.is_dir() or not aligned.config:
        raise CheckpointError(
            f"aligned: {aligned.label}: pairs need a model folder with a config.json"
        )
    names = aligned.config.get("architectures") or [""]
    if not any(word in names[0] for word in ("ForCausalLM", "LMHeadModel")):
        raise CheckpointError(
            f"aligned: {aligned.label}: pairs need a causal language model, "
            f"not {names[0] or 'this'}"
        )


def describe(plan: Plan) -> dict[str, Any]:
    """What a plan will do, as plain data."""
    rows, memory = plan.rows, plan.memory()
    return {
        "method": plan.recipe.line.name,
        "parameters": plan.recipe.settings,
        "models": {label: c.label for label, c in plan.inputs.items()},
        "fuse": asdict(plan.recipe.fusing),
        "tensors": len(plan.models.names),
        "pairs": {} if rows is None else {
            "train": len(rows.train), "validation": len(rows.validation), "test": len(rows.test),
        },
        "utility": 0 if plan.utility is None else len(plan.utility),
        "steps": plan.steps,
        "memory": {**{k: readable(v) for k, v in memory.items()},
                   "in all": readable(sum(memory.values())) + ", and activations"},
        "device": plan.device,
        "output": str(plan.out),
        "notes": list(plan.notes),
    }  # fmt: skip


__all__ = ["Options", "Plan", "describe", "make_plan"]
