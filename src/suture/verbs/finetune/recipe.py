"""The recipe of a fine-tuning run: YAML to frozen types, all faults at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from suture.errors import Problems, RecipeError, brief, did_you_mean
from suture.schema.paths import shown
from suture.schema.reader import Reader, read_training, refuse_unknown, section
from suture.schema.settings import check_words, settings
from suture.schema.sources import TOO_LONG, UNREAD, DataSpec, read_held_out, read_source
from suture.schema.text import raw_recipe
from suture.schema.tuning import TuneSettings
from suture.tensors.spec import WORD_OF, dtype_named
from suture.training.strategies import STRATEGIES, Strategy

KEYS = ("base", "strategy", "parameters", "task", "data", "head", "training", "output", "device")
IMAGES = "image-classification"
TASKS = ("classification", IMAGES, "language-model")
HEADS = ("probe", "zero-shot", "learned")
FORMS = ("model", "patch", "both")


@dataclass(frozen=True)
class Finetune:
    """A run, as data: after ``read_finetune`` every key is known and every value checked."""

    base: str
    strategy: Strategy
    data: DataSpec
    parameters: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    head: str = "probe"
    training: TuneSettings = field(default_factory=TuneSettings)
    recompute: bool = False
    """Whether activations are computed anew in the backward pass, to save memory."""
    dtype: str | None = None
    """The dtype of the output; ``None`` keeps that of the base."""
    form: str = "model"
    """What is written: the whole model, a patch of the base, or both."""
    device: str = "auto"
    folder: Path = field(default_factory=Path)

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as plain data that can be read again."""
        known = self.strategy.parameters
        shared = {n: self.parameters.get(n, p.default) for n, p in known.items()}
        data = asdict(self.data)
        train, validation = data.pop("train"), data.pop("validation")
        share = data.pop("share")
        data = {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}
        return {
            "base": self.base,
            "strategy": self.strategy.name,
            "parameters": {k: list(v) if isinstance(v, tuple) else v for k, v in shared.items()},
            "task": self.task,
            "data": {"train": train, "validation": validation or share, **data},
            "head": self.head,
            "training": {**asdict(self.training), "recompute": self.recompute},
            "output": {
                "dtype": None if self.dtype is None else WORD_OF[self.dtype],
                "form": self.form,
            },
            "device": self.device,
        }


def read_finetune(source: Path | Mapping[str, Any], folder: Path | None = None) -> Finetune:
    """Read a recipe file, or a mapping.

    Raises:
        RecipeError: everything that is wrong with it, at once.
    """
    problems = Problems()
    found = parse_finetune(source, folder, problems)
    problems.raise_if_any()
    assert found is not None
    return found


def parse_finetune(
    source: Path | Mapping[str, Any], folder: Path | None, problems: Problems
) -> Finetune | None:
    """The same, but with faults noted in ``problems``.

    A recipe with faults comes back as far as it is understood, so that its base and rows can be
    looked at too; ``None`` where there is no recipe at all.
    """
    with problems.collecting():
        raw, where = raw_recipe(source, folder, problems)
        return _Reader(raw, where, problems).recipe()
    return None


