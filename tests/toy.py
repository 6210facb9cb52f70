"""Small checkpoints made in code, and merges of them: what the tests of the merge core work on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from suture.merges.table import METHODS
from suture.tensors.roles import ParamSpace
from suture.tensors.spec import TensorSpec
from suture.testing.toys import invented, invented_stats
from suture.verbs.merge import VERB as merge
from suture.verbs.merge.result import MergeReport

__all__ = ["invented", "invented_stats"]  # and all below

Tensors = dict[str, torch.Tensor]

DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
}
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MIXED = ("f32", "bf16", "f16", "f64")
FLAVOURS = (*DTYPES, "mixed")

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
SCALAR = "model.layers.0.gain"
EMPTY = "model.layers.1.nothing.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
BUFFERS = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.position_ids", "model.seen")


def base_tensors(flavour: str = "f32", seed: int = 0) -> Tensors:
    """Two layers and everything that trips merges: buffers, a zero, a scalar, an empty tensor."""
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (VOCABULARY, HIDDEN),
        HEAD: (VOCABULARY, HIDDEN),
    }
    shapes |= {f"model.layers.{n}.{part}": shape for n in (0, 1) for part, shape in LAYER.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), ZERO: (3, 5), SCALAR: (), EMPTY: (0, 4)}
    found: Tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        kind = MIXED[number % 4] if flavour == "mixed" else flavour
        values = torch.randn(shape, generator=draw, dtype=torch.float64)
        found[name] = (torch.zeros(shape) if name == ZERO else values).to(DTYPES[kind])
    found[BUFFERS[0]] = torch.tensor([1.0, 0.1, 0.01])
    found[BUFFERS[1]] = torch.arange(2**24, 2**24 + 11)  # float32 cannot hold the odd ones
    found[BUFFERS[2]] = torch.tensor([True, False, True])
    return found


def tuned(base: Tensors, seed: int, spread: float = 0.1) -> Tensors:
    """What fine-tuning makes of ``base``: every floating tensor but buffers moves a little."""
    draw = torch.Generator().manual_seed(1000 + seed)
    found = {}
    for name, tensor in base.items():
        if name in BUFFERS or not tensor.is_floating_point():
            found[name] = tensor.clone()
            continue
        noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        found[name] = (tensor.double() + spread * noise).to(tensor.dtype)
    return found


def on_grid(base: Tensors, seed: int, step: float = 2.0**-4, most: int = 2) -> Tensors:
    """The same with few different deltas, multiples of ``step``: ties and cancellations."""
    draw = torch.Generator().manual_seed(2000 + seed)
    found = {}
    for name, tensor in base.items():
        if name in BUFFERS or not tensor.is_floating_point():
            found[name] = tensor.clone()
            continue
        steps = torch.randint(-most, most + 1, tensor.shape, generator=draw)
        found[name] = (tensor.double() + step * steps).to(tensor.dtype)
    return found


def grid_base(flavour: str = "f32", seed: int = 0, step: float = 2.0**-4) -> Tensors:
    """A base of few multiples of ``step``, so that every dtype holds all sums exactly."""
    return {
        name: (torch.round(t.double()).clamp(-1, 1) * step).to(t.dtype)
        if t.is_floating_point() and name not in BUFFERS
        else t
        for name, t in base_tensors(flavour, seed).items()
    }


def folder(
    where: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1, config: object = None
) -> Path:
    """Write a checkpoint folder, in one file or spread over shards with an index."""
    where.mkdir(parents=True)
    if config is not None:
        (where / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), where / "model.safetensors", metadata={"format": "pt"})
        return where
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = names[number::shards]
        save_file({n: tensors[n] for n in mine}, where / file)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (where / "model.safetensors.index.json").write_text(json.dumps(index))
    return where


def save_in_order(path: Path, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> Path:
    """Write one file whose header and bytes stand in the order of ``names``."""
    header: dict[str, Any] = {}
    body = b""
    for name in names:
        raw = raw_bytes(tensors[name])
        span = [len(body), len(body) + len(raw)]
        dtype, shape = NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor as a file holds them."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def read(where: Path) -> Tensors:
    """Every tensor of a folder, read by safetensors itself."""
    found: Tensors = {}
    for file in sorted(where.glob("*.safetensors")):
        found |= load_file(file)
    return found


def recipe(
    method: str,
    models: Mapping[str, Path],
    base: Path | None = None,
    *,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """A recipe as a mapping; keywords that are no section of it are parameters of the method."""
    known = {k: sections.pop(k) for k in ("space", "policy", "output") if k in sections}
    entries = {n: {"path": str(p), **(own or {}).get(n, {})} for n, p in models.items()}
    files = METHODS[method].example.files if method in METHODS else ()
    for which in files if "stats" not in sections else ():
        sections[which] = {n: str(invented_stats(Path(p), which)) for n, p in models.items()}
    found = {"method": method, "models": entries, "parameters": sections, **known}
    return found if base is None else {"base": str(base), **found}


def run(out: Path, what: Mapping[str, Any], **options: Any) -> tuple[Tensors, MergeReport]:
    """Follow a recipe into a new folder and read the result back."""
    report = merge(what, out, **options)
    return read(out), report


def editable(tensors: Mapping[str, torch.Tensor], space: ParamSpace | None = None) -> list[str]:
    """The names that a merge may touch, sorted."""
    specs = {n: TensorSpec(NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()}
    return (space or ParamSpace()).names(specs)


def files_digest(*places: Path) -> str:
    """One digest of every byte under some folders."""
    state = hashlib.sha256()
    for place in places:
        for file in sorted(p for p in place.rglob("*") if p.is_file()):
            state.update(file.name.encode() + file.read_bytes())
    return state.hexdigest()


def same_bytes(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """The names in which two models differ, in a bit, a shape or a dtype."""
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one
        or name not in other
        or (one[name].dtype, one[name].shape) != (other[name].dtype, other[name].shape)
        or raw_bytes(one[name]) != raw_bytes(other[name])
    ]


def ordered(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The values of a 16-bit float tensor as integers one apart where the values are neighbours."""
    bits = tensor.contiguous().reshape(-1).view(torch.int16).numpy().astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def steps_apart(one: torch.Tensor, other: torch.Tensor) -> np.ndarray[Any, Any]:
    """How many representable numbers lie between two 16-bit tensors, entry by entry."""
    return np.abs(ordered(one) - ordered(other))


def flat(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> np.ndarray[Any, Any]:
    """Some tensors as one float64 vector."""
    parts = [tensors[n].double().reshape(-1).numpy() for n in names]
    return np.concatenate(parts) if parts else np.zeros(0)
