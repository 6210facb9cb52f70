"""The masked optimizer and the linearized model, held against their definitions."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import tiny_model
from suture.errors import RecipeError
from suture.schema.tuning import TuneSettings
from suture.training.compact import Compact
from suture.training.data import Dataset, tokenise
from suture.training.labelled import labels_of
from suture.training.loop import refuse_sharded, slope, tune
from suture.training.loss import classification
from suture.training.models import Classifier, Head, recompute_activations
from suture.training.tangent import LinearizedBody, Tangent, product

SETTINGS = TuneSettings(epochs=9, batch=8, lr=2e-3, weight_decay=0.1, clip=0.5, seed=1)


def data() -> Dataset:
    rows = tiny_model.rows()
    return tokenise(rows, tiny_model.tokenizer(), labels=labels_of(rows), max_length=8)


def classifier() -> Classifier:
    torch.manual_seed(3)
    model = Classifier(
        tiny_model.encoder(), Head(("colour", "sky"), torch.randn(2, 16), torch.zeros(2))
    )
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def random_masks(
    model: nn.Module, only: str = "attention", share: float = 0.3
) -> dict[str, Tensor]:
    torch.manual_seed(4)
    return {
        n: torch.rand(p.shape) < share
        for n, p in model.named_parameters()
        if only in n and "encoder.layer" in n
    }


def test_the_compact_optimizer_is_masked_adamw() -> None:
    """54 steps equal a dense AdamW whose update and decay are multiplied by the mask, the
    gradient masked before it is clipped; entries outside of the mask keep their bits."""
    model, rows = classifier(), data()
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    masks = random_masks(model)

    result = tune(model, rows, SETTINGS, mover=Compact(model, masks))

    known = dict(twin.named_parameters())
    state = {n: (torch.zeros_like(known[n]), torch.zeros_like(known[n])) for n in masks}
    step = 0
    losses = []
    for epoch in range(SETTINGS.epochs):
        for batch in rows.batches(8, seed=1_000_003 + epoch):
            twin.zero_grad()
            value = classification(twin, batch)
            value.backward()
            losses.append(value.item())
            grads = {n: known[n].grad * masks[n] for n in masks}  # type: ignore[operator]
            norm = torch.cat([g.flatten() for g in grads.values()]).norm()
            lr = SETTINGS.lr * slope(step, result.steps, SETTINGS.warmup)
            step += 1
            for name, grad in grads.items():
                grad = grad * (SETTINGS.clip / (norm + 1e-6)).clamp(max=1)
                m, v = state[name]
                m.mul_(0.9).add_(0.1 * grad)
                v.mul_(0.999).add_(0.001 * grad**2)
                move = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                decay = 0.1 if grad.ndim > 1 else 0.0
                known[name].data -= lr * masks[name] * (move + decay * known[name].data)

    assert result.steps == step == 54
    assert result.losses == pytest.approx(losses, rel=1e-4)
    before = dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        mask = masks.get(name, torch.zeros_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[~mask], before[name][~mask]), name
        torch.testing.assert_close(parameter, known[name], rtol=1e-4, atol=2e-5)
        if mask.any() and not name.endswith("key.bias"):
            assert not torch.equal(parameter[mask], before[name][mask]), name


def test_a_full_mask_is_stock_adamw() -> None:
    """With every entry chosen, weights are those of the plain loop, to the last bits of a sum."""
    model, rows = classifier(), data()
    model.encoder.backbone.pooler = None  # type: ignore[union-attr]
    plain = copy.deepcopy(model)
    masks = {
        n: torch.ones_like(p, dtype=torch.bool)
        for n, p in model.named_parameters()
        if p.requires_grad
    }

    one = tune(model, rows, SETTINGS, mover=Compact(model, masks))
    other = tune(plain, rows, SETTINGS)

    assert one.losses == pytest.approx(other.losses, rel=1e-5, abs=1e-6)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_accumulated_gradients_are_those_of_one_large_batch() -> None:
    """Gathering adds up over the batches of a step."""
    model, rows = classifier(), data()
    other = copy.deepcopy(model)
    masks = random_masks(model)
    tune(model, rows, replace(SETTINGS, epochs=2, batch=48), mover=Compact(model, masks))
    tune(
        other,
        rows,
        replace(SETTINGS, epochs=2, batch=10, accumulate=5),
        mover=Compact(other, masks),
    )
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_mixed_precision_moves_chosen_entries_only(other_precision: None) -> None:
    """Autocast to bfloat16: losses near those of float32, the rest keeps its bits."""
    model, rows = classifier(), data()
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    masks = random_masks(model)
    how = replace(SETTINGS, epochs=1, precision="bf16")
    mixed = tune(model, rows, how, mover=Compact(model, masks))
    AcceleratorState._reset_state(True)
    plain = tune(twin, rows, replace(how, precision="no"), mover=Compact(twin, masks))
    assert mixed.losses != plain.losses
    assert mixed.losses == pytest.approx(plain.losses, rel=0.05)
    for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True):
        mask = masks.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert torch.equal(p[~mask], q[~mask])


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_models_spread_over_processes_are_refused(kind: str) -> None:
    """No process would hold whole tensors there; one device, or several whole models, is fine."""
    with pytest.raises(RecipeError, match="is not supported"):
        refuse_sharded(SimpleNamespace(distributed_type=kind))
    refuse_sharded(SimpleNamespace(distributed_type="MULTI_GPU"))


def test_recomputed_activations_train_chosen_entries_only() -> None:
    """The same losses as without, and the rest keeps its bits."""
    model, rows = classifier(), data()
    start = copy.deepcopy(model)
    masks = random_masks(model)
    recompute_activations(model.encoder.backbone)  # type: ignore[arg-type]
    twin = copy.deepcopy(start)
    plain = tune(twin, rows, replace(SETTINGS, epochs=1), mover=Compact(twin, masks))
    mixed = tune(model, rows, replace(SETTINGS, epochs=1), mover=Compact(model, masks))
    assert mixed.losses == pytest.approx(plain.losses, rel=1e-5)
    for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True):
        mask = masks.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert torch.equal(p[~mask], q[~mask])


class Saved:
    """Bytes that autograd saves, each storage once, parameters left out."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.held: dict[int, tuple[int, Tensor]] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self.own:
            self.held[place] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(n for n, _ in self.held.values())


