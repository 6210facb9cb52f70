"""The recipe of a localization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le
from pydantic import Field

from suture.edits.importance import RULES, Rule
from suture.errors import did_you_mean
from suture.schema.fields import (
    Becomes,
    FilePath,
    Files,
    Listed,
    ModelPath,
    NamedEntries,
    Says,
    Seed,
    Space,
    Word,
    plain,
    section_of,
)
from suture.schema.sections import Faults, Recipe, Section, check
from suture.schema.tuning import LEARN_PRESETS, LearnSettings
from suture.tensors.roles import DEFAULT_SPACE
from suture.training.task_rows import Task

Density = Annotated[float, Gt(0), Le(1), Says("the share of entries kept, in (0, 1]")]
PRESET = Field(description="The other keys' defaults: `released` has those of the published code.")
LearnKeys = section_of(
    LearnSettings, {"preset": (Annotated[Literal[tuple(LEARN_PRESETS)], PRESET], "default")}
)  # fmt: skip


def _learn(keys: Section, _: Path) -> LearnSettings:
    given = keys.model_dump(exclude_unset=True)
    return replace(LEARN_PRESETS[given.pop("preset", "default")], **given)


class TunedModel(Section):
    """A model whose mask is made."""

    short = "path"
    shape = "a path, or a mapping with a path"
    absent = {"density": 1.0}

    path: ModelPath
    """A folder, a file, a hub id, or BASE+ADAPTER."""
    density: Density | None = None
    """Of this mask; by default that of the recipe."""


class Regions(Recipe):
    """A localization: which entries carry which skill, key by key."""

    absent = {"base": "", "models": {}, "density": 1.0}

    base: ModelPath
    """What the models were tuned from."""
    models: Annotated[Mapping[str, TunedModel], NamedEntries(
        r"[^/\\]+", "cannot be the name of a mask file",
        "a mapping from names to paths, with at least one model", taken=("base", "stats"), least=1,
    )]  # fmt: skip
    """The fine-tuned models by name."""
    rule: Word = "magnitude"
    """The line of the table by which entries are ranked."""
    density: Density | None = None
    """The share of entries kept."""
    scope: Word = "global"
    """Where the share is counted: global, layer or tensor."""
    positive: bool = False
    """Whether only entries above 0 are kept."""
    seed: Seed = 0
    """Of the rule random."""
    space: Space = DEFAULT_SPACE
    """The tensors in which masks lie."""
    stats: Annotated[Mapping[str, FilePath], NamedEntries(
        ".*", "", "a mapping from names of models to files of statistics"
    )] = {}  # fmt: skip
    """Statistics that were measured before, by model."""
    tasks: Annotated[Mapping[str, Task], NamedEntries(
        ".*", "", "a mapping from names of models to their rows"
    )] = {}  # fmt: skip
    """Rows by model, for rules that measure."""
    at: Literal["tuned", "base", "both"] = "tuned"
    """Where statistics are measured."""
    learn: Annotated[LearnSettings, Becomes(LearnKeys, _learn, plain)] | None = None
    """How masks are trained, by the rule learned."""
    measure: Annotated[
        tuple[Literal["fisher", "empirical_fisher", "abs_grad", "grad", "input_norm", "gram"], ...],
        Listed(one=False),
    ] = ()  # fmt: skip
    """Statistics that are kept besides those that the rule needs, for merges by statistics."""
    keep_stats: bool = True
    """Whether what was measured stays beside the masks, which are much smaller."""
    device: Word = "cpu"
    """Where it is computed: auto, cpu or cuda."""
    without: Files = {}
    """Masks of entries that are never kept, one for all models or one for each."""

    @property
    def densities(self) -> dict[str, float | None]:
        """The density of each model's mask."""
        return {n: m.density or self.density for n, m in self.models.items()}

    @property
    def masks_without(self) -> Mapping[str, Path]:
        """The masks of entries that are never kept, by model."""
        given = self.without
        return given if isinstance(given, Mapping) else dict.fromkeys(self.models, given)

    @property
    def meant(self) -> str:
        """The rule, or that which a misspelt one is likely to mean."""
        found = RULES.likely(self.rule)
        return self.rule if found is None else found.name

    def needs(self, rule: Rule) -> tuple[str, ...]:
        """Every kind of statistics that is wanted."""
        return tuple(dict.fromkeys((*rule.needs, *self.measure)))

    @check
    def _names_are_models(self) -> Faults:
        known = list(self.models)
        for key in ("stats", "tasks", "without"):
            given = getattr(self, key)
            for name in given if isinstance(given, Mapping) else ():
                if name not in known:
                    hint = did_you_mean(name, known) if known else "there are none"
                    yield key, f"no model {name!r}; {hint}"

    @check
    def _learning_is_asked_for(self) -> Faults:
        if self.learn is not None and self.meant != "learned":
            yield "learn", f"belongs to the rule learned, not to {self.rule}"

    @check
    def _learning_has_its_place(self) -> Faults:
        if self.at == "both" and self.meant == "learned":
            yield "at", "the rule learned trains between base and model; leave it out"

    @check
    def _learning_measures_nothing(self) -> Faults:
        if self.measure and self.meant == "learned":
            yield "measure", "the rule learned trains and measures nothing; use another recipe"

    def settled(self) -> Mapping[str, Any]:
        """Return the settings of learning, and only what belongs to a model."""
        learn = LearnSettings() if self.meant == "learned" and self.learn is None else self.learn
        known = {key: {n: v for n, v in getattr(self, key).items() if n in self.models}
                 for key in ("stats", "tasks")}  # fmt: skip
        return {"learn": learn, **known}


__all__ = ["Regions", "TunedModel"]
