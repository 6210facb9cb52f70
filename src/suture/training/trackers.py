"""Curves of a run for TensorBoard or trackio, by flag; neither is needed without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from suture.errors import MissingExtraError, RecipeError, did_you_mean
from suture.training.loop import TrainingStep

Note = Callable[[str, TrainingStep], None]
TRACKERS = ("tensorboard", "trackio")


@contextmanager
def tracker(kind: str, out: Path, recipe: Mapping[str, Any]) -> Iterator[Note]:
    """Takes the phase and every step's numbers.

    TensorBoard files go to ``OUT-logs``, beside the output; trackio keeps its own place.

    Raises:
        MissingExtraError: the library is not installed.
        RecipeError: there is no such tracker.
    """
    if kind not in TRACKERS:
        raise RecipeError(f"no tracker {kind!r}; {did_you_mean(kind, TRACKERS)}")
    write, close = (_tensorboard if kind == "tensorboard" else _trackio)(out, recipe)

    def note(phase: str, at: TrainingStep) -> None:
        values = {"loss": at.loss, "lr": at.lr, "tokens_per_second": at.tokens_per_second}
        if at.score is not None:
            values["validation"] = at.score
        write({f"{phase}/{word}": value for word, value in values.items()}, at.step)

    try:
        yield note
    finally:
        close()


Write = Callable[[dict[str, float], int], None]


def _tensorboard(out: Path, recipe: Mapping[str, Any]) -> tuple[Write, Callable[[], None]]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("TensorBoard", "tensorboard") from error
    writer = SummaryWriter(str(out.parent / f"{out.name}-logs"))
    writer.add_text("recipe", str(dict(recipe)))

    def write(values: dict[str, float], step: int) -> None:
        for word, value in values.items():
            writer.add_scalar(word, value, step)

    return write, writer.close


def _trackio(out: Path, recipe: Mapping[str, Any]) -> tuple[Write, Callable[[], None]]:
    try:
        import trackio
    except ImportError as error:
        raise MissingExtraError("trackio", "trackio") from error
    trackio.init(project="suture", name=out.name, config=dict(recipe))
    return lambda values, step: trackio.log(values, step=step), trackio.finish
