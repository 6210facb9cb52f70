"""Activations under the lowest block that changes, computed once for a batch and kept.

They are kept in memory, or on disk in the working folder of a run, within a bound that is told
before. A batch finds its states by a key of everything that their bits follow from: the weights and
buffers under the cut, the configuration, token ids and mask, depth, precision, device, threads and
versions. A file also carries a digest over key and content. So there is nothing stale or damaged to
be used: what does not fit is computed anew.

The file of a batch is the 32 digits of that digest (xxh3-128) and a safetensors file with the
tensor ``states``. The folder goes with the run: its states cost one pass over the rows, less than
the room that they would take in a cache for good.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from suture.checkpoints.atomic import appearing
from suture.errors import OutputError, RecipeError
from suture.tensors.spec import readable
from suture.training.data import Batch
from suture.training.loss import to
from suture.training.split import SplitModel, split_of
from suture.version import __version__

FORM = 1
"""Version of the files; raise it with their form, so that no older one is read."""
GIB = 1 << 30
Context = Callable[[], AbstractContextManager[Any]]
DIGITS = 32


class Bounds(Protocol):
    """Where activations may be kept, and how much of them; part of ``TuneSettings``."""

    @property
    def activations(self) -> str:
        """``auto``, ``memory``, ``disk`` or ``recompute``."""

    @property
    def activations_memory(self) -> float:
        """GiB of memory at most."""

    @property
    def activations_disk(self) -> float:
        """GiB of disk at most."""


class KeptStates:
    """The states of batches under a cut."""

    def __init__(
        self, split: SplitModel, where: str, bound: float, folder: Path | None = None
    ) -> None:
        """Keep states in ``where``: ``memory``, ``disk`` (then below ``folder``), ``recompute``.

        Args:
            split: the model and its cut.
            where: as said.
            bound: bytes at most; what is more is computed anew whenever it is asked for.
            folder: made when the first states are written.
        """
        self.split, self.where, self.bound, self.folder = split, where, bound, folder
        self.taken = 0
        """Bytes that are kept now."""
        self.made = 0
        """How often states were computed."""
        around = (split.model, *split.around(), split.first)
        self._model = [type(m).__name__ for m in around]
        models: list[Any] = [m for m in split.model.modules() if hasattr(m, "config")]
        self._configs = [str(m.config.to_json_string(use_diff=False)) for m in models[:1]]
        self._memory: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}
        self._stamp: object = None
        self._weights = ""

    @contextmanager
    def feeding(self, batch: Batch, precision: Context = nullcontext) -> Iterator[None]:
        """Inside, the model is asked about this batch, without dropout under the cut.

        ``precision`` makes a context in which states are computed, such as that of a training.
        """
        if self.where == "recompute":
            self.split.quiet()
            yield
            return
        with precision():
            states = self.states(batch)
        with self.split.fed(states):
            yield

    def fed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, each while its states are given to the model."""
        for batch in batches:
            with self.feeding(batch):
                yield batch

    def states(self, batch: Batch) -> Tensor:
        """The states of a batch on the model's device: those that are kept, or made now."""
        device = next(self.split.model.parameters()).device
        self._renew()
        key = self.key(batch)
        found = self._memory.get(key)
        if found is None and self.where == "disk":
            found = self._read(key)
        if found is None:
            found = self.split.lower(to(batch, device))
            self.made += 1
            self._put(key, found.cpu())
        return found.to(device)

    def key(self, batch: Batch) -> str:
        """The hash of everything that the bits of the states of a batch follow from."""
        state = xxhash.xxh3_128(json.dumps(self.ground(), sort_keys=True).encode())
        for tensor in (batch.input_ids, batch.attention_mask):
            state.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            state.update(tensor.cpu().contiguous().numpy().tobytes())
        return state.hexdigest()

    def ground(self) -> dict[str, Any]:
        """What all batches share in their keys, as plain data."""
        split = self.split
        device = next(split.model.parameters()).device
        mixed = torch.is_autocast_enabled(device.type)
        return {
            "form": FORM,
            "versions": [__version__, torch.__version__, version("transformers")],
            "model": self._model,
            "config": self._configs,
            "depth": [split.at, len(split.blocks)],
            "weights": self._weights,
            "precision": str(torch.get_autocast_dtype(device.type)) if mixed else "no",
            "device": _kind(device),
            "threads": torch.get_num_threads(),
        }

    def _renew(self) -> None:
        """Hash the weights under the cut anew where they were written to since."""
        stamp = self.split.stamp()
        if stamp == self._stamp:
            return
        state = xxhash.xxh3_128()
        for name, tensor in sorted(self.split.weights().items()):
            state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            state.update(raw.numpy().data)
        self._stamp, self._weights = stamp, state.hexdigest()

    def _put(self, key: str, states: Tensor) -> None:
        size = states.nbytes
        if self.taken - self._sizes.get(key, 0) + size > self.bound:
            return
        if self.where == "memory":
            self._memory[key] = states
        else:
            assert self.folder is not None
            raw = save({"states": states.contiguous()})
            try:
                with appearing(self._path(key)) as file:
                    file.write(_digest(key, raw))
                    file.write(raw)
            except OutputError:  # a full disk is no reason to stop: they are made anew each time
                return
        self.taken += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _read(self, key: str) -> Tensor | None:
        with suppress(OSError, SafetensorError, KeyError):
            data = self._path(key).read_bytes()
            raw = data[DIGITS:]
            if data[:DIGITS] == _digest(key, raw):
                return load(raw)["states"]
        return None

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.states"

    def share_nothing(self) -> None:
        """Write no files: several processes at work would write the same ones."""
        if self.where == "disk":
            self.where = "recompute"

    def drop(self) -> None:
        """Let go of everything that is kept."""
        self._memory.clear()
        self._sizes.clear()
        self.taken = 0
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _digest(key: str, raw: bytes) -> bytes:
    state = xxhash.xxh3_128(key.encode())
    state.update(raw)
    return state.hexdigest().encode()


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def positions(lengths: Sequence[int], groups: Iterable[Sequence[int]]) -> int:
    """How many positions batches have, those of padding included.

    Examples:
        >>> positions([3, 5, 2], [[0, 1], [2]])
        12
    """
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in groups)


