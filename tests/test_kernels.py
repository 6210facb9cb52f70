"""Every kernel against its plain twin: numpy, torch, or loops over Python numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slow import merges as slow
from slow import philox, rounding
from suture.kernels import compiled, loops
from suture.tensors.spec import BF16, F16, F32, F64

Array = np.ndarray[Any, Any]
CODES = {"f32": F32, "bf16": BF16, "f16": F16, "f64": F64}
TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
LIMIT = float(np.finfo(np.float32).max)

EDGES = np.array(
    [
        *(
            0.0,
            -0.0,
            1.0,
            -1.0,
            1 / 3,
            -2 / 3,
            1e-3,
            65504.0,
            -65504.0,
            65519.996,
            65520.0,
            65536.0,
        ),
        *(1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8 + 2**-20, 2 - 2**-9),
        *(2**-14, 2**-14 - 2**-25, 2**-24, 2**-25, 2**-25 + 2**-40, 3 * 2**-25, 2**-26, -(2**-24)),
        *(2**-126, 2**-127, 2**-133, 2**-134, 3 * 2**-134, 2**-134 + 2**-149, 2**-149, -(2**-149)),
        *(3.3895314e38, 3.3961775e38, 3.39e38, LIMIT, -LIMIT, math.inf, -math.inf, math.nan),
    ],
    np.float32,
)
"""Subnormal, tied between two neighbours, at the end of a range, not finite."""


def floats(bits: Array) -> Array:
    return np.ascontiguousarray(bits, np.uint32).view(np.float32)


def every_upper_half(lower: int) -> Array:
    """One float32 for each of the 65,536 patterns of the upper 16 bits."""
    return floats((np.arange(1 << 16, dtype=np.uint32) << 16) | np.uint32(lower))


def raw_of(tensor: torch.Tensor) -> Array:
    """The bytes of a tensor, as a file has them."""
    return tensor.contiguous().view(torch.uint8).numpy()


def bits_of(row: Array) -> Array:
    return row.view(np.uint32)


def random_bits(count: int, seed: int) -> Array:
    """Float32 of every size and kind: uniform bit patterns."""
    draw = np.random.default_rng(seed)
    return floats(draw.integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32))


def finite_bits(count: int, seed: int) -> Array:
    """Finite float32 of every size."""
    row = random_bits(2 * count, seed)
    return row[np.isfinite(row)][:count]


def rows_of(*values: Array) -> Array:
    return np.ascontiguousarray(np.stack(values), np.float32)


def narrowed(row: Array, kind: str) -> tuple[torch.Tensor, int]:
    """What ``narrow`` makes of a row, as torch sees it, and how many it says are not finite."""
    raw = np.zeros(row.size * (8 if kind == "f64" else 4 if kind == "f32" else 2), np.uint8)
    wild = compiled.narrow(row, CODES[kind], row.size, raw)
    return torch.from_numpy(raw).view(TORCH[kind]), int(wild)


# ------------------------------------------------------------------------ reading and rounding


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_all_16_bit_numbers_widen_exactly(kind: str) -> None:
    """All 65,536 patterns become the float32 that torch makes of them, NaN and infinity counted."""
    half = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(TORCH[kind])
    row = np.zeros(1 << 16, np.float32)

    wild = compiled.widen(raw_of(half), CODES[kind], row.size, row)

    expected = half.float().numpy()
    nan = np.isnan(expected)
    assert (bits_of(row)[~nan] == bits_of(expected)[~nan]).all()
    assert np.isnan(row[nan]).all()
    assert wild == (~np.isfinite(expected)).sum()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_all_16_bit_numbers_come_back(kind: str) -> None:
    """Widened and rounded again, each of the 65,536 patterns is itself; a NaN stays a NaN."""
    half = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(TORCH[kind])
    row = np.zeros(1 << 16, np.float32)
    compiled.widen(raw_of(half), CODES[kind], row.size, row)

    back, wild = narrowed(row, kind)

    number = ~half.isnan()
    assert torch.equal(back.view(torch.int16)[number], half.view(torch.int16)[number])
    assert back[~number].isnan().all()
    assert wild == int((~half.isfinite()).sum())


@pytest.mark.parametrize("lower", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x5555])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_rounding_is_torch_s(kind: str, lower: int) -> None:
    """All upper halves with lower halves around the tie round as torch does, overflow included."""
    row = every_upper_half(lower)
    expected = torch.from_numpy(row.copy()).to(TORCH[kind])

    found, wild = narrowed(row, kind)

    nan = expected.isnan()
    assert torch.equal(found.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])
    assert found[nan].isnan().all()
    assert wild == int((~expected.isfinite()).sum())


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "f64"])
def test_edges_and_random_patterns_round_as_torch_does(kind: str) -> None:
    """Subnormal, tied, overflowing and non-finite values, and 100,000 random patterns."""
    row = np.concatenate([EDGES, random_bits(100_000, 1)])
    expected = torch.from_numpy(row.copy()).to(TORCH[kind])

    found, wild = narrowed(row, kind)

    nan = expected.isnan()
    width = (
        torch.int16 if kind in ("bf16", "f16") else torch.int64 if kind == "f64" else torch.int32
    )
    assert torch.equal(found.view(width)[~nan], expected.view(width)[~nan])
    assert found[nan].isnan().all()
    assert wild == int((~expected.isfinite()).sum())


@pytest.mark.parametrize(("kind", "form"), [("bf16", rounding.BF16), ("f16", rounding.F16)])
def test_rounding_is_exact_arithmetic_s(kind: str, form: rounding.Format) -> None:
    """The rounded number is the nearest one by exact fractions, and the even one of two."""
    row = np.concatenate([EDGES, finite_bits(300, 2), finite_bits(300, 3) * np.float32(1e-36)])
    row = row[~np.isnan(row)]

    found, _ = narrowed(row, kind)

    assert found.tolist() == [rounding.nearest(float(x), form) for x in row]


def test_float64_is_rounded_to_float32_once() -> None:
    """A float64 becomes the nearest float32; one that is too large counts as not finite."""
    draw = np.random.default_rng(4)
    values = draw.standard_normal(1000) * 10.0 ** draw.integers(-50, 50, 1000)
    values[:4] = [1e39, -1e300, math.nan, 1 + 2**-24]
    row = np.zeros(values.size, np.float32)

    wild = compiled.widen(values.view(np.uint8), F64, values.size, row)

    with np.errstate(over="ignore"):
        expected = values.astype(np.float32)
    assert np.array_equal(row, expected, equal_nan=True)
    assert wild == (~np.isfinite(expected)).sum()
    assert row[5:15].tolist() == [rounding.nearest(x, rounding.F32) for x in values[5:15].tolist()]


@pytest.mark.parametrize("kind", list(CODES))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1000])
def test_only_the_first_elements_are_touched(kind: str, count: int) -> None:
    """``count`` bounds what is read and written, whatever the buffers could hold."""
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(5)).to(TORCH[kind])
    row = np.full(1000, 7, np.float32)
    base = np.full(1000, 0.5, np.float32)
    delta = row.copy()

    compiled.widen(raw_of(tensor), CODES[kind], count, row)
    compiled.widen_delta(raw_of(tensor), CODES[kind], count, base, delta)

    assert np.array_equal(row[:count], tensor.float().numpy()[:count])
    assert np.array_equal(delta[:count], tensor.float().numpy()[:count] - np.float32(0.5))
    assert (row[count:] == 7).all()
    assert (delta[count:] == 7).all()


@pytest.mark.parametrize("kind", list(CODES))
def test_a_delta_is_the_difference_in_float32(kind: str) -> None:
    """Widened, less the base: one float32 subtraction; non-finite weights are counted."""
    tensor = torch.randn(5000, generator=torch.Generator().manual_seed(6)).to(TORCH[kind])
    tensor[17], tensor[18] = math.nan, math.inf
    base = np.random.default_rng(7).standard_normal(5000).astype(np.float32)
    row = np.zeros(5000, np.float32)

    wild = compiled.widen_delta(raw_of(tensor), CODES[kind], 5000, base, row)

    assert np.array_equal(row, tensor.float().numpy() - base, equal_nan=True)
    assert wild == 2


def test_float64_deltas_do_not_lose_the_small_ones() -> None:
    """Between float64 checkpoints the difference is formed in float64 and then rounded."""
    base = np.array([1.0, 1e30, -3.0])
    tuned = base + np.array([1e-12, 1e15, 1e-9])
    row = np.zeros(3, np.float32)

    compiled.subtract_double(tuned.view(np.uint8), base.view(np.uint8), 3, row)

    assert np.array_equal(row, (tuned - base).astype(np.float32))
    assert row[0] > 0


@pytest.mark.parametrize(("how", "based"), [("delta", True), ("weight", True), ("weight", False)])
@pytest.mark.parametrize(("first", "count"), [(0, 64), (8, 40), (24, 0)])
def test_rows_are_made_of_every_mixture_of_dtypes(
    how: str, based: bool, first: int, count: int
) -> None:
    """Four inputs of four dtypes beside each base dtype; one lacks the tensor; one holds a NaN."""
    draw = torch.Generator().manual_seed(25)
    for base_kind in CODES:
        kinds = [*([base_kind] if based else []), *CODES, None]
        whole = [
            None if k is None else torch.randn(64, generator=draw).double().to(TORCH[k])
            for k in kinds
        ]
        poisoned = int(based) + 1
        whole[poisoned][30] = math.nan
        buffers = np.zeros((len(kinds), 64 * 8), np.uint8)
        for buffer, tensor in zip(buffers, whole, strict=True):
            if tensor is not None:
                buffer[: raw_of(tensor).size] = raw_of(tensor)
        codes = np.array([-1 if k is None else CODES[k] for k in kinds], np.int64)
        rows = np.full((5, 64), 9, np.float32)
        base, wild = np.zeros(64, np.float32), np.zeros(len(kinds), np.int64)

        compiled.load_rows(buffers, codes, first, count, int(how == "delta"), int(based), base, rows,
                          wild)  # fmt: skip

        part = slice(first, first + count)
        start = whole[0].float()[part] if based else torch.zeros(count)
        for row, kind, tensor in zip(rows, kinds[based:], whole[based:], strict=True):
            if tensor is None:
                expected = torch.zeros(count) if how == "delta" else start
            elif how == "weight":
                expected = tensor.float()[part]
            elif kind == base_kind == "f64":
                expected = (tensor - whole[0]).float()[part]
            else:
                expected = tensor.float()[part] - start
            assert np.array_equal(row[:count], expected.numpy(), equal_nan=True)
            assert (row[count:] == 9).all()
        assert wild.tolist() == [
            int(i == poisoned and first <= 30 < first + count) for i in range(len(kinds))
        ]


# ------------------------------------------------------------------------ base plus delta


def finished(base: Array, delta: Array, kind: str) -> tuple[torch.Tensor, list[int]]:
    raw = np.zeros(base.size * 8, np.uint8)
    counts = np.zeros(3, np.int64)
    compiled.finish(base, delta, CODES[kind], 0, base.size, raw, counts)
    width = torch.empty(0, dtype=TORCH[kind]).element_size()
    return torch.from_numpy(raw[: base.size * width]).view(TORCH[kind]), counts.tolist()


@pytest.mark.parametrize("kind", list(CODES))
def test_a_sum_is_rounded_once_and_losses_are_counted(kind: str) -> None:
    """Output is the rounded float32 sum; counted: deltas, those that rounding undid, overflows."""
    draw = np.random.default_rng(8)
    base = draw.standard_normal(4000).astype(np.float32)
    delta = (draw.standard_normal(4000) * 10.0 ** draw.integers(-9, 1, 4000)).astype(np.float32)
    delta[::3] = 0
    base[5], delta[5] = 3.3e38, 3.3e38
    base, delta = (torch.from_numpy(x) for x in (base, delta))

    found, counts = finished(base.numpy(), delta.numpy(), kind)

    wide = torch.float64 if kind == "f64" else torch.float32
    expected = (base.to(wide) + delta.to(wide)).to(TORCH[kind])
    assert torch.equal(found, expected)
    moved = delta != 0
    lost = moved & (expected == base.to(TORCH[kind]))
    assert counts == [int(moved.sum()), int(lost.sum()), int((~expected.isfinite()).sum())]


def test_bfloat16_loses_what_is_below_half_a_step() -> None:
    """The specification's example: at 0.05 a delta below 1.2e-4 disappears, a larger one stays."""
    base = torch.tensor([0.05]).to(torch.bfloat16).float().numpy().repeat(3)
    delta = np.array([1.0e-4, 1.3e-4, 0.0], np.float32)

    found, counts = finished(base, delta, "bf16")

    assert counts == [2, 1, 0]
    assert found[0] == found[2] != found[1]


