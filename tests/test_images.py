"""Images: read from folders, arrays and rows; vision transformers trained by every strategy."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import suture
import tiny_model
from making import invoke
from suture import evaluate
from suture.edits.mask import Mask
from suture.errors import CheckpointError, MissingExtraError, RecipeError, SutureError
from suture.evals.results import read_result
from suture.evals.table import EVALS
from suture.training.calibrate import prunable
from suture.training.image_rows import look_of
from suture.training.images import ImageTransform, checked, prepared
from suture.training.load import load_tuned
from suture.training.models import Head, ImageEncoder, load_image_encoder, parameters_of, save_head
from suture.training.strategies import STRATEGIES
from suture.verbs.finetune import VERB as finetune
from suture.verbs.finetune.plan import make_plan as plan_finetune
from test_finetune import EXAMPLES, problems_of

TRAINING = {"epochs": 16, "batch": 8, "lr": 1e-2, "save_every": 50, "seed": 1}


def pictures(n: int = 48) -> tuple[Any, list[str]]:
    """Noise that is reddish or bluish: ``(n, 8, 8, 3)`` uint8, with labels."""
    images = np.random.default_rng(0).integers(0, 120, (n, 8, 8, 3), dtype=np.uint8)
    labels = ["blue" if i % 2 else "red" for i in range(n)]
    for image, label in zip(images, labels, strict=True):
        image[..., 2 if label == "blue" else 0] += 120
    return images, labels


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, and the same images in every form; nobody may change them."""
    where = tmp_path_factory.mktemp("gallery")
    for kind in ("vit", "dinov2", "grey"):
        tiny_model.image_folder(where / kind, kind)
    images, labels = pictures()
    np.savez(where / "images.npz", image=images, label=np.array(labels))
    rows = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = where / "folder" / label / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
        rows.append({"image": str(file.relative_to(where)), "label": label})
    (where / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (where / "rows.csv").write_text(
        "image,label\n" + "".join(f"{r['image']},{r['label']}\n" for r in rows)
    )
    return where


def recipe(
    gallery: Path, base: str = "vit", train: str = "images.npz", strategy: str = "full",
    **sections: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "base": str(gallery / base), "strategy": strategy, "parameters": EXAMPLES[strategy],
        "data": {"train": str(gallery / train), "validation": 0.3}, "training": TRAINING,
        "head": "learned", **sections,
    }  # fmt: skip


@pytest.mark.parametrize("base", ["vit", "dinov2"])
@pytest.mark.parametrize("name", list(EXAMPLES))
def test_vision_transformers_train_by_every_strategy(
    name: str, base: str, gallery: Path, tmp_path: Path
) -> None:
    """Renamed tensors come back to the names of the files, the folder loads in transformers and in
    Suture, and gives what the report says; what was not trained has its bytes."""
    what = recipe(gallery, base, strategy=name)
    report = finetune(what, tmp_path / "out")
    assert report.losses[1] < report.losses[0]
    assert report.metric is not None
    assert report.metric.value > 0.9
    plan = plan_finetune(what, tmp_path / "x")
    assert plan.task == "image-classification"
    model = load_tuned(tmp_path / "out", base=gallery / base)
    found = EVALS["accuracy"](model, plan.rows.validation.batches(8))[0]
    assert found == report.metric

    start, end = suture.open(gallery / base), suture.open(tmp_path / "out")
    assert start.specs == end.specs
    assert any(not np.array_equal(start[n], end[n]) for n in start)
    if STRATEGIES[name].sparse:
        mask = Mask.load(tmp_path / "out" / "mask.safetensors")
        assert mask.count == report.trained
        for tensor in start:
            outside = ~mask[tensor] if tensor in mask.shapes else np.ones(start[tensor].shape, bool)
            assert np.array_equal(start[tensor][outside], end[tensor][outside]), tensor


@pytest.mark.parametrize("base", ["vit", "dinov2"])
def test_a_vector_is_the_class_token_of_transformers(base: str, gallery: Path) -> None:
    """The same numbers as the library's own model, also for images larger than it was made for."""
    encoder = load_image_encoder(gallery / base)
    model = transformers.AutoModel.from_pretrained(gallery / base).eval()
    for size in (8, 16):
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        more = {"interpolate_pos_encoding": True} if base == "vit" else {}
        expected = model(pixel_values=pixels, **more).last_hidden_state[:, 0]
        torch.testing.assert_close(encoder(pixels, torch.ones(2, 1)), expected)


def test_a_model_without_a_class_token_gives_the_mean_of_its_patches() -> None:
    """As SigLIP's and Swin's do."""

    class Patches(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            hidden = pixel_values.flatten(2).mT
            return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden)

    pixels = torch.randn(2, 3, 4, 4)
    found = ImageEncoder(Patches())(pixels, torch.ones(2, 1))
    torch.testing.assert_close(found, pixels.mean((2, 3)))


def test_masks_of_a_vision_transformer_leave_tokens_and_tables_alone(gallery: Path) -> None:
    """Patches, blocks and norms are prunable; class token, positions and scales of layers not."""
    names = prunable(load_image_encoder(gallery / "dinov2"))
    assert "backbone.embeddings.patch_embeddings.projection.weight" in names
    assert not [n for n in names if "token" in n or "position" in n or "k_proj.bias" in n]
    files = set(suture.open(gallery / "dinov2"))
    assert set(parameters_of(load_image_encoder(gallery / "dinov2"))) == files


def test_the_same_images_in_every_form_are_the_same_data(gallery: Path, tmp_path: Path) -> None:
    """An array, a folder a label, and rows that name files: pixels and labels agree; files fall on
    the same side however they are named."""

    def contents(train: str) -> tuple[Any, list[Any]]:
        rows = plan_finetune(recipe(gallery, train=train), tmp_path / "x").rows
        assert rows.labels == ("blue", "red")
        parts = [next(side.batches(48)) for side in (rows.train, rows.validation)]
        every = sorted(
            (int(label), float(pixels.double().sum()))
            for part in parts
            for label, pixels in zip(part.labels, part.input_ids, strict=True)
        )
        return every, [sorted(side.ids) for side in (rows.train, rows.validation)]

    expected, _ = contents("images.npz")
    _, sides = contents("folder")
    assert len(expected) == 48
    for train in ("rows.jsonl", "rows.csv", "folder"):
        assert contents(train) == (expected, sides)


def test_files_as_mnist_has_them(gallery: Path, tmp_path: Path) -> None:
    """IDX pairs, zipped or not; grey images for a model that reads one channel."""
    images, labels = pictures()
    grey, numbers = np.ascontiguousarray(images[..., 0]), [int(x == "red") for x in labels]
    raw = struct.pack(">IIII", 0x803, *grey.shape) + grey.tobytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw))
    beside = struct.pack(">II", 0x801, len(numbers)) + bytes(numbers)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(beside))
    what = recipe(gallery, "grey")
    what["data"]["train"] = str(tmp_path / "train-images-idx3-ubyte.gz")
    report = finetune(what, tmp_path / "out")
    assert report.metric is not None
    assert report.metric.value > 0.9
    assert plan_finetune(what, tmp_path / "x").rows.labels == ("0", "1")

    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw[:-5]))
    assert "cut short" in problems_of(what, tmp_path / "x")[0]
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    assert "cannot be read" in problems_of(what, tmp_path / "x")[0]


