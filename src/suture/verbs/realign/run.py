"""From a recipe to a realigned folder: check, learn or compute, evaluate, publish; no printing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suture.analysis.ancestry import Distances, array, check_ancestor, measure
from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.views import View
from suture.edits.mask import Mask
from suture.edits.mask_file import marked
from suture.edits.stats import Stats
from suture.errors import MismatchError, OutputError
from suture.merges.apply import checkpoint_fingerprint, output_specs
from suture.runs.card import carry, config_text
from suture.runs.progress import Progress
from suture.runs.weights import TORCH, write_weights
from suture.runs.workspace import Workspace, training_space
from suture.schema.paths import place_of
from suture.tensors.spec import readable
from suture.training.loop import TuneResult, peak_memory, tune
from suture.training.loss import LossStep
from suture.training.models import load_language_model, parameters_of
from suture.training.packed import ParameterPlace
from suture.verbs.realign.base import Edit, Realigned, RealignJob, Scores
from suture.verbs.realign.plan import Plan
from suture.verbs.realign.result import (
    RealignReport,
    card,
    curve_of,
    key_of,
    nothing_lost,
    profile_of,
    provenance,
    restricted,
    retention,
)
from suture.verbs.realign.score_cache import inputs_of, keep_for, remembered


def execute(plan: Plan, progress: Progress) -> RealignReport:
    """Realign as planned and publish the folder; an interrupted run goes on where it stopped.

    Raises:
        MismatchError: the aligned model is not what the tuned ones were tuned from.
        SutureError: training failed, or the output cannot be written; the last checkpoint is kept.
    """
    began, say = time.perf_counter(), progress.say
    steps = f", {plan.steps} steps" if plan.steps else ""
    say(f"{plan.recipe.line.name}: on {plan.device}{steps}")
    need = plan.memory()
    parts = ", ".join(f"{what} {readable(n)}" for what, n in need.items())
    for note in plan.notes:
        say(f"note: {note}")
    say(f"needs about {readable(sum(need.values()))} of memory ({parts}), and activations")
    fingerprints = {label: checkpoint_fingerprint(c) for label, c in plan.inputs.items()}
    _check_mask(plan, fingerprints)
    distances = measure(plan.models, plan.options.threads)
    if plan.recipe.ancestor == "check":
        check_ancestor(plan.models, distances)
    with training_space(plan.out, "realign", key_of(plan, fingerprints), plan.options) as space:
        place = space.folder
        if (place / "train.safetensors").is_file():
            say("going on from the last checkpoint of a run that was interrupted")
        job = _job(plan, _names(plan, distances), place, progress)
        scores = _before(plan, job, fingerprints)
        notes = nothing_lost(scores)
        for note in notes:
            say(note)
        started = time.perf_counter()
        realigned = plan.recipe.line.make(**plan.recipe.settings)(job)
        took = time.perf_counter() - started
        if plan.looks:
            scores["realigned"] = _looked(plan, job, "realigned", _stored(plan, realigned.edit))
        if job.kept is not None:
            job.kept.drop()
        withheld = restricted(plan) or any(m.restricted for m in realigned.masks.values())
        losses = () if realigned.result is None else realigned.result.losses
        few = max(1, len(losses) // 10)
        ends = (sum(losses[:few]) / few, sum(losses[-few:]) / few) if losses else ()
        specs = plan.models.aligned.specs
        report = RealignReport(
            plan.out, plan.recipe.line.name, "", scores, retention(scores), len(losses), ends,
            None if realigned.result is None else realigned.result.best,
            sum(specs[n].numel for n in job.names),
            {"realigning": took, "in all": time.perf_counter() - began}, peak_memory(plan.device),
            {**realigned.facts, "distance": dict(distances.tuned),
             "profile": profile_of(realigned.shares)},
            (*plan.notes, *notes), withheld, curve_of(losses),
        )  # fmt: skip
        return _written(plan, job, realigned, report, fingerprints, space)


def _check_mask(plan: Plan, fingerprints: Mapping[str, str]) -> None:
    """Refuse a mask that says of which models it is, and it is none of these."""
    mask = plan.recipe.settings.get("mask")
    about = Mask.load(place_of(mask, plan.recipe.folder)).about if mask else {}
    prints = {p for word in ("base", "model") if isinstance(p := about.get(word), str)}
    if prints and not prints & set(fingerprints.values()):
        raise MismatchError(
            f"parameters.mask: {mask} is of models with the fingerprints "
            f"{' and '.join(sorted(prints))}, and this recipe names neither"
        )


def _prints(plan: Plan, mask: str, fingerprints: Mapping[str, str]) -> dict[str, str]:
    """Of which base and model a mask is: what those that use it have to be given."""
    if plan.recipe.line.name == "protect":
        given = plan.recipe.settings["mask"]
        return {} if given else {"base": fingerprints["base"], "model": fingerprints["aligned"]}
    own = list(plan.models.tuned) if mask == "mask" else [mask.removeprefix("mask-")]
    found = {"base": fingerprints["aligned"]}
    return found | ({"model": fingerprints[f"models.{own[0]}"]} if len(own) == 1 else {})


def _names(plan: Plan, found: Distances) -> tuple[str, ...]:
    """The tensors that may come out otherwise than they are in the aligned model."""
    if "base" not in plan.recipe.line.needs:
        return found.changed
    both = {*found.changed, *found.moved}
    return tuple(n for n in plan.models.names if n in both)


def _job(plan: Plan, names: tuple[str, ...], work: Path, progress: Progress) -> RealignJob:
    recipe, rows = plan.recipe, plan.rows
    model = None
    if plan.looks:
        model = load_language_model(
            plan.models.aligned.folder, device=plan.device, dtype=torch.float32
        ).model
        _adapt(model, plan.models.aligned)

    def train(mover: LossStep, score: Callable[[nn.Module], float] | None) -> TuneResult:
        assert rows is not None
        return tune(
            mover.model, rows.train.leading, recipe.training, device=plan.device, mover=mover,
            progress=lambda at: progress.step("train", at), score=score,
            checkpoint=work / "train.safetensors", kept=job.kept,
        )  # fmt: skip

    job = RealignJob(
        plan.models, names, recipe.fusing, None if rows is None else rows.train,
        None if rows is None else rows.validation, plan.utility, plan.choosing, recipe.training,
        plan.device, model, train, work, progress.say, plan.options.threads, recipe.folder,
    )  # fmt: skip
    job.kept = keep_for(plan, job)
    return job


@torch.no_grad()
def _adapt(model: nn.Module, aligned: Checkpoint) -> None:
    """Put what adapters change into a model that was loaded from the folder below them."""
    if not isinstance(aligned, View):
        return
    names = [n for n in aligned.specs if not aligned.as_stored(n)]
    for name, parameter in parameters_of(model, names).items():
        parameter.copy_(array(aligned, name))


def _before(plan: Plan, job: RealignJob, prints: Mapping[str, str]) -> dict[str, Scores]:
    """The aligned model and the tuned ones, as they came."""
    if not plan.looks:
        return {}
    job.say("looking at the aligned model, and at the tuned ones as they came")
    edits = {"aligned": job.aligned, "tuned": job.fused()}
    return {name: _looked(plan, job, name, edit, inputs_of(plan, job, prints, name))
            for name, edit in edits.items()}  # fmt: skip


def _stored(plan: Plan, edit: Edit) -> Edit:
    """The weights as they will stand in the file, rounded to its dtype: those are looked at."""
    specs = output_specs(plan.models.aligned, plan.recipe.dtype)
    return lambda name: edit(name).to(TORCH[specs[name].dtype]).float()


def _looked(
    plan: Plan, job: RealignJob, name: str, edit: Edit, inputs: list[Any] | None = None
) -> Scores:
    """The scores of an edit; with ``inputs`` those of an earlier run that had the same."""
    job.place(edit)  # whatever is remembered, a method finds the same weights

    def ask() -> Scores:
        return job.scores(None if plan.rows is None else plan.rows.reported, plan.utility)

    found = ask() if inputs is None else remembered(inputs, ask)
    if found:
        job.say(f"{name}: " + ", ".join(f"{k} {m.value:.4g}" for k, m in found.items()))
    return found


@dataclass(frozen=True)
class _Lazy(Mapping[str, Tensor]):
    """New weights that are computed when they are written."""

    edit: Edit
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> Tensor:
        return self.edit(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _written(
    plan: Plan, job: RealignJob, realigned: Realigned, report: RealignReport,
    fingerprints: Mapping[str, str], space: Workspace,
) -> RealignReport:  # fmt: skip
    folder, aligned = space.fresh(), plan.models.aligned
    weights = _Lazy(realigned.edit, job.names)
    places = {name: ParameterPlace(name) for name in job.names}
    report = replace(
        report, fingerprint=write_weights(aligned, weights, places, plan.recipe.dtype, folder)
    )
    record = provenance(plan, report, fingerprints)
    try:
        for name, mask in realigned.masks.items():
            about = marked({**_prints(plan, name, fingerprints), **mask.about}, report.restricted)
            Mask(mask.shapes, mask.bits, about).save(folder / f"{name}.safetensors")
        if realigned.logits is not None:
            logits = realigned.logits
            facts = marked(logits.facts, report.restricted)
            Stats(logits.tensors, facts, logits.where).save(folder / "logits.safetensors")
        carry([aligned], folder)
        texts = {
            "config.json": config_text(aligned.config, plan.recipe.dtype),
            "suture.json": json.dumps(record, indent=2, ensure_ascii=False) + "\n",
            "README.md": card(plan, record, plan.out.name),
        }
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{folder}: {error.strerror or error}; the training is kept, and the same command goes "
            "on from it"
        ) from error
    for checkpoint in plan.inputs.values():
        checkpoint.check_unchanged()
    space.publish()
    return report


__all__ = ["execute"]
