"""What a recipe may call a model, opened: a folder, a file, a patch, a graft."""

from __future__ import annotations

from pathlib import Path

from suture.checkpoints.checkpoint import Checkpoint, refuse_uncomputable
from suture.checkpoints.open import open_model
from suture.edits.graft import is_graft, open_graft
from suture.edits.patch import Patch
from suture.edits.patch_file import is_patch
from suture.errors import RecipeError


def open_input(path: str, near: Path | None, base: Checkpoint | None) -> Checkpoint:
    """What a recipe may call a model, opened: also a patch or a graft, which lies on the base.

    Raises:
        SutureError: there is no such model, or nothing can be computed with it.
    """
    found = open_model(path, near, base)
    if found.path.is_file():
        found = _put_on(found, base)
    refuse_uncomputable(found)
    return found


def _put_on(file: Checkpoint, base: Checkpoint | None) -> Checkpoint:
    """What a file means beside a base: a patch or a graft is the base with it on."""
    patch = is_patch(file)
    if not patch and not is_graft(file.path):
        return file
    if base is None:
        what = "a patch stands for a model only beside its base; name it"
        if not patch:
            what = "is a graft, weights to be put into a base; name the base"
        raise RecipeError(f"{file.label}: {what}")
    view = Patch.load(file.path).apply(base) if patch else open_graft(file.path, base)
    view.path, view.label = file.path, file.label
    return view
