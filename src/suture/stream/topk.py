"""Exact top-k by magnitude over any group of tensors, out of core, in constant memory.

The bits of a float32 magnitude, read as an unsigned integer, have the order of the magnitude: the
*key*. A small sample guesses a bracket of keys around the threshold; one sweep counts the entries
above the bracket, every key inside it, and how often the likeliest tied keys occur in each block.
If the threshold is in the bracket, it is known exactly. If not, a sweep over the upper 16 bits of
all keys finds the right bracket; the result never depends on the sample. Exactly
``round(density * n)`` entries are kept, ties broken by position (the order of sorted names, then
the order of elements); of a task vector with fewer non-zero entries than that, those.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from suture.kernels import compiled
from suture.stream.sweep import BLOCK, Block, Progress, Sources, Visitor, sweep, tasks_of
from suture.tensors.roles import layer_key
from suture.tensors.spec import PIECE, Piece, TensorSpec

Array = np.ndarray[Any, Any]
SCOPES = ("global", "layer", "tensor")
SAMPLE = 1 << 20
"""At most so many entries of a group are looked at before the sweep, and at most 1 in 128."""
_RUN = 1024
WIDTH = 1 << 19
"""Keys in a bracket at most, where they are counted: a table of 2 MB a model and thread."""
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
        for start, stop in pairwise(bounds):
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


class _Bracket(NamedTuple):
    """Keys ``low`` to ``low + width`` of one model, and the keys that are likely to be tied."""

    low: int
    width: int
    guesses: Array


@dataclass
class _Group:
    key: str
    names: list[str]
    shares: tuple[float, ...]
    wanted: list[int]
    """Entries that each column keeps; empty until it is known of how many."""
    size: int
    models: int
    """Columns: one a model, where nothing else is said."""
    blocks: int = 0
    brackets: list[_Bracket] = field(default_factory=list)
    """One a model; none yet when all keys have to be counted coarsely."""
    some: int = 0
    """Entries that are not zero, where those are counted."""
    missed: bool = False
    """Whether a bracket missed its threshold, so that the next sweep counts coarsely."""
    seen: int = 0
    above: Array | None = None
    counts: list[Array] = field(default_factory=list)
    """Of the keys in each model's bracket, or of all coarse keys: int64."""
    ties: dict[int, Array] = field(default_factory=dict)
    """How often each guess occurs in the block that starts at this position: int64[models, G]."""
    gathered: dict[int, list[Array]] = field(default_factory=dict)
    """Of a group that one thread saw alone: the keys in the bracket, by block and model."""
    limits: Limits | None = None

    @property
    def alone(self) -> bool:
        """Whether the group stays in one thread, which keeps the keys instead of counting them."""
        return self.size <= _ALONE

    def add(self, above: Array, counts: Sequence[Array]) -> None:
        """Add what one thread has counted."""
        if self.above is None:
            self.above = np.zeros(self.models, np.int64)
            self.counts = [np.zeros(c.size, np.int64) for c in counts]
        self.above += above
        for total, more in zip(self.counts, counts, strict=True):
            total += more

    def clear(self) -> None:
        """Make ready for the next sweep."""
        self.seen, self.above, self.counts = 0, None, []
        self.ties, self.gathered = {}, {}


def group_of(name: str, scope: str) -> str:
    """The group in which a tensor competes: all, its layer, or itself."""
    return "" if scope == "global" else layer_key(name) if scope == "layer" else name


def _unchanged(block: Block) -> None:
    """Entries are ranked as they are."""


@dataclass(frozen=True)
class Ranking:
    """What is ranked by magnitude, and where the thresholds are: one a *column*."""

    shares: Callable[[str], Sequence[float]]
    """The numbers of a tensor from which ``counts`` are made; tensors compete with their equals."""
    counts: Callable[[Sequence[float], int], Sequence[int]]
    """How many of n entries each column keeps."""
    rows: Sequence[int]
    """The row of the block that each column ranks."""
    change: Callable[[Block], None] = _unchanged
    """What is done with the rows of a block before they are ranked."""
    nonzero: bool = False
    """Whether n counts only the entries of the first column that are not zero."""

    def plain(self, models: int) -> bool:
        """Whether each model's entries are ranked as they are: the bytes are all that is needed."""
        return self.change is _unchanged and list(self.rows) == list(range(models))


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
    ranking = Ranking(
        densities, lambda shares, n: [count(s, n) for s in shares], range(len(sources.models))
    )
    return rank(sources, names, ranking, scope, threads=threads, block=block, progress=progress)


