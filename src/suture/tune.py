"""One training loop, to be read from top to bottom; knows no merge.

``tune`` moves whatever parameters of a model ask for gradients. ``fit_head`` fits a linear probe,
which is what a classifier starts from when only its encoder shall learn afterwards (linear
probing, then fine-tuning: Kumar et al., 2022).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suture.data import Batch, Dataset
from suture.errors import MissingExtraError, NonFiniteError, RecipeError
from suture.models import Head

PRECISIONS = ("no", "fp16", "bf16")
"""What ``TuneSettings.precision`` may be."""


@dataclass(frozen=True)
class TuneSettings:
    """How to train."""

    epochs: int = 1
    """How often every row is seen."""
    batch: int = 32
    """Rows in a batch."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step."""
    lr: float = 5e-5
    """Peak learning rate."""
    warmup: float = 0.1
    """Share of the steps over which the rate rises linearly to its peak; then it falls to 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; vectors (norms, biases) are never decayed."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    precision: str = "no"
    """Mixed precision: no, fp16 or bf16."""
    seed: int = 0
    """Seed of the order of rows and of dropout."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not (0 <= self.warmup <= 1 and self.lr > 0 and self.weight_decay >= 0 and self.clip > 0):
            raise RecipeError(f"warmup is a share, the other rates are positive; got {self}")
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise RecipeError(f"precision is one of {known}; got {self.precision!r}")


@dataclass(frozen=True)
class Progress:
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
    """Wall time."""


Loss = Callable[[nn.Module, Batch], Tensor]
"""Mean loss of one batch, a scalar; the batch is on the model's device."""


def classification(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a classifier."""
    return F.cross_entropy(model(batch.input_ids, batch.attention_mask).float(), batch.labels)


def tune(
    model: nn.Module,
    data: Dataset,
    settings: TuneSettings,
    *,
    loss: Loss = classification,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
) -> TuneResult:
    """Train the parameters of ``model`` that ask for gradients, in place.

    The result depends on model, data and settings only: randomness is seeded inside, and the
    caller's random state is as before afterwards. The model keeps its mode.

    Raises:
        MissingExtraError: accelerate is not installed.
        NonFiniteError: the loss became NaN or infinite.
        RecipeError: there is nothing to train, or nothing to train on.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained or not len(data):
        raise RecipeError(f"nothing to train: {len(trained)} parameters, {len(data)} rows")
    accelerator = _accelerator(settings.precision, device)

    # the plan: every process takes its share of the batches, and all take equally many
    each = math.ceil(len(data) / settings.batch) // accelerator.num_processes
    steps = math.ceil(each / settings.accumulate) * settings.epochs
    if not steps:
        raise RecipeError(f"{len(data)} rows do not give each of the processes a batch")

    # the optimizer: a linear rise to the peak rate, a linear fall to zero
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay}
    vectors = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=settings.lr)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: slope(step, steps, settings.warmup)
    )
    was_training = model.training
    prepared, stepper = accelerator.prepare(model, optimizer)
    prepared.train()

    # the loop
    losses: list[float] = []
    examples, began = 0, time.perf_counter()
    with _seeded(settings.seed, accelerator.device):
        for epoch in range(settings.epochs):
            batches = list(data.batches(settings.batch, seed=settings.seed * 1_000_003 + epoch))
            mine = batches[accelerator.process_index :: accelerator.num_processes][:each]
            for start in range(0, len(mine), settings.accumulate):
                group = [to(b, accelerator.device) for b in mine[start:][: settings.accumulate]]
                total = _backward(accelerator, prepared, group, loss)
                if not math.isfinite(total):
                    where = f"step {len(losses) + 1}: a smaller lr than {settings.lr} may help"
                    raise NonFiniteError(f"the loss is {total} at {where}")
                accelerator.clip_grad_norm_(trained, settings.clip)
                lr = float(optimizer.param_groups[0]["lr"])
                stepper.step()
                rate.step()
                stepper.zero_grad()

                losses.append(total)
                examples += sum(len(b.rows) for b in group) * accelerator.num_processes
                if progress is not None:
                    speed = examples / (time.perf_counter() - began)
                    eta = (steps - len(losses)) * (examples / len(losses)) / speed
                    progress(Progress(len(losses), steps, total, lr, speed, eta))

    model.train(was_training)
    return TuneResult(steps, examples, tuple(losses), time.perf_counter() - began)


def _backward(accelerator: Any, model: nn.Module, group: Sequence[Batch], loss: Loss) -> float:
    """Add up the gradients of a group of batches; the mean loss of its rows.

    Every batch weighs by its rows, so that a group is the same as one large batch.
    """
    rows, total = sum(len(batch.rows) for batch in group), 0.0
    for number, batch in enumerate(group, 1):
        last = number == len(group)  # processes exchange gradients once a step, not once a batch
        with nullcontext() if last else accelerator.no_sync(model), accelerator.autocast():
            value = loss(model, batch) * (len(batch.rows) / rows)
            accelerator.backward(value)
        total += float(value.detach())
    return total


def _accelerator(precision: str, device: str) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtraError("training", "finetune") from error
    kind = torch.device(device).type
    try:
        accelerator = Accelerator(mixed_precision=precision, cpu=kind == "cpu")
    except ValueError as error:  # accelerate fixes both for the life of a process
        what = f"cannot train on {device} with precision {precision}"
        raise RecipeError(f"{what}: {error}") from error
    if accelerator.device.type != kind:
        raise RecipeError(f"cannot train on {device}: only {accelerator.device.type} is here")
    return accelerator


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def slope(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak rate at a step counted from 0: up to 1 linearly, then down towards 0."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / max(1, steps - rising)


def to(batch: Batch, device: torch.device) -> Batch:
    """The same batch on a device."""
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    return Batch(ids, mask, batch.labels.to(device), batch.rows)


def fit_head(
    features: Tensor, targets: Tensor, labels: Sequence[str], *, l2: float = 1e-3, steps: int = 200
) -> Head:
    """Fit a linear probe: multinomial logistic regression by L-BFGS, to its only minimum.

    Minimises the mean cross-entropy plus ``l2 / 2`` times the squared norm of the weights, on
    features that are centred and divided by one number, their mean spread, so that ``l2`` means
    the same for every encoder; the head that comes back reads plain features. Dimensions are not
    scaled one by one: some encoders have constant ones, and noise there would rule the head.
    ``features`` are ``(n, dim)``, ``targets`` ``(n,)`` class numbers.
    """
    if not len(targets) or len(features) != len(targets):
        raise RecipeError(f"{len(features)} rows of features for {len(targets)} labels")
    x = features.double()
    middle = x.mean(0)
    spread = (x - middle).square().mean().sqrt().clamp(min=1e-9)
    x = (x - middle) / spread
    weight = torch.zeros(len(labels), x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(len(labels), dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, targets) + l2 / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(objective)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        plain = weight / spread
        return Head(tuple(labels), plain.float(), (bias - plain @ middle).float())
