"""One training loop, to be read from top to bottom; knows no merge.

``tune`` moves whatever parameters of a model ask for gradients.
"""

from __future__ import annotations

import math
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suture.errors import CheckpointError, MissingExtraError, NonFiniteError, RecipeError
from suture.schema.tuning import TuneSettings
from suture.training.data import Batch, Dataset, collate, fixed_plan, plan
from suture.training.kept import KeptStates
from suture.training.loss import Loss, LossStep, classification, to
from suture.training.snapshot import Snapshot, read_snapshot, write_snapshot


@dataclass(frozen=True)
class TrainingStep:
    """Where training stands, after a step."""

    step: int
    """Steps done, from 1."""
    steps: int
    """Steps in all."""
    loss: float
    """Mean loss of this step's batches."""
    lr: float
    """Learning rate of this step."""
    examples_per_second: float
    """Since the beginning."""
    eta: float
    """Seconds that the rest will take at this speed."""
    tokens_per_second: float = 0.0
    """Since the beginning, padding not counted."""
    score: float | None = None
    """What the validation rows gave after this step, if they were looked at."""
    unit: str = "tokens"
    """What ``tokens_per_second`` counts: tokens, or images."""


Tell = Callable[[str, TrainingStep], None]
"""Is told the phase and where training stands, after every step."""


@dataclass(frozen=True)
class TuneResult:
    """What training did; the model itself was changed in place."""

    steps: int
    """Optimizer steps."""
    examples: int
    """Rows seen, counted once an epoch."""
    losses: tuple[float, ...]
    """Mean loss of every step."""
    seconds: float
    """Wall time, that of interrupted runs not counted."""
    scores: tuple[tuple[int, float], ...] = ()
    """Steps and scores of every look at the validation rows."""
    best: int | None = None
    """The step whose weights were kept, where ``patience`` asks for the best."""


def tune(  # noqa: PLR0913 - who trains by hand needs each of these now and then
    model: nn.Module,
    data: Dataset,
    settings: TuneSettings,
    *,
    loss: Loss = classification,
    device: str = "cpu",
    progress: Callable[[TrainingStep], None] | None = None,
    mover: LossStep | None = None,
    score: Callable[[nn.Module], float] | None = None,
    checkpoint: Path | None = None,
    kept: KeptStates | None = None,
) -> TuneResult:
    """Train the parameters of ``model`` that ask for gradients, in place.

    The result depends on model, data and settings only: randomness is seeded inside, and the
    caller's random state is as before afterwards. The model keeps its mode.

    Args:
        model: what to train.
        data: the rows.
        settings: how to train.
        loss: of one batch.
        device: where the model is and the batches go.
        progress: is told after every step.
        mover: how to train, where it is not the plain way.
        score: looks at validation rows; the larger the better.
        checkpoint: a file to resume from, if it is there, and to save to. An interrupted run that
            goes on from it ends with the same losses and the same weights.
        kept: activations that stay as they are. The same rows then stand together in every epoch,
            and only the order of the batches is drawn anew.

    Raises:
        MissingExtraError: accelerate is not installed.
        NonFiniteError: the loss became NaN or infinite.
        OutputError: the checkpoint cannot be written.
        RecipeError: there is nothing to train, or nothing to train on.
    """
    mover = mover or LossStep(model, loss)
    trained = mover.trained()
    if not trained or not len(data):
        raise RecipeError(f"nothing to train: {len(trained)} parameters, {len(data)} rows")
    accelerator = _accelerator(settings.precision, device)

    # the plan: every process takes its share of the batches, and all take equally many
    each = math.ceil(len(data) / settings.batch) // accelerator.num_processes
    epoch_steps = math.ceil(each / settings.accumulate)
    steps = min(epoch_steps * settings.epochs, settings.steps or epoch_steps * settings.epochs)
    if not steps:
        raise RecipeError(f"{len(data)} rows do not give each of the processes a batch")
    lengths = [len(row) for row in data.ids]

    # the optimizer: AdamW; the rate is a function of the step, so it has no state of its own
    was_training = mover.model.training
    mover.prepare(accelerator)
    optimizer = torch.optim.AdamW(mover.groups(settings.weight_decay), lr=settings.lr, fused=True)
    stepper = accelerator.prepare(optimizer)
    mover.model.train()

    # the loop
    with _seeded(settings.seed, accelerator.device):
        run = _Run(mover, optimizer, stepper, accelerator, checkpoint, kept)
        run.resume()
        for step in range(run.step, 0 if run.stopped else steps):
            epoch, place = divmod(step, epoch_steps)
            if place == 0 or step == run.first:
                order = _order(lengths, settings, epoch, kept is not None)
                mine = order[accelerator.process_index :: accelerator.num_processes][:each]
            rows = mine[place * settings.accumulate :][: settings.accumulate]
            group = [to(collate(data, r), accelerator.device) for r in rows]

            lr = settings.lr * slope(step, steps, settings.warmup, settings.schedule)
            total = run.move(group, lr, settings.clip)
            if not math.isfinite(total):
                raise NonFiniteError(_not_finite(total, step + 1, settings, run))
            if score is not None and _is_time(step, steps, settings.validate_every or epoch_steps):
                run.look(score, settings.patience)
            if run.stopped or _is_time(step, steps, settings.save_every):
                run.save()
            if progress is not None:
                progress(run.progress(steps, lr, data.unit))
            if run.stopped:
                break
        run.keep_best()
        mover.after()

    mover.model.train(was_training)
    batches = run.step * settings.accumulate * accelerator.num_processes
    examples = min(batches * settings.batch, len(data) * settings.epochs)
    seconds = time.perf_counter() - run.began
    return TuneResult(run.step, examples, tuple(run.losses), seconds, tuple(run.scores), run.kept)


