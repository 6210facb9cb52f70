"""The cache of machine code: used without numba, made anew when it does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from suture.kernels import cache as machine
from suture.kernels import compiled

SCRIPT = """
import sys
import numpy as np
from suture.kernels import compiled as kernels
out = np.zeros(4, np.float32)
kernels.weighted_sum(np.ones((2, 4), np.float32), np.array([1, 2], np.float32), 0, 4, out)
print(out.tolist(), "numba" in sys.modules)
"""


def run(cache: Path) -> str:
    environment = {**os.environ, "SUTURE_CACHE": str(cache)}
    found = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True,
                           capture_output=True, text=True)  # fmt: skip
    return found.stdout.strip()


def test_a_kernel_is_compiled_once_and_then_loaded_without_numba(tmp_path: Path) -> None:
    """The first process imports numba, the second does not; both compute the same."""
    assert run(tmp_path) == "[3.0, 3.0, 3.0, 3.0] True"
    assert run(tmp_path) == "[3.0, 3.0, 3.0, 3.0] False"


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage: str) -> None:
    """A file that is cut short, changed or not ours is compiled again, never run."""
    run(tmp_path)
    (file,) = tmp_path.rglob("weighted_sum.o")
    whole = file.read_bytes()
    bad = {"cut": whole[:-100], "changed": whole[:-1] + b"x", "foreign": b"something else"}
    file.write_bytes(bad[damage])

    assert run(tmp_path) == "[3.0, 3.0, 3.0, 3.0] True"
    assert file.read_bytes() == whole


def test_an_unusable_cache_folder_costs_time_only(tmp_path: Path) -> None:
    """Where nothing can be kept, every process compiles for itself."""
    (tmp_path / "kernels").write_text("a file in the way")

    assert run(tmp_path) == "[3.0, 3.0, 3.0, 3.0] True"


def test_wrong_arrays_are_refused() -> None:
    """Machine code trusts its arguments, so dtype, rank, layout and number are checked before."""
    rows, out = np.ones((2, 4), np.float32), np.zeros(4, np.float32)
    weights = np.ones(2, np.float32)
    for bad in (rows.astype(np.float64), rows[0], np.asfortranarray(rows), rows[:, ::2]):
        with pytest.raises(TypeError):
            compiled.weighted_sum(bad, weights, 0, 2, out)
    with pytest.raises(TypeError, match="takes 5 arguments"):
        compiled.weighted_sum(rows, weights, 0, 4)


def test_every_kernel_loads() -> None:
    """The signatures in ``kernels`` are those of the functions in ``loops``."""
    found = [k for k in vars(compiled).values() if isinstance(k, machine.Kernel)]

    assert len(found) > 15
    assert all(k._load() for k in found)


def test_rounding_a_base_of_the_same_dtype_is_a_shift() -> None:
    """With a bfloat16 base, the quicker way to count what rounding lost counts the same."""
    draw = np.random.default_rng(3)
    bits = draw.standard_normal(5000).astype(np.float32).view(np.uint32) & 0xFFFF0000
    base = bits.view(np.float32)
    delta = (draw.standard_normal(5000) * 10.0 ** draw.integers(-9, 1, 5000)).astype(np.float32)
    delta[::7] = 0
    found = []
    for kept in (0, 1):
        raw, counts = np.zeros(10000, np.uint8), np.zeros(3, np.int64)
        compiled.finish(base, delta, 1, kept, base.size, raw, counts)
        found.append((raw.tobytes(), counts.tolist()))

    assert found[0] == found[1]
    assert found[0][1][1] > 0
