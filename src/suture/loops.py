"""The inner loops over float32 blocks: the only module that imports numba.

``suture.kernels`` is how the rest of the package calls them; this module is imported only when
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

from suture.spec import BF16, F16, F32, F64

Array = np.ndarray[Any, Any]

_inline = njit(nogil=True, error_model="numpy", inline="always")


def _kernel(function):
    return njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(
        function
    )


TILE = 1024
"""Elements of the accumulators inside a kernel: all of them stay in the first-level cache."""
MEAN, SUM, WEIGHTED_MEAN, MAX = range(4)
MASS, COUNT = range(2)


@intrinsic
def _as_float(_typing, bits):
    def build(_context, builder, _signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def _as_bits(_typing, value):
    def build(_context, builder, _signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), build


@_inline
def _half_to_float(h):
    magnitude = np.uint32(h & np.uint32(0x7FFF)) << np.uint32(13)
    # Multiplying by 2**112 rebiases the exponent and makes subnormal halves normal, exactly.
    value = _as_bits(_as_float(magnitude) * np.float32(5.192296858534828e33))
    if (h & np.uint32(0x7C00)) == np.uint32(0x7C00):
        value = magnitude | np.uint32(0x7F800000)
    return _as_float(value | (np.uint32(h & np.uint32(0x8000)) << np.uint32(16)))


@_inline
def _float_to_bfloat(value):
    bits = _as_bits(value)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        rounded = (bits >> np.uint32(16)) | np.uint32(0x40)  # keep NaN a NaN
    return np.uint16(rounded)


@_inline
def _float_to_half(value):
    bits = _as_bits(value)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    # 0xC8000FFF = rebias by 15 - 127, plus just under half a unit of the last place that is kept.
    normal = (magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13)
    # Adding 0.5 lets the adder round a subnormal half to its last place.
    tiny = _as_bits(_as_float(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000)
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
    large = (_as_bits(value) & np.uint32(0x7FFFFFFF)) >= least
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
    return np.uint32((_as_bits(value) & np.uint32(0x7F800000)) == np.uint32(0x7F800000))


@_kernel
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


@_kernel
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


@_kernel
def subtract_double(raw: Array, base: Array, count: int, row: Array) -> None:
    """The same for float64 checkpoints: subtracted in float64, rounded to float32 once."""
    tuned = raw.view(np.float64)
    start = base.view(np.float64)
    for i in range(count):
        row[i] = np.float32(tuned[i] - start[i])


@_inline
def _width(code):
    return 8 if code == F64 else 4 if code == F32 else 2


@_kernel
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


@_kernel
def narrow(row: Array, code: int, count: int, raw: Array) -> int:
    """Round ``row[:count]`` to raw bytes, to nearest even; return how many are not finite."""
    wild = 0
    if code == F32:
        whole = raw.view(np.float32)
        for i in range(count):
            whole[i] = row[i]
            if (_as_bits(row[i]) & np.uint32(0x7F800000)) == np.uint32(0x7F800000):
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


@_kernel
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
            bits = _as_bits(value)
            new = (
                bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            ) >> np.uint32(16)
            new = new if value == value else np.uint32(0x7FC0)
            some = delta[i] != np.float32(0)
            moved += np.uint32(some)
            lost += np.uint32(some & (new == (_as_bits(base[i]) >> np.uint32(16))))
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


@_kernel
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


@_kernel
def weighted_sum(rows: Array, weights: Array, start: int, stop: int, out: Array) -> None:
    """``out = sum_i weights[i] * rows[i]``, added in the order of rows."""
    total = out[start:stop]
    total[:] = np.float32(0)
    for model in range(rows.shape[0]):
        row = rows[model][start:stop]
        weight = weights[model]
        for i in range(total.size):
            total[i] += weight * row[i]


@_kernel
def count_coarse(row: Array, count: int, coarse: Array) -> None:
    """Count the upper 16 bits of every magnitude in ``coarse`` uint32[2, BINS].

    Two tables, to be added: neighbours that fall into one bin do not wait for each other.
    """
    for i in range(count):
        key = _as_bits(row[i]) & np.uint32(0x7FFFFFFF)
        coarse[i & 1, key >> np.uint32(16)] += np.uint32(1)


@_kernel
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
        above += np.uint32(np.int64(_as_bits(row[i]) & np.uint32(0x7FFFFFFF)) >= end)
    place = 0
    for i in range(count):
        key = np.uint32((_as_bits(row[i]) & np.uint32(0x7FFFFFFF)) - first)
        inside[place] = key
        place += np.int64(key < wide)
    found[0] = place
    found[1] = above


@_kernel
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


@_kernel
def pack_selected(row: Array, start: int, stop: int, key: int, bits: Array, offset: int) -> None:
    """Set bit ``offset + i - start`` (little-endian) where the magnitude's bits reach ``key``."""
    least = np.uint32(key)
    for i in range(start, stop):
        if (_as_bits(row[i]) & np.uint32(0x7FFFFFFF)) >= least:
            place = offset + i - start
            bits[place >> 3] |= np.uint8(1 << (place & 7))


