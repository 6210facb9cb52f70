"""The recipe of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import MinLen

from suture.errors import Problems
from suture.schema.fields import DtypeName, ModelPath, Says, Word, WordOrFile
from suture.schema.read import read
from suture.schema.rows import TrainingRows, how_to_train
from suture.schema.sections import Faults, Recipe, Section, check
from suture.schema.settings import line_faults
from suture.schema.sources import UNREAD, DataSpec
from suture.schema.table import Table
from suture.schema.tuning import FinetuneSettings
from suture.tensors.spec import WORD_OF
from suture.training.strategies import STRATEGIES, Strategy

IMAGES = "image-classification"
HEADS = ("probe", "zero-shot", "learned")
Form = Literal["model", "patch", "both"]


class Output(Section):
    """What is written."""

    dtype: DtypeName | None = None
    """Of the output; by default that of the base."""
    form: Form = "model"
    """The whole model, a patch of the base, or both."""


class Finetune(Recipe):
    """A fine-tuning run, key by key."""

    absent = {"base": "", "strategy": "full", "data": UNREAD}

    base: Annotated[ModelPath, Says("the path or hub id of the model to start from")]
    """The path or hub id of the model to start from."""
    strategy: Annotated[str, MinLen(1), Says("a name")]
    """`suture strategies` lists them."""
    parameters: Mapping[str, Any] = {}
    """Of the strategy; `suture methods strategy NAME` shows them."""
    task: Literal["classification", "image-classification", "language-model"] | None = None
    """What is learned; by default what the base is made for."""
    data: Annotated[DataSpec, TrainingRows]
    """A mapping with `train`, the rows that are trained on."""
    head: Annotated[str, WordOrFile(HEADS, "the file of a saved head")] = "probe"
    """Of a classifier: probe, zero-shot, learned, or the file of a saved head."""
    training: Annotated[FinetuneSettings, how_to_train(FinetuneSettings())] = FinetuneSettings()
    """How to train."""
    output: Output = Output()
    device: Annotated[Word, Says("auto, cpu or cuda")] = "auto"
    """Where it is computed: auto, cpu or cuda."""

    @classmethod
    def tables(cls) -> Mapping[str, Table[Any]]:
        """Return the table of strategies."""
        return {"strategy": STRATEGIES}

    @property
    def line(self) -> Strategy:
        """The strategy; of a misspelt name, the one that is likely meant."""
        return STRATEGIES.likely(self.strategy) or STRATEGIES["full"]

    @property
    def dtype(self) -> str | None:
        """The dtype of the output; ``None`` keeps that of the base."""
        return self.output.dtype

    @property
    def form(self) -> Form:
        """What is written: the whole model, a patch of the base, or both."""
        return self.output.form

    @check
    def _strategy_has_its_parameters(self) -> Faults:
        yield from line_faults(STRATEGIES, "strategy", self.strategy, self.parameters)

    def placed(self, folder: Path, written: Mapping[str, Any]) -> Self:
        """Return the recipe with the learning rate of its strategy, where it names none."""
        training = written.get("training")
        given = isinstance(training, Mapping) and training.get("lr") is not None
        if not given and {"strategy", "training"} <= vars(self).keys():
            vars(self)["training"] = replace(self.training, lr=self.line.lr)
        return super().placed(folder, written)

    def resolved(self) -> dict[str, Any]:
        """Return the recipe with every default, as plain data that can be read again."""
        known = {n: self.parameters.get(n, p.default) for n, p in self.line.parameters.items()}
        return super().resolved() | {
            "parameters": {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()},
            "training": asdict(self.training),
            "output": {"dtype": self.dtype and WORD_OF[self.dtype], "form": self.form},
        }


def read_finetune(
    source: Path | Mapping[str, Any], problems: Problems, folder: Path | None = None
) -> Finetune | None:
    """Read a recipe file, or a mapping; faults are noted, ``None`` where there is no recipe.

    A recipe with faults comes back as far as it is understood, so that its base and rows can be
    looked at too.
    """
    return read(Finetune, source, problems, folder, whole=False)


__all__ = ["HEADS", "IMAGES", "Finetune", "Output", "read_finetune"]
