"""Elections: which entries matter to models and base, and which of them each model may write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from suture.edits.importance import RULES, Scoring
from suture.edits.mask import stored_mask
from suture.edits.stats import stored_stats
from suture.errors import MismatchError, Problems
from suture.merges.base import Array, Beside, Context
from suture.merges.counts import Census, Votes, correlations
from suture.merges.marks import Joined, Ranked, StoredMasks, agreed, check_mask, check_stats, ranked
from suture.schema.values import PerModel
from suture.stream.sweep import sweep, tasks_of
from suture.tensors.roles import role_of

NEEDS = ("abs_grad",)


_PATTERNS: dict[str, Callable[[Array, Array], Array]] = {
    "both": lambda expert, base: expert & base,
    "expert": lambda expert, base: expert.copy(),
    "base": lambda expert, base: base.copy(),
    "either": lambda expert, base: expert | base,
    "expert_only": lambda expert, base: expert & ~base,
    "base_only": lambda expert, base: base & ~expert,
    "neither": lambda expert, base: ~(expert | base),
}


def _floor(density: float, n: int) -> int:
    return math.floor(density * n)


def _given(number: float, n: int) -> int:
    return int(number)


def voted(elect: str, expert: Array, base: Array, count: int) -> Array:
    """What models elect, from the marks of expert and base: uint8[models, bytes]."""
    found: Array = _PATTERNS[elect](expert, base)
    if count % 8:
        found[:, -1] &= np.uint8((1 << count % 8) - 1)  # no marks beyond the last entry
    return found


def kept_apart(elected: Array, priority: Sequence[float]) -> Array:
    """What each model may write: uint8[models, bytes].

    An entry goes to the elector of the highest priority, and to nobody where two share it.
    """
    found = np.zeros_like(elected)
    taken = np.zeros_like(elected[0])
    for level in sorted(set(priority), reverse=True):
        rows = [i for i, own in enumerate(priority) if own == level]
        once, twice = np.zeros_like(taken), np.zeros_like(taken)
        for i in rows:
            twice |= once & elected[i]
            once |= elected[i]
        for i in rows:
            found[i] = elected[i] & ~twice & ~taken
        taken |= once
    return found


@dataclass(frozen=True)
class Election:
    """The parameters of an election."""

    stats: Mapping[str, str] | None
    base_stats: Mapping[str, str] | None
    masks: Mapping[str, str] | None
    base_masks: Mapping[str, str] | None
    density: PerModel
    elect: str
    disjoint: str
    safety: str | None
    priority: PerModel
    scope: str
    embeddings: str
    rule: str
    match: str
    seed: int
    flip: bool

    @property
    def located(self) -> bool:
        """Whether it is known what matters to the models."""
        return self.stats is not None or self.masks is not None

    @property
    def matched(self) -> bool:
        """Whether a control marks as many entries as the election would."""
        return self.rule != "snip" and self.located

    @property
    def asks_base(self) -> bool:
        """Whether it matters what matters to the base."""
        return self.elect != "expert" and self.located

    def check(self, names: Sequence[str], models: Sequence[str]) -> Iterator[str]:
        """What is wrong with the parameters, a line each."""
        if self.rule == "snip" and not self.located:
            yield ("stats: missing; the folder of statistics that `suture localize` with "
                   "`rule: snip` and `at: both` writes, or `masks`")  # fmt: skip
        if self.stats is not None and self.masks is not None:
            yield "stats and masks: give one of them"
        if self.masks is not None and self.flip:
            yield "flip: reverses scores, and masks have none; give `stats`"
        if self.asks_base and self.stats is not None and self.base_stats is None:
            yield (f"base_stats: missing; `elect: {self.elect}` asks the base, too: the folder "
                   "stats/base that `at: both` writes")  # fmt: skip
        if self.asks_base and self.masks is not None and self.base_masks is None:
            yield (f"base_masks: missing; `elect: {self.elect}` asks the base, too: the folder "
                   "base that `at: both` writes beside the masks")  # fmt: skip
        if self.match == "written" and not self.matched:
            yield ("match: written: counts for a control beside stats or masks; add `rule: random` "
                   "or `rule: magnitude`")  # fmt: skip
        yield from self._models_named(names, models)

    def _models_named(self, names: Sequence[str], models: Sequence[str]) -> Iterator[str]:
        if self.disjoint == "safety_first" and self.safety is None:
            yield ("safety: missing; `disjoint: safety_first` needs the name of the safety expert, "
                   f"one of {', '.join(models)}")  # fmt: skip
        special = any(role_of(n).kind in ("embedding", "head") for n in names)
        if self.embeddings == "safety" and self.safety is None:
            yield "safety: missing; `embeddings: safety` needs the name of the safety expert"
        if self.embeddings == "safety" and not special:
            yield ("embeddings: safety: the space of this recipe leaves them out; write "
                   "`space: {exclude: []}`")  # fmt: skip

    def beside(self, context: Context, problems: Problems) -> Beside:
        """Check the statistics against the models by their headers."""
        identity: list[tuple[object, ...]] = []
        expected: dict[str, str] = {}
        marked: list[str] = []
        for model in context.models:
            restricted = False
            if self.stats is not None:
                restricted = self._hold_stats(model, self.stats, context, identity, expected,
                                              problems)  # fmt: skip
            elif self.masks is not None:
                restricted = self._hold_masks(model, self.masks, context, identity, expected,
                                              problems)  # fmt: skip
            marked += [model] if restricted else []
        return Beside(tuple(identity), expected, tuple(marked))

    def _hold_stats(
        self, model: str, files: Mapping[str, str], context: Context,
        identity: list[tuple[object, ...]], expected: dict[str, str], problems: Problems,
    ) -> bool:  # fmt: skip
        places = [("stats", files[model], "tuned")]
        if self.asks_base and self.base_stats is not None:
            places.append(("base_stats", self.base_stats[model], "base"))
        pair = []
        for key, path, at in places:
            with problems.collecting(f"parameters.{key}.{model}: "):
                stats = stored_stats(path)
                pair.append(stats)
                identity.append(tuple(stats.tensors.identity))  # type: ignore[attr-defined]
                known = check_stats(stats, NEEDS, context, model, at)
                agreed(expected, known, stats.where, problems)
        if len({stats.facts.get("data") for stats in pair}) > 1:
            problems.add(
                MismatchError,
                f"parameters.base_stats.{model}: {pair[1].where}: measured on other rows than "
                f"{pair[0].where}; measure both with `at: both`",
            )
        return any(stats.restricted for stats in pair)

    def _hold_masks(
        self, model: str, files: Mapping[str, str], context: Context,
        identity: list[tuple[object, ...]], expected: dict[str, str], problems: Problems,
    ) -> bool:  # fmt: skip
        held = context.sources.models[context.models.index(model)]
        places = [("masks", files[model], "tuned")]
        if self.asks_base and self.base_masks is not None:
            places.append(("base_masks", self.base_masks[model], "base"))
        restricted = False
        for key, path, at in places:
            with problems.collecting(f"parameters.{key}.{model}: "):
                mask = stored_mask(path)
                restricted |= mask.restricted
                identity.append(tuple(mask.checkpoint.identity))
                agreed(expected, check_mask(mask, held, model, context.names), path, problems)
                if mask.about.get("at", at) != at:
                    raise MismatchError(
                        f"{path}: marks what matters to the {mask.about['at']} model; a mask of "
                        f"the {at} one belongs here"
                    )
        return restricted

    def levels(self, name: str, models: Sequence[str]) -> list[float]:
        """The priority of each model in one tensor."""
        if self.disjoint == "safety_first":
            return [float(model == self.safety) for model in models]
        if self.disjoint == "priority":
            return list(self.priority.at(name, len(models)))
        return [0.0] * len(models)

    def prepare(self, context: Context) -> Elected:
        """Rank, and count what was elected."""
        number = len(context.models)
        if not self.located:  # a control by itself
            ranking = self._control(context, lambda n: self.density.at(n, number), _floor)
            return Elected(self, ranking, True, context).counted(context)
        state = Elected(self, self._election(context), False, context).counted(context)
        if not self.matched:
            return state
        alike = self._alike(context, state.census)
        other = Elected(self, alike, True, context).counted(context)
        other.facts["matched"] = {k: state.facts[k] for k in ("elected", "owned")}
        return other

    def _election(self, context: Context) -> Ranked | StoredMasks:
        if self.masks is not None:
            paths = [self.masks[m] for m in context.models]
            if self.asks_base and self.base_masks is not None:
                paths += [self.base_masks[m] for m in context.models]
            return StoredMasks(tuple(stored_mask(path) for path in paths))
        assert self.stats is not None
        rule, base = RULES.find("snip"), context.sources.base
        assert base is not None
        scorings, number = [], len(context.models)
        for model, tuned in zip(context.models, context.sources.models, strict=True):
            own = stored_stats(self.stats[model])
            scorings.append(Scoring(rule, base, tuned, own))
        for model in context.models if self.asks_base else ():
            assert self.base_stats is not None
            own = stored_stats(self.base_stats[model])
            scorings.append(Scoring(rule, base, base, own))
        times = len(scorings) // number

        def densities(name: str) -> tuple[float, ...]:
            return self.density.at(name, number) * times

        return ranked(context, scorings, densities, _floor, self.scope, self.flip)

    def _alike(self, context: Context, census: Census) -> Ranked | Joined:
        """A control with as many marks in each tensor as the election."""
        counts = census.elected if self.match == "elected" else census.owned
        if self.match == "elected":
            return self._control(context, lambda n: counts[n], _given)
        total = [sum(own[i] for own in counts.values()) for i in range(len(context.models))]
        made: dict[int, Ranked] = {}
        for i in sorted(range(len(total)), key=lambda i: (total[i], context.models[i])):
            own = {n: [counts[n][i]] for n in counts}
            made[i] = ranked(context, [self._scorings(context)[i]], own.__getitem__, _given,
                             "tensor", taken=list(made.values()))  # fmt: skip
        return Joined(tuple(made[i] for i in sorted(made)))

    def _control(self, context: Context, numbers: Any, count: Any) -> Ranked:
        scope = "tensor" if self.matched else self.scope
        return ranked(context, self._scorings(context), numbers, count, scope)

    def _scorings(self, context: Context) -> list[Scoring]:
        base = context.sources.base
        assert base is not None
        return [
            Scoring(RULES.find(self.rule), base, tuned, None, self.seed, model)
            for model, tuned in zip(context.models, context.sources.models, strict=True)
        ]


class Elected:
    """Which entries each model writes, and what is known of them."""

    def __init__(
        self, how: Election, marks: Ranked | Joined | StoredMasks, control: bool, context: Context
    ) -> None:
        self.how, self.marks, self.control = how, marks, control
        self.models = context.models
        self.facts: dict[str, Any] = {}
        self.census = Census(context.names, len(context.models), self.look)

    def look(self, name: str, start: int, count: int) -> Votes:
        """What is marked, elected and written among some entries."""
        how, number = self.how, len(self.models)
        bits = self.marks.bits(name, start, count)
        expert, base = bits[:number], bits[number:] if len(bits) > number else bits
        elected = voted("expert" if self.control else how.elect, expert, base, count)
        if how.embeddings == "elected" or role_of(name).kind not in ("embedding", "head"):
            return Votes(expert, base, elected, kept_apart(elected, how.levels(name, self.models)))
        whole = np.zeros_like(elected)
        if how.embeddings == "safety":
            whole[self.models.index(str(how.safety))] = 0xFF
        return Votes(expert, base, elected, voted("expert", whole, whole, count))

    def counted(self, context: Context) -> Elected:
        """The same, with the facts: what was elected, shared and written."""
        number = len(self.models)
        specs = {n: context.sources.spec(n) for n in context.names}
        sweep(context.sources, tasks_of(context.names, specs), self.census, threads=context.threads,
              block=context.block, progress=context.progress)  # fmt: skip
        both = self.marks.columns > number
        found = self.census.facts(self.models, sum(s.numel for s in specs.values()), both)
        if isinstance(self.marks, Ranked):
            found["rank_correlations"] = correlations(self.marks, self.models, specs)
        self.facts = found
        return self


def lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """What to tell of an election, a line each."""
    for model, share in facts["elected"].items():
        owned, kept = facts["owned"][model], facts["norm_kept"][model]
        yield (f"{model}: elects {share:.3%} of the entries and writes {owned:.3%}, which hold "
               f"{kept:.2%} of its squared change")  # fmt: skip
        if not owned:
            yield f"note: {model} writes nothing: the merge has none of its changes"
    ranks = facts.get("rank_correlations", {"models": (), "base_and_model": {}})
    tasks = {tuple(pair["models"]): pair["spearman"] for pair in ranks["models"]}
    for pair in facts["overlaps"]:
        one, other = pair["models"]
        known = f"; their scores have rank correlation {tasks[one, other]:.2f}" if tasks else ""
        yield (f"{one} and {other}: both elect {pair['share']:.3%} (by chance "
               f"{pair['by_chance']:.3%}){known}")  # fmt: skip
    for model, value in ranks["base_and_model"].items():
        yield f"{model}: scores of base and expert have rank correlation {value:.2f}"


__all__ = ["Elected", "Election", "kept_apart", "lines", "voted"]
