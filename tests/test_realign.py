"""The mathematics of realignment: masks, Fuses and their gradients, preferences, baselines."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import refusing
from suture.analysis.ancestry import Factors, Part, Unmasked
from suture.training.data import Dataset
from suture.verbs.realign.concrete import (
    FLOOR,
    Masking,
    Masks,
    concrete,
    logistic,
    logit_shape,
    rescaled,
)
from suture.verbs.realign.fuse import Counted, Cut, Fuser, dice, fuser
from suture.verbs.realign.fusing import FUSES, Fusing
from suture.verbs.realign.pairs import Pairs, dpo, log_probabilities, margins
from suture.verbs.realign.somf import Fusion

HOWS = {
    "single": Fusing("single"),
    "average": Fusing("average"),
    "task_arithmetic": Fusing("task_arithmetic", 0.3),
    "ties": Fusing("ties", 0.4, 0.4),
    "ties-tensor": Fusing("ties", 0.4, 0.4, "tensor"),
    "dare": Fusing("dare", 0.3, 0.6),
}
"""Every Fuse, so that the tests below fail when one is forgotten."""


def test_every_fuse_is_proven() -> None:
    """The table and the tests agree."""
    assert {how.how for how in HOWS.values()} == set(FUSES)


def toy(how: str, *, granularity: str = "entry", rescale: str = "mean", start: float = 0.0,
        ) -> tuple[Any, Fusion]:  # fmt: skip
    """A GPT-2 of two layers in float64, and its fusion with one or three task vectors."""
    model = refusing.gpt2(seed=3).double()
    named = dict(model.backbone.named_parameters())
    tasks = 1 if how == "single" else 3
    parts: list[Part] = []
    for number, (name, parameter) in enumerate(named.items()):
        draw = torch.Generator().manual_seed(number)
        deltas = [
            torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.1
            for _ in range(tasks)
        ]
        parts.append(Unmasked(name, parameter.detach().clone(), deltas))
    masking = Masking(granularity, 0.5, rescale)
    return model, Fusion.of(parts, masking, HOWS[how], named, start)


def batch() -> tuple[Pairs, Any]:
    """Two pairs of answers of different lengths."""
    ids = ((3, 11, 17, 8, 5, 6, 2), (3, 12, 18, 8, 5, 6, 2), (3, 11, 17, 8, 4, 17, 10, 2),
           (3, 12, 18, 8, 4, 2))  # fmt: skip
    targets = tuple(tuple(int(at >= 4) for at in range(len(row))) for row in ids)
    pairs = Pairs(Dataset(ids, (-1,) * 4, 0, targets))
    return pairs, pairs.batch([0, 1])


def loss_of(model: Any, fusion: Fusion, seed: int, how: Fuser | None = None) -> Tensor:
    """The loss with fixed noise; DARE drops the same entries, TIES keeps those it is told."""
    draw = fusion.masks.drawn(seed)
    how = fusion.fuser(draw, seed) if how is None else how
    with torch.no_grad():
        for name in fusion.parts:
            fusion.parameters[name].copy_(fusion.weights(name, draw, how))
    answers = log_probabilities(model, batch()[1]).view(2, -1).T
    return dpo(answers, torch.tensor([[-9.0, -8.0], [-7.0, -9.0]]).double(), 0.1).mean()


@pytest.mark.parametrize(
    ("granularity", "rescale"),
    [("entry", "mean"), ("entry", "none"), ("row", "mean"), ("tensor", "none")],
)
@pytest.mark.parametrize("how", list(HOWS))
def test_the_gradient_is_that_of_finite_differences(
    how: str, rescale: str, granularity: str
) -> None:
    """Of the logits, for every Fuse, through the mean of the mask, in float64. What TIES keeps and
    the signs it elects are constant, as they are almost everywhere: the thresholds are moved off
    the entries that they stand on."""
    model, fusion = toy(how, granularity=granularity, rescale=rescale)
    fixed = fusion.fuser(fusion.masks.drawn(7), 7)
    off = {k: [Cut(c.threshold * (1 - 1e-4), 0) for c in cs] for k, cs in fixed.cuts.items()}
    fixed = replace(fixed, cuts=off)
    loss_of(model, fusion, 7, fixed).backward()
    fusion.pull(fusion.masks.drawn(7), fixed)
    dice_ = torch.Generator().manual_seed(1)
    for key in list(fusion.masks.logits)[::5]:
        logits = fusion.masks.logits[key]
        assert logits.grad is not None
        at = int(torch.randint(logits.numel(), (), generator=dice_))
        step, found = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                logits.view(-1)[at] += sign * step
                found.append(float(loss_of(model, fusion, 7, fixed)))
                logits.view(-1)[at] -= sign * step
        expected = (found[0] - found[1]) / (2 * step)
        assert float(logits.grad.view(-1)[at]) == pytest.approx(expected, rel=1e-5, abs=1e-8), key


def test_every_task_has_its_share_of_the_gradient_of_ties() -> None:
    """With the second task's change in one tensor 0, the logits there feel the other tasks: the
    published code passes on the gradient of the first task alone."""
    model, fusion = toy("ties")
    name = next(n for n in fusion.parts if "c_attn.weight" in n)
    for task in fusion.tasks[name][:1]:
        task.zero_()
    loss_of(model, fusion, 7).backward()
    fusion.pull(fusion.masks.drawn(7), fusion.fuser(fusion.masks.drawn(7), 7))
    grad = fusion.masks.logits[name].grad
    assert grad is not None
    assert grad.abs().max() > 0


@pytest.mark.parametrize("how", list(HOWS))
def test_open_masks_give_the_fused_model(how: str) -> None:
    """Logits of +20: the aligned model plus the fused task vectors, DARE with the same pattern."""
    _, fusion = toy(how, start=20.0)
    draw = fusion.masks.drawn(5)
    used = fusion.fuser(draw, 5)
    plain = fuser(fusion.fusing, list(fusion.tasks), lambda k: fusion.tasks[k], 5)
    for name, part in fusion.parts.items():
        expected = part.weights(plain)
        assert torch.allclose(fusion.weights(name, draw, used), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("how", list(HOWS))
def test_closed_masks_give_the_aligned_model(how: str) -> None:
    """Logits of -20 without rescaling: the aligned weights."""
    _, fusion = toy(how, rescale="none", start=-20.0)
    draw = fusion.masks.drawn(5)
    used = fusion.fuser(draw, 5)
    for name, part in fusion.parts.items():
        assert isinstance(part, Unmasked)
        assert torch.allclose(fusion.weights(name, draw, used), part.safe, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("granularity", ["entry", "row"])
def test_the_mean_of_a_rescaled_mask_is_one(granularity: str) -> None:
    """Of every tensor, in a draw and in all exports, as long as something is open."""
    _, fusion = toy("single", granularity=granularity)
    with torch.no_grad():
        for number, logits in enumerate(fusion.masks.logits.values()):
            logits += torch.randn(logits.shape, generator=torch.Generator().manual_seed(number))
            logits.view(-1)[0] = 1.0
    masks = fusion.masks
    draws = [masks.drawn(3), masks.soft(), masks.hard(), *masks.exported("averaged", 2, 0)]
    for draw in draws:
        for key in masks.logits:
            whole = draw(key).detach().expand_as(fusion.tasks[key][0])
            assert float(whole.mean()) == pytest.approx(1.0)


def test_what_a_draw_is() -> None:
    """At logit 0 and T = 0.5: mean 0.5, deviation 0.38, second moment of the rescaled mask 1.57;
    the share above 0.5 is sigmoid(logit) at any temperature."""
    logits = torch.zeros(400_000)
    u = logistic(logits, 0, "x")
    mask = concrete(logits, u, 0.5)
    assert float(mask.mean()) == pytest.approx(0.5, abs=2e-3)
    assert float(mask.std()) == pytest.approx(0.38, abs=5e-3)
    assert float(rescaled(mask, "mean").square().mean()) == pytest.approx(1.57, abs=0.01)
    for temperature in (0.1, 0.5, 2.0):
        above = concrete(logits + 1.2, u, temperature) > 0.5
        assert float(above.double().mean()) == pytest.approx(1 / (1 + math.exp(-1.2)), abs=3e-3)


def test_a_closed_tensor_is_not_blown_up() -> None:
    """Where all of a tensor is closed, its mean counts as the floor and not as 0."""
    closed = rescaled(torch.full((4, 4), 1e-9), "mean")
    assert float(closed.max()) == pytest.approx(1e-9 / FLOOR)
    assert not rescaled(torch.zeros(3), "mean").any()


def test_noise_belongs_to_seed_and_name() -> None:
    """Not to the order in which tensors are asked, nor to the caller's random state."""
    shapes = {"a": (3, 4), "b": (5,)}
    masks = Masks.fresh(shapes, Masking(), {"a": 0, "b": 0})
    one = masks.drawn(1)
    first = [one("a"), one("b")]
    torch.rand(7)
    again = masks.drawn(1)
    assert torch.equal(again("b"), first[1])
    assert torch.equal(again("a"), first[0])
    assert not torch.equal(masks.drawn(2)("a"), first[0])
    kept = masks.drawn(1, keep=True)
    assert torch.equal(kept("a"), first[0])
    assert torch.equal(kept("a"), first[0])


