"""Token embeddings and heads of several models, brought to one vocabulary when they are read.

Rows are matched by token: a model's own row where it has the token, else the row of a model that
has it, a mean of several, or zeros. Nothing is stored: a ``View`` gathers the rows of any stretch
from the files. Tied heads are settled here, too, because a mix of tied and untied models needs the
same care.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from suture.checkpoints.chat import chosen_template, with_template
from suture.checkpoints.checkpoint import Checkpoint, within
from suture.checkpoints.headers import read_json
from suture.checkpoints.views import LazyTensor, Same, View
from suture.checkpoints.vocabulary import (
    UNION,
    ZERO,
    Vocabulary,
    Wanted,
    dumped,
    read_vocabulary,
    tokenizer_files,
    union,
    with_tokens,
    written,
)
from suture.errors import CheckpointError, MismatchError, Problems, RecipeError, did_you_mean
from suture.schema.paths import place_of
from suture.tensors.roles import ParamSpace, has_vocabulary, tied_to
from suture.tensors.spec import BF16, DTYPES, TensorSpec, listed

Array = np.ndarray[Any, Any]

_ZERO, _MEAN, _PAD = -1, -2, -3
"""Instead of the number of a model: a row of zeros, of the mean of all that have the token, or of
the mean of all rows."""
_STEP = 1 << 18
"""Elements read at once for a mean of all rows."""


# -- one tensor ------------------------------------------------------------------------------------


class MatchedRows:
    """A tensor whose rows are those of others: of one, of the mean of several, or zeros.

    Means are formed in float64 and rounded once to float32; rows that are merely taken over keep
    their bytes where all models have the same dtype, and are widened exactly where they do not.

    Args:
        tensors: where rows come from; ``tensors[which]`` is the one that is mainly read.
        which: its number.
        shape: of the result, whose rows lie one after another.
        source: int64[rows], the number of a tensor, or what stands for none.
        row: int64[rows], the row there.
        own: int64[tensors, rows but padding], the row of each token in every tensor, or -1.
    """

    def __init__(
        self, tensors: Sequence[tuple[Checkpoint, str]], which: int, shape: tuple[int, ...],
        source: Array, row: Array, own: Array,
    ) -> None:  # fmt: skip
        self.tensors, self.origin = tuple(tensors), tensors[which]
        self.source, self.row, self.own = source, row, own
        self.rows = source.size
        self.width = TensorSpec("U8", shape).numel // self.rows
        used = sorted({int(n) for n in np.unique(source) if n >= 0})
        if (source == _MEAN).any():
            used = list(range(len(tensors)))
        self.sources = tuple(dict.fromkeys([self.origin[0], *(tensors[n][0] for n in used)]))
        dtypes = {c.specs[n].dtype for c, n in (tensors[u] for u in {which, *used})}
        computed = bool((source <= _MEAN).any())
        same = len(dtypes) == 1 and (not computed or dtypes <= {"F32", "F64"})
        dtype = next(iter(dtypes)) if same else "F64" if "F64" in dtypes else "F32"
        self.spec = TensorSpec(dtype, shape)
        steps = (source[1:] != source[:-1]) | (
            (source[1:] >= 0) & (row[1:] != row[:-1] + 1)
        ) | (source[1:] == _MEAN)  # fmt: skip
        self._starts = np.concatenate([[0], np.flatnonzero(steps) + 1])
        """The first row of each run of rows that lie side by side in one tensor."""
        state = xxhash.xxh3_128()
        for array in (source, row, *([own] if (source == _MEAN).any() else [])):
            state.update(np.ascontiguousarray(array, "<i8").tobytes())
        names = [[self.sources.index(c), n] for c, n in (tensors[u] for u in used)]
        self.identity: object = ["rows", dtype, list(shape), state.hexdigest(), names]
        self._pad: Array | None = None
        self._lock = threading.Lock()

    def read(self, start: int, raw: Array) -> None:
        """Fill the bytes ``raw`` from element ``start`` on."""
        size = DTYPES[self.spec.dtype].itemsize
        stop = start + raw.size // size
        run = int(np.searchsorted(self._starts, start // self.width, "right")) - 1
        at = start
        while at < stop:
            after = self._starts[run + 1] if run + 1 < self._starts.size else self.rows
            end = min(stop, int(after) * self.width)
            self._fill(int(self._starts[run]), at, raw[(at - start) * size : (end - start) * size])
            at, run = end, run + 1

    def _fill(self, first: int, at: int, raw: Array) -> None:
        """Fill ``raw`` from element ``at``, all of it in the run that begins at row ``first``."""
        source, inside = int(self.source[first]), at - first * self.width
        if source == _ZERO:
            raw[:] = 0
        elif source >= 0:
            checkpoint, name = self.tensors[source]
            begin = int(self.row[first]) * self.width + inside
            if checkpoint.specs[name].dtype == self.spec.dtype:
                checkpoint.read_into(name, begin, raw)
            else:
                count = raw.size // DTYPES[self.spec.dtype].itemsize
                self._put(raw, _numbers(checkpoint, name, begin, count))
        elif source == _MEAN:
            inside, count = inside % self.width, raw.size // DTYPES[self.spec.dtype].itemsize
            have = [n for n in range(len(self.tensors)) if self.own[n, first] >= 0]
            rows = [
                _numbers(*self.tensors[n], int(self.own[n, first]) * self.width + inside, count)
                for n in have
            ]
            self._put(raw, np.stack(rows).sum(0) / len(rows))
        else:
            count = raw.size // DTYPES[self.spec.dtype].itemsize
            places = (inside + np.arange(count)) % self.width
            self._put(raw, self._mean_of_all()[places])

    def _put(self, raw: Array, numbers: Array) -> None:
        raw[:] = numbers.astype(DTYPES[self.spec.dtype].storage).view(np.uint8)

    def _mean_of_all(self) -> Array:
        """Mean of all rows before the padding, in float64 and in order: float64[width]."""
        with self._lock:
            if self._pad is None:
                count = int(np.flatnonzero(self.source == _PAD)[0])
                total = np.zeros(self.width)
                some = max(1, _STEP // self.width)
                for row in range(0, count, some):
                    part = min(some, count - row) * self.width
                    raw = np.empty(part * DTYPES[self.spec.dtype].itemsize, np.uint8)
                    self.read(row * self.width, raw)
                    total += raw.view(DTYPES[self.spec.dtype].storage).reshape(
                        -1, self.width).sum(0, dtype=np.float64)  # fmt: skip
                self._pad = total / max(1, count)
            return self._pad


def _numbers(checkpoint: Checkpoint, name: str, start: int, count: int) -> Array:
    """Some elements of a floating tensor as float64."""
    dtype = DTYPES[checkpoint.specs[name].dtype]
    raw = np.empty(count * dtype.itemsize, np.uint8)
    checkpoint.read_into(name, start, raw)
    if dtype.code == BF16:
        return (raw.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return raw.view(dtype.storage).astype(np.float64)


# -- one vocabulary --------------------------------------------------------------------------------


class Aligned(NamedTuple):
    """Models that share one vocabulary."""

    inputs: dict[str, Checkpoint]
    files: dict[str, bytes] | None = None
    """The tokenizer files of the output, and others that speak of token ids; ``None``: those of
    the reference, as they are."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Match:
    """Which row of which model stands for each token of the output."""

    labels: tuple[str, ...]
    own: Array
    """int64[models, rows]: the row that a model has for a token, or -1."""
    rules: Mapping[int, tuple[str | None, int]]
    """What a recipe says of single tokens: by id, a model and its row, or no model for zeros."""
    forced: frozenset[int]
    base: str | None
    filler: str | None
    """The model whose rows fill ids without a token."""
    filled: Array
    """bool[rows]: ids without a token."""
    padding: int
    """Rows at the end that are the mean of all others."""

    def rows(self, labels: Sequence[str], sizes: Mapping[str, int]) -> tuple[Array, Array, Array]:
        """For the models that have a tensor: ``own``, and source and row where a model has none."""
        at = [self.labels.index(label) for label in labels]
        own = self.own[at]
        has = own >= 0
        number = has.sum(0)
        source = np.full(own.shape[1], _ZERO, np.int64)
        row = np.zeros(own.shape[1], np.int64)
        single = number == 1
        source[single] = has.argmax(0)[single]
        several = number > 1
        source[several] = _MEAN
        if self.base in labels:
            base = labels.index(self.base)
            source[several & has[base]] = base
        if self.filler in labels:
            filler = labels.index(self.filler)
            spare = self.filled & (np.arange(own.shape[1]) < sizes[str(self.filler)])
            source[spare], row[spare] = filler, np.flatnonzero(spare)
        taken = (source >= 0) & ~self.filled
        row[taken] = own[source[taken], np.flatnonzero(taken)]
        for token, (label, there) in self.rules.items():
            source[token] = _ZERO if label is None else labels.index(label)
            row[token] = there
        return own, source, row

    def of(self, number: int, own: Array, source: Array, row: Array) -> tuple[Array, Array]:
        """Source and row for one model: its own row where it has one, unless that is overruled."""
        mine = own[number] >= 0
        mine[list(self.forced)] = False
        found, where = np.where(mine, number, source), np.where(mine, own[number], row)
        if self.padding:
            end = np.full(self.padding, _PAD)
            return np.concatenate([found, end]), np.concatenate([where, np.zeros_like(end)])
        return found, where


