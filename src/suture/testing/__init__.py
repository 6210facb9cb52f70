"""Tests for those who write methods: the laws that every merge method keeps.

In a test file of a plug-in::

    from my_package import MEDIAN
    from suture.testing import check_method

    def test_median_keeps_the_laws():
        check_method(MEDIAN)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from suture.errors import SutureError
from suture.merges.base import Method
from suture.testing.laws import cases, hold
from suture.testing.toys import Lab


def check_method(method: Method, folder: Path | None = None) -> int:
    """Hold a merge method against all laws, whether it is in the table, a plug-in, or neither.

    Small models are made and merged in a folder: one model alone comes back, inputs are left
    alone, threads, blocks and shards change no byte, and so on (see ``suture.testing.laws``).
    The method's ``example`` says with which parameters.

    Args:
        method: the line of a table.
        folder: an empty folder to work in; by default a temporary one.

    Returns:
        How many times a law was held.

    Raises:
        AssertionError: laws are broken; one line for each, with the parameters, the first tensor
            that is wrong, the number that came and the one that was expected.

    Examples:
        >>> from suture.merges.table import METHODS
        >>> check_method(METHODS["task_arithmetic"])
        17
    """
    if not isinstance(method, Method):
        raise TypeError(f"check_method takes a suture.merges.base.Method, not {method!r}")
    broken, held = [], 0
    with tempfile.TemporaryDirectory(prefix="suture-laws-") as made:
        for law, case in cases(method, Lab(Path(made) if folder is None else folder)):
            held += 1
            try:
                hold(law, case)
            except AssertionError as error:
                broken.append(str(error))
            except SutureError as error:
                broken.append(f"{method.name}: {law}: it is refused: {error}")
    if broken:
        raise AssertionError("\n".join(broken))
    return held


__all__ = ["check_method"]
