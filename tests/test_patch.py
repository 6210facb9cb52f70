"""Patches: made, applied, reverted, composed and scaled; bit for bit, and never on another base."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import suture
import toy
from making import (
    CONFIG,
    WIDTHS,
    Raw,
    Tensors,
    invoke,
    lines_of,
    packed,
    quick_disk,
    read_file,
    save_model,
    staging,
    tree,
)
from making import family as llamas
from slow import patches as slow
from slow import topk
from suture import Mask, Patch, apply_patches, make_patch, revert_patch
from suture.checkpoints.open import open_model
from suture.edits.patch import UNDO
from suture.errors import (
    CheckpointError,
    MismatchError,
    NonFiniteError,
    OutputError,
    RecipeError,
    SutureError,
)
from suture.merges.apply import checkpoint_fingerprint
from suture.tensors.spec import PIECE
from suture.verbs.merge import VERB as merge
from suture.verbs.patch.run import describe

BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}
SPECIAL = {
    "BF16": [0x8000, 0x7F80, 0xFF80, 0x7FC1, 0x7F81, 0xFFFF, 0x0001],
    "F16": [0x8000, 0x7C00, 0xFC00, 0x7E01, 0x7C01, 0xFFFF, 0x0001],
    "F32": [1 << 31, 0x7F800000, 0xFF800000, 0x7FC00123, 0x7F800001, 0xFFFFFFFF, 1],
    "F64": [
        1 << 63,
        0x7FF << 52,
        0xFFF << 52,
        (0x7FF8 << 48) + 7,
        (0x7FF << 52) + 1,
        (1 << 64) - 1,
        1,
    ],
}
"""-0.0, infinities, quiet and signalling NaNs with payloads, the smallest subnormal."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here is about power cuts."""
    quick_disk(monkeypatch)


def stored(folder: Path) -> Tensors:
    """The weights of an output, without the undo patch."""
    return read_file(folder / "model.safetensors")


def plain(tensors: Tensors) -> dict[str, tuple[str, bytes]]:
    return {name: (raw.dtype, raw.data) for name, raw in tensors.items()}


def bytes_of(tensors: Tensors) -> dict[str, bytes]:
    return {name: raw.data for name, raw in tensors.items()}


def view_bytes(view: Any) -> dict[str, bytes]:
    """Every tensor of an open checkpoint, read at once."""
    found = {}
    for name, spec in view.specs.items():
        raw = np.empty(spec.nbytes, np.uint8)
        view.read_into(name, 0, raw)
        found[name] = raw.tobytes()
    return found


def pair(folder: Path, base: Tensors, tuned: Tensors, **how: Any) -> Any:
    """Two models on disk, open, and the patch between them."""
    save_model(folder / "base", base)
    save_model(folder / "tuned", tuned)
    one, other = open_model(folder / "base"), open_model(folder / "tuned")
    return one, other, make_patch(one, other, folder / "p.patch.safetensors", **how)


@pytest.fixture
def models(tmp_path: Path, family: Callable[..., Any]) -> Any:
    """A base and two models near it (every dtype in them), open, with a patch to each."""
    found = family("mixed")

    class Models:
        base = open_model(found.base_path)
        ada, bob = (open_model(found.paths[n]) for n in ("ada", "bob"))
        names = found.names
        family = found

        @staticmethod
        def patch(name: str, model: Any = None, **how: Any) -> Any:
            path = tmp_path / f"{name}.patch.safetensors"
            return make_patch(Models.base, model or Models.ada, path, **how)

    return Models


# ------------------------------------------------------------------------------------ bit for bit


@st.composite
def bit_patterns(draw: Any) -> tuple[Tensors, Tensors]:
    """Two models with any bits at all: some random, some special, some equal."""
    base, tuned = {}, {}
    for dtype in BITS:
        shape = draw(st.sampled_from([(), (1,), (3, 5), (40,), (2, 0, 3), (17, 13)]))
        size, rng = int(np.prod(shape)), np.random.default_rng(draw(st.integers(0, 2**32)))
        sides = []
        for _ in range(2):
            raw = rng.integers(0, 1 << 8 * WIDTHS[dtype], size, BITS[dtype])
            special = rng.choice(np.array(SPECIAL[dtype], BITS[dtype]), size)
            sides.append(np.where(rng.random(size) < 0.5, special, raw))
        one, other = sides
        other = np.where(rng.random(size) < draw(st.sampled_from([0.0, 0.5, 0.97])), one, other)
        base[f"w.{dtype}"] = Raw(dtype, shape, one.astype(BITS[dtype]).tobytes())
        tuned[f"w.{dtype}"] = Raw(dtype, shape, other.astype(BITS[dtype]).tobytes())
    return base, tuned


