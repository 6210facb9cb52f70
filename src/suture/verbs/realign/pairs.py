"""Pairs of a safe and an unsafe answer to one prompt: rows to tokens, log-probabilities, DPO.

    L = -log sigmoid(beta ((lp(chosen) - ref(chosen)) - (lp(rejected) - ref(rejected))))

``lp`` is the sum of the log-probabilities of an answer's tokens (Rafailov et al. 2023,
arXiv:2305.18290). The reference is computed once, for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suture.errors import NonFiniteError, Problems, RecipeError
from suture.evals.base import Metric, mean, share
from suture.schema.sources import PairSpec
from suture.training.data import Batch, Dataset, collate, plan
from suture.training.kept import KeptStates, positions
from suture.training.labelled import cell, draw
from suture.training.loss import to, wanted
from suture.training.models import LanguageModel, evaluating
from suture.training.rows import Record, TokenRow, answer_tokens, need_columns, records_of

SIDES = ("train", "validation", "test")


@dataclass(frozen=True)
class Pairs:
    """Tokenised pairs: the first half of ``rows`` are chosen answers, the second the rejected."""

    rows: Dataset

    def __len__(self) -> int:
        return len(self.rows) // 2

    @property
    def leading(self) -> Dataset:
        """The chosen answers, by which batches are planned."""
        n = len(self)
        targets = self.rows.targets
        return Dataset(self.rows.ids[:n], (-1,) * n, self.rows.pad,
                       None if targets is None else targets[:n])  # fmt: skip

    def batch(self, rows: Sequence[int]) -> Batch:
        """Both answers of some pairs as one batch: chosen ones first."""
        return collate(self.rows, [*rows, *(len(self) + r for r in rows)])


class PairRows(NamedTuple):
    """The sides of the pairs, and what is to be said of them."""

    train: Pairs
    validation: Pairs
    test: Pairs
    notes: tuple[str, ...]

    @property
    def reported(self) -> Pairs:
        """The pairs whose numbers are reported."""
        return self.test if len(self.test) else self.validation


def read_pairs(spec: PairSpec, tokenizer: Any, longest: int, seed: int) -> PairRows:
    """Read and tokenise all sides; where a share is held out, a prompt is on one side only.

    Raises:
        RecipeError: there are no rows, all pairs are identical, a column is missing, an answer is
            empty or too long; all kinds of faults at once.
    """
    problems = Problems()
    sources = (spec.train, spec.validation, spec.test)
    columns = (spec.prompt, spec.chosen, spec.rejected)
    read: list[list[Record]] = []
    for name, source in zip(SIDES, sources, strict=True):
        read.append([])
        with problems.collecting():
            read[-1] = [] if source is None else records_of(source)
            need_columns((read[-1],), columns, Problems(), f"data.{name}")
    problems.raise_if_any()
    train = read[0][: spec.limit] if spec.limit else read[0]
    sides = [train, *read[1:]]
    if spec.validation is None:
        sides[:2] = [], []
        for where, record in train:
            key = cell(record, spec.prompt, where)
            sides[draw(seed, key) < spec.share].append((where, record))
    notes: list[str] = []
    found = [
        _tokenised(side, name, spec, tokenizer, longest, problems, notes)
        for side, name in zip(sides, SIDES, strict=True)
    ]
    problems.raise_if_any()
    notes += _twice(sides, spec)
    if spec.validation is None and (not len(found[0]) or (spec.share and not len(found[1]))):
        side = "validation" if len(found[0]) else "training"
        raise RecipeError(
            f"data.validation: {spec.share} of {len(train)} pairs leaves no {side} pairs; prompts "
            "are divided, never the pairs of one prompt"
        )
    return PairRows(found[0], found[1], found[2], tuple(notes))


def _twice(sides: Sequence[Sequence[Record]], spec: PairSpec) -> list[str]:
    """What is to be said of prompts that stand on two sides."""
    prompts = [[cell(record, spec.prompt, where) for where, record in side] for side in sides]
    told = []
    for one, other in ((1, 0), (2, 0), (2, 1)):
        known = set(prompts[other])
        both = sum(prompt in known for prompt in prompts[one])
        if both:
            told.append(f"{both} of {len(prompts[one])} {SIDES[one]} prompts are {SIDES[other]} "
                        "prompts, too: not held out")  # fmt: skip
    return told


def _tokenised(
    records: Sequence[Record], side: str, spec: PairSpec, tokenizer: Any, longest: int,
    problems: Problems, notes: list[str],
) -> Pairs:  # fmt: skip
    limit = spec.max_length or longest
    kept: list[list[TokenRow]] = []
    same = over = 0
    for where, record in records:
        with problems.collecting():
            prompt = cell(record, spec.prompt, where)
            texts = [cell(record, column, where) for column in (spec.chosen, spec.rejected)]
            for column, text in zip(
                (spec.prompt, spec.chosen, spec.rejected), (prompt, *texts), strict=True
            ):
                if not text.strip():
                    raise RecipeError(f"{where}: the column {column!r} is empty")
            if texts[0] == texts[1]:
                same += 1
                continue
            both = [answer_tokens(prompt, t, spec.chat, where, tokenizer) for t in texts]
            long = max(len(tokens.ids) for tokens in both)
            over += long > limit
            if long > limit and spec.too_long == "drop":
                continue
            kept.append([_cut(t, limit, long, spec, where) for t in both])
    if same and same == len(records):
        problems.add(
            RecipeError,
            f"data.{side}: in all {same} pairs {spec.chosen!r} and {spec.rejected!r} are "
            "identical; nothing tells what is safe",
        )
    elif records and spec.too_long == "drop" and same + over == len(records):
        problems.add(
            RecipeError,
            f"data.{side}: none of {len(records)} pairs is left: {over} have more than {limit} "
            f"tokens, {same} two equal answers; raise max_length, or say `too_long: cut`",
        )
    elif same:
        notes.append(f"{same} of {len(records)} {side} pairs have two equal answers; left out")
    if over and spec.too_long != "error":
        done = "cut" if spec.too_long == "cut" else "left out"
        notes.append(f"{over} of {len(records)} {side} pairs have more than {limit} tokens; {done}")
    rows = [pair[which] for which in (0, 1) for pair in kept]
    return Pairs(
        Dataset(
            tuple(tuple(row.ids) for row in rows), (-1,) * len(rows), tokenizer.pad_token_id or 0,
            tuple(tuple(row.targets or ()) for row in rows),
        )
    )  # fmt: skip


def _cut(tokens: TokenRow, limit: int, long: int, spec: PairSpec, where: str) -> TokenRow:
    if long > limit and spec.too_long == "error":
        raise RecipeError(
            f"{where}: {long} tokens, but max_length is {limit}; raise it, or say "
            "`too_long: cut` or `too_long: drop` under data"
        )
    found = TokenRow(tokens.ids[:limit], (tokens.targets or [])[:limit])
    if not any((found.targets or [])[1:]):
        raise RecipeError(f"{where}: an answer has no tokens: is it empty, or was it cut away?")
    return found


# -- numbers ---------------------------------------------------------------------------------------


def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """Of every row's answer, summed over its tokens: ``(rows,)``, differentiable.

    Only the positions before an answer's tokens are read out: the others' logits would only be
    multiplied by 0.
    """
    marks = wanted(batch)[:, 1:] == 1
    head = model.read_out() if isinstance(model, LanguageModel) else None
    if head is None:
        logits = model(batch.input_ids, batch.attention_mask)[:, :-1][marks]
    else:
        assert isinstance(model, LanguageModel)
        logits = head(model.hidden(batch.input_ids, batch.attention_mask)[:, :-1][marks])
    wide = logits if logits.dtype == torch.float64 else logits.float()
    found = -F.cross_entropy(wide, batch.input_ids[:, 1:][marks], reduction="none")
    return found.new_zeros(marks.shape).masked_scatter(marks, found).sum(1)


def dpo(answers: Tensor, reference: Tensor, beta: float) -> Tensor:
    """The losses of pairs: ``(pairs,)``.

    Args:
        answers: log-probabilities ``(pairs, 2)``, chosen and rejected.
        reference: the same under the reference.
        beta: how strongly a change is rewarded.
    """
    moved = answers - reference
    return -F.logsigmoid(beta * (moved[:, 0] - moved[:, 1]))


@torch.no_grad()
def answers_of(
    model: nn.Module, pairs: Pairs, groups: int | Sequence[Sequence[int]], device: str = "cpu",
    kept: KeptStates | None = None,
) -> Tensor:  # fmt: skip
    """Log-probabilities of all answers: ``(pairs, 2)`` float64 on the CPU.

    Args:
        model: a language model.
        pairs: whose answers.
        groups: the pairs of every batch, or how many a batch holds.
        device: where the model is.
        kept: activations that are the same for all models that are asked.

    Raises:
        NonFiniteError: the model gave NaN or infinity.
    """
    found = torch.zeros(len(pairs), 2, dtype=torch.float64)
    if isinstance(groups, int):
        groups = batches_of(pairs, groups)
    with evaluating(model):
        for rows in groups:
            batch = to(pairs.batch(rows), torch.device(device))
            with nullcontext() if kept is None else kept.feeding(batch):
                values = log_probabilities(model, batch).double().cpu()
            found[list(rows)] = values.view(2, -1).T
    if not torch.isfinite(found).all():
        raise NonFiniteError("the model gives an answer a probability that is not a finite number")
    return found


def batches_of(pairs: Pairs, size: int) -> list[list[int]]:
    """The pairs of every batch where nothing is trained, the longest first."""
    return plan([len(row) for row in pairs.leading.ids], size, seed=None)


def positions_of(pairs: Pairs, groups: Sequence[Sequence[int]]) -> int:
    """How many positions the batches of pairs have, both answers and padding included."""
    lengths, n = [len(row) for row in pairs.rows.ids], len(pairs)
    return positions(lengths, [[*rows, *(n + row for row in rows)] for rows in groups])


def margins(answers: Tensor, pairs: Pairs) -> tuple[Metric, Metric]:
    """Mean and sign of ``lp(chosen) / |chosen| - lp(rejected) / |rejected|``, a token's nats.

    The length of an answer is that of its tokens, so that short answers have no advantage.
    """
    assert pairs.rows.targets is not None
    lengths = torch.tensor([sum(row[1:]) for row in pairs.rows.targets], dtype=torch.float64)
    per_token = answers / lengths.view(2, -1).T
    gap = (per_token[:, 0] - per_token[:, 1]).tolist()
    return mean("margin", gap), share("preferred", sum(g > 0 for g in gap), len(gap))


__all__ = [
    "PairRows", "Pairs", "answers_of", "batches_of", "dpo", "log_probabilities",
    "margins", "positions_of", "read_pairs",
]  # fmt: skip
