"""How far a model's next-token distributions have moved from those of another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from suture.errors import MismatchError
from suture.evals.kinds import Column, EvalJob, Models, Prepare, Run, Score, Template, dataset_of
from suture.evals.odds import filled, lead, prompt_ids
from suture.training.models import evaluating


def token_divergences(reference: Tensor, logits: Tensor) -> Tensor:
    """KL divergence of every position, in nats: ``sum_t p (log p - log q)``, p of the reference.

    Both are logits ``(positions, vocabulary)``; the result is ``(positions,)`` float32.
    """
    p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def drift(prompt: Template = "prompt", response: Column = "response") -> Prepare:
    """Mean KL divergence from the suite's ``reference`` to the model, in nats a response token.

    Over the tokens of the responses, each predicted from prompt and response before it. Zero where
    both are the same model; taken over responses of the reference, it tells how much of its manner
    is lost, over benign ones how much else has changed.
    """

    def prepare(job: EvalJob) -> Run:
        texts = filled(job, response)
        answers = dict(zip(
            texts, job.ids([lead(job) + t for t in texts.values()], plain=True), strict=True
        ))  # fmt: skip
        prompts = prompt_ids(job, prompt, {n: len(ids) for n, ids in answers.items()})
        rows = [n for n in prompts if answers.get(n)]
        data, order = dataset_of(
            {n: [*prompts[n], *answers[n]] for n in rows}, job.tokenizer,
            {n: [0] * len(prompts[n]) + [1] * len(answers[n]) for n in rows},
        )  # fmt: skip

        @torch.inference_mode()
        def run(models: Models) -> tuple[Score, ...]:
            assert models.reference is not None, "suites without a reference are refused"
            sums, counts = {}, {}
            with evaluating(models.model), evaluating(models.reference):
                for batch in data.batches(job.batch):
                    assert batch.targets is not None
                    ids = batch.input_ids.to(models.device)
                    mask = batch.attention_mask.to(models.device)
                    first, second = models.reference(ids, mask), models.model(ids, mask)
                    if first.shape != second.shape:
                        raise MismatchError(
                            f"the model has {second.shape[-1]} tokens and the reference "
                            f"{first.shape[-1]}: drift compares models of one tokenizer"
                        )
                    for at, row in enumerate(batch.rows):
                        told = batch.targets[at, 1:].nonzero()[:, 0]
                        each = token_divergences(first[at, told], second[at, told]).double()
                        total = float(each.sum())
                        sums[order[row]] = total if math.isfinite(total) else math.nan
                        counts[order[row]] = float(len(told))
                    models.tick(len(batch.rows))
            return (Score("divergence", sums, "ratio", counts, "lower"),)

        return run

    return prepare
