"""Images of a recipe to data: folders by label, arrays, or rows that name files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.headers import read_json
from suture.errors import Problems, RecipeError, did_you_mean
from suture.schema.sources import DataSpec, Source
from suture.training.images import (
    Image,
    Images,
    ImageTransform,
    Labelled,
    array_images,
    checked,
    folder_images,
    idx_images,
    is_idx,
)
from suture.training.labelled import cell
from suture.training.rows import TrainingRows, held_out, need_columns, numbered, records_of

PREPROCESSOR = "preprocessor_config.json"


def look_of(base: Checkpoint, size: int) -> tuple[ImageTransform, tuple[str, ...]]:
    """How a base wants its images, and what to know of that; ``size`` wins unless it is 0.

    Raises:
        RecipeError: the size is not one that patches can cover.
    """
    config, path = base.config, base.folder / PREPROCESSOR
    how = read_json(path) if path.is_file() else {}
    notes = []
    if not how:
        notes.append(f"the base has no {PREPROCESSOR}; images get the mean and std of ImageNet")
    known = next((found for found in map(_size, (
        {"height": size, "width": size} if size else None,
        how.get("crop_size") if how.get("do_center_crop", True) else None,
        how.get("size"), config.get("image_size"),
    )) if found), (224, 224))  # fmt: skip
    patch = _size(config.get("patch_size")) or (1, 1)
    if known[0] % patch[0] or known[1] % patch[1]:
        raise RecipeError(
            f"data.size: {known[0]} x {known[1]} is no multiple of the base's patches of "
            f"{patch[0]} x {patch[1]}; take for example {max(1, known[0] // patch[0]) * patch[0]}"
        )
    channels = int(config.get("num_channels", 3))
    plain = ImageTransform(known, channels)
    mean, std = how.get("image_mean", plain.mean), how.get("image_std", plain.std)
    if how.get("do_normalize") is False:
        mean, std = [0.0] * channels, [1.0] * channels
    if len(mean) != channels or len(std) != channels:
        mean, std = [0.5] * channels, [0.5] * channels
        notes.append(f"no mean and std for {channels} channels; 0.5 is taken")
    return ImageTransform(known, channels, tuple(map(float, mean)), tuple(map(float, std))), tuple(
        notes
    )


def _size(value: Any) -> tuple[int, int] | None:
    if isinstance(value, Mapping):
        edge = value.get("shortest_edge")
        value = [value.get("height", edge), value.get("width", edge)]
    sides = [value, value] if isinstance(value, int) else value
    if isinstance(sides, list | tuple) and len(sides) == 2:
        height, width = sides
        if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
            return height, width
    return None


def image_rows(spec: DataSpec, look: ImageTransform, seed: int) -> TrainingRows:
    """Images with labels.

    Raises:
        RecipeError: a file that is no image, an unknown column or label, an empty side; all faults
            of a kind at once.
    """
    train = labelled(spec.train, spec)
    if spec.limit:
        train = train[: spec.limit]
    sides = [train] if spec.validation is None else [train, labelled(spec.validation, spec)]
    problems = Problems()
    known: list[list[tuple[int, Labelled]]] = []
    for side in sides:
        known.append([])
        for row in side:
            with problems.collecting():
                known[-1].append((checked(row[1], row[0]), row))
    problems.raise_if_any()
    if spec.validation is None:
        known = list(held_out(known[0], lambda row: str(row[0]), spec, seed))
    labels, numbers = numbered([[(w, label) for _, (w, _, label) in side] for side in known], spec)
    made = [
        Images(
            tuple((number,) for number, _ in side), tuple(mine), 0,
            images=tuple(image for _, (_, image, _) in side), look=look,
        )
        for side, mine in zip(known, numbers, strict=True)
    ]  # fmt: skip
    return TrainingRows(made[0], made[1], labels, ())


def labelled(source: Source, spec: DataSpec) -> list[Labelled]:
    """The images of a source with their places and labels.

    Raises:
        RecipeError: it cannot be read, or lacks a column.
    """
    path = Path(source.path)
    if not source.split and path.is_dir():
        return folder_images(path)
    if not source.split and path.suffix == ".npz":
        return array_images(path, spec.image, spec.label)
    if not source.split and is_idx(path):
        return idx_images(path)
    problems, found, records = Problems(), [], records_of(source, encoded=spec.image)
    need_columns([records], (spec.image, spec.label), problems)
    for where, record in records:
        with problems.collecting():
            image = _image(record, spec.image, where, None if source.split else path.parent)
            found.append((where, image, cell(record, spec.label, where)))
    problems.raise_if_any()
    return found


def _image(record: Mapping[str, object], column: str, where: str, folder: Path | None) -> Image:
    value = record.get(column)
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]  # as data sets hold images
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value and folder is not None:
        return folder / value
    if value is None:
        known = [str(key) for key, given in record.items() if given is not None]
        raise RecipeError(f"{where}: no column {column!r}; {did_you_mean(column, known)}")
    raise RecipeError(f"{where}: {column!r} is neither the path of an image nor its bytes")