@settings(max_examples=25)
@given(bit_patterns())
def test_any_bits_come_through(tmp_path_factory: pytest.TempPathFactory, case: Any) -> None:
    """With NaN payloads, -0.0 and infinities: base + patch is the tuned model, and back again."""
    base, tuned = case
    folder = tmp_path_factory.mktemp("bits")
    if bytes_of(base) == bytes_of(tuned):
        with pytest.raises(MismatchError, match="no entry differs"):
            pair(folder, base, tuned)
        return
    one, other, patch = pair(folder, base, tuned)
    apply_patches(one, [patch], folder / "out")
    revert_patch(open_model(folder / "out"), patch, folder / "back")

    assert bytes_of(stored(folder / "out")) == bytes_of(tuned)
    assert bytes_of(stored(folder / "back")) == bytes_of(base)
    assert slow.replaced(plain(base), slow.read(patch.path)[1]) == bytes_of(tuned)
    assert view_bytes(patch.apply(one)) == bytes_of(tuned)
    assert view_bytes(patch.revert(other)) == bytes_of(base)
    assert patch.count == sum(
        int((np.frombuffer(base[n].data, BITS[r.dtype]) != np.frombuffer(r.data, BITS[r.dtype])).sum())
        for n, r in tuned.items()
    )  # fmt: skip
    changed = Patch.load(folder / "out" / UNDO)
    assert slow.read(changed.path)[1] == slow.read(patch.path)[1]


def test_all_tensors_and_files_of_a_model(models: Any, tmp_path: Path) -> None:
    """The difference holds embeddings, heads and buffers, too; the output is a whole model."""
    patch = models.patch("all")
    report = apply_patches(models.base, [patch], tmp_path / "out", threads=2)

    assert toy.same_bytes(read_torch(tmp_path / "out"), models.family.models["ada"]) == []
    assert report.fingerprint == patch.result == checkpoint_fingerprint(models.ada)
    assert patch.base == checkpoint_fingerprint(models.base)
    assert {"README.md", "model.safetensors", "suture.json", UNDO} == {
        p.name for p in (tmp_path / "out").iterdir()
    }


