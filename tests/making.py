"""What the robustness tests are made with: files byte by byte, tiny models, recipes, the command line.

Nothing here uses Suture to read or write a tensor, so that a fault of ours cannot hide itself.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8,
          "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip
NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
    "BOOL": "?",
}


class Raw(NamedTuple):
    """One tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def values(self) -> np.ndarray:
        """The numbers, bfloat16 as float32."""
        if self.dtype == "BF16":
            short = np.frombuffer(self.data, "<u2").astype(np.uint32) << 16
            return short.view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, NUMPY[self.dtype]).reshape(self.shape)


Tensors = dict[str, Raw]


def packed(values: Any, dtype: str = "F32") -> Raw:
    """Numbers as a tensor of ``dtype``; bfloat16 is rounded to nearest even."""
    values = np.asarray(values)
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        short = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return Raw(dtype, values.shape, short.tobytes())
    return Raw(dtype, values.shape, np.ascontiguousarray(values, NUMPY[dtype]).tobytes())


def file_of(
    header: Mapping[str, Any] | bytes, data: bytes = b"", *, length: int | None = None
) -> bytes:
    """A safetensors file with exactly this header, right or wrong; ``length`` may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def safetensors(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """A right safetensors file, in the order of ``tensors``."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        header[name] = entry(tensor.dtype, list(tensor.shape), end, end + len(tensor.data))
        end += len(tensor.data)
    return file_of(header, b"".join(t.data for t in tensors.values()))


def read_file(path: Path) -> Tensors:
    """Every tensor of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    found = {}
    for name, e in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = (8 + length + o for o in e["data_offsets"])
            found[name] = Raw(e["dtype"], tuple(e["shape"]), content[start:end])
    return found


def read_model(folder: Path) -> Tensors:
    """Every tensor of every safetensors file of a folder."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read_file(path)
    return found


def save_model(
    folder: Path,
    tensors: Tensors,
    *,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """A model's folder: one file, or shards with an index, and whatever stands beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(tensors, {"format": "pt"}))
    else:
        names, where = list(tensors), {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {n: tensors[n] for n in names[i::shards]}
            (folder / file).write_bytes(safetensors(part, {"format": "pt"}))
            where |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, content in (files or {}).items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
    return folder


def llama(
    seed: int,
    near: Tensors | None = None,
    *,
    hidden: int = 16,
    layers: int = 2,
    vocabulary: int = 24,
    dtype: str = "F32",
    head: bool = True,
) -> Tensors:
    """The tensors of a Llama of almost no size; a small step away from ``near`` when that is given."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{at}mlp.{p}_proj.weight": (2 * hidden, hidden) for p in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, 2 * hidden)
        shapes |= {f"{at}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    if head:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    found = {}
    for name, shape in shapes.items():
        step = random.standard_normal(shape, np.float32) * np.float32(0.02)
        start = np.float32(0) if near is None else near[name].values
        found[name] = packed(start + step, dtype)
    return found


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
"""What ``transformers`` needs to make a model of the tensors of ``llama``."""


def family(
    folder: Path, *names: str, config: Mapping[str, Any] | None = None, **shape: Any
) -> Path:
    """A base and models near it, each in its folder: ``family(tmp_path, "math", "code")``."""
    base = llama(0, **shape)
    save_model(folder / "base", base, config=config)
    for number, name in enumerate(names or ("math", "code"), 1):
        save_model(folder / name, llama(number, base, **shape), config=config)
    return folder


RECIPE: dict[str, Any] = {
    "base": "./base",
    "models": {"math": "./math", "code": "./code"},
    "method": "ties",
    "parameters": {"density": 0.5},
}


def write_recipe(folder: Path, recipe: Any = RECIPE, name: str = "recipe.yaml") -> Path:
    """A recipe as a file: text as it is, anything else as YAML."""
    path = folder / name
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False))
    return path


def weights(folder: Path) -> dict[str, str]:
    """Digests of the weight files and their index: equal means byte-identical."""
    chosen = [
        p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name.endswith("index.json")
    ]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(chosen)}


def tree(folder: Path) -> dict[str, str]:
    """Digest, or target, of everything under a folder."""
    return {
        str(p.relative_to(folder)): str(p.readlink()) if p.is_symlink()
        else "folder" if p.is_dir() else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
    }  # fmt: skip


def staging(out: Path) -> Path:
    """Where an output is prepared."""
    return out.parent / f".{out.name}.suture"


class Said(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON object and nothing else."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


def invoke(*arguments: object) -> Said:
    """Run the command line in this process; an exception that is no exit comes through."""
    from typer.testing import CliRunner

    from suture.cli import app

    before = signal.getsignal(signal.SIGTERM)
    try:
        result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="suture")
    finally:
        signal.signal(signal.SIGTERM, before)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Said(result.exit_code, result.stdout, result.stderr)


def environment(**more: str) -> dict[str, str]:
    """The variables of a command: no network, one thread, no colours."""
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "TERM": "dumb",
             "COLUMNS": "120", "PYTHONWARNINGS": "error"}  # fmt: skip
    return {**os.environ, **fixed, **more}


def start(*arguments: object, cwd: Path, **more: str) -> subprocess.Popen[str]:
    """Begin a command in a process of its own."""
    command = [sys.executable, "-m", "suture", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=environment(**more), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, errors="surrogateescape")  # fmt: skip


def suture(*arguments: object, cwd: Path, timeout: float = 120, **more: str) -> Said:
    """Run a command in a process of its own."""
    with start(*arguments, cwd=cwd, **more) as process:
        out, err = process.communicate(timeout=timeout)
    return Said(process.returncode, out, err)


def lines_of(text: str, *wanted: str) -> None:
    """Assert that each of ``wanted`` stands in ``text``, and show the text where one does not."""
    missing = [w for w in wanted if w not in text]
    assert not missing, f"{missing} not in:\n{text}"


def quick_disk(patch: Any) -> None:
    """Let nothing wait for the disk: what only a power cut could show is not tested with this."""
    patch.setattr(os, "fsync", lambda _: None)
    patch.setattr(os, "fdatasync", lambda _: None)


def descriptors(under: Path) -> list[str]:
    """The files of a folder that this process holds open (Linux)."""
    if _open_files(under):
        gc.collect()  # what an error's traceback still holds is let go with it
    return _open_files(under)


def _open_files(under: Path) -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return sorted(path for path in found if path.startswith(f"{under}/"))


def record_inputs(folder: Path) -> dict[str, str]:
    """The fingerprints of the inputs that an output's record names."""
    record = json.loads((folder / "suture.json").read_text())
    return {label: entry["fingerprint"] for label, entry in record["inputs"].items()}
