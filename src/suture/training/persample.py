r"""Gradients of every sample alone, exactly, from one backward pass over a batch.

For a linear module with input :math:`a` and output gradient :math:`g`, the gradient of sample
:math:`b` is :math:`G_b = g_b^\top a_b`, one small matrix product a sample. Hooks catch
both; autograd is never asked for a weight gradient, so the pass costs a forward, the gradients of
activations, and the same products as an ordinary weight gradient.

Covered: Linear (also transformers' Conv1D), Conv1d/2d/3d without groups, and norms with an affine
part (LayerNorm, RMSNorm and their kin). Embeddings are not: rows of unseen tokens would have
gradients of exactly zero.

``Taps`` is for statistics, where those zeros are the truth: it takes every leaf module, embeddings
and tied tensors included, may differentiate one forward pass several times, and says where rows
cannot be told apart. ``persample`` hands gradients over while the backward pass runs, many rows at
a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from suture.errors import SutureError, did_you_mean

CHUNK = 64 << 20
"""Bytes of per-sample gradients that are held at once."""

Use = Callable[[str, Tensor], None]
"""Takes the name of a parameter and gradients ``(samples, *shape)``, some samples at a time."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product: Linear, or the transposed one of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_norm(module: nn.Module) -> bool:
    """Whether a module scales its last dimension, entry by entry, after a normalisation."""
    weight = getattr(module, "weight", None)
    known = isinstance(module, nn.LayerNorm | nn.RMSNorm) or (
        "norm" in type(module).__name__.lower()
        and not isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    )
    return known and isinstance(weight, Tensor) and weight.ndim == 1


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution over whole channels, as patch embeddings are."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1


def covered(model: nn.Module) -> list[str]:
    """The parameters whose per-sample gradients can be had, in the order of the model."""
    found = []
    for prefix, module in model.named_modules():
        if is_linear(module) or is_norm(module) or is_convolution(module):
            found += [
                f"{prefix}.{n}".lstrip(".") for n, _ in module.named_parameters(recurse=False)
            ]
    known = dict(model.named_parameters())
    return [name for name in found if name in known]


class _Watched(NamedTuple):
    module: nn.Module
    names: Mapping[str, str]
    """Which of its own parameters are asked for: ``weight`` or ``bias`` to the full name."""


