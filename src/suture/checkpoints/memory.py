"""Checkpoints in memory: tensors that somebody holds, and merges that are written nowhere.

``TensorCheckpoint`` reads tensors of numpy or torch where they lie; ``Held`` has bytes of its own,
which a merge fills. Small files, configuration and tokenizer, may lie in a folder as those of every
model do.
"""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from suture.checkpoints.checkpoint import MEMORY, BytePlace, Checkpoint, ties_embeddings
from suture.checkpoints.headers import read_json
from suture.errors import CheckpointError, Problems, brief
from suture.tensors.roles import tied_to
from suture.tensors.spec import DTYPES, TensorSpec, listed

Array = np.ndarray[Any, Any]

NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32",
    "uint16": "U16", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""Names in a safetensors header by those that numpy, ml_dtypes and torch use."""
_COPIES = 4
"""How many tensors that do not lie in order, or on another device, are kept as copies at once."""


class _InMemory(Checkpoint):
    """What checkpoints without a file of weights have in common."""

    in_memory = True

    def __init__(
        self, label: str, folder: Path | None, config: Mapping[str, Any] | None,
        specs: Mapping[str, TensorSpec],
    ) -> None:  # fmt: skip
        self.path = self.folder = Path(f"{MEMORY}{label}") if folder is None else folder
        self.label, self.files = label, []
        beside = self.folder / "config.json"
        found = read_json(beside) if folder is not None and beside.is_file() else {}
        self.config = dict(found if config is None else config)
        self.aliases = tied_to(specs.keys()) if ties_embeddings(self.config) else {}
        self.specs = {name: spec for name, spec in specs.items() if name not in self.aliases}
        self.places = {name: BytePlace(0, at) for at, name in enumerate(self.specs)}
        self._descriptors = {}
        self._lock = threading.Lock()

    @property
    def identity(self) -> list[list[Any]]:  # type: ignore[override]
        """Never the same twice.

        What an interrupted run left may have been made of other values, so it is not used again.
        """
        return [[MEMORY, self.label, secrets.token_hex(8)]]

    def read_into(self, name: str, start: int, raw: Array) -> None:
        """Fill the bytes ``raw`` (uint8) from element ``start`` of a tensor. Safe from any thread.

        Raises:
            CheckpointError: the tensor has another size now than when it was opened.
        """
        first = start * DTYPES[self.specs[name].dtype].itemsize
        held = self.whole(name)[first : first + raw.size]
        if held.size != raw.size:
            raise CheckpointError(
                f"{self.label}: {name}: became smaller since it was opened; open it again"
            )
        raw[:] = held

    def home(self, name: str) -> Path:
        """What messages name in the place of a file."""
        return Path(f"{MEMORY}{self.label}")

    def untied(self) -> list[str]:
        """None: every tensor is held once."""
        return []


class Held(_InMemory):
    """Tensors in memory, empty until somebody writes them.

    Args:
        label: what to call it.
        folder: where ``config.json`` and the tokenizer lie, if anywhere; no weights are looked for
            there.
        specs: its tensors.
        config: in the place of ``config.json``.
    """

    def __init__(
        self, label: str, folder: Path | None, specs: Mapping[str, TensorSpec],
        config: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(label, folder, config, specs)
        self.bytes: dict[str, Array] = {}

    def whole(self, name: str) -> Array:
        """The bytes of a whole tensor, themselves and no copy: a network may lie on them."""
        return self.bytes[name]

    def drop(self) -> None:
        """Give the memory back."""
        self.bytes = {}


class TensorCheckpoint(_InMemory):
    """Tensors of numpy or torch by name, read where they lie; nothing is copied until it is read.

    A tensor that stands under two names, as tied embeddings do in a ``state_dict``, is held once;
    ``aliases`` has the other name. What happens to the tensors later is seen by whoever reads.

    Args:
        tensors: by name.
        label: what to call it in messages and records.
        config: what ``config.json`` would say.
        folder: where ``config.json`` and the tokenizer lie, if anywhere.

    Raises:
        CheckpointError: a name is none, or a value is no tensor with numbers; all at once.
    """

    def __init__(
        self, tensors: Mapping[str, Any], label: str, *,
        config: Mapping[str, Any] | None = None, folder: Path | None = None,
    ) -> None:  # fmt: skip
        specs = _specs_of(tensors, label)
        self._tensors = dict(tensors)
        self._copies: dict[str, Array] = {}
        self._copying = threading.Lock()
        twice = _second_names(self._tensors, specs)
        super().__init__(label, folder, config, {n: s for n, s in specs.items() if n not in twice})
        self._apart = {a: specs[a] for a in self.aliases}
        self.aliases = {**self.aliases, **{a: self.aliases.get(n, n) for a, n in twice.items()}}
        if twice and not ties_embeddings(self.config):
            self.notes = (
                f"{label}: {listed(sorted(twice))}: the same tensor under a second name; it is "
                "written once, and whoever loads the output has to tie it again",
            )

    def whole(self, name: str) -> Array:
        """The bytes of a whole tensor (uint8), which nobody may change; no copy where it can be."""
        value = self._tensors[name]
        if _is_torch(value):
            if value.device.type == "cpu" and value.is_contiguous():
                return _torch_bytes(value)
            return self._copy(name, lambda: _torch_bytes(value.contiguous().cpu()))
        if value.flags.c_contiguous and value.dtype.isnative:
            return _numpy_bytes(value)
        return self._copy(name, lambda: _numpy_bytes(value))

    def _copy(self, name: str, make: Any) -> Array:
        """The bytes of a tensor that has to be copied; the last few copies are kept."""
        with self._copying:
            if name not in self._copies:
                while len(self._copies) >= _COPIES:
                    del self._copies[next(iter(self._copies))]
                self._copies[name] = make()
            return self._copies[name]

    def tensor(self, name: str) -> Any:
        """A copy of the tensor as torch holds it, in its dtype, on the CPU."""
        value = self._tensors[name]
        return value.detach().cpu().clone() if _is_torch(value) else super().tensor(name).clone()

    def untied(self) -> list[str]:
        """Second names, by ``config``, of tensors whose bytes are others."""
        return [
            alias
            for alias, spec in self._apart.items()
            if spec != self.specs[self.aliases[alias]]
            or not np.array_equal(self.whole(alias), self.whole(self.aliases[alias]))
        ]


def _is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")  # without it nothing can be a tensor of it
    return torch is not None and isinstance(value, torch.Tensor)


def _specs_of(tensors: Mapping[str, Any], label: str) -> dict[str, TensorSpec]:
    problems, found = Problems(), dict[str, TensorSpec]()
    for name, value in tensors.items():
        with problems.collecting(f"{label}: "):
            if not isinstance(name, str) or not name:
                raise CheckpointError(f"{brief(name)} is no name of a tensor")
            found[name] = _spec_of(name, value)
    if not found and not problems:
        problems.add(CheckpointError, f"{label}: holds no tensor")
    problems.raise_if_any()
    return found


def _spec_of(name: str, value: Any) -> TensorSpec:
    if _is_torch(value):
        word = str(value.dtype).removeprefix("torch.")
        if value.device.type == "meta":
            raise CheckpointError(f"{name}: is on the device 'meta', where it has no values; "
                                  "load it first")  # fmt: skip
        if str(value.layout) != "torch.strided":
            raise CheckpointError(f"{name}: is {value.layout}; make it dense with `.to_dense()`")
    elif isinstance(value, np.ndarray):
        word = value.dtype.name
    else:
        raise CheckpointError(
            f"{name}: a torch tensor or a numpy array, not {type(value).__name__}"
        )
    if word not in NAMES:
        raise CheckpointError(f"{name}: the dtype {word} cannot be stored; one of "
                              f"{', '.join(NAMES)}")  # fmt: skip
    return TensorSpec(NAMES[word], tuple(int(n) for n in value.shape))


def _second_names(tensors: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The names of tensors that lie in the same memory as another, and that other."""
    groups: dict[object, list[str]] = {}
    for name, value in tensors.items():
        if specs[name].numel:
            if _is_torch(value):
                place = (str(value.device), value.data_ptr(), tuple(value.stride()))
            else:
                place = ("numpy", value.__array_interface__["data"][0], value.strides)
            groups.setdefault((place, specs[name]), []).append(name)
    usual, found = tied_to(tensors.keys()), dict[str, str]()
    for names in groups.values():
        first = next((n for n in names if n not in usual), names[0])
        found |= {n: first for n in names if n != first}
    return found


