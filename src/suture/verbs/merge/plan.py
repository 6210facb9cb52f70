"""From a recipe to a plan: every input opened, every fault told at once, no tensor read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint, open_checkpoint
from suture.checkpoints.embeddings import Aligned, by_id, by_token, same_heads, templated
from suture.checkpoints.linearized import check_forms
from suture.checkpoints.open import check_ties
from suture.checkpoints.views import Planned, View
from suture.checkpoints.vocabulary import UNION, Wanted
from suture.checkpoints.writer import Shard, plan_shards
from suture.edits.inputs import open_input
from suture.errors import MismatchError, Problems, RecipeError, SutureError
from suture.merges.apply import MergeJob, bytes_read, peak_memory, tensor_fingerprints
from suture.merges.base import Beside, Context
from suture.runs.card import carried_files, carried_tokenizer
from suture.runs.place import (
    MergeOptions,
    apart,
    check_free,
    check_place,
    check_recipe_stays,
    check_room,
    existing,
)
from suture.schema.paths import place_of
from suture.tensors.roles import EVERYTHING
from suture.tensors.spec import DTYPES, TensorSpec, cache_folder, listed
from suture.verbs.merge.documents import parse_recipe
from suture.verbs.merge.estimate import estimate
from suture.verbs.merge.recipe import MergeRecipe
from suture.verbs.merge.slices import (
    Part,
    check_fit,
    check_required,
    config_of,
    job_of,
    parts_of,
    reference_label,
    takes_files,
    whole_shards,
)
from suture.version import __version__

Options = MergeOptions


@dataclass(frozen=True)
class Plan:
    """A merge whose every input was opened and checked; nothing was read but headers."""

    recipe: MergeRecipe
    jobs: tuple[MergeJob, ...]
    """One, or one for each slice; each makes some tensors of the output."""
    inputs: Mapping[str, Checkpoint]
    """The checkpoints by label, the base first."""
    out: Path | None
    options: MergeOptions
    config: Mapping[str, Any]
    """The ``config.json`` of the output, but for its dtype."""
    notes: tuple[str, ...] = ()
    stages: Mapping[str, Plan] = field(default_factory=dict)
    """The merges that come first, in order."""
    made: Mapping[str, str] = field(default_factory=dict)
    """The keys of those inputs that are outputs of stages, by label."""
    ordered: Mapping[str, Plan] = field(default_factory=dict)
    """The stages that were done."""
    told: tuple[str, ...] = ()
    """What was done for this run only, and is no part of the record."""
    views: Mapping[str, Checkpoint] = field(default_factory=dict)
    """The inputs as they are read, by label: brought to one vocabulary and one kind of head."""
    files: Mapping[str, bytes] | None = None
    """The tokenizer files of the output, where they are not those of an input."""
    whole: tuple[Shard, ...] = ()
    """Files of the reference that the output has byte for byte, where they may be linked."""
    beside: tuple[Beside, ...] = ()
    """What is known of the files that each job reads besides its models."""

    @property
    def ready(self) -> bool:
        """Whether every input is there, and none has to be made first."""
        return not any(isinstance(c, Planned) for c in self.inputs.values())

    @property
    def lead(self) -> Checkpoint:
        """The model that stands for the output: the base, or else the first."""
        return self.inputs[str(reference_label(self.recipe))]

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the output."""
        return {name: spec for job in self.jobs for name, spec in job.specs.items()}

    @property
    def merged(self) -> int:
        """How many tensors are merged; the others are copied."""
        return sum(len(job.names) for job in self.jobs)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    @cached_property
    def reads(self) -> int:
        """Bytes that will be read, all passes together."""
        return sum(
            bytes_read(job, job.names) * job.merge.passes + bytes_read(job, job.specs)
            for job in self.jobs
        )


def make_plan(
    recipe: Path | Mapping[str, Any],
    out: Path | None,
    options: MergeOptions | None = None,
    folder: Path | None = None,
) -> Plan:
    """Read a recipe, open its models, and check everything that headers can tell.

    Args:
        recipe: a YAML file, or what stands in it.
        out: the folder to write; ``None`` checks the inputs only.
        options: how to do it.
        folder: where the relative paths of the recipe start; by default the file's folder or the
            current one.

    Raises:
        SutureError: all problems at once, those of the output folder included.
    """
    options, problems = options or MergeOptions(), Problems()
    found = parse_recipe(recipe, folder, problems)
    if found is None and out is not None:
        check_place(out, {}, options.overwrite, problems)
    if isinstance(recipe, Path) and out is not None and options.overwrite:
        check_recipe_stays(recipe, out, problems)
    try:
        if found is None:
            problems.raise_if_any()
        assert found is not None
        return plan_merge(found, out, options, problems=problems)
    except SutureError as error:
        if isinstance(recipe, Path):
            error.add_note(f"in {recipe}")
        raise


