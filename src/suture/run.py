"""From a recipe to a folder: check everything, merge, add what belongs beside the weights, publish.

Everything a command does can be done from here; nothing is printed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import suture
from suture.card import carried_files, carried_tokenizer, config_text, model_card
from suture.checkpoint import (
    JSON_LIMIT,
    Checkpoint,
    is_from_hub,
    open_checkpoint,
    read_header,
    read_json,
    refuse_uncomputable,
    ties_embeddings,
)
from suture.embeddings import Aligned, by_id, by_token, same_heads, templated
from suture.engine import (
    Job,
    Outcome,
    Stage,
    apply,
    bytes_read,
    checkpoint_fingerprint,
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
from suture.forms import PLAIN, check_forms
from suture.layers import Stretch, cut, depth_of, depths, sliced_config, stack_of
from suture.merges import Beside, Context, Method, PerModel, Scalar, method
from suture.merges import method as method_named
from suture.merges.presets import preset as preset_named
from suture.merges.protect import protected
from suture.opening import open_model
from suture.recipe import SCHEMA, parse_recipe, read_recipe
from suture.recipe_types import ModelEntry, Policy, Recipe, Slice
from suture.roles import EVERYTHING, ParamSpace, check_selectors, layer_parts, selects, tied_to
from suture.spec import (
    DTYPES,
    PIECE,
    PROMOTED,
    WORD_OF,
    Piece,
    TensorSpec,
    cache_folder,
    dtype_named,
    listed,
    readable,
)
from suture.stream import BLOCK, Block, Progress, Sources, Visitor, cores, sweep, tasks_of
from suture.vector import TaskVector, align
from suture.views import Planned, View
from suture.vocabulary import TOKENIZER, UNION, Wanted
from suture.writer import SHARD_SIZE, Shard, Writer, plan_shards, staging_of


@dataclass(frozen=True)
class Options:
    """How to run a merge, as opposed to what it is: none of it changes a byte of the tensors."""

    threads: int | None = None
    block: int = BLOCK
    overwrite: bool = False
    resume: bool = True
    allow_nonfinite: bool = False
    link: bool = False
    """Whether files of the output that would be copies of an input's may be links to it."""


