"""A suite held against its data and its models: all problems before any model is loaded."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.headers import read_json
from suture.checkpoints.linearized import LINEARIZED, RECORD_LIMIT, form_of
from suture.checkpoints.open import open_model
from suture.errors import OutputError, Problems, RecipeError, SutureError
from suture.evals.kinds import EvalJob, Run
from suture.evals.results import SuiteResult, read_result
from suture.runs import place as runs
from suture.runs.card import carried_tokenizer
from suture.runs.place import check_parent
from suture.schema.paths import place_of
from suture.training.image_rows import PREPROCESSOR, look_of
from suture.training.images import ImageTransform
from suture.training.models import (
    device_named,
    gguf_tokenizer,
    load_head,
    load_tokenizer,
    longest_of,
    reads_images,
)
from suture.verbs.evaluate.recipe import Suite, read_suite
from suture.verbs.evaluate.rows import IMAGES, Asked, asked_in, digest, zero_shot_labels

HEAD = "head.safetensors"


@dataclass(frozen=True, kw_only=True)
class Options(runs.Options):
    """How to ask, as opposed to what is asked."""

    limit: int = 0
    """Only the first so many rows of each evaluation; 0 for what the suite says."""


@dataclass(frozen=True)
class Prepared:
    """One question, ready to be asked of one model."""

    run: Run
    rows: int
    head: str
    """Hash of the head, where that is the model's own, or of what else a kind reads."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """A model that is asked; its headers and tokenizer were read, no weight."""

    name: str
    given: str
    checkpoint: Checkpoint
    tokenizer: Any
    out: Path | None
    old: SuiteResult | None
    """What the output holds already."""
    prepared: Mapping[str, Prepared]


@dataclass(frozen=True)
class Plan:
    """Everything that will be asked, checked."""

    suite: Suite
    asked: Mapping[str, Asked]
    subjects: tuple[Subject, ...]
    device: str
    options: Options
    reference: Checkpoint | None = None

    @property
    def suite_hash(self) -> str:
        """A hash of all that is asked."""
        return digest({n: [a.facts, a.question.utility] for n, a in self.asked.items()})


def plan_suite(
    models: Sequence[str | os.PathLike[str] | Checkpoint],
    suite: Path | Mapping[str, Any],
    out: Path | None,
    options: Options | None = None,
    folder: Path | None = None,
) -> Plan:
    """Read a suite and its rows, open the models, tokenise; check all that can be checked.

    Args:
        models: a folder, hub id, GGUF file or ``BASE+ADAPTER`` each; or a checkpoint that is open.
        suite: a YAML file, or what stands in it.
        out: a ``.json`` file for one model, or a folder; ``None`` writes nothing.
        options: how to run.
        folder: where the relative paths of the suite start; by default the file's folder or the
            current one, where those of ``models`` and ``out`` always start.

    Raises:
        SutureError: all problems at once.
    """
    options, problems = options or Options(), Problems()
    found = read_suite(suite, problems, folder)
    if found is not None and options.limit:  # a quick look must not replace what took hours
        found = found.model_copy(update={"name": f"{found.name}.first{options.limit}"})
    asked = {} if found is None else asked_in(found, options.limit, problems)
    device = "cpu"
    with problems.collecting():
        device = device_named(options.device or "auto")
    given = [m.label if isinstance(m, Checkpoint) else os.fspath(m) for m in models]
    if not given:
        problems.add(RecipeError, "name at least one model")
    for twice in sorted({m for m in given if given.count(m) > 1}):
        problems.add(RecipeError, f"{twice}: stands twice among the models")
    opened: dict[str, Checkpoint] = {}
    for model, what in zip(given, models, strict=True):
        with problems.collecting():
            opened[model] = what if isinstance(what, Checkpoint) else open_model(model)
    reference = None
    if found is not None and found.reference is not None:
        with problems.collecting():
            reference = open_model(found.reference, found.folder)
    subjects = _subjects(opened, found, asked, out, options, problems)
    problems.raise_if_any()
    assert found is not None
    return Plan(found, asked, tuple(subjects), device, options, reference)


