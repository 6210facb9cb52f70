"""From a plan to a folder of masks: measure or learn, rank, publish; prints nothing."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import suture
from suture.engine import Stage, checkpoint_fingerprint
from suture.errors import (
    MismatchError,
    OutputError,
    SutureError,
)
from suture.graft import write_graft
from suture.importance import Scoring
from suture.mask import Located, MaskFile, StoredMask, locate
from suture.regions.plan import RECORD, Plan
from suture.roles import layer_key, role_of
from suture.stats import Stats
from suture.vector import TaskVector

if TYPE_CHECKING:
    from suture.data import Dataset

SCHEMA = 1
"""Version of the layout of ``localize.json``."""
Say = Callable[[str], None]
TELL = 10.0
"""Seconds between two lines about a measurement."""


def execute(plan: Plan, stage: Stage | None = None, say: Say | None = None) -> dict[str, Any]:
    """Make the masks and publish the folder; what ``localize.json`` holds.

    Raises:
        SutureError: an input or the output is at fault; nothing is left behind.
    """
    stage = stage or (lambda name, nbytes: None)
    say = say or (lambda text: None)
    out = plan.out.resolve()
    staging = out.with_name(f".{out.name}.suture-localize")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        record = _made(plan, staging, stage, say)
        for checkpoint in (plan.base, *plan.models.values()):
            checkpoint.check_unchanged()
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (staging / RECORD).write_text(text, encoding="utf-8")
        _publish(staging, out)
    except OSError as error:
        raise OutputError(f"{plan.out}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return record


def _publish(staging: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.replace(old)
    staging.replace(out)
    shutil.rmtree(old, ignore_errors=True)


def _made(plan: Plan, staging: Path, stage: Stage, say: Say) -> dict[str, Any]:
    prints = {
        label: checkpoint_fingerprint(c, stage(f"hash {label}", c.nbytes))
        for label, c in {"base": plan.base, **plan.models}.items()
    }
    masks = {}
    for model in sorted(plan.models):
        stats, base = _stats_for(plan, model, prints, staging, say)
        path = staging / f"{model}.safetensors"
        masks[model] = _mask(plan, model, stats, prints, path, stage)
        if base is not None:
            masks[model]["base"] = _mask(plan, model, base, prints, staging / "base" / path.name,
                                         stage)  # fmt: skip
        if not plan.recipe.keep_stats:
            shutil.rmtree(staging / "stats", ignore_errors=True)
    return {
        "suture": suture.__version__,
        "schema": SCHEMA,
        "kind": "localize",
        "recipe": dict(plan.recipe.raw),
        "rule": {"name": plan.rule.name, "title": plan.rule.title, "paper": plan.rule.paper},
        "inputs": {
            label: {"path": c.label, "fingerprint": prints[label]}
            for label, c in {"base": plan.base, **plan.models}.items()
        },
        "space": {"include": list(plan.recipe.space.include),
                  "exclude": list(plan.recipe.space.exclude), "tensors": len(plan.names)},
        "masks": masks,
        "overlaps": _overlaps(plan, staging),
    }  # fmt: skip


def _overlaps(plan: Plan, staging: Path) -> list[dict[str, Any]]:
    stored = {m: StoredMask(staging / f"{m}.safetensors") for m in sorted(plan.models)}
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
    scoring = Scoring(plan.rule, plan.base, tuned, stats, recipe.seed, model, recipe.positive)
    about = {"rule": plan.rule.name, "density": density, "scope": recipe.scope,
             "base": prints["base"], "model": prints[model]}  # fmt: skip
    about |= {} if stats is None else {"at": stats.facts.get("at", "tuned")}
    shapes = {n: plan.base.specs[n].shape for n in plan.names}
    reads = 2 * (plan.base.nbytes + tuned.nbytes)
    with MaskFile(path, shapes, about) as file:
        located = locate(scoring, plan.names, 1.0 if density is None else density, recipe.scope,
                         file.put, threads=plan.threads,
                         progress=stage(f"rank {model}", reads))  # fmt: skip
    if plan.values and path.parent.name != "base":
        bits = path.rename(path.with_name(f".{model}.bits"))
        write_graft(path, tuned, StoredMask(bits))
        bits.unlink()
    return {
        "file": path.name,
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
    plan: Plan, model: str, prints: Mapping[str, str], staging: Path, say: Say
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
    path = staging / "stats" / f"{model}.safetensors"
    say(f"{'learning' if plan.rule.name == 'learned' else 'measuring'} {model}: "
        f"{len(plan.material[model].rows)} rows")  # fmt: skip
    try:
        both = plan.recipe.at == "both"
        place = path.parent / "base" / path.name
        if both:
            _measured(plan, model, "base", prints, say).save(place)
        _measured(plan, model, "tuned" if both else plan.recipe.at, prints, say).save(path)
    except SutureError as error:
        error.add_note(f"while measuring {model}")
        raise
    base = Stats.load(place) if both and plan.rule.needs else None
    return Stats.load(path), base


def _measured(plan: Plan, model: str, at: str, prints: Mapping[str, str], say: Say) -> Stats:
    from suture.data import tokenise
    from suture.finetune.rows import language_rows, longest_of
    from suture.learned import Epoch, learn
    from suture.measure import measure, objective_named
    from suture.models import (
        FLOAT32,
        Classifier,
        load_encoder,
        load_language_model,
        load_tokenizer,
    )

    recipe, task, found = plan.recipe, plan.recipe.tasks[model], plan.material[model]
    learned = plan.rule.name == "learned"
    at = "base" if learned else at
    place = (plan.base if at == "base" else plan.models[model]).path
    facts = {"model": prints[model if learned or at == "tuned" else "base"],
             "at": "tuned" if learned else at}  # fmt: skip
    net: Any
    data: Dataset
    if found.head is not None:
        loaded = load_encoder(place, device=recipe.device, dtype=FLOAT32)
        net = Classifier(loaded.model, found.head).to(recipe.device)
        rows: Any = found.rows
        data = tokenise(rows, loaded.tokenizer, labels=found.head.labels,
                        max_length=task.max_length)  # fmt: skip
    else:
        text = load_language_model(place, device=recipe.device, dtype=FLOAT32)
        assert task.language is not None
        net = text.model
        # The model's own words and template, also for the base: both read the same tokens.
        tokenizer = load_tokenizer(plan.models[model].path)
        longest = min(task.max_length, longest_of(plan.base.config, tokenizer))
        spec = replace(task.language, max_length=longest)
        rows = language_rows(spec, tokenizer, longest, 0)
        data = rows.train
        for note in rows.notes:
            say(f"{model}: {note}")
    objective = objective_named(task.kind)
    if learned:
        vector = TaskVector(plan.base, [(plan.models[model], 1.0)], plan.names)

        def tell(now: Epoch) -> None:
            say(f"{model}: epoch {now.epoch} of {now.epochs}, loss {now.loss:.4f}, "
                f"open {now.open:.3%}")  # fmt: skip

        assert recipe.learn is not None
        return learn(vector, net, data, recipe.learn, objective=objective, device=recipe.device,
                     facts=facts, progress=tell)  # fmt: skip
    return measure(net, data, plan.recipe.needs(plan.rule), names=plan.names, objective=objective,
                   batch=task.batch, draws=task.draws, seed=recipe.seed, device=recipe.device,
                   facts=facts, progress=_counted(model, at, len(data), say))  # fmt: skip


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


def lines(record: Mapping[str, Any], out: Path) -> Iterator[str]:
    """What to tell at the end, a line each."""
    for model, found in record["masks"].items():
        kept, entries = found["kept"], found["entries"]
        yield f"{model}: kept {kept:,} of {entries:,} entries ({found['density']:.4%}), " + (
            f"{found['tied_at_threshold']:,} tied at the threshold"
        )
        if found["wanted"] is not None and found["kept"] < found["wanted"]:
            yield f"  {found['wanted']:,} were asked for; the others have no importance at all"
        rows = sorted(found["roles"].items(), key=lambda r: -r[1]["enrichment"])[:3]
        yield "  densest in " + ", ".join(f"{k} ({r['density']:.2%})" for k, r in rows)
    for pair in record["overlaps"]:
        one, other = pair["models"]
        yield (f"overlap of {one} and {other}: Jaccard {pair['jaccard']:.4f}; by chance "
               f"{pair['independent']:.4f}, by profile {pair['matched']:.4f}")  # fmt: skip
    yield f"wrote {out} ({len(record['masks'])} masks and {RECORD})"


__all__ = ["execute", "lines", "profile"]
