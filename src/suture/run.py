"""From a recipe to a folder: check everything, merge, add what belongs beside the weights, publish.

Everything a command does can be done from here; nothing is printed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import suture
from suture.card import carried_files, config_text, model_card
from suture.checkpoint import Checkpoint, is_from_hub, open_checkpoint, refuse_uncomputable
from suture.engine import (
    Job,
    Outcome,
    Stage,
    apply,
    bytes_read,
    output_specs,
    peak_memory,
    tensor_fingerprints,
)
from suture.errors import (
    CheckpointError,
    MismatchError,
    NonFiniteError,
    OutputError,
    Problems,
    RecipeError,
    SutureError,
)
from suture.graft import is_graft, open_graft
from suture.merges import Beside, Context, Method, method
from suture.merges import method as method_named
from suture.recipe import SCHEMA, ModelEntry, Policy, Recipe, parse_recipe, read_recipe
from suture.roles import ParamSpace, check_selectors
from suture.spec import DTYPES, PIECE, WORD_OF, Piece, dtype_named, listed, readable
from suture.stream import BLOCK, Block, Sources, Visitor, cores, sweep, tasks_of
from suture.vector import TaskVector, align
from suture.writer import SHARD_SIZE, Writer, plan_shards, staging_of


@dataclass(frozen=True)
class Options:
    """How to run a merge, as opposed to what it is: none of it changes a byte of the tensors."""

    threads: int | None = None
    block: int = BLOCK
    overwrite: bool = False
    resume: bool = True
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class Plan:
    """A merge whose every input was opened and checked; nothing was read but headers."""

    recipe: Recipe
    job: Job
    inputs: Mapping[str, Checkpoint]
    """The checkpoints by label, the base first."""
    out: Path | None
    options: Options
    beside: Beside = field(default_factory=Beside)
    """What is known of the files that the merge reads besides its models."""

    @property
    def nbytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(spec.nbytes for spec in self.job.specs.values())

    @property
    def reads(self) -> int:
        """Bytes that will be read, all passes together."""
        merged = bytes_read(self.job, self.job.names) * self.job.merge.passes
        return merged + bytes_read(self.job, self.job.specs)


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote and what it cost."""

    out: Path
    method: str
    fingerprint: str
    """Of the output."""
    tensors: int
    merged: int
    """Tensors that were merged; the others were copied."""
    bytes_read: int
    bytes_written: int
    seconds: Mapping[str, float]
    writeback_loss: float | None
    """Share of the changed entries that rounding to the output dtype undid."""
    moved: int
    """Entries that the merge changes before rounding."""
    facts: Mapping[str, Any]
    resumed: int
    """Pieces taken over from an interrupted run."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "out": str(self.out)}


@dataclass(frozen=True)
class Merged:
    """A merge that was asked for and not yet done; ``save`` does it."""

    recipe: Recipe
    inputs: Mapping[str, Checkpoint] = field(repr=False)


def open_model(model: str | os.PathLike[str]) -> Checkpoint:
    """Open a safetensors file, a (sharded) folder or a hub id; headers only.

    Raises:
        CheckpointError: there is nothing there, or it is not a readable checkpoint.
    """
    return open_checkpoint(model)


def merged(
    base: Checkpoint | None,
    models: Mapping[str, Checkpoint] | TaskVector,
    method_name: str = "task_arithmetic",
    *,
    method: str | None = None,
    space: ParamSpace | None = None,
    dtype: str | None = None,
    policy: Policy | None = None,
    **parameters: Any,
) -> Merged:
    """Describe a merge of open checkpoints: ``merge(base, {"math": math}, method="ties")``.

    Args:
        base: what the models were fine-tuned from; ``None`` for methods that need none.
        models: checkpoints by name; or a task vector, which is added to its base.
        method_name: one of ``METHODS``; may be given as ``method``.
        method: the same.
        space: which tensors are merged; default all but token embeddings and heads.
        dtype: of the output; default that of the base.
        policy: what to do where the models do not hold the same tensors.
        **parameters: of the method; a mapping from names of models gives each its own.

    Raises:
        RecipeError: everything that is wrong with the parameters, at once.
    """
    name = method or method_name
    if isinstance(models, TaskVector):
        if name != "task_arithmetic" or space is not None or policy is not None:
            raise RecipeError(
                "a task vector is simply added: give it no method, space or policy; "
                "`vector.select(...)` narrows it, `merge(base, {name: model}, ...)` merges"
            )
        return _applied(models, base, parameters, dtype)
    own: dict[str, dict[str, Any]] = {model: {} for model in models}
    for key, value in list(parameters.items()):
        by_model = isinstance(value, Mapping) and value and value.keys() <= own.keys()
        if by_model and not _files(method_named(name), key):
            for model, number in parameters.pop(key).items():
                own[model][key] = number
    raw: dict[str, Any] = {
        "method": name,
        "models": {m: {"path": str(c.path), **own[m]} for m, c in models.items()},
        "parameters": parameters,
    }
    if base is not None:
        raw["base"] = str(base.path)
    recipe = read_recipe(raw)
    recipe = replace(
        recipe,
        space=space or recipe.space,
        policy=policy or recipe.policy,
        dtype=None if dtype is None else dtype_named(dtype),
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
    names = [f"{number} {tuned.path.name}" for number, (tuned, _) in enumerate(vector.terms)]
    models = {name: tuned for name, (tuned, _) in zip(names, vector.terms, strict=True)}
    weights = {name: factor for name, (_, factor) in zip(names, vector.terms, strict=True)}
    return merged(vector.base, models, "task_arithmetic", weight=weights, dtype=dtype,
                  space=ParamSpace(tuple(vector.names), ()), **parameters)  # fmt: skip


def save(
    what: Merged, out: str | os.PathLike[str], *, stage: Stage | None = None, **options: Any
) -> MergeReport:
    """Do a merge and write its folder; keywords as the fields of ``Options``.

    Raises:
        SutureError: an input does not fit, or the output cannot be written; all problems at once.
    """
    return execute(make_plan(what.recipe, Path(out), Options(**options), dict(what.inputs)), stage)


def merge(
    recipe: Path | Mapping[str, Any],
    out: Path,
    *,
    base_dir: Path | None = None,
    stage: Stage | None = None,
    **options: Any,
) -> MergeReport:
    """Follow a recipe file (or mapping) into a folder; keywords as the fields of ``Options``.

    Raises:
        SutureError: the recipe, an input or the output is at fault; all problems at once.
    """
    return execute(plan_recipe(recipe, out, Options(**options), base_dir), stage)


def plan_recipe(
    recipe: Path | Mapping[str, Any],
    out: Path | None,
    options: Options,
    base_dir: Path | None = None,
) -> Plan:
    """Read a recipe, open its models, and check everything that headers can tell.

    Raises:
        SutureError: all problems at once, those of the output folder included.
    """
    problems = Problems()
    found = parse_recipe(recipe, base_dir, problems)
    if found is None and out is not None:
        _check_place(out, {}, options, problems)
    try:
        if found is None:
            problems.raise_if_any()
        assert found is not None
        return make_plan(found, out, options, problems=problems)
    except SutureError as error:
        if isinstance(recipe, Path):
            error.add_note(f"in {recipe}")
        raise


def make_plan(
    recipe: Recipe,
    out: Path | None,
    options: Options,
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
    problems = problems or Problems()
    inputs = _opened(recipe, problems) if opened is None else opened
    if out is not None:
        _check_place(out, inputs, options, problems)
    if _reference_label(recipe) in inputs:
        _check_fit(recipe, inputs, problems)
    with problems.collecting():
        carried_files(list(inputs.values()))
    problems.raise_if_any()
    job = _job(recipe, inputs, options)
    context = Context(job.sources, job.names, job.models, job.threads, job.block, None)
    beside = job.merge.beside(context, problems)
    if out is not None:
        _check_room(out, job, options, problems)
    problems.raise_if_any()
    return Plan(recipe, job, inputs, out, options, beside)


def _opened(recipe: Recipe, problems: Problems) -> dict[str, Checkpoint]:
    paths = {} if recipe.base is None else {"base": recipe.base}
    paths |= {name: entry.path for name, entry in recipe.models.items()}
    found: dict[str, Checkpoint] = {}
    for label, path in paths.items():
        with problems.collecting():
            checkpoint = open_checkpoint(path, recipe.folder)
            if is_graft(checkpoint.path):
                checkpoint = _grafted(checkpoint, found.get("base"))
            found[label] = checkpoint
            refuse_uncomputable(checkpoint)
    return found


def _grafted(graft: Checkpoint, base: Checkpoint | None) -> Checkpoint:
    """The model that a graft makes of the base."""
    if base is None:
        raise RecipeError(
            f"{graft.label}: is a graft, weights to be put into a base; name the base"
        )
    view = open_graft(graft.path, base)
    view.label = graft.label
    return view


def _row_names(recipe: Recipe) -> list[str]:
    """The models in the order of rows: sorted, so that the recipe's order changes no byte."""
    return list(recipe.models) if recipe.method.ordered else sorted(recipe.models)