def _subjects(
    opened: Mapping[str, Checkpoint], suite: Suite | None, asked: Mapping[str, Asked],
    out: Path | None, options: Options, problems: Problems,
) -> list[Subject]:  # fmt: skip
    """The models, each with every question prepared for it."""
    found, told = [], dict[tuple[str, str], list[str]]()
    names = _names(list(opened))
    if out is not None and out.suffix == ".json" and len(opened) > 1:
        problems.add(RecipeError, f"{out}: one file takes one model; name a folder for several")
    for model, checkpoint in opened.items():
        tokenizer: Any = None
        with problems.collecting():
            images = reads_images(checkpoint.config)
            tokenizer = _Blank() if images else tokenizer_of(checkpoint)
        place, old = _place(out, names[model], suite, options, problems)
        if tokenizer is None or suite is None:
            continue
        prepared = {}
        for name, one in asked.items():
            own = Problems()
            with own.collecting():
                prepared[name] = _prepare(one, suite, checkpoint, tokenizer, own)
            for text in _texts(own):
                told.setdefault((name, text), []).append(names[model])
        found.append(Subject(names[model], model, checkpoint, tokenizer, place, old, prepared))
    if not found and suite is not None:  # faults of the rows are found without a model, too
        for name, one in asked.items():
            own = Problems()
            with own.collecting():
                _job(one, suite, _Blank(), 1 << 30, (), own)
            for text in _texts(own):
                told.setdefault((name, text), [])
    for (name, text), who in told.items():
        whom = f"for {', '.join(who)}: " if len(opened) > 1 and len(who) < len(found) else ""
        problems.add(RecipeError, f"evaluations.{name}: {whom}{text}")
    return found


def _texts(problems: Problems) -> list[str]:
    """What was noted; of one fault in many rows the first, and how many more have it."""
    try:
        problems.raise_if_any()
    except SutureError as error:
        first: dict[str, str] = {}
        counts: dict[str, int] = {}
        for text in getattr(error, "problems", (str(error),)):
            fault = re.sub(r", (line|row) \d+", "", text)
            first.setdefault(fault, text)
            counts[fault] = counts.get(fault, 0) + 1
        more = {fault: f" (and {n - 1} more rows)" if n > 1 else "" for fault, n in counts.items()}
        return [text + more[fault] for fault, text in first.items()]
    return []


class _Blank:
    """Stands for a tokenizer where no model could be opened: rows can still be read."""

    chat_template = "none"
    pad_token_id = 0

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[number, *[0] * 101] for number in range(len(texts))]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return messages[-1]["content"]


def _prepare(
    asked: Asked, suite: Suite, checkpoint: Checkpoint, tokenizer: Any, problems: Problems
) -> Prepared:
    question, line = asked.question, asked.question.line
    if line.needs == "language-model" and not is_causal(checkpoint):
        what = (checkpoint.config.get("architectures") or ["a model without a head"])[0]
        raise RecipeError(f"{question.kind} needs a language model; {checkpoint.label} is {what}")
    head, labels = "", tuple[str, ...]()
    images = reads_images(checkpoint.config)
    if images != (line.needs == IMAGES):
        what = ("texts", "images") if images else ("images", "texts")
        raise RecipeError(f"{question.kind} asks about {what[0]}; {checkpoint.label} reads "
                          f"{what[1]}")  # fmt: skip
    if images and question.max_length:
        raise RecipeError("max_length: counts tokens; images have none")
    if line.needs in ("classifier", IMAGES):
        labels, head = _labels(asked, suite, checkpoint)
    longest = longest_of(checkpoint.config, tokenizer)
    if question.max_length > longest:
        raise RecipeError(f"max_length: {checkpoint.label} reads at most {longest} tokens, "
                          f"not {question.max_length}")  # fmt: skip
    look, notes = look_of(checkpoint, 0) if images else (None, ())
    job, run = _job(asked, suite, tokenizer, question.max_length or longest, labels, problems, look)
    return Prepared(run, len(asked.rows), head or job.stamp, (*notes, *job.notes))


def _job(
    asked: Asked, suite: Suite, tokenizer: Any, longest: int, labels: tuple[str, ...],
    problems: Problems, look: ImageTransform | None = None,
) -> tuple[EvalJob, Run]:  # fmt: skip
    question = asked.question
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in question.options.items()}
    job = EvalJob(asked.rows, tokenizer, longest, question.decoding, problems, question.too_long,
              question.batch, labels, suite.folder, look)  # fmt: skip
    run = question.line.make(**options)(job)
    job.finish()
    return job, run