class PerSample:
    """Hands the gradient of each sample to ``use``; made by ``persample``."""

    def __init__(self, watched: Collection[_Watched], use: Use) -> None:
        self._watched = watched
        self._use = use
        self._calls: dict[nn.Module, int] = {}
        self._seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def backward(self, values: Tensor) -> None:
        """Differentiate each of ``values`` ``(samples,)``, one number a sample, by itself.

        Raises:
            SutureError: a module was not called with one row a sample.
        """
        self._samples = len(values)
        try:
            values.sum().backward()  # type: ignore[no-untyped-call]
            for watched in self._watched:  # called more often than its outputs were used
                if self._seen.get(watched.module):
                    self._give(watched)
        finally:
            self._calls.clear()
            self._seen.clear()

    def _hook(self, watched: _Watched) -> Callable[..., None]:
        module = watched.module

        def forward(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not torch.is_grad_enabled():
                return
            if not output.requires_grad:
                output.requires_grad_()  # the first activation: from here on there is a graph
            read = inputs[0].detach()
            self._calls[module] = self._calls.get(module, 0) + 1

            def backward(gradient: Tensor) -> None:
                self._seen.setdefault(module, []).append((read, gradient.detach()))
                if len(self._seen[module]) == self._calls[module]:
                    self._give(watched)

            output.register_hook(backward)

        return forward

    def _give(self, watched: _Watched) -> None:
        calls = self._seen.pop(watched.module)
        module = watched.module
        if any(len(g) != self._samples for _, g in calls):
            raise SutureError(
                f"{next(iter(watched.names.values()))}: its module is not called with one row a "
                "sample (a mixture of experts?); per-sample gradients cannot be taken there"
            )
        size = max(4 * module.get_parameter(own).numel() for own in watched.names)
        step = max(1, CHUNK // max(1, size))
        for start in range(0, self._samples, step):
            part = [(a[start : start + step], g[start : start + step]) for a, g in calls]
            found = [_gradients(module, a.float(), g.float()) for a, g in part]
            for own, name in watched.names.items():
                total = found[0][own]()
                for other in found[1:]:  # a module called twice: one gradient, their sum
                    total = total + other[own]()
                self._use(name, total)


@contextmanager
def persample(model: nn.Module, names: Collection[str], use: Use) -> Iterator[PerSample]:
    """Watch a model; inside, run forward and ``backward(values)`` as often as you like.

    ::

        with persample(model, names, use) as each:
            for batch in batches:
                each.backward(score(model(batch.input_ids, batch.attention_mask)))

    All parameters are frozen inside, and as before afterwards. The model should be in ``eval`` mode
    and must not mix samples (no batch norm in training).

    Raises:
        SutureError: a name is no parameter of a covered module.
    """
    watched = _watched(model, names)
    meter = PerSample(watched, use)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    handles = [w.module.register_forward_hook(meter._hook(w)) for w in watched]
    try:
        model.requires_grad_(False)
        with torch.enable_grad():
            yield meter
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked[name])


def squares(model: nn.Module, names: Collection[str]) -> tuple[dict[str, Tensor], Use]:
    """Zeros in the shapes of parameters, and a ``use`` that adds squared gradients to them."""
    known = dict(model.named_parameters())
    sums = {name: torch.zeros_like(known[name], dtype=torch.float32) for name in names}

    def use(name: str, gradients: Tensor) -> None:
        sums[name] += gradients.square_().sum(0)

    return sums, use


def _watched(model: nn.Module, names: Collection[str]) -> list[_Watched]:
    wanted = set(names)
    holders: dict[int, int] = {}
    found = []
    for prefix, module in model.named_modules():
        own = {
            word: f"{prefix}.{word}".lstrip(".")
            for word, _ in module.named_parameters(recurse=False)
        }
        for word in own:
            held = id(module.get_parameter(word))
            holders[held] = holders.get(held, 0) + 1
        mine = {o: n for o, n in own.items() if n in wanted}
        if mine and (is_linear(module) or is_norm(module) or is_convolution(module)):
            found.append(_Watched(module, mine))
    there = [n for w in found for n in w.names.values()]
    for name in sorted(wanted - set(there)):
        raise SutureError(f"no per-sample gradient of {name}; {did_you_mean(name, covered(model))}")
    for watched in found:
        for word, name in watched.names.items():
            if holders[id(watched.module.get_parameter(word))] > 1:
                raise SutureError(f"{name}: tied to another module; leave it out")
    return found


def _gradients(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Callable[[], Tensor]]:
    """How to get ``(samples, *shape)`` of each parameter of a module, for one of its calls."""
    if is_convolution(module):
        return _convolution(module, a, g)
    samples = len(g)
    if is_norm(module):
        return {
            "weight": lambda: (g * _normed(module, a)).reshape(samples, -1, g.shape[-1]).sum(1),
            "bias": lambda: g.reshape(samples, -1, g.shape[-1]).sum(1),
        }
    a, g = a.reshape(samples, -1, a.shape[-1]), g.reshape(samples, -1, g.shape[-1])
    if isinstance(module, nn.Linear):
        return {"weight": lambda: g.mT @ a, "bias": lambda: g.sum(1)}
    return {"weight": lambda: a.mT @ g, "bias": lambda: g.sum(1)}  # Conv1D stores (in, out)


@torch.no_grad()
def _normed(module: nn.Module, a: Tensor) -> Tensor:
    """What a norm multiplies by its weight. The output is affine in the weight: two calls tell."""
    weight = module.get_parameter("weight")
    shift = {
        n: torch.zeros_like(p) for n, p in module.named_parameters(recurse=False) if n != "weight"
    }
    at = [
        torch.func.functional_call(module, {**shift, "weight": torch.full_like(weight, w)}, (a,))
        for w in (1.0, 0.0)
    ]
    scaled: Tensor = (at[0] - at[1]).float()
    return scaled


def _convolution(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Callable[[], Tensor]]:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    samples, weight = len(g), module.weight
    if (
        isinstance(module.padding, str)
        or any(module.padding)
        or any(d != 1 for d in module.dilation)
    ):
        raise SutureError(
            "per-sample gradients: convolutions with padding or dilation are not covered"
        )

    def product() -> Tensor:
        patches = a
        for at, (size, stride) in enumerate(zip(module.kernel_size, module.stride, strict=True)):
            patches = patches.unfold(2 + at, size, stride)
        # (samples, in, *places, *kernel) to (samples, places, in * kernel)
        dims = len(module.kernel_size)
        order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
        rows = patches.permute(order).reshape(samples, -1, math.prod(weight.shape[1:]))
        return (g.reshape(samples, g.shape[1], -1) @ rows).reshape(samples, *weight.shape)

    return {"weight": product, "bias": lambda: g.reshape(samples, g.shape[1], -1).sum(2)}


# -- any leaf module, row by row -------------------------------------------------------------------


class Spare:
    """One tensor of each shape, to be filled again and again.

    Fresh memory costs more than the sums that pass through it.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape; what was in it is gone."""
        key = (tensor.shape, tensor.dtype)
        if key not in self._held:
            self._held[key] = torch.empty_like(tensor, requires_grad=False)
        return self._held[key]


@dataclass(frozen=True)
class _Call:
    """What a layer read and gave."""

    layer: nn.Module
    names: Mapping[str, str]
    """From the layer's own name of a parameter to the model's."""
    read: Tensor
    gave: Tensor


class Taps:
    """Notes what every layer that owns one of the parameters reads and gives, inside ``with``."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], rows: int) -> None:
        self.rows = rows
        self.calls: list[_Call] = []
        self._odd = False
        self._names = {id(p): n for n, p in parameters.items()}
        self._layers = {}
        owned: set[int] = set()
        for layer in model.modules():
            mine = {own: self._names[id(p)] for own, p in layer.named_parameters(recurse=False)
                    if id(p) in self._names}  # fmt: skip
            if mine and not any(layer.children()):
                self._layers[layer] = mine
                owned |= {id(p) for p in layer.parameters(recurse=False)}
        self._odd = not self._names.keys() <= owned
        self._hooks: list[Any] = []
        self._spare = Spare()

    @property
    def complete(self) -> bool:
        """Whether every parameter was seen at work in simple layers that keep rows apart."""
        seen = {name for call in self.calls for name in call.names.values()}
        return not self._odd and seen == set(self._names.values())

    def __enter__(self) -> Taps:
        for layer in self._layers:
            self._hooks.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(layer.register_forward_hook(self._after))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.calls.clear()

    def _before(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            self._odd = True
            return None
        if isinstance(layer, nn.Embedding) and args[0].shape[0] == 1 < self.rows:
            # Positions are looked up once for all rows; here each row looks them up for itself.
            return (args[0].expand(self.rows, *args[0].shape[1:]),), kwargs
        return None

    def _after(self, layer: nn.Module, args: Any, output: Any) -> None:
        read = args[0] if len(args) == 1 else None
        if not (isinstance(read, Tensor) and isinstance(output, Tensor)) or not (
            read.dim() and output.dim() and len(read) == len(output) == self.rows
        ):
            self._odd = True
            return
        self.calls.append(_Call(layer, self._layers[layer], read.detach(), output))

    def gradients(self, total: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """The gradient of every row: name of the parameter, place in the batch, gradient.

        Calls of one parameter (tied tensors, repeated layers) are summed before they are given. A
        gradient lasts until the next one is asked for.
        """
        backs = torch.autograd.grad(total, [c.gave for c in self.calls], retain_graph=True,
                                    allow_unused=True)  # fmt: skip
        by_name: dict[str, list[tuple[str, _Call, Tensor]]] = {}
        for call, back in zip(self.calls, backs, strict=True):
            if back is not None:
                for own, name in call.names.items():
                    by_name.setdefault(name, []).append((own, call, back))
        for name, uses in by_name.items():
            for at in range(self.rows):
                if len(uses) == 1:
                    own, call, back = uses[0]
                    yield name, at, _row_gradient(call, own, back, at, self._spare)
                else:
                    parts = [_row_gradient(call, own, back, at) for own, call, back in uses]
                    yield name, at, torch.stack(parts).sum(0)


def _row_gradient(
    call: _Call, own: str, back: Tensor, at: int, spare: Spare | None = None
) -> Tensor:
    """The gradient of one row with respect to one parameter of a layer, perhaps in spare memory."""
    if isinstance(call.layer, nn.Linear):
        given = back[at].reshape(-1, back.shape[-1])
        if own == "bias":
            return given.sum(0)
        read = call.read[at].reshape(-1, call.read.shape[-1])
        out = None if spare is None else spare.like(call.layer.weight)
        return torch.mm(given.T, read, out=out)
    with torch.enable_grad():
        gave = call.layer.forward(call.read[at : at + 1])
        parameter = call.layer.get_parameter(own)
        (found,) = torch.autograd.grad(gave, parameter, back[at : at + 1])
    return found


__all__ = [
    "PerSample",
    "Spare",
    "Taps",
    "Use",
    "covered",
    "is_convolution",
    "is_linear",
    "is_norm",
    "persample",
    "squares",
]
