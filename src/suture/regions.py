"""From a recipe to a folder of masks: check, measure or learn, rank, publish; prints nothing.

The folder holds a mask for each model, the statistics that were measured for it, and
``localize.json``: the recipe, fingerprints, and where the masks lie, by layer and role.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import suture
from suture.checkpoint import Checkpoint, open_checkpoint
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
from suture.mask import Located, MaskFile, StoredMask, check_question, locate
from suture.recipe import parse_yaml
from suture.recipe_types import refuse_unknown, section
from suture.roles import DEFAULT_SPACE, ParamSpace, check_selectors, layer_key, role_of
from suture.stats import KINDS, Stats
from suture.vector import TaskVector, align

if TYPE_CHECKING:
    from suture.data import Dataset, Row
    from suture.finetune.recipe import DataSpec
    from suture.finetune.rows import Record
    from suture.learned import LearnSettings
    from suture.models import Head

SCHEMA = 1
"""Version of the layout of ``localize.json``."""
RECORD = "localize.json"
KEYS = ("base", "models", "rule", "density", "scope", "positive", "seed", "space", "stats", "tasks",
        "at", "learn", "measure", "device")  # fmt: skip
TASK_KEYS = ("data", "kind", "head", "text", "label", "prompt", "response", "messages", "format",
             "chat", "max_length", "rows", "batch", "draws")  # fmt: skip
PLACES = ("base", "tuned", "both")
TOKENS = {"classification": 128, "causal": 1024}
"""Most tokens of a row, where the recipe does not say."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """The data of one model, as the recipe names them."""

    data: Path
    kind: str = "classification"
    head: Path | None = None
    text: str = "text"
    label: str = "label"
    max_length: int = 128
    rows: int | None = None
    """Most rows of each label, or of all where there are none."""
    batch: int = 8
    draws: int = 1
    language: DataSpec | None = None
    """The columns of a language model's rows."""


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
class Material:
    """What a model is measured with: its rows and the head that reads them."""

    rows: Sequence[Row] | Sequence[Record]
    head: Head | None


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


class _Reader:
    """Reads a recipe into ``Regions`` and notes everything that is wrong."""

    def __init__(self, raw: Mapping[str, Any], folder: Path, problems: Problems) -> None:
        self.raw, self.folder, self.problems = raw, folder, problems

    def note(self, text: str) -> None:
        self.problems.add(RecipeError, text)

    def one(
        self, raw: Mapping[str, Any], key: str, kind: type, default: Any, where: str = ""
    ) -> Any:
        found = raw.get(key, default)
        fine = isinstance(found, kind) and (kind is bool or not isinstance(found, bool))
        if found is not default and not fine:
            words = {str: "a word", int: "a whole number", bool: "true or false"}
            self.note(f"{where}{key}: {words[kind]}, not {brief(found)}")
            return default
        return found

    def counted(self, raw: Mapping[str, Any], key: str, default: Any, where: str) -> Any:
        found = self.one(raw, key, int, default, where)
        if isinstance(found, int) and found < 1:
            self.note(f"{where}{key}: at least 1, not {found}")
            return default
        return found

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
        if at not in PLACES:
            self.note(f"at: where statistics are measured, base, tuned or both, not {at!r}")
        if at == "both" and rule == "learned":
            self.note("at: the rule learned trains between base and model; leave it out")
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

    def paired(self, key: str, models: Mapping[str, str]) -> dict[str, Any]:
        """A section with one entry a model, by name."""
        found = section(self.raw, key, self.problems)
        for name in found:
            if name not in models:
                hint = did_you_mean(name, list(models)) if models else "there are none"
                self.note(f"{key}: no model {name!r}; {hint}")
        return {n: v for n, v in found.items() if n in models}

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

    def tasks(self, models: Mapping[str, str]) -> dict[str, Task]:
        found = {}
        for name, entry in self.paired("tasks", models).items():
            where = f"tasks.{name}."
            if not isinstance(entry, Mapping) or not isinstance(entry.get("data"), str):
                self.note(f"tasks.{name}: a mapping with data, a .jsonl or .csv file")
                continue
            refuse_unknown(entry, TASK_KEYS, f"tasks.{name}: ", self.problems)
            kind = self.one(entry, "kind", str, "classification", where)
            if kind not in ("classification", "causal"):
                self.note(f"{where}kind: classification or causal, not {kind!r}")
            head = self.one(entry, "head", str, None, where)
            if kind == "classification" and head is None:
                self.note(f"{where}head: a classifier needs its head, a file that Suture wrote")
            length = self.counted(entry, "max_length", TOKENS.get(kind, 128), where)
            rows = self.counted(entry, "rows", None, where)
            data = self.folder / entry["data"]
            found[name] = Task(
                data, kind, None if head is None else self.folder / head,
                self.one(entry, "text", str, "text", where),
                self.one(entry, "label", str, "label", where), length, rows,
                self.counted(entry, "batch", 8, where), self.counted(entry, "draws", 1, where),
                self.language(entry, where, data, length, rows) if kind == "causal" else None,
            )  # fmt: skip
        return found

    def language(
        self, entry: Mapping[str, Any], where: str, data: Path, length: int, rows: int | None
    ) -> DataSpec:
        """Which columns a language model's rows have; chats go through its own template."""
        from suture.finetune.recipe import DataSpec, Source

        words = {key: self.one(entry, key, str, key, where)
                 for key in ("text", "prompt", "response", "messages")}  # fmt: skip
        kind = self.one(entry, "format", str, "", where)
        if kind not in ("", "text", "prompt", "chat"):
            self.note(f"{where}format: text, prompt or chat, not {kind!r}")
        return DataSpec(Source(str(data)), share=0.0, format=kind, max_length=length,
                        too_long="cut", limit=rows or 0, **words,
                        chat=self.one(entry, "chat", bool, False, where))  # fmt: skip


