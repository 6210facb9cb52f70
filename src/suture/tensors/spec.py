"""Facts about tensors, never their values: dtypes, shapes, name patterns, order."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from fnmatch import translate
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from suture.errors import RecipeError, brief, did_you_mean


class DType(NamedTuple):
    """One element type of the safetensors format."""

    name: str
    """The name in a safetensors header."""
    bits: int
    code: int
    """The number by which kernels know a floating type; -1 for what is never computed with."""
    storage: str
    """A numpy type of the same width, for views of the raw bytes."""

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return self.bits // 8

    @property
    def computable(self) -> bool:
        """Whether arithmetic is defined on it here."""
        return self.code >= 0


F32, BF16, F16, F64 = range(4)

DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("F64", 64, F64, "<f8"),
        DType("F32", 32, F32, "<f4"),
        DType("F16", 16, F16, "<f2"),
        DType("BF16", 16, BF16, "<u2"),
        DType("I64", 64, -1, "<i8"),
        DType("I32", 32, -1, "<i4"),
        DType("I16", 16, -1, "<i2"),
        DType("I8", 8, -1, "i1"),
        DType("U64", 64, -1, "<u8"),
        DType("U32", 32, -1, "<u4"),
        DType("U16", 16, -1, "<u2"),
        DType("U8", 8, -1, "u1"),
        DType("BOOL", 8, -1, "u1"),
        DType("C64", 64, -1, "<c8"),
        DType("F8_E4M3", 8, -1, "u1"),
        DType("F8_E5M2", 8, -1, "u1"),
        DType("F8_E8M0", 8, -1, "u1"),
    )
}
"""Every dtype that can be read; the first four can be computed with."""

FLOAT8 = frozenset(n for n in DTYPES if n.startswith("F8_"))

DTYPE_WORDS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "fp64": "F64",
    "fp32": "F32",
    "fp16": "F16",
    "bf16": "BF16",
}
"""What a recipe may call a dtype."""

WORD_OF = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


PROMOTED = "promoted"
"""In the place of a dtype: for each tensor the narrowest that holds the values of every model."""


def promoted(dtypes: Iterable[str]) -> str:
    """The narrowest floating dtype that holds the values of all of these."""
    found = set(dtypes)
    wide = max(found, key=lambda d: DTYPES[d].bits)
    return "F32" if found == {"BF16", "F16"} else wide


def dtype_named(word: str) -> str:
    """The safetensors name of the dtype a recipe calls ``word``.

    Raises:
        RecipeError: there is no such dtype.
    """
    plain = word.removeprefix("torch.").lower()
    if plain not in DTYPE_WORDS:
        raise RecipeError(f"no dtype {word!r}; {did_you_mean(plain, list(DTYPE_WORDS)[:4])}")
    return DTYPE_WORDS[plain]


class TensorSpec(NamedTuple):
    """What the header of a safetensors file says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


UNCOUNTED = -1
"""The bytes of a stage that computes more than it reads: it is told, and no rate is shown."""

PIECE = 1 << 20
"""Elements in a piece: the unit of fingerprints, of the journal and of scheduling.

It is part of the fingerprint's definition and therefore never changes.
"""


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of one flattened tensor."""

    name: str
    start: int
    stop: int

    @property
    def number(self) -> int:
        """Which piece of its tensor this is, from 0."""
        return self.start // PIECE


def pieces_of(name: str, numel: int) -> list[Piece]:
    """Cut a tensor of ``numel`` elements; an empty tensor is one empty piece."""
    return [Piece(name, a, min(a + PIECE, numel)) for a in range(0, max(numel, 1), PIECE)]


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def matches(name: str, pattern: str) -> bool:
    """Whether ``name`` fits a glob pattern; ``*`` also crosses dots. Case counts."""
    return _compiled(pattern).match(name) is not None


def any_match(name: str, patterns: Iterable[str]) -> bool:
    """Whether ``name`` fits one of the patterns."""
    return any(matches(name, p) for p in patterns)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


def bytes_from(text: str | int) -> int:
    """Read a size such as ``5GB``, ``512 MiB`` or ``1000000``.

    Raises:
        RecipeError: it is not a positive size.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]*)\s*", str(text))
    size = int(float(found[1]) * _UNITS.get(found[2].lower(), 0)) if found else 0
    if size <= 0:
        raise RecipeError(f"{brief(text)} is not a size; write a number and a unit, such as 5GB")
    return size


def readable(nbytes: float) -> str:
    """Bytes for people, in decimal units: ``1.53 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if nbytes < 999.5:  # more would be written as 1000 of the unit
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.0f} EB"


_SIGNS = {
    "theta": "θ", "tau": "τ", "lambda": "λ", "Omega": "Ω", "rho": "ρ", "gamma": "γ", "alpha": "α",
    "Sigma": "Σ", "mu": "μ", "kappa": "κ", "epsilon": "ε", "sigma": "σ", "sum": "Σ", "top": "T",
    "lVert": "‖", "rVert": "‖", "lfloor": "⌊", "rfloor": "⌋", "ge": "≥", "le": "≤", "cdot": "·",
    "sim": "~", "odot": "⊙", "leftarrow": "←", "in": "∈",
    "nabla": "∇", "ell": "\u2113", "cap": "∩", "setminus": "\u2216", "bigcup": "\u222a", "ne": "≠",
}  # fmt: skip
_ABOVE = {"hat": "\u0302", "bar": "\u0304"}


def in_letters(markdown: str) -> str:
    """Text whose formulas are in TeX, with them in plain letters and wrapped, for a terminal."""
    plain = re.sub(r"\$([^$]*)\$", lambda found: _formula(found[1]), markdown)
    return "\n\n".join(textwrap.fill(part, 88) for part in plain.split("\n\n"))


def _formula(tex: str) -> str:
    tex = re.sub(r"\\(?:operatorname|mathrm)\{([^{}]*)\}", r"\1", tex)
    tex = re.sub(r"\\frac\{((?:[^{}]|\{[^{}]*\})*)\}\{([^{}]*)\}", r"(\1 / \2) ", tex)
    tex = re.sub(
        r"\\(hat|bar)[\s{]*(\\?[A-Za-z]+)\}?",
        lambda found: _formula(found[2]) + _ABOVE[found[1]], tex,
    )  # fmt: skip
    tex = re.sub(r"\\([A-Za-z]+)", lambda found: _SIGNS.get(found[1], found[1]), tex)
    return re.sub(r"\s+", " ", tex.replace("\\,", " ").replace("{", "(").replace("}", ")"))


def listed(words: Sequence[str], most: int = 5) -> str:
    """Name the first few, and say how many more there are."""
    shown = ", ".join(words[:most])
    return f"{shown} and {len(words) - most} more" if len(words) > most else shown


def cache_folder() -> Path:
    """Where Suture keeps what it can make again: ``$SUTURE_CACHE``, or the user's cache."""
    named = os.environ.get("SUTURE_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "suture"
