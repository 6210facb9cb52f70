"""Ranks of magnitudes within rows, as DELLA needs them: processor time an entry, on one core.

Usage: ranks.py [--rounds N]

Prints a table by width of a row and kind of values, beside two stable sorts of torch, which give
the same ranks; that they do is checked.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from models import to_bfloat16

from suture.kernels import compiled
from suture.stream.sweep import BLOCK

WIDTHS = (16, 64, 512, 1408, 4096, 14336)


def rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)


def kinds() -> dict[str, np.ndarray[Any, Any]]:
    """Changes that training made in bfloat16, large and small, and less kind values."""
    draw = np.random.default_rng(0)
    normal = draw.standard_normal(BLOCK)
    base = rounded(draw.standard_normal(BLOCK) * 0.02)
    found = {
        "bfloat16": rounded(base + normal * 1e-3) - base,
        "bfloat16, small": rounded(base + normal * 2e-5) - base,
        "float32": normal,
        "9 of 10 zero": normal * (draw.random(BLOCK) < 0.1),
        "few outliers": normal * np.where(draw.random(BLOCK) < 0.002, 1e3, 1),
        "close together": 1 + draw.random(BLOCK) * 1e-4,
    }
    return {name: values.astype(np.float32) for name, values in found.items()}


def least(run: Callable[[], Any], rounds: int) -> float:
    """Processor time of the fastest of some calls, the first one left out."""
    run()
    times = []
    for _ in range(rounds):
        begun = time.thread_time()
        run()
        times.append(time.thread_time() - begun)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = kinds()
    print("ns an entry, and by two sorts of torch\n\n| width | " + " | ".join(rows) + " |")
    print("|---" * (len(rows) + 1) + "|")
    for width in WIDTHS:
        cells = [f"{ours:.1f} ({theirs:.0f})" for ours, theirs in
                 (both(row, width, rounds) for row in rows.values())]  # fmt: skip
        print(f"| {width} | " + " | ".join(cells) + " |", flush=True)


def both(row: np.ndarray[Any, Any], width: int, rounds: int) -> tuple[float, float]:
    """Nanoseconds an entry of ``rank_rows``, and of sorting twice."""
    number = row.size // width
    ranks = np.zeros(number * width, np.uint32)
    spare = np.zeros(3 * width + compiled.RANK_SPARE, np.uint32)
    grid = torch.from_numpy(row[: ranks.size].reshape(number, width)).abs()

    def twice() -> torch.Tensor:
        return grid.argsort(dim=1, stable=True).argsort(dim=1, stable=True)

    ours = least(lambda: compiled.rank_rows(row, 0, number, width, ranks, spare), rounds)
    theirs = least(twice, 1)
    assert (twice().numpy().ravel() == ranks).all()
    return ours / ranks.size * 1e9, theirs / ranks.size * 1e9


if __name__ == "__main__":
    main()