def test_counts_add_up_over_calls() -> None:
    """Counts are added to, so that one buffer serves all blocks of a piece."""
    counts = np.array([10, 20, 30], np.int64)
    raw = np.zeros(8, np.uint8)

    compiled.finish(np.ones(2, np.float32), np.full(2, 1e-9, np.float32), F32, 1, 2, raw, counts)

    assert counts.tolist() == [12, 22, 30]


def test_float64_sums_stay_float64() -> None:
    """Where base and output are float64 nothing passes through float32 but the delta."""
    base = np.array([1 / 3, 1e-300, 2.0, 1.7e308])
    delta = np.array([1e-9, 0.0, 1e-30, LIMIT], np.float32)
    raw = np.zeros(32, np.uint8)
    counts = np.zeros(3, np.int64)

    compiled.finish_double(base.view(np.uint8), delta, 4, raw, counts)

    assert np.array_equal(raw.view(np.float64), base + delta.astype(np.float64))
    assert counts.tolist() == [3, 2, 0]


# ------------------------------------------------------------------------ sums


def sample_rows(models: int, count: int, seed: int) -> Array:
    draw = np.random.default_rng(seed)
    rows = draw.standard_normal((models, count)).astype(np.float32)
    rows[:, ::5] = np.round(rows[:, ::5] * 2) / 2  # some ties, zeros and cancellations
    return rows