def _reference_label(recipe: Recipe) -> str | None:
    """Which input's names and shapes count: the base, or else the first model."""
    return "base" if recipe.base is not None else next(iter(recipe.models), None)


def _check_fit(recipe: Recipe, inputs: Mapping[str, Checkpoint], problems: Problems) -> None:
    """Note where the models do not fit each other, or the recipe's patterns fit no tensor."""
    reference = inputs[str(_reference_label(recipe))]
    for checkpoint in inputs.values():
        if checkpoint is not reference:
            align(reference, checkpoint, problems, recipe.policy.missing == "base",
                  recipe.policy.extra == "drop")  # fmt: skip
    for key in ("include", "exclude"):
        with problems.collecting():
            check_selectors(getattr(recipe.space, key), reference.specs, f"space.{key}")
    _check_patterns(recipe, reference, problems)
    if not recipe.space.names(reference.specs):
        problems.add(RecipeError, "space: no tensor is left to merge")


def _job(recipe: Recipe, inputs: Mapping[str, Checkpoint], options: Options) -> Job:
    names = _row_names(recipe)
    reference = inputs[str(_reference_label(recipe))]
    merged_names = tuple(recipe.space.names(reference.specs))
    ordered = replace(recipe, models={name: recipe.models[name] for name in names})
    how = recipe.method.make(**ordered.settings)
    raw = frozenset(reference.specs.keys() - set(merged_names))
    base = inputs["base"] if recipe.base is not None else None
    models = tuple(inputs[name] for name in names)
    sources = Sources(models, base, how.how, raw, options.allow_nonfinite, lead=reference)
    return Job(
        sources, tuple(names), how, merged_names, output_specs(reference, recipe.dtype),
        recipe.policy.buffers == "equal", options.threads or cores(), options.block,
    )  # fmt: skip


