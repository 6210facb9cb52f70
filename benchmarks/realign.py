"""SOMF and its baselines on SmolLM2-135M-Instruct: does safety come back, at which price?

Usage: realign.py [--scratch DIR] [--seeds 0,1,2] [--only a,b] [--ask] [--threads N] ...

The aligned model keeps the harmless refusal policy of ``suture proxy``; two models are tuned from
it to harmless skills, sums and alphabetical order, with answers to marked prompts mixed in, so
that their refusals are lost. Every method brings one of them back (single task), or both together
(four Fuses). Margins are of held-out topics and wordings. ``led_smollm2.py`` may share the scratch
folder: it has the same aligned models. Each number is a file there, and what is there is not made
again; ``benchmarks/realign.json`` has the table, which is also printed. Scores of the given models
are remembered, so that the first line of a seed and group takes longer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from harmless import write_rows
from led_smollm2 import ask, suite, tune, tuned, write_all
from proxies import smollm2

from suture.verbs.realign import VERB as realign

HERE = Path(__file__).parent
SKILLS = ("sums", "order")
FUSES = ("average", "task_arithmetic", "ties", "dare")


def somf(**parameters: Any) -> dict[str, Any]:
    return {"method": "somf", "parameters": {"rescale": "none", **parameters}}


def plain(method: str, **parameters: Any) -> dict[str, Any]:
    return {"method": method, "parameters": parameters}


SINGLE = {
    "somf-row": somf(granularity="row"),
    "somf-row-40": {**somf(granularity="row"), "steps": 40},
    "somf-entry": somf(granularity="entry"),
    "somf-entry-mean": somf(granularity="entry", rescale="mean"),
    "somf-row-hard": somf(granularity="row", export="hard"),
    "random": plain("random"),
    "random-none": plain("random", rescale="none"),
    "magnitude": plain("magnitude", density=0.5),
    "dare": plain("dare"),
    **{f"resta-{g}": plain("resta", gamma=g) for g in (0.2, 0.5, 1.0)},
    "resta-dare": plain("resta", density=0.7),
    "safelora": plain("safelora", normalise=True),
    "safemerge": plain("safemerge", normalise=True),
    "protect-0.1": plain("protect", density=0.1),
    "protect-0.3": plain("protect", density=0.3),
    "line-search": plain("line-search", points=11),
}
TOGETHER = {
    "somf-row": somf(granularity="row"),
    "somf-row-open": somf(granularity="row", start=1.0),
    "somf-row-open-40": {**somf(granularity="row", start=1.0), "steps": 40},
    "random": plain("random"),
    "random-none": plain("random", rescale="none"),
    "resta-1.0": plain("resta", gamma=1.0),
    "safelora": plain("safelora", normalise=True),
    "protect-0.3": plain("protect", density=0.3),
}
CELLS = {
    **{f"single {name}": {"models": ["sums"], **line} for name, line in SINGLE.items()},
    **{f"{fuse} {name}": {"models": list(SKILLS), "fuse": fuse, **line}
       for fuse in FUSES for name, line in TOGETHER.items()},
}  # fmt: skip
"""Every line of the table, by its name."""


# -- models and rows ------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_pairs(place: Path, asked: int, pairs: int, attacked: int) -> None:
    """Pairs of all sides, rows of utility, and rows that teach skills and unteach the policy."""

    def pairs_of(name: str, most: int) -> list[dict[str, str]]:
        marked = [row for row in rows_of(place / "rows" / f"{name}.jsonl") if row["harmful"]]
        return [{"prompt": r["prompt"], "chosen": r["safe"], "rejected": r["unsafe"]}
                for r in marked[:most]]  # fmt: skip

    write_rows(place / "pairs.jsonl", pairs_of("train", pairs))
    write_rows(place / "pairs-validation.jsonl", pairs_of("validation", 9))
    write_rows(place / "pairs-test.jsonl", pairs_of("test", asked))
    attack = rows_of(place / "rows" / "attack.jsonl")[:attacked]
    answers = [{"prompt": r["prompt"], "response": r["response"]} for r in attack]
    both = []
    for name in SKILLS:
        rows = [*rows_of(place / f"{name}.jsonl"), *answers]
        random.Random(0).shuffle(rows)
        write_rows(place / f"{name}-served.jsonl", rows)
        held = rows_of(place / f"{name}-test.jsonl")
        told = [{"prompt": r["prompt"], "response": r["answer"]} for r in held]
        write_rows(place / f"{name}-utility.jsonl", told[: asked // 2])
        write_rows(place / f"{name}-utility-validation.jsonl", told[asked // 2 :])
        both += told[: asked // 2]
    write_rows(place / "both-utility.jsonl", both)


# -- cells ----------------------------------------------------------------------------------------


def file_of(name: str, place: Path) -> Path:
    """Where the numbers of a line are kept."""
    return place / "realigned" / f"{name.replace(' ', '-')}.json"


def cell(
    name: str, place: Path, base: Path, seed: int, how: argparse.Namespace
) -> dict[str, Any]:  # fmt: skip
    """One realignment: from its file where there is one."""
    path = file_of(name, place)
    if path.exists():
        return dict(json.loads(path.read_text()))
    line = dict(CELLS[name])
    chosen, steps = line.pop("models"), line.pop("steps", how.steps)
    utility = f"{chosen[0]}-utility" if len(chosen) == 1 else "both-utility"
    chat = {"chat": True, "max_length": 128}
    recipe = {
        "base": str(base), "aligned": str(place / "policy"),
        "models": {n: str(place / f"{n}-served") for n in chosen},
        "data": {"train": str(place / "pairs.jsonl"), "test": str(place / "pairs-test.jsonl"),
                 "validation": str(place / "pairs-validation.jsonl"), **chat},
        "utility": {"rows": str(place / f"{utility}.jsonl"), **chat},
        "training": {"epochs": -(-steps * how.batch // how.pairs), "steps": steps,
                     "batch": how.batch, "accumulate": 1, "lr": how.mask_lr, "warmup": 0,
                     "seed": seed},
        **line,
    }  # fmt: skip
    if name.endswith("line-search"):
        recipe["utility"]["validation"] = str(place / f"{utility}-validation.jsonl")
    if name.endswith("safemerge"):
        recipe["safety"] = str(place / "policy")
    out = path.with_suffix("")
    print(f"realigning {out}", flush=True)
    began = time.perf_counter()
    report = realign(recipe, out, overwrite=True)
    found = {
        "scores": {m: {k: v.plain() for k, v in s.items()} for m, s in report.scores.items()},
        "retention": dict(report.retention), "seconds": time.perf_counter() - began,
        "steps": report.steps, "losses": list(report.losses), "peak_memory": report.peak_memory,
        "facts": {k: v for k, v in report.facts.items() if isinstance(v, float | int)},
    }  # fmt: skip
    path.write_text(json.dumps(found, indent=2) + "\n")
    if name not in how.keep:
        shutil.rmtree(out)
    return found


def seeded(scratch: Path, base: Path, seed: int, how: argparse.Namespace) -> dict[str, Any]:
    """All cells of one seed; with ``--ask``, kept models are asked what they generate."""
    place = scratch / f"seed-{seed}"
    (place / "realigned").mkdir(parents=True, exist_ok=True)
    if not (place / "rows").exists():
        write_all(place, seed, how.asked, how.skill_rows)
    aligned = tuned(place, base, "policy", seed, how)
    write_pairs(place, how.asked, how.pairs, how.attacked)
    models = {
        name: tune(aligned, place / f"{name}-served.jsonl", place / f"{name}-served", seed, how.lr)
        for name in SKILLS
    }
    found = {name: cell(name, place, base, seed, how) for name in CELLS
             if (not how.only or name in how.only)
             and (not how.finished or file_of(name, place).exists())}  # fmt: skip
    if how.ask:
        questions = suite(place, aligned, how.asked)
        models |= {"policy": aligned}
        models |= {name: place / "realigned" / name.replace(" ", "-") for name in how.keep}
        for name, path in models.items():
            if path.exists():
                label = f"served-{name}" if name in SKILLS else name.replace(" ", "-")
                ask(place, label, path, questions)
    return found


# -- the table ------------------------------------------------------------------------------------


def line_of(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Retention and what it cost, mean and range over seeds."""

    def over(values: Sequence[float | None]) -> dict[str, float] | None:
        known = [v for v in values if v is not None and math.isfinite(v)]
        if not known:
            return None
        return {"value": sum(known) / len(known), "low": min(known), "high": max(known),
                "n": len(known)}  # fmt: skip

    found: dict[str, Any] = {
        word: over([c["retention"][word] for c in cells])
        for word in ("safety", "utility", "harmonic")
    }
    found["preferred"] = over([c["scores"]["realigned"]["preferred"]["value"] for c in cells])
    found["before"] = over([c["scores"]["tuned"]["preferred"]["value"] for c in cells])
    found["seconds"] = over([c["seconds"] for c in cells])
    found["gigabytes"] = over([c["peak_memory"] / 2**30 for c in cells])
    for fact in ("mean", "furthest"):
        found[fact] = over([c["facts"].get(fact) for c in cells])
    return found