def test_a_row_is_an_output() -> None:
    """Also where matrices are stored as (inputs, outputs), as in GPT-2."""
    assert logit_shape((3, 5), "row") == (3, 1)
    assert logit_shape((3, 5), "row", across=1) == (1, 5)
    assert logit_shape((7,), "row", across=1) == (7,)
    assert logit_shape((3, 5), "tensor") == (1, 1)


# -- fuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_ties_is_what_its_slow_twin_gives(scope: str) -> None:
    """Trim, elect, sum, entry by entry in plain loops; ties of magnitude go by position."""
    draw = np.random.default_rng(0)
    shapes = {"a": (4, 5), "b": (7,), "c": (3, 3)}
    deltas = {
        k: [torch.tensor(draw.integers(-3, 4, s) / 2.0) for _ in range(3)]
        for k, s in shapes.items()
    }
    how = Fusing("ties", 0.4, 0.3, scope)
    found = fuser(how, list(shapes), lambda k: deltas[k])
    groups = [list(shapes)] if scope == "global" else [[k] for k in shapes]
    for group in groups:
        rows = [np.concatenate([deltas[k][t].numpy().ravel() for k in group]) for t in range(3)]
        trimmed = []
        for row in rows:
            order = sorted(range(row.size), key=lambda i: (-abs(row[i]), i))
            kept = set(order[: round(0.3 * row.size)])
            trimmed.append([x if i in kept else 0.0 for i, x in enumerate(row)])
        sums = [sum(column) for column in zip(*trimmed, strict=True)]
        balance = sum(int(s > 0) - int(s < 0) for s in sums)
        majority = 1 if balance >= 0 else -1
        expected = []
        for column, total in zip(zip(*trimmed, strict=True), sums, strict=True):
            sign = int(total > 0) - int(total < 0) or majority
            expected.append(0.4 * sum(x for x in column if int(x > 0) - int(x < 0) == sign))
        got = np.concatenate([found(k, deltas[k]).numpy().ravel() for k in group])
        np.testing.assert_allclose(got, expected, atol=1e-12)


