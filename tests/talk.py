"""Small tokenizers of different kinds and llamas for them; for tests of vocabularies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

import toy
from toy import Tensors

HIDDEN, INNER, LAYERS = 16, 24, 2
PROSE = [
    "the sun rises over the quiet sea and the sea is blue",
    "a small boat sails over the sea to the far island",
    "the moon is full and the night is quiet over the island",
] * 4
CODE = [
    "def run(self, path): return open(path).read()",
    "for name in names: print(name, len(name))",
    "import path; import names; print(names.run(path))",
] * 4
TEXTS = (
    "the sea is quiet", "print(name)", "over the island<|go|>def run", "<|a|> blue <|b|>",
    "unseen words: zebra 42",
)  # fmt: skip


def bpe(texts: Sequence[str], size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on some texts."""
    words = Tokenizer(BPE())
    words.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted({c for t in (*PROSE, *CODE, *TEXTS) for c in t.replace(" ", "Ġ")}),
    )  # fmt: skip
    words.train_from_iterator(texts, trainer)
    return words


def tokenizer(
    texts: Sequence[str], size: int, added: Sequence[AddedToken | str] = (), **more: Any
) -> transformers.PreTrainedTokenizerFast:
    """The same as transformers knows it, with some added tokens."""
    words = bpe(texts, size)
    words.add_tokens([AddedToken(t, special=True) if isinstance(t, str) else t for t in added])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", **more
    )


def llama(words: int, seed: int, *, tied: bool = False, width: int = HIDDEN) -> Tensors:
    """A llama for a vocabulary of so many tokens; layers that stem from one base."""
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (width,)}
    for n in range(LAYERS):
        shapes |= {
            f"model.layers.{n}.{part}.weight": shape
            for part, shape in {
                "self_attn.q_proj": (width, width), "self_attn.k_proj": (width // 2, width),
                "self_attn.v_proj": (width // 2, width), "self_attn.o_proj": (width, width),
                "mlp.gate_proj": (INNER, width), "mlp.up_proj": (INNER, width),
                "mlp.down_proj": (width, INNER), "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
            }.items()
        }  # fmt: skip
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    found = {n: 0.1 * torch.randn(s, generator=base) for n, s in shapes.items()}
    found = {n: t + 0.01 * torch.randn(t.shape, generator=own) for n, t in found.items()}
    names = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    return found | {n: 0.1 * torch.randn((words, width), generator=own) for n in names}


def config(words: int, *, tied: bool = False, **more: Any) -> dict[str, Any]:
    """The configuration of such a llama."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": words, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied, "hidden_act": "silu", "max_position_embeddings": 64,
        "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1, **more,
    }  # fmt: skip


def model(
    where: Path, words: Any, seed: int, *, tied: bool = False, rows: int | None = None,
    dtype: torch.dtype = torch.float32, **more: Any,
) -> Path:  # fmt: skip
    """A folder with a llama, its configuration and its tokenizer."""
    rows = rows or len(words.get_vocab())
    tensors = {n: t.to(dtype) for n, t in llama(rows, seed, tied=tied).items()}
    toy.folder(where, tensors, config=config(rows, tied=tied, **more))
    words.save_pretrained(where)
    return where


def loaded(where: Path) -> Any:
    """The tokenizer of a folder, as transformers reads it."""
    return transformers.AutoTokenizer.from_pretrained(where, local_files_only=True)


def by_token(tensors: Mapping[str, torch.Tensor], name: str, words: Any) -> Tensors:
    """The rows of a tensor under the tokens that they stand for."""
    return {token: tensors[name][i] for token, i in words.get_vocab().items()}