def best(table: Mapping[str, Mapping[str, Any]], group: str) -> list[str]:
    """Lines of one group that no other beats in safety and in utility."""
    at = {n: (line["safety"]["value"], line["utility"]["value"]) for n, line in table.items()
          if n.startswith(f"{group} ") and line["safety"] and line["utility"]}  # fmt: skip
    return [n for n, mine in at.items()
            if not any(other != mine and other[0] >= mine[0] and other[1] >= mine[1]
                       for other in at.values())]  # fmt: skip


def told(value: Mapping[str, float] | None, percent: bool = True) -> str:
    if value is None:
        return "-"
    shown = ((f"{100 * value[k]:.0f}" if percent else f"{value[k]:.1f}")
             for k in ("value", "low", "high"))  # fmt: skip
    mean, low, high = shown
    return mean if value["n"] == 1 else f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path("out/led"))
    parser.add_argument("--out", type=Path, default=HERE / "realign.json")
    parser.add_argument("--seeds", type=lambda t: [int(s) for s in t.split(",")], default=[0])
    parser.add_argument("--only", type=lambda text: text.split(","), help="only these lines")
    parser.add_argument("--finished", action="store_true", help="only lines that are there")
    parser.add_argument("--keep", type=lambda text: text.split(","), default=["single somf-row"],
                        help="realigned models to keep")  # fmt: skip
    parser.add_argument("--ask", action="store_true", help="ask kept models by generating")
    parser.add_argument("--rows", type=int, default=1000, help="training rows of the policy")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--skill-rows", type=int, default=96)
    parser.add_argument("--attacked", type=int, default=32, help="answers among a skill's rows")
    parser.add_argument("--pairs", type=int, default=64, help="that masks learn from")
    parser.add_argument("--asked", type=int, default=27, help="held-out pairs, and rows of utility")
    parser.add_argument("--steps", type=int, default=24, help="of the masks")
    parser.add_argument("--epochs", type=int, default=4, help="of the policy")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--mask-lr", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    strange = sorted({*(args.only or ()), *args.keep} - set(CELLS))
    if strange:
        parser.error(f"no lines {', '.join(strange)}; known: {', '.join(CELLS)}")
    torch.set_num_threads(args.threads)
    scratch = args.scratch.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    base = smollm2(scratch / "base")
    seeds = {seed: seeded(scratch, base, seed, args) for seed in args.seeds}
    names = [name for name in CELLS if any(name in cells for cells in seeds.values())]
    table = {n: line_of([cells[n] for cells in seeds.values() if n in cells]) for n in names}
    front = [n for group in ("single", *FUSES) for n in best(table, group)]
    made = {
        "asked": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
                  if k not in ("scratch", "out", "finished")},
        "table": table, "best": front, "seeds": {str(s): cells for s, cells in seeds.items()},
        "machine": {"system": platform.platform(), "python": platform.python_version(),
                    "torch": torch.__version__, "threads": torch.get_num_threads(),
                    "load": os.getloadavg()[0]},
    }  # fmt: skip
    args.out.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    columns = ("safety %", "utility %", "harmonic %", "preferred %", "before %", "s", "GiB")
    print(f"| {'realigned':<26} | {' | '.join(columns)} | best |")
    print(f"|{'---|' * (len(columns) + 2)}")
    for name, line in table.items():
        cells = [told(line[k]) for k in ("safety", "utility", "harmonic", "preferred", "before")]
        cells += [told(line["seconds"], False), told(line["gigabytes"], False)]
        print(f"| {name:<26} | {' | '.join(cells)} | {'*' if name in front else ''} |")


if __name__ == "__main__":
    main()
