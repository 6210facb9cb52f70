"""Patches in plain loops: the codes of positions, reading a file by its description, applying it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "U32": 4}
PIECE = 1 << 20


def gaps(at: Sequence[int]) -> bytes:
    """How many entries lie between one position and the next, 7 bits a byte, the lowest first."""
    found, before = bytearray(), -1
    for position in at:
        gap, before = position - before - 1, position
        while gap >= 128:
            found.append(gap % 128 + 128)
            gap //= 128
        found.append(gap)
    return bytes(found)


def bitmap(at: Sequence[int], size: int) -> bytes:
    """One bit an entry, the lowest of each byte first."""
    found = bytearray((size + 7) // 8)
    for position in at:
        found[position // 8] |= 1 << position % 8
    return bytes(found)


def encoded(at: Sequence[int], size: int) -> bytes:
    """The smaller of the two; the bitmap, where they are equal."""
    return min(bitmap(at, size), gaps(at), key=len)


def decoded(raw: bytes, size: int) -> list[int]:
    """The positions again."""
    if len(raw) == (size + 7) // 8:
        return [i for i in range(size) if raw[i // 8] >> i % 8 & 1]
    found, gap, shift, position = [], 0, 0, -1
    for byte in raw:
        gap += byte % 128 << shift
        shift += 7
        if byte < 128:
            position += gap + 1
            found.append(position)
            gap = shift = 0
    return found


def read(path: Path) -> tuple[dict[str, Any], dict[str, dict[int, tuple[bytes, bytes]]]]:
    """The metadata of a patch, and of each tensor: position to (old bits, new bits)."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    facts = json.loads(metadata["patch"])

    def data(key: str) -> bytes:
        start, stop = (8 + length + o for o in header[key]["data_offsets"])
        return content[start:stop]

    found = {}
    for name, entry in facts["tensors"].items():
        size = 1
        for side in entry["shape"]:
            size *= side
        width = WIDTHS[header[f"new:{name}"]["dtype"]]
        at, old, new = (data(f"{kind}:{name}") for kind in ("at", "old", "new"))
        table = [(len(new) // width, len(at))]
        if size > PIECE:
            raw = data(f"pieces:{name}")
            words = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
            table = list(zip(words[::2], words[1::2], strict=True))
        found[name], entries, nbytes = {}, 0, 0
        for number, (count, length_) in enumerate(table):
            inside = decoded(at[nbytes : nbytes + length_], min(PIECE, size - number * PIECE))
            assert len(inside) == count
            for position in inside:
                span = slice(entries * width, (entries + 1) * width)
                found[name][number * PIECE + position] = (old[span], new[span])
                entries += 1
            nbytes += length_
    return metadata | {"facts": facts}, found


def replaced(
    tensors: Mapping[str, tuple[str, bytes]],
    entries: Mapping[str, Mapping[int, tuple[bytes, bytes]]],
) -> dict[str, bytes]:
    """The bytes of every tensor (dtype, bytes) with the entries replaced."""
    found = {}
    for name, (dtype, raw) in tensors.items():
        new, width = bytearray(raw), WIDTHS[dtype]
        for position, (_, after) in entries.get(name, {}).items():
            new[position * width : (position + 1) * width] = after
        found[name] = bytes(new)
    return found
