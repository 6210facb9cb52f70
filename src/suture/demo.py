"""The main job on small real models, end to end: fine-tune, merge, localize, patch, compare.

For every task a linear head is fitted on the frozen base encoder and then frozen itself; only then
is the encoder fine-tuned (Kumar et al., 2022). So the base has a meaningful accuracy, every model
is read through the same heads, and what an expert learnt lies in its encoder alone, where a merge
can reach it.

Every step leaves a file that says what it was made from; a second run does again only what
changed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not spin

import torch
import yaml

from suture.data import Dataset, Row, Split, at_most, draw, labels_of, split, tokenise
from suture.demo_edits import Edits
from suture.demo_tasks import (
    OPERATIONS,
    OPERATIONS_ABOUT,
    TASKS,
    TextTask,
    base_folder,
    operations_rows,
    published_folder,
)
from suture.errors import SutureError
from suture.evals import EVALS, EvalResult, Metric
from suture.evals.embedding import agreement
from suture.models import (
    Classifier,
    Encoder,
    Tokenizer,
    embed,
    load_encoder,
    load_head,
    load_tokenizer,
    save_head,
    save_model,
)
from suture.probe import fit_head
from suture.report import Entry, Report, Task
from suture.roles import role_of
from suture.run import merge
from suture.settings import TuneSettings
from suture.tune import Progress, tune
from suture.workshop import (
    EVAL_BATCH,
    Column,
    Model,
    Say,
    Workshop,
    digest,
    fingerprint,
    read_result,
    write,
)

STEPS = 1
"""Version of what the steps below do; raise it with them, so that nothing stale is used again."""
SEED = 0
FEW = 16
"""Training rows of each label from which regions are found with data."""
SHARES = {"validation": 0.15, "test": 0.25}
SCALES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""What task arithmetic may choose from, on validation rows; 0, the base, is an answer too."""
MERGES = (
    "linear",
    "task-arithmetic",
    "ties",
    "dare-ties",
    "consensus",
    "stitch",
    "random-mask",
)
"""The recipes ``examples/demo-*.yaml``, in the order of the table."""
CHOSEN = "task-arithmetic"
"""The recipe whose scale is chosen."""
QUICK = ("bias", "languages")
"""The tasks of the quick demo."""


def run_edits(
    shop: Workshop, places: Mapping[str, Path], versions: dict[str, str], *, quick: bool = False
) -> Report:
    """Run the half of the demo that is about edits; its report is also JSON and Markdown.

    Args:
        shop: where everything is made: experts, heads, merges, regions, a patch and results; about
            1.5 GB.
        places: the folders of the packages.
        versions: what everything is made with.
        quick: two tasks instead of four, less training, fewer test rows; under three minutes.

    Raises:
        SutureError: the folder holds something else.
    """
    tasks = [shortened(task) for task in TASKS if task.name in QUICK] if quick else list(TASKS)
    report = _run(shop, tasks, places, versions)
    write(shop.out / "results.json", report.to_json())
    write(shop.out / "results.md", report.to_markdown())
    return report


def shortened(task: TextTask) -> TextTask:
    """The quick version of a task."""
    less = {"train": 200, "validation": 25, "test": 100}
    sizes = {side: min(most, getattr(task, side)) for side, most in less.items()}
    return replace(task, tune=replace(task.tune, epochs=1), **sizes)


