"""Answers that a language model writes: the likeliest token each time, many prompts at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from suture.evals.kinds import EvalJob, Models
from suture.training.models import LanguageModel, evaluating

Step = Callable[[Tensor | None], Tensor]
"""Takes the tokens that were chosen, gives the logits of the next: ``(batch, vocabulary)``."""

Begin = Callable[[nn.Module, Sequence[Sequence[int]], int, str], Step]


def questions(job: EvalJob, template: str) -> dict[int, list[int]]:
    """The tokens of every prompt, with room left for the answer, by row; faults are noted."""
    prompts = job.prompts(template)
    found = {}
    for number, ids in zip(prompts, job.ids(list(prompts.values())), strict=True):
        fit = job.fit(number, ids, room=job.decoding.max_tokens, end=True)
        if fit is not None:
            found[number] = fit
    return found


@torch.inference_mode()
def generate(
    models: Models, job: EvalJob, prompts: Mapping[int, Sequence[int]]
) -> dict[int, str | None]:
    """What the model answers, by row; ``None`` where it gives no finite logits any more.

    Answers end at the model's end of a turn, before a stop text, or after ``max_tokens``. Prompts
    of like length share a batch, padded on the left, so that every row goes on at its own end. The
    answers do not depend on the batch but for the rounding of sums.
    """
    order = sorted(prompts, key=lambda n: (-len(prompts[n]), n))
    found: dict[int, str | None] = {}
    with evaluating(models.model):
        for start in range(0, len(order), job.batch):
            part = order[start : start + job.batch]
            answers = _batch(models, job, [prompts[n] for n in part])
            found.update(zip(part, answers, strict=True))
            models.tick(len(part))
    return {n: found[n] for n in prompts}


def _batch(models: Models, job: EvalJob, prompts: Sequence[Sequence[int]]) -> list[str | None]:
    begin: Begin = _cached if isinstance(models.model, LanguageModel) else _uncached
    pad = getattr(job.tokenizer, "pad_token_id", None) or 0
    step, stops = begin(models.model, prompts, pad, models.device), job.decoding.stop
    ends = torch.tensor(sorted(_ends(models.model, job.tokenizer)), dtype=torch.int64)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    broken = torch.zeros(len(prompts), dtype=torch.bool)
    said: list[list[int]] = [[] for _ in prompts]
    chosen: Tensor | None = None
    for _ in range(job.decoding.max_tokens):
        logits = step(chosen)
        broken |= ~done & ~logits.isfinite().any(1).cpu() | logits.isnan().any(1).cpu() & ~done
        chosen = logits.argmax(1).cpu()
        done |= broken | torch.isin(chosen, ends)
        for at in (~done).nonzero()[:, 0].tolist():
            said[at].append(int(chosen[at]))
            if stops and any(stop in _text(job.tokenizer, said[at]) for stop in stops):
                done[at] = True
        if bool(done.all()):
            break
    return [
        None if broken[at] else _before(_text(job.tokenizer, ids), stops)
        for at, ids in enumerate(said)
    ]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: the tokenizer's, and those of the model's own settings."""
    settings = getattr(getattr(model, "backbone", None), "generation_config", None)
    found = [getattr(tokenizer, "eos_token_id", None), getattr(settings, "eos_token_id", None)]
    return {
        int(end)
        for ends in found if ends is not None
        for end in (ends if isinstance(ends, list | tuple) else [ends])
    }  # fmt: skip


def _cached(model: Any, prompts: Sequence[Sequence[int]], pad: int, device: str) -> Step:
    """Reads prompts once and then one token a step, keeping keys and values."""
    backbone: Any = model.backbone
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(prompts):
        ids[at, longest - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[at, longest - len(row) :] = 1
    known = inspect.signature(backbone.forward).parameters
    few = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    state: dict[str, Any] = {"mask": mask.to(device), "past": None}

    def step(chosen: Tensor | None) -> Tensor:
        if chosen is None:
            read = ids.to(device)
        else:
            read = chosen[:, None].to(device)
            state["mask"] = torch.cat([state["mask"], torch.ones_like(read)], 1)
        positions = (state["mask"].cumsum(1) - 1).clamp(min=0)[:, -read.shape[1] :]
        where = {"position_ids": positions} if "position_ids" in known else {}
        out = backbone(
            input_ids=read, attention_mask=state["mask"], past_key_values=state["past"],
            use_cache=True, **where, **few,
        )  # fmt: skip
        state["past"] = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits

    return step


def _uncached(model: nn.Module, prompts: Sequence[Sequence[int]], pad: int, device: str) -> Step:
    """Reads everything anew at each step, padded on the right: for models that keep nothing."""
    texts = [list(row) for row in prompts]

    def step(chosen: Tensor | None) -> Tensor:
        if chosen is not None:
            for row, token in zip(texts, chosen.tolist(), strict=True):
                row.append(token)
        longest = max(map(len, texts))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in texts])
        ends = torch.tensor([len(row) for row in texts])
        mask = (torch.arange(longest) < ends[:, None]).long()
        logits: Tensor = model(ids.to(device), mask.to(device))
        return logits[torch.arange(len(texts)), (ends - 1).to(logits.device)]

    return step
