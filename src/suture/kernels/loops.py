"""The inner loops over float32 blocks: the only module that imports numba.

``kernels.compiled`` is how the rest of the package calls them; this module is imported only when
their machine code is not in the cache. None of them reorders or contracts arithmetic, so the
result of an element depends on that element alone: not on the block, the thread or the width of the
processor's vectors. None allocates, raises or checks bounds: scratch is handed in, and sizes are
the caller's duty.

Shapes: ``rows`` is float32[models, block], ``out`` float32[block], ``scratch`` float32[anything
that holds TILE elements for each accumulator].
"""

# mypy: ignore-errors
#
# numba compiles this module; its types are those of the machine code, not those mypy knows.
from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from suture.tensors.spec import BF16, F16, F32, F64

Array = np.ndarray[Any, Any]

_inline = njit(nogil=True, error_model="numpy", inline="always")


def kernel(function):
    """Compile for calls from machine code alone; for ``kernels.cache``, which has its own door."""
    return njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(
        function
    )


TILE = 1024
"""Elements of the accumulators inside a kernel: all of them stay in the first-level cache."""
MEAN, SUM, WEIGHTED_MEAN, MAX = range(4)
MASS, COUNT = range(2)
WEIGHTED_SUM, ELECTED, MASKED_MEAN, CONSENSUS = range(4)
AS_FLOAT = -1
ALL_WORDS = 1 << 32