def plan_merge(
    recipe: MergeRecipe,
    out: Path | None,
    options: MergeOptions,
    opened: dict[str, Checkpoint] | None = None,
    problems: Problems | None = None,
) -> Plan:
    """Check a recipe against its models and its output folder.

    Args:
        recipe: what to do.
        out: the folder to write; ``None`` checks the inputs only.
        options: how to do it.
        opened: the checkpoints by label, where they are open already.
        problems: what is already known to be wrong.

    Raises:
        SutureError: all problems at once.
    """
    problems = Problems() if problems is None else problems
    stages = stages_of(recipe, options, problems)
    made = {label: _stage_key(stages[path]) for label, path in input_paths(recipe).items()
            if path in stages}  # fmt: skip
    if out is not None:
        _check_others(recipe, out, stages, problems)
    return _planned(recipe, out, options, opened, problems, stages, made)


def stages_of(recipe: MergeRecipe, options: MergeOptions, problems: Problems) -> dict[str, Plan]:
    """The plans of what must be made first; what one of them lacks is noted."""
    found: dict[str, Plan] = {}
    for name, stage in recipe.stages.items():
        own = Problems()
        try:
            if all(path in found for path in stage.paths if path in recipe.stages):
                made = {label: _stage_key(found[path]) for label, path in input_paths(stage).items()
                        if path in found}  # fmt: skip
                plan = _planned(stage, None, options, None, own, found, made)
                folder = stage_folder(plan)
                if not folder.exists():
                    check_free(folder, folder, options.overwrite, own)
                    _check_room(folder, plan, own)
                own.raise_if_any()
                found[name] = plan
        except SutureError as error:
            for text in getattr(error, "problems", (str(error),)):
                problems.add(type(error), f"stage {name}: {text}")
    return found


def _stage_key(plan: Plan) -> str:
    """What a stage's output is: the recipe, the inputs, and the version that makes it."""
    places = {label: plan.made.get(label) or str(c.path) for label, c in plan.inputs.items()}
    text = json.dumps([run_key(plan), places])
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def stage_folder(plan: Plan) -> Path:
    """Where the output of a stage is kept: it can always be made again."""
    return cache_folder().resolve() / "stages" / _stage_key(plan)


def _planned(
    recipe: MergeRecipe, out: Path | None, options: MergeOptions,
    opened: dict[str, Checkpoint] | None, problems: Problems,
    stages: Mapping[str, Plan], made: Mapping[str, str],
) -> Plan:  # fmt: skip
    inputs = _opened(recipe, problems, stages) if opened is None else opened
    if out is not None:
        check_place(out, inputs, options.overwrite, problems)
    parts: list[Part] = []
    notes: list[str] = []
    aligned = Aligned(inputs)
    if reference_label(recipe) in inputs:
        aligned = _aligned(recipe, inputs, problems)
        notes += aligned.notes
        parts = parts_of(recipe, aligned.inputs, problems)
        check_fit(recipe, parts, problems, notes)
    check_forms({n: c for n, c in inputs.items() if n != "base"}, problems)
    with problems.collecting():
        carried_files(list(inputs.values()))
    problems.raise_if_any()
    jobs = tuple(job_of(recipe, part, options, problems) for part in parts)
    check_required(recipe, jobs, parts, problems)
    for job in jobs:
        for problem in job.merge.check(job.names, job.models):
            problems.add(RecipeError, f"{recipe.method.name}: {problem}")
    beside = tuple(
        job.merge.beside(
            Context(job.sources, job.names, job.models, job.threads, job.block, None), problems
        )
        for job in jobs
    )
    config = config_of(recipe, parts, aligned.inputs)
    notes += [note for c in inputs.values() for note in c.notes]
    if options.allow_nonfinite:
        notes.append("NaN and infinity are let through; `suture inspect OUT --check` counts them")
    told = tuple(dict.fromkeys((*recipe.notes, *notes)))
    plan = Plan(recipe, jobs, inputs, out, options, config, told,
                {name: stages[name] for name in recipe.stages}, made, views=aligned.inputs,
                files=aligned.files, whole=whole_shards(jobs) if options.link else (),
                beside=beside)  # fmt: skip
    if out is not None:
        _check_room(out, plan, problems)
    problems.raise_if_any()
    return plan


