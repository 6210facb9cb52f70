"""A model over rows to statistics, in one pass; the meters live and die here.

Gradients are those of single rows, exactly: the loss of a row depends on that row alone, so its
gradient of a layer's weights follows from what the layer read and from the gradient of what it
gave, without a backward pass for each row. This is checked against autograd on the first batch;
where a model mixes rows, or uses a parameter outside of a simple layer, rows go one at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suture.edits.stats import OF_INPUTS, Stats, check_kinds
from suture.errors import NonFiniteError, RecipeError, did_you_mean
from suture.training.data import Batch, Dataset
from suture.training.loss import to, token_losses, wanted, wide
from suture.training.models import evaluating, parameters_of
from suture.training.persample import Spare, Taps

GRADIENTS = ("fisher", "empirical_fisher", "abs_grad", "grad")
"""The kinds that need gradients."""
Labelling = tuple[Tensor, Tensor]
"""Loss of every row under labels that the model gives, and the weight of these labels, (rows,)."""


@dataclass(frozen=True)
class Objective:
    """What the loss of a row is."""

    name: str
    logits: Callable[[nn.Module, Batch], Tensor]
    losses: Callable[[Tensor, Batch], Tensor]
    """Loss of every row, ``(rows,)``, from the logits; a row's depends on that row alone."""
    labellings: Callable[[Tensor, Batch, int, int], Iterator[Labelling]]
    """The same under labels that the model itself gives, for the true Fisher information; from
    logits, batch, number of draws and seed."""
    labelled: bool = True
    """Whether rows need a label."""


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return wide(model(batch.input_ids, batch.attention_mask))


def _class_losses(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch.labels, reduction="none")


def _every_class(logits: Tensor, batch: Batch, draws: int, seed: int) -> Iterator[Labelling]:
    logs = logits.log_softmax(1)
    for label in range(logits.shape[1]):
        yield -logs[:, label], logs[:, label].detach().exp()


def _text_losses(logits: Tensor, batch: Batch) -> Tensor:
    asked = wanted(batch)
    each = token_losses(logits, batch.input_ids, asked)
    return each.sum(1) / asked[:, 1:].sum(1).clamp(min=1)


def _drawn_texts(logits: Tensor, batch: Batch, draws: int, seed: int) -> Iterator[Labelling]:
    # Positions are drawn independently given the text so far; the square of the summed gradient is
    # then an unbiased estimate, because the gradients of positions have mean zero.
    logs = logits[:, :-1].log_softmax(2)
    mask = wanted(batch)[:, 1:]
    for draw in range(draws):
        labels = torch.zeros_like(batch.input_ids[:, 1:])
        for at, row in enumerate(batch.rows):  # of its own generator: no row depends on its batch
            length = int(batch.attention_mask[at, 1:].sum())
            if length:
                own = ((seed * 1_000_003 + row) * 1009 + draw) % (1 << 63)  # torch takes no more
                generator = torch.Generator().manual_seed(own)
                shares = logs[at, :length].detach().exp().cpu()
                drawn = torch.multinomial(shares, 1, generator=generator)
                labels[at, :length] = drawn[:, 0].to(labels.device)
        losses = -logs.gather(2, labels[..., None])[..., 0] * mask
        yield losses.sum(1) / mask.sum(1).clamp(min=1), torch.full_like(losses[:, 0], 1 / draws)


OBJECTIVES = {
    o.name: o
    for o in (
        Objective("classification", _logits, _class_losses, _every_class),
        Objective("causal", _logits, _text_losses, _drawn_texts, labelled=False),
    )
}
"""Cross-entropy of a classifier; mean loss of the next token of a language model, over the answer
where rows have a prompt, a row each."""


def objective_named(name: str) -> Objective:
    """Look up an objective.

    Raises:
        RecipeError: there is none of this name.
    """
    if name not in OBJECTIVES:
        raise RecipeError(f"no objective {name!r}; {did_you_mean(name, list(OBJECTIVES))}")
    return OBJECTIVES[name]


def check_rows(data: Dataset, objective: Objective) -> None:
    """Refuse rows that give no loss.

    Raises:
        RecipeError: there are no rows, or labels are missing.
    """
    if not len(data):
        raise RecipeError("nothing to measure on: there are no rows")
    bare = sum(label < 0 for label in data.labels)
    if objective.labelled and bare:
        raise RecipeError(
            f"{bare} of {len(data)} rows have no label; {objective.name} needs one on each"
        )


