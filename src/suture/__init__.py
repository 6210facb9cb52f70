"""Edit open-weight models like code: diff, localize, patch, merge, realign.

This is the whole public API; docs/api.md lists it, and everything else is private. The names are
loaded when they are first used, so that ``import suture`` costs nothing::

    import suture
    base, math, code = map(suture.open, ("base/", "math/", "code/"))
    tau = math - base                                    # lazy TaskVector
    mask = suture.localize(tau, rule="magnitude", density=0.05)
    merged = suture.merge(base, {"math": math, "code": code}, method="ties", density=0.2)
    suture.save(merged, "out/")                          # streams; nothing is read before this line
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from suture.api.algebra import diff, inspect, localize, measure, merge, open, save
    from suture.api.verbs import (
        VERBS,
        analyze,
        apply_patches,
        audit,
        bench,
        blame,
        compare,
        evaluate,
        extract_lora,
        finetune,
        localize_recipe,
        make_patch,
        merge_recipe,
        patch_apply,
        patch_make,
        patch_revert,
        realign,
        report,
        revert_patch,
        run_recipe,
    )
    from suture.checkpoints.checkpoint import Checkpoint
    from suture.edits.importance import RULES
    from suture.edits.mask import Mask
    from suture.edits.patch import Patch
    from suture.edits.stats import Stats
    from suture.errors import (
        CheckpointError,
        MismatchError,
        MissingExtraError,
        NonFiniteError,
        OutputError,
        RecipeError,
        SutureError,
    )
    from suture.evals.base import Metric
    from suture.evals.table import EVALS
    from suture.merges.presets import PRESETS
    from suture.merges.table import METHODS
    from suture.stream.vector import TaskVector
    from suture.tensors.roles import ParamSpace, role_of
    from suture.training.load import load_tuned
    from suture.training.strategies import STRATEGIES
    from suture.verbs.merge.lazy import Merged
    from suture.verbs.merge.result import MergeReport
    from suture.verbs.realign.methods import REALIGNERS
    from suture.version import __version__


_HOMES = {
    "__version__": "version",
    "Checkpoint": "checkpoints.checkpoint",
    "CheckpointError": "errors",
    "EVALS": "evals.table",
    "METHODS": "merges.table",
    "Mask": "edits.mask",
    "MergeReport": "verbs.merge.result",
    "Merged": "verbs.merge.lazy",
    "Metric": "evals.base",
    "MismatchError": "errors",
    "MissingExtraError": "errors",
    "NonFiniteError": "errors",
    "OutputError": "errors",
    "PRESETS": "merges.presets",
    "ParamSpace": "tensors.roles",
    "Patch": "edits.patch",
    "REALIGNERS": "verbs.realign.methods",
    "RULES": "edits.importance",
    "RecipeError": "errors",
    "STRATEGIES": "training.strategies",
    "Stats": "edits.stats",
    "SutureError": "errors",
    "TaskVector": "stream.vector",
    "VERBS": "api.verbs",
    "analyze": "api.verbs",
    "apply_patches": "api.verbs",
    "audit": "api.verbs",
    "bench": "api.verbs",
    "blame": "api.verbs",
    "compare": "api.verbs",
    "diff": "api.algebra",
    "evaluate": "api.verbs",
    "extract_lora": "api.verbs",
    "finetune": "api.verbs",
    "inspect": "api.algebra",
    "load_tuned": "training.load",
    "localize": "api.algebra",
    "localize_recipe": "api.verbs",
    "make_patch": "api.verbs",
    "measure": "api.algebra",
    "merge": "api.algebra",
    "merge_recipe": "api.verbs",
    "open": "api.algebra",
    "patch_apply": "api.verbs",
    "patch_make": "api.verbs",
    "patch_revert": "api.verbs",
    "realign": "api.verbs",
    "report": "api.verbs",
    "revert_patch": "api.verbs",
    "role_of": "tensors.roles",
    "run_recipe": "api.verbs",
    "save": "api.algebra",
}
__all__ = [
    "EVALS",
    "METHODS",
    "PRESETS",
    "REALIGNERS",
    "RULES",
    "STRATEGIES",
    "VERBS",
    "Checkpoint",
    "CheckpointError",
    "Mask",
    "MergeReport",
    "Merged",
    "Metric",
    "MismatchError",
    "MissingExtraError",
    "NonFiniteError",
    "OutputError",
    "ParamSpace",
    "Patch",
    "RecipeError",
    "Stats",
    "SutureError",
    "TaskVector",
    "__version__",
    "analyze",
    "apply_patches",
    "audit",
    "bench",
    "blame",
    "compare",
    "diff",
    "evaluate",
    "extract_lora",
    "finetune",
    "inspect",
    "load_tuned",
    "localize",
    "localize_recipe",
    "make_patch",
    "measure",
    "merge",
    "merge_recipe",
    "open",
    "patch_apply",
    "patch_make",
    "patch_revert",
    "realign",
    "report",
    "revert_patch",
    "role_of",
    "run_recipe",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'suture' has no attribute {name!r}")
    return getattr(import_module(f"suture.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
