"""A look at one checkpoint, or at the difference of two: sizes, roles, norms, integrity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from suture.checkpoints.checkpoint import Array, Checkpoint
from suture.errors import Problems
from suture.kernels import compiled
from suture.stream.sweep import RAW, Block, Hashers, Progress, Sources, Visitor, sweep, tasks_of
from suture.stream.vector import Gram, align
from suture.tensors.roles import EVERYTHING, layer_key, role_of
from suture.tensors.spec import DTYPES, PIECE, WORD_OF, Piece, TensorSpec, pieces_of


class _Integrity(Visitor[Hashers]):
    """Counts what is not finite, and takes a digest of every piece."""

    def __init__(self) -> None:
        self.wild: dict[tuple[str, int], int] = {}
        self.digests: dict[tuple[str, int], str] = {}

    def local(self) -> Hashers:
        return Hashers(1)

    def see(self, local: Hashers, block: Block) -> None:
        if block.ends_span:
            local.update(block.span)
        raw, spec = block.raw(0), block.sources.models[0].specs[block.name]
        code = DTYPES[spec.dtype].code
        if code >= 0 and raw is not None:
            wild = int(compiled.widen(raw, code, block.count, block.out))
            if wild:  # by piece, which one thread sees alone: two must not add to one number
                key = (block.name, block.start // PIECE)
                self.wild[key] = self.wild.get(key, 0) + wild

    def end_piece(self, local: Hashers, piece: Piece) -> None:
        self.digests[piece.name, piece.number] = local.take()[0]


def inspect_model(
    checkpoint: Checkpoint,
    *,
    check: bool = False,
    each: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds; with ``check`` also what only reading every byte can tell.

    Returns:
        Plain data: tensors, elements and bytes in all, by dtype and by role; layers; files; tied
        names; with ``check`` the tensors that are not finite, all zero, or equal to one another;
        with ``each`` dtype, shape, role, layer, bytes and file of every tensor.
    """
    specs = checkpoint.specs
    found: dict[str, Any] = {
        "path": checkpoint.label,
        "files": len(checkpoint.files),
        "tensors": len(specs),
        "elements": checkpoint.numel,
        "bytes": checkpoint.nbytes,
        "architecture": _architecture(checkpoint.config.get("architectures")),
        "vocabulary": checkpoint.vocabulary,
        "layers": len({layer_key(n) for n in specs if role_of(n).layer is not None}),
        "tied": dict(checkpoint.aliases),
        "dtypes": _sums(specs, lambda n: WORD_OF.get(specs[n].dtype, specs[n].dtype.lower())),
        "roles": _sums(specs, _kind(specs)),
    }
    if check:
        found["integrity"] = _integrity(checkpoint, progress)
    if each:
        kind = _kind(specs)
        found["each"] = {
            name: {"dtype": WORD_OF.get(spec.dtype, spec.dtype.lower()), "shape": list(spec.shape),
                   "role": kind(name), "layer": role_of(name).layer, "bytes": spec.nbytes,
                   "file": checkpoint.home(name).name}
            for name, spec in specs.items()
        }  # fmt: skip
    return found


def _architecture(found: object) -> str | None:
    return str(found[0]) if isinstance(found, list) and found else None


def _kind(specs: Mapping[str, TensorSpec]) -> Callable[[str], str]:
    return lambda n: role_of(n).kind if DTYPES[specs[n].dtype].computable else "buffer"


def _sums(
    specs: Mapping[str, TensorSpec], group: Callable[[str], str]
) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, spec in specs.items():
        row = found.setdefault(group(name), {"tensors": 0, "elements": 0, "bytes": 0})
        row["tensors"] += 1
        row["elements"] += spec.numel
        row["bytes"] += spec.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _integrity(checkpoint: Checkpoint, progress: Progress | None) -> dict[str, Any]:
    visitor = _Integrity()
    sweep(Sources((checkpoint,), how=RAW), tasks_of(list(checkpoint), checkpoint.specs), visitor,
          progress=progress)  # fmt: skip
    by_content: dict[tuple[Any, ...], list[str]] = {}
    for name, spec in checkpoint.specs.items():
        if spec.numel > 1:
            pieces = pieces_of(name, spec.numel)
            key = (spec, *(visitor.digests[name, piece.number] for piece in pieces))
            by_content.setdefault(key, []).append(name)
    same = [sorted(names) for names in by_content.values() if len(names) > 1]
    wild: dict[str, int] = {}
    for (name, _), count in sorted(visitor.wild.items()):
        wild[name] = wild.get(name, 0) + count
    untied = checkpoint.untied()
    return {
        "nonfinite": wild,
        "duplicates": sorted(g for g in same if not _trivial(checkpoint, g[0])),
        "constant_groups": sum(_trivial(checkpoint, g[0]) for g in same),
        "untied": untied,
        "ok": not wild and not untied,
    }