def data_hash(data: Dataset) -> str:
    """A hash of token ids and labels, and of which tokens are to be predicted."""
    found = [data.ids, data.labels, *([] if data.targets is None else [data.targets])]
    text = json.dumps(found, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def measure(  # noqa: PLR0913  every word of the question
    model: nn.Module,
    data: Dataset,
    kinds: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    objective: Objective = OBJECTIVES["classification"],
    batch: int = 8,
    draws: int = 1,
    seed: int = 0,
    device: str = "cpu",
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Stats:
    """Gather statistics of a model, which is left as it was, over all rows of ``data``.

    Args:
        model: what is measured, in evaluation mode; on ``device``.
        data: tokenised rows.
        kinds: of ``stats.KINDS``, any set of them in one pass.
        names: parameters by their names in the checkpoint; by default every one.
        objective: what the loss of a row is.
        batch: rows that go through the model together; changes speed and memory only.
        draws: labels drawn for each position, for the true Fisher of a language model.
        seed: of those draws.
        device: where model and batches are.
        facts: kept with the statistics: ``model``, its fingerprint; ``at``, base or tuned.
        progress: called with the number of rows done since the last call.

    Raises:
        NonFiniteError: the loss of a row is NaN or infinite.
        RecipeError: there is nothing to measure, labels are missing, or no such kind.
        MismatchError: the model lacks a parameter.
    """
    wanted = check_kinds(kinds)
    check_rows(data, objective)
    parameters = parameters_of(model, names)
    sums = _Sums(wanted, parameters)
    inputs = _Inputs(model, parameters, wanted)
    rows = _Rows(model, parameters, objective, sums, draws, seed)
    with evaluating(model), _only(model, parameters):
        for part in data.batches(batch):
            found = to(part, torch.device(device))
            if inputs.kinds:
                losses = inputs.add(found, objective)
                if not sums.kinds:
                    rows.note(losses)
            if sums.kinds:
                rows.add(found)
            if progress is not None:
                progress(len(part.rows))
    count = len(data)
    known = {
        "rows": count, "tokens": sum(map(len, data.ids)), "loss": rows.loss / count,
        "data": data_hash(data), "objective": objective.name, "one_row_at_a_time": rows.single,
        "shared": inputs.shared, **({"draws": draws, "seed": seed} if "fisher" in wanted else {}),
        **(facts or {}),
    }  # fmt: skip
    return Stats(sums.means(count) | inputs.found(), known, "the measured statistics")


@contextmanager
def _only(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let only these parameters ask for gradients inside."""
    before = {p: p.requires_grad for p in model.parameters()}
    chosen = {id(p) for p in parameters.values()}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, asked in before.items():
            parameter.requires_grad_(asked)


class _Sums:
    """Sums over rows of what becomes of their gradients."""

    def __init__(self, kinds: Sequence[str], parameters: Mapping[str, nn.Parameter]) -> None:
        self.kinds = [k for k in kinds if k in GRADIENTS]
        self.totals = {
            k: {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
            for k in self.kinds
        }
        self.spare = Spare()

    @property
    def given(self) -> bool:
        """Whether gradients on the given labels are wanted."""
        return any(k != "fisher" for k in self.kinds)

    def add(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of one row on its own label."""
        gradient = gradient.float()
        for kind, total in ((k, self.totals[k][name]) for k in self.kinds):
            if kind == "abs_grad":
                total += torch.abs(gradient, out=self.spare.like(total))
            elif kind == "grad":
                total += gradient
            elif kind == "empirical_fisher":
                total.addcmul_(gradient, gradient)

    def add_drawn(self, name: str, gradient: Tensor, weight: float) -> None:
        """Add the gradient of one row on a label that the model gives."""
        gradient = gradient.float()
        self.totals["fisher"][name].addcmul_(gradient, gradient, value=weight)

    def means(self, rows: int) -> dict[str, Any]:
        """The means over rows, by ``kind/parameter``."""
        return {
            f"{kind}/{name}": (total / rows).cpu().numpy()
            for kind, totals in self.totals.items()
            for name, total in totals.items()
        }


Add = Callable[[str, int, Tensor], None]
"""Takes the name of a parameter, the place of a row in its batch, and the row's gradient."""


@dataclass
class _Rows:
    """Runs batches through the model and hands the gradient of every row to the sums."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    objective: Objective
    sums: _Sums
    draws: int
    seed: int
    loss: float = 0.0
    single: bool = False
    """Whether rows go one at a time."""
    checked: bool = False

    def add(self, batch: Batch) -> None:
        """Add the rows of one batch."""
        if not self.checked:
            self.single = not self._simple(batch)
            self.checked = True
        if self.single:
            for at in range(len(batch.rows)):
                self._one(_row(batch, at))
        else:
            self._many(batch)

    def note(self, losses: Tensor) -> None:
        """Add to the loss."""
        total = float(losses.detach().sum())
        if not math.isfinite(total):
            raise NonFiniteError(
                f"the loss of a row is {total}: the model is broken, or too large for its dtype"
            )
        self.loss += total

    def _one(self, batch: Batch) -> None:
        for losses, weight in self._passes(batch):
            found = torch.autograd.grad(losses.sum(), list(self.parameters.values()),
                                        retain_graph=True, allow_unused=True)  # fmt: skip
            for name, gradient in zip(self.parameters, found, strict=True):
                if gradient is not None and weight is None:
                    self.sums.add(name, gradient)
                elif gradient is not None and weight is not None:
                    self.sums.add_drawn(name, gradient, float(weight[0]))

    def _passes(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Losses of all rows on their own labels, then on those that the model gives."""
        logits = self.objective.logits(self.model, batch)
        losses = self.objective.losses(logits, batch)
        self.note(losses)
        if self.sums.given:
            yield losses, None
        if "fisher" in self.sums.kinds:
            yield from self.objective.labellings(logits, batch, self.draws, self.seed)

    def _many(self, batch: Batch) -> None:
        with Taps(self.model, self.parameters, len(batch.rows)) as taps:
            for losses, weight in self._passes(batch):
                weights = None if weight is None else weight.tolist()
                for name, at, gradient in taps.gradients(losses.sum()):
                    if weights is None:
                        self.sums.add(name, gradient)
                    else:
                        self.sums.add_drawn(name, gradient, weights[at])

    def _simple(self, batch: Batch) -> bool:
        """Whether the layers' own gradients add up to those that autograd gives."""
        with Taps(self.model, self.parameters, len(batch.rows)) as taps:
            losses = self.objective.losses(self.objective.logits(self.model, batch), batch)
            if not taps.complete:
                return False
            total = losses.sum()
            true = torch.autograd.grad(total, list(self.parameters.values()), retain_graph=True,
                                       allow_unused=True)  # fmt: skip
            # One parameter after the other: nothing but the true gradients is held for all.
            known = dict(zip(self.parameters, true, strict=True))
            for name, rows in groupby(taps.gradients(total), key=lambda one: one[0]):
                found = torch.zeros_like(self.parameters[name])
                for _, _, gradient in rows:
                    found += gradient
                if not _near(found, known.pop(name)):
                    return False
        return all(g is None or _near(torch.zeros_like(g), g) for g in known.values())


def _near(found: Tensor, true: Tensor | None) -> bool:
    known = torch.zeros_like(found) if true is None else true
    far = float((found - known).abs().max()) > 1e-4 * float(known.abs().max()) + 1e-7
    return not far  # NaN is not far: that the model is broken is told where losses are added


def _row(batch: Batch, at: int) -> Batch:
    length = int(batch.attention_mask[at].sum())
    one = slice(at, at + 1)
    targets = None if batch.targets is None else batch.targets[one, :length]
    return Batch(batch.input_ids[one, :length], batch.attention_mask[one, :length],
                 batch.labels[one], batch.rows[one], targets)  # fmt: skip


class _Inputs:
    """Sums over tokens of what linear layers read."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], kinds: Sequence[str]
    ) -> None:
        self.kinds = [k for k in kinds if k in OF_INPUTS]
        self.model = model
        self.shared: dict[str, str] = {}
        """Layers that are handed the very same tensor as another one, whose sum is theirs too."""
        names = {id(p): n for n, p in parameters.items()}
        self._layers: dict[nn.Module, str] = {
            layer: names[id(layer.weight)]
            for layer in model.modules()
            if isinstance(layer, nn.Linear) and id(layer.weight) in names
        }
        self._totals: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def add(self, batch: Batch, objective: Objective) -> Tensor:
        """Add what the layers read of one batch; the losses of its rows."""
        read: list[tuple[Tensor, str]] = []  # held for the pass, so that no two have one identity

        def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            name = self._layers[layer]
            same = next((other for held, other in read if held is args[0]), None)
            if same is not None and name not in self._totals:
                self.shared[name] = same
            if name not in self.shared:
                read.append((args[0], name))
                self._sum(name, _tokens_of(args[0], batch.attention_mask.bool()))

        hooks = [layer.register_forward_pre_hook(note) for layer in self._layers]
        try:
            with torch.no_grad():
                return objective.losses(objective.logits(self.model, batch), batch)
        finally:
            for hook in hooks:
                hook.remove()

    def _sum(self, name: str, x: Tensor) -> None:
        x = x.double()
        new = x.T @ x if "gram" in self.kinds else x.square().sum(0)
        self._totals[name] = self._totals[name] + new if name in self._totals else new
        self._tokens[name] = self._tokens.get(name, 0) + len(x)

    def found(self) -> dict[str, Any]:
        """The statistics by ``kind/parameter``."""
        out = {}
        for name, total in self._totals.items():
            if "gram" in self.kinds:
                out[f"gram/{name}"] = (total / max(1, self._tokens[name])).float().cpu().numpy()
            if "input_norm" in self.kinds:
                squares = total.diagonal() if "gram" in self.kinds else total
                out[f"input_norm/{name}"] = squares.sqrt().float().cpu().numpy()
        return out


def _tokens_of(x: Tensor, mask: Tensor) -> Tensor:
    """The inputs of all tokens that are no padding, ``(tokens, inputs)``."""
    if x.shape[:2] == mask.shape:
        return x[mask]
    flat = x.reshape(-1, x.shape[-1])
    return flat[mask.reshape(-1)] if len(flat) == mask.numel() else flat


__all__ = [
    "OBJECTIVES", "Objective", "check_rows", "data_hash", "measure", "objective_named",
]  # fmt: skip
