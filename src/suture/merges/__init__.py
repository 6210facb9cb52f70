"""Several task vectors in, one out: the table of merge methods."""

from __future__ import annotations

from importlib.metadata import entry_points

from suture.errors import RecipeError, did_you_mean
from suture.merges.base import (
    Beside,
    Context,
    Curve,
    Merge,
    Method,
    Parameter,
    PerModel,
    Scalar,
    Value,
    each,
)
from suture.merges.consensus import consensus
from suture.merges.dare import dare_linear, dare_ties
from suture.merges.given import check_words, settings
from suture.merges.led import led
from suture.merges.linear import linear, passthrough, slerp, task_arithmetic
from suture.merges.measured import fisher_merging, regmean
from suture.merges.overlap import ram, ramplus_tl, sce
from suture.merges.pairs import arcee_fusion, nearswap
from suture.merges.sparse import breadcrumbs, breadcrumbs_ties, della, della_linear
from suture.merges.spectral import iso_c, iso_cts, tsv_merge
from suture.merges.sphere import karcher, multislerp, nuslerp
from suture.merges.stitch import stitch
from suture.merges.stock import model_stock
from suture.merges.ties import ties

__all__ = [
    "METHODS", "Beside", "Context", "Curve", "Merge", "Method", "Parameter", "PerModel", "Scalar",
    "Value", "check_words", "each", "method", "settings",
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
        Method(led, "LED-Merging", "Ma et al. 2025, arXiv:2502.16770", random=True),
        Method(fisher_merging, "Fisher merging", "Matena and Raffel 2022, arXiv:2111.09832"),
        Method(regmean, "RegMean", "Jin et al. 2023, arXiv:2212.09849"),
        Method(passthrough, "Passthrough", "Goddard et al. 2024, arXiv:2403.13257",
               needs_base=False, most=1),
        Method(breadcrumbs, "Model Breadcrumbs", "Davari and Belilovsky 2024, arXiv:2312.06795"),
        Method(breadcrumbs_ties, "Model Breadcrumbs with TIES",
               "Davari and Belilovsky 2024, arXiv:2312.06795"),
        Method(della, "DELLA", "Deep et al. 2024, arXiv:2406.11617", random=True),
        Method(della_linear, "DELLA without a vote", "Deep et al. 2024, arXiv:2406.11617",
               random=True),
        Method(sce, "SCE", "Wan et al. 2024, arXiv:2408.07990"),
        Method(ram, "Reinforced Agent Merging", "2026, arXiv:2601.13572"),
        Method(ramplus_tl, "Reinforced Agent Merging Plus, tensor by tensor",
               "2026, arXiv:2601.13572"),
        Method(model_stock, "Model Stock", "Jang et al. 2024, arXiv:2403.19522", least=2),
        Method(slerp, "SLERP", "Shoemake 1985, doi:10.1145/325165.325242", needs_base=False,
               least=2, most=2, ordered=True),
        Method(nuslerp, "SLERP of models or task vectors",
               "Shoemake 1985, doi:10.1145/325165.325242", needs_base=False, optional_base=True,
               least=2, most=2),
        Method(multislerp, "Mean direction of many models",
               "Goddard 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
               needs_base=False, optional_base=True),
        Method(karcher, "Karcher mean", "2026, arXiv:2603.04972", needs_base=False),
        Method(nearswap, "NearSwap",
               "alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
               most=1),
        Method(arcee_fusion, "Arcee Fusion", "as in mergekit 0.1.5 (2026), https://arcee.ai",
               most=1),
        Method(tsv_merge, "TSV-Merge (task singular vectors)",
               "Gargiulo et al. 2025, arXiv:2412.00081", tensorwise=True),
        Method(iso_c, "Iso-C (isotropic merging)", "Marczak et al. 2025, arXiv:2502.04959",
               tensorwise=True),
        Method(iso_cts, "Iso-CTS (isotropic, common and task-specific)",
               "Marczak et al. 2025, arXiv:2502.04959", tensorwise=True),
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
