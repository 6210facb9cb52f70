"""The training loop and the linear probe."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tiny_model
from suture.errors import NonFiniteError, RecipeError
from suture.evals.table import EVALS
from suture.schema.tuning import TuneSettings
from suture.training import data as data_module
from suture.training.data import Dataset, tokenise
from suture.training.labelled import labels_of
from suture.training.loop import TrainingStep, classification, slope, tune
from suture.training.loss import next_token
from suture.training.models import Classifier, Head, embed
from suture.training.probe import fit_head

SETTINGS = TuneSettings(epochs=2, batch=8, lr=3e-3, seed=1)


def data_and_labels() -> tuple[Dataset, tuple[str, ...]]:
    rows = tiny_model.rows()
    labels = labels_of(rows)
    return tokenise(rows, tiny_model.tokenizer(), labels=labels, max_length=8), labels


def classifier() -> tuple[Classifier, Dataset]:
    data, labels = data_and_labels()
    encoder = tiny_model.encoder()
    head = fit_head(embed(encoder, data.batches(8)), torch.tensor(data.labels), labels)
    return Classifier(encoder, head), data


def test_training_lowers_the_loss_and_leaves_the_head_alone() -> None:
    model, data = classifier()
    head = model.head()

    result = tune(model, data, replace(SETTINGS, epochs=8))

    assert sum(result.losses[-6:]) < 0.5 * sum(result.losses[:6])
    assert EVALS["accuracy"](model, data.batches(8))[0].value > 0.95
    torch.testing.assert_close(model.head().weight, head.weight, rtol=0, atol=0)


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    start, data = classifier()
    found = []
    for seed in (1, 1, 2):
        model = copy.deepcopy(start)
        tune(model, data, replace(SETTINGS, seed=seed))
        torch.rand(3)  # what else happens in the process does not matter
        found.append(nn.utils.parameters_to_vector(model.parameters()))

    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_callers_random_state_is_left_alone() -> None:
    model, data = classifier()
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)

    tune(model, data, SETTINGS)

    assert torch.equal(torch.rand(2), expected)


def test_accumulated_batches_are_one_large_batch() -> None:
    """Unequal batches weigh by their rows, so the step is that of the whole."""
    start, data = classifier()
    whole, parts = copy.deepcopy(start), copy.deepcopy(start)
    no_dropout(whole)
    no_dropout(parts)

    once = tune(whole, data, replace(SETTINGS, epochs=1, batch=48))
    pieces = tune(parts, data, replace(SETTINGS, epochs=1, batch=10, accumulate=5))

    assert once.steps == pieces.steps == 1
    assert once.losses[0] == pytest.approx(pieces.losses[0], rel=1e-5)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_accumulated_batches_of_texts_are_one_large_batch() -> None:
    """A loss is a mean over target tokens, so batches weigh by them: short answers do not count
    more because they came in a batch of their own."""
    lengths = [12, 11, 3, 2, 9, 2]
    data = Dataset(
        tuple(tuple((7 * i + j) % len(tiny_model.WORDS) for j in range(n)) for i, n in enumerate(lengths)),
        (-1,) * 6, 0, tuple((0, *(int(j % (i + 1) == 0) for j in range(n - 1)))
                            for i, n in enumerate(lengths)),
    )  # fmt: skip
    start = tiny_model.language_model()
    no_dropout(start)
    whole, parts = copy.deepcopy(start), copy.deepcopy(start)
    how = TuneSettings(epochs=1, lr=1e-3, warmup=0.0, clip=1e9)

    once = tune(whole, data, replace(how, batch=6), loss=next_token)
    pieces = tune(parts, data, replace(how, batch=2, accumulate=3), loss=next_token)

    assert once.steps == pieces.steps == 1
    assert once.losses[0] == pytest.approx(pieces.losses[0], rel=1e-5)


def test_rows_are_put_in_order_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before every step: with a million rows that would take longer than the step."""
    model, data = classifier()
    seeds: list[int | None] = []

    def counted(lengths: list[int], size: int, *, seed: int | None) -> list[list[int]]:
        seeds.append(seed)
        return data_module.plan(lengths, size, seed=seed)

    monkeypatch.setattr("suture.training.loop.plan", counted)
    result = tune(model, data, replace(SETTINGS, epochs=2))

    assert result.steps > 2
    assert seeds == [SETTINGS.seed * 1_000_003, SETTINGS.seed * 1_000_003 + 1]