def by_token(
    inputs: Mapping[str, Checkpoint], reference: str, wanted: Wanted, folder: Path,
    problems: Problems,
) -> Aligned:  # fmt: skip
    """Bring all models to the vocabulary of one tokenizer.

    Args:
        inputs: the models by label, in the order that a union follows.
        reference: the label of the model whose config the output has.
        wanted: which tokenizer, and where the rows of missing tokens come from.
        folder: where relative paths start.
        problems: takes what is wrong; the result then is the inputs as they were.
    """
    sizes = {label: _rows_of(c, label, problems) for label, c in inputs.items()}
    own, assumed = _vocabularies(inputs, wanted.base or reference, sizes, problems)
    unknown = sorted({r.source for r in wanted.tokens.values() if r.source not in (None, ZERO)}
                     - inputs.keys())  # fmt: skip
    unknown += [wanted.base] if wanted.base is not None and wanted.base not in inputs else []
    for label in unknown:
        hint = did_you_mean(str(label), list(inputs))
        problems.add(RecipeError, f"tokenizer: {label!r} is none of the models; {hint}")
    source = None
    with problems.collecting():
        source = _source(inputs, reference, wanted, own, folder)
    if problems or source is None:
        return Aligned(dict(inputs))
    where, held, start = source
    out = start
    if wanted.source == UNION:
        out = union(start, [own[label] for label in inputs])
    out = with_tokens(out, wanted.tokens)
    filler = (wanted.base or reference) if wanted.source == UNION else wanted.source
    rows = max(out.size, sizes.get(filler, 0)) if wanted.keep_rows else out.size
    match = _match(inputs, wanted, own, out, rows, sizes, problems)
    if problems:
        return Aligned(dict(inputs))
    views = _views(inputs, match, sizes, rows + match.padding, problems)
    files: dict[str, bytes] = {}
    with problems.collecting():
        files = written(where, held, out)
    if problems:
        return Aligned(dict(inputs))
    notes = list(assumed)
    lost = sorted(t for t, i in out.ids.items() if t not in wanted.tokens
                  and not any(t in v.ids for v in own.values()))  # fmt: skip
    if lost:
        notes.append(f"no model has {listed([repr(t) for t in lost])}: its embedding is zero")
    new = len(out.added.keys() - start.added.keys()) if wanted.source == UNION else 0
    if new:
        notes.append(f"the tokenizer has {new} more added tokens than that of the base")
    donor = inputs[wanted.source].config if wanted.source in inputs else {}
    ids = _Ids(own[reference], out, donor)
    config = _config(inputs[reference].config, sizes[reference], rows + match.padding, ids)
    views[reference] = _configured(views[reference], config)
    files |= _generation(inputs[reference], ids)
    if ids.lost:
        notes.append(f"config.json: the tokens of {listed(sorted(ids.lost))} are not in the new "
                     "vocabulary; set them yourself")  # fmt: skip
    return Aligned(views, files, tuple(notes))