def test_pixels_are_scaled_and_normalised_as_the_base_says(gallery: Path, tmp_path: Path) -> None:
    """Size, mean and std come from preprocessor_config.json; the recipe's size wins."""
    base = tiny_model.image_folder(tmp_path / "base")
    how = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (base / "preprocessor_config.json").write_text(json.dumps(how))
    data = recipe(gallery)["data"]
    for size, expected in ((0, 16), (12, 12)):
        what = {**recipe(gallery), "base": str(base), "data": {**data, "size": size}}
        plan = plan_finetune(what, tmp_path / "x")
        batch = next(plan.rows.train.batches(4))
        assert batch.input_ids.shape == (4, 3, expected, expected)
        assert not plan.rows.notes
    assert "ImageNet" in plan_finetune(recipe(gallery), tmp_path / "x").rows.notes[0]

    white = np.full((2, 2, 3), 255, np.uint8)
    look = ImageTransform((4, 4), 3, (0.5,) * 3, (0.25,) * 3)
    torch.testing.assert_close(prepared(white, look), torch.full((3, 4, 4), 2.0))
    torch.testing.assert_close(prepared(white[..., 0], look), torch.full((3, 4, 4), 2.0))
    torch.testing.assert_close(
        prepared(white, ImageTransform((2, 2), 1, (0.0,), (1.0,))), torch.ones(1, 2, 2)
    )


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    """The orientation that a camera notes is followed, and transparency is no channel."""
    pixels = np.zeros((2, 4, 4), np.uint8)
    pixels[0, 0] = 255
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    assert prepared(tmp_path / "turned.png", ImageTransform((4, 2))).shape == (3, 4, 2)
    upright = prepared(tmp_path / "turned.png", ImageTransform((4, 2), 3, (0.0,) * 3, (1.0,) * 3))
    assert upright[:, 0, 1].tolist() == [1.0, 1.0, 1.0]
    assert upright.sum() == 3


