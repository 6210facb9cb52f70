"""From a recipe to tables: fine-tune, add, subtract, measure; every step a cell of the ledger."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from suture.analysis.arithmetic import entangled, movement, sharing
from suture.analysis.masks import overlaps, structure
from suture.analysis.vector_space import BATCH, PlainSpace, Side, Space, accuracy, space_of
from suture.checkpoints.atomic import write_whole
from suture.checkpoints.checkpoint import open_checkpoint
from suture.edits.mask import Mask
from suture.merges.apply import checkpoint_fingerprint
from suture.runs.ledger import CELLS, Ledger, cells_of, digest
from suture.runs.progress import Progress, Say
from suture.training.calibrate import Calibration
from suture.training.data import Dataset, tokenise
from suture.training.heads import zero_shot
from suture.training.labelled import labels_of
from suture.training.models import Head, embed, load_encoder
from suture.training.probe import fit_head
from suture.training.threads import torch_threads
from suture.verbs.bench import measures
from suture.verbs.bench.learn import Base, Learnt, learn, load_vectors, save_vectors
from suture.verbs.bench.maths import matched
from suture.verbs.bench.plan import Plan, expected
from suture.verbs.bench.recipe import Line
from suture.verbs.bench.result import curves, markdown, results
from suture.verbs.bench.tasks import BenchTask
from suture.version import __version__

FEW = 16
"""Test rows of each task that movement is measured on: no labels, so few are enough."""
STEPS = 1
"""Version of what the steps below do; raise it with them, so that nothing stale is used again."""


def execute(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Do what a recipe asks for; the results, also written as ``results.json`` and ``.md``.

    Interrupted, the same call goes on: at most one cell is lost.

    Raises:
        SutureError: a package, a file or the output is at fault.
    """
    # A second process would delete vectors that this one needs.
    with torch_threads(plan.options.threads), cells_of(plan.out, plan.options, _written):
        return _Run(plan, progress.say).all()


def _written(path: Path) -> bool:
    """Whether a benchmark left it: vectors, masks, curves, tables."""
    return path.name in ("vectors", "masks", "curves", "results.json", "results.md")