def input_paths(recipe: MergeRecipe) -> dict[str, str]:
    """What every input is called in the recipe, by label."""
    paths = {} if recipe.base is None else {"base": recipe.base}
    return paths | {name: entry.path for name, entry in recipe.models.items()}


def _opened(
    recipe: MergeRecipe, problems: Problems, stages: Mapping[str, Plan]
) -> dict[str, Checkpoint]:
    found: dict[str, Checkpoint] = {}
    for label, path in input_paths(recipe).items():
        if path in recipe.stages and path not in stages:
            continue  # why it cannot be made is told already
        with problems.collecting():
            if path in stages:
                found[label] = _output_of(path, stages[path])
                continue
            found[label] = open_input(path, recipe.folder, found.get("base"))
    return found


def _output_of(name: str, plan: Plan) -> Checkpoint:
    """What a stage made, or what is known of what it will make."""
    folder = stage_folder(plan)
    if not folder.exists():
        return Planned(name, folder, plan.specs, plan.config)
    found = open_checkpoint(folder)
    found.label = name
    return found


def _aligned(recipe: MergeRecipe, inputs: dict[str, Checkpoint], problems: Problems) -> Aligned:
    """The models brought to the vocabulary and the tied heads that the output will have."""
    lead = str(reference_label(recipe))
    if len(inputs) < len(recipe.models) + (recipe.base is not None):
        return Aligned(inputs)  # some could not be opened, which is a problem already
    # Where layers are stacked anew, embedding and head may come from two models, edited or not.
    heads = same_heads(inputs, lead, EVERYTHING if recipe.slices else recipe.space)
    policy, wanted = recipe.policy.vocabulary, recipe.tokenizer
    if policy in ("base", "union"):
        source = lead if policy == "base" else "union"
        wanted = Wanted(source, lead, keep_rows=True)
    found = heads
    if wanted is not None:
        found = by_token(heads.inputs, lead, wanted, recipe.folder, problems)
    elif policy == "shared-rows":
        found = by_id(heads.inputs, lead, problems)
    found = found._replace(notes=(*heads.notes, *(found.notes if found is not heads else ())))
    with problems.collecting():
        donors = [inputs[lead], *(c for c in inputs.values() if c is not inputs[lead])]
        return templated(
            found, recipe.chat_template,
            lambda: next((files for c in donors if (files := carried_tokenizer(c))), {}),
        )  # fmt: skip
    return found


def _check_others(
    recipe: MergeRecipe, out: Path, stages: Mapping[str, Plan], problems: Problems
) -> None:
    """Note where an output would replace what is read besides its models."""
    held: dict[str, Collection[Path]] = {
        f"{label} of stage {name}": {c.path, *c.files}
        for name, stage in stages.items()
        for label, c in stage.inputs.items()
        if not isinstance(c, Planned) and label not in stage.made
    }
    with suppress(OSError, RuntimeError):  # check_place says what is wrong with the path
        for name, one in {**{n: s.recipe for n, s in stages.items()}, "": recipe}.items():
            for key, paths in _beside(one).items():
                held[f"{key}{name and ' of stage '}{name}"] = {path.resolve() for path in paths}
        apart(out, held, problems)


def _beside(recipe: MergeRecipe) -> dict[str, list[Path]]:
    """What a recipe reads besides its models: masks, statistics, a tokenizer, by its key."""
    found = {}
    if recipe.tokenizer is not None:
        source = recipe.tokenizer.source
        if source not in (UNION, "base", *recipe.models):
            found["tokenizer"] = [place_of(source, recipe.folder)]
    for key, value in recipe.parameters.items():
        if takes_files(recipe.method, key):
            files = value.values() if isinstance(value, Mapping) else [value]
            found[key] = [Path(file) for file in files if isinstance(file, str)]
    for key in ("mask", "stats"):
        file = None if recipe.protect is None else getattr(recipe.protect, key)
        if isinstance(file, str):
            found[f"protect.{key}"] = [Path(file)]
    return found


def _check_room(out: Path, plan: Plan, problems: Problems) -> None:
    parent = existing(out)
    here = parent.stat().st_dev
    linked = sum(s.size for s in plan.whole if s.source and s.source.stat().st_dev == here)
    check_room(out, plan.nbytes, plan.options.resume, problems, linked)


