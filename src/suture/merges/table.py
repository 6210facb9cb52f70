"""Several task vectors in, one out: the table of merge methods."""

from __future__ import annotations

from suture.merges.base import Beside, Context, Example, Merge, Method
from suture.merges.consensus import consensus
from suture.merges.dare import dare_linear, dare_ties
from suture.merges.led import led
from suture.merges.linear import linear, passthrough, slerp, task_arithmetic
from suture.merges.measured import fisher_merging, regmean
from suture.merges.model_stock import model_stock
from suture.merges.overlap import ram, ramplus_tl, sce
from suture.merges.pairs import arcee_fusion, nearswap
from suture.merges.sparse import breadcrumbs, breadcrumbs_ties, della, della_linear
from suture.merges.spectral import iso_c, iso_cts, tsv_merge
from suture.merges.sphere import karcher, multislerp, nuslerp
from suture.merges.stitch import stitch
from suture.merges.ties import ties
from suture.schema.table import Table

__all__ = ["METHODS", "Beside", "Context", "Example", "Merge", "Method"]

WHOLE = {"density": 1.0}
METHODS = Table("merge method", Method, (
    Method(linear, "Linear (model soup)", "Wortsman et al. 2022, arXiv:2203.05482",
           needs_base=False, averages=True),
    Method(task_arithmetic, "Task arithmetic", "Ilharco et al. 2023, arXiv:2212.04089"),
    Method(ties, "TIES", "Yadav et al. 2023, arXiv:2306.01708", example=Example(
        WHOLE, lively=(
            {"density": 0.3},
            {"density": 0.3, "scope": "layer", "elect": "count", "rounding": "floor"},
            {"density": 0.3, "votes": "equal", "aggregate": "weighted_mean"},
        ), together=(
            {"density": 0.3, "scope": "tensor", "zero_sign": "majority", "aggregate": "max"},
            {"density": 0.3, "scope": "tensor", "zero_sign": "majority", "rescale": "l1"},
        ))),
    Method(dare_linear, "DARE", "Yu et al. 2024, arXiv:2311.03099", random=True,
           example=Example(WHOLE, ({"density": 0.4}, {"density": 0.4, "rescale": "l1"}))),
    Method(dare_ties, "DARE with TIES", "Yu et al. 2024, arXiv:2311.03099", random=True,
           example=Example(WHOLE, ({"density": 0.4}, {"density": 0.4, "rescale": "l1"}))),
    Method(consensus, "Consensus (TALL masks)", "Wang et al. 2024, arXiv:2405.07813",
           example=Example({"min_tasks": 1}, apart={"min_tasks": 1})),
    Method(stitch, "Localize-and-Stitch", "He et al. 2025, arXiv:2408.13656",
           example=Example(WHOLE, ({"density": 0.3}, {"density": 0.3, "scope": "tensor"}))),
    Method(led, "LED-Merging", "Ma et al. 2025, arXiv:2502.16770", random=True, mixes=True,
           example=Example({"density": 1.0, "elect": "either"}, lively=(
               {},
               {"density": 0.6, "elect": "expert", "disjoint": "priority"},
               {"density": 0.6, "rule": "random"},
               {"density": 0.6, "rule": "magnitude", "scope": "global"},
           ), drawing={"rule": "random"}, files=("stats", "base_stats"))),
    Method(fisher_merging, "Fisher merging", "Matena and Raffel 2022, arXiv:2111.09832",
           averages=True, example=Example(together=({"normalize": True},), files=("stats",))),
    Method(regmean, "RegMean", "Jin et al. 2023, arXiv:2212.09849", averages=True,
           example=Example(files=("stats",))),
    Method(passthrough, "Passthrough", "Goddard et al. 2024, arXiv:2403.13257",
           needs_base=False, most=1, mixes=True,
           example=Example({"scale": 1.0}, ({"scale": 0.9},))),
    Method(breadcrumbs, "Model Breadcrumbs", "Davari and Belilovsky 2024, arXiv:2312.06795",
           example=Example(WHOLE, ({"density": 0.4, "gamma": 0.1},
                                   {"density": 0.4, "scope": "global", "rescale": "l1"}))),
    Method(breadcrumbs_ties, "Model Breadcrumbs with TIES",
           "Davari and Belilovsky 2024, arXiv:2312.06795",
           example=Example(WHOLE, ({"density": 0.4, "gamma": 0.1},
                                   {"density": 0.4, "rounding": "floor", "votes": "equal"}))),
    Method(della, "DELLA", "Deep et al. 2024, arXiv:2406.11617", random=True,
           example=Example(WHOLE, ({"density": 0.4, "epsilon": 0.2},
                                   {"density": 0.6, "epsilon": 0.2, "rescale": "l1"}))),
    Method(della_linear, "DELLA without a vote", "Deep et al. 2024, arXiv:2406.11617",
           random=True, example=Example(WHOLE, (
               {"density": 0.4, "epsilon": 0.2}, {"density": 0.6, "rescale": "none", "seed": 3},
           ))),
    Method(sce, "SCE", "Wan et al. 2024, arXiv:2408.07990", mixes=True, example=Example(WHOLE, (
        {"density": 0.4}, {"density": 0.3, "counted": "nonzero", "rounding": "floor"}, WHOLE,
    ))),
    Method(ram, "Reinforced Agent Merging", "2026, arXiv:2601.13572",
           example=Example({"epsilon": 0.0}, ({"epsilon": 0.03},))),
    Method(ramplus_tl, "Reinforced Agent Merging Plus, tensor by tensor",
           "2026, arXiv:2601.13572",
           example=Example({"epsilon": 0.0}, ({"epsilon": 0.03, "gain": 2.0, "most": 2.0},))),
    Method(model_stock, "Model Stock", "Jang et al. 2024, arXiv:2403.19522", least=2,
           averages=True, example=Example(lively=({}, {"over": "row", "clamp": False}))),
    Method(slerp, "SLERP", "Shoemake 1985, doi:10.1145/325165.325242", needs_base=False,
           least=2, most=2, ordered=True, averages=True),
    Method(nuslerp, "SLERP of models or task vectors",
           "Shoemake 1985, doi:10.1145/325165.325242", needs_base=False, optional_base=True,
           least=2, most=2, averages=True,
           example=Example(lively=({}, {"over": "row"}, {"over": "column"}))),
    Method(multislerp, "Mean direction of many models",
           "Goddard 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
           needs_base=False, optional_base=True, averages=True),
    Method(karcher, "Karcher mean", "2026, arXiv:2603.04972", needs_base=False, averages=True),
    Method(nearswap, "NearSwap",
           "alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
           most=1, mixes=True, example=Example({"t": 100.0}, ({"t": 0.03},))),
    Method(arcee_fusion, "Arcee Fusion", "as in mergekit 0.1.5 (2026), https://arcee.ai",
           most=1, mixes=True, example=Example({"spread": -1e9}, ({"spread": 0.1},))),
    Method(tsv_merge, "TSV-Merge (task singular vectors)",
           "Gargiulo et al. 2025, arXiv:2412.00081", tensorwise=True, mixes=True),
    Method(iso_c, "Iso-C (isotropic merging)", "Marczak et al. 2025, arXiv:2502.04959",
           tensorwise=True, mixes=True, example=Example({"isotropy": 0.0})),
    Method(iso_cts, "Iso-CTS (isotropic, common and task-specific)",
           "Marczak et al. 2025, arXiv:2502.04959", tensorwise=True, mixes=True,
           example=Example({"isotropy": 0.0, "common": 1.0})),
), group="suture.methods")  # fmt: skip
"""Every merge method; another package adds one by an entry point, see docs/plugins.md."""
