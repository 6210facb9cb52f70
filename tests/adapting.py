"""Tiny models and adapters as PEFT makes them: what the tests of adapters work on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def llama(where: Path, *, tied: bool = False, dtype: str = "float32", seed: int = 0) -> Path:
    """A Llama of almost no size, in its folder."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=41, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(where)
    return where


def qwen(where: Path) -> Path:
    """The same for Qwen 2, whose q, k and v have biases."""
    torch.manual_seed(3)
    config = transformers.Qwen2Config(
        vocab_size=41, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    shaken(model, seed=4)
    model.save_pretrained(where)
    return where


def gpt2(where: Path) -> Path:
    """The same for GPT-2, whose weights lie the other way round and partly are square."""
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=41, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(where)
    return where


def load(where: Path) -> Any:
    """The causal language model of a folder, in the dtype of its files."""
    return transformers.AutoModelForCausalLM.from_pretrained(where, dtype="auto")


def shaken(model: Any, seed: int, spread: float = 0.05, trained: bool = False) -> None:
    """Move every parameter (or only those that are trained) a little."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not trained:
                noise = torch.randn(parameter.shape, generator=draw) * spread
                parameter.add_(noise.to(parameter.dtype))


def adapter(base: Path, where: Path, seed: int = 1, **config: Any) -> Path:
    """An adapter with random factors, saved by PEFT."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(base), LoraConfig(**(settings | config)))
        shaken(model, seed, trained=True)
        model.save_pretrained(where)
    return where


def working(base: Path, folder: Path) -> Any:
    """A base with an adapter at work, not merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load(base), folder).eval()


def merged_by_peft(base: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """The tensors after PEFT merged adapters into a base, one after the other."""
    model = load(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for folder in adapters:
            model = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    return dict(model.state_dict())


def edited(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    **tensors: Any,
) -> Path:
    """Change an adapter's configuration (a value of ``...`` removes the key) and tensors."""
    path = folder / "adapter_config.json"
    found = json.loads(path.read_text()) | dict(config or {})
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {k: v for k, v in weights.items() if not any(d in k for d in drop)}
    for name, change in tensors.items():
        key = next(k for k in weights if name.replace("__", ".") in k)
        weights[key] = change(weights[key]).contiguous()
    save_file(weights, folder / "adapter_model.safetensors")
    return folder
