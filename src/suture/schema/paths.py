"""Where the paths of a recipe lie: one rule, the same for every command.

A relative path starts in the folder of the recipe's file; where a mapping was given instead of a
file, in the current folder; and an explicit ``folder`` wins over both. That folder is made absolute
once, when the recipe is read, so what was resolved is absolute and resolving it again changes
nothing. Paths from the command line, and arguments such as ``out``, start in the current folder.
"""

from __future__ import annotations

import os
from pathlib import Path


def recipe_folder(source: object, folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the absolute folder in which the relative paths of a recipe start.

    Links in it are resolved, so that ``..`` means the same in every later use.

    Args:
        source: the recipe: a ``Path`` of a file, or anything else, such as a mapping, that has no
            folder of its own.
        folder: an explicit folder; a relative one starts in the current folder.

    Examples:
        >>> recipe_folder({"base": "models/base"}, "/recipes")
        PosixPath('/recipes')
    """
    if folder is None:
        near = source.parent if isinstance(source, Path) else Path()
    else:
        near = Path(folder)
    return Path(os.path.realpath(_at_home(near)))


def place_of(path: str | os.PathLike[str], folder: Path | None = None) -> Path:
    """Return the path that a text of a recipe means, whether or not something is there.

    ``~`` is the user's home. An absolute path stays as it is, whatever the folder.

    Args:
        path: what the recipe says.
        folder: where it starts if it is relative, from ``recipe_folder``; by default it is left
            relative, to the current folder.

    Examples:
        >>> place_of("rows/train.jsonl", Path("/recipes"))
        PosixPath('/recipes/rows/train.jsonl')
        >>> place_of("/rows/train.jsonl", Path("/recipes"))
        PosixPath('/rows/train.jsonl')
    """
    found = _at_home(Path(path))
    return found if folder is None else folder / found


def shown(path: Path) -> str:
    """Return a path as messages write it: short where it lies in the current folder.

    Examples:
        >>> shown(Path.cwd() / "rows" / "train.jsonl")
        'rows/train.jsonl'
    """
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # the home of a user who does not exist
        return path


__all__ = ["place_of", "recipe_folder", "shown"]
