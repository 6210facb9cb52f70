"""``kill -9`` at ten random moments of the real demo: the same command goes on to the same tables."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from suture.cli.demo import NAME, load_demo
from suture.errors import SutureError

KILLS = 10
TABLES = ("edits/compared/tasks.json", "safety/compared/merges.json", "safety/compared/realigned.json",
          "safety/compared/results.md")  # fmt: skip


def started(folder: Path) -> subprocess.Popen[str]:
    """The demo in its default folder, in a process group of its own."""
    program = "from suture.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, "demo"], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def finished(folder: Path) -> tuple[dict[str, str], float]:
    """The tables of a demo that runs to its end, and the seconds that it took."""
    began = time.monotonic()
    process = started(folder)
    said, _ = process.communicate()
    assert process.returncode in (0, 1), said  # 1: it ran, and a promise was broken
    return {name: (folder / "demo" / name).read_text() for name in TABLES}, time.monotonic() - began


@pytest.mark.slow
def test_a_demo_killed_at_ten_random_moments_ends_with_the_same_tables(tmp_path: Path) -> None:
    """Between any two kills it gets on; what is whole when it is killed is not made again."""
    try:
        load_demo()
        sys.modules[f"{NAME}.tour"].package_folders(
            [n for names in sys.modules[f"{NAME}.tour"].PACKAGES.values() for n in names]
        )
    except SutureError as error:
        pytest.skip(str(error))
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected, seconds = finished(tmp_path / "whole")
    draw, killed = random.Random(0), 0
    for _ in range(KILLS):
        process = started(tmp_path / "killed")
        try:
            process.communicate(timeout=5 + draw.uniform(0, 2 * seconds / KILLS))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed += 1
    assert killed >= KILLS // 2
    again, _ = finished(tmp_path / "killed")
    assert again == expected
