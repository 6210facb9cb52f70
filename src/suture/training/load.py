"""A tuned folder as the model it is: with its head, and linearized where it says so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from suture.checkpoints.checkpoint import Checkpoint, open_checkpoint
from suture.checkpoints.headers import read_json
from suture.checkpoints.linearized import LINEARIZED, RECORD_LIMIT, form_of
from suture.errors import CheckpointError, MismatchError
from suture.merges.apply import checkpoint_fingerprint
from suture.training.models import (
    Classifier,
    Encoder,
    LanguageModel,
    load_encoder,
    load_head,
    load_image_encoder,
    load_language_model,
    reads_images,
)


def load_tuned(
    folder: str | os.PathLike[str], *, head: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None, device: str = "cpu",
    weights: Checkpoint | None = None, dtype: torch.dtype = torch.float32,
) -> nn.Module:  # fmt: skip
    """Load what ``suture finetune`` wrote, or a merge of such folders, ready to be evaluated.

    Args:
        folder: the folder.
        head: the head of the task; by default the one in the folder, if there is one.
        base: what a linearized model is linearized around; by default where its record says.
        device: where to.
        weights: the tensors, where they lie in memory and the folder has none.
        dtype: of a language model; encoders and linearized models are float32 always.

    Raises:
        CheckpointError: the folder holds no such model.
        MismatchError: the base is not the one it was trained on.

    Examples:
        >>> import suture
        >>> suture.load_tuned("nowhere")
        Traceback (most recent call last):
        suture.errors.CheckpointError: nowhere: no such file or folder (looked for nowhere)
    """
    folder, base = Path(folder), None if base is None else Path(base)
    beside = folder / "head.safetensors"
    head = Path(head) if head is not None else beside if beside.is_file() else None
    checkpoint = open_checkpoint(folder) if weights is None else weights
    if form_of(checkpoint).kind != LINEARIZED:
        body = _body(folder, head, device, weights, dtype)
        if head and isinstance(body, Encoder):
            return Classifier(body, load_head(head, device=device)).eval()
        return body

    from suture.training.tangent import LinearizedBody

    inputs = read_json(folder / "suture.json", RECORD_LIMIT).get("inputs", {}).get("base", {})
    where = base or folder / str(inputs.get("path", ""))
    if not where.is_dir():
        raise CheckpointError(
            f"{folder}: is linearized around a base that is not at {where}; name the base"
        )
    found = checkpoint_fingerprint(open_checkpoint(where))
    if found != inputs.get("fingerprint"):
        raise MismatchError(
            f"{where}: is not the base of {folder} (its fingerprint is {found}, "
            f"not {inputs.get('fingerprint')})"
        )
    start, end = _body(where, head, device), _body(folder, head, device)
    moved = dict(end.named_parameters())
    with torch.no_grad():
        tau = {n: moved[n] - p for n, p in start.named_parameters()}
    start.requires_grad_(False)
    linear = LinearizedBody(start, tau)
    if head and isinstance(start, Encoder):
        return Classifier(start, load_head(head, device=device)).with_body(linear).eval()
    return linear.eval()


def _body(
    folder: Path, head: Path | None, device: str, weights: Checkpoint | None = None,
    dtype: torch.dtype = torch.float32,
) -> Encoder | LanguageModel:  # fmt: skip
    config = read_json(folder / "config.json")
    names = config.get("architectures") or [""]
    causal = any(word in names[0] for word in ("ForCausalLM", "LMHeadModel"))
    if causal and head is None:
        return load_language_model(folder, device=device, dtype=dtype, weights=weights).model
    return encoder_of(config, folder, device, weights)


def encoder_of(
    config: Mapping[str, Any], folder: Path, device: str, weights: Checkpoint | None = None
) -> Encoder:
    """The encoder of a folder, of texts or of images, in float32.

    Raises:
        CheckpointError: the folder holds no such model.
    """
    if reads_images(config):
        return load_image_encoder(folder, device=device, dtype=torch.float32, weights=weights)
    return load_encoder(folder, device=device, dtype=torch.float32, weights=weights).model
