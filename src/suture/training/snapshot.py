"""Where a long run stands, on disk: tensors and plain facts in one safetensors file, never half.

A snapshot is written beside its place, synced and renamed, so that a kill at any moment leaves the
one before. There is no pickle in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from suture.checkpoints.atomic import replacing
from suture.errors import CheckpointError, OutputError


@dataclass(frozen=True)
class Snapshot:
    """Tensors by name, and facts that JSON can hold."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below ``prefix/``, by the rest of their names."""
        start = f"{prefix}/"
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}


def write_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Put a snapshot in the place of the one before, in one step.

    Raises:
        OutputError: the disk is full or refuses; the one before is still there.
    """
    tensors = {n: t.detach().cpu().contiguous() for n, t in snapshot.tensors.items()}
    try:
        with replacing(path) as partial:
            save_file(tensors, partial, {"facts": json.dumps(snapshot.facts)})
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        kept = "it was the first; with more room the same command starts anew"
        if path.is_file():
            kept = "the one before is kept, and the same command goes on from it"
        raise OutputError(f"{path}: the checkpoint cannot be written: {why}; {kept}") from error


def read_snapshot(path: Path, *, device: str = "cpu") -> Snapshot | None:
    """What ``write_snapshot`` wrote; ``None`` where nothing is.

    Raises:
        CheckpointError: the file is no snapshot.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt", device=device) as file:
            facts = json.loads(file.metadata()["facts"])
            return Snapshot({name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a checkpoint of a run: {error}; remove it to start anew"
        ) from error