def by_id(
    inputs: Mapping[str, Checkpoint], reference: str, problems: Problems
) -> Aligned:  # fmt: skip
    """Bring models to the largest vocabulary of them; an id means the same token in all.

    Rows that several models have are merged; a row beyond a model's own is that of the models which
    have it, never a copy of another row.
    """
    sizes = {label: _rows_of(c, label, problems) for label, c in inputs.items()}
    own: dict[str, Vocabulary] = {}
    for label, checkpoint in inputs.items():
        with problems.collecting():
            found = read_vocabulary(checkpoint.folder) if checkpoint.path.is_dir() else None
            if found is not None:
                own[label] = found.below(sizes[label])
    if problems:
        return Aligned(dict(inputs))
    rows = max(sizes.values())
    widest = max(inputs, key=lambda label: (sizes[label], label in own, label == reference))
    if widest in own:
        words = {i: t for t, i in own[widest].ids.items()}
        for label, vocabulary in own.items():
            other = [t for t, i in vocabulary.ids.items() if words.get(i, t) != t]
            if other:
                problems.add(
                    MismatchError,
                    f"{label}: {len(other)} of its tokens ({listed([repr(t) for t in other], 3)}) "
                    f"have the ids of other tokens in {widest}, so rows cannot be shared by id; "
                    "match them by token: `policy: {vocabulary: union}` (or `base`)",
                )
    if problems:
        return Aligned(dict(inputs))
    every = np.arange(rows)
    rows_of = np.stack([np.where(every < sizes[label], every, -1) for label in inputs])
    none = np.zeros(rows, bool)
    match = _Match(tuple(inputs), rows_of, {}, frozenset(), reference, None, none, 0)
    views = _views(inputs, match, sizes, rows, problems)
    config = _config(inputs[reference].config, sizes[reference], rows, None)
    views[reference] = _configured(views[reference], config)
    files = None
    if widest != reference and widest in own:
        folder = inputs[widest].folder
        files = {name: path.read_bytes() for name, path in tokenizer_files(folder).items()}
    return Aligned(views, files)


