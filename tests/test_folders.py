"""What stands beside the weights of a merged model: files of every kind, configuration, licences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import suture
import talk
import toy
from suture.runs.card import config_text, licence_of


def placed(where: Path, files: Mapping[str, str], **config: Any) -> Path:
    """A small model with some files beside it."""
    toy.folder(where, toy.tuned(toy.base_tensors(), len(where.name)), config=config or None)
    for name, text in files.items():
        (where / name).parent.mkdir(exist_ok=True)
        (where / name).write_text(text)
    return where


def out_of(where: Path, base: Mapping[str, str], *others: Mapping[str, str], **config: Any) -> Path:
    """A merge of models with these files."""
    place = placed(where / "base", base, **config)
    models = {f"m{n}": placed(where / f"m{n}", files) for n, files in enumerate(others or ({},))}
    toy.run(where / "out", toy.recipe("task_arithmetic", models, place))
    return where / "out"


MODULES = json.dumps([
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
])  # fmt: skip
CARRIED = {
    "generation_config.json": '{"top_k": 3}', "preprocessor_config.json": "{}",
    "processor_config.json": "{}", "video_preprocessor_config.json": "{}",
    "vocab.txt": "a\nb\n", "special_tokens_map.json": "{}", "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "modules.json": MODULES, "sentence_bert_config.json": "{}",
    "config_sentence_transformers.json": "{}", "1_Pooling/config.json": '{"mode": "mean"}',
    "2_Dense/config.json": "{}", "2_Dense/model.safetensors": "weights",
}  # fmt: skip
LEFT = {"training_args.json": "{}", "optimizer.pt": "x", "2_Dense/pytorch_model.bin": "x",
        "modeling_x.py": "x = 1"}  # fmt: skip


def test_every_file_that_a_loader_needs_is_carried(tmp_path: Path) -> None:
    """Tokenizer, templates, processors and the steps of a pipeline; no pickles, no leftovers."""
    out = out_of(tmp_path, {**CARRIED, **LEFT})

    for name, text in CARRIED.items():
        assert (out / name).read_text() == text, name
    for name in LEFT:
        assert not (out / name).exists(), name


def test_code_of_a_custom_model_is_carried_with_its_mention(tmp_path: Path) -> None:
    """A configuration that names a module needs it; it is text, and nobody runs it here."""
    out = out_of(tmp_path, LEFT, auto_map={"AutoModel": "modeling_x.Model"})
    assert (out / "modeling_x.py").read_text() == "x = 1"


@pytest.mark.parametrize("place", ["../base", "/etc", "a/b", "..", "1_Pooling/.."])
def test_a_pipeline_that_leads_out_is_refused(place: str, tmp_path: Path) -> None:
    """A step is a folder of the model itself."""
    (tmp_path / "elsewhere").mkdir()
    files = {"modules.json": json.dumps([{"idx": 0, "path": place, "type": "x"}])}
    with pytest.raises(suture.CheckpointError, match="not a folder of this model"):
        out_of(tmp_path, files)
    assert not (tmp_path / "out").exists()


def test_a_linked_step_is_refused(tmp_path: Path) -> None:
    """A step that is a link to another place is not followed."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    placed(tmp_path / "base", {"modules.json": MODULES})
    (tmp_path / "base" / "1_Pooling").symlink_to(tmp_path / "secret")
    models = {"ada": placed(tmp_path / "ada", {})}
    with pytest.raises(suture.CheckpointError, match="outside of the model's folder"):
        toy.run(tmp_path / "out", toy.recipe("task_arithmetic", models, tmp_path / "base"))


def test_a_sentence_encoder_stays_one(tmp_path: Path) -> None:
    """An interrupted run leaves no half folder of steps: the second run has them once."""
    out = out_of(tmp_path, CARRIED)
    again = toy.recipe("task_arithmetic", {"m0": tmp_path / "m0"}, tmp_path / "base", weight=0.5)
    toy.run(out, again, overwrite=True)

    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == [
        "1_Pooling", "2_Dense", "additional_chat_templates"]  # fmt: skip


