"""A recipe held against its base, rows and output: all problems before anything is trained."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suture.checkpoint import Checkpoint, open_checkpoint, refuse_uncomputable
from suture.errors import CheckpointError, OutputError, Problems, RecipeError
from suture.finetune.recipe import Finetune, read_finetune
from suture.finetune.rows import Rows, classification_rows, language_rows
from suture.finetune.strategies import MASKS
from suture.mask import Mask
from suture.models import device_named, load_tokenizer, longest_of
from suture.run import Options as PlaceOptions
from suture.run import check_place
from suture.spec import readable


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what: none of it changes the weights on one device."""

    overwrite: bool = False
    resume: bool = True
    device: str | None = None
    """Overrides the recipe's."""


@dataclass(frozen=True)
class Plan:
    """A run whose inputs were opened and checked; the rows are tokenised, no weight was read."""

    recipe: Finetune
    base: Checkpoint
    task: str
    tokenizer: Any
    rows: Rows
    out: Path
    device: str
    options: Options

    @property
    def steps(self) -> int:
        """Optimizer steps, of one process."""
        how = self.recipe.training
        batches = -(-len(self.rows.train) // how.batch)
        steps = -(-batches // how.accumulate) * how.epochs
        return min(steps, how.steps or steps)


def plan_finetune(
    recipe: Path | Mapping[str, Any], out: Path, options: Options | None = None
) -> Plan:
    """Read a recipe, open its base, read and tokenise its rows; check all that can be checked.

    Raises:
        SutureError: all problems at once.
    """
    options = options or Options()
    problems = Problems()
    found = base = None
    with problems.collecting():
        found = read_finetune(recipe)
    if found is not None:
        with problems.collecting():
            base = _base(found)
    inputs = {} if base is None else {"base": base}
    check_place(out, inputs, PlaceOptions(overwrite=options.overwrite), problems)
    if found is None or base is None:
        problems.raise_if_any()
    assert found is not None
    assert base is not None
    task = found.task or _task(base)
    device = options.device or found.device
    with problems.collecting():
        device = device_named(device)
    if found.training.patience and found.data.validation is None and not found.data.share:
        problems.add(RecipeError, "training.patience: needs validation rows")
    if task == "language-model" and found.head != "probe":
        problems.add(RecipeError, "head: a language model has its own; leave it out")
    rows = tokenizer = None
    with problems.collecting():
        tokenizer = load_tokenizer(base.folder)
        longest = longest_of(base.config, tokenizer)
        if found.data.max_length > longest:
            raise RecipeError(
                f"data.max_length: the base reads at most {longest} tokens, "
                f"not {found.data.max_length}"
            )
        read = classification_rows if task == "classification" else language_rows
        rows = read(found.data, tokenizer, longest, found.training.seed)
    _check_mask(found, problems)
    _check_room(out, base, problems)
    problems.raise_if_any()
    assert rows is not None
    return Plan(found, base, task, tokenizer, rows, out, device, options)


def _base(recipe: Finetune) -> Checkpoint:
    base = open_checkpoint(recipe.base, recipe.folder)
    if not base.path.is_dir() or not base.config:
        raise CheckpointError(
            f"base: {recipe.base}: training needs a model folder with a config.json"
        )
    refuse_uncomputable(base)
    return base


def _task(base: Checkpoint) -> str:
    names = base.config.get("architectures") or [""]
    causal = any(word in names[0] for word in ("ForCausalLM", "LMHeadModel"))
    return "language-model" if causal else "classification"


def _check_mask(recipe: Finetune, problems: Problems) -> None:
    mask = recipe.parameters.get("mask")
    if recipe.strategy.name == "masked" and isinstance(mask, str) and mask not in MASKS:
        with problems.collecting():
            path = recipe.folder / mask
            if not path.is_file():
                raise RecipeError(f"parameters.mask: no file {path}, nor one of {', '.join(MASKS)}")
            Mask.load(path)


def _check_room(out: Path, base: Checkpoint, problems: Problems) -> None:
    parent = out.resolve().parent
    while not parent.exists():
        parent = parent.parent
    needed, free = base.nbytes * 2, shutil.disk_usage(parent).free
    if needed > free:
        problems.add(
            OutputError, f"{out}: needs about {readable(needed)} of disk, {readable(free)} are free"
        )


def describe(plan: Plan) -> dict[str, Any]:
    """What a plan will do, as plain data."""
    rows = plan.rows
    return {
        "strategy": plan.recipe.strategy.name,
        "parameters": plan.recipe.resolved()["parameters"],
        "base": plan.base.label,
        "task": plan.task,
        "rows": {"train": len(rows.train), "validation": len(rows.validation)},
        "tokens": sum(map(len, rows.train.ids)),
        "longest": max(map(len, rows.train.ids)),
        "labels": list(rows.labels),
        "steps": plan.steps,
        "device": plan.device,
        "output": str(plan.out),
        "notes": list(rows.notes),
    }