@pytest.mark.parametrize("models", [1, 2, 5])
@pytest.mark.parametrize(("start", "stop"), [(0, 3000), (0, 0), (3, 1500), (1024, 2049)])
def test_weighted_sums_add_in_the_order_of_rows(models: int, start: int, stop: int) -> None:
    """Bit for bit ``((0 + w1 x1) + w2 x2) + ...``: neither contracted nor reordered."""
    rows = sample_rows(models, 3000, 9)
    weights = np.linspace(-0.3, 1.1, models).astype(np.float32)
    out = np.full(3000, 9, np.float32)

    compiled.weighted_sum(rows, weights, start, stop, out)

    expected = np.zeros(3000, np.float32)
    for row, weight in zip(rows, weights, strict=True):
        expected = expected + weight * row
    assert np.array_equal(out[start:stop], expected[start:stop])
    assert (out[:start] == 9).all()
    assert (out[stop:] == 9).all()


@pytest.mark.parametrize("count", [0, 1, 8, 1000, 1024, 5003])
def test_gram_sums_are_the_dot_products(count: int) -> None:
    """The lanes add up to the exact dot products of float64."""
    rows = sample_rows(3, 5003, 10)
    sums = np.zeros((3, 3, 8))

    compiled.gram(rows, count, sums)

    for a in range(3):
        for b in range(3):
            pairs = zip(rows[a, :count].tolist(), rows[b, :count].tolist(), strict=True)
            exact = math.fsum(x * y for x, y in pairs) if b <= a else 0.0
            assert sums[a, b].sum() == pytest.approx(exact, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("block", [8, 64, 1000, 1024, 4096])
def test_lanes_do_not_depend_on_blocks(block: int) -> None:
    """Sums taken in blocks of a multiple of 8 are bit for bit those taken at once."""
    row = sample_rows(2, 8192, 11)
    words = np.random.default_rng(12).integers(0, 1 << 32, 8192, dtype=np.uint64).astype(np.uint32)
    whole, parts = np.zeros((2, 2, 8)), np.zeros((2, 2, 8))
    sizes, pieces = np.zeros((2, 8)), np.zeros((2, 8))

    compiled.gram(row, 8192, whole)
    compiled.magnitudes(row[0], words, 1 << 31, 8192, sizes)
    for start in range(0, 8192, block):
        part = np.ascontiguousarray(row[:, start : start + block])
        compiled.gram(part, part.shape[1], parts)
        compiled.magnitudes(part[0], words[start : start + block], 1 << 31, part.shape[1], pieces)

    assert np.array_equal(whole, parts)
    assert np.array_equal(sizes, pieces)


@pytest.mark.parametrize("count", [0, 1, 1023, 5000])
@pytest.mark.parametrize("limit", [0, 1 << 30, 1 << 32])
def test_magnitudes_of_all_and_of_the_kept(count: int, limit: int) -> None:
    """Two sums of magnitudes, the second over entries whose word is below the limit."""
    row = sample_rows(1, 5000, 13)[0]
    words = np.random.default_rng(14).integers(0, 1 << 32, 5000, dtype=np.uint64).astype(np.uint32)
    sums = np.zeros((2, 8))

    compiled.magnitudes(row, words, limit, count, sums)

    sizes = np.abs(row[:count]).astype(np.float64)
    kept = sizes[words[:count].astype(np.uint64) < limit]
    assert sums.sum(1).tolist() == pytest.approx([math.fsum(sizes), math.fsum(kept)], rel=1e-12)


def test_extremes_are_updated() -> None:
    """The largest magnitude and the number of non-zero entries, carried over calls."""
    found = np.zeros(2)

    compiled.extremes(np.array([0, -3, 2, 9], np.float32), 3, found)
    compiled.extremes(np.array([0, -0.0, 1], np.float32), 3, found)

    assert found.tolist() == [3.0, 3.0]


# ------------------------------------------------------------------------ selecting by magnitude


def keys_of(row: Array) -> Array:
    return row.view(np.uint32) & np.uint32(0x7FFFFFFF)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=30))
