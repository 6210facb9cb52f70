"""Every method that mergekit has, too: time, processor time and peak memory of whole processes.

Usage: methods.py [--scratch DIR] [--large] [--only METHOD ...]

Both tools follow the same recipe on the same generated models (bfloat16, Llama shapes, about 56 M
parameters, or 374 M with ``--large``; three of them and a base). Prints a table, and writes
``benchmarks/methods.json`` (``methods-large.json``) with the machine's description; with ``--only``
the rows of other methods stay as an earlier run left them. The start-up of
each tool, which a small merge is mostly made of, is measured by a merge of a tiny model and taken
off in the last column.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

from models import llama_config, write_model
from run import BIG, HERE, TINY, Run, clear, machine, measure

MIDDLE = llama_config(512, 12, 1408, 16000)
THREE = "weight: 0.7, density: 0.3"
RECIPES: dict[str, tuple[int, bool, str, str]] = {
    "linear": (3, False, "weight: 0.7", ""),
    "slerp": (1, True, "", "t: 0.3"),
    "task_arithmetic": (3, True, "weight: 0.7", ""),
    "ties": (3, True, THREE, ""),
    "dare_linear": (3, True, THREE, ""),
    "dare_ties": (3, True, THREE, ""),
    "breadcrumbs": (3, True, THREE, ""),
    "breadcrumbs_ties": (3, True, THREE, ""),
    "della": (3, True, THREE, ""),
    "della_linear": (3, True, THREE, ""),
    "sce": (3, True, "", "select_topk: 0.3"),
    "ram": (3, True, "", ""),
    "ramplus_tl": (3, True, "", ""),
    "model_stock": (3, True, "", ""),
    "nuslerp": (2, False, "weight: 0.7", ""),
    "nuslerp rows": (2, False, "weight: 0.7", "nuslerp_flatten: false"),
    "nuslerp columns": (2, False, "weight: 0.7", "nuslerp_flatten: false, nuslerp_row_wise: true"),
    "multislerp": (3, False, "weight: 0.7", ""),
    "karcher": (3, False, "", ""),
    "nearswap": (1, True, "", "t: 0.0001"),
    "arcee_fusion": (1, True, "", ""),
    "passthrough": (1, False, "", "scale: 0.9"),
}
"""Models, whether there is a base, the parameters of each model, those of all."""


def recipe(scratch: Path, name: str, prefix: str) -> Path:
    """A mergekit recipe, which both tools read."""
    models, base, own, shared = RECIPES[name]
    lines = ["models:"]
    for i in range(1, models + 1):
        lines += [f"  - model: {scratch / f'{prefix}{i}'}", f"    parameters: {{{own}}}"]
    lines += [f"merge_method: {name.split()[0]}", f"parameters: {{{shared}}}", "dtype: bfloat16"]
    if base:
        lines.append(f"base_model: {scratch / f'{prefix}0'}")
    path = scratch / f"{prefix}-{name.replace(' ', '-')}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def both(scratch: Path, name: str, prefix: str) -> tuple[Run, Run]:
    """What Suture and mergekit take for one recipe."""
    path = recipe(scratch, name, prefix)
    kit = [str(Path(sys.executable).with_name("mergekit-yaml"))]
    found = []
    for command in ([sys.executable, "-m", "suture", "merge", str(path), "-o"], [*kit, str(path)]):
        found.append(measure([*command, str(scratch / "out")]))
        clear(scratch)
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--only", nargs="*", default=list(RECIPES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as place:
        scratch = Path(place)
        for prefix, config in {"m": BIG if options.large else MIDDLE, "tiny": TINY}.items():
            for model in range(4):
                write_model(scratch / f"{prefix}{model}", config, model)
        both(scratch, "linear", "tiny")
        start = both(scratch, "linear", "tiny")
        rows = {}
        print(f"{'':<18}{'Suture':>30}{'mergekit':>30}{'ratio':>24}")
        print(
            f"{'method':<18}"
            + f"{'seconds':>10}{'cpu':>10}{'MB':>10}" * 2
            + f"{'wall':>8}{'cpu':>8}{'net':>8}"
        )
        for name in options.only:
            both(scratch, name, "tiny")  # compiles what is not compiled yet
            runs = both(scratch, name, "m")
            net = [max(0.05, r.cpu - s.cpu) for r, s in zip(runs, start, strict=True)]
            rows[name] = {
                "suture": runs[0]._asdict(), "mergekit": runs[1]._asdict(),
                "wall": runs[1].seconds / runs[0].seconds, "ratio": runs[1].cpu / runs[0].cpu,
                "net": net[1] / net[0],
            }  # fmt: skip
            cells = "".join(f"{r.seconds:>10.2f}{r.cpu:>10.2f}{r.peak / 1e6:>10.0f}" for r in runs)
            ratios = "".join(f"{rows[name][word]:>8.1f}" for word in ("wall", "ratio", "net"))
            print(f"{name:<18}{cells}{ratios}", flush=True)
        for word in ("wall", "ratio"):
            every = sorted(row[word] for row in rows.values())
            print(f"{word}: least {every[0]:.1f}, median {median(every):.1f}")
    file = HERE / ("methods-large.json" if options.large else "methods.json")
    if set(options.only) < set(RECIPES) and file.exists():
        rows = json.loads(file.read_text())["methods"] | rows
    facts = {"machine": machine(), "start": [r._asdict() for r in start], "methods": rows}
    file.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
