"""The data that a recipe gives for a model: rows and a head, read; and the model that reads them.

Nothing heavy is imported before a model is really loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suture.checkpoints.checkpoint import Checkpoint, open_checkpoint
from suture.errors import Problems, RecipeError, did_you_mean
from suture.merges.policy import Policy
from suture.runs.card import carry
from suture.tensors.roles import EVERYTHING
from suture.training.task_rows import Task
from suture.verbs.merge.run import merged, save

if TYPE_CHECKING:
    from suture.training.data import Dataset
    from suture.training.labelled import LabelledText
    from suture.training.measure import Objective
    from suture.training.models import Head
    from suture.training.rows import Record


@dataclass(frozen=True)
class Material:
    """What a model is measured with: its rows and the head that reads them."""

    rows: Sequence[LabelledText] | Sequence[Record]
    head: Head | None

    @property
    def texts(self) -> list[list[str]]:
        """What identifies each row: all that it says."""
        return [
            [repr(sorted(row[1].items()))] if isinstance(row, tuple) else [row.text, row.label]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Net:
    """A loaded model, the rows it reads as tokens, and what their loss is."""

    model: Any
    data: Dataset
    objective: Objective
    notes: tuple[str, ...] = ()
    """About rows that were cut or left out."""


def read_material(
    tasks: Mapping[str, Task], problems: Problems, *, seed: int = 0
) -> dict[str, Material]:
    """Rows and heads, by name of the model; text only, faults are noted."""
    if not tasks:
        return {}
    found = {}
    with problems.collecting():
        for name, task in tasks.items():
            with problems.collecting():
                found[name] = _texts(task) if task.language else _labelled(name, task, seed)
                if not found[name].rows:
                    raise RecipeError(f"tasks.{name}: {task.data} holds no rows")
    return found


def _texts(task: Task) -> Material:
    from suture.training.rows import check_language_records, records_of

    assert task.language is not None
    texts = records_of(task.language.train)[: task.rows]
    check_language_records(task.language, texts)
    return Material(texts, None)


def _labelled(name: str, task: Task, seed: int) -> Material:
    from suture.training.labelled import at_most, read_rows
    from suture.training.models import load_head

    head = None if task.head is None else load_head(task.head)
    rows = read_rows(task.data, text=task.text, label=task.label)
    rows = rows if task.rows is None else at_most(rows, task.rows, seed=seed)
    strange = {r.label for r in rows} - set(head.labels) if head else set()
    if strange and head is not None:
        hint = did_you_mean(sorted(strange)[0], head.labels)
        raise RecipeError(f"tasks.{name}: the head has no label {sorted(strange)[0]!r}; {hint}")
    return Material(rows, head)


def check_loadable(checkpoint: Checkpoint, where: str, why: str, problems: Problems) -> None:
    """Note a model that cannot be loaded, because nothing says what network it is."""
    if not checkpoint.config:
        problems.add(
            RecipeError,
            f"{where}: {why} runs the model, and {checkpoint.label} has no config.json: "
            "name the model's folder",
        )


def folder_of(checkpoint: Checkpoint, scratch: Path, base: Checkpoint) -> Path:
    """The folder of a model as it is; one that is computed while it is read is written out first.

    Args:
        checkpoint: the model.
        scratch: a folder for those that are a base with adapters, a GGUF file or the like.
        base: whose tokenizer it has, where it has none.
    """
    if type(checkpoint) is Checkpoint and checkpoint.path.is_dir():
        return checkpoint.path
    place = scratch / "model"
    what = merged(None, {"model": checkpoint}, "linear", space=EVERYTHING,
                  policy=Policy("base", "drop", "base"))  # fmt: skip
    save(what, place, overwrite=True)
    carry([base], place)
    return place


def load_net(
    folder: Path, task: Task, material: Material, device: str = "cpu", words: Path | None = None
) -> Net:
    """Load a model in float32 with its head, and its rows as tokens.

    Args:
        folder: of the model.
        task: what is done with it.
        material: its rows, and its head.
        device: where it is put.
        words: the folder of the model whose tokenizer and chat template are used, where not its
            own: two models that are compared must read the same tokens.

    Raises:
        SutureError: the folder is not such a model, or rows have no tokens.
    """
    from suture.training.data import tokenise
    from suture.training.measure import objective_named
    from suture.training.models import (
        FLOAT32,
        Classifier,
        load_encoder,
        load_language_model,
        load_tokenizer,
        longest_of,
    )
    from suture.training.rows import language_data

    objective = objective_named(task.kind)
    if material.head is not None:
        loaded = load_encoder(folder, device=device, dtype=FLOAT32)
        rows: Any = material.rows
        data = tokenise(rows, loaded.tokenizer, labels=material.head.labels,
                        max_length=task.max_length)  # fmt: skip
        return Net(Classifier(loaded.model, material.head).to(device), data, objective)
    text = load_language_model(folder, device=device, dtype=FLOAT32)
    tokenizer = text.tokenizer if words is None else load_tokenizer(words)
    assert task.language is not None
    longest = min(task.max_length, longest_of(open_checkpoint(folder).config, tokenizer))
    spec = replace(task.language, max_length=longest)
    records: Any = material.rows
    tokens, notes = language_data(records, spec, tokenizer, longest)
    return Net(text.model, tokens, objective, tuple(notes))


__all__ = [
    "Material", "Net", "check_loadable", "folder_of", "load_net",
    "read_material",
]  # fmt: skip
