"""From a recipe to a folder of masks: check, measure or learn, rank, publish; prints nothing.

The folder holds a mask for each model, the statistics that were measured for it, and
``localize.json``: the recipe, fingerprints, and where the masks lie, by layer and role.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import suture
from suture.checkpoint import Checkpoint
from suture.engine import Stage, checkpoint_fingerprint
from suture.errors import (
    MismatchError,
    OutputError,
    Problems,
    RecipeError,
    SutureError,
    brief,
    did_you_mean,
)
from suture.graft import write_graft
from suture.importance import Rule, Scoring, rule_named
from suture.mask import Located, MaskFile, StoredMask, check_question, locate, marked
from suture.recipe import parse_yaml
from suture.recipe_types import refuse_unknown, section
from suture.roles import DEFAULT_SPACE, ParamSpace, check_selectors, layer_key, role_of
from suture.run import open_input
from suture.stats import KINDS, Stats
from suture.tasks import (
    Material,
    Task,
    TaskReader,
    check_loadable,
    folder_of,
    load_net,
    read_material,
)
from suture.vector import TaskVector, align

if TYPE_CHECKING:
    from suture.learned import LearnSettings

SCHEMA = 1
"""Version of the layout of ``localize.json``."""
RECORD = "localize.json"
KEYS = ("base", "models", "rule", "density", "scope", "positive", "seed", "space", "stats", "tasks",
        "at", "learn", "measure", "device")  # fmt: skip
STATS, LEARNING, RESUME = "stats", "learning", "resume.key"
"""In the folder that is made: statistics; where learning stands; what both belong to."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Regions:
    """A localization, as data: every key is known and every value checked."""

    base: str = ""
    models: Mapping[str, str] = field(default_factory=dict)
    densities: Mapping[str, float | None] = field(default_factory=dict)
    rule: str = "magnitude"
    scope: str = "global"
    positive: bool = False
    seed: int = 0
    space: ParamSpace = DEFAULT_SPACE
    stats: Mapping[str, Path] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)
    at: str = "tuned"
    learn: LearnSettings | None = None
    measure: tuple[str, ...] = ()
    """Statistics that are kept besides those that the rule needs, for merges by statistics."""
    device: str = "cpu"
    raw: Mapping[str, Any] = field(default_factory=dict)
    """As it was written."""

    def needs(self, rule: Rule) -> tuple[str, ...]:
        """Every kind of statistics that is wanted."""
        return tuple(dict.fromkeys((*rule.needs, *self.measure)))