def rank(
    sources: Sources,
    names: Sequence[str],
    ranking: Ranking,
    scope: str = "tensor",
    *,
    threads: int | None = None,
    block: int = BLOCK,
    progress: Progress | None = None,
) -> Selection:
    """The same for any ranking; the selection has a limit for each of its columns."""
    groups, where = _grouped(names, sources.reference.specs, ranking, scope)
    selector = _Selector(sources, groups, where, ranking, threads, block, progress)
    selector.run()
    return Selection(
        groups={name: where[name][0].key for name in where},
        offsets={name: where[name][1] for name in where},
        sizes={g.key: g.size for g in groups},
        limits={g.key: g.limits for g in groups if g.limits is not None},
    )


def _grouped(
    names: Sequence[str], specs: Mapping[str, TensorSpec], ranking: Ranking, scope: str
) -> tuple[list[_Group], dict[str, tuple[_Group, int]]]:
    members: dict[str, list[str]] = {}
    shares: dict[str, tuple[float, ...]] = {}
    for name in sorted(names):
        share = tuple(ranking.shares(name))
        key = f"{group_of(name, scope)} {share}"
        members.setdefault(key, []).append(name)
        shares[key] = share
    groups = []
    where: dict[str, tuple[_Group, int]] = {}
    for key, inside in members.items():
        size = sum(specs[n].numel for n in inside)
        wanted = [] if ranking.nonzero else list(ranking.counts(shares[key], size))
        group = _Group(key, inside, shares[key], wanted, size, len(ranking.rows))
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
        ranking: Ranking,
        threads: int | None,
        block: int,
        progress: Progress | None,
    ) -> None:
        self.sources, self.groups, self.where, self.ranking = sources, groups, where, ranking
        self.threads, self.block, self.progress = threads, block, progress
        specs = sources.reference.specs
        for group in groups:
            group.blocks = sum(max(1, -(-specs[n].numel // block)) for n in group.names)

    def run(self) -> None:
        left = self.groups
        while left:
            specs = self.sources.reference.specs
            small = [group for group in left if group.blocks == 1]
            tasks = tasks_of([name for group in small for name in group.names], specs)
            tasks += [t for group in left if group.blocks > 1 for t in _tasks(group, specs)]
            sweep(self.sources, tasks, _Counting(self), threads=self.threads,
                  block=self.block, progress=self.progress)  # fmt: skip
            left = [group for group in left if group.limits is None]

    def sample(self, group: _Group, block: Block) -> None:
        """Guess from evenly spaced runs of entries where each model's threshold will be."""
        specs = self.sources.reference.specs
        runs = max(1, min(SAMPLE, group.size // 128) // _RUN)
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
            self._load(block, name, start, count)
            for model, row in enumerate(self.ranking.rows):
                found[model].append(block.rows[row, :count].view(np.uint32) & 0x7FFFFFFF)
        wanted, of = group.wanted, group.size
        if not wanted:
            looked = np.concatenate(found[0])
            of = looked.size
            wanted = list(self.ranking.counts(group.shares, int(np.count_nonzero(looked))))
        for model in range(group.models):
            share = wanted[model] / of
            group.brackets.append(_guess(np.concatenate(found[model]), share, group.alone))

    def _load(self, block: Block, name: str, start: int, count: int) -> None:
        block.load(name, start, count)
        self.ranking.change(block)

    def resolve(self, group: _Group, block: Block) -> None:
        """Read the thresholds off the counts, or set what the next sweep over the group counts."""
        if not group.wanted:
            group.wanted = list(self.ranking.counts(group.shares, group.some))
        if group.missed:
            group.brackets = [
                _coarse_bracket(counts, wanted)
                for counts, wanted in zip(group.counts, group.wanted, strict=True)
            ]
            group.missed = False
        else:
            group.limits = self._limits(group, block)
        group.clear()

    def _limits(self, group: _Group, block: Block) -> Limits | None:
        assert group.above is not None
        limits = _empty_limits(group.models)
        brackets = list(group.brackets)
        for model, bracket in enumerate(group.brackets):
            wanted = group.wanted[model]
            if wanted == 0:
                limits.keys[model] = _NOTHING
                continue
            above = int(group.above[model])
            found = _rank(group, model, wanted - above)
            if found is None:
                group.missed = True
                return None
            place, over, there = found
            key, over = bracket.low + place, over + above
            cut = self._cut(group, model, key, wanted - over, there, block)
            if cut is None:
                brackets[model] = bracket._replace(guesses=np.array([key], np.uint32))
                continue
            limits.keys[model], limits.tied[model], limits.cuts[model] = key, there, cut
            limits.kept[model] = over if key == 0 else wanted
        if any(new is not old for new, old in zip(brackets, group.brackets, strict=True)):
            group.brackets = brackets
            return None
        return limits

    def _cut(
        self, group: _Group, model: int, key: int, need: int, there: int, block: Block
    ) -> int | None:
        """The position before which ties are kept; ``None`` if they must be counted first."""
        if key == 0:
            return 0  # a zero delta is never kept
        if need >= there:
            return group.size
        column = np.flatnonzero(group.brackets[model].guesses == key)
        if not column.size and not group.alone:
            return None
        place = key - group.brackets[model].low
        for position in sorted(group.gathered if group.alone else group.ties):
            if group.alone:
                ties = int((group.gathered[position][model] == place).sum())
            else:
                ties = int(group.ties[position][model, column[0]])
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
        self._load(block, name, start, count)
        row = self.ranking.rows[model]
        keys = block.rows[row, :count].view(np.uint32) & 0x7FFFFFFF
        return position + int(np.flatnonzero(keys == key)[need])


def _rank(group: _Group, model: int, wanted: int) -> tuple[int, int, int] | None:
    """The ``wanted``-th highest key in the bracket: its place, how many are higher, how many equal.

    ``None`` where the bracket does not hold so many, or the entry lies above it.
    """
    if group.alone:
        keys = np.concatenate([row[model] for row in group.gathered.values()])
        if not 0 < wanted <= keys.size:
            return None
        found = np.zeros(3, np.int64)
        compiled.find_rank(keys, keys.size, wanted, np.zeros(2048, np.int64), found)
        place, over, there = (int(x) for x in found)
        return place, over, there
    counts = group.counts[model]
    from_top = np.cumsum(counts[::-1])[::-1]
    if not 0 < wanted <= (int(from_top[0]) if from_top.size else 0):
        return None
    place = int(np.searchsorted(-from_top, -wanted, side="right")) - 1
    over = int(from_top[place + 1]) if place + 1 < from_top.size else 0
    return place, over, int(counts[place])


_NOTHING = 0x7FFFFFFF
"""A key that no finite magnitude reaches."""


def _tasks(group: _Group, specs: Mapping[str, TensorSpec]) -> list[list[Piece]]:
    """A group of moderate size stays in one thread, which then need not share its counts."""
    tasks = tasks_of(group.names, specs)
    return [[p for task in tasks for p in task]] if group.alone else tasks


def _empty_limits(models: int) -> Limits:
    return Limits(np.zeros(models, np.uint32), *(np.zeros(models, np.int64) for _ in range(3)))


def _guess(keys: Array, share: float, alone: bool) -> _Bracket:
    """The likely bracket of the threshold, and likely tied keys in it, from sampled keys.

    A group that stays in one thread gathers the keys of its bracket, however wide, and needs no
    guesses; one that is shared counts them in a table of ``WIDTH``.
    """
    size = keys.size
    rank = (1 - share) * (size - 1)
    # Runs of neighbours are correlated: count eight of them as one.
    slack = 4 * (8 * size * share * (1 - share)) ** 0.5 + 8
    first, last = (int(min(size - 1, max(0, rank + d))) for d in (-slack, slack))
    keys = np.partition(keys, [first, round(rank), last])
    low, high, middle = int(keys[first]), int(keys[last]), int(keys[round(rank)])
    if first == 0:
        low = 0
    if last == size - 1:
        high = _NOTHING
    if alone:
        return _Bracket(low, high - low + 1, np.zeros(0, np.uint32))
    if high - low >= WIDTH:
        low = max(low, middle - WIDTH // 2)
        high = min(high, low + WIDTH - 1)
    values, counts = np.unique(keys[first : last + 1], return_counts=True)
    likely = values[np.argsort(-counts, kind="stable")][:_GUESSES]
    often = np.sort(counts)[::-1][:_GUESSES] >= 3
    return _Bracket(low, high - low + 1, likely[often])


def _coarse_bracket(counts: Array, wanted: int) -> _Bracket:
    """The bracket of one coarse bin that holds the entry of rank ``wanted``."""
    above = np.cumsum(counts[::-1])[::-1]  # entries in this bin or a higher one
    bin_ = max(0, int(np.searchsorted(-above, -wanted, side="right")) - 1)
    return _Bracket(bin_ << 16, compiled.FINE, np.zeros(0, np.uint32))


class _Local:
    """One thread's counts of the group it is in."""

    def __init__(self, models: int, block: Block) -> None:
        self.group: _Group | None = None
        self.coarsely = False
        self.tables = np.zeros((models, WIDTH), np.uint32)
        self.coarse = np.zeros((models, 2, compiled.BINS), np.uint32)
        self.above = np.zeros(models, np.int64)
        self.fine: list[Array] = []
        self.ties: dict[int, Array] = {}
        self.gathered: dict[int, list[Array]] = {}
        self.some = 0
        self.blocks = 0
        self.spare = block
        self.inside = np.zeros((models, block.size + 1), np.uint32)
        self.found = np.zeros((models + 1, 2), np.int64)
        self.bins = np.zeros(2048, np.int64)
        self.rank = np.zeros(3, np.int64)
        self.lows = np.zeros(models, np.int64)
        self.widths = np.zeros(models, np.int64)

    def places(self, model: int) -> tuple[Array, Array]:
        """Where the keys of one column go, and how many there are."""
        return self.inside[model], self.found[model]


class _Counting(Visitor[_Local]):
    def __init__(self, selector: _Selector) -> None:
        self.selector = selector
        self.lock = threading.Lock()
        self.models = len(selector.ranking.rows)

    def local(self) -> _Local:
        return _Local(self.models, Block(self.selector.sources, self.selector.block))

    def see(self, local: _Local, block: Block) -> None:
        group, offset = self.selector.where[block.name]
        ranking = self.selector.ranking
        ranking.change(block)
        if group.size == block.count and (group.blocks == 1 or not group.size):
            group.limits = _direct(group, block, local, ranking)
            return
        if local.group is not group:
            self._leave(local)
            self._enter(local, group)
        if local.coarsely:
            for model, row in enumerate(ranking.rows):
                compiled.count_coarse(block.rows[row], block.count, local.coarse[model])
        else:
            self._bracketed(local, group, block, offset)
        if ranking.nonzero and not group.wanted:
            local.some += int(np.count_nonzero(block.rows[ranking.rows[0], : block.count]))
        local.blocks += 1

    def _bracketed(self, local: _Local, group: _Group, block: Block, offset: int) -> None:
        ranking = self.selector.ranking
        if ranking.plain(block.models):
            block.gather(local.lows, local.widths, local.inside, local.found)
        else:
            for model, bracket in enumerate(group.brackets):
                row, inside, found = block.rows[ranking.rows[model]], *local.places(model)
                compiled.gather_bracket(row, block.count, bracket.low, bracket.width, inside, found)
        local.above += local.found[:-1, 1]
        gathered = [keys[:n] for keys, n in zip(local.inside, local.found[:-1, 0], strict=True)]
        position = offset + block.start
        if group.alone:
            local.gathered[position] = [keys.copy() for keys in gathered]
            return
        ties = np.zeros((self.models, _GUESSES), np.int64)
        for model, keys in enumerate(gathered):
            guesses = group.brackets[model].guesses - np.uint32(group.brackets[model].low)
            compiled.count_places(keys, keys.size, local.fine[model], guesses, ties[model])
        if ties.any():
            local.ties[position] = ties

    def end_piece(self, local: _Local, piece: Piece) -> None:
        # Well before a 32-bit count can overflow, and as soon as the group is complete.
        group = local.group
        if group is not None and (local.blocks >= 256 or local.blocks + group.seen >= group.blocks):
            self._leave(local)

    def finish(self, local: _Local) -> None:
        self._leave(local)

    def _enter(self, local: _Local, group: _Group) -> None:
        with self.lock:
            if not group.brackets:
                self.selector.sample(group, local.spare)
        local.group, local.coarsely = group, group.missed
        local.lows[:] = [b.low for b in group.brackets]
        local.widths[:] = [b.width for b in group.brackets]
        if not local.coarsely and not group.alone:
            local.fine = [local.tables[m, : b.width] for m, b in enumerate(group.brackets)]

    def _leave(self, local: _Local) -> None:
        group = local.group
        if group is None:
            return
        counts = [c.sum(0, dtype=np.int64) for c in local.coarse] if local.coarsely else local.fine
        with self.lock:
            group.seen += local.blocks
            group.some += local.some
            group.ties.update(local.ties)
            group.gathered.update(local.gathered)
            group.add(local.above, counts)
            complete = group.seen == group.blocks
        if local.coarsely:
            local.coarse[:] = 0
        for table in local.fine:
            table[:] = 0
        local.above[:] = 0
        local.fine, local.ties, local.gathered = [], {}, {}
        local.blocks, local.some, local.group = 0, 0, None
        if complete:
            self.selector.resolve(group, local.spare)


def _direct(group: _Group, block: Block, local: _Local, ranking: Ranking) -> Limits:
    """The limits of a group that is one block: by looking at all of it."""
    limits = _empty_limits(group.models)
    if not group.wanted:
        some = int(np.count_nonzero(block.rows[ranking.rows[0], : block.count]))
        group.wanted = list(ranking.counts(group.shares, some))
    if block.count:
        rows = block.rows
        if list(ranking.rows) != list(range(block.models)):
            rows = rows[list(ranking.rows)]
        compiled.find_limits(
            rows, block.count, np.array(group.wanted, np.int64), *limits,
            local.bins, local.rank, local.inside[0],
        )  # fmt: skip
    else:
        limits.keys[:] = _NOTHING
    return limits