def plan_regions(
    source: Path | Mapping[str, Any],
    out: Path,
    *,
    folder: Path | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    values: bool = False,
) -> Plan:
    """Read a recipe, open its models, and check everything but the values of tensors.

    Args:
        source: a YAML file, or what stands in it.
        out: the folder to write.
        folder: where relative paths start; by default the file's folder or the current one.
        threads: default every core; changes no bit.
        overwrite: replace an older output.
        values: write the marked weights beside the bits: grafts.

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
        {} if rule is None or not recipe.needs(rule) else _material(recipe, rule, models, problems)
    )
    _check_place(out, [c for c in (base, *models.values()) if c is not None], overwrite, problems)
    problems.raise_if_any()
    assert base is not None
    assert rule is not None
    return Plan(recipe, rule, base, models, names, stats, material, out, threads, overwrite, values)


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
            base = open_checkpoint(recipe.base, folder)
    for name, path in recipe.models.items():
        with problems.collecting():
            models[name] = open_checkpoint(path, folder)
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
    recipe: Regions, rule: Rule, models: Mapping[str, Checkpoint], problems: Problems
) -> dict[str, Material]:
    """Rows and heads of the models that are to be measured; text only."""
    from suture.data import at_most, read_rows
    from suture.finetune.rows import check_language_records, records_of
    from suture.models import load_head

    found = {}
    for name, task in recipe.tasks.items():
        if name in recipe.stats:
            continue
        if name in models and not models[name].path.is_dir():
            problems.add(
                RecipeError, f"models.{name}: the rule {rule.name} runs the model: name its folder"
            )
        with problems.collecting():
            if task.language is not None:
                texts = records_of(task.language.train)[: task.rows]
                check_language_records(task.language, texts)
                found[name] = Material(texts, None)
                continue
            rows = read_rows(task.data, text=task.text, label=task.label)
            rows = rows if task.rows is None else at_most(rows, task.rows, seed=recipe.seed)
            head = None if task.head is None else load_head(task.head)
            strange = {r.label for r in rows} - set(head.labels) if head else set()
            if strange and head is not None:
                hint = did_you_mean(sorted(strange)[0], head.labels)
                raise RecipeError(
                    f"tasks.{name}: the head has no label {sorted(strange)[0]!r}; {hint}"
                )
            found[name] = Material(rows, head)
    return found


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
        stats = _stats_for(plan, model, prints, staging, say)
        masks[model] = _mask(plan, model, stats, prints, staging, stage)
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
    plan: Plan, model: str, stats: Stats | None, prints: Mapping[str, str], staging: Path,
    stage: Stage,
) -> dict[str, Any]:  # fmt: skip
    tuned, recipe = plan.models[model], plan.recipe
    density = recipe.densities[model]
    scoring = Scoring(plan.rule, plan.base, tuned, stats, recipe.seed, model, recipe.positive)
    about = {"rule": plan.rule.name, "density": density, "scope": recipe.scope,
             "base": prints["base"], "model": prints[model]}  # fmt: skip
    shapes = {n: plan.base.specs[n].shape for n in plan.names}
    path = staging / f"{model}.safetensors"
    reads = 2 * (plan.base.nbytes + tuned.nbytes)
    with MaskFile(path, shapes, about) as file:
        located = locate(scoring, plan.names, 1.0 if density is None else density, recipe.scope,
                         file.put, threads=plan.threads,
                         progress=stage(f"rank {model}", reads))  # fmt: skip
    if plan.values:
        bits = path.rename(staging / f".{model}.bits")
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
    path = staging / "stats" / f"{model}.safetensors"
    say(f"{'learning' if plan.rule.name == 'learned' else 'measuring'} {model}: "
        f"{len(plan.material[model].rows)} rows")  # fmt: skip
    try:
        if plan.recipe.at == "both":
            place = path.parent / "base" / path.name
            _measured(plan, model, "base", prints, say).save(place)
        at = "tuned" if plan.recipe.at == "both" else plan.recipe.at
        _measured(plan, model, at, prints, say).save(path)
    except SutureError as error:
        error.add_note(f"while measuring {model}")
        raise
    return Stats.load(path)


def _measured(plan: Plan, model: str, at: str, prints: Mapping[str, str], say: Say) -> Stats:
    from suture.data import tokenise
    from suture.finetune.rows import language_rows
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
        rows = language_rows(task.language, tokenizer, task.max_length, 0)
        data = rows.train
        for note in rows.notes:
            say(f"{model}: {note}")
    objective = objective_named(task.kind)
    say(f"{model}: {at} on {len(data)} rows")
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
                   facts=facts)  # fmt: skip


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


__all__ = ["Plan", "Regions", "Task", "execute", "lines", "plan_regions", "profile"]
