"""Which expert of a merge broke a gate: the merge without each of them, held against its rules.

Every candidate is merged in memory and goes from there into the network. Its results are kept like
all others, beside that of the edit.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import open_checkpoint
from suture.checkpoints.memory import Held
from suture.errors import MismatchError, NonFiniteError, Problems, RecipeError
from suture.evals.results import SuiteResult
from suture.runs.place import MergeOptions
from suture.runs.progress import Progress
from suture.verbs.compare.rules import Verdict
from suture.verbs.compare.run import compare
from suture.verbs.evaluate import plan as planning
from suture.verbs.evaluate.recipe import read_suite
from suture.verbs.evaluate.run import execute
from suture.verbs.merge import leave_one_out
from suture.verbs.merge.plan import Plan as MergePlan
from suture.verbs.merge.plan import make_plan


@dataclass(frozen=True)
class Without:
    """What becomes of the gate when one expert is left out."""

    expert: str
    verdicts: tuple[Verdict, ...] = ()
    """In the order of the rules; none where there is no such merge."""
    repaired: tuple[str, ...] = ()
    """Rules that the edit breaks and this merge keeps."""
    broken: tuple[str, ...] = ()
    """Rules that the edit keeps and this merge breaks."""
    reason: str = ""
    """Why there is no such merge."""


@dataclass(frozen=True)
class Blame:
    """Every expert of a merge, left out in turn."""

    edit: str
    broken: tuple[str, ...]
    """The rules that the edit breaks; none, and nothing was tried."""
    without: tuple[Without, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def culprits(self) -> tuple[str, ...]:
        """The experts whose removal repairs most rules; several where they repair as many."""
        most = max((len(one.repaired) for one in self.without), default=0)
        return tuple(one.expert for one in self.without if most and len(one.repaired) == most)

    @property
    def told(self) -> str:
        """The outcome in a sentence."""
        if not self.broken:
            return "blame: no rule is broken, so nobody was left out"
        all_ = len(self.broken)
        of = "the broken rule" if all_ == 1 else f"of the {all_} broken rules"
        named = self.culprits
        if not named:
            what = "the broken rule stays broken" if all_ == 1 else f"none {of} holds"
            return f"blame: no expert alone; whichever is left out, {what}"
        chosen = [one for one in self.without if one.expert in named]
        number = len(chosen[0].repaired)
        held = f"{of} holds" if all_ == 1 else f"{number} {of} {'holds' if number == 1 else 'hold'}"
        if len(named) > 1:
            which = "" if len({one.repaired for one in chosen}) == 1 else ", not the same for each"
            return (f"blame: {' or '.join(named)}, which the gate does not tell apart: without "
                    f"any one of them {held}{which}")  # fmt: skip
        (one,) = chosen
        price = f"; but then breaks: {', '.join(one.broken)}" if one.broken else ""
        return f"blame: {one.expert}; without it {held}{price}"

    def plain(self) -> dict[str, Any]:
        """The outcome as data that JSON can hold."""
        return {
            "edit": self.edit, "broken": list(self.broken), "culprits": list(self.culprits),
            "told": self.told,
            "without": [
                {"expert": one.expert, "repaired": list(one.repaired), "broken": list(one.broken),
                 "verdicts": [v.plain() for v in one.verdicts], "reason": one.reason}
                for one in self.without
            ],
            "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is judged, beside what, by which rules; as for ``compare``."""

    base: SuiteResult
    experts: Sequence[SuiteResult]
    edit: SuiteResult
    gate: Path | str | Sequence[str]
    names: Mapping[int, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the edit is called."""
        return self.names.get(id(self.edit), self.edit.model)

    def verdicts(self, candidate: SuiteResult | None = None) -> tuple[Verdict, ...]:
        """What becomes of every rule for the edit, or for a candidate beside it."""
        others = [] if candidate is None else [candidate]
        found = compare(self.base, self.experts, [self.edit, *others], self.gate, names=self.names)
        judged = self.name if candidate is None else candidate.model
        return tuple(v for v in found.verdicts if v.edit == judged)


@dataclass(frozen=True)
class How:
    """How to run, as opposed to what is asked."""

    device: str = "auto"
    overwrite: bool = False
    """Whether results of candidates of another recipe are replaced."""
    folder: Path | None = None
    """Where the relative paths of mappings start; ``None`` is the current folder."""

    def folder_of(self, source: Path | Mapping[str, Any]) -> Path | None:
        """Return where the relative paths of a recipe or suite start; a file has its own folder."""
        return None if isinstance(source, Path) else self.folder


def blame(
    recipe: str | Path | Mapping[str, Any],
    suite: str | Path | Mapping[str, Any],
    base: SuiteResult,
    experts: Sequence[SuiteResult],
    edit: SuiteResult,
    gate: Path | str | Sequence[str],
    out: str | Path | None = None,
    *,
    folder: Path | None = None,
    **options: Any,
) -> Blame:
    """Leave out every expert of a merge in turn and ask which broken rules then hold.

    Args:
        recipe: what made the edit: a recipe, or the ``suture.json`` beside it.
        suite: what was asked of all.
        base: as for ``compare``.
        experts: as for ``compare``.
        edit: the merge that is judged.
        gate: the rules.
        out: a folder for the results of the candidates; by default they are not kept.
        folder: where the relative paths of a recipe and a suite start that are mappings; by default
            the current folder.
        **options: ``device`` and ``overwrite``.

    Raises:
        SutureError: the recipe, the suite or a result is at fault; all problems at once.
    """
    try:
        how = How(**options)
    except TypeError as error:
        raise RecipeError(f"blame: {error}") from None
    paths = [Path(p) if isinstance(p, str) else p for p in (recipe, suite)]
    case = Case(base, experts, edit, gate)
    place = None if out is None else Path(out)
    return search(paths[0], paths[1], case, place, replace(how, folder=folder))


def search(
    recipe: Path | Mapping[str, Any],
    suite: Path | Mapping[str, Any],
    case: Case,
    out: Path | None,
    how: How,
    progress: Progress | None = None,
) -> Blame:
    """``blame``, with what is judged in one value and somebody who is told how far it is.

    Raises:
        SutureError: the recipe, the suite or a result is at fault; all problems at once.
    """
    progress = progress or Progress()
    with tempfile.TemporaryDirectory(prefix="suture-blame-") as place:
        found = _planned(recipe, suite, case, out, how, progress, Path(place))
        first = case.verdicts()
        broken = tuple(v.rule for v in first if not v.held)
        if not broken:
            return Blame(case.name, ())
        _check_recipe(found.whole, case, progress)
        tried, notes = [], list[str]()
        for one in found.left:
            reason, result = one.reason, None
            if one.plan is not None:
                try:
                    result = _asked(found, one, Path(place) / "written", progress, notes)
                except NonFiniteError as error:
                    reason = str(error)
            if result is None:
                tried.append(Without(one.expert, reason=reason))
                continue
            judged = case.verdicts(result)
            pairs = list(zip(first, judged, strict=True))
            tried.append(Without(
                one.expert, judged,
                tuple(new.rule for old, new in pairs if new.held and not old.held),
                tuple(new.rule for old, new in pairs if old.held and not new.held),
            ))  # fmt: skip
    return Blame(case.name, broken, tuple(tried), tuple(notes))


@dataclass(frozen=True)
class _Planned:
    """Everything that will be done, checked."""

    whole: MergePlan
    left: Sequence[leave_one_out.LeftOut]
    held: Mapping[str, Held]
    """The candidates by expert; their tensors are still to be merged."""
    asking: planning.Plan


def _planned(
    recipe: Path | Mapping[str, Any], suite: Path | Mapping[str, Any], case: Case,
    out: Path | None, how: How, progress: Progress, place: Path,
) -> _Planned:  # fmt: skip
    """Hold recipe, suite and results against each other."""
    problems = Problems()
    with problems.collecting():
        case.verdicts()
    whole, asking, left = None, None, list[leave_one_out.LeftOut]()
    with problems.collecting():
        whole = leave_one_out.ready(
            make_plan(recipe, None, MergeOptions(), how.folder_of(recipe)), progress.stage
        )
        left = leave_one_out.leave_one_out(whole)
    held: dict[str, Held] = {}
    for number, one in enumerate(left):
        if one.plan is not None:
            label = leave_one_out.label_of(case.name, one.expert)
            taken = label in {other.label for other in held.values()}
            label = f"{label}-{number}" if taken else label
            held[one.expert] = leave_one_out.prepare(one.plan, label, place / str(number))
    options = planning.Options(
        overwrite=how.overwrite, device=how.device, limit=_limit(suite, case.base, how)
    )
    with problems.collecting():
        if held:
            asking = planning.plan_suite(
                list(held.values()), suite, out, options, how.folder_of(suite)
            )
        else:
            read_suite(suite, problems, how.folder_of(suite))
    if asking is not None and asking.suite_hash != case.base.suite_hash:
        problems.add(MismatchError, "the suite asks something else than the results were made "
                                    "with; name theirs, as it was")  # fmt: skip
    problems.raise_if_any()
    assert whole is not None
    assert asking is not None
    return _Planned(whole, left, held, asking)


def _check_recipe(whole: MergePlan, case: Case, progress: Progress) -> None:
    """Refuse a recipe that makes something else than what was evaluated."""
    found = leave_one_out.fingerprint_of(whole, progress.stage)
    if found != case.edit.fingerprint:
        raise MismatchError(
            f"the recipe makes a model with the fingerprint {found}, {case.name} has "
            f"{case.edit.fingerprint}; name the recipe that made it, or its suture.json"
        )


def _asked(
    found: _Planned, one: leave_one_out.LeftOut, folder: Path, progress: Progress, notes: list[str]
) -> SuiteResult:
    """Merge a candidate, ask it, and give the memory back."""
    assert one.plan is not None
    held = found.held[one.expert]
    subject = next(s for s in found.asking.subjects if s.checkpoint is held)
    progress.say(f"without {one.expert}: merging")
    why = leave_one_out.must_be_written(one.plan)
    if why:
        notes.append(f"without {one.expert}: was written into a temporary folder: {why}")
        leave_one_out.written(one.plan, folder, progress.stage)
        subject = replace(subject, checkpoint=open_checkpoint(folder))
    else:
        leave_one_out.fill(held, one.plan, progress.stage)
    asking = replace(found.asking, subjects=(subject,))
    (result,) = execute(asking, progress)
    held.drop()
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _limit(suite: Path | Mapping[str, Any], base: SuiteResult, how: How) -> int:
    """The rows to which ``suture eval --limit`` cut the suite, by the name of the results."""
    found = read_suite(suite, Problems(), how.folder_of(suite))
    cut = found and re.fullmatch(re.escape(found.name) + r"\.first(\d+)", base.suite)
    return int(cut[1]) if cut else 0


__all__ = ["Blame", "Case", "How", "Without", "blame", "search"]
