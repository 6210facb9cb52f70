"""The digest of a file that stands in the file itself: it finds damage, not forgery.

xxh3-128 of all bytes, with 32 zeros in the digest's own place. Nothing that is not ours may stand
before that place, so that the first 32 zeros, and the first text like the digest, are it.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import xxhash

from suture.checkpoints.checkpoint import Checkpoint

BLANK = "0" * 32
"""What stands in the place of the digest while it is computed."""
_CHUNK = 1 << 22


def seal(file: BinaryIO) -> None:
    """Read a file that was written with ``BLANK`` in it, and put the digest in its place."""
    state = xxhash.xxh3_128()
    file.seek(0)
    place = -1
    while part := file.read(_CHUNK):
        place = part.index(BLANK.encode()) if place < 0 else place
        state.update(part)
    file.seek(place)
    file.write(state.hexdigest().encode())


def unbroken(held: Checkpoint, digest: str) -> bool:
    """Whether a file of one part has the digest that it states; reads every byte."""
    state = xxhash.xxh3_128()
    size = held.files[0].stat().st_size
    for start in range(0, size, _CHUNK):
        raw = np.empty(min(_CHUNK, size - start), np.uint8)
        held.read_at(0, start, raw)
        part = raw.tobytes()
        if start == 0 and len(digest) == len(BLANK):
            part = part.replace(digest.encode(), BLANK.encode(), 1)
        state.update(part)
    return bool(state.hexdigest() == digest)


__all__ = ["BLANK", "seal", "unbroken"]