def describe(plan: Plan) -> dict[str, Any]:
    """Return what a plan will do, as plain data: inputs, output, bytes, memory, time, notes.

    Raises:
        SutureError: what some bytes tell is wrong; see ``check_contents``.
    """
    check_contents(plan)
    elements = sum(job.specs[n].numel for job in plan.jobs for n in job.names)
    passes = [job.merge.passes + 1 for job in plan.jobs]
    return {
        "method": plan.recipe.method.name,
        "parameters": plan.recipe.resolved()["parameters"],
        "inputs": {
            label: {"path": c.label, "tensors": len(c), "bytes": c.nbytes, "files": len(c.files),
                    "tied": c.aliases}
            for label, c in plan.inputs.items()
        },
        "output": {
            "path": None if plan.out is None else str(plan.out),
            "tensors": len(plan.specs),
            "merged": plan.merged,
            "merged_elements": elements,
            "copied": len(plan.specs) - plan.merged,
            "bytes": plan.nbytes,
            "shards": len(plan_shards(plan.specs, plan.recipe.shard_size, plan.whole)),
        },
        "bytes_read": plan.reads,
        "passes": max(passes),
        "threads": plan.jobs[0].threads,
        "peak_memory": peak_memory(plan.jobs),
        "seconds": estimate(plan.jobs, plan.nbytes, ready=plan.ready),
        "notes": list(plan.notes),
        "stages": {
            name: {"method": one.recipe.method.name, "tensors": len(one.specs),
                   "bytes": one.nbytes, "path": str(stage_folder(one)),
                   "kept": stage_folder(one).exists()}
            for name, one in plan.stages.items()
        },
    }  # fmt: skip


def check_contents(plan: Plan) -> None:
    """Check what only some bytes can tell, before the merge begins: factors, buffers, ties.

    Raises:
        NonFiniteError: the factors of an adapter hold NaN or infinity.
        MismatchError: the models' integer tensors differ, or a config ties two that differ.
    """
    problems = Problems()
    for one in (*plan.stages.values(), plan):
        if one.ready:
            _check_factors(one, problems)
            _check_buffers(one, problems)
            with problems.collecting():
                check_ties(one.inputs)
    problems.raise_if_any()


def _check_factors(plan: Plan, problems: Problems) -> None:
    """Note NaN and infinity in the factors of adapters, whose products would hide where from."""
    if plan.options.allow_nonfinite:
        return
    found = {a.folder: a for c in plan.inputs.values() for a in c.adapters}
    for adapter in found.values():
        with problems.collecting():
            adapter.check_finite()


def _check_buffers(plan: Plan, problems: Problems) -> None:
    for job in plan.jobs:
        if not job.equal_buffers:
            continue
        reference = job.sources.reference
        names = [n for n, s in reference.specs.items() if not DTYPES[s.dtype].computable]
        others = [c for c in job.sources.all if c is not reference]
        mine = tensor_fingerprints(reference, names) if others else {}
        for checkpoint in others:
            theirs = tensor_fingerprints(checkpoint, [n for n in names if n in checkpoint.specs])
            different = sorted(n for n, found in theirs.items() if found != mine[n])
            if different:
                whose, label = _label(plan, reference), _label(plan, checkpoint)
                problems.add(
                    MismatchError,
                    f"{label} against {whose}: {listed(different)}: integer tensors differ; "
                    f"`policy: {{buffers: base}}` takes those of {whose}",
                )


def _label(plan: Plan, checkpoint: Checkpoint) -> str:
    """How the recipe calls a model, or the one that a slice was cut from."""
    origins = checkpoint.origins if isinstance(checkpoint, View) else []
    return next(n for n, c in plan.inputs.items() if c is checkpoint or c in origins)


def run_key(plan: Plan) -> str:
    """What a staging folder is for: everything that decides the bytes of the output."""
    facts = {
        "version": __version__,
        "recipe": plan.recipe.resolved() | {"output": None},
        "order": [list(job.models) for job in plan.jobs],
        "nonfinite": plan.options.allow_nonfinite,
        "link": plan.options.link,
        "inputs": {label: plan.made.get(label, c.identity) for label, c in plan.inputs.items()},
        "computed": [[label, name, lens.identity] for label, c in plan.views.items()
                     if isinstance(c, View) for name, lens in c.lenses.items()
                     if lens.identity is not None],
        "files": {name: hashlib.sha256(content).hexdigest()
                  for name, content in (plan.files or {}).items()},
        "beside": [one.identity for one in plan.beside],
        "shards": [[s.name, s.size, hashlib.sha256(s.header).hexdigest()]
                   for s in plan_shards(plan.specs, plan.recipe.shard_size, plan.whole)],
    }  # fmt: skip
    # Not sorted: of the patterns of a parameter, the first that fits counts.
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
