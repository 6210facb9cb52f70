"""A plan carried out: every model asked every question that its result does not answer already."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from suture.checkpoints.atomic import write_whole
from suture.checkpoints.checkpoint import Checkpoint
from suture.errors import OutputError, Problems
from suture.evals.kinds import Models, Score
from suture.evals.results import Evaluation, Scores, SuiteResult
from suture.merges.apply import checkpoint_fingerprint
from suture.runs.progress import Progress
from suture.schema.paths import place_of
from suture.training.heads import zero_shot
from suture.training.load import load_tuned
from suture.training.models import (
    FLOAT32,
    Classifier,
    LanguageModel,
    load_encoder,
    load_head,
    load_language_model,
)
from suture.verbs.evaluate.plan import (
    HEAD,
    Asked,
    Plan,
    Subject,
    beside,
    digest,
    zero_shot_labels,
)
from suture.verbs.merge.run import merged, save
from suture.version import __version__


@dataclass(frozen=True)
class At:
    """How far the asking is."""

    model: str
    evaluation: str
    done: float
    """Rows, of all models and evaluations."""
    total: int
    seconds: float

    @property
    def eta(self) -> float | None:
        """Seconds that are left, judged by the rows so far."""
        return self.seconds / self.done * (self.total - self.done) if self.done else None


def execute(plan: Plan, progress: Progress) -> list[SuiteResult]:
    """Ask; results are written after each evaluation, so that an interrupted run keeps them.

    Raises:
        SutureError: a model is at fault, or a result cannot be written.
    """
    prints = [
        checkpoint_fingerprint(s.checkpoint, progress.stage("identify", s.checkpoint.nbytes))
        for s in plan.subjects
    ]
    other = None if plan.reference is None else checkpoint_fingerprint(plan.reference)
    _check_old(plan, prints)
    kept = [_kept(plan, s, p, other) for s, p in zip(plan.subjects, prints, strict=True)]
    total = sum(
        len(plan.asked[name].rows) for k in kept for name in plan.asked.keys() - k.evaluations
    )
    number = sum(map(len, (k.evaluations for k in kept)))
    if number:
        progress.say(f"{number} evaluation(s) are there already")
    clock = _Clock(total, progress.asked)
    found = []
    for subject, result in zip(plan.subjects, kept, strict=True):
        found.append(_ask(plan, subject, result, other, clock))
    return found


class _Clock:
    """Counts rows over models and evaluations."""

    def __init__(self, total: int, tell: Callable[[At], None]) -> None:
        self.total, self.tell = total, tell
        self.done, self.begun = 0.0, time.perf_counter()
        self.model = self.evaluation = ""

    def tick(self, rows: float) -> None:
        self.done += rows
        spent = time.perf_counter() - self.begun
        self.tell(At(self.model, self.evaluation, self.done, self.total, spent))


def _check_old(plan: Plan, prints: Sequence[str]) -> None:
    problems = Problems()
    for subject, fingerprint in zip(plan.subjects, prints, strict=True):
        old = subject.old
        if old is not None and old.fingerprint != fingerprint and not plan.options.overwrite:
            problems.add(
                OutputError,
                f"{subject.out}: is a result of a model with the fingerprint {old.fingerprint}, "
                f"{subject.given} has {fingerprint}; name another place, or --overwrite",
            )
    problems.raise_if_any()


def _key(asked: Asked, subject: Subject, fingerprint: str, around: str, other: str | None) -> str:
    head = subject.prepared[asked.question.name].head
    line = asked.question.line
    reference = other if line.reference or line.asks else None
    return digest([asked.facts, fingerprint, around, head, reference])


def _kept(plan: Plan, subject: Subject, fingerprint: str, other: str | None) -> SuiteResult:
    """The result to go on with: what is there already and answers the same."""
    around, old = beside(subject.checkpoint), subject.old
    found = {}
    if old is not None and plan.options.resume:
        for name, asked in plan.asked.items():
            known = old.evaluations.get(name)
            key = _key(asked, subject, fingerprint, around, other)
            if known is not None and known.key == key and known.utility == asked.question.utility:
                found[name] = known
    tools = ("torch", "transformers", "tokenizers", "numpy")
    versions = {"suture": __version__, **{tool: version(tool) for tool in tools}}
    return SuiteResult(subject.name, subject.given, fingerprint, plan.suite.name, plan.suite_hash,
                       found, tuple(plan.asked), versions)  # fmt: skip


def _ask(
    plan: Plan, subject: Subject, result: SuiteResult, other: str | None, clock: _Clock
) -> SuiteResult:
    missing = [name for name in plan.asked if name not in result.evaluations]
    if subject.out is not None:
        write_whole(subject.out, result.to_json())
    if not missing:
        return result
    around = beside(subject.checkpoint)
    with _folder_of(subject.checkpoint) as folder:
        shelf = _Shelf(folder, plan, subject)
        for name in missing:
            asked = plan.asked[name]
            clock.model, clock.evaluation = subject.name, name
            begun = time.perf_counter()
            models = Models(shelf.model(asked), plan.device, shelf.reference(asked), clock.tick)
            scores = subject.prepared[name].run(models)
            key = _key(asked, subject, result.fingerprint, around, other)
            spent = round(time.perf_counter() - begun, 3)
            made = _evaluation(asked, subject, scores, key, spent)
            result = result.with_(made)
            if subject.out is not None:
                write_whole(subject.out, result.to_json())
    return result


def _evaluation(
    asked: Asked, subject: Subject, scores: Sequence[Score], key: str, seconds: float
) -> Evaluation:
    name, notes = asked.question.name, list(subject.prepared[asked.question.name].notes)
    kept, failed = [], dict[tuple[int, int], list[str]]()
    for score in scores:
        rows = sorted(score.values)
        values = np.asarray([score.values[row] for row in rows], np.float64)
        told = score.weights
        weights = np.ones(len(rows)) if told is None else np.asarray([told[r] for r in rows])
        values[~np.isfinite(values)] = np.nan
        kept.append(Scores(score.name, score.statistic, score.better, tuple(rows), values, weights))
        if np.isnan(values).any():
            failed.setdefault((int(np.isnan(values).sum()), len(rows)), []).append(score.name)
    notes += [
        f"{', '.join(names)}: {lost} of {asked_} rows gave no finite number: the model is broken "
        "there"
        for (lost, asked_), names in failed.items()
    ]
    taken = {score.name for score in kept}
    groups = {f"{g}_" if g in taken else g: rows for g, rows in asked.groups.items()}
    return Evaluation(name, asked.question.kind, asked.facts, key, asked.question.utility,
                      tuple(kept), groups, seconds, tuple(notes))  # fmt: skip


@contextmanager
def _folder_of(checkpoint: Checkpoint) -> Iterator[Path]:
    """A model as a folder that can be loaded; what is computed while it is read is written once."""
    if checkpoint.path.is_dir() and (type(checkpoint) is Checkpoint or checkpoint.in_memory):
        yield checkpoint.folder
        return
    with tempfile.TemporaryDirectory(prefix="suture-eval-") as place:
        folder = Path(place) / "model"
        save(merged(None, {"model": checkpoint}, method="passthrough"), folder)
        yield folder


class _Shelf:
    """The loaded models of one subject, each once."""

    def __init__(self, folder: Path, plan: Plan, subject: Subject) -> None:
        self.folder, self.plan, self.subject = folder, plan, subject
        self.held: dict[str, nn.Module] = {}
        self.dtype = getattr(torch, plan.suite.dtype)
        own = subject.checkpoint
        self.weights = own if own.in_memory else None

    def model(self, asked: Asked) -> nn.Module:
        """What a question is put to."""
        needs = asked.question.line.needs
        if needs == "language-model":
            return self._once(needs, self._language_model)
        body = self._once("encoder", self._encoder)
        return body if needs == "encoder" else self._classifier(asked, body)

    def reference(self, asked: Asked) -> nn.Module | None:
        """The model to compare with, where the kind needs one."""
        other = self.plan.reference
        line = asked.question.line
        if not (line.reference or line.asks) or other is None:
            return None

        def load() -> nn.Module:
            with _folder_of(other) as folder:
                return load_tuned(folder, device=self.plan.device, dtype=self.dtype)

        return self._once("reference", load)

    def _once(self, name: str, load: Callable[[], nn.Module]) -> nn.Module:
        if name not in self.held:
            # The wrapper too: whoever switches it back must not switch dropout on below it.
            self.held[name] = load().eval()
        return self.held[name]

    def _language_model(self) -> nn.Module:
        found = load_tuned(self.folder, device=self.plan.device, weights=self.weights,
                           dtype=self.dtype)  # fmt: skip
        if isinstance(found, Classifier):  # a head lies beside a language model
            return load_language_model(self.folder, device=self.plan.device, dtype=self.dtype,
                                       weights=self.weights).model  # fmt: skip
        return found

    def _encoder(self) -> nn.Module:
        found = load_tuned(self.folder, device=self.plan.device, weights=self.weights)
        if isinstance(found, LanguageModel):
            return load_encoder(self.folder, device=self.plan.device, dtype=FLOAT32,
                                weights=self.weights).model  # fmt: skip
        return found.encoder if isinstance(found, Classifier) else found

    def _classifier(self, asked: Asked, body: Any) -> nn.Module:
        options, device = asked.question.options, self.plan.device
        head = str(options["head"])
        if head == "zero-shot":
            labels = zero_shot_labels(asked)
            texts = options["label_texts"] or {}
            made = zero_shot(
                body, self.subject.tokenizer,
                [texts.get(label, label.replace("_", " ")) for label in labels], labels, device,
            )  # fmt: skip
        else:
            origin = self.subject.checkpoint.folder
            path = origin / HEAD if head == "model" else place_of(head, self.plan.suite.folder)
            made = load_head(path, device=device)
        return Classifier(body, made).to(device).eval()
