"""The folder beside an output: locked, keyed, resumed, and published whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from suture.checkpoints.writer import staging_of
from suture.errors import NonFiniteError, OutputError
from suture.runs.workspace import workspace


def test_an_output_appears_whole_and_the_workspace_goes(tmp_path: Path) -> None:
    """Until it is published nothing has the output's name; afterwards nothing else is left."""
    out = tmp_path / "out"
    with workspace(out, "localize") as space:
        (space.fresh() / "a.txt").write_text("whole")
        assert not out.exists()
        space.publish()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "a.txt").read_text() == "whole"


def interrupted(out: Path, key: dict[str, int]) -> None:
    """A run that keeps a checkpoint, leaves half an output and is stopped."""
    with pytest.raises(KeyboardInterrupt), workspace(out, "localize", key) as space:
        (space.folder / "train").write_text("kept")
        (space.fresh() / "half").write_text("half")
        raise KeyboardInterrupt


def test_what_was_kept_is_found_again_by_the_same_key_only(tmp_path: Path) -> None:
    """What stands in the workspace itself is kept, what was half made is not; another key, or
    --no-resume, starts anew."""
    out = tmp_path / "out"
    interrupted(out, {"seed": 1})
    with workspace(out, "localize", {"seed": 1}) as space:
        assert space.resumed
        assert (space.folder / "train").read_text() == "kept"
        assert not list(space.fresh().iterdir())
    for key, resume in (({"seed": 2}, True), ({"seed": 1}, False), (None, True)):
        interrupted(out, {"seed": 1})
        with workspace(out, "localize", key, resume=resume) as space:
            assert not space.resumed
            assert {p.name for p in space.folder.iterdir()} == {"lock", "key"}
        assert not staging_of(out).exists()


def test_precious_work_of_another_key_is_refused_and_the_remedy_helps(tmp_path: Path) -> None:
    """Checkpoints of another run are not lost; --no-resume, as the message says, starts anew."""
    out = tmp_path / "out"
    interrupted(out, {"seed": 1})
    with (
        pytest.raises(
            OutputError, match="holds checkpoints of a run with another recipe.*--no-resume"
        ),
        workspace(out, "finetune", {"seed": 2}, precious="checkpoints"),
    ):
        pass
    assert (staging_of(out) / "train").read_text() == "kept"
    with workspace(out, "finetune", {"seed": 2}, precious="checkpoints", resume=False) as space:
        assert not (space.folder / "train").exists()


def test_nothing_is_left_where_nothing_is_kept(tmp_path: Path) -> None:
    """An error leaves no trace of a run that kept nothing, nor of one that would meet it again."""
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="x"), workspace(out, "localize", {}) as space:
        (space.fresh() / "half").write_text("half")
        raise ValueError("x")
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(NonFiniteError),
        workspace(out, "localize", {}, fatal=(NonFiniteError,)) as space,
    ):
        (space.folder / "train").write_text("kept")
        raise NonFiniteError("NaN")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_that_no_run_left_is_named_and_kept(kind: str, tmp_path: Path) -> None:
    """Neither somebody's files nor what a link points to are taken for a workspace."""
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    place = staging_of(out)
    place.symlink_to(theirs) if kind == "link" else theirs.rename(place)
    with (
        pytest.raises(OutputError, match="which no run left; move it away"),
        workspace(out, "localize"),
    ):
        pass
    assert (place / "thesis.txt").read_text() == "mine"
    place.rename(tmp_path / "moved")
    with workspace(out, "localize") as space:
        space.fresh()
        space.publish()
    assert out.is_dir()


def test_the_second_of_two_runs_is_refused(tmp_path: Path) -> None:
    """And sweeps away nothing of the first."""
    out = tmp_path / "out"
    with workspace(out, "finetune", {"seed": 1}, precious="checkpoints") as space:
        (space.folder / "train").write_text("kept")
        with (
            pytest.raises(OutputError, match="another process is training it"),
            workspace(out, "finetune", {"seed": 1}, precious="checkpoints"),
        ):
            pass
        assert (space.folder / "train").read_text() == "kept"


def test_a_full_disk_says_what_is_kept(tmp_path: Path) -> None:
    """An error of the system becomes one of ours, with what the command has to add."""
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="out: cannot be written: No space left on device; go on"),
        workspace(out, "finetune", {}, remedy="; go on") as space,
    ):
        (space.folder / "train").write_text("kept")
        raise OSError(28, "No space left on device")
    assert (staging_of(out) / "train").read_text() == "kept"