def _run(
    shop: Workshop, tasks: Sequence[TextTask], places: Mapping[str, Path], versions: dict[str, str]
) -> Report:
    folder = base_folder(places)
    base = Model("base", "base", folder, fingerprint(folder), "all-MiniLM-L6-v2, 22.7 M parameters")
    tokenizer = load_tokenizer(folder)

    columns, experts = [], []
    for task in tasks:
        column, expert = learn(shop, task, task.read(places), base, tokenizer)
        columns.append(column)
        experts.append(expert)
    published = published_folder(places)
    about = "sre-embedding-model, fine-tuned and published by others"
    experts.append(Model(OPERATIONS, "expert", published, fingerprint(published), about))
    columns.append(published_column(experts[-1], tokenizer))

    scale, scores = choose_scale(shop, base, experts, columns)
    models = [base, *experts]
    for name in MERGES:
        models.append(merged(shop, name, base, experts, scale if name == CHOSEN else None))
    edits = Edits(shop, base, experts, columns)
    edits.localize()
    models.append(edits.stitched())

    entries = []
    for model in models:
        metrics = measured(shop, model, columns, "test", versions)
        shop.say(f"{model.name}: " + ", ".join(f"{n} {m.value:.3f}" for n, m in metrics.items()))
        entries.append(Entry(model.name, model.kind, metrics, model.about, model.seconds))
    told = [edits.continual(), edits.patch()]
    for line in told:
        shop.say(line)
    edits.curve()
    edits.analyse(scale)
    notes = [
        *NOTES,
        *told,
        _scale_note(scale, scores),
        _retrieval_note(shop, base, experts[-1], tokenizer),
    ]
    title = "Suture demo: experts of one small encoder, merged"
    return Report(title, tuple(c.task for c in columns), tuple(entries), tuple(notes), versions)


NOTES = (
    "The head of a task is a linear probe fitted on the frozen base and then frozen; every model "
    "is read through the same heads, so the row of the base is the accuracy of the probes.",
    "Rows are divided by a hash of their group, and equal texts share a side. Test rows were used "
    "for nothing but this table. One seed: the intervals are about rows, not about training runs.",
    "Fine-tuning leaves token embeddings alone; they are outside of what merges edit by default.",
    "random-mask is the control for stitch: as many entries of each task vector, drawn at random.",
    "operations has no labelled test set. Agreement says how much of the published edit is there, "
    "not whether that is good; the base's own agreement is the control.",
)


# -- one expert ------------------------------------------------------------------------------------


def learn(
    shop: Workshop, task: TextTask, rows: Any, base: Model, tokenizer: Tokenizer
) -> tuple[Column, Model]:
    """Fit the head of a task on the base, freeze it, fine-tune the encoder."""
    sides = divided(task, rows)
    labels = labels_of(sides.train)
    data = {
        side: tokenise(getattr(sides, side), tokenizer, labels=labels, max_length=task.max_length)
        for side in sides._fields
    }
    train_key = digest([base.key, labels, data["train"].ids, data["train"].labels])
    head_path = shop.out / "heads" / f"{task.name}.safetensors"
    folder = shop.out / "experts" / task.name

    def probe() -> None:
        encoder = load_encoder(base.folder, dtype=torch.float32).model
        features = embed(encoder, data["train"].batches(EVAL_BATCH))
        save_head(fit_head(features, torch.tensor(data["train"].labels), labels), head_path)

    def fine_tune() -> None:
        encoder = load_encoder(base.folder, dtype=torch.float32).model
        for name, parameter in encoder.backbone.named_parameters():
            parameter.requires_grad_(role_of(name).kind != "embedding")
        model = Classifier(encoder, load_head(head_path))
        settings = replace(task.tune, seed=SEED)
        tune(model, data["train"], settings, progress=_telling(shop.say, task.name))
        save_model(encoder, tokenizer, folder)

    head_key, _ = shop.make(head_path, [train_key], probe)
    key, seconds = shop.make(folder, [head_key, asdict(task.tune), SEED], fine_tune)
    head = load_head(head_path)
    column = Column(
        Task(task.name, "accuracy", task.name, f"{task.about}; {_counts(sides)}"),
        "accuracy",
        digest([head_key, data["validation"].ids, data["test"].ids]),
        data,
        lambda encoder, part: EVALS["accuracy"](
            Classifier(encoder, head), part.batches(EVAL_BATCH)
        ),
        head_path.resolve(),
        at_most(sides.train, FEW, seed=SEED),
        task.max_length,
    )
    return column, Model(task.name, "expert", folder, key, _training(task.tune, sides), seconds)


