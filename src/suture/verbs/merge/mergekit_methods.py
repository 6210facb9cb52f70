"""What mergekit calls the parameters of each method, and the conventions behind its words.

Pure data: the reader of recipes finds here, for every method of mergekit 0.1.5, under which name we
have a number, what mergekit's default is, and what follows from its switches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

REQUIRED = None
"""In the place of a default: mergekit has none."""


class Same(NamedTuple):
    """A number of mergekit's, under the name that Suture has for it."""

    name: str
    """Empty where the number changes nothing here."""
    default: float | None = REQUIRED


class Kit(NamedTuple):
    """How a method of mergekit is said in Suture's terms."""

    own: Mapping[str, Same] = {}
    """Numbers of each model."""
    shared: Mapping[str, Same] = {}
    """Numbers of the merge."""
    flags: Mapping[str, bool] = {}
    """What is true or false, with mergekit's default."""
    fixed: Callable[[Mapping[str, bool]], dict[str, Any]] = lambda flags: {}
    """What else Suture must be told, given the flags."""
    base: str = "difference"
    """What the base is: the start of a ``difference``, one ``more`` model, or the ``first``."""
    method: str | None = None
    """Suture's name of the method, where it is another."""


Flags = Mapping[str, bool]


def _summed(flags: Flags) -> dict[str, Any]:
    return {"normalize": flags["normalize"]}


def _elected(flags: Flags) -> dict[str, Any]:
    """Agreeing entries are divided by the sum of their weights, or not; a vote of 0 is plus."""
    return {"aggregate": "weighted_mean" if flags["normalize"] else "sum", "zero_sign": "positive"}


def _rescaled(flags: Flags) -> dict[str, Any]:
    return {"rescale": "l1" if flags["rescale"] else "none"}


def _tensor(flags: Flags) -> dict[str, Any]:
    return {"scope": "tensor", "rounding": "floor"}


def _all(*parts: Callable[[Flags], dict[str, Any]]) -> Callable[[Flags], dict[str, Any]]:
    return lambda flags: {k: v for part in parts for k, v in part(flags).items()}


def _variance(flags: Flags) -> dict[str, Any]:
    return {"counted": "nonzero", "rounding": "floor", "zero_sign": "positive",
            "equal_below": 1e-6}  # fmt: skip


def _stock(flags: Flags) -> dict[str, Any]:
    over = "row" if flags["filter_wise"] else "tensor"
    return {"over": over, "clamp": False, "least_norm": 1e-6}


def _vectors(flags: Flags) -> dict[str, Any]:
    # "Row-wise" puts the first axis last and takes what then stands in it: our columns.
    if flags["nuslerp_flatten"]:
        return {"over": "tensor"}
    return {"over": "column" if flags["nuslerp_row_wise"] else "row"}


_WEIGHT = {"weight": Same("weight")}
_DENSE = {**_WEIGHT, "density": Same("density", 1.0)}
_CRUMBS = {**_DENSE, "gamma": Same("gamma", 0.01)}
_RANKED = {**_DENSE, "epsilon": Same("epsilon", 0.15)}
_LAMBDA = {"lambda": Same("scale", 1.0)}
_PLAIN = {"normalize": False, "rescale": False}
_RESCALED = {"normalize": False, "rescale": True}
KITS: dict[str, Kit] = {
    "linear": Kit(_WEIGHT, {}, {"normalize": True}, _summed, "more"),
    "task_arithmetic": Kit({**_WEIGHT, "density": Same("", 1.0)}, _LAMBDA, _PLAIN, _summed),
    "ties": Kit(_DENSE, _LAMBDA, {"normalize": True, "rescale": False},
                _all(_elected, _tensor, _rescaled)),
    "dare_linear": Kit(_DENSE, _LAMBDA, _RESCALED, _all(_summed, _rescaled)),
    "dare_ties": Kit(_DENSE, _LAMBDA, _RESCALED, _all(_elected, _rescaled)),
    "breadcrumbs": Kit(_CRUMBS, _LAMBDA, _PLAIN, _all(_summed, _tensor, _rescaled)),
    "breadcrumbs_ties": Kit(_CRUMBS, _LAMBDA, _PLAIN, _all(_elected, _tensor, _rescaled)),
    "della": Kit(_RANKED, _LAMBDA, {"normalize": True, "rescale": True},
                 _all(_elected, _rescaled)),
    "della_linear": Kit(_RANKED, _LAMBDA, _RESCALED, _all(_summed, _rescaled)),
    "sce": Kit({}, {"select_topk": Same("density", 1.0)}, {}, _variance),
    "ram": Kit({}, {"epsilon": Same("epsilon", 1e-5)}),
    "ramplus_tl": Kit({}, {"r": Same("gain", 0.1), "alpha": Same("most", 0.2),
                           "epsilon": Same("epsilon", 1e-5)}),
    "model_stock": Kit({}, {}, {"filter_wise": False}, _stock),
    "slerp": Kit({}, {"t": Same("t")}, base="first"),
    "nuslerp": Kit(_WEIGHT, {}, {"nuslerp_row_wise": False, "nuslerp_flatten": True}, _vectors),
    "multislerp": Kit(_WEIGHT, {"eps": Same("", 1e-8)}, {"normalize_weights": True},
                      lambda flags: {"normalize": flags["normalize_weights"]}),
    "karcher": Kit({}, {"max_iter": Same("max_iter", 10), "tol": Same("tolerance", 1e-5)},
                   base="more"),
    "nearswap": Kit({}, {"t": Same("t")}),
    "arcee_fusion": Kit(fixed=lambda flags: {"spread": 1.5}),
    "passthrough": Kit({"scale": Same("scale", 1.0)}, base="more"),
}  # fmt: skip
"""Every method of mergekit 0.1.5."""

__all__ = ["KITS", "REQUIRED", "Kit", "Same"]
