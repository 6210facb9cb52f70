"""Small checkpoints made in code, on disk: what the laws of merge methods are held on; no torch."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from suture.checkpoints.checkpoint import open_checkpoint
from suture.edits.stats import Stats
from suture.tensors.roles import ParamSpace
from suture.tensors.spec import TensorSpec

Array = np.ndarray[Any, Any]
FLAVOURS: Mapping[str, Sequence[str]] = {
    "f32": ("F32",), "bf16": ("BF16",), "f16": ("F16",), "f64": ("F64",),
    "mixed": ("F32", "BF16", "F16", "F64"),
}  # fmt: skip
"""Dtypes of the tensors of a family, in turn."""
PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "|u1", "BOOL": "|b1"}
"""Dtypes that numpy knows."""
MODELS = ("ada", "bob", "cyd")


class Cells(NamedTuple):
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes

    @property
    def floating(self) -> bool:
        """Whether its entries are floating-point numbers."""
        return self.dtype in ("F64", "F32", "F16", "BF16")

    @property
    def numbers(self) -> Array:
        """Its entries as float64 of its shape, exactly."""
        if self.dtype == "BF16":
            words = np.frombuffer(self.raw, "<u2").astype(np.uint32) << 16
            return words.view(np.float32).astype(np.float64).reshape(self.shape)
        return np.frombuffer(self.raw, PLAIN[self.dtype]).astype(np.float64).reshape(self.shape)


Tensors = dict[str, Cells]


def cells(values: Array, dtype: str) -> Cells:
    """Return numbers as a tensor of a dtype, rounded to the nearest, ties to even."""
    values = np.asarray(values)
    if dtype != "BF16":
        return Cells(dtype, values.shape, values.astype(PLAIN[dtype]).tobytes())
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    words = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return Cells(dtype, values.shape, words.tobytes())


HIDDEN, INNER, VOCABULARY = 8, 20, 23
LAYER = {
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.q_proj.bias": (HIDDEN,),
    "mlp.gate_proj.weight": (INNER, HIDDEN),
    "mlp.up_proj.weight": (INNER, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INNER),
    "input_layernorm.weight": (HIDDEN,),
}
ZERO = "model.layers.1.adapter.zero.weight"
SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "lm_head.weight": (VOCABULARY, HIDDEN),
    **{f"model.layers.{n}.{part}": shape for n in (0, 1) for part, shape in LAYER.items()},
    "model.norm.weight": (HIDDEN,),
    ZERO: (3, 5),
    "model.layers.0.gain": (),
    "model.layers.1.nothing.weight": (0, 4),
}
"""Two layers and what trips merges: a zero, a scalar, an empty tensor; buffers come beside."""
STEP = 2.0**-4


def family(flavour: str, grid: bool) -> tuple[Tensors, dict[str, Tensors]]:
    """Return a base and three models that were made of it.

    Args:
        flavour: a key of ``FLAVOURS``.
        grid: whether values are few multiples of ``STEP``, with ties and cancellations.
    """
    draw, base = np.random.default_rng(0), {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        kinds = FLAVOURS[flavour]
        values = np.zeros(shape) if name == ZERO else draw.standard_normal(shape)
        if grid:
            values = np.clip(np.round(values), -1, 1) * STEP
        base[name] = cells(values, kinds[number % len(kinds)])
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": cells(np.array([1.0, 0.1, 0.01]), "F32"),
        # float32 cannot hold the odd ones
        "model.position_ids": cells(np.arange(2**24, 2**24 + 11), "I64"),
        "model.seen": cells(np.array([True, False, True]), "BOOL"),
    }
    models = {}
    for seed, model in enumerate(MODELS):
        draw = np.random.default_rng(1000 + seed)
        models[model] = {n: _moved(t, draw, grid) for n, t in base.items()} | buffers
    return base | buffers, models


def _moved(tensor: Cells, draw: np.random.Generator, grid: bool) -> Cells:
    """A tensor after fine-tuning."""
    if grid:
        change: Any = STEP * draw.integers(-2, 3, tensor.shape)
    else:
        change = 0.1 * draw.standard_normal(tensor.shape)
    return cells(tensor.numbers + change, tensor.dtype)


def large() -> tuple[Tensors, dict[str, Tensors]]:
    """Return a base and two bfloat16 models of more than one piece (2**20 entries) in a tensor."""
    shapes: Mapping[str, tuple[int, ...]] = {
        "model.layers.0.mlp.up_proj.weight": (1100, 1000),
        "model.layers.0.self_attn.q_proj.weight": (70, 1001),
        "model.layers.1.mlp.up_proj.weight": (17, 13),
        "model.norm.weight": (5,),
        "model.scalar": (),
    }
    draw = np.random.default_rng(7)
    base = {n: cells(draw.standard_normal(s), "BF16") for n, s in shapes.items()}
    models = {
        model: {n: cells(t.numbers + 0.01 * draw.standard_normal(t.shape), "BF16")
                for n, t in base.items()}
        for model in MODELS[:2]
    }  # fmt: skip
    return base, models


def write(where: Path, tensors: Mapping[str, Cells], shards: int = 1) -> Path:
    """Write a checkpoint folder in the order of the mapping, in one file or in several."""
    where.mkdir(parents=True)
    if shards == 1:
        _write(where / "model.safetensors", tensors)
        return where
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        _write(where / file, {n: tensors[n] for n in names[number::shards]})
        weight_map |= dict.fromkeys(names[number::shards], file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (where / "model.safetensors.index.json").write_text(json.dumps(index))
    return where


def _write(path: Path, tensors: Mapping[str, Cells]) -> None:
    header, at = {}, 0
    for name, tensor in tensors.items():
        span = [at, at + len(tensor.raw)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": span}
        at += len(tensor.raw)
    text = json.dumps(header).encode()
    body = b"".join(t.raw for t in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def read(where: Path) -> Tensors:
    """Return every tensor of a folder, by name."""
    checkpoint = open_checkpoint(where)
    tensors = {}
    for name, spec in checkpoint.specs.items():
        raw = np.empty(spec.nbytes, np.uint8)
        checkpoint.read_into(name, 0, raw)
        tensors[name] = Cells(spec.dtype, spec.shape, raw.tobytes())
    return tensors


def merged_names(tensors: Mapping[str, Cells]) -> list[str]:
    """Return the names that a merge may touch, sorted."""
    return ParamSpace().names({n: TensorSpec(t.dtype, t.shape) for n, t in tensors.items()})


def invented(model: str, name: str, shape: tuple[int, ...]) -> dict[str, Array]:
    """Return statistics of a tensor of a model by kind; they depend on the two names alone."""
    draw = np.random.default_rng(zlib.crc32(f"{model} {name}".encode()))
    found: dict[str, Array] = {"fisher": draw.random(shape, np.float32)}
    # another draw for the base, from the same name: LED scores both
    for place, kind in (("", "abs_grad"), ("base ", "base")):
        own = np.random.default_rng(zlib.crc32(f"{place}{model} {name} grad".encode()))
        found[kind] = own.random(shape, np.float32)
    if len(shape) == 2 and min(shape) > 0 and shape[1] < 2000:
        x = draw.standard_normal((2 * shape[1], shape[1]), np.float32)
        found["gram"] = x.T @ x / len(x)
    return found


def invented_stats(model: Path, which: str = "stats") -> Path:
    """Return a file of statistics of every kind that a merge reads, for the tensors of a model."""
    place = model if model.is_dir() else model.parent
    path = place.parent / f".{place.name}.{which}.safetensors"
    if not path.exists():
        tensors = {"gram/none": np.eye(2, dtype=np.float32)}
        for name, spec in open_checkpoint(place).specs.items():
            kinds = invented(place.name, name, spec.shape)
            base = kinds.pop("base")
            if which == "base_stats":
                kinds["abs_grad"] = base
            tensors |= {f"{kind}/{name}": values for kind, values in kinds.items()}
        Stats(tensors, {}, "").save(path)
    return path


@dataclass(frozen=True)
class Family:
    """A base and models that were made of it, in memory and on disk; nobody may change them."""

    base: Tensors
    models: Mapping[str, Tensors]
    base_path: Path
    paths: Mapping[str, Path]

    @property
    def names(self) -> list[str]:
        """What a merge may touch, sorted."""
        return merged_names(self.base)


class Lab:
    """A folder for families, made once, and for outputs.

    Args:
        where: an empty folder.
    """

    def __init__(self, where: Path) -> None:
        self.where = where
        self._families: dict[str, Family] = {}
        self._outputs = 0

    def family(self, flavour: str = "f32", *, grid: bool = False) -> Family:
        """Return a family of a flavour."""
        return self._family(f"{flavour}-{grid}", lambda: family(flavour, grid))

    def large(self) -> Family:
        """Return the one of large models."""
        return self._family("large", large)

    def _family(self, key: str, make: Callable[[], tuple[Tensors, dict[str, Tensors]]]) -> Family:
        if key not in self._families:
            base, models = make()
            where = self.where / key
            paths = {name: write(where / name, t) for name, t in models.items()}
            self._families[key] = Family(base, models, write(where / "base", base), paths)
        return self._families[key]

    def place(self) -> Path:
        """Return the path of a folder that is not there yet."""
        self._outputs += 1
        return self.where / f"out-{self._outputs}"

    def put(self, tensors: Mapping[str, Cells], shards: int = 1) -> Path:
        """Write a model into a new folder."""
        return write(self.place(), tensors, shards)


def different(one: Mapping[str, Cells], other: Mapping[str, Cells]) -> list[str]:
    """Return the names in which two models differ, in a bit, a shape or a dtype."""
    return [n for n in sorted(one.keys() | other.keys()) if one.get(n) != other.get(n)]


def digest(places: Iterable[Path]) -> int:
    """Return one checksum of every name and byte under some folders."""
    state = 0
    for place in places:
        for file in sorted(p for p in place.rglob("*") if p.is_file()):
            state = zlib.crc32(file.name.encode() + file.read_bytes(), state)
    return state


__all__ = [
    "FLAVOURS", "MODELS", "Cells", "Family", "Lab", "Tensors", "cells", "different", "digest",
    "invented", "invented_stats", "merged_names", "read", "write",
]  # fmt: skip
