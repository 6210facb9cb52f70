"""What a person sees: lines, JSON, and progress; the only place that prints."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from suture.runs.progress import Progress
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


class Watch:
    """Progress of a run on standard error: bars on a terminal, else a line now and then."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and not quiet
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._open: Any = None
        """The bar of a stage that was not counted; the next stage ends it."""
        self._shown_at, self._shown = 0.0, ""

    def __enter__(self) -> Progress:
        if self._terminal:
            self._bars = _bars()
            self._bars.start()
        return Progress(say=self.say, stage=self.stage, step=self.step, asked=self.asked)

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Say something that is no step."""
        if not self._quiet:
            say(text) if self._bars is None else self._bars.console.print(clean(text), markup=False)

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
        bars = self._bars
        task = bars.add_task(name, total=nbytes if counted else None, now="", unit="bytes")
        if not counted:
            self._open = task
            return None
        return lambda tensor, more: bars.update(task, advance=more, now=tensor[-48:])

    def step(self, phase: str, at: Any) -> None:
        """Show a step of a training."""
        score = "" if at.score is None else f", validation {at.score:.4f}"
        speed = f"{at.tokens_per_second:,.0f} {at.unit}/s"
        now = f"loss {at.loss:.4f}, lr {at.lr:.2e}, {speed}{score}"
        due = time.monotonic() - self._shown_at > 10 or at.step == at.steps or at.score is not None
        if self._show(phase, at.steps, at.step, now) and due:
            self._shown_at = time.monotonic()
            say(f"{phase}: step {at.step} of {at.steps}, {now}, {at.eta:.0f} s left")

    def asked(self, at: Any) -> None:
        """Show how many rows of an evaluation were asked."""
        now = clean(f"{at.model}: {at.evaluation}")
        due = now != self._shown or time.monotonic() - self._shown_at >= 10
        if self._show("rows", at.total, round(at.done), now) and due:
            self._shown_at, self._shown = time.monotonic(), now
            left = "" if at.eta is None else f", {at.eta:.0f} s left"
            say(f"{now}: {at.done:.0f} of {at.total} rows{left}")

    def _show(self, bar: str, total: float, done: float, now: str) -> bool:
        """Move a bar; whether there is none, and a line is to be shown."""
        if self._bars is None:
            return not self._quiet
        if bar not in self._tasks:
            self._tasks[bar] = self._bars.add_task(bar, total=total, now=now, unit="")
        self._bars.update(self._tasks[bar], completed=done, now=now)
        return False


def _bars() -> Any:
    """Bars of rich on standard error, of bytes and of steps; they vanish at the end."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    counts, sizes, speeds = MofNCompleteColumn(), DownloadColumn(), TransferSpeedColumn()

    class Amount(ProgressColumn):
        """How far a bar is: bytes and their speed, or steps."""

        def render(self, task: Task) -> Text:
            if task.fields["unit"] != "bytes":
                return counts.render(task)
            return Text.assemble(sizes.render(task), " ", speeds.render(task))

    return Bars(
        TextColumn("{task.description:<8}"), BarColumn(), Amount(), TimeRemainingColumn(),
        TextColumn("{task.fields[now]}", style="dim", markup=False),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