@intrinsic
def _as_float(_typing, bits):
    def build(_context, builder, _signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def as_bits(_typing, value):
    """The bits of a float32."""

    def build(_context, builder, _signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), build


@_inline
def _half_to_float(h):
    magnitude = np.uint32(h & np.uint32(0x7FFF)) << np.uint32(13)
    # Multiplying by 2**112 rebiases the exponent and makes subnormal halves normal, exactly.
    value = as_bits(_as_float(magnitude) * np.float32(5.192296858534828e33))
    if (h & np.uint32(0x7C00)) == np.uint32(0x7C00):
        value = magnitude | np.uint32(0x7F800000)
    return _as_float(value | (np.uint32(h & np.uint32(0x8000)) << np.uint32(16)))


@_inline
def _float_to_bfloat(value):
    bits = as_bits(value)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        rounded = (bits >> np.uint32(16)) | np.uint32(0x40)  # keep NaN a NaN
    return np.uint16(rounded)


@_inline
def _float_to_half(value):
    bits = as_bits(value)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    # 0xC8000FFF = rebias by 15 - 127, plus just under half a unit of the last place that is kept.
    normal = (magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13)
    # Adding 0.5 lets the adder round a subnormal half to its last place.
    tiny = as_bits(_as_float(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000)
    half = normal
    if magnitude < np.uint32(0x38800000):
        half = tiny
    if magnitude >= np.uint32(0x47800000):
        half = np.uint32(0x7C00)
        if magnitude > np.uint32(0x7F800000):
            half = np.uint32(0x7E00)
    return np.uint16(half | sign)


@_inline
def _trimmed(value, least):
    large = (as_bits(value) & np.uint32(0x7FFFFFFF)) >= least
    return value if large else np.float32(0)


@_inline
def _sign(value):
    return np.float32(value > 0) - np.float32(value < 0)


@_inline
def _step(delta):
    # Where nothing is added the base keeps its bits: -0.0 + 0.0 is 0.0, but x + -0.0 is always x.
    return delta if delta != 0 else np.float32(-0.0)


@_inline
def _wild(value):
    return np.uint32((as_bits(value) & np.uint32(0x7F800000)) == np.uint32(0x7F800000))


@kernel
def widen(raw: Array, code: int, count: int, row: Array) -> int:
    """Fill ``row[:count]`` (float32) from raw bytes; return how many are NaN or infinite.

    A finite float64 too large for float32 counts too: it is no number that we can use.
    """
    wild = np.uint32(0)
    if code == F32:
        whole = raw.view(np.float32)
        for i in range(count):
            value = whole[i]
            wild += _wild(value)
            row[i] = value
    elif code == BF16:
        short = raw.view(np.uint16)
        for i in range(count):
            value = _as_float(np.uint32(short[i]) << np.uint32(16))
            wild += _wild(value)
            row[i] = value
    elif code == F16:
        short = raw.view(np.uint16)
        for i in range(count):
            value = _half_to_float(np.uint32(short[i]))
            wild += _wild(value)
            row[i] = value
    elif code == F64:
        double = raw.view(np.float64)
        for i in range(count):
            value = np.float32(double[i])
            wild += _wild(value)
            row[i] = value
    return wild


@kernel
def widen_delta(raw: Array, code: int, count: int, base: Array, row: Array) -> int:
    """The same, less ``base`` (float32): a weight becomes a delta."""
    wild = np.uint32(0)
    if code == F32:
        whole = raw.view(np.float32)
        for i in range(count):
            value = whole[i]
            wild += _wild(value)
            row[i] = value - base[i]
    elif code == BF16:
        short = raw.view(np.uint16)
        for i in range(count):
            value = _as_float(np.uint32(short[i]) << np.uint32(16))
            wild += _wild(value)
            row[i] = value - base[i]
    elif code == F16:
        short = raw.view(np.uint16)
        for i in range(count):
            value = _half_to_float(np.uint32(short[i]))
            wild += _wild(value)
            row[i] = value - base[i]
    elif code == F64:
        double = raw.view(np.float64)
        for i in range(count):
            value = np.float32(double[i])
            wild += _wild(value)
            row[i] = value - base[i]
    return wild


@kernel
def subtract_double(raw: Array, base: Array, count: int, row: Array) -> None:
    """The same for float64 checkpoints: subtracted in float64, rounded to float32 once."""
    tuned = raw.view(np.float64)
    start = base.view(np.float64)
    for i in range(count):
        row[i] = np.float32(tuned[i] - start[i])


@_inline
def _width(code):
    return 8 if code == F64 else 4 if code == F32 else 2


@kernel
def load_rows(
    buffers: Array, codes: Array, first: int, count: int, deltas: int, based: int,
    base: Array, rows: Array, wild: Array,
) -> None:  # fmt: skip
    """Widen one block of every input: ``rows`` from the models, ``base`` from the base.

    Args:
        buffers: uint8[inputs, bytes], the base first where there is one (``based``).
        codes: int64[inputs], the dtype of each; -1 where the input lacks the tensor.
        first: the block's first element in the buffers.
        count: its elements.
        deltas: whether rows are models minus base (1), or models (0).
        based: whether there is a base.
        base: float32[block], filled from the base.
        rows: float32[models, block], filled from the models; a model that lacks the tensor has the
            base's values.
        wild: int64[inputs], grows by how many values are NaN or infinite.
    """
    if based:
        width = _width(codes[0])
        raw = buffers[0][first * width : (first + count) * width]
        wild[0] += widen(raw, codes[0], count, base)
    for model in range(rows.shape[0]):
        place = model + based
        code = codes[place]
        row = rows[model]
        if code < 0:
            for i in range(count):
                row[i] = np.float32(0) if deltas else base[i]
            continue
        width = _width(code)
        raw = buffers[place][first * width : (first + count) * width]
        if not deltas:
            wild[place] += widen(raw, code, count, row)
        elif code == F64 and codes[0] == F64:
            start = buffers[0][first * width : (first + count) * width]
            subtract_double(raw, start, count, row)
            for i in range(count):
                wild[place] += np.int64(_wild(row[i]))
        else:
            wild[place] += widen_delta(raw, code, count, base, row)


@kernel
def narrow(row: Array, code: int, count: int, raw: Array) -> int:
    """Round ``row[:count]`` to raw bytes, to nearest even; return how many are not finite."""
    wild = 0
    if code == F32:
        whole = raw.view(np.float32)
        for i in range(count):
            whole[i] = row[i]
            if (as_bits(row[i]) & np.uint32(0x7F800000)) == np.uint32(0x7F800000):
                wild += 1
    elif code == BF16:
        short = raw.view(np.uint16)
        for i in range(count):
            half = _float_to_bfloat(row[i])
            short[i] = half
            if (half & np.uint16(0x7F80)) == np.uint16(0x7F80):
                wild += 1
    elif code == F16:
        short = raw.view(np.uint16)
        for i in range(count):
            half = _float_to_half(row[i])
            short[i] = half
            if (half & np.uint16(0x7C00)) == np.uint16(0x7C00):
                wild += 1
    else:
        double = raw.view(np.float64)
        for i in range(count):
            double[i] = np.float64(row[i])
            if not np.isfinite(double[i]):
                wild += 1
    return wild


@kernel
def finish(
    base: Array, delta: Array, code: int, kept: int, count: int, raw: Array, counts: Array
) -> None:
    """Add float32 ``base`` to ``delta`` and round to raw bytes, counting what rounding loses.

    ``kept`` says that the base itself has the dtype ``code``, so that rounding does not change it.
    ``counts[0]`` grows by the entries with a delta, ``counts[1]`` by those among them whose rounded
    sum equals the rounded base (write-back loss, specification of stitching, section 0.4) and
    ``counts[2]`` by the sums that are not finite.
    """
    moved = np.uint32(0)
    lost = np.uint32(0)
    wild = np.uint32(0)
    if code == BF16 and kept:
        short = raw.view(np.uint16)
        for i in range(count):
            value = base[i] + _step(delta[i])
            bits = as_bits(value)
            new = (
                bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            ) >> np.uint32(16)
            new = new if value == value else np.uint32(0x7FC0)
            some = delta[i] != np.float32(0)
            moved += np.uint32(some)
            lost += np.uint32(some & (new == (as_bits(base[i]) >> np.uint32(16))))
            wild += np.uint32((new & np.uint32(0x7F80)) == np.uint32(0x7F80))
            short[i] = np.uint16(new)
    elif code == BF16:
        short = raw.view(np.uint16)
        for i in range(count):
            new = _float_to_bfloat(base[i] + _step(delta[i]))
            some = delta[i] != np.float32(0)
            moved += np.uint32(some)
            lost += np.uint32(some & (new == _float_to_bfloat(base[i])))
            wild += np.uint32((new & np.uint16(0x7F80)) == np.uint16(0x7F80))
            short[i] = new
    elif code == F16:
        short = raw.view(np.uint16)
        for i in range(count):
            new = _float_to_half(base[i] + _step(delta[i]))
            old = _float_to_half(base[i])
            some = np.uint32(delta[i] != np.float32(0))
            moved += some
            lost += some & np.uint32(new == old)
            wild += np.uint32((new & np.uint16(0x7C00)) == np.uint16(0x7C00))
            short[i] = new
    elif code == F32:
        whole = raw.view(np.float32)
        for i in range(count):
            new = base[i] + _step(delta[i])
            some = np.uint32(delta[i] != np.float32(0))
            moved += some
            lost += some & np.uint32(new == base[i])
            wild += _wild(new)
            whole[i] = new
    else:
        double = raw.view(np.float64)
        for i in range(count):
            new = np.float64(base[i]) + np.float64(_step(delta[i]))
            some = np.uint32(delta[i] != np.float32(0))
            moved += some
            lost += some & np.uint32(new == np.float64(base[i]))
            wild += np.uint32(not np.isfinite(new))
            double[i] = new
    counts[0] += moved
    counts[1] += lost
    counts[2] += wild


@kernel
def finish_double(base: Array, delta: Array, count: int, raw: Array, counts: Array) -> None:
    """The same where base (raw bytes) and output are float64: added in float64."""
    start = base.view(np.float64)
    total = raw.view(np.float64)
    for i in range(count):
        total[i] = start[i] + np.float64(_step(delta[i]))
        if delta[i] != 0:
            counts[0] += 1
            counts[1] += np.int64(total[i] == start[i])
        counts[2] += np.int64(not np.isfinite(total[i]))


@kernel
def weighted_sum(rows: Array, weights: Array, start: int, stop: int, out: Array) -> None:
    """``out = sum_i weights[i] * rows[i]``, added in the order of rows."""
    total = out[start:stop]
    total[:] = np.float32(0)
    for model in range(rows.shape[0]):
        row = rows[model][start:stop]
        weight = weights[model]
        for i in range(total.size):
            total[i] += weight * row[i]


@kernel
def count_coarse(row: Array, count: int, coarse: Array) -> None:
    """Count the upper 16 bits of every magnitude in ``coarse`` uint32[2, BINS].

    Two tables, to be added: neighbours that fall into one bin do not wait for each other.
    """
    for i in range(count):
        key = as_bits(row[i]) & np.uint32(0x7FFFFFFF)
        coarse[i & 1, key >> np.uint32(16)] += np.uint32(1)


@kernel
def gather_bracket(
    row: Array, count: int, low: int, width: int, inside: Array, found: Array
) -> None:
    """Gather the magnitudes around a threshold, in order.

    Keys (bits of magnitudes) from ``low`` up to ``low + width`` go, less ``low``, to ``inside``
    (uint32[count + 1]); ``found`` (int64[2]) becomes how many those are, and how many are higher.
    The gathering has no branch that the processor would have to foresee.
    """
    first = np.uint32(low)
    wide = np.uint32(width)
    end = np.int64(low) + np.int64(width)
    above = np.uint32(0)
    for i in range(count):
        above += np.uint32(np.int64(as_bits(row[i]) & np.uint32(0x7FFFFFFF)) >= end)
    place = 0
    for i in range(count):
        key = np.uint32((as_bits(row[i]) & np.uint32(0x7FFFFFFF)) - first)
        inside[place] = key
        place += np.int64(key < wide)
    found[0] = place
    found[1] = above


@kernel
def gather_brackets(
    rows: Array, base: Array, buffers: Array, codes: Array, first: int, count: int, deltas: int,
    based: int, lows: Array, widths: Array, inside: Array, found: Array, wild: Array,
) -> None:  # fmt: skip
    """``load_rows`` and ``gather_bracket`` for every model, strip by strip.

    Args:
        rows: float32[models, TILE], the strip, like ``base`` (float32[TILE]).
        buffers: as in ``load_rows``, with ``codes``, ``first``, ``count``, ``deltas``, ``based``
            and ``wild``.
        lows: int64[models], with ``widths`` the bracket of each model.
        widths: int64[models].
        inside: uint32[models, count + 1], filled with the keys in the brackets, less ``lows``.
        found: int64[models + 1, 2], how many those are, and how many are higher; the last row is
            scratch.
    """
    models = rows.shape[0]
    part = found[models]
    for model in range(models):
        found[model, 0] = 0
        found[model, 1] = 0
    for start in range(0, count, TILE):
        much = min(TILE, count - start)
        load_rows(buffers, codes, first + start, much, deltas, based, base, rows, wild)
        for model in range(models):
            free = inside[model][found[model, 0] :]
            gather_bracket(rows[model], much, lows[model], widths[model], free, part)
            found[model, 0] += part[0]
            found[model, 1] += part[1]


@kernel
def find_rank(keys: Array, count: int, wanted: int, table: Array, found: Array) -> None:
    """The ``wanted``-th highest of ``keys[:count]`` (uint32), by counting bits from the top.

    ``table`` is int64[2048] of scratch; ``found`` (int64[3]) becomes the key, how many keys are
    higher, and how many equal it.
    """
    prefix = np.uint32(0)
    known = np.uint32(0)
    over = np.int64(0)
    for step in range(3):
        shift = np.uint32(21 - 11 * step) if step < 2 else np.uint32(0)
        bits = np.uint32(0x7FF) if step < 2 else np.uint32(0x3FF)
        for j in range(table.size):
            table[j] = 0
        for i in range(count):
            if (keys[i] & known) == prefix:
                table[(keys[i] >> shift) & bits] += 1
        place = np.int64(bits)
        while over + table[place] < wanted:
            over += table[place]
            place -= 1
        prefix |= np.uint32(place) << shift
        known |= bits << shift
        found[2] = table[place]
    found[0] = np.int64(prefix)
    found[1] = over


@kernel
def find_limits(
    rows: Array, count: int, wanted: Array, keys: Array, cuts: Array, kept: Array, tied: Array,
    table: Array, found: Array, ordered: Array,
) -> None:  # fmt: skip
    """The threshold of each row's ``wanted`` largest magnitudes, where all of them are at hand.

    Args:
        rows: float32[models, block], of which ``count`` columns are looked at.
        count: at least 1.
        wanted: int64[models], at most ``count``.
        keys: uint32[models], filled with the thresholds.
        cuts: int64[models], filled with the position before which ties are kept.
        kept: int64[models], filled with how many entries are kept: zeros never are.
        tied: int64[models], filled with how many have exactly the threshold's magnitude.
        table: int64[2048] of scratch, like ``found`` (int64[3]) and ``ordered`` (uint32[block]).
    """
    for model in range(rows.shape[0]):
        row = rows[model]
        if wanted[model] == 0:
            keys[model] = np.uint32(0x7FFFFFFF)
            continue
        for i in range(count):
            ordered[i] = as_bits(row[i]) & np.uint32(0x7FFFFFFF)
        find_rank(ordered, count, wanted[model], table, found)
        key = np.uint32(found[0])
        keys[model] = key
        tied[model] = found[2]
        if key == 0:
            kept[model] = found[1]
            continue
        kept[model] = wanted[model]
        need = wanted[model] - found[1]
        place = np.int64(0)
        while need > 0:
            need -= np.int64(ordered[place] == key)
            place += 1
        # Where every tie is kept, there is nothing to cut.
        cuts[model] = count if wanted[model] - found[1] >= found[2] else place


@kernel
def count_places(inside: Array, count: int, table: Array, guesses: Array, ties: Array) -> None:
    """Count ``inside[:count]`` in ``table`` (uint32), and in ``ties`` what equals a guess."""
    for j in range(count):
        table[inside[j]] += np.uint32(1)
    for g in range(guesses.size):
        guess = guesses[g]
        same = np.uint32(0)
        for j in range(count):
            same += np.uint32(inside[j] == guess)
        ties[g] += same


@kernel
def pack_selected(row: Array, start: int, stop: int, key: int, bits: Array, offset: int) -> None:
    """Set bit ``offset + i - start`` (little-endian) where the magnitude's bits reach ``key``."""
    least = np.uint32(key)
    for i in range(start, stop):
        if (as_bits(row[i]) & np.uint32(0x7FFFFFFF)) >= least:
            place = offset + i - start
            bits[place >> 3] |= np.uint8(1 << (place & 7))


@kernel
def elect_and_merge(
    rows: Array, weights: Array, keys: Array, start: int, stop: int, out: Array,
    elect: int, aggregate: int, zero: int, scratch: Array,
) -> None:  # fmt: skip
    """Trim, elect a sign per entry, merge what agrees with it (TIES, Yadav et al. 2023, section 3).

    ``keys`` trims row by row as in ``trim``. With ``x_i = weights[i] * trimmed_i`` the elected sign
    is that of the sum of ``x_i`` (MASS) or of their signs (COUNT); where it is 0 it becomes
    ``zero`` (-1, 0 or 1). Agreeing entries are averaged, summed, averaged by weight, or the one of
    the largest magnitude is taken.
    """
    models = rows.shape[0]
    vote = scratch[:TILE]
    total = scratch[TILE : 2 * TILE]
    share = scratch[2 * TILE : 3 * TILE]
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        merged = out[first : first + count]
        vote[:] = np.float32(0)
        total[:] = np.float32(0)
        share[:] = np.float32(0)
        for model in range(models):
            row = rows[model][first : first + count]
            weighted = scratch[(3 + model) * TILE : (4 + model) * TILE]
            least = keys[model]
            weight = weights[model]
            if elect == MASS:
                for j in range(count):
                    value = weight * _trimmed(row[j], least)
                    weighted[j] = value
                    vote[j] += value
            else:
                for j in range(count):
                    value = weight * _trimmed(row[j], least)
                    weighted[j] = value
                    vote[j] += _sign(value)
        for j in range(count):
            sign = _sign(vote[j])
            vote[j] = sign if sign != 0 else np.float32(zero)
        for model in range(models):
            weighted = scratch[(3 + model) * TILE : (4 + model) * TILE]
            part = weights[model] if aggregate == WEIGHTED_MEAN else np.float32(1)
            if aggregate == MAX:
                for j in range(count):
                    total[j] = max(total[j], weighted[j] * vote[j])
            else:
                for j in range(count):
                    agrees = weighted[j] * vote[j] > 0
                    total[j] += weighted[j] if agrees else np.float32(0)
                    share[j] += part if agrees else np.float32(0)
        if aggregate == MAX:
            for j in range(count):
                merged[j] = total[j] * vote[j]
        elif aggregate == SUM:
            for j in range(count):
                merged[j] = total[j]
        else:
            for j in range(count):
                parts = share[j] if share[j] != 0 else np.float32(1)
                merged[j] = total[j] / parts


@kernel
def count_elected_signs(
    rows: Array, weights: Array, keys: Array, start: int, stop: int, elect: int, scratch: Array
) -> int:
    """The sum of the elected signs, zeros left at zero; its sign is TIES' majority sign."""
    balance = 0
    vote = scratch[:TILE]
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        vote[:] = np.float32(0)
        for model in range(rows.shape[0]):
            row = rows[model][first : first + count]
            least = keys[model]
            weight = weights[model]
            for j in range(count):
                value = weight * _trimmed(row[j], least)
                vote[j] += value if elect == MASS else _sign(value)
        for j in range(count):
            balance += np.int64(vote[j] > 0) - np.int64(vote[j] < 0)
    return balance


@kernel
def masked_mean(
    rows: Array, weights: Array, keys: Array, start: int, stop: int, out: Array, scratch: Array
) -> None:
    """Average, entry by entry, the weighted rows that selected the entry; 0 where none did."""
    chosen = scratch[:TILE]
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        total = out[first : first + count]
        total[:] = np.float32(0)
        chosen[:] = np.float32(0)
        for model in range(rows.shape[0]):
            row = rows[model][first : first + count]
            least = keys[model]
            weight = weights[model]
            for j in range(count):
                large = (as_bits(row[j]) & np.uint32(0x7FFFFFFF)) >= least
                total[j] += weight * row[j] if large else np.float32(0)
                chosen[j] += np.float32(large)
        for j in range(count):
            total[j] = total[j] / max(chosen[j], np.float32(1))


@kernel
def consensus(
    rows: Array, weights: Array, bounds: Array, least: int, start: int, stop: int, out: Array,
    scratch: Array,
) -> None:  # fmt: skip
    """Keep the sum of the rows where at least ``least`` rows hold their own against the others.

    With ``x_i = weights[i] * rows[i]``, row i holds its own where ``|x_i| >= bounds[i] * |sum -
    x_i|`` and is not zero (TALL masks, Wang et al. 2024).
    """
    total = scratch[:TILE]
    votes = scratch[TILE : 2 * TILE]
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        kept = out[first : first + count]
        total[:] = np.float32(0)
        votes[:] = np.float32(0)
        for model in range(rows.shape[0]):
            row = rows[model][first : first + count]
            weight = weights[model]
            for j in range(count):
                total[j] += weight * row[j]
        for model in range(rows.shape[0]):
            row = rows[model][first : first + count]
            weight = weights[model]
            bound = bounds[model]
            for j in range(count):
                value = weight * row[j]
                holds = abs(value) >= bound * abs(total[j] - value)
                votes[j] += np.float32(holds & (value != 0))
        for j in range(count):
            kept[j] = total[j] if votes[j] >= least else np.float32(0)


LANES = 64
"""Philox blocks that are computed side by side, so that the processor's vectors are full."""


@_inline
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011) of LANES counters: 128 bits of each become 4 words."""
    for _ in range(10):
        for j in range(LANES):
            a = np.uint64(c0[j]) * np.uint64(0xD2511F53)
            b = np.uint64(c2[j]) * np.uint64(0xCD9E8D57)
            c0[j] = np.uint32(b >> np.uint64(32)) ^ c1[j] ^ k0
            c1[j] = np.uint32(b)
            c2[j] = np.uint32(a >> np.uint64(32)) ^ c3[j] ^ k1
            c3[j] = np.uint32(a)
        k0 = np.uint32(k0 + np.uint32(0x9E3779B9))
        k1 = np.uint32(k1 + np.uint32(0xBB67AE85))


@kernel
def _random_strip(key: int, first: int, count: int, out: Array, lanes: Array) -> None:
    """``random_words`` for at most 4 * LANES words; ``lanes`` is uint32[4 * LANES] of scratch."""
    k0 = np.uint32(np.uint64(key) & np.uint64(0xFFFFFFFF))
    k1 = np.uint32(np.uint64(key) >> np.uint64(32))
    start = np.uint64(first) // np.uint64(4)
    c0, c1 = lanes[:LANES], lanes[LANES : 2 * LANES]
    c2, c3 = lanes[2 * LANES : 3 * LANES], lanes[3 * LANES : 4 * LANES]
    for j in range(LANES):
        counter = start + np.uint64(j)
        c0[j] = np.uint32(counter & np.uint64(0xFFFFFFFF))
        c1[j] = np.uint32(counter >> np.uint64(32))
        c2[j] = np.uint32(0)
        c3[j] = np.uint32(0)
    _philox(c0, c1, c2, c3, k0, k1)
    if count == 4 * LANES:
        for j in range(LANES):
            out[4 * j] = c0[j]
            out[4 * j + 1] = c1[j]
            out[4 * j + 2] = c2[j]
            out[4 * j + 3] = c3[j]
    else:
        for i in range(count):
            out[i] = lanes[(i & 3) * LANES + (i >> 2)]


@kernel
def random_words(key: int, first: int, count: int, out: Array, scratch: Array) -> None:
    """Fill uint32 ``out[:count]`` with the words of a stream from position ``first``.

    Word p is number p % 4 of the Philox block whose counter is p // 4: it depends on the 64-bit
    ``key`` and on its position only. ``first`` is a multiple of 4.
    """
    lanes = scratch[: 4 * LANES].view(np.uint32)
    for start in range(0, count, 4 * LANES):
        much = min(4 * LANES, count - start)
        _random_strip(key, first + start, much, out[start : start + much], lanes)


@kernel
def drop(row: Array, words: Array, limit: int, factor: float, count: int) -> None:
    """Keep entry i, times ``factor``, where ``words[i] < limit``; zero the others (DARE)."""
    bound = np.uint64(limit)
    scale = np.float32(factor)
    for i in range(count):
        row[i] = scale * row[i] if np.uint64(words[i]) < bound else np.float32(0)


@kernel
def _add_lanes(values, lanes):
    """``lanes[j] += values[j] + values[8 + j] + ...``; there is a multiple of 8 values."""
    a, b, c, d = lanes[0], lanes[1], lanes[2], lanes[3]
    e, f, g, h = lanes[4], lanes[5], lanes[6], lanes[7]
    for i in range(0, values.size, 8):
        eight = values[i : i + 8]
        a += eight[0]
        b += eight[1]
        c += eight[2]
        d += eight[3]
        e += eight[4]
        f += eight[5]
        g += eight[6]
        h += eight[7]
    lanes[0], lanes[1], lanes[2], lanes[3] = a, b, c, d
    lanes[4], lanes[5], lanes[6], lanes[7] = e, f, g, h


@kernel
def magnitudes(
    row: Array, words: Array, limit: int, count: int, sums: Array, scratch: Array
) -> None:
    """Add ``|row|`` over all entries to lanes ``sums[0]``, over the kept ones to ``sums[1]``.

    ``sums`` is float64[2, 8]: eight lanes whose order of addition is fixed, so that the total is
    the same for every block size that is a multiple of 8.
    """
    bound = np.uint64(limit)
    size = scratch[:TILE]
    kept = scratch[TILE : 2 * TILE]
    for first in range(0, count, TILE):
        much = min(TILE, count - first)
        size[:] = np.float32(0)
        kept[:] = np.float32(0)
        part = row[first : first + much]
        word = words[first : first + much]
        for i in range(much):
            size[i] = abs(part[i])
            kept[i] = size[i] if np.uint64(word[i]) < bound else np.float32(0)
        _add_lanes(size, sums[0])
        _add_lanes(kept, sums[1])


@kernel
def gram(rows: Array, count: int, sums: Array, scratch: Array) -> None:
    """Add the dot products of all pairs of rows to lanes ``sums`` float64[k, k, 8] (lower half)."""
    left = scratch[: 2 * TILE].view(np.float64)
    for first in range(0, count, TILE):
        much = min(TILE, count - first)
        for a in range(rows.shape[0]):
            for b in range(a + 1):
                x = rows[a][first : first + much]
                y = rows[b][first : first + much]
                left[much:] = 0.0
                for i in range(much):
                    left[i] = np.float64(x[i]) * np.float64(y[i])
                _add_lanes(left, sums[a, b])


@kernel
def extremes(row: Array, count: int, found: Array) -> None:
    """Update ``found`` = [largest magnitude, number of non-zero entries] (float64[2])."""
    largest = np.float32(0)
    some = 0
    for i in range(count):
        size = abs(row[i])
        largest = max(largest, size)
        some += np.int64(size > 0)
    found[0] = max(found[0], np.float64(largest))
    found[1] += some


@kernel
def stitched(
    rows: Array, weights: Array, bits: Array, count: int, out: Array, scratch: Array
) -> None:
    """Average, entry by entry, the weighted rows whose bit is set; 0 where none is."""
    chosen = scratch[:TILE]
    for first in range(0, count, TILE):
        size = min(TILE, count - first)
        total = out[first : first + size]
        total[:] = np.float32(0)
        chosen[:] = np.float32(0)
        for model in range(rows.shape[0]):
            row = rows[model][first : first + size]
            weight = weights[model]
            for j in range(size):
                place = first + j
                on = (bits[model, place >> 3] >> np.uint8(place & 7)) & np.uint8(1)
                total[j] += weight * row[j] if on else np.float32(0)
                chosen[j] += np.float32(on)
        for j in range(size):
            total[j] = total[j] / max(chosen[j], np.float32(1))


STRIP = 512
"""Columns that ``add_low_rank`` works on at once, so that its right factor stays in the cache."""


@_inline
def _add_products(left, right, begin, end, sums):
    """``sums[j] += left[0] * right[0, j] + left[1] * right[1, j] + ...``, one after the other."""
    much = end - begin
    k = 0
    while k + 4 <= left.size:
        l0, l1, l2, l3 = left[k], left[k + 1], left[k + 2], left[k + 3]
        r0, r1 = right[k][begin:end], right[k + 1][begin:end]
        r2, r3 = right[k + 2][begin:end], right[k + 3][begin:end]
        for j in range(much):
            sums[j] = sums[j] + l0 * r0[j] + l1 * r1[j] + l2 * r2[j] + l3 * r3[j]
        k += 4
    while k < left.size:
        one = left[k]
        other = right[k][begin:end]
        for j in range(much):
            sums[j] += one * other[j]
        k += 1


@_inline
def _add_products_twice(left, more, right, begin, end, sums, others):
    """The same for two rows of the left factor, in the same order."""
    much = end - begin
    k = 0
    while k + 4 <= left.size:
        l0, l1, l2, l3 = left[k], left[k + 1], left[k + 2], left[k + 3]
        m0, m1, m2, m3 = more[k], more[k + 1], more[k + 2], more[k + 3]
        r0, r1 = right[k][begin:end], right[k + 1][begin:end]
        r2, r3 = right[k + 2][begin:end], right[k + 3][begin:end]
        for j in range(much):
            a, b, c, d = r0[j], r1[j], r2[j], r3[j]
            sums[j] = sums[j] + l0 * a + l1 * b + l2 * c + l3 * d
            others[j] = others[j] + m0 * a + m1 * b + m2 * c + m3 * d
        k += 4
    while k < left.size:
        one, two = left[k], more[k]
        other = right[k][begin:end]
        for j in range(much):
            sums[j] += one * other[j]
            others[j] += two * other[j]
        k += 1


@kernel
def add_low_rank(
    row: Array, start: int, count: int, left: Array, right: Array, scale: float, scratch: Array
) -> None:
    """Add ``scale * (left @ right)`` to elements ``start`` to ``start + count`` of a matrix.

    ``row`` float32[count] holds those elements, ``left`` is float32[rows, rank] and ``right``
    float32[rank, columns]. The products of an element are added in the order of the rank, the sum
    is scaled and then added: the result depends neither on ``start`` nor on ``count``.
    """
    columns = right.shape[1]
    factor = np.float32(scale)
    stop = start + count
    if count == 0:
        return
    last = (stop - 1) // columns
    for strip in range(0, columns, STRIP):
        i = start // columns
        while i <= last:
            begin = max(strip, start - i * columns)
            end = min(strip + STRIP, columns, stop - i * columns)
            much = max(0, end - begin)
            sums = scratch[:much]
            sums[:] = np.float32(0)
            place = i * columns + begin - start
            part = row[place : place + much]
            full = min(strip + STRIP, columns)
            if begin == strip and end == full and (i + 1) * columns + full <= stop:
                others = scratch[STRIP : STRIP + much]
                others[:] = np.float32(0)
                _add_products_twice(left[i], left[i + 1], right, begin, end, sums, others)
                below = row[place + columns : place + columns + much]
                for j in range(much):
                    below[j] += factor * others[j]
                i += 1
            elif much:
                _add_products(left[i], right, begin, end, sums)
            for j in range(much):
                part[j] += factor * sums[j]
            i += 1


@kernel
def add_squares(row: Array, start: int, count: int, columns: int, by_row: int, sums: Array) -> None:
    """Add the squares of a matrix's elements to ``sums`` float64, by row (1) or by column (0).

    ``row`` float32[count] holds elements ``start`` to ``start + count``; the squares are added in
    the order of the elements.
    """
    for j in range(count):
        value = np.float64(row[j])
        place = (start + j) // columns if by_row else (start + j) % columns
        sums[place] += value * value


@kernel
def scale_lines(
    row: Array, start: int, count: int, columns: int, by_row: int, factors: Array
) -> None:
    """Multiply a matrix's elements by the factor (float32) of their row (1) or column (0)."""
    for j in range(count):
        place = (start + j) // columns if by_row else (start + j) % columns
        row[j] = row[j] * factors[place]


@kernel
def keep_between(rows: Array, low: Array, high: Array, start: int, stop: int) -> None:
    """Zero what is not in a band of magnitudes: keys (their bits) from ``low[i]`` to ``high[i]``.

    ``low`` and ``high`` are uint32[models]; an entry of row i is kept where ``low[i] <= key <
    high[i]``.
    """
    for model in range(rows.shape[0]):
        row = rows[model][start:stop]
        least = low[model]
        wide = np.uint32(max(np.int64(high[model]) - np.int64(least), 0))
        for i in range(row.size):
            key = as_bits(row[i]) & np.uint32(0x7FFFFFFF)
            row[i] = row[i] if np.uint32(key - least) < wide else np.float32(0)


@kernel
def add_magnitudes(rows: Array, count: int, sums: Array, scratch: Array) -> None:
    """Add ``|rows[i]|`` to lanes ``sums[i]`` (float64[models, 8]), in an order that is fixed."""
    size = scratch[:TILE]
    for model in range(rows.shape[0]):
        for first in range(0, count, TILE):
            much = min(TILE, count - first)
            part = rows[model][first : first + much]
            size[much:] = np.float32(0)
            for i in range(much):
                size[i] = abs(part[i])
            _add_lanes(size, sums[model])


@kernel
def vote_and_merge(
    rows: Array, weights: Array, start: int, stop: int, out: Array,
    elect: int, aggregate: int, zero: int, scratch: Array,
) -> None:  # fmt: skip
    """Elect a sign per entry before the weights are applied, merge what agrees with it.

    As ``elect_and_merge`` of rows that are trimmed already, but the vote is that of ``rows[i]``
    itself, and a row agrees by its own sign, whatever that of its weight.
    """
    models = rows.shape[0]
    vote = scratch[:TILE]
    share = scratch[TILE : 2 * TILE]
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        total = out[first : first + count]
        vote[:] = np.float32(0)
        share[:] = np.float32(0)
        total[:] = np.float32(0)
        for model in range(models):
            row = rows[model][first : first + count]
            if elect == MASS:
                for j in range(count):
                    vote[j] += row[j]
            else:
                for j in range(count):
                    vote[j] += _sign(row[j])
        for j in range(count):
            sign = _sign(vote[j])
            vote[j] = sign if sign != 0 else np.float32(zero)
        for model in range(models):
            row = rows[model][first : first + count]
            weight = weights[model]
            part = weight if aggregate == WEIGHTED_MEAN else np.float32(1)
            if aggregate == MAX:
                for j in range(count):
                    value = weight * row[j] if row[j] * vote[j] > 0 else np.float32(0)
                    total[j] = value if abs(value) > abs(total[j]) else total[j]
            else:
                for j in range(count):
                    agrees = row[j] * vote[j] > 0
                    total[j] += weight * row[j] if agrees else np.float32(0)
                    share[j] += part if agrees else np.float32(0)
        if aggregate in (MEAN, WEIGHTED_MEAN):
            for j in range(count):
                parts = share[j] if share[j] != 0 else np.float32(1)
                total[j] = total[j] / parts


@kernel
def variances(rows: Array, count: int, out: Array) -> None:
    """``out[:count]`` becomes the variance over the rows, entry by entry; 0 where all are equal."""
    models = rows.shape[0]
    number = np.float32(models)
    for first in range(0, count, TILE):
        much = min(TILE, count - first)
        spread = out[first : first + much]
        origin = rows[0][first : first + much]
        for j in range(much):
            mean = np.float32(0)
            for model in range(models):
                mean += rows[model, first + j] - origin[j]
            mean /= number
            total = np.float32(0)
            for model in range(models):
                away = (rows[model, first + j] - origin[j]) - mean
                total += away * away
            spread[j] = total / number


@kernel
def sum_by_row(
    rows: Array, factors: Array, start: int, number: int, width: int, out: Array
) -> None:
    """``out = sum_i factors[r, i] * rows[i]`` for each of ``number`` rows of ``width`` elements."""
    for r in range(number):
        first = start + r * width
        total = out[first : first + width]
        total[:] = np.float32(0)
        for model in range(rows.shape[0]):
            factor = factors[r, model]
            part = rows[model][first : first + width]
            for i in range(width):
                total[i] += factor * part[i]


@kernel
def row_dots(rows: Array, start: int, number: int, width: int, sums: Array) -> None:
    """Dot products of all pairs of models, row by row: float64[number, models * models].

    The order of addition depends on the width of a row alone.
    """
    models = rows.shape[0]
    for r in range(number):
        first = start + r * width
        for a in range(models):
            x = rows[a][first : first + width]
            for b in range(a + 1):
                y = rows[b][first : first + width]
                l0, l1, l2, l3 = 0.0, 0.0, 0.0, 0.0
                whole = width - width % 4
                for i in range(0, whole, 4):
                    l0 += np.float64(x[i]) * np.float64(y[i])
                    l1 += np.float64(x[i + 1]) * np.float64(y[i + 1])
                    l2 += np.float64(x[i + 2]) * np.float64(y[i + 2])
                    l3 += np.float64(x[i + 3]) * np.float64(y[i + 3])
                for i in range(whole, width):
                    l0 += np.float64(x[i]) * np.float64(y[i])
                total = (l0 + l1) + (l2 + l3)
                sums[r, a * models + b] = total
                sums[r, b * models + a] = total


@kernel
def column_dots(rows: Array, count: int, first: int, sums: Array) -> None:
    """Add the products of all pairs of models to ``sums`` float64[models * models, columns].

    Element i belongs to column ``(first + i) % columns``.
    """
    models = rows.shape[0]
    columns = sums.shape[1]
    for a in range(models):
        for b in range(a + 1):
            total = sums[a * models + b]
            place = first % columns
            i = 0
            while i < count:
                much = min(columns - place, count - i)
                x = rows[a][i : i + much]
                y = rows[b][i : i + much]
                part = total[place : place + much]
                for j in range(much):
                    part[j] += np.float64(x[j]) * np.float64(y[j])
                i += much
                place = 0


@kernel
def sum_by_column(rows: Array, factors: Array, count: int, first: int, out: Array) -> None:
    """``out = sum_i factors[i, c] * rows[i]``, with ``c`` the column of each element.

    Element j has column ``(first + j) % columns``.
    """
    columns = factors.shape[1]
    for model in range(rows.shape[0]):
        place = first % columns
        i = 0
        while i < count:
            much = min(columns - place, count - i)
            row = rows[model][i : i + much]
            factor = factors[model][place : place + much]
            total = out[i : i + much]
            if model == 0:
                for j in range(much):
                    total[j] = factor[j] * row[j]
            else:
                for j in range(much):
                    total[j] += factor[j] * row[j]
            i += much
            place = 0


@kernel
def count_overlaps(rows: Array, keys: Array, count: int, found: Array, scratch: Array) -> None:
    """Count, row by row, the entries that reach ``keys``: ``found`` grows, int64[2, models].

    ``found[0]`` by those where another row does so too, ``found[1]`` by those where none does.
    """
    chosen = scratch[:TILE]
    for first in range(0, count, TILE):
        much = min(TILE, count - first)
        chosen[:] = np.float32(0)
        for model in range(rows.shape[0]):
            row = rows[model][first : first + much]
            for j in range(much):
                chosen[j] += np.float32((as_bits(row[j]) & np.uint32(0x7FFFFFFF)) >= keys[model])
        for model in range(rows.shape[0]):
            row = rows[model][first : first + much]
            shared = np.uint32(0)
            alone = np.uint32(0)
            for j in range(much):
                large = (as_bits(row[j]) & np.uint32(0x7FFFFFFF)) >= keys[model]
                shared += np.uint32(large & (chosen[j] > 1))
                alone += np.uint32(large & (chosen[j] == 1))
            found[0, model] += np.int64(shared)
            found[1, model] += np.int64(alone)


@kernel
def merge_overlaps(
    rows: Array, alone: Array, keys: Array, count: int, out: Array, scratch: Array
) -> None:
    """Average the rows that reach ``keys``; where a single one does, take it times ``alone[i]``."""
    chosen = scratch[:TILE]
    single = scratch[TILE : 2 * TILE]
    for first in range(0, count, TILE):
        much = min(TILE, count - first)
        total = out[first : first + much]
        total[:] = np.float32(0)
        chosen[:] = np.float32(0)
        single[:] = np.float32(0)
        for model in range(rows.shape[0]):
            row = rows[model][first : first + much]
            factor = alone[model]
            for j in range(much):
                large = (as_bits(row[j]) & np.uint32(0x7FFFFFFF)) >= keys[model]
                value = row[j] if large else np.float32(0)
                total[j] += value
                single[j] += factor * value
                chosen[j] += np.float32(large)
        for j in range(much):
            mean = total[j] / max(chosen[j], np.float32(1))
            total[j] = single[j] if chosen[j] == 1 else mean


@kernel
def fused(
    rows: Array, base: Array, out: Array, buffers: Array, codes: Array, first: int, count: int,
    deltas: int, based: int, streams: Array, position: int, limits: Array, factors: Array,
    kind: int, weights: Array, keys: Array, bounds: Array, one: int, two: int, three: int,
    factor: float, code: int, kept: int, raw: Array, counts: Array, wild: Array, scratch: Array,
) -> None:  # fmt: skip
    """Load, drop, combine, scale and finish, strip by strip in the first-level cache.

    The same arithmetic as ``load_rows``, ``random_words`` and ``drop``, then the kernel of
    ``kind``, then ``finish`` (``narrow`` where rows are weights), with the same bytes; but what is
    between them is TILE elements long.

    Args:
        rows: float32[models, TILE]: the strip that is worked on, like ``base`` and ``out``
            (float32[TILE]).
        buffers: as in ``load_rows``, with ``codes``, ``first``, ``count``, ``deltas``, ``based``
            and ``wild``.
        streams: uint64[models], the key of each row's random stream; empty where nothing drops.
        position: of the first element in its tensor, a multiple of 4 where something drops.
        limits: int64[models], as in ``drop``, with ``factors`` (float32[models]).
        kind: WEIGHTED_SUM, ELECTED (``elect_and_merge`` with options one, two, three), MASKED_MEAN
            or CONSENSUS (``one`` is its ``least``).
        weights: float32[models].
        keys: uint32[models], for the kinds that trim.
        bounds: float32[models], for CONSENSUS.
        factor: the merged delta is multiplied by it, unless it is 1.
        code: dtype of the output, as in ``finish``; AS_FLOAT leaves the combined rows in float32.
        kept: as in ``finish``.
        raw: uint8, filled with ``count`` elements of the output.
        counts: int64[3], as in ``finish``.
    """
    width = 4 if code == AS_FLOAT else _width(code)
    scale = np.float32(factor)
    for start in range(0, count, TILE):
        much = min(TILE, count - start)
        part = raw[start * width : (start + much) * width]
        load_rows(buffers, codes, first + start, much, deltas, based, base, rows, wild)
        for model in range(streams.size):
            if limits[model] < ALL_WORDS:
                words = scratch[TILE : 2 * TILE].view(np.uint32)
                random_words(streams[model], position + start, much, words, scratch)
                drop(rows[model], words, limits[model], factors[model], much)
        if kind == WEIGHTED_SUM:
            weighted_sum(rows, weights, 0, much, out)
        elif kind == ELECTED:
            elect_and_merge(rows, weights, keys, 0, much, out, one, two, three, scratch)
        elif kind == MASKED_MEAN:
            masked_mean(rows, weights, keys, 0, much, out, scratch)
        else:
            consensus(rows, weights, bounds, one, 0, much, out, scratch)
        if factor != 1:
            for i in range(much):
                out[i] *= scale
        if code == AS_FLOAT:
            whole = part.view(np.float32)
            for i in range(much):
                whole[i] = out[i]
        elif deltas:
            finish(base, out, code, kept, much, part, counts)
        else:
            counts[2] += narrow(out, code, much, part)