def read_torch(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_the_same_patch_whatever_the_threads_and_shards(tmp_path: Path) -> None:
    """The bytes of a patch depend on the tensors alone: several pieces, threads, files."""
    draw = np.random.default_rng(0)
    size = PIECE + 4097
    base = {"big": packed(draw.standard_normal(size), "BF16"), "small": packed([1.0], "F32")}
    bits = np.frombuffer(base["big"].data, np.uint16).copy()
    at = [0, 3, 127, 128, 16_600, PIECE - 1, PIECE, size - 1]
    bits[at] ^= 0x8001
    tuned = {"big": Raw("BF16", (size,), bits.tobytes()), "small": packed([2.0], "F32")}
    one, _, patch = pair(tmp_path, base, tuned, threads=1)
    save_model(tmp_path / "sharded", {**tuned}, shards=2)
    sharded = open_model(tmp_path / "sharded")
    again = make_patch(one, sharded, tmp_path / "q.safetensors", threads=3)

    assert sorted(slow.read(patch.path)[1]["big"]) == at
    assert slow.read(again.path)[1] == slow.read(patch.path)[1]
    assert again.prints == patch.prints
    view = patch.apply(one)
    assert view_bytes(view) == bytes_of(tuned)
    for start, count in (
        (0, 1),
        (3, 5),
        (127, 2),
        (PIECE - 1, 2),
        (PIECE - 300, 900),
        (size - 1, 1),
    ):
        raw = np.empty(2 * count, np.uint8)
        view.read_into("big", start, raw)
        assert raw.tobytes() == tuned["big"].data[2 * start : 2 * (start + count)]
    assert patch.mask()["big"].nonzero()[0].tolist() == at


def test_saving_again_gives_the_same_bytes(models: Any, tmp_path: Path) -> None:
    """A copy is the same file; twice reversed is the same patch."""
    patch = models.patch("one", density=0.3)
    copy = patch.save(tmp_path / "copy.safetensors")
    assert copy.path.read_bytes() == patch.path.read_bytes()
    back = patch.reversed().save(tmp_path / "back.safetensors").reversed()
    assert (back.prints, back.base, back.result) == (patch.prints, patch.base, patch.result)
    assert view_bytes(back.apply(models.base)) == view_bytes(patch.apply(models.base))


# -------------------------------------------------------------------------- which entries are taken


@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_a_density_takes_the_largest(models: Any, scope: str, density: float) -> None:
    """Those of a stable sort over floating tensors but embeddings, heads and buffers."""
    patch = models.patch("dense", density=density, scope=scope)
    tau = {n: (models.ada[n] - models.base[n]).astype(np.float32) for n in models.names}
    for names in topk.groups(models.names, scope, lambda _: [density]).values():
        values = np.concatenate([tau[n].ravel() for n in names])
        kept = topk.largest(values, round(density * values.size))
        mine = [
            patch.mask()[n].ravel() if n in patch.specs else np.zeros(tau[n].size, bool)
            for n in names
        ]
        assert (np.concatenate(mine) == kept).all()
    before, after = view_bytes(models.base), view_bytes(models.ada)
    expected = slow.replaced(
        {n: (s.dtype, before[n]) for n, s in models.base.specs.items()}, slow.read(patch.path)[1]
    )
    found = view_bytes(patch.apply(models.base))
    assert found == expected
    for name in patch.specs:
        width = WIDTHS[patch.specs[name].dtype]
        chosen = np.repeat(patch.mask()[name].ravel(), width)
        mixed = np.where(chosen, *(np.frombuffer(b[name], np.uint8) for b in (after, before)))
        assert mixed.tobytes() == found[name]
        assert (patch.delta(name)[patch.mask()[name]] == tau[name][patch.mask()[name]]).all()


def test_a_mask_takes_its_entries(models: Any) -> None:
    """All of them and no others, those that did not move included; the mask comes back."""
    names = models.names[:4]
    draw = np.random.default_rng(1)
    bits = {
        n: np.packbits(draw.random(models.base.specs[n].numel) < 0.3, bitorder="little")
        for n in names
    }
    mask = Mask({n: models.base.specs[n].shape for n in names}, bits)
    for model in (models.ada, models.base):
        patch = models.patch("masked", model, mask=mask, overwrite=True)
        found = patch.mask()
        assert all(
            (found[n] == mask[n]).all() if n in patch.specs else not mask[n].any() for n in names
        )
        assert patch.count == mask.count


def test_one_percent_of_a_bfloat16_model_takes_less_than_2_7(tmp_path: Path) -> None:
    """Positions 1.3 bytes an entry, old and new 2 each: 2.65 % of the model, below the 3.5 asked."""
    draw = np.random.default_rng(0)
    base = {f"layers.{i}.w": packed(draw.standard_normal(600_000), "BF16") for i in range(3)}
    tuned = {
        n: packed(r.values + draw.standard_normal(600_000) * 0.1, "BF16") for n, r in base.items()
    }
    _, _, patch = pair(tmp_path, base, tuned, density=0.01)

    assert patch.count == 18_000
    share = describe(patch)["share"]
    assert share == patch.path.stat().st_size / 3_600_000
    assert share < 0.027


def test_a_dense_difference_costs_a_bit_an_entry(tmp_path: Path) -> None:
    """Where everything changed, positions are a bitmap, beside both models."""
    base = {"w": packed(np.arange(1.0, 100_001), "F32")}
    tuned = {"w": packed(-np.arange(1.0, 100_001), "F32")}
    _, _, patch = pair(tmp_path, base, tuned)

    assert describe(patch)["tensors"]["w"]["bytes"] == 2 * 400_000 + 12_500


# ------------------------------------------------------------------------------- several patches


def test_200_disjoint_patches_in_any_order(tmp_path: Path) -> None:
    """Order is nothing where patches touch different entries, whatever the bits: same bytes."""
    draw = np.random.default_rng(2)
    base, tuned = {}, {}
    for number, dtype in enumerate(BITS):
        for side in (base, tuned):
            bits = draw.integers(0, 1 << 8 * WIDTHS[dtype], 3000, BITS[dtype])
            side[f"layers.{number}.w"] = Raw(dtype, (30, 100), bits.tobytes())
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "tuned", tuned)
    one, other = open_model(tmp_path / "base"), open_model(tmp_path / "tuned")
    owner = {n: draw.integers(0, 201, 3000) for n in base}  # 200: nobody's
    patches = []
    for number in range(200):
        bits = {n: np.packbits(o == number, bitorder="little") for n, o in owner.items()}
        mask = Mask({n: (30, 100) for n in base}, bits)
        patches.append(make_patch(one, other, tmp_path / f"{number}.safetensors", mask=mask))
    expected = {}
    for name, raw in base.items():
        width = WIDTHS[raw.dtype]
        mine = np.repeat(owner[name] < 200, width)
        sides = (np.frombuffer(side[name].data, np.uint8) for side in (tuned, base))
        expected[name] = np.where(mine, *sides).tobytes()
    shuffle = random.Random(0)
    for round_ in range(4):
        shuffle.shuffle(patches)
        composed = Patch.compose(patches, ["error", "last", "mean", "error"][round_])
        assert view_bytes(composed.apply(one)) == expected
    report = apply_patches(one, patches, tmp_path / "out")
    assert bytes_of(stored(tmp_path / "out")) == expected
    assert report.entries == sum(p.count for p in patches)
    saved = Patch.compose(patches).save(tmp_path / "all.safetensors")
    assert view_bytes(saved.apply(one)) == expected
    assert view_bytes(saved.reversed().apply(open_model(tmp_path / "out"))) == bytes_of(base)
    step = one
    for patch in patches[:5]:
        step = patch.apply(step)  # one after the other, as views of views
    assert view_bytes(step) == view_bytes(Patch.compose(patches[:5]).apply(one))


