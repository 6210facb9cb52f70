"""The inner loops as the rest of the package calls them; ``loops`` and ``ranks`` say what each is.

Shapes: ``rows`` is float32[models, block], ``out`` float32[block]. Every kernel works on elements
``start`` to ``stop`` (or the first ``count``) of blocks that lie in the processor's cache, runs
without the interpreter lock, and has a plain twin in ``tests/slow/``.
"""

from __future__ import annotations

from suture.kernels.cache import Kernel

BINS = 1 << 15
"""Coarse bins: the upper 16 bits of the magnitude of a float32, whose sign bit is 0."""
FINE = 1 << 16
"""Keys in a coarse bin: the lower 16 bits."""
MEAN, SUM, WEIGHTED_MEAN, MAX = range(4)
"""What becomes of the entries that agree with the elected sign."""
MASS, COUNT = range(2)
"""What is counted to elect a sign."""
WEIGHTED_SUM, ELECTED, MASKED_MEAN, CONSENSUS = range(4)
"""How ``fused`` combines rows: as the kernels of these names do."""
AS_FLOAT = -1
"""In the place of a dtype's code: leave float32."""
TILE = 1024
"""Elements in a strip, and in each accumulator of scratch."""
RANK_SPARE = 1 << 15
"""What ``rank_rows`` needs of scratch beyond three rows: its bins, whatever the width."""

_R, _W, _K, _V, _B = "f4[:, ::1]", "f4[::1]", "u4[::1]", "f4[::1]", "u1[::1]"


def _four(rows: int) -> int:
    return 4 * TILE


def _three_and_rows(rows: int) -> int:
    return (3 + rows) * TILE


widen = Kernel("widen", f"{_B}, i8, i8, {_V}")
widen_delta = Kernel("widen_delta", f"{_B}, i8, i8, {_V}, {_V}")
subtract_double = Kernel("subtract_double", f"{_B}, {_B}, i8, {_V}")
load_rows = Kernel("load_rows", f"u1[:, ::1], i8[::1], i8, i8, i8, i8, {_V}, {_R}, i8[::1]")
narrow = Kernel("narrow", f"{_V}, i8, i8, {_B}")
finish = Kernel("finish", f"{_V}, {_V}, i8, i8, i8, {_B}, i8[::1]")
finish_double = Kernel("finish_double", f"{_B}, {_V}, i8, {_B}, i8[::1]")
weighted_sum = Kernel("weighted_sum", f"{_R}, {_W}, i8, i8, {_V}")
count_coarse = Kernel("count_coarse", f"{_V}, i8, u4[:, ::1]")
gather_bracket = Kernel("gather_bracket", f"{_V}, i8, i8, i8, {_K}, i8[::1]")
gather_brackets = Kernel(
    "gather_brackets",
    f"{_R}, {_V}, u1[:, ::1], i8[::1], i8, i8, i8, i8, i8[::1], i8[::1], u4[:, ::1], i8[:, ::1], "
    "i8[::1]",
)
find_rank = Kernel("find_rank", f"{_K}, i8, i8, i8[::1], i8[::1]")
find_limits = Kernel(
    "find_limits",
    f"{_R}, i8, i8[::1], {_K}, i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], {_K}",
)
count_places = Kernel("count_places", f"{_K}, i8, {_K}, {_K}, i8[::1]")
pack_selected = Kernel("pack_selected", f"{_V}, i8, i8, i8, {_B}, i8")
elect_and_merge = Kernel(
    "elect_and_merge", f"{_R}, {_W}, {_K}, i8, i8, {_V}, i8, i8, i8, {_V}", _three_and_rows
)
count_elected_signs = Kernel("count_elected_signs", f"{_R}, {_W}, {_K}, i8, i8, i8, {_V}", _four)
masked_mean = Kernel("masked_mean", f"{_R}, {_W}, {_K}, i8, i8, {_V}, {_V}", _four)
consensus = Kernel("consensus", f"{_R}, {_W}, {_W}, i8, i8, i8, {_V}, {_V}", _four)
random_words = Kernel("random_words", f"u8, i8, i8, {_K}, {_V}", lambda _: TILE)
drop = Kernel("drop", f"{_V}, {_K}, i8, f8, i8")
magnitudes = Kernel("magnitudes", f"{_V}, {_K}, i8, i8, f8[:, ::1], {_V}", _four)
gram = Kernel("gram", f"{_R}, i8, f8[:, :, ::1], {_V}", _four)
extremes = Kernel("extremes", f"{_V}, i8, f8[::1]")
stitched = Kernel("stitched", f"{_R}, {_W}, u1[:, ::1], i8, {_V}, {_V}", _four)
keep_between = Kernel("keep_between", f"{_R}, {_K}, {_K}, i8, i8")
add_magnitudes = Kernel("add_magnitudes", f"{_R}, i8, f8[:, ::1], {_V}", _four)
vote_and_merge = Kernel(
    "vote_and_merge", f"{_R}, {_W}, i8, i8, {_V}, i8, i8, i8, {_V}", _three_and_rows
)
variances = Kernel("variances", f"{_R}, i8, {_V}")
rank_rows = Kernel("rank_rows", f"{_V}, i8, i8, i8, {_K}, {_K}")
drop_by_rank = Kernel("drop_by_rank", f"{_V}, {_K}, {_K}, i8, i8, i8, f8, f8, i8, f8")
sum_by_row = Kernel("sum_by_row", f"{_R}, f4[:, ::1], i8, i8, i8, {_V}")
row_dots = Kernel("row_dots", f"{_R}, i8, i8, i8, f8[:, ::1]")
column_dots = Kernel("column_dots", f"{_R}, i8, i8, f8[:, ::1]")
sum_by_column = Kernel("sum_by_column", f"{_R}, f4[:, ::1], i8, i8, {_V}")
count_overlaps = Kernel("count_overlaps", f"{_R}, {_K}, i8, i8[:, ::1], {_V}", _four)
merge_overlaps = Kernel("merge_overlaps", f"{_R}, {_W}, {_K}, i8, {_V}, {_V}", _four)
add_low_rank = Kernel("add_low_rank", f"{_V}, i8, i8, {_R}, {_R}, f8, {_V}", _four)
add_squares = Kernel("add_squares", f"{_V}, i8, i8, i8, i8, f8[::1]")
scale_lines = Kernel("scale_lines", f"{_V}, i8, i8, i8, i8, {_V}")
fused = Kernel(
    "fused",
    f"{_R}, {_V}, {_V}, u1[:, ::1], i8[::1], i8, i8, i8, i8, u8[::1], i8, i8[::1], {_W}, i8, {_W}, "
    f"{_K}, {_W}, i8, i8, i8, f8, i8, i8, {_B}, i8[::1], i8[::1], {_V}",
    _three_and_rows,
)
