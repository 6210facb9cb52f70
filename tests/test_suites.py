"""Suites: what is asked, what comes out, what is kept, and what is refused before a model loads."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import adapting
import suture
import tiny_model
from making import invoke, lines_of
from suture.errors import MismatchError, OutputError, Problems, RecipeError, SutureError
from suture.evals.accuracy import accuracy
from suture.evals.choice import options_of
from suture.evals.decoding import Decoding
from suture.evals.exact import EXTRACTORS
from suture.evals.generate import _uncached, generate, questions
from suture.evals.kinds import EvalJob, Kind, Models, Prepare, Row, Run, Score, Template
from suture.evals.loss import loss
from suture.evals.results import SuiteResult, read_result
from suture.evals.table import EVALS
from suture.runs.progress import Progress
from suture.training.data import tokenise
from suture.training.labelled import rows_of
from suture.training.models import (
    Classifier,
    Head,
    LanguageModel,
    load_encoder,
    load_head,
    load_language_model,
    save_head,
    save_model,
)
from suture.verbs.compare.recipe import read_gate
from suture.verbs.compare.run import compare_files
from suture.verbs.evaluate import run as work
from suture.verbs.evaluate.plan import Options, plan_suite
from suture.verbs.evaluate.recipe import read_suite
from suture.verbs.finetune import VERB as finetune

WORDS = tiny_model.WORDS[2:]


def rows(n: int = 12) -> list[dict[str, Any]]:
    """Rows that every kind can read; no two prompts are alike."""
    found = []
    for i, row in enumerate(tiny_model.rows(n)):
        words = [WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 4)]
        found.append({
            "text": row.text, "label": row.label, "prompt": " ".join(words), "answer": WORDS[i % 5],
            "choices": [WORDS[i % 5], f"{WORDS[(i + 3) % 12]} four", "six six six"],
            "part": ("easy", "very hard")[i % 3 == 0], "tongue": ("en", "de")[i % 2],
        })  # fmt: skip
    return found


def written(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a head and rows; nobody may change them."""
    where = tmp_path_factory.mktemp("shop")
    for seed, name in enumerate(("base", "edit")):
        save_model(tiny_model.language_model(seed), tiny_model.tokenizer(), where / name)
        tiny_model.folder(where / f"{name}-encoder", seed)
    written(where / "rows.jsonl", rows())
    dice = torch.Generator().manual_seed(0)
    head = Head(("colour", "sky"), torch.randn(2, 16, generator=dice), torch.zeros(2))
    save_head(head, where / "head.safetensors")
    return where


def suite(shop: Path, **evaluations: Any) -> dict[str, Any]:
    """A suite of language tasks, or of those given, over the shop's rows."""
    chosen = evaluations or {
        "words": {"kind": "loss"},
        "pick": {"kind": "choice", "prompt": "prompt", "utility": True},
        "say": {"kind": "exact-match", "decoding": {"max_tokens": 4}},
    }
    found = {n: {"data": str(shop / "rows.jsonl"), **e} for n, e in chosen.items()}
    return {"name": "tiny", "evaluations": found}


def job(texts: list[str], **decoding: Any) -> EvalJob:
    return EvalJob([Row(f"line {i}", {"prompt": t}) for i, t in enumerate(texts)],
               tiny_model.tokenizer(), 30, Decoding(**decoding), Problems(), batch=3)  # fmt: skip


# -- what comes out --------------------------------------------------------------------------------


def test_every_kind_says_what_its_options_mean() -> None:
    """The table is whole: each option has a meaning, each default is allowed."""
    for name, kind in EVALS.items():
        assert kind.title
        assert kind.make.__doc__
        for option in kind.parameters.values():
            assert option.doc
            assert option.required or option.problem(option.default) is None, (name, option.name)


def test_a_choice_is_the_answer_with_the_highest_log_likelihood(shop: Path) -> None:
    """Slow twin: every answer alone, token by token, without batches or padding."""
    model, tokenizer = load_language_model(shop / "base")
    hits = raw_hits = 0
    for row in rows():
        even, raw = [], []
        for text in row["choices"]:
            start = tokenizer([row["prompt"]])["input_ids"][0]  # type: ignore[call-arg]
            ids = torch.tensor([start + tokenizer([text])["input_ids"][0]])  # type: ignore[call-arg]
            with torch.no_grad():
                logs = model(ids, torch.ones_like(ids))[0].double().log_softmax(1)
            told = [float(logs[at - 1, ids[0, at]]) for at in range(len(start), ids.shape[1])]
            raw.append(sum(told))
            even.append(sum(told) / len(told))
        right = row["choices"].index(row["answer"])
        hits += even.index(max(even)) == right
        raw_hits += raw.index(max(raw)) == right

    (result,) = suture.evaluate(
        shop / "base", suite(shop, pick={"kind": "choice", "prompt": "prompt"})
    )

    metrics = {m.name: m for m in result.evaluations["pick"].metrics}
    assert metrics["accuracy"].value == pytest.approx(hits / 12)
    assert metrics["raw_accuracy"].value == pytest.approx(raw_hits / 12)
    assert 0 < hits < 12


