"""Localize-and-Stitch on real tasks: grafts by rule and density; stitching beside merges.

Usage: localize_tasks.py [--out DIR] [--seeds 0 1 2] [--quick] [--threads N]

The tasks, heads and experts are those of ``experts.py`` (MiniLM; four tasks), with the seed of the
split, of training and of every draw changed together. Two tables are made:

1. Retention ``(m(graft) - m(base)) / (m(expert) - m(base))`` on test rows of ``theta0 + mask tau``
   for learned, one-step, magnitude and random masks of the same densities; gains summed over
   tasks.
2. Accuracy of stitched models beside soup, task arithmetic (scale chosen on validation rows), TIES,
   DARE and Consensus, as a share of the expert. A method whose density or scale is open chooses it
   on the same validation rows, among at most six.

Masks see training rows only. Every number is a file under ``DIR`` with the key of what it was made
from, so that an interrupted run goes on. Tables go to ``DIR/results.json`` and ``results.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from experts import (
    EVAL_BATCH,
    OPERATIONS,
    QUICK,
    STEPS,
    TASKS,
    Model,
    TextTask,
    Workshop,
    base_folder,
    digest,
    divided,
    fingerprint,
    packages,
    published_folder,
    shortened,
    write,
)
from experts import learn as learn_task

import suture
from suture.edits.graft import write_graft
from suture.edits.mask import Mask
from suture.edits.mask_file import StoredMask
from suture.edits.stats import Stats
from suture.evals.table import EVALS
from suture.schema.tuning import LEARN_PRESETS
from suture.stream.vector import TaskVector
from suture.training.data import Dataset, tokenise
from suture.training.labelled import at_most
from suture.training.mask_learning import learn
from suture.training.measure import measure
from suture.training.models import Classifier, Head, load_encoder, load_head, load_tokenizer
from suture.verbs.bench.maths import t95
from suture.verbs.merge import VERB as merge

DENSITIES = (0.001, 0.005, 0.01, 0.05, 0.1)
RULES = ("learned", "first_order", "magnitude", "random")
SPACE = ["embedding", "head", "pooler"]
"""What no mask and no merge touches."""
ROWS = 64
"""Training rows of each label from which masks are found."""
LEARN = LEARN_PRESETS["default"]
GRIDS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}],
    "task_arithmetic": [{"scale": s} for s in (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)],
    "ties": [{"density": d, "scale": s} for d in (0.1, 0.2) for s in (0.6, 1.0, 1.4)],
    "dare_linear": [{"density": d, "scale": s} for d in (0.1, 0.5) for s in (0.2, 0.4, 0.6)],
    "consensus": [{"min_tasks": 2, "scale": s} for s in (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)],
    "stitch": [{"density": d} for d in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5)],
    "stitch-learned": [{"density": d} for d in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5)],
    "stitch-random": [{"density": d} for d in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5)],
}
"""At most six choices a method, all made on validation rows."""


@dataclass(frozen=True)
class Expert:
    """One task of one seed, ready to be measured on."""

    name: str
    folder: Path
    head: Head
    data: Mapping[str, Dataset]
    few: Dataset
    """The training rows that masks may see."""
    vector: TaskVector
    key: str
    """Identifies its weights, and what they were trained on."""


class Bench:
    """One seed of the experiment."""

    def __init__(self, out: Path, seed: int, tasks: Sequence[TextTask], say: Callable[[str], None]):
        self.out, self.seed, self.say = out / f"seed{seed}", seed, say
        self.out.mkdir(parents=True, exist_ok=True)
        places, versions = packages()
        folder = base_folder(places)
        self.base = Model("base", folder, fingerprint(folder))
        self.checkpoint = suture.open(folder)
        tokenizer = load_tokenizer(folder)
        shop = Workshop(self.out, {"steps": STEPS, "seed": seed, **versions}, say)
        self.experts = [self._expert(shop, t, places, tokenizer) for t in tasks]
        self.key = digest([self.base.key, [e.key for e in self.experts]])

    def _expert(self, shop: Any, task: TextTask, places: Any, tokenizer: Any) -> Expert:
        sides = divided(task, task.read(places), self.seed)
        data, model = learn_task(shop, task, sides, self.base, tokenizer, self.seed)
        head = load_head(self.out / "heads" / f"{task.name}.safetensors")
        few = tokenise(
            at_most(sides.train, ROWS, seed=self.seed),
            tokenizer,
            labels=head.labels,
            max_length=task.max_length,
        )
        vector = (suture.open(model.folder) - self.checkpoint).select(exclude=SPACE)
        return Expert(task.name, model.folder, head, data, few, vector, model.key)

    # -- numbers, each made once ------------------------------------------------------------------

    def once(self, name: str, inputs: Any, make: Callable[[], float]) -> float:
        """A number from its file, or made now."""
        path = self.out / "numbers" / f"{name}.json"
        key = digest([self.key, inputs])
        if path.exists():
            found = json.loads(path.read_text())
            if found["key"] == key:
                return float(found["value"])
        path.parent.mkdir(parents=True, exist_ok=True)
        value = make()
        write(path, json.dumps({"key": key, "value": value}))
        return value

    def accuracy(self, folder: Path, expert: Expert, side: str) -> float:
        """Accuracy of a folder on a task."""
        encoder = load_encoder(folder, dtype=torch.float32).model
        return self._accuracy(encoder, expert, side)

    @staticmethod
    def _accuracy(encoder: Any, expert: Expert, side: str) -> float:
        batches = expert.data[side].batches(EVAL_BATCH)
        return EVALS["accuracy"](Classifier(encoder, expert.head), batches)[0].value

    def ends(self, expert: Expert, side: str) -> tuple[float, float]:
        """What the base and the expert reach."""
        return (
            self.once(f"base-{expert.name}-{side}", [],
                      lambda: self.accuracy(self.base.folder, expert, side)),
            self.once(f"expert-{expert.name}-{side}", [],
                      lambda: self.accuracy(expert.folder, expert, side)),
        )  # fmt: skip

    # -- masks -------------------------------------------------------------------------------------

    def stats(self, expert: Expert, rule: str) -> Stats | None:
        """What a rule needs, from its file or made now."""
        if rule in ("magnitude", "random"):
            return None
        settings = repr(LEARN) if rule == "learned" else ""
        key = digest([settings, ROWS, expert.key])[:8]
        path = self.out / "stats" / f"{expert.name}-{rule}-{key}.safetensors"
        if not path.exists():
            began = time.perf_counter()
            if rule == "learned":
                net = Classifier(
                    load_encoder(self.base.folder, dtype=torch.float32).model, expert.head
                )
                found = learn(expert.vector, net, expert.few, LEARN)
            else:
                tuned = load_encoder(expert.folder, dtype=torch.float32).model
                net = Classifier(tuned, expert.head)
                found = measure(net, expert.few, ["grad"], names=expert.vector.names, batch=16)
            found.save(path)
            self.say(f"{expert.name}: {rule} in {time.perf_counter() - began:.0f} s")
        return Stats.load(path)

    def mask(self, expert: Expert, rule: str, density: float) -> Mask:
        """The mask of one expert by one rule."""
        return suture.localize(
            expert.vector, rule, density=density, stats=self.stats(expert, rule), seed=self.seed,
            label=expert.name,
        )  # fmt: skip

    # -- table 1 -----------------------------------------------------------------------------------

    def retention(self, rule: str, density: float) -> float:
        """The share of the experts' gains that grafts keep: gains summed over tasks.

        (A mean of ratios would be ruled by the task with the smallest gain.)
        """
        kept, gain = 0.0, 0.0
        for expert in self.experts:
            low, high = self.ends(expert, "test")
            name = f"graft-{expert.name}-{rule}-{density:g}"
            inputs = [repr(LEARN) if rule == "learned" else "", ROWS]
            value = self.once(name, inputs, lambda e=expert: self._graft(e, rule, density))  # type: ignore[misc]
            kept, gain = kept + value - low, gain + high - low
        return kept / gain if gain else math.nan

    def _graft(self, expert: Expert, rule: str, density: float) -> float:
        mask = self.mask(expert, rule, density)
        encoder = load_encoder(self.base.folder, dtype=torch.float32).model
        parameters = dict(encoder.backbone.named_parameters())
        with torch.no_grad():
            for name in expert.vector.names:
                delta = torch.from_numpy(expert.vector[name] * mask[name])
                parameters[name].add_(delta)
        return self._accuracy(encoder, expert, "test")

    # -- table 2 -----------------------------------------------------------------------------------

    def merged(self, method: str, parameters: Mapping[str, Any], side: str) -> list[float]:
        """The share of the expert that one merge reaches, task by task."""
        words = "-".join(f"{k}{v:g}" for k, v in parameters.items()) or "plain"
        names = [f"merge-{method}-{words}-{e.name}-{side}" for e in self.experts]
        inputs = [repr(LEARN) if "learned" in method else "", ROWS, len(self.experts)]
        folder = self.out / "trial"
        made = False
        found = []
        for expert, name in zip(self.experts, names, strict=True):

            def value(expert: Expert = expert) -> float:
                nonlocal made
                if not made:
                    self._merge(method, parameters, folder)
                    made = True
                return self.accuracy(folder, expert, side)

            found.append(self.once(name, inputs, value) / self.ends(expert, side)[1])
        return found

    def _merge(self, method: str, parameters: Mapping[str, Any], folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        recipe: dict[str, Any] = {
            "base": str(self.base.folder),
            "models": {e.name: str(e.folder) for e in self.experts},
            "method": method,
            "parameters": dict(parameters),
            "space": {"exclude": SPACE},
            "policy": {"missing": "base"},  # position numbers, which transformers does not save
        }
        if method == "dare_linear":
            recipe["parameters"]["seed"] = self.seed
        if method.startswith("stitch-"):
            rule = method.removeprefix("stitch-")
            masks = self.out / "trial-masks"
            for e in self.experts:
                self.mask(e, rule, parameters["density"]).save(masks / f"{e.name}.safetensors")
            recipe |= {"method": "stitch", "parameters": {"masks": str(masks.resolve())}}
        merge(recipe, folder, folder=Path())

    def chosen(self, method: str) -> tuple[dict[str, Any], list[float]]:
        """The best parameters on validation rows, and what they reach on test rows."""
        grid = GRIDS[method]
        best = grid[0]
        if len(grid) > 1:
            best = max(grid, key=lambda p: sum(self.merged(method, p, "validation")))
        return best, self.merged(method, best, "test")

    def continual(self) -> bool:
        """Whether a fifth task, added later as a graft, gives the bytes of stitching five at once.

        The fifth is a fine-tune that others made and published. First the others are stitched from
        their grafts; then the fifth graft is put beside these, in another order, and nobody's
        checkpoint is opened any more.
        """
        folders = {e.name: e.folder for e in self.experts}
        masks = {e.name: self.mask(e, "magnitude", 0.05) for e in self.experts}
        fifth = published_folder(packages()[0])
        vector = (suture.open(fifth) - self.checkpoint).select(exclude=SPACE)
        folders[OPERATIONS] = fifth
        masks[OPERATIONS] = suture.localize(vector, density=0.05)
        state = self.out / "state"
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir()
        for name, mask in masks.items():
            mask.save(state / f".{name}.safetensors")
            bits = StoredMask(state / f".{name}.safetensors")
            write_graft(state / f"{name}.safetensors", suture.open(folders[name]), bits)
        grafts = {name: str((state / f"{name}.safetensors").resolve()) for name in masks}
        four = [e.name for e in self.experts]
        runs = {
            "four": {n: str(folders[n]) for n in four},
            "four-grafts": {n: grafts[n] for n in reversed(four)},
            "five": {n: str(f) for n, f in folders.items()},
            "five-later": {n: grafts[n] for n in [OPERATIONS, *reversed(four)]},
        }
        prints = {}
        for name, models in runs.items():
            out = self.out / "continual"
            shutil.rmtree(out, ignore_errors=True)
            how = {"base": str(self.base.folder), "method": "stitch", "models": models,
                   "parameters": {"masks": {n: grafts[n] for n in models}},
                   "policy": {"missing": "base"}, "space": {"exclude": SPACE}}  # fmt: skip
            prints[name] = merge(how, out, folder=Path()).fingerprint
            shutil.rmtree(out)
        assert prints["four"] != prints["five"]
        return prints["four"] == prints["four-grafts"] and prints["five"] == prints["five-later"]


def quicken() -> None:
    """Fewer rows, steps and choices: to see that everything works, not for its numbers."""
    global ROWS, LEARN
    ROWS, LEARN = 8, replace(LEARN, epochs=3)
    for method, grid in GRIDS.items():
        GRIDS[method] = grid[-2:]


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds with its 95 % t interval."""
    n = len(values)
    mean = sum(values) / n
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1))
    half = t95(n - 1) * spread / math.sqrt(n) if n > 1 else math.nan
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": n}


