"""What kept activations save: steps and epochs with and without them, paired in one run.

Usage: activations.py [--rows N] [--batch N] [--blocks N] [--epochs N] [--threads N]
                      [--scratch DIR] [--count]

SmolLM2-135M on the rows of the demo's refusal policy, the last blocks and the norm above them
trained. Two models with the same weights take the same batches in the same order: one runs as a
whole, as everything did before (commit f512531; this path is the same code), the other is given the
states under its cut. Their steps alternate, so that a busy machine slows both alike; times are
those of the clock and of the processor. At the end losses and weights are compared bit for bit.
Operations are counted by torch. Results go to ``benchmarks/activations.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from talos import Alone, smollm
from torch.utils.flop_counter import FlopCounterMode

from suture.schema.sources import DataSpec, Source
from suture.schema.tuning import TuneSettings
from suture.training.calibrate import upper
from suture.training.data import Batch, Dataset
from suture.training.kept import KeptStates, keep, positions
from suture.training.loop import groups_of
from suture.training.loss import LossStep, ReadOutLoss, next_token, wanted
from suture.training.models import LanguageModel, load_language_model, load_tokenizer
from suture.training.rows import language_rows
from suture.verbs.proxy import run

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

from demo.safety import TEMPLATE  # noqa: E402

DEPTHS = (1, 2, 3, 4, 6, 10)
Times = tuple[float, float]
"""Seconds by the clock and of the processor."""


@dataclass
class Side:
    """A model that is trained, and how."""

    model: LanguageModel
    mover: LossStep
    optimizer: torch.optim.AdamW
    kept: KeptStates | None = None
    steps: list[Times] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def forward_backward(self, batch: Batch) -> None:
        with nullcontext() if self.kept is None else self.kept.feeding(batch):
            self.losses.append(self.mover.gradients(Alone(), batch, 1.0, True))

    def optimize(self) -> None:
        torch.nn.utils.clip_grad_norm_(list(self.mover.trained().values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, batch: Batch) -> None:
        self.forward_backward(batch)
        self.optimize()


def timed(what: Callable[[], object]) -> Times:
    clock, processor = time.perf_counter(), time.process_time()
    what()
    return time.perf_counter() - clock, time.process_time() - processor


def side(folder: Path, blocks: int) -> Side:
    model = load_language_model(folder, dtype=torch.float32).model.train()
    model.read_out()  # asks the model something, once
    names = set(upper([n for n, _ in model.named_parameters()], blocks))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    mover = LossStep(model, next_token)
    return Side(model, mover, torch.optim.AdamW(mover.groups(0.01), lr=5e-5, fused=True))


def policy_rows(folder: Path, count: int, scratch: Path) -> Dataset:
    made = run.files(run.items(0, ("en",)))["train"][:count]
    path = scratch / "policy.jsonl"
    path.write_text("".join(json.dumps(vars(item)) + "\n" for item in made), encoding="utf-8")
    spec = DataSpec(Source(str(path)), prompt="prompt", response="response", chat=True, share=0.0)
    tokenizer: Any = load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    return language_rows(spec, tokenizer, 128, 0).train


def operations(what: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        what()
    return float(counter.get_total_flops())


def read_out(model: LanguageModel, batch: Batch) -> None:
    """Logits, loss and gradient of the states of a batch's targets, as training has them."""
    head, marks = model.read_out(), wanted(batch)[:, 1:] != 0
    assert head is not None
    states = torch.zeros(int(marks.sum()), head.in_features, requires_grad=True)
    apply: Any = ReadOutLoss.apply
    apply(states, head.weight, head.bias, batch.input_ids[:, 1:][marks]).backward()


def fastest(
    what: Callable[[], object], times: int = 3, before: Callable[[], object] = lambda: None
) -> list[float]:
    """The fewest seconds by the clock and of the processor; ``before`` is not counted."""
    found = []
    for _ in range(times):
        before()
        found.append(timed(what))
    return [min(clock for clock, _ in found), min(processor for _, processor in found)]


def epochs_of(steps: list[Times], each: int) -> list[list[float]]:
    parts = [steps[at : at + each] for at in range(0, len(steps), each)]
    return [[sum(t[i] for t in part) for i in (0, 1)] for part in parts]


