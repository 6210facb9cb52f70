"""What a merge was: inputs, recipe and result as plain data, for ``suture.json`` and the card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.linearized import PLAIN, check_forms
from suture.checkpoints.vocabulary import UNION
from suture.errors import Problems
from suture.merges.apply import Outcome, checkpoint_fingerprint
from suture.merges.base import spelled
from suture.runs.envelope import adapter_place, portable
from suture.runs.place import SCHEMA
from suture.schema.paths import place_of
from suture.tensors.spec import WORD_OF
from suture.verbs.merge.plan import Plan, input_paths
from suture.verbs.merge.slices import takes_files
from suture.version import __version__


def provenance(plan: Plan, outcome: Outcome, out: Path) -> dict[str, Any]:
    """What ``suture.json`` holds: enough to make the same tensors again, and to know it."""
    recipe = plan.recipe.resolved()
    paths = _place_inputs(recipe, plan, out)
    for name, stage in plan.ordered.items():
        _place_inputs(recipe["stages"][name], stage, out)
    tokenizer = plan.recipe.tokenizer
    if tokenizer is not None and tokenizer.source not in (UNION, *plan.inputs):
        folder = place_of(tokenizer.source, plan.recipe.folder)
        recipe["tokenizer"]["source"] = os.path.relpath(folder.resolve(), out)
    dtypes: dict[str, int] = {}
    for spec in plan.specs.values():
        word = WORD_OF.get(spec.dtype, spec.dtype)
        dtypes[word] = dtypes.get(word, 0) + spec.numel
    return {
        "suture": __version__,
        "schema": SCHEMA,
        "kind": "merge",
        **_marks(plan),
        **_form(plan),
        "recipe": recipe,
        "inputs": {
            label: {"path": paths[label], "fingerprint": outcome.fingerprints[label],
                    "tensors": len(c), "bytes": c.nbytes, **_made_of(c, out)}
            for label, c in plan.inputs.items()
        },
        "output": {
            "fingerprint": outcome.fingerprints["output"],
            "tensors": len(plan.specs),
            "bytes": plan.nbytes,
            "dtypes": dtypes,
        },
        "results": {
            "merged_tensors": plan.merged,
            "copied_tensors": len(plan.specs) - plan.merged,
            "moved": sum(outcome.moved.values()),
            "writeback_loss": outcome.writeback_loss,
            **outcome.facts,
        },
        "notes": list(plan.notes),
    }  # fmt: skip


def _marks(plan: Plan) -> dict[str, Any]:
    """The mark of what must not be passed on, and the inputs that it comes from."""
    found = [label for label, c in plan.inputs.items() if c.restricted]
    found += [m for b in plan.beside for m in b.restricted if m not in found]
    return {"restricted": True, "withheld": list(dict.fromkeys(found))} if found else {}


def _place_inputs(recipe: dict[str, Any], plan: Plan, out: Path) -> dict[str, str]:
    """Write into a recipe where its models and files are, seen from the output.

    Stages keep their names.
    """
    told = input_paths(plan.recipe)
    paths = {
        label: told[label] if label in plan.made else portable(c, out)
        for label, c in plan.inputs.items()
    }
    if recipe["base"] is not None:
        recipe["base"] = paths["base"]
    for name, entry in recipe["models"].items():
        entry["path"] = paths[name]
    if plan.recipe.protect is not None:
        moved = plan.recipe.protect.placed(lambda path: _file(path, out))
        recipe["protect"] = moved.plain()
    for name in [n for n in recipe["parameters"] if takes_files(plan.recipe.method, n)]:
        files = plan.recipe.parameters.get(name)
        if isinstance(files, Mapping):
            recipe["parameters"][name] = {m: _file(f, out) for m, f in files.items()}
        elif files is not None:
            recipe["parameters"][name] = _file(files, out)
    return paths


def _file(source: Any, out: Path) -> str:
    """A file of masks or statistics, seen from the output; by its name where it is in memory."""
    in_file = isinstance(source, str | os.PathLike)
    return os.path.relpath(source, out) if in_file else spelled(source)


def _form(plan: Plan) -> dict[str, str]:
    """How the output is to be read, where that is not plainly."""
    tuned = {n: c for n, c in plan.inputs.items() if n != "base"}
    form = check_forms(tuned, Problems())
    found = {"form": form.kind, "adapter": form.adapter}
    return {k: v for k, v in found.items() if v not in ("", PLAIN)}


def _made_of(checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
    """The base and the adapters of a model that is put together, with the adapters' digests."""
    if checkpoint.put_on is None:
        return {}
    whole = checkpoint
    while whole.put_on is not None:
        whole = whole.put_on
    adapters = [{"path": adapter_place(a, out), "fingerprint": checkpoint_fingerprint(a.weights)}
                for a in checkpoint.adapters]  # fmt: skip
    return {"made_of": {"base": portable(whole, out), "adapters": adapters}}
