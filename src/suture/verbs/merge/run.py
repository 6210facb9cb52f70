"""From a recipe to a folder: check everything, merge, add what belongs beside the weights, publish.

Everything a command does can be done from here; nothing is printed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from suture.checkpoints.checkpoint import Checkpoint, address
from suture.checkpoints.vocabulary import TOKENIZER
from suture.checkpoints.writer import Writer
from suture.errors import (
    CheckpointError,
    MismatchError,
    NonFiniteError,
    Problems,
    RecipeError,
    SutureError,
)
from suture.merges.apply import Outcome, Stage, apply
from suture.merges.policy import Policy
from suture.merges.presets import PRESETS
from suture.merges.table import METHODS
from suture.runs.card import carried_files, config_text, model_card
from suture.runs.place import MergeOptions, check_place
from suture.runs.progress import Progress
from suture.stream.sweep import Progress as Read
from suture.stream.vector import TaskVector
from suture.tensors.roles import ParamSpace
from suture.tensors.spec import (
    DTYPES,
    PROMOTED,
    TensorSpec,
    readable,
)
from suture.verbs.merge.documents import read_recipe
from suture.verbs.merge.lazy import Merged, check_fingerprints
from suture.verbs.merge.plan import (
    Plan,
    check_contents,
    plan_merge,
    run_key,
    stage_folder,
    stages_of,
)
from suture.verbs.merge.record import provenance
from suture.verbs.merge.result import MergeReport
from suture.verbs.merge.slices import takes_files


def merged(  # noqa: PLR0913  every section of a recipe
    base: Checkpoint | None,
    models: Mapping[str, Checkpoint] | TaskVector,
    method_name: str | None = None,
    *,
    method: str | None = None,
    preset: str | None = None,
    space: ParamSpace | None = None,
    dtype: str | None = None,
    policy: Policy | Mapping[str, str] | None = None,
    protect: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> Merged:
    """Describe a merge of open checkpoints: ``merge(base, {"math": math}, method="ties")``.

    Args:
        base: what the models were fine-tuned from; ``None`` for methods that need none.
        models: checkpoints by name; or a task vector, which is added to its base.
        method_name: one of ``METHODS``, by default ``task_arithmetic``; may be given as ``method``.
        method: the same.
        preset: one of ``PRESETS``: a method with the parameters of a paper or tool.
        space: which tensors are merged; default all but token embeddings and heads.
        dtype: of the output; default that of the base.
        policy: what to do where the models do not hold the same tensors.
        protect: entries that one model alone may write: its name and a mask, or a rule.
        **parameters: of the method; a mapping from names of models gives each its own.

    Raises:
        RecipeError: everything that is wrong with the parameters, at once.
    """
    name = method or method_name or (None if preset else "task_arithmetic")
    if isinstance(models, TaskVector):
        if name != "task_arithmetic" or any(x is not None for x in (space, policy, protect)):
            raise RecipeError(
                "a task vector is simply added: give it no method, space, policy or protect; "
                "`vector.select(...)` narrows it, `merge(base, {name: model}, ...)` merges"
            )
        return _applied(models, base, parameters, dtype)
    own: dict[str, dict[str, Any]] = {model: {} for model in models}
    for key, value in list(parameters.items()):
        by_model = isinstance(value, Mapping) and value and value.keys() <= own.keys()
        if by_model and not takes_files(
            METHODS.find(name or PRESETS.find(str(preset)).method), key
        ):
            for model, number in parameters.pop(key).items():
                own[model][key] = number
    raw: dict[str, Any] = {
        **({"method": name} if name else {}),
        **({"preset": preset} if preset else {}),
        "models": {m: {"path": address(c), **own[m]} for m, c in models.items()},
        "parameters": parameters,
        **({"protect": dict(protect)} if protect is not None else {}),
        **({"policy": dict(policy)} if isinstance(policy, Mapping) else {}),
        "output": {"dtype": dtype},
    }
    if base is not None:
        raw["base"] = address(base)
    recipe = read_recipe(raw)
    recipe = recipe.with_(
        space=space or recipe.space,
        policy=policy if isinstance(policy, Policy) else recipe.policy,
    )
    inputs = {**({"base": base} if base is not None else {}), **models}
    return Merged(recipe, inputs)


def _applied(
    vector: TaskVector, base: Checkpoint | None, parameters: dict[str, Any], dtype: str | None
) -> Merged:
    if base is not None and base is not vector.base:
        raise RecipeError("a task vector is added to the base that it was formed with")
    if not vector.names:
        raise RecipeError("the task vector holds no tensor; nothing would change")
    names = [
        f"{number} {Path(address(tuned)).name}" for number, (tuned, _) in enumerate(vector.terms)
    ]
    models = {name: tuned for name, (tuned, _) in zip(names, vector.terms, strict=True)}
    weights = {name: factor for name, (_, factor) in zip(names, vector.terms, strict=True)}
    return merged(vector.base, models, "task_arithmetic", weight=weights, dtype=dtype,
                  space=ParamSpace(tuple(vector.names), ()), **parameters)  # fmt: skip


def save(
    what: Merged, out: str | os.PathLike[str], *, stage: Stage | None = None, **options: Any
) -> MergeReport:
    """Do a merge and write its folder; keywords as the fields of ``MergeOptions``.

    Raises:
        SutureError: an input does not fit, or the output cannot be written; all problems at once.
    """
    plan = plan_merge(what.recipe, Path(out), MergeOptions(**options), dict(what.inputs))
    return execute(plan, progress_of(stage))


def progress_of(stage: Stage | None) -> Progress:
    """Return what tells passes over tensors alone."""
    return Progress() if stage is None else Progress(stage=stage)


def execute(plan: Plan, progress: Progress | None = None) -> MergeReport:
    """Do what was planned and publish the folder.

    Raises:
        SutureError: an input or the output is at fault. An interrupted merge leaves its staging
            folder, which the same call picks up.
    """
    assert plan.out is not None
    check_contents(plan)
    progress = progress or Progress()
    if plan.stages:
        return execute(after_stages(plan, progress), progress)
    progress.say(
        f"merging {len(plan.recipe.models)} model(s) by {plan.recipe.method.name}: "
        f"{plan.merged} tensors merged, {len(plan.specs) - plan.merged} copied, "
        f"{readable(plan.nbytes)} to {plan.out}"
    )
    out = plan.out.resolve()
    begun = time.perf_counter()
    writer = Writer(
        out, plan.specs, key=run_key(plan), shard_size=plan.recipe.shard_size,
        overwrite=plan.options.overwrite, resume=plan.options.resume, whole=plan.whole,
    )  # fmt: skip
    try:
        outcome = apply(plan.jobs, writer, plan.inputs, progress.stage)
        for checkpoint in plan.inputs.values():
            checkpoint.check_unchanged()
        check_fingerprints(plan, outcome)
        add_files(plan, writer)
        _add_record(plan, writer, outcome, out)
        told = convert_tokenizer(plan, writer)
        synced = time.perf_counter()
        problems = Problems()
        check_place(
            plan.out, plan.inputs, plan.options.overwrite, problems
        )  # once more: time has passed
        problems.raise_if_any()
        writer.publish()
    except (MismatchError, NonFiniteError, RecipeError):  # the same again would fail the same way
        writer.discard()
        raise
    except BaseException:
        writer.close()
        raise
    outcome.seconds["publish"] = time.perf_counter() - synced
    outcome.seconds["total"] = time.perf_counter() - begun
    return MergeReport(
        plan.out, plan.recipe.method.name, outcome.fingerprints["output"], len(plan.specs),
        plan.merged, plan.reads, plan.nbytes, outcome.seconds, outcome.writeback_loss,
        sum(outcome.moved.values()), outcome.facts, outcome.resumed,
        (*plan.notes, *plan.told, *told, *_linked(plan, writer)), outcome.told,
    )  # fmt: skip


def after_stages(plan: Plan, progress: Progress) -> Plan:
    """Make what is not there yet, and plan anew with it."""
    told = []
    for name in plan.stages:
        stages = stages_of(plan.recipe, plan.options, problems := Problems())
        problems.raise_if_any()
        one = stages[name]
        folder = stage_folder(one)
        if folder.exists():
            told.append(f"stage {name}: taken from {folder}, where it was made before")
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)

        def named(what: str, nbytes: int, name: str = name) -> Read | None:
            return progress.stage(f"{name}: {what}", nbytes)

        try:
            execute(replace(one, out=folder, stages={}), replace(progress, stage=named))
        except SutureError as error:
            error.add_note(f"in stage {name}")
            raise
        told.append(f"stage {name}: made, and kept in {folder}")
    made = plan_merge(plan.recipe, plan.out, plan.options)
    return replace(made, told=tuple(told), stages={}, ordered=plan.stages)


def _linked(plan: Plan, writer: Writer) -> list[str]:
    if not plan.options.link:
        return []
    if not writer.linked:
        return ["no file could be linked: each has a tensor that changes, or is on another disk"]
    return [
        f"{len(writer.linked)} files are links to those of an input: never change either in place"
    ]


class Files(Protocol):
    """Where the small files of an output go."""

    def add_file(self, name: str, content: bytes | str) -> None:
        """Put one beside the weights."""


def add_files(plan: Plan, writer: Files) -> None:
    """Add what stands beside the weights and makes a model of them: configuration, tokenizer."""
    lead = plan.lead
    donors = [lead, *(c for c in plan.inputs.values() if c is not lead)]
    made = plan.files or {}
    for name, path in carried_files(donors).items():
        if plan.files is not None and (name in TOKENIZER or name in made):
            continue
        try:
            writer.add_file(name, path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
    for name, content in made.items():
        writer.add_file(name, content)
    if plan.config:
        dtype = plan.recipe.dtype
        dtype = _main_dtype(plan.specs) if dtype == PROMOTED or plan.recipe.slices else dtype
        writer.add_file("config.json", config_text(plan.config, dtype))


def _add_record(plan: Plan, writer: Writer, outcome: Outcome, out: Path) -> None:
    lead = plan.lead
    donors = [lead, *(c for c in plan.inputs.values() if c is not lead)]
    record = provenance(plan, outcome, out)
    writer.add_file("suture.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    writer.add_file("README.md", model_card(record, plan.recipe.method, donors, out.name))


def _main_dtype(specs: Mapping[str, TensorSpec]) -> str | None:
    """The floating dtype that most elements have."""
    sizes: dict[str, int] = {}
    for spec in specs.values():
        if DTYPES[spec.dtype].computable:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.numel
    return max(sizes, key=lambda d: sizes[d], default=None)


def convert_tokenizer(plan: Plan, writer: Files) -> tuple[str, ...]:
    """Where no input has tokenizer files, write that of the first GGUF file; returns notes."""
    donors = list(plan.inputs.values())
    if plan.files is not None or carried_files(donors).keys() & set(TOKENIZER):
        return ()
    for donor in donors:
        while donor.put_on is not None:
            donor = donor.put_on
        if donor.has_tokenizer:
            try:
                from suture.training.models import gguf_tokenizer

                for name, content in gguf_tokenizer(donor.path).items():
                    writer.add_file(name, content)
            except SutureError as error:
                return (f"the tokenizer of {donor.label} was not converted: {error}",)
            return ()
    return ()


__all__ = ["after_stages", "execute", "merged", "progress_of", "save"]
