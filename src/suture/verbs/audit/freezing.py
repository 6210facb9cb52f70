"""Freezing: the attack again with entries that may not move, and where it goes instead."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from suture.merges.apply import checkpoint_fingerprint
from suture.verbs.audit.cells import Run, made_with
from suture.verbs.audit.metrics import Look, look_of
from suture.verbs.audit.regions import Atlas, overlap
from suture.verbs.audit.stitched import Change, Key, Region
from suture.verbs.audit.training import train


@dataclass(frozen=True)
class Frozen:
    """An attack that was not allowed to touch some entries."""

    look: Look
    share: float
    """Of the entries of the space that were frozen."""
    overlap: Mapping[str, Any]
    """Of the region found again at the new attacked model with the first one, beside nulls."""

    def plain(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"look": self.look.plain(), "frozen": self.share, "overlap": dict(self.overlap)}


def freezing(run: Run, atlas: Atlas, seed: int, suffix: str) -> dict[str, Frozen]:
    """The region frozen, as many random entries frozen, and all others frozen; as asked for."""
    how, recipe = run.recipe.freeze, run.recipe
    if how is None:
        return {}
    own = atlas.region(recipe.region, how.share)
    frozen: dict[str, Region] = {"region": own}
    if "random" in how.controls:
        frozen["random"] = atlas.control("random", how.share)
    if "others" in how.controls:
        frozen["others"] = own.inverted()
    found = {}
    for kind, region in frozen.items():
        key: Key = [made_with(), run.prints["aligned"], run.training(seed), region.key,
                    own.key, run.plan.asked["aligned"].key]  # fmt: skip

        def make(kind: str = kind, region: Region = region) -> Any:
            return _frozen(run, atlas, seed, f"{kind}{suffix}", region, own)

        raw = run.ledger.cell(("look", ""), f"freeze-{kind}{suffix}", key, make)
        look = look_of(raw["look"], run.plan.asked["aligned"].groups, recipe.evaluation.broken)
        found[kind] = Frozen(look, raw["share"], raw["overlap"])
    return found


def _frozen(
    run: Run, atlas: Atlas, seed: int, name: str, region: Region, own: Region
) -> dict[str, Any]:
    """Train, ask, find the region again; the model is removed, only numbers stay."""
    plan, recipe = run.plan, run.recipe
    where = plan.out / f"attacked-frozen-{name}"
    key: Key = [made_with(), run.prints["aligned"], run.training(seed), region.key]
    checkpoint = train(plan, run.ledger, where, seed, region.inverted(), f"frozen-{name}", key)
    one = run.distance("attacked", checkpoint, checkpoint_fingerprint(checkpoint))
    whole = Change(one.checkpoint, one.fingerprint, one.moved, None, True)
    net = run.net("aligned")
    net.place(whole, plan.names)
    look = net.ask(plan.asked["aligned"], lambda rows: None)
    again = run.atlas(one, seed)
    again.measure(recipe.region, recipe.main, lambda: net, whole)
    share = 0.2 if recipe.freeze is None else recipe.freeze.share
    theirs = again.region(recipe.region, share)
    found = overlap(own.make(), theirs.make(), again.control("magnitude", share).make())
    frozen = region.make()
    checkpoint.close()
    shutil.rmtree(where)
    if recipe.main == "attacked":  # those at the aligned model are the audit's own
        again.forget(recipe.region, recipe.main)
    return {"look": look, "share": frozen.density, "overlap": found}


__all__ = ["Frozen", "freezing"]
