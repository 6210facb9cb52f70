"""The recipe of a localization: YAML to frozen types, all faults at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suture.errors import (
    Problems,
    brief,
    did_you_mean,
)
from suture.importance import Rule, likely_rule
from suture.recipe_types import read_space, refuse_unknown, section
from suture.roles import DEFAULT_SPACE, ParamSpace
from suture.stats import KINDS
from suture.tasks import Task, TaskReader

if TYPE_CHECKING:
    from suture.learned import LearnSettings

KEYS = ("base", "models", "rule", "density", "scope", "positive", "seed", "space", "stats", "tasks",
        "at", "learn", "measure", "keep_stats", "device", "without")  # fmt: skip
PLACES = ("base", "tuned", "both")


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
    keep_stats: bool = True
    """Whether what was measured stays beside the masks, which are much smaller."""
    without: Mapping[str, Path] = field(default_factory=dict)
    """Masks of entries that are never kept, by model."""
    raw: Mapping[str, Any] = field(default_factory=dict)
    """As it was written."""

    def needs(self, rule: Rule) -> tuple[str, ...]:
        """Every kind of statistics that is wanted."""
        return tuple(dict.fromkeys((*rule.needs, *self.measure)))


class _Reader(TaskReader):
    """Reads a recipe into ``Regions`` and notes everything that is wrong."""

    def regions(self) -> Regions:
        refuse_unknown(self.raw, KEYS, "", self.problems)
        base = self.one(self.raw, "base", str, "")
        if not base:
            self.refuse("base: missing; what the models were tuned from")
        models, densities = self.models()
        rule = self.one(self.raw, "rule", str, "magnitude")
        meant = likely_rule(rule)
        word = rule if meant is None else meant.name
        at = self.one(self.raw, "at", str, "tuned")
        if at not in PLACES:
            self.refuse(f"at: where statistics are measured, base, tuned or both, not {at!r}")
        if at == "both" and word == "learned":
            self.refuse("at: the rule learned trains between base and model; leave it out")
        seed = self.one(self.raw, "seed", int, 0)
        if not 0 <= seed < 2**63:
            self.refuse(f"seed: from 0 to 2**63 - 1, not {seed}")
        learn = section(self.raw, "learn", self.problems)
        settings = None
        if word == "learned":
            from suture.learned import settings_from

            settings = settings_from(learn, self.problems)
        elif learn:
            self.refuse(f"learn: belongs to the rule learned, not to {rule}")
        return Regions(
            base, models, densities, rule, self.one(self.raw, "scope", str, "global"),
            self.one(self.raw, "positive", bool, False), seed,
            read_space(self.raw, self.problems),
            self.stats(models), self.tasks(models), at, settings, self.measured(word),
            self.one(self.raw, "device", str, "cpu"),
            self.one(self.raw, "keep_stats", bool, True), self.without(models), dict(self.raw),
        )  # fmt: skip

    def models(self) -> tuple[dict[str, str], dict[str, float | None]]:
        paths: dict[str, str] = {}
        densities: dict[str, float | None] = {}
        entries = section(self.raw, "models", self.problems)
        if not entries:
            self.refuse("models: a mapping from names to paths, with at least one model")
        for name, entry in entries.items():
            found = {"path": entry} if isinstance(entry, str) else entry
            if not isinstance(found, Mapping) or not isinstance(found.get("path"), str):
                self.refuse(f"models.{name}: a path, or a mapping with a path, not {brief(entry)}")
                continue
            refuse_unknown(found, ("path", "density"), f"models.{name}: ", self.problems)
            if name in ("base", "stats", "") or not name.isprintable() or set(name) & set("/\\"):
                self.refuse(f"models: {name!r} cannot be the name of a mask file")
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
            self.refuse(f"{where}: the share of entries kept, in (0, 1]; got {brief(found)}")
            return 1.0  # refused already; without a number it would be called missing, too
        return float(found)

    def measured(self, rule: str) -> tuple[str, ...]:
        """The kinds that are measured besides."""
        found = self.raw.get("measure", [])
        if not isinstance(found, list) or not all(isinstance(k, str) for k in found):
            self.refuse(f"measure: a list of kinds of statistics, not {brief(found)}")
            return ()
        for kind in found:
            if kind not in KINDS or kind == "logit":
                known = [k for k in KINDS if k != "logit"]
                self.refuse(f"measure: no statistics {kind!r}; {did_you_mean(kind, known)}")
        if found and rule == "learned":
            self.refuse("measure: the rule learned trains and measures nothing; use another recipe")
        return tuple(k for k in found if k in KINDS)

    def stats(self, models: Mapping[str, str]) -> dict[str, Path]:
        return self.files("stats", self.paired("stats", models))

    def without(self, models: Mapping[str, str]) -> dict[str, Path]:
        one = self.raw.get("without")
        if isinstance(one, str):
            return self.files("without", dict.fromkeys(models, one))
        return self.files("without", self.paired("without", models))

    def files(self, key: str, entries: Mapping[str, Any]) -> dict[str, Path]:
        found = {}
        for name, value in entries.items():
            if isinstance(value, str) and value:
                found[name] = self.place(value)
            else:
                self.refuse(f"{key}.{name}: a file, not {brief(value)}")
        return found


def regions_from(raw: Mapping[str, Any], folder: Path, problems: Problems) -> Regions:
    """The request that a recipe makes; everything that is wrong with it is noted.

    Args:
        raw: what stands in the recipe.
        folder: where relative paths start.
        problems: takes the notes.
    """
    return _Reader(raw, folder, problems).regions()


__all__ = ["Regions", "regions_from"]
