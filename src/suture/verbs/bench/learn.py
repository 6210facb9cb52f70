"""One fine-tune of the benchmark: a base, a frozen head and rows in, task vectors out.

The strategies are those of ``suture finetune``; nothing of a model is written. Task vectors are
taken after several shares of the steps, so that strategies can be compared where their single
models are equally good.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from suture.analysis.vector_space import BATCH, Side, Vector
from suture.checkpoints.atomic import replacing
from suture.checkpoints.checkpoint import Checkpoint
from suture.edits.mask import Mask
from suture.errors import OutputError, Problems
from suture.evals.table import EVALS
from suture.schema.settings import settings as settings_of
from suture.schema.tuning import TuneSettings
from suture.training.labelled import draw
from suture.training.loop import TuneResult, tune
from suture.training.loss import LossStep, classification
from suture.training.models import Classifier, Encoder, file_names
from suture.training.packed import ParameterPlace, unpack
from suture.training.strategy import TrainJob
from suture.verbs.bench.recipe import Line
from suture.verbs.finetune.run import places_of

BODY = "encoder.backbone."


@dataclass(frozen=True)
class Base:
    """The encoder that everything starts from; never changed."""

    encoder: Encoder
    checkpoint: Checkpoint
    fingerprint: str


@dataclass(frozen=True)
class Learnt:
    """What one fine-tune gives."""

    vectors: tuple[Vector, ...]
    """One a checkpoint."""
    steps: tuple[int, ...]
    """After which they were taken."""
    validation: tuple[float, ...]
    """Accuracy on validation rows, of each."""
    mask: Mask | None
    """The entries that were trained, where they were chosen."""
    facts: Mapping[str, Any]


def learn(
    base: Base, line: Line, rate: float, side: Side, training: TuneSettings, seed: int,
    checkpoints: Sequence[float], folder: Path | None = None,
) -> Learnt:  # fmt: skip
    """Fine-tune on one task by one strategy.

    Masks and low-rank updates are drawn by the benchmark's seed: masks anew for every task, the
    frozen halves of linearized low-rank updates the same for all, without which they do not add.
    Files that a strategy reads start in ``folder``.
    """
    encoder = copy.deepcopy(base.encoder)
    backbone: Any = encoder.backbone
    stored = file_names(backbone)
    apart = unpack(backbone) if line.strategy.sparse else {}
    model = Classifier(encoder, side.head)
    places = places_of(model, BODY, stored, apart, base.checkpoint)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if n in places}
    settings = replace(training, lr=rate, seed=seed, save_every=10**9)
    wanted: list[int] = []
    found: dict[int, tuple[Vector, float]] = {}

    def run(mover: LossStep, phase: str, how: TuneSettings) -> TuneResult:
        steps = _steps(len(side.data["train"]), how)
        wanted[:] = [max(1, round(share * steps)) for share in checkpoints]

        def look(at: Any) -> None:
            if at.step in wanted and phase == "train":
                rows = side.data["validation"].batches(BATCH)
                value = EVALS["accuracy"](mover.evaluated, rows)[0].value
                found[at.step] = vector_of(model, mover, start, places), value

        return tune(mover.model, side.data["train"], how, mover=mover, progress=look)

    job = TrainJob(
        model, BODY, side.data["train"], side.data["train"], classification, settings, "cpu",
        base.checkpoint, base.fingerprint, places, run, folder=folder or Path(),
    )  # fmt: skip
    given = {"seed": int(draw(seed, side.name) * 2**31), "adapter_seed": seed} | dict(
        line.parameters
    )
    known = line.strategy.parameters
    parameters = settings_of(
        line.strategy, {k: v for k, v in given.items() if k in known}, Problems()
    )
    tuned = line.strategy.make(**parameters)(job)
    mask = None if tuned.masks is None else job.mask(tuned.masks, {"strategy": line.name})
    losses = tuned.result.losses
    facts = {
        "trained": tuned.trained,
        "loss": [losses[0], losses[-1]],
        **{k: dict(v) if isinstance(v, Mapping) else v for k, v in tuned.facts.items()},
    }
    vectors, scores = zip(*(found[step] for step in wanted), strict=True)
    return Learnt(vectors, tuple(wanted), scores, mask, facts)


def _steps(rows: int, how: TuneSettings) -> int:
    batches = math.ceil(rows / how.batch)
    steps = math.ceil(batches / how.accumulate) * how.epochs
    return min(steps, how.steps or steps)


@torch.no_grad()
def vector_of(
    model: Classifier,
    mover: LossStep,
    start: Mapping[str, Tensor],
    places: Mapping[str, ParameterPlace],
) -> dict[str, Tensor]:
    """What training has moved so far, whatever is trained: weights, a direction, an update."""
    moved: dict[str, Tensor] = {}
    tau = getattr(mover, "tau", None)
    if tau is not None:  # a direction from the base, whose own weights do not move
        moved = {f"encoder.{n}": t.detach() for n, t in tau.items()}
    else:
        for name, parameter in model.named_parameters():
            plain = name.replace(".base_layer.", ".")
            if plain in start:
                moved[plain] = parameter.detach() - start[plain]
        for name, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                update: Callable[[str], Tensor] = module.get_delta_weight
                moved[f"{name}.weight"] = moved[f"{name}.weight"] + update("default")
    whole: dict[str, Tensor] = {}
    for name, delta in moved.items():
        if not delta.any():
            continue
        place = places[name]
        if place.stop is None:
            whole[place.name] = delta.clone()
            continue
        sizes = [other for n, other in places.items() if other.name == place.name]
        shape = list(delta.shape)
        shape[place.axis] = max(other.stop or 0 for other in sizes)
        place.of(whole.setdefault(place.name, torch.zeros(shape))).copy_(delta)
    return whole


# -- on disk ---------------------------------------------------------------------------------------


def save_vectors(vectors: Sequence[Vector], path: Path) -> None:
    """Write task vectors; sparse ones as positions and values. The file appears whole.

    Raises:
        OutputError: the disk is full or refuses.
    """
    held: dict[str, Tensor] = {}
    for number, vector in enumerate(vectors):
        for name, delta in vector.items():
            flat = delta.flatten()
            at = flat.nonzero().flatten()
            shape = torch.tensor(delta.shape)
            if len(at) * 2 < len(flat):
                held[f"{number}/{name}/at"] = at.to(torch.int32 if len(flat) < 2**31 else at.dtype)
                held[f"{number}/{name}/shape"] = shape
                flat = flat[at]
                held[f"{number}/{name}/values"] = flat.clone()
            else:
                held[f"{number}/{name}/dense"] = delta.contiguous()
    try:
        with replacing(path) as partial:
            save_file(held, partial)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: task vectors cannot be written: {error}") from error


def load_vectors(path: Path, number: int) -> dict[str, Tensor]:
    """The task vector of one checkpoint."""
    found: dict[str, Tensor] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - no mapping
            at, _, rest = key.partition("/")
            name, _, kind = rest.rpartition("/")
            if int(at) != number:
                continue
            if kind == "dense":
                found[name] = file.get_tensor(key)
            elif kind == "values":
                start = f"{at}/{name}"
                delta = torch.zeros(file.get_tensor(f"{start}/shape").tolist())
                positions = file.get_tensor(f"{start}/at").long()
                delta.view(-1)[positions] = file.get_tensor(key)
                found[name] = delta
    return found
