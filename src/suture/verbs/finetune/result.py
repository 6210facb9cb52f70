"""What a run has done: the report, its table, and the record beside the output."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import is_from_hub
from suture.evals.base import Metric
from suture.runs.place import SCHEMA
from suture.tensors.spec import readable
from suture.training.data import data_digest
from suture.training.loop import peak_memory
from suture.training.strategy import TrainJob, Tuned
from suture.verbs.finetune.plan import Plan
from suture.version import __version__


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
    """The step whose weights were kept, where ``patience`` asks for the best."""
    facts: Mapping[str, Any]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "out": str(self.out)}


def report_of(
    plan: Plan,
    tuned: Tuned,
    before: Metric | None,
    after: Metric | None,
    began: float,
    trained_for: float,
) -> FinetuneReport:
    """What came of a plan; the fingerprint is known when the output is written."""
    losses = tuned.result.losses
    few = max(1, len(losses) // 10)
    ends = sum(losses[:few]) / few, sum(losses[-few:]) / few
    seconds = {
        "training": tuned.result.seconds,
        "masks": max(0.0, trained_for - tuned.result.seconds) if tuned.masks is not None else 0.0,
        "total": time.perf_counter() - began,
    }
    return FinetuneReport(
        plan.out, plan.recipe.line.name, tuned.form, "", tuned.result.steps, ends, before,
        after, tuned.trained, plan.base.numel, seconds, peak_memory(plan.device), tuned.result.best,
        tuned.facts, plan.rows.notes,
    )  # fmt: skip


def provenance(plan: Plan, job: TrainJob, tuned: Tuned, report: FinetuneReport) -> dict[str, Any]:
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
        "suture": __version__,
        "schema": SCHEMA,
        "kind": "finetune",
        "form": tuned.form,
        **({"restricted": True} if plan.restricted else {}),
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


def lines(report: FinetuneReport, out: Path) -> Iterator[str]:
    """Yield the notes, then a table: what it is, and its value."""
    yield from (f"note: {note}" for note in report.notes)
    yield from (f"{key:<22}{text}" for key, text in _rows(report))


def _rows(report: FinetuneReport) -> list[tuple[str, str]]:
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
            f"{report.trained:,} of {report.entries:,} entries "
            f"({report.trained / max(1, report.entries):.2%})",
        )
    )
    masks = f", {report.seconds['masks']:.1f} s of masks" if report.seconds["masks"] else ""
    rows.append(
        (
            "time",
            f"{report.seconds['total']:.1f} s: {report.seconds['training']:.1f} s of "
            f"training{masks}",
        )
    )
    rows.append(("peak memory", readable(report.peak_memory)))
    rows.append(("output", f"{report.out}, fingerprint {report.fingerprint}"))
    return rows