def test_keys_have_the_order_of_magnitudes(values: list[float]) -> None:
    """The bits of a float32 without its sign sort as the magnitudes do, equal when they are."""
    row = np.array(values, np.float32)
    size, key = np.abs(row), keys_of(row)

    assert np.array_equal(np.less.outer(size, size), np.less.outer(key, key))


def test_coarse_counts() -> None:
    """Two tables that together count the upper 16 bits of every magnitude."""
    row = np.concatenate([random_bits(5000, 15), np.zeros(100, np.float32)])
    coarse = np.zeros((2, compiled.BINS), np.uint32)

    compiled.count_coarse(row, 5050, coarse)

    expected = np.bincount(keys_of(row[:5050]) >> 16, minlength=compiled.BINS)
    assert np.array_equal(coarse.sum(0), expected)


@pytest.mark.parametrize(
    ("low", "width"),
    [(0, 1), (0, 1 << 31), (0x3F000000, 0x800000), (0x7FFFFFFF, 1), (0x7F000000, 1 << 31), (5, 0)],
)
def test_a_bracket_gathers_its_keys_in_order(low: int, width: int) -> None:
    """Keys of the bracket less its start, in order; how many are higher is counted."""
    row = np.concatenate([np.zeros(9, np.float32), random_bits(3000, 16), EDGES])
    inside = np.zeros(row.size + 1, np.uint32)
    found = np.zeros(2, np.int64)

    compiled.gather_bracket(row, row.size, low, width, inside, found)

    keys = keys_of(row).astype(np.int64)
    expected = keys[(keys >= low) & (keys < low + width)] - low
    assert np.array_equal(inside[: found[0]], expected)
    assert found.tolist() == [expected.size, (keys >= low + width).sum()]


@pytest.mark.parametrize("count", [1, 1023, 1024, 5000])
def test_brackets_are_gathered_from_bytes(count: int) -> None:
    """Strip by strip from the files' bytes, the same as row by row from the deltas."""
    base, tuned = sample_rows(1, count + 3, 17)[0], sample_rows(2, count + 3, 18)
    buffers = np.stack([base, *tuned]).view(np.uint8).reshape(3, -1)
    codes, wild = np.full(3, F32, np.int64), np.zeros(3, np.int64)
    lows, widths = np.array([0x3E000000, 0], np.int64), np.array([0x1000000, 1 << 31], np.int64)
    inside, found = np.zeros((2, count + 1), np.uint32), np.zeros((3, 2), np.int64)
    strip = np.zeros((2, compiled.TILE), np.float32), np.zeros(compiled.TILE, np.float32)

    compiled.gather_brackets(
        *strip, buffers, codes, 3, count, 1, 1, lows, widths, inside, found, wild
    )

    for model in (0, 1):
        keys = keys_of(tuned[model, 3:] - base[3:]).astype(np.int64)
        low, high = lows[model], lows[model] + widths[model]
        expected = keys[(keys >= low) & (keys < high)] - low
        assert np.array_equal(inside[model, : found[model, 0]], expected)
        assert found[model].tolist() == [expected.size, (keys >= high).sum()]


@given(st.lists(st.integers(0, 2**32 - 1) | st.sampled_from([0, 5, 2**31, 2**32 - 1]), min_size=1),
       st.data())  # fmt: skip
def test_ranks_are_those_of_a_sort(values: list[int], data: st.DataObject) -> None:
    """The wanted-th highest key, how many are higher and how many equal it."""
    keys = np.array(values, np.uint32)
    wanted = data.draw(st.integers(1, keys.size))
    found = np.zeros(3, np.int64)

    compiled.find_rank(keys, keys.size, wanted, np.zeros(2048, np.int64), found)

    key = sorted(values, reverse=True)[wanted - 1]
    assert found.tolist() == [key, sum(v > key for v in values), values.count(key)]


def test_places_and_ties_are_counted() -> None:
    """A histogram of the gathered keys, and how many equal each guess; both are added to."""
    inside = np.array([3, 1, 3, 3, 0, 7, 7], np.uint32)
    table, ties = np.ones(8, np.uint32), np.zeros(4, np.int64)
    guesses = np.array([3, 7, 2, 2**32 - 1], np.uint32)

    compiled.count_places(inside, 6, table, guesses, ties)

    assert table.tolist() == [2, 2, 1, 4, 1, 1, 1, 2]
    assert ties.tolist() == [3, 1, 0, 0]


@pytest.mark.parametrize("offset", [0, 8, 4096])
@pytest.mark.parametrize(("start", "stop"), [(0, 100), (0, 0), (13, 91), (99, 100)])
def test_selected_entries_set_their_bits(offset: int, start: int, stop: int) -> None:
    """Bit i of byte j stands for entry 8 j + i; bits that were set stay set."""
    row = sample_rows(1, 100, 17)[0]
    bits = np.zeros(600, np.uint8)
    bits[0] = 0b10000000
    key = int(keys_of(np.float32([0.5]))[0])

    compiled.pack_selected(row, start, stop, key, bits, offset)

    expected = np.zeros(4800, bool)
    expected[7] = True
    expected[offset : offset + stop - start] |= np.abs(row[start:stop]) >= 0.5
    assert np.array_equal(np.unpackbits(bits, bitorder="little").view(bool), expected)


# ------------------------------------------------------------------------ electing signs


ELECT = {"mass": compiled.MASS, "count": compiled.COUNT}
AGGREGATE = {
    "mean": compiled.MEAN,
    "sum": compiled.SUM,
    "weighted_mean": compiled.WEIGHTED_MEAN,
    "max": compiled.MAX,
}
ZERO = {"zero": 0, "positive": 1}


def grid_rows(models: int, count: int, seed: int) -> Array:
    """Few different values: every vote that can be tied is, and float32 adds them exactly."""
    draw = np.random.default_rng(seed)
    return (draw.integers(-4, 5, (models, count)) / 8).astype(np.float32)


def as_vectors(rows: Array) -> dict[str, dict[str, Array]]:
    return {str(i): {"t": row.astype(np.float64)} for i, row in enumerate(rows)}


