"""Per-sample gradients from hooks, held against one backward pass a sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import tiny_model
from suture.errors import SutureError
from suture.training import persample as module
from suture.training.persample import covered, persample, squares


def looped(
    model: nn.Module, names: list[str], values: Callable[[int], Tensor], n: int
) -> dict[str, Tensor]:
    """The slow twin: a backward pass for every sample."""
    known = dict(model.named_parameters())
    sums = {name: torch.zeros_like(known[name]) for name in names}
    for i in range(n):
        found = torch.autograd.grad(values(i), [known[n] for n in names], allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            if gradient is not None:
                sums[name] += gradient.square()
    return sums


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(float(e.max()) for e in expected.values())
    for name, value in expected.items():
        scale = max(float(value.max()), 1e-6 * largest)
        assert float((found[name] - value).abs().max()) <= 1e-6 * scale, name


class Net(nn.Module):
    """Every covered kind: a patch convolution, both norms, a linear that is called twice, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.twice = nn.Linear(6, 6)
        self.rms = nn.RMSNorm(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = self.twice(F.gelu(self.twice(self.norm(x))))
        out: Tensor = self.last(self.rms(x).mean(1))
        return out


def test_all_kinds_of_modules_equal_a_loop_over_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a module called twice, a 2-D input, and samples taken in chunks."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 2, 6, 6)
    names = covered(net)
    assert set(names) == {n for n, _ in net.named_parameters()}
    for chunk in (module.CHUNK, 1):
        monkeypatch.setattr(module, "CHUNK", chunk)
        sums, use = squares(net, names)
        with persample(net, names, use) as each:
            each.backward(F.log_softmax(net(x), -1)[:, 1])
        expected = looped(net, names, lambda i: F.log_softmax(net(x[i : i + 1]), -1)[0, 1], 5)
        assert_same(sums, expected)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_real_architectures_equal_a_loop_over_samples() -> None:
    """BERT (mean of tokens), Llama (RMSNorm, grouped queries) and GPT-2 (transposed Conv1D)."""
    torch.manual_seed(1)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=14, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)).eval()  # fmt: skip
    for model in (tiny_model.encoder().eval(), tiny_model.language_model().eval(), llama):
        ids = torch.randint(2, 14, (4, 7))
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0

        def values(
            rows: slice, model: nn.Module = model, ids: Tensor = ids, mask: Tensor = mask
        ) -> Tensor:
            out = model(input_ids=ids[rows], attention_mask=mask[rows])
            out = out if isinstance(out, Tensor) else out.logits
            return (out * torch.linspace(-1, 1, out.shape[-1])).flatten(1).sum(1)

        names = [
            n
            for n in covered(model)
            if "pooler" not in n and "head" not in n and "key.bias" not in n
        ]
        sums, use = squares(model, names)
        with persample(model, names, use) as each:
            each.backward(values(slice(None)))
        expected = looped(model, names, lambda i: values(slice(i, i + 1))[0], 4)
        assert_same(sums, expected)


def test_what_cannot_be_had_is_refused() -> None:
    """An embedding, a tied parameter, and a module that does not see one row a sample."""
    net = Net()
    with (
        pytest.raises(SutureError, match="last.weight"),
        persample(net, ["last.wight"], lambda *_: None),
    ):
        pass
    net.last.weight = net.twice.weight
    with (
        pytest.raises(SutureError, match="tied"),
        persample(net, ["twice.weight"], lambda *_: None),
    ):
        pass
    with pytest.raises(SutureError, match="one row a sample"):
        line = nn.Linear(2, 1)
        with persample(line, ["weight"], lambda *_: None) as each:
            each.backward(line(torch.randn(6, 2)).view(3, 2).sum(1))
