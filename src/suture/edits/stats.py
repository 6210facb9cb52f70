"""Frozen facts about a model on data: what importance rules and data-based merges read; no model.

``measure`` gathers them once; here they are saved, loaded lazily and read block by block. A file is
a safetensors file whose tensors are called ``kind/parameter``, all float32, with the facts of the
measurement (fingerprint of the model, hash of the data, rows, loss, ...) as JSON in its metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from suture.checkpoints.atomic import appearing
from suture.checkpoints.checkpoint import Array, Checkpoint, refuse_memory
from suture.checkpoints.headers import read_header
from suture.checkpoints.memory import TensorCheckpoint
from suture.errors import CheckpointError, MismatchError, RecipeError, did_you_mean
from suture.tensors.spec import TensorSpec, listed

FORMAT = "suture.stats"

KINDS = {
    "fisher": "mean over rows of the squared gradient of the loss on labels as the model gives them"
    " (diagonal of the true Fisher information)",
    "empirical_fisher": "mean over rows of the squared gradient of the loss on the given labels",
    "abs_grad": "mean over rows of the absolute gradient of the loss, row by row",
    "grad": "mean over rows of the gradient of the loss, with its sign",
    "input_norm": "Euclidean norm over all tokens of each input of a linear layer",
    "gram": "mean over all tokens of the products of each pair of inputs of a linear layer",
    "logit": "trained logit of each entry of a mask",
}
"""Every kind of statistic. The first four and the last have the shape of the parameter; a linear
layer of ``n`` inputs has ``n`` input norms and a Gram matrix of ``n`` times ``n``."""
OF_INPUTS = ("input_norm", "gram")


class Stats:
    """Statistics of one model on one set of rows, by kind and parameter.

    Layers that read the same input (query, key and value) share one tensor on disk.

    Examples:
        >>> import numpy as np, suture
        >>> stats = suture.Stats({"fisher/w": np.ones((2, 3), np.float32)}, {"rows": 8}, "mine")
        >>> stats
        Stats(mine: fisher)
        >>> stats.names("fisher"), stats.shape("fisher", "w"), stats.facts["rows"]
        (['w'], (2, 3), 8)
    """

    def __init__(self, tensors: Mapping[str, Array], facts: Mapping[str, Any], where: str) -> None:
        self.tensors = tensors
        """By ``kind/parameter``; a ``Checkpoint`` when they are read from a file."""
        self.facts = dict(facts)
        """``model`` (fingerprint), ``data`` (hash), ``at`` (base or tuned), ``rows``, ``tokens``,
        ``loss``, ``objective``; ``shared`` names the layer whose input another one reads, too."""
        self.where = where
        """What to call them in a message."""

    def __repr__(self) -> str:
        return f"Stats({self.where}: {', '.join(self.kinds)})"

    @property
    def kinds(self) -> list[str]:
        """The kinds there are."""
        return sorted({key.partition("/")[0] for key in self.tensors})

    @property
    def restricted(self) -> bool:
        """Whether they, and what is made with them, must not be passed on."""
        return self.facts.get("restricted") is True

    def names(self, kind: str) -> list[str]:
        """The parameters for which there is this kind, sorted."""
        found = {key.partition("/")[2] for key in self.tensors if key.startswith(f"{kind}/")}
        if kind in OF_INPUTS:
            found |= {n for n, other in self.facts.get("shared", {}).items() if other in found}
        return sorted(found)

    def key(self, kind: str, name: str) -> str:
        """The tensor that holds this kind for this parameter."""
        shared: Mapping[str, str] = self.facts.get("shared", {}) if kind in OF_INPUTS else {}
        return f"{kind}/{shared.get(name, name)}"

    def shape(self, kind: str, name: str) -> tuple[int, ...] | None:
        """The shape of one statistic; ``None`` where there is none."""
        key = self.key(kind, name)
        if isinstance(self.tensors, Checkpoint):
            spec = self.tensors.specs.get(key)
            return None if spec is None else spec.shape
        return self.tensors[key].shape if key in self.tensors else None

    def whole(self, kind: str, name: str) -> Array:
        """One statistic in its shape."""
        return self.tensors[self.key(kind, name)]

    def read(self, kind: str, name: str, start: int, count: int) -> Array:
        """``count`` entries of one flattened statistic from ``start`` on, float32."""
        key = self.key(kind, name)
        if isinstance(self.tensors, Checkpoint):
            row = np.empty(count, np.float32)
            self.tensors.read_into(key, start, row.view(np.uint8))
            return row
        return self.tensors[key].reshape(-1)[start : start + count]

    def check(self, kinds: Iterable[str], specs: Mapping[str, TensorSpec]) -> None:
        """Refuse statistics that lack a kind, or that are those of other tensors.

        Args:
            kinds: what is needed.
            specs: of the tensors for which it is needed.

        Raises:
            RecipeError: a kind is missing.
            MismatchError: a tensor is missing or has another shape.
        """
        for kind in kinds:
            if kind not in self.kinds:
                hint = did_you_mean(kind, self.kinds)
                raise RecipeError(f"{self.where}: holds no {kind!r} statistics; {hint}")
            if kind in OF_INPUTS:
                self._check_inputs(kind, specs)
                continue
            missing = [n for n in specs if self.shape(kind, n) is None]
            if missing:
                raise MismatchError(
                    f"{self.where}: no {kind} of {listed(missing)}: are these the statistics of "
                    "another model, or measured over a smaller space?"
                )
            for name, spec in specs.items():
                if self.shape(kind, name) != spec.shape:
                    raise MismatchError(
                        f"{self.where}: {kind} of {name} is {list(self.shape(kind, name) or ())}, "
                        f"the model's tensor {list(spec.shape)}"
                    )

    def _check_inputs(self, kind: str, specs: Mapping[str, TensorSpec]) -> None:
        matrices = [n for n, spec in specs.items() if len(spec.shape) == 2]
        if matrices and not set(self.names(kind)) & specs.keys():
            raise MismatchError(
                f"{self.where}: no {kind} of any of these tensors: are these the statistics of "
                "another model?"
            )
        for name in set(self.names(kind)) & specs.keys():
            shape, wanted = self.shape(kind, name) or (0,), specs[name].shape[-1:]
            if shape[:1] != wanted:
                raise MismatchError(
                    f"{self.where}: {kind} of {name} is for {shape[0]} inputs, the model's tensor "
                    f"has {list(specs[name].shape)}"
                )

    def stored(self) -> Stats:
        """The same as merges read them: tensors in memory behind a checkpoint."""
        if isinstance(self.tensors, Checkpoint):
            return self
        arrays = {k: np.asarray(v, np.float32, order="C") for k, v in self.tensors.items()}
        return Stats(TensorCheckpoint(arrays, "stats"), self.facts, self.where)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all; the same statistics, the same bytes.

        Raises:
            OutputError: it cannot be written.
        """
        facts = json.dumps(self.facts, sort_keys=True)
        # By hand: the library writes metadata in an order that changes from run to run.
        header: dict[str, Any] = {"__metadata__": {"facts": facts, "format": FORMAT}}
        tensors = {k: np.asarray(v, np.float32, order="C") for k, v in self.tensors.items()}
        end = 0
        for key, tensor in sorted(tensors.items()):
            span = [end, end + tensor.nbytes]
            header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": span}
            end = span[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with appearing(Path(path)) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in sorted(tensors.items()):
                file.write(tensor.reshape(-1).view(np.uint8).data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Stats:
        """Open a file that ``save`` wrote; tensors are read when they are asked for.

        Raises:
            CheckpointError: the file is missing, damaged, or holds no statistics.
        """
        path = Path(path)
        refuse_memory(str(path))
        metadata = read_header(path).metadata
        checkpoint = Checkpoint(path, str(path), [path])
        try:
            facts = json.loads(metadata.get("facts", ""))
        except ValueError:
            facts = None
        if metadata.get("format") != FORMAT or not isinstance(facts, dict):
            raise CheckpointError(f"{path}: not a file of statistics that Suture measured")
        odd = [n for n, s in checkpoint.specs.items()
               if s.dtype != "F32" or n.partition("/")[0] not in KINDS]  # fmt: skip
        if odd or not all(isinstance(facts.get(k, {}), dict) for k in ("shared",)):
            raise CheckpointError(f"{path}: damaged: {listed(odd) or 'its facts'} make no sense")
        return cls(checkpoint, facts, str(path))


def stored_stats(source: str | os.PathLike[str] | Stats) -> Stats:
    """Statistics as merges read them, of a file or of what ``measure`` gave.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no statistics.
        RecipeError: it is neither.
    """
    if isinstance(source, Stats):
        return source.stored()
    if not isinstance(source, str | os.PathLike):
        raise RecipeError(f"statistics, or the file of some, not {type(source).__name__}")
    return Stats.load(source)


def check_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """Return the kinds, if there are such.

    Raises:
        RecipeError: no such kind.
    """
    found = tuple(dict.fromkeys(kinds))
    for kind in found:
        if kind not in KINDS:
            raise RecipeError(f"no statistics {kind!r}; {did_you_mean(kind, list(KINDS))}")
    return found


__all__ = ["FORMAT", "KINDS", "OF_INPUTS", "Stats", "check_kinds", "stored_stats"]