def _rows_of(checkpoint: Checkpoint, label: str, problems: Problems) -> int:
    rows = checkpoint.vocabulary
    if rows is None:
        problems.add(
            MismatchError, f"{label}: has no token embedding, so its vocabulary cannot be matched"
        )
        return 0
    said = {section["vocab_size"] for section in _sections(checkpoint.config)
            if type(section.get("vocab_size")) is int}  # fmt: skip
    if said and rows not in said:
        problems.add(
            MismatchError,
            f"{label}: config.json says vocab_size {', '.join(map(str, sorted(said)))}, but its "
            f"token embedding has {rows} rows; set vocab_size to {rows} there",
        )
    return rows


def _sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config and the configs inside of it."""
    return [config, *(v for v in config.values() if isinstance(v, dict))]


def _vocabularies(
    inputs: Mapping[str, Checkpoint], base: str, sizes: Mapping[str, int], problems: Problems
) -> tuple[dict[str, Vocabulary], list[str]]:
    """The tokens of every model that has rows for them."""
    found: dict[str, Vocabulary] = {}
    without: list[str] = []
    for label, checkpoint in inputs.items():
        with problems.collecting():
            own = read_vocabulary(checkpoint.folder) if checkpoint.path.is_dir() else None
            if own is None:
                without.append(label)
            else:
                found[label] = own.below(sizes[label])
    notes = []
    for label in without:
        if base in found and label != base and sizes[label] == sizes[base]:
            found[label] = found[base]
            notes.append(f"{label} has no tokenizer; its tokens are taken to be those of {base}")
        else:
            problems.add(
                CheckpointError,
                f"{inputs[label].label}: has no tokenizer, so its embeddings cannot be matched by "
                "token; put its tokenizer.json beside the weights, or leave the tokenizer out of "
                "the recipe",
            )
    return found, notes


def _source(
    inputs: Mapping[str, Checkpoint], reference: str, wanted: Wanted,
    own: Mapping[str, Vocabulary], folder: Path,
) -> tuple[Path, Vocabulary, Vocabulary] | None:  # fmt: skip
    """The folder that the output's tokenizer starts from, what it holds, and what counts of it."""
    label = (wanted.base or reference) if wanted.source == UNION else wanted.source
    if label in inputs:
        if label not in own:
            return None
        where = inputs[label].folder
        held = read_vocabulary(where)
        if held is None:  # assumed to be those of the base
            where = inputs[wanted.base or reference].folder
            held = read_vocabulary(where)
        assert held is not None
        return where, held, own[label]
    where = place_of(label, folder)
    if not where.is_dir():
        hint = did_you_mean(label, [UNION, "base", *inputs])
        raise RecipeError(
            f"tokenizer: {label!r} is none of the models and no folder with a tokenizer; {hint}"
        )
    held = read_vocabulary(where)
    if held is None:
        raise RecipeError(f"tokenizer: {where} holds no tokenizer")
    return where, held, held


