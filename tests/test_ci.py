"""The look at the demo's page by which continuous integration judges it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LOOK = Path(__file__).parents[1] / ".ci" / "look"
SECTIONS = (
    "glance",
    "moved",
    "localization",
    "merges",
    "safety",
    "safety-2",
    "realignment",
    "provenance",
)
RULES = "What became of the rules"


def page(
    where: Path, *, sections: tuple[str, ...] = SECTIONS, figures: int = 8, specs: int | None = None,
    held: tuple[tuple[str, str], ...] = (("average", "BROKEN"), ("somf", "yes")),
) -> Path:  # fmt: skip
    """A page as Suture writes it, as far as it is looked at."""
    rows = "".join(
        f"<tr><td>{model}</td><td>a &gt;= 1</td><td>{word}</td></tr>" for model, word in held
    )
    table = f"<table><caption>{RULES}</caption><tbody>{rows}</tbody></table>"
    drawn = [{"light": {"a": 1}, "dark": {"a": 1}}] * (figures if specs is None else specs)
    body = "".join(f"<section id='{name}'></section>" for name in sections)
    where.write_text(
        f"<!doctype html><body>{body}{'<figure><p>x</p></figure>' * figures}{table}"
        f"<script type='application/json' id='specs'>{json.dumps(drawn)}</script></body>"
    )
    return where


def look(path: Path) -> tuple[int, str]:
    """The exit status of the look, and what it complains of."""
    done = subprocess.run([sys.executable, LOOK, path], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_a_whole_page_passes(tmp_path: Path) -> None:
    """All sections, enough figures, a gate that broke and one that held."""
    assert look(page(tmp_path / "page.html")) == (0, "")


@pytest.mark.parametrize(("change", "told"), [
    ({"sections": SECTIONS[:-1]}, "no section 'provenance'"),
    ({"figures": 7}, "7 figures, at least 8 expected"),
    ({"specs": 3}, "3 drawings in two themes for 8 figures"),
    ({"held": (("average", "BROKEN"), ("somf", "yes"), ("somf", "BROKEN"))}, "no model passed a gate"),
    ({"held": (("average", "yes"), ("somf", "yes"))}, "no model broke a gate"),
    ({"held": ()}, "no model passed a gate"),
])  # fmt: skip
def test_what_a_page_lacks_fails_the_look(
    change: dict[str, object], told: str, tmp_path: Path
) -> None:
    """Each promise of the demo by itself."""
    code, complaint = look(page(tmp_path / "page.html", **change))  # type: ignore[arg-type]
    assert code == 1
    assert told in complaint