@pytest.mark.parametrize("zero", ["zero", "positive", "negative"])
@pytest.mark.parametrize("aggregate", list(AGGREGATE))
@pytest.mark.parametrize("elect", list(ELECT))
@pytest.mark.parametrize("make", [sample_rows, grid_rows])
def test_electing_and_merging_is_the_paper_s(
    make: Callable[[int, int, int], Array], elect: str, aggregate: str, zero: str
) -> None:
    """Trim, vote, aggregate: equal to loops over entries, for every option and any stretch."""
    rows = make(3, 3000, 19)
    weights = np.array([1.0, 0.5, -2.0], np.float32)
    keys = keys_of(np.array([0.25, 0.125, 0.0], np.float32)).astype(np.uint32)
    out = np.full(3000, 9, np.float32)
    code = {"zero": 0, "positive": 1, "negative": -1}[zero]

    compiled.elect_and_merge(rows, weights, keys, 5, 2900, out,
                            ELECT[elect], AGGREGATE[aggregate], code)  # fmt: skip

    thin = np.where(keys_of(rows) >= keys[:, None], rows, 0).astype(np.float64)
    expected = []
    for column in thin[:, 5:2900].T.tolist():
        entries = [w * x for w, x in zip(weights.tolist(), column, strict=True)]
        gamma = slow.elected(entries, elect) or code
        expected.append(slow.agreed(entries, weights.tolist(), gamma, aggregate))
    np.testing.assert_allclose(out[5:2900], expected, rtol=3e-7, atol=1e-7)
    assert (out[:5] == 9).all()
    assert (out[2900:] == 9).all()


@pytest.mark.parametrize("elect", list(ELECT))
@pytest.mark.parametrize(("start", "stop"), [(0, 2500), (7, 1030), (4, 4)])
def test_the_balance_of_elected_signs(elect: str, start: int, stop: int) -> None:
    """How many more entries elect plus than minus; a cancelled vote counts for neither."""
    rows = grid_rows(3, 2500, 20)
    weights = np.array([1.0, 2.0, -0.5], np.float32)
    keys = np.zeros(3, np.uint32)

    found = compiled.count_elected_signs(rows, weights, keys, start, stop, ELECT[elect])

    columns = (rows * weights[:, None])[:, start:stop].T.tolist()
    assert found == sum(slow.elected(column, elect) for column in columns)


@pytest.mark.parametrize("make", [sample_rows, grid_rows])
def test_masked_mean_averages_who_selected(make: Callable[[int, int, int], Array]) -> None:
    """The mean over the rows that selected an entry, whatever the others hold there."""
    rows = make(3, 3000, 21)
    weights = np.array([1.0, 0.5, 3.0], np.float32)
    keys = keys_of(np.array([0.25, 0.375, 0.5], np.float32)).astype(np.uint32)
    out = np.full(3000, 9, np.float32)

    compiled.masked_mean(rows, weights, keys, 1, 2999, out)

    chosen = keys_of(rows) >= keys[:, None]
    total = (np.where(chosen, rows, 0) * weights[:, None]).astype(np.float64).sum(0)
    expected = total / np.maximum(chosen.sum(0), 1)
    np.testing.assert_allclose(out[1:2999], expected[1:2999], rtol=1e-6, atol=1e-7)
    assert out[0] == out[2999] == 9


@pytest.mark.parametrize("count", [1, 8, 1000, 3001])
def test_stitching_averages_whose_bit_is_set(count: int) -> None:
    """The mean over the rows whose bit is set, and 0 where none is."""
    rows = sample_rows(3, count, 5)
    weights = np.array([1.0, 0.5, 3.0], np.float32)
    marks = np.random.default_rng(count).random((3, count)) < 0.4
    bits = np.packbits(marks, axis=1, bitorder="little")
    out = np.full(count + 1, 9, np.float32)

    compiled.stitched(rows, weights, bits, count, out)

    total = (np.where(marks, rows[:, :count], 0) * weights[:, None]).astype(np.float64).sum(0)
    expected = total / np.maximum(marks.sum(0), 1)
    np.testing.assert_allclose(out[:count], expected, rtol=1e-6, atol=1e-6)
    assert out[count] == 9


@pytest.mark.parametrize("least", [0, 1, 2, 3, 4])
def test_consensus_counts_who_holds_their_own(least: int) -> None:
    """On values that float32 adds exactly, the mask is the paper's, equality included."""
    rows = grid_rows(3, 3000, 22)
    weights = np.array([1.0, 2.0, -1.0], np.float32)
    bounds = np.array([0.5, 1.0, 0.0], np.float32)
    out = np.full(3000, 9, np.float32)

    compiled.consensus(rows, weights, bounds, least, 2, 2990, out)

    expected = slow.consensus(
        as_vectors(rows), slow.constant(*weights.tolist()), slow.constant(*bounds.tolist()),
        lambda name: 1.0, min_tasks=least,
    )["t"]  # fmt: skip
    assert np.array_equal(out[2:2990], expected[2:2990])
    assert (out[:2] == 9).all()


# ------------------------------------------------------------------------ random words


KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""The known answers that Random123 publishes for philox4x32 with 10 rounds."""


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    """Every lane of the kernel and the plain twin give the known answers of Random123."""
    lanes = [np.full(loops.LANES, word, np.uint32) for word in counter]
    loops._philox(*lanes, *(np.uint32(x) for x in key))

    assert [set(lane.tolist()) for lane in lanes] == [{word} for word in answer]
    assert philox.philox(counter, key) == answer


@pytest.mark.parametrize("key", [0, 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("first", [0, 4, 2**20, 2**34 - 8, 2**40])
def test_random_words_are_the_twin_s(key: int, first: int) -> None:
    """Words depend on key and position only, also where the counter passes 32 bits."""
    out = np.zeros(32, np.uint32)

    compiled.random_words(key, first, 29, out)

    assert out[:29].tolist() == philox.words(key, first, 29)


@pytest.mark.parametrize("part", [8, 64, 1000, 4096])
def test_a_stream_may_be_cut_anywhere(part: int) -> None:
    """Words drawn in parts are the words drawn at once."""
    whole, parts = np.zeros(4096, np.uint32), np.zeros(4096, np.uint32)

    compiled.random_words(99, 4096, 4096, whole)
    for start in range(0, 4096, part):
        row = np.zeros(part, np.uint32)
        count = min(part, 4096 - start)
        compiled.random_words(99, 4096 + start, count, row)
        parts[start : start + count] = row[:count]

    assert np.array_equal(whole, parts)


def test_random_words_are_spread_evenly() -> None:
    """No bit of a million words is set more or less often than chance allows (5 sigma)."""
    out = np.zeros(1 << 20, np.uint32)

    compiled.random_words(7, 0, out.size, out)

    for bit in range(32):
        share = ((out >> np.uint32(bit)) & np.uint32(1)).mean(dtype=np.float64)
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(out.size)


@pytest.mark.parametrize("density", [0.0, 0.3, 0.999, 1.0])
def test_dropping_keeps_words_below_the_limit(density: float) -> None:
    """Kept entries are multiplied once in float32, the others are zero, the rest is left alone."""
    row = sample_rows(1, 1000, 23)[0]
    before = row.copy()
    words = np.random.default_rng(24).integers(0, 1 << 32, 1000, dtype=np.uint64).astype(np.uint32)
    words[:3] = [0, 2**32 - 1, round(density * 2**32) % 2**32]
    limit = round(density * 2**32)

    compiled.drop(row, words, limit, 1.7, 990)

    expected = np.where(words.astype(np.uint64) < limit, np.float32(1.7) * before, np.float32(0))
    assert np.array_equal(row[:990], expected[:990])
    assert np.array_equal(row[990:], before[990:])


# -------------------------------------------------------------------- thinning, voting, ranking


@pytest.mark.parametrize("start", [0, 1, 37])
def test_a_band_of_magnitudes_is_kept(start: int) -> None:
    """Entries from the lower key up to, not including, the higher; nothing beside the stretch."""
    rows = rows_of(*(finite_bits(1500, seed) for seed in (1, 2)))
    before = rows.copy()
    keys = bits_of(before) & 0x7FFFFFFF
    low = np.array([np.percentile(keys[0], 30), 0], np.uint32)
    high = np.array([np.percentile(keys[0], 70), 0x80000000], np.uint32)

    compiled.keep_between(rows, low, high, start, 1400)

    for row, old, key, a, b in zip(rows, before, keys, low, high, strict=True):
        inside = np.arange(1500)
        inside = (inside >= start) & (inside < 1400)
        expected = np.where(~inside | ((key >= a) & (key < b)), old, np.float32(0))
        assert (bits_of(row) == bits_of(expected)).all()
    compiled.keep_between(rows, high, low, 0, 1500)
    assert not rows[0].any()  # an empty band keeps nothing


def test_magnitudes_add_up_in_lanes() -> None:
    """The lanes hold the sum of magnitudes of each row, the same for blocks of any size."""
    rows = rows_of(*(np.random.default_rng(s).standard_normal(5001).astype("f4") for s in (1, 2)))
    sums = np.zeros((2, 8))
    compiled.add_magnitudes(rows, 5001, sums)
    pieces = np.zeros((2, 8))
    for first in range(0, 5001, 64):
        part = np.ascontiguousarray(rows[:, first : first + 64])
        compiled.add_magnitudes(part, part.shape[1], pieces)

    assert (sums == pieces).all()
    np.testing.assert_allclose(sums.sum(1), np.abs(rows.astype(np.float64)).sum(1), rtol=1e-12)


@pytest.mark.parametrize("zero", [-1, 0, 1])
@pytest.mark.parametrize("aggregate", ["mean", "sum", "weighted_mean", "max"])
@pytest.mark.parametrize("elect", ["mass", "count"])
def test_votes_without_weights(elect: str, aggregate: str, zero: int) -> None:
    """A row agrees by its own sign, and is weighed only then; checked entry by entry."""
    draw = np.random.default_rng(4)
    rows = draw.integers(-2, 3, (3, 2100)).astype(np.float32)
    weights = np.array([0.5, -2.0, 1.25], np.float32)
    out = np.zeros(2100, np.float32)
    how = {"mean": 0, "sum": 1, "weighted_mean": 2, "max": 3}[aggregate]

    compiled.vote_and_merge(rows, weights, 3, 2090, out, int(elect == "count"), how, zero)

    for i in range(3, 2090):
        column = [float(x) for x in rows[:, i]]
        gamma = slow.elected(column, elect) or zero
        agreeing = [(w * x, w) for x, w in zip(column, weights.tolist(), strict=True)
                    if slow.sign(x) == gamma != 0]  # fmt: skip
        total = sum(x for x, _ in agreeing)
        divisor = {"mean": len(agreeing), "weighted_mean": sum(w for _, w in agreeing)}
        expected = total / (divisor.get(aggregate, 1) or 1)
        if aggregate == "max":
            expected = max((x for x, _ in agreeing), key=abs, default=0.0)
        assert abs(out[i]) == pytest.approx(abs(expected), rel=1e-6)
        assert aggregate == "max" or out[i] == pytest.approx(expected, rel=1e-6)
    assert not out[:3].any()
    assert not out[2090:].any()


def test_variance_over_the_models() -> None:
    """That of numpy, and exactly zero where all models agree."""
    draw = np.random.default_rng(5)
    rows = (0.1 + draw.standard_normal((3, 1500)) * 1e-3).astype(np.float32)
    rows[:, ::7] = rows[0, ::7]
    out = np.ones(1500, np.float32)

    compiled.variances(rows, 1499, out)

    expected = rows.astype(np.float64).var(0)
    np.testing.assert_allclose(out[:1499], expected[:1499], rtol=1e-4, atol=1e-12)
    assert not out[:1499:7].any()
    assert out[1499] == 1


def ranked(count: int) -> dict[str, Array]:
    """Values for every way that ranks are found: by neighbours, by insertion, by digits."""
    draw = np.random.default_rng(6)
    normal = draw.standard_normal(count)
    base = normal * 0.02
    few = draw.standard_normal(count) * (draw.random(count) < 0.1)
    return {
        "all magnitudes": finite_bits(count, 7),
        "NaN and infinity, too": draw.integers(0, 1 << 32, count).astype(np.uint32).view("f4"),
        "ties": draw.integers(-3, 4, count),
        "zeros": np.zeros(count),
        "mostly zeros": few,
        "normal": draw.standard_normal(count),
        "differences of bfloat16": bfloat16(base + draw.standard_normal(count) * 1e-3)
        - bfloat16(base),
        "one octave": 1 + draw.random(count),
        "close together": 1 + draw.random(count) * 1e-4,
        "outliers": draw.standard_normal(count) * np.where(draw.random(count) < 0.002, 1e6, 1),
        "falling": -np.arange(count, 0, -1.0),
    }


def bfloat16(values: Array) -> Array:
    """Rounded to bfloat16, in float32."""
    raw = np.zeros(2 * values.size, np.uint8)
    compiled.narrow(values.astype(np.float32), BF16, values.size, raw)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("width", [1, 2, 3, 64, 700, 5000, 70_000])
def test_ranks_are_those_of_a_stable_sort(width: int) -> None:
    """Within each row, for magnitudes of every size and spread, and for ties; signs do not count.

    The scratch is not cleared in between, and nothing beyond the rows or the scratch is written.
    """
    number = max(1, 6000 // width)
    scratch = np.full(3 * width + compiled.RANK_SPARE + 4, 7, np.uint32)
    for title, values in ranked(number * width).items():
        row = np.concatenate([np.ones(5, np.float32), values.astype(np.float32), [np.float32(1)]])
        ranks = np.full(row.size, 9, np.uint32)

        compiled.rank_rows(row, 5, number, width, ranks, scratch[:-4])

        keys = (bits_of(row)[5:-1] & 0x7FFFFFFF).reshape(number, width)
        expected = np.argsort(np.argsort(keys, axis=1, kind="stable"), axis=1, kind="stable")
        assert (ranks[5:-1].reshape(number, width) == expected).all(), title
        assert (ranks[:5] == 9).all()
        assert ranks[-1] == 9
        assert (scratch[-4:] == 7).all()


def test_drop_by_rank_is_a_comparison_with_its_own_probability() -> None:
    """Kept where the word is below the probability on 32 bits; divided by it, or multiplied."""
    n = 2000
    draw = np.random.default_rng(8)
    values = draw.standard_normal(n).astype(np.float32)
    words = draw.integers(0, 1 << 32, n + 4, dtype=np.uint64).astype(np.uint32)
    ranks = draw.permutation(n).astype(np.uint32)
    for own in (0, 1):
        row = values.copy()
        compiled.drop_by_rank(row, ranks, words, 10, n - 20, 3, 0.2, 0.6 / (n - 1), own, 3.0)
        for i in range(10, n - 10):
            p = 0.2 + 0.6 / (n - 1) * int(ranks[i])
            kept = int(words[i - 10 + 3]) < round(p * 2**32)
            factor = np.float32(1 / p) if own else np.float32(3)
            assert row[i] == (factor * values[i] if kept else 0)
        assert (row[:10] == values[:10]).all()
        assert (row[-10:] == values[-10:]).all()


def test_sums_and_dot_products_by_row_and_by_column() -> None:
    """Einstein's notation says the same in one line each."""
    draw = np.random.default_rng(9)
    rows = draw.standard_normal((3, 7 * 30 + 4)).astype(np.float32)
    grid = rows[:, 4:].reshape(3, 7, 30)
    out = np.zeros(rows.shape[1], np.float32)
    factors = draw.standard_normal((7, 3)).astype(np.float32)

    compiled.sum_by_row(rows, factors, 4, 7, 30, out)
    np.testing.assert_allclose(out[4:], np.einsum("rm,mrc->rc", factors, grid).ravel(), rtol=2e-5,
                               atol=1e-6)  # fmt: skip
    sums = np.zeros((7, 9))
    compiled.row_dots(rows, 4, 7, 30, sums)
    wide = grid.astype(np.float64)
    np.testing.assert_allclose(sums, np.einsum("arc,brc->rab", wide, wide).reshape(7, 9), rtol=1e-9)

    columns, first = 30, 11  # the first element stands in column 11
    whole = np.zeros((9, columns))
    compiled.column_dots(rows, 100, first, whole)
    split = np.zeros((9, columns))
    compiled.column_dots(rows, 64, first, split)
    compiled.column_dots(np.ascontiguousarray(rows[:, 64:]), 36, first + 64, split)
    place = (first + np.arange(100)) % columns
    for c in range(columns):
        part = rows[:, :100][:, place == c].astype(np.float64)
        expected = part @ part.T
        for a in range(3):
            for b in range(a + 1):
                assert whole[3 * a + b, c] == pytest.approx(expected[a, b], rel=1e-9, abs=1e-12)
                assert split[3 * a + b, c] == whole[3 * a + b, c]
    by_column = draw.standard_normal((3, columns)).astype(np.float32)
    compiled.sum_by_column(rows, by_column, 100, first, out)
    np.testing.assert_allclose(out[:100], (by_column[:, place] * rows[:, :100]).sum(0), rtol=2e-5,
                               atol=1e-6)  # fmt: skip