def test_images_of_a_data_set_are_bytes(
    gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set of the hub is read as files, whatever the column is called; labels by name."""
    import datasets

    files = sorted((gallery / "folder").rglob("*.png"))
    names = datasets.ClassLabel(names=["blue", "red"])
    table = {
        "photo": [{"bytes": f.read_bytes(), "path": None} for f in files],
        "label": [names.str2int(f.parent.name) for f in files],
    }
    columns = datasets.Features({"photo": datasets.Image(), "label": names})
    made = datasets.Dataset.from_dict(table, features=columns)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    what = recipe(gallery, data={"train": "some/set", "image": "photo", "validation": 0.3})
    plan = plan_finetune(what, tmp_path / "x")
    assert plan.rows.labels == ("blue", "red")
    assert next(plan.rows.train.batches(4)).input_ids.shape == (4, 3, 8, 8)


def test_what_is_wrong_with_images_is_told_before_training(
    gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are no images, a missing file, arrays of another kind, sizes, tasks, heads."""
    (tmp_path / "pics" / "a").mkdir(parents=True)
    (tmp_path / "pics" / "b").mkdir()
    (tmp_path / "pics" / "a" / "notes.txt").write_text("no image")
    file = next((gallery / "folder").rglob("*.png"))
    (tmp_path / "pics" / "b" / "cut.png").write_bytes(file.read_bytes()[:60])
    (tmp_path / "rows.csv").write_text("image,label\nnone.png,a\n")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "float.npz", image=np.zeros((3, 4, 4)), label=np.zeros(2, np.int64))

    def told(train: Path | str, **sections: Any) -> str:
        what = recipe(gallery, **sections)
        what["data"] = {**what["data"], "train": str(train)}
        return "\n".join(problems_of(what, tmp_path / "x"))

    both = told(tmp_path / "pics")
    assert "notes.txt: cannot be read as an image" in both
    assert "cut.png: cannot be read as an image" in both
    assert "none.png: No such file" in told(tmp_path / "rows.csv")
    assert "a folder of images for each label" in told(tmp_path / "empty")
    assert "not uint8" in told(tmp_path / "float.npz")
    assert "3 images have 2 labels" in told(tmp_path / "float.npz")
    good = gallery / "images.npz"
    assert "did you mean 'image'" in told(good, data={"image": "imag"})
    assert "no multiple of the base's patches" in told(good, data={"size": 9})
    assert "has a column 'photo'" in told(gallery / "rows.csv", data={"image": "photo"})
    assert "zero-shot reads texts" in told(good, head="zero-shot")
    assert "the base reads images, so classification" in told(good, task="classification")
    tiny_model.folder(tmp_path / "text")
    text = {**recipe(gallery), "base": str(tmp_path / "text"), "task": "image-classification"}
    assert "the base reads texts" in problems_of(text, tmp_path / "x")[0]
    assert "among data.labels" in told(good, data={"labels": ["red", "green"]})

    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match=r"suture\[images\]"):
        checked(file, "here")


def test_a_file_that_breaks_later_is_named(gallery: Path, tmp_path: Path) -> None:
    """A file that is lost while training ends it with its name, not with a traceback."""
    with pytest.raises(RecipeError, match="gone.png: cannot be read as an image"):
        prepared(tmp_path / "gone.png", ImageTransform((8, 8)))


