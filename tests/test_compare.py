"""Results side by side: paired differences, what cannot be compared, and gates."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import suture
from making import environment, invoke, lines_of
from suture.errors import MismatchError, RecipeError
from suture.evals.base import share
from suture.evals.numbers import RESAMPLES, metric_of, resampled
from suture.evals.results import Evaluation, Scores, SuiteResult, read_result
from suture.verbs.compare.recipe import read_rule
from suture.verbs.compare.result import comparison_table
from suture.verbs.compare.run import compare

N = 200
DICE = np.random.Generator(np.random.Philox(0))
EASE = DICE.random(N)
"""How easy each row is; models get the easier ones right."""


def scores(
    name: str, values: Sequence[float], statistic: str = "share", better: str = "higher"
) -> Scores:
    found = np.asarray(values, np.float64)
    return Scores(name, statistic, better, tuple(range(len(found))), found, np.ones(len(found)))


def hits(rate: float, n: int = N) -> list[float]:
    """The share ``rate`` of the easiest rows."""
    return (EASE[:n] < rate).astype(float).tolist()


def evaluation(name: str, *found: Scores, utility: bool = False, **more: Any) -> Evaluation:
    asked = {"options": {"prompt": "text"}, "decoding": {"max_tokens": 8}, "data": "d1"}
    return Evaluation(name, "accuracy", asked, f"key of {name}", utility, found, **more)


def result(model: str, *found: Evaluation, expected: tuple[str, ...] = ()) -> SuiteResult:
    return SuiteResult(model, f"models/{model}", f"print of {model}", "tiny", "hash of the suite",
                       {e.name: e for e in found}, expected or tuple(e.name for e in found))  # fmt: skip


def model(name: str, refusal: float, topics: float, sums: float, loss: float = 2.0) -> SuiteResult:
    """A result with what a safety gate asks for."""
    halves = {"harmful": tuple(range(0, N, 2)), "benign": tuple(range(1, N, 2))}
    return result(
        name,
        evaluation("refusal", scores("refused", hits(refusal)), groups=halves),
        evaluation("topics", scores("accuracy", hits(topics)), utility=True),
        evaluation("sums", scores("accuracy", hits(sums)), utility=True),
        evaluation("text", scores("loss", [loss * e for e in EASE + 0.5], "mean", "lower")),
    )


BASE = model("start", 0.9, 0.5, 0.4)
EXPERT = model("expert-one", 0.5, 0.9, 0.4)
OTHER = model("expert-two", 0.5, 0.5, 0.8)
EDIT = model("edit", 0.88, 0.87, 0.79, loss=1.9)


# -- numbers ---------------------------------------------------------------------------------------


def test_a_paired_interval_is_that_of_the_differences_of_rows() -> None:
    """Slow twin: resample the rows, take both models' means on the same rows, subtract."""
    (line,) = (x for x in compare(BASE, [], EDIT).lines if x.evaluation == "topics")
    found = line.differences["edit"]
    one, two = np.array(hits(0.87)), np.array(hits(0.5))
    dice = np.random.Generator(np.random.Philox(7))
    twin = [float((one - two)[dice.integers(0, N, N)].mean()) for _ in range(4000)]

    assert found.value == pytest.approx((one - two).mean())
    assert [found.low, found.high] == pytest.approx(np.percentile(twin, [2.5, 97.5]), abs=0.01)
    assert line.values["edit"] == share("accuracy", int(one.sum()), N)


def test_pairing_removes_what_is_hard_for_both() -> None:
    """Two models that fail on nearly the same rows differ by little, and surely."""
    close = compare(model("a", 0.5, 0.50, 0.5), [], model("b", 0.5, 0.52, 0.5))
    (line,) = (x for x in close.lines if x.evaluation == "topics")
    found = line.differences["b"]
    alone = line.values["b"]

    assert found.high - found.low < (alone.high - alone.low) / 2


def test_statistics_are_resampled_the_same_for_all_and_in_little_memory() -> None:
    """A ratio weighs rows; the draws do not depend on how many are made at once."""
    values, weights = DICE.random((2, 50)), DICE.random((2, 50)) + 1
    found = resampled("ratio", values, weights)
    dice = np.random.Generator(np.random.Philox(0))
    chosen = dice.integers(0, 50, (RESAMPLES, 50))
    for m in range(2):
        twin = values[m][chosen].sum(1) / weights[m][chosen].sum(1)
        assert np.allclose(found[m], twin)
    metric = metric_of("p", "exp-ratio", values[0], weights[0])
    assert metric.value == pytest.approx(math.exp(values[0].sum() / weights[0].sum()))
    assert metric.low < metric.value < metric.high
    assert math.isnan(metric_of("p", "mean", np.array([1.0, np.nan]), np.ones(2)).value)
    assert math.isnan(metric_of("p", "share", np.array([]), np.array([])).value)


