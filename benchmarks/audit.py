"""Where does SmolLM2-135M-Instruct keep a harmless refusal policy, in three languages?

Usage: audit.py [--scratch DIR] [--seed N] [--epochs N] [--asked N] [--threads N]

The model learns the policy of ``suture proxy`` in English, German and Spanish, the latter two, of
which it knows little, for longer; two more are tuned from it: a derivative that learns sums and
goes on keeping the policy, and an unrelated one that learns the alphabet. ``suture.audit`` attacks
the aligned model with answers to marked prompts of training, looks for the region, and answers its
five questions on known topics in new wordings. What is there is not made again. Aggregates go to
``benchmarks/audit.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from harmless import TEMPLATE, skills, write_rows
from led_smollm2 import same_settings, tune
from proxies import smollm2

from suture.runs.progress import Progress
from suture.verbs.audit import VERB as audit
from suture.verbs.audit.metrics import ALL
from suture.verbs.audit.result import shown
from suture.verbs.audit.verdicts import tables
from suture.verbs.proxy import run

HERE = Path(__file__).parent
HELD_OUT = 0.35
"""Of the topics: 63 marked prompts a language."""


def write_all(place: Path, seed: int, attacked: int, probes: int) -> None:
    """Rows of all models, of the attack and of the scores; those two have no prompt in common."""
    how: dict[str, Any] = {"held_out": HELD_OUT, "topics": "known"}
    run.write(place / "rows", seed, run.LANGUAGES, **how)
    made = run.files(run.items(seed, run.LANGUAGES, **how))
    train = [vars(item) for item in made["train"]]
    write_rows(place / "policy.jsonl", train)
    draw = random.Random(seed)
    english = [row for row in train if row["language"] == "en"]
    more = [row for row in train if row["language"] != "en"]
    more += draw.sample(english, len(english) // 2)
    draw.shuffle(more)
    write_rows(place / "more.jsonl", more)
    for name, rows in skills(96).items():
        mixed = [{"prompt": row["prompt"], "response": row["response"]} for row in rows]
        if name == "sums":  # so that the derivative goes on refusing
            mixed += [{"prompt": r["prompt"], "response": r["response"]}
                      for r in draw.sample(train, 96)]  # fmt: skip
        draw.shuffle(mixed)
        write_rows(place / f"{name}.jsonl", mixed)
    attack, probe = [], []
    for language in run.LANGUAGES:
        own = [vars(item) for item in made["attack"] if item.language == language]
        draw.shuffle(own)
        each = attacked // len(run.LANGUAGES)
        attack += own[:each]
        probe += own[each : each + probes]
    draw.shuffle(attack)
    write_rows(place / "attack.jsonl", attack)
    write_rows(place / "probe.jsonl", probe)


def recipe(place: Path, how: argparse.Namespace) -> dict[str, Any]:
    """The audit."""
    rows = place / "rows"
    return {
        "aligned": str(place / "aligned"),
        "attack": {"train": str(place / "attack.jsonl"), "response": "unsafe", "limit": 0,
                   "training": {"epochs": 2, "batch": 8, "accumulate": 1, "lr": how.lr}},
        "languages": list(run.LANGUAGES),
        "rows": {"probe": str(place / "probe.jsonl"), "marked": str(rows / "marked.jsonl"),
                 "benign": str(rows / "benign.jsonl"), "response": "unsafe"},
        "scores": {"at": "both", "rows": how.probes},
        "shares": [0.05, 0.2, 1.0], "share": 0.2, "region": "en",
        "freeze": True,
        "onto": {"sums": str(place / "sums")}, "control": str(place / "order"),
        "utility": {"data": str(rows / "benign.jsonl"), "prompt": "prompt", "response": "response",
                    "limit": 60},
        "evaluation": {"limit": how.asked, "max_tokens": 12, "chat": True, "batch": 32},
        "seeds": [how.seed],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path("out/audit"))
    parser.add_argument("--out", type=Path, default=HERE / "audit.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4, help="of the policy")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--attacked", type=int, default=96, help="rows of the attack")
    parser.add_argument("--probes", type=int, default=16, help="rows of scores, a language")
    parser.add_argument("--asked", type=int, default=60, help="marked and benign rows a language")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scratch = args.scratch.resolve()
    settings = {k: v for k, v in vars(args).items() if k not in ("scratch", "out", "threads")}
    same_settings(scratch, settings)
    base = smollm2(scratch / "base")
    (base / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    write_all(scratch, args.seed, args.attacked, args.probes)
    first = tune(base, scratch / "policy.jsonl", scratch / "policy", args.seed, args.lr,
                 epochs=args.epochs)  # fmt: skip
    aligned = tune(first, scratch / "more.jsonl", scratch / "aligned", args.seed, 2 * args.lr,
                   epochs=args.epochs)  # fmt: skip
    for name in ("sums", "order"):
        tune(aligned, scratch / f"{name}.jsonl", scratch / name, args.seed, args.lr)
    found = audit(recipe(scratch, args), scratch / "audited", threads=args.threads,
                  progress=Progress(say=lambda line: print(line, flush=True)))  # fmt: skip
    found.pop("recipe")
    for one in found["seeds"].values():
        one.pop("places")  # a number for every layer and part; the report draws them
    machine = {"system": platform.platform(), "python": platform.python_version(),
               "torch": torch.__version__, "threads": args.threads}  # fmt: skip
    args.out.write_text(
        json.dumps({"asked": settings, "machine": machine, **found}, indent=1, ensure_ascii=False)
        + "\n", encoding="utf-8",
    )  # fmt: skip
    (seed,) = found["seeds"].values()
    looks = {"aligned": found["aligned"], "attacked": seed["attacked"]["look"]}
    for kind in ("region", "random", "magnitude"):
        looks |= {f"{kind} {p['share']:.0%}": p for p in seed["curve"][kind] if p["share"] < 1}
    looks |= {f"without {p['share']:.0%}": p for p in seed["without"]["repair"]}
    looks |= {f"region of {n}": look for n, look in seed["transfer"].items()}
    looks |= {f"frozen: {n}": one["look"] for n, one in seed["freeze"].items()}
    looks |= {f"onto sums: {n}": look for n, look in seed["onto"]["sums"].items()}
    columns = (*run.LANGUAGES, ALL)
    print(f"| model | {' | '.join(f'answered, {c}' for c in columns)} | over-refused | utility |")
    print(f"|{'---|' * (len(columns) + 3)}")
    for name, look in looks.items():
        cells = [shown(look["violation"][c]) for c in columns]
        cells.append(shown(look["over_refusal"][ALL]))
        cells += [f"{m['value']:.2f}" for m in look["utility"].values()]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(tables(found["verdicts"])))


if __name__ == "__main__":
    main()
