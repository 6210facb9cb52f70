"""A network in memory as a checkpoint, and a checkpoint put into a network; no file is touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.memory import TensorCheckpoint
from suture.errors import CheckpointError, MismatchError, Problems
from suture.tensors.spec import listed
from suture.training.models import (
    Classifier,
    Encoder,
    LanguageModel,
    file_names,
    files_of,
    named_in_files,
)


def open_network(
    module: nn.Module, *, label: str | None = None, config: Mapping[str, Any] | None = None,
    files: Path | None = None,
) -> TensorCheckpoint:  # fmt: skip
    """A network as a checkpoint under the names that its tensors have in files; nothing is copied.

    Tied tensors are held once. The head of a ``Classifier`` of ours is left out, as everywhere.

    Args:
        module: any ``nn.Module``; of transformers, its configuration is taken too.
        label: what to call it; default the name of its class.
        config: in the place of the module's own.
        files: where its tokenizer lies; default the folder, or the folder in the cache of the Hub,
            that transformers loaded it from, where that is still there.

    Raises:
        CheckpointError: a tensor has no values, or its dtype cannot be stored; LoRA layers are
            still in it.
    """
    inner = backbone_of(module)
    label = label or type(inner).__name__
    layers = [n for n, _ in inner.named_parameters() if ".lora_A." in n or ".lora_B." in n]
    if layers:
        raise CheckpointError(
            f"{label}: has adapters on it ({listed(layers, 2)}); call `merge_and_unload()` first, "
            "or save the adapter and name BASE+ADAPTER"
        )
    tensors = named_in_files(inner, inner.state_dict())
    own = own_config(inner) if config is None else dict(config)
    return TensorCheckpoint(tensors, label, config=own, folder=files or files_of(inner))


def backbone_of(module: nn.Module) -> nn.Module:
    """What is merged of a network: without the head and the wrappers of ours."""
    inner = module.encoder if isinstance(module, Classifier) else module
    found = inner.backbone if isinstance(inner, Encoder | LanguageModel) else inner
    assert isinstance(found, nn.Module)
    return found


def own_config(module: nn.Module) -> dict[str, Any]:
    """What ``config.json`` would say of a network; empty for one that has no configuration."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_json_string"):
        return {}
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    if dtype is not None:
        found["dtype"] = str(dtype).removeprefix("torch.")
    return found | {"architectures": [type(module).__name__]}


def load_into(module: nn.Module, source: Checkpoint) -> nn.Module:
    """Copy the tensors of a checkpoint into a network, which keeps its dtype and device.

    Args:
        module: takes the values; a wrapper of ours is looked through.
        source: has a tensor for each parameter and each buffer that a file would have.

    Returns:
        The module.

    Raises:
        MismatchError: a tensor is missing, has another shape, or has no place in the module; all
            problems at once, with nothing copied.
    """
    inner = backbone_of(module)
    own = dict(inner.state_dict(keep_vars=True))
    stored = file_names(inner)
    places = {stored.get(name, name): tensor for name, tensor in own.items()}
    names = {**{n: n for n in source.specs}, **source.aliases}
    who, problems = f"{source.label} into {type(inner).__name__}", Problems()
    filled = {(t.data_ptr(), t.shape) for n, t in places.items() if n in names}
    lacking = [n for n, t in places.items() if n not in names
               and (t.data_ptr(), t.shape) not in filled]  # fmt: skip
    beyond = sorted(n for n in source.specs if n not in places)
    if lacking:
        problems.add(MismatchError, f"{who}: lacks {listed(sorted(lacking))}")
    if beyond:
        problems.add(
            MismatchError,
            f"{who}: has no place for {listed(beyond)}; a network of another class, or one whose "
            "tensors transformers renames or joins: save it and load the folder",
        )
    fitting = {n: t for n, t in places.items() if n in names}
    for name, tensor in fitting.items():
        shape = source.specs[names[name]].shape
        if tuple(tensor.shape) != shape:
            problems.add(MismatchError, f"{who}: {name} is {list(shape)}, "
                                        f"not {list(tensor.shape)}")  # fmt: skip
    problems.raise_if_any()
    _copy(fitting, {name: source.tensor(names[name]) for name in fitting})
    return module


def _copy(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in places.items():
            tensor.copy_(values[name])


__all__ = ["backbone_of", "load_into", "open_network", "own_config"]
