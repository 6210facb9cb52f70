"""Verbs of Suture as steps: a recipe is written beside the outputs, and the verb follows that file.

Every recipe can be run by hand: ``suture merge demo/edits/recipes/ties.yaml -o out``. Its paths
start at its own folder, so the demo's folder may be moved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import suture
from suture.checkpoints.atomic import appearing
from suture.runs.progress import Progress
from suture.verbs import VERBS

from .steps import Now, Step


@dataclass(frozen=True)
class Place:
    """The folder of one half of the demo, and how large and how fast its models are."""

    folder: Path
    """Of the whole demo."""
    half: str
    megabytes: float
    """Of one model."""

    def at(self, name: str) -> Path:
        """The path of something in this half."""
        return self.folder / self.half / name

    def named(self, *names: str) -> tuple[str, ...]:
        """Steps of this half by their full names."""
        return tuple(f"{self.half}/{name}" for name in names)

    def recipe(self, name: str, what: Any) -> Path:
        """Write a recipe, as YAML."""
        path = self.at("recipes") / f"{name}.yaml"
        write(path, yaml.safe_dump(what, sort_keys=False, allow_unicode=True, width=100))
        return path

    # -- a step for each verb ----------------------------------------------------------------------

    def tuned(
        self, name: str, does: str, recipe: Mapping[str, Any], needs: Sequence[str], seconds: float
    ) -> Step:
        """``suture finetune``."""
        return self._trained("finetune", name, does, recipe, needs, seconds)

    def realigned(
        self, name: str, does: str, recipe: Mapping[str, Any], needs: Sequence[str], seconds: float
    ) -> Step:
        """``suture realign``."""
        return self._trained("realign", name, does, recipe, needs, seconds)

    def _trained(
        self, verb: str, name: str, does: str, recipe: Mapping[str, Any], needs: Sequence[str],
        seconds: float,
    ) -> Step:  # fmt: skip
        def make(now: Now) -> str:
            path = self.recipe(name.rpartition("/")[2], recipe)
            steps = Progress(step=lambda _, at: now.tick(at.step / at.steps))
            VERBS[verb](path, self.at(name), overwrite=True, resume=now.resume, progress=steps)
            return ""

        return self._step(name, does, recipe, make, needs, seconds, self.megabytes)

    def merged(
        self, name: str, does: str, recipe: Mapping[str, Any], needs: Sequence[str], *,
        outside: Mapping[str, Any] | None = None, seconds: float = 1.5,
    ) -> Step:  # fmt: skip
        """``suture merge``; ``outside`` is put into the recipe, and does not decide what it is."""

        def make(now: Now) -> str:
            path = self.recipe(name.rpartition("/")[2], {**recipe, **(outside or {})})
            suture.run_recipe(path, self.at(name), overwrite=True, resume=now.resume)
            return ""

        return self._step(name, does, recipe, make, needs, seconds, self.megabytes)

    def located(
        self, name: str, does: str, recipe: Mapping[str, Any], needs: Sequence[str],
        seconds: float, values: bool = False,
    ) -> Step:  # fmt: skip
        """``suture localize``."""

        def make(now: Now) -> str:
            path = self.recipe(name.rpartition("/")[2], recipe)
            VERBS["localize"](path, self.at(name), overwrite=True, values=values)
            return ""

        return self._step(name, does, [recipe, values], make, needs, seconds, self.megabytes)

    def asked(
        self, name: str, does: str, suite: Mapping[str, Any], models: Sequence[str], seconds: float
    ) -> Step:
        """``suture eval``: results of models of this half, into one folder."""

        def make(now: Now) -> str:
            path = self.recipe("suite", suite)
            known = {f"{model.rpartition('/')[2]}.{suite['name']}.json" for model in models}
            for old in self.at(name).glob("*.json"):  # of a longer form
                if old.name not in known:
                    old.unlink()
            for done, model in enumerate(models, 1):
                suture.evaluate([self.at(model)], path, self.at(name), overwrite=True)
                now.tick(done / len(models))
            return ""

        needs = [*models, "rows"]
        return self._step(name, does, [suite, list(models)], make, needs, seconds, 0.2)

    def analysed(
        self, name: str, does: str, recipe: Mapping[str, Any], needs: Sequence[str], seconds: float
    ) -> Step:
        """``suture analyze``."""

        def make(now: Now) -> str:
            suture.analyze(self.recipe(name, recipe), self.at(name), overwrite=True)
            return ""

        return self._step(name, does, recipe, make, needs, seconds, 1)

    def patched(self, name: str, model: str, onto: str, density: float | None) -> Step:
        """``suture patch make``, ``apply`` and ``revert``: a change as a file, put on, taken off.

        The folder holds the patch, the patched model in ``patched``, and ``patch.json``: sizes, and
        whether the bits are what they should be.
        """
        short, what = model.rpartition("/")[2], onto.rpartition("/")[2]
        part = "all" if density is None else f"the largest {density:.0%}"
        does = f'make {part} of the change of "{short}" a patch of "{what}", put it on, take it off'

        def make(now: Now) -> str:
            facts = patch_facts(self.at(onto), self.at(model), self.at(name), density)
            return patch_words(facts)

        return self._step(name, does, density, make, [model, onto], 3 * self.megabytes / 90,
                          1.1 * self.megabytes)  # fmt: skip

    def written(self, name: str, does: str, inputs: Any, make: Any, seconds: float) -> Step:
        """Rows, or anything else that no verb makes."""
        return self._step(name, does, inputs, make, (), seconds, 2)

    def _step(
        self, name: str, does: str, inputs: Any, make: Any, needs: Sequence[str], seconds: float,
        megabytes: float,
    ) -> Step:  # fmt: skip
        return Step(f"{self.half}/{name}", does, inputs, make, self.named(*needs), seconds,
                    megabytes)  # fmt: skip


def patch_facts(base: Path, tuned: Path, folder: Path, density: float | None) -> dict[str, Any]:
    """Make a patch, put it on and take it off again; what came out, as plain data.

    ``back`` is whether every bit of the base is there again, ``on`` whether the patched model has
    the bits of the tuned one in every entry that differs from the base (with ``density``: in every
    entry that the patch moved).
    """
    folder.mkdir(parents=True, exist_ok=True)
    before, after = suture.open(base), suture.open(tuned)
    patch = suture.make_patch(before, after, folder / "change.patch.safetensors", density=density,
                              overwrite=True)  # fmt: skip
    suture.apply_patches(before, [patch], folder / "patched", overwrite=True)
    suture.revert_patch(suture.open(folder / "patched"), patch, folder / "reverted", overwrite=True)
    on, back = suture.open(folder / "patched"), suture.open(folder / "reverted")
    facts = {
        "bytes": patch.path.stat().st_size, "model": before.nbytes, "density": density,
        "on": all(_as_tuned(on[n], before[n], after[n], whole=density is None) for n in before),
        "moved": any(on[n].tobytes() != before[n].tobytes() for n in before),
        "back": all(back[n].tobytes() == before[n].tobytes() for n in before),
    }  # fmt: skip
    shutil.rmtree(folder / "reverted")
    if density is None:
        shutil.rmtree(folder / "patched")
    write(folder / "patch.json", json.dumps(facts, indent=1) + "\n")
    return facts


def _as_tuned(on: Any, before: Any, after: Any, *, whole: bool) -> bool:
    """Whether every entry is that of the base or the tuned model; all the tuned one's if whole."""
    if whole:
        return bool(on.tobytes() == after.tobytes())
    kind = f"u{on.dtype.itemsize}"
    on, before, after = (a.view(kind) for a in (on, before, after))
    return bool(((on == before) | (on == after)).all())


def patch_words(facts: Mapping[str, Any]) -> str:
    """What a patch came to, in words."""
    size = f"{facts['bytes'] / 1e6:.1f} MB, {facts['bytes'] / facts['model']:.1%} of the model"
    good = facts["on"] and facts["moved"] and facts["back"]
    return f"{size}, {'undone bit for bit' if good else 'NOT undone bit for bit'}"


def write(path: Path, text: str) -> None:
    """Put a text file in its place, whole or not at all."""
    with appearing(path) as file:
        file.write(text.encode())


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one row a line, as JSON."""
    write(path, "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))


__all__ = ["Place", "patch_facts", "patch_words", "write", "write_rows"]