def test_other_image_models_are_refused(tmp_path: Path) -> None:
    """A network with batch norm mixes samples; a text model reads no pixels."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    transformers.ResNetModel(config).save_pretrained(tmp_path / "net")
    tiny_model.folder(tmp_path / "text")
    for name in ("net", "text"):
        with pytest.raises(CheckpointError, match="no vision transformer"):
            load_image_encoder(tmp_path / name)
    assert issubclass(CheckpointError, SutureError)


# -- suites ----------------------------------------------------------------------------------------


def painter(gallery: Path, where: Path, kind: str) -> Path:
    """A vision transformer with a random head beside it."""
    shutil.copytree(gallery / kind, where)
    draw = torch.Generator().manual_seed(3)
    save_head(
        Head(("blue", "red"), torch.randn(2, 16, generator=draw), torch.zeros(2)),
        where / "head.safetensors",
    )
    return where


@pytest.mark.parametrize("kind", ["vit", "dinov2", "grey"])
def test_a_suite_asks_about_images(gallery: Path, tmp_path: Path, kind: str) -> None:
    """Folders, arrays and rows, its own head and a file: the accuracy of the loaded model."""
    model = painter(gallery, tmp_path / "model", kind)
    shutil.copy(model / "head.safetensors", tmp_path / "saved.safetensors")
    suite = {"name": "look", "evaluations": {
        name: {"kind": "image-accuracy", "data": str(gallery / data), "batch": 5, **more}
        for name, data, more in (
            ("folders", "folder", {}), ("arrays", "images.npz", {"limit": 20}),
            ("rows", "rows.jsonl", {"head": "saved.safetensors"}),
        )
    }}  # fmt: skip
    (tmp_path / "look.yaml").write_text(json.dumps(suite))

    said = invoke("eval", model, "--suite", tmp_path / "look.yaml", "-o", tmp_path / "out.json")

    assert said.code == 0, said.err
    found = read_result(tmp_path / "out.json").evaluations
    images, labels = pictures()
    tuned = load_tuned(model)
    look = look_of(suture.open(model), 0)[0]
    pixels = torch.stack([prepared(image, look) for image in images])
    with torch.inference_mode():
        numbers = tuned(pixels, torch.ones(len(pixels), 1)).argmax(1).tolist()
    right = [("blue", "red")[n] == label for n, label in zip(numbers, labels, strict=True)]
    for name, part in (("rows", right), ("arrays", right[:20])):
        assert found[name].scores[0].values.tolist() == [float(hit) for hit in part]
    assert found["folders"].scores[0].values.sum() == sum(right)
    again = invoke("eval", model, "--suite", tmp_path / "look.yaml", "-o", tmp_path / "out.json")
    assert "3 evaluation(s) are there already" in again.err + again.out


def test_a_tuned_folder_is_asked_what_it_learned(gallery: Path, tmp_path: Path) -> None:
    """What fine-tuning wrote keeps its head and its accuracy."""
    what = recipe(gallery)
    finetune(what, tmp_path / "tuned")
    suite = {
        "evaluations": {"colours": {"kind": "image-accuracy", "data": str(gallery / "folder")}}
    }

    (result,) = evaluate(tmp_path / "tuned", suite)

    assert result.evaluations["colours"].scores[0].values.mean() > 0.9


def test_suites_of_the_other_kind_are_refused(gallery: Path, tmp_path: Path) -> None:
    """Texts for a model of images, images for one of texts, no head, labels it does not know."""
    model = painter(gallery, tmp_path / "model", "vit")
    tiny_model.folder(tmp_path / "text")
    (tmp_path / "texts.jsonl").write_text('{"text": "red sun", "label": "red"}\n')
    pictured = {"kind": "image-accuracy", "data": str(gallery / "folder")}

    def told(which: Path, **question: Any) -> str:
        with pytest.raises(SutureError) as caught:
            evaluate(which, {"evaluations": {"it": question}})
        return str(caught.value)

    texts = {"kind": "accuracy", "data": str(tmp_path / "texts.jsonl")}
    assert "accuracy asks about texts; " in told(model, **texts)
    assert "image-accuracy asks about images; " in told(tmp_path / "text", **pictured)
    assert "has no head.safetensors; name the file of a head" in told(gallery / "vit", **pictured)
    assert "a zero-shot head is made of texts" in told(model, **pictured, head="zero-shot")
    assert "images have none" in told(model, **pictured, max_length=5)
    assert "image and label are both 'image'" in told(model, **pictured, label="image")
    shutil.copytree(gallery / "folder" / "red", tmp_path / "more" / "green")
    shutil.copytree(gallery / "folder" / "blue", tmp_path / "more" / "blue")
    pictured["data"] = str(tmp_path / "more")
    assert "the label 'green' is not one of the head's" in told(model, **pictured)
