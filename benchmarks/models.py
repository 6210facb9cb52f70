"""Synthetic Llama checkpoints of any size: real shapes and bfloat16, random values."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def llama_config(hidden: int, layers: int, ffn: int, vocab: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def llama_shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    hidden, ffn = int(str(config["hidden_size"])), int(str(config["intermediate_size"]))
    vocab, layers = int(str(config["vocab_size"])), int(str(config["num_hidden_layers"]))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {at + f"self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {at + f"mlp.{p}_proj.weight": (ffn, hidden) for p in ("gate", "up")}
        shapes[at + "mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {at + f"{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return shapes


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _tensor(name: str, shape: tuple[int, ...], model: int, seed: int) -> Iterator[bytes]:
    """A tensor in chunks: base weights of deviation 0.02, and a fine-tune's change of 0.001."""
    count = int(np.prod(shape))
    for start in range(0, count, 1 << 22):
        size = min(1 << 22, count - start)
        key = zlib.crc32(f"{name} {start}".encode())
        base = np.random.default_rng([seed, key]).standard_normal(size, np.float32) * 0.02
        base += 1.0 if name.endswith("norm.weight") else 0.0
        if model:
            base = (to_bfloat16(base).astype(np.uint32) << 16).view(np.float32)
            tuned = np.random.default_rng([seed, key, model])
            base = base + tuned.standard_normal(size, np.float32) * 0.001
        yield to_bfloat16(base).tobytes()


def write_model(folder: Path, config: dict[str, object], model: int, seed: int = 0) -> None:
    """Write base (model 0) or a fine-tune of it (1, 2, ...) as one bfloat16 safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder / "model.safetensors", llama_shapes(config), model, seed)


def write_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], model: int, seed: int = 0
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in sorted(shapes.items()):
            for part in _tensor(name, shape, model, seed):
                file.write(part)
