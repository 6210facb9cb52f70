"""How much the masks of several tasks have in common, beside what chance alone would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from suture.analysis.cells import Array, Groups, Matrix, Stack, frozen
from suture.analysis.geometry import cosines
from suture.edits.mask import Mask
from suture.kernels import compiled
from suture.stream.sweep import Block, Visitor
from suture.stream.vector import Gram
from suture.tensors.spec import Piece, TensorSpec


@dataclass(frozen=True)
class KeptShare:
    """What a mask keeps in one part of the network."""

    model: str
    elements: int
    density: float
    """Share of this part's entries that are in the mask."""
    share: float
    """Share of the mask that lies in this part."""
    enrichment: float
    """``density`` over the density of the whole mask; 1 means no preference."""
    energy: float | None
    """Squared length of the masked delta over that of the delta; ``None`` where nothing moved."""
    layer: str | None = None
    role: str | None = None


@dataclass(frozen=True)
class Overlap:
    """Masks compared pair by pair, and where each of them lies."""

    models: tuple[str, ...]
    source: str
    """Where the masks come from."""
    jaccard: Matrix
    """Size of the intersection over size of the union."""
    independent: Matrix
    """The Jaccard index of random masks with the same densities."""
    placed: Matrix
    """The same, for random masks that also have the same density in every tensor."""
    cosine: Matrix
    """Cosine of the masked task vectors."""
    unmasked: Matrix
    """Cosine of the task vectors over the same tensors."""
    total: tuple[KeptShare, ...]
    layers: tuple[KeptShare, ...]
    roles: tuple[KeptShare, ...]
    cells: tuple[KeptShare, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def independent_jaccard(p: float, q: float) -> float:
    """The Jaccard index of two large random masks of densities p and q: s/(2-s) for p = q = s."""
    union = p + q - p * q
    return p * q / union if union > 0 else 0.0


class Masked(Visitor[Stack]):
    """Dot products of the task vectors and of the masked ones, tensor by tensor."""

    def __init__(self, masks: Sequence[Mask]) -> None:
        self.masks = list(masks)
        self.gram = Gram(2 * len(masks))

    def local(self) -> Stack:
        """The masked deltas under the whole ones."""
        return Stack(self.gram)

    def see(self, local: Stack, block: Block) -> None:
        """Add a block."""
        rows, number = local.fit(block.size), len(self.masks)
        rows[:number, : block.count] = block.rows[:number, : block.count]
        for i, mask in enumerate(self.masks):
            rows[number + i, : block.count] = block.rows[i, : block.count] * _bits(mask, block)
        compiled.gram(rows, block.count, local.lanes[""])

    def end_piece(self, local: Stack, piece: Piece) -> None:
        """Put the lanes of a piece aside."""
        self.gram.end_piece(local.lanes, piece)

    def end_task(self, local: Stack, task: Sequence[Piece]) -> None:
        """Hand the finished pieces over."""
        self.gram.end_task(local.lanes, task)

    def overlap(self, models: Sequence[str], groups: Groups, source: str) -> Overlap:
        """What was found, after the sweep."""
        names = [n for inside in groups.layers.values() for n in inside]
        sizes = {n: TensorSpec("BOOL", self.masks[0].shapes[n]).numel for n in names}
        counts = {n: np.array([_count(m, n) for m in self.masks], np.int64) for n in names}
        whole = self.gram.of(*names)
        number = len(self.masks)
        everything = sum(counts.values(), np.zeros(number, np.int64))
        densities = everything / max(1, sum(sizes.values()))

        def kept(inside: Sequence[str], **where: str) -> list[KeptShare]:
            elements = sum(sizes[n] for n in inside)
            found = sum((counts[n] for n in inside), np.zeros(number, np.int64))
            energy = np.diag(self.gram.of(*inside))
            return [
                KeptShare(
                    model, elements, _over(found[i], elements), _over(found[i], everything[i]),
                    _over(_over(found[i], elements), densities[i]),
                    float(energy[number + i] / energy[i]) if energy[i] > 0 else None, **where,
                )
                for i, model in enumerate(models)
            ]  # fmt: skip

        return Overlap(
            tuple(models), source, _jaccards(self.masks, names, counts),
            _chances(counts, {"": list(names)}, sizes), _chances(counts, None, sizes),
            frozen(cosines(whole[number:, number:])), frozen(cosines(whole[:number, :number])),
            tuple(kept(names)),
            tuple(k for key, inside in groups.layers.items() for k in kept(inside, layer=key)),
            tuple(k for key, inside in groups.roles.items() for k in kept(inside, role=key)),
            tuple(k for key, inside in groups.cells.items()
                  for k in kept(inside, layer=key.layer, role=key.role)),
        )  # fmt: skip


def _bits(mask: Mask, block: Block) -> Array:
    bits = mask.bits[block.name][block.start // 8 : -(-block.stop // 8)]
    return np.asarray(np.unpackbits(bits, count=block.count, bitorder="little"))


def _count(mask: Mask, name: str) -> int:
    return int(np.bitwise_count(mask.bits[name]).sum(dtype=np.int64))


def _over(above: float, below: float) -> float:
    return float(above / below) if below else 0.0


def _jaccards(masks: Sequence[Mask], names: Sequence[str], counts: Mapping[str, Array]) -> Matrix:
    number = len(masks)
    both = np.zeros((number, number), np.int64)
    for name in names:
        for a in range(number):
            for b in range(a + 1):
                shared = masks[a].bits[name] & masks[b].bits[name]
                both[a, b] += np.bitwise_count(shared).sum(dtype=np.int64)
    both = np.maximum(both, both.T)
    sizes = sum(counts.values(), np.zeros(number, np.int64))
    return frozen(_ratio(both.astype(float), sizes.astype(float)))


def _ratio(both: Array, sizes: Array) -> Array:
    union = sizes[:, None] + sizes[None, :] - both
    return np.asarray(np.divide(both, union, out=np.zeros_like(both), where=union > 0))


def _chances(
    counts: Mapping[str, Array], groups: Mapping[str, list[str]] | None, sizes: Mapping[str, int]
) -> Matrix:
    """The Jaccard index that random masks have when each group keeps its number of entries."""
    inside = groups if groups is not None else {n: [n] for n in counts}
    number = len(next(iter(counts.values())))
    both = np.zeros((number, number))
    for names in inside.values():
        kept = sum((counts[n] for n in names), np.zeros(number, np.int64)).astype(float)
        size = sum(sizes[n] for n in names)
        both += np.outer(kept, kept) / size if size else 0.0
    all_kept = sum(counts.values(), np.zeros(number, np.int64)).astype(float)
    chances = _ratio(both, all_kept)
    chances[np.diag_indices(number)] = all_kept > 0  # a mask and itself: no chance involved
    return frozen(chances)
