"""What a person sees: lines, JSON, and progress; the only place that prints."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Self

from suture.tensors.spec import UNCOUNTED, readable


def clean(text: str) -> str:
    """Show control characters instead of obeying them: names come from files."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def say(text: str) -> None:
    """Tell something on standard error."""
    print(clean(text), file=sys.stderr)


def part(text: str) -> None:
    """Tell a piece of a line on standard error; it is seen at once."""
    print(clean(text), end="", file=sys.stderr, flush=True)


def tell(text: str = "") -> None:
    """Print a line of the result."""
    print(clean(text))


def show_json(value: Any) -> None:
    """Print a result as one JSON object."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


class Bars:
    """Progress on standard error: bars on a terminal, else one line a stage."""

    def __init__(self, quiet: bool = False) -> None:
        self._bars: Any = None
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and not quiet
        self._open: Any = None
        """The bar of a stage that was not counted; the next stage ends it."""

    def __enter__(self) -> Bars:
        if self._terminal:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )  # fmt: skip

            self._bars = Progress(
                TextColumn("{task.description:<8}"), BarColumn(), DownloadColumn(),
                TransferSpeedColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[name]}", style="dim", markup=False),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def stage(self, name: str, nbytes: int) -> Callable[[str, int], None] | None:
        """Begin a stage that will read so many bytes; ``UNCOUNTED`` where that says nothing."""
        if nbytes == 0 or self._quiet:
            return None
        counted = nbytes != UNCOUNTED
        if self._bars is None:
            say(f"{name}: reading {readable(nbytes)}" if counted else name)
            return None
        if self._open is not None:
            self._bars.remove_task(self._open)
            self._open = None
        bars, task = (
            self._bars,
            self._bars.add_task(name, total=nbytes if counted else None, name=""),
        )
        if not counted:
            self._open = task
            return None
        return lambda tensor, more: bars.update(task, advance=more, name=tensor[-48:])


class Steps:
    """Progress in steps on standard error: a bar on a terminal, else a line now and then."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._told, self._last = 0.0, ""
        if sys.stderr.isatty() and not quiet:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self._bars = Progress(
                TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[now]}", style="dim", markup=False),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Tell something that is not a step."""
        if not self._quiet:
            say(text) if self._bars is None else self._bars.console.print(clean(text), markup=False)

    def _show(self, bar: str, total: float, done: float, now: str) -> bool:
        """Move a bar; whether there is none, and a line is to be told."""
        if self._bars is None:
            return not self._quiet
        if bar not in self._tasks:
            self._tasks[bar] = self._bars.add_task(bar, total=total, now=now)
        self._bars.update(self._tasks[bar], completed=done, now=now)
        return False


class Training(Steps):
    """Progress of training."""

    def __init__(self, quiet: bool = False, unit: str = "tokens") -> None:
        super().__init__(quiet)
        self._unit = unit

    def tell(self, phase: str, at: Any) -> None:
        """Tell of a step."""
        score = "" if at.score is None else f", validation {at.score:.4f}"
        speed = f"{at.tokens_per_second:,.0f} {self._unit}/s"
        now = f"loss {at.loss:.4f}, lr {at.lr:.2e}, {speed}{score}"
        due = time.monotonic() - self._told > 10 or at.step == at.steps or at.score is not None
        if self._show(phase, at.steps, at.step, now) and due:
            self._told = time.monotonic()
            say(f"{phase}: step {at.step} of {at.steps}, {now}, {at.eta:.0f} s left")


class Asking(Steps):
    """Progress of evaluations."""

    def tell(self, at: Any) -> None:
        """Tell how far it is."""
        now = clean(f"{at.model}: {at.evaluation}")
        due = now != self._last or time.monotonic() - self._told >= 10
        if self._show("rows", at.total, round(at.done), now) and due:
            self._told, self._last = time.monotonic(), now
            left = "" if at.eta is None else f", {at.eta:.0f} s left"
            say(f"{now}: {at.done:.0f} of {at.total} rows{left}")
