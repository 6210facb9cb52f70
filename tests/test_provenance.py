"""An output says what it is, can be made again to the byte, and loads where models are loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import yaml

import suture
from making import (
    CONFIG,
    RECIPE,
    Tensors,
    family,
    invoke,
    lines_of,
    llama,
    packed,
    quick_disk,
    read_model,
    save_model,
    staging,
    tree,
    weights,
    write_recipe,
)
from suture.runs.place import MergeOptions
from suture.verbs.merge import VERB as merge
from suture.verbs.merge.plan import make_plan, run_key

FILES = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"do_sample": false}',
    "README.md": "---\nlicense: apache-2.0\n---\n# base\n",
    "pytorch_model.bin": b"\x80\x04.",
    "modeling_evil.py": "import os",
    "notes.txt": "private",
}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_disk(monkeypatch)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Models in one folder, and a recipe beside them; outputs go to ``made``."""
    root = family(tmp_path / "work", "math", "code", config=CONFIG)
    for name, content in FILES.items():
        data = content.encode() if isinstance(content, str) else content
        (root / "base" / name).write_bytes(data)
    write_recipe(root)
    return root


def merged(recipe: Path, out: Path, *flags: str) -> Path:
    said = invoke("merge", recipe, "-o", out, *flags)
    assert said.code == 0, said
    return out


def record_of(out: Path) -> dict[str, Any]:
    found = json.loads((out / "suture.json").read_text())
    assert isinstance(found, dict)
    return found


