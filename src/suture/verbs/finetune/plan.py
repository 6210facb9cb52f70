"""A recipe held against its base, rows and output: all problems before anything is trained."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint, open_checkpoint, refuse_uncomputable
from suture.errors import CheckpointError, OutputError, Problems, RecipeError
from suture.runs.place import Options, check_place, existing
from suture.schema.paths import place_of
from suture.schema.sources import UNREAD
from suture.tensors.spec import DTYPES, readable
from suture.training.data import Dataset
from suture.training.heads import saved_head
from suture.training.image_rows import image_rows, look_of
from suture.training.images import Images
from suture.training.models import device_named, load_tokenizer, longest_of, reads_images
from suture.training.rows import TrainingRows, classification_rows, language_rows
from suture.training.strategies import MASKS
from suture.training.strategy import given_mask
from suture.verbs.finetune.recipe import HEADS, IMAGES, Finetune, read_finetune


@dataclass(frozen=True)
class Plan:
    """A run whose inputs were opened and checked; the rows are tokenised, no weight was read."""

    recipe: Finetune
    base: Checkpoint
    task: str
    tokenizer: Any
    rows: TrainingRows
    out: Path
    device: str
    options: Options
    withheld: bool = False
    """Whether a mask that the recipe names must not be passed on."""

    @property
    def restricted(self) -> bool:
        """Whether the output must not be passed on: that is asked for, or base or mask must not."""
        return self.options.restricted or self.base.restricted or self.withheld

    @property
    def steps(self) -> int:
        """Optimizer steps, of one process."""
        how = self.recipe.training
        batches = -(-len(self.rows.train) // how.batch)
        steps = -(-batches // how.accumulate) * how.epochs
        return min(steps, how.steps or steps)


def make_plan(
    recipe: Path | Mapping[str, Any],
    out: Path,
    options: Options | None = None,
    folder: Path | None = None,
) -> Plan:
    """Read a recipe, open its base, read and tokenise its rows; check all that can be checked.

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
    base = None
    found = read_finetune(recipe, problems, folder)
    if found is not None and found.base:
        with problems.collecting():
            base = _base(found)
    inputs = {} if base is None else {"base": base}
    check_place(out, inputs, options.overwrite, problems)
    if found is None:
        problems.raise_if_any()
    assert found is not None
    device = options.device or found.device
    with problems.collecting():
        device = device_named(device)
    rows, tokenizer, task = None, None, ""
    if base is not None:
        task = found.task or _task(base)
        rows, tokenizer = _material(found, base, task, problems)
        _check_form(found, base, problems)
    withheld = _check_mask(found, problems)
    problems.raise_if_any()
    assert base is not None
    assert rows is not None
    plan = Plan(found, base, task, tokenizer, rows, out, device, options, withheld)
    _check_room(plan, problems)
    problems.raise_if_any()
    return plan


def _material(
    found: Finetune, base: Checkpoint, task: str, problems: Problems
) -> tuple[TrainingRows | None, Any]:
    """The rows and the tokenizer; what does not go with the task is noted."""
    if found.training.patience and found.data.validation is None and not found.data.share:
        problems.add(RecipeError, "training.patience: needs validation rows")
    if task == "language-model" and found.head != "probe":
        problems.add(RecipeError, "head: a language model has its own; leave it out")
    if task == IMAGES and found.head == "zero-shot":
        problems.add(RecipeError, "head: zero-shot reads texts, the base images; take the probe")
    rows = tokenizer = None
    if found.data is not UNREAD:
        with problems.collecting():
            rows, tokenizer = _rows(found, base, task)
    if rows is not None and task != "language-model" and found.head not in HEADS:
        with problems.collecting():
            saved_head(found.head, found.folder, rows.labels, base.config.get("hidden_size"))
    return rows, tokenizer