def divided(task: TextTask, rows: Any) -> Split:
    """Training, validation and test rows of a task, each text once, at most so many of a label."""
    unique = list({row.text: row for row in rows}.values())
    train, validation, test = split(unique, seed=SEED, **SHARES)
    return Split(
        at_most(train, task.train, seed=SEED),
        at_most(validation, task.validation, seed=SEED),
        at_most(test, task.test, seed=SEED),
    )


def published_column(expert: Model, tokenizer: Tokenizer) -> Column:
    """Agreement with the expert that others published, on texts about its subject."""
    sides: dict[str, list[Row]] = {"validation": [], "test": []}
    for row in operations_rows():
        sides["validation" if draw(SEED, row.label) < 0.3 else "test"].append(row)
    data = {side: tokenise(rows, tokenizer, max_length=64) for side, rows in sides.items()}
    references: dict[Dataset, torch.Tensor] = {}

    def measure(encoder: Encoder, part: Dataset) -> tuple[Metric, ...]:
        if part not in references:
            model = load_encoder(expert.folder, dtype=torch.float32).model
            references[part] = embed(model, part.batches(EVAL_BATCH))
        return agreement(references[part])(encoder, part.batches(EVAL_BATCH))

    counts = ", ".join(f"{len(rows)} {side}" for side, rows in sides.items())
    task = Task(OPERATIONS, "agreement", expert.name, f"{OPERATIONS_ABOUT}; {counts}")
    key = digest([expert.key, {side: part.ids for side, part in data.items()}])
    return Column(task, "agreement", key, data, measure)


# -- merging and measuring -------------------------------------------------------------------------


def recipe(name: str, base: Model, experts: Sequence[Model], scale: float | None) -> dict[str, Any]:
    """An example recipe with the demo's folders in place of its placeholders."""
    raw: dict[str, Any] = yaml.safe_load((_examples() / f"demo-{name}.yaml").read_text("utf-8"))
    here = {expert.name: str(expert.folder.resolve()) for expert in experts}
    raw["base"] = str(base.folder.resolve())
    raw["models"] = {model: here[model] for model in raw["models"] if model in here}
    if scale is not None:
        raw["parameters"] = {**raw.get("parameters", {}), "scale": scale}
    return raw


def merged(
    shop: Workshop, name: str, base: Model, experts: Sequence[Model], scale: float | None
) -> Model:
    """One merge of all experts, by the library's own way from recipe to folder."""
    how = recipe(name, base, experts, scale)
    folder = shop.out / "merges" / name
    used = ["method", "parameters", "space", "policy", "output"]
    content = {word: how[word] for word in used if word in how}
    inputs = [content, base.key, {expert.name: expert.key for expert in experts}]
    key, seconds = shop.make(folder, inputs, lambda: _merge(how, folder))
    settings = ", ".join(f"{word} {value}" for word, value in how.get("parameters", {}).items())
    chosen = ", scale chosen on validation rows" if scale is not None else ""
    about = f"{how['method']}{': ' if settings else ''}{settings}{chosen}"
    return Model(name, "merge", folder, key, about, seconds)


def _merge(how: Mapping[str, Any], folder: Path) -> None:
    merge(how, folder, overwrite=True)


def choose_scale(
    shop: Workshop, base: Model, experts: Sequence[Model], columns: Sequence[Column]
) -> tuple[float, dict[float, float]]:
    """The scale of task arithmetic with the best mean share of the expert on validation rows.

    0 stands for the base. Ties go to the smaller scale.
    """
    path = shop.out / "results" / "scale.json"
    inputs = [[expert.key for expert in experts], [column.key for column in columns], SCALES]
    by_name = {expert.name: expert for expert in experts}

    def values(folder: Path, asked: Sequence[Column]) -> dict[str, float]:
        encoder = load_encoder(folder, dtype=torch.float32).model
        return {c.task.name: c.measure(encoder, c.data["validation"])[0].value for c in asked}

    def choose() -> None:
        best: dict[str, float] = {}
        for column in columns:
            best |= values(by_name[column.task.expert].folder, [column])
        scores = {}
        for scale in (0.0, *SCALES):
            trial = shop.out / "merges" / ".trial"
            if scale:
                _merge(recipe(CHOSEN, base, experts, scale), trial)
            found = values(trial if scale else base.folder, columns)
            scores[scale] = sum(found[name] / best[name] for name in best) / len(best)
            shop.say(
                f"{CHOSEN}: scale {scale} gives {scores[scale]:.3f} of the experts on validation"
            )
        shutil.rmtree(shop.out / "merges" / ".trial")
        write(path, json.dumps({str(scale): score for scale, score in scores.items()}, indent=2))

    shop.make(path, inputs, choose)
    scores = {float(scale): score for scale, score in json.loads(path.read_text()).items()}
    return max(sorted(scores), key=lambda scale: scores[scale]), scores


