"""Log-probabilities of many continuations of one prompt, from one pass over both.

The continuations of a prompt are a tree: what they share is read once, behind the prompt that all
share, and each token sees the prompt and its own ancestors only. Twenty openers of four tokens cost
about as much as one answer of forty. Models that cannot be read so (their positions or masks are
their own matter) are read one continuation at a time; which holds is found by reading a few both
ways. Every continuation has its exact probability under the model either way.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from suture.evals.kinds import EvalJob, Models
from suture.evals.loss import row_losses
from suture.training.data import Dataset
from suture.training.models import LanguageModel, evaluating

TOKENS = 4096
"""Tokens of a batch at most, padding included."""
LOGITS = 1 << 26
"""Logits of a batch at most: 256 MB in float32."""


class Tail(NamedTuple):
    """A continuation of a prompt."""

    ids: tuple[int, ...]
    start: int = 0
    """Tokens before it are given: they are read, and not counted."""


class Asked(NamedTuple):
    """A prompt and what may come after it."""

    prompt: tuple[int, ...]
    tails: tuple[Tail, ...]


class _Tree:
    """The tokens that tails of one prompt share, each once; the last of a tail is never read."""

    def __init__(self, tails: Sequence[Tail]) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        known: dict[tuple[int, int], int] = {}
        self.steps: list[list[tuple[int, int]]] = []
        """For each tail: the place whose logits tell of a token (0 is the prompt's end), and it."""
        for tail in tails:
            at, steps = 0, []
            for number, token in enumerate(tail.ids):
                if number >= tail.start:
                    steps.append((at, token))
                if number == len(tail.ids) - 1:
                    break
                if (at, token) not in known:
                    known[at, token] = len(self.tokens) + 1
                    self.tokens.append(token)
                    self.parents.append(at)
                    self.depths.append(number)
                at = known[at, token]
            self.steps.append(steps)


@torch.inference_mode()
def log_probabilities(
    models: Models, job: EvalJob, asked: Mapping[int, Asked]
) -> dict[int, tuple[float, ...]]:
    """Natural log-probability of each tail after its prompt, by row; NaN where it is not finite."""
    if not asked:
        return {}
    together = _together(models, job, asked)
    find = _in_trees if together else _one_by_one
    with evaluating(models.model):
        return find(models, job, asked)


def _together(models: Models, job: EvalJob, asked: Mapping[int, Asked]) -> bool:
    """Whether this model can be read in trees; seen from three tails of the first prompt."""
    backbone: Any = getattr(models.model, "backbone", None)
    if not isinstance(models.model, LanguageModel):
        return False
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return False
    first = next(iter(asked))
    prompt, tails = asked[first]
    longest = max(tails, key=lambda tail: len(tail.ids))
    few = {first: Asked(prompt, tuple(dict.fromkeys((tails[0], longest, tails[-1]))))}
    try:
        with evaluating(models.model):
            trees = _in_trees(Models(models.model, models.device), job, few)[first]
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    with evaluating(models.model):
        alone = _one_by_one(Models(models.model, models.device), job, few)[first]
    exact = next(models.model.parameters()).dtype == torch.float32
    near = 1e-3 if exact else 0.1
    return all(
        abs(a - b) <= near * (1 + abs(b)) or (a != a and b != b)
        for a, b in zip(trees, alone, strict=True)
    )


def _in_trees(
    models: Models, job: EvalJob, asked: Mapping[int, Asked]
) -> dict[int, tuple[float, ...]]:
    trees = {number: _Tree(one.tails) for number, one in asked.items()}
    order = sorted(asked, key=lambda n: (-len(asked[n].prompt) - len(trees[n].tokens), n))
    words = int(models.model.backbone.config.vocab_size)  # type: ignore[union-attr, arg-type]
    found: dict[int, tuple[float, ...]] = {}
    part: list[int] = []
    for number in order:
        grown = [*part, number]
        long = max(len(asked[n].prompt) for n in grown)
        wide = max(len(trees[n].tokens) for n in grown)
        if part and (
            len(grown) * (long + wide) > TOKENS or len(grown) * (wide + 1) * words > LOGITS
        ):
            found |= _batch(models, job, asked, trees, part)
            grown = [number]
        part = grown
    found |= _batch(models, job, asked, trees, part)
    return {number: found[number] for number in asked}


def _batch(
    models: Models, job: EvalJob, asked: Mapping[int, Asked], trees: Mapping[int, _Tree],
    rows: Sequence[int],
) -> dict[int, tuple[float, ...]]:  # fmt: skip
    """One pass: prompts padded on the left, so that all end at the same place, trees behind."""
    backbone: Any = models.model.backbone
    long = max(len(asked[n].prompt) for n in rows)
    wide = max(len(trees[n].tokens) for n in rows)
    pad = getattr(job.tokenizer, "pad_token_id", None) or 0
    ids = torch.full((len(rows), long + wide), pad)
    positions = torch.zeros_like(ids)
    seen = torch.eye(long + wide, dtype=torch.bool).repeat(len(rows), 1, 1)
    causal = torch.ones(long, long, dtype=torch.bool).tril()
    for at, number in enumerate(rows):
        prompt, tree = asked[number].prompt, trees[number]
        begin = long - len(prompt)
        ids[at, begin:long] = torch.tensor(prompt)
        positions[at, begin:long] = torch.arange(len(prompt))
        seen[at, begin:long, begin:long] |= causal[begin:, begin:]
        if not tree.tokens:
            continue
        end = long + len(tree.tokens)
        ids[at, long:end] = torch.tensor(tree.tokens)
        positions[at, long:end] = torch.tensor(tree.depths) + len(prompt)
        seen[at, long:end, begin:long] = True
        for node, parent in enumerate(tree.parents):
            if parent:  # what the parent sees, and itself
                seen[at, long + node, long:end] |= seen[at, long + parent - 1, long:end]
    kind = next(models.model.parameters()).dtype
    mask = torch.zeros(seen.shape, dtype=kind).masked_fill_(~seen, torch.finfo(kind).min)
    known = inspect.signature(backbone.forward).parameters
    few = {"logits_to_keep": wide + 1} if "logits_to_keep" in known else {}
    logits: Tensor = backbone(
        input_ids=ids.to(models.device), attention_mask=mask[:, None].to(models.device),
        position_ids=positions.to(models.device), use_cache=False, **few,
    ).logits[:, -(wide + 1) :]  # fmt: skip
    found = {}
    for at, number in enumerate(rows):
        steps = [step for steps in trees[number].steps for step in steps]
        places = torch.tensor([place for place, _ in steps], device=logits.device)
        tokens = torch.tensor([token for _, token in steps], device=logits.device)
        own = logits[at, : len(trees[number].tokens) + 1].float()
        each = (own[places, tokens] - own.logsumexp(-1)[places]).double().cpu()
        told = iter(each.tolist())
        sums = [math.fsum(next(told) for _ in tail) for tail in trees[number].steps]
        found[number] = tuple(s if math.isfinite(s) else math.nan for s in sums)
    models.tick(len(rows))
    return found


def _one_by_one(
    models: Models, job: EvalJob, asked: Mapping[int, Asked]
) -> dict[int, tuple[float, ...]]:
    ids, marks, owners = [], [], []
    for number, (prompt, tails) in asked.items():
        for tail in tails:
            ids.append((*prompt, *tail.ids))
            given = len(prompt) + tail.start
            marks.append((0,) * given + (1,) * (len(ids[-1]) - given))
            owners.append(number)
    pad = getattr(job.tokenizer, "pad_token_id", None) or 0
    data = Dataset(tuple(ids), (-1,) * len(ids), pad, tuple(marks))
    share = len(asked) / len(ids)
    sums, _ = row_losses(
        models.model, data.batches(job.batch), device=models.device,
        tick=lambda texts: models.tick(texts * share),
    )  # fmt: skip
    found: dict[int, list[float]] = {number: [] for number in asked}
    for at, number in enumerate(owners):
        found[number].append(-sums[at])
    return {number: tuple(values) for number, values in found.items()}


def log_sum(values: Sequence[float]) -> float:
    """``log sum exp``; of nothing minus infinity, NaN where one is NaN."""
    most = max(values, default=-math.inf)
    if any(v != v for v in values):
        return math.nan
    if most == -math.inf:
        return most
    return most + math.log(sum(math.exp(v - most) for v in values))


__all__ = ["Asked", "Tail", "log_probabilities", "log_sum"]
