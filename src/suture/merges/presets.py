"""The conventions of papers and tools, by name: a method, its parameters, and where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from suture.schema.table import Table


@dataclass(frozen=True)
class Preset:
    """Parameters that together are somebody's convention; what a recipe gives itself wins."""

    name: str
    method: str
    source: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    everything: bool = False
    """Whether token embeddings and output heads are merged, too."""
    note: str = ""
    """Where the source does otherwise than its own description."""

    def to_dict(self) -> dict[str, Any]:
        """What listings show, as plain data."""
        return {**vars(self), "parameters": dict(self.parameters)}


_MERGEKIT = "mergekit 0.1.5"
_PEFT = "PEFT 0.21, peft.utils.merge_utils"
_BENCH = "MergeBench, scripts/merge.sh"
_FLOOR = {"scope": "tensor", "rounding": "floor"}
_PLUS = {"zero_sign": "positive"}

PRESETS = Table("preset", Preset, (
    Preset("ties-paper", "ties", "Yadav et al. 2023, arXiv:2306.01708",
           {"density": 0.2, "scale": 1.0, "scope": "global", "elect": "mass",
            "aggregate": "mean", "zero_sign": "majority", "rounding": "round",
            "votes": "weighted", "rescale": "none"},
           note="the authors' code keeps one entry more, and all that are tied with it"),
    Preset("ties-mergekit", "ties", _MERGEKIT,
           {**_FLOOR, **_PLUS, "density": 1.0, "aggregate": "weighted_mean",
            "votes": "weighted", "rescale": "none"}, everything=True),
    Preset("ties-peft", "ties", _PEFT,
           {**_FLOOR, **_PLUS, "aggregate": "mean", "votes": "equal", "rescale": "none"},
           everything=True,
           note="PEFT has no default density, and merges the factors of adapters, not deltas"),
    Preset("dare-paper", "dare_linear", "Yu et al. 2024, arXiv:2311.03099",
           {"density": 0.1, "rescale": "density", "normalize": False},
           note="drop rate 0.9; the paper tries 0.1 to 0.99"),
    Preset("dare-ties-paper", "dare_ties", "Yu et al. 2024, arXiv:2311.03099",
           {"density": 0.1, "rescale": "density", "aggregate": "mean", "elect": "mass"}),
    Preset("dare-mergekit", "dare_linear", _MERGEKIT,
           {"density": 1.0, "rescale": "l1", "normalize": False}, everything=True),
    Preset("dare-ties-mergekit", "dare_ties", _MERGEKIT,
           {**_PLUS, "density": 1.0, "rescale": "l1", "aggregate": "sum",
            "votes": "weighted"}, everything=True),
    Preset("dare-peft", "dare_linear", _PEFT, {"rescale": "density", "normalize": False},
           everything=True),
    Preset("dare-ties-peft", "dare_ties", _PEFT,
           {**_PLUS, "rescale": "density", "aggregate": "mean", "votes": "equal"},
           everything=True),
    Preset("della-paper", "della", "Deep et al. 2024, arXiv:2406.11617",
           {"density": 0.7, "epsilon": 0.07, "scale": 1.1, "rescale": "probability",
            "elect": "mass", "aggregate": "mean"},
           note="drop rate 0.3, window 0.14"),
    Preset("della-mergekit", "della", _MERGEKIT,
           {**_PLUS, "density": 1.0, "epsilon": 0.15, "rescale": "l1",
            "aggregate": "weighted_mean", "votes": "weighted"}, everything=True),
    Preset("breadcrumbs-paper", "breadcrumbs", "Davari and Belilovsky 2024, arXiv:2312.06795",
           {"density": 0.14, "gamma": 0.01, "scale": 0.3, "scope": "tensor",
            "rescale": "none"}),
    Preset("breadcrumbs-mergekit", "breadcrumbs", _MERGEKIT,
           {**_FLOOR, "density": 1.0, "gamma": 0.01, "rescale": "none", "normalize": False},
           everything=True),
    Preset("consensus-paper", "consensus", "Wang et al. 2024, arXiv:2405.07813",
           {"tall_threshold": 0.4, "min_tasks": 2},
           note="the threshold is chosen for each task, from 0.2 to 0.6, on held-out data"),
    Preset("stitch-paper", "stitch", "He et al. 2025, arXiv:2408.13656",
           {"density": 0.05, "scale": 1.0, "scope": "global"}),
    Preset("led-paper", "led", "arXiv:2502.16770",
           {"density": 0.4, "weight": 1.0, "scale": 1.0, "elect": "both",
            "disjoint": "exclusive", "scope": "tensor", "rule": "snip"}, everything=True,
           note="densities are the models' own: 0.1 for safety, 0.4 for mathematics, 0.5 for "
           "code; the paper scores no biases"),
    Preset("led-released", "led", "the released code of arXiv:2502.16770",
           {"density": 0.4, "weight": 1.0, "scale": 1.0, "elect": "both",
            "disjoint": "exclusive", "scope": "tensor", "rule": "snip", "flip": True},
           everything=True,
           note="its scripts save most scores with the wrong sign, and so elect the least "
           "important entries; its tie rules are not followed"),
    Preset("led-released-head", "led", "the released code of arXiv:2502.16770, last version",
           {"density": 0.4, "weight": 1.0, "scale": 1.0, "disjoint": "exclusive",
            "scope": "tensor", "rule": "random"}, everything=True,
           note="the last version draws masks at random, which is the paper's ablation"),
    Preset("sce-paper", "sce", "Wan et al. 2024, arXiv:2408.07990",
           {"density": 0.1, "counted": "all", "equal_below": 0.0}),
    Preset("sce-mergekit", "sce", _MERGEKIT,
           {**_PLUS, "density": 1.0, "counted": "nonzero", "rounding": "floor",
            "equal_below": 1e-6}, everything=True),
    Preset("model-stock-paper", "model_stock", "Jang et al. 2024, arXiv:2403.19522",
           {"over": "tensor", "clamp": True, "least_norm": 0.0}),
    Preset("model-stock-mergekit", "model_stock", _MERGEKIT,
           {"over": "tensor", "clamp": False, "least_norm": 1e-6}, everything=True),
    Preset("mergebench-soup", "linear", _BENCH, {"normalize": True}),
    Preset("mergebench-task-arithmetic", "task_arithmetic", _BENCH, {"scale": 0.4}),
    Preset("mergebench-ties", "ties", _BENCH,
           {"density": 0.3, "scale": 0.4, "scope": "global", "aggregate": "sum",
            "zero_sign": "majority"},
           note="its code keeps one entry more, and counts the output head among all entries"),
    Preset("mergebench-dare", "dare_linear", _BENCH,
           {"density": 0.1, "scale": 0.4, "rescale": "density"}),
    Preset("mergebench-consensus", "consensus", _BENCH,
           {"tall_threshold": 0.2, "min_tasks": 2, "scale": 0.4}),
    Preset("mergebench-stitch", "stitch", "MergeBench", {"density": 0.1, "scope": "global"}),
))  # fmt: skip
"""Every preset; their parameters are checked with those of the recipe."""