def _labels(asked: Asked, suite: Suite, checkpoint: Checkpoint) -> tuple[tuple[str, ...], str]:
    """The labels of a head, and the hash of the model's own."""
    options = asked.question.options
    head = str(options["head"])
    if head == "zero-shot":
        return zero_shot_labels(asked), ""
    if options.get("labels") or options.get("label_texts"):
        raise RecipeError("labels and label_texts belong to `head: zero-shot`; a saved head has "
                          "labels of its own")  # fmt: skip
    path = checkpoint.folder / HEAD if head == "model" else place_of(head, suite.folder)
    if head != "model" and not path.is_file():
        return (), ""  # noted when the question was read
    if not path.is_file():
        other = "" if asked.question.line.needs == IMAGES else ", or say `head: zero-shot`"
        raise RecipeError(f"{checkpoint.label} has no {HEAD}; name the file of a head{other}")
    found, dim = load_head(path), checkpoint.config.get("hidden_size")
    if dim is not None and found.weight.shape[1] != dim:
        raise RecipeError(f"head: {path} reads {found.weight.shape[1]} numbers, "
                          f"{checkpoint.label} gives {dim}")  # fmt: skip
    own_hash = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    return found.labels, own_hash if head == "model" else ""


def is_causal(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a language model."""
    name = (checkpoint.config.get("architectures") or [""])[0]
    return any(word in name for word in ("ForCausalLM", "LMHeadModel"))


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a model, whatever it lies in.

    Raises:
        CheckpointError: there is none.
    """
    if checkpoint.path.suffix != ".gguf":
        return load_tokenizer(checkpoint.folder)
    with tempfile.TemporaryDirectory() as place:
        for name, content in gguf_tokenizer(checkpoint.path).items():
            (Path(place) / name).write_bytes(content)
        return load_tokenizer(Path(place))


def beside(checkpoint: Checkpoint) -> str:
    """A hash of what changes answers besides the weights: configuration, tokenizer, what it is."""
    facts: dict[str, Any] = {"config": checkpoint.config}
    if checkpoint.path.is_dir():
        files = carried_tokenizer(checkpoint)
        template = checkpoint.folder / "chat_template.jinja"
        if template.is_file():
            files = {**files, template.name: template}
        for name, path in sorted(files.items()):
            facts[name] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        look = checkpoint.folder / PREPROCESSOR
        if look.is_file():
            facts[look.name] = read_json(look)
        if form_of(checkpoint).kind == LINEARIZED:
            record = read_json(checkpoint.folder / "suture.json", RECORD_LIMIT)
            facts["form"] = record.get("inputs", {}).get("base", {}).get("fingerprint")
    return digest(facts)


def _names(models: Sequence[str]) -> dict[str, str]:
    """A name for each model: as many last parts of its path as tell it from the others."""
    found = {}
    for model in models:
        for number in range(1, 100):
            name = _end(model, number)
            if [_end(other, number) for other in models].count(name) == 1:
                break
        found[model] = name
    return found


def _end(model: str, number: int) -> str:
    parts = [p for p in re.split(r"[/\\]+", model.partition("@")[0]) if p not in ("", ".", "..")]
    return re.sub(r"[^\w.+-]", "-", "-".join(parts[-number:])) or "model"


def _place(
    out: Path | None, name: str, suite: Suite | None, options: Options, problems: Problems
) -> tuple[Path | None, SuiteResult | None]:
    """Where a result goes, and what is there already."""
    if out is None or suite is None:
        return None, None
    path = out if out.suffix == ".json" else out / f"{name}.{suite.name}.json"
    if not check_parent(path, out, problems):
        return path, None
    if path.is_dir() or (out.exists() and out.suffix != ".json" and not out.is_dir()):
        problems.add(OutputError, f"{path if path.is_dir() else out}: is in the way")
        return path, None
    if not path.exists() or (options.overwrite and not options.resume):
        return path, None
    try:
        old = read_result(path)
        if old.suite != suite.name and not options.overwrite:
            raise RecipeError(f"{path}: is a result of the suite {old.suite!r}")
    except RecipeError as error:
        if not options.overwrite:
            problems.add(OutputError, f"{error}; name another place, or --overwrite")
        return path, None
    return path, old


def describe(plan: Plan) -> dict[str, Any]:
    """What a plan will do, as plain data."""
    return {
        "suite": plan.suite.name,
        "device": plan.device,
        "models": {s.name: {"path": s.given, "output": None if s.out is None else str(s.out)}
                   for s in plan.subjects},
        "evaluations": {
            name: {"kind": a.question.kind, "rows": len(a.rows), "utility": a.question.utility,
                   "categories": list(a.groups),
                   "notes": sorted({n for s in plan.subjects for n in s.prepared[name].notes})}
            for name, a in plan.asked.items()
        },
    }  # fmt: skip


__all__ = ["HEAD", "Asked", "Options", "Plan", "Prepared", "Subject", "beside", "describe",
           "digest", "is_causal", "plan_suite", "tokenizer_of", "zero_shot_labels"]  # fmt: skip
