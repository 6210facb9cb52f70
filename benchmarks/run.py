"""Speed and memory of merges: whole processes, ratios in one run, beside copies and mergekit.

Usage: run.py [--rounds N] [--mergekit METHOD ...] [--scratch DIR] [--small]

Writes ``benchmarks/last.json`` with the machine's description and prints the table. Models are
generated (bfloat16, Llama shapes, about 374 M parameters; three times as many for the memory rows).
"Copies" is one process that reads all inputs and writes and syncs one output of their size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from models import llama_config, write_model, write_tensors

HERE = Path(__file__).parent
BIG = llama_config(1024, 24, 2816, 32000)
BIGGER = llama_config(1536, 38, 4096, 32000)
TINY = llama_config(64, 2, 128, 256)
MANY = 16_000
MODELS = 3

COPY = """
import os, sys
buffer = memoryview(bytearray(1 << 20))
*sources, target = sys.argv[1:]
out = os.open(target, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
for number, source in enumerate(sources):
    file = os.open(source, os.O_RDONLY)
    while count := os.readv(file, [buffer]):
        if number == 0:
            os.write(out, buffer[:count])
os.fsync(out)
"""


class Run(NamedTuple):
    """What one process took."""

    seconds: float
    cpu: float
    peak: int
    """Bytes of resident memory at most."""


def measure(command: list[str]) -> Run:
    """Run a command to its end; wall and processor time, and peak memory of it alone.

    Python may keep its bytecode, as it does wherever a package is installed: without it, the
    compiler of Python would be measured, too.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    process.stderr.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{errors}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def recipe(scratch: Path, method: str, prefix: str, density: bool) -> Path:
    """A mergekit recipe over the generated models, which both tools read."""
    path = scratch / f"{prefix}-{method}.yaml"
    lines = ["models:"]
    for i in range(1, MODELS + 1):
        more = ", density: 0.2" if density else ""
        lines += [f"  - model: {scratch / f'{prefix}{i}'}",
                  f"    parameters: {{weight: {0.2 + 0.1 * i}{more}}}"]  # fmt: skip
    if method != "linear":  # which would average the base, too
        lines.append(f"base_model: {scratch / f'{prefix}0'}")
    lines += [f"merge_method: {method}", "dtype: float32", "out_dtype: bfloat16"]
    path.write_text("\n".join(lines) + "\n")
    return path


def native(scratch: Path, prefix: str) -> Path:
    """Suture's own TIES: trimmed over the whole model, as in the paper."""
    path = scratch / f"{prefix}-global-ties.yaml"
    models = ", ".join(f"m{i}: {scratch / f'{prefix}{i}'}" for i in range(1, MODELS + 1))
    path.write_text(f"base: {scratch / f'{prefix}0'}\nmodels: {{{models}}}\nmethod: ties\n"
                    "parameters: {density: 0.2}\nspace: {exclude: []}\n")  # fmt: skip
    return path


def generate(scratch: Path, small: bool) -> None:
    jobs = []
    sizes = {"tiny": TINY, "big": TINY if small else BIG, "bigger": TINY if small else BIGGER}
    for prefix, config in sizes.items():
        jobs += [(scratch / f"{prefix}{i}", config, i) for i in range(MODELS + 1)]
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for job in [pool.submit(write_model, *job) for job in jobs]:
            job.result()
    for i in range(MODELS + 1):
        (scratch / f"many{i}").mkdir()
        shapes = {f"model.layers.{n // 50}.x{n % 50}.weight": (4, 8) for n in range(MANY)}
        write_tensors(scratch / f"many{i}" / "model.safetensors", shapes, i)


def commands(scratch: Path) -> dict[str, list[str]]:
    """What is timed, by name; all of it in every round."""
    suture = [str(Path(sys.executable).parent / "suture")]
    out = ["-o", str(scratch / "out"), "--json"]
    files = [str(scratch / f"big{i}" / "model.safetensors") for i in range(MODELS + 1)]
    merges = {
        "linear": recipe(scratch, "linear", "big", False),
        "task arithmetic": recipe(scratch, "task_arithmetic", "big", False),
        "TIES (per tensor)": recipe(scratch, "ties", "big", True),
        "TIES (global)": native(scratch, "big"),
        "DARE": recipe(scratch, "dare_linear", "big", True),
        "DARE-TIES": recipe(scratch, "dare_ties", "big", True),
        "TIES (global), 3 x the size": native(scratch, "bigger"),
        "TIES, tiny model": recipe(scratch, "ties", "tiny", True),
        "TIES, 16,000 tensors": recipe(scratch, "ties", "many", True),
    }
    return {
        "copies": [sys.executable, "-c", COPY, *files, str(scratch / "copy")],
        "suture --help": [*suture, "--help"],
        "python, numpy": [sys.executable, "-c", "import numpy"],
        **{name: [*suture, "merge", str(path), *out] for name, path in merges.items()},
    }


SHARED = {
    "linear": ("linear", False),
    "task_arithmetic": ("task arithmetic", False),
    "ties": ("TIES (per tensor)", True),
    "dare_linear": ("DARE", True),
    "dare_ties": ("DARE-TIES", True),
}


def mergekit(scratch: Path, methods: list[str]) -> dict[str, Run]:
    """Run mergekit once on the shared recipes."""
    tool = str(Path(sys.executable).parent / "mergekit-yaml")
    found = {}
    for method in methods:
        name, density = SHARED[method]
        path = recipe(scratch, method, "big", density)
        found[name] = measure([tool, str(path), str(scratch / "other"), "--quiet"])
        shutil.rmtree(scratch / "other")
        print(f"  mergekit {name}: {found[name].seconds:.1f} s", file=sys.stderr)
    return found


def clear(scratch: Path) -> None:
    """Remove what a command wrote, outside of its time, and let the disk come to rest."""
    shutil.rmtree(scratch / "out", ignore_errors=True)
    (scratch / "copy").unlink(missing_ok=True)
    os.sync()


def machine() -> dict[str, object]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {"processor": model, "cores": os.cpu_count(), "system": platform.system(),
            "python": platform.python_version(), "numpy": np.__version__,
            "load_before": os.getloadavg()[0]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mergekit", nargs="*", choices=list(SHARED), default=list(SHARED))
    parser.add_argument("--small", action="store_true", help="tiny models: to try the script")
    parser.add_argument("--scratch", type=Path)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="suture-bench-", dir=options.scratch))
    try:
        facts = machine()
        print("generating models", file=sys.stderr)
        generate(scratch, options.small)
        todo = commands(scratch)
        for command in todo.values():  # machine code is compiled once, files come into the cache
            measure(command)
            clear(scratch)
        runs: dict[str, list[Run]] = {name: [] for name in todo}
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for name, command in todo.items():
                runs[name].append(measure(command))
                clear(scratch)
        others = mergekit(scratch, options.mergekit)
    finally:
        shutil.rmtree(scratch)
    report = tables(runs, others, facts)
    if not options.small:
        (HERE / "last.json").write_text(json.dumps(report, indent=2) + "\n")
    print(report["table"])