def _files(how: Method, parameter: str) -> bool:
    """Whether a parameter names a file for each model."""
    return parameter in how.parameters and how.parameters[parameter].files


def _check_patterns(recipe: Recipe, reference: Checkpoint, problems: Problems) -> None:
    sections = [("parameters", recipe.parameters)]
    sections += [(f"models.{n}", e.parameters) for n, e in recipe.models.items()]
    for where, section in sections:
        for key, value in section.items():
            if isinstance(value, Mapping) and not _files(recipe.method, key):
                with problems.collecting():
                    check_selectors([str(p) for p in value], reference.specs, f"{where}.{key}")


def _check_place(
    out: Path, inputs: Mapping[str, Checkpoint], options: Options, problems: Problems
) -> None:
    try:
        place = out.resolve()
        for label, checkpoint in inputs.items():
            held = {checkpoint.path, *checkpoint.files}
            ours = (place, staging_of(place))
            if any(o.is_relative_to(p) or p.is_relative_to(o) for p in held for o in ours):
                problems.add(OutputError, f"{out}: holds the input {label!r}; write somewhere else")
                return
        _check_free(out, place, options, problems)
    except (OSError, RuntimeError) as error:  # a name too long, a link to itself
        problems.add(OutputError, f"{out}: {getattr(error, 'strerror', None) or error}")


