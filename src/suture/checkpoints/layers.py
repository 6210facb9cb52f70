"""The layers of a model: how deep each tensor lies, and models cut and stacked anew.

A model is read from bottom to top: what stands below the layers (embeddings), the layers, and what
stands above them (the last norm, the head). A *stack* is the layers of one part of it, known by
what stands before their numbers, such as ``model.layers.``.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.views import LazyTensor, Same, View
from suture.errors import RecipeError
from suture.tensors.roles import layer_parts, role_of, tied_to

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers")
"""What a configuration may call the number of its layers."""
LISTS = ("mlp_only_layers", "full_attn_idxs", "cross_attention_layers", "moe_layer_indices")
"""Lists of a configuration that hold numbers of layers."""


def stacks(names: Iterable[str]) -> dict[str, int]:
    """How many layers each stack of a model has, by what stands before their numbers."""
    found: dict[str, int] = {}
    for name in names:
        parts = layer_parts(name)
        if parts is not None:
            found[parts[0]] = max(found.get(parts[0], 0), parts[1] + 1)
    return found


def depths(names: Iterable[str]) -> dict[str, float]:
    """How deep each tensor lies: 0 in the first layer of its stack, 1 in the last.

    Outside of layers it is 0; the only layer of a stack is its last.
    """
    names = list(names)
    numbers = stacks(names)
    found = {}
    for name in names:
        parts = layer_parts(name)
        found[name] = 0.0 if parts is None else depth_of(parts[1], numbers[parts[0]])
    return found


def depth_of(layer: int, layers: int) -> float:
    """The depth of a layer among so many: 0 for the first, 1 for the last and for the only one."""
    return layer / (layers - 1) if layers > 1 else 1.0


def below(name: str) -> bool:
    """Whether a tensor outside of the layers stands below them rather than above."""
    kind = role_of(name).kind
    if kind in ("head", "pooler"):
        return False
    # CLIP calls the norm between its patches and its layers so, in this spelling
    early = ("embed", "pre_layrnorm", "pre_layernorm")
    return kind in ("embedding", "position", "patch") or any(w in name.lower() for w in early)


class Stretch(NamedTuple):
    """Layers ``start`` to ``stop`` of a model, as layers ``at`` on of the output."""

    start: int
    stop: int
    at: int
    first: bool
    """Whether what stands below the layers belongs to it."""
    last: bool
    """Whether what stands above them does."""


def stack_of(model: Checkpoint) -> tuple[str, int]:
    """The only stack of a model and how many layers it has.

    Raises:
        RecipeError: it has none, or several.
    """
    found = stacks(model.specs)
    if len(found) != 1:
        told = ", ".join(f"{prefix}*: {n}" for prefix, n in sorted(found.items())) or "none"
        raise RecipeError(
            f"{model.label}: slices cut models that have one stack of layers; it has {told}"
        )
    return next(iter(found.items()))


def cut(
    model: Checkpoint, part: Stretch, heads: Collection[str] = ()
) -> tuple[View, dict[str, str]]:
    """A stretch of a model as a checkpoint of its own.

    Args:
        model: the whole one.
        part: which layers, and where they go.
        heads: names of heads that it must have, its embedding's values where it ties them.

    Returns:
        The view, and the model's own name of each of its tensors.

    Raises:
        RecipeError: the model has not so many layers, or not one stack of them.
    """
    _, layers = stack_of(model)
    if part.stop > layers:
        raise RecipeError(
            f"{model.label} has {layers} layers; [0, {layers}] are all, "
            f"[{part.start}, {part.stop}] goes beyond"
        )
    names: dict[str, str] = {}
    for name in model.specs:
        parts = layer_parts(name)
        if parts is not None:
            if part.start <= parts[1] < part.stop:
                names[f"{parts[0]}{parts[1] - part.start + part.at}{parts[2]}"] = name
        elif part.first if below(name) else part.last:
            names[name] = name
    for head in heads if part.last else ():
        tied = tied_to({head, *model.specs}).get(head)
        if head not in names and tied is not None:
            names[head] = tied
    lenses: dict[str, LazyTensor] = {new: Same(model, old) for new, old in names.items()}
    return View(model, lenses), names


def sliced_config(
    config: Mapping[str, Any], layers: int, origins: Sequence[tuple[Mapping[str, Any], int, int]]
) -> dict[str, Any]:
    """A configuration for other layers than its model had.

    Args:
        config: that of the model which stands for the output.
        layers: how many layers that model has.
        origins: for each layer of the output the configuration of the model it comes from, its
            number there, and how many layers that model has.
    """
    found = copy.deepcopy(dict(config))
    for part in (found, found.get("text_config")):
        if isinstance(part, dict):
            _recount(part, layers, origins, nested=part is not found)
    return found


def _recount(
    part: dict[str, Any], layers: int, origins: Sequence[tuple[Mapping[str, Any], int, int]],
    nested: bool,
) -> None:  # fmt: skip
    for key in COUNTS:
        if part.get(key) == layers:
            part[key] = len(origins)
    for key, value in list(part.items()):
        if not isinstance(value, list) or not value:
            continue
        theirs = [_listed(config, key, nested) for config, _, _ in origins]
        if key in LISTS:
            part[key] = [n for n, (_, i, _) in enumerate(origins) if i in theirs[n]]
        elif len(value) == layers and "layer" in key:
            part[key] = [
                own[i] if len(own) == count else value[min(i, layers - 1)]
                for own, (_, i, count) in zip(theirs, origins, strict=True)
            ]


def _listed(config: Mapping[str, Any], key: str, nested: bool) -> list[Any]:
    inner = config.get("text_config") if nested else config
    found = inner.get(key) if isinstance(inner, Mapping) else None
    return found if isinstance(found, list) else []