def cuts(deltas: dict[str, Tensor], density: float) -> dict[str, Cut]:
    """Where one task's ranking is cut."""
    counted = Counted(density)
    for delta in deltas.values():
        counted.add(delta)
    counted.turn()
    for key, delta in deltas.items():
        counted.gather(key, delta)
    return counted.cuts(list(deltas))


def test_a_cut_keeps_an_exact_count() -> None:
    """Equal magnitudes are cut by position, over all tensors together; 0 is never kept."""
    deltas = {"a": torch.tensor([1.0, -1.0, 1.0]), "b": torch.tensor([1.0, 2.0, 0.0])}
    found = cuts(deltas, 0.5)
    assert found["a"].keep(deltas["a"]).tolist() == [True, True, False]
    assert found["b"].keep(deltas["b"]).tolist() == [False, True, False]
    sparse = {"a": torch.tensor([0.0, 0.0, 3.0, 0.0])}
    assert cuts(sparse, 1.0)["a"].keep(sparse["a"]).tolist() == [False, False, True, False]
    assert not cuts(sparse, 0.01)["a"].keep(sparse["a"]).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [1e-4, 0.2, 0.5, 0.9999, 1.0])
def test_a_cut_by_counting_is_that_of_sorting(density: float, dtype: torch.dtype) -> None:
    """Over normal and tiny magnitudes, many of them equal in bfloat16, in every dtype."""
    draw = torch.Generator().manual_seed(5)
    deltas = {
        key: (torch.randn(4000, generator=draw) * scale).to(dtype)
        for key, scale in (("a", 1.0), ("b", 1e-3), ("c", 1e-30))
    }
    sizes = torch.cat([d.abs() for d in deltas.values()]).double()
    order = torch.argsort(sizes, descending=True, stable=True)
    expected = torch.zeros(sizes.numel(), dtype=torch.bool)
    expected[order[: round(density * sizes.numel())]] = True
    found = cuts(deltas, density)
    assert torch.equal(torch.cat([found[k].keep(d) for k, d in deltas.items()]), expected)


