"""Rows of a recipe to tokenised data: classification, plain text, prompts with responses, chats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from suture.checkpoints.chat import as_chat
from suture.errors import MissingExtraError, Problems, RecipeError, did_you_mean
from suture.schema.sources import DataSpec, Source
from suture.training.data import Dataset
from suture.training.labelled import LabelledText, cell, draw, read_records

R = TypeVar("R")
Record = tuple[str, Mapping[str, object]]
"""Where a row stands, and its cells."""


class TrainingRows(NamedTuple):
    """Tokenised rows, and what they mean."""

    train: Dataset
    validation: Dataset
    labels: tuple[str, ...]
    notes: tuple[str, ...]


class TokenRow(NamedTuple):
    """One row: its token ids, and which of them are to be predicted (``None``: all)."""

    ids: list[int]
    targets: list[int] | None


def records_of(source: Source, *, encoded: str = "") -> list[Record]:
    """The rows of a file or of a data set of the hub; ``encoded`` names a column of image files.

    Raises:
        MissingExtraError: the hub's library is not installed.
        RecipeError: they cannot be read, or there are none.
    """
    if not source.split:
        return read_records(Path(source.path))
    try:
        from datasets import Image, load_dataset
    except ImportError as error:
        raise MissingExtraError("a data set of the hub", "data") from error
    where = f"{source.path} ({source.split})"
    try:
        found = load_dataset(
            source.path, source.config, split=source.split, revision=source.revision
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"{where}: cannot be read: {' '.join(str(error).split())[:300]}"
        ) from error
    if isinstance(found.features.get(encoded), Image):
        found = found.cast_column(encoded, Image(decode=False))
    rows = [(f"{where}, row {n}", record) for n, record in enumerate(found)]
    if not rows:
        raise RecipeError(f"{where}: holds no rows")
    names = getattr(found.features.get("label"), "names", None)
    if names:  # class numbers of the hub have names
        rows = [
            (w, {**r, "label": names[r["label"]] if 0 <= r["label"] < len(names) else None})
            for w, r in rows
        ]
    return rows


def split_records(spec: DataSpec, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and validation rows; a share is held out by a hash of each row, not by its place.

    Raises:
        RecipeError: they cannot be read, or a side is empty.
    """
    train = records_of(spec.train)
    if spec.limit:
        train = train[: spec.limit]
    if spec.validation is not None:
        return train, records_of(spec.validation)
    return held_out(train, lambda row: repr(sorted(row[1].items())), spec, seed)


def need_columns(
    sides: Sequence[Sequence[Record]], columns: Sequence[str], problems: Problems,
    place: str = "data",
) -> None:  # fmt: skip
    """Note each column that no row at all has, once; single gaps are told row by row."""
    records = [record for side in sides for _, record in side]
    known = sorted({str(k) for record in records for k, v in record.items() if v is not None})
    for column in columns:
        if records and column not in known:
            problems.add(RecipeError, f"{place}: no row has a column {column!r}; "
                                      f"{did_you_mean(column, known)}")  # fmt: skip
    problems.raise_if_any()


def held_out(
    rows: Sequence[R], key: Callable[[R], str], spec: DataSpec, seed: int
) -> tuple[list[R], list[R]]:
    """Rows in two parts; a row's side depends on the seed and its key and on no other row.

    Raises:
        RecipeError: a side is empty.
    """
    sides: tuple[list[R], list[R]] = ([], [])
    for row in rows:
        sides[draw(seed, key(row)) < spec.share].append(row)
    if not sides[0] or (spec.share and not sides[1]):
        side = "validation" if sides[0] else "training"
        raise RecipeError(
            f"data.validation: {spec.share} of {len(rows)} rows leaves no {side} rows"
        )
    return sides


def numbered(
    sides: Sequence[Sequence[tuple[str, str]]], spec: DataSpec
) -> tuple[tuple[str, ...], list[list[int]]]:
    """The labels there are, and the number of each row's, of (place, label) on several sides.

    Raises:
        RecipeError: a label is not listed, or there is only one; all such rows at once.
    """
    problems = Problems()
    labels = spec.labels or tuple(sorted({label for _, label in sides[0]}))
    if len(labels) < 2:
        problems.add(
            RecipeError,
            f"data: all training rows have the label {labels[0]!r}; there is nothing to learn",
        )
    numbers = {label: i for i, label in enumerate(labels)}
    known = "data.labels" if spec.labels else "the training rows"
    strange: dict[str, list[str]] = {}
    for where, label in (row for side in sides for row in side):
        if label not in numbers:
            strange.setdefault(label, []).append(where)
    for label, places in strange.items():
        others = f" (and {len(places) - 1} more rows)" if places[1:] else ""
        problems.add(RecipeError, f"{places[0]}{others}: the label {label!r} is not among {known}; "
                                  f"{did_you_mean(label, labels)}")  # fmt: skip
    problems.raise_if_any()
    return labels, [[numbers[label] for _, label in side] for side in sides]