@dataclass(frozen=True)
class Plan:
    """A merge whose every input was opened and checked; nothing was read but headers."""

    recipe: Recipe
    jobs: tuple[Job, ...]
    """One, or one for each slice; each makes some tensors of the output."""
    inputs: Mapping[str, Checkpoint]
    """The checkpoints by label, the base first."""
    out: Path | None
    options: Options
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
        return self.inputs[str(_reference_label(self.recipe))]

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
    told: tuple[str, ...] = ()
    """What the method has to say, a line each."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "out": str(self.out)}


@dataclass(frozen=True)
class Merged:
    """A merge that was asked for and not yet done; ``save`` does it."""

    recipe: Recipe
    inputs: Mapping[str, Checkpoint] = field(repr=False)


def merged(  # noqa: PLR0913  every section of a recipe
    base: Checkpoint | None,
    models: Mapping[str, Checkpoint] | TaskVector,
    method_name: str | None = None,
    *,
    method: str | None = None,
    preset: str | None = None,
    space: ParamSpace | None = None,
    dtype: str | None = None,
    policy: Policy | None = None,
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
        if by_model and not _files(method_named(name or preset_named(str(preset)).method), key):
            for model, number in parameters.pop(key).items():
                own[model][key] = number
    raw: dict[str, Any] = {
        **({"method": name} if name else {}),
        **({"preset": preset} if preset else {}),
        "models": {m: {"path": str(c.path), **own[m]} for m, c in models.items()},
        "parameters": parameters,
        **({"protect": dict(protect)} if protect is not None else {}),
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
        check_place(out, {}, options, problems)
    if isinstance(recipe, Path) and out is not None and options.overwrite:
        _check_recipe_stays(recipe, out, problems)
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
    problems = Problems() if problems is None else problems
    stages = _stages(recipe, options, problems)
    made = {label: _stage_key(stages[path]) for label, path in _paths(recipe).items()
            if path in stages}  # fmt: skip
    if out is not None:
        _check_others(recipe, out, stages, problems)
    return _planned(recipe, out, options, opened, problems, stages, made)


def _stages(recipe: Recipe, options: Options, problems: Problems) -> dict[str, Plan]:
    """The plans of what must be made first; what one of them lacks is noted."""
    found: dict[str, Plan] = {}
    for name, stage in recipe.stages.items():
        own = Problems()
        try:
            if all(path in found for path in stage.paths if path in recipe.stages):
                made = {label: _stage_key(found[path]) for label, path in _paths(stage).items()
                        if path in found}  # fmt: skip
                plan = _planned(stage, None, options, None, own, found, made)
                folder = _stage_folder(plan)
                if not folder.exists():
                    _check_free(folder, folder, options, own)
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
    text = json.dumps([_key(plan), places])
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _stage_folder(plan: Plan) -> Path:
    """Where the output of a stage is kept: it can always be made again."""
    return cache_folder().resolve() / "stages" / _stage_key(plan)


def _planned(
    recipe: Recipe, out: Path | None, options: Options, opened: dict[str, Checkpoint] | None,
    problems: Problems, stages: Mapping[str, Plan], made: Mapping[str, str],
) -> Plan:  # fmt: skip
    inputs = _opened(recipe, problems, stages) if opened is None else opened
    if out is not None:
        check_place(out, inputs, options, problems)
    parts: list[_Part] = []
    notes: list[str] = []
    aligned = Aligned(inputs)
    if _reference_label(recipe) in inputs:
        aligned = _aligned(recipe, inputs, problems)
        notes += aligned.notes
        parts = _parts(recipe, aligned.inputs, problems)
        _check_fit(recipe, parts, problems, notes)
    check_forms({n: c for n, c in inputs.items() if n != "base"}, problems)
    with problems.collecting():
        carried_files(list(inputs.values()))
    problems.raise_if_any()
    jobs = tuple(_job(recipe, part, options, problems) for part in parts)
    _check_required(recipe, jobs, parts, problems)
    for job in jobs:
        for problem in job.merge.check(job.names, job.models):
            problems.add(RecipeError, f"{recipe.method.name}: {problem}")
    beside = tuple(
        job.merge.beside(
            Context(job.sources, job.names, job.models, job.threads, job.block, None), problems
        )
        for job in jobs
    )
    config = _config(recipe, parts, aligned.inputs)
    notes += [note for c in inputs.values() for note in c.notes]
    told = tuple(dict.fromkeys((*recipe.notes, *notes)))
    plan = Plan(recipe, jobs, inputs, out, options, config, told,
                {name: stages[name] for name in recipe.stages}, made, views=aligned.inputs,
                files=aligned.files, whole=_whole(jobs) if options.link else (),
                beside=beside)  # fmt: skip
    if out is not None:
        _check_room(out, plan, problems)
    problems.raise_if_any()
    return plan


def _paths(recipe: Recipe) -> dict[str, str]:
    """What every input is called in the recipe, by label."""
    paths = {} if recipe.base is None else {"base": recipe.base}
    return paths | {name: entry.path for name, entry in recipe.models.items()}


def _opened(
    recipe: Recipe, problems: Problems, stages: Mapping[str, Plan]
) -> dict[str, Checkpoint]:
    found: dict[str, Checkpoint] = {}
    for label, path in _paths(recipe).items():
        if path in recipe.stages and path not in stages:
            continue  # why it cannot be made is told already
        with problems.collecting():
            if path in stages:
                found[label] = _output_of(path, stages[path])
                continue
            found[label] = open_input(path, recipe.folder, found.get("base"))
    return found


def open_input(path: str, near: Path | None, base: Checkpoint | None) -> Checkpoint:
    """What a recipe may call a model, opened: also a patch or a graft, which lies on the base.

    Raises:
        SutureError: there is no such model, or nothing can be computed with it.
    """
    found = open_model(path, near, base)
    if found.path.is_file():
        found = _put_on(found, base)
    refuse_uncomputable(found)
    return found


def _output_of(name: str, plan: Plan) -> Checkpoint:
    """What a stage made, or what is known of what it will make."""
    folder = _stage_folder(plan)
    if not folder.exists():
        return Planned(name, folder, plan.specs, plan.config)
    found = open_checkpoint(folder)
    found.label = name
    return found


def _put_on(file: Checkpoint, base: Checkpoint | None) -> Checkpoint:
    """What a file means beside a base: a patch or a graft is the base with it on."""
    from suture.graft import is_graft, open_graft
    from suture.patch import Patch
    from suture.patchfile import is_patch

    patch = is_patch(file)
    if not patch and not is_graft(file.path):
        return file
    if base is None:
        what = "a patch stands for a model only beside its base; name it"
        if not patch:
            what = "is a graft, weights to be put into a base; name the base"
        raise RecipeError(f"{file.label}: {what}")
    view = Patch.load(file.path).apply(base) if patch else open_graft(file.path, base)
    view.path, view.label = file.path, file.label
    return view


def _reference_label(recipe: Recipe) -> str | None:
    """Which input's names and shapes count: the base, or else the first model."""
    return "base" if recipe.base is not None else next(iter(recipe.models), None)


