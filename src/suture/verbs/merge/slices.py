"""The parts of a merge, one for each slice: which tensors are merged, by which numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint, refuse_memory, ties_embeddings
from suture.checkpoints.headers import read_header
from suture.checkpoints.layers import Stretch, cut, depth_of, depths, sliced_config, stack_of
from suture.checkpoints.writer import Shard
from suture.errors import MismatchError, Problems, RecipeError
from suture.merges.apply import MergeJob, output_specs
from suture.merges.base import Method
from suture.merges.protect import protected
from suture.runs.place import MergeOptions
from suture.schema.settings import settings
from suture.schema.values import PerModel, Scalar
from suture.stream.sweep import Sources, cores
from suture.stream.vector import align
from suture.tensors.roles import check_selectors, layer_parts, selects, tied_to
from suture.tensors.spec import listed
from suture.verbs.merge.recipe import MergeRecipe, Slice


@dataclass(frozen=True)
class Part:
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


def parts_of(
    recipe: MergeRecipe, inputs: Mapping[str, Checkpoint], problems: Problems
) -> list[Part]:
    """The models, cut as the slices say; slices that do not fit are noted and left out."""
    if not recipe.slices:
        rows = tuple(name for name in recipe.rows(recipe.cuts[0]) if name in inputs)
        base = "base" if recipe.base is not None else None
        lead = str(reference_label(recipe))
        whole = {label: c for label, c in inputs.items() if label == base}
        whole |= {name: inputs[name] for name in rows}
        return [Part(recipe.cuts[0], whole, rows, base, lead)]
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
                where = f"slices[{number}].sources.{label}.layers"
                where = recipe.places.get((number, label), where)
                problems.add(RecipeError, f"{where}: {error}")
        if stretch is not None:
            at += stretch.stop - stretch.start
        lead = base if base is not None else next((n for n in one.sources if n in views), "")
        if len(views) == len(labels) and lead in views:
            found.append(Part(one, views, rows, base, lead, known, stretch))
    return found


def _heads(inputs: Mapping[str, Checkpoint]) -> set[str]:
    """The heads that some models have and others tie to their embedding."""
    tied = [c for c in inputs.values() if ties_embeddings(c.config)]
    own = [c for c in inputs.values() if not ties_embeddings(c.config)]
    return {n for c in own for n in tied_to(c.specs.keys())} if tied else set()


def reference_label(recipe: MergeRecipe) -> str | None:
    """Which input's names and shapes count: the base, or else the first model."""
    return "base" if recipe.base is not None else next(iter(recipe.models), None)


def _check_files(recipe: MergeRecipe, problems: Problems) -> None:
    """Note files that are read besides the models, and are not there."""
    found = settings(recipe.method, recipe.parameters, Problems(), [(n, {}) for n in recipe.models])
    for key, files in found.items():
        for model, path in (files or {}).items() if takes_files(recipe.method, key) else ():
            _check_there(f"parameters.{key}.{model}", path, problems)
    if recipe.protect is not None:
        for key in ("mask", "stats"):
            _check_there(f"protect.{key}", getattr(recipe.protect, key), problems)


def _check_there(where: str, source: Any, problems: Problems) -> None:
    """Note a file that is missing; masks and statistics in memory are there."""
    if isinstance(source, str | os.PathLike):
        with problems.collecting(f"{where}: "):
            refuse_memory(os.fspath(source))
            if not Path(source).exists():
                raise RecipeError(f"no such file: {source}")


def check_fit(
    recipe: MergeRecipe, parts: Sequence[Part], problems: Problems, notes: list[str]
) -> None:
    """Note where the models do not fit each other, or the recipe's patterns fit no tensor."""
    _check_files(recipe, problems)
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
    left = any(recipe.space.names(part.reference.specs) for part in parts)
    if not left and recipe.method.most != 1:  # one model taken over is copied, whatever it holds
        problems.add(RecipeError, "space: no tensor is left to merge")


def _check_stacking(parts: Sequence[Part], problems: Problems) -> None:
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


def job_of(recipe: MergeRecipe, part: Part, options: MergeOptions, problems: Problems) -> MergeJob:
    """What the engine does for one part: the method with its numbers, over its tensors."""
    reference = part.reference
    how = recipe.method.make(**_bound(recipe.settings_of(part.cut, part.rows), part))
    if recipe.protect is not None:
        with problems.collecting("protect.mask: "):
            how = protected(how, recipe.protect)
    merged_names = tuple(n for n in recipe.space.names(reference.specs) if not how.keeps(n))
    raw = frozenset(reference.specs.keys() - set(merged_names))
    base = None if part.base is None else part.views[part.base]
    models = tuple(part.views[name] for name in part.rows)
    sources = Sources(
        models, base, how.rows(base is not None), raw, options.allow_nonfinite, lead=reference
    )
    return MergeJob(
        sources, part.rows, how, merged_names, output_specs(reference, recipe.dtype, models),
        recipe.policy.buffers == "equal", options.threads or cores(), options.block,
    )  # fmt: skip


def whole_shards(jobs: Sequence[MergeJob]) -> tuple[Shard, ...]:
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


def _bound(found: Mapping[str, Any], part: Part) -> dict[str, Any]:
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


def check_required(
    recipe: MergeRecipe, jobs: Sequence[MergeJob], parts: Sequence[Part], problems: Problems
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


def config_of(
    recipe: MergeRecipe, parts: Sequence[Part], inputs: Mapping[str, Checkpoint]
) -> dict[str, Any]:
    """The configuration of the output: the lead's, with the layers that there are now."""
    lead = inputs[str(reference_label(recipe))]
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


def takes_files(how: Method, parameter: str) -> bool:
    """Whether a parameter names a file for each model."""
    return parameter in how.parameters and how.parameters[parameter].files


def _check_patterns(
    recipe: MergeRecipe, names: Collection[str], problems: Problems, notes: list[str]
) -> None:
    """Note patterns of names that fit none; in a mergekit recipe they are legal, and told."""
    places = [("parameters", recipe.parameters)]
    places += [(f"models.{n}", e.parameters) for n, e in recipe.models.items()]
    for number, one in enumerate(recipe.slices):
        places.append((f"slices[{number}].parameters", one.parameters))
        places += [(f"slices[{number}].sources.{n}", s.parameters) for n, s in one.sources.items()]
    for where, section in places:
        for key, value in section.items():
            if not isinstance(value, Mapping) or takes_files(recipe.method, key):
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