# -- what cannot be compared -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": "d2"}, "topics: was asked of other rows"),
        ({"decoding": {"max_tokens": 9}}, "topics: decoding.max_tokens is 8 for start and 9 for edit"),
        ({"options": {"prompt": "p"}}, "topics: options.prompt is 'text' for start and 'p' for edit"),
    ],
)  # fmt: skip
def test_results_of_different_questions_are_refused_with_the_reason(
    change: dict[str, Any], told: str
) -> None:
    topics = EDIT.evaluations["topics"]
    other = replace(EDIT, suite_hash="another").with_(
        replace(topics, asked={**topics.asked, **change})
    )
    with pytest.raises(MismatchError) as caught:
        compare(BASE, [], other)
    lines_of(str(caught.value), told, "evaluate both with the same suite")


def test_results_of_different_suites_are_refused() -> None:
    small = result("edit", BASE.evaluations["topics"])
    with pytest.raises(MismatchError, match="edit was not asked refusal, sums, text"):
        compare(BASE, [], replace(small, suite_hash="another"))
    with pytest.raises(MismatchError, match="were asked by different suites"):
        compare(BASE, [], replace(EDIT, suite_hash="another"))
    with pytest.raises(RecipeError, match="two results are of models named start"):
        compare(BASE, [], replace(EDIT, model="start"))


# -- rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "op", "constant", "factors"),
    [
        ("refusal.harmful >= base - 0.02", "refusal.harmful", ">=", -0.02, {"base": 1.0}),
        ("over_refusal<=.1", "over_refusal", "<=", 0.1, {}),
        ("a.b.c > 0.95 * base", "a.b.c", ">", 0.0, {"base": 0.95}),
        ("a < base*0.5+expert*0.5 - 1e-2", "a", "<", -0.01, {"base": 0.5, "expert": 0.5}),
        ("a >= -1", "a", ">=", -1.0, {}),
        ("a-b >= base-0.5", "a-b", ">=", -0.5, {"base": 1.0}),
        ("a >= expert-one", "a", ">=", 0.0, {"expert-one": 1.0}),
    ],
)  # fmt: skip
def test_a_rule_is_a_name_and_a_sum(
    text: str, name: str, op: str, constant: float, factors: dict[str, float]
) -> None:
    rule = read_rule(text)

    assert (rule.name, rule.op, rule.constant) == (name, op, pytest.approx(constant))
    assert dict(rule.factors) == factors


@pytest.mark.parametrize(
    "text", ["a", "a >=", "a == 1", ">= 1", "a >= base base", "a >= base * base", "a >= 1 1",
             "a >= base / 2", "a >= 2 *", "a >= __import__('os')", "a >= (1)", "1 >= a", "a >= - - 1"],
)  # fmt: skip
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        read_rule(text)


RULES = [
    ("refusal >= 0.7", True),
    ("refusal >= 0.86", False),  # the value is 0.88, the lower end below
    ("refusal.refused <= 0.95", True),
    ("refusal <= 0.9", False),
    ("refusal.harmful >= base - 0.1", True),
    ("refusal.refused.benign >= base - 0.2", True),
    ("refusal >= base", False),
    ("topics >= base + 0.2", True),
    ("topics >= 0.9 * expert", True),
    ("topics >= expert", False),
    ("topics >= expert-two", True),
    ("text.loss <= base", True),
    ("text <= 0.9 * base", False),
    ("text < 0.96 * base", True),
    ("utility.min_retention >= 0.9", True),
    ("utility.min_retention >= 0.99", False),
    ("utility.mean_retention.base >= 1.2", True),
    ("utility.min_retention.expert-one >= 0.9", True),
]


@pytest.mark.parametrize(("rule", "held"), RULES)
def test_rules_are_judged_on_the_end_that_speaks_against_them(rule: str, held: bool) -> None:
    """`expert` is the best of them on each evaluation; less is better for a loss."""
    found = compare(BASE, [EXPERT, OTHER], EDIT, [rule])
    (verdict,) = found.verdicts

    assert verdict.held is held
    assert found.held is held
    assert verdict.margin.low <= verdict.margin.value <= verdict.margin.high


def test_the_value_alone_does_not_keep_a_rule() -> None:
    """0.55 of 20 rows is not surely at least 0.5, of 2000 rows it is; the table says why."""
    few, many = (
        result("edit", evaluation("a", scores("accuracy", [1.0] * int(0.55 * n) + [0.0] * round(0.45 * n))))
        for n in (20, 2000)
    )  # fmt: skip
    rules = ["a >= 0.5", "a >= 0.6", "a <= 0.6", "a <= 0.5", "a <= 0.99"]
    unsure = compare(replace(few, model="b"), [], few, rules)
    told = {v.rule: next(line for line in comparison_table(unsure) if f"  {v.rule}  " in line)
            for v in unsure.verdicts}  # fmt: skip
    assert [v.held for v in unsure.verdicts] == [False, False, False, False, True]
    assert [r for r in rules if "too few rows to be sure" in told[r]] == ["a >= 0.5", "a <= 0.6"]
    assert compare(replace(many, model="b"), [], many, ["a >= 0.5"]).held


