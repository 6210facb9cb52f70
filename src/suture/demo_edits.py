"""What the demo does with regions: found, stitched, grafted, made a patch, put on and taken off.

Each step goes the way that its command goes and leaves what the command leaves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import suture
from suture.analysis import Curve, Point, Series
from suture.analyze import analysis
from suture.engine import checkpoint_fingerprint
from suture.evals.walk import Walk
from suture.mask import Mask
from suture.models import load_encoder
from suture.patching import apply_patches, make_patch, revert_patch
from suture.regions import execute, plan_regions
from suture.run import merge
from suture.stats import Stats
from suture.workshop import Column, Model, Workshop, digest, write

DENSITY = 0.1
"""Of the regions: that of the recipe `demo-stitch.yaml`."""
DENSITIES = (0.001, 0.01, 0.1)
"""At which grafts of one task are measured."""
SPACE = ["embedding", "head", "pooler"]
"""What regions leave out. Nothing reads the pooler, so no data can tell how much it matters."""
POLICY = {"missing": "base"}  # position_ids, a buffer that some files leave out
PATCHED = 0.01
"""Density of the demo's patch."""
LOOKS = {"rows": 16, "iterations": 6, "directions": 2}
"""Of the diagnostics: enough to see orders of magnitude."""


@dataclass(frozen=True)
class Edits:
    """Base and experts with what is known of them, and where to put what is made."""

    shop: Workshop
    base: Model
    experts: Sequence[Model]
    columns: Sequence[Column]
    """One for each expert."""

    @property
    def _key(self) -> list[Any]:
        return [self.base.key, {e.name: e.key for e in self.experts}]

    @property
    def _few(self) -> list[str]:
        return [digest([asdict(r) for r in c.few]) for c in self.columns]

    def _recipe(self, models: Sequence[Model], **more: Any) -> dict[str, Any]:
        paths = {m.name: str(m.folder.resolve()) for m in models}
        return {"base": str(self.base.folder.resolve()), "models": paths, **more}

    # -- regions -----------------------------------------------------------------------------------

    def localize(self) -> None:
        """Regions of all experts without data, and with data of those that have some."""
        self._regions("magnitude", self.experts, True, rule="magnitude", density=DENSITY)
        tasks, learners = {}, []
        for column, expert in zip(self.columns, self.experts, strict=True):
            if column.head is not None:
                rows = self.shop.out / "regions" / "rows" / f"{expert.name}.jsonl"
                lines = [json.dumps({"text": r.text, "label": r.label}) for r in column.few]
                rows.parent.mkdir(parents=True, exist_ok=True)
                write(rows, "\n".join(lines) + "\n")
                tasks[expert.name] = {"data": str(rows), "head": str(column.head), "batch": 16,
                                      "max_length": column.max_length}  # fmt: skip
                learners.append(expert)
        self._regions("one-step", learners, False, rule="first_order", density=DENSITY, tasks=tasks)

    def _regions(self, name: str, models: Sequence[Model], values: bool, **how: Any) -> None:
        folder = self.shop.out / "regions" / name
        recipe = self._recipe(models, space={"exclude": SPACE}, **how)
        heads = [c.key for c in self.columns]

        def make() -> None:
            record = execute(plan_regions(recipe, folder, values=values))
            told = ", ".join(f"{m} {f['kept']:,}" for m, f in record["masks"].items())
            self.shop.say(f"{name}: entries marked: {told}")

        self.shop.make(folder, [self._key, how["rule"], DENSITY, SPACE, self._few, heads], make)

    def masks(self, name: str) -> Mapping[str, Path]:
        """The masks of one localization, by model."""
        folder = self.shop.out / "regions" / name
        return {p.stem: p.resolve() for p in sorted(folder.glob("*.safetensors"))}

    def stitched(self) -> Model:
        """All experts stitched from regions found with data, where there is some."""
        masks = {**self.masks("magnitude"), **self.masks("one-step")}
        recipe = self._stitch({e.name: str(e.folder.resolve()) for e in self.experts}, masks)
        folder = self.shop.out / "merges" / "stitch-data"
        inputs = [self._key, DENSITY, SPACE, [c.key for c in self.columns], self._few]
        key, seconds = self.shop.make(folder, inputs, lambda: _merge(recipe, folder))
        about = "stitch: density 0.1, regions found by one backward pass where there are labels"
        return Model("stitch-data", "merge", folder, key, about, seconds)

    def continual(self) -> str:
        """Whether grafts alone, without the checkpoints, stitch to the bytes of all at once."""
        path = self.shop.out / "regions" / "continual.json"
        grafts = self.masks("magnitude")

        def make() -> None:
            experts = {e.name: str(e.folder.resolve()) for e in self.experts}
            later = {m: str(grafts[m]) for m in reversed(list(grafts))}
            trial = self.shop.out / "regions" / ".trial"
            prints = []
            for models in (experts, later):
                _merge(self._stitch(models, grafts), trial)
                prints.append(checkpoint_fingerprint(suture.open(trial)))
                shutil.rmtree(trial)
            files = [f for e in self.experts for f in e.folder.glob("*.safetensors")]
            facts = {
                "same": prints[0] == prints[1],
                "grafts": sum(p.stat().st_size for p in grafts.values()),
                "experts": sum(f.stat().st_size for f in files),
            }
            write(path, json.dumps(facts))

        self.shop.make(path, [self._key, DENSITY, SPACE], make)
        facts = json.loads(path.read_text(encoding="utf-8"))
        same = "the same bytes as" if facts["same"] else "OTHER bytes than"
        return (
            f"Stitching from grafts alone ({facts['grafts'] / 1e6:.0f} MB; the experts have "
            f"{facts['experts'] / 1e6:.0f} MB), the last task first, gives {same} stitching all "
            "experts at once: a task can be added later without the others' checkpoints."
        )

    def _stitch(self, models: Mapping[str, str], masks: Mapping[str, Path]) -> dict[str, Any]:
        return {
            "base": str(self.base.folder.resolve()), "models": dict(models), "method": "stitch",
            "parameters": {"masks": {m: str(p) for m, p in masks.items()}}, "policy": POLICY,
            "space": {"exclude": SPACE},
        }  # fmt: skip

    # -- how few entries carry a task --------------------------------------------------------------

    def curve(self) -> None:
        """Accuracy of grafts of the first task over density, by rule, beside random entries."""
        column, expert = self.columns[0], self.experts[0]
        path = self.shop.out / "curves" / f"graft-{expert.name}.json"

        def make() -> None:
            vector = suture.open(expert.folder) - suture.open(self.base.folder)
            vector = vector.select(exclude=SPACE)
            encoder = load_encoder(self.base.folder, dtype=torch.float32).model
            measured = self.shop.out / "regions" / "one-step" / "stats"
            stats = Stats.load(measured / f"{expert.name}.safetensors")
            series = []
            for rule, given in (("first_order", stats), ("magnitude", None), ("random", None)):
                points = []
                for density in DENSITIES:
                    mask = suture.localize(
                        vector, rule, density=density, stats=given, label=expert.name
                    )
                    graft = {n: vector[n] * mask[n] for n in vector.names}
                    walk = Walk(encoder, [graft])
                    walk.move((1.0,))
                    m = column.measure(encoder, column.data["test"])[0]
                    walk.move((0.0,))
                    points.append(Point(density, m.value, m.low, m.high))
                series.append(Series(rule, tuple(points)))
            drawn = Curve(f"Grafts of {expert.name} onto the base", "density", "accuracy",
                          tuple(series), logarithmic=True)  # fmt: skip
            write(path, json.dumps(drawn.to_dict(), indent=1))

        self.shop.make(path, [self._key, column.key, DENSITIES, SPACE], make)

    # -- a patch -----------------------------------------------------------------------------------

    def patch(self) -> str:
        """A patch of the first expert: made, put on, taken off; says whether every bit is back."""
        expert = self.experts[0]
        folder = self.shop.out / "patch"
        path = folder / f"{expert.name}.patch.safetensors"

        def make() -> None:
            folder.mkdir(parents=True)
            base, tuned = suture.open(self.base.folder), suture.open(expert.folder)
            vector = (tuned - base).select(exclude=SPACE)
            mask: Mask = suture.localize(vector, density=PATCHED)
            patch = make_patch(base, tuned, path, mask=mask)
            apply_patches(base, [patch], folder / "patched")
            revert_patch(suture.open(folder / "patched"), patch, folder / "reverted")
            back = suture.open(folder / "reverted")
            facts = {
                "bytes": path.stat().st_size, "model": base.nbytes,
                "back": checkpoint_fingerprint(back) == checkpoint_fingerprint(base),
                "moved": checkpoint_fingerprint(suture.open(folder / "patched"))
                != checkpoint_fingerprint(base),
            }  # fmt: skip
            shutil.rmtree(folder / "reverted")
            write(folder / "patch.json", json.dumps(facts))

        self.shop.make(folder, [self._key, PATCHED, SPACE], make)
        facts = json.loads((folder / "patch.json").read_text(encoding="utf-8"))
        back = "every bit is the base's again" if facts["back"] else "the base is NOT back"
        return (
            f"The patch of {expert.name} ({PATCHED:.0%} of its entries) has "
            f"{facts['bytes'] / 1e6:.2f} MB, {facts['bytes'] / facts['model']:.1%} of the model. "
            f"Put on the base and taken off: {back}."
        )

    # -- all at once -------------------------------------------------------------------------------

    def analyse(self, scale: float) -> None:
        """What `suture analyze` says of all experts, and of what task arithmetic does to them."""
        folder = self.shop.out / "analysis"
        rows = self.shop.out / "regions" / "rows"
        recipe = self._recipe(
            self.experts, density=DENSITY, space={"exclude": SPACE},
            tasks={e.name: {"data": str(rows / f"{e.name}.jsonl"), "head": str(c.head),
                            "max_length": c.max_length}
                   for e, c in zip(self.experts, self.columns, strict=True) if c.head is not None},
            diagnostics={**LOOKS, "weights": scale},
        )  # fmt: skip
        key = [self._key, [c.key for c in self.columns], LOOKS, DENSITY, SPACE, scale]
        self.shop.make(folder, key, lambda: _analyse(recipe, folder))


def _merge(recipe: Mapping[str, Any], folder: Path) -> None:
    merge(recipe, folder, overwrite=True)


def _analyse(recipe: Mapping[str, Any], folder: Path) -> None:
    analysis(recipe, folder, overwrite=True)
