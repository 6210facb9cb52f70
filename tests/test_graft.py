"""Stitching from masks, and grafts: tasks come and go without the checkpoints of the others."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import suture
import toy
from suture import Mask
from suture.edits.graft import VALUES, is_graft, open_graft, write_graft
from suture.edits.mask_file import MaskFile, StoredMask
from suture.errors import CheckpointError, MismatchError, OutputError, RecipeError, SutureError
from suture.tensors.spec import TensorSpec

NAMES = ("ada", "bob", "cyd")


def masks_of(
    family: Any, folder: Path, names: Any, density: float = 0.3, rule: str = "random"
) -> None:
    """A mask file for each model."""
    folder.mkdir(exist_ok=True)
    base = suture.open(family.base_path)
    for name in names:
        tau = (suture.open(family.paths[name]) - base).select(exclude=["embedding", "head"])
        suture.localize(tau, rule, density=density, label=name).save(folder / f"{name}.safetensors")


def grafts_of(family: Any, masks: Path, folder: Path, names: Any) -> dict[str, Path]:
    found = {}
    for name in names:
        found[name] = folder / f"{name}.safetensors"
        write_graft(
            found[name], suture.open(family.paths[name]), StoredMask(masks / f"{name}.safetensors")
        )
    return found


@pytest.mark.parametrize("flavour", ["f32", "bf16", "f16", "mixed"])
def test_stitching_with_masks_is_the_mean_over_those_that_mark(
    flavour: str, family: Any, tmp_path: Path
) -> None:
    """Entries of exactly 0, 1, 2 and 3 masks get nothing, the delta, and the mean of 2 and of 3."""
    models = family(flavour)
    masks_of(models, tmp_path / "masks", NAMES, 0.6)
    what = toy.recipe(
        "stitch", models.some(*NAMES), models.base_path, masks=str(tmp_path / "masks")
    )

    out, _ = toy.run(tmp_path / "out", what)

    loaded = [Mask.load(tmp_path / "masks" / f"{n}.safetensors") for n in NAMES]
    met = set()
    for name in toy.editable(models.base):
        start = models.base[name].double().numpy()
        marks = np.stack([m[name] for m in loaded])
        taus = np.stack([models.models[n][name].double().numpy() - start for n in NAMES])
        met |= set(np.unique(marks.sum(0)).tolist())
        expected = start + (marks * taus).sum(0) / np.maximum(marks.sum(0), 1)
        near = torch.from_numpy(np.asarray(expected)).to(models.base[name].dtype)
        if near.dtype in (torch.bfloat16, torch.float16):
            apart = toy.steps_apart(out[name], near)
            assert (
                (apart <= 1) | ((out[name].float() - near.float()).abs().flatten().numpy() < 1e-6)
            ).all()
        else:
            torch.testing.assert_close(out[name], near, rtol=1e-6, atol=1e-6)
    assert met == {0, 1, 2, 3}


def test_masks_of_the_largest_stitch_like_dataless(family: Any, tmp_path: Path) -> None:
    """Masks by magnitude give the bytes of ``stitch`` with their density; weights and scale, too."""
    models = family("bf16")
    masks_of(models, tmp_path / "masks", NAMES, 0.3, "magnitude")
    own = {"ada": {"weight": 0.5}, "cyd": {"weight": 2.0}}
    one, other = (
        toy.run(tmp_path / name, toy.recipe("stitch", models.some(*NAMES), models.base_path, own=own,
                                            scale=0.7, **more))[0]
        for name, more in (("a", {"density": 0.3}), ("b", {"masks": str(tmp_path / "masks")}))
    )  # fmt: skip

    assert toy.same_bytes(one, other) == []


@pytest.mark.parametrize("flavour", ["f32", "bf16", "mixed"])
def test_a_graft_is_the_base_with_marked_weights(flavour: str, family: Any, tmp_path: Path) -> None:
    """Bit for bit, from whatever entry it is read."""
    models = family(flavour)
    masks_of(models, tmp_path / "masks", NAMES)
    base = suture.open(models.base_path)
    (path,) = grafts_of(models, tmp_path / "masks", tmp_path / "grafts", ["ada"]).values()

    view = open_graft(path, base)

    assert is_graft(path)
    assert not is_graft(models.base_path / "model.safetensors")
    mask = Mask.load(path)
    assert mask == Mask.load(tmp_path / "masks" / "ada.safetensors")
    for name, tensor in models.base.items():
        tuned = models.models["ada"][name]
        expected = (
            torch.where(torch.from_numpy(mask[name]), tuned, tensor)
            if name in mask.shapes
            else tensor
        )
        raw, width = toy.raw_bytes(expected), expected.element_size()
        for start in (0, 1, 9, 13):
            stop = min(expected.numel(), start + 30)
            part = np.zeros(max(0, stop - start) * width, np.uint8)
            if part.size:
                view.read_into(name, start, part)
                assert part.tobytes() == raw[start * width : stop * width], (name, start)


@pytest.mark.parametrize("what", ["mask", "graft"])
def test_a_flipped_bit_stops_a_merge(what: str, family: Any, tmp_path: Path) -> None:
    """One bit of a mask's last tensor, or of a graft's first weights: refused before a merge begins."""
    models = family("bf16")
    masks_of(models, tmp_path / "masks", NAMES)
    grafts = grafts_of(models, tmp_path / "masks", tmp_path / "grafts", NAMES)
    path = grafts["bob"] if what == "graft" else tmp_path / "masks" / "bob.safetensors"
    content = bytearray(path.read_bytes())
    content[-1 if what == "mask" else 8 + int.from_bytes(content[:8], "little")] ^= 1
    path.write_bytes(content)
    sources = grafts if what == "graft" else models.some(*NAMES)
    recipe = toy.recipe("stitch", sources, models.base_path, masks=str(tmp_path / "masks"))

    with pytest.raises(CheckpointError, match=r"bob.safetensors: its bytes do not have the digest"):
        toy.run(tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_large_tensors_are_grafted_from_any_entry(tmp_path: Path) -> None:
    """Ranks count across steps of 65,536 entries."""
    draw = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(300_001, generator=draw).to(torch.bfloat16)}
    tuned = {
        "w": (base["w"].float() + 0.1 * torch.randn(300_001, generator=draw)).to(torch.bfloat16)
    }
    one, two = toy.folder(tmp_path / "base", base), toy.folder(tmp_path / "tuned", tuned)
    tau = suture.open(two) - suture.open(one)
    suture.localize(tau, density=0.2).save(tmp_path / "m.safetensors")
    write_graft(
        tmp_path / "g.safetensors", suture.open(two), StoredMask(tmp_path / "m.safetensors")
    )

    view = open_graft(tmp_path / "g.safetensors", suture.open(one))

    marks = torch.from_numpy(Mask.load(tmp_path / "m.safetensors")["w"])
    expected = toy.raw_bytes(torch.where(marks, tuned["w"], base["w"]))
    for start, count in ((0, 300_001), (65_530, 20), (131_072, 70_001), (299_999, 2)):
        part = np.zeros(2 * count, np.uint8)
        view.read_into("w", start, part)
        assert part.tobytes() == expected[2 * start : 2 * (start + count)]
    size = (tmp_path / "g.safetensors").stat().st_size
    assert size < 300_001 / 8 + 2 * 0.2 * 300_001 + 1000


def test_tasks_come_and_go_without_the_others_checkpoints(family: Any, tmp_path: Path) -> None:
    """Grafts stitch to the bytes of the checkpoints, in any order, one added later, one removed."""
    models = family("bf16")
    masks_of(models, tmp_path / "masks", NAMES)
    grafts = grafts_of(models, tmp_path / "masks", tmp_path / "state", NAMES)
    at_once = {}
    for names in (NAMES, NAMES[:2]):
        what = toy.recipe("stitch", models.some(*names), models.base_path,
                          masks={n: str(tmp_path / "masks" / f"{n}.safetensors") for n in names})  # fmt: skip
        at_once[names], _ = toy.run(tmp_path / f"at-once-{len(names)}", what)
    shutil.rmtree(tmp_path / "masks")

    for number, names in enumerate([*itertools.permutations(NAMES), NAMES[:2]]):
        files = {n: grafts[n] for n in names}
        what = toy.recipe(
            "stitch", files, models.base_path, masks={n: str(p) for n, p in files.items()}
        )
        out, _ = toy.run(tmp_path / f"later-{number}", what)
        assert toy.same_bytes(out, at_once[tuple(sorted(names))]) == []


def test_the_record_of_a_stitch_makes_it_again(family: Any, tmp_path: Path) -> None:
    """``suture.json`` names the masks relative to the output, and gives the same bytes."""
    models = family("bf16")
    masks_of(models, tmp_path / "masks", NAMES)
    what = toy.recipe(
        "stitch", models.some(*NAMES), models.base_path, masks=str(tmp_path / "masks")
    )
    out, _ = toy.run(tmp_path / "out", what)

    again, _ = toy.run(tmp_path / "again", tmp_path / "out" / "suture.json")  # type: ignore[arg-type]

    assert toy.same_bytes(out, again) == []


def test_masks_that_do_not_fit_are_refused(family: Any, tmp_path: Path) -> None:
    """Another model's shapes or names, a missing file, a model without a mask: all told, nothing written."""
    models = family("f32")
    masks = tmp_path / "masks"
    masks_of(models, masks, ("ada",))
    Mask({"other.weight": (4,)}, {"other.weight": np.zeros(1, np.uint8)}).save(
        masks / "bob.safetensors"
    )
    shape = Mask({"model.norm.weight": (9,)}, {"model.norm.weight": np.zeros(2, np.uint8)})
    shape.save(masks / "cyd.safetensors")

    def refused(match: str, **masks_: Any) -> None:
        what = toy.recipe("stitch", models.some(*NAMES), models.base_path, **masks_)
        with pytest.raises(SutureError, match=match):
            toy.run(tmp_path / "out", what)
        assert not (tmp_path / "out").exists()

    refused(r"bob.*lacks other\.weight: a mask of another model", masks=str(masks))
    refused(r"is \[8\] in the model and \[9\] in the mask", masks=str(masks))
    refused("nonesuch", masks=str(tmp_path / "nonesuch"))
    refused(
        "'bob' has no file; files are paired by model name",
        masks={"ada": str(masks / "ada.safetensors")},
    )
    refused("neither a folder nor a mapping", masks=3)