def no_dropout(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


class Line(nn.Module):
    """Logits that depend on the first token alone; small enough for a slow twin."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(len(tiny_model.WORDS), 2))
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.table[input_ids[:, 0]] + self.bias


def test_the_loop_is_adamw_with_a_slope_and_clipping() -> None:
    """The slow twin: the same steps written out with nothing but torch."""
    data, _ = data_and_labels()
    settings = TuneSettings(epochs=2, batch=8, lr=0.1, warmup=0.25, weight_decay=0.1, clip=0.2)
    model, twin = Line(), Line()

    result = tune(model, data, settings)

    state = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in twin.parameters()]
    step, steps = 0, 12
    for epoch in range(2):
        for batch in data.batches(8, seed=settings.seed * 1_000_003 + epoch):
            twin.zero_grad()
            F.cross_entropy(twin(batch.input_ids, batch.attention_mask), batch.labels).backward()
            norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()  # type: ignore[union-attr]
            step += 1
            lr = 0.1 * (step / 3 if step <= 3 else (steps - step + 1) / 9)
            for p, m, v in state:
                assert p.grad is not None
                grad = p.grad * (0.2 / norm).clamp(max=1)
                m.mul_(0.9).add_(0.1 * grad)
                v.mul_(0.999).add_(0.001 * grad**2)
                move = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                decay = 0.1 if p.ndim > 1 else 0.0
                p.data -= lr * (move + decay * p.data)
    assert result.steps == step == steps
    assert result.examples == 96
    torch.testing.assert_close(model.table.data, twin.table.data, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.bias.data, twin.bias.data, rtol=1e-3, atol=1e-4)


def test_the_rate_rises_to_one_and_falls_towards_zero() -> None:
    factors = [slope(step, 10, 0.3) for step in range(10)]

    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors[3:] == pytest.approx([7 / 7, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])
    assert slope(0, 5, 0.0) == 1
    assert all(0 < slope(step, 4, 1.0) <= 1 for step in range(4))


def test_progress_is_told_after_every_step() -> None:
    model, data = classifier()
    told: list[TrainingStep] = []

    result = tune(model, data, SETTINGS, progress=told.append)

    assert [at.step for at in told] == list(range(1, result.steps + 1))
    assert {at.steps for at in told} == {result.steps}
    assert tuple(at.loss for at in told) == result.losses
    assert max(at.lr for at in told) == pytest.approx(SETTINGS.lr)
    assert told[-1].eta == 0
    assert all(at.examples_per_second > 0 and at.eta >= 0 for at in told)


def test_the_model_keeps_its_mode() -> None:
    model, data = classifier()
    model.eval()

    tune(model, data, replace(SETTINGS, epochs=1))

    assert not model.training


def test_frozen_parameters_do_not_move() -> None:
    model, data = classifier()
    words = model.encoder.backbone.embeddings.word_embeddings.weight  # type: ignore[union-attr]
    words.requires_grad_(False)  # type: ignore[operator]
    before = words.clone()  # type: ignore[operator]

    tune(model, data, SETTINGS)

    assert torch.equal(words, before)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_training() -> None:
    model, data = classifier()

    with pytest.raises(NonFiniteError, match=r"the loss is nan at step 1: a smaller lr"):
        tune(model, data, SETTINGS, loss=lambda m, b: classification(m, b) * float("nan"))


def test_nothing_to_train_is_refused() -> None:
    model, data = classifier()

    with pytest.raises(RecipeError, match="0 rows"):
        tune(model, Dataset((), (), 0), SETTINGS)
    model.requires_grad_(False)
    with pytest.raises(RecipeError, match="0 parameters"):
        tune(model, data, SETTINGS)


def test_a_device_that_is_not_here_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    model, data = classifier()

    with pytest.raises(RecipeError, match="cannot train on cuda"):
        tune(model, data, SETTINGS, device="cuda")


def test_the_graphics_processor_that_is_named_is_the_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate knows the current one only: ``cuda:1`` is made that before it is asked, so that
    batches go where the model is."""
    model, data = classifier()
    chosen: list[str] = []

    def refused(**how: object) -> None:
        raise ValueError(f"asked with {chosen}")

    monkeypatch.setattr("accelerate.Accelerator", refused)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    for device in ("cuda", "cuda:1"):
        with pytest.raises(RecipeError, match=f"cannot train on {device}.*asked with"):
            tune(model, data, SETTINGS, device=device)
    assert chosen == ["cuda:1"]


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"lr": 0.0}, {"warmup": 2.0}, {"precision": "half"}, {"clip": -1.0}]
)
def test_settings_are_checked_at_the_door(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        TuneSettings(**wrong)  # type: ignore[arg-type]


def features(n: int = 60, dim: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, dim, generator=generator) * 3 + 7
    y = (x[:, 0] > 7).long() + (x[:, 1] > 8).long()
    return x, y


def test_a_probe_stands_at_the_minimum() -> None:
    """The gradient of the objective, in the features it was fitted on, is zero."""
    x, y = features()
    head = fit_head(x, y, "abc", l2=0.1)

    spread = (x - x.mean(0)).square().mean().sqrt()
    z = ((x - x.mean(0)) / spread).double()
    weight = (head.weight * spread).double().requires_grad_()
    bias = (head.bias + head.weight @ x.mean(0)).double().requires_grad_()
    value = F.cross_entropy(z @ weight.T + bias, y) + 0.05 * weight.square().sum()
    gradients = torch.autograd.grad(value, [weight, bias])

    assert max(float(g.abs().max()) for g in gradients) < 1e-4


def test_a_probe_reads_shifted_and_scaled_features_alike() -> None:
    x, y = features()

    plain, moved = fit_head(x, y, "abc"), fit_head(100 * x - 3000, y, "abc")

    def logits(head: Head, at: Tensor) -> Tensor:
        return at @ head.weight.T + head.bias

    torch.testing.assert_close(
        logits(plain, x), logits(moved, 100 * x - 3000), rtol=1e-2, atol=1e-2
    )


def test_a_constant_dimension_does_not_rule_a_probe() -> None:
    x, y = features()
    constant = torch.cat([x, torch.full((len(x), 1), 4.0) + 1e-7 * torch.randn(len(x), 1)], 1)

    head = fit_head(constant, y, "abc")

    assert float(head.weight[:, -1].abs().max()) < 1e-3
