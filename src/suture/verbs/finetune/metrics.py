"""Looks at the validation rows of a training, and the activations that they share with it.

No row is asked twice of the same weights: the base is looked at once before training, and where the
weights that are written are those of a look that training took, that look is the result.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from suture.evals.base import Metric
from suture.evals.table import EVALS
from suture.training.data import collate, plan
from suture.training.kept import KeptStates, keep, positions
from suture.training.loop import groups_of
from suture.training.loss import to
from suture.training.strategy import Say, Tuned
from suture.verbs.finetune.plan import Plan


class Looks:
    """What the validation rows of a plan say of a model."""

    def __init__(self, plan: Plan, model: nn.Module, work: Path, say: Say) -> None:
        self.plan, self.model, self.work, self.say = plan, model, work, say
        self.before: Metric | None = None
        """Of the base."""
        self.kept: KeptStates | None = None
        """The activations of the training that goes on."""
        self._begun = False
        self._found: list[Metric] = []

    def begin(self, model: nn.Module) -> None:
        """Called when it is known what of the model a training changes, before it changes."""
        self.done()
        self.kept = self._keep(model)
        if self.score is not None and not self._begun:
            self.before = self._measure(self.model)
        self._begun = True
        self._found.clear()

    def done(self) -> None:
        """Let go of the activations."""
        if self.kept is not None:
            self.kept.drop()
        self.kept = None

    @property
    def score(self) -> Callable[[nn.Module], float] | None:
        """The larger the better; ``None`` where there are no rows."""
        return self._score if len(self.plan.rows.validation) else None

    def after(self, tuned: Tuned) -> Metric | None:
        """Of the trained model: what its last look said, or the one whose weights were kept."""
        if self.score is None:
            return None
        result = tuned.result
        ours = result.scores[len(result.scores) - len(self._found) :]
        steps = [step for step, _ in ours]
        wanted = result.steps if result.best is None else result.best
        if wanted in steps:
            return self._found[steps.index(wanted)]
        return self._measure(tuned.evaluated or self.model)

    def _score(self, model: nn.Module) -> float:
        self._found.append(self._measure(model))
        sign = -1.0 if self.plan.task == "language-model" else 1.0
        return sign * self._found[-1].value

    def _measure(self, model: nn.Module) -> Metric:
        kind = "loss" if self.plan.task == "language-model" else "accuracy"
        batches = self.plan.rows.validation.batches(self.plan.recipe.training.batch)
        fed = batches if self.kept is None else self.kept.fed(batches)
        return EVALS[kind](model, fed, device=self.plan.device)[0]

    def _keep(self, model: nn.Module) -> KeptStates | None:
        settings, rows = self.plan.recipe.training, self.plan.rows
        lengths = [len(row) for row in rows.train.ids]
        groups = groups_of(lengths, settings)
        held = [len(row) for row in rows.validation.ids]
        places = positions(lengths, groups) + positions(held, plan(held, settings.batch, seed=None))
        few = sorted({groups[-1][0], groups[-1][-1]})  # enough to compare bits on
        batch = to(collate(rows.train, few), torch.device(self.plan.device))
        changing = [p for p in model.parameters() if p.requires_grad]
        return keep(
            model, changing, batch, (len(lengths) + len(held), places), settings,
            folder=self.work / "activations", say=self.say,
        )  # fmt: skip


__all__ = ["Looks"]