def test_losses_and_classes_are_those_of_the_evaluations_in_training(shop: Path) -> None:
    """A suite gives the numbers that the same rows give by hand."""
    made = suite(shop, words={"kind": "loss"})
    (result,) = suture.evaluate(shop / "base", made)
    model, tokenizer = load_language_model(shop / "base")
    data = tokenise(rows_of((r["text"], "") for r in rows()), tokenizer, max_length=30)
    by_hand = {m.name: m.value for m in loss(model, data.batches(4))}
    assert {m.name: m.value for m in result.evaluations["words"].metrics} == pytest.approx(by_hand)

    made = suite(shop, topics={"kind": "accuracy", "head": str(shop / "head.safetensors")})
    (result,) = suture.evaluate(shop / "base-encoder", made)
    head = load_head(shop / "head.safetensors")
    encoder, tokenizer = load_encoder(shop / "base-encoder")
    labelled = tokenise(rows_of((r["text"], r["label"]) for r in rows()), tokenizer,
                        labels=head.labels, max_length=30)  # fmt: skip
    assert (
        result.evaluations["topics"].metrics[0]
        == accuracy(Classifier(encoder, head), labelled.batches(5))[0]
    )


def test_only_the_response_counts_where_there_is_one(shop: Path) -> None:
    """Slow twin: the loss of the answer's tokens after the prompt's."""
    made = suite(shop, replies={"kind": "loss", "prompt": "{prompt} ", "response": "answer"})
    (result,) = suture.evaluate(shop / "base", made)
    model, tokenizer = load_language_model(shop / "base")
    total = 0.0
    for row in rows():
        ids = torch.tensor(tokenizer([f"{row['prompt']} {row['answer']}"])["input_ids"])  # type: ignore[call-arg]
        with torch.no_grad():
            total += float(F.cross_entropy(model(ids, torch.ones_like(ids))[0, -2], ids[0, -1]))
    assert result.evaluations["replies"].metrics[0].value == pytest.approx(total / 12, rel=1e-4)


TEXTS = ["red", "one two three four five", "moon star", "six", "blue sun green red", "two one"]


@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_many_prompts_at_once_are_answered_like_each_alone(which: str, tmp_path: Path) -> None:
    """Left padding and the cache change nothing: the answers are those of plain loops, and those
    of transformers' own generation for one prompt."""
    if which == "gpt2":
        model = tiny_model.language_model(3)
    else:
        model = load_language_model(_llama(tmp_path / "llama"), dtype=torch.float32).model
    model.eval()
    asked = job(TEXTS, max_tokens=9)
    prompts = questions(asked, "prompt")
    together = generate(Models(model), asked, prompts)

    assert len(set(together.values())) > 1
    for number, ids in prompts.items():
        step, said = _uncached(model, [ids], 0, "cpu"), list[int]()
        chosen = None
        with torch.no_grad():
            for _ in range(9):
                chosen = step(chosen).argmax(1)
                said.append(int(chosen[0]))
        ends = [model.backbone.generation_config.eos_token_id]
        if ends[0] in said:
            said = said[: said.index(ends[0])]
        assert together[number] == asked.tokenizer.decode(said, skip_special_tokens=True)
    ids = torch.tensor([prompts[1]])
    oracle = model.backbone.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9, pad_token_id=0
    )
    assert together[1] == asked.tokenizer.decode(
        oracle[0, ids.shape[1] :], skip_special_tokens=True
    )


def _llama(where: Path) -> Path:
    """A Llama whose tokenizer knows fewer words than it."""
    adapting.llama(where)
    tiny_model.tokenizer().save_pretrained(str(where))
    return where


class Scripted(torch.nn.Module):
    """Continues every prompt by the same words, whatever it reads; NaN after ``breaks`` tokens."""

    def __init__(self, words: str, breaks: int = 1000) -> None:
        super().__init__()
        self.ids = [tiny_model.WORDS.index(w) for w in words.split()]
        self.start: list[int] | None = None
        self.breaks = breaks

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        lengths = attention_mask.sum(1).tolist()
        self.start = self.start or lengths
        logits = torch.zeros(*input_ids.shape, len(tiny_model.WORDS))
        for row, (length, start) in enumerate(zip(lengths, self.start, strict=True)):
            at = length - start
            logits[row, :, self.ids[at % len(self.ids)]] = 5
            if at >= self.breaks:
                logits[row] = float("nan")
        return logits


def test_answers_end_before_a_stop_text_and_after_so_many_tokens() -> None:
    """The stop text is no part of the answer; a text that never comes changes nothing."""

    def said(**decoding: Any) -> list[str | None]:
        asked = job(["red", "sun moon"], **decoding)
        found = generate(Models(Scripted("one two three four")), asked, questions(asked, "prompt"))
        return list(found.values())

    assert said(max_tokens=3) == ["one two three"] * 2
    assert said(max_tokens=9, stop=("three",)) == ["one two "] * 2
    assert said(max_tokens=2, stop=("never",)) == ["one two"] * 2


def test_a_model_that_breaks_while_it_writes_gives_no_answer() -> None:
    """NaN logits end an answer as none at all, not as what stood before."""
    asked = job(["red", "sun moon"], max_tokens=4)
    broken = Scripted("one two", breaks=2)

    assert generate(Models(broken), asked, questions(asked, "prompt")) == {0: None, 1: None}