def test_retention_is_the_worst_of_all_utility_evaluations() -> None:
    """By value: the minimum and the mean of edit over best expert."""
    found = compare(
        BASE, [EXPERT, OTHER], EDIT, ["utility.min_retention > 0", "utility.mean_retention > 0"]
    ).verdicts
    ratios = [
        sum(hits(0.87)) / sum(hits(0.9)), sum(hits(0.79)) / sum(hits(0.8)),
    ]  # fmt: skip
    assert found[0].value == pytest.approx(min(ratios))
    assert found[1].value == pytest.approx(sum(ratios) / 2)


def _with(changed: SuiteResult, name: str, found: Scores) -> SuiteResult:
    return changed.with_(replace(changed.evaluations[name], scores=(found,)))


@pytest.mark.parametrize("rule", ["topics >= -9", "topics <= 9", "topics >= base - 9",
                                  "utility.min_retention >= -9", "topics < 9"])  # fmt: skip
def test_nan_keeps_no_rule(rule: str) -> None:
    """On either side of the rule, for every operator."""
    broken = _with(EDIT, "topics", scores("accuracy", [math.nan, *hits(0.9)[1:]]))
    found = compare(BASE, [], broken, [rule])
    assert not found.held
    assert "NaN" in found.verdicts[0].reason

    base = _with(BASE, "topics", scores("accuracy", [math.nan, *hits(0.9)[1:]]))
    assert compare(base, [], EDIT, [rule]).held is (
        rule in ("topics >= -9", "topics <= 9", "topics < 9")
    )


def test_what_is_absent_keeps_no_rule() -> None:
    """An interrupted evaluation of the edit: its rules are broken, and the table says why."""
    kept = {n: e for n, e in EDIT.evaluations.items() if n != "topics"}
    half = replace(EDIT, evaluations=kept)
    found = compare(BASE, [], half, ["topics >= 0", "utility.min_retention >= 0", "sums >= 0"])

    assert [v.held for v in found.verdicts] == [False, False, True]
    assert "absent" in found.verdicts[0].reason
    assert "edit: was interrupted" in found.notes[-1]


def test_a_reference_of_zero_keeps_no_retention() -> None:
    nothing = _with(BASE, "sums", scores("accuracy", [0.0] * N))
    assert not compare(nothing, [], EDIT, ["utility.min_retention >= 0"]).held


WRONG = [
    ("refusl >= 0", "rules[0]: refusl >= 0: no evaluation 'refusl'; did you mean 'refusal'?"),
    ("refusal.harmfull >= 0", "refusal has no metric, category or language 'harmfull'"),
    ("refusal >= bas", "no model 'bas'; did you mean 'base'?"),
    ("refusal >= expert", "there is no expert among the results"),
    ("utility.retention >= 0", "utility has min_retention and mean_retention"),
    ("utility.min_retention >= base", "a retention is a ratio already"),
    ("utility.min_retention.nobody >= 0", "no model 'nobody'"),
    ("refusal = 1", "is no rule; write NAME OP EXPRESSION"),
    ("refusal >= edit - 0.1", "edit is the edit, which always keeps what it has itself"),
    ("utility.min_retention.edit >= 0.9", "edit is the edit, which always keeps"),
]


@pytest.mark.parametrize(("rule", "told"), WRONG)
def test_a_rule_about_nothing_is_refused(rule: str, told: str) -> None:
    """A typing error is wrong input, not a broken gate."""
    with pytest.raises(RecipeError) as caught:
        compare(BASE, [], EDIT, [rule])
    lines_of(str(caught.value), told)


# -- files and the command -------------------------------------------------------------------------


