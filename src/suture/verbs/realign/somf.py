"""Subspace-oriented model fusion: which of the tuned weights may stay on the aligned model.

SOMF (Yi et al. 2024, arXiv:2405.09055) learns a binary Concrete mask over the task vectors by DPO
on pairs of a safe and an unsafe answer; weights stay frozen:

    theta(m) = theta_safe + Fuse({m_hat * delta_i})         m_hat drawn anew at every batch

It differs from the published code where that is wrong: the reference is one model, not noise around
it, and computed once; TIES passes the gradient on to every task; exports are not random.

The gradient needs no graph over the whole model: the loss gives ``dL/dtheta``, and tensor by tensor
that is carried on to the logits, through the mask's mean and the Fuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from suture.analysis.ancestry import Part, across, held
from suture.edits.mask import Mask
from suture.edits.stats import Stats
from suture.errors import NonFiniteError, RecipeError, SutureError
from suture.training.data import Batch
from suture.training.loop import groups_of
from suture.training.loss import LossStep, to
from suture.training.snapshot import Snapshot, read_snapshot, write_snapshot
from suture.verbs.realign.base import Edit, Realigned, RealignJob, needed
from suture.verbs.realign.concrete import Draw, Masking, Masks
from suture.verbs.realign.fuse import Fuser, fuser
from suture.verbs.realign.fusing import Fusing
from suture.verbs.realign.pairs import Pairs, dpo, log_probabilities

COLLAPSED = 1e-3
"""Below this mean of the open share the mask has closed: the aligned model alone is left."""


@dataclass(frozen=True)
class Learning:
    """How SOMF learns."""

    beta: float = 0.1
    reference: str = "fused"
    export: str = "soft"
    draws: int = 8
    start: float = 0.0
    seed: int = 0


class Fusion:
    """The model as a function of the logits: parts, masks and a Fuse."""

    def __init__(
        self,
        parts: Sequence[Part],
        masks: Masks,
        fusing: Fusing,
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        self.parts = {part.name: part for part in parts}
        self.masks, self.fusing, self.parameters = masks, fusing, parameters
        self.tasks = {key: tasks for part in parts for key, tasks in part.deltas.items()}
        self.sizes = {key: tasks[0].numel() for key, tasks in self.tasks.items()}

    @classmethod
    def of(
        cls, parts: Sequence[Part], how: Masking, fusing: Fusing,
        parameters: Mapping[str, nn.Parameter], start: float = 0.0,
    ) -> Fusion:  # fmt: skip
        """With fresh logits."""
        tasks = {key: own for part in parts for key, own in part.deltas.items()}
        first = next(iter(tasks.values()))[0]
        masks = Masks.fresh(
            {key: tuple(own[0].shape) for key, own in tasks.items()}, how,
            {key: across(key) for key in tasks}, start, str(first.device), first.dtype,
        )  # fmt: skip
        return cls(parts, masks, fusing, parameters)

    def fuser(self, draw: Draw, seed: int | None = None) -> Fuser:
        """The Fuse for one draw of the masks."""
        keys = list(self.tasks)
        return fuser(self.fusing, keys, lambda k: [draw(k) * d for d in self.tasks[k]], seed)

    def weights(self, name: str, draw: Draw, how: Fuser) -> Tensor:
        """The weights of one tensor; differentiable by the logits if the draw is."""
        return self.parts[name].weights(lambda key, tasks: how(key, _masked(draw(key), tasks)))

    @torch.no_grad()
    def place(self, draws: Sequence[Draw], seed: int | None = None) -> None:
        """Set the model's weights to the mean over the fused models of some draws."""
        edit = self.edit(draws, seed)
        for name in self.parts:
            self.parameters[name].copy_(edit(name))

    def edit(self, draws: Sequence[Draw], seed: int | None = None) -> Edit:
        """The same as a function of a tensor's name."""
        ways = [(draw, self.fuser(draw, seed)) for draw in draws]

        @torch.no_grad()
        def edit(name: str) -> Tensor:
            found = self.weights(name, *ways[0])
            for way in ways[1:]:
                found = found + self.weights(name, *way)
            return found / len(ways)

        return edit

    def pull(self, draw: Draw, how: Fuser) -> None:
        """Carry the gradients of the weights on to the logits, tensor by tensor."""
        for name, part in self.parts.items():
            parameter = self.parameters[name]
            if parameter.grad is None:
                continue
            logits = [self.masks.logits[key] for key in part.deltas]
            found = torch.autograd.grad(
                self.weights(name, draw, how), logits, parameter.grad, allow_unused=True
            )
            parameter.grad = None
            for logit, slope in zip(logits, found, strict=True):
                if slope is not None:
                    logit.grad = slope if logit.grad is None else logit.grad + slope


