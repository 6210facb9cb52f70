"""Masks: sets of entries, one bit each; and dataless localization."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import suture
import toy
from slow import topk
from suture import Mask
from suture.edits.mask_file import StoredMask
from suture.errors import MismatchError, OutputError, RecipeError, SutureError

SHAPES = {"a": (3, 5), "b": (16,), "c": (), "d": (0, 4), "e": (1, 1, 9)}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())

entries = st.lists(st.booleans(), min_size=SIZE, max_size=SIZE)


def packed(chosen: list[bool]) -> Mask:
    """A mask of SHAPES from one boolean an entry."""
    bits, rest = {}, np.array(chosen)
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        bits[name], rest = np.packbits(rest[:size], bitorder="little"), rest[size:]
    return Mask(SHAPES, bits)


def unpacked(mask: Mask) -> list[bool]:
    """One boolean an entry."""
    return [bool(x) for name in SHAPES for x in mask[name].ravel()]


@given(entries, entries)
def test_masks_are_sets(one: list[bool], other: list[bool]) -> None:
    """``& | - ~``, counts, density and Jaccard are those of the sets of entries."""
    a, b = packed(one), packed(other)
    left = {i for i, x in enumerate(one) if x}
    right = {i for i, x in enumerate(other) if x}

    def as_set(mask: Mask) -> set[int]:
        return {i for i, x in enumerate(unpacked(mask)) if x}

    assert as_set(a & b) == left & right
    assert as_set(a | b) == left | right
    assert as_set(a - b) == left - right
    assert as_set(~a) == set(range(SIZE)) - left
    assert (~a).count == SIZE - len(left)
    assert (a.count, a.size, a.density) == (len(left), SIZE, len(left) / SIZE)
    assert a.jaccard(b) == (len(left & right) / len(left | right) if left | right else 0.0)
    assert ~~a == a
    assert (a == b) == (left == right)
    assert (a | ~a).density == 1


@given(entries)
def test_shapes_come_back(chosen: list[bool]) -> None:
    """A mask gives booleans in the shape of the tensor; scalar and empty ones, too."""
    mask = packed(chosen)

    assert {name: mask[name].shape for name in SHAPES} == SHAPES
    assert all(mask[name].dtype == bool for name in SHAPES)
    assert unpacked(mask) == chosen


def test_operations_leave_their_operands_alone() -> None:
    """Each operation makes a new mask."""
    a, b = packed([True, False] * (SIZE // 2) + [True] * (SIZE % 2)), packed([True] * SIZE)
    before = unpacked(a), unpacked(b)

    _ = (a & b, a | b, a - b, ~a, ~b)

    assert (unpacked(a), unpacked(b)) == before


def test_masks_of_other_tensors_do_not_combine() -> None:
    """Another name or shape is an error, not an empty intersection."""
    mask = packed([True] * SIZE)
    other = Mask({"a": (5, 3)}, {"a": np.zeros(2, np.uint8)})

    with pytest.raises(SutureError, match="same tensors"):
        _ = mask & other
    assert mask != other


@given(chosen=entries)
def test_saving_and_loading(chosen: list[bool], tmp_path_factory: pytest.TempPathFactory) -> None:
    """What ``save`` writes, ``load`` reads: the same set over the same shapes."""
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    mask = packed(chosen)

    mask.save(path)

    assert Mask.load(path) == mask


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the bits of a mask file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A mask of three of nine entries of two tensors."""
    path = tmp_path / "small.safetensors"
    marks = {"b": np.arange(6).reshape(2, 3) % 4 == 1, "a": np.array([True, False, False])}
    Mask.of(marks, {"rule": "magnitude"}).save(path)
    return path


def test_the_bytes_of_a_mask_are_as_described(small: Path) -> None:
    """Golden bytes: header, metadata, order, bits; a change of the format must be meant."""
    header, bits = parts(small)
    metadata = header.pop("__metadata__")
    content = small.read_bytes()
    blank = content.replace(metadata["digest"].encode(), b"0" * 32)

    assert {k: (v["dtype"], v["shape"], v["data_offsets"]) for k, v in header.items()} == {
        "a": ("U8", [1], [0, 1]), "b": ("U8", [1], [1, 2])
    }  # fmt: skip
    assert bits == bytes([0b001, 0b100010])
    assert list(metadata) == ["format", "version", "digest", "about", "shape a", "shape b"]
    assert (metadata["format"], metadata["version"]) == ("suture.mask", "2")
    assert (metadata["shape a"], metadata["shape b"]) == ("3", "2,3")
    assert json.loads(metadata["about"]) == {"rule": "magnitude"}
    assert xxhash.xxh3_128_hexdigest(blank) == metadata["digest"]
    assert hashlib.sha256(content).hexdigest() == GOLDEN


