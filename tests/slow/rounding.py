"""Rounding to a narrower float with exact fractions: to nearest, ties to even."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np


class Format(NamedTuple):
    """A binary floating-point format."""

    digits: int
    """Bits of the significand, the hidden one included."""
    lowest: int
    """Exponent of the smallest normal number."""
    highest: int
    """Exponent of the largest number."""


BF16 = Format(8, -126, 127)
F16 = Format(11, -14, 15)
F32 = Format(24, -126, 127)


def nearest(value: float, form: Format) -> float:
    """The nearest number of the format; infinity from half a step beyond the largest."""
    if value != value or abs(value) == float("inf") or value == 0:
        return value
    exact = abs(Fraction(value))
    exponent = min(form.highest, max(form.lowest, math.frexp(value)[1] - 1))
    step = Fraction(2) ** (exponent - form.digits + 1)
    steps, rest = divmod(exact, step)
    if 2 * rest > step or (2 * rest == step and steps % 2 == 1):
        steps += 1
    rounded = float(steps * step)
    if steps * step >= Fraction(2) ** (form.highest + 1):
        rounded = float("inf")
    return rounded if value > 0 else -rounded


def to_bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Round float64 to bfloat16 once, to nearest even, as float64; for finite normal values."""
    bits = np.ascontiguousarray(values, np.float64).view(np.int64)
    cut = 52 - 7
    half = (1 << (cut - 1)) - 1 + ((bits >> cut) & 1)
    return ((bits + half) >> cut << cut).view(np.float64)