def _match(
    inputs: Mapping[str, Checkpoint], wanted: Wanted, own: Mapping[str, Vocabulary],
    out: Vocabulary, rows: int, sizes: Mapping[str, int], problems: Problems,
) -> _Match:  # fmt: skip
    table = np.full((len(inputs), rows), -1, np.int64)
    for number, label in enumerate(inputs):
        ids = own[label].ids
        pairs = [(i, ids[token]) for token, i in out.ids.items() if token in ids]
        if pairs:
            here, there = np.array(pairs, np.int64).T
            table[number, here] = there
    filled = np.ones(rows, bool)
    filled[list(out.ids.values())] = False
    rules: dict[int, tuple[str | None, int]] = {}
    forced = set()
    for token, rule in wanted.tokens.items():
        with problems.collecting():
            place = out.ids[token]
            if rule.source is None:
                if not any(token in v.ids for v in own.values()):
                    raise RecipeError(
                        f"tokenizer.tokens.{token}: no model has this token; say where its "
                        "embedding comes from, for example `source: {kind: zero}`"
                    )
                continue
            if rule.force:
                forced.add(place)
            rules[place] = _row(token, rule, own, sizes)
    multiple = wanted.pad_to_multiple_of
    padding = -rows % multiple if multiple else 0
    filler = wanted.base if wanted.source == UNION else wanted.source
    return _Match(
        tuple(inputs), table, rules, frozenset(forced), wanted.base, filler, filled, padding
    )


def _row(
    token: str, rule: Any, own: Mapping[str, Vocabulary], sizes: Mapping[str, int]
) -> tuple[str | None, int]:
    if rule.source == ZERO:
        return None, 0
    label = str(rule.source)
    if rule.token_id is not None:
        if rule.token_id >= sizes[label]:
            raise RecipeError(
                f"tokenizer.tokens.{token}: {label} has token ids from 0 to {sizes[label] - 1}, "
                f"not {rule.token_id}"
            )
        return label, int(rule.token_id)
    word = token if rule.token is None else rule.token
    if word not in own[label].ids:
        hint = did_you_mean(word, list(own[label].ids)) if len(own[label].ids) < 1000 else \
            "name another, or give its token_id"  # fmt: skip
        raise RecipeError(f"tokenizer.tokens.{token}: {label} has no token {word!r}; {hint}")
    return label, own[label].ids[word]


