"""Rows, splits and batches."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_model
from suture.errors import RecipeError
from suture.training.data import Dataset, plan, tokenise
from suture.training.labelled import (
    LabelledText,
    at_most,
    draw,
    labels_of,
    read_rows,
    rows_of,
    split,
)


def test_jsonl_and_csv_give_the_same_rows(tmp_path: Path) -> None:
    jsonl, csv = tmp_path / "a.jsonl", tmp_path / "a.csv"
    jsonl.write_text('{"text": "one, two", "label": 3}\n\n{"text": "né", "label": true}\n', "utf-8")
    csv.write_text('text,label\n"one, two",3\nné,true\n', "utf-8")

    one = tmp_path / "a.json"
    one.write_text('[{"text": "one, two", "label": 3}, {"text": "né", "label": true}]', "utf-8")

    assert read_rows(one) == read_rows(jsonl)
    assert (
        read_rows(jsonl)
        == read_rows(csv)
        == [LabelledText("one, two", "3"), LabelledText("né", "true")]
    )


def test_columns_are_named_by_the_caller(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("q,kind,source\nhello,x,book\n")

    assert read_rows(file, text="q", label="kind", group="source") == [
        LabelledText("hello", "x", "book")
    ]
    assert read_rows(file, text="q", label=None) == [LabelledText("hello")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"txt": "x", "label": "y"}', r"line 1: no column 'text'; did you mean 'txt'"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n{', "line 2: not JSON"),
        ("a.jsonl", "[1]", "line 1: a row is an object"),
        ("a.json", '{"text": "x"}', "one list of objects"),
        ("a.json", "[", "not JSON"),
        ("a.json", "[]", "holds no rows"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.csv", "text,label\nx\n", "line 2: no column 'label'"),
        ("a.txt", "x", r"read from .jsonl and .json"),
        ("a.csv", None, "cannot be read"),
        ("a.jsonl", '{"text":' + "[" * 100_000, "line 1: not JSON: nested too deeply"),
        ("a.json", '[{"text": "\\ud83d", "label": "y"}]', "half of a surrogate pair"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)

    with pytest.raises(RecipeError, match=says):
        read_rows(tmp_path / name)


def test_long_cells_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    """A text of a book's length in a CSV file, and what editors put before JSON."""
    long = "word " * 60_000
    (tmp_path / "a.csv").write_text(f'text,label\n"{long}",a\n')
    before = csv.field_size_limit()
    for name in ("a.jsonl", "a.json"):
        row = '{"text": "\\ud83d\\ude00", "label": "y"}'
        (tmp_path / name).write_text(row if name == "a.jsonl" else f"[{row}]", "utf-8-sig")

    assert read_rows(tmp_path / "a.csv") == [LabelledText(long, "a")]
    assert csv.field_size_limit() == before
    assert read_rows(tmp_path / "a.jsonl") == [LabelledText("\U0001f600", "y")]
    assert read_rows(tmp_path / "a.json") == [LabelledText("\U0001f600", "y")]


ROWS = [LabelledText(f"text {i}", "ab"[i % 2], group=f"group {i // 3}") for i in range(600)]


def test_a_split_shares_no_group_and_loses_no_row() -> None:
    parts = split(ROWS, seed=0, validation=0.2, test=0.3)

    groups = [{row.group for row in part} for part in parts]
    assert sum(map(len, parts)) == len(ROWS)
    assert not (groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2])
    assert [len(part) / len(ROWS) for part in parts] == pytest.approx([0.5, 0.2, 0.3], abs=0.1)


def test_where_a_row_goes_depends_on_no_other_row() -> None:
    whole = split(ROWS, seed=1, validation=0.2, test=0.3)
    some = split(ROWS[::-7], seed=1, validation=0.2, test=0.3)

    for few, all_ in zip(some, whole, strict=True):
        assert set(few) <= set(all_)


def test_equal_texts_share_a_side() -> None:
    parts = split(
        [LabelledText("same", label) for label in "abcd"], seed=0, validation=0.3, test=0.3
    )

    assert sorted(map(len, parts)) == [0, 0, 4]


def test_another_seed_divides_differently() -> None:
    assert split(ROWS, seed=0, validation=0.2, test=0.3) != split(
        ROWS, seed=1, validation=0.2, test=0.3
    )


def test_shares_that_leave_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match="nothing to train on"):
        split(ROWS, seed=0, validation=0.5, test=0.5)


def test_a_draw_is_uniform_and_below_one() -> None:
    draws = [draw(0, str(i)) for i in range(4000)]

    assert 0 <= min(draws) < 0.01
    assert 0.99 < max(draws) < 1
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.02)


def test_at_most_keeps_so_many_of_each_label_in_their_order() -> None:
    rows = rows_of([(f"t{i}", "rare" if i % 10 == 0 else "often") for i in range(100)])

    kept = at_most(rows, 20, seed=0)

    assert [row.label for row in kept].count("rare") == 10
    assert [row.label for row in kept].count("often") == 20
    assert kept == [row for row in rows if row in kept]


@given(
    lengths=st.lists(st.integers(1, 50), max_size=120),
    size=st.integers(1, 9),
    seed=st.none() | st.integers(0, 3),
)
def test_a_plan_holds_every_row_once_in_full_batches(
    lengths: list[int], size: int, seed: int | None
) -> None:
    batches = plan(lengths, size, seed=seed)

    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert sum(len(batch) < size for batch in batches) <= 1


def test_buckets_save_padding_and_a_seed_changes_the_order() -> None:
    lengths = [1 + (i * 37) % 64 for i in range(512)]

    def padded(batches: list[list[int]]) -> int:
        return sum(len(b) * max(lengths[i] for i in b) for b in batches)

    in_order = [list(range(at, at + 8)) for at in range(0, 512, 8)]
    assert padded(plan(lengths, 8, seed=0)) < 0.7 * padded(in_order)
    assert plan(lengths, 8, seed=0) == plan(lengths, 8, seed=0) != plan(lengths, 8, seed=1)


def test_without_a_seed_the_longest_rows_come_first() -> None:
    assert plan([3, 9, 5], 2, seed=None) == [[1, 2], [0]]


def test_a_batch_is_padded_on_the_right_and_knows_its_rows() -> None:
    data = Dataset(((5, 6), (7,)), (1, 0), pad=9)

    (batch,) = data.batches(4)

    assert batch.input_ids.tolist() == [[5, 6], [7, 9]]
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert batch.labels.tolist() == [1, 0]
    assert batch.rows == (0, 1)
    assert batch.input_ids.dtype == torch.int64


def test_tokenising_cuts_and_numbers_the_labels() -> None:
    rows = rows_of([("red green blue", "b"), ("sun", "a")])

    data = tokenise(rows, tiny_model.tokenizer(), labels=labels_of(rows), max_length=2)

    assert data.ids == ((2, 3), (5,))
    assert data.labels == (1, 0)
    assert tokenise(rows, tiny_model.tokenizer(), max_length=2).labels == (-1, -1)
    assert len(tokenise([], tiny_model.tokenizer(), max_length=2)) == 0


def test_an_unlisted_label_and_an_empty_text_are_refused() -> None:
    with pytest.raises(RecipeError, match="'skyy' is not listed; did you mean 'sky'"):
        tokenise(
            [LabelledText("sun", "skyy")], tiny_model.tokenizer(), labels=["sky"], max_length=4
        )
    with pytest.raises(RecipeError, match="row 1 has no tokens"):
        tokenise([LabelledText("sun"), LabelledText(" ")], tiny_model.tokenizer(), max_length=4)