def test_overlaps_are_counted_and_averaged() -> None:
    """Shared entries, own ones, their mean or their strengthened value: by numpy's masks."""
    draw = np.random.default_rng(10)
    rows = draw.integers(-2, 3, (3, 2500)).astype(np.float32)
    keys = np.full(3, np.array([1.5], np.float32).view(np.uint32)[0], np.uint32)
    alone = np.array([1.5, 2.0, 0.5], np.float32)
    found, out = np.zeros((2, 3), np.int64), np.zeros(2500, np.float32)

    compiled.count_overlaps(rows, keys, 2499, found)
    compiled.merge_overlaps(rows, alone, keys, 2499, out)

    moved = np.abs(rows[:, :2499]) >= 1.5
    number = moved.sum(0)
    assert (found[0] == (moved & (number > 1)).sum(1)).all()
    assert (found[1] == (moved & (number == 1)).sum(1)).all()
    total = (rows[:, :2499] * moved).sum(0)
    single = (alone[:, None] * rows[:, :2499] * moved).sum(0)
    expected = np.where(number == 1, single, total / np.maximum(number, 1))
    np.testing.assert_allclose(out[:2499], expected, rtol=1e-6)
    assert out[2499] == 0


# ------------------------------------------------------------------------ fused


KINDS = {"sum": compiled.WEIGHTED_SUM, "elect": compiled.ELECTED, "masked": compiled.MASKED_MEAN,
         "consensus": compiled.CONSENSUS}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "float", "weights"])
