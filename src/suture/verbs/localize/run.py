"""From a plan to a folder of masks: measure or learn, rank, publish; prints nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from suture.edits.graft import write_graft
from suture.edits.importance import Scoring
from suture.edits.mask import Located, locate
from suture.edits.mask_file import MaskFile, StoredMask, marked
from suture.edits.stats import Stats
from suture.errors import MismatchError, NonFiniteError, Problems, RecipeError, SutureError
from suture.merges.apply import checkpoint_fingerprint
from suture.runs.progress import Progress, Say, Stage
from suture.runs.workspace import Workspace, workspace
from suture.stream.vector import TaskVector
from suture.tensors.roles import layer_key, role_of
from suture.verbs.localize.plan import RECORD, Plan, check_place
from suture.verbs.localize.tasks import folder_of, load_net
from suture.version import __version__

SCHEMA = 1
"""Version of the layout of ``localize.json``."""
LEARNING, STATS = "learning", "stats"
"""In the workspace: where learning stands, and what was measured."""
TELL = 10.0
"""Seconds between two lines about a measurement."""


def execute(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Make the masks and publish the folder; what ``localize.json`` holds.

    What was measured, and every epoch of what is learned, is kept beside the output until it is
    there: the same command goes on from it after an interruption, to the same bytes.

    Raises:
        SutureError: an input or the output is at fault. What was measured is kept, unless the same
            again would fail the same way.
    """
    stage = progress.stage
    prints = {
        label: checkpoint_fingerprint(c, stage(f"hash {label}", c.nbytes))
        for label, c in plan.inputs.items()
    }
    _check_without(plan, prints)
    same_again = (MismatchError, NonFiniteError, RecipeError)
    with workspace(plan.out, "localize", _key(plan, prints), overwrite=plan.options.overwrite,
                   fatal=same_again) as space:  # fmt: skip
        record = _made(plan, prints, space, progress)
        for checkpoint in plan.inputs.values():
            checkpoint.check_unchanged()
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (space.made / RECORD).write_text(text, encoding="utf-8")
        problems = Problems()
        check_place(plan, problems)  # once more: time has passed
        problems.raise_if_any()
        if plan.recipe.keep_stats and (space.folder / STATS).is_dir():
            shutil.copytree(space.folder / STATS, space.made / STATS, copy_function=_linked)
        space.publish()
    return record


