"""Verdicts of judges, kept in a file by a hash of judge, prompt and answers, never with texts.

An interrupted run goes on with them; what could not be told is asked anew.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from suture.errors import OutputError, RecipeError
from suture.evals.judges import Judge
from suture.schema.paths import place_of
from suture.tensors.spec import cache_folder

OTHER = "name another file with `keep`, or say `keep: no`"
Got = Callable[[int, float | None], None]
"""Takes the number of a row and its verdict: 1 yes or the first, 0 no or the second, 0.5 a tie."""


def decided(
    judge: Judge, prompts: Sequence[str], answers: Sequence[str], keep: Path | None
) -> list[bool | None]:
    """A verdict for every answer; see ``remembered``."""

    def ask(rows: Sequence[tuple[str, ...]], got: Got) -> None:
        judge.decide([row[0] for row in rows], [row[1] for row in rows], got)

    found = remembered(judge.key, list(zip(prompts, answers, strict=True)), ask, keep)
    return [None if verdict is None else bool(verdict) for verdict in found]


def remembered(
    key: str, rows: Sequence[tuple[str, ...]],
    ask: Callable[[Sequence[tuple[str, ...]], Got], None], keep: Path | None,
) -> list[float | None]:  # fmt: skip
    """A verdict for every row of texts; those in the file ``keep`` are not asked for again.

    What could not be told is asked anew the next time.

    Raises:
        SutureError: the judge does not answer, or ``keep`` cannot be written; what was decided
            before that is kept.
    """
    names = [
        hashlib.blake2b("\0".join((key, *row)).encode(), digest_size=16).hexdigest() for row in rows
    ]
    known = {} if keep is None else _read(keep)
    found: dict[int, float | None] = {n: known[x] for n, x in enumerate(names) if x in known}
    missing = [n for n in range(len(names)) if n not in found]
    with _kept(keep) as note:

        def got(at: int, verdict: float | None) -> None:
            found[missing[at]] = verdict
            if verdict is not None:
                note(names[missing[at]], verdict)

        if missing:
            ask([rows[n] for n in missing], got)
    return [found.get(n) for n in range(len(names))]


def _read(path: Path) -> dict[str, float]:
    """The verdicts of a file; a line that was not written to its end is passed over."""
    found = {}
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    for line in text.splitlines():
        name, _, verdict = line.partition(" ")
        if re.fullmatch(r"[0-9a-f]{32}", name) and verdict in ("0", "0.5", "1"):
            found[name] = float(verdict)
    return found


@contextmanager
def _kept(path: Path | None) -> Iterator[Callable[[str, float], None]]:
    """Takes verdicts and appends each to a file at once."""
    if path is None:
        yield lambda name, verdict: None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}; {OTHER}") from None

    def note(name: str, verdict: float) -> None:
        try:
            file.write(f"{name} {verdict:g}\n")
            file.flush()
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}; {OTHER}") from None

    with file:
        if file.tell():
            file.write("\n")  # the last line may be torn; empty ones are passed over
        yield note


def kept_at(keep: str, key: str, folder: Path) -> Path | None:
    """The file that the option ``keep`` means: ``auto`` is one in the user's cache, ``no`` none."""
    return {"auto": verdict_file(key), "no": None}.get(keep, place_of(keep, folder))


def verdict_file(key: str) -> Path:
    """Where the verdicts of a judge are kept, unless a suite says otherwise: the user's cache."""
    return cache_folder() / "verdicts" / key


__all__ = ["Got", "decided", "kept_at", "remembered", "verdict_file"]
