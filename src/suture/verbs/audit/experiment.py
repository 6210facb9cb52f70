"""One attack, looked at from all sides: the curve, the matrices, derivatives, freezing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from typing import Any

from suture.verbs.audit.cells import Run
from suture.verbs.audit.freezing import Frozen, freezing
from suture.verbs.audit.metrics import Look
from suture.verbs.audit.plan import more_looks
from suture.verbs.audit.regions import places
from suture.verbs.audit.stitched import Change, Net, Region
from suture.verbs.audit.verdicts import Found, fragility, regained


class Case:
    """What is measured of the attack of one seed."""

    def __init__(self, run: Run, seed: int, suffix: str) -> None:
        self.run, self.recipe, self.seed, self.suffix = run, run.recipe, seed, suffix
        self.one = run.attacked(seed, suffix)
        self.atlas = run.atlas(self.one, seed)
        self.outside = bool(set(self.one.moved) - set(run.plan.names))
        """Whether the attack has moved tensors in which no region lies."""
        if self.outside:
            run.ledger.pending["look", ""] += more_looks(self.recipe)

    def whole(self, outside: bool) -> Change:
        """The change of the attack, of the space or of everything."""
        return Change(self.one.checkpoint, self.one.fingerprint, self.one.moved, None, outside)

    def stitched(self, region: Region, outside: bool = False) -> Change:
        """The change within a region."""
        return Change(self.one.checkpoint, self.one.fingerprint, self.one.moved, region, outside)

    def ask(self, name: str, change: Change, ground: str = "aligned") -> Look:
        """The look at a stitched model."""
        return self.run.ask(f"{name}{self.suffix}", change, ground)

    def measured(self, aligned: Look, befores: Mapping[str, Look]) -> tuple[dict[str, Any], Found]:
        """Everything that the recipe asks for: as plain data, and as what verdicts are made of."""
        recipe, atlas = self.recipe, self.atlas
        attacked = self.ask("attacked", self.whole(self.outside))
        self._gradients()
        own = self._curve(f"region-{recipe.region}", partial(atlas.region, recipe.region), attacked)
        nulls: dict[str, dict[float, Look]] = {
            rule: self._curve(rule, partial(atlas.control, rule), attacked)
            for rule in recipe.controls
        }
        without = self._without()
        masks = {language: atlas.region(language, recipe.share) for language in recipe.languages}
        regions = {
            language: self.ask(f"region-{language}-{recipe.share:g}", self.stitched(region))
            for language, region in masks.items()
        }
        shared = None
        if len(masks) > 1:
            masks["shared"] = atlas.shared(recipe.share)
            shared = self.ask("shared", self.stitched(masks["shared"]))
        masks |= {rule: atlas.control(rule, recipe.share) for rule in ("magnitude", "random")}
        where = {n: self._place(n, r) for n, r in masks.items() if n != "random"}
        pairs = self._overlaps(masks)
        control, onto = self._control(), self._onto(befores)
        frozen = freezing(self.run, atlas, self.seed, self.suffix)
        found = Found(
            recipe.share, aligned, attacked, own, nulls, regions,
            {n: p for n, p in where.items() if n in regions or n == "magnitude"}, pairs, onto,
            {n: f.look for n, f in frozen.items()},
        )  # fmt: skip
        folder = self.run.plan.out / "regions"
        made = {
            "attacked": {
                "fingerprint": self.one.fingerprint, "distance": self.one.distance,
                "tensors": len(self.one.moved), "outside": self.outside, "look": attacked.plain(),
            },
            "gap": found.gap().plain(),
            "curve": {n: _points(c) for n, c in {"region": own, **nulls}.items()},
            "without": {n: _points(c) for n, c in without.items()},
            "repaired": {f"{q:g}": regained(found, k) for q, k in without["repair"].items()},
            "fragility": fragility(found),
            "transfer": {n: k.plain() for n, k in regions.items()},
            "shared": None if shared is None else shared.plain(),
            "overlaps": pairs,
            "rankings": self._rankings(),
            "places": where,
            "control": control,
            "onto": {n: {k: v.plain() for k, v in looks.items()} for n, looks in onto.items()},
            "freeze": _frozen(frozen),
            "files": atlas.publish(masks, folder / self.suffix.lstrip("-")),
        }  # fmt: skip
        return made, found

    def _curve(
        self, name: str, make: Callable[[float], Region], attacked: Look
    ) -> dict[float, Look]:
        """The aligned model with ever more of the change; all of it is the attacked model."""
        found = {}
        for q in sorted({*self.recipe.shares, self.recipe.share}):
            if q < 1:
                found[q] = self.ask(f"{name}-{q:g}", self.stitched(make(q)))
            else:
                found[q] = self.ask("everything", self.whole(False)) if self.outside else attacked
        return found

    def _without(self) -> dict[str, dict[float, Look]]:
        """All of the change but the region's: put on the aligned model, and left of the attack.

        The two differ only where the attack has moved tensors outside of the space.
        """
        found: dict[str, dict[float, Look]] = {"complement": {}, "repair": {}}
        for q in (q for q in self.recipe.shares if q < 1):
            rest = self.atlas.region(self.recipe.region, q).inverted()
            one = self.ask(f"complement-{q:g}", self.stitched(rest))
            found["complement"][q] = found["repair"][q] = one
            if self.outside:
                found["repair"][q] = self.ask(f"repair-{q:g}", self.stitched(rest, True))
        return found

    def _place(self, name: str, region: Region) -> dict[str, Any]:
        def make() -> Any:
            return places(region.make())

        found: dict[str, Any] = self.run.cell(
            f"places-{name}{self.suffix}", ["places", region.key], make
        )
        return found

    def _gradients(self) -> None:
        """The gradients of every language, where they are to be taken."""
        at = self.recipe.scores.at
        for language in self.recipe.languages:
            for where in ("attacked", "aligned") if at == "both" else (at,):
                self.atlas.measure(language, where, self._net, self.whole(self.outside))

    def _net(self) -> Net:
        return self.run.net("aligned")

    def _overlap(self, name: str, one: Region, other: Region, large: Region) -> dict[str, Any]:
        return self.run.overlap(f"{name}{self.suffix}", one, other, large)

    def _overlaps(self, masks: Mapping[str, Region]) -> list[dict[str, Any]]:
        found = []
        for one, other in combinations(self.recipe.languages, 2):
            a, b, big = masks[one], masks[other], masks["magnitude"]
            value = self._overlap(f"overlap-{one}-{other}", a, b, big)
            found.append({"languages": [one, other], **value})
        return found

    def _rankings(self) -> dict[str, Any]:
        """How much the rankings at the two models agree, by language."""
        if self.recipe.scores.at != "both":
            return {}
        found, share = {}, self.recipe.share
        big = self.atlas.control("magnitude", share)
        for language in self.recipe.languages:
            a, b = (self.atlas.region(language, share, at) for at in ("attacked", "aligned"))
            found[language] = self._overlap(f"rankings-{language}", a, b, big)
        return found

    def _control(self) -> dict[str, Any] | None:
        """The region of an unrelated fine-tuning: what it shares, and what it does."""
        recipe, run = self.recipe, self.run
        if run.plan.control is None:
            return None
        other = run.given("control")
        theirs = run.atlas(other, self.seed)
        whole = Change(other.checkpoint, other.fingerprint, other.moved, None, True)
        theirs.measure(recipe.region, recipe.main, self._net, whole)
        region = theirs.region(recipe.region, recipe.share)
        big = self.atlas.control("magnitude", recipe.share)
        look = self.ask("control", self.stitched(region))
        found = {}
        for language in recipe.languages:
            own = self.atlas.region(language, recipe.share)
            found[language] = self._overlap(f"overlap-control-{language}", own, region, big)
        return {"look": look.plain(), "overlaps": found}

    def _onto(self, befores: Mapping[str, Look]) -> dict[str, dict[str, Look]]:
        """Derivatives with the change of the region, and of each control, added to them."""
        found: dict[str, dict[str, Look]] = {}
        share, atlas = self.recipe.share, self.atlas
        for name, before in befores.items():
            regions = {"region": atlas.region(self.recipe.region, share)}
            regions |= {rule: atlas.control(rule, share) for rule in self.recipe.controls}
            found[name] = {"before": before} | {
                kind: self.ask(f"onto-{name}-{kind}", self.stitched(region), name)
                for kind, region in regions.items()
            }
        return found


def _points(looks: Mapping[float, Look]) -> list[dict[str, Any]]:
    return [{"share": q, **look.plain()} for q, look in looks.items()]


def _frozen(found: Mapping[str, Frozen]) -> dict[str, Any]:
    return {name: one.plain() for name, one in found.items()}


__all__ = ["Case"]