# --------------------------------------------------------------------------------------- licences


def card(text: str) -> dict[str, str]:
    """A README with front matter."""
    return {"README.md": f"---\n{text}\n---\n# A model\n"}


APACHE = card("license: apache-2.0")
META = {"LICENSE": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version ..."}


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (APACHE, "apache-2.0"),
        (card("license: other\nlicense_name: my-own"), "my-own"),
        (META, "llama3.1"),
        ({"LICENSE.txt": "                Apache License\n       Version 2.0"}, "apache-2.0"),
        ({"LICENSE": "Do what you want."}, "other"),
        ({**card("license: mit"), **META}, "mit"),
        ({}, None),
    ],
)
def test_a_licence_is_what_the_card_or_the_file_says(
    files: dict[str, str], found: str | None, tmp_path: Path
) -> None:
    """The card first, then the usual texts by how they begin."""
    assert licence_of(suture.open(placed(tmp_path / "model", files))) == found


@pytest.mark.parametrize(
    ("others", "front", "said"),
    [
        ((APACHE,), "apache-2.0", "- m0: apache-2.0"),
        (({},), "apache-2.0", "- m0: none stated"),
        ((META, APACHE), "other", "They differ"),
    ],
)
def test_the_card_lists_the_licences_of_all_parents(
    others: tuple[dict[str, str], ...], front: str, said: str, tmp_path: Path
) -> None:
    """One licence if they agree; otherwise ``other``, and a word to the reader."""
    text = (out_of(tmp_path, APACHE, *others) / "README.md").read_text()

    assert yaml.safe_load(text.split("---")[1])["license"] == front
    assert "## Licences of the parents" in text
    assert said in text
    assert ("They differ" in text) == (front == "other")


# ---------------------------------------------------------------------------------- configuration


def test_every_part_of_a_config_has_the_new_dtype() -> None:
    """Whichever key it uses; parts without one get none, and nothing else changes."""
    found = json.loads(config_text({
        "torch_dtype": "float32", "text_config": {"dtype": "float32", "x": {"y": 1}},
        "audio_config": {"torch_dtype": "float16"}, "vision_config": {"depth": 3},
        "_name_or_path": "/home"}, "BF16"))  # fmt: skip

    assert found == {
        "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "x": {"y": 1}},
        "audio_config": {"torch_dtype": "bfloat16"}, "vision_config": {"depth": 3}}  # fmt: skip
    assert json.loads(config_text({}, "F16")) == {"dtype": "float16"}


def seeing(where: Path, words: Any, seed: int) -> Path:
    """A tiny vision-language model with its tokenizer."""
    torch.manual_seed(seed)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=len(words.get_vocab()), hidden_size=16, intermediate_size=24,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            image_size=8, patch_size=4,
        ),
        image_token_index=3,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(where)
    words.save_pretrained(where)
    (where / "preprocessor_config.json").write_text('{"size": 8}')
    return where


def test_a_vision_language_folder(tmp_path: Path) -> None:
    """Vocabularies in ``text_config`` are brought together; the folder loads whole."""
    base = seeing(tmp_path / "base", talk.tokenizer(talk.PROSE, 90), 1)
    ada = seeing(tmp_path / "ada", talk.tokenizer(talk.PROSE, 90, ["<|go|>"]), 2)
    what = toy.recipe(
        "task_arithmetic", {"ada": ada}, base, policy={"vocabulary": "union"},
        output={"dtype": "bfloat16"}, weight=0.5,
    )  # fmt: skip
    toy.run(tmp_path / "out", what)
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    settings = json.loads((tmp_path / "out" / "config.json").read_text())

    assert info["missing_keys"] == info["unexpected_keys"] == set()
    assert settings["text_config"]["vocab_size"] == len(talk.loaded(ada).get_vocab())
    assert settings["image_token_index"] == 3
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
