"""Vocabularies of different models: what is read, which row stands for a token, what is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from tokenizers.pre_tokenizers import Whitespace

import suture
import talk
import toy
from suture.checkpoints.chat import CHAT_TEMPLATES
from suture.checkpoints.embeddings import MatchedRows
from suture.checkpoints.vocabulary import Vocabulary, read_vocabulary, union, written
from suture.errors import CheckpointError, RecipeError, SutureError
from suture.runs.place import MergeOptions
from suture.verbs.merge.documents import read_recipe
from suture.verbs.merge.plan import make_plan

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EVERYTHING = {"exclude": []}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with tokenizers of several kinds."""
    where = tmp_path_factory.mktemp("models")
    plain, special = talk.tokenizer(talk.PROSE, 90), talk.tokenizer(talk.PROSE, 90, ["<|go|>"])
    chat = talk.tokenizer(talk.PROSE, 90, ["<|go|>", "<|a|>"], chat_template="{{ messages }} A")
    talk.model(where / "base", plain, 1)
    talk.model(where / "ada", special, 2)
    talk.model(where / "bob", talk.tokenizer(talk.CODE, 100, ["<|b|>"]), 3)
    talk.model(where / "chat", chat, 4)
    talk.model(where / "tied", plain, 5, tied=True)
    talk.model(where / "half", special, 6, dtype=torch.bfloat16)
    talk.model(where / "padded", plain, 7, rows=96)
    talk.model(where / "free", plain, 11)
    bare = talk.model(where / "bare", plain, 8)
    wide = talk.model(where / "wide", special, 9)
    liar = talk.model(where / "liar", special, 10)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    for file in wide.glob("tokenizer*"):
        file.unlink()
    (liar / "config.json").write_text(json.dumps(talk.config(70)))
    return where


def kit(place: Path, *names: str, **more: Any) -> dict[str, Any]:
    """A mergekit recipe for task arithmetic."""
    models = [{"model": str(place / n), "parameters": {"weight": 0.5}} for n in names]
    return {"merge_method": "task_arithmetic", "base_model": str(place / "base"), "models": models,
            "dtype": "float32", **more}  # fmt: skip


def ours(place: Path, *names: str, base: str = "base", **sections: Any) -> dict[str, Any]:
    """A recipe of our own for the same."""
    return {"base": str(place / base), "models": {n: str(place / n) for n in names},
            "method": "task_arithmetic", "parameters": {"weight": 0.5}, **sections}  # fmt: skip


def problem(what: Mapping[str, Any], out: Path) -> str:
    """What is said of a recipe before anything is read."""
    with pytest.raises(SutureError) as caught:
        make_plan(what, out, MergeOptions())
    assert not out.exists()
    return str(caught.value)


def settings(out: Path, name: str = "config.json") -> Any:
    """A JSON file of an output."""
    return json.loads((out / name).read_text())


