"""Checkpoints made of others: the same tensors under other names, or values computed when read.

A view is a checkpoint like any other to everything that reads one. Each of its tensors has a *lens*
that knows how to fill bytes from any element on; nothing is copied and nothing is kept. A lens must
give the same bytes whatever stretch it is asked for, and from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from suture.checkpoints.checkpoint import BytePlace, Checkpoint, ties_embeddings
from suture.tensors.roles import tied_to
from suture.tensors.spec import TensorSpec

Array = np.ndarray[Any, Any]


class LazyTensor(Protocol):
    """How one tensor of a view is read."""

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype of what is read."""

    @property
    def origin(self) -> tuple[Checkpoint, str]:
        """The tensor it mainly comes from: named in messages, and read in its file's order."""

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """Every checkpoint it reads."""

    @property
    def identity(self) -> object:
        """What else decides the bytes, as plain data; ``None`` where they are the origin's own."""

    def read(self, start: int, raw: Array) -> None:
        """Fill the bytes ``raw`` (uint8) from element ``start`` on."""


class Same:
    """A tensor as it is, perhaps under another name."""

    identity: object = None

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.origin = (checkpoint, name)
        self.sources = (checkpoint,)

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype of the original."""
        return self.origin[0].specs[self.origin[1]]

    def read(self, start: int, raw: Array) -> None:
        """Fill the bytes ``raw`` from element ``start`` of the original."""
        self.origin[0].read_into(self.origin[1], start, raw)


class View(Checkpoint):
    """A checkpoint whose tensors are read through lenses.

    Args:
        origin: the checkpoint it is named after, whose folder and config it has.
        lenses: how each tensor is read, by the name that it has in the view.
        config: what stands in for the origin's ``config.json``, where that no longer fits.
    """

    def __init__(
        self,
        origin: Checkpoint,
        lenses: Mapping[str, LazyTensor],
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.label, self.folder = origin.path, origin.label, origin.folder
        self.lenses = dict(lenses)
        self.origins = list(
            dict.fromkeys([origin, *(s for n in lenses for s in lenses[n].sources)])
        )
        """Every checkpoint that is read, the one it is named after first."""
        self.restricted = any(checkpoint.restricted for checkpoint in self.origins)
        self.specs = {name: lens.spec for name, lens in self.lenses.items()}
        starts: dict[Checkpoint, int] = {}
        self.files = []
        for checkpoint in self.origins:
            starts[checkpoint] = len(self.files)
            self.files += checkpoint.files
        self.places = {}
        for name, lens in self.lenses.items():
            checkpoint, inner = lens.origin
            place = checkpoint.places[inner]
            self.places[name] = BytePlace(starts[checkpoint] + place.file, place.offset)
        self.aliases = {
            a: n for a, n in origin.aliases.items() if n in self.specs and a not in self.specs
        }
        self.config = dict(origin.config if config is None else config)
        self.identity = [
            *(i for checkpoint in self.origins for i in checkpoint.identity),
            *([n, self.lenses[n].origin[1], self.lenses[n].identity] for n in sorted(self.lenses)),
        ]
        self._descriptors = {}
        self._lock = threading.Lock()

    def read_into(self, name: str, start: int, raw: Array) -> None:
        """Fill the bytes ``raw`` from element ``start`` of a tensor. Safe from any thread."""
        self.lenses[name].read(start, raw)

    def close(self) -> None:
        """Close the files of all origins; they are opened again when something is read."""
        for checkpoint in self.origins:
            checkpoint.close()

    def check_unchanged(self) -> None:
        """Refuse what was read from files that somebody wrote to meanwhile.

        Raises:
            CheckpointError: a file that was read is not the one whose header was read.
        """
        for checkpoint in self.origins:
            checkpoint.check_unchanged()

    def untied(self) -> list[str]:
        """Aliases of the origin whose bytes differ from the tensor they should be tied to."""
        origin = self.origins[0]
        return [a for a in origin.untied() if origin.aliases[a] in self.specs]

    def stored(self, name: str) -> str:
        """The dtype in the file that a tensor mainly comes from."""
        checkpoint, inner = self.lenses[name].origin
        return checkpoint.stored(inner)

    def as_stored(self, name: str) -> bool:
        """Whether a tensor is read just as its file has it, under its own name."""
        lens = self.lenses[name]
        checkpoint, inner = lens.origin
        return isinstance(lens, Same) and inner == name and checkpoint.as_stored(name)


class Planned(Checkpoint):
    """A checkpoint that is still to be made: its header is known, its values are not.

    Args:
        name: what the recipe calls it.
        folder: where it will be.
        specs: its tensors.
        config: its ``config.json``.
    """

    def __init__(
        self, name: str, folder: Path, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]
    ) -> None:
        self.path, self.label, self.folder, self.files = folder, name, folder, []
        self.config = dict(config)
        self.aliases = tied_to(specs.keys()) if ties_embeddings(self.config) else {}
        self.specs = {n: spec for n, spec in specs.items() if n not in self.aliases}
        self.places = {n: BytePlace(0, 0) for n in self.specs}
        self.identity = []
        self._descriptors = {}
        self._lock = threading.Lock()

    def read_into(self, name: str, start: int, raw: Array) -> None:
        """Nothing of it can be read yet."""
        raise AssertionError(f"{self.label}: {name} was read before it was made")

    def untied(self) -> list[str]:
        """Nothing is known of its values."""
        return []


__all__ = ["LazyTensor", "Planned", "Same", "View"]