GOLDEN = "30c285d4f446da43e611b9d63b5e316f39a39f177a8119a4ce23c669e235a35a"


def test_each_byte_of_a_mask_is_guarded(small: Path) -> None:
    """Whichever byte is changed, in the length, the header or the bits, the mask is refused."""
    content = small.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 + place * 37 % 255
        small.write_bytes(changed)
        with pytest.raises(SutureError):
            Mask.load(small)


def test_a_mask_without_a_digest_still_opens(small: Path) -> None:
    """Version 1 told neither version nor digest; version 2 is refused without one, and 3 by name."""
    mask = Mask.load(small)
    header, bits = parts(small)
    metadata = header["__metadata__"]

    def write() -> None:
        text = json.dumps(header).encode()
        small.write_bytes(len(text).to_bytes(8, "little") + text + bits)

    del metadata["digest"]
    write()
    with pytest.raises(SutureError, match="no digest"):
        Mask.load(small)
    del metadata["version"]
    write()
    assert Mask.load(small) == mask
    metadata["version"] = "3"
    write()
    with pytest.raises(SutureError, match="a mask of version '?3'?; this Suture reads version 2"):
        Mask.load(small)


def test_a_mask_that_cannot_be_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full when the digest is written: an error of the user's, and no file."""

    def full(file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("suture.edits.mask_file.seal", full)
    with pytest.raises(OutputError, match="No space left"):
        packed([True] * SIZE).save(tmp_path / "mask.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_no_mask(family: Any) -> None:
    """A file that is not a mask is refused by name."""
    with pytest.raises(SutureError, match="not a mask"):
        Mask.load(family("f32").base_path / "model.safetensors")


@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(("flavour", "grid"), [("f32", False), ("bf16", True), ("mixed", True)])
def test_localize_marks_the_largest(
    flavour: str, grid: bool, density: float, scope: str, family: Any
) -> None:
    """Exactly the largest entries of a task vector, ties by position, never a zero."""
    models = family(flavour, grid=grid)
    tau = suture.open(models.paths["ada"]) - suture.open(models.base_path)
    tau = tau.select(exclude=["embedding", "head"])

    mask = suture.localize(tau, density=density, scope=scope, threads=2)

    deltas = {name: tau[name].ravel() for name in tau}
    expected = topk.kept(deltas, list(deltas), lambda name: [density], 0, scope)
    for name in tau:
        assert mask[name].ravel().tolist() == expected[name].tolist(), name
        assert mask[name].shape == tau[name].shape


def test_the_sign_and_scale_of_a_vector_do_not_move_its_mask(family: Any) -> None:
    """Magnitudes of -3 tau rank as those of tau."""
    models = family("f32")
    tau = suture.open(models.paths["ada"]) - suture.open(models.base_path)

    assert suture.localize(-3 * tau, density=0.1) == suture.localize(tau, density=0.1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"density": 0}, "share of entries kept"),
        ({"density": 1.5}, "share of entries kept"),
        ({"density": math.nan}, "share of entries kept"),
        ({"density": 0.5, "scope": "globl"}, "did you mean 'global'"),
        ({"density": 0.5, "rule": "magnitud"}, "did you mean 'magnitude'"),
    ],
)
def test_wrong_questions_are_refused(how: Any, message: str, family: Any) -> None:
    """A share outside (0, 1], an unknown scope or rule: an error that helps."""
    models = family("f32")
    tau = suture.open(models.paths["ada"]) - suture.open(models.base_path)

    with pytest.raises(RecipeError, match=message):
        suture.localize(tau, **how)