def cell(found: Mapping[str, float]) -> str:
    if found["seeds"] < 2:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def tables(results: Mapping[str, Any]) -> str:
    lines = [
        "Retention of grafted single tasks (1: the expert, 0: the base), gains summed over "
        f"{', '.join(results['tasks'])}; {len(results['seeds'])} seed(s), 95 % t intervals.",
        "",
        "| density | " + " | ".join(RULES) + " |",
        "|---|" + "---|" * len(RULES),
    ]
    for density in DENSITIES:
        row = [cell(results["retention"][rule][f"{density:g}"]) for rule in RULES]
        lines.append(f"| {density:g} | " + " | ".join(row) + " |")
    lines += [
        "",
        "Merges of all tasks: accuracy as a share of the expert, mean and worst task.",
        "",
        "| method | mean | worst task | choices | chosen |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["merges"].items():
        chosen = "; ".join(json.dumps(p) for p in row["chosen"])
        lines.append(f"| {name} | {cell(row['mean'])} | {cell(row['worst'])} | "
                     f"{row['choices']} | {chosen} |")  # fmt: skip
    same = all(results["continual"])
    lines += [
        "",
        "A fifth task, the published fine-tune, added later as a graft gives the bytes of "
        f"stitching five at once: {same}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/localize-tasks"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--continual", action="store_true", help="only the check of tasks that come later"
    )
    parser.add_argument("--quick", action="store_true", help="two small tasks, to see it work")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tasks = list(TASKS)
    if args.quick:
        quicken()
        tasks = [shortened(t) for t in TASKS if t.name in QUICK]
    retention: dict[str, dict[str, list[float]]] = {r: {} for r in RULES}
    merges: dict[str, list[tuple[dict[str, Any], list[float]]]] = {m: [] for m in GRIDS}
    continual = []
    for seed in args.seeds:
        bench = Bench(args.out.resolve(), seed, tasks, lambda text: print(text, flush=True))
        if args.continual:
            print(f"seed {seed}: a fifth task later, the same bytes: {bench.continual()}")
            continue
        for rule in RULES:
            for density in DENSITIES:
                value = bench.retention(rule, density)
                retention[rule].setdefault(f"{density:g}", []).append(value)
                print(f"seed {seed}: {rule} at {density:g} keeps {value:.3f}", flush=True)
        for method in GRIDS:
            best, shares = bench.chosen(method)
            merges[method].append((best, shares))
            print(
                f"seed {seed}: {method} {best} reaches {sum(shares) / len(shares):.3f}", flush=True
            )
        continual.append(bench.continual())
    if args.continual:
        return
    results = {
        "tasks": [t.name for t in tasks],
        "seeds": args.seeds,
        "learn": repr(LEARN),
        "rows_per_label": ROWS,
        "retention": {
            r: {d: interval(v) for d, v in rows.items()} for r, rows in retention.items()
        },
        "merges": {
            m: {
                "mean": interval([sum(s) / len(s) for _, s in found]),
                "worst": interval([min(s) for _, s in found]),
                "choices": len(GRIDS[m]),
                "chosen": [p for p, _ in found],
            }
            for m, found in merges.items()
        },
        "continual": continual,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2))
    (args.out / "results.md").write_text(tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