class _Run:
    """One run over all cells, in an order in which every beginning is worth something."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self.plan, self.bench, self.say = plan, plan.bench, say
        self.ledger = Ledger(plan.out / CELLS, say)
        self.versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        self.versions |= {"suture": __version__, "python": platform.python_version()}
        self.ledger.pending = expected(self.bench)
        self.record: dict[str, Any] = {"base": {}, "lines": {}, "sensitivity": {}, "ceiling": {}}
        self._before = _cells(plan.out / "results.json")
        self._base: Base | None = None
        self._sides: dict[int, list[Side]] = {}

    # -- what everything starts from ---------------------------------------------------------------

    @property
    def base(self) -> Base:
        """The base, loaded when it is first needed."""
        if self._base is None:
            checkpoint = open_checkpoint(self.plan.folder)
            encoder = load_encoder(self.plan.folder, dtype=torch.float32).model
            self._base = Base(encoder, checkpoint, checkpoint_fingerprint(checkpoint))
        return self._base

    def sides(self, seed: int) -> list[Side]:
        """Rows and heads of one seed: the tasks, then the control."""
        if seed not in self._sides:
            self._sides = {seed: [self._side(seed, task) for task in self.bench.everything]}
        return self._sides[seed]

    def _side(self, seed: int, task: BenchTask) -> Side:
        split = self.plan.splits[seed][task.name]
        labels = labels_of(split.train)
        data = {
            part: tokenise(
                [row for row in getattr(split, part) if row.label in labels], self.plan.tokenizer,
                labels=labels, max_length=self.bench.rows.max_length,
            )
            for part in split._fields
        }  # fmt: skip
        data["probe"] = _first(data["test"], self.bench.grids.rows)
        data["few"] = _first(data["test"], min(FEW, self.bench.grids.rows))
        head = self._head(task, labels, data["train"])
        about = [task.name, self.base.fingerprint, self.bench.head, labels, task.texts]
        rows = {part: [d.ids, d.labels] for part, d in data.items() if part != "few"}
        return Side(task.name, head, data, digest([about, rows]))

    def _head(self, task: BenchTask, labels: tuple[str, ...], train: Dataset) -> Head:
        encoder = self.base.encoder
        if self.bench.head == "probe":
            features = embed(encoder, train.batches(BATCH))
            return fit_head(features, torch.tensor(train.labels), labels)
        plain = {n: n.replace("_", " ").replace("-", " ").lower() for n in labels}
        texts = [task.texts.get(n, plain[n]) for n in labels]
        return zero_shot(encoder, self.plan.tokenizer, texts, labels)

    # -- cells -------------------------------------------------------------------------------------

    def _made_with(self) -> list[Any]:
        return [STEPS, self.versions["suture"], self.versions["torch"], self.base.fingerprint]

    def _inputs(self, seed: int, line: Line, rate: float, side: Side) -> dict[str, Any]:
        return {
            "made with": self._made_with(), "line": line.resolved(), "lr": rate, "seed": seed,
            "training": asdict(self.bench.settings), "task": side.name, "rows": side.key,
            "checkpoints": list(self.bench.checkpoints),
        }  # fmt: skip

    def train(self, seed: int, line: Line, rate: float, side: Side, *, again: bool = False) -> Any:
        """One fine-tune; its vectors and mask go to files that are deleted by need."""
        inputs = self._inputs(seed, line, rate, side)
        key = digest(inputs)

        def make() -> dict[str, Any]:
            found = learn(
                self.base, line, rate, side, self.bench.settings, seed, self.bench.checkpoints,
                self.bench.folder,
            )  # fmt: skip
            save_vectors(found.vectors, self._vectors(key))
            if found.mask is not None and "masks" in self.bench.measure:
                found.mask.save(self._mask(key))
            return _facts(found)

        name = f"train-{line.name}-{side.name}-seed{seed}-lr{rate:g}"
        value = self.ledger.cell(("train", line.name), name, inputs, make, fresh=again)
        return {**value, "key": key}

    def _vectors(self, key: str) -> Path:
        return self.plan.out / "vectors" / f"{key}.safetensors"

    def _mask(self, key: str) -> Path:
        return self.plan.out / "masks" / f"{key}.safetensors"

    def rate(self, line: Line) -> tuple[float, dict[str, float]]:
        """The rate with the best validation accuracy of single models, on the first seed.

        The smaller of two that are equally good.
        """
        if len(line.rates) == 1:
            return line.rates[0], {}
        seed, bench = self.bench.seeds[0], self.bench
        asked = [s for s in self.sides(seed)[: len(bench.tasks)]
                 if s.name in (bench.choose_on or [t.name for t in bench.tasks])]  # fmt: skip
        scores, keys = {}, {}
        for rate in sorted(line.rates):
            cells = [self.train(seed, line, rate, side) for side in asked]
            scores[rate] = sum(c["validation"][-1] for c in cells) / len(cells)
            keys[rate] = [c["key"] for c in cells]
        best = max(sorted(scores), key=lambda rate: scores[rate])
        for rate in scores:
            for key in keys[rate] if rate != best else ():
                self._vectors(key).unlink(missing_ok=True)
                self._mask(key).unlink(missing_ok=True)
        return best, {f"{rate:g}": score for rate, score in scores.items()}

    def all(self) -> dict[str, Any]:
        """Every cell, seed by seed; the tables are written anew after each line."""
        bench = self.bench
        rates = {}
        for seed in bench.seeds:
            sides = self.sides(seed)
            inputs = [self._made_with(), [s.key for s in sides]]
            start = partial(self._start, sides)
            self.record["base"][seed] = self.ledger.cell(
                ("base", ""), f"base-seed{seed}", inputs, start
            )
            for line in self.bench.order:
                if line.name not in rates:
                    sides = self.sides(bench.seeds[0])
                    rates[line.name] = self.rate(line)
                sides = self.sides(seed)
                rate, choice = rates[line.name]
                held = self.record["lines"].setdefault(
                    line.name, {"lr": rate, "choice": choice, "seeds": {}}
                )
                held["seeds"][seed] = self._line(seed, line, rate, sides)
                self._write(complete=False)
            if "sensitivity" in bench.measure:
                self.record["sensitivity"][seed] = self._sensitivity(seed, sides)
                self._write(complete=False)
        return self._write(complete=True)

    def _start(self, sides: list[Side]) -> dict[str, Any]:
        space = PlainSpace(self.base.encoder, [], sides)
        return {
            part: [accuracy(space, (), t, part) for t in range(len(sides))]
            for part in ("validation", "test")
        } | {"rows": {s.name: {p: len(d) for p, d in s.data.items()} for s in sides}}

    def _line(self, seed: int, line: Line, rate: float, sides: list[Side]) -> dict[str, Any]:
        """Everything of one strategy and seed; its vectors are deleted at the end."""
        bench, count = self.bench, len(self.bench.tasks)
        cells = [self.train(seed, line, rate, side) for side in sides[:count]]
        keys = [c["key"] for c in cells]
        last = len(bench.checkpoints) - 1
        curve = [sum(c["validation"][i] for c in cells) / count for i in range(last + 1)]
        found: dict[str, Any] = {
            "validation": curve, "facts": [c["facts"] for c in cells], "masks": None,
            "addition": {}, "disentanglement": {}, "movement": {}, "negation": None,
        }  # fmt: skip
        wanted = {last}
        if line.name == bench.reference:
            wanted |= set(range(last + 1))
        else:
            reference = self.record["lines"][bench.reference]["seeds"][seed]["validation"]
            own, other = matched(curve, reference)
            found["matched"] = [own, other]
            wanted.add(own)
        common = [self._made_with(), keys, [s.key for s in sides]]
        for point in sorted(wanted, reverse=True):
            where = f"{line.name}-seed{seed}" + ("" if point == last else f"-checkpoint{point + 1}")
            space = _Late(partial(self._space, seed, line, rate, sides, point))
            for part, value in self._at_point(line, space, where, [common, point]).items():
                found[part][point] = value
            if point == last and line.negation and "negation" in bench.measure:
                found["negation"] = self._negation(line, space, where, common)
        if "masks" in bench.measure and line.strategy.sparse:
            found["masks"] = self.ledger.cell(
                ("masks", line.name), f"masks-{line.name}-seed{seed}", common,
                lambda: self._masks(seed, line, rate, sides[:count]),
            )  # fmt: skip
            found["mask_keys"] = keys
        for key in keys:
            self._vectors(key).unlink(missing_ok=True)
        return found

    def _at_point(self, line: Line, space: _Late, where: str, inputs: Any) -> dict[str, Any]:
        """What is measured at every checkpoint that is looked at."""
        grids, found = self.bench.grids, {}
        if "addition" in self.bench.measure:
            found["addition"] = self.ledger.cell(
                ("addition", line.name), f"addition-{where}", [*inputs, list(grids.addition)],
                lambda: measures.addition(space(), grids.addition),
            )  # fmt: skip
        if "disentanglement" in self.bench.measure:
            names = [t.name for t in self.bench.tasks]
            amounts = [list(grids.disentanglement), grids.rows]
            found["disentanglement"] = self.ledger.cell(
                ("disentanglement", line.name), f"disentanglement-{where}", [*inputs, amounts],
                lambda: entangled(space(), (0.0, *grids.disentanglement), names),
            )  # fmt: skip
        if "movement" in self.bench.measure:
            found["movement"] = self.ledger.cell(
                ("movement", line.name), f"movement-{where}", [*inputs, grids.rows, FEW],
                lambda: movement(space(), self.base.encoder),
            )  # fmt: skip
        return found

    def _negation(self, line: Line, space: _Late, where: str, common: Any) -> Any:
        grids = self.bench.grids
        return self.ledger.cell(
            ("negation", line.name), f"negation-{where}", [common, [*grids.negation, grids.keep]],
            lambda: measures.negation(space(), grids),
        )  # fmt: skip

    def _space(self, seed: int, line: Line, rate: float, sides: list[Side], point: int) -> Space:
        vectors = [
            self.vectors(seed, line, rate, side, point) for side in sides[: len(self.bench.tasks)]
        ]
        return space_of(line.strategy.name == "linearized", self.base.encoder, vectors, sides)

    def vectors(self, seed: int, line: Line, rate: float, side: Side, point: int) -> Any:
        """The task vector of a checkpoint; trained again where its file was deleted."""
        path = self._vectors(digest(self._inputs(seed, line, rate, side)))
        if not path.is_file():
            self.ledger.pending["train", line.name] += 1
            self.train(seed, line, rate, side, again=True)
        return load_vectors(path, point)

    def _masks(self, seed: int, line: Line, rate: float, sides: list[Side]) -> dict[str, Any]:
        masks = []
        for side in sides:
            path = self._mask(digest(self._inputs(seed, line, rate, side)))
            if not path.is_file():
                self.ledger.pending["train", line.name] += 1
                self.train(seed, line, rate, side, again=True)
            masks.append(Mask.load(path))
        return {**structure(masks), **overlaps(masks)}

    def _sensitivity(self, seed: int, sides: list[Side]) -> list[Any]:
        grids, found = self.bench.grids, []
        inside = sides[: len(self.bench.tasks)]
        about = [[s.key for s in inside], [list(grids.shares), grids.rows]]
        for task, side in enumerate(inside):

            def make(task: int = task) -> dict[str, Any]:
                return sharing(self.base.encoder, inside, task, grids.shares,
                               Calibration(rows=grids.rows, seed=seed))  # fmt: skip

            inputs = [self._made_with(), seed, task, *about]
            name = f"sensitivity-{side.name}-seed{seed}"
            found.append(self.ledger.cell(("sensitivity", ""), name, inputs, make))
        return found

    def _ceilings(self) -> dict[str, float]:
        """IoU of masks of the same task under other seeds: other rows, other drawn labels."""
        found = {}
        for name, held in self.record["lines"].items():
            keys = [s["mask_keys"] for s in held["seeds"].values() if "mask_keys" in s]
            values = []
            for task in zip(*keys, strict=True):
                masks = [Mask.load(p) for k in task if (p := self._mask(k)).is_file()]
                values += [a.jaccard(b) for i, a in enumerate(masks) for b in masks[i + 1 :]]
            if values:
                found[name] = sum(values) / len(values)
        return found

    def _write(self, *, complete: bool) -> dict[str, Any]:
        """Write the tables; those of a run that went on are not replaced by those of less."""
        if not complete and self.ledger.finished < self._before:
            return {}
        if complete and "masks" in self.bench.measure:
            self.record["ceiling"] = self._ceilings()
        found = results(self.bench, self.record, self.versions, self.base.fingerprint)
        found["complete"] = complete
        found["cells"] = self.ledger.finished
        out = self.plan.out
        write_whole(out / "results.json", json.dumps(found, indent=1) + "\n")
        write_whole(out / "results.md", markdown(found))
        for name, curve in curves(found).items():
            write_whole(out / "curves" / f"{name}.json", json.dumps(curve, indent=1) + "\n")
        return found


class _Late:
    """A space that is made when a cell asks for it, and then kept for the next cell."""

    def __init__(self, make: Callable[[], Space]) -> None:
        self._make = make
        self._space: Space | None = None

    def __call__(self) -> Space:
        if self._space is None:
            self._space = self._make()
        return self._space


def _cells(path: Path) -> int:
    """How many cells the tables in a file were made of."""
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["cells"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _facts(found: Learnt) -> dict[str, Any]:
    return {
        "steps": list(found.steps),
        "validation": list(found.validation),
        "facts": dict(found.facts),
    }


def _first(data: Dataset, count: int) -> Dataset:
    return replace(data, ids=data.ids[:count], labels=data.labels[:count])


__all__ = ["execute"]