class _Reader(Reader):
    """Reads one recipe; every fault is noted."""

    def word(self, key: str, choices: tuple[str, ...], default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            return default
        if value not in choices:
            self.refuse(f"{key}: {brief(value)} is not known; {did_you_mean(str(value), choices)}")
            return default
        return value

    def recipe(self) -> Finetune:
        folder = self.folder
        refuse_unknown(self.raw, KEYS, "", self.problems)
        base, name = self.raw.get("base"), self.raw.get("strategy")
        if not isinstance(base, str) or not base:
            self.refuse("base: the path or hub id of the model to start from")
        parameters = section(self.raw, "parameters", self.problems)
        found = STRATEGIES.likely(name)  # what was meant, for all else
        with self.problems.collecting("strategy: "):
            if not isinstance(name, str):
                what = "missing" if name is None else f"a name, not {brief(name)}"
                raise RecipeError(f"{what}; `suture strategies` lists them")
            found = STRATEGIES.find(name)
        if found is not None:
            with self.problems.supposing(None if found.name == name else found.name):
                settings(found, parameters, self.problems)
        else:
            check_words(STRATEGIES.values(), parameters, self.problems, noun="strategy")
            found, parameters = STRATEGIES["full"], {}
        training, recompute = self.training(found.lr)
        dtype, form = self.output()
        task = self.word("task", TASKS, None)
        head = self.raw.get("head", "probe")
        if not isinstance(head, str) or not head:
            self.refuse(f"head: {', '.join(HEADS)} or the file of a saved head, not {brief(head)}")
            head = "probe"
        elif head not in HEADS and not self.place(head).is_file():
            self.refuse(f"head: no file {shown(self.place(head))}; {did_you_mean(head, HEADS)}")
            head = "probe"
        device = self.raw.get("device", "auto")
        if not isinstance(device, str):
            self.refuse(f"device: auto, cpu or cuda, not {brief(device)}")
            device = "auto"
        base = base if isinstance(base, str) else ""
        return Finetune(base, found, self.data(folder), parameters, task, head, training,
                        recompute, dtype, form, device, folder)  # fmt: skip

    def training(self, lr: float) -> tuple[TuneSettings, bool]:
        raw = section(self.raw, "training", self.problems)
        recompute = raw.pop("recompute", False)
        if not isinstance(recompute, bool):
            self.refuse(f"training.recompute: true or false, not {brief(recompute)}")
        return read_training(raw, TuneSettings(lr=lr), self.problems, ("recompute",)), bool(
            recompute
        )

    def output(self) -> tuple[str | None, str]:
        raw = section(self.raw, "output", self.problems)
        refuse_unknown(raw, ("dtype", "form"), "output: ", self.problems)
        form, dtype = raw.get("form") or "model", None
        if form not in FORMS:
            hint = did_you_mean(str(form), FORMS)
            self.refuse(f"output.form: {brief(form)} is not known; {hint}")
        with self.problems.collecting("output.dtype: "):
            dtype = None if raw.get("dtype") is None else dtype_named(str(raw["dtype"]))
        return dtype, str(form)

    def data(self, folder: Path) -> DataSpec:
        before = len(self.problems)
        raw = section(self.raw, "data", self.problems)
        names = tuple(f.name for f in fields(DataSpec) if f.name != "share")
        refuse_unknown(raw, names, "data: ", self.problems)
        train = read_source(raw.get("train"), "data.train", folder, "train", self.problems)
        other, share = read_held_out(raw, "data.validation", 0.1, folder, self.problems)
        given = self.columns(raw) | self.limits(raw) | self.labels(raw)
        fine = train is not None and len(self.problems) == before
        return DataSpec(train, other, share, **given) if train is not None and fine else UNREAD

    def columns(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """What the columns are called and what stands in them."""
        given: dict[str, Any] = {}
        for key in ("text", "label", "prompt", "response", "messages", "image"):
            if key in raw and not isinstance(raw[key], str):
                self.refuse(f"data.{key}: the name of a column, not {brief(raw[key])}")
            elif key in raw:
                given[key] = raw[key]
        for key, choices in (("format", ("text", "prompt", "chat")), ("too_long", TOO_LONG)):
            value = raw.get(key) or ""
            if value and value not in choices:
                hint = did_you_mean(str(value), choices)
                self.refuse(f"data.{key}: {brief(value)} is not known; {hint}")
            elif value:
                given[key] = value
        return given

    def limits(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """How much of the rows is used."""
        given: dict[str, Any] = {}
        for key in ("max_length", "limit", "size"):
            value = raw.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                self.refuse(f"data.{key}: a whole number, not {brief(value)}")
            else:
                given[key] = value
        return given

    def labels(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Labels, what they are called, and whether there are chats to be made."""
        labels, texts, chat = (
            raw.get("labels", []),
            raw.get("label_texts", {}),
            raw.get("chat", False),
        )
        if not isinstance(chat, bool):
            self.refuse(f"data.chat: true or false, not {brief(chat)}")
        if not isinstance(labels, list) or len({str(x) for x in labels}) != len(labels):
            self.refuse(f"data.labels: a list of different labels, not {brief(labels)}")
            labels = []
        if not isinstance(texts, Mapping):
            self.refuse(f"data.label_texts: a mapping from labels to texts, not {brief(texts)}")
            texts = {}
        named = {str(k): str(v) for k, v in texts.items()}
        return {"labels": tuple(map(str, labels)), "label_texts": named, "chat": chat}
