"""Does a mask in the last blocks learn a task as well as one in all of them? Real texts, MiniLM.

Usage: depth.py [--tasks NAME,...] [--seeds N] [--blocks N,...] [--out DIR]

Tasks and rows are those of ``experts.py`` (make demo installs them). Every run is a `suture
finetune` of the same recipe; `blocks` is all that differs, 0 for all. A seed draws the order of
rows and the mask. Finished runs are kept in DIR and not made again. Results go to
``benchmarks/depth.json``: accuracy on the test rows, which no run has seen, with Wilson intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from experts import TASKS, TextTask, base_folder, packages

from suture.training.labelled import at_most, split
from suture.verbs.finetune import VERB as finetune

HERE = Path(__file__).parent


def rows_of(task: TextTask, places: dict[str, Path], out: Path) -> tuple[Path, Path]:
    """Training and test rows as files."""
    parts = split(task.read(places), seed=0, validation=0.1, test=0.25)
    files = []
    for rows, most, word in ((parts.train, task.train, "train"), (parts.test, task.test, "test")):
        path = out / f"{task.name}-{word}.jsonl"
        kept = at_most(rows, most, seed=0)
        path.write_text(
            "".join(json.dumps({"text": r.text, "label": r.label}) + "\n" for r in kept)
        )
        files.append(path.resolve())
    return files[0], files[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(t.name for t in TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--blocks", default="0,1,2")
    parser.add_argument("--out", type=Path, default=HERE / "scratch" / "depth")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    places, _ = packages()
    chosen = [t for t in TASKS if t.name in args.tasks.split(",")]
    found: dict[str, Any] = {}
    for seed in range(args.seeds):
        for task in chosen:
            train, test = rows_of(task, places, args.out)
            for blocks in map(int, args.blocks.split(",")):
                out = args.out / f"{task.name}-{blocks}-{seed}"
                recipe = {
                    "base": str(base_folder(places)),
                    "strategy": "talos",
                    "parameters": {
                        # as many entries as a tenth of the prunable ones, in fewer blocks
                        "density": min(1.0, 0.1 * 6 / blocks) if blocks else 0.1,
                        "blocks": blocks, "rounds": 1 if blocks else 4, "seed": seed,
                    },
                    "data": {
                        "train": str(train), "validation": str(test),
                        "max_length": task.max_length, "too_long": "cut",
                    },
                    "training": {
                        "epochs": task.tune.epochs, "lr": 5e-4, "seed": seed, "save_every": 10_000,
                    },
                }  # fmt: skip
                if not (out / "suture.json").is_file():
                    finetune(recipe, out)
                results = json.loads((out / "suture.json").read_text())["results"]
                found.setdefault(task.name, {}).setdefault(str(blocks), []).append(
                    {k: results[k] for k in ("base_metric", "metric", "trained", "steps")}
                )
                print(task.name, blocks, seed, results["metric"], flush=True)
                path = HERE / "depth.json"
                path.write_text(json.dumps({"results": found}, indent=2) + "\n")
    print("| task | blocks | probe of the base | tuned | interval of one run | entries |")
    print("|---|---|---|---|---|---|")
    for name, kinds in found.items():
        for blocks, runs in kinds.items():
            values = [r["metric"]["value"] for r in runs]
            last = runs[0]["metric"]
            print(
                f"| {name} | {blocks if int(blocks) else 'all'} | "
                f"{runs[0]['base_metric']['value']:.3f} | {statistics.mean(values):.3f} ± "
                f"{statistics.pstdev(values):.3f} | [{last['low']:.3f}, {last['high']:.3f}] | "
                f"{runs[0]['trained']:,} |"
            )


if __name__ == "__main__":
    main()