def test_masks_of_the_embedding_need_it_in_the_space(family: Any, tmp_path: Path) -> None:
    """A mask over tensors that the recipe leaves out would be cut silently; it is refused."""
    models = family("f32")
    tau = suture.open(models.paths["ada"]) - suture.open(models.base_path)
    suture.localize(tau, density=0.3).save(tmp_path / "ada.safetensors")
    what = toy.recipe("stitch", models.some("ada"), models.base_path,
                      masks={"ada": str(tmp_path / "ada.safetensors")})  # fmt: skip

    with pytest.raises(MismatchError, match="the same `space`"):
        toy.run(tmp_path / "out", what)
    toy.run(tmp_path / "out", {**what, "space": {"include": [], "exclude": []}})


def test_grafts_of_another_base_are_refused(family: Any, tmp_path: Path) -> None:
    """Shapes or dtypes that do not fit, no base at all."""
    models = family("f32")
    masks_of(models, tmp_path / "masks", ("ada",))
    (path,) = grafts_of(models, tmp_path / "masks", tmp_path / "state", ["ada"]).values()
    other = suture.open(toy.folder(tmp_path / "half", toy.base_tensors("f16")))

    with pytest.raises(MismatchError, match="F16 in the base and F32 in the graft"):
        open_graft(path, other)
    with pytest.raises(RecipeError, match="is a graft, weights to be put into a base"):
        toy.run(tmp_path / "out", toy.recipe("linear", {"ada": path}))


