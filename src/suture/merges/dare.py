"""Drop entries at random, rescale what is left (DARE), then add or merge by sign.

The random word of an entry depends on the seed, the model's name, the tensor's name and the entry's
position, and on nothing else: not on threads, blocks, shards, or what other tensors or models do.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np

from suture.kernels import compiled
from suture.merges.base import Array, Context, Density, Merge, Scale, Seed, Weight
from suture.merges.elect import AGGREGATE, ELECT, Aggregate, Elect, Sign, Votes
from suture.merges.linear import Normalize, normalized
from suture.merges.trim import voted
from suture.schema.parameters import Choice
from suture.schema.values import PerModel, Scalar, each
from suture.stream.sweep import Block, Combine, Drops, Visitor, sweep, tasks_of
from suture.tensors.spec import Piece

Rescale = Annotated[
    Literal["density", "l1", "none"],
    Choice(
        "divide what is kept by the density, or restore each tensor's sum of magnitudes, or not"
    ),
]


@lru_cache(maxsize=1 << 16)
def stream_key(seed: int, model: str, tensor: str) -> int:
    """The 64-bit key of the random stream of one tensor of one model."""
    digest = hashlib.blake2b(f"{seed}\0{model}\0{tensor}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def limit_of(density: float) -> int:
    """Words below this are kept: the density on a 32-bit scale, so 1 keeps everything."""
    return round(density * 2**32)


class _Dropped:
    """What ``combine`` of both methods needs: names, and the rescaling factors."""

    def __init__(self, models: tuple[str, ...], factors: dict[str, list[float]]) -> None:
        self.models = models
        self.factors = factors


def _drops(block: Block, state: _Dropped, density: PerModel, seed: int, rescale: str) -> Drops:
    densities = density.at(block.name, block.models)
    factors = [1.0] * block.models
    if rescale == "density":
        factors = [1 / share for share in densities]
    elif rescale == "l1":
        factors = state.factors[block.name]
    streams = [stream_key(seed, model, block.name) for model in state.models]
    return Drops(
        np.array(streams, np.uint64),
        np.array([limit_of(share) for share in densities], np.int64),
        np.array(factors, np.float32),
    )


def _drop(block: Block, drops: Drops) -> None:
    for number, limit in enumerate(drops.limits.tolist()):
        if limit < 1 << 32:
            stream, factor = int(drops.streams[number]), float(drops.factors[number])
            compiled.random_words(stream, block.start, block.count, block.words)
            compiled.drop(block.rows[number], block.words, limit, factor, block.count)


class _Sums(Visitor["dict[str, Array]"]):
    """Sums of magnitudes, of all entries and of the kept ones, tensor by tensor."""

    def __init__(self, models: tuple[str, ...], density: PerModel, seed: int) -> None:
        self.models, self.density, self.seed = models, density, seed
        self._parts: dict[str, list[Array]] = {}

    def local(self) -> dict[str, Array]:
        return {"": np.zeros((len(self.models), 2, 8))}

    def see(self, local: dict[str, Array], block: Block) -> None:
        densities = self.density.at(block.name, len(self.models))
        for number, model in enumerate(self.models):
            key = stream_key(self.seed, model, block.name)
            compiled.random_words(key, block.start, block.count, block.words)
            limit = limit_of(densities[number])
            compiled.magnitudes(
                block.rows[number], block.words, limit, block.count, local[""][number]
            )

    def end_piece(self, local: dict[str, Array], piece: Piece) -> None:
        local[f"{piece.start} {piece.name}"] = local[""]
        local[""] = np.zeros_like(local[""])

    def end_task(self, local: dict[str, Array], task: Any) -> None:
        for key in [k for k in local if k]:
            self._parts.setdefault(key.split(" ", 1)[1], []).append(local.pop(key))

    def factors(self, name: str) -> list[float]:
        found = []
        for model in range(len(self.models)):
            whole, kept = (
                math.fsum(x for part in self._parts[name] for x in part[model, i].tolist())
                for i in (0, 1)
            )
            found.append(whole / kept if whole >= 1e-7 and kept >= 1e-7 else 1.0)
        return found


def _prepare(context: Context, density: PerModel, seed: int, rescale: str) -> _Dropped:
    if rescale != "l1":
        return _Dropped(context.models, {})
    sums = _Sums(context.models, density, seed)
    sweep(context.sources, tasks_of(context.names, context.sources.reference.specs), sums,
          threads=context.threads, block=context.block, progress=context.progress)  # fmt: skip
    return _Dropped(context.models, {name: sums.factors(name) for name in context.names})


def dare_linear(
    *,
    weight: Weight = each(1.0),
    density: Density = each(0.5),
    scale: Scale = Scalar(1.0),
    seed: Seed = 0,
    rescale: Rescale = "density",
    normalize: Normalize = False,
) -> Merge[_Dropped]:
    r"""Keep each entry with probability :math:`\rho`, divide by :math:`\rho`, then add.

    :math:`\theta = \theta_0 + \lambda \sum_i w_i m_i \tau_i / \rho_i` with :math:`m_i \sim
    \mathrm{Bernoulli}(\rho_i)`, entry by entry. Unbiased; the noise grows as the density falls.
    """

    def prepare(context: Context) -> _Dropped:
        return _prepare(context, density, seed, rescale)

    def combine(block: Block, state: _Dropped) -> None:
        weights = normalized(weight.row(block), normalize) * np.float32(scale.at(block.name))
        drops = _drops(block, state, density, seed, rescale)
        block.fuse(Combine(compiled.WEIGHTED_SUM, weights), drops)

    return Merge(combine, prepare, passes=int(rescale == "l1"))


def dare_ties(
    *,
    weight: Weight = each(1.0),
    density: Density = each(0.5),
    scale: Scale = Scalar(1.0),
    seed: Seed = 0,
    rescale: Rescale = "density",
    elect: Elect = "mass",
    aggregate: Aggregate = "mean",
    zero_sign: Sign = "zero",
    votes: Votes = "weighted",
) -> Merge[_Dropped]:
    r"""Drop and rescale as DARE does, then elect signs and merge as TIES does.

    The random drop stands in the place of the trim: what survives it is not thinned again.
    """

    def prepare(context: Context) -> _Dropped:
        return _prepare(context, density, seed, rescale)

    def combine(block: Block, state: _Dropped) -> None:
        drops = _drops(block, state, density, seed, rescale)
        if votes == "equal":
            _drop(block, drops)
            finish(block)
            return
        options = (ELECT[elect], AGGREGATE[aggregate], int(zero_sign == "positive"))
        how = Combine(compiled.ELECTED, weight.row(block), np.zeros(block.models, np.uint32),
                      options=options, factor=scale.at(block.name))  # fmt: skip
        block.fuse(how, drops)

    finish = voted(weight, scale, elect, aggregate, int(zero_sign == "positive"), votes)
    return Merge(combine, prepare, passes=int(rescale == "l1"))