def _torch_bytes(value: Any) -> Array:
    """The bytes of a contiguous tensor on the CPU, where they lie."""
    import torch

    flat = value.detach().resolve_conj().resolve_neg().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    found: Array = flat.view(torch.uint8).numpy()
    return found


def _numpy_bytes(value: Array) -> Array:
    """The bytes of an array in order, lowest first; where they lie if they lie so."""
    flat = np.ascontiguousarray(value).reshape(-1)
    flat = flat if flat.dtype.isnative else flat.astype(flat.dtype.newbyteorder("="))
    return flat.view(np.uint8)


class MemorySink:
    """What a merge writes into when it publishes nothing; keeps tensors only if told to.

    Args:
        specs: the tensors to come.
        kept: takes them; ``None`` lets every byte go, where only fingerprints are asked for.
    """

    resumed = False

    def __init__(self, specs: Mapping[str, TensorSpec], kept: dict[str, Array] | None) -> None:
        self.specs, self.kept = specs, kept
        if kept is not None:
            kept.update({name: np.empty(spec.nbytes, np.uint8) for name, spec in specs.items()})

    def journal(self) -> list[list[Any]]:
        """Nothing: what is tried is not resumed."""
        return []

    def record(self, line: list[Any]) -> None:
        """Nothing is noted."""

    def write(self, name: str, start: int, raw: Array) -> None:
        """Take the bytes ``raw`` (uint8) from element ``start`` of a tensor. Any thread may."""
        if self.kept is not None:
            first = start * DTYPES[self.specs[name].dtype].itemsize
            self.kept[name][first : first + raw.size] = raw

    def read_back(self, name: str, start: int, raw: Array) -> None:
        """Never asked for: no earlier run has left anything."""
        raise AssertionError(f"{name}: nothing of an earlier run is kept")


class SmallFiles:
    """Takes the small files of a model into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add_file(self, name: str, content: bytes | str) -> None:
        """Put one file there."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


__all__ = ["NAMES", "Held", "MemorySink", "SmallFiles", "TensorCheckpoint"]