def _aligned(recipe: Recipe, inputs: dict[str, Checkpoint], problems: Problems) -> Aligned:
    """The models brought to the vocabulary and the tied heads that the output will have."""
    lead = str(_reference_label(recipe))
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


@dataclass(frozen=True)
class _Part:
    """A slice with its models cut to it; or all of them whole."""

    cut: Slice
    views: Mapping[str, Checkpoint]
    """What is read, by label: the base first, then the models in the order of rows."""
    rows: tuple[str, ...]
    base: str | None
    lead: str
    """Whose names and shapes count."""
    known: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The models' own names of the tensors, where they have others in the output."""
    stretch: Stretch | None = None

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint whose names and shapes count."""
        return self.views[self.lead]


def _parts(recipe: Recipe, inputs: Mapping[str, Checkpoint], problems: Problems) -> list[_Part]:
    """The models, cut as the slices say; slices that do not fit are noted and left out."""
    if not recipe.slices:
        rows = tuple(name for name in recipe.rows(recipe.cuts[0]) if name in inputs)
        base = "base" if recipe.base is not None else None
        lead = str(_reference_label(recipe))
        whole = {label: c for label, c in inputs.items() if label == base}
        whole |= {name: inputs[name] for name in rows}
        return [_Part(recipe.cuts[0], whole, rows, base, lead)]
    found = []
    at = 0
    heads = _heads(inputs)
    for number, one in enumerate(recipe.slices):
        first, last = number == 0, number == len(recipe.slices) - 1
        rows = tuple(recipe.rows(one))
        base = one.base if recipe.differs else None
        labels = [n for n in (base, *rows) if n is not None and n in one.sources]
        views: dict[str, Checkpoint] = {}
        known: dict[str, dict[str, str]] = {}
        stretch: Stretch | None = None
        for label in labels:
            layers = one.sources[label].layers
            if layers is None or label not in inputs:
                continue
            stretch = Stretch(*layers, at, first, last)
            try:
                views[label], known[label] = cut(inputs[label], stretch, heads)
            except RecipeError as error:
                problems.add(RecipeError, f"{one.sources[label].where}: {error}")
        if stretch is not None:
            at += stretch.stop - stretch.start
        lead = base if base is not None else next((n for n in one.sources if n in views), "")
        if len(views) == len(labels) and lead in views:
            found.append(_Part(one, views, rows, base, lead, known, stretch))
    return found


def _heads(inputs: Mapping[str, Checkpoint]) -> set[str]:
    """The heads that some models have and others tie to their embedding."""
    tied = [c for c in inputs.values() if ties_embeddings(c.config)]
    own = [c for c in inputs.values() if not ties_embeddings(c.config)]
    return {n for c in own for n in tied_to(c.specs.keys())} if tied else set()


def _check_fit(
    recipe: Recipe, parts: Sequence[_Part], problems: Problems, notes: list[str]
) -> None:
    """Note where the models do not fit each other, or the recipe's patterns fit no tensor."""
    for part in parts:
        for checkpoint in part.views.values():
            if checkpoint is not part.reference:
                # mergekit goes by the architecture, whose lists know no buffers.
                align(part.reference, checkpoint, problems, recipe.policy.missing == "base",
                      recipe.policy.extra == "drop", recipe.kit is not None)  # fmt: skip
    if recipe.slices:
        _check_stacking(parts, problems)
    if len(parts) < len(recipe.cuts):
        return
    names = {name for part in parts for name in part.reference.specs}
    for key in ("include", "exclude"):
        with problems.collecting():
            check_selectors(getattr(recipe.space, key), names, f"space.{key}")
    names |= {old for part in parts for own in part.known.values() for old in own.values()}
    _check_patterns(recipe, names, problems, notes)
    if not any(recipe.space.names(part.reference.specs) for part in parts):
        problems.add(RecipeError, "space: no tensor is left to merge")