@pytest.mark.parametrize("dropping", [False, True])
def test_fused_kernels_give_the_bytes_of_the_single_ones(
    kind: str, dtype: str, dropping: bool
) -> None:
    """Loading, dropping, combining, scaling and finishing in strips changes no byte or count."""
    count, first, position = 2 * compiled.TILE + 77, 5, 4096
    stored = "bf16" if dtype in ("weights", "float") else dtype
    values = 0.2 * sample_rows(4, count + first, 31)
    buffers = np.stack([raw_of(torch.from_numpy(v).to(TORCH[stored])) for v in values])
    codes, deltas = np.full(4, CODES[stored], np.int64), int(dtype != "weights")
    weights = np.array([0.5, -1.5, 0.3], np.float32)
    keys = np.array([0, 0x3E000000, 0x3D000000], np.uint32)
    bounds, options = np.array([0.4, 0.0, 2.0], np.float32), (1, 2, 1)
    streams = np.array([1, 2**63, 3] if dropping else [], np.uint64)
    limits = np.array([1 << 31, 1 << 32, 1 << 29] if dropping else [], np.int64)
    factors = np.array([2.0, 1.0, 8.0] if dropping else [], np.float32)
    code = compiled.AS_FLOAT if dtype == "float" else CODES[stored]
    raw = np.zeros(count * (4 if dtype in ("float", "f32") else 2), np.uint8)
    counts, wild = np.zeros(3, np.int64), np.zeros(4, np.int64)
    strip = np.zeros((3, compiled.TILE), np.float32), *np.zeros((2, compiled.TILE), np.float32)

    compiled.fused(
        *strip, buffers, codes, first, count, deltas, 1, streams, position, limits, factors,
        KINDS[kind], weights, keys, bounds, *options, 0.7, code, 1, raw, counts, wild,
    )  # fmt: skip

    rows, base = np.zeros((3, count), np.float32), np.zeros(count, np.float32)
    compiled.load_rows(buffers, codes, first, count, deltas, 1, base, rows, wild)
    words, out = np.zeros(count, np.uint32), np.zeros(count, np.float32)
    for model in range(streams.size):
        if limits[model] < 1 << 32:
            compiled.random_words(int(streams[model]), position, count, words)
            compiled.drop(rows[model], words, int(limits[model]), float(factors[model]), count)
    if kind == "sum":
        compiled.weighted_sum(rows, weights, 0, count, out)
    elif kind == "elect":
        compiled.elect_and_merge(rows, weights, keys, 0, count, out, *options)
    elif kind == "masked":
        compiled.masked_mean(rows, weights, keys, 0, count, out)
    else:
        compiled.consensus(rows, weights, bounds, options[0], 0, count, out)
    out *= np.float32(0.7)
    expected, expected_counts = np.zeros_like(raw), np.zeros(3, np.int64)
    if dtype == "float":
        expected = out.view(np.uint8)
    elif deltas:
        compiled.finish(base, out, code, 1, count, expected, expected_counts)
    else:
        expected_counts[2] = compiled.narrow(out, code, count, expected)
    assert np.array_equal(raw, expected)
    assert counts.tolist() == expected_counts.tolist()
    assert not wild.any()


@given(
    rows=st.integers(1, 9), columns=st.sampled_from([1, 3, 8, 511, 512, 513, 1100]),
    rank=st.integers(1, 10), seed=st.integers(0, 99), cut=st.floats(0, 1), end=st.floats(0, 1),
)  # fmt: skip
def test_a_product_of_low_rank_is_added_in_one_order(
    rows: int, columns: int, rank: int, seed: int, cut: float, end: float
) -> None:
    """Bit for bit the sum over the rank in float32, one after the other, from whatever element on."""
    draw = np.random.default_rng(seed)
    left = draw.standard_normal((rows, rank)).astype(np.float32)
    right = draw.standard_normal((rank, columns)).astype(np.float32)
    weight = draw.standard_normal(rows * columns).astype(np.float32)
    start = int(cut * weight.size)
    stop = start + int(end * (weight.size - start))
    sums = np.zeros((rows, columns), np.float32)
    for k in range(rank):
        sums += left[:, k : k + 1] * right[k]
    expected = weight + np.float32(0.3) * sums.ravel()

    part = weight[start:stop].copy()
    compiled.add_low_rank(part, start, part.size, left, right, 0.3)

    assert part.tobytes() == expected[start:stop].tobytes()


@pytest.mark.parametrize("by_row", [0, 1])
def test_lines_of_a_matrix_are_measured_and_scaled(by_row: int) -> None:
    """Squares by row or column in float64, and a factor for each, also from the middle of a row on."""
    draw = np.random.default_rng(0)
    matrix = draw.standard_normal((7, 13)).astype(np.float32)
    factors = draw.standard_normal(7 if by_row else 13).astype(np.float32)
    flat, sums = matrix.ravel().copy(), np.zeros(factors.size)
    for start in range(0, flat.size, 5):
        part = flat[start : start + 5]
        compiled.add_squares(part, start, part.size, 13, by_row, sums)
        compiled.scale_lines(part, start, part.size, 13, by_row, factors)

    expected = (matrix.astype(np.float64) ** 2).sum(1 if by_row else 0)
    assert np.allclose(sums, expected, rtol=1e-14)
    scaled = matrix * (factors[:, None] if by_row else factors)
    assert flat.tobytes() == scaled.tobytes()