def _masked(mask: Tensor, tasks: Sequence[Tensor]) -> list[Tensor]:
    return [mask * task for task in tasks]


class Somf(LossStep):
    """Moves the logits by DPO; a fresh draw of the masks for every batch."""

    def __init__(
        self, model: nn.Module, fusion: Fusion, pairs: Pairs, reference: Tensor, how: Learning,
        kept: Callable[[], str] = lambda: "",
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.fusion, self.pairs, self.reference, self.how = fusion, pairs, reference, how
        self.kept = kept
        chosen = {id(p) for p in fusion.parameters.values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)

    def trained(self) -> dict[str, nn.Parameter]:
        """The logits."""
        return self.fusion.masks.logits

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Decay pulls logits to 0, where a mask is open by half."""
        return [{"params": list(self.trained().values()), "weight_decay": weight_decay}]

    def prepare(self, accelerator: Any) -> None:
        """Nothing is wrapped.

        Raises:
            RecipeError: there are several processes, which would draw masks of their own.
        """
        if accelerator.num_processes > 1:
            raise RecipeError(
                "masks are learned by one process; run it without `accelerate launch`"
            )

    def gradients(self, accelerator: Any, batch: Batch, share: float, last: bool) -> float:
        """Draw masks, fuse, and add the gradient of ``share`` times the loss to the logits."""
        self.model.eval()  # no dropout: the mask is the only noise
        draw, how = self.draw()
        self.fusion.place([draw], how.seed)
        both = self.asked(batch)
        with accelerator.autocast():
            answers = log_probabilities(self.model, both).view(2, -1).T
            reference = self.reference[list(batch.rows)].to(answers)
            value = dpo(answers, reference, self.how.beta).mean() * share
            accelerator.backward(value)
        self.fusion.pull(draw, how)
        return float(value.detach())

    def asked(self, batch: Batch) -> Batch:
        """Both answers of the pairs of a batch."""
        return to(self.pairs.batch(batch.rows), batch.input_ids.device)

    def draw(self) -> tuple[Draw, Fuser]:
        """Masks and Fuse of a batch; their seed comes from the loop, whose state is saved."""
        seed = int(torch.randint(2**62, ()))
        draw = self.fusion.masks.drawn(seed, keep=True)
        return draw, self.fusion.fuser(draw, seed)

    def after(self) -> None:
        """Look whether the masks are still masks.

        Raises:
            NonFiniteError: a logit is no number.
            SutureError: they have closed.
        """
        open_ = self.fusion.masks.mean(self.fusion.sizes)
        if math.isfinite(open_) and open_ >= COLLAPSED:
            return
        remedy = "a smaller lr, or fewer steps, may help" + self.kept()
        if not math.isfinite(open_):
            raise NonFiniteError(f"the logits of the mask became NaN or infinite: {remedy}")
        raise SutureError(
            f"the mask has collapsed: its mean fell to {open_:.2g}, so that only the aligned model "
            f"would be left: {remedy}"
        )

    @property
    def evaluated(self) -> nn.Module:
        """The model with the masks as they would be written now."""
        self.fusion.place(self.exported())
        return self.model

    def exported(self) -> list[Draw]:
        """The masks that are written."""
        return self.fusion.masks.exported(self.how.export, self.how.draws, self.how.seed)


def learn(job: RealignJob, space: str, masking: Masking, how: Learning) -> Realigned:
    """Learn the masks of a job and make of them what is written.

    Raises:
        NonFiniteError: the loss or a logit became NaN or infinite; the last checkpoint is kept.
        SutureError: the mask has collapsed; the last checkpoint is kept.
    """
    pairs = needed(job.train, "data")
    model, tune = needed(job.model, "data"), needed(job.tune, "data")
    parts = list(held(job.models, job.names, space, job.device))
    if not parts:
        raise RecipeError("no factor differs between the aligned and the tuned models")
    job.place(job.aligned)  # what no factor changes is written so, and tuned models stood here
    parameters = job.parameters([part.name for part in parts])
    fusion = Fusion.of(parts, masking, job.fusing, parameters, how.start)
    reference, held_out = references(job, fusion, how)
    mover = Somf(model, fusion, pairs, reference, how, kept=lambda: _kept(job))
    validation = job.validation

    def score(looked: nn.Module) -> float:
        assert validation is not None
        with job.autocast():
            answers = job.answers(looked, validation, job.settings.batch)
        return -float(dpo(answers, held_out, how.beta).mean())

    look = score if validation is not None and len(validation) else None
    result = tune(mover, look)
    edit = fusion.edit(mover.exported())
    facts = {
        "masked": sum(fusion.sizes.values()),
        "logits": sum(p.numel() for p in fusion.masks.logits.values()),
        "mean": fusion.masks.mean(fusion.sizes),
        "open": _open(fusion),
        "furthest": max(float(p.detach().abs().max()) for p in fusion.masks.logits.values()),
    }
    about = {"method": "somf", "granularity": masking.granularity, "space": space}
    own = set(fusion.parts)

    def every(name: str) -> Tensor:
        return edit(name) if name in own else job.aligned(name)

    return Realigned(every, facts, {"mask": _mask(fusion, about)}, _logits(fusion, about), result,
                     _shares(fusion))  # fmt: skip


def references(job: RealignJob, fusion: Fusion, how: Learning) -> tuple[Tensor, Tensor]:
    """Log-probabilities under the reference, of training and validation pairs; made once a run."""
    path = None if job.work is None else job.work / "reference.safetensors"
    found = None if path is None else read_snapshot(path)
    if found is None:
        job.say(f"log-probabilities of the reference, the {how.reference} model")
        if how.reference == "fused":
            fusion.place([_all_open(fusion)])
        else:
            for name, part in fusion.parts.items():
                with torch.no_grad():
                    fusion.parameters[name].copy_(
                        part.weights(lambda _, tasks: torch.zeros_like(tasks[0]))
                    )
        assert job.model is not None
        sides = {"train": job.train, "validation": job.validation}
        with job.autocast():
            found = Snapshot({
                side: job.answers(job.model, pairs, _groups(job, side, pairs))
                for side, pairs in sides.items() if pairs is not None
            })  # fmt: skip
        if path is not None:
            write_snapshot(found, path)
    tensors = found.tensors
    return tensors["train"], tensors.get("validation", torch.zeros(0, 2))


def _groups(job: RealignJob, side: str, pairs: Pairs) -> int | list[list[int]]:
    """Training pairs are asked in the batches in which they are trained on."""
    if side != "train" or job.kept is None:
        return job.settings.batch
    return groups_of([len(row) for row in pairs.leading.ids], job.settings)


def _all_open(fusion: Fusion) -> Draw:
    return lambda key: torch.ones((), device=fusion.tasks[key][0].device)


def _kept(job: RealignJob) -> str:
    saved = None if job.work is None else job.work / "train.safetensors"
    if saved is None or not saved.is_file():
        return ""
    return f"; the checkpoint before is kept in {saved.parent}"


@torch.no_grad()
def _open(fusion: Fusion) -> float:
    """Share of entries whose logit is above 0."""
    total = sum(float((p > 0).double().mean()) * fusion.sizes[key]
                for key, p in fusion.masks.logits.items())  # fmt: skip
    return total / max(1, sum(fusion.sizes.values()))


@torch.no_grad()
def _shares(fusion: Fusion) -> dict[str, tuple[float, int]]:
    """The mean of ``sigmoid(logit)`` of each tensor, and its entries."""
    return {key: (float(p.sigmoid().mean(dtype=torch.float64)), fusion.sizes[key])
            for key, p in fusion.masks.logits.items()}  # fmt: skip


def _mask(fusion: Fusion, about: Mapping[str, Any]) -> Mask:
    found = {}
    for key, logits in fusion.masks.logits.items():
        shape = tuple(fusion.tasks[key][0].shape)
        found[key] = np.broadcast_to((logits.detach() > 0).cpu().numpy(), shape)
    return Mask.of(found, about)


def _logits(fusion: Fusion, about: Mapping[str, Any]) -> Stats:
    """The logits of every entry, as ``suture localize`` reads them (rule ``learned``)."""
    found = {}
    for key, logits in fusion.masks.logits.items():
        shape = tuple(fusion.tasks[key][0].shape)
        found[f"logit/{key}"] = np.broadcast_to(logits.detach().float().cpu().numpy(), shape)
    return Stats(found, dict(about), "the learned logits")


__all__ = ["COLLAPSED", "Fusion", "Learning", "Somf", "learn", "references"]