def saved_bytes(model: nn.Module, rows: Dataset) -> int:
    found = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(found.pack, lambda t: t):
        value = classification(model, next(iter(rows.batches(8))))
    total = found.nbytes
    value.backward()
    return total


def test_frozen_tensors_cost_nothing() -> None:
    """No gradient of a frozen tensor, no gradient left of a chosen one, fewer saved activations
    than dense training, and fewer still where only the last block is chosen."""
    rows = data()
    dense = classifier()
    all_bytes = saved_bytes(dense, rows)
    sizes = []
    for only in ("attention.self", "layer.1.attention.self"):
        model = classifier()
        masks = {n: m for n, m in random_masks(model, only).items() if "value" not in n}
        mover = Compact(model, masks)
        sizes.append(saved_bytes(model, rows))
        assert all(p.grad is None for p in model.parameters())
        assert mover.count == sum(int(m.sum()) for m in masks.values())
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(masks)
        assert all(f.grad is not None and f.grad.abs().sum() > 0 for f in mover.flats.values())
    assert sizes[1] < sizes[0] < all_bytes


def test_a_mask_that_does_not_fit_is_refused() -> None:
    """Another name, another shape."""
    with pytest.raises(RecipeError, match="fits no parameter"):
        Compact(classifier(), {"nonesuch": torch.ones(2, dtype=torch.bool)})


def with_tau(model: Classifier) -> Tangent:
    mover = Tangent(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for tau in mover.tau.values():
            tau.normal_(std=0.01)
    return mover


class OneProcess:
    """What a mover asks of accelerate, without it."""

    num_processes = 1

    @staticmethod
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", enabled=False)

    @staticmethod
    def backward(value: Tensor) -> None:
        value.backward()


def test_two_passes_give_the_gradient_of_the_linearized_loss() -> None:
    """Loss and gradient equal autograd through the forward-mode derivative, to 1e-5 relative."""
    model = classifier().eval()
    mover = with_tau(model)
    batch = next(iter(data().batches(8)))

    found = mover.gradients(OneProcess(), batch, 1.0, True)

    body, tau = (
        model.encoder,
        {n: t.detach().clone().requires_grad_() for n, t in mover.tau.items()},
    )
    base = {n: p.detach() for n, p in body.named_parameters()}

    def features(parameters: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(
            body, parameters, (batch.input_ids, batch.attention_mask)
        )
        return out

    with sdpa_kernel(SDPBackend.MATH):
        at, along = torch.func.jvp(features, (base,), (tau,))
    expected = F.cross_entropy(model.linear(at + along), batch.labels)
    wanted = torch.autograd.grad(expected, list(tau.values()), allow_unused=True)

    assert found == pytest.approx(expected.item(), rel=1e-6)
    for (name, t), gradient in zip(mover.tau.items(), wanted, strict=True):
        if gradient is None or t.grad is None:
            assert "pooler" in name
            continue
        scale = max(float(gradient.abs().max()), 1e-4)
        assert float((t.grad - gradient).abs().max()) < 1e-5 * scale, name
    assert all(p.grad is None for p in model.parameters())


def test_linearized_features_add_up() -> None:
    """Features of a sum of task vectors move by the sum of their moves: no cross terms at all."""
    model = classifier().eval()
    a, b = (
        with_tau(model).tau,
        {n: torch.randn_like(p) * 0.01 for n, p in model.encoder.named_parameters()},
    )
    batch = next(iter(data().batches(8)))

    def moved(tau: dict[str, Tensor]) -> Tensor:
        return product(model.encoder, tau, batch.input_ids, batch.attention_mask)[1]

    both = moved({n: a[n].detach() + b[n] for n in b})
    torch.testing.assert_close(both, moved(dict(a)) + moved(b), rtol=1e-4, atol=1e-5)


def test_linearized_training_learns_and_decays_the_weights() -> None:
    """The base stays where it is, the loss falls, and decay pulls at theta, not at tau."""
    model, rows = classifier(), data()
    start = copy.deepcopy(model)
    mover = Tangent(model)
    result = tune(model, rows, replace(SETTINGS, lr=1e-2, weight_decay=0.0, clip=5.0), mover=mover)
    assert sum(result.losses[-6:]) < 0.8 * sum(result.losses[:6])
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)
    )
    assert isinstance(mover.evaluated.encoder, LinearizedBody)  # type: ignore[union-attr]

    name = next(n for n, t in mover.tau.items() if t.ndim > 1)
    still = Tangent(start)
    still.groups(0.5)
    still.before(OneProcess(), 0.1)
    torch.testing.assert_close(still.tau[name].data, -0.05 * still.base[name].data)
