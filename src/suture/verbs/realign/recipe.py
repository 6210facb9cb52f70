"""The recipe of a realignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le, Lt, MinLen

from suture.errors import Problems
from suture.schema.fields import DtypeName, ModelPath, NamedEntries, Says, Seed, Word, space_of
from suture.schema.read import read
from suture.schema.rows import how_to_train, rows_of
from suture.schema.sections import Faults, Recipe, Section, check
from suture.schema.settings import line_faults, settings
from suture.schema.sources import DataSpec, PairSpec
from suture.schema.table import Table
from suture.schema.tuning import TuneSettings
from suture.tensors.roles import EVERYTHING, ParamSpace
from suture.tensors.spec import WORD_OF
from suture.verbs.realign.fusing import FUSES, Fusing
from suture.verbs.realign.methods import REALIGNERS, Realigner

TRAINING = TuneSettings(
    epochs=3, batch=4, accumulate=4, lr=5e-3, warmup=0.0, schedule="cosine", weight_decay=0.0
)
"""That of the published code."""
MEANT = {
    "base": "the pretrained model that the aligned one was made of",
    "safety": "a model tuned from the aligned one on safety data alone",
    "data": "pairs of a safe (`chosen`) and an unsafe (`rejected`) answer",
}
Weight = Annotated[float, Gt(-(2**63)), Lt(2**63), Says("a number")]


class TunedModel(Section):
    """A model that fine-tuning made less safe."""

    short = "path"
    shape = "a path, or a mapping with a path"

    path: ModelPath
    """A folder, a file, a hub id, or BASE+ADAPTER."""
    weight: Weight = 1.0
    """Factor on its task vector."""


class Fuse(Section):
    """How task vectors become one change."""

    short = "how"
    shape = f"one of {', '.join(FUSES)} or a mapping"

    how: Literal[tuple(FUSES)] | None = None  # type: ignore[valid-type]
    """By default single for one model, and average for several."""
    coefficient: Weight | None = None
    """Factor on the result; by default that of the published code."""
    density: Annotated[float, Gt(0), Le(1), Says("the share kept, in (0, 1]")] | None = None
    """The share of entries that each task keeps, of ties and dare."""
    scope: Literal["global", "tensor"] = "global"
    """Over which tensors the entries of a task compete in ties."""
    seed: Seed = 0
    """Of the entries that dare drops, in everything but the steps of training."""

    def fusing(self, tasks: int) -> Fusing:
        """Return what holds for so many tasks."""
        how = self.how or ("single" if tasks < 2 else "average")
        line = FUSES[how]
        factor = line.coefficient if self.coefficient is None else self.coefficient
        return Fusing(how, factor, self.density or line.density, self.scope, self.seed)


class Output(Section):
    """What is written."""

    dtype: DtypeName | None = None
    """Of the output; by default that of the aligned model."""


class Realign(Recipe):
    """A realignment of tuned models, key by key."""

    absent = {"aligned": "", "method": "magnitude", "models": {}}

    method: Annotated[str, MinLen(1), Says("a name")]
    """`suture realigners` lists them."""
    base: ModelPath | None = None
    """The pretrained model that the aligned one was made of."""
    aligned: ModelPath
    """The safe model that the others were tuned from."""
    models: Annotated[Mapping[str, TunedModel], NamedEntries(
        r"[\w.-]+", "cannot be the name of a model; letters, digits, _, . and - can",
        "a mapping from names to the tuned models, with at least one", least=1,
    )]  # fmt: skip
    """A mapping from names to the tuned models, with at least one."""
    safety: ModelPath | None = None
    """A model tuned from the aligned one on safety data alone."""
    fuse: Fuse = Fuse()
    parameters: Mapping[str, Any] = {}
    """Of the method; `suture methods realigner NAME` shows them."""
    space: Annotated[ParamSpace, space_of(EVERYTHING)] = EVERYTHING
    """The tensors that may change."""
    data: Annotated[PairSpec, rows_of(PairSpec)] | None = None
    """Pairs of a safe and an unsafe answer."""
    utility: Annotated[DataSpec, rows_of(
        DataSpec, train="rows", share=0.0, short="rows", label=None, image=None, size=None,
        labels=None, label_texts=None,
    )] | None = None  # fmt: skip
    """Rows of what the tuned models are for; a loss per token is measured on them."""
    training: Annotated[TuneSettings, how_to_train(TRAINING)] = TRAINING
    """How to train, of methods that do."""
    ancestor: Literal["check", "trust"] = "check"
    """Whether distances are asked if the tuned models come from the aligned one."""
    output: Output = Output()
    device: Annotated[Word, Says("auto, cpu or cuda")] = "auto"
    """Where it is computed: auto, cpu or cuda."""

    @classmethod
    def tables(cls) -> Mapping[str, Table[Any]]:
        """Return the table of ways to realign."""
        return {"method": REALIGNERS}

    @property
    def line(self) -> Realigner:
        """The method; of a misspelt name, the one that is likely meant."""
        return REALIGNERS.likely(self.method) or REALIGNERS["magnitude"]

    @property
    def tuned(self) -> dict[str, TunedModel]:
        """The tuned models in the order of their names: that of a recipe is no part of a result."""
        return dict(sorted(self.models.items()))

    @property
    def weights(self) -> dict[str, float]:
        """The factor on the task vector of each model."""
        return {name: model.weight for name, model in self.tuned.items()}

    @property
    def fusing(self) -> Fusing:
        """How the task vectors are fused."""
        return self.fuse.fusing(len(self.models))

    @property
    def dtype(self) -> str | None:
        """The dtype of the output; ``None`` keeps that of the aligned model."""
        return self.output.dtype

    @property
    def trained(self) -> tuple[str, ...]:
        """The keys of ``training`` that are read."""
        if self.line.trains:
            return tuple(asdict(self.training))
        split = () if self.data is None else ("seed",)  # of the pairs that are held out
        kept = ("batch", "activations", "activations_memory", "activations_disk")
        return split if self.data is None and self.utility is None else (*kept, *split)

    @property
    def reads_base(self) -> bool:
        """Whether the base is asked for anything."""
        ranks = self.line.name == "protect" and not self.settings.get("mask")
        return "base" in self.line.needs or ranks or self.ancestor == "check"

    @property
    def settings(self) -> dict[str, Any]:
        """The parameters of the method with its defaults."""
        return settings(self.line, self.parameters, Problems())

    @property
    def notes(self) -> tuple[str, ...]:
        """What the recipe gives and the method does not read."""
        line, notes = self.line, []
        if self.written.get("safety") is not None and "safety" not in line.needs:
            notes.append(f"safety: {line.name} reads no such model; it is left out")
        held = self.utility is not None and (self.utility.validation or self.utility.share)
        if held and not line.chooses:
            notes.append(f"utility.validation: {line.name} chooses nothing by these rows")
        idle = [key for key in self.written.get("training") or () if key not in self.trained]
        if idle:
            notes.append(f"training: {line.name} does not train, so {', '.join(idle)} "
                         f"{'has' if len(idle) == 1 else 'have'} no effect")  # fmt: skip
        return tuple(notes)

    @check
    def _method_has_its_parameters(self) -> Faults:
        yield from line_faults(REALIGNERS, "method", self.method, self.parameters)

    @check
    def _method_has_what_it_needs(self) -> Faults:
        for need in self.line.needs:
            if getattr(self, need) is None:
                yield need, f"missing; {self.line.name} needs {MEANT[need]}"

    @check
    def _fuse_takes_the_models(self) -> Faults:
        how, tasks = self.fusing.how, len(self.models)
        if tasks > 1 and not FUSES[how].several:
            others = ", ".join(k for k, v in FUSES.items() if v.several)
            yield "fuse", f"{how} takes one model, here are {tasks}; {others}"

    @check
    def _fuse_has_its_numbers(self) -> Faults:
        how = self.fusing.how
        if FUSES[how].density == 1 and self.fuse.density not in (None, 1):
            yield "fuse.density", f"{how} keeps all; ties and dare do not"
        if self.fuse.scope != "global" and how != "ties":
            yield "fuse.scope", f"{how} ranks no entries; ties does"

    def settled(self) -> Mapping[str, Any]:
        """Return no safety model where the method reads none."""
        return {} if "safety" in self.line.needs else {"safety": None}

    def resolved(self) -> dict[str, Any]:
        """Return the recipe with every default, as plain data that can be read again."""
        return super().resolved() | {
            "models": {name: vars(model) for name, model in self.tuned.items()},
            "fuse": asdict(self.fusing),
            "parameters": self.settings,
            "training": {key: getattr(self.training, key) for key in self.trained},
            "output": {"dtype": self.dtype and WORD_OF[self.dtype]},
        }


def read_realign(
    source: Path | Mapping[str, Any], problems: Problems, folder: Path | None = None
) -> Realign | None:
    """Read a recipe file, or a mapping; faults are noted, ``None`` where there is no recipe.

    A recipe with faults comes back as far as it is understood, so that its models and rows can be
    looked at too.
    """
    return read(Realign, source, problems, folder, whole=False)


__all__ = ["TRAINING", "Realign", "TunedModel", "read_realign"]
