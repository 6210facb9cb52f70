"""Verdicts of judges, kept in a file by a hash of judge, prompt and answer, never with texts.

An interrupted run goes on with them; what could not be told is asked anew.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from suture.errors import OutputError, RecipeError
from suture.evals.judges import Judge

OTHER = "name another file with `keep`, or say `keep: no`"


def decided(
    judge: Judge, prompts: Sequence[str], answers: Sequence[str], keep: Path | None
) -> list[bool | None]:
    """A verdict for every answer; those in the file ``keep`` are not asked for again.

    What could not be told is asked anew the next time.

    Raises:
        SutureError: the judge does not answer, or ``keep`` cannot be written; what was decided
            before that is kept.
    """
    names = [
        hashlib.blake2b("\0".join((judge.key, p, a)).encode(), digest_size=16).hexdigest()
        for p, a in zip(prompts, answers, strict=True)
    ]
    known = {} if keep is None else _read(keep)
    found: dict[int, bool | None] = {n: known[x] for n, x in enumerate(names) if x in known}
    missing = [n for n in range(len(names)) if n not in found]
    with _kept(keep) as note:

        def got(at: int, verdict: bool | None) -> None:
            found[missing[at]] = verdict
            if verdict is not None:
                note(names[missing[at]], verdict)

        if missing:
            judge.decide([prompts[n] for n in missing], [answers[n] for n in missing], got)
    return [found.get(n) for n in range(len(names))]


def _read(path: Path) -> dict[str, bool]:
    """The verdicts of a file; a line that was not written to its end is passed over."""
    found = {}
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    for line in text.splitlines():
        name, _, verdict = line.partition(" ")
        if re.fullmatch(r"[0-9a-f]{32}", name) and verdict in ("0", "1"):
            found[name] = verdict == "1"
    return found


@contextmanager
def _kept(path: Path | None) -> Iterator[Callable[[str, bool], None]]:
    """Takes verdicts and appends each to a file at once."""
    if path is None:
        yield lambda name, verdict: None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}; {OTHER}") from None

    def note(name: str, verdict: bool) -> None:
        try:
            file.write(f"{name} {int(verdict)}\n")
            file.flush()
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}; {OTHER}") from None

    with file:
        if file.tell():
            file.write("\n")  # the last line may be torn; empty ones are passed over
        yield note


def verdict_file(judge: Judge) -> Path:
    """Where the verdicts of a judge are kept, unless a suite says otherwise: the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "suture" / "verdicts" / judge.key


__all__ = ["decided", "verdict_file"]
