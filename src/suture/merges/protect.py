"""Protection: entries that one model alone may write, in a merge by any method.

A protected merge is the merge itself, with the entries that a mask marks put in their places after
it: ``theta = where(mask, theta_0 + scale * tau_safety, merge)``. The one loop knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from suture.edits.importance import RULES, Scoring
from suture.edits.mask import Mask, stored_mask
from suture.edits.mask_file import StoredMask
from suture.edits.stats import Stats, stored_stats
from suture.errors import Problems, RecipeError, brief, did_you_mean
from suture.merges.base import Beside, Context, Merge, spelled
from suture.merges.marks import (
    Ranked,
    StoredMasks,
    agreed,
    buffers,
    check_mask,
    check_stats,
    ranked,
    unpacked,
)
from suture.schema.parameters import Number
from suture.schema.paths import place_of
from suture.stream.sweep import DELTA, Block, cores
from suture.stream.topk import SCOPES, exact_count

KEYS = ("model", "mask", "rule", "density", "scope", "stats", "seed", "scale")
CONTROLS = ("magnitude", "random")


@dataclass(frozen=True)
class Protection:
    """What a recipe says of it."""

    model: str
    """Who alone may write."""
    mask: str | Mask | None = None
    """A file of bits, or a mask in memory; or else a rule with a density."""
    rule: str | None = None
    """How entries are ranked; beside a mask a control that marks as many entries of each tensor."""
    density: float | None = None
    scope: str = "tensor"
    stats: str | Stats | None = None
    seed: int = 0
    scale: float = 1.0

    def plain(self) -> dict[str, Any]:
        """As a recipe has it, with nothing in it that is a default."""
        given = {k: getattr(self, k) for k in KEYS if getattr(self, k) != getattr(_DEFAULT, k)}
        return {k: spelled(v) if k in ("mask", "stats") else v for k, v in given.items()}

    def placed(self, move: Any) -> Protection:
        """The same with other paths of its files."""
        return replace(self, **{k: move(v) for k in ("mask", "stats")
                                if isinstance(v := getattr(self, k), str)})  # fmt: skip

    @property
    def told(self) -> str:
        """What it means, in a sentence."""
        if self.mask is None:
            which = f"where the rule {self.rule} marks {self.density:g} of the entries"
        elif self.rule is None:
            which = f"where {Path(spelled(self.mask)).name} marks entries"
        else:
            which = (f"where the rule {self.rule} marks as many entries of each tensor as "
                     f"{Path(spelled(self.mask)).name}")  # fmt: skip
        own = "has what that model has" if self.scale == 1 else (
            f"has the base plus {self.scale:g} times the change of that model")  # fmt: skip
        return (f"protect: {which}, only {self.model} writes: the output {own} there, whatever "
                "the method makes of the models")  # fmt: skip


_DEFAULT = Protection("")


def read_protection(
    raw: object, models: Iterable[str], based: bool, folder: Path, problems: Problems
) -> Protection | None:
    """The section ``protect`` of a recipe; everything that is wrong with it is noted.

    Args:
        raw: the section.
        models: the names of the recipe's models.
        based: whether the recipe names a base.
        folder: where relative paths start.
        problems: takes the notes.
    """
    if raw is None:
        return None
    found: list[str] = []
    made = _read(raw, list(models), based, found)
    for text in found:
        problems.add(RecipeError, text)
    return None if found or made is None else made.placed(lambda path: str(place_of(path, folder)))


def _read(raw: object, models: list[str], based: bool, wrong: list[str]) -> Protection | None:
    if not isinstance(raw, Mapping):
        wrong.append(f"protect: a mapping with a model and a mask, not {brief(raw)}")
        return None
    given = {str(k): v for k, v in raw.items() if v is not None}
    wrong += _odd_words(given, models)
    if "mask" in given:
        wrong += _masked(given)
    elif isinstance(given.get("rule", ""), str):
        wrong += _computed(given.get("rule"), given.get("density"), given.get("stats"))
    if not based and ("rule" in given or given.get("scale", 1) != 1):
        wrong.append("protect: a rule, or a scale, works on the change to a base; name a base")
    if wrong:
        return None
    words: dict[str, Any] = {k: float(v) if k in ("density", "scale") else v
                             for k, v in given.items()}  # fmt: skip
    return Protection(**words)


def _odd_words(given: Mapping[str, Any], models: list[str]) -> Iterator[str]:
    """What is no key, or not of its kind."""
    for key in given:
        if key not in KEYS:
            yield f"protect: unknown key {key!r}; {did_you_mean(key, KEYS)}"
    if "model" not in given:
        yield "protect.model: missing; the name of the model that alone may write there"
    elif given["model"] not in models:
        hint = did_you_mean(str(given["model"]), models) if models else "there are none"
        yield f"protect.model: no model {brief(given['model'])}; {hint}"
    for key, more in (("mask", Mask), ("stats", Stats), ("rule", str)):
        if not isinstance(given.get(key, ""), str | more):
            yield f"protect.{key}: a word, not {brief(given[key])}"
    for key, bound in _NUMBERS.items():
        if key in given and (problem := bound.problem(given[key])) is not None:
            yield f"protect.{key}: {problem}"
    scope = given.get("scope", "tensor")
    if scope not in SCOPES:
        yield f"protect.scope: {brief(scope)} is not known; {did_you_mean(str(scope), SCOPES)}"


def _masked(given: Mapping[str, Any]) -> Iterator[str]:
    """What does not go with a mask."""
    if given.get("rule") not in (None, *CONTROLS):
        yield f"protect.rule: beside a mask a control, {' or '.join(CONTROLS)}, not {given['rule']}"
    for key in ("density", "stats", "scope"):
        if key in given:
            yield f"protect.{key}: belongs to a rule, and the mask decides; leave one of them out"


_NUMBERS = {
    "seed": Number("seed of the control, 0 to 2**63 - 1", 0, 2**63 - 1, whole=True),
    "scale": Number("factor on the change of the model that may write"),
    "density": Number("density is the share of entries kept, in (0, 1]", high=1, positive=True),
}


def _computed(rule: object, density: object, stats: object) -> Iterator[str]:
    """What is wrong with a rule."""
    if rule is None:
        yield "protect: give a mask, a file of `suture localize`, or a rule with a density"
        return
    known = RULES.likely(str(rule))
    try:
        RULES.find(str(rule))
    except RecipeError as error:
        yield f"protect.rule: {error}"
    if known is not None and known.signed:
        plain = ", ".join(n for n, r in RULES.items() if not r.signed)
        yield f"protect.rule: {known.name} has a sign; use one of {plain}, or its mask as a file"
    if known is not None and known.needs and stats is None:
        yield (f"protect.stats: missing; the rule {known.name} needs {', '.join(known.needs)}, a "
               "file that `suture localize` writes into its folder `stats`")  # fmt: skip
    if density is None:
        yield "protect.density: missing; the share of entries to protect"


@dataclass(frozen=True)
class _State:
    inner: Any
    marks: StoredMasks | Ranked
    row: int
    facts: dict[str, Any] = field(default_factory=dict)


def protected(merge: Merge[Any], how: Protection) -> Merge[Any]:
    """The same merge, with marked entries written by one model alone.

    Raises:
        SutureError: the file of the mask cannot be read.
    """
    stored = None if how.mask is None else stored_mask(how.mask)

    def prepare(context: Context) -> _State:
        marks, count = _marks(how, stored, context)
        total = sum(context.sources.spec(n).numel for n in context.names)
        facts = {"model": how.model, "entries": count, "share": count / max(1, total)}
        return _State(merge.prepare(context), marks, context.models.index(how.model), facts)

    def combine(block: Block, state: _State) -> None:
        bits = state.marks.bits(block.name, block.start, block.count)
        if not bits.any():
            merge.combine(block, state.inner)
            return
        mine = block.rows[state.row, : block.count].copy()  # a method may change its rows
        factor = np.float32(how.scale)
        if factor != 1 and block.sources.how == DELTA:
            mine *= factor
        elif factor != 1:
            base = block.base[: block.count]
            mine = base + factor * (mine - base)
        block.target = None  # finished bytes could not be changed any more
        merge.combine(block, state.inner)
        np.copyto(block.out[: block.count], mine, where=unpacked(bits[0], block.count))

    def facts(state: _State) -> dict[str, Any]:
        return {**merge.facts(state.inner), "protect": state.facts}

    def tell(state: _State) -> Iterator[str]:
        yield from merge.tell(state.inner)
        yield (f"protected: {state.facts['entries']:,} entries ({state.facts['share']:.3%}), which "
               f"only {how.model} writes")  # fmt: skip

    def keeps(name: str) -> bool:
        return stored is not None and name not in stored.shapes and merge.keeps(name)

    passes = merge.passes + (0 if how.rule is None else 1)
    held = buffers(0 if how.rule is None else 1)  # of a thread: scores, marks, own entries
    return replace(merge, combine=combine, prepare=prepare, passes=passes, facts=facts, tell=tell,
                   keeps=keeps, beside=lambda c, p: _beside(merge, how, c, p),
                   memory=lambda s, models: merge.memory(s, models) + cores() * held)  # fmt: skip


def _marks(
    how: Protection, stored: StoredMask | None, context: Context
) -> tuple[StoredMasks | Ranked, int]:
    """The marks, and how many there are."""
    held = {}
    if stored is not None:
        held = {n: stored.count(n) for n in stored.shapes}
        if how.rule is None:
            return StoredMasks((stored,)), sum(held.values())
    base = context.sources.base
    assert base is not None
    tuned = context.sources.models[context.models.index(how.model)]
    stats = None if how.stats is None else stored_stats(how.stats)
    scoring = Scoring(RULES.find(str(how.rule)), base, tuned, stats, how.seed, how.model)
    if stored is None:
        density = how.density
        assert density is not None
        found = ranked(context, [scoring], lambda n: [density], exact_count, how.scope)
    else:
        found = ranked(context, [scoring], lambda n: [held.get(n, 0)], _given, "tensor")
    return found, found.selection.kept()[0]


def _given(number: float, n: int) -> int:
    return int(number)


def _beside(merge: Merge[Any], how: Protection, context: Context, problems: Problems) -> Beside:
    """Check the files of the protection, and those of the merge, before a model is read."""
    inner = merge.beside(context, problems)
    identity, expected = [*inner.identity], dict(inner.expected)
    marked = list(inner.restricted)
    key = "stats" if how.mask is None else "mask"
    with problems.collecting(f"protect.{key}: "):
        model = context.sources.models[context.models.index(how.model)]
        if how.mask is not None:
            mask = stored_mask(how.mask)
            identity.append(tuple(mask.checkpoint.identity))
            marked += [how.model] if mask.restricted else []
            known = check_mask(mask, model, how.model, context.names)
            if context.sources.base is None:
                known.pop("base", None)
            agreed(expected, known, mask.path, problems)
        if how.stats is not None:
            stats = stored_stats(how.stats)
            identity.append(tuple(stats.tensors.identity))  # type: ignore[attr-defined]
            marked += [how.model] if stats.restricted else []
            at = str(stats.facts.get("at", "tuned"))
            needs = RULES.find(str(how.rule)).needs
            agreed(
                expected, check_stats(stats, needs, context, how.model, at), stats.where, problems
            )
    return Beside(tuple(identity), expected, tuple(marked))


__all__ = ["Protection", "protected", "read_protection"]