def test_dare_keeps_the_expectation() -> None:
    """The mean over patterns is the sum of the task vectors, times the coefficient."""
    delta = [torch.ones(50_000), torch.full((50_000,), 2.0)]
    how = Fusing("dare", 0.3, 0.8)
    found = fuser(how, ["a"], lambda _: delta, 4)("a", delta)
    assert float(found.mean()) == pytest.approx(0.3 * 3.0, rel=0.01)
    assert torch.equal(found, fuser(how, ["a"], lambda _: delta, 4)("a", delta))
    assert not torch.equal(found, fuser(how, ["a"], lambda _: delta, 5)("a", delta))
    assert dice(1, "a").initial_seed() != dice(1, "b").initial_seed()


def test_factors_compose() -> None:
    """``W_0 + s (B + c dB)(A + c dA)``; a mask on one factor alone is not one on the product."""
    draw = torch.Generator().manual_seed(0)
    rest, left, right = (torch.randn(s, generator=draw) for s in ((4, 5), (4, 2), (2, 5)))
    lefts, rights = [torch.randn(4, 2, generator=draw)], [torch.randn(2, 5, generator=draw)]
    part = Factors("w", rest, left, right, lefts, rights, 1.5)
    assert list(part.deltas) == ["w:left", "w:right"]
    whole = part.weights(lambda _, tasks: tasks[0])
    assert torch.allclose(whole, rest + 1.5 * (left + lefts[0]) @ (right + rights[0]))
    none = part.weights(lambda _, tasks: torch.zeros_like(tasks[0]))
    assert torch.allclose(none, rest + 1.5 * left @ right)


# -- preferences -----------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_answers() -> None:
    """Token by token from the softmax; the prompt and padding count nothing."""
    model = refusing.llama(seed=2)
    pairs, both = batch()
    with torch.no_grad():
        found = log_probabilities(model, both)
    assert pairs.rows.targets is not None
    for row, (ids, marks) in enumerate(zip(pairs.rows.ids, pairs.rows.targets, strict=True)):
        whole = torch.tensor([ids])
        with torch.no_grad():
            logs = model(whole, torch.ones_like(whole)).log_softmax(-1)[0]
        expected = sum(float(logs[at - 1, ids[at]]) for at in range(1, len(ids)) if marks[at])
        assert float(found[row]) == pytest.approx(expected, rel=1e-5)


def test_the_loss_and_the_margin() -> None:
    """Of DPO, at the reference and away from it; the margin is a token's."""
    answers = torch.tensor([[-2.0, -6.0]])
    assert float(dpo(answers, answers, 0.1)) == pytest.approx(math.log(2))
    moved = dpo(answers, answers + torch.tensor([[1.0, -1.0]]), 0.5)
    assert float(moved) == pytest.approx(math.log(1 + math.exp(1.0)))
    one = Pairs(Dataset(((1, 2, 3), (1, 2, 3, 4)), (-1, -1), 0, ((0, 1, 1), (0, 1, 1, 1))))
    margin, preferred = margins(answers.double(), one)
    assert margin.value == pytest.approx(-2.0 / 2 + 6.0 / 3)
    assert preferred.value == 1.0
