"""The part of an analysis that asks classifiers: every task vector on the rows of every task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.linearized import LINEARIZED, check_forms
from suture.errors import Problems, RecipeError
from suture.merges.apply import Stage
from suture.stream.vector import TaskVector
from suture.tensors.spec import UNCOUNTED
from suture.verbs.analyze.diagnostics import few
from suture.verbs.analyze.recipe import CLASSES, Request
from suture.verbs.localize.tasks import Material, check_loadable, folder_of

if TYPE_CHECKING:
    from suture.analysis.vector_space import Side
    from suture.training.models import Encoder

MOVED = 16
"""Rows of each task that movement is measured on: no labels, so few are enough."""


def check_classifiers(
    request: Request, inputs: Mapping[str, Checkpoint], problems: Problems
) -> None:
    """Note what keeps the models from being asked."""
    if "base" not in inputs:
        return
    asked = [name for name in CLASSES if name in request.analyses]
    check_loadable(inputs["base"], "base", asked[0], problems)
    if set(asked) != {"sensitivity"}:
        check_forms({n: c for n, c in inputs.items() if n in request.models}, problems)


def classifiers(
    request: Request,
    inputs: Mapping[str, Checkpoint],
    names: tuple[str, ...],
    material: Mapping[str, Material],
    stage: Stage,
) -> dict[str, dict[str, Any]]:
    """The analyses of CLASSES that were asked for, by name.

    Args:
        request: what is asked for.
        inputs: the base and the models.
        names: the tensors that task vectors may move.
        material: rows and heads by name of the model.
        stage: told of the steps.

    Raises:
        SutureError: the base cannot be loaded, or does not fit its tasks; a vector moves no
            features, or the base knows nothing, where shares of that are asked for.
    """
    from suture.analysis.arithmetic import maps, movement, sharing, transfers
    from suture.analysis.vector_space import accuracy, space_of, vector_from
    from suture.training.calibrate import Calibration

    base, tasks = inputs["base"], list(request.models)
    with TemporaryDirectory(prefix="suture-") as scratch:
        encoder, sides = _loaded(request, folder_of(base, Path(scratch), base), material)
    linear = check_forms({n: inputs[n] for n in tasks}, Problems()).kind == LINEARIZED
    vectors = []
    if set(request.analyses) & {"disentanglement", "function-localization"}:
        for name in tasks:
            tau = TaskVector(base, [(inputs[name], 1.0)], names)
            vectors.append(vector_from({n: tau[n] for n in names}))
    space = space_of(linear, encoder, vectors, sides)
    none = (0.0,) * len(vectors)
    base_scores = [accuracy(space, none, t, "probe") for t in range(len(tasks))]
    if "sensitivity" in request.analyses:
        for name, score in zip(tasks, base_scores, strict=True):
            if not score:  # found before anything that takes long
                raise RecipeError(f"sensitivity: the base gets no row of {name!r} right, so there "
                                  "is no accuracy to keep a share of")  # fmt: skip
    about = {"models": tasks, "linearized": linear, "rows": [len(s.data["probe"]) for s in sides]}
    found: dict[str, dict[str, Any]] = {}
    if "disentanglement" in request.analyses:
        stage("disentanglement", UNCOUNTED)
        grid = request.disentanglement
        made = maps(space, grid.amounts, tasks, grid.metric)
        at_one = [m.at_one for m in made if m.at_one is not None]
        found["disentanglement"] = {
            **about, "metric": grid.metric, "amounts": list(grid.amounts),
            "xi": sum(at_one) / len(at_one) if at_one else None,
            "xi_mean": sum(m.mean for m in made) / len(made),
            "maps": [m.to_dict() for m in made],
        }  # fmt: skip
    if "function-localization" in request.analyses:
        stage("function-localization", UNCOUNTED)
        found["function-localization"] = {
            **about, "base": base_scores, **transfers(space), **movement(space, encoder),
        }  # fmt: skip
    if "sensitivity" in request.analyses:
        how = Calibration(rows=request.sensitivity.rows, seed=request.seed)
        by_task = {}
        for number, name in enumerate(tasks):
            stage(f"sensitivity {name}", UNCOUNTED)
            by_task[name] = sharing(encoder, sides, number, request.sensitivity.shares, how)
        found["sensitivity"] = {
            "models": tasks, "rows": about["rows"], "shares": list(request.sensitivity.shares),
            "base": next(iter(by_task.values()))["base"],
            "tasks": {name: one["rows"] for name, one in by_task.items()},
        }  # fmt: skip
    return found


def _loaded(
    request: Request, folder: Path, material: Mapping[str, Material]
) -> tuple[Encoder, list[Side]]:
    """The base, and rows and head of every task, in the order of the models."""
    from suture.analysis.vector_space import Side
    from suture.training.data import tokenise
    from suture.training.models import FLOAT32, load_encoder

    loaded = load_encoder(folder, device=request.device, dtype=FLOAT32)
    sides = []
    for name in request.models:
        some, head = few(material[name], request.rows, request.seed), material[name].head
        assert head is not None
        rows: Any = some.rows
        probe, moved = (
            tokenise(part, loaded.tokenizer, labels=head.labels,
                     max_length=request.tasks[name].max_length)
            for part in (rows, rows[:MOVED])
        )  # fmt: skip
        data = {"probe": probe, "validation": probe, "few": moved}
        sides.append(Side(name, head, data, name))
    return loaded.model, sides
