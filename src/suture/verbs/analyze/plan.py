"""An analysis whose inputs are opened and checked; no tensor is read but those of masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint
from suture.edits.inputs import open_input
from suture.edits.mask import Mask
from suture.errors import MismatchError, Problems, RecipeError
from suture.runs.place import Options, check_place
from suture.schema.paths import place_of
from suture.stream.vector import align
from suture.tensors.roles import names_in
from suture.tensors.spec import listed
from suture.verbs.analyze.classifiers import check_classifiers
from suture.verbs.analyze.diagnostics import check_diagnostics
from suture.verbs.analyze.recipe import ANALYSES, CLASSES, Request, read_request
from suture.verbs.localize.tasks import Material, read_material

RECORD = "analysis.json"


@dataclass(frozen=True)
class AnalysisPlan:
    """An analysis whose inputs were opened and checked; nothing was read but headers."""

    request: Request
    inputs: Mapping[str, Checkpoint]
    """By label: the base, the models, the unseen ones."""
    names: tuple[str, ...]
    """The tensors of the space, where there are masks those that they cover."""
    space: tuple[str, ...]
    """All tensors of the space: what task vectors move when models are run."""
    masks: Mapping[str, Mask] | None
    again: Mapping[str, Mask]
    """Masks of the same tasks made anew, by name of the model."""
    material: Mapping[str, Material]
    """Rows and heads, by name of the model, where the model is to be run."""
    out: Path | None
    options: Options

    @property
    def base(self) -> Checkpoint:
        """What the models were tuned from."""
        return self.inputs["base"]

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """The models, in the order of the request."""
        return tuple(self.inputs[name] for name in self.request.models)

    @property
    def bytes_read(self) -> int:
        """Bytes that will be read: fingerprints, masks and the sweep together."""
        swept = sum(c.specs[n].nbytes for c in self.inputs.values() for n in self.names)
        by_magnitude = 2 * swept if self.request.density and self.masks is None else 0
        return sum(c.nbytes for c in self.inputs.values()) + swept + by_magnitude


def make_plan(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    options: Options | None = None,
    folder: Path | None = None,
) -> AnalysisPlan:
    """Read an analysis recipe, open its models and check all that headers can tell.

    Args:
        recipe: a YAML file, or what stands in it.
        out: the folder to write; ``None`` writes nothing.
        options: how to run.
        folder: where the relative paths of the recipe start; by default the file's folder or the
            current one.

    Raises:
        SutureError: all problems at once.
    """
    options = options or Options()
    problems = Problems()
    recipe = Path(recipe) if isinstance(recipe, str) else recipe
    out = None if out is None else Path(out)
    request = read_request(recipe, folder, problems)
    inputs: dict[str, Checkpoint] = {}
    names: list[str] = []
    masks, again = None, dict[str, Mask]()
    material: dict[str, Material] = {}
    if request is not None:
        inputs = _opened(request, problems)
        names = _checked_names(request, inputs, problems)
        if request.masks is not None and "base" in inputs:
            masks = _read_masks(request, "masks", inputs["base"], names, problems)
        if request.same_task is not None and "base" in inputs:
            again = _read_masks(request, "same_task", inputs["base"], names, problems)
            _check_again(again, masks, {n: inputs["base"].specs[n].shape for n in names}, problems)
        if set(CLASSES) & set(request.analyses):
            check_classifiers(request, inputs, problems)
        if "diagnostics" in request.analyses:
            check_diagnostics(request, inputs, problems)
        if {"diagnostics", *CLASSES} & set(request.analyses):
            request = _on_device(request, problems)
            material = read_material(request.tasks, problems, seed=request.seed)
    if out is not None:
        check_place(out, inputs, options.overwrite, problems, _files(request), RECORD)
    problems.raise_if_any()
    assert request is not None
    space = tuple(names)
    if masks is not None:
        names = [n for n in names if n in next(iter(masks.values())).shapes]
    return AnalysisPlan(request, inputs, tuple(names), space, masks, again, material, out, options)


def describe(plan: AnalysisPlan) -> dict[str, Any]:
    """Return what a plan will do, as plain data."""
    specs = plan.base.specs
    return {
        "inputs": {
            label: {"path": c.label, "tensors": len(c), "bytes": c.nbytes}
            for label, c in plan.inputs.items()
        },
        "analyses": {name: ANALYSES[name] for name in plan.request.analyses},
        "tensors": len(plan.names),
        "elements": sum(specs[n].numel for n in plan.names),
        "bytes_read": plan.bytes_read,
        "output": None if plan.out is None else str(plan.out),
    }


def _on_device(request: Request, problems: Problems) -> Request:
    """The request with a device that is there; ``auto`` is chosen."""
    from suture.training.models import device_named

    with problems.collecting():
        return request.model_copy(update={"device": device_named(request.device)})
    return request


def _opened(request: Request, problems: Problems) -> dict[str, Checkpoint]:
    paths = {"base": request.base, **request.models, **request.unseen}
    if "diagnostics" in request.analyses and request.diagnostics.merged is not None:
        paths["merged"] = request.diagnostics.merged
    found: dict[str, Checkpoint] = {}
    for label, path in paths.items():
        if path:
            with problems.collecting():
                found[label] = open_input(path, request.folder, found.get("base"))
    return found


def _checked_names(
    request: Request, inputs: Mapping[str, Checkpoint], problems: Problems
) -> list[str]:
    base = inputs.get("base")
    if base is None:
        return []
    for label, checkpoint in inputs.items():
        if label != "base":
            align(base, checkpoint, problems, buffers=True)
    return list(names_in(request.space, base.specs, "look at", problems))


def _read_masks(
    request: Request, key: str, base: Checkpoint, names: Sequence[str], problems: Problems
) -> dict[str, Mask]:
    folder = place_of(str(getattr(request, key)), request.folder)
    found: dict[str, Mask] = {}
    for model in request.models:
        path = folder / f"{model}.safetensors"
        if not path.is_file():
            problems.add(RecipeError, f"{key}: {path} is missing: one mask for each model")
            continue
        with problems.collecting(f"{key}: "):
            found[model] = Mask.load(path)
    shapes = {name: base.specs[name].shape for name in names}
    for model, mask in found.items():
        wrong = sorted(n for n, s in mask.shapes.items() if n in shapes and s != shapes[n])
        other = mask.shapes.keys() - base.specs.keys()
        if wrong or other or not mask.shapes.keys() & shapes.keys():
            what = listed([*wrong, *sorted(other)]) or "every tensor"
            problems.add(MismatchError, f"{key}: {model}: is a mask of another model ({what})")
    if len({frozenset(m.shapes) for m in found.values()}) > 1:
        problems.add(MismatchError, f"{key}: they are not over the same tensors")
    return found


def _check_again(
    again: Mapping[str, Mask], masks: Mapping[str, Mask] | None,
    space: Mapping[str, tuple[int, ...]], problems: Problems,
) -> None:  # fmt: skip
    """Note masks made anew that are over other tensors than those they are compared with."""
    for model, mask in again.items():
        own = space if masks is None else masks[model].shapes if model in masks else mask.shapes
        if mask.shapes != own:
            problems.add(MismatchError, f"same_task: {model}: is not over the tensors of the mask "
                                        "that it is compared with")  # fmt: skip


def _files(request: Request | None) -> dict[str, set[Path]]:
    """The files that are read besides models, by the key that names them."""
    if request is None:
        return {}
    found = {
        key: {place_of(getattr(request, key), request.folder)}
        for key in ("masks", "same_task")
        if getattr(request, key) is not None
    }
    for name, task in request.tasks.items():
        found[f"tasks.{name}"] = {p for p in (task.data, task.head) if p is not None}
    return found


__all__ = ["RECORD", "AnalysisPlan", "Options", "describe", "make_plan"]
