"""What to analyse: the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import Field

from suture.errors import Problems, brief, did_you_mean
from suture.schema.fields import (
    Count,
    Factors,
    Listed,
    ModelPath,
    Models,
    NamedEntries,
    Numbers,
    OtherModels,
    Says,
    Seed,
    Space,
    Word,
)
from suture.schema.read import read
from suture.schema.sections import Faults, Recipe, Section, check
from suture.tensors.roles import DEFAULT_SPACE
from suture.training.task_rows import Task

ANALYSES = {
    "geometry": "norms by layer and role, dot products, angles",
    "conflicts": "where experts move entries in opposite directions",
    "overlap": "masks compared, beside what chance would give, and where they lie",
    "bases": "a few vectors that stand for many task vectors",
    "diagnostics": "loss, gradient and smoothness on the way from each expert to a merge",
    "masks": "intersection over union of masks, beside four baselines",
    "structure": "where masks lie, layer by layer and part by part",
    "disentanglement": "how much two task vectors disturb each other, over the amounts of both",
    "function-localization": "what every task vector does on the rows of every task",
    "sensitivity": "whether entries that matter little to one task matter little to the others",
}
ASKED = ("masks", "structure", "disentanglement", "function-localization", "sensitivity")
"""Analyses that are made only where the recipe names them: they take long."""
MASKED = ("overlap", "masks", "structure")
"""Analyses of masks."""
CLASSES = ("disentanglement", "function-localization", "sensitivity")
"""Analyses that ask classifiers about rows of every task."""
MOST_POINTS = 101
Kind = Literal["autoencoder", "spectral", "pca", "clusters", "random"]
MaskFolder = Annotated[str, MinLen(1), Says("a folder with a mask for each model")]


class BasisRequest(Section):
    """Which bases to find, and which to write."""

    kinds: Annotated[tuple[Kind, ...], Listed()] = (
        "autoencoder", "spectral", "pca", "clusters", "random",
    )  # fmt: skip
    """Which bases are found."""
    size: int | None = None
    """Vectors of a basis; by default one less than models, or what the eigengap chooses."""
    write: Annotated[tuple[Kind, ...], Listed()] = ()
    """Bases whose vectors are written as checkpoints."""

    @check
    def _written_ones_are_found(self) -> Faults:
        for kind in self.write:
            if kind not in self.kinds:
                yield "write", f"{kind!r} is not known; {did_you_mean(kind, self.kinds)}"


class DiagnosticsRequest(Section):
    """Which merge is diagnosed, and how closely."""

    weights: Factors = {}
    """Factors on the task vectors, one for all or by model; without any, the plain average."""
    merged: ModelPath | None = None
    """A merged model, instead of factors."""
    rows: Count = 256
    """Most rows of a task."""
    iterations: Count = 20
    """Products with second derivatives at most."""
    directions: Annotated[int, Ge(0), Says("a whole number from 0 on")] = 4
    """Random directions."""
    points: Annotated[int, Ge(2), Says("a whole number from 2 on")] = 11
    """On the way."""
    dtype: Literal["float32", "float64"] = "float32"
    """What losses are computed in; ``float64`` where moves are small."""

    @check
    def _one_merge(self) -> Faults:
        if self.weights != {} and self.merged is not None:
            yield "", "give weights or a merged model, not both"


class GridRequest(Section):
    """Where disentanglement is measured, and what is compared."""

    amounts: Numbers = tuple(n / 2 for n in range(-4, 5))
    """Factors on either task vector; or give a `range` with `points`."""
    range: Annotated[Numbers, Field(exclude=True)] = (-2.0, 2.0)
    """The lowest and the highest amount."""
    points: Annotated[Count, Field(exclude=True)] = 9
    """Amounts from one end of the range to the other."""
    metric: Literal["classes", "features"] = "classes"
    """What is compared."""

    @check
    def _amounts_or_a_range(self) -> Faults:
        if "amounts" in self.model_fields_set and {"range", "points"} & self.model_fields_set:
            yield "", "give amounts, or a range with points, not both"
        if len(self.range) != 2 or not self.range[0] < self.range[1]:
            yield "range", f"two numbers that go up, not {brief(list(self.range))}"
        if self.points > MOST_POINTS:
            yield "points", f"at most {MOST_POINTS}, not {self.points}"

    @check
    def _a_grid(self) -> Faults:
        if not 2 <= len({*self.amounts}) == len(self.amounts) <= MOST_POINTS:
            yield "amounts", (f"a grid has from 2 to {MOST_POINTS} different amounts, not "
                              f"{len(self.amounts)}: {brief(list(self.amounts))}")  # fmt: skip
        if self.points == 1:
            yield "points", f"a grid has from 2 to {MOST_POINTS} different amounts, not 1"

    def settled(self) -> Mapping[str, Any]:
        """Return the amounts, in order."""
        if "amounts" in self.model_fields_set:
            return {"amounts": tuple(sorted(self.amounts))}
        low, high = self.range
        step = (high - low) / (self.points - 1)
        amounts = tuple(round(low + n * step, 12) for n in range(self.points))
        return {"amounts": amounts}


class SensitivityRequest(Section):
    """What is set to 0, and how it is chosen."""

    shares: Annotated[
        tuple[Annotated[float, Gt(0), Lt(1)], ...], MinLen(1), Listed(one=False, different=False),
        Says("shares of the weights, in (0, 1)"),
    ] = (0.01, 0.05, 0.1, 0.2)  # fmt: skip
    """Each share of the weights is set to 0: the least sensitive, the most, and random ones."""
    rows: Count = 256
    """Rows that sensitivities are measured on."""


class Request(Recipe):
    """A look at several task vectors, key by key."""

    absent = {"base": "", "models": {}}

    base: ModelPath
    """What the models were fine-tuned from, a path or hub id."""
    models: Models
    """The fine-tuned models by name."""
    unseen: OtherModels = {}
    """Models that no basis is made of; the nearest basis vector is named for each."""
    analyses: Annotated[
        tuple[Literal[tuple(ANALYSES)], ...], Listed(different=False)  # type: ignore[valid-type]
    ] = ()  # fmt: skip
    """By default all that the recipe gives the inputs for, but those that take long."""
    density: Annotated[float, Gt(0), Le(1), Says("the share of entries kept, in (0, 1]")] | None = (
        None
    )
    """Of masks by magnitude; conflicts count only what they keep."""
    scope: Literal["global", "layer", "tensor"] = "global"
    """Where the share of `density` is counted."""
    masks: MaskFolder | None = None
    """A folder with a mask for each model, instead of masks by magnitude."""
    same_task: MaskFolder | None = None
    """A folder with masks of the same tasks made anew: the most that masks can have in common."""
    bases: BasisRequest = BasisRequest()
    space: Space = DEFAULT_SPACE
    """The tensors that are looked at."""
    seed: Seed = 0
    """Of what is drawn at random."""
    tasks: Annotated[Mapping[str, Task], NamedEntries(
        ".*", "", "a mapping from names of models to their rows"
    )] = {}  # fmt: skip
    """Rows of some models, for the analyses that run the model."""
    diagnostics: DiagnosticsRequest = DiagnosticsRequest()
    disentanglement: GridRequest = GridRequest()
    sensitivity: SensitivityRequest = SensitivityRequest()
    rows: Count = 512
    """Most rows of a task that classifiers are asked about."""
    device: Word = "cpu"
    """Where it is computed: auto, cpu or cuda."""

    @property
    def made(self) -> tuple[str, ...]:
        """The analyses that are asked for, or those that have their inputs."""
        if "analyses" in self.model_fields_set:
            return self.analyses
        masked, several = self.density is not None or self.masks is not None, len(self.models) > 1
        fitting = {"overlap": masked, "conflicts": several, "bases": several,
                   "diagnostics": bool(self.tasks)}  # fmt: skip
        return tuple(a for a in ANALYSES if a not in ASKED and fitting.get(a, True))

    @check
    def _unseen_are_others(self) -> Faults:
        for name in sorted(self.models.keys() & self.unseen.keys()):
            yield f"unseen.{name}", "is one of the models, too; give it another name"

    @check
    def _names_are_models(self) -> Faults:
        known = list(self.models)
        for key, given in (
            ("tasks", self.tasks),
            ("diagnostics.weights", self.diagnostics.weights),
        ):
            for name in given if isinstance(given, Mapping) else ():
                if name not in known:
                    hint = did_you_mean(name, known) if known else "there are none"
                    yield key, f"no model {name!r}; {hint}"

    @check
    def _masks_are_there(self) -> Faults:
        if self.density is None and self.masks is None:
            for name in (n for n in MASKED if n in self.analyses):
                what = "shows" if name == "structure" else "compares"
                yield "analyses", f"{name} {what} masks; give a density, or a folder as `masks`"

    @check
    def _rows_are_there(self) -> Faults:
        if "diagnostics" in self.analyses and not self.tasks:
            yield "analyses", "diagnostics run the model; give rows under `tasks`"

    @check
    def _models_are_several(self) -> Faults:
        for name in ("conflicts", "bases", "masks", *CLASSES):
            if name in self.analyses and len(self.models) == 1:
                yield "analyses", f"{name} takes two models or more"

    @check
    def _classifiers_have_rows(self) -> Faults:
        asked = next((name for name in CLASSES if name in self.analyses), None)
        for name in self.models if asked else ():
            if name not in self.tasks:
                yield "analyses", (f"{asked} asks every model about every task; give rows of "
                                   f"{name!r} under `tasks`")  # fmt: skip
        for name, task in self.tasks.items() if asked else ():
            if task.kind != "classification":
                yield "analyses", (f"{asked} compares classes; tasks.{name} is {task.kind}, "
                                   "without any")  # fmt: skip

    @check
    def _sections_are_asked_for(self) -> Faults:
        if self.same_task is not None and "masks" not in self.made:
            yield "same_task", "belongs to the analysis masks; add it to `analyses`"
        for key in ("disentanglement", "sensitivity"):
            if getattr(self, key).model_fields_set and key not in self.made:
                yield key, "is an analysis that was not asked for; add it to `analyses`"

    @check
    def _diagnostics_have_rows(self) -> Faults:
        if self.diagnostics.model_fields_set and not self.tasks:
            yield "diagnostics", "belong to rows; give data for a model under `tasks`"

    @check
    def _bases_are_small(self) -> Faults:
        size, most = self.bases.size, len(self.models)
        if size is not None and not 1 <= size <= max(1, most):
            yield "bases.size", f"from 1 to {most}, the number of models, not {size}"

    def settled(self) -> Mapping[str, Any]:
        """Return the analyses that are made."""
        return {"analyses": self.made}

    def resolved(self) -> dict[str, Any]:
        """Return the request with every default, but for what its analyses do not need."""
        idle = {key for key in ("disentanglement", "sensitivity") if key not in self.analyses}
        idle |= set() if {*CLASSES} & {*self.analyses} else {"rows"}
        idle |= set() if self.tasks else {"tasks", "diagnostics", "device"}
        found = self.model_dump(mode="json", exclude=idle)
        return {k: v for k, v in found.items() if v is not None}


def read_request(
    source: Path | Mapping[str, Any], folder: Path | None, problems: Problems
) -> Request | None:
    """Read an analysis recipe; faults are noted in ``problems``, ``None`` where nothing is left."""
    return read(Request, source, problems, folder, whole=False)
