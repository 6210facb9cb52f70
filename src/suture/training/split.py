"""A model cut below the lowest block that changes: what lies under the cut is a fixed function.

Where only the last blocks of a transformer change, the hidden states that the first of them reads
follow from a batch alone. ``Split.lower`` computes them, and inside of ``Split.fed`` the model
takes them as given: the blocks under the cut are passed over, and everything else (masks,
positions, what the model does around its blocks) is computed by the model's own code. This holds
for any model whose blocks hand on one tensor; ``Split.proven`` compares both ways bit for bit
before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from suture.tensors.roles import layer_parts
from suture.training.data import Batch
from suture.training.models import LanguageModel, evaluating

DROPPED = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""What a configuration calls the chance that a whole block is left out of a training step."""


class _ReachedError(Exception):
    """The first block above the cut was entered; carries what it reads."""

    def __init__(self, states: object) -> None:
        super().__init__()
        self.states = states


class SplitModel:
    """A model, and where it is cut."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module], at: int) -> None:
        """Cut ``model`` between its blocks ``at - 1`` and ``at``; see ``split_of``."""
        self.model, self.blocks, self.at = model, blocks, at
        self.under: list[nn.Module] = []
        """The modules under the cut, those inside of others included."""
        self._lengths: list[int] = []

    @property
    def first(self) -> nn.Module:
        """The first block above the cut."""
        return self.blocks[self.at]

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers under the cut, by name."""
        names = {id(module): name for name, module in self.model.named_modules()}
        found: dict[str, Tensor] = {}
        for module in self.under:
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            found |= {f"{names[id(module)]}.{word}": t for word, t in own}
        return found

    def stamp(self) -> list[tuple[int, int, torch.dtype]]:
        """What differs after something under the cut was written to or replaced; cheap.

        It is torch's own count of writes, which writes through ``.data`` go around; nothing here
        does that.
        """
        held = (t for m in self.under for d in (m._parameters, m._buffers) for t in d.values())
        return [(t.data_ptr(), t._version, t.dtype) for t in held if t is not None]

    def quiet(self) -> None:
        """Switch dropout under the cut off; whatever switches the whole model's mode undoes it."""
        for module in self.under:
            module.training = False

    def lower(self, batch: Batch) -> Tensor:
        """The hidden states that the first block above the cut reads; without a gradient.

        They are ``(rows, length, dim)`` in most models. Dropout under the cut is off.
        """
        self.quiet()
        handle = self.first.register_forward_pre_hook(_stop, with_kwargs=True)
        try:
            # what was made in inference mode could not be used in training
            with torch.inference_mode(False), torch.no_grad():
                self.model(batch.input_ids, batch.attention_mask)
        except _ReachedError as reached:
            states: Any = reached.states
            found: Tensor = states.detach()
        finally:
            handle.remove()
        return found

    @contextmanager
    def fed(self, states: Tensor) -> Iterator[None]:
        """Inside, the model takes ``states`` for what the first block above the cut reads."""
        self.quiet()

        def replaced(
            _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            held = given[0] if given else named["hidden_states"]
            assert held.shape == states.shape, "these states are of another batch"
            if given:
                return (states, *given[1:]), named
            return given, {**named, "hidden_states": states}

        handle = self.first.register_forward_pre_hook(replaced, with_kwargs=True)
        lower = self.blocks[: self.at]
        try:
            for block, length in zip(lower, self._lengths, strict=True):
                block.forward = _passed(length)
            yield
        finally:
            handle.remove()
            for block in lower:
                vars(block).pop("forward", None)

    def probe(self, batch: Batch) -> bool:
        """Find out what runs under the cut; whether states are one tensor that can be handed on."""
        for part in self.model.modules():  # it asks the model something else, once
            if isinstance(part, LanguageModel):
                part.read_out()
        entered: list[nn.Module] = []
        given: list[int | None] = [None] * self.at

        def note(module: nn.Module, _: object) -> None:
            entered.append(module)

        def told(number: int) -> Callable[[nn.Module, object, object], None]:
            def hook(_: nn.Module, __: object, out: object) -> None:
                given[number] = _length(out)

            return hook

        handles = [m.register_forward_pre_hook(note) for m in self.model.modules()]
        handles += [b.register_forward_hook(told(i)) for i, b in enumerate(self.blocks[: self.at])]
        handles.append(self.first.register_forward_pre_hook(_stop, with_kwargs=True))
        states: object = None
        try:
            with torch.inference_mode(False), torch.no_grad(), evaluating(self.model):
                self.model(batch.input_ids, batch.attention_mask)
        except _ReachedError as reached:
            states = reached.states
        finally:
            for handle in handles:
                handle.remove()
        around = {id(m) for m in self.around()}
        whole = {id(m): m for b in self.blocks[: self.at] for m in b.modules()}
        whole |= {id(m): m for m in entered if id(m) not in around and m is not self.first}
        self.under = list(whole.values())
        self._lengths = [length or 0 for length in given]
        return isinstance(states, Tensor) and None not in given

    def around(self) -> list[nn.Module]:
        """The modules that the cut goes through: whole models and lists of blocks."""
        return [m for m in self.model.modules()
                if m is not self.first and any(c is self.first for c in m.modules())]  # fmt: skip

    def proven(self, batch: Batch) -> bool:
        """Whether both ways give the same bits on a batch."""
        with torch.inference_mode(False), torch.no_grad(), evaluating(self.model):
            whole = self.model(batch.input_ids, batch.attention_mask)
            states = self.lower(batch)
            with self.fed(states):
                parts = self.model(batch.input_ids, batch.attention_mask)
        return bool(torch.equal(whole, parts))


def split_of(
    model: nn.Module, changing: Collection[nn.Parameter], batch: Batch
) -> SplitModel | None:
    """Cut a model under the lowest block in which something changes.

    Args:
        model: a ``Classifier``, ``Encoder`` or ``LanguageModel``.
        changing: the parameters that change.
        batch: some rows, on the model's device, to see in which order its parts run.

    Returns:
        ``None`` where there is nothing to gain, or no place for a cut: the first block changes, or
        something that runs before the blocks, or the model has no list of blocks that is known.
    """
    ids = {id(p) for p in changing}
    stacks: dict[str, dict[int, nn.Module]] = {}
    for name, module in model.named_modules():
        parts = layer_parts(f"{name}.")
        if parts is not None and parts[2] == ".":
            stacks.setdefault(parts[0], {})[parts[1]] = module
    touched = {stack for stack, blocks in stacks.items() if any(map(_holds(ids), blocks.values()))}
    if len(touched) != 1:
        return None
    numbered = stacks[touched.pop()]
    blocks = [numbered[number] for number in sorted(numbered)]
    at = next(number for number, block in enumerate(blocks) if _holds(ids)(block))
    backbone = next((m for m in model.modules() if hasattr(m, "config")), model)
    if not at or any(getattr(getattr(backbone, "config", None), word, 0) for word in DROPPED):
        return None
    split = SplitModel(model, blocks, at)
    if not split.probe(batch):
        return None
    fixed = [*split.under, *split.around()]
    own = (p for module in fixed for p in module.parameters(recurse=False))
    return None if any(id(p) in ids for p in own) else split


def _holds(ids: Collection[int]) -> Callable[[nn.Module], bool]:
    return lambda module: any(id(p) in ids for p in module.parameters())


def _stop(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    raise _ReachedError(given[0] if given else named.get("hidden_states"))


def _length(out: object) -> int | None:
    """How long a tuple a block gives, hidden states first; 0 for a tensor, ``None`` for others."""
    if isinstance(out, Tensor):
        return 0
    return len(out) if isinstance(out, tuple) and out and isinstance(out[0], Tensor) else None


def _passed(length: int) -> Callable[..., Any]:
    """A block that hands on what it is given, in the form in which it gives its own states."""

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, *(None,) * (length - 1)) if length else hidden_states

    return forward


__all__ = ["SplitModel", "split_of"]
