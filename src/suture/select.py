"""Exact top-k by magnitude over any group of tensors, out of core, in constant memory.

The bits of a float32 magnitude, read as an unsigned integer, have the order of the magnitude: the
*key*. One sweep counts every key's upper 16 bits. A small sample taken first guesses where the
threshold will be, so that the same sweep also counts the lower 16 bits around it and how often the
likeliest tied values occur. Where a guess was wrong, another sweep over those groups settles it;
the result never depends on the sample. Exactly ``round(density * n)`` entries are kept, ties broken
by position (the order of sorted names, then the order of elements); of a task vector with fewer
non-zero entries than that, the non-zero ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from suture import kernels
from suture.roles import layer_key
from suture.spec import PIECE, Piece, TensorSpec
from suture.stream import BLOCK, Block, Progress, Sources, Visitor, sweep, tasks_of

Array = np.ndarray[Any, Any]
SCOPES = ("global", "layer", "tensor")
SAMPLE = 1 << 20
"""At most so many entries of a group are looked at before the sweep, and at most 1 in 64."""
_RUN = 1024
_SLOTS = 8
_GUESSES = 6
_ALONE = 16 * PIECE

Count = Callable[[float, int], int]
"""How many of n entries a density keeps."""


def exact_count(density: float, n: int) -> int:
    """``round(density * n)``, halves to even."""
    return round(density * n)


class Limits(NamedTuple):
    """What one group keeps, model by model."""

    keys: Array
    """uint32[models]: entries with a larger key are kept."""
    cuts: Array
    """int64[models]: entries with exactly that key are kept before this position of the group."""
    kept: Array
    """int64[models]: how many entries are kept."""
    tied: Array
    """int64[models]: how many entries have exactly that key."""


@dataclass(frozen=True)
class Selection:
    """Which entries of which tensors are kept; made by ``select``."""

    groups: Mapping[str, str]
    """The group of each tensor."""
    offsets: Mapping[str, int]
    """Where the tensor starts in its group."""
    sizes: Mapping[str, int]
    """Entries of each group."""
    limits: Mapping[str, Limits]

    def segments(self, block: Block) -> Iterator[tuple[int, int, Array]]:
        """Cut a block into stretches in which each model's rule is one number.

        Yields:
            ``(start, stop, keys)``: columns of the block, and uint32[models]; an entry is kept when
            its key is at least that.
        """
        limits = self.limits[self.groups[block.name]]
        first = self.offsets[block.name] + block.start
        edges = {0, block.count}
        for cut in limits.cuts.tolist():
            if first < cut < first + block.count:
                edges.add(cut - first)
        bounds = sorted(edges)
        for start, stop in zip(bounds, bounds[1:], strict=False):
            beyond = (limits.cuts <= first + start).astype(np.uint32)
            yield start, stop, limits.keys + beyond

    def kept(self) -> list[int]:
        """Entries kept, by model."""
        return [int(x) for x in np.sum([g.kept for g in self.limits.values()], axis=0)]

    def tied(self) -> list[int]:
        """Entries whose magnitude equals a threshold, by model; some are kept, some not."""
        return [int(x) for x in np.sum([g.tied for g in self.limits.values()], axis=0)]

    def total(self) -> int:
        """Entries there were to choose from."""
        return sum(self.sizes.values())


@dataclass
class _Group:
    key: str
    names: list[str]
    wanted: list[int]
    size: int
    blocks: int
    models: int
    bins: list[list[int]] = field(default_factory=list)
    guesses: list[Array] = field(default_factory=list)
    seen: int = 0
    coarse: Array | None = None
    fine: Array | None = None
    at: dict[int, Array] = field(default_factory=dict)
    """How often each guess occurs in the block that starts at this position: int64[models, G]."""
    limits: Limits | None = None
    exact: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Model: key, ties to keep, ties there are; known before the cut is."""

    def add(self, coarse: Array, fine: Array) -> None:
        """Add one thread's counts: uint32[models, 2, BINS] and uint32[models, slots, FINE]."""
        if self.coarse is None or self.fine is None:
            self.coarse = np.zeros((self.models, kernels.BINS), np.int64)
            self.fine = np.zeros((self.models, _SLOTS, kernels.FINE), np.int64)
        self.coarse += coarse.sum(1, dtype=np.int64)
        for model, bins in enumerate(self.bins):
            self.fine[model, : len(bins)] += fine[model, : len(bins)]

    def clear(self) -> None:
        self.seen, self.coarse, self.fine, self.at = 0, None, None, {}


