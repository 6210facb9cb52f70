"""A tiny llama with a word tokenizer and a chat template; for tests of what language models say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from suture.errors import Problems
from suture.evals.decoding import Decoding
from suture.evals.kinds import EvalJob, Row
from suture.training.models import LanguageModel, save_model

WORDS = [
    "[PAD]", "[UNK]", "[END]", "user", "assistant", "sorry", "I", "cannot", "never", "sure", "here",
    "it", "is", "red", "green", "blue", "sun", "moon", "star", "one", "two", "three", "guitar",
    "hammer", ".",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def tokenizer(*, chat: bool = True) -> Any:
    words = Words(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]",
        model_max_length=128,
    )  # fmt: skip
    if chat:
        made.chat_template = TEMPLATE
    return made


def llama(seed: int = 0) -> LanguageModel:
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=0, eos_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LanguageModel(transformers.LlamaForCausalLM(config)).eval()


def gpt2(seed: int = 0) -> LanguageModel:
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=128, bos_token_id=0,
        eos_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LanguageModel(transformers.GPT2LMHeadModel(config)).eval()


def bloom(seed: int = 0) -> LanguageModel:
    """A model whose positions come from its mask: it cannot be read in trees."""
    config = transformers.BloomConfig(
        vocab_size=len(WORDS), hidden_size=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LanguageModel(transformers.BloomForCausalLM(config)).eval()


def folder(where: Path, seed: int = 0, *, chat: bool = True) -> Path:
    save_model(llama(seed), tokenizer(chat=chat), where)
    return where


def job(rows: Sequence[Mapping[str, object]], *, chat: bool = True, max_tokens: int = 8) -> EvalJob:
    """Rows as a suite hands them over; ``language`` and ``category`` are read off their columns."""
    made = [
        Row(
            f"rows.jsonl, line {n}", row, str(row.get("category", "")), str(row.get("language", ""))
        )
        for n, row in enumerate(rows, 1)
    ]
    return EvalJob(made, tokenizer(), 128, Decoding(max_tokens, chat=chat), Problems())