def classification_rows(spec: DataSpec, tokenizer: Any, longest: int, seed: int) -> TrainingRows:
    """Texts with labels.

    Raises:
        RecipeError: an unknown column, a label out of range, an empty side, a row too long; all
            kinds of faults at once, the first rows of each.
    """
    sides, problems = split_records(spec, seed), Problems()
    need_columns(sides, (spec.text, spec.label), problems)
    read: list[list[LabelledText]] = []
    places: list[list[str]] = []
    for side in sides:
        rows, where_of = [], []
        for where, record in side:
            with problems.collecting():
                rows.append(
                    LabelledText(cell(record, spec.text, where), cell(record, spec.label, where))
                )
                where_of.append(where)
        read.append(rows)
        places.append(where_of)
    problems.raise_if_any()
    labels, numbers = numbered(
        [
            [(where, row.label) for row, where in zip(rows, where_of, strict=True)]
            for rows, where_of in zip(read, places, strict=True)
        ],
        spec,
    )
    made = [
        _dataset(
            [TokenRow(ids, None) for ids in _ids(tokenizer, [r.text for r in rows])], where_of,
            mine, tokenizer, spec, longest, problems,
        )
        for rows, where_of, mine in zip(read, places, numbers, strict=True)
    ]  # fmt: skip
    problems.raise_if_any()
    return TrainingRows(
        made[0][0], made[1][0], labels, tuple(note for _, notes in made for note in notes)
    )


def language_rows(spec: DataSpec, tokenizer: Any, longest: int, seed: int) -> TrainingRows:
    """Rows of a language model: plain text, prompts with responses, or chats.

    Raises:
        RecipeError: as for classification; also no chat template, or a row without a response.
    """
    sides, problems = split_records(spec, seed), Problems()
    spec = replace(spec, format=spec.format or _format(sides[0][0][1], spec))
    made: list[tuple[Dataset, list[str]]] = []
    for side in sides:
        with problems.collecting():
            made.append(language_data(side, spec, tokenizer, longest))
    problems.raise_if_any()
    return TrainingRows(
        made[0][0], made[1][0], (), tuple(note for _, notes in made for note in notes)
    )


def language_data(
    records: Sequence[Record], spec: DataSpec, tokenizer: Any, longest: int
) -> tuple[Dataset, list[str]]:
    """Some rows of a language model as tokens, and notes about those that were cut or left out.

    Raises:
        RecipeError: as for ``language_rows``.
    """
    problems = Problems()
    kind = spec.format or _format(records[0][1], spec)
    columns = {"text": (spec.text,), "prompt": (spec.prompt, spec.response)}.get(kind, ())
    place = records[0][0].rpartition(",")[0] if records else ""
    need_columns((records,), columns, problems, place or "data")
    tokens, places = [], []
    for where, record in records:
        with problems.collecting():
            tokens.append(_language_row(kind, spec, record, where, tokenizer))
            places.append(where)
    found = _dataset(tokens, places, [-1] * len(tokens), tokenizer, spec, longest, problems)
    problems.raise_if_any()
    return found


def check_language_records(spec: DataSpec, records: Sequence[Record]) -> None:
    """Refuse rows that lack a column, or a side of a pair, before any tokenizer is there.

    Raises:
        RecipeError: all of them at once.
    """
    kind = spec.format or _format(records[0][1], spec)
    problems = Problems()
    for where, record in records:
        with problems.collecting():
            if kind == "chat":
                said = _messages(record.get(spec.messages), where, spec.messages)
                if not any(m["role"] == "assistant" and m["content"].strip() for m in said):
                    raise RecipeError(f"{where}: no words of the assistant to predict")
                continue
            columns = [spec.text] if kind == "text" else [spec.prompt, spec.response]
            for column in columns:
                if not cell(record, column, where).strip():
                    raise RecipeError(f"{where}: the column {column!r} is empty")
    problems.raise_if_any()


def _format(record: Mapping[str, object], spec: DataSpec) -> str:
    if spec.messages in record:
        return "chat"
    if spec.prompt in record:
        return "prompt"
    if spec.text in record:
        return "text"
    columns = ", ".join(map(str, record))
    raise RecipeError(
        f"data: no column {spec.messages!r}, {spec.prompt!r} or {spec.text!r}, but {columns}; "
        "name yours, for example `text: body`"
    )