def _linked(source: str, target: str) -> None:
    """Give a file a second name where the disk can: what was measured stays in the workspace."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _key(plan: Plan, prints: Mapping[str, str]) -> dict[str, Any]:
    """All that measuring and learning depend on."""
    recipe = plan.recipe
    tasks = {
        m: [recipe.tasks[m].model_dump(mode="json", exclude={"data", "head"}),
            found.texts, _digest(recipe.tasks[m].head)]
        for m, found in plan.material.items()
    }  # fmt: skip
    facts = [
        SCHEMA, plan.rule.name, recipe.at, recipe.seed, recipe.device,
        None if recipe.learn is None else asdict(recipe.learn), recipe.needs(plan.rule),
        dict(prints), plan.names, tasks,
        [plan.options.restricted, plan.base.restricted,
         {m: c.restricted for m, c in plan.models.items()}],
    ]  # fmt: skip
    return {"localize": facts}


def _digest(path: Path | None) -> str:
    return "" if path is None else hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _check_without(plan: Plan, prints: Mapping[str, str]) -> None:
    """Refuse masks of entries to be left out that are of another base, or are damaged."""
    for without in set(plan.without.values()):  # one may serve several models
        if without.about.get("base", prints["base"]) != prints["base"]:
            raise MismatchError(
                f"{without.path}: marks entries of another base than {plan.base.label}"
            )
        without.check()


def _made(
    plan: Plan, prints: Mapping[str, str], space: Workspace, progress: Progress
) -> dict[str, Any]:
    made, masks, stage = space.fresh(), dict[str, Any](), progress.stage
    for model in sorted(plan.models):
        stats, base = _stats_for(plan, model, prints, space.folder, progress.say)
        path = made / f"{model}.safetensors"
        masks[model] = _mask(plan, model, stats, prints, path, stage)
        if base is not None:
            masks[model]["base"] = _mask(plan, model, base, prints, made / "base" / path.name,
                                         stage)  # fmt: skip
        if not plan.recipe.keep_stats:
            shutil.rmtree(space.folder / STATS, ignore_errors=True)
    return {
        "suture": __version__,
        "schema": SCHEMA,
        "kind": "localize",
        **({"restricted": True} if any(m.get("restricted") for m in masks.values()) else {}),
        "recipe": dict(plan.recipe.written),
        "rule": {"name": plan.rule.name, "title": plan.rule.title, "paper": plan.rule.paper},
        "inputs": {
            label: {"path": c.label, "fingerprint": prints[label]}
            for label, c in plan.inputs.items()
        },
        "space": {"include": list(plan.recipe.space.include),
                  "exclude": list(plan.recipe.space.exclude), "tensors": len(plan.names)},
        "masks": masks,
        "overlaps": _overlaps(plan, made),
    }  # fmt: skip


def _overlaps(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    stored = {m: StoredMask(folder / f"{m}.safetensors") for m in sorted(plan.models)}
    found = []
    for one, other in combinations(stored, 2):
        overlap = stored[one].overlap(stored[other])
        found.append({"models": [one, other], **overlap._asdict()})
    for mask in stored.values():
        mask.checkpoint.close()
    return found


def _mask(
    plan: Plan, model: str, stats: Stats | None, prints: Mapping[str, str], path: Path,
    stage: Stage,
) -> dict[str, Any]:  # fmt: skip
    tuned, recipe = plan.models[model], plan.recipe
    density = recipe.densities[model]
    without = plan.without.get(model)
    scoring = Scoring(plan.rule, plan.base, tuned, stats, recipe.seed, model, recipe.positive,
                      without=without)  # fmt: skip
    about = {"rule": plan.rule.name, "density": density, "scope": recipe.scope,
             "base": prints["base"], "model": prints[model]}  # fmt: skip
    about |= {} if stats is None else {"at": stats.facts.get("at", "tuned")}
    about |= {} if without is None else {"without": without.path.name}
    restricted = _restricted(plan, model)
    restricted = restricted or any(x is not None and x.restricted for x in (stats, without))
    shapes = {n: plan.base.specs[n].shape for n in plan.names}
    reads = 2 * (plan.base.nbytes + tuned.nbytes)
    with MaskFile(path, shapes, marked(about, restricted)) as file:
        located = locate(scoring, plan.names, 1.0 if density is None else density, recipe.scope,
                         file.put, threads=plan.options.threads,
                         progress=stage(f"rank {model}", reads))  # fmt: skip
    if plan.options.values and path.parent.name != "base":
        bits = path.rename(path.with_name(f".{model}.bits"))
        write_graft(path, tuned, StoredMask(bits))
        bits.unlink()
    return {
        "file": path.name,
        **({"restricted": True} if restricted else {}),
        "kept": located.kept,
        "entries": sum(located.sizes.values()),
        "density": located.density,
        "wanted": None if density is None else located.wanted,
        "tied_at_threshold": located.tied,
        "bytes": path.stat().st_size,
        "stats": None if stats is None else stats.facts,
        "layers": profile(located, layer_key),
        "roles": profile(located, lambda n: role_of(n).kind),
    }


def profile(located: Located, group: Callable[[str], str]) -> dict[str, dict[str, float]]:
    """Where a mask lies: by group, its density there, its share of the mask, its enrichment.

    ``density`` is kept entries over entries of the group, ``share`` kept entries of the group over
    all kept ones, ``enrichment`` the group's density over that of the whole mask.
    """
    kept: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for name, count in located.counts.items():
        key = group(name)
        kept[key] = kept.get(key, 0) + count
        sizes[key] = sizes.get(key, 0) + located.sizes[name]
    whole = located.density
    return {
        key: {
            "kept": kept[key],
            "entries": sizes[key],
            "density": kept[key] / max(1, sizes[key]),
            "share": kept[key] / max(1, located.kept),
            "enrichment": kept[key] / max(1, sizes[key]) / whole if whole else 0.0,
        }
        for key in sorted(kept, key=_natural)
    }


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(w), "") if w.isdecimal() else (0, w) for w in key.split(".")]


def _stats_for(
    plan: Plan, model: str, prints: Mapping[str, str], folder: Path, say: Say
) -> tuple[Stats | None, Stats | None]:
    """The statistics by which a model's entries are ranked, and with ``at: both`` the base's."""
    if not plan.recipe.needs(plan.rule):
        return None, None
    if model in plan.stats:
        stats = plan.stats[model]
        at = stats.facts.setdefault("at", plan.recipe.at)
        theirs = prints["base" if at == "base" else model]
        if stats.facts.get("model", theirs) != theirs:
            raise MismatchError(
                f"{stats.where}: measured on another model than {model} "
                f"(fingerprint {stats.facts['model']}, not {theirs}); measure again"
            )
        return stats, None
    path = folder / STATS / f"{model}.safetensors"
    places = {plan.recipe.at: path}
    if plan.recipe.at == "both":
        places = {"base": path.parent / "base" / path.name, "tuned": path}
    say(f"{'learning' if plan.rule.name == 'learned' else 'measuring'} {model}: "
        f"{len(plan.material[model].rows)} rows")  # fmt: skip
    for at, place in places.items():
        if place.is_file():
            what = f"{model}, {at}" if len(places) > 1 else model
            say(f"{what}: measured before the interruption")
            continue
        try:
            measured = _measured(plan, model, at, prints, folder, say)
        except SutureError as error:
            error.add_note(f"while measuring {model}")
            raise
        measured.save(place)
    base = Stats.load(places["base"]) if len(places) > 1 and plan.rule.needs else None
    return Stats.load(path), base


def _restricted(plan: Plan, model: str) -> bool:
    return plan.options.restricted or plan.base.restricted or plan.models[model].restricted


def _measured(
    plan: Plan, model: str, at: str, prints: Mapping[str, str], folder: Path, say: Say
) -> Stats:
    from suture.training.mask_learning import Epoch, learn
    from suture.training.measure import measure

    recipe, task, found = plan.recipe, plan.recipe.tasks[model], plan.material[model]
    learned = plan.rule.name == "learned"
    at = "base" if learned else at
    facts = {"model": prints[model if learned or at == "tuned" else "base"],
             "at": "tuned" if learned else at}  # fmt: skip
    facts = marked(facts, _restricted(plan, model))
    runs = plan.base if at == "base" else plan.models[model]
    with TemporaryDirectory(prefix="suture-") as scratch:
        runnable, words = folder_of(runs, Path(scratch) / "runs", plan.base), None
        if task.language is not None and at == "base":
            # The model's own words and template also for the base: both read the same tokens.
            words = folder_of(plan.models[model], Path(scratch) / "words", plan.base)
        net = load_net(runnable, task, found, recipe.device, words)
    for note in net.notes:
        say(f"{model}: {note}")
    if learned:
        vector = TaskVector(plan.base, [(plan.models[model], 1.0)], plan.names)

        def tell(now: Epoch) -> None:
            say(f"{model}: epoch {now.epoch} of {now.epochs}, loss {now.loss:.4f}, "
                f"open {now.open:.3%}")  # fmt: skip

        assert recipe.learn is not None
        return learn(vector, net.model, net.data, recipe.learn, objective=net.objective,
                     device=recipe.device, facts=facts, progress=tell,
                     keep=folder / LEARNING / f"{model}.safetensors")  # fmt: skip
    return measure(net.model, net.data, plan.recipe.needs(plan.rule), names=plan.names,
                   objective=net.objective, batch=task.batch, draws=task.draws, seed=recipe.seed,
                   device=recipe.device, facts=facts,
                   progress=_counted(model, at, len(net.data), say))  # fmt: skip


def _counted(model: str, at: str, rows: int, say: Say) -> Callable[[int], None]:
    """Says now and then how far a measurement is."""
    begun = last = time.monotonic()
    done = 0

    def progress(more: int) -> None:
        nonlocal done, last
        done += more
        now = time.monotonic()
        if now - last >= TELL or done == rows:
            last = now
            left = (now - begun) / done * (rows - done)
            say(f"{model}, {at}: {done} of {rows} rows, {left:.0f} s left")

    return progress


__all__ = ["execute", "profile"]