# ------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_tokens_are_those_that_transformers_sees(kind: str, tmp_path: Path) -> None:
    """Those of the file, added ones, and those that only the configuration names."""
    words = talk.tokenizer(talk.PROSE, 90, ["<|go|>"], pad_token="<pad>", unk_token="<s>")
    words.save_pretrained(tmp_path)
    whole = settings(tmp_path, "tokenizer.json")
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"] != "<pad>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    if kind == "vocab.json":
        (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
        more = {t["content"]: t["id"] for t in whole["added_tokens"]}
        (tmp_path / "added_tokens.json").write_text(json.dumps(more))
        (tmp_path / "tokenizer.json").unlink()

    found = read_vocabulary(tmp_path)

    assert found is not None
    assert found.ids == words.get_vocab()
    assert found.size == len(words.get_vocab())
    assert "<|go|>" in found.added


def test_a_union_keeps_the_first_one_s_ids() -> None:
    """New ordinary tokens follow in order of model and id, then added ones; none stands twice."""
    first = Vocabulary({"a": 0, "b": 1, "<x>": 5}, {"<x>": {"special": True}})
    second = Vocabulary({"c": 0, "a": 1, "d": 2, "<y>": 3}, {"<y>": {"special": True}})
    third = Vocabulary({"d": 0, "<y>": 1, "e": 2})
    found = union(first, [second, third])

    assert found.ids == {"a": 0, "b": 1, "<x>": 5, "c": 6, "d": 7, "e": 8, "<y>": 9}
    assert found.added["<y>"] == {"special": True}
    assert list(found.added) == ["<x>", "<y>", "c", "d", "e"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": {"vocab": {"a": "0"}}}, "no whole numbers"),
        ({"model": {"vocab": {"a": -1}}}, "no whole numbers"),
        ({"model": {"vocab": [1, 2]}}, "no list of tokens"),
        ({"model": {}}, "has no vocab"),
        ({"model": {"vocab": {"a": 10**12}}}, "absurd ids"),
        ({"model": {"vocab": {}}}, "without tokens"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": 3, "id": 1}]}, "added_tokens"),
    ],
)
def test_a_hostile_tokenizer_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    """Whatever stands in the file: an error with its name, no crash and no giant allocation."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(suture.CheckpointError, match=said):
        read_vocabulary(tmp_path)


def test_a_sentencepiece_model_alone_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """Its tokens cannot be matched honestly without its own library."""
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x01x")
    with pytest.raises(suture.CheckpointError, match=r"save_pretrained\(folder\)"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel", "Unigram", "rebuilt GPT-2"])
def test_unions_of_every_kind_of_tokenizer_load(kind: str, tmp_path: Path) -> None:
    """The edited files give the tokens of both under the ids that the rows have."""
    words = [*"abc", "[UNK]", "the", "sea"]
    ids = {w: n for n, w in enumerate(words)}
    made = {
        "WordPiece": lambda: WordPiece(ids, unk_token="[UNK]"),
        "WordLevel": lambda: WordLevel(ids, unk_token="[UNK]"),
        "Unigram": lambda: Unigram([(w, -float(n)) for n, w in enumerate(words)], unk_id=3),
        "rebuilt GPT-2": lambda: BPE(ids, [], unk_token="[UNK]"),
    }[kind]
    for name, more in (("one", ["<|x|>"]), ("two", ["<|y|>", "zebra"])):
        inner = Tokenizer(made())
        inner.pre_tokenizer = Whitespace()
        inner.add_tokens([AddedToken(t, special=t.startswith("<")) for t in more])
        whole = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
        whole.save_pretrained(tmp_path / name)
    config = settings(tmp_path / "one", "tokenizer_config.json")
    if kind == "rebuilt GPT-2":  # a class that reads added tokens from its configuration alone
        config |= {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {
            "6": {"content": "<|x|>", "special": True}, "3": {"content": "[UNK]"}}}  # fmt: skip
        (tmp_path / "one" / "tokenizer_config.json").write_text(json.dumps(config))
    one, two = read_vocabulary(tmp_path / "one"), read_vocabulary(tmp_path / "two")
    assert one is not None
    assert two is not None
    out = union(one, [two])
    (tmp_path / "out").mkdir()
    for name, content in written(tmp_path / "one", one, out).items():
        (tmp_path / "out" / name).write_bytes(content)
    found = talk.loaded(tmp_path / "out")

    assert {t: i for t, i in found.get_vocab().items() if t in out.ids} == out.ids
    assert out.ids["<|x|>"] == 6
    assert found.convert_tokens_to_ids(["zebra", "<|y|>"]) == [out.ids["zebra"], out.ids["<|y|>"]]
    assert found("<|y|>zebra", add_special_tokens=False)["input_ids"] == [
        out.ids["<|y|>"], out.ids["zebra"]]  # fmt: skip


# --------------------------------------------------------------------------------------- which row


@pytest.fixture(scope="module")
def rows(place: Path) -> tuple[MatchedRows, np.ndarray]:
    """A tensor of rows of all kinds, and what it must hold."""
    one, two = suture.open(place / "base"), suture.open(place / "half")
    own = np.array([[0, 1, 2, -1, 7, 8, 9], [5, -1, 4, -1, 3, 2, 1]])
    source = np.array([0, 1, -2, -1, 0, 0, -2, -3, -3])
    row = np.array([3, 6, 0, 0, 7, 8, 0, 0, 0])
    lens = MatchedRows([(one, EMBEDDING), (two, EMBEDDING)], 0, (9, talk.HIDDEN), source, row, own)
    a, b = (np.asarray(c[EMBEDDING], np.float64) for c in (one, two))
    parts = [a[3], b[6], (a[2] + b[4]) / 2, 0 * a[0], a[7], a[8], (a[9] + b[1]) / 2]
    mean = np.mean([np.float32(p) for p in parts], 0, dtype=np.float64)
    return lens, np.array([*parts, mean, mean], np.float32)


@given(st.integers(0, 9 * talk.HIDDEN), st.integers(0, 9 * talk.HIDDEN))
def test_any_stretch_of_rows_is_that_of_the_whole(
    rows: tuple[MatchedRows, np.ndarray], one: int, other: int
) -> None:
    """Taken rows, means, zeros and padding, from any element to any other, always the same bytes."""
    lens, wanted = rows
    start, stop = sorted((one, other))
    raw = np.zeros((stop - start) * 4, np.uint8)
    lens.read(start, raw)

    assert lens.spec.dtype == "F32"
    assert (raw.view(np.float32) == wanted.reshape(-1)[start:stop]).all()


def test_rows_that_are_only_taken_keep_their_bytes(place: Path) -> None:
    """Nothing is widened where nothing is computed."""
    half = suture.open(place / "half")
    source, row = np.zeros(3, np.int64), np.array([4, 0, 1])
    lens = MatchedRows([(half, EMBEDDING)], 0, (3, talk.HIDDEN), source, row, row[None])
    raw = np.zeros(3 * talk.HIDDEN * 2, np.uint8)
    lens.read(0, raw)

    assert lens.spec.dtype == "BF16"
    assert (raw.view(np.int16).reshape(3, -1) == half.tensor(EMBEDDING)[row].view(
        torch.int16).numpy()).all()  # fmt: skip


def test_models_of_another_vocabulary_load_and_repeat(place: Path, tmp_path: Path) -> None:
    """The folder loads in transformers, and its provenance gives the same bytes again."""
    what = kit(place, "ada", "bob", tokenizer_source="union")
    first, _ = toy.run(tmp_path / "out", what)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    again, _ = toy.run(tmp_path / "again", tmp_path / "out" / "suture.json")  # type: ignore[arg-type]
    blocks, _ = toy.run(tmp_path / "blocks", what, block=1 << 10, threads=3)

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.get_input_embeddings().weight.shape[0] == settings(tmp_path / "out")["vocab_size"]
    assert len(talk.loaded(tmp_path / "out").get_vocab()) == len(first[EMBEDDING])
    assert toy.same_bytes(first, again) == []
    assert toy.same_bytes(first, blocks) == []


def test_the_same_tokenizers_change_nothing(place: Path, tmp_path: Path) -> None:
    """Where all vocabularies agree, the merge is the one without a tokenizer source."""
    one, _ = toy.run(tmp_path / "one", kit(place, "free", tokenizer_source="union"))
    two, _ = toy.run(tmp_path / "two", kit(place, "free"))

    assert toy.same_bytes(one, two) == []
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (
        place / "base" / "tokenizer.json").read_bytes()  # fmt: skip


def test_the_dtype_stays_that_of_the_base(place: Path, tmp_path: Path) -> None:
    """Rows are averaged in float32, but the output is what the base was."""
    out, _ = toy.run(tmp_path / "out", {
        "method": "linear", "policy": {"vocabulary": "union"}, "space": {"exclude": []},
        "models": {n: str(place / n) for n in ("half", "ada", "bob")}})  # fmt: skip

    assert out[EMBEDDING].dtype == out[HEAD].dtype == torch.bfloat16


def test_special_tokens_follow_their_tokenizer(place: Path, tmp_path: Path) -> None:
    """With another model's tokenizer, ids in the configuration name the same tokens as before."""
    base, bob = place / "base", place / "bob"
    here = talk.loaded(base).get_vocab()["sea" if "sea" in talk.loaded(base).get_vocab() else "Ġ"]
    word = {i: t for t, i in talk.loaded(base).get_vocab().items()}[here]
    shifted = tmp_path / "base"
    talk.model(shifted, talk.tokenizer(talk.PROSE, 90), 1, pad_token_id=here, sep_token_id=[0, 1])
    (shifted / "generation_config.json").write_text(json.dumps({"pad_token_id": here, "top_k": 5}))
    what = kit(place, "bob", tokenizer_source=str(bob)) | {"base_model": str(shifted)}
    toy.run(tmp_path / "out", what)

    assert settings(tmp_path / "out")["pad_token_id"] == talk.loaded(bob).get_vocab()[word]
    assert settings(tmp_path / "out")["sep_token_id"] == [0, 1]
    found = settings(tmp_path / "out", "generation_config.json")
    assert found == {"pad_token_id": talk.loaded(bob).get_vocab()[word], "top_k": 5}


@pytest.mark.parametrize(
    "said", ["<x>", 5, {"added_tokens_decoder": {"9" * 5000: {"content": "z"}}}]
)
def test_special_tokens_that_are_no_list_are_none(said: Any, tmp_path: Path) -> None:
    """A word is not a list of letters, and a number of absurdly many digits is no id."""
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    config = said if isinstance(said, dict) else {"additional_special_tokens": said}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    found = read_vocabulary(tmp_path)

    assert found is not None
    assert found.ids == {"a": 0, "b": 1}


# ------------------------------------------------------------------------------------ our recipes


def test_sizes_that_differ_are_an_error_with_the_policies(place: Path, tmp_path: Path) -> None:
    """By default nobody guesses: both sizes are named, and what can be done."""
    said = problem(ours(place, "ada"), tmp_path / "out")

    rows = [len(talk.loaded(place / n).get_vocab()) for n in ("base", "ada")]
    assert f"vocabularies of {rows[0]} and {rows[1]} tokens" in said
    assert "policy: {vocabulary: union}" in said
    assert "shared-rows" in said


def test_shared_rows(place: Path, tmp_path: Path) -> None:
    """Rows that both have are merged; the others are those of the model that has them."""
    what = ours(place, "ada", policy={"vocabulary": "shared-rows"}, space=EVERYTHING)
    out, _ = toy.run(tmp_path / "out", what)
    base, ada = toy.read(place / "base"), toy.read(place / "ada")
    n = len(base[EMBEDDING])

    for name in (EMBEDDING, HEAD):
        assert torch.allclose(out[name][:n], (base[name] + ada[name][:n]) / 2, atol=1e-6)
        assert torch.equal(out[name][n:], ada[name][n:])
    assert settings(tmp_path / "out")["vocab_size"] == n + 1
    assert talk.loaded(tmp_path / "out").get_vocab() == talk.loaded(place / "ada").get_vocab()


def test_shared_rows_need_shared_ids(place: Path, tmp_path: Path) -> None:
    """Tokenizers that give the same ids to other tokens cannot share rows."""
    what = ours(place, "bob", policy={"vocabulary": "shared-rows"})
    assert "have the ids of other tokens" in problem(what, tmp_path / "out")


def test_base_and_union(place: Path, tmp_path: Path) -> None:
    """The base's vocabulary, rows without a token included; or everybody's."""
    what = ours(place, "ada", base="padded", policy={"vocabulary": "base"}, space=EVERYTHING)
    kept, _ = toy.run(tmp_path / "base", what)
    what = ours(place, "ada", policy={"vocabulary": "union"})
    more, _ = toy.run(tmp_path / "union", what)
    base, ada, padded = (toy.read(place / n) for n in ("base", "ada", "padded"))
    n = len(base[EMBEDDING])

    assert torch.equal(kept[EMBEDDING][n:], padded[EMBEDDING][n:])
    assert torch.allclose(
        kept[EMBEDDING][:n], (padded[EMBEDDING][:n] + ada[EMBEDDING][:n]) / 2, atol=1e-6
    )
    assert settings(tmp_path / "base")["vocab_size"] == len(padded[EMBEDDING])
    # The default space leaves embeddings alone: the base's rows, and the new token's only owner.
    assert torch.equal(more[EMBEDDING], torch.cat([base[EMBEDDING], ada[EMBEDDING][n:]]))
    assert talk.loaded(tmp_path / "union").get_vocab() == talk.loaded(place / "ada").get_vocab()


def test_a_tokenizer_section_of_our_own(place: Path, tmp_path: Path) -> None:
    """The same section as mergekit's, with the names of models instead of paths."""
    section = {"source": "union", "tokens": {
        "<|go|>": {"source": {"kind": "model_token", "model": "bob", "token": "<|b|>"}, "force": True},
        "<|b|>": {"source": "zero", "force": True}}}  # fmt: skip
    out, _ = toy.run(
        tmp_path / "out", ours(place, "ada", "bob", tokenizer=section, space=EVERYTHING)
    )
    ids, bob = talk.loaded(tmp_path / "out").get_vocab(), toy.read(place / "bob")
    there = talk.loaded(place / "bob").get_vocab()["<|b|>"]

    assert torch.equal(out[HEAD][ids["<|go|>"]], bob[HEAD][there])
    assert not out[EMBEDDING][ids["<|b|>"]].any()


def test_a_tokenizer_from_another_folder(place: Path, tmp_path: Path) -> None:
    """A folder that is none of the models can give the tokenizer, and does so again."""
    what = kit(place, "bob", tokenizer_source=str(place / "ada"))
    one, _ = toy.run(tmp_path / "out", what)
    again, _ = toy.run(tmp_path / "again", tmp_path / "out" / "suture.json")  # type: ignore[arg-type]

    assert talk.loaded(tmp_path / "out").get_vocab() == talk.loaded(place / "ada").get_vocab()
    assert toy.same_bytes(one, again) == []


WRONG: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "unknown policy": (("ada",), {"policy": {"vocabulary": "unoin"}}, "did you mean 'union'"),
    "policy and section": (
        ("ada",), {"policy": {"vocabulary": "base"}, "tokenizer": "union"}, "give one of them"),
    "unknown source": (("ada",), {"tokenizer": "adda"}, "did you mean 'ada'"),
    "unknown key": (("ada",), {"tokenizer": {"sources": "base"}}, "did you mean 'source'"),
    "unknown token": (
        ("ada",), {"tokenizer": {"tokens": {"<|go|>": {"source": {
            "kind": "model_token", "model": "ada", "token": "<|og|>"}}}}}, "did you mean '<|go|>'"),
    "token of a model without it": (
        ("ada",), {"tokenizer": {"tokens": {"<|go|>": "base"}}}, "base has no token '<|go|>'"),
    "a new token from nowhere": (
        ("ada",), {"tokenizer": {"tokens": {"<|new|>": {}}}}, "no model has this token"),
    "token id out of range": (
        ("ada",), {"tokenizer": {"tokens": {"<|go|>": {"source": {
            "kind": "model_token", "model": "ada", "token_id": 5000}}}}}, "not 5000"),
    "unknown model of a token": (
        ("ada",), {"tokenizer": {"tokens": {"<|go|>": "bbo"}}}, "'bbo' is none of the models"),
    "unknown kind": (
        ("ada",), {"tokenizer": {"tokens": {"<|go|>": {"source": {"kind": "zeros"}}}}},
        "did you mean 'zero'"),
    "force without source": (
        ("ada",), {"tokenizer": {"tokens": {"<|go|>": {"force": True}}}}, "force needs a source"),
    "padding to nothing": (
        ("ada",), {"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of"),
    "no tokenizer": (("wide",), {"tokenizer": "union"}, "has no tokenizer"),
    "a config that lies": (("liar",), {"tokenizer": "union"}, "says vocab_size 70"),
    "unknown template": (("bare",), {"chat_template": "chat-ml"}, "did you mean 'chatml'"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_what_cannot_be_done_is_said_before(name: str, place: Path, tmp_path: Path) -> None:
    """Found in the plan, with the place in the recipe and a remedy."""
    models, sections, said = WRONG[name]
    assert said in problem(ours(place, *models, **sections), tmp_path / "out")


def test_mergekit_s_two_keys_exclude_each_other(place: Path, tmp_path: Path) -> None:
    """As in mergekit."""
    what = kit(place, "ada", tokenizer_source="base", tokenizer={"source": "base"})
    assert "give one of them" in problem(what, tmp_path / "out")


def test_a_model_without_a_tokenizer_has_that_of_the_base(place: Path, tmp_path: Path) -> None:
    """Where it has as many rows; and that is said."""
    _, report = toy.run(tmp_path / "out", kit(place, "bare", "ada", tokenizer_source="union"))
    assert any("bare has no tokenizer" in note for note in report.notes)


def test_a_union_without_a_tokenizer_json_is_refused(place: Path, tmp_path: Path) -> None:
    """A vocabulary in other files cannot be extended honestly; it can be taken as it is."""
    old = talk.model(tmp_path / "old", talk.tokenizer(talk.PROSE, 90), 1)
    whole = settings(old, "tokenizer.json")
    (old / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (old / "tokenizer.json").unlink()
    what = {**kit(place, "ada", tokenizer_source="union"), "base_model": str(old)}

    assert "no tokenizer.json" in problem(what, tmp_path / "out")
    toy.run(tmp_path / "out", {**what, "tokenizer_source": "base"})
    assert (tmp_path / "out" / "vocab.json").is_file()


@pytest.mark.parametrize("ids", [[3, 7, 5], [10, 4, 2], [3, 4, 5], [0, 0, 0]])
@pytest.mark.parametrize(
    "words", [{"red": 0, "[UNK]": 1, "blue": 2}, {"red": 0, "[UNK]": 2, "blue": 9}]
)
def test_added_tokens_have_the_ids_with_which_they_are_loaded(
    words: dict[str, int], ids: list[int], tmp_path: Path
) -> None:
    """Whatever stands in the file, the library numbers them anew; one is a word already."""
    inner = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    inner.save(str(tmp_path / "tokenizer.json"))
    whole = settings(tmp_path, "tokenizer.json")
    form = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    added = zip(("x", "blue", "y"), ids, strict=True)
    whole["added_tokens"] = [{"id": number, "content": token, **form} for token, number in added]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))

    found = read_vocabulary(tmp_path)

    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert found is not None
    assert found.ids == {t: loaded.token_to_id(t) for t in ("red", "[UNK]", "blue", "x", "y")}


@pytest.mark.parametrize("far", [2, 9])
def test_new_tokens_are_loaded_with_the_ids_of_their_rows(far: int, tmp_path: Path) -> None:
    """Where the vocabulary has holes they would not be, and that is refused."""
    for name, words in (
        ("a", {"red": 0, "[UNK]": 1, "blue": far}),
        ("b", {"[UNK]": 0, "green": 1}),
    ):
        (tmp_path / name).mkdir()
        Tokenizer(WordLevel(words, unk_token="[UNK]")).save(str(tmp_path / name / "tokenizer.json"))
    one, other = read_vocabulary(tmp_path / "a"), read_vocabulary(tmp_path / "b")
    assert one is not None
    assert other is not None
    both = union(one, [other])
    if far == 9:
        with pytest.raises(
            CheckpointError, match="3 tokens, with ids up to 9.*'green' would have the id 3, not 10"
        ):
            written(tmp_path / "a", one, both)
        for name, own in (("a", one), ("b", other)):  # what the message advises
            files = written(tmp_path / name, own, own)
            assert files["tokenizer.json"] == (tmp_path / name / "tokenizer.json").read_bytes()
        return
    (tmp_path / "out.json").write_bytes(written(tmp_path / "a", one, both)["tokenizer.json"])

    loaded = Tokenizer.from_file(str(tmp_path / "out.json"))
    assert both.ids == {token: loaded.token_to_id(token) for token in both.ids}


def test_a_section_is_read_whole() -> None:
    """All faults of a section are found at once."""
    wanted = {"source": 5, "pad_to_multiple_of": "x", "tokens": {"a": 1, "b": {"x": 1}}}
    with pytest.raises(RecipeError, match="4 problems") as caught:
        read_recipe({"models": {"ada": "a"}, "method": "linear", "tokenizer": wanted})
    print(caught.value)
    for text in ("tokenizer.source: the name of a model, not 5", "unknown key 'x'",
                 "tokenizer.pad_to_multiple_of: a whole number from 1", "tokenizer.tokens.a: "):  # fmt: skip
        assert text in str(caught.value)


# ------------------------------------------------------------------------------------- tied heads


@pytest.mark.parametrize("base", ["tied", "free"])
def test_a_mix_of_tied_and_untied_heads(base: str, place: Path, tmp_path: Path) -> None:
    """Both tensors are merged and written, and the configuration says that they are two."""
    other = "free" if base == "tied" else "tied"
    what = ours(place, other, base=base, space=EVERYTHING)
    out, report = toy.run(tmp_path / "out", what)
    tied, untied = toy.read(place / "tied"), toy.read(place / "free")

    assert torch.allclose(out[HEAD], (tied[EMBEDDING] + untied[HEAD]) / 2, atol=1e-6)
    assert torch.allclose(out[EMBEDDING], (tied[EMBEDDING] + untied[EMBEDDING]) / 2, atol=1e-6)
    assert settings(tmp_path / "out")["tie_word_embeddings"] is False
    assert any("the output holds both" in note for note in report.notes)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, out[HEAD])
    assert torch.equal(model.model.embed_tokens.weight, out[EMBEDDING])


def test_heads_that_no_edit_touches_stay_tied(place: Path, tmp_path: Path) -> None:
    """The default space copies embeddings and heads of the base, so one tensor is enough."""
    out, _ = toy.run(tmp_path / "out", ours(place, "free", base="tied"))
    assert HEAD not in out
    assert settings(tmp_path / "out")["tie_word_embeddings"] is True


# ---------------------------------------------------------------------------------- chat templates

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Go"}]  # fmt: skip
SAID = {
    "alpaca": "### Instruction:\nHi\n\n### Response:\nHo\n\n### Instruction:\nGo\n\n### Response:\n",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
              "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Ho[|endofturn|]\n[|user|]Go\n"
              "[|assistant|]",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>"
              "assistant<|end_header_id|>\n\nHo<|eot_id|><|start_header_id|>user<|end_header_id|>"
              "\n\nGo<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Hi [/INST] Ho</s> [INST] Go [/INST]",
}  # fmt: skip


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_named_chat_templates(name: str, place: Path, tmp_path: Path) -> None:
    """Each gives the text of its format, to the letter, once the output is loaded."""
    toy.run(tmp_path / "out", ours(place, "bare", chat_template=name))
    words = talk.loaded(tmp_path / "out")

    said = words.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert said == SAID[name]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("auto", "{{ messages }} A"), ("{{ messages[0].content }}", "{{ messages[0].content }}")],
)
def test_chat_templates_of_models_and_as_given(
    wanted: str, found: str, place: Path, tmp_path: Path
) -> None:
    """``auto`` takes what most models have; text is taken as it is, tokenizer made or copied."""
    toy.run(tmp_path / "one", kit(place, "chat", tokenizer_source="union", chat_template=wanted))
    toy.run(tmp_path / "two", kit(place, "bare", chat_template=wanted))

    assert talk.loaded(tmp_path / "one").chat_template == found
    two = talk.loaded(tmp_path / "two").chat_template
    assert two == (None if wanted == "auto" else found)


def test_a_tokenizer_without_a_readable_configuration_gets_no_template(
    place: Path, tmp_path: Path
) -> None:
    """What is not a JSON object cannot hold a template: an error, not a crash."""
    talk.model(tmp_path / "odd", talk.tokenizer(talk.PROSE, 90), 1)
    (tmp_path / "odd" / "tokenizer_config.json").write_text("[1]")

    said = problem(ours(place, "bare", chat_template="chatml") | {"base": str(tmp_path / "odd")},
                   tmp_path / "out")  # fmt: skip

    assert "tokenizer_config.json is not a JSON object" in said