def test_overlaps_are_refused_unless_it_is_said_what_they_become(
    models: Any, tmp_path: Path
) -> None:
    """error names tensor, count and remedy; last is the last patch's; mean averages the deltas."""
    one = models.patch("one", models.ada, density=0.5)
    two = models.patch("two", models.bob, density=0.5)
    before = tree(tmp_path)
    with pytest.raises(
        MismatchError, match=r"entries near element \d+ stand in more than one patch.*on_overlap="
    ):
        apply_patches(models.base, [one, two], tmp_path / "out")
    assert tree(tmp_path) == before

    first, last = slow.read(one.path)[1], slow.read(two.path)[1]
    raw = {n: (s.dtype, view_bytes(models.base)[n]) for n, s in models.base.specs.items()}
    merged = {n: first.get(n, {}) | last.get(n, {}) for n in first.keys() | last.keys()}
    assert view_bytes(Patch.compose([one, two], "last").apply(models.base)) == slow.replaced(
        raw, merged
    )
    with pytest.raises(RecipeError, match=r"did you mean 'last'"):
        apply_patches(models.base, [one, two], tmp_path / "out", on_overlap="least")
    with pytest.raises(RecipeError, match="no policy"):
        apply_patches(models.base, [one], tmp_path / "out", on_overlap="sum")
    with pytest.raises(RecipeError, match="at least one"):
        apply_patches(models.base, [], tmp_path / "out")


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_mean_is_stitchings(models: Any, tmp_path: Path, scale: float) -> None:
    """Each entry gets the mean of the deltas of the patches that hold it; order changes no byte."""
    models_ = [models.ada, models.bob, open_model(models.family.paths["cyd"])]
    patches = [models.patch(f"p{i}", m, density=0.6) for i, m in enumerate(models_)]
    composed = Patch.compose(patches, "mean").scaled(scale)
    found = view_bytes(composed.apply(models.base))
    for order in ([2, 0, 1], [1, 2, 0]):
        again = Patch.compose([patches[i] for i in order], "mean").scaled(scale)
        assert view_bytes(again.apply(models.base)) == found
    view = composed.apply(models.base)
    for name in models.names:
        start = models.base[name].astype(np.float64)
        sums, claims = np.zeros(start.shape), np.zeros(start.shape)
        for model, patch in zip(models_, patches, strict=True):
            chosen = patch.mask()[name] if name in patch.specs else np.zeros(start.shape, bool)
            sums += np.where(chosen, model[name].astype(np.float64) - start, 0)
            claims += chosen
        exact = start + scale * sums / np.maximum(claims, 1)
        step = {"BF16": 2**-8, "F16": 2**-11}.get(models.base.specs[name].dtype, 2**-22)
        np.testing.assert_allclose(view[name], exact, rtol=1.01 * step, atol=3e-7)
    saved = composed.save(tmp_path / "mean.safetensors")
    assert view_bytes(saved.apply(models.base)) == found
    report = apply_patches(models.base, patches, tmp_path / "out", on_overlap="mean", scale=scale)
    assert bytes_of(stored(tmp_path / "out")) == found
    assert report.undo_bytes


def test_entries_that_have_no_mean(tmp_path: Path) -> None:
    """Integers are not averaged; bits that one patch holds alone stay as they are, NaN or not."""
    base = {"a": packed([1, 2], "I64"), "w": packed([1.0, np.inf, 3.0])}
    save_model(tmp_path / "base", base)
    nan = np.array([0x3F800000, 0x7FC00123, 0x40400000], np.uint32)
    sides = [
        {"a": packed([5, 2], "I64"), "w": packed([2.0, np.inf, 3.0])},
        {"a": packed([1, 2], "I64"), "w": Raw("F32", (3,), nan.tobytes())},
        {"a": packed([7, 2], "I64"), "w": packed([4.0, np.inf, 3.0])},
    ]
    one = open_model(tmp_path / "base")
    patches = []
    for number, side in enumerate(sides):
        save_model(tmp_path / str(number), side)
        patches.append(
            make_patch(one, open_model(tmp_path / str(number)), tmp_path / f"{number}.safetensors")
        )
    with pytest.raises(MismatchError, match="a: I64 entries have no mean"):
        apply_patches(one, [patches[0], patches[2]], tmp_path / "out", on_overlap="mean")
    found = view_bytes(Patch.compose(patches, "last").apply(one))
    assert np.frombuffer(found["a"], np.int64).tolist() == [7, 2]
    assert np.frombuffer(found["w"], np.uint32)[1] == 0x7FC00123
    pieces = Patch.compose(patches, "mean").entries("w", 0)
    assert pieces.new.view(np.uint32)[1] == 0x7FC00123
    assert pieces.new.view(np.float32)[0] == 3.0
    with pytest.raises(RecipeError, match="a cannot be scaled"):
        apply_patches(one, [patches[0]], tmp_path / "out", scale=2)
    assert not (tmp_path / "out").exists()


def test_patches_of_different_bases_do_not_compose(models: Any, tmp_path: Path) -> None:
    """They say so before anything is read, and by their bits where nothing else is known."""
    one = models.patch("one", models.ada, density=0.5)
    two = make_patch(models.bob, models.ada, tmp_path / "two.safetensors")
    with pytest.raises(MismatchError, match="different bases.*one after the other"):
        Patch.compose([one, two], "last")
    unknown = two.scaled(2.0).reversed().scaled(1.0)
    assert {old for old, _ in unknown.prints.values()} == {None}
    blurred = Patch.compose([one, unknown], "last")
    with pytest.raises(MismatchError, match="different bases"):
        view_bytes(blurred.apply(models.base, force=True))


# ------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("flavour", toy.FLAVOURS)
@pytest.mark.parametrize("scale", [0.5, -1.0, 3.7])
def test_a_scaled_patch_is_task_arithmetic(
    family: Callable[..., Any], tmp_path: Path, flavour: str, scale: float
) -> None:
    """Of all entries of the space it gives the bytes of the merge with that scale."""
    found = family(flavour)
    base, ada = open_model(found.base_path), open_model(found.paths["ada"])
    patch = make_patch(base, ada, tmp_path / "p.safetensors", density=1.0)
    report = apply_patches(base, [patch], tmp_path / "patched", scale=scale)
    merged = toy.run(
        tmp_path / "merged",
        toy.recipe("task_arithmetic", found.some("ada"), found.base_path, scale=scale),
    )[0]

    assert toy.same_bytes(read_torch(tmp_path / "patched"), merged) == []
    with pytest.raises(MismatchError, match=UNDO):
        revert_patch(open_model(tmp_path / "patched"), patch, tmp_path / "back")
    undo = Patch.load(tmp_path / "patched" / UNDO)
    back = revert_patch(open_model(tmp_path / "patched"), undo, tmp_path / "back")
    assert toy.same_bytes(read_torch(tmp_path / "back"), found.base) == []
    assert back.fingerprint == patch.base == undo.base
    assert report.fingerprint == undo.result
    assert back.undo_bytes == 0
    record = json.loads((tmp_path / "patched/suture.json").read_text())
    assert (record["kind"], record["scale"], record["force"]) == ("patch", scale, False)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39])
