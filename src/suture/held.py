"""A checkpoint whose tensors are in memory and in no file: a merge that is only tried.

Small files, configuration and tokenizer, lie in a folder as those of every model do.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from suture.checkpoint import Checkpoint, Place, ties_embeddings
from suture.headers import read_json
from suture.roles import tied_to
from suture.spec import DTYPES, TensorSpec

Array = np.ndarray[Any, Any]


class Held(Checkpoint):
    """Tensors in memory, empty until somebody writes them.

    Args:
        label: what to call it.
        folder: where ``config.json`` and the tokenizer lie; no weights are looked for there.
        specs: its tensors.
    """

    def __init__(self, label: str, folder: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path, self.label, self.folder, self.files = folder, label, folder, []
        config = folder / "config.json"
        self.config = read_json(config) if config.is_file() else {}
        self.aliases = tied_to(specs.keys()) if ties_embeddings(self.config) else {}
        self.specs = {name: spec for name, spec in specs.items() if name not in self.aliases}
        self.places = {name: Place(0, 0) for name in self.specs}
        self.identity = []
        self.bytes: dict[str, Array] = {}
        self._descriptors = {}
        self._lock = threading.Lock()

    def read_into(self, name: str, start: int, raw: Array) -> None:
        """Fill the bytes ``raw`` (uint8) from element ``start`` of a tensor."""
        first = start * DTYPES[self.specs[name].dtype].itemsize
        raw[:] = self.bytes[name][first : first + raw.size]

    def whole(self, name: str) -> Array:
        """The bytes of a whole tensor, themselves and no copy: a network may lie on them."""
        return self.bytes[name]

    def untied(self) -> list[str]:
        """None: every tensor stands there once."""
        return []

    def drop(self) -> None:
        """Give the memory back."""
        self.bytes = {}


class Sink:
    """What a merge writes into when it publishes nothing; keeps tensors only if told to.

    Args:
        specs: the tensors to come.
        kept: takes them; ``None`` lets every byte go, where only fingerprints are asked for.
    """

    resumed = False

    def __init__(self, specs: Mapping[str, TensorSpec], kept: dict[str, Array] | None) -> None:
        self.specs, self.kept = specs, kept
        if kept is not None:
            kept.update({name: np.empty(spec.nbytes, np.uint8) for name, spec in specs.items()})

    def journal(self) -> list[list[Any]]:
        """Nothing: what is tried is not resumed."""
        return []

    def record(self, line: list[Any]) -> None:
        """Nothing is noted."""

    def write(self, name: str, start: int, raw: Array) -> None:
        """Take the bytes ``raw`` (uint8) from element ``start`` of a tensor. Any thread may."""
        if self.kept is not None:
            first = start * DTYPES[self.specs[name].dtype].itemsize
            self.kept[name][first : first + raw.size] = raw

    def read_back(self, name: str, start: int, raw: Array) -> None:
        """Never asked for: no earlier run has left anything."""
        raise AssertionError(f"{name}: nothing of an earlier run is kept")


class Beside:
    """Takes the small files of a model into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add_file(self, name: str, content: bytes | str) -> None:
        """Put one file there."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


__all__ = ["Beside", "Held", "Sink"]
