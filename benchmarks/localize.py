"""Masks of a model of a billion entries: exact against numpy, memory above start, speed of masks.

Usage: localize.py [--entries N] [--scratch DIR] [--rules magnitude random] [--density D]

The base is zero (a file of holes) and the model random bfloat16, so that a count of all 32,768
magnitudes by numpy, which shares no code with Suture, gives the exact top-k, ties by position. Each
rule is a process of its own; "above start" is its peak memory beyond the same command on a tiny
model. Prints a table; writes ``benchmarks/localize.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from suture.edits.mask import Mask
from suture.edits.mask_file import StoredMask, popcount

CHUNK = 1 << 24
WIDTH = 1 << 14


def write(folder: Path, entries: int, random: bool) -> None:
    """One bfloat16 checkpoint of tensors of at most 2**28 entries."""
    folder.mkdir(parents=True)
    header: dict[str, object] = {}
    left, end, number = entries, 0, 0
    while left:
        count = min(left, 1 << 28)
        shape = [count // WIDTH, WIDTH] if count % WIDTH == 0 else [count]
        name = f"model.layers.{number:02}.mlp.up_proj.weight"
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * count]}
        left, end, number = left - count, end + 2 * count, number + 1
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if not random:
            file.truncate(8 + len(text) + end)
            return
        for start in range(0, entries, CHUNK):
            file.write(values(start, min(CHUNK, entries - start)).tobytes())


def values(start: int, count: int) -> np.ndarray:
    """Random bfloat16 bits of magnitudes below 2, so that all are finite."""
    bits = np.random.default_rng([7, start]).integers(0, 1 << 16, CHUNK, np.uint16)
    return (bits & 0xBFFF)[:count]


def expected(entries: int, density: float) -> tuple[int, int, int]:
    """By counting: threshold key, how many lie above it, and how many are wanted."""
    counts = np.zeros(1 << 15, np.int64)
    for start in range(0, entries, CHUNK):
        keys = values(start, min(CHUNK, entries - start)) & 0x7FFF
        counts += np.bincount(keys, minlength=1 << 15)
    wanted = round(density * entries)
    above = 0
    for key in range((1 << 15) - 1, 0, -1):
        if above + counts[key] >= wanted:
            return key, above, wanted
        above += int(counts[key])
    raise AssertionError("fewer entries than wanted")


def exact(path: Path, entries: int, density: float) -> bool:
    """Whether the mask on disk is the exact top-k, ties by position."""
    key, above, wanted = expected(entries, density)
    ties = wanted - above
    mask = StoredMask(path)
    position = 0
    for name in sorted(mask.shapes):
        size = int(np.prod(mask.shapes[name], dtype=np.int64))
        for start in range(0, size, CHUNK):
            count = min(CHUNK, size - start)
            keys = values(position, count) & 0x7FFF
            tied = keys == key
            kept = (keys > key) | (tied & (np.cumsum(tied) <= ties))
            ties = max(0, ties - int(tied.sum()))
            bits = np.empty(-(-count // 8), np.uint8)
            mask.read(name, start, bits)
            if not np.array_equal(np.unpackbits(bits, count=count, bitorder="little"), kept):
                return False
            position += count
    return True


def run(folder: Path, rule: str, density: float) -> tuple[float, int]:
    """Seconds and peak bytes of one ``suture localize``."""
    recipe = {"base": "base", "models": {"m": "model"}, "rule": rule, "density": density}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "suture", "localize", str(folder / "recipe.yaml"),
               "-o", str(folder / f"masks-{rule}"), "--overwrite"]  # fmt: skip
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def speeds(path: Path) -> dict[str, float]:
    """Gigabytes a second of counting and of a Jaccard index, and of reading the same bytes."""
    one, other = Mask.load(path), Mask.load(path)
    size = sum(b.size for b in one.bits.values())

    def rate(work: object, nbytes: int) -> float:
        best = min(_timed(work) for _ in range(3))
        return nbytes / best / 1e9

    return {
        "sum_of_bytes": rate(
            lambda: [b.view(np.uint64).sum() for b in one.bits.values() if b.size % 8 == 0], size
        ),
        "popcount": rate(lambda: [popcount(b) for b in one.bits.values()], size),
        "jaccard": rate(lambda: one.jaccard(other), 4 * size),
    }


def _timed(work: object) -> float:
    began = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=1 << 30)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--rules", nargs="+", default=["magnitude", "random"])
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args()
    found: dict[str, object] = {
        "entries": args.entries, "density": args.density, "cores": os.cpu_count(),
        "python": platform.python_version(), "machine": platform.machine(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.scratch) as place:
        tiny, large = Path(place) / "tiny", Path(place) / "large"
        for folder, entries in ((tiny, 1 << 16), (large, args.entries)):
            write(folder / "base", entries, random=False)
            write(folder / "model", entries, random=True)
        for rule in args.rules:
            _, start = run(tiny, rule, args.density)
            seconds, peak = run(large, rule, args.density)
            path = large / f"masks-{rule}" / "m.safetensors"
            row: dict[str, object] = {"seconds": round(seconds, 1), "above_start": peak - start,
                                      "mask_bytes": path.stat().st_size}  # fmt: skip
            if rule == "magnitude":
                row["exact"] = exact(path, args.entries, args.density)
                found["speeds_gb_s"] = speeds(path)
            else:
                row["exact"] = Mask.load(path).count == round(args.density * args.entries)
            found[rule] = row
            print(f"{rule:<12}{seconds:8.1f} s  {(peak - start) / 2**20:8.0f} MiB above start  "
                  f"exact: {row['exact']}", flush=True)  # fmt: skip
        print("GB/s:", {k: round(v, 1) for k, v in dict(found["speeds_gb_s"]).items()})  # type: ignore[call-overload]
    (Path(__file__).parent / "localize.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