def test_factors_that_are_none(models: Any, tmp_path: Path, scale: float) -> None:
    """A factor is a number of float32."""
    with pytest.raises(RecipeError, match="scale: a finite number"):
        apply_patches(models.base, [models.patch("p", density=0.1)], tmp_path / "out", scale=scale)


def test_arithmetic_that_leaves_the_numbers(tmp_path: Path) -> None:
    """A sum too large for the dtype is an error that names the tensor; nothing is written."""
    one, _, patch = pair(
        tmp_path, {"w": packed([1.0, 2.0], "F16")}, {"w": packed([60000.0, 2.0], "F16")}
    )
    before = tree(tmp_path)
    with pytest.raises(NonFiniteError, match="w: 1 sums"):
        apply_patches(one, [patch], tmp_path / "out", scale=4)
    assert tree(tmp_path) == before


# --------------------------------------------------------------------------------- another base


def test_another_base_is_refused(models: Any, tmp_path: Path) -> None:
    """By names, shapes and dtypes before anything is read; by content before anything is written."""
    patch = models.patch("p", density=0.2)
    before = tree(tmp_path)
    with pytest.raises(
        MismatchError, match=r"not what .* was made on: \d+ of \d+ tensors .*force=True"
    ):
        apply_patches(models.bob, [patch], tmp_path / "out")
    with pytest.raises(MismatchError, match="does not hold at element"):
        view_bytes(patch.apply(models.bob))
    other = {n: Raw("F32", (3,), bytes(12)) for n in list(patch.specs)[1:]}
    save_model(tmp_path / "other", other)
    with pytest.raises(MismatchError) as found:
        apply_patches(open_model(tmp_path / "other"), [patch], tmp_path / "out")
    assert f"lacks {next(iter(patch.specs))}" in str(found.value)
    told = [line for line in str(found.value).splitlines() if "is F32[3], but" in line]
    assert len(told) == 10, "the first ten, and how many more"
    assert told == sorted(told)
    assert f"{len(other) - 10} more tensors differ" in str(found.value)
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("other")} == before


def test_another_patch_on_the_same_tensors(models: Any, tmp_path: Path) -> None:
    """Where the tensors differ but no entry that is replaced, it says so; forced, it is exact."""
    size = {n: models.base.specs[n] for n in models.names if models.base.specs[n].numel > 8}
    halves = []
    for number in (0, 1):
        bits = {
            n: np.packbits(np.arange(s.numel) % 2 == number, bitorder="little")
            for n, s in size.items()
        }
        mask = Mask({n: s.shape for n, s in size.items()}, bits)
        halves.append(models.patch(f"half{number}", mask=mask))
    apply_patches(models.base, halves[:1], tmp_path / "one")
    one = open_model(tmp_path / "one")
    with pytest.raises(MismatchError, match="every entry that it replaces holds the right bits"):
        apply_patches(one, halves[1:], tmp_path / "two")
    report = apply_patches(one, halves[1:], tmp_path / "two", force=True)
    assert set(report.forced) == size.keys()
    apply_patches(models.base, halves, tmp_path / "both")
    assert bytes_of(stored(tmp_path / "two")) == bytes_of(stored(tmp_path / "both"))


def test_forced_onto_another_model_the_deltas_are_added(models: Any, tmp_path: Path) -> None:
    """As task arithmetic adds them; provenance and card tell; the undo patch takes it back."""
    patch = models.patch("p", density=0.3)
    report = apply_patches(models.bob, [patch], tmp_path / "out", force=True)
    found = open_model(tmp_path / "out")
    for name, spec in models.base.specs.items():
        expected = models.bob[name]
        if name in patch.specs:
            expected = expected + patch.delta(name)
            step = {"BF16": 2**-8, "F16": 2**-11}.get(spec.dtype, 2**-23)
            same = models.bob[name] == models.base[name]  # there it is the tuned entry, exactly
            close = np.isclose(found[name], expected, rtol=step, atol=0)
            assert (close | same).all()
        else:
            assert (found[name] == expected).all()
    record = json.loads((tmp_path / "out/suture.json").read_text())
    assert record["forced"] == list(report.forced) == list(patch.specs)
    assert "Forced" in (tmp_path / "out/README.md").read_text()
    undo = Patch.load(tmp_path / "out" / UNDO)
    assert undo.provenance()["force"] is True
    revert_patch(found, undo, tmp_path / "back")
    assert toy.same_bytes(read_torch(tmp_path / "back"), models.family.models["bob"]) == []


