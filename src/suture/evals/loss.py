"""How well a language model predicts documents: loss and perplexity per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suture.errors import NonFiniteError
from suture.evals.base import Metric, ratio
from suture.evals.kinds import EvalJob, Models, Prepare, Run, Score, dataset_of
from suture.schema.parameters import Text
from suture.training.data import Batch
from suture.training.loss import token_losses, wide
from suture.training.models import LanguageModel, evaluating


@torch.inference_mode()
def loss(model: nn.Module, batches: Iterable[Batch], *, device: str = "cpu") -> tuple[Metric, ...]:
    """Mean next-token loss (nats) and perplexity over all tokens but the first of each document.

    Documents count by their tokens; the intervals come from resampling whole documents, and
    ``n`` is the number of documents that have at least two tokens.

    Raises:
        NonFiniteError: the model gave NaN or infinity.
    """
    sums: list[float] = []
    counts: list[float] = []
    with evaluating(model):
        for batch in batches:
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            if batch.targets is not None:  # the answer is judged, not the prompt
                seen, mask = mask, batch.targets.to(device)
                each = target_losses(model, ids, seen, mask)
            else:
                each = token_losses(model(ids, mask), ids, mask)
            sums += each.sum(1).tolist()
            counts += (mask[:, 1:].sum(1)).tolist()
    if not all(map(math.isfinite, sums)):
        raise NonFiniteError("the model gave a loss that is not a finite number")
    pairs = [(s, c) for s, c in zip(sums, counts, strict=True) if c]
    nats = ratio("loss", [s for s, _ in pairs], [c for _, c in pairs])
    ends = (math.exp(nats.value), nats.n, math.exp(nats.low), math.exp(nats.high))
    return nats, Metric("perplexity", *ends)


def target_losses(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, targets: Tensor
) -> Tensor:
    """The same for tokens that are targets, 0 for others, whose logits are not computed.

    A model whose read-out is more than a matrix gives all logits.
    """
    head = model.read_out() if isinstance(model, LanguageModel) else None
    if head is None:
        return token_losses(model(input_ids, attention_mask), input_ids, targets)
    assert isinstance(model, LanguageModel)
    marks = targets[:, 1:] != 0
    states = model.hidden(input_ids, attention_mask)[:, :-1][marks]
    each = F.cross_entropy(wide(head(states)), input_ids[:, 1:][marks], reduction="none")
    return each.new_zeros(marks.shape).masked_scatter(marks, each)


@torch.inference_mode()
def row_losses(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: str = "cpu",
    tick: Callable[[int], None] = lambda rows: None,
) -> tuple[dict[int, float], dict[int, float]]:
    """Summed next-token loss (nats) of every row, and over how many tokens; NaN where it is none.

    Only ``targets`` count where a batch has them. Logits are read row by row: the float32 copies
    that a cross-entropy makes are then those of one row.
    """
    sums: dict[int, float] = {}
    counts: dict[int, float] = {}
    with evaluating(model):
        for batch in batches:
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            counted = mask if batch.targets is None else batch.targets.to(device)
            logits = model(ids, mask)
            for at, row in enumerate(batch.rows):
                each = token_losses(logits[at : at + 1], ids[at : at + 1], counted[at : at + 1])
                total = float(each.double().sum())
                sums[row] = total if math.isfinite(total) else math.nan
                counts[row] = float(counted[at, 1:].sum())
            tick(len(batch.rows))
    return sums, counts


def joined(
    job: EvalJob, prompts: dict[int, str], answers: dict[int, str]
) -> dict[int, list[list[int]]]:
    """Tokens of prompt and answer together, and 1 for those of the answer, by row.

    The two are tokenised as one text, as a model would write it, with spaces between them on the
    answer's side; where the prompt then ends in the middle of a token, each for itself.
    """
    rows = [n for n in prompts if n in answers]
    before = {n: prompts[n].rstrip() if not job.decoding.chat else prompts[n] for n in rows}
    after = {n: prompts[n][len(before[n]) :] + answers[n] for n in rows}
    starts = job.ids([before[n] for n in rows])
    wholes = job.ids([before[n] + after[n] for n in rows])
    ends = job.ids([after[n] for n in rows], plain=True)
    found = {}
    for n, start, whole, end in zip(rows, starts, wholes, ends, strict=True):
        ids = whole if whole[: len(start)] == start and len(whole) > len(start) else start + end
        found[n] = [ids, [0] * len(start) + [1] * (len(ids) - len(start))]
    return found


def prediction(
    text: Annotated[
        str, Text("the column of documents, every token of which counts", True)
    ] = "text",
    prompt: Annotated[str, Text("a column or text with {columns} that comes before", True)] = "",
    response: Annotated[str, Text("the column of answers; then only its tokens count", True)] = "",
) -> Prepare:
    """How well a language model predicts: nats a token, and their exponent, the perplexity.

    Documents count by their tokens, of which the first is given. With ``prompt`` and ``response``
    the answer is judged and the prompt is read.
    """

    def prepare(job: EvalJob) -> Run:
        if response:
            read = joined(job, job.prompts(prompt or "prompt"), job.column(response))
        else:
            if prompt:
                job.refuse("prompt: without a response there is nothing to come after it")
            texts = job.texts(text)
            whole = zip(texts, job.ids(list(texts.values())), strict=True)
            read = {n: [ids, [1] * len(ids)] for n, ids in whole}
        fitting: dict[int, list[int]] = {}
        targets: dict[int, list[int]] = {}
        for n, (ids, marks) in read.items():
            fit = job.fit(n, ids)
            if fit is not None:
                fitting[n], targets[n] = fit, marks[: len(fit)]
                if response and not any(targets[n][1:]):
                    job.refuse(f"{job.rows[n].where}: nothing of {response!r} is left to predict")
        if fitting and not any(any(marks[1:]) for marks in targets.values()):
            job.refuse("data: no row has two tokens; there is nothing to predict")
        data, order = dataset_of(fitting, job.tokenizer, targets)

        def run(models: Models) -> tuple[Score, ...]:
            sums, counts = row_losses(
                models.model, data.batches(job.batch), device=models.device, tick=models.tick
            )
            values = {order[n]: sums[n] for n in sums if counts[n]}
            weights = {order[n]: counts[n] for n in sums if counts[n]}
            return (
                Score("loss", values, "ratio", weights, "lower"),
                Score("perplexity", values, "exp-ratio", weights, "lower"),
            )

        return run

    return prepare