def _rows(recipe: Finetune, base: Checkpoint, task: str) -> tuple[TrainingRows, Any]:
    """The rows of a recipe, and the tokenizer of a base that reads texts."""
    data, seed, images = recipe.data, recipe.training.seed, reads_images(base.config)
    if images != (task == IMAGES):
        kind = "images" if images else "texts"
        raise RecipeError(f"task: the base reads {kind}, so {task} is not for it; leave it out")
    if images:
        look, notes = look_of(base, data.size)
        return image_rows(data, look, seed)._replace(notes=notes), None
    tokenizer = load_tokenizer(base.folder)
    longest = longest_of(base.config, tokenizer)
    if data.max_length > longest:
        raise RecipeError(
            f"data.max_length: the base reads at most {longest} tokens, not {data.max_length}"
        )
    read = classification_rows if task == "classification" else language_rows
    return read(data, tokenizer, longest, seed), tokenizer


def _base(recipe: Finetune) -> Checkpoint:
    base = open_checkpoint(recipe.base, recipe.folder)
    if not base.path.is_dir() or not base.config:
        raise CheckpointError(
            f"base: {recipe.base}: training needs a model folder with a config.json"
        )
    refuse_uncomputable(base)
    return base


def _task(base: Checkpoint) -> str:
    if reads_images(base.config):
        return IMAGES
    names = base.config.get("architectures") or [""]
    causal = any(word in names[0] for word in ("ForCausalLM", "LMHeadModel"))
    return "language-model" if causal else "classification"


def named_files(recipe: Finetune) -> dict[str, Path]:
    """The files, besides rows, that decide what is trained: by the key that names them."""
    mask = recipe.parameters.get("mask")
    found = {}
    if recipe.line.name == "masked" and isinstance(mask, str) and mask not in MASKS:
        found["mask"] = place_of(mask, recipe.folder)
    if recipe.head not in HEADS:
        found["head"] = place_of(recipe.head, recipe.folder)
    return found


def _check_mask(recipe: Finetune, problems: Problems) -> bool:
    """Note what is wrong with the mask that a recipe names; whether it must not be passed on."""
    path = named_files(recipe).get("mask")
    if path is None:
        return False
    with problems.collecting():
        if not path.is_file():
            raise RecipeError(f"parameters.mask: no file {path}, nor one of {', '.join(MASKS)}")
        return given_mask(path).restricted
    return False


def _check_form(recipe: Finetune, base: Checkpoint, problems: Problems) -> None:
    if recipe.form == "model":
        return
    if recipe.line.name == "linearized":
        problems.add(RecipeError, "output.form: a linearized model is no patch of its base")
    held = {spec.dtype for spec in base.specs.values() if DTYPES[spec.dtype].computable}
    if recipe.dtype is not None and held != {recipe.dtype}:
        problems.add(
            RecipeError,
            f"output.dtype: a patch has the dtypes of its base ({', '.join(sorted(held))}); "
            "leave it out",
        )


def _check_room(plan: Plan, problems: Problems) -> None:
    """Whether there is room for the output, and for a checkpoint while the next one is written."""
    parent = existing(plan.out)
    name, parameters = plan.recipe.line.name, plan.recipe.resolved()["parameters"]
    share = float(parameters["density"]) if name in ("talos", "masked") else 1.0
    share = 0.02 if "lora" in name else share
    copies = 2 if plan.steps > plan.recipe.training.save_every else 1
    state = int(12 * plan.base.numel * share)  # values and two moments, in float32
    needed, free = plan.base.nbytes + copies * state, shutil.disk_usage(parent).free
    if needed > free:
        problems.add(
            OutputError,
            f"{plan.out}: output and checkpoints need about {readable(needed)} of disk, "
            f"{readable(free)} are free",
        )


def _extent(data: Dataset) -> dict[str, Any]:
    """How large rows are: tokens, or pixels."""
    if isinstance(data, Images):
        return {"pixels": list(data.look.size)}
    return {"tokens": sum(map(len, data.ids)), "longest": max(map(len, data.ids))}


def describe(plan: Plan) -> dict[str, Any]:
    """What a plan will do, as plain data."""
    rows = plan.rows
    return {
        "strategy": plan.recipe.line.name,
        "parameters": plan.recipe.resolved()["parameters"],
        "base": plan.base.label,
        "task": plan.task,
        "rows": {"train": len(rows.train), "validation": len(rows.validation)},
        **_extent(rows.train),
        "labels": list(rows.labels),
        "steps": plan.steps,
        "device": plan.device,
        "output": str(plan.out),
        "notes": list(rows.notes),
    }
