"""From a recipe to a tuned folder: check everything, train, evaluate, publish; prints nothing."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import suture
from suture.checkpoint import Checkpoint, is_from_hub, open_checkpoint, refuse_uncomputable
from suture.engine import checkpoint_fingerprint
from suture.errors import CheckpointError, OutputError, Problems, RecipeError
from suture.evals import EVALS, Metric
from suture.finetune.base import Job, Say, Tuned, backbone_of
from suture.finetune.heads import make_head
from suture.finetune.output import publish, write_beside, write_weights
from suture.finetune.packed import Place, unpack
from suture.finetune.recipe import Finetune, read_finetune
from suture.finetune.rows import Rows, classification_rows, language_rows
from suture.mask import Mask
from suture.models import (
    Classifier,
    Head,
    load_encoder,
    load_language_model,
    load_tokenizer,
    recompute_activations,
)
from suture.recipe import SCHEMA
from suture.run import _check_place
from suture.run import Options as PlaceOptions
from suture.spec import listed, readable
from suture.tune import Mover, Progress, TuneResult, TuneSettings, classification, next_token, tune
from suture.writer import _locked

Tell = Callable[[str, Progress], None]
"""Is told the phase and where training stands, after every step."""


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what: none of it changes the weights on one device."""

    overwrite: bool = False
    resume: bool = True
    device: str | None = None
    """Overrides the recipe's."""


