"""The report of the demo: its ratios, its JSON, its Markdown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from suture.errors import RecipeError
from suture.evals.base import Metric, share
from suture.runs.report import Entry, Report, ReportTask


def metric(value: float) -> Metric:
    return Metric("accuracy", value, 100, value - 0.1, value + 0.1)


TASKS = (
    ReportTask("a", "accuracy", "expert a", "about a"),
    ReportTask("b", "accuracy", "expert b"),
)
ENTRIES = (
    Entry("base", "base", {"a": metric(0.5), "b": metric(0.6)}),
    Entry("expert a", "expert", {"a": metric(0.9), "b": metric(0.3)}),
    Entry("expert b", "expert", {"a": metric(0.4), "b": metric(0.6)}),
    Entry("ties", "merge", {"a": metric(0.8), "b": metric(0.5)}, "density 0.2", 1.5),
)
REPORT = Report("Title", TASKS, ENTRIES, ("a note",), {"torch": "2"})


def test_the_ratios_are_one_for_the_expert_and_retention_is_zero_for_the_base() -> None:
    base, expert, _, _ = ENTRIES

    assert REPORT.share(expert, TASKS[0]) == REPORT.retention(expert, TASKS[0]) == 1
    assert REPORT.retention(base, TASKS[0]) == 0
    assert REPORT.share(base, TASKS[0]) == pytest.approx(5 / 9)


def test_the_ratios_of_a_merge() -> None:
    merge = REPORT.entry("ties")

    assert REPORT.share(merge, TASKS[0]) == pytest.approx(8 / 9)
    assert REPORT.retention(merge, TASKS[0]) == pytest.approx(0.75)
    assert REPORT.summary(merge, "share") == pytest.approx((5 / 6, (8 / 9 + 5 / 6) / 2))


def test_there_is_no_retention_where_nothing_was_gained() -> None:
    """The interval of expert b reaches down to the base, so its column does not count."""
    merge = REPORT.entry("ties")

    assert REPORT.retention(merge, TASKS[1]) is None
    assert REPORT.summary(merge, "retention") == pytest.approx((0.75, 0.75))


def test_there_is_no_share_of_an_expert_that_has_nothing() -> None:
    zero = {"a": share("accuracy", 0, 5)}
    entries = (Entry("base", "base", zero), Entry("expert a", "expert", zero))
    report = Report("t", TASKS[:1], entries)

    assert report.share(entries[0], TASKS[0]) is None
    assert report.summary(entries[0], "share") == (None, None)
    assert "| base | - | - | - |" in report.to_markdown()


def test_a_report_comes_back_from_json() -> None:
    assert Report.from_json(REPORT.to_json()) == REPORT


def test_the_json_repeats_the_ratios_for_readers() -> None:
    derived = json.loads(REPORT.to_json())["derived"]["ties"]

    assert derived["retention"]["tasks"] == {"a": pytest.approx(0.75), "b": None}
    assert derived["share"]["min"] == pytest.approx(5 / 6)


def test_the_page_shows_every_model_with_its_interval() -> None:
    lines = REPORT.to_markdown().splitlines()

    assert lines[0] == "# Title"
    assert "|  | a (accuracy) | b (accuracy) |" in lines
    assert "| ties | 0.800 [0.700, 0.900] | 0.500 [0.400, 0.600] |" in lines
    assert "| ties | 0.750 | - | 0.750 | 0.750 |" in lines
    assert "| ties | merge | density 0.2 | 1.5 |" in lines
    assert "- a note" in lines


def test_a_bar_in_a_name_does_not_break_the_table() -> None:
    entries = (*ENTRIES[:3], replace(ENTRIES[3], name="a|b"))

    assert "| a\\|b | 0.800" in Report("t", TASKS, entries).to_markdown()


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ((*ENTRIES, ENTRIES[3]), "two entries named ties"),
        (ENTRIES[1:], "exactly one base"),
        (ENTRIES[:2], "its expert 'expert b' has no entry"),
        ((*ENTRIES[:3], replace(ENTRIES[3], metrics={})), "ties was not measured on a"),
    ],
)
def test_a_report_that_does_not_fit_together_is_refused(
    entries: tuple[Entry, ...], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        Report("t", TASKS, entries)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"title": "t"}', REPORT.to_json().replace('"base",', '"bass",'),
     REPORT.to_json().replace('"notes"', '"remarks"')],
)  # fmt: skip
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        Report.from_json(text)


def test_an_unknown_entry_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="no entry 'tie'; there are base"):
        REPORT.entry("tie")
