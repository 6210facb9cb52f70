"""Query, key and value out of one packed tensor, as three; and back, bit for bit.

A mask that leaves values alone could not freeze them inside of a packed tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from suture.tensors.roles import role_of
from suture.training.persample import is_linear

PARTS = ("q_proj", "k_proj", "v_proj")


class ParameterPlace(NamedTuple):
    """Where the entries of a parameter stand in the files of its checkpoint."""

    name: str
    """Of the tensor in the file."""
    axis: int = 0
    start: int = 0
    stop: int | None = None
    """With these, the part of it along one axis; without an end, all of it."""

    def of(self, whole: Tensor) -> Tensor:
        """The view of the entries in the whole tensor."""
        if self.stop is None:
            return whole
        return whole.narrow(self.axis, self.start, self.stop - self.start)


class Unpacked(nn.Module):
    """Three products in the place of one; the outputs stand side by side, as before."""

    def __init__(self, packed: nn.Module, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        weight, bias = packed.get_parameter("weight"), getattr(packed, "bias", None)
        across = 0 if isinstance(packed, nn.Linear) else 1  # Conv1D stores (in, out)
        weights = torch.split(weight.detach(), list(sizes), across)
        biases = [None] * 3 if bias is None else torch.split(bias.detach(), list(sizes))
        for word, w, b, size in zip(PARTS, weights, biases, sizes, strict=True):
            part: Any
            if across == 0:
                part = nn.Linear(w.shape[1], size, bias=b is not None, device="meta")
            else:
                part = type(packed)(size, w.shape[0])
            part.weight = nn.Parameter(w.clone())
            if b is not None:
                part.bias = nn.Parameter(b.clone())
            self.add_module(word, part)

    def forward(self, x: Tensor) -> Tensor:
        """Queries, keys and values, side by side."""
        return torch.cat([self.get_submodule(word)(x) for word in PARTS], -1)


def unpack(model: nn.Module) -> dict[str, ParameterPlace]:
    """Replace packed projections in place; where each new parameter stood, by its name.

    Packings that interleave the heads (GPT-NeoX, BLOOM, Falcon) are left as they are.
    """
    places: dict[str, ParameterPlace] = {}
    config = getattr(model, "config", None)
    for prefix, module in list(model.named_modules()):
        if (
            not is_linear(module)
            or role_of(f"{prefix}.weight").kind != "qkv"
            or "query_key_value" in prefix
        ):
            continue
        weight = module.get_parameter("weight")
        across = 0 if isinstance(module, nn.Linear) else 1
        sizes = _sizes(weight.shape[across], config)
        if sizes is None:
            continue
        parent, _, own = prefix.rpartition(".")
        setattr(model.get_submodule(parent), own, Unpacked(module, sizes).train(module.training))
        start = 0
        for word, size in zip(PARTS, sizes, strict=True):
            places[f"{prefix}.{word}.weight"] = ParameterPlace(
                f"{prefix}.weight", across, start, start + size
            )
            if getattr(module, "bias", None) is not None:
                places[f"{prefix}.{word}.bias"] = ParameterPlace(
                    f"{prefix}.bias", 0, start, start + size
                )
            start += size
    return places


def _sizes(total: int, config: Any) -> tuple[int, int, int] | None:
    """Rows of queries, keys and values; ``None`` where the model's config does not tell."""
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    hidden = getattr(config, "hidden_size", None)
    if not heads or not groups or not hidden:
        return None
    dim = getattr(config, "head_dim", None) or hidden // heads
    sizes = heads * dim, groups * dim, groups * dim
    return sizes if sum(sizes) == total else None
