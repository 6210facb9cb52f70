"""From a recipe to a folder with ``analysis.json``: check, look at all models at once, write.

One sweep serves every analysis; masks by magnitude cost two more. Bases come from dot products, and
only the vectors that are asked for are written, as checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from suture.analysis.basis import Basis, make_basis
from suture.analysis.cells import Together, groups_of
from suture.analysis.conflicts import Conflicts, Signs
from suture.analysis.geometry import Geometry, Products
from suture.analysis.masks import NULLS, densities, pairwise, structure
from suture.analysis.overlap import Masked, Overlap
from suture.analysis.theory import Diagnostics
from suture.checkpoints.checkpoint import is_from_hub
from suture.edits.mask import Mask, localize
from suture.merges.apply import checkpoint_fingerprint
from suture.merges.policy import Policy
from suture.runs.progress import Progress, Stage
from suture.runs.workspace import workspace
from suture.schema.paths import place_of
from suture.stream.sweep import Sources, sweep, tasks_of
from suture.stream.topk import select
from suture.stream.vector import TaskVector
from suture.tensors.roles import ParamSpace
from suture.verbs.analyze.classifiers import classifiers
from suture.verbs.analyze.diagnostics import diagnostics
from suture.verbs.analyze.plan import RECORD, AnalysisPlan
from suture.verbs.analyze.recipe import CLASSES, MASKED, Request
from suture.verbs.merge.run import merged, save
from suture.version import __version__

SCHEMA = 1
"""Version of the layout of ``analysis.json``."""


@dataclass(frozen=True)
class Analysis:
    """Everything that was found about some task vectors over one base."""

    request: dict[str, Any]
    inputs: Mapping[str, Mapping[str, Any]]
    """By label: path, fingerprint, tensors, bytes."""
    tensors: int
    elements: int
    geometry: Geometry | None = None
    conflicts: Conflicts | None = None
    overlap: Overlap | None = None
    bases: tuple[Basis, ...] = ()
    nearest: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """For each model that no basis was made of: its place to each basis, by kind."""
    written: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Folders of the basis vectors that were written, by kind."""
    diagnostics: Diagnostics | None = None
    masks: Mapping[str, Any] | None = None
    """Pairs of masks beside chance."""
    structure: Mapping[str, Any] | None = None
    """By model: shares and densities of its mask, cell by cell."""
    classifiers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What classifiers answered, by analysis."""
    restricted: bool = False
    """Whether an input must not be passed on, nor what is made with it."""

    def to_dict(self) -> dict[str, Any]:
        """What ``analysis.json`` holds."""
        found = asdict(self)
        if not self.restricted:
            del found["restricted"]
        found |= {name.replace("-", "_"): one for name, one in found.pop("classifiers").items()}
        for name in ("masks", "structure"):
            if found[name] is None:
                del found[name]
        return {"suture": __version__, "schema": SCHEMA, "kind": "analysis", **found}


def analyse(plan: AnalysisPlan, stage: Stage = Progress.stage) -> Analysis:
    """Do what was planned, without writing anything.

    Raises:
        SutureError: an input is at fault.
    """
    request, models = plan.request, plan.models
    masks = _masks(plan, stage)
    products, signs, masked = _looked(plan, masks, stage)
    labels, groups = tuple(request.models), groups_of(plan.names)
    sizes = {n: plan.base.specs[n].numel for n in plan.names}
    geometry, theory = None, None
    bases: tuple[Basis, ...] = ()
    nearest: dict[str, dict[str, Any]] = {}
    if products is not None:
        geometry = products.geometry(labels, groups, sizes)
        gram = products.gram.of(*plan.names)[:-1, :-1]
        if "bases" in request.analyses:
            bases, nearest = _bases(request, gram)
        if "diagnostics" in request.analyses:
            inner = gram[: len(models), : len(models)]
            theory = diagnostics(request, plan.inputs, plan.names, plan.material, inner, stage)
    answers: dict[str, dict[str, Any]] = {}
    if set(CLASSES) & set(request.analyses):
        answers = classifiers(request, plan.inputs, plan.space, plan.material, stage)
    source = _source(plan)
    return Analysis(
        _portable(plan),
        _prints(plan, stage),
        len(plan.names),
        sum(sizes.values()),
        geometry if "geometry" in request.analyses else None,
        None if signs is None else signs.conflicts(labels, groups, request.density),
        None if masked is None else masked.overlap(labels, groups, source),
        bases,
        nearest,
        diagnostics=theory,
        masks=_pairs(plan, masks, source) if "masks" in request.analyses else None,
        structure=_structure(masks, source) if "structure" in request.analyses else None,
        classifiers=answers,
        restricted=_restricted(plan),
    )


def _looked(
    plan: AnalysisPlan, masks: Mapping[str, Mask], stage: Stage
) -> tuple[Products | None, Signs | None, Masked | None]:
    """What one sweep over all models saw, as far as the analyses ask for it."""
    asked, models, base = set(plan.request.analyses), plan.models, plan.base
    unseen = tuple(plan.inputs[name] for name in plan.request.unseen)
    products, signs, masked = None, None, None
    if {"geometry", "bases", "diagnostics"} & asked:
        products = Products(len(models) + len(unseen))
    if "conflicts" in asked:
        density, selection = plan.request.density, None
        if density is not None:
            shares = [float(density)] * len(models)
            selection = select(Sources(models, base), plan.names, lambda _: shares,
                               scope=plan.request.scope, threads=plan.options.threads)  # fmt: skip
        signs = Signs(len(models), selection)
    if masks and "overlap" in asked:
        masked = Masked(list(masks.values()))
    visitors = [visitor for visitor in (products, signs, masked) if visitor is not None]
    sources = Sources((*models, *unseen), base)
    if visitors:
        read = sum(c.specs[n].nbytes for c in sources.all for n in plan.names)
        sweep(sources, tasks_of(plan.names, base.specs), Together(visitors),
              threads=plan.options.threads, progress=stage("look", read))  # fmt: skip
    return products, signs, masked


def _restricted(plan: AnalysisPlan) -> bool:
    masks = [*(plan.masks or {}).values(), *plan.again.values()]
    return any(c.restricted for c in plan.inputs.values()) or any(m.restricted for m in masks)


def _source(plan: AnalysisPlan) -> str:
    """Where the masks come from, in words."""
    request = plan.request
    if plan.masks is not None:
        return f"those of the folder {request.masks}"
    where = {"global": "over all tensors", "layer": "in each layer"}
    share = 100 * (request.density or 1)
    counted = where.get(request.scope, "in each tensor")
    return f"the {share:.3g} % of largest magnitude, counted {counted}"


def _masks(plan: AnalysisPlan, stage: Stage) -> dict[str, Mask]:
    if not set(MASKED) & set(plan.request.analyses):
        return {}
    if plan.masks is not None:
        return {name: plan.masks[name] for name in plan.request.models}
    stage("masks", 2 * sum(c.specs[n].nbytes for c in plan.models for n in plan.names))
    density = float(plan.request.density or 1)
    return {
        name: localize(
            TaskVector(plan.base, [(plan.inputs[name], 1.0)], plan.names),
            density=density,
            scope=plan.request.scope,
            threads=plan.options.threads,
        )
        for name in plan.request.models
    }


def _pairs(plan: AnalysisPlan, masks: Mapping[str, Mask], source: str) -> dict[str, Any]:
    """Every pair of masks beside its baselines, and each mask beside its like of the same task."""
    names = list(masks)
    pairs = pairwise(list(masks.values()))
    for pair in pairs:
        pair["pair"] = [names[i] for i in pair["pair"]]
    same = {n: masks[n].jaccard(other) for n, other in plan.again.items()}
    means = {w: sum(p[w] for p in pairs) / len(pairs) for w in ("iou", *NULLS)}
    means["same_task"] = sum(same.values()) / len(same) if same else None
    return {"models": names, "source": source, "pairs": pairs, "same_task": same or None,
            "means": means}  # fmt: skip


def _structure(masks: Mapping[str, Mask], source: str) -> dict[str, Any]:
    found = {
        name: {**structure([mask]), "densities": densities(mask)} for name, mask in masks.items()
    }
    return {"source": source, "models": found}


def _bases(
    request: Request, gram: np.ndarray[Any, Any]
) -> tuple[tuple[Basis, ...], dict[str, dict[str, Any]]]:
    number = len(request.models)
    inner = gram[:number, :number]
    found = tuple(
        make_basis(inner, tuple(request.models), kind, request.bases.size, request.seed)
        for kind in request.bases.kinds
    )
    nearest = {
        name: {
            basis.kind: asdict(
                basis.nearest(
                    inner, gram[number + i, :number].tolist(), float(gram[number + i, number + i])
                )
            )
            for basis in found
        }
        for i, name in enumerate(request.unseen)
    }
    return found, nearest


def _portable(plan: AnalysisPlan) -> dict[str, Any]:
    """The request with paths that hold wherever the output and the inputs move together."""
    found = plan.request.resolved()
    where = _paths(plan)
    found["base"] = where["base"]
    for section in ("models", "unseen"):
        found[section] = {name: where[name] for name in found[section]}
    for name, task in found.get("tasks", {}).items():
        given = plan.request.tasks[name]
        for key, path in (("data", given.data), ("head", given.head)):
            if path is not None and plan.out is not None:
                task[key] = os.path.relpath(path, plan.out.resolve())
    if "merged" in where:
        found["diagnostics"]["merged"] = where["merged"]
    if plan.request.masks is not None and plan.out is not None:
        masks = place_of(plan.request.masks, plan.request.folder)
        found["masks"] = os.path.relpath(masks, plan.out.resolve())
    if plan.request.same_task is not None and plan.out is not None:
        again = place_of(plan.request.same_task, plan.request.folder)
        found["same_task"] = os.path.relpath(again, plan.out.resolve())
    return found


def _paths(plan: AnalysisPlan) -> dict[str, str]:
    near = None if plan.out is None else plan.out.resolve()
    return {
        label: c.label if near is None or is_from_hub(c) else os.path.relpath(c.path, near)
        for label, c in plan.inputs.items()
    }


def _prints(plan: AnalysisPlan, stage: Stage) -> dict[str, dict[str, Any]]:
    where = _paths(plan)
    progress = stage("identify", sum(c.nbytes for c in plan.inputs.values()))
    return {
        label: {
            "path": where[label],
            "fingerprint": checkpoint_fingerprint(c, progress),
            "tensors": len(c),
            "bytes": c.nbytes,
        }
        for label, c in plan.inputs.items()
    }


def execute(plan: AnalysisPlan, progress: Progress) -> Analysis:
    """Do what was planned and publish the folder: ``analysis.json``, and ``basis/`` if asked.

    Raises:
        SutureError: an input or the output is at fault; then nothing was written.
    """
    assert plan.out is not None
    with workspace(plan.out, "analyze", overwrite=plan.options.overwrite) as space:
        found = analyse(plan, progress.stage)
        made = space.fresh()
        written = {
            basis.kind: _write_basis(plan, basis, made / "basis" / basis.kind, progress.stage)
            for basis in found.bases
            if basis.kind in plan.request.bases.write
        }
        found = Analysis(**{**vars(found), "written": written})
        for checkpoint in plan.inputs.values():
            checkpoint.check_unchanged()
        text = json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n"
        (made / RECORD).write_text(text, encoding="utf-8")
        space.publish()
    return found


def _write_basis(plan: AnalysisPlan, basis: Basis, folder: Path, stage: Stage) -> list[str]:
    """Write base + s for every basis vector s, as float32 checkpoints, one after another."""
    made = np.array(basis.vectors)
    for column, name in enumerate(basis.names):
        weights = {t: float(w) for t, w in zip(basis.tasks, made[:, column], strict=True) if w}
        models = {t: plan.inputs[t] for t in weights}
        what = merged(
            plan.base,
            models,
            "task_arithmetic",
            weight=weights,
            dtype="float32",
            space=ParamSpace(plan.names, ()),
            policy=Policy("base", "drop", "base"),
        )
        save(what, folder / name, stage=stage, threads=plan.options.threads)
    return [f"basis/{basis.kind}/{name}" for name in basis.names]
