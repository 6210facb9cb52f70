"""What a way to realign works with, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suture.analysis.ancestry import RealignModels
from suture.edits.mask import Mask
from suture.edits.stats import Stats
from suture.errors import RecipeError
from suture.evals.base import Metric
from suture.evals.table import EVALS
from suture.schema.tuning import TuneSettings
from suture.training.data import Dataset
from suture.training.kept import KeptStates
from suture.training.loop import TuneResult
from suture.training.models import parameters_of
from suture.verbs.realign.fuse import Fuser, fuser
from suture.verbs.realign.fusing import Fusing
from suture.verbs.realign.pairs import Pairs, answers_of, margins

Say = Callable[[str], None]
Edit = Callable[[str], Tensor]
"""The new weights of a tensor, by its name: float32, computed when they are asked for."""
Scores = dict[str, Metric]
"""What is known of one model: ``margin``, ``preferred``, and ``utility`` where there are rows."""


@dataclass
class RealignJob:
    """What a way to realign works with."""

    models: RealignModels
    names: tuple[str, ...]
    """The tensors in which a tuned model differs from the aligned one."""
    fusing: Fusing
    train: Pairs | None
    validation: Pairs | None
    utility: Dataset | None
    choosing: Dataset | None
    """Rows of utility by which a method chooses; where there are none, those that are reported."""
    settings: TuneSettings
    device: str
    model: nn.Module | None = None
    """The aligned model in float32, where there are pairs or utility rows."""
    tune: Callable[..., TuneResult] | None = None
    """The loop, with a checkpoint and with somebody who is told of every step."""
    work: Path | None = None
    """A folder for what is made once."""
    say: Say = lambda _: None
    threads: int | None = None
    folder: Path = field(default_factory=Path)
    """Where relative paths of the recipe start."""
    kept: KeptStates | None = None
    """Activations under the tensors that change: every model that is looked at has the same."""
    _parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def parameters(self, names: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
        """The parameters of the model by the names of the checkpoint's tensors."""
        assert self.model is not None
        if not self._parameters:
            self._parameters = parameters_of(self.model, self.names)
        return {n: self._parameters[n] for n in (self.names if names is None else names)}

    def fused(self) -> Edit:
        """The aligned model plus the task vectors as they are: what is to be realigned."""
        masks = [lambda name: torch.ones(())] * len(self.models.tuned)
        return self.masked(masks)

    def masked(self, masks: Sequence[Callable[[str], Tensor]]) -> Edit:
        """The aligned model plus the task vectors, each through a mask of its own."""

        def deltas(name: str) -> list[Tensor]:
            tasks = self.models.whole(name).tasks
            return [mask(name) * task for mask, task in zip(masks, tasks, strict=True)]

        chosen: Fuser = fuser(self.fusing, self.names, deltas)

        def edit(name: str) -> Tensor:
            part = self.models.whole(name)
            return part.safe + chosen(name, deltas(name))

        return edit

    def autocast(self) -> torch.autocast:
        """The precision of training, for numbers that are compared with those of training."""
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.precision)
        return torch.autocast(torch.device(self.device).type, kind, enabled=kind is not None)

    @torch.no_grad()
    def place(self, edit: Edit) -> None:
        """Put new weights into the model."""
        for name, parameter in self.parameters().items():
            parameter.copy_(edit(name))

    def aligned(self, name: str) -> Tensor:
        """The aligned weights, as an edit that changes nothing."""
        return self.models.whole(name).safe

    def answers(
        self, model: nn.Module, pairs: Pairs, groups: int | Sequence[Sequence[int]]
    ) -> Tensor:
        """Log-probabilities of all answers; see ``answers_of``."""
        return answers_of(model, pairs, groups, self.device, self.kept)

    def scores(self, pairs: Pairs | None, utility: Dataset | None) -> Scores:
        """What the model, as it is now, makes of pairs and of rows of utility."""
        assert self.model is not None
        found: Scores = {}
        if pairs is not None and len(pairs):
            answers = self.answers(self.model, pairs, self.settings.batch)
            margin, preferred = margins(answers, pairs)
            found |= {"margin": margin, "preferred": preferred}
        if utility is not None:
            batches = utility.batches(self.settings.batch)
            fed = batches if self.kept is None else self.kept.fed(batches)
            found["utility"] = EVALS["loss"](self.model, fed, device=self.device)[0]
        return found


@dataclass(frozen=True)
class Realigned:
    """What a way to realign leaves."""

    edit: Edit
    facts: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, Mask] = field(default_factory=dict)
    """Entries that are kept, by the name of a file without its ending."""
    logits: Stats | None = None
    result: TuneResult | None = None
    """What training did, where there was any."""
    shares: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Of each tensor, how much of the tuned change may stay, and how many entries it has."""


def needed(value: Any, what: str) -> Any:
    """What a recipe must have named; the plan has checked it before.

    Raises:
        RecipeError: it is missing.
    """
    if value is None:
        raise RecipeError(f"{what}: missing")
    return value


__all__ = ["Edit", "RealignJob", "Realigned", "Say", "Scores", "needed"]
