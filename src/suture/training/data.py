"""Rows of text to padded batches: JSONL, CSV and pairs; splits that leak nothing; no model.

Which side of a split a row falls on depends on the seed and on the row's own group, never on the
other rows or their order: adding data moves nothing from training to test.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from suture.errors import MissingExtraError, RecipeError, did_you_mean
from suture.schema.paths import shown

if TYPE_CHECKING:
    from suture.training.models import Tokenizer

CELL_LIMIT = 1 << 30
"""Characters that a cell of a CSV file may have; Python alone would refuse a long text."""


@dataclass(frozen=True)
class LabelledText:
    """One labelled text."""

    text: str
    label: str = ""
    group: str = ""
    """Rows of one group stay on one side of a split; without a group, equal texts do."""

    @property
    def key(self) -> str:
        """What the split looks at."""
        return self.group or self.text


class Split(NamedTuple):
    """Three lists of rows that share no group."""

    train: list[LabelledText]
    validation: list[LabelledText]
    test: list[LabelledText]


class Batch(NamedTuple):
    """Padded rows, ready for a model."""

    input_ids: Tensor
    """``(batch, length)`` int64, padded on the right; pixels of images, float32
    ``(batch, channels, height, width)``."""
    attention_mask: Tensor
    """``(batch, length)`` int64: 1 for a token, 0 for padding; one 1 for an image."""
    labels: Tensor
    """``(batch,)`` int64: the position of each label in the list of labels; -1 without one."""
    rows: tuple[int, ...]
    """The positions of these rows in the data."""
    targets: Tensor | None = None
    """``(batch, length)`` int64: 1 where a language model shall learn to predict the token;
    without it, every token counts."""


def rows_of(pairs: Iterable[tuple[str, str]]) -> list[LabelledText]:
    """Rows of ``(text, label)`` pairs."""
    return [LabelledText(text, label) for text, label in pairs]


def read_rows(
    path: Path, *, text: str = "text", label: str | None = "label", group: str | None = None
) -> list[LabelledText]:
    """Read a ``.jsonl`` or ``.csv`` file; the arguments name its columns.

    Labels become text as JSON writes it (``true``, ``3``). Blank lines are skipped.

    Raises:
        RecipeError: the file is missing, is neither kind, or a row lacks a column.
    """
    return [
        LabelledText(
            cell(record, text, where),
            cell(record, label, where) if label else "",
            cell(record, group, where) if group else "",
        )
        for where, record in read_records(path)
    ]


def read_records(path: Path) -> list[tuple[str, Mapping[str, object]]]:
    """Read a ``.jsonl``, ``.csv`` or ``.parquet`` file: where each row stands, and its cells.

    Raises:
        RecipeError: the file is missing, of another kind, or empty.
    """
    where = shown(path)
    if path.suffix not in READERS:
        raise RecipeError(f"{where}: data is read from {' and '.join(READERS)} files")
    try:
        records = [(f"{where}, line {n}", record) for n, record in READERS[path.suffix](path)]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{where}: cannot be read: {error}") from error
    if not records:
        raise RecipeError(f"{where}: holds no rows")
    return records


def split(rows: Iterable[LabelledText], *, seed: int, validation: float, test: float) -> Split:
    """Divide rows into training, validation and test by a hash of seed and group.

    The two shares are expectations: groups are never divided, so small sets miss them a little.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise RecipeError(f"validation={validation} and test={test} leave nothing to train on")
    parts = Split([], [], [])
    for row in rows:
        at = draw(seed, row.key)
        side = 2 if at < test else 1 if at < test + validation else 0
        parts[side].append(row)
    return parts


def at_most(rows: Sequence[LabelledText], per_label: int, *, seed: int) -> list[LabelledText]:
    """Keep at most so many rows of each label, chosen by a hash, in their given order."""
    by_label: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_label[row.label].append(index)
    kept: list[int] = []
    for indices in by_label.values():
        kept += sorted(indices, key=lambda i: (draw(seed, rows[i].text), i))[:per_label]
    return [rows[i] for i in sorted(kept)]