def test_reverting_what_was_never_applied(models: Any, tmp_path: Path) -> None:
    """The base itself is not the result of the patch."""
    patch = models.patch("p", density=0.3)
    with pytest.raises(MismatchError, match="reversed was made on"):
        revert_patch(models.base, patch, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- restricted, records


def test_restricted_survives_everything(models: Any, tmp_path: Path) -> None:
    """Made, saved, scaled, reversed, composed, applied, reverted, undone, merged: still restricted."""
    secret = models.patch("secret", density=0.2, restricted=True)
    other = models.patch("other", models.bob, density=0.2)
    assert (secret.restricted, other.restricted) == (True, False)
    composed = Patch.compose([other, secret], "mean")
    for patch in (secret.scaled(2.0), secret.reversed(), composed, composed.reversed().scaled(0.5)):
        assert patch.restricted
        assert patch.mask().restricted
        assert patch.save(tmp_path / "again.safetensors", overwrite=True).restricted
    report = apply_patches(models.base, [secret], tmp_path / "out")
    assert report.restricted
    assert json.loads((tmp_path / "out/suture.json").read_text())["restricted"] is True
    card = (tmp_path / "out/README.md").read_text()
    lines_of(card, "Restricted", "- restricted\n", "suture patch revert . undo.patch.safetensors")
    assert secret.identity not in card
    assert "entries" not in card
    assert Patch.load(tmp_path / "out" / UNDO).restricted
    out = open_model(tmp_path / "out")
    assert make_patch(models.base, out, tmp_path / "derived.safetensors").restricted
    assert apply_patches(out, [other], tmp_path / "more", force=True).restricted
    assert revert_patch(out, secret, tmp_path / "back").restricted
    for path in (tmp_path / "out", secret.path):
        what = toy.recipe("task_arithmetic", {"m": path}, models.family.base_path)
        merge(what, tmp_path / "merged", overwrite=True)
        assert json.loads((tmp_path / "merged/suture.json").read_text())["restricted"] is True
    merge(
        toy.recipe("task_arithmetic", models.family.some("ada"), models.family.base_path),
        tmp_path / "free",
    )
    assert "restricted" not in json.loads((tmp_path / "free/suture.json").read_text())


def test_the_record_and_the_card(models: Any, tmp_path: Path) -> None:
    """suture.json has fingerprints, digests and paths that move together; the card is for the hub."""
    patch = models.patch("p", density=0.3)
    report = apply_patches(models.base, [patch], tmp_path / "out")
    record = json.loads((tmp_path / "out/suture.json").read_text())
    assert record["output"]["fingerprint"] == report.fingerprint == patch.result
    assert record["inputs"]["model"]["fingerprint"] == patch.base
    (entry,) = record["patches"]
    assert (tmp_path / "out" / entry["path"]).resolve() == patch.path
    assert (entry["digest"], entry["entries"]) == (patch.identity, patch.count)
    assert entry["provenance"] == {"made": "density", "density": 0.3, "scope": "global", "base": "base",
                                   "tuned": "ada", "suture": suture.__version__}  # fmt: skip
    card = (tmp_path / "out/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "tags": ["patch", "suture"],
        "library_name": "transformers",
        "base_model": ["base"],
    }
    assert patch.identity in card
    assert str(tmp_path) not in card + json.dumps(record)


def test_configuration_and_tokenizer_come_along(tmp_path: Path) -> None:
    """What stood beside the model stands beside the output."""
    base = {"w": packed([1.0, 2.0])}
    save_model(tmp_path / "base", base, config={"model_type": "x", "torch_dtype": "float32"},
               files={"tokenizer.json": "{}", "notes.txt": "not carried"})  # fmt: skip
    save_model(tmp_path / "tuned", {"w": packed([1.0, 3.0])})
    one = open_model(tmp_path / "base")
    patch = make_patch(one, open_model(tmp_path / "tuned"), tmp_path / "p.safetensors")
    apply_patches(one, [patch], tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"
    assert (tmp_path / "out/tokenizer.json").exists()
    assert not (tmp_path / "out/notes.txt").exists()
    open_model(tmp_path / "out")  # the undo patch in it does not stand in the way


# -------------------------------------------------------------------------- as a model of a recipe


def test_a_patch_stands_for_a_model_in_a_recipe(models: Any, tmp_path: Path) -> None:
    """The merge has the bytes of the one with the whole model; suture.json makes it again."""
    patch = models.patch("ada")
    base = models.family.base_path
    both = {"ada": patch.path, "bob": models.family.paths["bob"]}
    merge(toy.recipe("ties", both, base, density=0.4), tmp_path / "with")
    merge(
        toy.recipe("ties", models.family.some("ada", "bob"), base, density=0.4),
        tmp_path / "without",
    )

    assert toy.same_bytes(read_torch(tmp_path / "with"), read_torch(tmp_path / "without")) == []
    merge(tmp_path / "with/suture.json", tmp_path / "again")
    assert toy.same_bytes(read_torch(tmp_path / "again"), read_torch(tmp_path / "with")) == []
    with pytest.raises(MismatchError, match="fits its own base only"):
        merge(toy.recipe("ties", both, models.family.paths["cyd"], density=0.4), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(RecipeError, match="only beside its base"):
        merge(toy.recipe("linear", {"ada": patch.path}), tmp_path / "wrong")


# ------------------------------------------------------------------------------- wrong inputs, safety


def test_models_that_make_no_patch(models: Any, tmp_path: Path) -> None:
    """Other names, shapes or dtypes, the same model, a mask of another model: all at once."""
    base, out = models.base, tmp_path / "p.safetensors"
    save_model(tmp_path / "odd", {"model.norm.weight": packed([1.0]), "ghost": packed([1.0])})
    odd = open_model(tmp_path / "odd")
    with pytest.raises(RecipeError) as found:
        make_patch(base, odd, out, density=2.0, scope="everywhere")
    for words in ("density is the share", "no scope 'everywhere'", "lacks", "has ghost besides",
                  "model.norm.weight is F32[1]"):  # fmt: skip
        assert words in str(found.value)
    mask = Mask({"model.norm.weight": (9,), "ghost": (1,)}, {"model.norm.weight": np.zeros(2, np.uint8),
                                                            "ghost": np.zeros(1, np.uint8)})  # fmt: skip
    with pytest.raises(MismatchError, match="the mask does not fit .*ghost, model.norm.weight"):
        make_patch(base, models.ada, out, mask=mask)
    with pytest.raises(RecipeError, match="not both"):
        make_patch(base, models.ada, out, mask=mask, density=0.1)
    with pytest.raises(MismatchError, match="no entry differs"):
        make_patch(base, base, out)
    for density in (0.0, -1.0, float("nan")):
        with pytest.raises(RecipeError, match="density is the share"):
            make_patch(base, models.ada, out, density=density)
    empty = Mask({"model.norm.weight": (8,)}, {"model.norm.weight": np.zeros(1, np.uint8)})
    with pytest.raises(MismatchError, match="no entry"):
        make_patch(base, models.ada, out, mask=empty)
    assert {p.name for p in tmp_path.iterdir()} == {"odd"}


def test_nan_has_no_magnitude(tmp_path: Path) -> None:
    """A density over NaN is refused with the file's name; the whole difference is not."""
    base = {"w": packed([1.0, 2.0, 3.0])}
    tuned = {"w": packed([1.0, np.nan, 4.0])}
    _, _, patch = pair(tmp_path, base, tuned)
    assert patch.count == 2
    with pytest.raises(NonFiniteError) as found:
        pair(tmp_path, base, tuned, density=0.5, overwrite=True)
    assert "model.safetensors: w holds 1 NaN" in str(found.value)
    assert "leave the density out" in str(found.value)
    assert "--allow-nonfinite" not in str(found.value)


def test_places_that_are_taken(models: Any, tmp_path: Path) -> None:
    """Nothing is overwritten unasked; no input is ever an output."""
    patch = models.patch("p", density=0.2)
    for out, words in ((patch.path, "exists"), (tmp_path / "p.bin", "is a safetensors file"),
                       (tmp_path / "no/p.safetensors", "there is no folder")):  # fmt: skip
        with pytest.raises(OutputError, match=words):
            make_patch(models.base, models.ada, out)
    folder = tmp_path / "d.safetensors"
    folder.mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        make_patch(models.base, models.ada, folder, overwrite=True)
    copy = tmp_path / "copy"
    toy.folder(copy, models.family.models["ada"])
    with pytest.raises(OutputError, match="is an input"):
        make_patch(models.base, open_model(copy), copy / "model.safetensors", overwrite=True)
    apply_patches(models.base, [patch], tmp_path / "out")
    out = open_model(tmp_path / "out")
    for target in (tmp_path / "out", tmp_path / "out/inside", patch.path / "x"):
        with pytest.raises(OutputError):
            revert_patch(out, patch, target)
    undo = Patch.load(tmp_path / "out" / UNDO)
    with pytest.raises(OutputError, match="holds the input"):
        revert_patch(out, undo, tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match="exists"):
        apply_patches(models.base, [patch], tmp_path / "out")
    assert apply_patches(models.base, [patch], tmp_path / "out", overwrite=True).tensors == len(out)


def test_a_model_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read from a file that somebody wrote to is not published."""
    one, _, patch = pair(tmp_path, {"w": packed([1.0, 2.0])}, {"w": packed([1.0, 3.0])})
    from suture.verbs.patch import run

    def late(*arguments: Any, **how: Any) -> Any:
        found = compare(*arguments, **how)
        save_model(tmp_path / "base", {"w": packed([9.0, 2.0])})
        return found

    compare = run.compare
    monkeypatch.setattr(run, "compare", late)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        apply_patches(one, [patch], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_application_goes_on(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written stays in the staging folder; the same command takes it over."""
    from suture.checkpoints.writer import Writer

    patch = models.patch("p", density=0.2)

    def stopped(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as now:
        now.setattr(Writer, "publish", stopped)
        with pytest.raises(KeyboardInterrupt):
            apply_patches(models.base, [patch], tmp_path / "out")
    assert staging(tmp_path / "out").exists()
    assert not (tmp_path / "out").exists()
    other = models.patch("q", density=0.3)
    report = apply_patches(models.base, [patch], tmp_path / "out")
    assert report.resumed == len(models.base)
    assert not staging(tmp_path / "out").exists()
    with monkeypatch.context() as now:
        now.setattr(Writer, "publish", stopped)
        with pytest.raises(KeyboardInterrupt):
            apply_patches(models.base, [patch], tmp_path / "two")
    assert apply_patches(models.base, [other], tmp_path / "two").resumed == 0  # another patch: anew
    assert apply_patches(models.base, [patch], tmp_path / "three").fingerprint == report.fingerprint


def test_inputs_are_left_alone(models: Any, tmp_path: Path) -> None:
    """Neither models nor patches change."""
    patch = models.patch("p", density=0.2)
    before = (
        toy.files_digest(models.family.base_path, models.family.paths["ada"]),
        patch.path.read_bytes(),
    )
    apply_patches(models.base, [patch], tmp_path / "out", scale=0.5)
    revert_patch(
        open_model(tmp_path / "out"), Patch.load(tmp_path / "out" / UNDO), tmp_path / "back"
    )
    assert before == (
        toy.files_digest(models.family.base_path, models.family.paths["ada"]), patch.path.read_bytes()
    )  # fmt: skip


def test_every_fault_of_the_user_is_a_suture_error(models: Any) -> None:
    """A tensor that no patch touches is a KeyError of ``delta``, as in any mapping; the rest is ours."""
    patch: Mapping[str, Any] | Any = models.patch("p", density=0.1)
    with pytest.raises(KeyError):
        patch.delta("nonesuch")
    with pytest.raises(SutureError):
        Patch.load(models.family.base_path)


# ------------------------------------------------------------------------------- the command line


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A base and two models near it, in folders."""
    return llamas(tmp_path, "math", "code", config=CONFIG)


def test_the_commands_from_end_to_end(here: Path) -> None:
    """make, show, apply, revert; --json is one object on standard output."""
    patch, out = here / "m.patch.safetensors", here / "out"
    made = invoke("patch", "make", here / "base", here / "math", "--density", 0.1, "-o", patch)
    assert made.code == 0
    lines_of(made.out, "entries of", "% of their size")
    shown = invoke("patch", "show", patch, "--json").json
    assert shown["provenance"]["density"] == 0.1
    assert sum(row["entries"] for row in shown["tensors"].values()) == shown["entries"]
    text = invoke("patch", "show", patch).out
    lines_of(text, shown["digest"], shown["base"], shown["result"], "layers.0.mlp.up_proj.weight")
    applied = invoke("patch", "apply", here / "base", patch, "-o", out, "--json").json
    assert applied["fingerprint"] == shown["result"]
    assert applied["entries"] == shown["entries"]
    undone = invoke("patch", "revert", out, out / UNDO, "-o", here / "back")
    assert undone.code == 0
    lines_of(undone.out, shown["base"])
    assert bytes_of(stored(here / "back")) == bytes_of(stored(here / "base"))
    said = invoke("patch", "apply", here / "base", patch, "-o", here / "half", "--scale", 0.5)
    lines_of(said.out, "to undo it: suture patch revert", UNDO)
    code = here / "c.patch.safetensors"
    invoke("patch", "make", here / "base", here / "code", "-o", code, "--restricted")
    both = invoke(
        "patch", "apply", here / "base", patch, code, "-o", here / "both", "--on-overlap", "mean"
    )
    lines_of(both.out, "restricted")
    lines_of(invoke("patch", "show", code).out, "restricted")


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("make", "base", "nothing", "-o", "x.safetensors"), "nothing: no such file"),
    (("make", "base", "base", "-o", "x.safetensors"), "no entry differs"),
    (("make", "base", "math", "-o", "x.bin"), "is a safetensors file"),
    (("make", "base", "math", "-o", "p.safetensors"), "--overwrite"),
    (("make", "base", "math", "-o", "x.safetensors", "--density", "0"), "density is the share"),
    (("make", "base", "math", "-o", "x.safetensors", "--density", "nan"), "density is the share"),
    (
        ("make", "base", "math", "-o", "x.safetensors", "--scope", "tensors"),
        "did you mean 'tensor'",
    ),
    (("make", "base", "math", "-o", "x.safetensors", "--mask", "p.safetensors"), "not a mask"),
    (("make", "p.safetensors", "math", "-o", "x.safetensors"), "lacks at:"),
    (("apply", "base", "base/model.safetensors", "-o", "out"), "not a patch"),
    (("apply", "base", "nothing", "other", "-o", "out"), "2 problems"),
    (("apply", "code", "p.safetensors", "-o", "out"), "not what"),
    (("apply", "base", "p.safetensors", "p.safetensors", "-o", "out"), "more than one patch"),
    (("apply", "base", "p.safetensors", "-o", "base"), "holds the input"),
    (("apply", "base", "p.safetensors", "-o", "out", "--scale", "nan"), "a finite number"),
    (("apply", "base", "p.safetensors", "-o", "out", "--on-overlap", "sum"), "no policy 'sum'"),
    (("apply", "base", "cut.safetensors", "-o", "out"), "cut short"),
    (("apply", "base", "flipped.safetensors", "-o", "out"), "fetch or make it again"),
    (("revert", "base", "p.safetensors", "-o", "out"), UNDO),
    (("revert", "math", "flipped.safetensors", "-o", "out"), "fetch or make it again"),
    (("show", "base"), "is not a file"),
    (("show", "flipped.safetensors"), "digest"),
]


def test_wrong_input_on_the_command_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2, a message with the place and the cause, no traceback; nothing is written."""
    monkeypatch.chdir(here)
    invoke("patch", "make", "base", "math", "-o", "p.safetensors")
    content = Path("p.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(content[:-9])
    Path("flipped.safetensors").write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    before = tree(here)
    for arguments, words in WRONG:
        said = invoke("patch", *arguments)
        assert said.code == 2, (arguments, said)
        assert words in said.err, (arguments, said.err)
        assert said.out == ""
        told = invoke("patch", *arguments, "--json")
        assert words in told.json["error"]
        assert tree(here) == before, arguments
