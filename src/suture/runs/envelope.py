"""How records name their inputs: hub ids, or paths relative to the output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint, address, is_from_hub


def portable(checkpoint: Checkpoint, out: Path) -> str:
    """A hub id as it is; a path relative to the output, so that both can move together."""
    if checkpoint.put_on is not None:
        return f"{portable(checkpoint.put_on, out)}+{adapter_place(checkpoint.adapters[-1], out)}"
    if is_from_hub(checkpoint):
        return checkpoint.label
    if checkpoint.in_memory:
        return address(checkpoint)
    return os.path.relpath(checkpoint.path, out)


def adapter_place(adapter: Any, out: Path) -> str:
    """Return an adapter's hub id, or its path relative to the output."""
    if adapter.folder.parent.name == "snapshots":
        return str(adapter.label)
    return os.path.relpath(adapter.folder, out)