def _check_stacking(parts: Sequence[_Part], problems: Problems) -> None:
    """Note where layers of different shapes, or a foreign head, would stand in one model."""
    seen: dict[str, tuple[tuple[int, ...], Checkpoint]] = {}
    rows = next((n for part in parts if (n := part.reference.vocabulary)), None)
    for part in parts:
        mine = part.reference
        for name, spec in mine.specs.items():
            place = layer_parts(name)
            if place is None:
                if name.endswith("lm_head.weight") and rows not in (None, spec.shape[0]):
                    problems.add(
                        MismatchError,
                        f"{mine.label}: {name} has {spec.shape[0]} rows, the embedding below has "
                        f"{rows}; take both from models of one vocabulary",
                    )
                continue
            shape, whose = seen.setdefault(place[2], (spec.shape, mine))
            if shape != spec.shape and whose.path != mine.path:
                problems.add(
                    MismatchError,
                    f"{mine.label} on {whose.label}: {place[2]} is {list(spec.shape)}, not "
                    f"{list(shape)}; one model cannot hold both",
                )
                break


def _job(recipe: Recipe, part: _Part, options: Options, problems: Problems) -> Job:
    reference = part.reference
    how = recipe.method.make(**_bound(recipe.settings_of(part.cut, part.rows), part))
    if recipe.protect is not None:
        with problems.collecting():
            how = protected(how, recipe.protect)
    merged_names = tuple(n for n in recipe.space.names(reference.specs) if not how.keeps(n))
    raw = frozenset(reference.specs.keys() - set(merged_names))
    base = None if part.base is None else part.views[part.base]
    models = tuple(part.views[name] for name in part.rows)
    sources = Sources(
        models, base, how.rows(base is not None), raw, options.allow_nonfinite, lead=reference
    )
    return Job(
        sources, part.rows, how, merged_names, output_specs(reference, recipe.dtype, models),
        recipe.policy.buffers == "equal", options.threads or cores(), options.block,
    )  # fmt: skip


def _whole(jobs: Sequence[Job]) -> tuple[Shard, ...]:
    """The files of the reference of which every tensor is copied as it is."""
    if len(jobs) != 1:
        return ()  # layers that were stacked anew stand in no file as they are
    job = jobs[0]
    lead = job.sources.reference
    held: dict[int, list[str]] = {}
    for name, place in lead.places.items():
        held.setdefault(place.file, []).append(name)
    found = []
    for number, names in sorted(held.items()):
        if not all(
            n in job.sources.raw and job.specs.get(n) == lead.specs[n] and lead.as_stored(n)
            for n in names
        ):
            continue
        path = lead.files[number]
        header = read_header(path)
        if header.specs.keys() != set(names):  # it holds a second name of a tied tensor, too
            continue
        with path.open("rb") as file:
            text = file.read(min(header.offsets.values()))
        found.append(Shard("", text, header.offsets, path.stat().st_size, path))
    return tuple(found)


def _bound(found: Mapping[str, Any], part: _Part) -> dict[str, Any]:
    """The parameters with a number for every tensor where they depend on depth or on old names."""
    depth: Callable[[str], float]
    if part.stretch is None:
        depth = depths(part.reference.specs).__getitem__ if _curved(found) else lambda name: 0.0
    else:
        at, layers = part.stretch.at, part.stretch.stop - part.stretch.start

        def depth(name: str) -> float:
            place = layer_parts(name)
            return 0.0 if place is None else depth_of(place[1] - at, layers)

    def bound(scalar: Scalar, known: Mapping[str, str] | None) -> Scalar:
        if not scalar.curved and not (known and scalar.rules):
            return scalar
        names = part.reference.specs
        return scalar.bound((n, known.get(n, n) if known else n, depth(n)) for n in names)

    made = dict(found)
    for key, value in found.items():
        if isinstance(value, Scalar):
            made[key] = bound(value, None)
        elif isinstance(value, PerModel):
            made[key] = PerModel(tuple(
                bound(scalar, part.known.get(row))
                for scalar, row in zip(value.scalars, part.rows, strict=True)
            ))  # fmt: skip
    return made


def _curved(found: Mapping[str, Any]) -> bool:
    scalars = [v for v in found.values() if isinstance(v, Scalar)]
    scalars += [s for v in found.values() if isinstance(v, PerModel) for s in v.scalars]
    return any(scalar.curved for scalar in scalars)


def _check_required(
    recipe: Recipe, jobs: Sequence[Job], parts: Sequence[_Part], problems: Problems
) -> None:
    """Note tensors for which no condition gives a number that must be given."""
    for job, part in zip(jobs, parts, strict=True):
        found = recipe.settings_of(part.cut, part.rows) if recipe.required else {}
        for key in recipe.required:
            value = found[key]
            scalars = value.scalars if isinstance(value, PerModel) else (value,)
            rows = part.rows if isinstance(value, PerModel) else ("",)
            for scalar, row in zip(scalars, rows, strict=True):
                known = part.known.get(row, {})
                without = [] if not scalar.rules else [
                    n for n in job.names
                    if not any(selects(p, known.get(n, n)) for p, _ in scalar.rules)
                ]  # fmt: skip
                if without:
                    problems.add(
                        RecipeError,
                        f"{f'models.{row}.' if row else ''}{key}: no condition fits "
                        f"{listed(without, 3)}; add one without a filter, such as {{value: 1.0}}",
                    )