def card_of(out: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of the model card."""
    text = (out / "README.md").read_text()
    assert text.startswith("---\n")
    front, _, body = text[4:].partition("\n---\n")
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found, body


# ------------------------------------------------------------------------------------ made again

METHODS: dict[str, dict[str, Any]] = {
    "ties": {"method": "ties", "parameters": {"density": 0.3}},
    "dare_ties": {"method": "dare_ties", "parameters": {"density": 0.3, "seed": 99}},
    "dare_linear": {"method": "dare_linear", "parameters": {"density": {"*mlp*": 0.2, "*": 0.9}}},
    "slerp": {"method": "slerp", "parameters": {"t": 0.2}, "base": None},
    "stitch": {"method": "stitch", "parameters": {}, "space": {"exclude": []}},
}


def recipe_of(method: str, **more: Any) -> dict[str, Any]:
    return {k: v for k, v in {**RECIPE, **METHODS[method], **more}.items() if v is not None}


@pytest.mark.parametrize("method", METHODS)
def test_a_record_makes_the_same_tensors_again(here: Path, method: str) -> None:
    """``suture merge OUT/suture.json -o AGAIN``: the same files, and the same record."""
    recipe = recipe_of(method, output={"dtype": "bfloat16", "shard_size": 5000})
    out = merged(write_recipe(here, recipe), here / "made" / "out")
    again = merged(out / "suture.json", here / "made" / "again")

    assert weights(again) == weights(out)
    assert record_of(again) == record_of(out)
    third = merged(again / "suture.json", here / "elsewhere" / "deep" / "third")
    assert weights(third) == weights(out)


def test_a_mergekit_recipe_is_recorded_in_our_terms(here: Path) -> None:
    """The record needs no translation any more, and makes the same."""
    entries = [
        {"model": f"./{n}", "parameters": {"weight": 0.4, "density": 0.5}} for n in ("math", "code")
    ]
    kit = {"merge_method": "dare_ties", "base_model": "./base", "models": entries}
    out = merged(write_recipe(here, kit), here / "made" / "out")
    again = merged(out / "suture.json", here / "made" / "again")

    assert record_of(out)["recipe"]["method"] == "dare_ties"
    assert weights(again) == weights(out)


def test_a_record_works_where_everything_was_moved(here: Path, tmp_path: Path) -> None:
    """Its paths are relative: models and output travel together."""
    out = merged(here / "recipe.yaml", here / "made" / "out")
    before = weights(out)
    moved = here.rename(tmp_path / "far")
    again = merged(moved / "made" / "out" / "suture.json", moved / "again")

    assert weights(again) == before


def test_a_record_works_from_any_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths start at the record, not at where the command is called."""
    out = merged(here / "recipe.yaml", here / "made" / "out")
    monkeypatch.chdir("/")
    again = merged(out / "suture.json", here / "made" / "again")

    assert weights(again) == weights(out)


@pytest.mark.parametrize("who", ["base", "math"])
def test_a_changed_input_is_found_out(here: Path, who: str) -> None:
    """One flipped bit in one input: refused by name and fingerprint, nothing published."""
    out = merged(here / "recipe.yaml", here / "made" / "out")
    path = here / who / "model.safetensors"
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    said = invoke("merge", out / "suture.json", "-o", here / "made" / "again")

    assert said.code == 2
    then = record_of(out)["inputs"][who]["fingerprint"]
    lines_of(said.err, f"{who}: ", "is not the model that was merged then", then)
    assert not (here / "made" / "again").exists()
    assert not staging(here / "made" / "again").exists()


def test_inputs_may_be_stored_differently(here: Path) -> None:
    """The fingerprint is that of the tensors: other shards, another order are the same model."""
    out = merged(here / "recipe.yaml", here / "made" / "out")
    for name in ("base", "math", "code"):
        tensors = read_model(here / name)
        shutil.rmtree(here / name)
        save_model(here / name, dict(reversed(tensors.items())), shards=3, config=CONFIG)
    again = merged(out / "suture.json", here / "made" / "again")

    assert weights(again) == weights(out)


@pytest.mark.parametrize("change", ["swapped", "added"])
def test_a_record_that_was_edited_is_refused(here: Path, change: str) -> None:
    """Another model under an old fingerprint, or one without: not the merge it says it is."""
    out = merged(here / "recipe.yaml", here / "made" / "out")
    record = record_of(out)
    models = record["recipe"]["models"]
    if change == "swapped":
        one, other = models["math"], models["code"]
        one["path"], other["path"] = other["path"], one["path"]
    else:
        models["third"] = {"path": "../../math"}
    path = write_recipe(out, json.dumps(record), "edited.json")
    said = invoke("merge", path, "-o", here / "made" / "again")

    assert said.code == 2, said
    lines_of(said.err, "math" if change == "swapped" else "third")
    assert not (here / "made" / "again").exists()


def test_a_newer_layout_is_refused(here: Path) -> None:
    """A ``suture.json`` of another schema is not guessed at."""
    out = merged(here / "recipe.yaml", here / "made" / "out")
    path = write_recipe(out, json.dumps({**record_of(out), "schema": 99}), "suture.json")
    said = invoke("merge", path, "-o", here / "made" / "again")

    assert said.code == 2
    lines_of(said.err, "has the schema 99")


def test_a_merge_of_merges_is_a_merge(here: Path) -> None:
    """An output is an input like any other."""
    first = merged(here / "recipe.yaml", here / "made" / "first")
    write_recipe(here, {**RECIPE, "models": {"first": "./made/first", "math": "./math"}})
    second = merged(here / "recipe.yaml", here / "made" / "second")

    made = record_of(first)["output"]["fingerprint"]
    assert record_of(second)["inputs"]["first"]["fingerprint"] == made


def test_patterns_in_another_order_are_another_merge(here: Path) -> None:
    """Of the patterns of a parameter the first that fits counts: their order is in the key."""

    def key(density: dict[str, float]) -> str:
        recipe = {**RECIPE, "parameters": {"density": density}}
        return run_key(make_plan(recipe, here / "x", MergeOptions(), here))

    one = {"*mlp*": 0.1, "*layers*": 0.9}

    assert key(one) == key(dict(one))
    assert key(one) != key(dict(reversed(one.items())))


# -------------------------------------------------------------------------------- what is recorded


def slow_fingerprint(tensors: Tensors) -> str:
    """The definition: xxh3-128 over names, dtypes, shapes and digests of pieces of 2**20."""
    text = b""
    for name in sorted(tensors):
        raw = tensors[name]
        numel = int(np.prod(raw.shape))
        step = (1 << 20) * (len(raw.data) // numel if numel else 1)
        pieces = [raw.data[i : i + step] for i in range(0, max(1, len(raw.data)), step)]
        whole = xxhash.xxh3_128_hexdigest(b"".join(xxhash.xxh3_128_digest(p) for p in pieces))
        text += f"{name}\0{raw.dtype}\0{list(raw.shape)}\0{whole}\n".encode()
    return xxhash.xxh3_128_hexdigest(text)


def test_fingerprints_are_what_they_say(here: Path) -> None:
    """Of all inputs and the output, whole models, by the plain definition; extra tensors too."""
    extra = llama(1) | {"extra.weight": packed([1.0])}
    save_model(here / "math", extra, config=CONFIG)
    write_recipe(here, {**RECIPE, "policy": {"extra": "drop"}})
    out = merged(here / "recipe.yaml", here / "made" / "out")
    record = record_of(out)

    assert record["output"]["fingerprint"] == slow_fingerprint(read_model(out))
    for name in ("base", "math", "code"):
        assert record["inputs"][name]["fingerprint"] == slow_fingerprint(read_model(here / name))


def test_fingerprints_of_large_and_empty_tensors(tmp_path: Path) -> None:
    """A tensor of several pieces, one of exactly one piece, one of none."""
    random = np.random.default_rng(0)
    sizes = {"a.w": (1 << 20) + 3, "b.w": 1 << 20, "c.w": 0, "d.w": 2 << 20}
    for name in ("base", "math"):
        made = {n: packed(random.standard_normal(s), "BF16") for n, s in sizes.items()}
        save_model(tmp_path / name, made)
    write_recipe(tmp_path, {**RECIPE, "models": {"math": "./math"}})
    record = record_of(merged(tmp_path / "recipe.yaml", tmp_path / "out"))

    assert record["output"]["fingerprint"] == slow_fingerprint(read_model(tmp_path / "out"))
    found = record["inputs"]["math"]["fingerprint"]
    assert found == slow_fingerprint(read_model(tmp_path / "math"))


def test_the_record_holds_what_is_needed(here: Path) -> None:
    """Versions, the whole recipe with defaults and seed, every input, and what came out."""
    write_recipe(here, recipe_of("dare_ties"))
    record = record_of(merged(here / "recipe.yaml", here / "made" / "out"))

    assert record["suture"] == suture.__version__
    assert record["recipe"]["parameters"]["seed"] == 99
    assert record["recipe"]["models"]["math"]["path"] == "../../math"
    assert record["recipe"]["base"] == "../../base"
    assert record["inputs"].keys() == {"base", "math", "code"}
    base = record["inputs"]["base"]
    assert (base["path"], base["tensors"], base["bytes"]) == ("../../base", 21, 23872)
    assert record["output"]["tensors"] == 21
    assert record["output"]["dtypes"] == {"float32": 5968}
    assert record["results"]["merged_tensors"] == 19


# ------------------------------------------------------------------------------ what stands beside


def test_files_beside_the_weights_are_carried_over(here: Path) -> None:
    """Tokenizer, chat template and generation settings byte by byte; nothing else of the folder."""
    out = merged(here / "recipe.yaml", here / "made" / "out")

    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "suture.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_text() == FILES[name]


def test_a_tokenizer_is_taken_whole_from_one_model(here: Path) -> None:
    """Where the base has none, the first model that has one gives all of its files."""
    for name in FILES:
        if name.startswith(("tokenizer", "special", "chat")):
            (here / "base" / name).unlink()
    (here / "code" / "tokenizer.json").write_text("of code")
    (here / "math" / "vocab.json").write_text("of math")
    (here / "math" / "merges.txt").write_text("of math")
    out = merged(here / "recipe.yaml", here / "made" / "out")

    assert (out / "vocab.json").read_text() == "of math"
    assert not (out / "tokenizer.json").exists()


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_configuration_says_the_dtype_of_the_tensors(here: Path, key: str) -> None:
    """Under the key that it has, in nested sections too; all else is as in the base."""
    config: dict[str, Any] = {k: v for k, v in CONFIG.items() if k != "torch_dtype"}
    inner = {key: "float32", "x": 1}
    config |= {key: "float32", "text_config": inner, "_name_or_path": "/of/mine/base"}
    (here / "base" / "config.json").write_text(json.dumps(config))
    write_recipe(here, {**RECIPE, "output": {"dtype": "bf16"}})
    out = merged(here / "recipe.yaml", here / "made" / "out")
    expected = {**config, key: "bfloat16", "text_config": {key: "bfloat16", "x": 1}}
    del expected["_name_or_path"]

    assert json.loads((out / "config.json").read_text()) == expected


def test_without_a_dtype_the_configuration_is_the_base_s(here: Path) -> None:
    """Nothing was asked, nothing is changed."""
    out = merged(here / "recipe.yaml", here / "made" / "out")

    assert json.loads((out / "config.json").read_text()) == CONFIG


# ---------------------------------------------------------------------------------------- the card


def test_the_card_can_be_read_by_the_hub(here: Path) -> None:
    """Front matter with its models, tags and licence, read by the hub's own code."""
    from huggingface_hub import ModelCard

    out = merged(here / "recipe.yaml", here / "made" / "out")
    front, body = card_of(out)
    card = ModelCard.load(out / "README.md")

    assert front["base_model"] == ["base", "math", "code"]
    assert "merge" in front["tags"]
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers"
    assert card.data.base_model == ["base", "math", "code"]
    made = record_of(out)["output"]["fingerprint"]
    lines_of(body, "# out", "TIES", "arXiv:2306.01708", "density: 0.5", made)


def test_the_card_holds_the_recipe(here: Path) -> None:
    """As YAML in a fence, with every parameter."""
    _, body = card_of(merged(here / "recipe.yaml", here / "made" / "out"))
    found = re.search(r"```yaml\n(.*?)```", body, re.S)
    assert found is not None
    recipe = yaml.safe_load(found[1])

    assert recipe["method"] == "ties"
    assert recipe["parameters"]["density"] == 0.5
    assert recipe["models"].keys() == {"math", "code"}


@pytest.mark.parametrize("form", ["mapping", "list", "mergekit"])
def test_no_absolute_path_leaves_the_machine(
    here: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the models were named, from wherever: record, card and configuration name none."""
    (here / "math").rename(here / "model")
    (here / "b").mkdir()
    (here / "code").rename(here / "b" / "model")
    paths = [str(here / "model"), str(here / "b" / "model")]
    recipe: dict[str, Any] = {**RECIPE, "base": str(here / "base")}
    if form == "mapping":
        recipe["models"] = dict(zip(("math", "code"), paths, strict=True))
    elif form == "list":
        recipe["models"] = paths
    else:
        own = {"weight": 1, "density": 0.5}
        entries = [{"model": p, "parameters": own} for p in paths]
        recipe = {"merge_method": "ties", "base_model": str(here / "base"), "models": entries}
    monkeypatch.chdir("/")
    out = merged(write_recipe(here, recipe), here / "made" / "out")

    for name in ("suture.json", "README.md", "config.json"):
        assert str(here) not in (out / name).read_text()
        assert str(here.parent.parent) not in (out / name).read_text()
    assert card_of(out)[0]["base_model"][0] == "base"


def test_a_relative_path_is_no_hub_id(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``models/math`` in a recipe elsewhere looks like an organisation's model, and is none."""
    (here / "models").mkdir()
    (here / "math").rename(here / "models" / "math")
    write_recipe(here, {**RECIPE, "models": {"m": "models/math", "code": "./code"}})
    monkeypatch.chdir("/")
    out = merged(here / "recipe.yaml", here / "made" / "out")

    assert sorted(card_of(out)[0]["base_model"]) == ["base", "code", "math"]
    assert record_of(out)["inputs"]["m"]["path"] == "../../models/math"


def test_a_model_of_the_hub_keeps_its_id(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Record and card name it by id and revision, not by its place in the cache."""
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "hub" / "models--org--name"
    snapshot = root / "snapshots" / commit
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((here / "math").iterdir())):
        shutil.copy(file, root / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    real = huggingface_hub.snapshot_download

    def offline(*arguments: Any, **how: Any) -> Any:
        return real(*arguments, **{**how, "cache_dir": tmp_path / "hub", "local_files_only": True})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    write_recipe(here, {**RECIPE, "models": {"m": "org/name@main", "code": "./code"}})
    out = merged(here / "recipe.yaml", here / "made" / "out")

    assert record_of(out)["inputs"]["m"]["path"] == "org/name@main"
    assert sorted(card_of(out)[0]["base_model"]) == ["base", "code", "org/name"]
    assert weights(merged(out / "suture.json", here / "made" / "again")) == weights(out)


@pytest.mark.parametrize("name", ["a|b", "é", "- x", "yes", "12", "#1", "a: b", "{{x}}", "<b>"])
def test_odd_names_keep_the_card_whole(here: Path, name: str) -> None:
    """Names of models and outputs that mean something in YAML or Markdown."""
    write_recipe(here, {**RECIPE, "models": {name: "./math", "code": "./code"}})
    out = merged(here / "recipe.yaml", here / "made" / name)
    front, _ = card_of(out)

    assert sorted(front["base_model"]) == ["base", "code", "math"]
    assert set(record_of(out)["inputs"]) == {"base", name, "code"}
    assert weights(merged(out / "suture.json", here / "made" / "again")) == weights(out)


# ------------------------------------------------------------------------------------ it is a model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_and_generates(
    tmp_path: Path, tied: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``from_pretrained(OUT)`` just works; the weights in memory are those in the file."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    for seed, name in enumerate(("base", "math", "code")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    output = {"dtype": dtype, "shard_size": "8KB"}
    write_recipe(tmp_path, {**RECIPE, "space": {"exclude": []}, "output": output})
    out = merged(tmp_path / "recipe.yaml", tmp_path / "out")
    load = AutoModelForCausalLM.from_pretrained
    model, info = load(out, output_loading_info=True, dtype="auto")
    made = model.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=4, do_sample=False)

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert 3 < made.shape[1] <= 7
    assert model.dtype == getattr(torch, dtype)
    files = read_model(out)
    assert ("lm_head.weight" in files) == (not tied)
    for name, value in model.state_dict().items():
        stored = files.get(name, files["model.embed_tokens.weight"])
        assert np.array_equal(value.float().numpy(), stored.values), name
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied


def test_inputs_are_never_touched(here: Path) -> None:
    """After merges of every kind, the inputs have their bytes and their times."""
    digests = {
        p: (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in here.rglob("*")
        if p.is_file()
    }
    before = tree(here)
    for method in METHODS:
        merge(recipe_of(method), here.parent / method, folder=here)

    assert tree(here) == before
    for path, (changed, digest) in digests.items():
        assert path.stat().st_mtime_ns == changed
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
