"""Metrics, intervals and evaluations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny_model
from suture.errors import MismatchError, NonFiniteError, RecipeError
from suture.evals.base import Metric, mean, ratio, share
from suture.evals.embedding import agreement
from suture.evals.table import EVALS
from suture.training.data import Dataset, tokenise
from suture.training.labelled import LabelledText, labels_of
from suture.training.loss import token_losses
from suture.training.models import Classifier, Head, embed


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 9), (830, 1000)])
def test_a_wilson_interval_holds_the_shares_that_the_hits_do_not_contradict(
    hits: int, n: int
) -> None:
    """Slow twin: its ends are where (p - p0)^2 = z^2 p0 (1 - p0) / n."""
    metric = share("accuracy", hits, n)

    def contradicts(p0: float) -> bool:
        return (hits / n - p0) ** 2 > 1.959963984540054**2 * p0 * (1 - p0) / n

    grid = [i / 20000 for i in range(1, 20000) if not contradicts(i / 20000)]
    assert metric.low == pytest.approx(grid[0], abs=2e-4)
    assert metric.high == pytest.approx(grid[-1], abs=2e-4)
    assert 0 <= metric.low <= metric.value <= metric.high <= 1
    assert (metric.value, metric.n) == (hits / n, n)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_what_is_no_share_is_refused(hits: int, n: int) -> None:
    with pytest.raises(RecipeError, match="is not a share"):
        share("accuracy", hits, n)


def test_a_wilson_interval_covers_the_truth_as_often_as_it_says() -> None:
    draws = np.random.Generator(np.random.Philox(0)).binomial(80, 0.9, 2000)

    covered = [(m := share("a", int(hits), 80)).low <= 0.9 <= m.high for hits in draws]

    assert 0.93 <= sum(covered) / len(covered) <= 0.98


def test_a_bootstrap_interval_is_that_of_a_normal_mean() -> None:
    values = np.random.Generator(np.random.Philox(1)).normal(3, 2, 400).tolist()

    metric = mean("m", values)

    half = 1.96 * float(np.std(values)) / 20
    assert metric.value == pytest.approx(float(np.mean(values)))
    assert metric.high - metric.value == pytest.approx(half, rel=0.15)
    assert metric.value - metric.low == pytest.approx(half, rel=0.15)
    assert mean("m", values) == metric


def test_a_ratio_weighs_documents_by_their_tokens() -> None:
    assert ratio("loss", [10.0, 2.0], [10, 1]).value == pytest.approx(12 / 11)
    with pytest.raises(RecipeError, match="nothing was measured"):
        ratio("loss", [], [])


class Constant(nn.Module):
    """Gives the same logits whatever it reads."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.logits.expand(*input_ids.shape[: 3 - self.logits.ndim], *self.logits.shape)


DATA = Dataset(((1, 2, 3), (1, 2), (4,), (5, 6, 7, 8)), (0, 1, 1, 0), 0)


def test_accuracy_counts_the_rows_with_the_right_class() -> None:
    (metric,) = EVALS["accuracy"](Constant(torch.tensor([[0.0, 1.0]])[0]), _flat(DATA))

    assert metric == share("accuracy", 2, 4)


def _flat(data: Dataset):  # type: ignore[no-untyped-def]
    return [b._replace(input_ids=b.input_ids[:, 0]) for b in data.batches(3)]


def test_accuracy_without_labels_is_refused() -> None:
    head = Head(("a", "b"), torch.zeros(2, 16), torch.zeros(2))
    model = Classifier(tiny_model.encoder(), head)

    with pytest.raises(RecipeError, match="label on every row"):
        EVALS["accuracy"](model, replace(DATA, labels=(-1,) * 4).batches(2))
    with pytest.raises(RecipeError, match="0 of 0"):
        EVALS["accuracy"](model, [])


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    loss, perplexity = EVALS["loss"](Constant(torch.zeros(9)), DATA.batches(2))

    assert loss.value == pytest.approx(math.log(9))
    assert (perplexity.value, perplexity.low) == pytest.approx((9, 9))
    assert loss.n == 3  # a document of one token has nothing to predict


def test_loss_is_that_of_every_document_alone() -> None:
    """Slow twin: no batches, no padding, one token at a time."""
    model = tiny_model.language_model()
    total, tokens = 0.0, 0
    for ids in DATA.ids:
        row = torch.tensor([ids])
        with torch.no_grad():
            logits = model(row, torch.ones_like(row))[0].double()
        for at in range(1, len(ids)):
            total -= float(logits[at - 1].log_softmax(0)[ids[at]])
            tokens += 1

    loss, _ = EVALS["loss"](model, DATA.batches(4))

    assert loss.value == pytest.approx(total / tokens, rel=1e-4)


def test_padding_costs_nothing() -> None:
    ids, mask = torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 0]])

    assert token_losses(torch.randn(1, 3, 5), ids, mask)[0, 1] == 0


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match="not a finite number"):
        EVALS["loss"](Constant(torch.full((9,), float("nan"))), DATA.batches(2))


def test_an_encoder_agrees_with_itself_and_less_with_another() -> None:
    one, other = tiny_model.encoder(0), tiny_model.encoder(1)
    evaluate = agreement(embed(one, DATA.batches(3)))

    assert evaluate(one, DATA.batches(2))[0].value == pytest.approx(1, abs=1e-5)
    assert evaluate(other, DATA.batches(2))[0].value < 0.9
    with pytest.raises(MismatchError, match=r"vectors of \(2, 16\), the reference has \(4, 16\)"):
        evaluate(one, Dataset(DATA.ids[:2], (0, 0), 0).batches(2))


def test_the_neighbour_of_a_text_is_another_row() -> None:
    rows = [LabelledText(text, text) for text in ("red sun", "blue moon", "six five four")] * 2
    data = tokenise(rows, tiny_model.tokenizer(), labels=labels_of(rows), max_length=8)
    alone = replace(data, labels=tuple(range(6)))

    assert EVALS["neighbour"](tiny_model.encoder(), data.batches(4))[0] == share("neighbour", 6, 6)
    assert EVALS["neighbour"](tiny_model.encoder(), alone.batches(4))[0].value == 0
    with pytest.raises(RecipeError, match="needs an encoder, not a Constant"):
        EVALS["neighbour"](Constant(torch.zeros(2)), data.batches(4))


@pytest.mark.parametrize("training", [False, True])
def test_an_evaluation_leaves_the_model_as_it_was(training: bool) -> None:
    model = tiny_model.language_model()
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    first, again = (EVALS["loss"](model, DATA.batches(2)) for _ in range(2))

    assert first == again
    assert model.training is training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_metric_is_plain_data() -> None:
    assert Metric("a", 0.5, 2, 0.1, 0.9) == Metric.read(
        {"name": "a", "value": 0.5, "n": 2, "low": 0.1, "high": 0.9}
    )
