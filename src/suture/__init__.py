"""Edit open-weight models like code: diff, localize, patch, merge, realign.

The public names are loaded when they are first used, so that ``import suture`` costs nothing::

    import suture
    base, math, code = map(suture.open, ("base/", "math/", "code/"))
    tau = math - base                                    # lazy TaskVector
    mask = suture.localize(tau, rule="magnitude", density=0.05)
    merged = suture.merge(base, {"math": math, "code": code}, method="ties", density=0.2)
    suture.save(merged, "out/")                          # streams; nothing is read before this line
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "Mask": "mask",
    "MergeReport": "run",
    "Merged": "run",
    "METHODS": "merges",
    "MismatchError": "errors",
    "NonFiniteError": "errors",
    "OutputError": "errors",
    "PRESETS": "merges.presets",
    "ParamSpace": "roles",
    "Patch": "patch",
    "EVALS": "evals.table",
    "RULES": "importance",
    "RecipeError": "errors",
    "Stats": "stats",
    "SutureError": "errors",
    "TaskVector": "vector",
    "apply_patches": "patching",
    "compare": "suites.comparison",
    "evaluate": "suites.work",
    "extract_lora": "lowrank",
    "localize": "mask",
    "make_patch": "patching",
    "merge": "run",
    "open": "opening",
    "revert_patch": "patching",
    "role_of": "roles",
    "run_recipe": "run",
    "save": "run",
}
_NAMED = {"merge": "merged", "open": "open_model", "run_recipe": "merge"}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'suture' has no attribute {name!r}")
    if name in ("Checkpoint", "open"):  # what they give learns to subtract there
        import_module("suture.vector")
    return getattr(import_module(f"suture.{_HOMES[name]}"), _NAMED.get(name, name))


def __dir__() -> list[str]:
    return __all__
