"""GGUF files as checkpoints with the names and the layout of Hugging Face; values dequantised.

The header is read here, as carefully as that of a safetensors file; the ``gguf`` package knows how
to dequantise and is asked only for that. Float tensors are read as they are. Whatever is not the
plain decoder of a known architecture is refused by name.
"""

from __future__ import annotations

import mmap
import re
import struct
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from suture.checkpoints.checkpoint import Array, BytePlace, Checkpoint, close_all
from suture.errors import CheckpointError, MissingExtraError, Problems, brief
from suture.tensors.spec import DTYPES, TensorSpec, listed, readable

_REMEDY = (
    "convert it with transformers: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name), "
    "then save_pretrained(folder)"
)
_FLOATS = {0: "F32", 1: "F16", 30: "BF16", 28: "F64"}
"""Types of GGUF that are read without the ``gguf`` package."""
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_TEXT, _ARRAY = 8, 9
_KEPT = 4096
"""Elements of the longest array of numbers that is kept; the vocabulary is only counted."""

_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH = _BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


class _Family(NamedTuple):
    """What an architecture of GGUF is called in transformers."""

    model_type: str
    architecture: str
    block: Mapping[str, str]
    rotated: bool = False
    """Whether rows of q and k are stored in the order of llama.cpp's rotary embedding."""
    shift: float = 0.0
    """What is added to the weights of norms: some store one plus the weight."""
    rope_is_head: bool = False
    """Whether the rotary dimension is that of a head."""


_FAMILIES = {
    "llama": _Family("llama", "LlamaForCausalLM", _BLOCK, rotated=True, rope_is_head=True),
    "qwen2": _Family("qwen2", "Qwen2ForCausalLM", _BLOCK),
    "qwen3": _Family("qwen3", "Qwen3ForCausalLM", _BLOCK | _QK_NORMS),
    "phi3": _Family(
        "phi3", "Phi3ForCausalLM",
        _BLOCK | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "gemma": _Family("gemma", "GemmaForCausalLM", _BLOCK, shift=-1.0),
    "gemma2": _Family("gemma2", "Gemma2ForCausalLM", _SANDWICH, shift=-1.0),
    "gemma3": _Family("gemma3_text", "Gemma3ForCausalLM", _SANDWICH | _QK_NORMS, shift=-1.0),
}  # fmt: skip

_CONFIG = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_NEEDED = (
    "context_length", "block_count", "feed_forward_length", "embedding_length",
    "attention.head_count", "attention.layer_norm_rms_epsilon",
)  # fmt: skip
_TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}


class _Tensor(NamedTuple):
    """Where and how a tensor lies in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    """Its type, as ggml numbers them."""
    offset: int


class _Coding(NamedTuple):
    """How elements are packed."""

    block: int
    nbytes: int
    decode: Callable[[Array], Array] | None
    """From uint8[1, blocks * nbytes] to float32; ``None`` where they are floats."""


class _Cursor:
    """Reads the header, never beyond its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise CheckpointError(f"{self.path}: cut short inside its header; fetch the file again")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path}: its header has a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner == _TEXT:
            for _ in range(count):
                self.take(self.number("Q"))
            return range(count)  # its length is all that is needed
        if inner not in _NUMBERS:
            raise CheckpointError(f"{self.path}: its header has an array of the type {inner}")
        code = _NUMBERS[inner]
        raw = self.take(struct.calcsize("<" + code) * count)
        return struct.unpack(f"<{count}{code}", raw) if count <= _KEPT else range(count)


class _Header(NamedTuple):
    facts: dict[str, Any]
    tensors: list[_Tensor]
    digest: str


