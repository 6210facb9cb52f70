"""The inner loops that rank the entries of a row by magnitude; ``loops`` has the others.

What is said there holds here: they depend on the row alone, allocate nothing and check nothing.
"""

# mypy: ignore-errors
#
# numba compiles this module; its types are those of the machine code, not those mypy knows.
from __future__ import annotations

import numpy as np

from suture.kernels.loops import Array, as_bits, kernel

WINDOW = 32
"""Entries of a bin at most for which ``rank_rows`` compares each with its neighbours."""


@kernel
def _key(value):
    return as_bits(value) & np.uint32(0x7FFFFFFF)


@kernel
def _rank_by_digits(row: Array, ranks: Array, keys: Array, one: Array, other: Array, table: Array):
    """``rank_rows`` for one row, by a sort whose time does not depend on the values."""
    width = row.size
    bits = 8 if width < 4096 else 11
    values = 1 << bits
    for i in range(width):
        keys[i] = _key(row[i])
        one[i] = np.uint32(i)
    for low in range(0, 31, bits):
        shift = np.uint32(low)
        table[:values] = np.uint32(0)
        for i in range(width):
            table[(keys[i] >> shift) & np.uint32(values - 1)] += np.uint32(1)
        place = np.uint32(0)
        most = np.uint32(0)
        for value in range(values):
            much = table[value]
            most = max(most, much)
            table[value] = place
            place += much
        if most == width:
            continue  # one digit for all: nothing moves
        for i in range(width):
            index = one[i]
            value = (keys[index] >> shift) & np.uint32(values - 1)
            other[table[value]] = index
            table[value] += np.uint32(1)
        one, other = other, one
    for i in range(width):
        ranks[one[i]] = np.uint32(i)


@kernel
def _sort_nearly_sorted(keys: Array, places: Array, moves: int) -> bool:
    """Sort ``keys`` and ``places`` by insertion; ``False`` where it takes more than ``moves``."""
    for i in range(1, keys.size):
        if keys[i - 1] > keys[i]:
            key, place = keys[i], places[i]
            j = i
            while j > 0 and keys[j - 1] > key:
                keys[j] = keys[j - 1]
                places[j] = places[j - 1]
                j -= 1
            keys[j] = key
            places[j] = place
            moves -= i - j
            if moves < 0:
                return False
    return True


@kernel
def rank_rows(row: Array, start: int, number: int, width: int, ranks: Array, spare: Array) -> None:
    """The rank of every magnitude within its row, from 0 for the smallest; ties by position.

    ``number`` rows of ``width`` elements begin at ``start`` of ``row``; ``ranks`` (uint32) is
    filled at the same places. ``spare`` is uint32[3 * width + RANK_SPARE].

    Entries are put in bins of their magnitudes, in order, a few to a bin. Then little is out of
    order where many are tied, as differences of 16-bit weights are: insertion sorts them. Else,
    where no bin has many, an entry's rank is its place, less the larger ones close before it, and
    more by the smaller ones close behind: comparisons without a branch to foresee. What is neither
    is sorted by digits.
    """
    scale = 0
    while (2 << scale) <= width:
        scale += 1
    shift = np.uint32(23 - min(max(scale - 3, 0), 10))
    # Magnitudes below 2**-(scale + 1) of the row's largest one share a bin.
    span = np.uint32(((scale + 1) << 23) - 1)
    fenced = spare[: width + 2 * WINDOW]
    fenced[:WINDOW] = np.uint32(0)
    fenced[width + WINDOW :] = np.uint32(0xFFFFFFFF)
    keys = fenced[WINDOW : width + WINDOW]
    places = spare[width + 2 * WINDOW : 2 * width + 2 * WINDOW]
    order = spare[2 * width + 2 * WINDOW : 3 * width + 2 * WINDOW]
    table = spare[3 * width + 2 * WINDOW :]
    bins = np.int64(span >> shift) + 1
    for r in range(number):
        part = row[start + r * width : start + (r + 1) * width]
        rank = ranks[start + r * width : start + (r + 1) * width]
        largest = np.uint32(0)
        for i in range(width):
            largest = max(largest, _key(part[i]))
        least = largest - min(largest, span)
        table[:bins] = np.uint32(0)
        for i in range(width):
            table[(max(_key(part[i]), least) - least) >> shift] += np.uint32(1)
        most = np.uint32(0)
        for value in range(bins):
            most = max(most, table[value])
        place = np.uint32(0)
        for value in range(bins):
            much = table[value]
            table[value] = place
            place += much
        for i in range(width):
            key = _key(part[i])
            value = (max(key, least) - least) >> shift
            place = table[value]
            keys[place] = key
            places[place] = np.uint32(i)
            table[value] = place + np.uint32(1)
        falls = np.uint32(0)
        before = fenced[WINDOW - 1 : WINDOW - 1 + width]
        for i in range(width):
            falls += np.uint32(before[i] > keys[i])
        if most <= WINDOW and falls > width // 16:
            for i in range(width):
                order[i] = np.uint32(i)
            for away in range(1, np.int64(most)):
                before = fenced[WINDOW - away : WINDOW - away + width]
                behind = fenced[WINDOW + away : WINDOW + away + width]
                for i in range(width):
                    order[i] += np.uint32(behind[i] < keys[i]) - np.uint32(before[i] > keys[i])
            for i in range(width):
                rank[places[i]] = order[i]
        elif falls <= width // 4 and _sort_nearly_sorted(keys, places, 4 * width):
            for i in range(width):
                rank[places[i]] = np.uint32(i)
        else:
            _rank_by_digits(part, rank, keys, places, order, table)


@kernel
def drop_by_rank(
    row: Array, ranks: Array, words: Array, start: int, count: int, offset: int,
    least: float, step: float, own: int, factor: float,
) -> None:  # fmt: skip
    """Keep entry i with probability ``least + step * ranks[i]``, rescaled; zero the others (DELLA).

    Columns ``start`` to ``start + count``; their words begin at ``offset``. What is kept is divided
    by its own probability where ``own`` is 1, else multiplied by ``factor``.
    """
    part = row[start : start + count]
    rank = ranks[start : start + count]
    word = words[offset : offset + count]
    if own:
        for i in range(count):
            share = least + step * np.float64(np.int32(rank[i]))
            kept = np.float64(word[i]) < np.floor(share * 4294967296.0 + 0.5)
            part[i] = np.float32(1.0 / share) * part[i] if kept else np.float32(0)
    else:
        scale = np.float32(factor)
        for i in range(count):
            share = least + step * np.float64(np.int32(rank[i]))
            kept = np.float64(word[i]) < np.floor(share * 4294967296.0 + 0.5)
            part[i] = scale * part[i] if kept else np.float32(0)
