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

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inspect import Signature

    from suture.algebra import diff, inspect, localize, measure, merge, open, save
    from suture.api import (
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
    from suture.checkpoint import Checkpoint
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
    from suture.finetune.load import load_tuned
    from suture.finetune.strategies import STRATEGIES
    from suture.importance import RULES
    from suture.mask import Mask
    from suture.merged import Merged
    from suture.merges import METHODS
    from suture.merges.presets import PRESETS
    from suture.patch import Patch
    from suture.realign.methods import REALIGNERS
    from suture.roles import ParamSpace, role_of
    from suture.run import MergeReport
    from suture.stats import Stats
    from suture.vector import TaskVector
    from suture.version import __version__


_HOMES = {
    "__version__": "version",
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "EVALS": "evals.table",
    "METHODS": "merges",
    "Mask": "mask",
    "MergeReport": "run",
    "Merged": "merged",
    "Metric": "evals.base",
    "MismatchError": "errors",
    "MissingExtraError": "errors",
    "NonFiniteError": "errors",
    "OutputError": "errors",
    "PRESETS": "merges.presets",
    "ParamSpace": "roles",
    "Patch": "patch",
    "REALIGNERS": "realign.methods",
    "RULES": "importance",
    "RecipeError": "errors",
    "STRATEGIES": "finetune.strategies",
    "Stats": "stats",
    "SutureError": "errors",
    "TaskVector": "vector",
    "VERBS": "api",
    "analyze": "api",
    "apply_patches": "api",
    "audit": "api",
    "bench": "api",
    "blame": "api",
    "compare": "api",
    "diff": "algebra",
    "evaluate": "api",
    "extract_lora": "api",
    "finetune": "api",
    "inspect": "algebra",
    "load_tuned": "finetune.load",
    "localize": "algebra",
    "localize_recipe": "api",
    "make_patch": "api",
    "measure": "algebra",
    "merge": "algebra",
    "merge_recipe": "api",
    "open": "algebra",
    "patch_apply": "api",
    "patch_make": "api",
    "patch_revert": "api",
    "realign": "api",
    "report": "api",
    "revert_patch": "api",
    "role_of": "roles",
    "run_recipe": "api",
    "save": "algebra",
}
_BESIDE = ("analyze", "audit", "bench", "finetune", "measure", "realign", "report")
"""Verbs whose name a module has too: that module is called like the verb. Once it lies elsewhere,
its name leaves this list, and `suture.finetune` is the function itself."""

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


class _VerbModule(ModuleType):
    """A module that is called like the verb of its name: ``suture.finetune(recipe, out)``."""

    @property
    def _verb(self) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(f"suture.{_HOMES[name]}"), name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._verb(*args, **options)

    @property
    def __signature__(self) -> "Signature":
        from inspect import signature

        return signature(self._verb)


class _Package(ModuleType):
    """The package, which makes those modules callable when they are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _BESIDE and type(value) is ModuleType:
            value.__class__ = _VerbModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'suture' has no attribute {name!r}")
    if name in _BESIDE:
        return import_module(f"suture.{name}")
    return getattr(import_module(f"suture.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