@dataclass(frozen=True)
class Plan:
    """A localization whose every input was opened and checked; no tensor was read."""

    recipe: Regions
    rule: Rule
    base: Checkpoint
    models: Mapping[str, Checkpoint]
    names: tuple[str, ...]
    stats: Mapping[str, Stats]
    material: Mapping[str, Material]
    out: Path
    threads: int | None = None
    overwrite: bool = False
    values: bool = False
    restricted: bool = False
    """Whether every mask is to be marked: not to be passed on."""

    def describe(self) -> dict[str, Any]:
        """What will be done, as plain data."""
        entries = sum(self.base.specs[n].numel for n in self.names)
        return {
            "rule": self.rule.name,
            "needs": list(self.recipe.needs(self.rule)),
            "scope": self.recipe.scope,
            "tensors": len(self.names),
            "entries": entries,
            "densities": dict(self.recipe.densities),
            "models": {m: c.label for m, c in self.models.items()},
            "rows": {m: len(found.rows) for m, found in self.material.items()},
            "output": {"path": str(self.out), "bytes": len(self.models) * -(-entries // 8)},
        }


# -- the recipe ------------------------------------------------------------------------------------


class _Reader(TaskReader):
    """Reads a recipe into ``Regions`` and notes everything that is wrong."""

    def words(self, raw: Mapping[str, Any], key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        found = raw.get(key, list(default))
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(w, str) for w in found):
            self.note(f"space.{key}: a list of roles or name patterns, not {brief(found)}")
            return default
        return tuple(found)

    def regions(self) -> Regions:
        refuse_unknown(self.raw, KEYS, "", self.problems)
        base = self.one(self.raw, "base", str, "")
        if not base:
            self.note("base: missing; what the models were tuned from")
        models, densities = self.models()
        rule = self.one(self.raw, "rule", str, "magnitude")
        at = self.one(self.raw, "at", str, "tuned")
        if at not in ("base", "tuned"):
            self.note(f"at: where statistics are measured, base or tuned, not {at!r}")
        seed = self.one(self.raw, "seed", int, 0)
        if not 0 <= seed < 2**63:
            self.note(f"seed: from 0 to 2**63 - 1, not {seed}")
        space = section(self.raw, "space", self.problems)
        refuse_unknown(space, ("include", "exclude"), "space: ", self.problems)
        default = ParamSpace()
        learn = section(self.raw, "learn", self.problems)
        settings = None
        if rule == "learned":
            from suture.learned import settings_from

            settings = settings_from(learn, self.problems)
        elif learn:
            self.note(f"learn: belongs to the rule learned, not to {rule}")
        return Regions(
            base, models, densities, rule, self.one(self.raw, "scope", str, "global"),
            self.one(self.raw, "positive", bool, False), seed,
            ParamSpace(self.words(space, "include", default.include),
                       self.words(space, "exclude", default.exclude)),
            self.stats(models), self.tasks(models), at, settings, self.measured(rule),
            self.one(self.raw, "device", str, "cpu"), dict(self.raw),
        )  # fmt: skip

    def models(self) -> tuple[dict[str, str], dict[str, float | None]]:
        paths: dict[str, str] = {}
        densities: dict[str, float | None] = {}
        entries = section(self.raw, "models", self.problems)
        if not entries:
            self.note("models: a mapping from names to paths, with at least one model")
        for name, entry in entries.items():
            found = {"path": entry} if isinstance(entry, str) else entry
            if not isinstance(found, Mapping) or not isinstance(found.get("path"), str):
                self.note(f"models.{name}: a path, or a mapping with a path, not {brief(entry)}")
                continue
            refuse_unknown(found, ("path", "density"), f"models.{name}: ", self.problems)
            if name in ("base", "stats", "") or not name.isprintable() or set(name) & set("/\\"):
                self.note(f"models: {name!r} cannot be the name of a mask file")
                continue
            paths[name] = found["path"]
            densities[name] = self.density(found, name)
        return paths, densities

    def density(self, entry: Mapping[str, Any], name: str) -> float | None:
        where = f"models.{name}.density" if "density" in entry else "density"
        found = entry.get("density", self.raw.get("density"))
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found <= 1:
            self.note(f"{where}: the share of entries kept, in (0, 1]; got {brief(found)}")
            return None
        return float(found)

    def measured(self, rule: str) -> tuple[str, ...]:
        """The kinds that are measured besides."""
        found = self.raw.get("measure", [])
        if not isinstance(found, list) or not all(isinstance(k, str) for k in found):
            self.note(f"measure: a list of kinds of statistics, not {brief(found)}")
            return ()
        for kind in found:
            if kind not in KINDS or kind == "logit":
                known = [k for k in KINDS if k != "logit"]
                self.note(f"measure: no statistics {kind!r}; {did_you_mean(kind, known)}")
        if found and rule == "learned":
            self.note("measure: the rule learned trains and measures nothing; use another recipe")
        return tuple(k for k in found if k in KINDS)

    def stats(self, models: Mapping[str, str]) -> dict[str, Path]:
        found = {}
        for name, value in self.paired("stats", models).items():
            if isinstance(value, str):
                found[name] = self.folder / value
            else:
                self.note(f"stats.{name}: a file, not {brief(value)}")
        return found


def plan_regions(
    source: Path | Mapping[str, Any],
    out: Path,
    *,
    folder: Path | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    values: bool = False,
    restricted: bool = False,
) -> Plan:
    """Read a recipe, open its models, and check everything but the values of tensors.

    Args:
        source: a YAML file, or what stands in it.
        out: the folder to write.
        folder: where relative paths start; by default the file's folder or the current one.
        threads: default every core; changes no bit.
        overwrite: replace an older output.
        values: write the marked weights beside the bits: grafts.
        restricted: mark the masks: neither they nor what is made with them may be passed on.

    Raises:
        SutureError: all problems at once.
    """
    problems = Problems()
    place = folder or (Path() if isinstance(source, Mapping) else source.parent)
    raw = source if isinstance(source, Mapping) else parse_yaml(_text(source), str(source))
    recipe = _Reader(raw, place, problems).regions()
    rule = _question(recipe, problems)
    base, models = _opened(recipe, place, problems)
    names = _names(recipe, base, problems)
    stats = _stats(recipe, rule, base, names, problems)
    material = (
        {}
        if rule is None or not recipe.needs(rule)
        else _material(recipe, rule, base, models, problems)
    )
    _check_place(out, [c for c in (base, *models.values()) if c is not None], overwrite, problems)
    problems.raise_if_any()
    assert base is not None
    assert rule is not None
    return Plan(recipe, rule, base, models, names, stats, material, out, threads, overwrite, values,
                restricted)  # fmt: skip


def _text(source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{source}: not a text file") from None


def _question(recipe: Regions, problems: Problems) -> Rule | None:
    """Check the words of the recipe; the rule, if there is such."""
    some = Stats({}, {}, "")
    for density in set(recipe.densities.values()) or {None}:
        for text in check_question(recipe.rule, density, recipe.scope, some, recipe.positive):
            problems.add(RecipeError, text)
    try:
        rule = rule_named(recipe.rule)
    except RecipeError:
        return None
    for name in recipe.models if recipe.needs(rule) else ():
        if name not in recipe.stats and name not in recipe.tasks:
            problems.add(
                RecipeError,
                f"tasks: {_why(recipe, rule)} needs data for {name!r}: `tasks: {{{name}: {{data: "
                "..., head: ...}}}`, or `stats: {" + name + ": FILE}` measured before",
            )
    return rule


def _why(recipe: Regions, rule: Rule) -> str:
    return f"the rule {rule.name}" if rule.needs else f"measure: {', '.join(recipe.measure)}"


def _opened(
    recipe: Regions, folder: Path, problems: Problems
) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
    base = None
    models = {}
    if recipe.base:
        with problems.collecting():
            base = open_input(recipe.base, folder, None)
    for name, path in recipe.models.items():
        with problems.collecting():
            models[name] = open_input(path, folder, base)
            if base is not None:
                align(base, models[name], problems, buffers=True)
    return base, models


def _names(recipe: Regions, base: Checkpoint | None, problems: Problems) -> tuple[str, ...]:
    if base is None:
        return ()
    for key in ("include", "exclude"):
        with problems.collecting():
            check_selectors(getattr(recipe.space, key), base.specs, f"space.{key}")
    names = tuple(recipe.space.names(base.specs))
    if not names:
        problems.add(RecipeError, "space: no tensor is left to localize in")
    return names


def _stats(
    recipe: Regions, rule: Rule | None, base: Checkpoint | None, names: Sequence[str],
    problems: Problems,
) -> dict[str, Stats]:  # fmt: skip
    found = {}
    for name, path in recipe.stats.items() if rule is not None and base is not None else ():
        with problems.collecting():
            stats = Stats.load(path)
            assert rule is not None
            assert base is not None
            stats.check(recipe.needs(rule), {n: base.specs[n] for n in names})
            found[name] = stats
    return found


def _material(
    recipe: Regions, rule: Rule, base: Checkpoint | None, models: Mapping[str, Checkpoint],
    problems: Problems,
) -> dict[str, Material]:  # fmt: skip
    """Rows and heads of the models that are to be measured; text only."""
    wanted = {n: t for n, t in recipe.tasks.items() if n not in recipe.stats}
    for name in wanted:
        if name in models:
            at_base = rule.name == "learned" or recipe.at == "base"
            place, runs = ("base", base) if at_base else (f"models.{name}", models[name])
            if runs is not None:
                check_loadable(runs, place, f"the rule {rule.name}", problems)
    return read_material(wanted, problems, seed=recipe.seed)


def _check_place(
    out: Path, inputs: Sequence[Checkpoint], overwrite: bool, problems: Problems
) -> None:
    place = out.resolve()
    for checkpoint in inputs:
        held = {checkpoint.path, *checkpoint.files}
        if any(place.is_relative_to(p) or p.is_relative_to(place) for p in held):
            problems.add(OutputError, f"{out}: holds an input; write somewhere else")
            return
    empty = place.is_dir() and not any(place.iterdir())
    if place.exists() and not empty:
        if not place.is_dir():
            problems.add(OutputError, f"{out}: is a file; name a folder")
        elif not (place / RECORD).exists():
            problems.add(OutputError, f"{out}: was not written by `suture localize`; name another")
        elif not overwrite:
            problems.add(OutputError, f"{out}: exists; name another folder, or add --overwrite")
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        problems.add(OutputError, f"{out}: cannot write in {parent}")


# -- doing it --------------------------------------------------------------------------------------


def execute(plan: Plan, stage: Stage | None = None, say: Say | None = None) -> dict[str, Any]:
    """Make the masks and publish the folder; what ``localize.json`` holds.

    What was measured, and every epoch of what is learned, is kept beside the output until it is
    there: the same command goes on from it after an interruption, to the same bytes.

    Raises:
        SutureError: an input or the output is at fault; nothing is left behind.
    """
    stage = stage or (lambda name, nbytes: None)
    say = say or (lambda text: None)
    out = plan.out.resolve()
    staging = out.with_name(f".{out.name}.suture-localize")
    interrupted = False
    try:
        record = _made(plan, staging, stage, say)
        for checkpoint in (plan.base, *plan.models.values()):
            checkpoint.check_unchanged()
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (staging / RECORD).write_text(text, encoding="utf-8")
        for name in (RESUME, LEARNING):
            _remove(staging / name)
        _publish(staging, out)
    except OSError as error:
        raise OutputError(f"{plan.out}: cannot be written: {error.strerror}") from error
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        if not interrupted:
            shutil.rmtree(staging, ignore_errors=True)
    return record


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _take_over(plan: Plan, prints: Mapping[str, str], staging: Path) -> None:
    """Prepare the staging folder; of an interrupted run of the same it keeps what was measured."""
    key = _key(plan, prints)
    try:
        known = (staging / RESUME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        known = ""
    if known != key:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        (staging / RESUME).write_text(key, encoding="utf-8")
    for path in staging.iterdir():
        if path.name not in (RESUME, LEARNING, STATS):
            _remove(path)


def _key(plan: Plan, prints: Mapping[str, str]) -> str:
    """Identifies all that measuring and learning depend on."""
    recipe = plan.recipe
    tasks = {
        m: [asdict(replace(recipe.tasks[m], data=Path(), head=None)),
            [[r.text, r.label] for r in found.rows], _digest(recipe.tasks[m].head)]
        for m, found in plan.material.items()
    }  # fmt: skip
    facts = [
        suture.__version__, SCHEMA, plan.rule.name, recipe.at, recipe.seed, recipe.device,
        None if recipe.learn is None else asdict(recipe.learn), recipe.needs(plan.rule),
        dict(prints), plan.names, tasks,
        [plan.restricted, plan.base.restricted, {m: c.restricted for m, c in plan.models.items()}],
    ]  # fmt: skip
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(path: Path | None) -> str:
    return "" if path is None else hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


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
    _take_over(plan, prints, staging)
    masks = {}
    for model in sorted(plan.models):
        stats = _stats_for(plan, model, prints, staging, say)
        masks[model] = _mask(plan, model, stats, prints, staging, stage)
    return {
        "suture": suture.__version__,
        "schema": SCHEMA,
        "kind": "localize",
        **({"restricted": True} if any(m.get("restricted") for m in masks.values()) else {}),
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
    plan: Plan, model: str, stats: Stats | None, prints: Mapping[str, str], staging: Path,
    stage: Stage,
) -> dict[str, Any]:  # fmt: skip
    tuned, recipe = plan.models[model], plan.recipe
    density = recipe.densities[model]
    scoring = Scoring(plan.rule, plan.base, tuned, stats, recipe.seed, model, recipe.positive)
    about = {"rule": plan.rule.name, "density": density, "scope": recipe.scope,
             "base": prints["base"], "model": prints[model]}  # fmt: skip
    restricted = _restricted(plan, model) or (stats is not None and stats.restricted)
    shapes = {n: plan.base.specs[n].shape for n in plan.names}
    path = staging / f"{model}.safetensors"
    reads = 2 * (plan.base.nbytes + tuned.nbytes)
    with MaskFile(path, shapes, marked(about, restricted)) as file:
        located = locate(scoring, plan.names, 1.0 if density is None else density, recipe.scope,
                         file.put, threads=plan.threads,
                         progress=stage(f"rank {model}", reads))  # fmt: skip
    if plan.values:
        bits = path.rename(staging / f".{model}.bits")
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
    plan: Plan, model: str, prints: Mapping[str, str], staging: Path, say: Say
) -> Stats | None:
    if not plan.recipe.needs(plan.rule):
        return None
    if model in plan.stats:
        stats = plan.stats[model]
        at = stats.facts.setdefault("at", plan.recipe.at)
        theirs = prints["base" if at == "base" else model]
        if stats.facts.get("model", theirs) != theirs:
            raise MismatchError(
                f"{stats.where}: measured on another model than {model} "
                f"(fingerprint {stats.facts['model']}, not {theirs}); measure again"
            )
        return stats
    path = staging / STATS / f"{model}.safetensors"
    if path.is_file():
        say(f"{model}: measured before the interruption")
        return Stats.load(path)
    say(f"{'learning' if plan.rule.name == 'learned' else 'measuring'} {model}: "
        f"{len(plan.material[model].rows)} rows")  # fmt: skip
    try:
        measured = _measured(plan, model, prints, staging, say)
    except SutureError as error:
        error.add_note(f"while measuring {model}")
        raise
    measured.save(path)
    return Stats.load(path)


def _restricted(plan: Plan, model: str) -> bool:
    return plan.restricted or plan.base.restricted or plan.models[model].restricted


def _measured(plan: Plan, model: str, prints: Mapping[str, str], staging: Path, say: Say) -> Stats:
    from suture.learned import Epoch, learn
    from suture.measure import measure

    recipe, task, found = plan.recipe, plan.recipe.tasks[model], plan.material[model]
    learned = plan.rule.name == "learned"
    at = "base" if learned else recipe.at
    facts = {"model": prints[model if learned or at == "tuned" else "base"],
             "at": "tuned" if learned else at}  # fmt: skip
    facts = marked(facts, _restricted(plan, model))
    runs = plan.base if at == "base" else plan.models[model]
    with TemporaryDirectory(prefix="suture-") as scratch:
        net = load_net(folder_of(runs, Path(scratch), plan.base), task, found, recipe.device)
    if learned:
        vector = TaskVector(plan.base, [(plan.models[model], 1.0)], plan.names)

        def tell(now: Epoch) -> None:
            say(f"{model}: epoch {now.epoch} of {now.epochs}, loss {now.loss:.4f}, "
                f"open {now.open:.3%}")  # fmt: skip

        assert recipe.learn is not None
        return learn(vector, net.model, net.data, recipe.learn, objective=net.objective,
                     device=recipe.device, facts=facts, progress=tell,
                     keep=staging / LEARNING / f"{model}.safetensors")  # fmt: skip
    return measure(net.model, net.data, plan.recipe.needs(plan.rule), names=plan.names,
                   objective=net.objective, batch=task.batch, draws=task.draws, seed=recipe.seed,
                   device=recipe.device, facts=facts)  # fmt: skip


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
    if record.get("restricted"):
        yield "restricted: neither the masks nor what is made with them may be passed on"
    yield f"wrote {out} ({len(record['masks'])} masks and {RECORD})"


__all__ = ["Plan", "Regions", "Task", "execute", "lines", "plan_regions", "profile"]
