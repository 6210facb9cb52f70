"""What the given models make of the rows, kept in the user's cache: asked once for all methods."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

import suture
from suture.errors import OutputError, SutureError
from suture.evals import Metric
from suture.finetune.outcome import data_digest
from suture.publish import appearing
from suture.realign.base import Job, Scores
from suture.realign.plan import Plan
from suture.spec import cache_folder

LOOKS = 1
"""Version of what scoring does; raise it with that, so that nothing stale is used again."""


def inputs_of(plan: Plan, job: Job, prints: Mapping[str, str], name: str) -> list[Any]:
    """All that the bits of the scores of ``aligned`` or ``tuned`` follow from, as plain data."""
    rows = [None if plan.rows is None else plan.rows.reported.rows, plan.utility]
    device = torch.device(plan.device)
    kind = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else torch.backends.cpu.get_cpu_capability())  # fmt: skip
    own = {} if name == "aligned" else {
        "tuned": [[prints[f"models.{m}"], w] for m, w in plan.recipe.weights.items()],
        "fuse": asdict(plan.recipe.fusing), "names": list(job.names),
    }  # fmt: skip
    return [
        LOOKS, suture.__version__, version("torch"), version("transformers"), plan.device, kind,
        torch.get_num_threads(), job.settings.batch, prints["aligned"], plan.models.aligned.config,
        [None if r is None else [data_digest(r), r.pad] for r in rows], own,
    ]  # fmt: skip


def remembered(inputs: list[Any], make: Callable[[], Scores]) -> Scores:
    """The scores that follow from these inputs: those of an earlier run, or made and kept now.

    A file that is damaged is none, and a cache that takes no file is no error.
    """
    path = cache_folder() / "scores" / _hash(json.dumps(inputs, sort_keys=True, default=str))
    with suppress(OSError, ValueError, SutureError):
        check, _, text = path.read_text(encoding="utf-8").partition("\n")
        if check == _hash(text):
            return {name: Metric.read(raw) for name, raw in json.loads(text).items()}
    found = make()
    text = json.dumps({name: asdict(metric) for name, metric in found.items()})
    with suppress(OutputError), appearing(path) as file:
        file.write(f"{_hash(text)}\n{text}".encode())
    return found


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


__all__ = ["LOOKS", "inputs_of", "remembered"]
