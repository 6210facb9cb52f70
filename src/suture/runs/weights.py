"""Trained weights, put into the files of the checkpoint that training started from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from suture.checkpoints.checkpoint import Checkpoint, open_checkpoint
from suture.checkpoints.writer import index_of, plan_shards
from suture.errors import OutputError
from suture.merges.apply import checkpoint_fingerprint, output_specs
from suture.tensors.spec import DTYPES
from suture.training.packed import ParameterPlace

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_weights(
    base: Checkpoint,
    trained: Mapping[str, Tensor],
    places: Mapping[str, ParameterPlace],
    dtype: str | None,
    folder: Path,
) -> str:
    """Write ``model*.safetensors``; the fingerprint of what was written.

    What was not trained is copied byte for byte, unless another dtype is asked for.

    Args:
        base: the checkpoint that training started from.
        trained: parameters by name, as they are now.
        places: where each stands in the base's files.
        dtype: of floating tensors in the output; ``None`` keeps the base's.
        folder: an empty folder.

    Raises:
        OutputError: the disk is full or refuses.
    """
    inside: dict[str, list[str]] = {}
    for name in trained:
        inside.setdefault(places[name].name, []).append(name)
    specs = output_specs(base, dtype)
    shards = plan_shards(specs)
    try:
        for shard in shards:
            with (folder / shard.name).open("wb") as file:
                file.write(shard.header)
                for name, at in sorted(shard.offsets.items(), key=lambda pair: pair[1]):
                    assert file.tell() == at
                    value, own = base.tensor(name), inside.get(name, [])
                    if len(own) == 1 and places[own[0]].stop is None:
                        value = trained[own[0]].detach().cpu()
                    elif own:
                        value = value.clone()
                        for one in own:
                            part = places[one].of(value)
                            part.copy_(trained[one].detach().to("cpu", value.dtype))
                    if DTYPES[specs[name].dtype].computable:
                        value = value.to(TORCH[specs[name].dtype])
                    raw = (
                        value.contiguous().reshape(-1).view(torch.uint8).numpy()
                        if value.numel()
                        else np.empty(0, np.uint8)
                    )
                    file.write(raw.data)
                file.flush()
                os.fsync(file.fileno())
        index = index_of(shards, specs)
        if index is not None:
            (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    except OSError as error:
        raise disk_error(folder, error) from error
    return checkpoint_fingerprint(open_checkpoint(folder))


def disk_error(folder: Path, error: OSError | SafetensorError) -> OutputError:
    """Return what is said when the disk refuses; what was trained is kept."""
    why = getattr(error, "strerror", None) or error
    return OutputError(
        f"{folder}: {why}; the training is kept, and the same command goes on from it"
    )