def groups_of(lengths: Sequence[int], settings: TuneSettings) -> list[list[int]]:
    """The rows that stand together in every epoch, where activations may be kept."""
    return fixed_plan(lengths, settings.batch, seed=settings.seed * 1_000_003)


def _order(
    lengths: Sequence[int], settings: TuneSettings, epoch: int, together: bool
) -> list[list[int]]:
    seed = settings.seed * 1_000_003 + epoch
    if not together:
        return plan(lengths, settings.batch, seed=seed)
    groups = groups_of(lengths, settings)
    random.Random(seed).shuffle(groups)
    return groups


def _is_time(step: int, steps: int, every: int) -> bool:
    """Whether something is due after a step, counted from 0; always after the last."""
    return (step + 1) % every == 0 or step + 1 == steps


def _not_finite(total: float, step: int, settings: TuneSettings, run: _Run) -> str:
    kept = f"; the checkpoint of step {run.saved} is kept" if run.saved else ""
    return f"the loss is {total} at step {step}: a smaller lr than {settings.lr} may help{kept}"


class _Run:
    """What changes while training, and how it gets to disk and back."""

    def __init__(
        self,
        mover: LossStep,
        optimizer: torch.optim.AdamW,
        stepper: Any,
        accelerator: Any,
        path: Path | None,
        kept: KeptStates | None,
    ) -> None:
        self.activations = kept
        if kept is not None and accelerator.num_processes > 1:
            kept.share_nothing()
        self.mover, self.optimizer, self.stepper = mover, optimizer, stepper
        self.accelerator, self.path = accelerator, path
        self.trained = mover.trained()
        self.losses: list[float] = []
        self.scores: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}
        self.kept: int | None = None
        self.stopped = False
        self.first = self.saved = 0
        self.rows = self.tokens = 0
        self.began = time.perf_counter()

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def move(self, group: Sequence[Batch], lr: float, clip: float) -> float:
        """One step of the optimizer on a group of batches; their mean loss.

        A batch weighs by what its loss is a mean over, so that a group is the same as one large
        batch. With a loss that is no number nothing moves.
        """
        for part in self.optimizer.param_groups:
            part["lr"] = lr
        weights = [self.mover.weight(batch) for batch in group]
        every = max(1, sum(weights))
        total = 0.0
        for batch, weight in zip(group, weights, strict=True):
            with self.fed(batch):
                total += self.mover.gradients(
                    self.accelerator, batch, weight / every, batch is group[-1]
                )
        if not math.isfinite(total):
            return total
        self.mover.before(self.accelerator, lr)
        self.accelerator.clip_grad_norm_(list(self.trained.values()), clip)
        self.stepper.step()
        self.stepper.zero_grad()
        self.mover.after()
        self.losses.append(total)
        self.rows += sum(len(b.rows) for b in group) * self.accelerator.num_processes
        tokens = sum(int(batch.attention_mask.sum()) for batch in group)
        self.tokens += tokens * self.accelerator.num_processes
        return total

    def fed(self, batch: Batch) -> AbstractContextManager[None]:
        """Inside, the model is given the activations that are kept for a batch, if any are."""
        if self.activations is None:
            return nullcontext()
        return self.activations.feeding(self.mover.asked(batch), self.accelerator.autocast)

    def progress(self, steps: int, lr: float, unit: str) -> TrainingStep:
        """Where training stands now."""
        spent = time.perf_counter() - self.began
        eta = (steps - self.step) * spent / (self.step - self.first)
        looked = self.scores[-1][1] if self.scores and self.scores[-1][0] == self.step else None
        speeds = self.rows / spent, self.tokens / spent
        loss = self.losses[-1]
        return TrainingStep(self.step, steps, loss, lr, speeds[0], eta, speeds[1], looked, unit)

    def look(self, score: Callable[[nn.Module], float], patience: int) -> None:
        """Score the model; remember it if it is the best, stop if it has not been for long."""
        found = score(self.mover.evaluated)
        earlier = [value for _, value in self.scores]
        self.scores.append((self.step, found))
        if patience and (not earlier or found > max(earlier)):
            self.best = {n: p.detach().clone() for n, p in self.trained.items()}
            self.kept = self.step
        since = sum(1 for at, _ in self.scores if self.kept is not None and at > self.kept)
        self.stopped = bool(patience) and since >= patience

    @torch.no_grad()
    def keep_best(self) -> None:
        """Put the best weights back, where they were remembered."""
        for name, value in self.best.items():
            self.trained[name].copy_(value)

    def save(self) -> None:
        """Write a checkpoint, if there is a place for it."""
        if self.path is None or not self.accelerator.is_main_process:
            return
        tensors: dict[str, Tensor] = {f"trained/{n}": p for n, p in self.trained.items()}
        tensors |= {f"best/{n}": t for n, t in self.best.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{word}": value for word, value in state.items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if self.accelerator.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        scaler = self.accelerator.scaler
        facts = {
            "losses": self.losses,
            "scores": self.scores,
            "kept": self.kept,
            "stopped": self.stopped,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        write_snapshot(Snapshot(tensors, facts), self.path)
        self.saved = self.step

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        found = None if self.path is None else read_snapshot(self.path)
        if found is None:
            return
        held = found.part("trained")
        if held.keys() != self.trained.keys() or any(
            held[n].shape != p.shape for n, p in self.trained.items()
        ):
            raise CheckpointError(f"{self.path}: is of another run; move it away")
        for name, parameter in self.trained.items():
            parameter.copy_(held[name])
        self.best = {n: t.to(self.trained[n].device) for n, t in found.part("best").items()}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in found.part("optimizer").items():
            number, word = key.split("/")
            state.setdefault(int(number), {})[word] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        facts = found.facts
        self.losses, self.scores = list(facts["losses"]), [tuple(s) for s in facts["scores"]]
        self.kept, self.stopped = facts["kept"], facts["stopped"]
        self.first = self.saved = self.step
        if facts["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        torch.set_rng_state(found.tensors["random/cpu"])
        if "random/cuda" in found.tensors:
            torch.cuda.set_rng_state(found.tensors["random/cuda"], self.accelerator.device)
        self.mover.after()


SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Ways to spread one model over processes, in which no process holds a whole tensor."""


def _accelerator(precision: str, device: str) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtraError("training", "finetune") from error
    kind = torch.device(device).type
    if kind == "cuda" and torch.device(device).index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
    try:
        accelerator = Accelerator(mixed_precision=precision, cpu=kind == "cpu")
    except ValueError as error:  # accelerate fixes both for the life of a process
        what = f"cannot train on {device} with precision {precision}"
        raise RecipeError(f"{what}: {error}") from error
    if accelerator.device.type != kind:
        raise RecipeError(f"cannot train on {device}: only {accelerator.device.type} is here")
    refuse_sharded(accelerator)
    return accelerator


def refuse_sharded(accelerator: Any) -> None:
    """Refuse to train where no process holds whole tensors.

    Raises:
        RecipeError: accelerate is set up for FSDP, DeepSpeed or Megatron.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind.upper() in SHARDED:
        raise RecipeError(
            f"accelerate is set up for {kind}, which is not supported: masks and checkpoints need "
            "whole tensors in every process; use one device, or several with a whole model each "
            "(`accelerate launch --multi_gpu`)"
        )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def slope(step: int, steps: int, warmup: float, schedule: str = "linear") -> float:
    """Factor on the peak rate at a step counted from 0: up to 1 linearly, then down towards 0."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    left = (steps - step) / max(1, steps - rising)
    return left if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def peak_memory(device: str) -> int:
    """Bytes of device memory at most; of the whole process where the device is the CPU."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