@pytest.mark.parametrize("rule", ["magnitude", "random"])
def test_entries_of_another_mask_are_never_kept(rule: str, family: Any, tmp_path: Path) -> None:
    """Set difference: the ranking goes on behind what is left out, in memory and from a file; the
    count stays that of all entries, and the mark of what must not be passed on is inherited."""
    models = family("mixed", grid=True)
    base = suture.open(models.base_path)
    tau, other = (suture.open(models.paths[m]) - base for m in ("ada", "bob"))
    out = suture.localize(other, density=0.3)
    found = suture.localize(tau, rule, density=0.2, without=out)

    assert (found & out).count == 0
    assert found.count == round(0.2 * found.size)
    if rule == "magnitude":
        deltas = {n: np.where(out[n], 0, tau[n]).ravel() for n in tau}
        expected = topk.kept(deltas, list(deltas), lambda name: [0.2], 0, "global")
        for name in tau:
            assert found[name].ravel().tolist() == expected[name].tolist(), name
    assert suture.localize(tau, rule, density=0.2, without=out - out) == suture.localize(
        tau, rule, density=0.2
    )

    Mask(out.shapes, out.bits, {"restricted": True}).save(tmp_path / "out.safetensors")
    stored = StoredMask(tmp_path / "out.safetensors")
    again = suture.localize(tau, rule, density=0.2, without=stored)
    assert again == found
    assert again.restricted
    with pytest.raises(MismatchError, match="none of the tensors"):
        suture.localize(tau, density=0.2, without=Mask.of({"x": np.ones(8, bool)}))


def test_a_sum_of_vectors_is_not_localized(family: Any, tmp_path: Path) -> None:
    """One task vector at a time: of a sum the mask would not be that of its parts."""
    models = family("f32")
    base = suture.open(models.base_path)
    a, b = (suture.open(models.paths[n]) - base for n in ("ada", "bob"))

    with pytest.raises(RecipeError, match="one task vector at a time"):
        suture.localize(a + b, density=0.5)


def test_stitching_is_pasting_what_masks_mark(family: Any, tmp_path: Path) -> None:
    """``stitch`` adds to the base the mean of the deltas over the masks that mark them."""
    models = family("f32")
    base = suture.open(models.base_path)
    taus = [
        (suture.open(models.paths[n]) - base).select(exclude=["embedding", "head"])
        for n in ("ada", "bob", "cyd")
    ]
    masks = [suture.localize(tau, density=0.3) for tau in taus]
    what = toy.recipe("stitch", models.some("ada", "bob", "cyd"), models.base_path, density=0.3)

    out, report = toy.run(tmp_path / "out", what)

    assert report.facts["kept"] == [mask.count for mask in masks]
    for name in taus[0]:
        marked = np.stack([mask[name] for mask in masks])
        total = sum(np.where(m, tau[name], 0) for m, tau in zip(marked, taus, strict=True))
        expected = base[name] + total / np.maximum(marked.sum(0), 1)
        np.testing.assert_allclose(out[name].numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", [None, "magnitude"])
def test_marks_beyond_the_last_entry_are_refused(
    rule: str | None, family: Any, tmp_path: Path
) -> None:
    """A byte holds 8 bits and a tensor may end before: more marks than entries are damage, which
    would have a control look for more entries than there are."""
    models = family()
    path = tmp_path / "m.safetensors"
    Mask({toy.ZERO: (3, 5)}, {toy.ZERO: np.array([255, 255], np.uint8)}).save(path)
    protect = {"model": "ada", "mask": str(path)} | ({} if rule is None else {"rule": rule})
    what = toy.recipe("task_arithmetic", models.some("ada"), models.base_path)

    with pytest.raises(SutureError, match=r"damaged: .*zero\.weight marks more than it has"):
        Mask.load(path)
    with pytest.raises(SutureError, match="damaged"):
        toy.run(tmp_path / "out", {**what, "protect": protect})


def test_a_shape_of_absurdly_many_digits_is_refused(tmp_path: Path) -> None:
    """What no number can be made of is no shape, and no crash either."""
    path = tmp_path / "m.safetensors"
    tensors = {"x": np.zeros(1, np.uint8)}
    save_file(tensors, path, {"format": "suture.mask", "shape x": "9" * 5000})

    with pytest.raises(SutureError, match="the mask of x has no shape"):
        Mask.load(path)


def test_nothing_is_marked_of_a_vector_times_zero(family: Any) -> None:
    """No entry of a zero task vector can matter, whatever it was before it was multiplied."""
    models = family()
    tau = suture.open(models.paths["ada"]) - suture.open(models.base_path)

    assert suture.localize(tau, density=0.5).count > 0
    assert suture.localize(0 * tau, density=0.5).count == 0


def test_a_mask_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails while it writes leaves what stood there, and nothing besides."""
    path = tmp_path / "m.safetensors"
    Mask({"a": (8,)}, {"a": np.array([1], np.uint8)}).save(path)
    before = path.read_bytes()

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OutputError, match="cannot be written"):
        Mask({"a": (8,)}, {"a": np.array([2], np.uint8)}).save(path)

    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
