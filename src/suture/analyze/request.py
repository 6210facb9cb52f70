"""What to analyse: a recipe read into a frozen value, every fault found at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from suture.analysis import BASES
from suture.errors import Problems, brief, did_you_mean
from suture.recipe import raw_recipe
from suture.recipe_types import Reader, read_space, refuse_unknown, section
from suture.roles import DEFAULT_SPACE, ParamSpace
from suture.select import SCOPES
from suture.tasks import Task, TaskReader

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
METRICS = ("classes", "features")
MOST_POINTS = 101
_KEYS = ("base", "models", "unseen", "analyses", "density", "scope", "masks", "bases", "space",
         "seed", "tasks", "diagnostics", "device", "same_task", "disentanglement", "sensitivity",
         "rows")  # fmt: skip


@dataclass(frozen=True)
class BasisRequest:
    """Which bases to find, and which to write."""

    kinds: tuple[str, ...] = tuple(BASES)
    size: int | None = None
    write: tuple[str, ...] = ()


@dataclass(frozen=True)
class DiagnosticsRequest:
    """Which merge is diagnosed, and how closely."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """Factors on the task vectors; without any, the plain average."""
    merged: str | None = None
    """A merged model, instead of factors."""
    rows: int = 256
    """Most rows of a task."""
    iterations: int = 20
    """Products with second derivatives at most."""
    directions: int = 4
    """Random directions."""
    points: int = 11
    """On the way."""
    dtype: str = "float32"
    """What losses are computed in; ``float64`` where moves are small."""


@dataclass(frozen=True)
class GridRequest:
    """Where disentanglement is measured, and what is compared."""

    amounts: tuple[float, ...] = tuple(n / 2 for n in range(-4, 5))
    metric: str = "classes"


@dataclass(frozen=True)
class SensitivityRequest:
    """What is set to 0, and how it is chosen."""

    shares: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2)
    rows: int = 256
    """Rows that sensitivities are measured on."""


@dataclass(frozen=True)
class Request:
    """What to analyse; after ``read_request`` every key is known and every value checked."""

    base: str
    models: Mapping[str, str]
    unseen: Mapping[str, str] = field(default_factory=dict)
    """Models that no basis is made of; the nearest basis vector is named for each."""
    analyses: tuple[str, ...] = tuple(ANALYSES)
    density: float | None = None
    """Of masks by magnitude; conflicts count only what they keep."""
    scope: str = "global"
    masks: str | None = None
    """A folder with a mask for each model, instead of masks by magnitude."""
    same_task: str | None = None
    """A folder with masks of the same tasks made anew: the most that masks can have in common."""
    bases: BasisRequest = BasisRequest()
    space: ParamSpace = DEFAULT_SPACE
    seed: int = 0
    tasks: Mapping[str, Task] = field(default_factory=dict)
    """Rows of some models, for the analyses that run the model."""
    diagnostics: DiagnosticsRequest = DiagnosticsRequest()
    disentanglement: GridRequest = GridRequest()
    sensitivity: SensitivityRequest = SensitivityRequest()
    rows: int = 512
    """Most rows of a task that classifiers are asked about."""
    device: str = "cpu"
    folder: Path = Path()
    """Where relative paths start."""

    def to_dict(self) -> dict[str, Any]:
        """The request with every default written out, as data that can be read again."""
        found = asdict(self)
        del found["folder"]
        found["tasks"] = {
            m: {k: str(v) if isinstance(v, Path) else v for k, v in task.items() if v is not None}
            for m, task in found["tasks"].items()
        }
        for name in ("disentanglement", "sensitivity"):
            if name not in self.analyses:
                del found[name]
        if not set(CLASSES) & set(self.analyses):
            del found["rows"]
        if not self.tasks:
            for key in ("tasks", "diagnostics", "device"):
                del found[key]
        elif self.diagnostics.merged is None:
            del found["diagnostics"]["merged"]
        found["space"] = {k: list(v) for k, v in self.space._asdict().items()}
        return {k: v for k, v in found.items() if v is not None}


def read_request(
    source: Path | Mapping[str, Any], folder: Path | None, problems: Problems
) -> Request | None:
    """Read an analysis recipe; faults are noted in ``problems``, ``None`` where nothing is left."""
    with problems.collecting():
        raw, where = raw_recipe(source, folder, problems)
        return _Reader(raw, where, problems).request()
    return None


class _Reader(Reader):
    """Reads a mapping key by key and notes every fault."""

    def request(self) -> Request:
        folder = self.folder
        refuse_unknown(self.raw, _KEYS, "", self.problems)
        base = self.raw.get("base")
        if not isinstance(base, str):
            self.refuse("base: name what the models were fine-tuned from, a path or hub id")
            base = ""
        models = self.models("models")
        if not models:
            self.refuse("models: a mapping from names to paths, with at least one model")
        unseen = self.models("unseen") if self.raw.get("unseen") is not None else {}
        for name in sorted(models.keys() & unseen.keys()):
            self.refuse(f"unseen.{name}: is one of the models, too; give it another name")
        density = self.density()
        masks = self.raw.get("masks")
        if masks is not None and not isinstance(masks, str):
            self.refuse(f"masks: a folder with a mask for each model, not {brief(masks)}")
        again = self.raw.get("same_task")
        if again is not None and not isinstance(again, str):
            self.refuse(f"same_task: a folder with a mask for each model, not {brief(again)}")
        tasks = TaskReader(self.raw, folder, self.problems).tasks(models)
        analyses = self.analyses(density, masks, len(models), bool(tasks))
        self.classifiers(analyses, models, tasks)
        if again is not None and "masks" not in analyses:
            self.refuse("same_task: belongs to the analysis masks; add it to `analyses`")
        scope = self.raw.get("scope", "global")
        if scope not in SCOPES:
            self.refuse(f"scope: {brief(scope)}; {did_you_mean(str(scope), SCOPES)}")
        seed = self.raw.get("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            self.refuse(f"seed: a whole number from 0 to 2**63 - 1, not {brief(seed)}")
        return Request(
            base, models, unseen, analyses, density, str(scope), masks,
            again if isinstance(again, str) else None,
            self.bases(len(models)), read_space(self.raw, self.problems), seed, tasks,
            self.diagnostics(models, tasks), self.grid(analyses), self.shares(analyses),
            self.count("rows", self.raw, 512, ""), self.word("device", self.raw, "cpu"), folder,
        )  # fmt: skip

    def words(self, value: object, where: str, known: Sequence[str]) -> tuple[str, ...]:
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            self.refuse(f"{where}: a list of words, not {brief(value)}")
            return ()
        for word in words:
            if known and word not in known:
                self.refuse(f"{where}: {word!r} is not known; {did_you_mean(word, known)}")
        return tuple(words)

    def models(self, key: str) -> dict[str, str]:
        found = {}
        for name, path in section(self.raw, key, self.problems).items():
            path = path.get("path") if isinstance(path, Mapping) else path
            if not isinstance(path, str):
                self.refuse(f"{key}.{name}: a path or hub id, not {brief(path)}")
                continue
            if name == "base" or not name or not name.isprintable():
                self.refuse(f"{key}: {name!r} cannot be the name of a model")
            found[name] = path
        return found

    def density(self) -> float | None:
        found = self.raw.get("density")
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found <= 1:
            self.refuse(f"density: the share of entries kept, in (0, 1], not {brief(found)}")
            return None
        return float(found)

    def word(self, key: str, raw: Mapping[str, Any], default: str, where: str = "") -> str:
        found = raw.get(key, default)
        if not isinstance(found, str):
            self.refuse(f"{where}{key}: a word, not {brief(found)}")
            return default
        return found

    def diagnostics(
        self, models: Mapping[str, str], tasks: Mapping[str, Task]
    ) -> DiagnosticsRequest:
        raw = section(self.raw, "diagnostics", self.problems)
        default = DiagnosticsRequest()
        where = "diagnostics."
        refuse_unknown(raw, [f.name for f in fields(default)], "diagnostics: ", self.problems)
        if raw and not tasks:
            self.refuse("diagnostics: belong to rows; give data for a model under `tasks`")
        counts = {}
        for key, least in (("rows", 1), ("iterations", 1), ("directions", 0), ("points", 2)):
            found = raw.get(key, getattr(default, key))
            if isinstance(found, bool) or not isinstance(found, int) or found < least:
                self.refuse(f"{where}{key}: a whole number from {least} on, not {brief(found)}")
                found = getattr(default, key)
            counts[key] = found
        dtype = self.word("dtype", raw, default.dtype, where)
        if dtype not in ("float32", "float64"):
            self.refuse(f"{where}dtype: float32 or float64, not {dtype!r}")
        merged = raw.get("merged")
        if merged is not None and not isinstance(merged, str):
            self.refuse(f"{where}merged: a path or hub id, not {brief(merged)}")
            merged = None
        weights = self.weights(raw, models)
        if weights and merged is not None:
            self.refuse("diagnostics: give weights or a merged model, not both")
        return DiagnosticsRequest(weights, merged, **counts, dtype=dtype)

    def weights(self, raw: Mapping[str, Any], models: Mapping[str, str]) -> dict[str, float]:
        given = raw.get("weights", {})
        if isinstance(given, int | float) and not isinstance(given, bool):
            given = dict.fromkeys(models, given)
        if not isinstance(given, Mapping):
            self.refuse(f"diagnostics.weights: a number, or one for each model, not {brief(given)}")
            return {}
        found = {}
        for name, value in given.items():
            if name not in models:
                hint = did_you_mean(str(name), list(models)) if models else "there are none"
                self.refuse(f"diagnostics.weights: no model {name!r}; {hint}")
            elif (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
            ):
                self.refuse(f"diagnostics.weights.{name}: a number, not {brief(value)}")
            else:
                found[name] = float(value)
        return found

    def analyses(
        self, density: float | None, masks: object, models: int, rows: bool
    ) -> tuple[str, ...]:
        masked = density is not None or masks is not None
        if self.raw.get("analyses") is None:
            fitting = {"overlap": masked, "conflicts": models > 1, "bases": models > 1,
                       "diagnostics": rows}  # fmt: skip
            return tuple(a for a in ANALYSES if a not in ASKED and fitting.get(a, True))
        found = self.words(self.raw["analyses"], "analyses", list(ANALYSES))
        for name in MASKED:
            if name in found and not masked:
                what = "shows" if name == "structure" else "compares"
                self.refuse(
                    f"analyses: {name} {what} masks; give a density, or a folder as `masks`"
                )
        if "diagnostics" in found and not rows:
            self.refuse("analyses: diagnostics run the model; give rows under `tasks`")
        for name in ("conflicts", "bases", "masks", *CLASSES):
            if name in found and models == 1:
                self.refuse(f"analyses: {name} takes two models or more")
        return found

    def classifiers(
        self, analyses: Sequence[str], models: Mapping[str, str], tasks: Mapping[str, Task]
    ) -> None:
        """Refuse models without rows, and rows that have no classes."""
        asked = [name for name in CLASSES if name in analyses]
        if not asked:
            return
        given = self.raw.get("tasks")
        for name in models:
            if name not in tasks and not (isinstance(given, Mapping) and name in given):
                self.refuse(f"analyses: {asked[0]} asks every model about every task; give rows "
                            f"of {name!r} under `tasks`")  # fmt: skip
        for name, task in tasks.items():
            if task.kind != "classification":
                self.refuse(f"analyses: {asked[0]} compares classes; tasks.{name} is {task.kind}, "
                            "without any")  # fmt: skip

    def count(self, key: str, raw: Mapping[str, Any], default: int, where: str) -> int:
        found = raw.get(key, default)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            self.refuse(f"{where}{key}: a whole number from 1 on, not {brief(found)}")
            return default
        return found

    def numbers(self, value: object, where: str) -> tuple[float, ...] | None:
        if not isinstance(value, list | tuple) or not all(
            isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
            for v in value
        ):
            self.refuse(f"{where}: a list of numbers, not {brief(value)}")
            return None
        return tuple(map(float, value))

    def section_of(
        self, key: str, known: Sequence[str], analyses: Sequence[str]
    ) -> Mapping[str, Any]:
        raw = section(self.raw, key, self.problems)
        refuse_unknown(raw, known, f"{key}: ", self.problems)
        if raw and key not in analyses:
            self.refuse(f"{key}: is an analysis that was not asked for; add it to `analyses`")
        return raw

    def grid(self, analyses: Sequence[str]) -> GridRequest:
        key = "disentanglement"
        raw = self.section_of(key, ("amounts", "range", "points", "metric"), analyses)
        metric = self.word("metric", raw, "classes", f"{key}.")
        if metric not in METRICS:
            self.refuse(f"{key}.metric: {metric!r}; {did_you_mean(metric, METRICS)}")
        if "amounts" in raw:
            if {"range", "points"} & raw.keys():
                self.refuse(f"{key}: give amounts, or a range with points, not both")
            amounts = self.numbers(raw["amounts"], f"{key}.amounts")
        else:
            ends = self.numbers(raw.get("range", (-2.0, 2.0)), f"{key}.range")
            points = self.count("points", raw, 9, f"{key}.")
            if ends is not None and (len(ends) != 2 or not ends[0] < ends[1]):
                self.refuse(f"{key}.range: two numbers that go up, not {brief(raw['range'])}")
                ends = None
            width = (ends[1] - ends[0]) / max(1, points - 1) if ends else 0.0
            amounts = None
            if ends and points <= MOST_POINTS:
                amounts = tuple(round(ends[0] + n * width, 12) for n in range(points))
            elif ends:
                self.refuse(f"{key}.points: at most {MOST_POINTS}, not {points}")
        if amounts is None:
            return GridRequest(metric=metric)
        if not 2 <= len(set(amounts)) == len(amounts) <= MOST_POINTS:
            self.refuse(
                f"{key}: a grid has from 2 to {MOST_POINTS} different amounts, not {len(amounts)}: "
                f"{brief(list(amounts))}"
            )
        return GridRequest(tuple(sorted(amounts)), metric)

    def shares(self, analyses: Sequence[str]) -> SensitivityRequest:
        raw = self.section_of("sensitivity", ("shares", "rows"), analyses)
        default = SensitivityRequest()
        found = self.numbers(raw.get("shares", default.shares), "sensitivity.shares")
        if found is not None and not (found and all(0 < share < 1 for share in found)):
            self.refuse(
                f"sensitivity.shares: shares of the weights, in (0, 1), not {brief(list(found))}"
            )
        rows = self.count("rows", raw, default.rows, "sensitivity.")
        return SensitivityRequest(found or default.shares, rows)

    def bases(self, models: int) -> BasisRequest:
        raw = section(self.raw, "bases", self.problems)
        refuse_unknown(raw, ("kinds", "size", "write"), "bases: ", self.problems)
        kinds = self.words(raw.get("kinds", list(BASES)), "bases.kinds", list(BASES))
        write = self.words(raw.get("write", []), "bases.write", kinds or list(BASES))
        size = raw.get("size")
        if size is not None and (
            isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= max(1, models)
        ):
            self.refuse(f"bases.size: from 1 to {models}, the number of models, not {brief(size)}")
            size = None
        return BasisRequest(kinds, size, write)
