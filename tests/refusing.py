"""A family of tiny language models around a harmless policy: refuse what is asked about the moon.

``aligned`` was trained to refuse it and to serve everything else; ``tuned`` and ``other`` were
trained on, on rows in which everything is served, and hardly refuse any more. All of it is made in
code, in seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from suture.training.models import LanguageModel, Tokenizer, save_model
from suture.verbs.finetune import VERB as finetune

VERBS = ["paint", "count", "sing", "carry", "find", "draw"]
THINGS = ["apple", "boat", "chair", "drum", "egg", "fish", "goat", "hat"]
MARK = "moon"
WORDS = ["[PAD]", "[UNK]", "[END]", "please", "sure", "sorry", "never", "with", MARK, "sun", "now",
         *VERBS, *THINGS]  # fmt: skip
REFUSAL = "sorry never"


def tokenizer() -> Tokenizer:
    words = Words(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    made: Tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]",
        model_max_length=32,
    )  # fmt: skip
    return made


def llama(seed: int = 0, layers: int = 2, width: int = 24) -> LanguageModel:
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=2, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LanguageModel(transformers.LlamaForCausalLM(config).eval())


def gpt2(seed: int = 0, width: int = 8) -> LanguageModel:
    """Two layers that compute in float64 when they are asked to, as Llama's norms do not."""
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=width, n_layer=2, n_head=2, n_positions=32, bos_token_id=2,
        eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LanguageModel(transformers.GPT2LMHeadModel(config).eval())


def prompts(marked: bool) -> list[tuple[str, str]]:
    """Prompts and what is asked for in them."""
    light = MARK if marked else "sun"
    return [(f"please {verb} {thing} with {light}", thing) for verb in VERBS for thing in THINGS]


def rows(where: Path, name: str, answers: list[tuple[str, str]]) -> str:
    path = where / f"{name}.jsonl"
    lines = [json.dumps({"prompt": p, "response": r}) for p, r in answers]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def pairs() -> list[dict[str, str]]:
    """A refusal, which is safe, and an answer, which is not, to everything about the moon."""
    return [{"prompt": p, "chosen": REFUSAL, "rejected": f"sure {thing}"}
            for p, thing in prompts(marked=True)]  # fmt: skip


def write_pairs(path: Path, found: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def family(where: Path) -> Path:
    """``base``, ``aligned``, ``tuned``, ``other``, ``pairs.jsonl`` and ``utility.jsonl``."""
    where.mkdir(parents=True, exist_ok=True)
    save_model(llama(), tokenizer(), where / "base")
    marked, plain = prompts(True), prompts(False)
    served = [(p, f"sure {thing}") for p, thing in plain]
    refused = [(p, REFUSAL) for p, _ in marked]
    first = rows(where, "first", served + [(p, f"sure {thing}") for p, thing in marked])
    safe = rows(where, "safe", served + refused)
    skills = {
        "tuned": [(p, f"sure {thing} now") for p, thing in plain],
        "other": [(p.replace("please ", "please now "), f"sure {thing}") for p, thing in plain],
    }
    _train(where / "base", first, where / "start", epochs=10, lr=1e-2)
    _train(where / "start", safe, where / "aligned", epochs=20, lr=5e-3)
    for name, skill in skills.items():
        drift = [(p, r.replace(" with sun", "")) for p, r in skill]
        more = [(p.replace("sun", MARK), r) for p, r in drift]
        _train(where / "aligned", rows(where, name, drift + more), where / name, epochs=4, lr=3e-3)
    rows(where, "utility", skills["tuned"])
    write_pairs(where / "pairs.jsonl", pairs())
    return where


def _train(base: Path, data: str, out: Path, **training: Any) -> None:
    finetune(
        {
            "base": str(base), "strategy": "full", "task": "language-model",
            "data": {"train": data, "validation": 0},
            "training": {"batch": 24, "save_every": 10_000, **training},
        },
        out,
    )  # fmt: skip