def by_depth(folder: Path, batch: Batch, settings: TuneSettings) -> dict[str, list[float]]:
    """Operations of a step as a whole, with kept states, and their ratio, by trained blocks."""
    found = {}
    for blocks in DEPTHS:
        one = side(folder, blocks)
        whole = operations(lambda one=one: one.forward_backward(batch))  # type: ignore[misc]
        prepared(one, batch, (len(batch.rows), batch.input_ids.numel()), settings)
        assert one.kept is not None
        one.kept.states(batch)
        kept = operations(lambda one=one: one.forward_backward(batch))  # type: ignore[misc]
        found[str(blocks)] = [whole, kept, kept / whole]
    return found


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=HERE / "scratch")
    parser.add_argument("--count", action="store_true", help="operations by depth alone")
    parser.add_argument("--out", type=Path, default=HERE / "activations.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.scratch.mkdir(parents=True, exist_ok=True)
    folder = smollm(args.scratch)
    data = policy_rows(folder, args.rows, args.scratch)
    settings = TuneSettings(batch=args.batch, epochs=args.epochs)
    lengths = [len(row) for row in data.ids]
    groups = groups_of(lengths, settings)
    batches = [data.collate(rows) for rows in groups]
    places = positions(lengths, groups)
    if args.count:
        known = json.loads(args.out.read_text())
        known["operations by blocks"] = by_depth(folder, batches[len(batches) // 2], settings)
        args.out.write_text(json.dumps(known, indent=1) + "\n")
        print(known["operations by blocks"])
        return
    whole, cut = side(folder, args.blocks), side(folder, args.blocks)
    started = timed(lambda: prepared(cut, batches[-1], (len(data), places), settings))
    assert cut.kept is not None

    for epoch in range(args.epochs):
        order = list(batches)
        random.Random(epoch).shuffle(order)
        for number, batch in enumerate(order):
            sides = (whole, cut) if (number + epoch) % 2 else (cut, whole)
            for one in sides:
                one.steps.append(timed(lambda one=one, batch=batch: one.step(batch)))
        print(
            epoch, epochs_of(whole.steps, len(batches))[-1], epochs_of(cut.steps, len(batches))[-1]
        )

    same = whole.losses == cut.losses and all(
        torch.equal(p, q)
        for p, q in zip(whole.model.parameters(), cut.model.parameters(), strict=True)
    )
    middle = batches[len(batches) // 2]
    targets = sum(int((wanted(b)[:, 1:] != 0).sum()) for b in batches)
    counted = {
        "whole": operations(lambda: whole.forward_backward(middle)),
        "kept": operations(lambda: cut.forward_backward(middle)),
        "under the cut": operations(lambda: cut.kept.split.lower(middle)),  # type: ignore[union-attr]
        "read-out": operations(lambda: read_out(cut.model, middle)),
    }
    parts = {
        "whole": fastest(lambda: whole.forward_backward(middle)),
        "kept": fastest(lambda: cut.forward_backward(middle)),
        "under the cut": fastest(lambda: cut.kept.split.lower(middle)),  # type: ignore[union-attr]
        "read-out": fastest(lambda: read_out(cut.model, middle)),
        "optimizer": fastest(cut.optimize, before=lambda: cut.forward_backward(middle)),
        "finding the states": fastest(lambda: cut.kept.states(middle)),  # type: ignore[union-attr]
    }
    each = len(batches)
    ratios = [[b / a for a, b in zip(x, y, strict=True)]
              for x, y in zip(whole.steps[each:], cut.steps[each:], strict=True)]  # fmt: skip
    sides = epochs_of(whole.steps, each), epochs_of(cut.steps, each)
    later = [[sum(e[i] for e in one[1:]) for i in (0, 1)] for one in sides]
    found = {
        "model": "SmolLM2-135M", "rows": len(data), "batch": args.batch, "positions": places,
        "tokens": sum(lengths), "targets": targets, "blocks": args.blocks,
        "trained": sum(p.numel() for p in cut.mover.trained().values()),
        "threads": args.threads, "same losses and weights": same,
        "kept bytes": cut.kept.taken, "cut found and proven": started,
        "epochs": {"whole": sides[0], "kept": sides[1]},
        "epoch from the second on": [later[1][i] / later[0][i] for i in (0, 1)],
        "step, median of paired ratios": [statistics.median(r[i] for r in ratios) for i in (0, 1)],
        "operations": counted, "operations, ratio": counted["kept"] / counted["whole"],
        "operations by blocks": by_depth(folder, middle, settings),
        "parts": parts, "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "epochs"}, indent=1))


def prepared(cut: Side, batch: Batch, asked: tuple[int, int], settings: TuneSettings) -> None:
    cut.kept = keep(
        cut.model, list(cut.mover.trained().values()), batch, asked, settings, say=print
    )


if __name__ == "__main__":
    main()
