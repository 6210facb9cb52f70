"""Learned masks: Localize-and-Stitch with data (He et al. 2025, arXiv:2408.13656).

Each entry of a task vector has a logit ``S``; the model that is trained is ``theta0 + sigmoid(S) *
tau``. Only the logits move. The gradient needs no graph over them:

    J(S)    = loss(theta0 + sigmoid(S) tau) + penalty(S)
    dJ/dS   = (tau * dloss/dtheta + pull(S)) * sigmoid(S) (1 - sigmoid(S))

What comes out are logits, as statistics of the kind ``logit``; ``suture.localize`` ranks them with
the rule ``learned``, to an exact density or to all that are above 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suture.edits.mask import localize
from suture.edits.stats import Stats
from suture.errors import NonFiniteError
from suture.schema.tuning import LearnSettings
from suture.stream.vector import TaskVector
from suture.training.data import Dataset
from suture.training.loss import to
from suture.training.measure import OBJECTIVES, Objective, check_rows, data_hash
from suture.training.models import evaluating, parameters_of
from suture.training.snapshot import Snapshot, read_snapshot, write_snapshot


def pull(logits: Tensor, reg: str, strength: float) -> Tensor | float:
    """The derivative of the penalty with respect to the open share ``sigmoid(S)``.

    ``l1``: the penalty is ``strength * sum sigmoid(S)``, and every logit falls. ``polarize``: it is
    ``-strength * sum |sigmoid(S) - 1/2|``, and every logit leaves 0.
    """
    if reg == "l1":
        return strength
    return -strength * logits.sign() if reg == "polarize" else 0.0


def penalty(logits: Tensor, reg: str, strength: float) -> Tensor:
    """What ``pull`` is the derivative of."""
    open_ = logits.sigmoid()
    if reg == "l1":
        return strength * open_.sum()
    return -strength * (open_ - 0.5).abs().sum() if reg == "polarize" else torch.zeros(())


def gradient(use: Tensor, logits: Tensor, reg: str, strength: float) -> Tensor:
    """``dJ/dS`` of one tensor from ``use``, its delta times the gradient of its weights."""
    open_ = logits.sigmoid()
    return (use + pull(logits, reg, strength)) * open_ * (1 - open_)


@dataclass(frozen=True)
class Epoch:
    """Where training stands."""

    epoch: int
    """Steps done, from 1."""
    epochs: int
    loss: float
    """Mean loss of a row with the masks before this step."""
    open: float
    """Share of logits above 0 after it."""


def learn(  # noqa: PLR0913  every word of the question
    vector: TaskVector,
    model: nn.Module,
    data: Dataset,
    settings: LearnSettings = LearnSettings(),
    *,
    objective: Objective = OBJECTIVES["classification"],
    device: str = "cpu",
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[Epoch], None] | None = None,
    keep: Path | None = None,
) -> Stats:
    """Train the logits of the mask of one task vector; statistics of the kind ``logit``.

    Args:
        vector: tuned minus base; its tensors are those that have logits.
        model: the base, loaded; its tensors of the vector are set, and set back at the end.
        data: rows of the task.
        settings: how to train.
        objective: what the loss of a row is.
        device: where model and batches are.
        facts: kept with the logits: ``model``, the fingerprint of the tuned model.
        progress: called after every step.
        keep: a file that holds where training stands, after every step; training goes on from it,
            to the same bytes, if it is that of the same data and settings.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
        RecipeError: there are no rows, labels are missing.
        MismatchError: the model lacks a parameter.
    """
    check_rows(data, objective)
    parameters = parameters_of(model, vector.names)
    start = localize(vector, density=settings.start)
    trainer = _Trainer(vector, parameters, settings, device)
    trainer.open({name: torch.from_numpy(start[name]) for name in vector.names})
    same = {"settings": asdict(settings), "data": data_hash(data), "facts": dict(facts or {})}
    losses = [] if keep is None else trainer.go_on(keep, same)
    with evaluating(model), _restored(model, parameters):
        for epoch in range(len(losses) + 1, settings.epochs + 1):
            trainer.place()
            loss = trainer.gather(model, data, objective)
            losses.append(loss)
            trainer.step()
            if keep is not None:
                write_snapshot(trainer.snapshot({**same, "losses": losses}), keep)
            if progress is not None:
                progress(Epoch(epoch, settings.epochs, loss, trainer.share()))
    known = {
        "rows": len(data), "data": same["data"], "objective": objective.name, "at": "tuned",
        "loss": losses[-1], "losses": losses, "settings": asdict(settings),
        "start_density": start.density, **(facts or {}),
    }  # fmt: skip
    logits = {f"logit/{name}": s.cpu().numpy() for name, s in trainer.logits.items()}
    return Stats(logits, known, "the learned logits")


@contextmanager
def _restored(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put back values and wishes for gradients afterwards, bit for bit."""
    values = {name: p.detach().clone() for name, p in parameters.items()}
    asked = {p: p.requires_grad for p in model.parameters()}
    chosen = {id(p) for p in parameters.values()}
    try:
        for parameter in asked:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
        for parameter, wish in asked.items():
            parameter.requires_grad_(wish)