def saved(where: Path, *found: SuiteResult) -> list[Path]:
    paths = [where / f"{r.model}.json" for r in found]
    for path, one in zip(paths, found, strict=True):
        path.write_text(one.to_json())
    return paths


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, _with(EDIT, "topics", scores("accuracy", [math.nan, 1.0])))
    again = read_result(path)

    assert again.to_json() == path.read_text()
    assert math.isnan(again.evaluations["topics"].metrics[0].value)
    assert compare(BASE, [], read_result(saved(tmp_path, EDIT)[0]), ["sums >= 0.5"]).held


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"share"', '"sharp"'), ('"higher"', '"high"'), ('"rows": [0, 1', '"rows": [1, 1'),
        ('"schema": 1', '"schema": 2'), ('"suite_hash"', '"suit"'), ('"accuracy", "value"', '"b", "value"'),
        ('"scores": [', '"scores": 3, "x": ['), ('"values": [', '"values": [1.0, '),
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused(tmp_path: Path, old: str, new: str) -> None:
    (path,) = saved(tmp_path, EDIT)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(RecipeError, match=r"edit\.json: not a result of `suture eval`"):
        read_result(path)


def test_the_gate_of_a_command_exits_1_where_a_rule_is_broken(tmp_path: Path) -> None:
    """0 and what held; 1 and what broke, first in the table; 2 for rules that are none."""
    paths = saved(tmp_path, BASE, EXPERT, OTHER, EDIT)
    gate = tmp_path / "gate.yaml"
    gate.write_text(
        "# what must hold\n- refusal.harmful >= base - 0.1\n- utility.min_retention >= 0.9\n"
    )
    said = invoke("compare", *paths, "--gate", gate)
    assert said.code == 0
    lines_of(said.out, "start (base)", "expert-one (expert)", "edit (edit)", "gate: held, 2 rules")

    gate.write_text("rules:\n- refusal.harmful >= base\n- utility.min_retention >= 0.9\n")
    said = invoke("compare", *paths, "--gate", gate)
    assert said.code == 1
    table = said.out[said.out.index("gate: BROKEN, 1 of 2 rules") :].splitlines()
    assert table[2].startswith("BROKEN  edit  refusal.harmful >= base")
    assert "difference -0.0" in table[2]
    assert "difference" not in table[3], "a retention is no difference to a model"
    found = invoke("compare", *paths, "--gate", gate, "--json")
    assert found.code == 1
    assert [v["held"] for v in found.json["verdicts"]] == [False, True]

    gate.write_text("# one\n- refusal.harmfull >= base\n- 3\n")
    said = invoke("compare", *paths, "--gate", gate)
    assert said.code == 2
    lines_of(said.err, "line 3: rules[1]: 3 is no rule")
    gate.write_text("# one\n- refusal.harmfull >= base\n")
    lines_of(invoke("compare", *paths, "--gate", gate).err, "line 2: rules[0]", "'harmfull'")
    for text, told in (
        ("", "at least one rule"),
        ("rule: [a]", "and nothing else"),
        ("- a: b", "is no rule"),
    ):
        gate.write_text(text or "rules: []")
        said = invoke("compare", *paths, "--gate", gate)
        assert said.code == 2
        lines_of(said.err, told)


def test_several_edits_are_judged_each(tmp_path: Path) -> None:
    base, expert, edit, worse = saved(tmp_path, BASE, EXPERT, EDIT, model("worse", 0.2, 0.87, 0.79))
    gate = tmp_path / "gate.yaml"
    gate.write_text("- refusal >= base - 0.1\n")
    said = invoke(
        "compare", base, expert, "--edit", edit, "--edit", worse, "--gate", gate, "--json"
    )

    assert said.code == 1
    assert said.json["models"] == {
        "start": "base", "expert-one": "expert", "edit": "edit", "worse": "edit",
    }  # fmt: skip
    assert [(v["edit"], v["held"]) for v in said.json["verdicts"]] == [
        ("edit", True),
        ("worse", False),
    ]


def test_models_of_one_name_go_by_their_files(tmp_path: Path) -> None:
    """`results/a/model.json` and the like: names must tell them apart."""
    for name, one in (("one", BASE), ("two", replace(EDIT, model="start"))):
        (tmp_path / f"{name}.json").write_text(one.to_json())
    said = invoke("compare", tmp_path / "one.json", tmp_path / "two.json", "--json")

    assert said.json["models"] == {"one": "base", "two": "edit"}


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, BASE)
    (tmp_path / "list.json").write_text("[]")
    for files, told in (
        ([path], "a base and at least one other"), ([path, path], "stands twice"),
        ([path, tmp_path / "none.json"], "No such file"), ([path, tmp_path / "list.json"], "not a result"),
        ([path, tmp_path], "directory"),
    ):  # fmt: skip
        said = invoke("compare", *files)
        assert said.code == 2
        lines_of(said.err, told)


def test_comparing_imports_no_framework(tmp_path: Path) -> None:
    """A gate in CI needs the results alone."""
    paths = saved(tmp_path, BASE, EDIT)
    code = """
import json, sys
from pathlib import Path
import suture
from suture.verbs.compare.run import compare_files
compare_files([Path(p) for p in sys.argv[1:]])
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, timeout=60,
        check=True, env=environment(),
    )  # fmt: skip
    assert not {"torch", "transformers"} & set(json.loads(done.stdout))


def test_the_public_names_are_there() -> None:
    assert suture.compare.__name__ == compare.__name__
    assert callable(suture.compare)
    assert callable(suture.evaluate)
    assert "loss" in suture.EVALS
