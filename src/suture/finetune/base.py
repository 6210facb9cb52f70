"""What a strategy is: a function from parameters to how a model is trained, and a table line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from suture.checkpoint import Checkpoint, open_checkpoint
from suture.data import Dataset
from suture.errors import MismatchError, Problems, RecipeError, brief, did_you_mean
from suture.finetune.packed import Place
from suture.forms import PLAIN
from suture.mask import Mask
from suture.maskfile import marked
from suture.merges.base import Number, Parameter
from suture.mover import Loss, Mover
from suture.patch import Patch
from suture.patchfile import is_patch
from suture.roles import DEFAULT_SPACE, ROLES
from suture.settings import TuneSettings
from suture.tune import TuneResult

Say = Callable[[str], None]


@dataclass(frozen=True)
class Text:
    """What a parameter that is a word or path means."""

    doc: str

    def problem(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        return (
            None if isinstance(value, str) and value else f"{self.doc}; {brief(value)} is no word"
        )


@dataclass(frozen=True)
class Roles:
    """What a parameter that is a list of roles means."""

    doc: str

    def problem(self, value: object) -> str | None:
        """What is wrong with ``value``; ``None`` when nothing is."""
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list | tuple) or not all(isinstance(w, str) for w in words):
            return f"{self.doc}; {brief(value)} is no list of roles"
        for word in words:
            if word not in ROLES:
                return f"{word!r} is no role; {did_you_mean(word, list(ROLES))}"
        return None


Share = Annotated[
    float, Number("share of the prunable entries that is trained, in (0, 1]", high=1, positive=True)
]
Words = tuple[str, ...]


@dataclass
class Job:
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
    places: Mapping[str, Place]
    """Where parameters stand in the base's files; those that are not there cannot be trained."""
    run: Callable[[Mover, str, TuneSettings], TuneResult]
    """Train with a mover, in a named phase with a checkpoint of its own."""
    work: Path | None = None
    """A folder for what is made once."""
    say: Say = lambda _: None
    folder: Path = field(default_factory=Path)
    """Where relative paths of the recipe start."""

    def train(
        self, mover: Mover, phase: str = "train", settings: TuneSettings | None = None
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
            partial = path.with_name(f".{path.name}.partial")
            self.mask(masks, about).save(partial)
            partial.replace(path)
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


@dataclass(frozen=True)
class Strategy:
    """A line of the table: the function that makes the training, and what to know of it."""

    make: Callable[..., Callable[[Any], Any]]
    title: str
    paper: str
    """Where it comes from: authors, year, identifier."""
    sparse: bool = False
    """Whether it moves chosen entries only; a mask is then saved beside the weights."""
    lr: float = TuneSettings.lr
    """The peak rate where a recipe names none: fewer or slower entries need a larger one."""

    @property
    def name(self) -> str:
        """The name in recipes."""
        return self.make.__name__.replace("_", "-")

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The parameters, by name, in the order of the signature."""
        hints = get_type_hints(self.make, include_extras=True)
        return {
            n: Parameter(n, hints[n], p.default)
            for n, p in inspect.signature(self.make).parameters.items()
        }

    @property
    def equation(self) -> str:
        """What is computed, in Markdown: the body of the docstring."""
        text = inspect.cleandoc(self.make.__doc__ or "").replace("``", "`")
        return re.sub(r":math:`([^`]*)`", r"$\1$", text)

    def settings(self, given: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
        """Check the parameters of a recipe and give them the types that the strategy asks for."""
        known = self.parameters
        for key in given:
            if key not in known:
                hint = did_you_mean(key, list(known)) if known else "it has none"
                problems.add(RecipeError, f"parameters: {self.name} has no {key!r}; {hint}")
        found: dict[str, Any] = {}
        for name, parameter in known.items():
            value = given.get(name, parameter.default)
            if parameter.required and name not in given:
                problems.add(RecipeError, f"parameters.{name}: missing: {parameter.doc}")
                continue
            wrong = parameter.problem(value)
            if wrong is not None:
                problems.add(RecipeError, f"parameters.{name}: {wrong}")
            elif isinstance(parameter.meta, Roles):
                found[name] = (value,) if isinstance(value, str) else tuple(value)
            elif isinstance(parameter.meta, Number):
                found[name] = int(value) if parameter.meta.whole else float(value)
            else:
                found[name] = value
        return found


def check_words(lines: Iterable[Strategy], given: Iterable[str], problems: Problems) -> None:
    """Note parameters that no line of a table has, where it is not known which one is meant."""
    known = list(dict.fromkeys(name for line in lines for name in line.parameters))
    for key in given:
        if key not in known:
            problems.add(RecipeError, f"parameters: none has {key!r}; {did_you_mean(key, known)}")


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


__all__ = ["Job", "Number", "Roles", "Share", "Strategy", "Text", "Tuned", "Words",
           "backbone_of", "entries", "given_mask", "ones"]  # fmt: skip
