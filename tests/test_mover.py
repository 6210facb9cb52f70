"""The loss of language models: its slow twin, what it keeps, and models whose read-out does more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from torch.nn import functional as F

import tiny_model
from suture.schema.tuning import TuneSettings
from suture.training import loss as mover
from suture.training.data import Batch, Dataset
from suture.training.loop import tune
from suture.training.loss import LossStep, ReadOutLoss, next_token
from suture.training.models import LanguageModel

ROWS = Dataset(
    ((2, 3, 4, 5, 6, 7), (3, 4, 5, 9), (8, 2, 8)), (-1, -1, -1), 0,
    ((0, 0, 1, 1, 0, 1), (0, 1, 1, 1), (0, 1, 0)),
)  # fmt: skip


def slow(model: LanguageModel, batch: Batch) -> torch.Tensor:
    """Position by position, as the definition says."""
    logits = model(batch.input_ids, batch.attention_mask)
    wanted = batch.attention_mask if batch.targets is None else batch.targets
    losses = [
        -logits[row, at - 1].float().log_softmax(-1)[batch.input_ids[row, at]]
        for row in range(len(logits))
        for at in range(1, logits.shape[1])
        if wanted[row, at]
    ]
    return torch.stack(losses).mean()


def gradients(loss: Any, model: LanguageModel, batch: Batch) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    value = loss(model, batch)
    value.backward()
    return float(value.detach()), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("targets", [True, False])
def test_the_loss_is_its_slow_twin(targets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and the gradient of every weight, the tied read-out's too, with few rows at a time."""
    monkeypatch.setattr(mover, "ROWS", 2)
    model = tiny_model.language_model()
    assert model.read_out() is not None
    batch = next((ROWS if targets else replace(ROWS, targets=None)).batches(3))
    value, found = gradients(next_token, model, batch)
    expected, twin = gradients(slow, model, batch)
    assert value == pytest.approx(expected, rel=1e-6)
    for name, gradient in twin.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_gradients_of_matrix_and_bias_pass_the_check_of_torch() -> None:
    """Against cross_entropy of a Linear, times a factor; a frozen matrix gets none."""
    torch.manual_seed(0)
    states, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((5, 4), (7, 4), (7,)))
    targets = torch.tensor([0, 6, 3, 3, 1])
    ours: Any = ReadOutLoss.apply(states, weight, bias, targets)
    theirs = F.cross_entropy(F.linear(states, weight, bias), targets)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(3 * ours, (states, weight, bias)),
        torch.autograd.grad(3 * theirs, (states, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    frozen: Any = ReadOutLoss.apply(states, weight.detach(), None, targets)
    frozen.backward()
    assert states.grad is not None


def test_nothing_as_wide_as_the_vocabulary_is_kept() -> None:
    """What autograd saves of the read-out is its input's gradient, not its logits."""
    config = transformers.GPT2Config(
        vocab_size=5000, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0
    )
    model = LanguageModel(transformers.GPT2LMHeadModel(config).eval())
    model.read_out()
    widths: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        widths.add(tensor.shape[-1] if tensor.ndim else 0)
        return tensor

    model.requires_grad_(False)
    model.get_parameter("backbone.transformer.h.0.attn.c_attn.weight").requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        next_token(model, next(ROWS.batches(3)))
    assert max(widths) < 5000


def test_a_read_out_that_caps_its_logits_is_left_to_the_model() -> None:
    """Gemma 2 bends its logits: the loss is that of what the model says, not of the matrix alone."""
    config = transformers.Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.05,
        query_pre_attn_scalar=8, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LanguageModel(transformers.Gemma2ForCausalLM(config).eval())
    assert model.read_out() is None
    batch = next(ROWS.batches(3))
    value, found = gradients(next_token, model, batch)
    expected, twin = gradients(slow, model, batch)
    assert value == pytest.approx(expected, rel=1e-5)
    for name, gradient in twin.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.fixture
def other_precision() -> Iterator[None]:
    """accelerate fixes the precision for the life of a process; tests want more than one."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_language_models_train_in_mixed_precision_with_accumulated_batches(
    other_precision: None,
) -> None:
    """bfloat16 autocast with two batches a step: losses near those of float32."""
    how = TuneSettings(epochs=6, batch=2, accumulate=2, lr=1e-3)
    losses = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(True)
        model = tiny_model.language_model()
        done = tune(
            model, ROWS, replace(how, precision=precision), mover=LossStep(model, next_token)
        )
        losses.append(done.losses)
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1][-1] < losses[1][0]