def _read_header(path: Path) -> _Header:
    try:
        with path.open("rb") as file:
            head = file.read(24)
            if len(head) < 24 or not head.startswith(b"GGUF"):
                raise CheckpointError(f"{path}: is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path), len(data))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def _parse(cursor: _Cursor, size: int) -> _Header:
    path = cursor.path
    cursor.take(4)
    version, tensors, facts_count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF of version {brief(version)}; 2 and 3 are read")
    facts: dict[str, Any] = {}
    for _ in range(facts_count):
        key = cursor.text()
        if key in facts:
            raise CheckpointError(f"{path}: its header has {brief(key)} twice")
        facts[key] = cursor.value(cursor.number("I"))
    found, seen = [], set()
    for _ in range(tensors):
        name, rank = cursor.text(), cursor.number("I")
        if rank > 4 or name in seen:
            raise CheckpointError(f"{path}: {brief(name)} stands twice, or has {rank} dimensions")
        seen.add(name)
        shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]
        if any(not 0 < s < 1 << 40 for s in shape):
            raise CheckpointError(f"{path}: {brief(name)} has the absurd shape {brief(shape)}")
        found.append(_Tensor(name, shape, cursor.number("I"), cursor.number("Q")))
    align = facts.get("general.alignment", 32)
    if type(align) is not int or not 0 < align <= 1 << 20:
        raise CheckpointError(f"{path}: the alignment {brief(align)} is none")
    first = -(-cursor.at // align) * align
    digest = xxhash.xxh3_128_hexdigest(cursor.data[: cursor.at])
    return _Header(facts, [t._replace(offset=first + t.offset) for t in found], digest)


@cache
def _coding(kind: int) -> _Coding:
    if kind in _FLOATS:
        return _Coding(1, DTYPES[_FLOATS[kind]].itemsize, None)
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("reading a quantised GGUF file", "gguf") from None
    try:
        known = gguf.GGMLQuantizationType(kind)
        block, nbytes = gguf.GGML_QUANT_SIZES[known]
        gguf.dequantize(np.zeros((1, nbytes), np.uint8), known)
    except (ValueError, KeyError, NotImplementedError):
        raise CheckpointError(f"the quantisation of number {kind} cannot be undone") from None
    return _Coding(block, nbytes, lambda raw: gguf.dequantize(raw, known))


class Gguf(Checkpoint):
    """A GGUF file, read as if it were the Hugging Face folder that it was made from."""

    def __init__(self, path: Path, label: str) -> None:
        header = _read_header(path)
        self.path, self.label, self.files, self.folder = path, label, [path], path.parent
        self._descriptors = {}
        self._lock = threading.Lock()
        self._close = weakref.finalize(self, close_all, self._descriptors)
        self._layout: dict[str, tuple[_Tensor, _Coding, int, float]] = {}
        """By name: the tensor, its packing, rows of a head to unrotate (or 0), and the shift."""
        self.specs, self.places, self.aliases = {}, {}, {}
        family = _family(header.facts, label)
        problems = Problems()
        for tensor in header.tensors:
            with problems.collecting():
                self._add(tensor, family, header.facts)
        problems.raise_if_any()
        if not self.specs:
            raise CheckpointError(f"{label}: a GGUF file without tensors")
        info = path.stat()
        self.identity = [[path.name, info.st_size, info.st_mtime_ns, header.digest]]
        self.config = _config(header.facts, family, self, label)
        frequencies = [t for t in header.tensors if t.name == "rope_freqs.weight"]
        if frequencies:
            self.config["rope_scaling"] = _llama3(self, frequencies[0], self.config, label)
        self.has_tokenizer = "tokenizer.ggml.tokens" in header.facts
        self.close()

    def _add(self, tensor: _Tensor, family: _Family, facts: Mapping[str, Any]) -> None:
        if tensor.name == "rope_freqs.weight":
            return
        name = _name_of(tensor.name, family)
        if name is None:
            raise CheckpointError(
                f"{self.label}: {tensor.name} is not known in {family.model_type}; {_REMEDY}"
            )
        try:
            coding = _coding(tensor.kind)
        except CheckpointError as error:
            raise CheckpointError(f"{self.label}: {tensor.name}: {error}; {_REMEDY}") from None
        columns = tensor.shape[-1] if tensor.shape else 1
        if columns % coding.block:
            raise CheckpointError(f"{self.label}: {tensor.name}: rows of {columns} are no blocks")
        shift = family.shift if name.endswith("norm.weight") else 0.0
        dtype = "F32" if coding.decode or shift else _FLOATS[tensor.kind]
        spec = TensorSpec(dtype, tensor.shape)
        held, size = spec.numel // coding.block * coding.nbytes, self.path.stat().st_size
        if tensor.offset + held > size:
            raise CheckpointError(
                f"{self.path}: cut short: {tensor.name} ends at {readable(tensor.offset + held)}, "
                f"the file at {readable(size)}; fetch the file again"
            )
        self.specs[name] = spec
        self.places[name] = BytePlace(0, tensor.offset)
        rows = _head_rows(tensor, family, facts, self.label)
        self._layout[name] = (tensor, coding, rows, shift)

    def read_into(self, name: str, start: int, raw: Array) -> None:
        """Fill the bytes ``raw`` from element ``start`` of a tensor. Safe from any thread."""
        tensor, coding, rows, shift = self._layout[name]
        spec = self.specs[name]
        count = raw.size // DTYPES[spec.dtype].itemsize
        if not count:
            return
        if not rows:
            found = self._elements(tensor, coding, start, start + count)
        else:  # whole heads, whose rows were woven into each other
            head = rows * (spec.numel // spec.shape[0])
            first = start // head
            last = -(-(start + count) // head)
            woven = self._elements(tensor, coding, first * head, last * head)
            found = woven.reshape(last - first, rows // 2, 2, -1).swapaxes(1, 2).ravel()
            found = found[start - first * head :][:count]
        if shift:
            found = found.astype(np.float32) + np.float32(shift)
        raw[:] = np.ascontiguousarray(found).view(np.uint8)

    def _elements(self, tensor: _Tensor, coding: _Coding, start: int, stop: int) -> Array:
        first = start // coding.block
        blocks = -(-stop // coding.block) - first
        raw = np.empty(blocks * coding.nbytes, np.uint8)
        self.read_at(0, tensor.offset + first * coding.nbytes, raw)
        if coding.decode is None:
            return raw.view(DTYPES[_FLOATS[tensor.kind]].storage)
        with np.errstate(all="ignore"):  # NaN and infinity are found, and told, by those who read
            values = coding.decode(raw.reshape(1, -1)).ravel()  # gguf is slow with many short rows
        begin = start - first * coding.block
        return values[begin : begin + stop - start]


def _family(facts: Mapping[str, Any], label: str) -> _Family:
    name = facts.get("general.architecture")
    if name not in _FAMILIES:
        raise CheckpointError(
            f"{label}: the architecture {brief(name)} of GGUF is not read, only "
            f"{', '.join(_FAMILIES)}; {_REMEDY}"
        )
    if facts.get("split.count", 0) not in (0, 1):
        raise CheckpointError(
            f"{label}: one of {brief(facts['split.count'])} parts of a GGUF file; join them first: "
            "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    return _FAMILIES[name]


def _name_of(name: str, family: _Family) -> str | None:
    """The name in Hugging Face's files; ``None`` where there is none."""
    stem, _, last = name.rpartition(".")
    if last not in ("weight", "bias"):
        return None
    if stem in _TOP:
        return f"{_TOP[stem]}.{last}"
    found = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)", stem)
    if found is None or found[2] not in family.block:
        return None
    return f"model.layers.{found[1]}.{family.block[found[2]]}.{last}"


def _head_rows(tensor: _Tensor, family: _Family, facts: Mapping[str, Any], label: str) -> int:
    """Rows of one head of a rotated tensor; 0 for any other tensor."""
    found = re.search(r"\.attn_([qk])\.", tensor.name) if family.rotated else None
    if found is None:
        return 0
    heads = facts.get("llama.attention.head_count")
    if found[1] == "k":
        heads = facts.get("llama.attention.head_count_kv", heads)
    if type(heads) is not int or heads < 1 or not tensor.shape or tensor.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{label}: {tensor.name}: {list(tensor.shape)} is not made of {brief(heads)} heads"
        )
    return tensor.shape[0] // heads


def _config(
    facts: Mapping[str, Any], family: _Family, model: Checkpoint, label: str
) -> dict[str, Any]:
    """What ``config.json`` would say, as far as the file tells."""
    arch = str(facts["general.architecture"])
    _check_needed(facts, arch, label)
    found: dict[str, Any] = {"architectures": [family.architecture]}
    found["model_type"] = family.model_type
    for key, word in _CONFIG.items():
        value = facts.get(f"{arch}.{key}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[word] = float(np.float32(value)) if isinstance(value, float) else value
    if family.rope_is_head and "head_dim" not in found:
        size = facts.get(f"{arch}.rope.dimension_count")
        if type(size) is int:
            found["head_dim"] = size
    found.setdefault("num_key_value_heads", found["num_attention_heads"])
    found.setdefault("rope_theta", 10000.0)
    for key, word in _TOKENS.items():
        if type(facts.get(key)) is int:
            found[word] = facts[key]
    found["vocab_size"] = model.vocabulary
    found["tie_word_embeddings"] = "lm_head.weight" not in model.specs
    if family.model_type in ("gemma2", "gemma3_text"):
        found["query_pre_attn_scalar"] = _scalar(found)
    if family.rotated:
        found["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in model.specs
        found["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in model.specs
    scaling = _scaling(facts, arch, label)
    if scaling:
        found["rope_scaling"] = scaling
    found["torch_dtype"] = "float32"
    return found


def _check_needed(facts: Mapping[str, Any], arch: str, label: str) -> None:
    problems = Problems()
    for key in _NEEDED:
        value: Any = facts.get(f"{arch}.{key}")
        if type(value) not in (int, float) or not value > 0:
            problems.add(CheckpointError, f"{label}: {arch}.{key} is {brief(value)}; {_REMEDY}")
    problems.raise_if_any()


def _scalar(config: Mapping[str, Any]) -> int:
    """What queries of Gemma 2 and 3 are scaled with; the file does not say it.

    It is the size of a head, but in the models of 27 billion parameters, which their number of
    layers tells, hidden size over heads.
    """
    largest = {"gemma2": 46, "gemma3_text": 62}[config["model_type"]]
    if config["num_hidden_layers"] == largest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config.get("head_dim", 256))


def _scaling(facts: Mapping[str, Any], arch: str, label: str) -> dict[str, Any] | None:
    kind = facts.get(f"{arch}.rope.scaling.type")
    factor = facts.get(f"{arch}.rope.scaling.factor")
    if kind in (None, "none") or type(factor) is not float:
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{label}: rope scaling {brief(kind)} is not read; {_REMEDY}")
    found: dict[str, Any] = {"rope_type": kind, "factor": factor}
    before = facts.get(f"{arch}.rope.scaling.original_context_length")
    if kind == "yarn" and type(before) is int:
        found["original_max_position_embeddings"] = before
    return found


def _llama3(model: Gguf, tensor: _Tensor, config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The rope scaling of Llama 3.1 and later, of which the file holds only its effect."""
    size = tensor.shape[0] if tensor.kind == 0 and len(tensor.shape) == 1 else 0
    there = np.zeros(size, np.float32)
    if 0 < size <= 4096:
        model.read_at(0, tensor.offset, there.view(np.uint8))
        factor, low, high, before = float(there.max()), 1.0, 4.0, 8192
        head = 2 * size
        lengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, head, 2) / head)
        smooth = (before / lengths - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        expected = np.where(lengths < before / high, 1.0,
                            np.where(lengths > before / low, factor, between))  # fmt: skip
        if factor > 1 and np.allclose(there, expected, rtol=1e-3):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": before}  # fmt: skip
    raise CheckpointError(
        f"{label}: rope_freqs.weight is not the rope scaling of Llama 3, and no other is known; "
        f"{_REMEDY}"
    )


def find_gguf(path: Path, label: str) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder without safetensors.

    Raises:
        CheckpointError: the folder holds several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted(p for p in path.glob("*.gguf") if p.is_file())
    if len(found) > 1:
        raise CheckpointError(
            f"{label}: {len(found)} GGUF files, {listed([p.name for p in found])}; name one of them"
        )
    return found[0] if found else None


def open_gguf(path: Path, label: str) -> Gguf:
    """Open a GGUF file; its header and nothing else is read.

    Raises:
        CheckpointError: it is no whole GGUF file of a known architecture.
        MissingExtraError: it is quantised and the ``gguf`` package is not there.
    """
    return Gguf(path, label)


__all__ = ["Gguf", "find_gguf", "open_gguf"]
