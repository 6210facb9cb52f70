"""Where the scores say that safety lies: gradients kept on disk, masks of any share made of them.

Scores are ``|change| x |gradient|``. The gradients of one language at one model are a file of
statistics; scores are computed when they are read, block by block, and the global top of them is
found out of core, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint
from suture.edits.graft import write_graft
from suture.edits.importance import RULES
from suture.edits.mask import Located, Mask, localize
from suture.edits.mask_file import MaskOverlap, Shared, StoredMask, marked, overlap_of, popcount
from suture.edits.stats import Stats
from suture.errors import CheckpointError
from suture.runs.ledger import digest
from suture.stream.vector import TaskVector
from suture.tensors.roles import layer_key, role_of
from suture.tensors.spec import TensorSpec
from suture.training.data import Dataset
from suture.training.measure import OBJECTIVES, measure
from suture.verbs.audit.recipe import SPARED, Audit
from suture.verbs.audit.stitched import Change, Key, Net, Region
from suture.verbs.localize.run import profile

BATCH = 4
"""Probe rows that go through the model together: speed and memory only."""


@dataclass
class Atlas:
    """The regions of one attacked model: statistics by language, masks by share."""

    recipe: Audit
    aligned: Checkpoint
    attacked: Checkpoint
    prints: Mapping[str, str]
    """Fingerprints of ``aligned`` and ``attacked``."""
    names: tuple[str, ...]
    folder: Path
    probes: Mapping[str, Dataset]
    probe_key: str
    seed: int
    threads: int | None = None
    say: Callable[[str], None] = lambda _: None
    _kept: dict[str, Mask] = field(default_factory=dict)

    def stats_key(self, language: str, at: str) -> Key:
        """What the gradients of a language follow from."""
        rule = RULES[self.recipe.scores.rule]
        return ["gradients", language, self.prints[at], list(rule.needs), list(self.names),
                self.probe_key, self.recipe.scores.rows,
                self.recipe.evaluation.decoding.chat]  # fmt: skip

    def stats_path(self, language: str, at: str) -> Path:
        """Where they lie."""
        return self.folder / f"{language}-{at}-{digest(self.stats_key(language, at))}.safetensors"

    def measured(self, language: str, at: str) -> bool:
        """Whether the gradients of a language are there; a damaged file of them is removed."""
        path = self.stats_path(language, at)
        try:
            if path.is_file():
                Stats.load(path)
                return True
        except CheckpointError:
            path.unlink()
        return False

    def measure(self, language: str, at: str, net: Callable[[], Net], attack: Change) -> None:
        """Take the gradients of a language's probe rows, and of useful ones, unless they are there.

        Args:
            language: of the probe rows.
            at: ``aligned`` or ``attacked``.
            net: gives the network that holds the aligned model, loaded when it is needed.
            attack: what makes it the attacked one.

        Raises:
            NonFiniteError: the loss of a row is NaN or infinite.
        """
        for which in self._wanted(language):
            if self.measured(which, at):
                continue
            held = net()
            held.place(attack if at == "attacked" else None, self.names)
            self.say(f"{which}: gradients of {len(self.probes[which])} rows at {at}")
            facts = {"model": self.prints[at], "at": "base" if at == "aligned" else "tuned"}
            found = measure(
                held.model, self.probes[which], RULES[self.recipe.scores.rule].needs,
                names=self.names, objective=OBJECTIVES["causal"], batch=BATCH, device=held.device,
                facts=marked(facts, True),
            )  # fmt: skip
            found.save(self.stats_path(which, at))

    def forget(self, language: str, at: str) -> None:
        """Remove what ``measure`` has written."""
        for which in self._wanted(language):
            self.stats_path(which, at).unlink(missing_ok=True)

    def _wanted(self, language: str) -> list[str]:
        return [language] if self.recipe.useful is None else [language, SPARED]

    def region(self, language: str, share: float, at: str = "") -> Region:
        """The top share of a language's scores."""
        how, at = self.recipe.scores, at or self.recipe.main
        key = ["top", how.rule, share, self.stats_key(language, at), self._about]
        spared: Region | None = None
        if self.recipe.useful is not None and language != SPARED:
            spared = self.region(SPARED, self.recipe.useful.share, at)
            key.append(["without", spared.key])
        name = f"{language}-{at}-{share:g}-{digest(key)}"
        keep = share == self.recipe.share or language == SPARED

        def make() -> Mask:
            if name in self._kept:
                return self._kept[name]
            without = None if spared is None else spared.make()
            found = self._mask(how.rule, share, language, at, without)
            if keep:
                self._kept[name] = found
            return found

        return Region(key, make)

    def control(self, rule: str, share: float) -> Region:
        """What scores have to beat: the largest changes, random entries, or SNIP of the weights."""
        key = ["control", rule, share, self._about, self.seed if rule == "random" else None]
        language, at = "", ""
        if RULES[rule].needs:
            language, at = self.recipe.region, self.recipe.main
            key.append(self.stats_key(language, at))
        return Region(key, lambda: self._mask(rule, share, language, at))

    def shared(self, share: float) -> Region:
        """What the regions of all languages have in common."""
        parts = [self.region(language, share) for language in self.recipe.languages]

        def make() -> Mask:
            found = parts[0].make()
            for part in parts[1:]:
                found = found & part.make()
            return found

        return Region(["and", [p.key for p in parts]], make)

    @property
    def _about(self) -> Key:
        return [self.prints["aligned"], self.prints["attacked"], list(self.names)]

    def _mask(
        self, rule: str, share: float, language: str, at: str, without: Mask | None = None
    ) -> Mask:
        vector = TaskVector(self.aligned, [(self.attacked, 1.0)], self.names)
        found = localize(
            vector, rule, density=share, stats=self.stats_path(language, at) if language else None,
            positive=self.recipe.scores.signed and bool(language), seed=self.seed,
            label="audit", without=without, threads=self.threads,
        )  # fmt: skip
        # of an attacked model that came without the mark, too
        found.about = marked({**found.about, "base": self.prints["aligned"],
                              "model": self.prints["attacked"]}, True)  # fmt: skip
        return found

    def publish(self, masks: Mapping[str, Region], folder: Path) -> dict[str, dict[str, Any]]:
        """Write masks as files, with the weights that they mark where the recipe asks for them."""
        found = {}
        for name, region in masks.items():
            path = folder / f"{name}.safetensors"
            mask = region.make()
            if not self.recipe.deltas:
                about = marked({**mask.about, "base": self.prints["aligned"]}, True)
                Mask(mask.shapes, mask.bits, about).save(path)
            else:
                bits = path.with_name(f".{name}.bits")
                Mask(mask.shapes, mask.bits, marked(mask.about, True)).save(bits)
                write_graft(path, self.attacked, StoredMask(bits))
                bits.unlink()
            found[name] = {"file": path.name, "kept": mask.count, "entries": mask.size}
        return found