@dataclass(frozen=True)
class Plan:
    """A run whose inputs were opened and checked; the rows are tokenised, no weight was read."""

    recipe: Finetune
    base: Checkpoint
    task: str
    tokenizer: Any
    rows: Rows
    out: Path
    device: str
    options: Options

    @property
    def steps(self) -> int:
        """Optimizer steps, of one process."""
        how = self.recipe.training
        batches = -(-len(self.rows.train) // how.batch)
        steps = -(-batches // how.accumulate) * how.epochs
        return min(steps, how.steps or steps)


@dataclass(frozen=True)
class FinetuneReport:
    """What a run has done and what it cost."""

    out: Path
    strategy: str
    form: str
    fingerprint: str
    """Of the output."""
    steps: int
    losses: tuple[float, float]
    """Mean losses of the first and the last steps."""
    base_metric: Metric | None
    metric: Metric | None
    """Of the validation rows, before and after; accuracy, or loss per token."""
    trained: int
    """Entries trained."""
    entries: int
    """Entries there are."""
    seconds: Mapping[str, float]
    peak_memory: int
    """Bytes: of the device, or of the process where that is the CPU."""
    best: int | None
    """The step whose weights were kept, where training stopped early."""
    facts: Mapping[str, Any]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "out": str(self.out)}


def plan_finetune(
    recipe: Path | Mapping[str, Any], out: Path, options: Options | None = None
) -> Plan:
    """Read a recipe, open its base, read and tokenise its rows; check all that can be checked.

    Raises:
        SutureError: all problems at once.
    """
    options = options or Options()
    problems = Problems()
    found = base = None
    with problems.collecting():
        found = read_finetune(recipe)
    if found is not None:
        with problems.collecting():
            base = _base(found)
    inputs = {} if base is None else {"base": base}
    _check_place(out, inputs, PlaceOptions(overwrite=options.overwrite), problems)
    if found is None or base is None:
        problems.raise_if_any()
    assert found is not None and base is not None
    task = found.task or _task(base)
    device = options.device or found.device
    with problems.collecting():
        device = _device(device)
    if found.training.patience and found.data.validation is None and not found.data.share:
        problems.add(RecipeError, "training.patience: needs validation rows")
    if task == "language-model" and found.head != "probe":
        problems.add(RecipeError, "head: a language model has its own; leave it out")
    rows = tokenizer = None
    with problems.collecting():
        tokenizer = load_tokenizer(base.folder)
        longest = _longest(base, tokenizer)
        if found.data.max_length > longest:
            raise RecipeError(
                f"data.max_length: the base reads at most {longest} tokens, not {found.data.max_length}"
            )
        read = classification_rows if task == "classification" else language_rows
        rows = read(found.data, tokenizer, longest, found.training.seed)
    _check_mask(found, problems)
    _check_room(out, base, problems)
    problems.raise_if_any()
    assert rows is not None
    return Plan(found, base, task, tokenizer, rows, out, device, options)


def _base(recipe: Finetune) -> Checkpoint:
    base = open_checkpoint(recipe.base, recipe.folder)
    if not base.path.is_dir() or not base.config:
        raise CheckpointError(
            f"base: {recipe.base}: training needs a model folder with a config.json"
        )
    refuse_uncomputable(base)
    return base


def _task(base: Checkpoint) -> str:
    names = base.config.get("architectures") or [""]
    causal = any(word in names[0] for word in ("ForCausalLM", "LMHeadModel"))
    return "language-model" if causal else "classification"


def _device(word: str) -> str:
    if word == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(word).type
    except RuntimeError:
        raise RecipeError(f"device: {word!r} is none; auto, cpu or cuda") from None
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise RecipeError(f"device: there is no {word} here")
    return word


def _longest(base: Checkpoint, tokenizer: Any) -> int:
    config = base.config
    positions = config.get("max_position_embeddings") or config.get("n_positions") or 10**6
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        positions -= 2  # positions are counted from the padding id
    return int(min(positions, getattr(tokenizer, "model_max_length", positions) or positions))


def _check_mask(recipe: Finetune, problems: Problems) -> None:
    from suture.finetune.strategies import MASKS

    mask = recipe.parameters.get("mask")
    if recipe.strategy.name == "masked" and isinstance(mask, str) and mask not in MASKS:
        with problems.collecting():
            path = recipe.folder / mask
            if not path.is_file():
                raise RecipeError(f"parameters.mask: no file {path}, nor one of {', '.join(MASKS)}")
            Mask.load(path)


def _check_room(out: Path, base: Checkpoint, problems: Problems) -> None:
    parent = out.resolve().parent
    while not parent.exists():
        parent = parent.parent
    needed, free = base.nbytes * 2, shutil.disk_usage(parent).free
    if needed > free:
        problems.add(
            OutputError, f"{out}: needs about {readable(needed)} of disk, {readable(free)} are free"
        )


def describe(plan: Plan) -> dict[str, Any]:
    """What a plan will do, as plain data."""
    rows = plan.rows
    return {
        "strategy": plan.recipe.strategy.name,
        "parameters": plan.recipe.resolved()["parameters"],
        "base": plan.base.label,
        "task": plan.task,
        "rows": {"train": len(rows.train), "validation": len(rows.validation)},
        "tokens": sum(map(len, rows.train.ids)),
        "longest": max(map(len, rows.train.ids)),
        "labels": list(rows.labels),
        "steps": plan.steps,
        "device": plan.device,
        "output": str(plan.out),
        "notes": list(rows.notes),
    }


def finetune(
    recipe: Path | Mapping[str, Any],
    out: Path,
    *,
    say: Say = lambda _: None,
    tell: Tell | None = None,
    **options: Any,
) -> FinetuneReport:
    """Follow a recipe file (or mapping) into a folder; keywords as the fields of ``Options``.

    Raises:
        SutureError: the recipe, an input or the output is at fault; all problems at once.
    """
    return execute(plan_finetune(recipe, out, Options(**options)), say=say, tell=tell)


def execute(plan: Plan, *, say: Say = lambda _: None, tell: Tell | None = None) -> FinetuneReport:
    """Train as planned and publish the folder; an interrupted run goes on where it stopped.

    Raises:
        SutureError: training failed, or the output cannot be written; the last checkpoint is kept.
    """
    began = time.perf_counter()
    fingerprint = checkpoint_fingerprint(plan.base)
    with _workshop(plan, fingerprint) as work:
        model, head = _model(plan)
        job = _job(plan, model, fingerprint, work, say, tell)
        evaluation = _evaluation(plan)
        before = None if evaluation is None else evaluation(model)
        way = plan.recipe.strategy.make(
            **plan.recipe.strategy.settings(plan.recipe.parameters, Problems())
        )
        started = time.perf_counter()
        tuned = way(job)
        trained_for = time.perf_counter() - started
        after = None if evaluation is None else evaluation(tuned.evaluated or model)
        tuned.finish()
        if head is not None:
            assert isinstance(model, Classifier)
            head = model.head()
        report = _report(plan, tuned, before, after, began, trained_for)
        return _written(plan, job, tuned, head, report, work)


def _model(plan: Plan) -> tuple[nn.Module, Head | None]:
    """The model in float32 on its device, and the head of a classifier."""
    folder, recipe = plan.base.folder, plan.recipe
    if plan.task == "language-model":
        model: nn.Module = load_language_model(
            folder, device=plan.device, dtype=torch.float32
        ).model
        head, backbone = None, model.backbone
    else:
        encoder = load_encoder(folder, device=plan.device, dtype=torch.float32).model
        head = make_head(recipe.head, encoder, plan.tokenizer, plan.rows.train, plan.rows.labels,
                         recipe.data.label_texts, folder=recipe.folder, device=plan.device)  # fmt: skip
        model = Classifier(encoder, head, train_head=recipe.head == "learned").to(plan.device)
        backbone = encoder.backbone
    if recipe.recompute:
        assert isinstance(backbone, nn.Module)
        recompute_activations(backbone)
    return model, head


def _job(
    plan: Plan, model: nn.Module, fingerprint: str, work: Path, say: Say, tell: Tell | None
) -> Job:
    recipe = plan.recipe
    body = "backbone." if plan.task == "language-model" else "encoder.backbone."
    backbone = backbone_of(model, body)
    apart = unpack(backbone) if recipe.strategy.sparse else {}
    score = _score(plan)

    def run(mover: Mover, phase: str, settings: TuneSettings) -> TuneResult:
        if phase == "dense":  # a means to a mask: not looked at, never stopped early
            settings = replace(settings, patience=0)
        return tune(
            mover.model, plan.rows.train, settings, device=plan.device, mover=mover,
            progress=None if tell is None else lambda at: tell(phase, at),
            score=None if phase == "dense" else score, checkpoint=work / f"{phase}.safetensors",
        )  # fmt: skip

    loss = next_token if plan.task == "language-model" else classification
    calibration = plan.rows.validation if len(plan.rows.validation) else plan.rows.train
    return Job(
        model, body, plan.rows.train, calibration, loss, recipe.training, plan.device, plan.base,
        fingerprint, places_of(model, body, apart, plan.base), run, work, say, recipe.folder,
    )  # fmt: skip


def places_of(
    model: nn.Module, body: str, apart: Mapping[str, Place], base: Checkpoint
) -> dict[str, Place]:
    """Where each parameter of the body stands in the base's files, checked by its values.

    Raises:
        CheckpointError: a matrix stands nowhere: the loader has renamed or recombined tensors.
    """
    backbone = backbone_of(model, body)
    prefix = str(getattr(backbone, "base_model_prefix", "") or "")
    found, lost = {}, []
    for name, parameter in backbone.named_parameters():
        place = apart.get(name, Place(name))
        names = [place.name, f"{prefix}.{place.name}", place.name.removeprefix(f"{prefix}.")]
        for candidate in names:
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
            f"{base.label}: {listed(lost)}: not in the files as the model holds them; load the model with "
            "transformers, save it with save_pretrained, and start from that folder"
        )
    return found