def _views(
    inputs: Mapping[str, Checkpoint], match: _Match, sizes: Mapping[str, int], rows: int,
    problems: Problems,
) -> dict[str, Checkpoint]:  # fmt: skip
    """Every model with its vocabulary tensors read through rows."""
    lenses: dict[str, dict[str, LazyTensor]] = {label: {} for label in inputs}
    names = {n for label, c in inputs.items() for n in _tensors(c, sizes[label])}
    known: dict[tuple[str, ...], tuple[Array, Array, Array]] = {}
    for name in sorted(names):
        have = [label for label, c in inputs.items() if name in _tensors(c, sizes[label])]
        lacking = sorted({v[0] for v in match.rules.values() if v[0] is not None} - {*have})
        if lacking:
            problems.add(
                MismatchError,
                f"tokenizer: rows of {listed(lacking)} are asked for, which lacks {name}",
            )
            continue
        tensors = [(inputs[label], name) for label in have]
        widths = {c.specs[n].numel // sizes[label]
                  for label, (c, n) in zip(have, tensors, strict=True)}  # fmt: skip
        if len(widths) > 1:
            problems.add(
                MismatchError,
                f"{name}: rows of {' and '.join(map(str, sorted(widths)))} numbers; models of "
                "different width cannot be merged",
            )
            continue
        own, source, row = known.setdefault(tuple(have), match.rows(have, sizes))
        for number, label in enumerate(have):
            taken, where = match.of(number, own, source, row)
            if _unchanged(taken, where, number, sizes[label]):
                continue
            spec = inputs[label].specs[name]
            shape = tuple(rows if s == sizes[label] else s for s in spec.shape[:1]) + spec.shape[1:]
            if spec.shape[0] != sizes[label]:  # a bias of one row
                shape = (*spec.shape[:-1], rows)
            lenses[label][name] = MatchedRows(tensors, number, shape, taken, where, own)
    return {
        label: View(c, {n: lenses[label].get(n) or Same(c, n) for n in c.specs})
        if lenses[label] else c
        for label, c in inputs.items()
    }  # fmt: skip


def _tensors(checkpoint: Checkpoint, rows: int) -> list[str]:
    """The tensors that have a row for every token."""
    return [
        name for name, spec in checkpoint.specs.items()
        if rows and spec.shape and DTYPES[spec.dtype].computable and has_vocabulary(name)
        and (spec.shape[0] == rows or spec.shape == (1, rows))
    ]  # fmt: skip


def _unchanged(source: Array, row: Array, number: int, size: int) -> bool:
    return (
        source.size == size
        and bool((source == number).all())
        and bool((row == np.arange(size)).all())
    )


# -- what else speaks of tokens --------------------------------------------------------------------


class _Ids:
    """From the token ids of the reference to those of the output."""

    def __init__(self, old: Vocabulary, out: Vocabulary, donor: Mapping[str, Any]) -> None:
        self.new = {i: out.ids.get(t) for t, i in old.ids.items() if out.ids.get(t) != i}
        self._donor = {k: v for section in reversed(_sections(donor)) for k, v in section.items()}
        """The config of the model whose tokenizer it is, for tokens of the reference it lacks."""
        self.lost: set[str] = set()

    def of(self, key: str, value: object) -> object:
        """What stands under a key that names tokens."""
        if type(value) is int:
            found = self.new.get(value, value)
            return self._instead(key) if found is None else found
        if isinstance(value, list) and all(type(v) is int for v in value):
            kept = [v for old in value if (v := self.new.get(old, old)) is not None]
            return kept or self._instead(key)
        return value

    def _instead(self, key: str) -> object:
        if self._donor.get(key) is None:
            self.lost.add(key)
        return self._donor.get(key)


def _config(config: Mapping[str, Any], old: int, rows: int, ids: _Ids | None) -> dict[str, Any]:
    """A config for another vocabulary: its size, and the ids of special tokens."""
    new = {
        key: _config(value, old, rows, ids) if isinstance(value, dict) else value
        for key, value in config.items()
    }
    if new.get("vocab_size") == old:
        new["vocab_size"] = rows
    return _renumbered(new, ids)


def _renumbered(config: dict[str, Any], ids: _Ids | None) -> dict[str, Any]:
    if ids is None or not ids.new:
        return config
    return {
        key: ids.of(key, value) if key.endswith(("_token_id", "_token_index")) else value
        for key, value in config.items()
    }


def _generation(checkpoint: Checkpoint, ids: _Ids) -> dict[str, bytes]:
    """``generation_config.json`` with other token ids, where they change."""
    path = checkpoint.folder / "generation_config.json"
    if not ids.new or not checkpoint.path.is_dir() or not path.is_file():
        return {}
    new = _renumbered(read_json(within(path, checkpoint.folder)), ids)
    return {path.name: dumped(new)}


