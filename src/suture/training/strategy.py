"""What a strategy works with, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from suture.checkpoints.checkpoint import Checkpoint, open_checkpoint
from suture.checkpoints.linearized import PLAIN
from suture.edits.mask import Mask
from suture.edits.mask_file import marked
from suture.edits.patch import Patch
from suture.edits.patch_file import is_patch
from suture.errors import MismatchError, Problems, RecipeError
from suture.schema.tuning import TuneSettings
from suture.tensors.roles import DEFAULT_SPACE
from suture.training.data import Dataset
from suture.training.loop import TuneResult
from suture.training.loss import Loss, LossStep
from suture.training.packed import ParameterPlace

Say = Callable[[str], None]


@dataclass
class TrainJob:
    """What a strategy works with."""

    model: nn.Module
    """A ``Classifier`` or ``LanguageModel`` in float32, on the device."""
    body: str
    """Prefix of names of the pretrained part; what else asks for gradients is a learned head."""
    data: Dataset
    calibration: Dataset
    """Rows for masks; their labels are not used."""
    loss: Loss
    settings: TuneSettings
    device: str
    base: Checkpoint
    fingerprint: str
    """Of the base."""
    places: Mapping[str, ParameterPlace]
    """Where parameters stand in the base's files; those that are not there cannot be trained."""
    run: Callable[[LossStep, str, TuneSettings], TuneResult]
    """Train with a mover, in a named phase with a checkpoint of its own."""
    work: Path | None = None
    """A folder for what is made once."""
    say: Say = lambda _: None
    folder: Path = field(default_factory=Path)
    """Where relative paths of the recipe start."""

    def train(
        self, mover: LossStep, phase: str = "train", settings: TuneSettings | None = None
    ) -> TuneResult:
        """Train; an interrupted run goes on from its checkpoint."""
        return self.run(mover, phase, settings or self.settings)

    def head(self) -> dict[str, nn.Parameter]:
        """The parameters of a head that is learned along, by name."""
        return {n: p for n, p in self.model.named_parameters()
                if not n.startswith(self.body) and p.requires_grad}  # fmt: skip

    def freeze(self) -> None:
        """Freeze the pretrained part, not a learned head."""
        for name, parameter in self.model.named_parameters():
            if name.startswith(self.body):
                parameter.requires_grad_(False)

    def once(
        self, name: str, make: Callable[[], dict[str, Tensor]], about: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Masks that are made once a run: an interrupted one finds them again."""
        path = None if self.work is None else self.work / f"{name}.safetensors"
        if path is not None and path.is_file():
            return self.masks_of(Mask.load(path), str(path))
        masks = make()
        if path is not None:
            self.mask(masks, about).save(path)
        return masks

    def mask(self, masks: Mapping[str, Tensor], about: Mapping[str, Any]) -> Mask:
        """Booleans by parameter as a mask over the tensors of the base's files."""
        names = set(DEFAULT_SPACE.names(self.base.specs)) | {self.places[n].name for n in masks}
        entries = {
            n: torch.zeros(self.base.specs[n].shape, dtype=torch.bool) for n in sorted(names)
        }
        for name, chosen in masks.items():
            self.places[name].of(entries[self.places[name].name]).copy_(chosen)
        return Mask.of(
            {n: e.numpy() for n, e in entries.items()}, {"base": self.fingerprint, **about}
        )

    def masks_of(self, mask: Mask, where: str) -> dict[str, Tensor]:
        """A mask of the base's tensors as booleans by parameter.

        Raises:
            MismatchError: it is the mask of another model.
        """
        problems = Problems()
        made_for = mask.about.get("base")
        if made_for and made_for != self.fingerprint:
            problems.add(
                MismatchError,
                f"{where}: is a mask of another base (its fingerprint is {made_for}, that of this "
                f"one {self.fingerprint})",
            )
        held = {place.name for place in self.places.values()}
        for name, shape in mask.shapes.items():
            if name not in self.base.specs:
                problems.add(MismatchError, f"{where}: masks {name}, which the base does not have")
            elif self.base.specs[name].shape != shape:
                problems.add(
                    MismatchError,
                    f"{where}: masks {name} as {shape}; the base has {self.base.specs[name].shape}",
                )
            elif name not in held and np.any(mask.bits[name]):
                problems.add(
                    MismatchError, f"{where}: chooses entries of {name}, which is not trained"
                )
        problems.raise_if_any()
        found = {}
        for name, place in self.places.items():
            if place.name in mask.shapes and mask.bits[place.name].any():
                chosen = place.of(torch.from_numpy(mask[place.name]))
                if chosen.any():
                    found[name] = chosen.clone()
        if not found:
            raise RecipeError(f"{where}: the mask is empty; there is nothing to train")
        return found


def given_mask(path: Path) -> Mask:
    """The mask in a file: a saved one, or the entries that a patch replaces.

    Raises:
        SutureError: the file is neither, or is damaged.
    """
    if not is_patch(open_checkpoint(path)):
        return Mask.load(path)
    patch = Patch.load(path)
    mask = patch.mask()
    about = {} if patch.base is None else {"base": patch.base}
    return Mask(mask.shapes, mask.bits, marked(about, patch.restricted))


@dataclass(frozen=True)
class Tuned:
    """What a strategy leaves beside the weights, which are in the model."""

    result: TuneResult
    trained: int
    """Entries that were trained, the head's not counted."""
    masks: Mapping[str, Tensor] | None = None
    """The chosen entries, of strategies that choose."""
    form: str = PLAIN
    adapter: str = ""
    """Hash of a frozen half of low-rank updates."""
    save: Callable[[Path], None] | None = None
    """Writes more files into the output, such as the adapter."""
    evaluated: nn.Module | None = None
    """What to evaluate, if not the model itself."""
    finish: Callable[[], None] = lambda: None
    """Puts what was learned into the weights of the model, after it was evaluated."""
    facts: Mapping[str, Any] = field(default_factory=dict)


def backbone_of(model: nn.Module, body: str) -> nn.Module:
    """The pretrained part of a model."""
    return model.get_submodule(body.rstrip("."))


def entries(masks: Mapping[str, Tensor]) -> int:
    """How many entries are chosen."""
    return sum(int(m.count_nonzero()) for m in masks.values())


def ones(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that choose everything."""
    return {
        n: torch.ones(p.shape, dtype=torch.bool, device=p.device) for n, p in parameters.items()
    }


__all__ = ["TrainJob", "Tuned", "backbone_of", "entries", "given_mask", "ones"]
