"""What stands beside the weights: provenance that can be run again, a card, a model that loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from making import (
    CONFIG,
    RECIPE,
    family,
    llama,
    read_model,
    save_model,
    suture,
    weights,
    write_recipe,
)
from suture.errors import MismatchError, RecipeError
from suture.run import merge

TINY = {"hidden": 16, "layers": 2, "vocabulary": 24}


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """A family of models and a merge of it."""
    family(tmp_path, config=CONFIG, **TINY)
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"a": 1}')
    (tmp_path / "base" / "generation_config.json").write_text('{"max_new_tokens": 3}')
    merge(write_recipe(tmp_path), tmp_path / "out")
    return tmp_path


def test_provenance_makes_the_same_bytes_again(done: Path) -> None:
    """``suture merge OUT/suture.json -o AGAIN`` writes the same weights, byte for byte."""
    merge(done / "out" / "suture.json", done / "again")

    assert weights(done / "again") == weights(done / "out")


def test_provenance_moves_with_its_tree(done: Path, tmp_path: Path) -> None:
    """Paths are relative: the whole tree may be moved."""
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    shutil.copytree(done, moved)
    shutil.rmtree(done / "base")

    merge(moved / "out" / "suture.json", moved / "again")

    assert weights(moved / "again") == weights(moved / "out")
    assert str(tmp_path) not in (moved / "out" / "suture.json").read_text()


def test_another_input_than_then_is_refused(done: Path) -> None:
    """A model that changed since is named, and nothing appears."""
    save_model(done / "math", llama(99, **TINY), config=CONFIG)

    with pytest.raises(MismatchError, match=r"math: .* is not the model that was merged then"):
        merge(done / "out" / "suture.json", done / "again")
    assert not (done / "again").exists()


def test_a_newer_layout_is_refused(done: Path) -> None:
    """A ``suture.json`` of another schema is not guessed at."""
    path = done / "out" / "suture.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))

    with pytest.raises(RecipeError, match="has the schema 99"):
        merge(path, done / "again")


def test_the_card_and_the_files_beside(done: Path) -> None:
    """Front matter that the hub reads, no paths of this machine, and the base's own small files."""
    text = (done / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])

    assert front["tags"] == ["merge", "suture"]
    assert front["base_model"] == ["base", "math", "code"]
    assert str(done) not in text
    assert "Yadav" in text
    assert (done / "out" / "tokenizer_config.json").read_text() == '{"a": 1}'
    assert (done / "out" / "generation_config.json").read_text() == '{"max_new_tokens": 3}'


def test_the_config_has_the_dtype_of_the_tensors(done: Path) -> None:
    """Another output dtype is written into ``config.json`` too."""
    recipe = {**RECIPE, "output": {"dtype": "bfloat16"}}
    merge(write_recipe(done, recipe, "half.yaml"), done / "half")

    assert json.loads((done / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in read_model(done / "half").values()} == {"BF16"}


@pytest.mark.parametrize("head", [True, False], ids=["untied", "tied"])
def test_transformers_loads_and_generates(tmp_path: Path, head: bool) -> None:
    """The folder is a model: it loads without a complaint and continues a text."""
    transformers = pytest.importorskip("transformers")
    import torch

    config = {**CONFIG, "tie_word_embeddings": not head}
    family(tmp_path, config=config, head=head, **TINY)
    merge(write_recipe(tmp_path), tmp_path / "out")

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False,
                         pad_token_id=0)  # fmt: skip

    assert ids.shape[1] <= 7
    embedding = read_model(tmp_path / "out")["model.embed_tokens.weight"].values
    assert torch.equal(model.get_input_embeddings().weight, torch.tensor(embedding))


def test_the_command_line_does_it_again(done: Path) -> None:
    """From another folder, through the command."""
    said = suture("merge", "out/suture.json", "-o", "again", cwd=done)

    assert said.code == 0, said.err
    assert weights(done / "again") == weights(done / "out")


def test_patterns_in_another_order_are_another_merge(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the patterns of a parameter the first that fits counts, so their order is part of the key."""
    from suture import run

    def key(density: dict[str, float]) -> str:
        recipe = {**RECIPE, "base": str(done / "base"), "parameters": {"density": density},
                  "models": {m: str(done / m) for m in ("math", "code")}}  # fmt: skip
        return run._key(run.plan_recipe(recipe, done / "x", run.Options()))

    one = {"*mlp*": 0.1, "*layers*": 0.9}

    assert key(one) == key(dict(one))
    assert key(one) != key(dict(reversed(one.items())))
