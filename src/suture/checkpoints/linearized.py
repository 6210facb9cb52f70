"""What the weights of a checkpoint mean: by themselves, or only as a change to a base.

Fine-tuning can leave weights that are a direction and not a model: a linearized model is evaluated
and combined as such. Its ``suture.json`` says so, and whoever combines checkpoints asks here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.headers import read_json
from suture.errors import CheckpointError, MismatchError, Problems

PLAIN, LINEARIZED = "plain", "linearized"
RECORD_LIMIT = 16 << 20


class Form(NamedTuple):
    """How a checkpoint is to be read."""

    kind: str = PLAIN
    """``plain``, or ``linearized``: to first order around its base."""
    adapter: str = ""
    """Hash of the frozen half of its low-rank updates; sums need it to be the same."""


def form_of(checkpoint: Checkpoint) -> Form:
    """The form that the ``suture.json`` beside a checkpoint states; plain without one."""
    path = checkpoint.folder / "suture.json"
    if not checkpoint.path.is_dir() or not path.is_file():
        return Form()
    try:
        record = read_json(path, RECORD_LIMIT)
    except CheckpointError:
        return Form()
    return Form(str(record.get("form", PLAIN)), str(record.get("adapter", "")))


def check_forms(models: Mapping[str, Checkpoint], problems: Problems) -> Form:
    """Refuse to combine what does not add up; the form of the sum.

    Args:
        models: what is added to the base, by name.
        problems: takes what is wrong.
    """
    forms = {name: form_of(c) for name, c in models.items()}
    kinds = sorted({form.kind for form in forms.values()})
    if len(kinds) > 1:
        which = ", ".join(f"{n} is {f.kind}" for n, f in forms.items())
        problems.add(MismatchError, f"linearized and plain models do not add up: {which}")
    adapters = sorted({form.adapter for form in forms.values() if form.adapter})
    if len(adapters) > 1:
        which = ", ".join(f"{n}: {f.adapter[:12]}" for n, f in forms.items() if f.adapter)
        problems.add(
            MismatchError,
            f"low-rank updates with different frozen halves do not add up ({which}); "
            "train them with the same rank, targets and adapter_seed",
        )
    return Form(kinds[0] if len(kinds) == 1 else PLAIN, adapters[0] if len(adapters) == 1 else "")