def places(mask: Mask) -> dict[str, Any]:
    """Where a mask lies: density, share and enrichment by layer, by role and by both."""
    counts = {n: popcount(b) for n, b in mask.bits.items()}
    sizes = {n: TensorSpec("BOOL", s).numel for n, s in mask.shapes.items()}
    found = Located(counts, sizes, sum(counts.values()), 0)
    return {
        "kept": found.kept, "entries": sum(sizes.values()), "density": found.density,
        "layers": profile(found, layer_key),
        "roles": profile(found, lambda n: role_of(n).kind),
        "cells": profile(found, lambda n: f"{layer_key(n)} {role_of(n).kind}"),
    }  # fmt: skip


def overlap(one: Mask, other: Mask, magnitude: Mask) -> dict[str, Any]:
    """The IoU of two masks beside three nulls.

    ``independent`` has the same two densities, ``matched`` also the same density in every tensor,
    ``magnitude`` also the same overlap with the largest changes there: masks that agree only in
    liking large changes have as much in common as this.
    """
    found: MaskOverlap = one.overlap(other)
    strata: dict[str, Shared] = {}
    for name, big in magnitude.bits.items():
        a, b = one.bits[name], other.bits[name]
        size = TensorSpec("BOOL", one.shapes[name]).numel
        inside = Shared(popcount(big), popcount(a & big), popcount(b & big), popcount(a & b & big))
        strata[f"{name} large"] = inside
        strata[f"{name} small"] = Shared(
            size - inside.size, popcount(a) - inside.one, popcount(b) - inside.other,
            popcount(a & b) - inside.both,
        )  # fmt: skip
    like = overlap_of(strata)
    return {
        "jaccard": found.jaccard, "independent": found.independent, "matched": found.matched,
        "magnitude": like.matched, "low": like.low, "high": like.high,
    }  # fmt: skip


__all__ = ["Atlas", "overlap", "places"]
