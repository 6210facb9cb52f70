"""From a recipe to a tuned folder: train, evaluate, publish; prints nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from suture.checkpoints.checkpoint import Checkpoint, open_checkpoint
from suture.edits.mask_file import marked
from suture.errors import CheckpointError, OutputError, Problems
from suture.merges.apply import checkpoint_fingerprint
from suture.runs.place import SCHEMA
from suture.runs.progress import Progress
from suture.runs.weights import write_weights
from suture.runs.workspace import Workspace
from suture.schema.settings import settings
from suture.schema.tuning import TuneSettings
from suture.tensors.spec import listed
from suture.training.heads import make_head
from suture.training.load import encoder_of
from suture.training.loop import TuneResult, tune
from suture.training.loss import LossStep, classification, next_token
from suture.training.models import (
    Classifier,
    Head,
    file_names,
    load_language_model,
    recompute_activations,
)
from suture.training.packed import ParameterPlace, unpack
from suture.training.strategy import TrainJob, Tuned, backbone_of
from suture.verbs.finetune.metrics import Looks
from suture.verbs.finetune.output import PATCH, write_beside
from suture.verbs.finetune.plan import Plan
from suture.verbs.finetune.result import FinetuneReport, provenance, report_of
from suture.verbs.finetune.work import workshop
from suture.verbs.patch.run import make_patch
from suture.version import __version__


def execute(plan: Plan, progress: Progress) -> FinetuneReport:
    """Train as planned and publish the folder; an interrupted run goes on where it stopped.

    Raises:
        SutureError: training failed, or the output cannot be written; the last checkpoint is kept.
    """
    began = time.perf_counter()
    progress.say(f"{plan.recipe.line.name}: {len(plan.rows.train)} rows, {plan.steps} steps on "
                 f"{plan.device}")  # fmt: skip
    fingerprint = checkpoint_fingerprint(plan.base)
    with workshop(plan, fingerprint) as space:
        work = space.folder
        model, head = _model(plan)
        looks = Looks(plan, model, work, progress.say)
        job = _job(plan, model, fingerprint, work, looks, progress)
        way = plan.recipe.line.make(
            **settings(plan.recipe.line, plan.recipe.parameters, Problems())
        )
        started = time.perf_counter()
        tuned = way(job)
        trained_for = time.perf_counter() - started
        before, after = looks.before, looks.after(tuned)
        looks.done()
        tuned.finish()
        if head is not None:
            assert isinstance(model, Classifier)
            head = model.head()
        report = report_of(plan, tuned, before, after, began, trained_for)
        return _written(plan, job, tuned, head, report, space)


def _model(plan: Plan) -> tuple[nn.Module, Head | None]:
    """The model in float32 on its device, and the head of a classifier."""
    folder, recipe = plan.base.folder, plan.recipe
    if plan.task == "language-model":
        model: nn.Module = load_language_model(
            folder, device=plan.device, dtype=torch.float32
        ).model
        head, backbone = None, model.backbone
    else:
        encoder = encoder_of(plan.base.config, folder, plan.device)
        head = make_head(
            recipe.head, encoder, plan.tokenizer, plan.rows.train, plan.rows.labels,
            recipe.data.label_texts, folder=recipe.folder, device=plan.device,
        )  # fmt: skip
        model = Classifier(encoder, head, train_head=recipe.head == "learned").to(plan.device)
        backbone = encoder.backbone
    if recipe.training.recompute:
        assert isinstance(backbone, nn.Module)
        recompute_activations(backbone)
    return model, head


def _job(
    plan: Plan, model: nn.Module, fingerprint: str, work: Path, looks: Looks, progress: Progress
) -> TrainJob:
    recipe = plan.recipe
    body = "backbone." if plan.task == "language-model" else "encoder.backbone."
    backbone = backbone_of(model, body)
    stored = file_names(backbone)
    apart = unpack(backbone) if recipe.line.sparse else {}

    def run(mover: LossStep, phase: str, settings: TuneSettings) -> TuneResult:
        if phase == "dense":  # a means to a mask: not looked at, never stopped early
            settings = replace(settings, patience=0)
        looks.begin(mover.model)
        return tune(
            mover.model, plan.rows.train, settings, device=plan.device, mover=mover,
            progress=lambda at: progress.step(phase, at),
            score=None if phase == "dense" else looks.score,
            checkpoint=work / f"{phase}.safetensors", kept=looks.kept,
        )  # fmt: skip

    loss = next_token if plan.task == "language-model" else classification
    calibration = plan.rows.validation if len(plan.rows.validation) else plan.rows.train
    return TrainJob(
        model, body, plan.rows.train, calibration, loss, recipe.training, plan.device, plan.base,
        fingerprint, places_of(model, body, stored, apart, plan.base), run, work, looks.say,
        recipe.folder,
    )  # fmt: skip


def places_of(
    model: nn.Module, body: str, stored: Mapping[str, str], apart: Mapping[str, ParameterPlace],
    base: Checkpoint,
) -> dict[str, ParameterPlace]:  # fmt: skip
    """Where each parameter of the body stands in the base's files, checked by its values.

    Args:
        model: the model.
        body: the prefix of its pretrained part.
        stored: names in files of the parameters of that part, before packed ones were split.
        apart: what was split from packed ones.
        base: the files.

    Raises:
        CheckpointError: a matrix stands nowhere: the loader has renamed or recombined tensors.
    """
    backbone = backbone_of(model, body)
    prefix = str(getattr(backbone, "base_model_prefix", "") or "")
    found, lost = {}, []
    for name, parameter in backbone.named_parameters():
        place = apart.get(name, ParameterPlace(name))
        own = stored.get(place.name, place.name)
        for candidate in (own, f"{prefix}.{own}", own.removeprefix(f"{prefix}."), place.name):
            if candidate not in base.specs:
                continue
            there = place._replace(name=candidate)
            held = there.of(base.tensor(candidate))
            if held.shape == parameter.shape and torch.equal(
                held.float(), parameter.detach().float().cpu()
            ):
                found[body + name] = there
                break
        else:
            lost.append(name)
    if lost and any(backbone.get_parameter(n).ndim > 1 for n in lost):
        raise CheckpointError(
            f"{base.label}: {listed(lost)}: not in the files as the model holds them; load it with "
            "transformers, save it with save_pretrained, and start from that folder"
        )
    return found


def _written(
    plan: Plan,
    job: TrainJob,
    tuned: Tuned,
    head: Head | None,
    report: FinetuneReport,
    space: Workspace,
) -> FinetuneReport:
    folder = space.fresh()
    trained, form = _moved(job), plan.recipe.form
    try:
        fingerprint = write_weights(plan.base, trained, job.places, plan.recipe.dtype, folder)
        if tuned.masks is not None:
            about = {"strategy": plan.recipe.line.name, **plan.recipe.parameters}
            about = marked(about, plan.restricted)
            job.mask(tuned.masks, about).save(folder / "mask.safetensors")
        if tuned.save is not None:
            tuned.save(folder)
            _mark_parts(folder, plan.restricted)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise OutputError(f"{folder}: {why}; the training is kept") from error
    if form != "model":
        whole = open_checkpoint(folder)
        make_patch(plan.base, whole, folder / PATCH, restricted=plan.restricted)
        if form == "patch":
            for file in (*whole.files, folder / "model.safetensors.index.json"):
                file.unlink(missing_ok=True)
    report = replace(report, fingerprint=fingerprint)
    record = provenance(plan, job, tuned, report)
    write_beside(plan.base, plan.recipe, record, head, folder, plan.out.name)
    plan.base.check_unchanged()
    space.publish()
    return report


def _mark_parts(folder: Path, restricted: bool) -> None:
    """Let what can be used by itself, such as an adapter, say that it must not be passed on."""
    record = {"suture": __version__, "schema": SCHEMA, "kind": "adapter", "restricted": True}
    for part in folder.iterdir() if restricted else ():
        if part.is_dir():
            (part / "suture.json").write_text(json.dumps(record, indent=2) + "\n")


def _moved(job: TrainJob) -> dict[str, torch.Tensor]:
    """The parameters of the body by the names they had before adapters were put around them."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in job.model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if plain in job.places:
            found[plain] = parameter
    return found


__all__ = ["execute"]
