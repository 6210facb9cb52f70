"""A random two-layer BERT with a word tokenizer, made in code; for tests of training and evals."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from suture.training.labelled import LabelledText
from suture.training.models import (
    Encoder,
    Head,
    LanguageModel,
    Loaded,
    Tokenizer,
    load_encoder,
    save_head,
    save_model,
)

WORDS = [
    "[PAD]", "[UNK]", "red", "green", "blue", "sun", "moon", "star", "one", "two", "three", "four",
    "five", "six",
]  # fmt: skip
COLOURS, SKIES = WORDS[2:5], WORDS[5:8]


def tokenizer() -> Tokenizer:
    words = Words(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    made: Tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    return made


def encoder(seed: int = 0) -> Encoder:
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Encoder(transformers.BertModel(config).eval())


def language_model(seed: int = 0) -> LanguageModel:
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LanguageModel(transformers.GPT2LMHeadModel(config).eval())


def image_folder(where: Path, kind: str = "vit", seed: int = 0) -> Path:
    """A random vision transformer for images of 8 pixels in patches of 4."""
    shape = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4, "num_channels": 1 if kind == "grey" else 3,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "dinov2":
            model = transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=2, **shape))
        else:
            made = transformers.ViTConfig(intermediate_size=32, **shape)
            model = transformers.ViTForImageClassification(made)
    model.save_pretrained(where)
    return where


def folder(where: Path, seed: int = 0) -> Path:
    save_model(encoder(seed), tokenizer(), where)
    return where


def loaded(where: Path) -> Loaded[Encoder]:
    return load_encoder(where, dtype=torch.float32)


def rows(n: int = 48) -> list[LabelledText]:
    """Texts about colours or about the sky, all different."""
    found = []
    for i in range(n):
        words = (COLOURS, SKIES)[i % 2]
        fillers = [WORDS[8 + (i // 6**k) % 6] for k in range(1 + i % 3)]
        text = " ".join([words[i % 3], *fillers, words[(i // 3) % 3]])
        found.append(LabelledText(text, ("colour", "sky")[i % 2], group=str(i)))
    return found


def workshop(where: Path) -> Path:
    """A folder with a base, two models near it, a head and twenty labelled rows."""
    folder(where / "base")
    for number, name in enumerate(("one", "two")):
        tuned = loaded(where / "base")
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for p in tuned.model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
        save_model(tuned.model, tuned.tokenizer, where / name)
    draw = torch.Generator().manual_seed(7)
    head = Head(("colour", "sky"), torch.randn(2, 16, generator=draw), torch.zeros(2))
    save_head(head, where / "head.safetensors")
    lines = [json.dumps({"text": r.text, "label": r.label}) for r in rows(20)]
    (where / "rows.jsonl").write_text("\n".join(lines))
    return where