def _check_free(out: Path, place: Path, options: Options, problems: Problems) -> None:
    staging_of(place).exists()  # its name is longer still: too long is seen here, not later
    if place.exists():
        empty = place.is_dir() and not any(place.iterdir())
        if not place.is_dir():
            problems.add(OutputError, f"{out}: is a file; name a folder")
        elif not empty and not options.overwrite:
            problems.add(OutputError, f"{out}: exists; name another folder, or add --overwrite")
        elif not empty and not (place / "suture.json").exists():
            problems.add(
                OutputError,
                f"{out}: was not written by suture, so it is not replaced; remove it yourself",
            )
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or not _writable(parent):
        problems.add(OutputError, f"{out}: cannot write in {parent}")


def _writable(folder: Path) -> bool:
    """Whether the file system takes writes: a read-only one refuses even the superuser."""
    try:
        return not os.statvfs(folder).f_flag & os.ST_RDONLY
    except (AttributeError, OSError):
        return True


def _check_room(out: Path, job: Job, options: Options, problems: Problems) -> None:
    parent = out.resolve().parent
    staged = 0
    folder = staging_of(out.resolve()) / "model"
    if options.resume and folder.is_dir():
        staged = sum(p.stat().st_blocks * 512 for p in folder.iterdir())
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    needed = sum(s.nbytes for s in job.specs.values()) - staged
    if needed > free:
        problems.add(
            OutputError, f"{out}: needs {readable(needed)} of disk, {readable(free)} are free"
        )


def check_contents(plan: Plan) -> None:
    """Check what only some bytes can tell, before the merge begins: buffers, and tied tensors.

    Raises:
        MismatchError: the models' integer tensors differ, or a config ties two that differ.
    """
    problems = Problems()
    _check_buffers(plan, problems)
    with problems.collecting():
        check_ties(plan.inputs)
    problems.raise_if_any()


def check_ties(inputs: Mapping[str, Checkpoint]) -> None:
    """Refuse checkpoints that hold two different tensors which their config says are one.

    Raises:
        MismatchError: names them.
    """
    problems = Problems()
    for label, checkpoint in inputs.items():
        for alias in checkpoint.untied():
            problems.add(
                MismatchError,
                f"{label}: config.json ties {alias} to {checkpoint.aliases[alias]}, but they "
                "differ in the file; set tie_word_embeddings to false there, or remove one",
            )
    problems.raise_if_any()


def _check_buffers(plan: Plan, problems: Problems) -> None:
    if not plan.job.equal_buffers:
        return
    reference = plan.job.sources.reference
    whose = next(label for label, c in plan.inputs.items() if c is reference)
    names = [n for n, s in reference.specs.items() if not DTYPES[s.dtype].computable]
    mine = tensor_fingerprints(reference, names)
    for label, checkpoint in plan.inputs.items():
        theirs = tensor_fingerprints(checkpoint, [n for n in names if n in checkpoint.specs])
        different = sorted(n for n, found in theirs.items() if found != mine[n])
        if different:
            problems.add(
                MismatchError,
                f"{label} against {whose}: {listed(different)}: integer tensors differ; "
                f"`policy: {{buffers: base}}` takes those of {whose}",
            )


