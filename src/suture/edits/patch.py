"""Patches: masked task vectors on disk, applied and reverted bit for bit.

A patch says for some entries what stood there and what replaces it. Applied to its base it gives a
``View``, a checkpoint whose tensors are read through the patch: nothing is copied or computed until
something reads it. ``suture.verbs.patch.run`` writes such views to folders.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.views import LazyTensor, Same, View
from suture.edits.mask import Mask
from suture.edits.mask_file import marked
from suture.edits.patch_file import Entries, PatchFile, Spool, bits_of, nothing, write_patch
from suture.errors import (
    MismatchError,
    NonFiniteError,
    OutputError,
    Problems,
    RecipeError,
    did_you_mean,
)
from suture.kernels import compiled
from suture.tensors.spec import DTYPES, F64, PIECE, Piece, TensorSpec, listed, pieces_of

Array = np.ndarray[Any, Any]
ON_OVERLAP = ("error", "last", "mean")
"""What becomes of an entry that several patches replace: refused, the last one's, or their mean."""
UNDO = "undo.patch.safetensors"
"""Stands beside the output of every application: what was really done."""


def subtract(old: Array, new: Array, dtype: str) -> Array:
    """``new - old`` of raw bits, as task vectors have it: float32[k], zeros where undefined."""
    delta = np.zeros(old.size, np.float32)
    code, one, other = DTYPES[dtype].code, old.view(np.uint8), new.view(np.uint8)
    if code == F64:
        compiled.subtract_double(other, one, old.size, delta)
    elif code >= 0:
        start = np.zeros(old.size, np.float32)
        compiled.widen(one, code, old.size, start)
        compiled.widen_delta(other, code, old.size, start, delta)
    return delta


def add(old: Array, delta: Array, dtype: str) -> Array:
    """Raw bits plus a float32 delta, rounded once, as a merge does it.

    Raises:
        NonFiniteError: a sum is no finite number.
    """
    raw, counts = np.zeros(old.nbytes, np.uint8), np.zeros(3, np.int64)
    code, one = DTYPES[dtype].code, old.view(np.uint8)
    if code == F64:
        compiled.finish_double(one, delta, old.size, raw, counts)
    else:
        start = np.zeros(old.size, np.float32)
        compiled.widen(one, code, old.size, start)
        compiled.finish(start, delta, code, 1, old.size, raw, counts)
    if counts[2]:
        raise NonFiniteError(
            f"{counts[2]} sums are NaN, infinite or too large for {dtype}; only an unscaled patch "
            "on its own base can hold such values"
        )
    return raw.view(old.dtype)