def group_of(name: str, scope: str) -> str:
    """The group in which a tensor competes: all, its layer, or itself."""
    return "" if scope == "global" else layer_key(name) if scope == "layer" else name


def select(
    sources: Sources,
    names: Sequence[str],
    densities: Callable[[str], Sequence[float]],
    *,
    scope: str = "global",
    count: Count = exact_count,
    threads: int | None = None,
    block: int = BLOCK,
    progress: Progress | None = None,
) -> Selection:
    """Find, for every model, the threshold that keeps the share ``densities(name)`` of its deltas.

    Tensors that share scope and densities compete with one another. Any number of densities for
    one model is one call each; memory is a few megabytes a thread and model.
    """
    specs = sources.reference.specs
    groups, where = _grouped(names, specs, densities, scope, count, len(sources.models))
    selector = _Selector(sources, groups, where, threads, block, progress)
    selector.run()
    return Selection(
        groups={name: where[name][0].key for name in where},
        offsets={name: where[name][1] for name in where},
        sizes={g.key: g.size for g in groups},
        limits={g.key: g.limits for g in groups if g.limits is not None},
    )


def _grouped(
    names: Sequence[str],
    specs: Mapping[str, TensorSpec],
    densities: Callable[[str], Sequence[float]],
    scope: str,
    count: Count,
    models: int,
) -> tuple[list[_Group], dict[str, tuple[_Group, int]]]:
    members: dict[str, list[str]] = {}
    shares: dict[str, tuple[float, ...]] = {}
    for name in sorted(names):
        share = tuple(densities(name))
        key = f"{group_of(name, scope)} {share}"
        members.setdefault(key, []).append(name)
        shares[key] = share
    groups = []
    where: dict[str, tuple[_Group, int]] = {}
    for key, inside in members.items():
        size = sum(specs[n].numel for n in inside)
        group = _Group(key, inside, [count(s, size) for s in shares[key]], size, 0, models)
        offset = 0
        for name in inside:
            where[name] = (group, offset)
            offset += specs[name].numel
        groups.append(group)
    return groups, where