def _trivial(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor holds one value only; many biases and norms do, and nobody copied them."""
    spec = checkpoint.specs[name]
    if spec.numel > PIECE:
        return False
    values = checkpoint[name].ravel()
    return bool((values == values[0]).all())


class _Local:
    """One thread's sums: the rows (delta, base), and what the current task has given."""

    def __init__(self, gram: Gram) -> None:
        self.gram = gram.local()
        self.rows = np.zeros((2, 0), np.float32)
        self.found = np.zeros(2)
        self.pieces: list[tuple[str, Array]] = []


class _Difference(Visitor[_Local]):
    """Gram matrices of (delta, base), largest deltas and changed entries, by tensor."""

    def __init__(self) -> None:
        self.gram = Gram(2)
        self.extremes: dict[str, Array] = {}

    def local(self) -> _Local:
        return _Local(self.gram)

    def see(self, local: _Local, block: Block) -> None:
        if local.rows.shape[1] != block.size:
            local.rows = np.zeros((2, block.size), np.float32)
        local.rows[0, : block.count] = block.rows[0, : block.count]
        local.rows[1, : block.count] = block.base[: block.count]
        compiled.gram(local.rows, block.count, local.gram[""])
        compiled.extremes(block.rows[0], block.count, local.found)

    def end_piece(self, local: _Local, piece: Piece) -> None:
        self.gram.end_piece(local.gram, piece)
        local.pieces.append((piece.name, local.found))
        local.found = np.zeros(2)

    def end_task(self, local: _Local, task: Sequence[Piece]) -> None:
        self.gram.end_task(local.gram, task)
        for name, (largest, changed) in local.pieces:
            old = self.extremes.setdefault(name, np.zeros(2))
            old[:] = max(old[0], largest), old[1] + changed
        local.pieces = []


def diff(
    base: Checkpoint, tuned: Checkpoint, stage: Callable[[str, int], Progress | None] | None = None
) -> dict[str, Any]:
    """The profile of the task vector ``tuned - base``: in all, by layer, by role, by tensor.

    Every row holds elements, changed entries, the Euclidean norm of the delta, that norm relative
    to the base's, the largest magnitude, and the cosine between base and tuned weights. Sums are
    exact in float64 and do not depend on threads. Buffers that only one of the two has are named.
    ``stage`` is told when reading begins, and of how many bytes.

    Raises:
        MismatchError: the two do not hold the same tensors.
    """
    problems = Problems()
    align(base, tuned, problems, buffers=True)
    problems.raise_if_any()
    names = EVERYTHING.names(base.specs)
    visitor = _Difference()
    progress = stage and stage("diff", base.nbytes + tuned.nbytes)
    sweep(Sources((tuned,), base), tasks_of(names, base.specs), visitor, progress=progress)
    tensors = {name: _row([name], base, visitor) for name in names}
    layers: dict[str, list[str]] = {}
    roles: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_key(name), []).append(name)
        roles.setdefault(role_of(name).kind, []).append(name)
    return {
        "base": base.label,
        "tuned": tuned.label,
        "only_in_base": sorted(base.specs.keys() - tuned.specs.keys()),
        "only_in_tuned": sorted(tuned.specs.keys() - base.specs.keys()),
        "total": _row(names, base, visitor),
        "layers": {k: _row(v, base, visitor) for k, v in sorted(layers.items(), key=_by_number)},
        "roles": {k: _row(v, base, visitor) for k, v in sorted(roles.items())},
        "tensors": tensors,
    }


def _by_number(item: tuple[str, list[str]]) -> tuple[int, str, int]:
    layer = role_of(item[1][0]).layer
    return (layer is not None, item[0].rstrip("0123456789"), layer or 0)


def _row(names: Sequence[str], base: Checkpoint, visitor: _Difference) -> dict[str, Any]:
    gram = visitor.gram.of(*names)
    delta, start, dot = gram[0, 0], gram[1, 1], gram[0, 1]
    end = start + 2 * dot + delta
    elements = sum(base.specs[n].numel for n in names)
    changed = int(sum(visitor.extremes[n][1] for n in names))
    cosine = (start + dot) / math.sqrt(start * end) if start > 0 and end > 0 else None
    return {
        "elements": elements,
        "changed": changed,
        "changed_share": changed / elements if elements else 0.0,
        "norm": math.sqrt(delta),
        "relative_norm": math.sqrt(delta / start) if start > 0 else None,
        "largest": float(max((visitor.extremes[n][0] for n in names), default=0.0)),
        "cosine": None if cosine is None else min(1.0, max(-1.0, cosine)),
    }