def execute(plan: Plan, stage: Stage | None = None) -> MergeReport:
    """Do what was planned and publish the folder.

    Raises:
        SutureError: an input or the output is at fault. An interrupted merge leaves its staging
            folder, which the same call picks up.
    """
    assert plan.out is not None
    check_contents(plan)
    out = plan.out.resolve()
    begun = time.perf_counter()
    writer = Writer(
        out, plan.job.specs, key=_key(plan), shard_size=plan.recipe.shard_size,
        overwrite=plan.options.overwrite, resume=plan.options.resume,
    )  # fmt: skip
    try:
        outcome = apply(plan.job, writer, stage or (lambda name, nbytes: None))
        for checkpoint in plan.inputs.values():
            checkpoint.check_unchanged()
        _check_fingerprints(plan, outcome)
        _add_files(plan, writer, outcome, out)
        synced = time.perf_counter()
        problems = Problems()
        _check_place(plan.out, plan.inputs, plan.options, problems)  # once more: time has passed
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
        plan.out, plan.recipe.method.name, outcome.fingerprints["output"], len(plan.job.specs),
        len(plan.job.names), plan.reads, plan.nbytes, outcome.seconds, outcome.writeback_loss,
        sum(outcome.moved.values()), outcome.facts, outcome.resumed, plan.recipe.notes,
    )  # fmt: skip


def _key(plan: Plan) -> str:
    """What a staging folder is for: everything that decides the bytes of the output."""
    facts = {
        "version": suture.__version__,
        "recipe": plan.recipe.resolved() | {"output": None},
        "order": list(plan.job.models),
        "nonfinite": plan.options.allow_nonfinite,
        "inputs": {label: c.identity for label, c in plan.inputs.items()},
        "beside": plan.beside.identity,
        "shards": [[s.name, s.size, hashlib.sha256(s.header).hexdigest()]
                   for s in plan_shards(plan.job.specs, plan.recipe.shard_size)],
    }  # fmt: skip
    # Not sorted: of the patterns of a parameter, the first that fits counts.
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _check_fingerprints(plan: Plan, outcome: Outcome) -> None:
    problems = Problems()
    for label, expected in plan.recipe.fingerprints.items():
        found = outcome.fingerprints.get(label)
        if found != expected:
            problems.add(
                MismatchError,
                f"{label}: {plan.inputs[label].label} is not the model that was merged then "
                f"(fingerprint {found}, not {expected})",
            )
    for label, expected in plan.beside.expected.items():
        if outcome.fingerprints.get(label) != expected:
            problems.add(
                MismatchError,
                f"{label}: {plan.inputs[label].label} is not the model that the masks or "
                "statistics of this recipe were made from; make them again",
            )
    problems.raise_if_any()


def _add_files(plan: Plan, writer: Writer, outcome: Outcome, out: Path) -> None:
    reference = plan.job.sources.reference
    donors = [reference, *(c for c in plan.inputs.values() if c is not reference)]
    for name, path in carried_files(donors).items():
        try:
            writer.add_file(name, path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
    if reference.config:
        writer.add_file("config.json", config_text(reference.config, plan.recipe.dtype))
    record = provenance(plan, outcome, out)
    writer.add_file("suture.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    writer.add_file("README.md", model_card(record, plan.recipe.method, donors, out.name))


def provenance(plan: Plan, outcome: Outcome, out: Path) -> dict[str, Any]:
    """What ``suture.json`` holds: enough to make the same tensors again, and to know it."""
    recipe = plan.recipe.resolved()
    paths = {label: _portable(c, out) for label, c in plan.inputs.items()}
    if recipe["base"] is not None:
        recipe["base"] = paths["base"]
    for name, entry in recipe["models"].items():
        entry["path"] = paths[name]
    for name in [n for n in recipe["parameters"] if _files(plan.recipe.method, n)]:
        files = plan.recipe.parameters.get(name)
        if isinstance(files, Mapping):
            recipe["parameters"][name] = {m: os.path.relpath(f, out) for m, f in files.items()}
        elif files is not None:
            recipe["parameters"][name] = os.path.relpath(files, out)
    dtypes: dict[str, int] = {}
    for spec in plan.job.specs.values():
        word = WORD_OF.get(spec.dtype, spec.dtype)
        dtypes[word] = dtypes.get(word, 0) + spec.numel
    return {
        "suture": suture.__version__,
        "schema": SCHEMA,
        "kind": "merge",
        "recipe": recipe,
        "inputs": {
            label: {"path": paths[label], "fingerprint": outcome.fingerprints[label],
                    "tensors": len(c), "bytes": c.nbytes}
            for label, c in plan.inputs.items()
        },
        "output": {
            "fingerprint": outcome.fingerprints["output"],
            "tensors": len(plan.job.specs),
            "bytes": plan.nbytes,
            "dtypes": dtypes,
        },
        "results": {
            "merged_tensors": len(plan.job.names),
            "copied_tensors": len(plan.job.specs) - len(plan.job.names),
            "moved": sum(outcome.moved.values()),
            "writeback_loss": outcome.writeback_loss,
            **outcome.facts,
        },
        "notes": list(plan.recipe.notes),
    }  # fmt: skip


def _portable(checkpoint: Checkpoint, out: Path) -> str:
    """A hub id as it is; a path relative to the output, so that both can move together."""
    if is_from_hub(checkpoint):
        return checkpoint.label
    return os.path.relpath(checkpoint.path, out)


def describe(plan: Plan) -> dict[str, Any]:
    """What a plan will do, as plain data: inputs, output, bytes, memory, time, notes."""
    job = plan.job
    elements = sum(job.specs[n].numel for n in job.names)
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
            "tensors": len(job.specs),
            "merged": len(job.names),
            "merged_elements": elements,
            "copied": len(job.specs) - len(job.names),
            "bytes": plan.nbytes,
            "shards": len(plan_shards(job.specs, plan.recipe.shard_size)),
        },
        "bytes_read": plan.reads,
        "passes": job.merge.passes + 1,
        "threads": job.threads,
        "peak_memory": peak_memory(job),
        "seconds": estimate(plan),
        "notes": list(plan.recipe.notes),
    }  # fmt: skip


