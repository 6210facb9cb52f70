"""What the demo makes, once: a folder where each thing says what it was made from."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from suture.data import Dataset, Row
from suture.errors import OutputError, SutureError
from suture.evals import EvalResult, Metric
from suture.models import Encoder
from suture.report import Kind, Task

Say = Callable[[str], None]
EVAL_BATCH = 64


@dataclass(frozen=True)
class Model:
    """A row of the table before it is measured."""

    name: str
    kind: Kind
    folder: Path
    key: str
    """Identifies its weights."""
    about: str
    seconds: float = 0.0


Measure = Callable[[Encoder, Dataset], tuple[Metric, ...]]


@dataclass(frozen=True)
class Column:
    """A task, ready to measure encoders on."""

    task: Task
    kind: str
    """The evaluation."""
    key: str
    """Identifies data and head."""
    data: Mapping[str, Dataset]
    """By side: ``validation``, ``test``."""
    measure: Measure
    head: Path | None = None
    """The file of its head, where it has one."""
    few: Sequence[Row] = ()
    """Some training rows of each label, from which regions are found."""
    max_length: int = 64
    """Tokens of a row."""


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
            raise OutputError(f"{path} was not made by the demo; choose another folder")
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


def read_result(path: Path, key: str) -> EvalResult | None:
    """A result from its file, if it was made from what ``key`` identifies."""
    try:
        result = EvalResult.from_json(path.read_text(encoding="utf-8"))
    except (OSError, SutureError):
        return None
    return result if result.inputs.get("key") == key else None


@contextmanager
def limited(number: int) -> Iterator[None]:
    """Let torch use so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