class _Trainer:
    """The logits and what moves them."""

    def __init__(
        self, vector: TaskVector, parameters: Mapping[str, nn.Parameter], settings: LearnSettings,
        device: str,
    ) -> None:  # fmt: skip
        self.parameters, self.settings = parameters, settings
        self.base: dict[str, Tensor] = {}
        self.tau: dict[str, Tensor] = {}
        self.logits: dict[str, Tensor] = {}
        for name in vector.names:
            self.base[name] = torch.from_numpy(vector.base[name]).float().to(device)
            self.tau[name] = torch.from_numpy(vector[name]).to(device)
        self.use = {name: torch.zeros_like(tau) for name, tau in self.tau.items()}
        """Delta times the gathered gradient of the weights."""
        self._adam: torch.optim.Adam | None = None

    def open(self, start: Mapping[str, Tensor]) -> None:
        """Set the logits: open where ``start`` is true."""
        at = self.settings.logit
        for name, tau in self.tau.items():
            marks = start[name].to(tau.device)
            self.logits[name] = torch.where(marks, at, -at).to(torch.float32).reshape(tau.shape)
        if self.settings.step == "adam":
            self._adam = torch.optim.Adam(list(self.logits.values()), lr=self.settings.lr)

    @torch.no_grad()
    def place(self) -> None:
        """Set the weights to ``theta0 + sigmoid(S) tau``: from the base, so that nothing drifts."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.base[name] + self.logits[name].sigmoid() * self.tau[name])

    def gather(self, model: nn.Module, data: Dataset, objective: Objective) -> float:
        """Gather the gradient over all rows into ``use``; the mean loss of a row."""
        total, rows = 0.0, len(data)
        for use in self.use.values():
            use.zero_()
        device = next(iter(self.tau.values())).device
        for part in data.batches(self.settings.batch):
            batch = to(part, device)
            losses = objective.losses(objective.logits(model, batch), batch)
            value = float(losses.detach().sum())
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"the loss of a row is {value} while masks are learned: a smaller lr than "
                    f"{self.settings.lr} may help, or the model is broken"
                )
            total += value
            # As released: the sum of the batches' means; else the mean over all rows.
            share = len(part.rows) if self.settings.step == "raw" else rows
            found = torch.autograd.grad(losses.sum() / share, list(self.parameters.values()),
                                        allow_unused=True)  # fmt: skip
            for name, gradient_ in zip(self.parameters, found, strict=True):
                if gradient_ is not None:
                    self.use[name].addcmul_(gradient_.float(), self.tau[name])
        return total / rows

    @torch.no_grad()
    def step(self) -> None:
        """Move the logits once."""
        how = self.settings
        if how.step == "raw":
            length, strength = how.lr, how.strength / how.lr  # the released penalty has no rate
        else:
            length, strength = how.lr, how.strength
            size = sum(float(use.double().square().sum()) for use in self.use.values())
            size = math.sqrt(size / max(1, sum(use.numel() for use in self.use.values())))
            for use in self.use.values():
                use /= size or 1.0
        for name, logits in self.logits.items():
            slope = gradient(self.use[name], logits, how.reg, strength)
            if self._adam is None:
                logits -= length * slope
            else:
                logits.grad = slope
        if self._adam is not None:
            self._adam.step()

    def snapshot(self, facts: Mapping[str, Any]) -> Snapshot:
        """Where training stands: the logits, and what Adam remembers of them."""
        tensors = {f"logit/{name}": s for name, s in self.logits.items()}
        for name, s in self.logits.items() if self._adam is not None else ():
            assert self._adam is not None
            tensors |= {f"{key}/{name}": value for key, value in self._adam.state[s].items()}
        return Snapshot(tensors, facts)

    def go_on(self, path: Path, same: Mapping[str, Any]) -> list[float]:
        """Take up where a snapshot stands, if it is one of the same; the losses so far."""
        found = read_snapshot(path)
        if found is None or {k: found.facts.get(k) for k in same} != same:
            return []
        for name, logits in self.logits.items():
            logits.copy_(found.tensors[f"logit/{name}"])
            if self._adam is not None:
                kept = {k: found.tensors[f"{k}/{name}"] for k in ("step", "exp_avg", "exp_avg_sq")}
                on = {k: t.to(logits.device) for k, t in kept.items() if k != "step"}
                self._adam.state[logits] = {"step": kept["step"], **on}
        return list(map(float, found.facts["losses"]))

    def share(self) -> float:
        """Share of logits above 0."""
        open_ = sum(int((s > 0).sum()) for s in self.logits.values())
        return open_ / max(1, sum(s.numel() for s in self.logits.values()))


__all__ = [
    "Epoch", "gradient", "learn", "penalty", "pull",
]  # fmt: skip