@_kernel
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


@_kernel
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


@_kernel
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
                large = (_as_bits(row[j]) & np.uint32(0x7FFFFFFF)) >= least
                total[j] += weight * row[j] if large else np.float32(0)
                chosen[j] += np.float32(large)
        for j in range(count):
            total[j] = total[j] / max(chosen[j], np.float32(1))


@_kernel
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


@_inline
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011): 128 counter bits and 64 key bits to 4 random words."""
    for _ in range(10):
        a = np.uint64(c0) * np.uint64(0xD2511F53)
        b = np.uint64(c2) * np.uint64(0xCD9E8D57)
        c0 = np.uint32(b >> np.uint64(32)) ^ c1 ^ k0
        c1 = np.uint32(b & np.uint64(0xFFFFFFFF))
        c2 = np.uint32(a >> np.uint64(32)) ^ c3 ^ k1
        c3 = np.uint32(a & np.uint64(0xFFFFFFFF))
        k0 = np.uint32(k0 + np.uint32(0x9E3779B9))
        k1 = np.uint32(k1 + np.uint32(0xBB67AE85))
    return c0, c1, c2, c3


@_kernel
def random_words(key: int, first: int, count: int, out: Array) -> None:
    """Fill uint32 ``out[:count]`` with the words of a stream from position ``first``.

    Word p is number p % 4 of the Philox block whose counter is p // 4: it depends on the 64-bit
    ``key`` and on its position only. ``first`` is a multiple of 4.
    """
    k0 = np.uint32(np.uint64(key) & np.uint64(0xFFFFFFFF))
    k1 = np.uint32(np.uint64(key) >> np.uint64(32))
    zero = np.uint32(0)
    blocks = (count + 3) // 4
    start = np.uint64(first) // np.uint64(4)
    for b in range(blocks):
        counter = start + np.uint64(b)
        low = np.uint32(counter & np.uint64(0xFFFFFFFF))
        high = np.uint32(counter >> np.uint64(32))
        w0, w1, w2, w3 = _philox(low, high, zero, zero, k0, k1)
        out[4 * b] = w0
        out[4 * b + 1] = w1
        out[4 * b + 2] = w2
        out[4 * b + 3] = w3


@_kernel
def drop(row: Array, words: Array, limit: int, factor: float, count: int) -> None:
    """Keep entry i, times ``factor``, where ``words[i] < limit``; zero the others (DARE)."""
    bound = np.uint64(limit)
    scale = np.float32(factor)
    for i in range(count):
        row[i] = scale * row[i] if np.uint64(words[i]) < bound else np.float32(0)


@_kernel
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


@_kernel
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


@_kernel
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


@_kernel
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


@_kernel
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
