"""What the first bytes of a safetensors file say, and JSON beside weights; all of it is hostile.

Lengths, offsets, shapes and names are checked against the size of the file before they are
believed, so a wrong file is an error with its name in it, never a crash or a read outside the
tensor's bytes.
"""

from __future__ import annotations

import json
import math
import stat
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from suture.errors import CheckpointError, brief
from suture.tensors.spec import DTYPES, TensorSpec, readable

HEADER_LIMIT = 100_000_000
"""Bytes of header that the safetensors format allows."""
JSON_LIMIT = 512_000_000
"""Bytes of an index that will be read (one of a million tensors fits)."""
CONFIG_LIMIT = 16_000_000
"""Bytes of any other JSON file beside the weights that will be read."""
RANK_LIMIT = 64
"""Dimensions a tensor may have; numpy has no more."""


class Header(NamedTuple):
    """What the first bytes of a safetensors file say."""

    specs: dict[str, TensorSpec]
    offsets: dict[str, int]
    """Bytes from the start of the file, by tensor."""
    metadata: dict[str, str]
    digest: str
    """xxh3-128 of the header's bytes."""


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice!r} stands twice")
    return found


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object, of which no key may stand twice.

    Raises:
        CheckpointError: ``what`` is none.
    """
    try:
        found = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_no_twice)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{what} is not valid JSON: {reason}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return found


def _size(path: Path) -> int:
    """Bytes of a regular file: reading a pipe or a device might never end."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path}: is not a file")
    return info.st_size


def read_json(path: Path, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size.

    Raises:
        CheckpointError: the file is missing, too large, or holds no JSON object.
    """
    try:
        size = _size(path)
        if size > limit:
            raise CheckpointError(f"{path}: {readable(size)} is too large for a JSON file")
        return parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: the file cannot be read, is cut short, or its header is not consistent.
    """
    try:
        size = _size(path)
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8:
                raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file")
            if length > HEADER_LIMIT:
                raise CheckpointError(
                    f"{path}: its header claims {readable(length)}, more than the format allows; "
                    "this is not a safetensors file"
                )
            if 8 + length > size:
                raise CheckpointError(
                    f"{path}: cut short inside its header ({size} bytes of at least {8 + length}); "
                    "fetch the file again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    raw = parse_object(text, f"{path}: the header")
    metadata = raw.pop("__metadata__", None)  # some writers put null here
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map text to text")
    specs: dict[str, TensorSpec] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in raw.items():
        spec, start, end = _entry(path, name, entry)
        name = sys.intern(name)  # models of one family share their names
        specs[name] = spec
        spans.append((start, end, name))
    _check_spans(path, spans, size - 8 - length)
    offsets = {name: 8 + length + start for start, _, name in spans}
    return Header(specs, offsets, metadata, xxhash.xxh3_128_hexdigest(text))


def _entry(path: Path, name: str, entry: object) -> tuple[TensorSpec, int, int]:
    try:
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
    except (TypeError, KeyError):
        raise CheckpointError(f"{path}: {name!r} has no dtype, shape and data_offsets") from None
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise CheckpointError(f"{path}: the name {brief(name)} is not valid text")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name!r} has the unknown dtype {brief(dtype)}")
    if not _counts(shape) or not _counts(span) or len(span) != 2:
        raise CheckpointError(f"{path}: {name!r} has a shape or offsets that are no whole numbers")
    spec, nbytes = _spec(dtype, tuple(shape))
    if spec is None:
        raise CheckpointError(f"{path}: {name!r} has the absurd shape {brief(shape)}")
    start, end = span
    if end - start != nbytes:
        raise CheckpointError(
            f"{path}: {name!r} is {spec} and needs {nbytes} bytes, but its offsets "
            f"{brief(start)} to {brief(end)} hold {brief(end - start)}"
        )
    return spec, start, end


@lru_cache(maxsize=1 << 14)
def _spec(dtype: str, shape: tuple[int, ...]) -> tuple[TensorSpec | None, int]:
    """One value for all tensors of a shape, and its bytes; ``None`` where the shape is absurd."""
    # Sizes of zero count as one here: beside them the others may not be absurd either.
    if len(shape) > RANK_LIMIT or math.prod(max(1, min(s, 1 << 60)) for s in shape) >= 1 << 60:
        return None, 0
    spec = TensorSpec(dtype, shape)
    return spec, spec.nbytes


def _counts(values: object) -> bool:
    # No generator: this is asked twice for every tensor of a model.
    return (
        isinstance(values, list) and {*map(type, values)} <= {int} and min(values, default=0) >= 0
    )


def _check_spans(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    reached = 0
    for start, end, name in sorted(spans):
        if start < reached:
            raise CheckpointError(f"{path}: the bytes of {name!r} overlap those of another tensor")
        if start > reached:
            raise CheckpointError(
                f"{path}: {start - reached} bytes before {name!r} belong to nothing"
            )
        reached = end
    if reached > size:
        raise CheckpointError(
            f"{path}: cut short, {readable(size)} of {readable(reached)} of tensor data are there; "
            "fetch the file again"
        )
    if reached < size:
        raise CheckpointError(
            f"{path}: {size - reached} bytes after the last tensor belong to nothing"
        )


__all__ = [
    "CONFIG_LIMIT", "HEADER_LIMIT", "JSON_LIMIT", "RANK_LIMIT", "Header", "parse_object",
    "read_header", "read_json",
]  # fmt: skip