class Patch:
    """Entries of some tensors: what stood there and what replaces it.

    ``Patch.load``, ``Patch.compose``, ``patch.scaled`` and ``patch.reversed`` make one, lazily.

    Examples:
        >>> import numpy as np, suture, tempfile
        >>> place = tempfile.TemporaryDirectory()
        >>> base = suture.open({"w": np.zeros(4, np.float32)})
        >>> tuned = suture.open({"w": np.array([0, 1, 0, 2], np.float32)})
        >>> patch = suture.patch_make(base, tuned, f"{place.name}/math.patch.safetensors")
        >>> patch.apply(base)["w"].tolist()
        [0.0, 1.0, 0.0, 2.0]
        >>> patch.scaled(0.5).apply(base)["w"].tolist()
        [0.0, 0.5, 0.0, 1.0]
        >>> place.cleanup()
    """

    label: str
    specs: dict[str, TensorSpec]
    """The tensors that are touched, sorted, as the base has them."""
    base: str | None
    """Fingerprint of the whole base; ``None`` where it is not known."""
    result: str | None
    """Fingerprint of the whole base with the patch applied."""
    prints: dict[str, tuple[str | None, str | None]]
    """Fingerprints of each tensor that is touched, before and after."""
    restricted: bool
    """Whether it was made from something that must not be passed on; everything made of it is."""
    files: tuple[Checkpoint, ...]
    """The files it reads."""
    identity: object
    """What decides its bytes, as plain data."""

    def __init__(self) -> None:
        self._near = threading.local()

    def entries(self, name: str, number: int) -> Entries:
        """The entries of piece ``number`` (2**20 elements) of a tensor that is touched."""
        raise NotImplementedError

    def near(self, name: str, number: int) -> Entries:
        """The same; each thread remembers the last one."""
        near = self._near.__dict__
        if near.get("key") != (name, number):
            near["found"] = self.entries(name, number)
            near["key"] = (name, number)
        found: Entries = near["found"]
        return found

    def _pieces(self) -> Iterator[tuple[Piece, Entries]]:
        for name, spec in self.specs.items():
            for piece in pieces_of(name, spec.numel):
                yield piece, self.near(name, piece.number)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> StoredPatch:
        """Open a patch and check every byte of it.

        Raises:
            CheckpointError: it is no patch, or damaged.
        """
        file = PatchFile(Path(path))
        file.check()
        return StoredPatch(file)

    @staticmethod
    def compose(patches: Sequence[Patch], on_overlap: str = "error") -> Patch:
        """Several patches of one base as one. Where they touch different entries, order is nothing.

        Raises:
            MismatchError: they were made on different bases, or they overlap and may not (found
                when the entries are read).
            RecipeError: no patches, or no such policy.
        """
        return Composed(patches, on_overlap)

    def scaled(self, factor: float) -> Patch:
        """The patch ``old + factor (new - old)``: float32, one rounding. Factor 1 changes nothing.

        Raises:
            RecipeError: not a finite number, or there are tensors that cannot be computed with.
        """
        return self if factor == 1 else Scaled(self, factor)

    def reversed(self) -> Patch:
        """The patch from the result back to the base."""
        return Reversed(self)

    def apply(self, model: Checkpoint, *, force: bool = False) -> View:
        """The model with the patch on it; its bytes are computed when they are read.

        An entry that holds the base's bits gets the new bits. One that does not is refused when it
        is read; with ``force`` the delta is added to it, in float32 with one rounding.

        Raises:
            MismatchError: the model lacks tensors of the patch, or has them otherwise.
        """
        self.check_fit(model)
        lenses: dict[str, LazyTensor] = {
            name: Through(self, model, name, force) if name in self.specs else Same(model, name)
            for name in model.specs
        }
        view = View(model, lenses)
        view.restricted = view.restricted or self.restricted
        return view

    def revert(self, model: Checkpoint, *, force: bool = False) -> View:
        """The base again, from the model with the patch on it."""
        return self.reversed().apply(model, force=force)

    def check_fit(self, model: Checkpoint) -> None:
        """Compare names, shapes and dtypes with those of a model.

        Raises:
            MismatchError: names every tensor that does not fit.
        """
        problems = Problems()
        lacking = [n for n in self.specs if n not in model.specs]
        if lacking:
            problems.add(MismatchError, f"{model.label}: lacks {listed(lacking)} of {self.label}")
        odd = [n for n, wanted in self.specs.items() if model.specs.get(n, wanted) != wanted]
        for name in odd[:10]:
            there, wanted = model.specs[name], self.specs[name]
            text = f"{model.label}: {name} is {there}, but {wanted} in {self.label}"
            problems.add(MismatchError, text)
        if odd[10:]:
            problems.add(MismatchError, f"{model.label}: {len(odd) - 10} more tensors differ")
        problems.raise_if_any()

    def delta(self, name: str) -> Array:
        """One tensor of the task vector: float32 in the tensor's shape, 0 where it is not touched.

        Raises:
            KeyError: the tensor is not touched.
        """
        spec = self.specs[name]
        found = np.zeros(spec.numel, np.float32)
        for piece in pieces_of(name, spec.numel):
            some = self.near(name, piece.number)
            found[piece.start + some.at.astype(np.int64)] = _delta(some, spec.dtype)
        return found.reshape(spec.shape)

    def mask(self) -> Mask:
        """The entries that are replaced, as a mask over the tensors that are touched."""
        bits = {n: np.zeros(-(-s.numel // 8), np.uint8) for n, s in self.specs.items()}
        for piece, some in self._pieces():
            chosen = np.zeros(piece.stop - piece.start, bool)
            chosen[some.at] = True
            packed = np.packbits(chosen, bitorder="little")
            bits[piece.name][piece.start // 8 : piece.start // 8 + packed.size] = packed
        shapes = {n: s.shape for n, s in self.specs.items()}
        return Mask(shapes, bits, marked({}, self.restricted))

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> StoredPatch:
        """Write the patch to a file, whole or not at all, and open it.

        Raises:
            OutputError: there is something already, or it cannot be written.
            MismatchError: patches that were composed overlap, or come from different bases.
        """
        out = Path(path)
        check_free(out, overwrite)
        spool = Spool(out.resolve().parent)
        try:
            for piece, some in self._pieces():
                spool.add(piece.name, piece.number, piece.stop - piece.start, some)
            write_patch(out, spool, self.specs, self.facts(), overwrite=overwrite)
        finally:
            spool.close()
        return Patch.load(out)

    def facts(self) -> dict[str, Any]:
        """What the metadata of the file says."""
        tensors = {
            name: {"shape": list(spec.shape), "old": self.prints[name][0],
                   "new": self.prints[name][1]}
            for name, spec in self.specs.items()
        }  # fmt: skip
        return {"base": self.base, "result": self.result, "restricted": self.restricted,
                "tensors": tensors, "provenance": self.provenance()}  # fmt: skip

    def provenance(self) -> dict[str, Any]:
        """How the patch came to be, as plain data."""
        raise NotImplementedError


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse a place for a patch that is taken, or that the patch format would not be found in.

    Raises:
        OutputError: says why.
    """
    if out.suffix != ".safetensors":
        raise OutputError(f"{out}: a patch is a safetensors file; name it NAME.patch.safetensors")
    if out.is_dir():
        raise OutputError(f"{out}: is a folder; name a file")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists; name another file, or add --overwrite")
    if not out.resolve().parent.is_dir():
        raise OutputError(f"{out}: there is no folder {out.resolve().parent}")


class StoredPatch(Patch):
    """A patch in a file."""

    def __init__(self, file: PatchFile) -> None:
        super().__init__()
        self.file, self.path, self.label = file, file.path, str(file.path)
        self.specs, self.files, self.identity = file.specs, (file.held,), file.digest
        self.base, self.result = file.facts.get("base"), file.facts.get("result")
        self.restricted = file.facts["restricted"]
        tensors = file.facts["tensors"]
        self.prints = {n: (tensors[n].get("old"), tensors[n].get("new")) for n in self.specs}

    def entries(self, name: str, number: int) -> Entries:
        """The entries of one piece, read now."""
        return self.file.entries(name, number)

    @property
    def count(self) -> int:
        """Entries that are replaced."""
        return sum(self.file.count(name) for name in self.specs)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.file.nbytes

    def provenance(self) -> dict[str, Any]:
        """How the patch came to be, as the file says."""
        found = self.file.facts.get("provenance")
        return dict(found) if isinstance(found, dict) else {}


def _delta(some: Entries, dtype: str) -> Array:
    return subtract(some.old, some.new, dtype) if some.delta is None else some.delta


class Scaled(Patch):
    """A patch whose deltas are multiplied."""

    def __init__(self, patch: Patch, factor: float) -> None:
        super().__init__()
        if not abs(factor) <= float(np.finfo(np.float32).max):
            raise RecipeError(f"scale: a finite number, not {factor}")
        fixed = [n for n, s in patch.specs.items() if not DTYPES[s.dtype].computable]
        if fixed:
            raise RecipeError(f"{patch.label}: {listed(fixed)} cannot be scaled, only replaced")
        self.patch, self.factor = patch, factor
        self.label, self.specs, self.files = patch.label, patch.specs, patch.files
        self.base, self.result, self.restricted = patch.base, None, patch.restricted
        self.prints = {n: (old, None) for n, (old, _) in patch.prints.items()}
        self.identity = [patch.identity, "scale", factor]

    def entries(self, name: str, number: int) -> Entries:
        """The entries of one piece, computed now."""
        some, dtype = self.patch.entries(name, number), self.specs[name].dtype
        delta = np.float32(self.factor) * _delta(some, dtype)
        return Entries(some.at, some.old, _sum(some.old, delta, name, dtype), delta)

    def provenance(self) -> dict[str, Any]:
        """The patch and the factor."""
        return {"made": "scaled", "scale": self.factor, "of": self.patch.provenance()}


def _sum(old: Array, delta: Array, name: str, dtype: str) -> Array:
    try:
        return add(old, delta, dtype)
    except NonFiniteError as error:
        raise NonFiniteError(f"{name}: {error}") from None


class Reversed(Patch):
    """A patch from the result to the base."""

    def __init__(self, patch: Patch) -> None:
        super().__init__()
        self.patch = patch
        self.label, self.specs, self.files = f"{patch.label} reversed", patch.specs, patch.files
        self.base, self.result, self.restricted = patch.result, patch.base, patch.restricted
        self.prints = {n: (new, old) for n, (old, new) in patch.prints.items()}
        self.identity = [patch.identity, "reversed"]

    def entries(self, name: str, number: int) -> Entries:
        """The entries of one piece, old and new exchanged."""
        some = self.patch.entries(name, number)
        return Entries(some.at, some.new, some.old, None if some.delta is None else -some.delta)

    def provenance(self) -> dict[str, Any]:
        """The patch that is reversed."""
        return {"made": "reversed", "of": self.patch.provenance()}


class Composed(Patch):
    """Several patches of one base."""

    def __init__(self, patches: Sequence[Patch], on_overlap: str) -> None:
        super().__init__()
        if not patches:
            raise RecipeError("name at least one patch")
        if on_overlap not in ON_OVERLAP:
            known = did_you_mean(on_overlap, ON_OVERLAP)
            raise RecipeError(f"no policy {on_overlap!r} for overlaps; {known}")
        self.patches, self.on_overlap = tuple(patches), on_overlap
        self.label = listed([p.label for p in patches], 3)
        self.files = tuple(dict.fromkeys(f for p in patches for f in p.files))
        self.restricted = any(p.restricted for p in patches)
        self.identity = [on_overlap, *(p.identity for p in patches)]
        names = sorted({n for p in patches for n in p.specs})
        self.touching = {n: [p for p in patches if n in p.specs] for n in names}
        self.specs = {n: touching[0].specs[n] for n, touching in self.touching.items()}
        self._check()
        bases = {p.base for p in patches}
        self.base = bases.pop() if len(bases) == 1 else None
        self.result = patches[0].result if len(patches) == 1 else None
        self.prints = {
            n: touching[0].prints[n] if len(touching) == 1
            else (next((o for p in touching if (o := p.prints[n][0])), None), None)
            for n, touching in self.touching.items()
        }  # fmt: skip

    def _check(self) -> None:
        problems = Problems()
        for name, touching in self.touching.items():
            first = touching[0]
            for other in touching[1:]:
                here, there = first.specs[name], other.specs[name]
                old, known = other.prints[name][0], first.prints[name][0]
                if here != there:
                    text = f"{name} is {here} in {first.label}, but {there} in {other.label}"
                    problems.add(MismatchError, text)
                elif None not in (old, known) and old != known:
                    text = f"{name}: {first.label} and {other.label} were made on different bases"
                    problems.add(MismatchError, f"{text}; apply one after the other")
        problems.raise_if_any()

    def entries(self, name: str, number: int) -> Entries:
        """The entries of one piece of all patches together."""
        dtype = self.specs[name].dtype
        parts = [s for p in self.touching[name] if (s := p.entries(name, number)).at.size]
        if len(parts) < 2:
            return parts[0] if parts else nothing(dtype)
        joined = _joined(parts, dtype)
        first = np.flatnonzero(np.diff(joined.at.astype(np.int64), prepend=-1))
        if first.size == joined.at.size:
            return joined
        return self._settled(name, number * PIECE, joined, first)

    def _settled(self, name: str, start: int, joined: Entries, first: Array) -> Entries:
        """The entries of which some stand in several patches; ``first`` of each position."""
        dtype, claims = self.specs[name].dtype, np.diff(first, append=joined.at.size)
        if self.on_overlap == "error":
            many, place = int((claims > 1).sum()), start + int(joined.at[first[claims > 1][0]])
            raise MismatchError(
                f"{name}: {many} entries near element {place} stand in more than one patch of "
                f"{self.label}; say what becomes of them: --on-overlap last or mean"
            )
        old = joined.old[first]
        if (joined.old != np.repeat(old, claims)).any():
            raise MismatchError(f"{name}: {self.label} were made on different bases")
        last = first + claims - 1
        delta = None if joined.delta is None else joined.delta[last]
        if self.on_overlap == "last":
            return Entries(joined.at[first], old, joined.new[last], delta)
        if not DTYPES[dtype].computable:
            raise MismatchError(f"{name}: {dtype} entries have no mean; say --on-overlap last")
        # Added in order of value, in float64: the order of the patches changes nothing.
        all_deltas = _delta(joined, dtype)
        order = np.lexsort((all_deltas, joined.at))
        sums = np.add.reduceat(all_deltas[order].astype(np.float64), first)
        delta = (sums / claims).astype(np.float32)
        new, shared = joined.new[last], claims > 1  # bits that one patch claims stay as they are
        new[shared] = _sum(old[shared], delta[shared], name, dtype)
        return Entries(joined.at[first], old, new, delta)

    def provenance(self) -> dict[str, Any]:
        """The patches, and what was done where they overlap."""
        return {"made": "composed", "on_overlap": self.on_overlap,
                "of": [p.provenance() for p in self.patches]}  # fmt: skip


def _joined(parts: Sequence[Entries], dtype: str) -> Entries:
    """All entries in order of position, those of one position in order of the patches."""
    at = np.concatenate([p.at for p in parts])
    order = np.argsort(at, kind="stable")
    delta = None
    if any(p.delta is not None for p in parts):
        delta = np.concatenate([_delta(p, dtype) for p in parts])[order]
    old, new = (np.concatenate([p[i] for p in parts])[order] for i in (1, 2))
    return Entries(at[order], old, new, delta)


class Through:
    """A tensor with a patch on it."""

    def __init__(self, patch: Patch, model: Checkpoint, name: str, force: bool) -> None:
        self.patch, self.name, self.force = patch, name, force
        self.origin = (model, name)
        self.sources = (model, *patch.files)
        self.identity: object = ["patch", patch.identity, force]

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype of the model's tensor."""
        return self.patch.specs[self.name]

    def read(self, start: int, raw: Array) -> None:
        """Fill the bytes ``raw`` from element ``start`` on, and patch them.

        Raises:
            MismatchError: an entry does not hold what the base held, and that is not forced.
        """
        self.origin[0].read_into(self.name, start, raw)
        current = raw.view(bits_of(self.spec.dtype))
        stop = start + current.size
        for number in range(start // PIECE, -(-stop // PIECE)):
            first = number * PIECE
            some = self.patch.near(self.name, number)
            edges = np.array([max(0, start - first), min(PIECE, stop - first)], np.uint32)
            low, high = np.searchsorted(some.at, edges)
            if low != high:
                part = Entries(*(None if x is None else x[low:high] for x in some))  # type: ignore[arg-type]
                where = part.at.astype(np.int64) + (first - start)
                current[where] = self._replaced(current[where], part, first)

    def _replaced(self, current: Array, part: Entries, first: int) -> Array:
        other = current != part.old
        if not other.any():
            return part.new
        if not self.force:
            place = first + int(part.at[np.argmax(other)])
            raise MismatchError(
                f"{self.origin[0].label}: {self.name} does not hold at element {place} what the "
                f"base of {self.patch.label} held; a patch fits its own base only"
            )
        new = part.new.copy()
        dtype = self.spec.dtype
        if DTYPES[dtype].computable:
            delta = _delta(part, dtype)[other]
            new[other] = _sum(current[other], delta, self.name, dtype)
        return new


__all__ = ["ON_OVERLAP", "Patch", "StoredPatch"]
