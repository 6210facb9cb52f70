"""The cells of one audit: networks, looks, masks and attacked models, each made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from suture.analysis.ancestry import RealignModels, check_ancestor, measure
from suture.checkpoints.checkpoint import Checkpoint
from suture.errors import MismatchError
from suture.merges.apply import checkpoint_fingerprint
from suture.runs.ledger import CELLS, Ledger, digest
from suture.runs.progress import Say
from suture.tensors.roles import EVERYTHING
from suture.verbs.audit.metrics import Look, look_of
from suture.verbs.audit.plan import Plan, counts
from suture.verbs.audit.regions import Atlas, overlap
from suture.verbs.audit.stitched import Change, Key, Net, Region
from suture.verbs.audit.training import train
from suture.version import __version__

STEPS = 1
"""Version of what the steps below do; raise it with them, so that nothing stale is used again."""


def made_with() -> list[Any]:
    """Return the versions of what computes."""
    return [STEPS, __version__, version("torch"), version("transformers")]


@dataclass(frozen=True)
class Attacked:
    """An attacked model, and what tells it from the aligned one."""

    checkpoint: Checkpoint
    fingerprint: str
    moved: tuple[str, ...]
    distance: float
    """Of its weights from the aligned ones, as a share of their length."""


class Run:
    """One run over all cells."""

    def __init__(self, plan: Plan, prints: Mapping[str, str], key: str, say: Say) -> None:
        self.plan, self.recipe, self.prints, self.key = plan, plan.recipe, prints, key
        self.say = say
        self.ledger = Ledger(plan.out / CELLS, say)
        expected = counts(self.recipe, plan.attacked is None)
        seeds = len(self.recipe.seeds)
        onto = (expected["onto"] * seeds + 1) * len(plan.onto)
        self.ledger.pending["look", ""] = expected["looks"] * seeds + 1 + onto
        self._net: tuple[str, Net] | None = None
        self._looks: dict[tuple[str, str], Look] = {}
        """Those that this run has had; one is counted once, however often it is wanted."""
        self._given: dict[str, Attacked] = {}

    # -- what everything is made of ----------------------------------------------------------------

    def net(self, ground: str) -> Net:
        """The network of a ground; one is loaded at a time."""
        if self._net is None or self._net[0] != ground:
            self._net = None
            checkpoint = self.plan.aligned if ground == "aligned" else self.plan.onto[ground]
            self._net = (ground, Net(checkpoint, self.plan.aligned, self.plan.device))
        return self._net[1]

    def ask(self, name: str, change: Change | None, ground: str = "aligned") -> Look:
        """The look at one stitched model: from its cell, or asked now."""
        questions = self.plan.asked[ground]
        label = "aligned" if ground == "aligned" else f"onto.{ground}"
        inputs: Key = {
            "made with": made_with(), "ground": self.prints[label],
            "aligned": self.prints["aligned"], "change": None if change is None else change.key,
            "space": digest(list(self.plan.names)), "asked": questions.key,
        }  # fmt: skip

        def make() -> Any:
            net = self.net(ground)
            net.place(change, self.plan.names)
            return net.ask(questions, lambda rows: None)

        which = name, digest(inputs)
        if which not in self._looks:
            raw = self.ledger.cell(("look", ""), name, inputs, make)
            self._looks[which] = look_of(raw, questions.groups, self.recipe.evaluation.broken)
        return self._looks[which]

    def cell(self, name: str, inputs: Key, make: Callable[[], Any]) -> Any:
        """What is made of masks alone."""
        return self.ledger.cell(("masks", ""), name, [made_with(), inputs], make)

    def overlap(self, name: str, one: Region, other: Region, large: Region) -> dict[str, Any]:
        """What two regions have in common, beside nulls."""

        def make() -> Any:
            return overlap(one.make(), other.make(), large.make())

        found: dict[str, Any] = self.cell(name, ["overlap", one.key, other.key, large.key], make)
        return found

    def attacked(self, seed: int, suffix: str) -> Attacked:
        """The attacked model of a seed: the given one, or trained now; its ancestry is checked."""
        plan = self.plan
        if plan.attacked is not None:
            return self.given("attacked")
        inputs: Key = [made_with(), self.prints["aligned"], self.training(seed)]
        where = plan.out / f"attacked{suffix}"
        found = train(plan, self.ledger, where, seed, None, f"attack{suffix}", inputs)
        return self.distance("attacked", found, checkpoint_fingerprint(found))

    def training(self, seed: int) -> Key:
        """What the attack follows from, besides the aligned model."""
        how = self.recipe.attack
        assert how is not None
        assert self.plan.attack is not None
        rows = digest([list(self.plan.attack.ids), list(self.plan.attack.targets or ())])
        return [vars(how.training), seed, rows, digest(list(self.plan.names))]

    def given(self, label: str) -> Attacked:
        """A model that the recipe names, and how far it is from the aligned one; measured once.

        Raises:
            MismatchError: it is the same, or another model.
        """
        if label not in self._given:
            one = self.plan.inputs[label]
            self._given[label] = self.distance(label, one, self.prints[label])
        return self._given[label]

    def distance(self, label: str, checkpoint: Checkpoint, fingerprint: str) -> Attacked:
        """How far a model is from the aligned one, and in which tensors.

        Raises:
            MismatchError: it is the same, or another model.
        """
        aligned = self.plan.aligned
        names = tuple(EVERYTHING.names(aligned.specs))
        models = RealignModels(aligned, {label: checkpoint}, {label: 1.0}, names)
        found = measure(models, self.plan.options.threads)
        who = f"{label}: {checkpoint.label}"
        if not found.changed:
            raise MismatchError(f"{who}: is the aligned model, weight for weight; there is no "
                                "change in which to look for its safety")  # fmt: skip
        if (
            label != "control"
            and not label.startswith("onto.")
            and not (set(found.changed) & set(self.plan.names))
        ):
            raise MismatchError(f"{who}: differs from the aligned model only outside of `space`; "
                                "include the tensors in which it differs")  # fmt: skip
        if self.recipe.ancestor == "check":
            try:
                check_ancestor(models, found)
            except MismatchError as error:
                raise MismatchError(str(error).removeprefix("models.")) from None
        return Attacked(checkpoint, fingerprint, found.changed,
                        found.tuned[label] / max(found.length, 1e-30))  # fmt: skip

    def atlas(self, one: Attacked, seed: int) -> Atlas:
        """The regions of an attacked model."""
        prints = {"aligned": self.prints["aligned"], "attacked": one.fingerprint}
        return Atlas(
            self.recipe, self.plan.aligned, one.checkpoint, prints, self.plan.names,
            self.plan.out / "regions" / "gradients", self.plan.probes,
            self.plan.material.probe_key(), seed, self.plan.options.threads, self.say,
        )  # fmt: skip


__all__ = ["Attacked", "Run", "made_with"]
