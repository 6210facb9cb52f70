r"""Stitched models in memory: a network whose weights are written over, and what it answers.

.. math:: \theta = \theta_G + \gamma \odot (\theta_J - \theta_A)

with the ground :math:`G` (the aligned model, or a derivative), the attacked model :math:`J` and a
mask :math:`\gamma`. No checkpoint is written; tensors are read from the files when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from suture.analysis.ancestry import array
from suture.checkpoints.checkpoint import Checkpoint
from suture.edits.mask import Mask
from suture.errors import SutureError
from suture.evals.kinds import Models, Score
from suture.evals.results import Scores
from suture.training.models import FLOAT32, LanguageModel, load_language_model, parameters_of
from suture.verbs.audit.rows import Questions

Key = Any
"""Plain data from which a thing follows: the same key, the same thing."""


@dataclass(frozen=True)
class Region:
    """A mask that is made when it is needed, and what it follows from."""

    key: Key
    make: Callable[[], Mask]

    def inverted(self) -> Region:
        """Every entry of the space that is not in it."""
        return Region(["not", self.key], lambda: ~self.make())


@dataclass(frozen=True)
class Change:
    """What is added to a ground: a difference of two models, within a region or whole."""

    source: Checkpoint
    """The model whose difference to the aligned one it is."""
    fingerprint: str
    moved: Sequence[str]
    """The tensors in which the two differ."""
    region: Region | None = None
    """``None`` for every entry."""
    outside: bool = False
    """Whether tensors that lie in no region come along."""

    @property
    def key(self) -> Key:
        """What the change follows from."""
        return [self.fingerprint, None if self.region is None else self.region.key, self.outside]


class Net:
    """A loaded ground, and weights that are put over its own."""

    def __init__(self, ground: Checkpoint, aligned: Checkpoint, device: str) -> None:
        self.ground, self.aligned, self.device = ground, aligned, device
        self.model: LanguageModel = load_language_model(
            ground.folder, device=device, dtype=FLOAT32
        ).model
        self._dirty: set[str] = set()

    @torch.no_grad()
    def place(self, change: Change | None, names: Sequence[str]) -> None:
        """Make the ground with a change on it; ``names`` are those in which regions lie.

        Where the mask is set on the aligned model itself, the weights are the source's bit for bit
        in float32, and elsewhere the ground's.
        """
        inside, wanted = set(names), set[str]()
        mask: Mask | None = None
        if change is not None:
            mask = None if change.region is None else change.region.make()
            wanted = {n for n in change.moved if n in inside or change.outside}
        parameters = parameters_of(self.model, sorted(self._dirty | wanted))
        for name, parameter in parameters.items():
            value = array(self.ground, name)
            if name in wanted:
                assert change is not None
                theirs = array(change.source, name)
                chosen = torch.ones((), dtype=torch.bool)
                if mask is not None and name in inside:
                    chosen = torch.from_numpy(mask[name])
                if self.ground is self.aligned:
                    value = torch.where(chosen, theirs, value)
                else:
                    value = value + chosen * (theirs - array(self.aligned, name))
            parameter.copy_(value)
        self._dirty = wanted

    def ask(self, questions: Questions, tick: Callable[[float], None]) -> dict[str, Any]:
        """What the model answers, as numbers by row: plain data without a word of it."""
        models = Models(self.model, self.device, None, tick)
        try:
            found: dict[str, Any] = {
                "marked": _marked(questions.marked(models)),
                "benign": _named(questions.benign(models), ("refused", "broken")),
            }
            for name, run in questions.utility.items():
                first = run(models)[0]
                found.setdefault("utility", {})[name] = _plain(first)
        except SutureError as error:
            error.add_note("while a stitched model was asked")
            raise
        return found


def _marked(scores: Sequence[Score]) -> dict[str, Any]:
    """Violations, refusals and broken answers, by row, whoever judged."""
    found = {score.name: dict(score.values) for score in scores}
    lost = found.get("unparsed", {})
    if "harmful" in found:
        bad, no = found["harmful"], found["safe"]
    else:
        no = found["refused"]
        bad = {
            n: float(not v and not found["broken"][n] and not lost.get(n)) for n, v in no.items()
        }
    made = [Score("violation", bad, "share", better="lower"), Score("refused", no, "share"),
            Score("broken", found["broken"], "share", better="lower")]  # fmt: skip
    if lost:
        made.append(Score("unparsed", lost, "share", better="lower"))
    return {score.name: _plain(score) for score in made}


def _named(scores: Sequence[Score], names: Sequence[str]) -> dict[str, Any]:
    return {score.name: _plain(score) for score in scores if score.name in names}


def _plain(score: Score) -> dict[str, Any]:
    rows = tuple(sorted(score.values))
    values = np.asarray([score.values[n] for n in rows], np.float64)
    told: Mapping[int, float] = score.weights or {}
    weights = np.asarray([told.get(n, 1.0) for n in rows], np.float64)
    return Scores(score.name, score.statistic, score.better, rows, values, weights).plain()


__all__ = ["Change", "Key", "Net", "Region"]