def draw(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on seed and key and nothing else."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53  # 53 bits: exact, and never 1.0


def labels_of(rows: Iterable[LabelledText]) -> tuple[str, ...]:
    """The distinct labels, sorted."""
    return tuple(sorted({row.label for row in rows}))


@dataclass(frozen=True)
class Dataset:
    """Tokenised rows."""

    unit: ClassVar[str] = "tokens"
    """What a row is made of, for speeds."""

    ids: tuple[tuple[int, ...], ...]
    """Token ids of every row."""
    labels: tuple[int, ...]
    """Position of every row's label; -1 without one."""
    pad: int
    """The id that fills short rows."""
    targets: tuple[tuple[int, ...], ...] | None = None
    """1 for every token that is to be predicted, where not all are."""

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """All rows once, in batches of ``size`` rows of similar length; the last may be smaller.

        Without a seed the longest rows come first, so that memory is known after one batch. With
        a seed the rows are shuffled into buckets of 16 batches, sorted by length inside a bucket,
        and the batches shuffled: little padding, and a new order for every seed.
        """
        for rows in plan([len(row) for row in self.ids], size, seed=seed):
            yield self.collate(rows)

    def collate(self, rows: Sequence[int]) -> Batch:
        """The rows at these positions, padded on the right to the longest of them."""
        longest = max(len(self.ids[i]) for i in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros((len(rows), longest), dtype=torch.int64)
        for at, i in enumerate(rows):
            length = len(self.ids[i])
            ids[at, :length] = torch.tensor(self.ids[i], dtype=torch.int64)
            mask[at, :length] = 1
        targets = None
        if self.targets is not None:
            targets = torch.zeros_like(mask)
            for at, i in enumerate(rows):
                targets[at, : len(self.ids[i])] = torch.tensor(self.targets[i], dtype=torch.int64)
        return Batch(ids, mask, torch.tensor([self.labels[i] for i in rows]), tuple(rows), targets)


def plan(lengths: Sequence[int], size: int, *, seed: int | None) -> list[list[int]]:
    """Positions of the rows of every batch; see ``Dataset.batches``."""
    if size < 1:
        raise RecipeError(f"a batch holds at least one row; got {size}")
    if seed is None:
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        return [order[at : at + size] for at in range(0, len(order), size)]
    generator = random.Random(seed)
    order = list(range(len(lengths)))
    generator.shuffle(order)
    bucket = 16 * size
    batches: list[list[int]] = []
    for start in range(0, len(order), bucket):
        part = sorted(order[start : start + bucket], key=lambda i: -lengths[i])
        batches += [part[at : at + size] for at in range(0, len(part), size)]
    generator.shuffle(batches)
    return batches


def fixed_plan(lengths: Sequence[int], size: int, *, seed: int) -> list[list[int]]:
    """Batches that stay together in every epoch: sorted by length, equal lengths by chance.

    Example:
        >>> sorted(map(len, fixed_plan([5, 3, 4], 2, seed=0)))
        [1, 2]
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    return [[order[i] for i in rows] for rows in plan([lengths[i] for i in order], size, seed=None)]


def collate(data: Dataset, rows: Sequence[int]) -> Batch:
    """The rows at these positions as a batch."""
    return data.collate(rows)


def tokenise(
    rows: Sequence[LabelledText],
    tokenizer: Tokenizer,
    *,
    labels: Sequence[str] = (),
    max_length: int,
) -> Dataset:
    """Tokenise rows, cut to ``max_length`` tokens; ``labels`` gives every label its number.

    Raises:
        RecipeError: a row has a label that is not listed, or no tokens at all.
    """
    numbers = {label: i for i, label in enumerate(labels)}
    for row in rows if labels else ():
        if row.label not in numbers:
            hint = did_you_mean(row.label, labels)
            raise RecipeError(f"label {row.label!r} is not listed; {hint}")
    if not rows:
        return Dataset((), (), 0)
    encoded = tokenizer([row.text for row in rows], truncation=True, max_length=max_length)
    ids = tuple(tuple(row) for row in encoded["input_ids"])
    if () in ids:
        raise RecipeError(f"row {ids.index(())} has no tokens: is its text empty?")
    pad = tokenizer.pad_token_id or 0  # masked, so any id does
    return Dataset(ids, tuple(numbers.get(row.label, -1) for row in rows), pad)


def _parsed(text: str, where: str) -> Any:
    """JSON that can be written again.

    Raises:
        RecipeError: it is none, or an escape in it stands for half of a character.
    """
    try:
        found = json.loads(text)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RecipeError(f"{where}: holds half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise RecipeError(f"{where}: not JSON: nested too deeply") from None
    except ValueError as error:
        raise RecipeError(f"{where}: not JSON: {error}") from error
    return found


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record = _parsed(line, f"{path}, line {number}")
            if not isinstance(record, dict):
                raise RecipeError(f"{path}, line {number}: a row is an object with named columns")
            yield number, record


def _json(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    found = _parsed(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise RecipeError(f"{path}: a .json file of rows is one list of objects")
    yield from enumerate(found, 1)


def _csv(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        limit = csv.field_size_limit(CELL_LIMIT)
        try:
            for record in reader:
                if None in record:  # cells that the first line has no name for
                    columns = ", ".join(reader.fieldnames or ())
                    raise RecipeError(
                        f"{path}, line {reader.line_num}: has more cells than the first line has "
                        f"columns ({columns}); texts with commas need quotes"
                    )
                yield reader.line_num, record
        except csv.Error as error:
            raise RecipeError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
        finally:
            csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError("a Parquet file", "data") from error
    try:
        number = 0
        for part in ParquetFile(path).iter_batches():
            for record in part.to_pylist():
                number += 1
                yield number, record
    except ArrowException as error:
        raise RecipeError(f"{path}: not a Parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Mapping[str, object]]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""What reads a file, by its ending."""


def cell(record: Mapping[str, object], column: str, where: str) -> str:
    """A cell as text.

    Raises:
        RecipeError: the row has no such column.
    """
    value = record.get(column)
    if value is None:
        known = [str(key) for key, given in record.items() if given is not None]
        raise RecipeError(f"{where}: no column {column!r}; {did_you_mean(column, known)}")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def data_digest(data: Dataset) -> str:
    """A hash of tokenised rows."""
    text = json.dumps([data.ids, data.labels, data.targets], separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