def _evaluation(plan: Plan) -> Callable[[nn.Module], Metric] | None:
    rows = plan.rows.validation
    if not len(rows):
        return None
    kind = "loss" if plan.task == "language-model" else "accuracy"
    return lambda model: EVALS[kind](
        model, rows.batches(plan.recipe.training.batch), device=plan.device
    )[0]


def _score(plan: Plan) -> Callable[[nn.Module], float] | None:
    measure = _evaluation(plan)
    if measure is None:
        return None
    sign = -1.0 if plan.task == "language-model" else 1.0
    return lambda model: sign * measure(model).value


def _report(
    plan: Plan,
    tuned: Tuned,
    before: Metric | None,
    after: Metric | None,
    began: float,
    trained_for: float,
) -> FinetuneReport:
    losses = tuned.result.losses
    few = max(1, len(losses) // 10)
    ends = sum(losses[:few]) / few, sum(losses[-few:]) / few
    seconds = {
        "training": tuned.result.seconds,
        "masks": max(0.0, trained_for - tuned.result.seconds) if tuned.masks is not None else 0.0,
        "total": time.perf_counter() - began,
    }
    return FinetuneReport(
        plan.out, plan.recipe.strategy.name, tuned.form, "", tuned.result.steps, ends, before, after,
        tuned.trained, plan.base.numel, seconds, peak_memory(plan.device), tuned.result.best,
        tuned.facts, plan.rows.notes,
    )  # fmt: skip


def peak_memory(device: str) -> int:
    """Bytes of device memory at most; of the whole process where the device is the CPU."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _written(
    plan: Plan, job: Job, tuned: Tuned, head: Head | None, report: FinetuneReport, work: Path
) -> FinetuneReport:
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    trained = _moved(job)
    try:
        fingerprint = write_weights(plan.base, trained, job.places, plan.recipe.dtype, folder)
        if tuned.masks is not None:
            about = {"strategy": plan.recipe.strategy.name, **plan.recipe.parameters}
            job.mask(tuned.masks, about).save(folder / "mask.safetensors")
        if tuned.save is not None:
            tuned.save(folder)
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror or error}; the training is kept") from error
    report = replace(report, fingerprint=fingerprint)
    record = provenance(plan, job, tuned, report)
    write_beside(plan.base, plan.recipe, record, head, folder, plan.out.name)
    plan.base.check_unchanged()
    publish(folder, plan.out.resolve(), overwrite=plan.options.overwrite)
    return report


def _moved(job: Job) -> dict[str, torch.Tensor]:
    """The parameters of the body by the names they had before adapters were put around them."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in job.model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if plain in job.places:
            found[plain] = parameter
    return found


def provenance(plan: Plan, job: Job, tuned: Tuned, report: FinetuneReport) -> dict[str, Any]:
    """What ``suture.json`` holds."""
    base = plan.base
    path = base.label if is_from_hub(base) else os.path.relpath(base.path, plan.out.resolve())
    recipe = plan.recipe.resolved()
    recipe["base"] = path
    for side in ("train", "validation"):  # names of files, not where they were
        if isinstance(recipe["data"][side], dict) and not recipe["data"][side]["split"]:
            recipe["data"][side]["path"] = Path(recipe["data"][side]["path"]).name
    tools = ("torch", "transformers", "accelerate", *(("peft",) if tuned.save else ()))
    metrics = (report.base_metric, report.metric)
    return {
        "suture": suture.__version__,
        "schema": SCHEMA,
        "kind": "finetune",
        "form": tuned.form,
        "adapter": tuned.adapter,
        "recipe": recipe,
        "task": plan.task,
        "labels": list(plan.rows.labels),
        "inputs": {"base": {"path": path, "fingerprint": job.fingerprint}},
        "data": {
            "train": data_digest(plan.rows.train),
            "validation": data_digest(plan.rows.validation),
        },
        "output": {"fingerprint": report.fingerprint},
        "results": {
            "steps": report.steps,
            "loss": {"first": report.losses[0], "last": report.losses[1]},
            "base_metric": None if metrics[0] is None else asdict(metrics[0]),
            "metric": None if metrics[1] is None else asdict(metrics[1]),
            "trained": report.trained,
            "share": report.trained / max(1, report.entries),
            "best": report.best,
            **report.facts,
        },
        "versions": {tool: version(tool) for tool in tools},
    }


def data_digest(data: Any) -> str:
    """A hash of tokenised rows."""
    text = json.dumps([data.ids, data.labels, data.targets], separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def work_of(out: Path) -> Path:
    """The folder in which a run keeps its checkpoints."""
    return out.parent / f".{out.name}.finetune"


@contextmanager
def _workshop(plan: Plan, fingerprint: str) -> Iterator[Path]:
    """The folder of a run's checkpoints, locked; removed when the run is done."""
    out = plan.out.resolve()
    work = work_of(out)
    facts = {
        "recipe": {**plan.recipe.resolved(), "base": "", "output": None, "device": ""},
        "base": fingerprint,
        "rows": [
            data_digest(plan.rows.train),
            data_digest(plan.rows.validation),
            list(plan.rows.labels),
        ],
        "versions": [suture.__version__, version("torch"), version("transformers")],
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"{work}: cannot write there: {error.strerror}") from None
    try:
        if not _locked(lock):
            raise OutputError(f"{plan.out}: another process is training it just now")
        _same_run(work, key, plan)
        yield work
        shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)
        with suppress(OSError):  # nothing was saved: leave no trace
            if {p.name for p in work.iterdir()} <= {"lock", "key"}:
                shutil.rmtree(work)


def _same_run(work: Path, key: str, plan: Plan) -> None:
    path = work / "key"
    held = [p for p in work.iterdir() if p.name not in ("lock", "key")]
    if plan.options.resume and held and (not path.is_file() or path.read_text() != key):
        raise OutputError(
            f"{work}: holds checkpoints of a run with another recipe, base or rows; take the old recipe to go on "
            "with them, or --no-resume to start anew"
        )
    if not plan.options.resume:
        for stale in held:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    path.write_text(key)


def report_rows(report: FinetuneReport) -> list[tuple[str, str]]:
    """The table at the end: what it is, and its value."""
    rows = [("strategy", report.strategy + ("" if report.form == "plain" else f" ({report.form})"))]
    rows.append(
        ("loss", f"{report.losses[0]:.4f} -> {report.losses[1]:.4f} in {report.steps} steps")
    )
    for label, metric in (("base", report.base_metric), ("tuned", report.metric)):
        if metric is not None:
            rows.append(
                (
                    f"{metric.name}, {label}",
                    f"{metric.value:.4f} [{metric.low:.4f}, {metric.high:.4f}], n = {metric.n}",
                )
            )
    rows.append(
        (
            "trained",
            f"{report.trained:,} of {report.entries:,} entries ({report.trained / max(1, report.entries):.2%})",
        )
    )
    masks = f", {report.seconds['masks']:.1f} s of masks" if report.seconds["masks"] else ""
    rows.append(
        (
            "time",
            f"{report.seconds['total']:.1f} s: {report.seconds['training']:.1f} s of training{masks}",
        )
    )
    rows.append(("peak memory", readable(report.peak_memory)))
    rows.append(("output", f"{report.out}, fingerprint {report.fingerprint}"))
    return rows


__all__ = ["FinetuneReport", "Options", "Plan", "describe", "execute", "finetune",
           "plan_finetune", "report_rows"]  # fmt: skip