class _Selector:
    """The sweeps of ``select``: first all groups, then those in which a guess was wrong."""

    def __init__(
        self,
        sources: Sources,
        groups: list[_Group],
        where: dict[str, tuple[_Group, int]],
        threads: int | None,
        block: int,
        progress: Progress | None,
    ) -> None:
        self.sources, self.groups, self.where = sources, groups, where
        self.threads, self.block, self.progress = threads, block, progress
        specs = sources.reference.specs
        for group in groups:
            group.blocks = sum(max(1, -(-specs[n].numel // block)) for n in group.names)

    def run(self) -> None:
        left = self.groups
        while left:
            specs = self.sources.reference.specs
            tasks = [task for group in left for task in _tasks(group, specs)]
            sweep(self.sources, tasks, _Counting(self), threads=self.threads,
                  block=self.block, progress=self.progress)  # fmt: skip
            left = [group for group in left if group.limits is None]

    def sample(self, group: _Group, block: Block) -> None:
        """Guess from evenly spaced runs of entries where each model's threshold will be."""
        specs = self.sources.reference.specs
        runs = max(1, min(SAMPLE, group.size // 64) // _RUN)
        step = group.size / runs
        found: list[list[Array]] = [[] for _ in range(group.models)]
        names = iter(group.names)
        name, offset = next(names), 0
        for i in range(runs):
            position = int(i * step)
            while position >= offset + specs[name].numel:
                offset += specs[name].numel
                name = next(names)
            start = (position - offset) // _RUN * _RUN
            count = min(_RUN, specs[name].numel - start, block.size)
            block.load(name, start, count)
            for model in range(group.models):
                found[model].append(block.rows[model, :count].view(np.uint32) & 0x7FFFFFFF)
        for model in range(group.models):
            keys = np.sort(np.concatenate(found[model]))
            bins, guesses = _guess(keys, group.wanted[model] / group.size)
            group.bins.append(bins)
            group.guesses.append(guesses)

    def resolve(self, group: _Group, block: Block) -> None:
        """Read the thresholds off the counts, or note what the next sweep has to count."""
        assert group.coarse is not None
        assert group.fine is not None
        limits = _empty_limits(group.models)
        again = False
        for model in range(group.models):
            if model not in group.exact and not self._find_key(group, model):
                again = True
                continue
            key, need, there = group.exact[model]
            cut = self._find_cut(group, model, key, need, there, block)
            again = again or cut is None
            limits.keys[model], limits.tied[model] = key, there
            limits.cuts[model] = 0 if cut is None else cut
            limits.kept[model] = self._kept(group, model, key, need)
        if again:
            for model in range(group.models):
                if model in group.exact:
                    group.guesses[model] = np.array([group.exact[model][0]], np.uint32)
        else:
            group.limits = limits
        group.clear()

    def _kept(self, group: _Group, model: int, key: int, need: int) -> int:
        if key == 0:
            assert group.coarse is not None
            return group.wanted[model] - need
        return group.wanted[model]

    def _find_key(self, group: _Group, model: int) -> bool:
        """Set ``group.exact``; if the lower bits were not counted where needed, ask for them."""
        assert group.coarse is not None
        assert group.fine is not None
        wanted = group.wanted[model]
        above = np.cumsum(group.coarse[model][::-1])[::-1]  # entries in this bin or a higher one
        bin_ = int(np.searchsorted(-above, -wanted, side="right")) - 1
        higher = int(above[bin_ + 1]) if bin_ + 1 < kernels.BINS else 0
        if wanted == 0:
            group.exact[model] = (0x7FFFFFFF, 0, 0)
            return True
        if bin_ not in group.bins[model]:
            group.bins[model] = [bin_]
            return False
        counts = group.fine[model, group.bins[model].index(bin_)]
        from_top = np.cumsum(counts[::-1], dtype=np.int64)[::-1] + higher
        low = int(np.searchsorted(-from_top, -wanted, side="right")) - 1
        over = int(from_top[low + 1]) if low + 1 < kernels.FINE else higher
        group.exact[model] = (bin_ << 16 | low, wanted - over, int(counts[low]))
        return True

    def _find_cut(
        self, group: _Group, model: int, key: int, need: int, there: int, block: Block
    ) -> int | None:
        """The position before which ties are kept; ``None`` if they must be counted first."""
        if key == 0:
            return 0  # a zero delta is never kept
        if need >= there:
            return group.size
        column = np.flatnonzero(group.guesses[model] == key)
        if not column.size:
            return None
        for position in sorted(group.at):
            ties = int(group.at[position][model, column[0]])
            if need < ties:
                return self._scan(group, model, key, need, position, block)
            need -= ties
        raise AssertionError(f"{there} ties counted, but not found again in {group.key!r}")

    def _scan(
        self, group: _Group, model: int, key: int, need: int, position: int, block: Block
    ) -> int:
        specs = self.sources.reference.specs
        name = next(
            n for n in group.names
            if self.where[n][1] <= position < self.where[n][1] + specs[n].numel
        )  # fmt: skip
        start = position - self.where[name][1]
        count = min(self.block, specs[name].numel - start)
        block.load(name, start, count)
        keys = block.rows[model, :count].view(np.uint32) & 0x7FFFFFFF
        return position + int(np.flatnonzero(keys == key)[need])


def _tasks(group: _Group, specs: Mapping[str, TensorSpec]) -> list[list[Piece]]:
    """A group of moderate size stays in one thread, which then need not share its counts."""
    tasks = tasks_of(group.names, specs)
    return [[p for task in tasks for p in task]] if group.size <= _ALONE else tasks


def _empty_limits(models: int) -> Limits:
    return Limits(np.zeros(models, np.uint32), *(np.zeros(models, np.int64) for _ in range(3)))


def _guess(keys: Array, share: float) -> tuple[list[int], Array]:
    """Likely coarse bins of the threshold, and likely tied values, from sorted sampled keys."""
    size = keys.size
    rank = (1 - share) * (size - 1)
    # Runs of neighbours are correlated: count eight of them as one.
    slack = 4 * (8 * size * share * (1 - share)) ** 0.5 + 8
    low, high = (int(min(size - 1, max(0, rank + d))) for d in (-slack, slack))
    middle = int(keys[round(rank)] >> 16)
    bins = sorted(range(int(keys[low] >> 16), int(keys[high] >> 16) + 1),
                  key=lambda b: abs(b - middle))[:_SLOTS]  # fmt: skip
    values, counts = np.unique(keys[low : high + 1], return_counts=True)
    likely = values[np.argsort(-counts, kind="stable")][:_GUESSES]
    often = np.sort(counts)[::-1][:_GUESSES] >= 3
    return bins, likely[often]


class _Local:
    """One thread's counts of the group it is in."""

    def __init__(self, models: int, block: Block | None) -> None:
        self.group: _Group | None = None
        self.coarse = np.zeros((models, 2, kernels.BINS), np.uint32)
        self.fine = np.zeros((models, _SLOTS, kernels.FINE), np.uint32)
        self.slots = np.zeros((models, kernels.BINS), np.uint8)
        self.at: dict[int, Array] = {}
        self.blocks = 0
        self.used: list[int] = []
        self.spare = block


class _Counting(Visitor[_Local]):
    def __init__(self, selector: _Selector) -> None:
        self.selector = selector
        self.lock = threading.Lock()
        self.models = len(selector.sources.models)

    def local(self) -> _Local:
        return _Local(self.models, Block(self.selector.sources, self.selector.block))

    def see(self, local: _Local, block: Block) -> None:
        group, offset = self.selector.where[block.name]
        if group.blocks == 1 and group.size == block.count:
            group.limits = _direct(group, block)
            return
        if local.group is not group:
            self._leave(local)
            self._enter(local, group)
        guesses = group.guesses
        counts = np.zeros((self.models, _GUESSES), np.int64)
        for model in range(self.models):
            row = block.rows[model]
            kernels.histogram(
                row, block.count, local.coarse[model], local.slots[model], local.fine[model]
            )
            if guesses[model].size:
                kernels.count_keys(row, 0, block.count, guesses[model], counts[model])
        local.at[offset + block.start] = counts
        local.blocks += 1

    def end_piece(self, local: _Local, piece: Piece) -> None:
        # Well before a 32-bit count can overflow, and so that a group ends when its last piece does.
        group = local.group
        if group is not None and (local.blocks >= 256 or local.blocks + group.seen >= group.blocks):
            self._leave(local)

    def finish(self, local: _Local) -> None:
        self._leave(local)

    def _enter(self, local: _Local, group: _Group) -> None:
        assert local.spare is not None
        with self.lock:
            if not group.bins:
                self.selector.sample(group, local.spare)
        local.group = group
        local.used = [len(bins) for bins in group.bins]
        local.slots[:] = 0
        for model, bins in enumerate(group.bins):
            for slot, bin_ in enumerate(bins):
                local.slots[model, bin_] = slot + 1

    def _leave(self, local: _Local) -> None:
        group = local.group
        if group is None:
            return
        alone = local.blocks == group.blocks  # then the counts need not be added to anybody's
        with self.lock:
            group.seen += local.blocks
            group.at.update(local.at)
            if alone:
                group.coarse = local.coarse.sum(1, dtype=np.int64)
                group.fine = local.fine
            else:
                group.add(local.coarse, local.fine)
            complete = group.seen == group.blocks
        if complete:
            assert local.spare is not None
            self.selector.resolve(group, local.spare)
        for model, used in enumerate(local.used):
            local.fine[model, :used] = 0
        local.coarse[:] = 0
        local.at, local.blocks, local.group = {}, 0, None


def _direct(group: _Group, block: Block) -> Limits:
    """The limits of a group that is one block: by sorting it."""
    limits = _empty_limits(group.models)
    for model, wanted in enumerate(group.wanted):
        keys = block.rows[model, : block.count].view(np.uint32) & 0x7FFFFFFF
        if wanted == 0 or not keys.size:
            limits.keys[model] = 0x7FFFFFFF
            continue
        key = int(np.partition(keys, keys.size - wanted)[keys.size - wanted])
        over = int((keys > key).sum())
        ties = np.flatnonzero(keys == key)
        need = wanted - over
        limits.keys[model], limits.tied[model] = key, ties.size
        limits.kept[model] = over if key == 0 else wanted
        if key:
            limits.cuts[model] = group.size if need >= ties.size else int(ties[need])
    return limits
