"""What a user may call a model, opened: a file, a folder, a hub id, a base with adapters on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from suture.checkpoints.checkpoint import Checkpoint, locate, open_checkpoint
from suture.errors import CheckpointError, MismatchError, Problems
from suture.schema.paths import place_of


def open_model(
    model: str | os.PathLike[str], near: Path | None = None, base: Checkpoint | None = None
) -> Checkpoint:
    """Open a model; headers only.

    ``BASE+ADAPTER`` is a base with a LoRA adapter on it, ``BASE+ONE+OTHER`` with two. An adapter
    alone is put on ``base`` where there is one.

    Args:
        model: a safetensors or GGUF file, a (sharded) folder, a hub id with an optional
            ``@revision``, or such a one and adapters, joined by ``+``.
        near: the folder where relative paths start; by default the current one.
        base: what an adapter without a base is put on.

    Raises:
        CheckpointError: there is nothing there, or it is not a readable model.
        MismatchError: an adapter does not fit its base.
    """
    first, *rest = parts_of(os.fspath(model), near)
    if base is not None and first and _may_be_adapter(locate(first, near)):
        found, rest = base, [first, *rest]
    else:
        found = _open_whole(first, near)
    return _with_adapters(found, rest, near) if rest else found


def _may_be_adapter(path: Path) -> bool:
    if not (path / "adapter_config.json").is_file():
        return False
    from suture.checkpoints.adapters import is_adapter

    return is_adapter(path)


def _with_adapters(found: Checkpoint, rest: list[str], near: Path | None) -> Checkpoint:
    from suture.checkpoints.adapters import adapted, is_adapter, open_adapter

    for part in rest:
        folder = locate(part, near)
        if not is_adapter(folder):
            raise CheckpointError(
                f"{part}: not a LoRA adapter: a folder with adapter_config.json is what can be "
                f"added to {found.label}"
            )
        found = adapted(found, open_adapter(folder, part))
    return found


def _open_whole(text: str, near: Path | None) -> Checkpoint:
    where = locate(text, near) if text else None
    if where is not None and (where.suffix == ".gguf" or any(where.glob("*.gguf"))):
        from suture.checkpoints.gguf import find_gguf, open_gguf

        gguf = find_gguf(where, text)
        if gguf is not None:
            return open_gguf(gguf, text)
    return open_checkpoint(text, near)


def parts_of(text: str, near: Path | None = None) -> list[str]:
    """Cut a model's name at each ``+`` that is not part of the name of a file."""
    pieces = text.split("+")
    parts = []
    while pieces:
        number = next(
            (n for n in range(len(pieces), 1, -1) if _exists("+".join(pieces[:n]), near)), 1
        )
        parts.append("+".join(pieces[:number]))
        pieces = pieces[number:]
    return parts


def _exists(text: str, near: Path | None) -> bool:
    try:
        return place_of(text, near).exists()
    except OSError:
        return False


def check_ties(inputs: Mapping[str, Checkpoint]) -> None:
    """Refuse checkpoints that hold two different tensors which their config says are one.

    Raises:
        MismatchError: names them.
    """
    problems = Problems()
    for label, checkpoint in inputs.items():
        for alias in checkpoint.untied():
            problems.add(
                MismatchError,
                f"{label}: config.json ties {alias} to {checkpoint.aliases[alias]}, but they "
                "differ in the file; set tie_word_embeddings to false there, or remove one",
            )
    problems.raise_if_any()