def tables(runs: dict[str, list[Run]], others: dict[str, Run], facts: dict[str, object]) -> dict:
    start = min(r.peak for r in runs["python, numpy"])
    lines = ["| | seconds (min / median) | x copies | x faster than mergekit | peak above start | "
             "mergekit's peak |", "|---|---|---|---|---|---|"]  # fmt: skip
    rows = {}
    for name, found in runs.items():
        ratios = [r.seconds / c.seconds for r, c in zip(found, runs["copies"], strict=True)]
        row = {
            "seconds_min": min(r.seconds for r in found),
            "seconds_median": statistics.median(r.seconds for r in found),
            "cpu_median": statistics.median(r.cpu for r in found),
            "copies_ratio_median": statistics.median(ratios),
            "peak_above_start": max(r.peak for r in found) - start,
        }
        other = others.get(name)
        if other is not None:
            row |= {"mergekit_seconds": other.seconds, "mergekit_peak": other.peak,
                    "speedup": other.seconds / row["seconds_median"]}  # fmt: skip
        rows[name] = row
        speed = f"{row['speedup']:.1f}" if other else ""
        peak = f"{other.peak / 2**30:.2f} GiB" if other else ""
        lines.append(
            f"| {name} | {row['seconds_min']:.2f} / {row['seconds_median']:.2f} | "
            f"{row['copies_ratio_median']:.2f} | {speed} | "
            f"{row['peak_above_start'] / 2**20:.0f} MiB | {peak} |"
        )
    return {"machine": facts, "rows": rows, "table": "\n".join(lines)}


if __name__ == "__main__":
    main()