def _language_row(
    kind: str, spec: DataSpec, record: Mapping[str, object], where: str, tokenizer: Any
) -> TokenRow:
    if kind == "text":
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return TokenRow(_ids(tokenizer, [cell(record, spec.text, where)])[0] + end, None)
    if kind == "chat":
        return _chat(_messages(record.get(spec.messages), where, spec.messages), where, tokenizer)
    prompt, response = cell(record, spec.prompt, where), cell(record, spec.response, where)
    return answer_tokens(prompt, response, spec.chat, where, tokenizer)


def answer_tokens(prompt: str, answer: str, chat: bool, where: str, tokenizer: Any) -> TokenRow:
    """A prompt and the answer to it; the answer is what is to be predicted.

    Args:
        prompt: what is asked.
        answer: what is to be predicted, with the mark of an end behind it.
        chat: whether both are put into the chat template.
        where: the row, for messages.
        tokenizer: of the model.

    Raises:
        RecipeError: there is no chat template.
    """
    if chat:
        return _chat(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
            where,
            tokenizer,
        )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    before = _ids(tokenizer, [prompt])[0]
    after = list(tokenizer([answer], add_special_tokens=False)["input_ids"][0]) + end
    return TokenRow(before + after, [0] * len(before) + [1] * len(after))


def _messages(value: object, where: str, column: str) -> list[dict[str, str]]:
    fine = (
        isinstance(value, list)
        and value
        and all(
            isinstance(m, Mapping)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in value
        )
    )
    if not fine:
        raise RecipeError(
            f"{where}: {column!r} is a list of messages, each with a role and a content"
        )
    assert isinstance(value, list)
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _chat(messages: Sequence[dict[str, str]], where: str, tokenizer: Any) -> TokenRow:
    """A chat in the model's template; what the assistant says is what is to be predicted.

    The template is asked for every beginning of the chat: what an assistant's turn adds to the
    prompt before it is the turn, whatever the template writes around it.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            "the model has no chat template; use a prompt and a response column, or plain text"
        )

    def ids(part: Sequence[dict[str, str]], ask: bool = False) -> list[int]:
        text = as_chat(tokenizer, part, ask=ask)
        return list(tokenizer([text], add_special_tokens=False)["input_ids"][0])

    whole = ids(messages)
    targets = [0] * len(whole)
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = ids(messages[:at], ask=True), ids(messages[: at + 1])
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise RecipeError(
                f"{where}: the chat template writes the beginning of a chat in another way when it "
                "goes on, so the assistant's words cannot be told; use one answer a row"
            )
        targets[len(before) : len(after)] = [1] * (len(after) - len(before))
    return TokenRow(whole, targets)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(texts)["input_ids"]] if texts else []


def _dataset(
    tokens: Sequence[TokenRow], places: Sequence[str], labels: Sequence[int], tokenizer: Any,
    spec: DataSpec, longest: int, problems: Problems,
) -> tuple[Dataset, list[str]]:  # fmt: skip
    limit = spec.max_length or longest
    kept: list[tuple[TokenRow, int]] = []
    over, notes = 0, []
    for row, where, label in zip(tokens, places, labels, strict=True):
        if not row.ids:
            problems.add(RecipeError, f"{where}: no tokens: is its text empty?")
        elif len(row.ids) > limit:
            over += 1
            if over == 1 and spec.too_long == "error":
                problems.add(
                    RecipeError,
                    f"{where}: {len(row.ids)} tokens, but max_length is {limit}; raise it, or say "
                    "`too_long: cut` or `too_long: drop` under data",
                )
            if spec.too_long == "drop":
                continue
            row = TokenRow(row.ids[:limit], None if row.targets is None else row.targets[:limit])
        if row.targets is not None and not any(row.targets[1:]):
            problems.add(
                RecipeError, f"{where}: nothing to predict: the response is empty, or was cut away"
            )
        kept.append((row, label))
    if over:
        done = {"cut": "cut", "drop": "left out", "error": "too long"}[spec.too_long]
        notes.append(
            f"{over} of {len(tokens)} rows have more than {limit} tokens; they were {done}"
        )
    if tokens and not kept:
        problems.add(RecipeError, f"data: every row has more than {limit} tokens")
    chosen = [row for row, _ in kept]
    targets = None
    if any(row.targets is not None for row in chosen):
        targets = tuple(tuple(row.targets or [1] * len(row.ids)) for row in chosen)
    ids = tuple(tuple(row.ids) for row in chosen)
    return Dataset(
        ids, tuple(label for _, label in kept), tokenizer.pad_token_id or 0, targets
    ), notes
