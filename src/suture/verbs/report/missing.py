"""What a folder lacks to be whole: runs that stopped, models never asked, results never compared.

Everything is read out of the folder itself; whatever made it is not known here.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from suture.tensors.spec import listed
from suture.verbs.report.blocks import Section
from suture.verbs.report.collect import Found
from suture.verbs.report.unfinished import HERE, Unfinished

Step = tuple[str, str]
"""A sentence, and the command that it is about."""
MADE = {"finetune": "Fine-tuned models", "merge": "Merges", "realign": "Realigned models"}
"""Records of models that can be asked something, and what to call them."""
MOST = 12
"""Names in a sentence at most."""


def missing(found: Found) -> list[Section]:
    """The section that says what is missing and how to go on; none where nothing is."""
    steps = [
        *map(_stopped, found.unfinished),
        *_half_asked(found),
        *_half_measured(found),
        *_never_asked(found),
        *_never_compared(found),
    ]
    lead = (
        "What this folder would need to be whole, and how to go on. Commands are to be typed in "
        "the folder itself; words in capitals stand for names of your own."
    )
    return [Section("missing", "What is missing", lead, steps=tuple(steps))] if steps else []


def _stopped(one: Unfinished) -> Step:
    older = " An older one stands in its place." if one.older else ""
    return (
        f"Not finished: {one.where} (interrupted, or still running); the same command "
        f"{one.then}.{older}",
        one.command,
    )


def _half_asked(found: Found) -> Iterator[Step]:
    for where, result in found.suites:
        left = [name for name in result.expected if name not in result.evaluations]
        if left:
            yield (
                f"Not finished: {where}, {len(left)} of {len(result.expected)} evaluations are "
                f"missing ({listed(left, MOST)}); the same command goes on.",
                f"suture eval MODEL --suite SUITE.yaml -o {shlex.quote(where)}",
            )


def _half_measured(found: Found) -> Iterator[Step]:
    for where, raw in found.benchmarks:
        if raw.get("complete") is False:
            out = shlex.quote(where.rpartition("/")[0] or ".")
            yield (
                f"Not finished: {where}; the same command goes on.",
                f"suture bench RECIPE.yaml -o {out}",
            )


def _never_asked(found: Found) -> Iterator[Step]:
    """Models without a result; what went into another model of the folder counts by that one."""
    prints, names = _asked(found)
    used = _used(found)
    for kind, records in (
        ("finetune", found.tunings), ("merge", found.merges), ("realign", found.realignments),
    ):  # fmt: skip
        left = []
        for where, raw in records:
            folder = where.rpartition("/")[0]
            mark = _fingerprint(raw.get("output"))
            known = mark in prints or (folder.rpartition("/")[2] or found.name) in names
            if raw.get("kind", kind) == kind and not known and (mark is None or mark not in used):
                left.append(folder or HERE)
        if left:
            models = " ".join(shlex.quote("." if f == HERE else f) for f in left)
            yield (
                f"{MADE[kind]} that were never evaluated: {listed(left, MOST)}.",
                f"suture eval {models} --suite SUITE.yaml -o results",
            )


def _asked(found: Found) -> tuple[set[str], set[str]]:
    """Fingerprints and names of the models that some result is about."""
    prints = {result.fingerprint for _, result in found.suites}
    names = {result.model for _, result in found.suites}
    for _, raw in found.comparisons:
        names |= set(map(str, _mapping(raw.get("models"))))
    return prints, names


def _used(found: Found) -> set[str]:
    """Fingerprints of what other models of the folder were made of."""
    records = (*found.tunings, *found.merges, *found.realignments)
    return {
        mark
        for _, raw in records
        for entry in _mapping(raw.get("inputs")).values()
        if (mark := _fingerprint(entry)) is not None
    }


def _mapping(raw: Any) -> Mapping[str, Any]:
    return raw if isinstance(raw, Mapping) else {}


def _fingerprint(raw: Any) -> str | None:
    mark = _mapping(raw).get("fingerprint")
    return mark if isinstance(mark, str) else None


def _never_compared(found: Found) -> Iterator[Step]:
    """Results of one suite, of several models, that stand in no comparison of it."""
    suites: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for where, result in found.suites:
        key = (result.suite, result.suite_hash)
        suites.setdefault(key, []).append((where, result.model))
    for (suite, _), results in suites.items():
        known = {
            str(name)
            for _, raw in found.comparisons
            if raw.get("suite") == suite
            for name in _mapping(raw.get("models"))
        }
        left = [where for where, model in results if not known & _labels(where, model)]
        if left and len(results) > 1:
            yield (
                f"Results of the suite {suite} that were never compared: {listed(left, MOST)}.",
                "suture compare BASE.json EXPERT.json EDIT.json --gate GATE.yaml --json "
                "> comparison.json",
            )


def _labels(where: str, model: str) -> set[str]:
    """What a comparison may call a result: by its model, its file, its path."""
    file = where.rpartition("/")[2]
    return {model, file.removesuffix(".json"), where}


def summary(sections: Sequence[Section]) -> list[str]:
    """What stands at the head of a page of which something is missing."""
    count = sum(len(s.steps) for s in sections)
    if not count:
        return []
    things = "1 thing is" if count == 1 else f"{count} things are"
    return [f"This folder is not whole: {things} named under What is missing."]


__all__ = ["MADE", "missing", "summary"]