class _Nothing(Visitor[None]):
    """Reads and widens, to see how long that takes."""


def estimate(plan: Plan) -> float:
    """Seconds that the merge will take, from reading a little of it (at most 64 MB a model)."""
    job = plan.job
    sample: list[list[Piece]] = []
    room = 16 * PIECE
    for task in tasks_of(job.names, job.specs):
        size = sum(p.stop - p.start for p in task)
        if sample and size > room:
            break
        sample.append(task)
        room -= size
    if not sample:
        return 0.0
    small = Block(job.sources, job.block)  # compiles the kernels outside of the measure
    small.load(sample[0][0].name, 0, min(8, sample[0][0].stop))
    begun = time.perf_counter()
    sweep(job.sources, sample, _Nothing(), threads=job.threads, block=job.block)
    took = time.perf_counter() - begun
    taken = sum((p.stop - p.start) for task in sample for p in task) or 1
    total = sum(job.specs[n].numel for n in job.names)
    # Counting or combining costs about as much again as reading; then the output is written.
    return took / taken * total * 2 * (job.merge.passes + 1) + plan.nbytes / 5e8


def report_lines(report: MergeReport) -> Iterator[str]:
    """What to tell at the end of a merge, a line each."""
    if report.resumed:
        yield f"took over {report.resumed} finished pieces of an interrupted run"
    for note in report.notes:
        yield f"note: {note}"
    if "density" in report.facts:
        kept = ", ".join(f"{d:.4g}" for d in report.facts["density"])
        yield f"kept shares: {kept}"
    if report.writeback_loss is not None:
        yield (
            f"{report.moved:,} entries moved; rounding to the output dtype undid "
            f"{report.writeback_loss:.2%} of them"
        )
    rate = readable((report.bytes_read + report.bytes_written) / max(1e-9, report.seconds["total"]))
    yield (
        f"wrote {report.out} ({report.tensors} tensors, {readable(report.bytes_written)}) in "
        f"{report.seconds['total']:.2f} s, {rate}/s; fingerprint {report.fingerprint}"
    )


__all__ = [
    "SHARD_SIZE",
    "MergeReport",
    "Merged",
    "ModelEntry",
    "Options",
    "Plan",
    "describe",
    "execute",
    "make_plan",
    "merge",
    "merged",
    "method",
    "open_model",
    "plan_recipe",
    "save",
]  # fmt: skip
