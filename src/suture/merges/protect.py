"""Protection: entries that one model alone may write, in a merge by any method.

A protected merge is the merge itself, with the entries that a mask marks put in their places after
it: ``theta = where(mask, theta_0 + scale * tau_safety, merge)``. The one loop knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict

from suture.edits.importance import RULES, Scoring
from suture.edits.mask import Mask, stored_mask
from suture.edits.mask_file import StoredMask
from suture.edits.stats import Stats, stored_stats
from suture.errors import (
    Problems,
    RecipeError,
    brief,
)
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
from suture.schema.fields import ReadAs, Says
from suture.schema.parameters import Number
from suture.schema.paths import place_of
from suture.schema.sections import Faults, Section, check
from suture.stream.sweep import DELTA, Block, cores
from suture.stream.topk import exact_count

CONTROLS = ("magnitude", "random")


def _within(bound: Number) -> Callable[[Any, Path], float | int]:
    def read(value: Any, _: Path) -> float | int:
        problem = bound.problem(value)
        if problem is not None:
            raise RecipeError(problem)
        return int(value) if bound.whole else float(value)

    return read


def _file(value: Any, folder: Path) -> Any:
    if isinstance(value, Mask | Stats):
        return value
    if not isinstance(value, str):
        raise RecipeError(f"a word, not {brief(value)}")
    return str(place_of(value, folder))


_DENSITY = Number("density is the share of entries kept, in (0, 1]", high=1, positive=True)
_SEED = Number("seed of the control, 0 to 2**63 - 1", 0, 2**63 - 1, whole=True)
_SCALE = Number("factor on the change of the model that may write")


class Protection(Section):
    """What one model alone may write."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    shape = "a mapping with a model and a mask"

    model: Annotated[str, Says("the name of a model")]
    """The name of the model that alone may write there."""
    mask: Annotated[str | Mask | None, ReadAs(_file, spelled)] = None
    """A file of bits, or a mask in memory; or else a rule with a density."""
    rule: Annotated[str, Says("a word")] | None = None
    """How entries are ranked; beside a mask a control that marks as many entries of each tensor."""
    density: Annotated[
        float | None, ReadAs(_within(_DENSITY), float, Annotated[float, Gt(0), Le(1)])
    ] = None
    """The share of entries that a rule marks."""
    scope: Literal["global", "layer", "tensor"] = "tensor"
    """Where the share is counted."""
    stats: Annotated[str | Stats | None, ReadAs(_file, spelled)] = None
    """Statistics that a rule needs: a file that `suture localize` writes."""
    seed: Annotated[int, ReadAs(_within(_SEED), int, Annotated[int, Ge(0)])] = 0
    """Of the control."""
    scale: Annotated[float, ReadAs(_within(_SCALE), float, float)] = 1.0
    """Factor on the change of the model that may write."""

    def plain(self) -> dict[str, Any]:
        """As a recipe has it, with nothing in it that is a default."""
        return self.model_dump(exclude_defaults=True)

    def placed(self, move: Any) -> Protection:
        """The same with other paths of its files."""
        return self.model_copy(update={k: move(v) for k in ("mask", "stats")
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

    @check
    def _a_mask_decides(self) -> Faults:
        if self.mask is None:
            return
        if self.rule not in (None, *CONTROLS):
            yield "rule", f"beside a mask a control, {' or '.join(CONTROLS)}, not {self.rule}"
        for key in ("density", "stats", "scope"):
            if key in self.model_fields_set:
                yield key, "belongs to a rule, and the mask decides; leave one of them out"

    @check
    def _something_marks(self) -> Faults:
        if self.mask is None and self.rule is None:
            yield "", "give a mask, a file of `suture localize`, or a rule with a density"

    @check
    def _the_rule_is_one(self) -> Faults:
        rule = self.rule if self.mask is None else None
        known = RULES.likely(rule)
        try:
            known = known if rule is None else RULES.find(rule)
        except RecipeError as error:
            yield "rule", str(error)
        if known is not None and known.signed:
            plain = ", ".join(n for n, r in RULES.items() if not r.signed)
            yield "rule", f"{known.name} has a sign; use one of {plain}, or its mask as a file"
        if known is not None and known.needs and self.stats is None:
            needs = ", ".join(known.needs)
            yield "stats", (f"missing; the rule {known.name} needs {needs}, a file that `suture "
                            "localize` writes into its folder `stats`")  # fmt: skip

    @check
    def _a_rule_has_its_share(self) -> Faults:
        if self.mask is None and self.rule is not None and self.density is None:
            yield "density", "missing; the share of entries to protect"


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


__all__ = ["Protection", "protected"]
