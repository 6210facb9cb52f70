"""Exact top-k by magnitude with a stable sort: ties go to what stands first in sorted names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def layer_of(name: str) -> str:
    """The block that a name of the toy models belongs to."""
    parts = name.split(".")
    if "layers" in parts:
        return ".".join(parts[: parts.index("layers") + 2])
    return "outside: " + name


def groups(
    names: Sequence[str], scope: str, densities: Callable[[str], Sequence[float]]
) -> dict[Any, list[str]]:
    """Which tensors compete with each other: the same scope and the same densities."""
    found: dict[Any, list[str]] = {}
    for name in sorted(names):
        where = {"global": "", "layer": layer_of(name), "tensor": name}[scope]
        found.setdefault((where, tuple(densities(name))), []).append(name)
    return found


def largest(values: Array, wanted: int) -> Array:
    """Booleans: the ``wanted`` entries of largest magnitude, the first of equals, never a zero."""
    sizes = np.abs(values.astype(np.float32))
    order = np.argsort(-sizes, kind="stable")[:wanted]
    kept = np.zeros(values.size, bool)
    kept[order] = True
    return kept & (sizes > 0)


def kept(
    deltas: Mapping[str, Array],
    names: Sequence[str],
    density: Callable[[str], Sequence[float]],
    model: int,
    scope: str,
    count: Callable[[float, int], int] = lambda share, n: round(share * n),
) -> dict[str, Array]:
    """The mask of one model's task vector, by name, flattened."""
    masks: dict[str, Array] = {}
    for (_, shares), members in groups(names, scope, density).items():
        vector = np.concatenate([deltas[name].reshape(-1) for name in members])
        chosen = largest(vector, count(shares[model], vector.size))
        for name in members:
            size = deltas[name].size
            masks[name], chosen = chosen[:size], chosen[size:]
    return masks
