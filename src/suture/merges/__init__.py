"""Several task vectors in, one out: the table of merge methods."""

from __future__ import annotations

from importlib.metadata import entry_points

from suture.errors import RecipeError, did_you_mean
from suture.merges.base import (
    Beside,
    Context,
    Merge,
    Method,
    Parameter,
    PerModel,
    Scalar,
    each,
    settings,
)
from suture.merges.consensus import consensus
from suture.merges.dare import dare_linear, dare_ties
from suture.merges.linear import linear, slerp, task_arithmetic
from suture.merges.measured import fisher_merging, regmean
from suture.merges.stitch import stitch
from suture.merges.ties import ties

__all__ = [
    "METHODS", "Beside", "Context", "Merge", "Method", "Parameter", "PerModel", "Scalar", "each",
    "method", "settings",
]  # fmt: skip

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method(linear, "Linear (model soup)", "Wortsman et al. 2022, arXiv:2203.05482",
               needs_base=False),
        Method(task_arithmetic, "Task arithmetic", "Ilharco et al. 2023, arXiv:2212.04089"),
        Method(ties, "TIES", "Yadav et al. 2023, arXiv:2306.01708"),
        Method(dare_linear, "DARE", "Yu et al. 2024, arXiv:2311.03099", random=True),
        Method(dare_ties, "DARE with TIES", "Yu et al. 2024, arXiv:2311.03099", random=True),
        Method(consensus, "Consensus (TALL masks)", "Wang et al. 2024, arXiv:2405.07813"),
        Method(stitch, "Localize-and-Stitch", "He et al. 2025, arXiv:2408.13656"),
        Method(fisher_merging, "Fisher merging", "Matena and Raffel 2022, arXiv:2111.09832"),
        Method(regmean, "RegMean", "Jin et al. 2023, arXiv:2212.09849"),
        Method(slerp, "SLERP", "Shoemake 1985, doi:10.1145/325165.325242", needs_base=False,
               least=2, most=2, ordered=True),
    )
}  # fmt: skip
"""Every merge method. Another package adds one by an entry point ``suture.methods``."""


def method(name: str) -> Method:
    """Look up a merge method.

    Raises:
        RecipeError: there is none of this name; the message names the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    for point in entry_points(group="suture.methods", name=name):
        found = point.load()
        if isinstance(found, Method):
            return found
    raise RecipeError(f"no merge method {name!r}; {did_you_mean(name, list(METHODS))}")
