r"""Which entries matter least to what a model says: sensitivity, and masks in rounds (TaLoS).

The sensitivity of an entry is its Fisher information,

.. math:: F_j = E_x E_{y \sim p(\cdot|x)} (\partial \log p(y|x) / \partial \theta_j)^2,

with labels drawn from the model itself (Iurada et al. 2025, arXiv:2504.02620). Rounds keep ever
fewer entries; what a round rejects is multiplied by ``damping`` in the network that the next round
measures. This damping, not a ranking at the base, is what makes masks of queries and keys.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from suture.checkpoints.layers import below
from suture.errors import NonFiniteError, RecipeError
from suture.tensors.roles import role_of
from suture.training.data import Batch, Dataset, collate, plan
from suture.training.loss import to, wanted
from suture.training.models import evaluating
from suture.training.persample import covered, persample, squares

OUTSIDE = ("embedding", "position", "head", "pooler", "buffer", "router")
"""Roles that are never pruned. Rows of unseen tokens have exactly zero sensitivity and would take
the whole budget."""


@dataclass(frozen=True)
class Calibration:
    """How masks are made; the density is the share of prunable entries that stay trainable."""

    density: float = 0.1
    rounds: int = 4
    damping: float = 0.1
    draws: int = 1
    """Labels drawn from the model for each row."""
    score: str = "fisher"
    """``fisher`` differentiates the log-probability of the drawn label, ``logit`` its logit."""
    rows: int = 256
    """Rows that are looked at."""
    structure: str = "entry"
    """``entry``, or ``row`` for masks of whole rows of matrices."""
    least: float = 0.01
    """A tensor with a smaller share chosen is left alone; its budget goes to the others."""
    seed: int = 0


Say = Callable[[str], None]


def prunable(model: nn.Module, *, blocks: int = 0) -> list[str]:
    """Weights and biases of Linear and convolution, affine parts of norms; sorted.

    Never embeddings, positions, heads or poolers; nor biases of keys, whose gradient is zero since
    softmax does not see a shift: they would always be chosen and never learn.

    Args:
        model: a ``Classifier`` or ``LanguageModel``.
        blocks: only the last so many transformer blocks; 0 for everything.
    """
    names = [n for n in covered(model) if "backbone." in n and role_of(n).kind not in OUTSIDE]
    names = [
        n
        for n in names
        if not (n.endswith(".bias") and role_of(n.removesuffix("bias") + "weight").kind == "k")
    ]
    if blocks:
        kept = last_blocks(names, blocks)
        names = [n for n in names if role_of(n).layer in kept]
    return sorted(names)


def last_blocks(names: Iterable[str], blocks: int) -> frozenset[int]:
    """The numbers of the last so many transformer blocks, as the names of parameters count them.

    Examples:
        >>> sorted(last_blocks(["layers.0.w", "layers.1.w", "layers.2.w", "norm.w"], 2))
        [1, 2]

    Raises:
        RecipeError: there are fewer.
    """
    layers = sorted({layer for n in names if (layer := role_of(n).layer) is not None})
    if blocks > len(layers):
        raise RecipeError(f"blocks: the model has {len(layers)} blocks, not {blocks}")
    return frozenset(layers[len(layers) - blocks :])


def upper(names: Iterable[str], blocks: int) -> list[str]:
    """The parameters of the last so many transformer blocks and of the norm above them; 0: all.

    The norm above belongs to them, since nothing but what they give passes through it. Read-out,
    embeddings and a norm of embeddings do not.

    Examples:
        >>> upper(["embed.weight", "layers.0.w", "layers.1.w", "norm.weight", "lm_head.weight"], 1)
        ['layers.1.w', 'norm.weight']

    Raises:
        RecipeError: there are fewer blocks.
    """
    names = list(names)
    if not blocks:
        return names
    kept = last_blocks(names, blocks)
    return [
        n
        for n in names
        if role_of(n).layer in kept
        or (role_of(n).layer is None and role_of(n).kind == "norm" and not below(n))
    ]


def sensitivity(
    model: nn.Module,
    data: Dataset,
    names: Sequence[str],
    how: Calibration,
    *,
    seed: int = 0,
    device: str = "cpu",
    batch: int = 16,
) -> dict[str, Tensor]:
    """Sums of squared per-sample gradients of parameters, in float32.

    Raises:
        NonFiniteError: one of them is no number.
    """
    chosen = sorted(random.Random(how.seed).sample(range(len(data)), min(how.rows, len(data))))
    sums, use = squares(model, names)
    dice = torch.Generator().manual_seed(seed)
    groups = plan([len(data.ids[i]) for i in chosen], batch, seed=None)
    with evaluating(model), persample(model, names, use) as each:
        for _ in range(how.draws):
            for group in groups:
                part = to(collate(data, [chosen[i] for i in group]), torch.device(device))
                each.backward(_said(model, part, how.score, dice))
    wild = [name for name, total in sums.items() if not total.isfinite().all()]
    if wild:
        raise NonFiniteError(f"the sensitivity of {wild[0]} is not finite; the model overflows")
    return sums


def _said(model: nn.Module, batch: Batch, score: str, dice: torch.Generator) -> Tensor:
    """For each row, the log-probability (or logit) of a label drawn from the model itself."""
    logits = model(batch.input_ids, batch.attention_mask).float()
    if logits.ndim == 3:  # a language model: a token drawn at every place that has a target
        logits, counts = logits[:, :-1], wanted(batch)[:, 1:]
    else:
        logits, counts = logits[:, None], torch.ones(len(logits), 1, device=logits.device)
    logs = logits.log_softmax(-1)
    odds = logs.detach().exp().flatten(0, 1).cpu()
    drawn = torch.multinomial(odds, 1, generator=dice).view(*logits.shape[:2], 1).to(logits.device)
    values = (logs if score == "fisher" else logits).gather(-1, drawn)[..., 0]
    total: Tensor = (values * counts).sum(1)
    return total


def smallest(
    scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], count: int, *, largest: bool = False
) -> dict[str, Tensor]:
    """Exactly ``count`` of the living entries, those of smallest score; all tensors compete.

    Ties go to the first by name, then by position. Scores are not negative, so that their bits
    order them: two counts of 16 bits each find the threshold in constant memory.
    """
    bits = {n: s.float().contiguous().view(torch.int32) for n, s in scores.items()}
    if largest:
        bits = {n: 0x7F800000 - b for n, b in bits.items()}
    left, prefix = count, 0
    for shift in (16, 0):
        totals = torch.zeros(1 << 16, dtype=torch.int64)
        for name, held in bits.items():
            inside = held[alive[name]]
            if shift == 0:
                inside = inside[inside >> 16 == prefix] & 0xFFFF
            totals += torch.bincount(inside >> shift, minlength=1 << 16).cpu()
        ends = totals.cumsum(0)
        digit = int(torch.searchsorted(ends, left))
        if digit == 1 << 16:
            raise RecipeError(f"{count} entries are wanted, there are fewer")
        left -= int(ends[digit] - totals[digit])
        prefix = digit if shift else prefix << 16 | digit
    found = {}
    for name in sorted(bits):
        found[name] = alive[name] & (bits[name] < prefix)
        ties = (alive[name] & (bits[name] == prefix)).flatten().nonzero().flatten()[:left]
        found[name].view(-1)[ties] = True
        left -= len(ties)
    return found


@torch.no_grad()
def calibrate(
    model: nn.Module,
    data: Dataset,
    names: Sequence[str],
    how: Calibration,
    *,
    device: str = "cpu",
    batch: int = 16,
    say: Say = lambda _: None,
) -> dict[str, Tensor]:
    """The entries that stay trainable, as booleans by parameter; exactly ``floor(density * n)``.

    The model is changed while this runs and has its own bits back afterwards.
    """
    known = dict(model.named_parameters())
    base = {n: known[n].detach().clone() for n in names}
    chosen = {n: torch.ones_like(p, dtype=torch.bool) for n, p in base.items()}
    total = sum(p.numel() for p in base.values())
    budget = int(how.density * total + 1e-9)
    if not budget:
        raise RecipeError(
            f"density {how.density} of {total} prunable entries leaves nothing to train"
        )
    try:
        for number in range(1, how.rounds + 1):
            scores = sensitivity(
                model, data, names, how, seed=how.seed * 1009 + number, device=device, batch=batch
            )
            share = how.density ** (number / how.rounds)
            count = budget if number == how.rounds else int(total * share)
            chosen = smallest(scores, chosen, count)
            for name, kept in chosen.items():
                known[name].copy_(torch.where(kept, base[name], how.damping * base[name]))
            say(f"calibration: round {number} of {how.rounds}, {count:,} of {total:,} entries kept")
    finally:
        for name, value in base.items():
            known[name].copy_(value)
    if how.structure == "row":
        return _rows(chosen, budget)
    return _without_strays(chosen, scores, budget, how.least)


def _without_strays(
    chosen: dict[str, Tensor], scores: Mapping[str, Tensor], budget: int, least: float
) -> dict[str, Tensor]:
    """Let go of tensors with hardly an entry chosen, which would have to be kept alive for it."""
    keep = {n for n, c in chosen.items() if int(c.count_nonzero()) >= max(1, least * c.numel())}
    room = sum(chosen[n].numel() for n in keep)
    if room < budget:
        return chosen
    kept = {n: c if n in keep else torch.zeros_like(c) for n, c in chosen.items()}
    lost = budget - sum(int(c.count_nonzero()) for c in kept.values())
    if lost:
        free = {n: ~c if n in keep else torch.zeros_like(c) for n, c in kept.items()}
        more = smallest(scores, free, lost)
        kept = {n: c | more[n] for n, c in kept.items()}
    return kept


def _rows(chosen: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Round to whole rows of matrices, the fullest first; one row may be cut to meet the budget."""
    order = sorted(
        (-share, name, row)
        for name, kept in chosen.items()
        for row, share in enumerate(kept.float().reshape(len(kept), -1).mean(1).tolist())
        if share
    )
    found = {n: torch.zeros_like(c) for n, c in chosen.items()}
    left = budget
    for _, name, row in order:
        line = found[name].view(len(found[name]), -1)[row]
        line[:left] = True
        left -= min(left, line.numel())
    return found


def structure(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of all chosen entries that lies in each role; biases count with their weight."""
    counts: dict[str, int] = defaultdict(int)
    for name, mask in masks.items():
        kind = role_of(name).kind
        if kind == "bias":
            kind = role_of(name.removesuffix("bias") + "weight").kind + ".bias"
        counts[kind] += int(mask.count_nonzero())
    total = max(1, sum(counts.values()))
    return {kind: n / total for kind, n in sorted(counts.items(), key=lambda pair: -pair[1]) if n}