def keep(
    model: nn.Module, changing: Collection[nn.Parameter], batch: Batch, asked: tuple[int, int],
    bounds: Bounds, *, folder: Path | None = None, say: Callable[[str], None] = lambda _: None,
) -> KeptStates | None:  # fmt: skip
    """Find where a model can be cut, and where its states are kept; tell what they take.

    Args:
        model: a ``Classifier``, ``Encoder`` or ``LanguageModel``.
        changing: the parameters that change.
        batch: a small one, on the model's device; both ways are compared on it.
        asked: how many rows there are in all, and how many positions in their batches.
        bounds: what a recipe allows.
        folder: for states on disk; none: they are never kept there.
        say: is told what is kept and what it takes.

    Returns:
        ``None`` where nothing lies under what changes. With ``recompute`` nothing is kept, but
        batches are grouped, and dropout under the cut is off, as they are where something is.

    Raises:
        RecipeError: states shall be kept in a place that is too small for them.
    """
    split = split_of(model, changing, batch)
    if split is None:
        if bounds.activations in ("memory", "disk"):
            say(
                f"training.activations: {bounds.activations}: nothing is kept, since something "
                "changes in the first block or before it, or the blocks are not known"
            )
        return None
    rows, places = asked
    lower = f"the lower {split.at} of {len(split.blocks)} blocks"
    if bounds.activations == "recompute":
        return KeptStates(split, "recompute", 0)
    if not split.proven(batch):
        say(f"the activations of {lower} are computed anew at every step: given back to the model, "
            "they do not give the same bits")  # fmt: skip
        return KeptStates(split, "recompute", 0)
    states = split.lower(batch)
    need = int(states.nbytes / batch.attention_mask.numel() * places)
    where = _place(bounds, need, folder)
    size = f"{rows:,} rows, {readable(need)}"
    if where == "recompute":
        say(f"the activations of {lower} are computed anew at every step: {size} are more than "
            "training.activations_memory and activations_disk allow")  # fmt: skip
        return KeptStates(split, where, 0)
    at = "in memory" if where == "memory" else f"in {folder}, until the run is done"
    say(f"the activations of {lower} are computed once and kept: {size} {at}")
    bound = bounds.activations_memory if where == "memory" else bounds.activations_disk
    return KeptStates(split, where, bound * GIB, folder if where == "disk" else None)


def _place(bounds: Bounds, need: int, folder: Path | None) -> str:
    """Where so many bytes go.

    Raises:
        RecipeError: nowhere, and a recipe says where.
    """
    wanted = bounds.activations
    if wanted != "disk" and need <= bounds.activations_memory * GIB:
        return "memory"
    short = ""
    if wanted == "memory":
        short = f"activations_memory is {bounds.activations_memory:g} GiB"
    elif folder is None:
        short = "this run has no folder"
    elif need > bounds.activations_disk * GIB:
        short = f"activations_disk is {bounds.activations_disk:g} GiB"
    elif need > (free := shutil.disk_usage(_existing(folder)).free):
        short = f"{readable(free)} are free"
    if not short:
        return "disk"
    if wanted == "auto":
        return "recompute"
    raise RecipeError(
        f"training.activations: {wanted}: the activations take {readable(need)}, and {short}; "
        f"raise that to {need / GIB + 0.005:.2f}, or say `activations: auto`"
    )


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.absolute().parents) if p.is_dir())


__all__ = ["FORM", "Bounds", "KeptStates", "keep", "positions"]