@pytest.mark.parametrize(
    ("extract", "text", "found"),
    [
        ("last-number", "3 + 4 = 7 apples.", "7"), ("last-number", "It costs $1,250.50.", "1250.5"),
        ("last-number", "-3.0", "-3"), ("last-number", "none", ""), ("first-number", "2, then 9", "2"),
        ("first-line", "\n  yes \nno", "yes"), ("last-line", "yes\nno\n\n", "no"),
        ("letter", "The answer is (B).", "B"), ("letter", "C", "C"), ("letter", "Bad", ""),
        ("whole", " a\nb ", " a\nb "), ("first-line", "", ""), ("last-number", "100", "100"),
    ],
)  # fmt: skip
def test_what_is_taken_out_of_an_answer(extract: str, text: str, found: str) -> None:
    assert EXTRACTORS[extract](text) == found


def test_an_exact_match_forgives_case_and_punctuation_and_takes_one_of_several(
    shop: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Right: the same words; one of a list; a pattern's group. Wrong: another word."""
    monkeypatch.setattr(work._Shelf, "model", lambda *_: Scripted("one two"))
    data = written(
        tmp_path / "r.jsonl",
        [{"prompt": "red", "answer": a} for a in ("ONE  two.", ["six", "one two"], "two", "one")],
    )
    made = {"a": {"kind": "exact-match", "decoding": {"max_tokens": 2}, "data": str(data)}}
    made["b"] = {**made["a"], "extract": "regex", "pattern": r"one (\w+)"}
    made["c"] = {**made["a"], "case": True}
    (result,) = suture.evaluate(shop / "base", suite(shop, **made), device="cpu")

    hits = {n: e.scores[0].values.tolist() for n, e in result.evaluations.items()}
    assert hits == {"a": [1, 1, 0, 0], "b": [0, 1, 1, 0], "c": [0, 1, 0, 0]}
    assert result.evaluations["a"].metrics[1].value == 1  # answered


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        (["a", "b"], ["a", "b"]), ([1, 2], ["1", "2"]), ('["x", "y"]', ["x", "y"]),
        ("A. red sun\nB. blue", ["red sun", "blue"]), ("(A) x\n(B) y\nZ. y more", ["x", "y\nZ. y more"]),
    ],
)  # fmt: skip
def test_answers_to_choose_from_are_read_as_they_come(cell: Any, found: list[str]) -> None:
    assert options_of(Row("r", {"choices": cell}), "choices") == found


@pytest.mark.parametrize(
    ("answer", "how", "right"),
    [
        ("blue", "auto", 1), ("B", "auto", 1), ("b)", "letter", 1), ("A. red", "auto", 0), (1, "index", 1),
        (1, "number", 0), (1, "auto", None), ("C", "auto", None), ("green", "text", None), (2, "index", None),
    ],
)  # fmt: skip
def test_the_right_answer_is_told_by_text_letter_or_number(
    shop: Path, tmp_path: Path, answer: Any, how: str, right: int | None
) -> None:
    """A bare number is refused until the suite says where numbers start."""
    row = {"prompt": "one", "choices": ["red", "blue"], "answer": answer}
    data = written(tmp_path / "r.jsonl", [row])
    made = suite(
        shop, pick={"kind": "choice", "prompt": "prompt", "answer_as": how, "data": str(data)}
    )
    if right is None:
        with pytest.raises(RecipeError, match=r"r\.jsonl, line 1: 'answer' is .* none of the 2"):
            suture.evaluate(shop / "base", made)
        return
    (result,) = suture.evaluate(shop / "base", made)
    others = dict(made["evaluations"]["pick"], data=str(written(
        tmp_path / "o.jsonl", [{**row, "answer": "red" if right else "blue"}])), answer_as="text")  # fmt: skip
    (other,) = suture.evaluate(shop / "base", suite(shop, pick=others))
    assert {r.evaluations["pick"].scores[0].values[0] for r in (result, other)} == {0.0, 1.0}


def test_each_category_and_language_has_metrics_of_its_own(shop: Path) -> None:
    """They are the metrics of these rows alone, and add up to the whole."""
    made = suite(shop, words={"kind": "loss", "category": "part", "language": "tongue"})
    (result,) = suture.evaluate(shop / "base", made)
    found = {m.name: m for m in result.evaluations["words"].metrics}

    assert {"loss.easy", "loss.very_hard", "loss.en", "perplexity.de"} <= found.keys()
    assert (found["loss.easy"].n, found["loss.very_hard"].n, found["loss.en"].n) == (8, 4, 6)
    weights = result.evaluations["words"].score("loss").weights
    hard = [i for i in range(12) if i % 3 == 0]
    share = weights[hard].sum() / weights.sum()
    assert found["loss"].value == pytest.approx(
        share * found["loss.very_hard"].value + (1 - share) * found["loss.easy"].value
    )


