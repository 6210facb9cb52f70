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

from suture.checkpoints.atomic import appearing
from suture.errors import OutputError, SutureError
from suture.evals.base import Metric
from suture.tensors.spec import cache_folder
from suture.training.data import collate, data_digest
from suture.training.data import plan as batch_plan
from suture.training.kept import KeptStates, keep, positions
from suture.training.loop import groups_of
from suture.training.loss import to
from suture.verbs.realign.base import RealignJob, Scores
from suture.verbs.realign.pairs import Pairs, batches_of, positions_of
from suture.verbs.realign.plan import Plan
from suture.version import __version__

LOOKS = 2
"""Version of what scoring does; raise it with that, so that nothing stale is used again."""


def inputs_of(plan: Plan, job: RealignJob, prints: Mapping[str, str], name: str) -> list[Any]:
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
        LOOKS, __version__, version("torch"), version("transformers"), plan.device, kind,
        torch.get_num_threads(), job.settings.batch, prints["aligned"], plan.models.aligned.config,
        [None if r is None else [data_digest(r), r.pad] for r in rows], own,
    ]  # fmt: skip


def keep_for(plan: Plan, job: RealignJob) -> KeptStates | None:
    """Where the activations are kept that aligned, tuned and realigned models have in common.

    They are those under the lowest block that has a tensor in which the models differ.
    """
    if job.model is None:
        return None
    settings, size = job.settings, job.settings.batch
    asked: list[tuple[Pairs, list[list[int]]]] = []
    if plan.rows is not None:
        train = plan.rows.train
        if plan.recipe.line.trains:
            asked.append((train, groups_of([len(row) for row in train.leading.ids], settings)))
        sides = {id(s): s for s in (plan.rows.validation, plan.rows.reported) if len(s)}
        asked += [(side, batches_of(side, size)) for side in sides.values()]
    rows = sum(2 * len(pairs) for pairs, _ in asked)
    places = sum(positions_of(pairs, groups) for pairs, groups in asked)
    first = [pairs.batch(groups[-1][:1]) for pairs, groups in asked]  # enough to compare bits on
    for data in {id(d): d for d in (plan.utility, plan.choosing) if d is not None}.values():
        lengths = [len(row) for row in data.ids]
        groups = batch_plan(lengths, size, seed=None)
        rows, places = rows + len(data), places + positions(lengths, groups)
        first.append(collate(data, groups[-1][:2]))
    if not first:
        return None
    return keep(
        job.model, list(job.parameters().values()), to(first[0], torch.device(job.device)),
        (rows, places), settings, folder=None if job.work is None else job.work / "activations",
        say=job.say,
    )  # fmt: skip


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


__all__ = ["LOOKS", "inputs_of", "keep_for", "remembered"]
