"""The strategies: each a function of its parameters, read from its signature, and a table line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from suture.checkpoints.linearized import LINEARIZED
from suture.errors import RecipeError, did_you_mean
from suture.schema.parameters import Choice, Number, Text, Words
from suture.schema.paths import place_of
from suture.schema.table import Table
from suture.tensors.roles import ROLES, role_of
from suture.training.calibrate import (
    Calibration,
    calibrate,
    prunable,
    sensitivity,
    smallest,
    structure,
    upper,
)
from suture.training.compact import Compact
from suture.training.loss import LossStep
from suture.training.strategy import Strategy, TrainJob, Tuned, entries, given_mask, ones

Way = Callable[[TrainJob], Tuned]

Share = Annotated[
    float, Number("share of the prunable entries that is trained, in (0, 1]", high=1, positive=True)
]
Embeddings = Annotated[bool, Choice("whether token and position embeddings are trained, too")]
Blocks = Annotated[
    int, Number("only the last so many transformer blocks; 0 for all", 0, 10**6, whole=True)
]
Rank = Annotated[int, Number("rank of the updates", 1, 65536, whole=True)]
Alpha = Annotated[float, Number("updates are scaled by alpha / rank", positive=True)]
Targets = Annotated[
    tuple[str, ...], Words("the matrices that get updates, by role", tuple(ROLES), single=True)
]
Rows = Annotated[int, Number("rows that sensitivity is measured on", 1, 2**31, whole=True)]
Seed = Annotated[int, Number("seed of the mask, 0 to 2**63 - 1", 0, 2**63 - 1, whole=True)]
Score = Annotated[
    Literal["fisher", "logit"],
    Choice("what is differentiated: log-probability or logit of a drawn label"),
]


def full(embeddings: Embeddings = True, blocks: Blocks = 0) -> Way:
    """Train every weight of the pretrained part.

    With ``blocks``, only those of the last so many transformer blocks and of the norm above them:
    embeddings, what stands below these blocks and the read-out stay as they are.
    """

    def way(job: TrainJob) -> Tuned:
        count = _everything(job, embeddings, blocks)
        return Tuned(job.train(LossStep(job.model, job.loss)), count)

    return way


def _everything(job: TrainJob, embeddings: bool, blocks: int) -> int:
    """Let every parameter of the body ask for gradients; how many entries that is."""
    names = [n for n, _ in job.model.named_parameters() if n.startswith(job.body)]
    learning = {
        n
        for n in upper(names, blocks)
        if n in job.places and (embeddings or role_of(n).kind not in ("embedding", "position"))
    }
    count = 0
    for name in names:
        parameter = job.model.get_parameter(name)
        parameter.requires_grad_(name in learning)
        count += parameter.numel() if name in learning else 0
    return count


def linearized(embeddings: Embeddings = True, blocks: Blocks = 0) -> Way:
    r"""Train the model's first-order expansion, :math:`f(x, \theta_0) + J \tau`, exactly.

    The output says that it is linearized; it is evaluated and combined as such. ``blocks`` means
    what it means to ``full``.
    """

    def way(job: TrainJob) -> Tuned:
        from suture.training.tangent import Tangent

        count = _everything(job, embeddings, blocks)
        mover = Tangent(job.model, job.loss)
        result = job.train(mover)
        evaluated = mover.evaluated
        return Tuned(result, count, form=LINEARIZED, evaluated=evaluated, finish=mover.move)

    return way


def lora(
    rank: Rank = 16,
    alpha: Alpha = 32.0,
    targets: Targets = ("q", "v"),
    dropout: Annotated[float, Number("share of inputs dropped in training", 0, 0.99)] = 0.0,
    blocks: Blocks = 0,
) -> Way:
    r"""Train low-rank updates, :math:`W = W_0 + (\alpha / r) B A`.

    They are merged into the weights at the end, and also saved as an adapter that PEFT reads.
    """

    def way(job: TrainJob) -> Tuned:
        from suture.training.lora import LoraUpdates

        seed = job.settings.seed
        adapter = LoraUpdates(
            job, rank=rank, alpha=alpha, targets=targets, dropout=dropout, seed=seed, blocks=blocks
        )
        count = adapter.count
        result = job.train(LossStep(job.model, job.loss))
        return Tuned(result, count, save=adapter.save, finish=adapter.merge)

    return way


def linearized_lora(
    rank: Rank = 16,
    alpha: Alpha = 32.0,
    targets: Targets = ("q", "v"),
    adapter_seed: Annotated[
        int, Number("seed of the frozen halves; the same for all tasks", 0, 2**31, whole=True)
    ] = 0,
    blocks: Blocks = 0,
) -> Way:
    r"""Low-rank updates, each linearized: :math:`W = W_0 + (\alpha / r) B A_0`, frozen :math:`A_0`.

    Updates of several tasks add up because :math:`A_0` is the same for all; its hash is saved, and
    merging checks it.
    """

    def way(job: TrainJob) -> Tuned:
        from suture.training.lora import LoraUpdates

        adapter = LoraUpdates(
            job, rank=rank, alpha=alpha, targets=targets, dropout=0.0, seed=adapter_seed,
            blocks=blocks,
        )  # fmt: skip
        digest = adapter.freeze_a()
        count = adapter.count
        result = job.train(LossStep(job.model, job.loss))
        return Tuned(result, count, adapter=digest, save=adapter.save, finish=adapter.merge)

    return way


def lota(
    density: Share = 0.1,
    dense_steps: Annotated[
        int,
        Number("steps of the dense phase; 0 for as many as the sparse one", 0, 2**31, whole=True),
    ] = 0,
    dense_lr: Annotated[
        float, Number("peak rate of the dense phase; 0 for that of the sparse one", 0)
    ] = 0.0,
) -> Way:
    r"""Train all, keep the entries that moved most, go back to the base, train these only.

    The mask holds the :math:`\lfloor \kappa N \rfloor` prunable entries with the largest
    :math:`|\theta - \theta_0|`.
    """

    def way(job: TrainJob) -> Tuned:
        names = _trainable(job, prunable(job.model))

        def largest() -> dict[str, Tensor]:
            known = dict(job.model.named_parameters())
            start = {
                n: p.detach().clone() for n, p in known.items() if n in names or n in job.head()
            }
            job.freeze()
            for name in names:
                known[name].requires_grad_()
            settings = replace(
                job.settings,
                steps=dense_steps or job.settings.steps,
                lr=dense_lr or job.settings.lr,
            )
            job.say("dense phase")
            job.train(LossStep(job.model, job.loss), "dense", settings)
            with torch.no_grad():
                moved = {n: (known[n] - start[n]).abs() for n in names}
                for name, value in start.items():
                    known[name].copy_(value)  # rewind
            budget = _budget(density, moved)
            return smallest(moved, ones(moved), budget, largest=True)

        masks = job.once("mask", largest, {"rule": "lota", "density": density})
        job.say("sparse phase")
        return _sparse(job, masks)

    return way


def talos(
    density: Share = 0.1,
    rounds: Annotated[int, Number("rounds of calibration", 1, 100, whole=True)] = 4,
    damping: Annotated[
        float,
        Number("factor on rejected entries in the next round, in (0, 1]", high=1, positive=True),
    ] = 0.1,
    draws: Annotated[
        int, Number("labels drawn from the model for each row", 1, 1000, whole=True)
    ] = 1,
    score: Score = "fisher",
    rows: Rows = 256,
    structure: Annotated[
        Literal["entry", "row"],
        Choice("whether single entries are chosen, or whole rows of matrices"),
    ] = "entry",
    blocks: Blocks = 0,
    least: Annotated[
        float, Number("a tensor with a smaller share chosen is left alone", 0, 1)
    ] = 0.01,
    seed: Seed = 0,
) -> Way:
    r"""Train only the entries that the model's outputs are least sensitive to.

    Rounds :math:`r = 1..K` keep the :math:`N \kappa^{r/K}` entries of smallest Fisher information
    and damp the others; the mask has exactly :math:`\lfloor \kappa N \rfloor` entries of the
    prunable ones (Linear, convolution and norms; no embeddings, heads or biases of keys).
    """
    how = Calibration(density, rounds, damping, draws, score, rows, structure, least, seed)

    def way(job: TrainJob) -> Tuned:
        def make() -> dict[str, Tensor]:
            names = _trainable(job, prunable(job.model, blocks=blocks))
            return calibrate(job.model, job.calibration, names, how, device=job.device, say=job.say)

        about = {"rule": "talos", **vars(how), "blocks": blocks}
        return _sparse(job, job.once("mask", make, about))

    return way


MASKS = ("dense", "random", "least-sensitive", "most-sensitive")
"""What ``mask`` may be, besides a file."""


def masked(
    mask: Annotated[
        str, Text("a mask or patch file, or dense, random, least-sensitive, most-sensitive")
    ],
    density: Share = 0.1,
    only: Annotated[
        tuple[str, ...], Words("roles that are trained; none given: all", tuple(ROLES), single=True)
    ] = (),
    rows: Rows = 256,
    seed: Seed = 0,
) -> Way:
    """Train the entries of a given mask: a saved one, those of a patch, or a control by name.

    ``random`` and the one-shot rankings choose the same number of entries as TaLoS of this density;
    ``dense`` takes all entries of the roles that ``only`` names.
    """

    def way(job: TrainJob) -> Tuned:
        return _sparse(
            job,
            job.once(
                "mask",
                lambda: make(job),
                {"rule": f"masked: {Path(mask).name}", "density": density},
            ),
        )

    def make(job: TrainJob) -> dict[str, Tensor]:
        if mask not in MASKS:
            path = place_of(mask, job.folder)
            if not path.is_file():
                raise RecipeError(f"parameters.mask: no file {path}; {did_you_mean(mask, MASKS)}")
            return job.masks_of(given_mask(path), str(path))
        known = dict(job.model.named_parameters())
        names = _trainable(job, prunable(job.model))
        budget = _budget(density, {n: known[n] for n in names})
        names = [n for n in names if not only or _part(n) in only]
        if not names:
            raise RecipeError(f"parameters.only: no prunable tensor is {' or '.join(only)}")
        everything = ones({n: known[n] for n in names})
        if mask == "dense":
            return everything
        if mask == "random":
            dice = torch.Generator().manual_seed(seed)
            scores = {
                n: torch.rand(known[n].shape, generator=dice).to(known[n].device) for n in names
            }
        else:
            scores = sensitivity(
                job.model,
                job.calibration,
                names,
                Calibration(rows=rows, seed=seed),
                device=job.device,
            )
        budget = min(budget, sum(m.numel() for m in everything.values()))
        return smallest(scores, everything, budget, largest=mask == "most-sensitive")

    return way


def _part(name: str) -> str:
    """The role of a parameter; a bias counts with its weight."""
    kind = role_of(name).kind
    return role_of(name.removesuffix("bias") + "weight").kind if kind == "bias" else kind


def _trainable(job: TrainJob, names: list[str]) -> list[str]:
    return [n for n in names if n in job.places]


def _budget(density: float, tensors: dict[str, Tensor]) -> int:
    budget = int(density * sum(t.numel() for t in tensors.values()) + 1e-9)
    if not budget:
        raise RecipeError(f"parameters.density: {density} of the prunable entries is not even one")
    return budget


def _sparse(job: TrainJob, masks: dict[str, Tensor]) -> Tuned:
    """Train the chosen entries, and a learned head with them."""
    head = ones(job.head())
    mover = Compact(job.model, {**masks, **head}, job.loss)
    result = job.train(mover)
    mover.close()
    facts: dict[str, Any] = {
        "structure": structure(masks),
        "tensors": sum(bool(m.any()) for m in masks.values()),
    }
    return Tuned(result, entries(masks), masks, facts=facts)


STRATEGIES = Table(
    "strategy",
    Strategy,
    (
        Strategy(full, "Full fine-tuning", "Ilharco et al. 2023, arXiv:2212.04089"),
        Strategy(
            linearized,
            "Linearized fine-tuning",
            "Ortiz-Jimenez et al. 2023, arXiv:2305.12827",
            lr=1e-4,
        ),
        Strategy(lora, "LoRA", "Hu et al. 2022, arXiv:2106.09685", lr=3e-4),
        Strategy(linearized_lora, "Linearized LoRA", "Tang et al. 2024, arXiv:2310.04742", lr=1e-3),
        Strategy(lota, "LoTA", "Panda et al. 2024, arXiv:2406.16797", sparse=True, lr=1e-4),
        Strategy(talos, "TaLoS", "Iurada et al. 2025, arXiv:2504.02620", sparse=True, lr=5e-4),
        Strategy(
            masked,
            "Training of a given mask",
            "Iurada et al. 2025, arXiv:2504.02620",
            sparse=True,
            lr=3e-4,
        ),
    ),
    group="suture.strategies",
)
"""Every fine-tuning strategy; another package adds one, see docs/plugins.md."""

__all__ = ["MASKS", "STRATEGIES"]