def _config(
    recipe: Recipe, parts: Sequence[_Part], inputs: Mapping[str, Checkpoint]
) -> dict[str, Any]:
    """The configuration of the output: the lead's, with the layers that there are now."""
    lead = inputs[str(_reference_label(recipe))]
    config = dict(lead.config)
    if not recipe.slices or not config:
        return config
    origins = []
    for part in parts:
        layers = part.cut.sources[part.lead].layers
        assert layers is not None
        model = inputs[part.lead]
        number = stack_of(model)[1]
        origins += [(model.config, layer, number) for layer in range(*layers)]
    config = sliced_config(config, stack_of(lead)[1], origins)
    if ties_embeddings(config) and any(tied_to(c.specs.keys()) for c in inputs.values()):
        config["tie_word_embeddings"] = False  # each head is a tensor of its own now
    return config


def _files(how: Method, parameter: str) -> bool:
    """Whether a parameter names a file for each model."""
    return parameter in how.parameters and how.parameters[parameter].files


def _check_patterns(
    recipe: Recipe, names: Collection[str], problems: Problems, notes: list[str]
) -> None:
    """Note patterns of names that fit none; in a mergekit recipe they are legal, and told."""
    places = [("parameters", recipe.parameters)]
    places += [(f"models.{n}", e.parameters) for n, e in recipe.models.items()]
    for number, one in enumerate(recipe.slices):
        places.append((f"slices[{number}].parameters", one.parameters))
        places += [(f"slices[{number}].sources.{n}", s.parameters) for n, s in one.sources.items()]
    for where, section in places:
        for key, value in section.items():
            if not isinstance(value, Mapping) or _files(recipe.method, key):
                continue
            try:
                check_selectors([str(p) for p in value], names, f"{where}.{key}")
            except RecipeError as error:
                if recipe.kit is None:
                    problems.add(RecipeError, str(error))
                else:
                    unused = [str(p) for p in value if not any(selects(str(p), n) for n in names)]
                    words = ", ".join(p.strip("*") for p in unused)
                    notes.append(f"{key}: the filter {words} fits no tensor")


def check_place(
    out: Path, inputs: Mapping[str, Checkpoint], options: Options, problems: Problems
) -> None:
    """Note what keeps an output from being written, or what it would destroy.

    Args:
        out: the folder that will be.
        inputs: what is read, by its label.
        options: whether something older may be replaced.
        problems: takes the notes.
    """
    try:
        held = {label: {c.path, *c.files} for label, c in inputs.items()}
        if _apart(out, held, problems):
            _check_free(out, out.resolve(), options, problems)
    except (OSError, RuntimeError) as error:  # a name too long, a link to itself
        problems.add(OutputError, f"{out}: {getattr(error, 'strerror', None) or error}")


def _apart(out: Path, held: Mapping[str, Collection[Path]], problems: Problems) -> bool:
    """Whether an output, and the place where it is prepared, are apart from what is read."""
    place = out.resolve()
    ours = (place, staging_of(place))
    for label, paths in held.items():
        if any(o.is_relative_to(p) or p.is_relative_to(o) for p in paths for o in ours):
            problems.add(OutputError, f"{out}: holds the input {label!r}; write somewhere else")
            return False
    return True


def _check_others(
    recipe: Recipe, out: Path, stages: Mapping[str, Plan], problems: Problems
) -> None:
    """Note where an output would replace what is read besides its models."""
    held: dict[str, Collection[Path]] = {
        f"{label} of stage {name}": {c.path, *c.files}
        for name, stage in stages.items()
        for label, c in stage.inputs.items()
        if not isinstance(c, Planned) and label not in stage.made
    }
    for name, one in {**{n: s.recipe for n, s in stages.items()}, "": recipe}.items():
        if one.tokenizer is not None and one.tokenizer.source not in (UNION, "base", *one.models):
            folder = one.folder / Path(one.tokenizer.source).expanduser()
            held[f"tokenizer{name and ' of stage '}{name}"] = {folder.resolve()}
    with suppress(OSError, RuntimeError):  # check_place says what is wrong with the path
        _apart(out, held, problems)


