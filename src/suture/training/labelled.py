"""Labelled texts: JSONL, CSV and Parquet files, and splits that leak nothing; needs no framework.

Which side of a split a row falls on depends on the seed and on the row's own group, never on the
other rows or their order: adding data moves nothing from training to test.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from suture.errors import MissingExtraError, RecipeError, did_you_mean
from suture.schema.paths import shown

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