def test_masks_know_their_models(family: Any, tmp_path: Path) -> None:
    """A mask with the fingerprint of another model or base is refused, and nothing is written."""
    models = family("f32")
    masks_of(models, tmp_path / "masks", ("ada",))
    path = tmp_path / "masks" / "ada.safetensors"
    mask = Mask.load(path)
    for about, match in (({"model": "00"}, "ada: .* is not the model that the masks"),
                         ({"base": "00"}, "base: .* is not the model that the masks")):  # fmt: skip
        Mask(mask.shapes, mask.bits, {**mask.about, **about}).save(path)
        what = toy.recipe("stitch", models.some("ada"), models.base_path, masks=str(path.parent))
        with pytest.raises(MismatchError, match=match):
            toy.run(tmp_path / "out", what)
        assert not (tmp_path / "out").exists()


def test_a_graft_with_fewer_weights_than_marks_is_refused(family: Any, tmp_path: Path) -> None:
    """What its mask marks and it does not hold would be read out of the tensor behind."""
    models, name = family(), toy.ZERO
    path = tmp_path / "g.safetensors"
    with MaskFile(path, {name: (3, 5)}, {}, {VALUES + name: TensorSpec("F32", (2,))}) as file:
        file.put(name, 0, np.array([0b111, 0], np.uint8))
    graft = open_graft(path, suture.open(models.base_path))

    with pytest.raises(CheckpointError, match=r"damaged: 3 entries .* its weights are \[2\]"):
        _ = graft[name]


def test_files_that_a_merge_reads_are_never_replaced(family: Any, tmp_path: Path) -> None:
    """Masks and statistics are inputs, too, also where they lie in an older output."""
    models = family()
    out, masks = tmp_path / "out", tmp_path / "out" / "masks"
    some = models.some("ada", "bob")
    toy.run(out, toy.recipe("task_arithmetic", some, models.base_path))
    masks_of(models, masks, some)
    by_mask = toy.recipe("stitch", some, models.base_path, masks=str(masks))
    alone = {"model": "ada", "mask": str(masks / "ada.safetensors")}
    protecting = toy.recipe("task_arithmetic", some, models.base_path) | {"protect": alone}

    for what, name in ((by_mask, "masks"), (protecting, "protect.mask")):
        with pytest.raises(OutputError, match=f"holds the input '{name}'"):
            toy.run(out, what, overwrite=True)
    assert len(list(masks.iterdir())) == 2