def measured(
    shop: Workshop, model: Model, columns: Sequence[Column], side: str, versions: dict[str, str]
) -> dict[str, Metric]:
    """A model's metric in every column, from its result files where they are current."""
    encoder: Encoder | None = None
    metrics = {}
    for column in columns:
        path = shop.out / "results" / model.name / f"{column.task.name}.json"
        key = digest([shop.made_with, model.key, column.key, side])
        result = read_result(path, key)
        if result is None:
            if encoder is None:
                encoder = load_encoder(model.folder, dtype=torch.float32).model
            began = time.perf_counter()
            found = column.measure(encoder, column.data[side])
            seconds = time.perf_counter() - began
            result = EvalResult(
                model.name, column.task.name, column.kind, found, seconds, {"key": key}, versions
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, result.to_json())
        metrics[column.task.name] = result.metrics[0]
    return metrics


def _examples() -> Path:
    here = Path(__file__).resolve().parent
    for folder in (here / "examples", here.parents[1] / "examples"):
        if (folder / "demo-linear.yaml").is_file():
            return folder
    raise SutureError("the demo's recipes are not installed: run `make demo` in a clone of Suture")


# -- words -----------------------------------------------------------------------------------------


def _telling(say: Say, name: str) -> Callable[[Progress], None]:
    def tell(at: Progress) -> None:
        if at.step % max(1, at.steps // 4) == 0:
            speed = f"{at.examples_per_second:.0f} rows/s, {at.eta:.0f} s left"
            say(f"{name}: step {at.step} of {at.steps}, loss {at.loss:.3f}, {speed}")

    return tell


def _training(settings: TuneSettings, sides: Split) -> str:
    epochs = "1 epoch" if settings.epochs == 1 else f"{settings.epochs} epochs"
    return f"base fine-tuned on {len(sides.train)} rows, {epochs}, peak rate {settings.lr:g}"


def _counts(sides: Split) -> str:
    return f"{len(sides.train)} train, {len(sides.validation)} validation, {len(sides.test)} test"


def _scale_note(scale: float, scores: Mapping[float, float]) -> str:
    tried = ", ".join(f"{at:g}: {score:.3f}" for at, score in scores.items())
    return (
        f"The scale of {CHOSEN}, {scale:g}, has the best mean share of the expert on validation "
        f"rows ({tried}). All other methods run with fixed parameters."
    )


def _retrieval_note(shop: Workshop, base: Model, expert: Model, tokenizer: Tokenizer) -> str:
    rows = operations_rows()
    data = tokenise(rows, tokenizer, labels=labels_of(rows), max_length=64)
    found = []
    for model in (base, expert):
        path = shop.out / "results" / model.name / "retrieval.json"
        key = digest([shop.made_with, model.key, data.ids])
        result = read_result(path, key)
        if result is None:
            encoder = load_encoder(model.folder, dtype=torch.float32).model
            metrics = EVALS["neighbour"](encoder, data.batches(EVAL_BATCH))
            result = EvalResult(
                model.name, "retrieval", "neighbour", metrics, 0.0, {"key": key}, {}
            )
            write(path, result.to_json())
        metric = result.metrics[0]
        found.append(f"{metric.value:.2f} [{metric.low:.2f}, {metric.high:.2f}] for {model.name}")
    return (
        f"Nearest neighbour of a text is the other half of its pair: {', '.join(found)} (n = 88)."
    )
