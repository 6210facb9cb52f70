"""Every error a user can meet; imports nothing of ours.

``SutureError`` is the only class the command line shows without a traceback::

    SutureError
    ├── RecipeError        a recipe, a parameter or a command that cannot be followed
    ├── CheckpointError    a file or folder that is not a readable checkpoint
    ├── MismatchError      checkpoints that should hold the same tensors do not
    ├── NonFiniteError     NaN or infinity where a number was expected
    ├── OutputError        the place to write to cannot be written to
    └── MissingExtraError  an optional dependency is not installed
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from reprlib import repr as brief
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class SutureError(Exception):
    """Something is wrong with what the user gave; never a bug of ours.

    ``problems`` has every fault, where there are several.

    Examples:
        >>> import suture
        >>> try:
        ...     suture.open("nowhere")
        ... except suture.SutureError as error:
        ...     print(type(error).__name__, error)
        CheckpointError nowhere: no such file or folder (looked for nowhere)
    """


class RecipeError(SutureError):
    """A recipe, a parameter or a command that cannot be followed.

    Examples:
        >>> import numpy as np, suture
        >>> suture.merge(None, [{"x": np.zeros(2)}], "liner")
        Traceback (most recent call last):
        suture.errors.RecipeError: method: no merge method 'liner'; did you mean 'linear'?
    """


class CheckpointError(SutureError):
    """A file or folder that is not a readable checkpoint.

    Examples:
        >>> import suture
        >>> suture.open({"x": [1.0]})
        Traceback (most recent call last):
        suture.errors.CheckpointError: tensors: x: a torch tensor or a numpy array, not list
    """


class MismatchError(SutureError):
    """Checkpoints that should hold the same tensors do not.

    Examples:
        >>> import numpy as np, suture
        >>> one, two = (suture.open({n: np.zeros(2)}, label=n) for n in ("one", "two"))
        >>> one - two
        Traceback (most recent call last):
        suture.errors.MismatchError: 2 problems:
          - one against two: lacks two
          - one against two: has one besides
    """


class NonFiniteError(SutureError):
    """NaN or infinity where a number was expected.

    Examples:
        >>> import numpy as np, suture
        >>> wild = {"layers.0.mlp.weight": np.array([np.nan], np.float32)}
        >>> suture.merge(None, [wild], "linear").numpy()
        Traceback (most recent call last):
        suture.errors.NonFiniteError: memory:model1: layers.0.mlp.weight holds 1 NaN or ...
    """


class OutputError(SutureError):
    """The place to write to cannot be written to.

    Examples:
        >>> import numpy as np, suture
        >>> suture.save({"x": np.zeros(2)}, "/")
        Traceback (most recent call last):
        suture.errors.OutputError: /: ...
    """


class MissingExtraError(SutureError):
    """An optional dependency is not installed.

    Examples:
        >>> str(MissingExtraError("a torch tensor", "models"))
        "a torch tensor needs the extra 'models': pip install 'suture[models]'"
    """

    def __init__(self, what: str, extra: str | None = None) -> None:
        remedy = f" needs the extra {extra!r}: pip install 'suture[{extra}]'"
        super().__init__(what if extra is None else what + remedy)


class Problems:
    """Collects what is wrong, so that all of it is reported at once and not one fault a run."""

    def __init__(self, limit: int = 20) -> None:
        self._found: list[tuple[type[SutureError], str]] = []
        self._limit = limit
        self._supposing = ""
        self.locate: Callable[[str], str] = str
        """Puts before a problem where in a file it stands, if that can be told from its text."""

    def add(self, kind: type[SutureError], text: str) -> None:
        """Note one problem; the same one is noted once."""
        text += self._supposing
        if (kind, text) not in self._found[
            -50:
        ]:  # near repeats only: linear work for 100,000 tensors
            self._found.append((kind, text))

    @contextmanager
    def supposing(self, name: str | None) -> Iterator[None]:
        """Say of all that is noted inside that it holds if ``name`` is meant; ``None``: nothing."""
        before = self._supposing
        self._supposing = before if name is None else f" (if {name!r} is meant)"
        try:
            yield
        finally:
            self._supposing = before

    @contextmanager
    def collecting(self, where: str = "") -> Iterator[None]:
        """Note a ``SutureError`` raised inside, instead of letting it through; ``where`` first."""
        try:
            yield
        except SutureError as error:
            for line in getattr(error, "problems", (str(error),)):
                self.add(type(error), where + line)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every problem that was noted, without its place in a file."""
        return tuple(text for _, text in self._found)

    def __bool__(self) -> bool:
        return bool(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def raise_if_any(self) -> None:
        """Raise one error that lists every problem; its class is that of the first."""
        if not self._found:
            return
        kind = self._found[0][0]
        # Where to write is said beside the recipe: its name may be that of a key.
        texts = [t if k is OutputError else self.locate(t) for k, t in self._found]
        if len(texts) == 1:
            error = kind(texts[0])
        else:
            shown = "".join(f"\n  - {_indented(text)}" for text in texts[: self._limit])
            more = (
                f"\n  ... and {len(texts) - self._limit} more" if len(texts) > self._limit else ""
            )
            error = kind(f"{len(texts)} problems:{shown}{more}")
        error.problems = tuple(texts)  # type: ignore[attr-defined]
        raise error


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")


__all__ = [
    "CheckpointError", "MismatchError", "MissingExtraError", "NonFiniteError", "OutputError",
    "Problems", "RecipeError", "SutureError", "brief", "did_you_mean", "in_python",
    "nearest", "spoken_in_python", "told_in_python",
]  # fmt: skip


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known word that a misspelt one is likely to mean; ``None`` where none is near."""
    lower = {k.lower(): k for k in known}
    near = get_close_matches(str(word).lower(), lower, n=1)
    return lower[near[0]] if near else None


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint for a misspelt ``word``: the nearest known one, or all there are."""
    found = nearest(word, known)
    return f"known: {', '.join(known)}" if found is None else f"did you mean {found!r}?"


_IN_PYTHON = {
    "overwrite": "overwrite=True", "no-resume": "resume=False", "force": "force=True",
    "allow-nonfinite": "allow_nonfinite=True", "save-others": "save_others=True",
    "scale": "scale", "rank": "rank", "energy": "energy", "out": "out", "values": "values=True",
    "on-overlap last or mean": 'on_overlap="last" or on_overlap="mean"',
    "on-overlap last": 'on_overlap="last"',
}  # fmt: skip
"""What the options of commands, which messages name, are called in Python."""
_FLAG = re.compile(
    r"(?<![\w-])--(" + "|".join(sorted(_IN_PYTHON, key=len, reverse=True)) + r")(?![\w-])"
)
_INSPECT = re.compile(r"`suture inspect (\w+) --check`")


def in_python(text: str) -> str:
    """A message with keywords of Python in the place of the options of a command.

    >>> in_python("out: exists; name another folder, or add --overwrite")
    'out: exists; name another folder, or add overwrite=True'
    """
    text = _INSPECT.sub(r"`suture.inspect(\1, check=True)`", text)
    return _FLAG.sub(lambda found: _IN_PYTHON[found[1]], text)


@contextmanager
def told_in_python() -> Iterator[None]:
    """Let errors that leave the block name keywords, where they name options of a command."""
    try:
        yield
    except SutureError as error:
        error.args = tuple(in_python(a) if isinstance(a, str) else a for a in error.args)
        problems = getattr(error, "problems", None)
        if problems is not None:
            error.problems = tuple(map(in_python, problems))  # type: ignore[attr-defined]
        raise


def spoken_in_python(function: Callable[P, T]) -> Callable[P, T]:
    """The function, whose errors speak of keywords; for what users call from Python.

    A keyword that it does not have is a ``RecipeError`` with the one that was meant.
    """
    known = signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())

    @wraps(function)
    def called(*args: P.args, **options: P.kwargs) -> T:
        for word in () if open_ended else options:
            if word not in known:
                hint = did_you_mean(word, list(known))
                raise RecipeError(f"{function.__name__}: no keyword {word!r}; {hint}")
        with told_in_python():
            return function(*args, **options)

    return called