def _check_recipe_stays(recipe: Path, out: Path, problems: Problems) -> None:
    """An output is replaced as a whole: a recipe in it would be gone before it could be repeated.

    The record that Suture itself writes there is no loss: the new output has its own.
    """
    try:
        inside = recipe.resolve().is_relative_to(out.resolve())
    except (OSError, RuntimeError):
        return  # check_place says what is wrong with the path
    if inside and recipe.name != "suture.json":
        problems.add(
            OutputError, f"{out}: --overwrite would remove the recipe {recipe} in it; move it first"
        )


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


def _check_room(out: Path, plan: Plan, problems: Problems) -> None:
    parent = existing(out)
    here = parent.stat().st_dev
    linked = sum(s.size for s in plan.whole if s.source and s.source.stat().st_dev == here)
    check_room(out, plan.nbytes, plan.options.resume, problems, linked)


def check_room(out: Path, nbytes: int, resume: bool, problems: Problems, spared: int = 0) -> None:
    """Note where a disk has too little room for an output.

    Args:
        out: the folder that will be.
        nbytes: of its tensors.
        resume: whether what an interrupted run left is used again.
        problems: takes the note.
        spared: bytes that are not written, because they are links.
    """
    staged = 0
    folder = staging_of(out.resolve()) / "model"
    if resume and folder.is_dir():
        staged = sum(p.stat().st_blocks * 512 for p in folder.iterdir() if p.is_file())
    free = shutil.disk_usage(existing(out)).free
    needed = nbytes - max(staged, spared)
    if needed > free:
        problems.add(
            OutputError, f"{out}: needs {readable(needed)} of disk, {readable(free)} are free"
        )


def existing(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent


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


def execute(plan: Plan, stage: Stage | None = None) -> MergeReport:
    """Do what was planned and publish the folder.

    Raises:
        SutureError: an input or the output is at fault. An interrupted merge leaves its staging
            folder, which the same call picks up.
    """
    assert plan.out is not None
    check_contents(plan)
    if plan.stages:
        return execute(_after_stages(plan, stage), stage)
    out = plan.out.resolve()
    begun = time.perf_counter()
    writer = Writer(
        out, plan.specs, key=_key(plan), shard_size=plan.recipe.shard_size,
        overwrite=plan.options.overwrite, resume=plan.options.resume, whole=plan.whole,
    )  # fmt: skip
    try:
        outcome = apply(plan.jobs, writer, plan.inputs, stage or (lambda name, nbytes: None))
        for checkpoint in plan.inputs.values():
            checkpoint.check_unchanged()
        _check_fingerprints(plan, outcome)
        _add_files(plan, writer, outcome, out)
        told = _convert_tokenizer(plan, writer)
        synced = time.perf_counter()
        problems = Problems()
        check_place(plan.out, plan.inputs, plan.options, problems)  # once more: time has passed
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


def _after_stages(plan: Plan, stage: Stage | None) -> Plan:
    """Make what is not there yet, and plan anew with it."""
    told = []
    for name in plan.stages:
        stages = _stages(plan.recipe, plan.options, problems := Problems())
        problems.raise_if_any()
        one = stages[name]
        folder = _stage_folder(one)
        if folder.exists():
            told.append(f"stage {name}: taken from {folder}, where it was made before")
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)

        def named(what: str, nbytes: int, name: str = name) -> Progress | None:
            return None if stage is None else stage(f"{name}: {what}", nbytes)

        try:
            execute(replace(one, out=folder, stages={}), named)
        except SutureError as error:
            error.add_note(f"in stage {name}")
            raise
        told.append(f"stage {name}: made, and kept in {folder}")
    made = make_plan(plan.recipe, plan.out, plan.options)
    return replace(made, told=tuple(told), stages={}, ordered=plan.stages)


def _linked(plan: Plan, writer: Writer) -> list[str]:
    if not plan.options.link:
        return []
    if not writer.linked:
        return ["no file could be linked: each has a tensor that changes, or is on another disk"]
    return [
        f"{len(writer.linked)} files are links to those of an input: never change either in place"
    ]