def _configured(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """The same checkpoint with another config."""
    if config == checkpoint.config:
        return checkpoint
    if isinstance(checkpoint, View):
        return View(checkpoint.origins[0], checkpoint.lenses, config)
    return View(checkpoint, {n: Same(checkpoint, n) for n in checkpoint.specs}, config)


# -- tied heads ------------------------------------------------------------------------------------


def same_heads(inputs: Mapping[str, Checkpoint], reference: str, space: ParamSpace) -> Aligned:
    """Settle a mix of models that tie their output head to the embedding and models that do not.

    Where an edit touches neither tensor and the reference ties them, they stay tied and the heads
    of the others are not looked at. Otherwise the head becomes a tensor of its own in all models,
    and the output's config says so.
    """
    mixed = {
        head: original
        for checkpoint in inputs.values()
        for head, original in tied_to(checkpoint.specs.keys()).items()
        if any(_ties(c, head, original) for c in inputs.values())
    }
    if not mixed:
        return Aligned(dict(inputs))
    lead = inputs[reference]
    dropped = {
        head for head, original in mixed.items()
        if _ties(lead, head, original) and not any(
            space.holds(name, c.specs[name])
            for c in inputs.values() for name in (head, original) if name in c.specs)
    }  # fmt: skip
    found: dict[str, Checkpoint] = {}
    for label, checkpoint in inputs.items():
        lenses: dict[str, LazyTensor] = {
            name: Same(checkpoint, name) for name in checkpoint.specs if name not in dropped
        }
        for head in mixed.keys() - dropped:
            if _ties(checkpoint, head, mixed[head]):
                lenses[head] = Same(checkpoint, mixed[head])
        same = lenses.keys() == checkpoint.specs.keys()
        found[label] = checkpoint if same else View(checkpoint, lenses)
    kept = sorted(mixed.keys() - dropped)
    if not kept:
        return Aligned(found)
    tied = [label for label, c in inputs.items() if kept[0] not in c.specs]
    found[reference] = _configured(found[reference], _untied(lead.config))
    return Aligned(found, None, (
        f"{listed(kept)} is tied to the embedding in {listed(tied)} and not in the others: the "
        "output holds both, and its config says so",))  # fmt: skip


def _ties(checkpoint: Checkpoint, head: str, original: str) -> bool:
    """Whether a checkpoint has this head only as a second name of its embedding."""
    if head in checkpoint.specs or original not in checkpoint.specs:
        return False
    said = [s["tie_word_embeddings"] for s in _sections(checkpoint.config)
            if "tie_word_embeddings" in s]  # fmt: skip
    return not said or any(said)


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    new: dict[str, Any] = {
        key: {**value, "tie_word_embeddings": False}
        if isinstance(value, dict) and "tie_word_embeddings" in value else value
        for key, value in config.items()
    }  # fmt: skip
    return {**new, "tie_word_embeddings": False} if config else new


# -- chat templates --------------------------------------------------------------------------------


def templated(
    aligned: Aligned, wanted: str | None, donors: Callable[[], Mapping[str, Path]]
) -> Aligned:
    """The same with the chat template that a recipe asks for.

    Args:
        aligned: the models, and the tokenizer files where they were made.
        wanted: ``auto``, the name of a template, or its text; ``None`` leaves what is there.
        donors: the tokenizer files that would be carried over otherwise.
    """
    if wanted is None:
        return aligned
    folders = [c.folder for c in aligned.inputs.values() if c.path.is_dir()]
    template = chosen_template(wanted, folders)
    files = aligned.files
    if files is None:
        files = {name: path.read_bytes() for name, path in donors().items()}
    if template is None or not files:
        what = "no model has one" if template is None else "there is no tokenizer to put it in"
        return aligned._replace(notes=(*aligned.notes, f"chat_template: {what}"))
    return aligned._replace(files=with_template(files, template))


__all__ = ["Aligned", "MatchedRows", "by_id", "by_token", "same_heads", "templated"]
