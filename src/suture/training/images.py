"""Images with labels: from files or arrays, scaled, as batches; no model; the only importer of PIL.

Arrays need no library. A file is opened when its batch is made, so that memory does not grow with
the data; that it is an image at all is looked at before.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from suture.errors import MissingExtraError, RecipeError, did_you_mean
from suture.tensors.spec import listed
from suture.training.data import Batch, Dataset

Pixels = np.ndarray[Any, Any]
"""uint8 ``(height, width)`` or ``(height, width, channels)``."""
Image = Path | bytes | Pixels
"""A file, the bytes of one, or the pixels."""
Labelled = tuple[str, Image, str]
"""Where an image stands, the image, its label."""


@dataclass(frozen=True)
class ImageTransform:
    """How a model wants its images: the whole image is scaled, nothing is cut off."""

    size: tuple[int, int]
    """Height and width."""
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Of each channel, in [0, 1], subtracted; by default ImageNet's."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Of each channel; what is left is divided by it."""


@dataclass(frozen=True, eq=False)
class Images(Dataset):
    """Labelled images. ``ids`` holds one number for each, a hash of its content."""

    unit: ClassVar[str] = "images"

    images: tuple[Image, ...] = ()
    look: ImageTransform = field(default_factory=lambda: ImageTransform((224, 224)))

    def collate(self, rows: Sequence[int]) -> Batch:
        """The images at these positions, scaled to one size and normalised."""
        found = torch.stack([prepared(self.images[i], self.look) for i in rows])
        labels = torch.tensor([self.labels[i] for i in rows])
        return Batch(found, torch.ones(len(rows), 1, dtype=torch.int64), labels, tuple(rows))


def prepared(image: Image, look: ImageTransform) -> Tensor:
    """Pixels as a model reads them, ``(channels, height, width)`` float32.

    Raises:
        RecipeError: the file is not an image, or a broken one.
    """
    raw = image if isinstance(image, np.ndarray) else _decoded(image, look.channels)
    pixels = torch.from_numpy(np.array(raw, np.float32)) / 255
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if len(pixels) != look.channels:  # grey to colour, or the other way
        pixels = pixels.mean(0, keepdim=True).expand(look.channels, -1, -1)
    if tuple(pixels.shape[1:]) != look.size:
        pixels = F.interpolate(
            pixels[None], look.size, mode="bilinear", align_corners=False, antialias=True
        )[0]
    mean, std = torch.tensor(look.mean)[:, None, None], torch.tensor(look.std)[:, None, None]
    return ((pixels - mean) / std).contiguous()


def _decoded(image: Path | bytes, channels: int) -> Pixels:
    with _opened(image, str(image) if isinstance(image, Path) else "an image") as held:
        from PIL import ImageOps

        turned = ImageOps.exif_transpose(held)  # photographs say which side is up
        return np.asarray(turned.convert("L" if channels == 1 else "RGB"))


@contextmanager
def _opened(image: Path | bytes, where: str) -> Iterator[Any]:
    try:
        import PIL.Image
    except ImportError as error:
        raise MissingExtraError("an image file", "images") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as held:
                yield held
    except (
        OSError, SyntaxError, ValueError, zlib.error, PIL.Image.DecompressionBombError,
        PIL.Image.DecompressionBombWarning,
    ) as error:  # fmt: skip
        raise RecipeError(f"{where}: cannot be read as an image: {error}") from error


def checked(image: Image, where: str) -> int:
    """A number that stands for the content of an image.

    Raises:
        RecipeError: there is no such file, or it is no image.
    """
    if isinstance(image, np.ndarray):
        raw = repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()
    else:
        raw = image if isinstance(image, bytes) else _bytes(image, where)
        with _opened(image, where) as held:
            held.verify()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") >> 1


def _bytes(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{where}: {path}: {error.strerror}") from error


# -- where they come from --------------------------------------------------------------------------


def folder_images(folder: Path) -> list[Labelled]:
    """A folder of folders: their names are the labels, the files in them the images.

    The first of each label come first, then the second of each, so that the beginning holds all.

    Raises:
        RecipeError: there are no such folders.
    """
    groups = [
        [(str(p), p, part.name) for p in sorted(part.rglob("*"))
         if p.is_file() and not p.name.startswith(".")]
        for part in sorted(folder.iterdir())
        if part.is_dir() and not part.name.startswith(".")
    ]  # fmt: skip
    found = [item for row in zip_longest(*groups) for item in row if item is not None]
    if not found:
        raise RecipeError(f"{folder}: holds no images; it needs a folder of images for each label")
    return found


def array_images(path: Path, image: str, label: str) -> list[Labelled]:
    """Two arrays of an ``.npz`` file: images ``(n, height, width[, channels])`` uint8, labels.

    Raises:
        RecipeError: the file or an array is not what it should be.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            if not isinstance(held, Mapping):
                raise RecipeError(f"{path}: holds one array; images and labels are two (np.savez)")
            for name in (image, label):
                if name not in held:
                    raise RecipeError(f"{path}: no array {name!r}; {did_you_mean(name, [*held])}")
            images, labels = held[image], held[label]
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    return _labelled(path, images, labels)


IDX_IMAGES, IDX_LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def is_idx(path: Path) -> bool:
    """Whether a name is that of images as MNIST is distributed."""
    return path.name.removesuffix(".gz").endswith(IDX_IMAGES)


def idx_images(path: Path) -> list[Labelled]:
    """A pair of files as MNIST is distributed; the labels stand beside, named alike.

    Raises:
        RecipeError: one of the two is missing or broken.
    """
    beside = path.with_name(path.name.replace(IDX_IMAGES, IDX_LABELS))
    return _labelled(path, _idx(path, 3), _idx(beside, 1))


def _idx(path: Path, dims: int) -> Pixels:
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    start = 4 + 4 * dims
    shape = tuple(int(n) for n in np.frombuffer(raw[4:start], ">u4"))
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != start + int(np.prod(shape)):
        raise RecipeError(f"{path}: is not an IDX file of bytes in {dims} dimensions, or cut short")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _labelled(path: Path, images: Pixels, labels: Pixels) -> list[Labelled]:
    wrong = []
    if images.dtype != np.uint8:
        wrong.append(f"images are {images.dtype}, not uint8 from 0 to 255")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        wrong.append(f"images are {images.shape}, not (n, height, width) or with 1 or 3 channels")
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        wrong.append(f"labels are {labels.dtype} {labels.shape}, not n whole numbers or words")
    if len(images) != len(labels) or not len(images):
        wrong.append(f"{len(images)} images have {len(labels)} labels")
    if wrong:
        raise RecipeError(f"{path}: {listed(wrong)}")
    return [
        (f"{path}, row {n}", image, str(label))
        for n, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))
    ]