def _key(plan: Plan) -> str:
    """What a staging folder is for: everything that decides the bytes of the output."""
    facts = {
        "version": suture.__version__,
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
    for label, expected in [item for one in plan.beside for item in one.expected.items()]:
        if outcome.fingerprints.get(label) != expected:
            problems.add(
                MismatchError,
                f"{label}: {plan.inputs[label].label} is not the model that the masks or "
                "statistics of this recipe were made from; make them again",
            )
    for label in plan.made:
        folder = plan.inputs[label].path
        kept = read_json(folder / "suture.json", JSON_LIMIT).get("output")
        if not isinstance(kept, dict) or kept.get("fingerprint") != outcome.fingerprints[label]:
            problems.add(
                MismatchError, f"{label}: {folder} was changed since it was made; remove it"
            )
    problems.raise_if_any()


def _add_files(plan: Plan, writer: Writer, outcome: Outcome, out: Path) -> None:
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


def _convert_tokenizer(plan: Plan, writer: Writer) -> tuple[str, ...]:
    """Where no input has tokenizer files, write that of the first GGUF file; returns notes."""
    donors = list(plan.inputs.values())
    if plan.files is not None or carried_files(donors).keys() & set(TOKENIZER):
        return ()
    for donor in donors:
        while donor.put_on is not None:
            donor = donor.put_on
        if donor.has_tokenizer:
            try:
                from suture.models import gguf_tokenizer

                for name, content in gguf_tokenizer(donor.path).items():
                    writer.add_file(name, content)
            except SutureError as error:
                return (f"the tokenizer of {donor.label} was not converted: {error}",)
            return ()
    return ()


def provenance(plan: Plan, outcome: Outcome, out: Path) -> dict[str, Any]:
    """What ``suture.json`` holds: enough to make the same tensors again, and to know it."""
    recipe = plan.recipe.resolved()
    paths = _place_inputs(recipe, plan, out)
    for name, stage in plan.ordered.items():
        _place_inputs(recipe["stages"][name], stage, out)
    tokenizer = plan.recipe.tokenizer
    if tokenizer is not None and tokenizer.source not in (UNION, *plan.inputs):
        folder = plan.recipe.folder / Path(tokenizer.source).expanduser()
        recipe["tokenizer"]["source"] = os.path.relpath(folder.resolve(), out)
    dtypes: dict[str, int] = {}
    for spec in plan.specs.values():
        word = WORD_OF.get(spec.dtype, spec.dtype)
        dtypes[word] = dtypes.get(word, 0) + spec.numel
    return {
        "suture": suture.__version__,
        "schema": SCHEMA,
        "kind": "merge",
        **_marks(plan),
        **_form(plan),
        "recipe": recipe,
        "inputs": {
            label: {"path": paths[label], "fingerprint": outcome.fingerprints[label],
                    "tensors": len(c), "bytes": c.nbytes, **_made_of(c, out)}
            for label, c in plan.inputs.items()
        },
        "output": {
            "fingerprint": outcome.fingerprints["output"],
            "tensors": len(plan.specs),
            "bytes": plan.nbytes,
            "dtypes": dtypes,
        },
        "results": {
            "merged_tensors": plan.merged,
            "copied_tensors": len(plan.specs) - plan.merged,
            "moved": sum(outcome.moved.values()),
            "writeback_loss": outcome.writeback_loss,
            **outcome.facts,
        },
        "notes": list(plan.notes),
    }  # fmt: skip


def _marks(plan: Plan) -> dict[str, Any]:
    """The mark of what must not be passed on, and the inputs that it comes from."""
    found = [label for label, c in plan.inputs.items() if c.restricted]
    found += [m for b in plan.beside for m in b.restricted if m not in found]
    return {"restricted": True, "withheld": list(dict.fromkeys(found))} if found else {}


def _place_inputs(recipe: dict[str, Any], plan: Plan, out: Path) -> dict[str, str]:
    """Write into a recipe where its models and files are, seen from the output.

    Stages keep their names.
    """
    told = _paths(plan.recipe)
    paths = {
        label: told[label] if label in plan.made else _portable(c, out)
        for label, c in plan.inputs.items()
    }
    if recipe["base"] is not None:
        recipe["base"] = paths["base"]
    for name, entry in recipe["models"].items():
        entry["path"] = paths[name]
    if plan.recipe.protect is not None:
        moved = plan.recipe.protect.placed(lambda path: os.path.relpath(path, out))
        recipe["protect"] = moved.plain()
    for name in [n for n in recipe["parameters"] if _files(plan.recipe.method, n)]:
        files = plan.recipe.parameters.get(name)
        if isinstance(files, Mapping):
            recipe["parameters"][name] = {m: os.path.relpath(f, out) for m, f in files.items()}
        elif files is not None:
            recipe["parameters"][name] = os.path.relpath(files, out)
    return paths


def _form(plan: Plan) -> dict[str, str]:
    """How the output is to be read, where that is not plainly."""
    tuned = {n: c for n, c in plan.inputs.items() if n != "base"}
    form = check_forms(tuned, Problems())
    found = {"form": form.kind, "adapter": form.adapter}
    return {k: v for k, v in found.items() if v not in ("", PLAIN)}


def _portable(checkpoint: Checkpoint, out: Path) -> str:
    """A hub id as it is; a path relative to the output, so that both can move together."""
    if checkpoint.put_on is not None:
        return f"{_portable(checkpoint.put_on, out)}+{_place(checkpoint.adapters[-1], out)}"
    if is_from_hub(checkpoint):
        return checkpoint.label
    return os.path.relpath(checkpoint.path, out)


def _place(adapter: Any, out: Path) -> str:
    if adapter.folder.parent.name == "snapshots":
        return str(adapter.label)
    return os.path.relpath(adapter.folder, out)


def _made_of(checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
    """The base and the adapters of a model that is put together, with the adapters' digests."""
    if checkpoint.put_on is None:
        return {}
    whole = checkpoint
    while whole.put_on is not None:
        whole = whole.put_on
    adapters = [{"path": _place(a, out), "fingerprint": checkpoint_fingerprint(a.weights)}
                for a in checkpoint.adapters]  # fmt: skip
    return {"made_of": {"base": _portable(whole, out), "adapters": adapters}}


def describe(plan: Plan) -> dict[str, Any]:
    """What a plan will do, as plain data: inputs, output, bytes, memory, time, notes."""
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
        "seconds": estimate(plan),
        "notes": list(plan.notes),
        "stages": {
            name: {"method": one.recipe.method.name, "tensors": len(one.specs),
                   "bytes": one.nbytes, "path": str(_stage_folder(one)),
                   "kept": _stage_folder(one).exists()}
            for name, one in plan.stages.items()
        },
    }  # fmt: skip


def explain(recipe: Path | Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe means in Suture's terms, and where Suture's defaults would differ.

    Raises:
        RecipeError: everything that is wrong with it, at once; models are not opened.
    """
    from suture.mergekit import differences, native

    found = read_recipe(recipe)
    merges = {**found.stages, "": found}
    return {
        "mergekit": found.kit is not None or any(s.kit for s in found.stages.values()),
        "differences": {
            name: differences(one) for name, one in merges.items() if one.kit is not None
        },
        "native": native(found),
        "notes": [
            note
            for one in merges.values()
            for note in (*one.notes, *([one.protect.told] if one.protect is not None else ()))
        ],
    }


class _Nothing(Visitor[None]):
    """Reads and widens, to see how long that takes."""

    def see(self, local: None, block: Block) -> None:
        _ = block.rows


def estimate(plan: Plan) -> float:
    """Seconds that the merge will take, from reading a little of it (at most 64 MB a model)."""
    total = sum(
        job.specs[n].numel * 2 * (job.merge.passes + 1) for job in plan.jobs for n in job.names
    )
    job = max(plan.jobs, key=lambda job: len(job.names))
    sample = _sample(job)
    if not sample or not plan.ready:
        return plan.nbytes / 5e8
    small = Block(job.sources, job.block)  # compiles the kernels outside of the measure
    small.load(sample[0][0].name, 0, min(8, sample[0][0].stop))
    begun = time.perf_counter()
    sweep(job.sources, sample, _Nothing(), threads=job.threads, block=job.block)
    took = time.perf_counter() - begun
    taken = sum((p.stop - p.start) for task in sample for p in task) or 1
    # Counting or combining costs about as much again as reading; then the output is written.
    return took / taken * total + plan.nbytes / 5e8


def _sample(job: Job) -> list[list[Piece]]:
    """The first tasks of a job, with 16 pieces or fewer."""
    names, most = [], 0
    for name in job.names:
        names.append(name)
        most += job.specs[name].numel
        if most >= 16 * PIECE:
            break
    found: list[list[Piece]] = []
    room = 16 * PIECE
    for task in tasks_of(names, job.specs):
        size = sum(p.stop - p.start for p in task)
        if found and size > room:
            break
        found.append(task)
        room -= size
    return found


def report_lines(report: MergeReport) -> Iterator[str]:
    """What to tell at the end of a merge, a line each."""
    if report.resumed:
        yield f"took over {report.resumed} finished pieces of an interrupted run"
    for note in report.notes:
        yield f"note: {note}"
    if "density" in report.facts:
        kept = ", ".join(f"{d:.4g}" for d in report.facts["density"])
        yield f"kept shares: {kept}"
    yield from report.told
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
    "explain",
    "make_plan",
    "merge",
    "merged",
    "method",
    "open_model",
    "plan_recipe",
    "save",
]  # fmt: skip
