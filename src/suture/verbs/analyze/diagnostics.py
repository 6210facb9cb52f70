"""The part of an analysis that loads the model: losses, gradients and smoothness, task by task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from suture.analysis.maps import Curve
from suture.analysis.theory import Diagnostics
from suture.checkpoints.checkpoint import Checkpoint
from suture.errors import Problems, SutureError
from suture.merges.apply import Stage
from suture.stream.vector import TaskVector
from suture.tensors.spec import UNCOUNTED
from suture.verbs.analyze.recipe import Request
from suture.verbs.localize.tasks import Material, check_loadable, folder_of, load_net

Array = np.ndarray[Any, Any]


def check_diagnostics(
    request: Request, inputs: Mapping[str, Checkpoint], problems: Problems
) -> None:
    """Note what keeps the model from being loaded."""
    if "base" in inputs:
        check_loadable(inputs["base"], "base", "diagnostics", problems)


def factors(request: Request) -> dict[str, float]:
    """The merge's factor on each task vector; without any in the recipe the plain average."""
    given = request.diagnostics.weights
    if not isinstance(given, Mapping):
        return dict.fromkeys(request.models, given)
    return {m: given.get(m, 0.0) if given else 1 / len(request.models) for m in request.models}


def diagnostics(
    request: Request,
    inputs: Mapping[str, Checkpoint],
    names: tuple[str, ...],
    material: Mapping[str, Material],
    gram: Array,
    stage: Stage,
) -> Diagnostics:
    """Look at the loss of every model that has rows.

    Args:
        request: what is asked for.
        inputs: the base, the models, and perhaps what was ``merged``.
        names: the tensors that edits may touch.
        material: rows and heads by name of the model.
        gram: dot products of the task vectors, in the order of the request.
        stage: told of the steps.

    Raises:
        SutureError: the base cannot be loaded, or a loss is no number.
    """
    from suture.analysis.loss_curves import Convex, Looks, diagnose
    from suture.evals.walk import Walk

    base, how = inputs["base"], request.diagnostics
    looks = Looks(how.iterations, directions=how.directions, points=how.points, seed=request.seed)
    merged = inputs.get("merged")
    weights = factors(request)
    moved = [(inputs[m], w) for m, w in weights.items() if w]
    terms = moved if merged is None else [(merged, 1.0)]
    whole = TaskVector(base, terms, names)
    convex = merged is None and min(weights.values()) >= 0
    convex = convex and abs(sum(weights.values()) - 1) < 1e-9
    found, lines = [], []
    with TemporaryDirectory(prefix="suture-") as scratch:
        folder = folder_of(base, Path(scratch), base)
        for name in request.models:
            if name not in material:
                continue
            some = few(material[name], how.rows, request.seed)
            net = load_net(folder, request.tasks[name], some, request.device)
            model = net.model.double() if how.dtype == "float64" else net.model
            own = TaskVector(base, [(inputs[name], 1.0)], names)
            tau = {n: own[n] for n in names}
            way = {n: whole[n] - tau[n] for n in names}
            stage(f"diagnose {name}", UNCOUNTED)
            try:
                one, line = diagnose(
                    Walk(model, [tau, way]), name, net.data, objective=net.objective, looks=looks,
                    convex=_convex(Convex, gram, weights, list(request.models), name)
                    if convex else None,
                    device=request.device, progress=lambda what: _tell(stage, what),
                )  # fmt: skip
            except SutureError as error:
                error.add_note(f"while diagnosing {name}")
                raise
            found.append(one)
            lines.append(line)
    curve = Curve("loss from each expert to the merge", "way", "loss", tuple(lines))
    settings = {"rows": how.rows, "iterations": how.iterations, "directions": how.directions,
                "points": how.points, "dtype": how.dtype}  # fmt: skip
    told: dict[str, Any] = {"weights": weights} if merged is None else {"path": merged.label}
    return Diagnostics(told, tuple(found), curve, settings)


def _tell(stage: Stage, what: str) -> None:
    stage(what, UNCOUNTED)


def _convex(
    kind: Any, gram: Array, weights: Mapping[str, float], models: list[str], name: str
) -> Any:
    from suture.analysis.geometry import cosines

    cosine = cosines(gram)
    off = np.abs(cosine - np.diag(np.diag(cosine)))
    return kind(weights[name], float(np.diag(gram).max()), float(off.max(initial=0.0)))


def few(material: Material, most: int, seed: int) -> Material:
    """At most so many rows, chosen by a hash, in their given order."""
    from suture.training.labelled import draw

    if len(material.rows) <= most:
        return material
    texts = [" ".join(text) for text in material.texts]
    order = sorted(range(len(texts)), key=lambda i: (draw(seed, texts[i]), i))
    rows: Any = [material.rows[i] for i in sorted(order[:most])]
    return Material(rows, material.head)