def test_a_broken_model_gets_nan_and_a_note_and_never_a_score(shop: Path, tmp_path: Path) -> None:
    """NaN weights are no error of the user's suite: the result says so and JSON stays JSON."""
    broken = _broken(shop, tmp_path)
    (result,) = suture.evaluate(broken, suite(shop), tmp_path / "out")

    for evaluation in result.evaluations.values():
        assert all(math.isnan(m.value) for m in evaluation.metrics)
        assert "the model is broken there" in " ".join(evaluation.notes)
        assert len(evaluation.notes) < len(evaluation.metrics) or len(evaluation.metrics) == 1
    again = read_result(tmp_path / "out" / "broken.tiny.json")
    assert again.to_json() == result.to_json()


def _broken(shop: Path, where: Path) -> Path:
    broken = where / "broken"
    save_model(tiny_model.language_model(), tiny_model.tokenizer(), broken)
    weights = load_file(broken / "model.safetensors")
    weights["transformer.wte.weight"][:] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    return broken


def test_a_result_holds_numbers_and_no_texts(shop: Path, tmp_path: Path) -> None:
    """No prompt, answer or choice of any row can be read from it."""
    suture.evaluate(shop / "base", suite(shop), tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()

    for row in rows():
        for value in (row["text"], *row["choices"][1:]):
            assert value not in text
    found = SuiteResult.from_json(text)
    assert found.complete
    assert found.evaluations["words"].scores[0].rows == tuple(range(12))
    assert found.versions["torch"] == torch.__version__


def test_a_zero_shot_head_is_made_by_each_model_of_the_labels_texts(shop: Path) -> None:
    """Two encoders make two heads; the texts of labels matter."""
    plain = {"kind": "accuracy", "head": "zero-shot"}
    told = {**plain, "label_texts": {"colour": "red green blue", "sky": "sun moon star"}}
    results = suture.evaluate(
        [shop / "base-encoder", shop / "edit-encoder"], suite(shop, plain=plain, told=told,
                                                              near={"kind": "neighbour"})
    )  # fmt: skip

    assert [r.evaluations["told"].metrics[0].n for r in results] == [12, 12]
    assert results[0].evaluations["told"].metrics[0].value >= 0.5
    assert all(0 <= r.evaluations["near"].metrics[0].value <= 1 for r in results)


def test_what_finetune_wrote_is_evaluated_as_what_it_is(shop: Path, tmp_path: Path) -> None:
    """A linearized model with its own head gets the accuracy that its training reported."""
    what = {
        "base": str(shop / "base-encoder"), "strategy": "linearized",
        "data": {"train": str(shop / "rows.jsonl"), "validation": str(shop / "rows.jsonl")},
        "head": str(shop / "head.safetensors"), "training": {"epochs": 6, "batch": 6, "lr": 0.01},
    }  # fmt: skip
    report = finetune(what, tmp_path / "tuned", progress=Progress(say=lambda _: None))
    (result,) = suture.evaluate(tmp_path / "tuned", suite(shop, topics={"kind": "accuracy"}))

    assert report.metric is not None
    assert report.base_metric != report.metric
    assert result.evaluations["topics"].metrics[0].value == report.metric.value


def test_an_adapter_on_its_base_is_evaluated_like_the_merged_model(tmp_path: Path) -> None:
    """``BASE+ADAPTER`` is a model here, too; nothing is left behind in temporary places."""
    base = _llama(tmp_path / "base")
    lora = adapting.adapter(base, tmp_path / "lora")
    data = written(tmp_path / "rows.jsonl", rows())
    made = {"evaluations": {"words": {"kind": "loss", "data": str(data)}}}
    plain, adapted = (suture.evaluate(model, made)[0] for model in (base, f"{base}+{lora}"))
    checkpoint = suture.open(f"{base}+{lora}")
    save_file(
        {n: checkpoint.tensor(n).clone() for n in checkpoint}, tmp_path / "merged.safetensors"
    )
    merged = _llama(tmp_path / "merged")
    (tmp_path / "merged.safetensors").replace(merged / "model.safetensors")
    (by_hand,) = suture.evaluate(merged, made)

    values = [r.evaluations["words"].metrics[0].value for r in (plain, adapted, by_hand)]
    assert values[1] == pytest.approx(values[2], rel=1e-6)
    assert abs(values[0] - values[1]) > 1e-4


def test_language_models_are_asked_in_the_dtype_of_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind answers nearly the same in half the memory; another dtype is another question."""
    loaded: list[torch.dtype] = []
    real = work._Shelf.model
    monkeypatch.setattr(work._Shelf, "model", lambda self, a: (
        loaded.append(next((found := real(self, a)).parameters()).dtype), found)[1])  # fmt: skip
    base = _llama(tmp_path / "base")
    answers = {"safe": "red", "unsafe": "blue", "response": "red"}
    data = written(tmp_path / "rows.jsonl", [{**row, **answers} for row in rows()])
    kinds = {
        "words": {"kind": "loss"}, "pick": {"kind": "choice", "prompt": "prompt"},
        "say": {"kind": "exact-match", "decoding": {"max_tokens": 4}},
        "far": {"kind": "drift"}, "no": {"kind": "refusal", "decoding": {"max_tokens": 4}},
        "prefer": {"kind": "preference"},
        "odds": {"kind": "refusal-odds", "refusals": ["red"], "compliances": ["blue"]},
    }  # fmt: skip
    made = {"name": "s", "reference": str(base),
            "evaluations": {n: {"data": str(data), **k} for n, k in kinds.items()}}  # fmt: skip
    full, half = (
        suture.evaluate(base, made | {"dtype": dtype}, tmp_path / f"{dtype}.json")[0]
        for dtype in ("float32", "bfloat16")
    )
    assert loaded == [torch.float32] * len(kinds) + [torch.bfloat16] * len(kinds)
    for name in kinds:
        one, other = (r.evaluations[name].metrics[0].value for r in (full, half))
        assert other == pytest.approx(one, abs=0.1), name
    assert half.evaluations["far"].metrics[0].value == 0
    wrong = "words: dtype is unset for float32 and 'bfloat16' for bfloat16"
    with pytest.raises(MismatchError, match=wrong):
        compare_files([tmp_path / "float32.json", tmp_path / "bfloat16.json"])


# -- what is kept ----------------------------------------------------------------------------------


def test_what_a_result_answers_already_is_not_asked_again(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same suite loads no model; a changed evaluation runs alone; what is gone from the suite
    is gone from the result; `resume=False` asks everything."""
    asked: list[str] = []
    real = work._Shelf.model
    monkeypatch.setattr(
        work._Shelf, "model", lambda self, a: (asked.append(a.question.name), real(self, a))[1]
    )
    out, made = tmp_path / "r.json", suite(shop)
    suture.evaluate(shop / "base", made, out)
    assert asked == ["words", "pick", "say"]
    before = out.read_text()
    suture.evaluate(shop / "base", made, out)
    assert asked == ["words", "pick", "say"]
    assert out.read_text() == before

    made["evaluations"]["say"]["decoding"] = {"max_tokens": 5}
    data = written(tmp_path / "other.jsonl", rows(13))
    made["evaluations"]["pick"]["data"] = str(data)
    suture.evaluate(shop / "base", made, out)
    assert asked[3:] == ["pick", "say"]
    written(data, rows(14))  # the same name, other rows
    del made["evaluations"]["words"]
    (last,) = suture.evaluate(shop / "base", made, out)
    assert asked[5:] == ["pick"]
    assert list(last.evaluations) == ["pick", "say"]
    suture.evaluate(shop / "base", made, out, resume=False)
    assert asked[6:] == ["pick", "say"]


def test_what_stands_beside_the_weights_counts_too(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another chat template, or another head in the folder, is another question."""
    asked: list[str] = []
    real = work._Shelf.model
    monkeypatch.setattr(
        work._Shelf, "model", lambda self, a: (asked.append(a.question.name), real(self, a))[1]
    )
    model = tiny_model.folder(tmp_path / "model")
    made = suite(shop, topics={"kind": "accuracy"}, near={"kind": "neighbour"})
    weight = torch.zeros(2, 16)
    for value in (1.0, 1.0, 2.0):
        save_head(Head(("colour", "sky"), weight + value, weight[:, 0]), model / "head.safetensors")
        suture.evaluate(model, made, tmp_path / "r.json")
    assert asked == ["topics", "near", "topics"]
    (model / "chat_template.jinja").write_text("{{ messages }}")
    suture.evaluate(model, made, tmp_path / "r.json")
    assert asked[3:] == ["topics", "near"]


def test_an_interrupted_run_keeps_what_it_has_finished(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 3 with the first evaluation on disk; the same command asks the rest, and the numbers
    are those of a run that was not interrupted."""
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(suite(shop)))
    line = ("eval", shop / "base", "-s", path, "-o", tmp_path / "r.json")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("suture.evals.choice.row_losses", interrupted)
        assert invoke(*line).code == 3
    half = read_result(tmp_path / "r.json")
    assert (list(half.evaluations), half.complete) == (["words"], False)

    said = invoke(*line)
    assert said.code == 0
    lines_of(said.err, "1 evaluation(s) are there already")
    whole = read_result(tmp_path / "r.json")
    (fresh,) = suture.evaluate(shop / "base", suite(shop))
    assert whole.complete
    assert [e.scores[0].plain() for e in whole.evaluations.values()] == [
        e.scores[0].plain() for e in fresh.evaluations.values()
    ]


@pytest.mark.parametrize(
    "text", ["{", "", "[]", '{"kind": "evaluation"}', "\x00\xff", '{"kind": NaN}', "[" * 100000]
)
def test_a_corrupted_result_is_refused_and_replaced_only_if_asked(
    shop: Path, tmp_path: Path, text: str
) -> None:
    """It may be somebody's file: nothing is written over it without `--overwrite`."""
    out = tmp_path / "r.json"
    out.write_text(text, encoding="latin-1")
    with pytest.raises(OutputError, match=r"r\.json: .*overwrite=True"):
        suture.evaluate(shop / "base", suite(shop), out)
    assert out.read_text(encoding="latin-1") == text
    suture.evaluate(shop / "base", suite(shop), out, overwrite=True)
    assert read_result(out).complete


def test_the_result_of_another_model_or_suite_is_not_replaced(shop: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "r.json", suite(shop, words={"kind": "loss"})
    suture.evaluate(shop / "base", made, out)
    with pytest.raises(OutputError, match="fingerprint .* name another place, or overwrite=True"):
        suture.evaluate(shop / "edit", made, out)
    with pytest.raises(OutputError, match="is a result of the suite 'tiny'"):
        suture.evaluate(shop / "base", {**made, "name": "other"}, out)
    (found,) = suture.evaluate(shop / "edit", made, out, overwrite=True)
    assert read_result(out).fingerprint == found.fingerprint


# -- what is refused before a model is loaded ------------------------------------------------------

WRONG = [
    ("evaluations: {}", "evaluations: a mapping from names to what is asked, with at least one"),
    ("evaluations:", "evaluations: missing; a mapping from names to what is asked, with at least one"),
    ("evaluations: [a]", "error: line 1: evaluations: a mapping from names to what is asked, with at least one, not ['a']"),
    ("evaluations:\n  a: {kind: refusal, data: rows.jsonl, max_perplexity: 0}", "broken; at least 1; got 0"),
    ("evaluation: {}", "unknown key 'evaluation'; did you mean 'evaluations'?"),
    ("evaluations:\n  a: {kind: los, data: rows.jsonl}", "line 2: evaluations.a.kind: no evaluation 'los'; did you mean 'loss'?"),
    ("evaluations:\n  a: {kind: loss, data: rows.json}", "line 2: evaluations.a.data: no file"),
    ("evaluations:\n  a: {kind: loss, data: empty.jsonl}", "empty.jsonl: holds no rows"),
    ("evaluations:\n  a: {kind: loss, data: rows.jsonl, text: txt}", "line 2: evaluations.a: rows.jsonl, line 1: no column 'txt'; did you mean 'text'? (and 11 more rows)"),
    ("evaluations:\n  a: {kind: loss, data: rows.jsonl, prompt: 'x'}", "without a response there is nothing to come after it"),
    ("evaluations:\n  a: {kind: loss, data: rows.jsonl, limit: -1}", "evaluations.a.limit: a whole number from 0, not -1"),
    ("evaluations:\n  a: {kind: loss, data: rows.jsonl, utility: 3}", "evaluations.a.utility: true or false"),
    ("evaluations:\n  a: {kind: loss, data: rows.jsonl, category: nothing}", "rows.jsonl, line 1 has no column 'nothing' (and 11 more rows)"),
    ("evaluations:\n  a: {kind: loss, data: many.jsonl, category: text}", "300 categories and languages"),
    ("evaluations:\n  a: {kind: loss, data: rows.jsonl, max_length: 99}", "max_length: base reads at most 32 tokens, not 99"),
    ("evaluations:\n  utility: {kind: loss, data: rows.jsonl}", "none of utility, base, expert"),
    ("evaluations:\n  a b: {kind: loss, data: rows.jsonl}", "a name is a word that rules can use"),
    ("evaluations:\n  a: {kind: choice, data: rows.jsonl, prompt: '{prmpt}:'}", "no column 'prmpt'; did you mean 'prompt'?"),
    ("evaluations:\n  a: {kind: choice, data: rows.jsonl, prompt: text, choices: [text]}", "holds 0 answers; it takes a list of two or more"),
    ("evaluations:\n  a: {kind: choice, data: rows.jsonl, normalise: words}", "evaluations.a.normalise: 'words' is not one of tokens, bytes, none"),
    ("evaluations:\n  a: {kind: exact-match, data: rows.jsonl, extract: last-number}", "'answer' holds nothing that `extract: last-number` finds"),
    ("evaluations:\n  a: {kind: exact-match, data: rows.jsonl, extract: regex, pattern: '('}", "is no regular expression"),
    ("evaluations:\n  a: {kind: exact-match, data: rows.jsonl, pattern: x}", "belongs to `extract: regex`"),
    ("evaluations:\n  a: {kind: exact-match, data: rows.jsonl, decoding: {chat: true}}", "the model has no chat template"),
    ("evaluations:\n  a: {kind: exact-match, data: rows.jsonl, decoding: {system: be good}}", "belongs to a chat"),
    ("evaluations:\n  a: {kind: exact-match, data: rows.jsonl}", "1 tokens and 64 of an answer, but at most 32 can be read"),
    ("evaluations:\n  a: {kind: loss, data: rows.jsonl, max_length: 3}", "tokens, but at most 3 can be read; say `too_long: cut`"),
    ("evaluations:\n  a: {kind: loss, data: rows.jsonl, max_length: 1, too_long: drop}", "every row has more than 1 tokens"),
    ("evaluations:\n  a: {kind: accuracy, data: rows.jsonl}", "base has no head.safetensors"),
    ("evaluations:\n  a: {kind: accuracy, data: rows.jsonl, head: other.safetensors}", "evaluations.a.head: no file"),
    ("evaluations:\n  a: {kind: accuracy, data: rows.jsonl, head: head.safetensors, label: part}", "the label 'very hard' is not one of the head's"),
    ("evaluations:\n  a: {kind: accuracy, data: rows.jsonl, head: head.safetensors, labels: [a, b]}", "a saved head has labels of its own"),
    ("evaluations:\n  a: {kind: accuracy, data: rows.jsonl, head: wide.safetensors}", "reads 4 numbers"),
    ("decoding: {max_tokens: 0, stop: 3, heat: 1}\nevaluations:\n  a: {kind: loss, data: rows.jsonl}", "decoding.stop: a text that ends an answer"),
    ("dtype: bf16\nevaluations:\n  a: {kind: loss, data: rows.jsonl}", "line 1: dtype: 'bf16' is not known; did you mean 'bfloat16'?"),
    ("dtype: bfloat16\nevaluations:\n  a: {kind: accuracy, data: rows.jsonl, head: head.safetensors}", "only language models are asked in bfloat16"),
    ("a: [", "not valid YAML"),
    ("", "suite.yaml: a suite is a mapping with keys such as name, evaluations, decoding"),
    ("evaluations:\n  a: {kind: depth, data: rows.jsonl, depths: []}", "line 2: evaluations.a.depths: after how many tokens"),
    ("evaluations:\n  a: {kind: depth, data: rows.jsonl, depths: [0, b]}", "evaluations.a.depths: after how many tokens"),
    ("evaluations:\n  a: {kind: judged, data: rows.jsonl}", "line 2: evaluations.a.judge: missing"),
]  # fmt: skip


@pytest.fixture(scope="module")
def desk(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("desk")
    for name in ("base", "base-encoder", "rows.jsonl", "head.safetensors"):
        (where / name).symlink_to(shop / name)
    (where / "empty.jsonl").write_text("\n")
    written(where / "many.jsonl", [{"text": f"red {i}"} for i in range(300)])
    save_head(
        Head(("colour", "sky"), torch.zeros(2, 4), torch.zeros(2)), where / "wide.safetensors"
    )
    return where


@pytest.mark.parametrize(("text", "told"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, told: str
) -> None:
    """Exit 2, no traceback, the place and the cause; nothing is loaded or written."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(work, "load_tuned", None)
    path = desk / "suite.yaml"
    path.write_text(text)
    said = invoke("eval", "base-encoder" if "kind: accuracy" in text else "base", "-s", "suite.yaml",
                  "-o", tmp_path / "out")  # fmt: skip

    told = told.replace("base has", "base-encoder has")
    assert said.code == 2, said.out
    lines_of(said.err.replace("\n    ", " "), told)
    assert not (tmp_path / "out").exists()


def test_all_problems_are_told_at_once(desk: Path, tmp_path: Path) -> None:
    """Of the suite, its rows, two models and the output, in one message."""
    made = {
        "evaluations": {
            "a": {"kind": "los", "data": str(desk / "rows.jsonl")},
            "b": {"kind": "loss", "data": str(desk / "none.jsonl")},
            "c": {"kind": "loss", "data": str(desk / "rows.jsonl"), "text": "nothing"},
        }
    }
    (tmp_path / "file").write_text("")
    with pytest.raises(SutureError) as caught:
        plan_suite([desk / "nowhere", desk / "base-encoder"], made, tmp_path / "file" / "out",
                   Options(device="abacus"))  # fmt: skip
    lines_of(str(caught.value), "a.kind", "none.jsonl", "nowhere",
             "cannot write in", "device: 'abacus'", "loss needs a language model")  # fmt: skip


def test_a_head_that_is_missing_is_told_once(desk: Path) -> None:
    """As the file that was named, not as one that the model's folder lacks."""
    asked = {"kind": "accuracy", "data": str(desk / "rows.jsonl"), "head": "other.safetensors"}
    with pytest.raises(SutureError) as caught:
        plan_suite([desk / "base-encoder"], {"evaluations": {"a": asked}}, None)
    lines_of(str(caught.value), "evaluations.a.head: no file")
    assert "has no head.safetensors" not in str(caught.value)


def test_a_row_is_checked_even_where_no_model_can_be_opened(desk: Path) -> None:
    made = {"evaluations": {"c": {"kind": "loss", "data": str(desk / "rows.jsonl"), "text": "no"}}}
    with pytest.raises(SutureError) as caught:
        plan_suite([desk / "nowhere"], made, None)
    lines_of(str(caught.value), "nowhere: no such file", "line 1: no column 'no'")


def test_longer_rows_are_cut_or_left_out_where_the_suite_says_so(shop: Path) -> None:
    """Cut: all rows count, with fewer tokens. Dropped: fewer rows; both are told."""
    made = {"kind": "loss", "max_length": 4}
    results = suture.evaluate(
        shop / "base",
        suite(shop, cut={**made, "too_long": "cut"}, drop={**made, "too_long": "drop"}),
    )[0].evaluations
    long = sum(len(row["text"].split()) > 4 for row in rows())

    assert results["cut"].metrics[0].n == 12
    assert results["cut"].scores[0].weights.max() == 3
    assert results["drop"].metrics[0].n == 12 - long
    assert long
    assert results["cut"].notes == (f"{long} of 12 rows have more than 4 tokens; they were cut",)


def test_a_chat_template_is_used_where_the_suite_asks_for_it(shop: Path, tmp_path: Path) -> None:
    """The prompt stands inside the template: the answers are those to the written-out text."""
    model = tmp_path / "model"
    save_model(tiny_model.language_model(5), tiny_model.tokenizer(), model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role and 'moon ' }}{{ m.content }} {% endfor %}star"
    )
    chat = {"max_tokens": 4, "chat": True, "system": "six"}
    made = suite(
        shop, chat={"kind": "loss", "prompt": "prompt", "response": "answer", "decoding": chat},
        plain={"kind": "loss", "prompt": "moon six moon {prompt} star", "response": "answer"},
    )  # fmt: skip
    found = suture.evaluate(model, made)[0].evaluations

    assert found["chat"].asked["decoding"]["chat"] is True
    assert found["chat"].metrics[0].value == pytest.approx(
        found["plain"].metrics[0].value, rel=1e-5
    )


# -- new kinds -------------------------------------------------------------------------------------


def drift(prompt: Template = "prompt") -> Prepare:
    """How far the model's next token is from the reference's: a kind of a few lines."""

    def prepare(given: EvalJob) -> Run:
        prompts = questions(given, prompt)

        def run(models: Models) -> tuple[Score, ...]:
            assert models.reference is not None
            found = {}
            for number, ids in prompts.items():
                row = torch.tensor([ids])
                logs = [m(row, torch.ones_like(row))[0, -1].log_softmax(0)
                        for m in (models.reference, models.model)]  # fmt: skip
                found[number] = float((logs[0].exp() * (logs[0] - logs[1])).sum())
                models.tick(1)
            return (Score("drift", found, "mean", better="lower"),)

        return run

    return prepare


def test_a_new_kind_is_a_function_and_a_line(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets categories, intervals, caching and a reference model for nothing."""
    monkeypatch.setitem(EVALS.own, "drift", Kind(drift, "drift", "", reference=True))
    made = suite(shop, moved={"kind": "drift", "category": "part", "decoding": {"max_tokens": 4}})
    with pytest.raises(RecipeError, match="drift needs a `reference` at the top of the suite"):
        suture.evaluate(shop / "edit", made)
    made["reference"] = str(shop / "base")
    with torch.no_grad():
        same, other = suture.evaluate([shop / "base", shop / "edit"], made, tmp_path)

    assert same.evaluations["moved"].metrics[0].value == pytest.approx(0, abs=1e-6)
    assert other.evaluations["moved"].metrics[0].value > 1e-4
    assert [m.name for m in other.evaluations["moved"].metrics] == [
        "drift", "drift.easy", "drift.very_hard",
    ]  # fmt: skip


# -- the command -----------------------------------------------------------------------------------


def test_the_command_plans_asks_and_tells(shop: Path, tmp_path: Path) -> None:
    """A plan first, a table, what was written last; `--json` one object; `--dry-run` nothing."""
    path = tmp_path / "quick.yaml"
    path.write_text(json.dumps(suite(shop) | {"name": "quick"}))
    out = tmp_path / "results"
    line = ("eval", shop / "base", shop / "edit", "-s", path, "-o", out)

    said = invoke(*line, "--dry-run")
    assert said.code == 0
    lines_of(said.out, "ask      pick: choice, 12 rows, utility", "nothing was asked")
    assert not out.exists()

    said = invoke(*line, "--limit", 5)
    assert said.code == 0
    assert said.err.startswith("quick.first5: 3 evaluation(s), 15 rows, 2 model(s) on cpu")
    lines_of(said.out, "words.perplexity", "pick.accuracy")
    assert said.out.splitlines()[-1] == f"wrote {out / 'edit.quick.first5.json'}"
    assert read_result(out / "base.quick.first5.json").evaluations["words"].metrics[0].n == 5

    found = invoke(*line, "--json").json["results"]
    assert [r["model"] for r in found] == ["base", "edit"]
    assert found[0]["evaluations"]["words"]["metrics"][0]["n"] == 12
    assert invoke("compare", out / "base.quick.json", out / "edit.quick.json").code == 0


def test_a_linearized_language_model_can_answer_too() -> None:
    """What keeps no keys and values reads everything anew; the answers are the same."""
    model = tiny_model.language_model(3)

    class Wrapped(torch.nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return model(ids, mask)  # type: ignore[no-any-return]

    asked = job(TEXTS, max_tokens=5)
    prompts = questions(asked, "prompt")

    assert isinstance(model, LanguageModel)
    assert generate(Models(Wrapped()), asked, prompts) == generate(Models(model), asked, prompts)


def test_the_suites_and_gates_of_the_docs_and_examples_can_be_read(tmp_path: Path) -> None:
    """With files of those names beside them, nothing is wrong with them."""
    root = Path(__file__).parents[1]
    text = (root / "docs" / "evaluate.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    suites = [b for b in blocks if "evaluations:" in b]
    gates = [b for b in blocks if ">=" in b]
    assert (len(suites), len(gates)) == (2, 1)
    suites.append((root / "examples" / "eval-quick.yaml").read_text())
    gates.append((root / "examples" / "gate.yaml").read_text())
    for body in suites:
        for name in re.findall(r"[\w-]+\.(?:jsonl|csv)", body):
            written(tmp_path / name, rows(1))
        (tmp_path / "suite.yaml").write_text(body)
        problems = Problems()
        found = read_suite(tmp_path / "suite.yaml", problems)
        problems.raise_if_any()
        assert found is not None
        assert len(found.questions) == len(re.findall(r"\bkind:", body))
    for body in gates:
        (tmp_path / "gate.yaml").write_text(body)
        problems = Problems()
        assert len(read_gate(tmp_path / "gate.yaml", problems)) >= 2
        problems.raise_if_any()
